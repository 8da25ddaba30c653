"""Preparation: the rows that come out, what is left out, and the errors that leave everything as it was."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from filelock import FileLock
from huggingface_hub import DatasetCard
from trees import LAYOUTS, write_tree

from diffusers_endora.data.corpora import load_corpus_builder, packing
from diffusers_endora.data.corpora import prepare as preparation
from diffusers_endora.data.corpora.corpus import CorpusFolder, Rejection
from diffusers_endora.data.corpora.packing import row_of_sample
from diffusers_endora.data.corpora.prepare import prepare_corpus
from diffusers_endora.data.transcode import encode_frames
from diffusers_endora.data.video_io import iterate_frames, read_frames, read_image, read_video_info

NUM_FRAMES = 8
# A video in each split, cut into clips of 2 and 3 frames
PHANTOM = {"num_videos": 3, "num_frames": 5, "height": 16, "width": 24, "seed": 7, "clip_length": 2}
FORMATS = ("parquet", "webdataset")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """`trees(corpus, layout)` is a raw folder that is not to be changed."""
    root = tmp_path_factory.mktemp("trees")

    def tree(corpus: str, layout: str) -> Path:
        folder = root / corpus / layout
        return folder if folder.exists() else write_tree(corpus, layout, folder, NUM_FRAMES)

    return tree


@pytest.fixture
def raw(tmp_path):
    """A small raw folder of one's own: twelve videos of Colonoscopic."""
    return write_tree("colonoscopic", "owners", tmp_path / "raw", NUM_FRAMES)


