import json

import numpy as np
import pytest
from trees import (
    T45_VIDEOS,
    T50_VIDEOS,
    TRIPLET_PARTS,
    TRIPLETS,
    json_labels,
    read_tree,
    triplets_of_frame,
    write,
    write_tree,
)

from diffusers_endora.data.corpora import cholectriplet as module
from diffusers_endora.data.corpora import load_corpus_builder
from diffusers_endora.data.corpora.cholectriplet import PHASES, PROTOCOLS, published_splits
from diffusers_endora.data.corpora.corpus import CorpusError, Rejection
from diffusers_endora.data.video_io import read_frames, read_image

NUM_FRAMES = 20


@pytest.fixture
def t45(tmp_path):
    return write_tree("cholectriplet", "cholect45", tmp_path / "raw", NUM_FRAMES)


@pytest.fixture
def t50(tmp_path):
    return write_tree("cholectriplet", "cholect50", tmp_path / "raw", NUM_FRAMES)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_the_hundred_triplets():
    assert list(module.TRIPLETS) == TRIPLETS
    # lines that the owners print, and the ranges of their instruments
    assert module.TRIPLETS[0] == "grasper,dissect,cystic_plate"
    assert module.TRIPLETS[17] == "grasper,retract,gallbladder"
    assert module.TRIPLETS[99] == "irrigator,null_verb,null_target"
    ranges = {"grasper": (0, 21), "bipolar": (22, 45), "hook": (46, 64), "scissors": (65, 76), "clipper": (77, 81)}
    for instrument, (first, last) in (ranges | {"irrigator": (82, 93)}).items():
        assert {name.split(",")[0] for name in module.TRIPLETS[first : last + 1]} == {instrument}
    assert all(name.endswith("null_verb,null_target") for name in module.TRIPLETS[94:])
    assert len(set(module.TRIPLETS)) == 100
    assert (len(module.INSTRUMENTS), len(module.VERBS), len(module.TARGETS), len(PHASES)) == (6, 10, 15, 7)


def test_labels_of_another_mapping_are_refused(t45):
    mapping = t45 / "dict" / "maps.txt"
    lines = mapping.read_text().splitlines()
    assert lines[18] == "17,0,1,0,1,0"
    mapping.write_text("\n".join(lines[1:]))  # without its first line it is the same
    read_tree("cholectriplet", t45)
    lines[18] = "17,0,1,1,1,1"
    mapping.write_text("\r\n".join(lines))
    with pytest.raises(
        CorpusError, match=r"maps\.txt, line 19: expected a line of the published mapping; got '17,0,1"
    ):
        read_tree("cholectriplet", t45)


@pytest.mark.parametrize(
    ("kind", "line", "number", "name"),
    [
        ("triplet", "17:hook,dissect,gallbladder", 17, "grasper,retract,gallbladder"),
        ("instrument", "2:stapler", 2, "hook"),
        ("verb", "0:retract", 0, "grasp"),
        ("target", "14:liver", 14, "null_target"),
    ],
)
def test_dictionaries_of_other_names_are_refused(t45, kind, line, number, name):
    file = t45 / "dict" / f"{kind}.txt"
    lines = file.read_text().splitlines()
    file.write_text("\ufeff" + "\r\n".join(["# id:name", *lines]).upper())
    assert read_tree("cholectriplet", t45).rejected == []
    lines[number] = line
    file.write_text("\n".join(lines))
    got = line.partition(":")[2]
    with pytest.raises(CorpusError, match=f"{kind}.txt: names {kind} {number} '{got}', which is {name} here"):
        read_tree("cholectriplet", t45)
    file.unlink()
    write(t45 / "dict" / "phase.txt", "")
    assert read_tree("cholectriplet", t45).rejected == [Rejection("dict/phase.txt", "no part of the layout; not read")]


# --- splits ----------------------------------------------------------------------------------------------------------

# Lines of `split_selector` in the owners' loaders
PAPER_TRAIN = """1 15 26 40 52 65 79 2 18 27 43 56 66 92 4 22 31 47 57 68 96 5 23 35 48 60 70 103 13 25 36 49 62
75 110"""
CHALLENGE_TRAIN = """1 15 26 40 52 79 2 27 43 56 66 4 22 31 47 57 68 23 35 48 60 70 13 25 49 62 75 8 12 29 50 78 6 51
10 73 14 32 80 42"""
FOLDS = """79 2 51 6 25 14 66 23 50 111
80 32 5 15 40 47 26 48 70 96
31 57 36 18 52 68 10 8 73 103
42 29 60 27 65 75 22 49 12 110
78 43 62 35 74 1 56 4 13 92"""


