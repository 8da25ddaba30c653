"""What is taken from a source: every video, the stated frames, an identity that follows the content."""

import os

import numpy as np
import pytest

from diffusers_endora.data.video_io import write_video
from diffusers_endora.metrics.clip_sources import (
    Clip,
    ParquetRow,
    clips_at_fixed_offsets,
    num_overlapping,
    one_clip_per_video,
    open_videos,
    whole_clips,
)


def moving(seed: int, num_frames: int = 20, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, size, size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """The same four clips as ffv1, as folders of png, as one npy and as single npy files."""
    clips = [moving(seed) for seed in range(4)]
    for name in ("ffv1", "png", "npy", "npys"):
        (tmp_path / name).mkdir()
    for i, clip in enumerate(clips):
        write_video(tmp_path / "ffv1" / f"clip_{i}.mkv", clip, 8, codec="ffv1")
        write_video(tmp_path / "png" / f"clip_{i}", clip, 8, codec="png")
        np.save(tmp_path / "npys" / f"clip_{i}.npy", clip)
    np.save(tmp_path / "npy" / "clips.npy", np.stack(clips))
    return tmp_path


@pytest.mark.parametrize("name", ["ffv1", "png", "npy", "npys"])
def test_every_lossless_form_reads_the_same(folder, name):
    videos = open_videos(folder / name)
    assert [(video.num_frames, video.height, video.width) for video in videos] == [(20, 16, 16)] * 4
    for i, clip in enumerate(whole_clips(videos, 16)):
        np.testing.assert_array_equal(clip.read(), moving(i)[:16])
    assert len({clip.key for clip in whole_clips(videos, 16)}) == 4


def test_identity_is_content_and_frames(folder):
    video = open_videos(folder / "ffv1" / "clip_0.mkv")[0]
    (folder / "copy.mkv").write_bytes((folder / "ffv1" / "clip_0.mkv").read_bytes())
    assert open_videos(folder / "copy.mkv")[0].content_hash == video.content_hash
    assert Clip(video, (0, 1)).key != Clip(video, (0, 2)).key
    path = folder / "ffv1" / "clip_0.mkv"
    write_video(path, moving(9), 8, codec="ffv1")
    assert open_videos(path)[0].content_hash != video.content_hash


def test_contact_sheet_beside_folders_of_frames_is_no_clip(folder):
    write_video(folder / "sheet", moving(0)[:1], 8, codec="png")
    (folder / "sheet" / "000000.png").rename(folder / "png" / "contact_sheet.png")
    assert len(open_videos(folder / "png")) == 4


def test_parquet_rows(folder):
    datasets = pytest.importorskip("datasets")
    rows = [{"path": None, "bytes": path.read_bytes()} for path in sorted((folder / "ffv1").iterdir())]
    dataset = datasets.Dataset.from_dict(
        {"video": rows}, features=datasets.Features({"video": datasets.Video(decode=False)})
    )
    (folder / "corpus").mkdir()
    (folder / "small").mkdir()
    dataset.to_parquet(folder / "corpus" / "train-00000-of-00001.parquet")
    videos = open_videos(folder / "corpus")
    np.testing.assert_array_equal(Clip(videos[2], (3, 4)).read(), moving(2)[3:5])
    dataset.to_parquet(folder / "small" / "a.parquet", batch_size=1)  # a row group per video
    small = open_videos(folder / "small")
    np.testing.assert_array_equal(Clip(small[2], (3, 4)).read(), moving(2)[3:5])
    assert [video.content_hash for video in small] == [video.content_hash for video in videos]


def test_a_rewritten_parquet_file_is_read_again(folder):
    datasets = pytest.importorskip("datasets")
    files = sorted((folder / "ffv1").iterdir())[:2]
    path = folder / "corpus.parquet"
    read = []
    for file in files:
        datasets.Dataset.from_list([{"video": {"path": None, "bytes": file.read_bytes()}}]).to_parquet(path)
        os.utime(path, ns=(0, len(read)))
        read.append(ParquetRow(path, 0, 0).read())
    assert read == [file.read_bytes() for file in files]


def test_parquet_without_videos(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"image": [b"0"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: has no readable column 'video' \(it has none\)"):
        open_videos(tmp_path)
    parquet.write_table(pyarrow.table({"video": [3]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet\[0\]: expected .*, got int"):
        open_videos(tmp_path)
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: has no readable column 'video'"):
        open_videos(tmp_path)


def test_floats_are_rounded_and_checked(tmp_path):
    np.save(tmp_path / "a.npy", moving(0) / 255.0)
    np.testing.assert_array_equal(whole_clips(open_videos(tmp_path), 16)[0].read(), moving(0)[:16])
    for bad, message in ((np.nan, "not finite"), (1.5, r"floats from 0 to 1.5"), (-1.0, "floats from -1 to")):
        clip = np.zeros((16, 8, 8, 3), np.float32)
        clip[3, 2, 1, 0] = bad
        with pytest.raises(ValueError, match=message):
            whole_clips(open_videos(clip), 16)[0].read()


def test_fewer_clips_than_videos_come_from_all_over_the_corpus():
    videos = open_videos(np.zeros((9, 16, 4, 4, 3), np.uint8))
    clips = clips_at_fixed_offsets(videos, 3, 16, 16)
    assert [videos.index(clip.video) for clip in clips] == [0, 4, 8]


def test_parquet_rows_of_plain_bytes(folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    files = sorted((folder / "ffv1").iterdir())
    parquet.write_table(pyarrow.table({"video": [path.read_bytes() for path in files]}), tmp_path / "a.parquet")
    np.testing.assert_array_equal(Clip(open_videos(tmp_path / "a.parquet")[2], (3, 4)).read(), moving(2)[3:5])


def test_fixed_offsets_are_even_and_overlap_only_when_needed():
    videos = open_videos(np.zeros((2, 100, 4, 4, 3), np.uint8)) + open_videos(np.zeros((1, 30, 4, 4, 3), np.uint8))
    clips = clips_at_fixed_offsets(videos, 4, 16, 48)
    assert [(videos.index(clip.video), clip.indices[0], clip.indices[-1]) for clip in clips] == [
        (0, 0, 47),
        (0, 52, 99),
        (1, 0, 47),
        (1, 52, 99),
    ]
    assert num_overlapping(clips) == 0
    clips = clips_at_fixed_offsets(videos, 7, 16, 48)
    assert len(clips) == 7
    assert num_overlapping(clips) > 0
    assert len(clips_at_fixed_offsets(videos, 10**6, 16, 48)) == 2 * 53  # all there are, each once
    assert len({clip.key for clip in clips_at_fixed_offsets(videos[:1], 10**6, 16, 48)}) == 53


def test_quotas_differ_by_one_at_most():
    videos = open_videos(np.zeros((7, 64, 4, 4, 3), np.uint8))
    for num_clips in range(1, 29):
        clips = clips_at_fixed_offsets(videos, num_clips, 16, 16)
        counts = [sum(clip.video is video for clip in clips) for video in videos]
        assert sum(counts) == num_clips
        assert max(counts) - min(counts) <= 1


def test_one_clip_per_video_is_consecutive_and_seeded():
    videos = open_videos(np.zeros((5, 40, 4, 4, 3), np.uint8))
    clips = one_clip_per_video(videos, 16, seed=3)
    assert [clip.video for clip in clips] == videos
    assert all(np.diff(clip.indices).tolist() == [1] * 15 for clip in clips)
    assert [clip.indices for clip in clips] == [clip.indices for clip in one_clip_per_video(videos, 16, seed=3)]
    assert [clip.indices for clip in clips] != [clip.indices for clip in one_clip_per_video(videos, 16, seed=4)]


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="there is nothing there"):
        open_videos(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no clips; expected videos"):
        open_videos(tmp_path)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text.mp4: cannot be read as a video"):
        open_videos(tmp_path)
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(ValueError, match=r"text.npy: cannot be read as an array"):
        open_videos(tmp_path / "text.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects.npy: cannot be read as an array"):
        open_videos(tmp_path / "objects.npy")
    with pytest.raises(ValueError, match=r"expected clips \(N, F, H, W, 3\)"):
        open_videos(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="an empty list"):
        open_videos([])


def test_generated_clips_must_have_one_size_and_enough_frames():
    videos = open_videos([np.zeros((16, 8, 8, 3), np.uint8), np.zeros((16, 8, 9, 3), np.uint8)])
    with pytest.raises(ValueError, match="is 9x8 pixels, but clip 0 is 8x8; generated clips must have one size"):
        whole_clips(videos, 16)
    with pytest.raises(ValueError, match="has 16 frames; clips of 17 frames"):
        whole_clips(videos, 17)
