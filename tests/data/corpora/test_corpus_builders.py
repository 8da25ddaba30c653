import hashlib
import logging
import os
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
from trees import LAYOUTS, pictures, read_tree, video_bytes, write, write_tree

from diffusers_endora.data.corpora import CORPORA, corpus_class, load_corpus, load_corpus_builder
from diffusers_endora.data.corpora import corpus as corpus_module
from diffusers_endora.data.corpora.cholectriplet import PROTOCOLS
from diffusers_endora.data.corpora.corpus import (
    CorpusError,
    Rejection,
    SourceVideo,
    changed_config,
    other_files,
    printable,
    read_json,
    read_table,
    walk,
    windows,
)
from diffusers_endora.data.video_io import VideoError, read_frames

datasets.disable_progress_bars()

EVERY_LAYOUT = [(corpus, layout) for corpus, layouts in LAYOUTS.items() for layout in layouts]
every_layout = pytest.mark.parametrize(("corpus", "layout"), EVERY_LAYOUT)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Returns `(corpus, layout) -> raw folder`, for tests that do not change it."""
    root = tmp_path_factory.mktemp("trees")
    made = {(corpus, layout): write_tree(corpus, layout, root / corpus / layout) for corpus, layout in EVERY_LAYOUT}
    return lambda corpus, layout: made[corpus, layout]


def content(row):
    """A row with the bytes of its video in place of where they are."""
    video = row["video"]
    data = video["bytes"] if video["bytes"] is not None else Path(video["path"]).read_bytes()
    return row | {"video": hashlib.sha256(data).hexdigest()}


# --- through datasets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["videos", "clips"])
@every_layout
def test_rows_are_the_same_on_disk_streamed_and_in_parquet(corpus, layout, config, trees, tmp_path):
    options = {"data_dir": trees(corpus, layout), "cache_dir": tmp_path / "cache"}
    if config == "clips":
        options["clip_length"] = 8
    builder = load_corpus_builder(corpus, config, **options)
    builder.download_and_prepare()
    on_disk = builder.as_dataset()
    streamed = builder.as_streaming_dataset()
    parquet = tmp_path / "parquet"
    load_corpus_builder(corpus, config, **options).download_and_prepare(parquet, file_format="parquet")
    files = {split: str(parquet / f"*-{split}*.parquet") for split in on_disk}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    assert list(streamed) == list(on_disk) == list(loaded)
    for split, rows in on_disk.items():
        assert rows.features == loaded[split].features == builder.features(builder.config)
        assert rows.features["video"] == datasets.Video(decode=False)
        expected = [content(row) for row in rows]
        assert [content(row) for row in streamed[split]] == expected
        assert [content(row) for row in loaded[split]] == expected
        assert all(row["split"] == split for row in rows)
        assert all(row["video"]["bytes"] for row in loaded[split])  # the files are inside
        parts = [(row["start_frame"], row["num_frames"]) for row in rows]
        one_video = [(0, 8), (8, 12)] if config == "clips" else [(0, 20)]
        assert parts == one_video * (len(rows) // len(one_video))
    found = read_tree(corpus, trees(corpus, layout))
    ids = [row["video_id"] for rows in on_disk.values() for row in rows if row["start_frame"] == 0]
    assert sorted(ids) == sorted(video.video_id for video in found.videos)


@pytest.mark.parametrize("corpus", CORPORA)
def test_columns_of_a_row_are_in_the_order_of_the_features(corpus, tmp_path):
    # A table of rows is cast to the schema of the features, and columns in another order are an error there
    options = {"num_frames": 2, "height": 16, "width": 16} if corpus == "phantom" else {}
    builder = corpus_class(corpus)
    config = changed_config(builder.BUILDER_CONFIGS[0], options)
    layouts = LAYOUTS.get(corpus, (None,))
    for layout in layouts:
        root = None if layout is None else write_tree(corpus, layout, tmp_path / layout)
        video = builder.read_folder(root, config).videos[0]
        row = builder.write_rows(video, tmp_path, config)[0]
        key, complete = builder.complete_row(video, row, tmp_path)
        assert list(complete) == list(builder.features(config))
        table = datasets.Dataset.from_list([complete], features=builder.features(config)).data.table
        assert table.cast(builder.features(config).arrow_schema).num_rows == 1
        assert key == video.video_id


def test_clips_are_the_frames_of_the_video(trees, tmp_path):
    builder = load_corpus_builder(
        "colonoscopic",
        "clips",
        data_dir=trees("colonoscopic", "owners"),
        cache_dir=tmp_path,
        clip_length=6,
        quality="lossless",
    )
    rows = [row for row in builder.as_streaming_dataset("test") if row["video_id"] == "adenoma_40_nbi"]
    original = trees("colonoscopic", "owners") / rows[0]["source"]
    assert [(row["start_frame"], row["num_frames"]) for row in rows] == [(0, 6), (6, 6), (12, 8)]
    for row in rows:
        indices = np.arange(row["num_frames"])
        frames = read_frames(row["video"]["bytes"], indices)
        np.testing.assert_array_equal(frames, read_frames(original, row["start_frame"] + indices))
        assert row["fps"] == 25


def test_short_side_scales_the_rows(trees, tmp_path):
    folder = trees("colonoscopic", "owners")
    builder = load_corpus_builder("colonoscopic", data_dir=folder, cache_dir=tmp_path, short_side=24)
    for row in builder.as_streaming_dataset("train"):
        assert (row["height"], row["width"], row["num_frames"], row["fps"]) == (24, 32, 20, 25)
        assert read_frames(row["video"]["bytes"], [19]).shape == (1, 24, 32, 3)


def test_processes_and_stream_shards_share_the_videos(trees, tmp_path):
    builder = load_corpus_builder("colonoscopic", data_dir=trees("colonoscopic", "owners"), cache_dir=tmp_path)
    streamed = builder.as_streaming_dataset("train")
    builder.download_and_prepare(num_proc=2)
    assert streamed.num_shards == 6
    assert list(builder.as_dataset("train")) == list(streamed)


def test_a_changed_folder_is_another_dataset(tmp_path):
    root = write_tree("colonoscopic", "endo_fm", tmp_path / "raw")

    def cache_dir():
        return load_corpus_builder("colonoscopic", data_dir=root, cache_dir=tmp_path / "cache").cache_dir

    before = cache_dir()
    assert cache_dir() == before
    write(root / "00006.mp4", b"")
    assert cache_dir() != before


def test_a_split_by_its_name(tmp_path):
    root = write_tree("colonoscopic", "owners", tmp_path / "raw")
    options = {"data_dir": root, "cache_dir": tmp_path / "cache"}
    assert len(load_corpus("colonoscopic", split="test", **options)) == 6
    with pytest.raises(ValueError, match=r"split 'validation': colonoscopic has train, test here\."):
        load_corpus("colonoscopic", split="validation", **options)
    for video in read_tree("colonoscopic", root).videos:
        if video.split == "test":
            write(video.path, b"")
    with pytest.raises(ValueError, match=r"split 'test': colonoscopic has train here\."):
        load_corpus("colonoscopic", split="test", **options)


# --- splits ----------------------------------------------------------------------------------------------------------

PROTOCOL_OPTIONS = [{"split_protocol": protocol, "fold": fold} for protocol in PROTOCOLS for fold in range(1, 6)]


@pytest.mark.parametrize("config", ["videos", "clips"])
@every_layout
def test_no_video_lesion_or_patient_is_in_two_splits(corpus, layout, config, trees):
    is_cholec = corpus == "cholectriplet"
    for options in PROTOCOL_OPTIONS if is_cholec else [{}]:
        found = read_tree(corpus, trees(corpus, layout), config, **options)
        splits_of: dict[str, set[str]] = {}
        for video in found.videos:
            paths = [video.path] if video.path.is_file() else sorted(video.path.iterdir())
            data = b"".join(path.read_bytes() for path in paths)
            # A lesion is of one patient, and so is a whole video: of these nothing smaller may be divided
            for unit in (video.video_id, hashlib.sha256(data).hexdigest(), video.labels.get("lesion")):
                if unit is not None:
                    splits_of.setdefault(unit, set()).add(video.split)
        assert all(len(splits) == 1 for splits in splits_of.values())
        assert {split for splits in splits_of.values() for split in splits} <= set(corpus_module.SPLITS)


@every_layout
def test_the_order_of_a_listing_changes_nothing(corpus, layout, trees, monkeypatch):
    root = trees(corpus, layout)
    before = read_tree(corpus, root)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path="."):
            with scandir(path) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

    monkeypatch.setattr(os, "scandir", Backwards)
    monkeypatch.setattr(os, "listdir", lambda path=".": [entry.name for entry in Backwards(path)])
    assert read_tree(corpus, root) == before


# --- folders that are not as they should be --------------------------------------------------------------------------


@every_layout
def test_hidden_files_and_links_that_lead_back_change_nothing(corpus, layout, tmp_path):
    root = write_tree(corpus, layout, tmp_path / "raw")
    before = read_tree(corpus, root)
    folders = [path for path in [root, *root.rglob("*")] if path.is_dir()]
    for folder in folders:
        write(folder / ".DS_Store", b"\0\1")
        write(folder / "._00001.mp4", b"\0\1")
    write(root / "__MACOSX" / "00001.mp4", b"\0\1")
    (root / "loop").symlink_to(root)
    (folders[-1] / "back").symlink_to("..")
    assert read_tree(corpus, root) == before


@pytest.mark.parametrize(
    ("corpus", "layout", "name"),
    [
        ("kvasir_capsule", "owners", "labelled_videos"),
        ("cholectriplet", "cholect45", "data"),
        ("cholectriplet", "cholect50", "videos/VID01"),
        ("polypdiag", "endo_fm", "videos"),
    ],
)
def test_what_is_read_by_a_link_is_not_said_to_be_unread(corpus, layout, name, tmp_path):
    root = write_tree(corpus, layout, tmp_path / "raw")
    before = read_tree(corpus, root)
    (root / "0_store").mkdir()
    (root / name).rename(root / "0_store" / "real")
    (root / name).symlink_to(root / "0_store" / "real")
    assert read_tree(corpus, root) == before


def test_a_folder_is_walked_by_its_own_name_and_else_by_its_first_link(tmp_path):
    root = tmp_path / "raw"
    write(root / "b" / "real" / "file", "")
    write(tmp_path / "outside" / "inner" / "file", "")
    (root / "a").symlink_to(root / "b" / "real")
    (root / "c").symlink_to(tmp_path / "outside")
    (root / "d").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(root)
    assert [path.relative_to(root).as_posix() for path in walk(root)] == ["b/real/file", "c/inner/file"]
    (tmp_path / "link").symlink_to(root)
    assert len(walk(tmp_path / "link")) == 2


@pytest.mark.parametrize(
    ("corpus", "expected"),
    [
        ("colonoscopic", r"owners' tree \(Hyperplasic/hyperplasic_01/videos/WL\.mp4, \.\.\.\) or the Endo-FM folder"),
        ("kvasir_capsule", r"owners' tree \(labelled_videos/, unlabelled_videos/, metadata\.csv\) or the Endo-FM fo"),
        ("cholectriplet", r"CholecT45 \(data/VID01/, .*CholecT50 \(videos/VID01/, .* or the Endo-FM folder"),
        ("polypdiag", r"videos/ with splits/train\.txt and splits/val\.txt, or the owners' tree"),
    ],
)
def test_another_folder_is_refused_by_what_was_expected_and_found(corpus, expected, tmp_path):
    other = tmp_path / "other"
    with pytest.raises(CorpusError, match=f"other: expected the folder of {corpus}, but there is no such folder"):
        read_tree(corpus, other)
    other.mkdir()
    with pytest.raises(CorpusError, match=f"{expected}.*found nothing"):
        read_tree(corpus, other)
    write(other / "holiday" / "beach.mp4", video_bytes(1, 6, 16, 16))
    write(other / "notes.txt", "")
    with pytest.raises(CorpusError, match=rf"{expected}.*found holiday/, notes\.txt\."):
        read_tree(corpus, other)
    with pytest.raises(CorpusError, match=f"notes.txt: expected the folder of {corpus}, but it is a file"):
        read_tree(corpus, other / "notes.txt")
    with pytest.raises(CorpusError, match=f"{corpus} needs the folder of the videos"):
        read_tree(corpus, None)


@pytest.mark.parametrize("corpus", ["colonoscopic", "kvasir_capsule", "cholectriplet"])
def test_the_folder_of_another_corpus_is_refused(corpus, trees):
    with pytest.raises(CorpusError, match=r"expected .*found splits/, videos/"):
        read_tree(corpus, trees("polypdiag", "endo_fm"))


@pytest.mark.parametrize("corpus", ["colonoscopic", "kvasir_capsule", "cholectriplet"])
def test_only_the_numbered_videos_of_a_processed_folder_are_read(corpus, tmp_path):
    root = write_tree(corpus, "endo_fm", tmp_path)
    write(root / "train.csv", "pretrain/00001.mp4,-1\r\n")
    write(root / "sample.mp4", video_bytes(1, 6, 16, 16))
    write(root / "more" / "00006.mp4", video_bytes(2, 6, 16, 16))
    (root / "00007.mp4").symlink_to("nowhere.mp4")
    found = read_tree(corpus, root)
    assert [video.video_id for video in found.videos] == ["00001", "00002", "00003", "00004", "00005"]
    assert found.rejected == [
        Rejection("00007.mp4", "a link to nothing"),
        Rejection("more/00006.mp4", "no part of the layout; not read"),
        Rejection("sample.mp4", "no part of the layout; not read"),
        Rejection("train.csv", "no part of the layout; not read"),
    ]
    assert found.notes


def test_many_files_that_are_not_read_are_counted_by_folder(tmp_path):
    for i in range(11):
        write(tmp_path / "frames" / f"{i}.jpg", b"")
    for i in range(10):
        write(tmp_path / f"{i}.txt", b"")
    assert other_files(tmp_path, [tmp_path / "3.txt"], {"frames": "stills"}) == [
        *[Rejection(f"{i}.txt", "no part of the layout; not read") for i in range(10) if i != 3],
        Rejection("frames/", "11 files: stills"),
    ]


def undecodable(path):
    """The path with a byte in its name that is not UTF-8."""
    return path.with_name(os.fsdecode(os.fsencode(path.stem) + b"\xff" + os.fsencode(path.suffix)))


@pytest.mark.parametrize(
    ("corpus", "layout", "name"),
    [
        ("colonoscopic", "owners", "Adenoma/adenoma_02/videos/WL.mp4"),
        ("colonoscopic", "owners", "Adenoma/adenoma_02"),
        ("colonoscopic", "endo_fm", "00002.mp4"),
        ("kvasir_capsule", "owners", "labelled_videos/04a78ef00c5245e0.mp4"),
        ("kvasir_capsule", "owners", "unlabelled_videos/055bbbec392b4f3a.mp4"),
        ("cholectriplet", "cholect45", "data/VID02"),
        ("cholectriplet", "cholect50", "videos/VID01"),
        ("polypdiag", "endo_fm", "videos/indexed-train_set_abnormal-38_outp-0-20.mp4"),
        ("polypdiag", "owners", "indexed/train_set_abnormal/38_outp.mp4"),
    ],
)
def test_a_name_that_is_not_utf8_is_a_counted_rejection(corpus, layout, name, tmp_path):
    root = write_tree(corpus, layout, tmp_path / "raw")
    before = read_tree(corpus, root)
    renamed = undecodable(root / name)
    (root / name).rename(renamed)
    found = read_tree(corpus, root)
    below = printable(renamed.relative_to(root).as_posix())
    assert any(rejection.source.startswith(below) for rejection in found.rejected)
    assert r"\udcff" in below
    for rejection in found.rejected:
        (rejection.source + rejection.reason).encode()  # can be written down
    gone = {video.source for video in before.videos} - {video.source for video in found.videos}
    assert gone
    assert all(source.startswith(name) for source in gone)


def test_a_raw_folder_whose_name_is_not_utf8_is_refused(tmp_path):
    root = write_tree("colonoscopic", "endo_fm", undecodable(tmp_path / "raw"))
    for read in (lambda: read_tree("colonoscopic", root), lambda: load_corpus_builder("colonoscopic", data_dir=root)):
        with pytest.raises(CorpusError, match=r"raw\\udcff: its name is not UTF-8"):
            read()


# --- videos that are not as they should be ---------------------------------------------------------------------------


def video_without_frames(path):
    """An mp4 whose video track has no sample."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    return path


