import pytest
from trees import read_tree, video_bytes, write, write_tree

from diffusers_endora.data.corpora import load_corpus_builder
from diffusers_endora.data.corpora.corpus import CorpusError, Rejection
from diffusers_endora.data.corpora.polypdiag import PolypDiag

VIDEO = video_bytes(1, 6, 16, 16)
ABNORMAL = "indexed-train_set_abnormal-38_outp-0-20"
NORMAL = "indexed-train_set_normal-33143cb2-a5ef-4bab-b25e-148a8076e5dd-0-20"


@pytest.fixture
def root(tmp_path):
    return write_tree("polypdiag", "endo_fm", tmp_path / "raw")


def facts(found):
    return {video.video_id: (video.split, video.labels["label"]) for video in found.videos}


def append(root, line, name="train.txt"):
    path = root / "splits" / name
    path.write_text(path.read_text() + line)


def test_labels_and_splits_are_those_of_the_lists(root):
    found = read_tree("polypdiag", root)
    assert len(found.videos) == 10
    assert facts(found)[ABNORMAL] == ("train", "abnormal")
    assert facts(found)[NORMAL] == ("train", "normal")
    assert facts(found)["indexed-test_set-abnormal_test-Images-2-0-20"] == ("validation", "abnormal")
    assert facts(found)["indexed-test_set-normal_test-0_3-0-20"] == ("validation", "normal")
    assert found.rejected == found.notes == []


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, lambda t: t.strip()])
def test_line_endings_and_byte_order_marks_change_nothing(root, change):
    before = read_tree("polypdiag", root)
    for path in (root / "splits").iterdir():
        write(path, change(path.read_text()))
    assert read_tree("polypdiag", root) == before


def test_a_list_for_testing_is_read(root):
    (root / "splits" / "val.txt").rename(root / "splits" / "test.txt")
    found = read_tree("polypdiag", root)
    assert {video.split for video in found.videos} == {"train", "test"}
    assert found.notes == ["validation is empty: splits/val.txt is not there"]


@pytest.mark.parametrize(("split", "name"), [("train", "train.txt"), ("validation", "val.txt")])
@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "is not there"), ("", "has no line"), ("\n \n", "has no line"), ("a.mp4,1\n", "names no usable video")],
)
def test_a_split_that_is_empty_is_told(root, split, name, text, reason):
    file = root / "splits" / name
    file.unlink() if text is None else write(file, text)
    found = read_tree("polypdiag", root)
    assert {video.split for video in found.videos} == {"train", "validation"} - {split}
    assert found.notes == [f"{split} is empty: splits/{name} {reason}"]


def test_the_owners_tree_has_the_same_videos(root, tmp_path):
    owners = read_tree("polypdiag", write_tree("polypdiag", "owners", tmp_path / "owners"))
    assert {f"{name}-0-20": fact for name, fact in facts(owners).items()} == facts(read_tree("polypdiag", root))


# --- lines that cannot be followed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("gone.mp4,1", "there is no 'gone.mp4' in videos/"),
        (f"{ABNORMAL}.mp4,1", f"'{ABNORMAL}.mp4' is listed in splits/train.txt, line 1"),
        (f"./{ABNORMAL}.mp4,0", f"'./{ABNORMAL}.mp4' is listed in splits/train.txt, line 1"),
        ("../outside.mp4,1", "'../outside.mp4' is outside videos/"),
        ("a/../../outside.mp4,1", "'a/../../outside.mp4' is outside videos/"),
        ("/etc/passwd,1", "'/etc/passwd' is outside videos/"),
        (".,1", "there is no '.' in videos/"),
        (",1", "there is no '' in videos/"),
        ("x" * 300 + ".mp4,1", "there is no 'xxx"),  # longer than a name can be
        ("a\0b.mp4,1", r"there is no 'a\x00b.mp4' in videos/"),
        ("extra.mp4,2", "expected <file>,<0 or 1>; got 'extra.mp4,2'"),
        ("extra.mp4", "expected <file>,<0 or 1>; got 'extra.mp4'"),
        ("extra.mp4,1,0", "expected <file>,<0 or 1>; got 'extra.mp4,1,0'"),
        ("y" * 200_000, "expected <file>,<0 or 1>; got 'yyy"),
    ],
)
def test_a_line_that_cannot_be_followed_is_left_out_alone(root, line, reason):
    write(root / "outside.mp4", VIDEO)
    before = read_tree("polypdiag", root)
    append(root, line + "\n")
    found = read_tree("polypdiag", root)
    assert found.videos == before.videos
    (rejection,) = [rejection for rejection in found.rejected if rejection not in before.rejected]
    assert rejection.source == "splits/train.txt, line 7"
    assert rejection.reason.startswith(reason)
    assert len(rejection.reason) < 200


