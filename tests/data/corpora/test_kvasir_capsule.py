import hashlib
from pathlib import Path

import pytest
from trees import LABELLED, UNLABELLED, kvasir_metadata, read_tree, video_bytes, write, write_tree

from diffusers_endora.data.corpora import load_corpus_builder
from diffusers_endora.data.corpora.corpus import CorpusError, Rejection, SourceVideo
from diffusers_endora.data.corpora.kvasir_capsule import CLASSES, LANDMARKS, KvasirCapsule, parse_finding, split_of

HEADER = "filename;video_id;frame_number;finding_category;finding_class;x1;y1;x2;y2;x3;y3;x4;y4"
ROW = "0728084c8da942d9_22803.jpg;0728084c8da942d9;22803;Luminal;Normal clean mucosa"
SECOND = LABELLED[1]  # has an overhanging box


@pytest.fixture
def root(tmp_path):
    return write_tree("kvasir_capsule", "owners", tmp_path / "raw")


def findings(found):
    return {video.video_id: video.labels["findings"] for video in found.videos if video.labels["findings"]}


def finding(frame, category, finding_class, box=None):
    return {"frame": frame, "category": category, "finding_class": finding_class, "box": box}


EXPECTED = {
    LABELLED[0]: [
        finding(0, "Luminal", "Normal clean mucosa"),
        finding(1, "Luminal", "Normal clean mucosa"),
        finding(2, "Luminal", "Erosion", [138, 3, 311, 73]),
    ],
    LABELLED[1]: [
        finding(1, "Luminal", "Foreign body", [210, 187, 341, 341]),
        finding(3, "Luminal", "Foreign body", [200, 180, 330, 330]),
    ],
    LABELLED[2]: [
        finding(0, "Luminal", "Erosion", [10, 20, 40, 60]),
        finding(0, "Anatomy", "Pylorus"),
        finding(4, "Luminal", "Reduced mucosal view"),
    ],
    LABELLED[3]: [
        finding(2, "Anatomy", "Ampulla of Vater", [100, 110, 150, 170]),
        finding(5, "Luminal", "Blood - fresh", [0, 0, 336, 336]),
    ],
    LABELLED[4]: [finding(4, "Luminal", "Erythema")],
}


def test_findings_of_the_table(root):
    found = read_tree("kvasir_capsule", root)
    assert findings(found) == EXPECTED
    assert {video.source for video in found.videos} == {
        *(f"labelled_videos/{video_id}.mp4" for video_id in LABELLED),
        *(f"unlabelled_videos/{video_id}.mp4" for video_id in UNLABELLED),
    }
    assert found.notes == []
    assert found.rejected == [Rejection("labelled_images/", "14 files: stills of the labelled videos; not read")]


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, lambda t: t + "\n\n"])
def test_line_endings_and_byte_order_marks_change_nothing(root, change):
    write(root / "metadata.csv", change(kvasir_metadata()))
    assert findings(read_tree("kvasir_capsule", root)) == EXPECTED


