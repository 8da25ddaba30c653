"""No video, lesion or content is in two splits, whatever lies in a raw folder."""

import hashlib
import shutil

import pytest
from trees import LABELLED, LAYOUTS, UNLABELLED, video_bytes, write, write_tree

from diffusers_endora.data.corpora import corpus as corpus_module
from diffusers_endora.data.corpora import load_corpus_builder
from diffusers_endora.data.corpora.corpus import Rejection, SourceVideo, leave_out_copies
from diffusers_endora.data.corpora.kvasir_capsule import split_of

NUM_FRAMES = 6
EVERY_LAYOUT = [(corpus, layout) for corpus, layouts in LAYOUTS.items() for layout in layouts]


# --- rows of raw folders in which ids and contents collide -----------------------------------------------------------

# What is there, and what is added under the same id with another content
SAME_ID = {
    ("colonoscopic", "owners"): [
        ("Adenoma/adenoma_02/videos/WL.mp4", "more/ADENOMA_02/WL.mp4"),
        ("Adenoma/adenoma_40/videos/NBI.mp4", "more/adenoma_040/nbi.mkv"),
    ],
    ("colonoscopic", "owners_flat"): [
        ("adenoma/adenoma_02/WL.mp4", "more/ADENOMA_02/WL.mp4"),
        ("hyperplasic/hyperplasic_05/WL.mp4", "more/Hyperplastic_5/WL.mp4"),
    ],
    ("kvasir_capsule", "owners"): [
        (f"labelled_videos/{LABELLED[0]}.mp4", f"unlabelled_videos/{LABELLED[0]}.mp4"),  # the first is in train
        (f"labelled_videos/{LABELLED[3]}.mp4", f"unlabelled_videos/{LABELLED[3]}.mp4"),  # in test
    ],
    ("kvasir_capsule", "owners_and_folds"): [
        (f"labelled_videos/{LABELLED[1]}.mp4", f"labelled_videos/{LABELLED[1]}.avi"),
        (f"labelled_videos/{LABELLED[2]}.mp4", f"unlabelled_videos/{LABELLED[2]}.mp4"),
    ],
    ("cholectriplet", "cholect45"): [("data/VID79", "data/VID079")],
    ("cholectriplet", "cholect50"): [("videos/VID15", "videos/VID015")],
    ("cholectriplet", "cholect50_list"): [("videos/VID08", "videos/VID008")],
    ("polypdiag", "endo_fm"): [
        ("videos/indexed-train_set_normal-0_14-0-6.mp4", "videos/indexed-train_set_normal-0_14-0-6.avi")
    ],
    ("polypdiag", "owners"): [("indexed/train_set_normal/0_14.mp4", "indexed/train_set_normal/0_14.avi")],
}

# What is there, and what is added with the same content in another split. Folders of frames are not compared, and
# Endo-FM clips are one split
_IN_TRAIN = next(name for name in (f"{i:016x}" for i in range(100)) if split_of(name) == "train")
_IN_TEST = next(name for name in (f"{i:016x}" for i in range(100)) if split_of(name) == "test")
SAME_CONTENT = {
    ("colonoscopic", "owners"): [
        ("Adenoma/adenoma_40/videos/WL.mp4", "more/adenoma_03/WL.mp4"),
        ("Adenoma/adenoma_02/videos/NBI.mp4", "more/serrated_10/NBI.mp4"),
    ],
    ("colonoscopic", "owners_flat"): [("serrated/serrated_03/WL.mp4", "more/serrated_05/WL.mp4")],
    ("kvasir_capsule", "owners"): [
        (f"labelled_videos/{LABELLED[1]}.mp4", f"labelled_videos/{_IN_TEST}.mp4"),
        (f"labelled_videos/{LABELLED[2]}.mp4", "unlabelled_videos/00000000000000ff.mp4"),
    ],
    ("kvasir_capsule", "owners_and_folds"): [
        (f"labelled_videos/{LABELLED[4]}.mp4", f"labelled_videos/{_IN_TRAIN}.mp4"),
        (f"unlabelled_videos/{UNLABELLED[0]}.mp4", f"labelled_videos/{_IN_TEST}.mp4"),
    ],
    ("polypdiag", "endo_fm"): [("videos/indexed-train_set_abnormal-38_outp-0-6.mp4", "videos/new.mp4")],
    ("polypdiag", "owners"): [("indexed/train_set_abnormal/38_outp.mp4", "indexed/test_set/abnormal_test/99.mp4")],
}