def test_a_video_in_both_lists_stays_where_it_is_trained_on(root):
    append(root, f"{NORMAL}.mp4,0\n", "val.txt")
    found = read_tree("polypdiag", root)
    assert facts(found)[NORMAL] == ("train", "normal")
    reason = f"'{NORMAL[:56]}... is listed in splits/train.txt, line 2"
    (rejection,) = found.rejected
    assert rejection.source == "splits/val.txt, line 5"
    assert rejection.reason.endswith(reason.rpartition("... ")[2])


def test_videos_without_a_line_are_counted(root):
    lines = (root / "splits" / "train.txt").read_text().splitlines(keepends=True)
    write(root / "splits" / "train.txt", "".join(lines[1:]))
    write(root / "videos" / "notes.txt", "")
    found = read_tree("polypdiag", root)
    assert len(found.videos) == 9
    assert found.rejected == [
        Rejection(f"videos/{ABNORMAL}.mp4", "in none of the lists in splits/"),
        Rejection("videos/notes.txt", "in none of the lists in splits/"),
    ]


def test_two_files_of_one_name_are_one_video(root):
    write(root / "videos" / f"{ABNORMAL}.avi", VIDEO)
    append(root, f"{ABNORMAL}.avi,1\n")
    found = read_tree("polypdiag", root)
    assert found.rejected == [
        Rejection(f"videos/{ABNORMAL}.mp4", f"the id {ABNORMAL} is taken by videos/{ABNORMAL}.avi")
    ]


def test_lists_of_another_kind_are_an_error(root):
    write(root / "splits" / "train.txt", "filename label\nx 1\n")
    with pytest.raises(CorpusError, match=r"train\.txt: expected lines of <file>,<0 or 1>; got 'filename label'"):
        read_tree("polypdiag", root)
    (root / "splits" / "train.txt").unlink()
    with pytest.raises(
        CorpusError, match=r"labelled_per_class needs splits/train\.txt, whose order says which; found "
    ):
        read_tree("polypdiag", root, "labelled_40")
    (root / "splits" / "val.txt").rename(root / "splits" / "test.txt")
    with pytest.raises(CorpusError, match=r"splits: expected train\.txt and val\.txt; found test\.txt"):
        read_tree("polypdiag", root)


def test_lists_without_videos_are_an_error_with_an_example(root):
    (root / "videos").rename(root / "clips")
    message = (
        r"no video of the Endo-FM layout .* is usable \(20 rejected, such as clips/indexed-test_set-abnormal_test"
    )
    with pytest.raises(CorpusError, match=message):
        read_tree("polypdiag", root)


# --- the labelled subset ---------------------------------------------------------------------------------------------


@pytest.fixture
def official_size(tmp_path):
    """Lists of the published lengths, in an order that is not that of the names; the videos are empty."""
    labels = [1] * 102 + [0] * 71
    lines = [f"{(37 * i) % 173:03d}.mp4,{labels[(37 * i) % 173]}\n" for i in range(173)]
    validation = [f"v{i:02d}.mp4,{int(i < 60)}\n" for i in range(80)]
    write(tmp_path / "splits" / "train.txt", "".join(lines))
    write(tmp_path / "splits" / "val.txt", "".join(validation))
    for line in lines + validation:
        write(tmp_path / "videos" / line.split(",")[0], b"")
    return tmp_path


def first_of_each_class(root, count):
    lines = [line.split(",") for line in (root / "splits" / "train.txt").read_text().splitlines()]
    return {name.removesuffix(".mp4") for label in "01" for name, _ in [x for x in lines if x[1] == label][:count]}