def test_rows_with_and_without_the_last_field():
    for row in (ROW + ";" * 7, ROW + ";" * 8):
        video_id, found = parse_finding(row.split(";"))
        assert (video_id, found) == ("0728084c8da942d9", finding(22803, "Luminal", "Normal clean mucosa"))
    for row in (ROW + ";" * 6, ROW + ";" * 9, ROW):
        with pytest.raises(ValueError, match=r"has \d+ fields; expected 13, or 12 without a box"):
            parse_finding(row.split(";"))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Blood - fresh", "Blood - fresh"),
        ("Blood", "Blood - fresh"),
        ("Blood - hematin", "Blood - hematin"),
        ("Erythematous", "Erythema"),
        ("Ileo-cecal valve", "Ileocecal valve"),
        ("Normal", "Normal clean mucosa"),
        ("Foreign Body", "Foreign body"),
        ("Foreign Bodies", "Foreign body"),
        ("Reduced Mucosal View", "Reduced mucosal view"),
        *((name, name) for name in CLASSES),
    ],
)
def test_every_spelling_of_a_class(spelling, name):
    category = "Anatomy" if name in LANDMARKS else "luminal"
    row = f"v_1.jpg;v;1;{category};{spelling};;;;;;;".split(";")
    assert parse_finding(row)[1]["finding_class"] == name


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("v_1.jpg;v;1;Luminal;Diverticulum;;;;;;;", "'Diverticulum' is no finding class"),
        ("v_1.jpg;v;1;Colon;Polyp;;;;;;;", "'Colon' is no finding category"),
        ("v_1.jpg;v;-1;Luminal;Polyp;;;;;;;", "expected an id and a frame number; got 'v' and '-1'"),
        ("v_1.jpg;v;" + "9" * 5000 + ";Luminal;Polyp;;;;;;;", "expected an id and a frame number"),
        ("v_1.jpg;../v;1;Luminal;Polyp;;;;;;;", "expected an id and a frame number; got '../v' and '1'"),
        ("v_1.jpg;v\0;1;Luminal;Polyp;;;;;;;", "expected an id and a frame number"),
        ("v_1.jpg;v;1;Luminal;Polyp;1;1;2;1;2;2;1", "expected no box or four corners"),
        ("v_1.jpg;v;1;Luminal;Polyp;1;1;2;1;2;2;1;", "expected no box or four corners"),
        ("v_1.jpg;v;1;Luminal;Polyp;1;1;2;1;2;2;1;nan", "expected no box or four corners"),
        ("v_1.jpg;v;1;Luminal;Polyp;1;1;1e999;1;1e999;2;1;2", "expected no box or four corners"),
        ("v_1.jpg;v;1;Luminal;Polyp;1;1;1;1;1;2;1;2", "expected no box or four corners"),  # no width
        ("v_1.jpg;v;1;Luminal;Polyp;" + "x" * 200_000 + ";;;;;;", "expected no box or four corners"),
        ("v_1.jpg", "has 1 fields; expected 13, or 12 without a box"),
        ("v_2.jpg;v;1;Luminal;Polyp;;;;;;;", "expected the filename 'v_1.jpg'; got 'v_2.jpg'"),
        ("w_1.jpg;v;1;Luminal;Polyp;;;;;;;", "expected the filename 'v_1.jpg'; got 'w_1.jpg'"),
        ("v_11.jpg;v;1;Luminal;Polyp;;;;;;;", "expected the filename 'v_1.jpg'; got 'v_11.jpg'"),
        (";v;1;Luminal;Polyp;;;;;;;", "expected the filename 'v_1.jpg'; got ''"),
        ("v_1.jpg;v;1;Anatomy;Polyp;;;;;;;", "Polyp is of category Luminal; got 'Anatomy'"),
        ("v_1.jpg;v;1;luminal;pylorus;;;;;;;", "Pylorus is of category Anatomy; got 'luminal'"),
    ],
)
def test_a_row_that_cannot_be_understood_is_left_out_alone(row, reason, root):
    lines = kvasir_metadata().splitlines()
    write(root / "metadata.csv", "\n".join([*lines[:3], row, *lines[3:]]))
    found = read_tree("kvasir_capsule", root)
    assert findings(found) == EXPECTED
    (rejection,) = [rejection for rejection in found.rejected if rejection.source == "metadata.csv, row 4"]
    assert rejection.reason.startswith(reason)
    assert len(rejection.reason) < 200


def test_rows_that_say_the_same_and_rows_without_a_video(root):
    extra = f"{LABELLED[0]}_1.jpg;{LABELLED[0]};1;luminal;Normal;;;;;;;\n"  # says what row 3 says
    missing = "ffffffffffffffff_1.jpg;ffffffffffffffff;1;Luminal;Ulcer;;;;;;;\n" * 2
    write(root / "metadata.csv", kvasir_metadata() + extra + missing)
    found = read_tree("kvasir_capsule", root)
    assert findings(found) == EXPECTED
    assert [r for r in found.rejected if not r.source.startswith("labelled_images")] == [
        Rejection(
            "labelled_videos/ffffffffffffffff.mp4", "its 1 findings in metadata.csv have no video in labelled_videos/"
        ),
        Rejection("metadata.csv, row 13", "says the same as an earlier row"),
        Rejection("metadata.csv, row 15", "says the same as an earlier row"),
    ]


def test_a_labelled_video_without_findings_is_told(root):
    write(root / "metadata.csv", "\n".join(kvasir_metadata().splitlines()[:4]))
    found = read_tree("kvasir_capsule", root)
    assert found.notes == ["4 of 5 labelled videos have no finding in metadata.csv"]
    assert len(found.videos) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the header filename;.*; got an empty file"),
        (ROW + ";" * 7, "expected the header filename;.*; got '0728084c8da942d9_22803.jpg;0728"),
        (HEADER.replace(";", ","), "expected the header filename;.*; got 'filename,video_id"),
        (HEADER.rpartition(";")[0], "expected the header filename;"),
    ],
)
def test_another_header_is_an_error(root, text, message):
    write(root / "metadata.csv", text)
    with pytest.raises(CorpusError, match=rf"metadata\.csv: {message}"):
        read_tree("kvasir_capsule", root)