def numbers(text):
    return {int(number) for number in text.split()}


def test_the_split_of_the_paper():
    splits = {name: set(ids) for name, ids in published_splits("cholect50").items()}
    assert splits == {
        "train": numbers(PAPER_TRAIN),
        "validation": {8, 12, 29, 50, 78},
        "test": {6, 51, 10, 73, 14, 74, 32, 80, 42, 111},
    }
    assert [len(ids) for ids in splits.values()] == [35, 5, 10]


def test_the_split_of_the_challenge():
    splits = {name: set(ids) for name, ids in published_splits("cholect50-challenge").items()}
    assert splits == {
        "train": numbers(CHALLENGE_TRAIN),
        "validation": {5, 18, 36, 65, 74},
        "test": {92, 96, 103, 110, 111},
    }
    assert [len(ids) for ids in splits.values()] == [40, 5, 5]


@pytest.mark.parametrize("fold", range(1, 6))
def test_the_folds(fold):
    tested = FOLDS.splitlines()[fold - 1]
    for protocol, sizes in (("cholect50-crossval", [35, 5, 10]), ("cholect45-crossval", [31, 5, 9])):
        splits = published_splits(protocol, fold)
        expected = numbers(tested) if sizes[2] == 10 else numbers(tested) - {92, 96, 103, 110, 111}
        assert set(splits["test"]) == expected
        assert [len(ids) for ids in splits.values()] == sizes
        # As the code has it: the last five of the other folds
        in_t50, in_t45 = (1, 56, 4, 13, 92), (74, 1, 56, 4, 13)
        if fold == 5:
            in_t50, in_t45 = (75, 22, 49, 12, 110), (65, 75, 22, 49, 12)
        assert splits["validation"] == (in_t50 if sizes[2] == 10 else in_t45)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_video_is_in_one_part(protocol):
    tested = []
    for fold in range(1, 6):
        splits = published_splits(protocol, fold)
        ids = [video for videos in splits.values() for video in videos]
        assert len(set(ids)) == len(ids) == (45 if protocol == "cholect45-crossval" else 50)
        tested += splits["test"]
    if protocol.endswith("crossval"):
        assert len(set(tested)) == len(tested) == len(ids)


def split_of(found):
    return {int(video.video_id.removeprefix("VID")): video.split for video in found.videos}


def test_each_release_has_its_own_default(t45, tmp_path):
    found = read_tree("cholectriplet", t45)
    parts = ("test", "test", "validation", "validation", "train", "train")
    assert split_of(found) == dict(zip(T45_VIDEOS, parts, strict=True))
    assert (found.layout, found.notes) == ("CholecT45", ["splits: cholect45-crossval, fold 1"])
    found = read_tree("cholectriplet", write_tree("cholectriplet", "cholect50", tmp_path / "t50"))
    parts = ("train", "train", "validation", "validation", "test", "test", "train")
    assert split_of(found) == dict(zip(T50_VIDEOS, parts, strict=True))
    assert (found.layout, found.notes) == ("CholecT50", ["splits: cholect50"])


def test_a_protocol_without_a_video_leaves_it_out(t50):
    found = read_tree("cholectriplet", t50, split_protocol="cholect45-crossval", fold=5)
    assert split_of(found) == {1: "test", 15: "train", 8: "train", 12: "validation", 6: "train", 65: "validation"}
    assert found.rejected == [Rejection("videos/VID111", "video 111 is in no part of cholect45-crossval")]
    found = read_tree("cholectriplet", t50, split_protocol="cholect50-challenge")
    assert (split_of(found)[111], split_of(found)[65], split_of(found)[8]) == ("test", "validation", "train")


# --- labels ----------------------------------------------------------------------------------------------------------