@pytest.mark.parametrize("config", ["videos", "clips"])
def test_broken_videos_are_left_out_one_by_one(config, tmp_path, caplog):
    root = write_tree("colonoscopic", "endo_fm", tmp_path / "raw")
    write(root / "00002.mp4", b"")
    write(root / "00003.mp4", b"this is no video")
    video_without_frames(root / "00004.mp4")
    builder = load_corpus_builder("colonoscopic", config, data_dir=root, cache_dir=tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        builder.download_and_prepare()
    assert builder.as_dataset("train")["video_id"][:] == ["00001", "00005"]
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [message.split(": ")[1] for message in left_out] == ["00002.mp4", "00003.mp4", "00004.mp4"]
    assert all("cannot be read as a video" in message for message in left_out)


def test_what_is_left_out_is_said_again_where_rows_come_from_the_cache(tmp_path, caplog):
    root = write_tree("colonoscopic", "endo_fm", tmp_path / "raw")
    write(root / "00002.mp4", b"this is no video")
    write(root / "notes.txt", b"")
    said = []
    for _ in range(2):
        caplog.clear()
        rows = load_corpus("colonoscopic", data_dir=root, cache_dir=tmp_path / "cache")
        assert rows["video_id"][:] == ["00001", "00003", "00004", "00005"]
        said.append(sorted(r.getMessage() for r in caplog.records if r.name.startswith("diffusers_endora")))
    assert [message.split(": ")[:2] for message in said[0]] == [
        ["left out", "00002.mp4"],
        ["notes.txt", "no part of the layout; not read"],
    ]
    assert said[1] == ["left out of train, as they cannot be read: 00002.mp4", said[0][1]]


def test_rows_are_the_same_in_one_process_and_two(tmp_path):
    options = {"num_videos": 4, "num_frames": 2, "height": 16, "width": 16}
    one, two = (load_corpus("phantom", cache_dir=tmp_path / str(n), num_proc=n, **options)[:] for n in (1, 2))
    assert one == two
    assert len(one["video_id"]) == 4


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_while_rows_are_made_is_one_sentence(num_proc, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_class("colonoscopic"), "write_rows", full)
    root = write_tree("colonoscopic", "endo_fm", tmp_path / "raw")
    with pytest.raises(
        ValueError, match=r"^colonoscopic: its rows could not be made: .Errno 28. No space left on .*$"
    ):
        load_corpus("colonoscopic", data_dir=root, cache_dir=tmp_path / "cache", num_proc=num_proc)


def test_a_video_that_breaks_off_gives_no_clips(tmp_path):
    builder = corpus_class("colonoscopic")
    root = write_tree("colonoscopic", "endo_fm", tmp_path / "raw", num_frames=60)
    data = (root / "00001.mp4").read_bytes()
    position = data.index(b"mdat") + 4
    size = len(data) // 3
    write(root / "00001.mp4", data[: position + size] + bytes(size) + data[position + 2 * size :])
    video = read_tree("colonoscopic", root).videos[0]
    config = changed_config(builder.BUILDER_CONFIGS[1], {"clip_length": 10})
    with pytest.raises(VideoError, match=r"00001\.mp4"):
        builder.write_rows(video, tmp_path, config)


def test_a_video_that_vanishes_is_one_sentence(tmp_path):
    builder = corpus_class("colonoscopic")
    video = SourceVideo("gone", tmp_path / "gone.mp4", "train", "gone.mp4")
    with pytest.raises(VideoError, match=r"^gone\.mp4: is not there any more$"):
        builder.write_rows(video, tmp_path, builder.BUILDER_CONFIGS[0])


def test_a_video_too_large_for_a_row_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_VIDEO_BYTES", 10)
    builder = corpus_class("colonoscopic")
    video = read_tree("colonoscopic", write_tree("colonoscopic", "endo_fm", tmp_path / "raw")).videos[0]
    row = builder.write_rows(video, tmp_path, builder.BUILDER_CONFIGS[0])[0]
    with pytest.raises(VideoError, match=r"00001\.mp4: has 0 MiB, and a row at most 0; .*--transcode"):
        builder.complete_row(video, row, tmp_path)
    assert builder.complete_row(video, row, tmp_path, embed=False)[1]["video"]["path"] == str(video.path)


@pytest.mark.parametrize(
    ("num_frames", "clip_length", "expected"),
    [
        (7, 8, [(0, 7)]),  # shorter than a clip
        (8, 8, [(0, 8)]),
        (15, 8, [(0, 15)]),
        (16, 8, [(0, 8), (8, 16)]),
        (449, 150, [(0, 150), (150, 449)]),
        (450, 150, [(0, 150), (150, 300), (300, 450)]),
    ],
)
def test_the_last_window_takes_the_remainder(num_frames, clip_length, expected):
    assert windows(num_frames, clip_length) == expected


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        ("colonoscopic", {"clip_length": 0}, "clip_length=0: expected a positive integer"),
        ("colonoscopic", {"clip_length": True}, "clip_length=True: expected a positive integer"),
        ("colonoscopic", {"short_side": 12.5}, "short_side=12.5: expected a positive integer"),
        ("colonoscopic", {"kind": "frames"}, "kind='frames': expected 'videos' or 'clips'"),
        ("colonoscopic", {"quality": "good"}, "quality='good': expected 'visually_lossless' or 'lossless'"),
        ("colonoscopic", {"labelled_per_class": 3}, "doesn't have a 'labelled_per_class' key"),
        ("polypdiag", {"labelled_per_class": 0}, "labelled_per_class=0: expected a positive integer"),
        ("cholectriplet", {"fold": 6}, "fold=6: expected 1 to 5"),
        ("cholectriplet", {"fold": True}, "fold=True: expected 1 to 5"),
        ("cholectriplet", {"split_protocol": "mine"}, "split_protocol='mine': expected one of cholect50, "),
        ("phantom", {"seed": -1}, "seed=-1: expected a non-negative integer"),
        ("phantom", {"num_videos": 0}, "num_videos=0: expected a positive integer"),
        ("phantom", {"short_side": 64}, "short_side=64: .* choose it by height and width"),
    ],
)
def test_options_out_of_range_are_refused_at_once(corpus, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_corpus_builder(corpus, cache_dir=tmp_path, **options)


def test_names_that_there_are_not(tmp_path):
    with pytest.raises(ValueError, match="colon: is no corpus; expected one of cholectriplet, colonoscopic, kvasir_c"):
        load_corpus_builder("colon")
    with pytest.raises(ValueError, match="BuilderConfig 'frames' not found"):
        load_corpus_builder("colonoscopic", "frames", cache_dir=tmp_path)


# --- files of text ---------------------------------------------------------------------------------------------------


def test_a_table_is_read_whatever_its_line_endings_and_mark(tmp_path):
    expected = [(1, ["a", "b"]), (3, ["é", ""])]
    for text in ("a,b\n\né,\n", "a,b\r\n\r\né,", "\ufeffa,b\n\né,\n", " a , b\n , \né,"):
        assert read_table(write(tmp_path / "table.csv", text), ",") == expected


def test_no_content_of_a_table_breaks_the_reading(tmp_path):
    field = "x" * 200_000  # beyond the limit of Python's csv module
    table = read_table(write(tmp_path / "table.csv", f'a,"b\n{field},\0\nc,d\n'), ",")
    assert table == [(1, ["a", '"b']), (2, [field, "\0"]), (3, ["c", "d"])]
    with pytest.raises(CorpusError, match=r"table\.csv: expected UTF-8 text \(invalid start byte at byte 2\)"):
        read_table(write(tmp_path / "table.csv", b"a,\xff"), ",")
    with pytest.raises(CorpusError, match="cannot be read"):
        read_table(tmp_path, ",")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("9" * 5000, "Exceeds the limit"),
        ('{"a": {"7": 1, "7": 2}}', "'7' is there twice"),
    ],
)
def test_hostile_json_is_one_sentence(text, reason, tmp_path):
    with pytest.raises(CorpusError, match=rf"content\.json: expected json \(.*{reason}") as caught:
        read_json(write(tmp_path / "content.json", text))
    assert "\n" not in str(caught.value)


# --- the trees -------------------------------------------------------------------------------------------------------


@every_layout
def test_videos_of_a_tree_differ(corpus, layout, trees):
    found = read_tree(corpus, trees(corpus, layout)).videos
    first_frames = {read_frames(video.path, [0]).tobytes() for video in found}
    assert len(first_frames) == len(found) >= 5


def test_pictures_move():
    steps = np.abs(np.diff(pictures(1, 6, 16, 16).astype(int), axis=0))
    assert steps.mean(axis=(1, 2, 3)).min() > 2