def test_a_missing_table_is_an_error_only_where_there_are_labelled_videos(root):
    (root / "metadata.csv").unlink()
    with pytest.raises(CorpusError, match=r"has labelled_videos/ but not their metadata\.csv"):
        read_tree("kvasir_capsule", root)
    (root / "labelled_videos").rename(root.parent / "elsewhere")
    (root / "labelled_images").rename(root.parent / "images")
    found = read_tree("kvasir_capsule", root)
    assert splits(found) == dict.fromkeys(UNLABELLED, "unlabelled")
    assert found.notes == ["no video in labelled_videos/: unlabelled videos alone"]


def test_a_filename_may_have_any_extension_and_leading_zeros():
    for name in ("v_1.png", "v_1.JPEG", "v_1", "v_0001.jpg"):
        assert parse_finding(f"{name};v;1;Luminal;Polyp;;;;;;;".split(";"))[0] == "v"


@pytest.mark.parametrize("there", ["metadata.csv", "labelled_images"])
@pytest.mark.parametrize("is_empty", [True, False])
def test_labels_without_labelled_videos_are_an_error(root, there, is_empty):
    (root / "labelled_videos").rename(root.parent / "elsewhere")
    (root / ({"metadata.csv", "labelled_images"} - {there}).pop()).rename(root.parent / "other")
    if is_empty:
        (root / "labelled_videos").mkdir()
    message = f"raw: has {there} but no video in labelled_videos/; put them there, or move {there} away"
    with pytest.raises(CorpusError, match=message):
        read_tree("kvasir_capsule", root)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("labelled_videos", "labeled_videos"),
        ("labelled_videos", "Labeled_Videos"),
        ("labelled_videos", "labelled_video"),
        ("labelled_videos", "labelled videos"),
        ("unlabelled_videos", "unlabeled_videos"),
        ("unlabelled_videos", "UNLABELED-VIDEOS"),
    ],
)
def test_a_mistyped_folder_is_an_error_that_says_its_name(root, right, wrong):
    (root / right).rename(root / wrong)
    with pytest.raises(CorpusError, match=f"raw: expected the name {right}/ for {wrong}/; rename it"):
        read_tree("kvasir_capsule", root)


def test_labelled_videos_alone(root):
    (root / "unlabelled_videos").rename(root.parent / "elsewhere")
    found = read_tree("kvasir_capsule", root)
    assert set(splits(found)) == set(LABELLED)
    assert found.notes == ["no video in unlabelled_videos/: labelled videos alone"]


def test_an_id_that_is_there_twice_stays_labelled(root):
    write(root / "unlabelled_videos" / f"{SECOND}.mp4", video_bytes(9, 6, 16, 16))
    found = read_tree("kvasir_capsule", root)
    reason = f"the id {SECOND} is taken by labelled_videos/{SECOND}.mp4"
    assert Rejection(f"unlabelled_videos/{SECOND}.mp4", reason) in found.rejected
    assert len(found.videos) == 7


# --- rows ------------------------------------------------------------------------------------------------------------


def rows_of(root, tmp_path, config, video_id, **options):
    builder = load_corpus_builder("kvasir_capsule", config, data_dir=root, cache_dir=tmp_path, **options)
    names = builder.info.features["findings"].feature
    for rows in builder.as_streaming_dataset().values():
        for row in rows:
            if row["video_id"] == video_id:
                for entry in row["findings"]:
                    entry["category"] = names["category"].int2str(entry["category"])
                    entry["finding_class"] = names["finding_class"].int2str(entry["finding_class"])
                label = row["label"]
                yield row | {"label": None if label is None else CLASSES[label]}


def test_boxes_are_clipped_to_the_frame(root, tmp_path):
    (row,) = rows_of(root, tmp_path, "videos", SECOND)
    assert (row["height"], row["width"], row["fps"], row["num_frames"]) == (336, 336, 30, 20)
    assert row["findings"] == [
        finding(1, "Luminal", "Foreign body", [210, 187, 336, 336]),
        finding(3, "Luminal", "Foreign body", [200, 180, 330, 330]),
    ]
    assert row["label"] == "Foreign body"


def test_boxes_are_scaled_with_the_frame(root, tmp_path):
    (row,) = rows_of(root, tmp_path, "videos", SECOND, short_side=84)
    assert (row["height"], row["width"]) == (84, 84)
    assert [entry["box"] for entry in row["findings"]] == [[52.5, 46.75, 84, 84], [50, 45, 82.5, 82.5]]