def expected_labels(start=0, stop=NUM_FRAMES, phases=True):
    shown = [triplets_of_frame(i) for i in range(start, stop)]
    parts = [[sorted({TRIPLET_PARTS[triplet][part] for triplet in frame}) for frame in shown] for part in range(3)]
    columns = dict(zip(("instruments", "verbs", "targets"), parts, strict=True))
    # `[]` says no phase, a row of -1 may
    phase = [None if not triplets_of_frame(i) and i % 2 else min(i // 4, 6) for i in range(start, stop)]
    return {"triplets": [list(frame) for frame in shown]} | columns | {"phases": phase if phases else None}


@pytest.mark.parametrize("layout", ["cholect45", "cholect50", "cholect50_list"])
def test_labels_are_the_same_from_text_and_json(layout, tmp_path):
    found = read_tree("cholectriplet", write_tree("cholectriplet", layout, tmp_path, NUM_FRAMES))
    for video in found.videos:
        assert video.labels == expected_labels(phases=layout != "cholect45")
        assert video.image_fps == 1
    assert found.rejected == []


def test_a_clip_has_the_labels_of_its_frames(t50, tmp_path):
    options = {"data_dir": t50, "cache_dir": tmp_path, "clip_length": 8, "quality": "lossless"}
    builder = load_corpus_builder("cholectriplet", "clips", **options)
    rows = [row for row in builder.as_streaming_dataset("train") if row["video_id"] == "VID01"]
    for row, (start, stop) in zip(rows, ((0, 8), (8, 20)), strict=True):
        labels = expected_labels(start, stop)
        assert {column: row[column] for column in labels} == labels
        assert (row["start_frame"], row["num_frames"], row["fps"]) == (start, stop - start, 1)
        images = [read_image(t50 / "videos" / "VID01" / f"{i:06d}.png") for i in range(start, stop)]
        np.testing.assert_array_equal(read_frames(row["video"]["bytes"], np.arange(stop - start)), images)
    names = builder.info.features["triplets"].feature.feature
    assert names.int2str(rows[0]["triplets"][1]) == ["grasper,retract,gallbladder", "hook,dissect,gallbladder"]


def test_frames_without_a_label_are_null_and_labels_without_a_frame_are_counted(t45, tmp_path):
    for kind in ("triplet", "instrument", "verb", "target"):
        lines = (t45 / kind / "VID02.txt").read_text().splitlines()
        extra = "25," + lines[0].partition(",")[2]
        write(t45 / kind / "VID02.txt", "\r\n".join([*lines[:3], *lines[4:], extra]))
    (t45 / "data" / "VID02" / "000007.png").unlink()
    found = read_tree("cholectriplet", t45)
    (video,) = [video for video in found.videos if video.video_id == "VID02"]
    expected = expected_labels(phases=False)
    for column in ("triplets", "instruments", "verbs", "targets"):
        expected[column][3] = None
        del expected[column][7]
    assert video.labels == expected
    assert found.rejected == [
        Rejection("data/VID02", "1 frames are missing between its first and its last"),
        Rejection("data/VID02", "1 frames have no label, such as 000003.png; null"),
        Rejection("data/VID02", "2 labelled frames have no image, such as 000007.png; not used"),
    ]
    builder = load_corpus_builder("cholectriplet", data_dir=t45, cache_dir=tmp_path)
    (row,) = [row for row in builder.as_streaming_dataset("test") if row["video_id"] == "VID02"]
    assert {column: row[column] for column in expected} == expected
    assert row["num_frames"] == 19


def test_columns_that_differ_in_their_frames_are_told(t45):
    file = t45 / "verb" / "VID02.txt"
    write(file, "".join(file.read_text().splitlines(keepends=True)[:-2]))
    found = read_tree("cholectriplet", t45)
    assert found.rejected == [Rejection("data/VID02", "verbs and triplets differ in 2 of their frames")]
    assert found.videos[0].labels["verbs"][16:] == [[1, 2], [], None, None]


def test_processed_clips_have_no_labels_and_one_split(tmp_path):
    found = read_tree("cholectriplet", write_tree("cholectriplet", "endo_fm", tmp_path))
    assert {video.split for video in found.videos} == {"train"}
    nothing = {"triplets": None, "instruments": None, "verbs": None, "targets": None, "phases": None}
    assert [video.labels for video in found.videos] == [nothing] * 5


# --- labels against themselves -------------------------------------------------------------------------------------


def change_json(root, video, change):
    file = root / "labels" / f"{video}.json"
    content = json.loads(file.read_text())
    change(content)
    write(file, json.dumps(content))


@pytest.mark.parametrize("layout", ["cholect50", "cholect50_list"])
@pytest.mark.parametrize(
    ("kind", "number", "name", "expected"),
    [
        ("triplet", 17, "hook,dissect,gallbladder", "grasper,retract,gallbladder"),
        ("instrument", 2, "stapler", "hook"),
        ("verb", 0, "retract", "grasp"),
        ("target", 14, "liver", "null_target"),
        ("phase", 6, "preparation", "gallbladder-extraction"),
    ],
)
def test_categories_of_other_names_reject_the_video(layout, kind, number, name, expected, tmp_path):
    root = write_tree("cholectriplet", layout, tmp_path / "raw", NUM_FRAMES)

    def rename(content):
        categories = content["categories"]
        if isinstance(categories, dict):
            categories[kind][str(number)] = name
        else:
            next(e for e in categories if (e["supercategory"], int(e["id"])) == (kind, number))["name"] = name

    change_json(root, "VID12", rename)
    reason = f"labels/VID12.json: names {kind} {number} '{name}', which is {expected} here; labels would be wrong."
    assert only_rejection(root, "videos/VID12", len(T50_VIDEOS)) == reason


@pytest.mark.parametrize(
    "categories",
    [
        None,
        [],
        {},
        "none",
        7,
        {"triplet": 3, "tool": {"0": "x"}},
        {"verb": {"null": "x", "9": 4, "10": "more", "9.5": "x"}},
        {"instrument": {"-1": "null_instrument", "0": " Grasper ", "6": "null_instrument"}},
        {"instrument": list(module.INSTRUMENTS), "triplet": {"17": "grasper, retract, gallbladder"}},
        {"target": {"1": "cystic plate"}, "phase": {"1": "calot_triangle_dissection"}},
        [{"id": 0}, {"name": "x"}, 4, None, {"id": [], "name": {}, "supercategory": {}}, {"id": 0, "name": "x"}],
        [{"id": -1, "name": "null_instrument", "supercategory": "instrument"}],
    ],
)
def test_categories_of_other_forms_are_tolerated(t50, categories):
    change_json(t50, "VID12", lambda content: content.update(categories=categories))
    change_json(t50, "VID15", lambda content: content.pop("categories"))
    assert read_tree("cholectriplet", t50).rejected == []


def test_triplets_that_contradict_their_parts_are_counted(t50):
    def change(content):
        annotations = content["annotations"]
        for frame, position, value in (("3", 7, 5), ("5", 1, 2), ("5", 8, 3), ("6", 0, 3), ("1", 0, -1)):
            annotations[frame][0][position] = value
        annotations["10"][0][1] = annotations["10"][0][7] = annotations["10"][0][8] = -1

    change_json(t50, "VID12", change)
    found = read_tree("cholectriplet", t50)
    reason = "3 instances name a triplet and other parts than its own, such as in 000003.png; kept as they are"
    assert found.rejected == [Rejection("videos/VID12", reason)]
    (video,) = [video for video in found.videos if video.video_id == "VID12"]
    assert video.labels["verbs"][3] == [5]
    assert video.labels["triplets"][3] == [4]


def test_text_files_that_contradict_the_triplets_are_counted(t45):
    for kind, frame, column in (("verb", 3, 5), ("instrument", 3, 5), ("target", 11, 2)):
        file = t45 / kind / "VID02.txt"
        lines = file.read_text().splitlines()
        cells = lines[frame].split(",")
        cells[1 + column] = "1"
        write(file, "\n".join([*lines[:frame], ",".join(cells), *lines[frame + 1 :]]))
    found = read_tree("cholectriplet", t45)
    reason = (
        "2 frames have other instruments, verbs or targets than their triplets, such as 000003.png; kept as they are"
    )
    assert found.rejected == [Rejection("data/VID02", reason)]
    assert found.videos[0].labels["verbs"][3] == [0, 5]


@pytest.mark.parametrize(
    ("header", "reasons"),
    [
        ({"num_frames": 21}, ["its json says 21 frames and has 20 annotated ones; there are 20 images"]),
        ({"video": 15}, ["its json is of video 15"]),
        ({"video": "VID15"}, ["its json is of video 15"]),
        ({"video": "VID12", "num_frames": "20"}, []),
        ({"video": None, "num_frames": None}, []),
        ({"video": {}, "num_frames": True}, []),
    ],
)
def test_the_header_of_a_json_is_compared(t50, header, reasons):
    change_json(t50, "VID12", lambda content: content.update(header))
    found = read_tree("cholectriplet", t50)
    assert found.rejected == [Rejection("videos/VID12", reason) for reason in reasons]
    assert len(found.videos) == len(T50_VIDEOS)


def test_a_header_that_the_images_contradict(t50):
    (t50 / "videos" / "VID12" / "000019.png").unlink()
    reasons = [rejection.reason for rejection in read_tree("cholectriplet", t50).rejected]
    assert "its json says 20 frames and has 20 annotated ones; there are 19 images" in reasons


# --- what is not as it should be rejects that video ------------------------------------------------------------------


def only_rejection(root, source, num_videos):
    found = read_tree("cholectriplet", root)
    assert len(found.videos) == num_videos - 1
    (rejection,) = found.rejected
    assert rejection.source == source
    assert "\n" not in rejection.reason
    assert str(root) not in rejection.reason  # what is published has no names of this machine
    assert len(rejection.reason) < 250
    return rejection.reason


ROW = [17, 0, 1, -1, -1, -1, -1, 1, 0, -1, -1, -1, -1, -1, 1]
NESTED = "[" * 100_000


def at(position, value):
    return json.dumps({"annotations": {"0": [[*ROW[:position], value, *ROW[position + 1 :]]]}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "labels/VID12.json: expected json (Expecting value: line 1 column 1 (char 0))."),
        (NESTED, "labels/VID12.json: expected json (nested too deeply)."),
        ('{"annotations": {"0": [], "0": []}}', "labels/VID12.json: expected json ('0' is there twice)."),
        ("[]", "labels/VID12.json: expected an object 'annotations' from frame numbers to lists"),
        ('{"annotations": []}', "labels/VID12.json: expected an object 'annotations' from frame numbers to lists"),
        ('{"annotations": {"-1": []}}', "labels/VID12.json, frame '-1': expected the number of a frame, each once"),
        ('{"annotations": {"1": [], "01": []}}', "labels/VID12.json, frame '01': expected the number of a frame, eac"),
        ('{"annotations": {"0": null}}', "labels/VID12.json, frame '0': expected a list of rows of 15 numbers"),
        ('{"annotations": {"0": [[17]]}}', "labels/VID12.json, frame '0': expected a list of rows of 15 numbers"),
        ('{"annotations": {"0": ["..............."]}}', "labels/VID12.json, frame '0': expected a list of rows of 15"),
        (at(0, 100), "labels/VID12.json, frame '0', triplets: expected -1 to 99; got '100'"),
        (at(0, -2), "labels/VID12.json, frame '0', triplets: expected -1 to 99; got '-2'"),
        (at(0, 1.5), "labels/VID12.json, frame '0', triplets: expected -1 to 99; got '1.5'"),
        (at(0, float("nan")), "labels/VID12.json, frame '0', triplets: expected -1 to 99; got 'nan'"),
        (at(1, float("inf")), "labels/VID12.json, frame '0', instruments: expected -1 to 5; got 'inf'"),
        (at(7, 10**4000), "labels/VID12.json, frame '0', verbs: expected -1 to 9; got '1000000"),
        (at(8, "0"), "labels/VID12.json, frame '0', targets: expected -1 to 14; got '0'"),
        (at(8, None), "labels/VID12.json, frame '0', targets: expected -1 to 14; got 'None'"),
        (at(8, [[]]), "labels/VID12.json, frame '0', targets: expected -1 to 14; got '[[]]'"),
        (at(14, True), "labels/VID12.json, frame '0', phase: expected -1 to 6; got 'True'"),
        (b"\xff\xfe{", "labels/VID12.json: expected UTF-8 text (invalid start byte at byte 0)."),
    ],
)
def test_a_json_file_that_cannot_be_understood_rejects_its_video(t50, text, reason):
    write(t50 / "labels" / "VID12.json", text)
    assert only_rejection(t50, "videos/VID12", len(T50_VIDEOS)).startswith(reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0,0,1\n", "verb/VID04.txt, line 1: expected a frame number and 10 times 0 or 1; got 3 fields, '0,0,1'"),
        ("0" + ",0" * 10 + "\n1" + ",2" * 10, "verb/VID04.txt, line 2: expected a frame number and 10 times 0 or 1"),
        ("-1" + ",0" * 10, "verb/VID04.txt, line 1: expected a frame number and 10 times 0 or 1"),
        ("0" + ",\0" * 10, "verb/VID04.txt, line 1: expected a frame number and 10 times 0 or 1"),
        ("9" * 200_000 + ",0" * 10, "verb/VID04.txt, line 1: expected a frame number and 10 times 0 or 1"),
        ("0" + ",0" * 10 + "\n0" + ",1" * 10, "verb/VID04.txt, line 2: frame 0 is there already"),
        (b"\xff", "verb/VID04.txt: expected UTF-8 text"),
    ],
)
def test_a_text_file_that_cannot_be_understood_rejects_its_video(t45, text, reason):
    write(t45 / "verb" / "VID04.txt", text)
    assert only_rejection(t45, "data/VID04", len(T45_VIDEOS)).startswith(reason)