def plant(corpus, layout, root):
    """Adds the videos above; returns pairs of which one is to be left out."""
    same_id = SAME_ID.get((corpus, layout), [("00002.mp4", "00002.avi")])
    same_content = SAME_CONTENT.get((corpus, layout), [])
    other = video_bytes(9000, NUM_FRAMES, 48, 64, 30, "mpeg4")
    for there, added in [*same_id, *same_content]:
        if (root / there).is_dir():
            shutil.copytree(root / there, root / added)
            for file in [*root.glob(f"labels/{there[-5:]}.json"), *root.glob(f"*/{there[-5:]}.txt")]:
                shutil.copy(file, file.with_name(added.rpartition("/")[2] + file.suffix))
            # Of two frames in another order, so that the contents differ
            (root / added / "000000.png").write_bytes((root / there / "000001.png").read_bytes())
        else:
            write(root / added, other if (there, added) in same_id else (root / there).read_bytes())
        if (corpus, layout) == ("polypdiag", "endo_fm"):  # those that are there are in train
            with (root / "splits" / "val.txt").open("a") as file:
                file.write(f"{added.removeprefix('videos/')},1\n")
    return [*same_id, *same_content]


@pytest.mark.parametrize("config", ["videos", "clips"])
@pytest.mark.parametrize(("corpus", "layout"), EVERY_LAYOUT)
def test_no_row_of_an_id_lesion_or_content_is_in_two_splits(corpus, layout, config, tmp_path):
    root = write_tree(corpus, layout, tmp_path / "raw", NUM_FRAMES)
    pairs = plant(corpus, layout, root)
    options = {"data_dir": root, "cache_dir": tmp_path / "cache"} | ({"clip_length": 3} if config == "clips" else {})
    builder = load_corpus_builder(corpus, config, **options)
    splits_of, sources_of, keys = {}, {}, []
    for split, rows in builder.as_streaming_dataset().items():
        for row in rows:
            assert row["split"] == split
            data = row["video"]["bytes"] or (root / row["source"]).read_bytes()
            # A lesion is of one patient, and so is a whole video: of these nothing smaller may be divided
            for unit in (row["video_id"], row.get("lesion"), hashlib.sha256(data).hexdigest()):
                if unit is not None:
                    splits_of.setdefault(unit, set()).add(split)
            sources_of.setdefault(row["video_id"], set()).add(row["source"])
            keys.append((row["video_id"], row["start_frame"]))
    assert {unit: splits for unit, splits in splits_of.items() if len(splits) > 1} == {}
    assert {name: sources for name, sources in sources_of.items() if len(sources) > 1} == {}
    assert len(set(keys)) == len(keys) == len(sources_of) * (2 if config == "clips" else 1)
    kept = set().union(*sources_of.values())
    assert [len(kept & set(pair)) for pair in pairs] == [1] * len(pairs)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def video(tmp_path):
    """`video(name, split, content)` is a video of a raw folder; the file is not written where there is no content."""

    def make(name, split, content=None):
        if content is not None:
            write(tmp_path / name, content)
        return SourceVideo(name, tmp_path / name, split, name)

    return make


def test_of_copies_in_several_splits_the_one_that_is_tested_on_stays(video):
    splits = ("train", "unlabelled", "validation", "test")
    for remaining in range(4, 1, -1):
        videos = [video(f"{split}.mp4", split, b"same") for split in splits[-remaining:]]
        kept, rejected = leave_out_copies(videos)
        assert kept == [videos[-1]]
        reason = "is the same file as test.mp4, which is in test"
        assert rejected == [Rejection(of.source, reason) for of in videos[:-1]]
    kept, rejected = leave_out_copies([video("u", "unlabelled", b"same"), video("t", "train", b"same")])
    assert [of.source for of in kept] == ["t"]
    assert rejected == [Rejection("u", "is the same file as t, which is in train")]


def test_what_is_no_copy_stays(video, tmp_path):
    videos = [
        video("a.mp4", "train", b"same"),
        video("b.mp4", "train", b"same"),  # within a split nothing leaks
        video("c.mp4", "test", b"else"),
        video("d.mp4", "train", b""),  # no video at all, which is said when it is opened
        video("e.mp4", "test", b""),
        video("gone.mp4", "test"),
        video("also_gone.mp4", "train"),
        video("f", "train"),
        video("g", "test"),
    ]
    for name in "fg":  # folders of frames
        write(tmp_path / name / "0.png", b"same")
    assert leave_out_copies(videos) == (videos, [])


def test_a_link_is_a_copy(video, tmp_path):
    there = video("a.mp4", "train", b"same")
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    (tmp_path / "c.mp4").symlink_to("nowhere.mp4")
    linked = video("b.mp4", "validation")
    assert leave_out_copies([there, linked, video("c.mp4", "test")])[1] == [
        Rejection("a.mp4", "is the same file as b.mp4, which is in validation")
    ]


def test_only_files_of_a_size_that_two_splits_have_are_read(video, monkeypatch):
    read = []
    file_digest = hashlib.file_digest

    def counted(file, name):
        read.append(file.name.rpartition("/")[2])
        return file_digest(file, name)

    monkeypatch.setattr(corpus_module.hashlib, "file_digest", counted)
    contents = {"a": b"1", "b": b"22", "c": b"22", "d": b"333", "e": b"444", "f": b"55555"}
    splits = {"a": "train", "b": "train", "c": "train", "d": "train", "e": "test", "f": "test"}
    leave_out_copies([video(name, splits[name], content) for name, content in contents.items()])
    assert sorted(read) == ["d", "e"]