def test_a_box_wholly_outside_the_frame_is_none():
    labels = {"findings": [finding(0, "Luminal", "Polyp", [337, 10, 341, 20])]}
    row = {"start_frame": 0, "num_frames": 1, "source_width": 336, "source_height": 336, "width": 336, "height": 336}
    assert KvasirCapsule.labels_of_row(labels, row, None)["findings"][0]["box"] is None


def test_a_clip_has_the_findings_of_its_own_frames(root, tmp_path):
    rows = list(rows_of(root, tmp_path, "clips", LABELLED[3], clip_length=4, short_side=32))
    assert [row["start_frame"] for row in rows] == [0, 4, 8, 12, 16]
    assert [[(entry["frame"], entry["finding_class"]) for entry in row["findings"]] for row in rows] == [
        [(2, "Ampulla of Vater")],
        [(1, "Blood - fresh")],
        [],
        [],
        [],
    ]
    assert [row["label"] for row in rows] == ["Ampulla of Vater", "Blood - fresh", None, None, None]


def test_findings_beyond_the_video_are_told():
    labels = {"findings": [finding(frame, "Luminal", "Polyp") for frame in (5, 20, 31)]}
    video = SourceVideo("v", Path("v.mp4"), "train", "labelled_videos/v.mp4", labels)
    assert KvasirCapsule.misfits(video, 32) == []
    assert KvasirCapsule.misfits(video, 20) == ["2 of its findings lie beyond its 20 frames, at 31 at the latest"]


# --- splits ----------------------------------------------------------------------------------------------------------


def splits(found):
    return {video.video_id: video.split for video in found.videos}


def test_the_split_is_by_the_hash_of_the_id(root):
    expected = {
        name: "test" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0 else "train" for name in LABELLED
    }
    assert splits(read_tree("kvasir_capsule", root)) == expected | dict.fromkeys(UNLABELLED, "unlabelled")
    assert set(expected.values()) == {"train", "test"}
    many = [split_of(f"{i:016x}") for i in range(1000)]
    assert 160 < many.count("test") < 240


def test_official_folds_share_no_video_here(tmp_path):
    root = write_tree("kvasir_capsule", "owners_and_folds", tmp_path)
    found = read_tree("kvasir_capsule", root)
    # Videos 0 and 2 are in fold 0; 1, 2 and 4 in fold 1; 3 in none
    folds = dict(zip(LABELLED, ("train", "test", "train", split_of(LABELLED[3]), "test"), strict=True))
    assert splits(found) == folds | dict.fromkeys(UNLABELLED, "unlabelled")
    assert found.notes == [f"videos in both official folds, 1, stay in train: {LABELLED[2]}"]
    assert {rejection.source for rejection in found.rejected} == {"labelled_images/"}


@pytest.mark.parametrize("text", ["Polyp/04a78ef00c5245e0_5.png\n", "filename;label\n", ""])
def test_folds_of_another_form_are_an_error(text, tmp_path):
    root = write_tree("kvasir_capsule", "owners_and_folds", tmp_path)
    write(root / "official_splits" / "split_1.csv", text)
    with pytest.raises(CorpusError, match=r"split_1\.csv: expected the header filename,label; files from before Jan"):
        read_tree("kvasir_capsule", root)


def test_rows_of_folds_without_meaning_and_a_missing_fold(tmp_path):
    root = write_tree("kvasir_capsule", "owners_and_folds", tmp_path)
    fold = root / "official_splits" / "split_1.csv"
    write(fold, f"filename,label\n{LABELLED[1]}_5.jpg,Erosion\nnothing\n{LABELLED[0]}_5.jpg,Eruption\n")
    found = read_tree("kvasir_capsule", root)
    assert splits(found)[LABELLED[1]] == "test"
    reason = "expected <video>_<frame>.jpg and a finding class; got "
    assert [r for r in found.rejected if r.source.startswith("official")] == [
        Rejection("official_splits/split_1.csv, row 3", f"{reason}'nothing'"),
        Rejection("official_splits/split_1.csv, row 4", f"{reason}'{LABELLED[0]}_5.jpg,Eruption'"),
    ]
    fold.unlink()
    found = read_tree("kvasir_capsule", root)
    assert found.notes == ["official_splits has no split_1.csv, so it is not used"]
    assert splits(found)[LABELLED[1]] == split_of(LABELLED[1])


def test_processed_clips_have_no_findings_and_one_split(tmp_path):
    found = read_tree("kvasir_capsule", write_tree("kvasir_capsule", "endo_fm", tmp_path))
    assert splits(found) == {f"{i:05d}": "train" for i in range(1, 6)}
    assert findings(found) == {}
