from dataclasses import replace

import datasets
import numpy as np
import pytest

from diffusers_endora.data.corpora import load_corpus_builder
from diffusers_endora.data.corpora.corpus import CorpusError
from diffusers_endora.data.corpora.phantom import Phantom
from diffusers_endora.data.phantom import CLASSES, render_phantom_clip
from diffusers_endora.data.video_io import read_frames

datasets.disable_progress_bars()

SMALL = {"num_videos": 3, "num_frames": 5, "height": 16, "width": 24, "seed": 7}  # one of each split


def found(**options):
    return Phantom.read_folder(None, replace(Phantom.BUILDER_CONFIGS[0], **options))


def test_a_seed_is_one_video_of_one_class_in_one_split():
    videos = {video.source: video for video in found(num_videos=60, seed=0).videos}
    assert len(videos) == len({video.video_id for video in videos.values()}) == 60
    splits = [video.split for video in videos.values()]
    assert splits[:10] == ["train"] * 8 + ["validation", "test"]
    assert splits == splits[:10] * 6
    for split in ("train", "validation", "test"):
        assert {video.labels["label"] for video in videos.values() if video.split == split} == set(CLASSES)
    # Other options that have a seed in common have the same video there, in the same split
    for video in found(num_videos=10, seed=13, num_frames=5).videos:
        assert videos[video.source] == video


@pytest.mark.parametrize("config", [pytest.param("videos", marks=pytest.mark.slow), "clips"])
def test_rows_have_the_truth_of_their_frames(config, tmp_path):
    options = SMALL | ({"clip_length": 2} if config == "clips" else {})
    builder = load_corpus_builder("phantom", config, cache_dir=tmp_path, quality="lossless", **options)
    builder.download_and_prepare()
    rows = builder.as_dataset()
    streamed = builder.as_streaming_dataset()
    parquet = load_corpus_builder("phantom", config, cache_dir=tmp_path, quality="lossless", **options)
    parquet.download_and_prepare(tmp_path / "parquet", file_format="parquet")
    assert list(rows) == ["train", "validation", "test"]
    for seed, split in ((7, "train"), (8, "validation"), (9, "test")):
        label = CLASSES[seed % 3]
        clip = render_phantom_clip(seed, 5, 16, 24, polyp=label == "polyp", instrument=label == "instrument")
        parts = [(0, 2), (2, 5)] if config == "clips" else [(0, 5)]
        files = {"train": str(tmp_path / "parquet" / f"*-{split}*.parquet")}
        loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
        assert loaded.features == rows[split].features
        tables = [
            rows[split].with_format("numpy"),
            list(streamed[split]),
            loaded.with_format("numpy"),
        ]
        for table in tables:
            for row, (start, stop) in zip(table, parts, strict=True):
                assert (row["video_id"], row["split"], row["source"]) == (f"{label}_{seed:06d}", split, f"seed {seed}")
                assert row["label"] == CLASSES.index(label)
                assert (row["start_frame"], row["num_frames"], row["fps"]) == (start, stop - start, 8)
                for name in ("depth", "camera_to_world"):
                    array = np.asarray(row[name], dtype=np.float32)
                    np.testing.assert_array_equal(array, getattr(clip, name)[start:stop])
                np.testing.assert_array_equal(np.asarray(row["intrinsics"], dtype=np.float32), clip.intrinsics[0])
                for name in ("polyp_visible", "instrument_visible"):
                    assert list(row[name]) == getattr(clip, name)[start:stop].tolist()
                frames = read_frames(row["video"]["bytes"], np.arange(stop - start))
                np.testing.assert_array_equal(frames, clip.frames[start:stop])


def test_it_takes_no_folder(tmp_path):
    with pytest.raises(CorpusError, match="the phantom is rendered and takes no folder"):
        Phantom.read_folder(tmp_path, Phantom.BUILDER_CONFIGS[0])