def test_the_forty_labelled_are_the_first_twenty_of_each_class(official_size):
    everything = read_tree("polypdiag", official_size)
    assert len(everything.videos) == 253
    found = read_tree("polypdiag", official_size, "labelled_40")
    trained = {video.video_id for video in found.videos if video.split == "train"}
    assert trained == first_of_each_class(official_size, 20)
    assert len(trained) == 40
    assert sum(video.split == "validation" for video in found.videos) == 80
    assert found.notes == ["133 training videos are not among the labelled ones"]
    assert found.rejected == []


def test_a_missing_labelled_video_is_not_replaced(official_size):
    expected = first_of_each_class(official_size, 20)
    gone = sorted(expected)[5]
    label = facts(read_tree("polypdiag", official_size))[gone][1]
    (official_size / "videos" / f"{gone}.mp4").unlink()
    found = read_tree("polypdiag", official_size, "labelled_40")
    assert {video.video_id for video in found.videos if video.split == "train"} == expected - {gone}
    assert [rejection.reason for rejection in found.rejected] == [f"there is no '{gone}.mp4' in videos/"]
    counts = {"normal": 20, "abnormal": 20}
    counts[label] -= 1
    assert found.notes[-1] == "labelled_40: {normal} normal and {abnormal} abnormal of 20 each are there".format(
        **counts
    )


def test_too_few_labelled_videos_are_told(root):
    found = read_tree("polypdiag", root, "labelled_40")
    assert found.notes == ["labelled_40: 3 normal and 3 abnormal of 20 each are there"]
    assert read_tree("polypdiag", root, "labelled_40", labelled_per_class=3).notes == []


def test_the_labelled_subset_as_clips(root, tmp_path):
    options = {"data_dir": root, "cache_dir": tmp_path, "clip_length": 10, "short_side": 16}
    same = load_corpus_builder("polypdiag", "clips", labelled_per_class=1, **options)
    builder = load_corpus_builder("polypdiag", "labelled_40", kind="clips", labelled_per_class=1, **options)
    rows = list(builder.as_streaming_dataset("train"))
    assert [(row["video_id"], row["label"], row["start_frame"]) for row in rows] == [
        (name, label, start) for name, label in ((ABNORMAL, 1), (NORMAL, 0)) for start in (0, 10)
    ]
    assert list(same.as_streaming_dataset("train")) == rows
    assert len(list(builder.as_streaming_dataset("validation"))) == 8


def test_the_owners_tree_does_not_say_which_are_labelled(tmp_path):
    root = write_tree("polypdiag", "owners", tmp_path)
    with pytest.raises(CorpusError, match=r"labelled_per_class needs splits/train\.txt, whose order says which"):
        read_tree("polypdiag", root, "labelled_40")


# --- the owners' tree ------------------------------------------------------------------------------------------------


def test_other_videos_of_the_owners_tree_are_left_out(tmp_path):
    root = write_tree("polypdiag", "owners", tmp_path)
    write(root / "indexed" / "demo.mp4", VIDEO)
    write(root / "indexed" / "normal" / "x.mp4", VIDEO)  # of which set?
    (root / "indexed" / "train_set_normal" / "y.mp4").symlink_to("nowhere.mp4")
    found = read_tree("polypdiag", root)
    assert len(found.videos) == 10
    assert found.rejected == [
        Rejection("indexed/demo.mp4", "no part of the layout; not read"),
        Rejection("indexed/normal/x.mp4", "no part of the layout; not read"),
        Rejection("indexed/train_set_normal/y.mp4", "a link to nothing"),
    ]


def test_frames_in_place_of_a_video(tmp_path):
    frames = tmp_path / "indexed" / "test_set" / "abnormal_test" / "Images" / "7"
    for i in range(3):
        write(frames / f"{i}.jpg", b"")
    write(frames / "list.txt", "")
    found = read_tree("polypdiag", tmp_path)
    assert facts(found) == {"indexed-test_set-abnormal_test-Images-7": ("validation", "abnormal")}
    assert [rejection.source for rejection in found.rejected] == ["indexed/test_set/abnormal_test/Images/7/list.txt"]


def test_the_terms_forbid_publishing():
    assert not PolypDiag.MAY_BE_PUBLISHED