def test_a_missing_label_file_rejects_its_video(t45):
    (t45 / "target" / "VID79.txt").unlink()
    assert only_rejection(t45, "data/VID79", len(T45_VIDEOS)) == "has no labels: target/VID79.txt is not there"


def test_labels_without_a_video_are_counted(t50):
    (t50 / "videos" / "VID15").rename(t50.parent / "VID15")
    write(t50 / "labels" / "old" / "VID15.json", "{}")
    write(t50 / "labels" / "VID01.txt", "")
    write(t50 / "labels" / "notes.txt", "")
    found = read_tree("cholectriplet", t50)
    assert found.rejected == [
        Rejection("labels/notes.txt", "no part of the layout; not read"),
        Rejection("labels/old/VID15.json", "no part of the layout; not read"),
        Rejection("labels/VID01.txt", "no part of the layout; not read"),
        Rejection("labels/VID15.json", "has no video: videos/VID15/ is not there"),
    ]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["cover.jpg"], "'cover.jpg' is no frame such as 000000.png; remove it"),
        (["000003.jpg"], "000003.jpg and 000003.png are the same frame; remove one"),
        (["3.png"], "3.png and 000003.png are the same frame; remove one"),
    ],
)
def test_images_that_would_shift_the_frames_reject_their_video(t45, files, reason):
    for name in files:
        write(t45 / "data" / "VID31" / name, b"")
    found = only_rejection(t45, "data/VID31", len(T45_VIDEOS))
    assert sorted(found.split()) == sorted(reason.split())