def content_of(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def plain(value):
    """A row without the differences that formats make: arrays as lists."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def rows_of(folder: Path, streaming: bool, cache_dir: Path) -> dict[str, list[dict]]:
    """The rows of all splits, as `load_dataset` gives them."""
    loaded = datasets.load_dataset(str(folder), streaming=streaming, cache_dir=str(cache_dir))
    is_webdataset = any((folder / "data").glob("*.tar"))
    return {
        split: [plain(row_of_sample(row) if is_webdataset else row) for row in rows] for split, rows in loaded.items()
    }


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpus", "layout"), [(c, layout) for c, of_corpus in LAYOUTS.items() for layout in of_corpus]
)
def test_both_formats_hold_the_rows_of_the_builder(corpus, layout, trees, tmp_path):
    raw = trees(corpus, layout)
    builder = load_corpus_builder(corpus, data_dir=raw, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    expected = {split: [plain(row) for row in rows] for split, rows in builder.as_dataset().items()}
    for file_format in FORMATS:
        prepared = prepare_corpus(corpus, raw, tmp_path / file_format, file_format=file_format)
        for streaming in (False, True):
            rows = rows_of(tmp_path / file_format, streaming, tmp_path / "cache")
            assert list(rows) == list(expected) == list(prepared.summary["splits"])
            for split in rows:
                for row, of_builder in zip(rows[split], expected[split], strict=True):
                    video, other = row.pop("video"), dict(of_builder)
                    source = other.pop("video")
                    assert row == other
                    assert video["bytes"] == source["bytes"] or video["bytes"] == Path(source["path"]).read_bytes()
                    assert read_video_info(video["bytes"]).num_frames == row["num_frames"] == NUM_FRAMES
        assert prepared.summary["rows"] == sum(map(len, expected.values()))
        assert prepared.summary["frames"] == NUM_FRAMES * prepared.summary["rows"]


def test_phantom(tmp_path):
    builder = load_corpus_builder("phantom", "clips", cache_dir=str(tmp_path / "cache"), quality="lossless", **PHANTOM)
    builder.download_and_prepare()
    expected = {split: [plain(row) for row in rows] for split, rows in builder.as_dataset().items()}
    assert list(expected) == ["train", "validation", "test"]
    for file_format in FORMATS:
        out = tmp_path / file_format
        prepare_corpus("phantom", None, out, "clips", file_format, quality="lossless", **PHANTOM)
        for streaming in (False, True):
            for split, rows in rows_of(out, streaming, tmp_path / "cache").items():
                for row, of_builder in zip(rows, expected[split], strict=True):
                    assert np.shape(row["depth"]) == (2 if row["start_frame"] == 0 else 3, 16, 24)
                    video, other = row.pop("video"), dict(of_builder)
                    assert video["bytes"] == other.pop("video")["bytes"]
                    assert row == other


def test_transcoded_clips(raw, tmp_path):
    prepared = prepare_corpus("colonoscopic", raw, tmp_path / "out", "clips", short_side=24, clip_length=3)
    rows = rows_of(tmp_path / "out", True, tmp_path)["train"]
    assert prepared.summary["videos"] == 12
    assert prepared.summary["rows"] == 24  # 8 frames: 3 and the remainder, 5
    assert [(row["start_frame"], row["num_frames"]) for row in rows[:2]] == [(0, 3), (3, 5)]
    source = read_frames(raw / rows[0]["source"], range(NUM_FRAMES)).reshape(NUM_FRAMES, 24, 2, 32, 2, 3).mean((2, 4))
    clips = [read_frames(row["video"]["bytes"], range(row["num_frames"])) for row in rows[:2]]
    for i, frame in enumerate(np.concatenate(clips)):
        assert frame.shape == (24, 32, 3)
        assert np.abs(source - frame).mean((1, 2, 3)).argmin() == i


def test_options_of_a_corpus(trees, tmp_path):
    splits = {}
    for fold in (1, 2):
        out = tmp_path / f"fold_{fold}"
        prepare_corpus("cholectriplet", trees("cholectriplet", "cholect45"), out, fold=fold)
        rows = rows_of(out, True, tmp_path)
        splits[fold] = {row["video_id"] for row in rows["test"]}
    assert splits == {1: {"VID02", "VID79"}, 2: {"VID80"}}


def test_names_that_tar_and_webdataset_read_their_own_way(tmp_path):
    raw = tmp_path / "raw"
    # A dot ends a sample's name; the three names must not become one, and the last is longer than tar's own field
    names = ["a.b", "a%2Eb", "a_b", "né 漢字", "n" * 180]
    for i, name in enumerate(names):
        label = "abnormal" if i % 2 else "normal"
        source = write_tree("polypdiag", "owners", tmp_path / "tree", 6 + i)
        path = raw / "indexed" / f"train_set_{label}" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(source.rglob("*.mp4")), path)
    for file_format in FORMATS:
        prepare_corpus("polypdiag", raw, tmp_path / file_format, file_format=file_format)
    parquet, webdataset = (rows_of(tmp_path / f, False, tmp_path)["train"] for f in FORMATS)
    assert len(parquet) == len(names)
    assert {row["source"].rsplit("/", 1)[1] for row in parquet} == {f"{name}.mp4" for name in names}
    for row, sample in zip(parquet, webdataset, strict=True):
        assert row.pop("video")["bytes"] == sample.pop("video")["bytes"]
        assert row == sample


# --- shards ----------------------------------------------------------------------------------------------------------


def test_the_number_of_processes_changes_nothing(raw, tmp_path):
    for num_proc in (1, 2, 5):
        prepare_corpus("colonoscopic", raw, tmp_path / f"{num_proc}", num_proc=num_proc, short_side=24)
    assert content_of(tmp_path / "1") == content_of(tmp_path / "2") == content_of(tmp_path / "5")


@pytest.mark.parametrize("file_format", FORMATS)
def test_shards_of_a_limited_size(file_format, raw, tmp_path):
    size = max(path.stat().st_size for path in raw.rglob("*.mp4"))
    prepare_corpus("colonoscopic", raw, tmp_path / "out", file_format=file_format, max_shard_bytes=2 * size)
    paths = sorted((tmp_path / "out" / "data").iterdir())
    extension, num_shards = packing.EXTENSIONS[file_format], len(paths) // 2
    assert 2 <= num_shards <= 3  # of six videos
    assert [path.name for path in paths] == [
        f"{split}-{i:05d}-of-{num_shards:05d}{extension}" for split in ("test", "train") for i in range(num_shards)
    ]
    rows = rows_of(tmp_path / "out", False, tmp_path)
    assert [len(rows[split]) for split in ("train", "test")] == [6, 6]
    assert len({row["video_id"] for split in rows for row in rows[split]}) == 12


def test_row_groups_are_small(raw, tmp_path, monkeypatch):
    sizes = [path.stat().st_size for path in raw.rglob("*.mp4")]
    monkeypatch.setattr(packing, "_ROW_GROUP_BYTES", 2 * max(sizes))
    prepare_corpus("colonoscopic", raw, tmp_path / "out")
    for path in (tmp_path / "out" / "data").iterdir():
        metadata = pyarrow.parquet.ParquetFile(path).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        assert len(groups) >= 2
        assert all(group.num_rows == 1 or group.total_byte_size < 2.5 * max(sizes) for group in groups)
        assert sum(group.num_rows for group in groups) == 6


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_says_what_is_in_the_folder(raw, tmp_path):
    (raw / "notes.txt").write_text("x")
    prepare_corpus("colonoscopic", raw, tmp_path / "out", short_side=24)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    metadata = card.data.to_dict()
    assert metadata["configs"] == [
        {
            "config_name": "videos",
            "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in ("train", "test")],
            "default": True,
        }
    ]
    assert [(s["name"], s["num_examples"]) for s in metadata["dataset_info"]["splits"]] == [("train", 6), ("test", 6)]
    assert metadata["size_categories"] == ["n<1K"]
    assert "as config `videos` (short_side 24, quality visually_lossless)" in card.text
    assert "| train | 6 | 6 | 48 | 0.0 |" in card.text
    assert "| serrated | 2 | 2 |" in card.text
    assert "rejected.jsonl`: 1." in card.text
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert str(tmp_path) not in json.dumps(record) + card.content  # no path of this machine
    assert [json.loads(line)["source"] for line in (tmp_path / "out" / "rejected.jsonl").open()] == ["notes.txt"]


# --- what is left out ------------------------------------------------------------------------------------------------


def test_unreadable_videos_are_left_out_with_their_reasons(raw, tmp_path):
    videos = sorted(raw.rglob("*.mp4"))
    videos[0].write_bytes(b"")
    videos[1].write_bytes(videos[1].read_bytes()[:200])
    videos[2].unlink()
    videos[2].symlink_to("nowhere.mp4")
    for folder, options in (("copied", {}), ("transcoded", {"short_side": 24})):
        prepared = prepare_corpus("colonoscopic", raw, tmp_path / folder, **options)
        left_out = {rejection.source: rejection.reason for rejection in prepared.rejected}
        assert set(left_out) == {video.relative_to(raw).as_posix() for video in videos[:3]}
        for reason in left_out.values():
            assert str(tmp_path) not in reason
            assert reason
        assert prepared.summary["videos"] == 9
        lines = (tmp_path / folder / "rejected.jsonl").read_text().splitlines()
        assert [Rejection(**json.loads(line)) for line in lines] == prepared.rejected


def test_damage_that_shows_in_decoding_leaves_out_the_whole_video(raw, tmp_path):
    video = next(raw.rglob("*.mp4"))
    data = bytearray(video.read_bytes())
    middle = data.index(b"mdat") + 1200
    data[middle : middle + 300] = bytes(300)
    video.write_bytes(data)
    prepared = prepare_corpus("colonoscopic", raw, tmp_path / "out", "clips", clip_length=2)
    assert [rejection.source for rejection in prepared.rejected] == [video.relative_to(raw).as_posix()]
    assert re.search("damaged|can be decoded", prepared.rejected[0].reason)
    assert prepared.summary["videos"] == 11
    assert prepared.summary["rows"] == 44


def test_a_video_too_large_for_a_row(raw, tmp_path, monkeypatch):
    sizes = sorted(path.stat().st_size for path in raw.rglob("*.mp4"))
    monkeypatch.setattr(preparation, "MAX_VIDEO_BYTES", sizes[-2])
    prepared = prepare_corpus("colonoscopic", raw, tmp_path / "out")
    assert prepared.summary["videos"] == 11
    assert "--config clips" in prepared.rejected[0].reason


def test_nothing_is_usable(raw, tmp_path):
    for video in raw.rglob("*.mp4"):
        video.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no video is usable, such as .*: cannot be read as a video"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


# --- again -----------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_made_again(raw, tmp_path, monkeypatch):
    (raw / "notes.txt").write_text("x")
    first = prepare_corpus("colonoscopic", raw, tmp_path / "out")
    content = content_of(tmp_path / "out")
    monkeypatch.setattr(preparation, "make_unit", None)
    again = prepare_corpus("colonoscopic", raw, tmp_path / "out")
    assert again.took is None
    assert first.took > 0
    assert again.summary == first.summary
    assert again.rejected == first.rejected
    assert content_of(tmp_path / "out") == content


def test_other_options_and_other_files_are_said(raw, tmp_path):
    prepare_corpus("colonoscopic", raw, tmp_path / "out")
    content = content_of(tmp_path / "out")
    with pytest.raises(ValueError, match=r"was prepared with short_side None and not 24; choose another folder"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out", short_side=24)
    with pytest.raises(ValueError, match=r"was prepared with corpus colonoscopic and not phantom"):
        prepare_corpus("phantom", None, tmp_path / "out")
    with pytest.raises(ValueError, match=r"was prepared with format parquet and not webdataset"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out", file_format="webdataset")
    os.utime(next(raw.rglob("*.mp4")), (1, 1))
    with pytest.raises(ValueError, match=r"was prepared from other files, or the raw folder has changed since"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out")
    assert content_of(tmp_path / "out") == content


def test_rejected_videos_are_tried_again(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "MAX_VIDEO_BYTES", 1)
    interrupt_packing(monkeypatch, "colonoscopic", raw, tmp_path / "out")
    monkeypatch.undo()
    assert prepare_corpus("colonoscopic", raw, tmp_path / "out").rejected == []


def interrupt_packing(monkeypatch, corpus: str, raw: Path, output: Path, **options) -> None:
    """Prepares until all units are there."""
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_shards", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(corpus, raw, output, **options)


def test_a_source_that_vanishes_or_changes_before_it_goes_on(raw, tmp_path, monkeypatch):
    videos = sorted(raw.rglob("*.mp4"))
    out = tmp_path / "out"
    interrupt_packing(monkeypatch, "colonoscopic", raw, out, short_side=24)
    videos[0].unlink()
    shutil.copy(videos[4], videos[1])  # of the same split
    prepare_corpus("colonoscopic", raw, out, short_side=24)
    prepare_corpus("colonoscopic", raw, tmp_path / "at_once", short_side=24)
    assert content_of(out) == content_of(tmp_path / "at_once")
    assert json.loads((out / "prepared.json").read_text())["summary"]["videos"] == 11


def test_units_that_are_not_whole_are_made_again(raw, tmp_path, monkeypatch):
    interrupt_packing(monkeypatch, "colonoscopic", raw, tmp_path / "out", short_side=24)
    units = sorted((tmp_path / "out.incomplete" / "units").iterdir())
    (units[0] / "unit.json").unlink()
    (units[1] / "unit.json").write_text('{"rows": [')
    (units[2].with_name(f".{units[2].name}")).mkdir()
    (units[3].with_name("of_other_options")).mkdir()
    prepare_corpus("colonoscopic", raw, tmp_path / "out", short_side=24)
    prepare_corpus("colonoscopic", raw, tmp_path / "at_once", short_side=24)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "at_once")


def do_after_rows_of(video, action, monkeypatch):
    """Lets `action` happen as soon as the rows of a video are written."""
    builder = preparation.corpus_class("colonoscopic")
    write_rows = builder.write_rows.__func__

    def write_and_act(cls, of, *arguments):
        rows = write_rows(cls, of, *arguments)
        if of.path == video:
            action()
        return rows

    monkeypatch.setattr(builder, "write_rows", classmethod(write_and_act))


def test_a_source_that_vanishes_while_it_is_read(raw, tmp_path, monkeypatch):
    video = sorted(raw.rglob("*.mp4"))[3]
    do_after_rows_of(video, video.unlink, monkeypatch)
    with pytest.raises(ValueError, match=rf"{video.name}: has changed since the preparation began; run it again"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out")


def test_a_source_that_changes_meanwhile(raw, tmp_path, monkeypatch):
    video = sorted(raw.rglob("*.mp4"))[3]
    write_shards = preparation.write_shards

    def change_and_write(*arguments):
        with video.open("ab") as file:
            file.write(b"more")
        return write_shards(*arguments)

    monkeypatch.setattr(preparation, "write_shards", change_and_write)
    with pytest.raises(ValueError, match=rf"{video.name}: has changed since the preparation began; run it again"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    prepare_corpus("colonoscopic", raw, tmp_path / "out")
    prepare_corpus("colonoscopic", raw, tmp_path / "at_once")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "at_once")


def test_a_source_that_changes_while_it_is_encoded(raw, tmp_path, monkeypatch):
    video = sorted(raw.rglob("*.mp4"))[3]
    do_after_rows_of(video, lambda: os.utime(video, (1, 1)), monkeypatch)
    with pytest.raises(ValueError, match="has changed since"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out", short_side=24)
    assert not (tmp_path / "out").exists()


# --- places ----------------------------------------------------------------------------------------------------------


def test_places_that_are_taken(raw, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file: is a file; expected a folder"):
        prepare_corpus("colonoscopic", raw, tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="mine: is not empty and holds no prepared corpus; choose another folder"):
        prepare_corpus("colonoscopic", raw, tmp_path / "mine")
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"out\.incomplete: is not what an interrupted preparation leaves"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out")
    with pytest.raises(ValueError, match="lies in the raw folder"):
        prepare_corpus("colonoscopic", raw, raw / "prepared")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert (tmp_path / "out.incomplete" / "thesis.txt").exists()
    assert not (raw / "prepared").exists()


def test_an_empty_folder_and_a_missing_parent(raw, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    prepare_corpus("colonoscopic", raw, tmp_path / "link")
    assert (tmp_path / "empty" / "README.md").exists()
    monkeypatch.chdir(tmp_path)
    prepare_corpus("colonoscopic", "raw", "not/yet/there")
    assert content_of(tmp_path / "not" / "yet" / "there") == content_of(tmp_path / "empty")
    assert not list(tmp_path.rglob("*.incomplete"))


def test_bad_arguments(raw, tmp_path):
    for arguments, message in [
        ({"config_name": "frames"}, "config 'frames': colonoscopic has videos, clips"),
        ({"file_format": "zip"}, "format 'zip': expected one of parquet, webdataset"),
        ({"num_proc": 0}, "num_proc=0: expected a positive integer"),
        ({"short_side": 0}, "short_side=0: expected a positive integer"),
        ({"fold": 2}, "fold: is no option here"),
        ({"clip_length": 16}, "config 'videos' has no clips"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            prepare_corpus("colonoscopic", raw, tmp_path / "out", **arguments)
    with pytest.raises(ValueError, match="colonoscopy: is no corpus"):
        prepare_corpus("colonoscopy", raw, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_quality_where_nothing_is_encoded(raw, trees, tmp_path):
    message = "quality='lossless': nothing is encoded without short_side (--transcode) or config clips; leave it out."
    for corpus, folder in [("colonoscopic", raw), ("cholectriplet", trees("cholectriplet", "endo_fm"))]:
        with pytest.raises(ValueError, match=re.escape(message)):
            prepare_corpus(corpus, folder, tmp_path / "out", quality="lossless")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    frames = trees("cholectriplet", "cholect50")
    prepare_corpus("cholectriplet", frames, tmp_path / "lossless", quality="lossless")
    (row, *_) = rows_of(tmp_path / "lossless", True, tmp_path)["train"]
    first = sorted((frames / row["source"]).iterdir())[0]
    np.testing.assert_array_equal(read_frames(row["video"]["bytes"], [0])[0], read_image(first))
    prepare_corpus("colonoscopic", raw, tmp_path / "clips", "clips", quality="lossless")
    prepare_corpus("colonoscopic", raw, tmp_path / "small", quality="lossless", short_side=24)


def test_two_at_once(raw, tmp_path):
    work = tmp_path / "out.incomplete"
    work.mkdir()
    with FileLock(work / "lock"), pytest.raises(ValueError, match="out: another process is preparing it"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out")
    results = []

    def run():
        try:
            results.append(prepare_corpus("colonoscopic", raw, tmp_path / "out", short_side=24))
        except ValueError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [result for result in results if isinstance(result, preparation.Prepared)]
    assert made
    assert sum(result.took is not None for result in made) == 1
    assert all("another process is preparing it" in str(result) for result in results if result not in made)
    prepare_corpus("colonoscopic", raw, tmp_path / "alone", short_side=24)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "alone")
    assert not work.exists()


@contextmanager
def files_of_at_most(num_bytes: int):
    """A disk that is full, for this process' next file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failure_stops_what_is_being_encoded(raw, tmp_path, monkeypatch):
    builder = preparation.corpus_class("colonoscopic")
    patience = 20  # seconds that the video lasts which nobody waits for
    is_encoding, ended_by_itself = threading.Event(), threading.Event()

    def endless(source):
        frame = next(iterate_frames(source))
        start = time.perf_counter()
        while time.perf_counter() < start + patience:
            is_encoding.set()
            frame.pts += frame.duration
            yield frame
        ended_by_itself.set()

    def write_rows(cls, video, folder, config):
        if video is first[0]:
            encode_frames(folder / "0.mp4", endless(video.path))
        is_encoding.wait()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first = builder.read_folder(raw, builder.BUILDER_CONFIGS[0]).videos
    monkeypatch.setattr(builder, "read_folder", lambda *_: CorpusFolder("a tree", first))
    monkeypatch.setattr(builder, "write_rows", classmethod(write_rows))
    with pytest.raises(OSError, match="No space left on device"):
        prepare_corpus("colonoscopic", raw, tmp_path / "out", num_proc=2)
    assert not ended_by_itself.is_set()
    assert not any((tmp_path / "out.incomplete" / "units").iterdir())


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("where", ["encoding", "packing"])
def test_a_file_that_does_not_fit(where, file_format, raw, tmp_path):
    at_once, out = tmp_path / "at_once", tmp_path / "out"
    options = {"file_format": file_format, "short_side": 24}
    prepare_corpus("colonoscopic", raw, at_once, **options)
    limit = 2000 if where == "encoding" else max(p.stat().st_size for p in (at_once / "data").iterdir()) - 1
    with files_of_at_most(limit), pytest.raises(OSError, match=r"File too large; what is done is kept in .*"):
        prepare_corpus("colonoscopic", raw, out, **options)
    assert not out.exists()
    assert not list((tmp_path / "out.incomplete" / "units").glob(".*"))
    assert len(list((tmp_path / "out.incomplete" / "units").iterdir())) == (0 if where == "encoding" else 12)
    prepare_corpus("colonoscopic", raw, out, **options)
    assert content_of(out) == content_of(at_once)


@pytest.fixture
def mounted(tmp_path):
    """`mounted(options)` mounts a file system in memory and returns its folder."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if result.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {result.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(raw, tmp_path, mounted):
    prepare_corpus("colonoscopic", raw, tmp_path / "at_once", short_side=24)
    disk = mounted("size=64k")
    with pytest.raises(OSError, match="No space left on device; what is done is kept in"):
        prepare_corpus("colonoscopic", raw, disk / "out", short_side=24)
    assert not (disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    prepare_corpus("colonoscopic", raw, disk / "out", short_side=24)
    assert content_of(disk / "out") == content_of(tmp_path / "at_once")


def test_a_disk_that_is_read_only(raw, mounted):
    disk = mounted("ro")
    with pytest.raises(OSError, match="Read-only file system"):
        prepare_corpus("colonoscopic", raw, disk / "out")


def test_a_mount_point_is_no_target(raw, mounted):
    with pytest.raises(ValueError, match="is a mount point, which cannot be replaced; choose a folder in it"):
        prepare_corpus("colonoscopic", raw, mounted("size=1m"))