def test_folders_that_are_no_video_and_files_among_frames(t45):
    (t45 / "data" / "VID80").rename(t45 / "data" / "video80")
    (t45 / "data" / "VID05").mkdir()
    write(t45 / "data" / "VID02" / "notes.txt", "")
    found = read_tree("cholectriplet", t45)
    assert {(r.source, r.reason) for r in found.rejected} == {
        ("data/VID05", "expected frames named 000000.png, 000001.png, ...; found none"),
        ("data/VID02/notes.txt", "no part of the layout; not read"),
        ("data/video80", "its name is not VID and a number"),
        *(
            (f"{kind}/VID80.txt", "has no video: data/VID80/ is not there")
            for kind in ("triplet", "instrument", "verb", "target")
        ),
    }


def test_a_frame_in_two_phases_has_none(t50):
    content = json_labels(15, NUM_FRAMES)
    content["annotations"]["1"][0][14] = 6
    write(t50 / "labels" / "VID15.json", json.dumps(content))
    found = read_tree("cholectriplet", t50)
    assert found.rejected == [Rejection("videos/VID15", "1 frames are in several phases, such as 000001.png; null")]
    (video,) = [video for video in found.videos if video.video_id == "VID15"]
    assert video.labels["phases"] == [0, None, *expected_labels()["phases"][2:]]


def test_no_usable_video_is_an_error_with_an_example(t50):
    for file in (t50 / "labels").iterdir():
        file.unlink()
    message = r"no video of CholecT50 is usable \(7 rejected, such as videos/VID01: has no labels: labels/VID01\.json"
    with pytest.raises(CorpusError, match=message):
        read_tree("cholectriplet", t50)
