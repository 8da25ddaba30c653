import pytest
from trees import read_tree, video_bytes, write, write_tree

from diffusers_endora.data.corpora.colonoscopic import CLASSES, LIGHTS, Colonoscopic
from diffusers_endora.data.corpora.corpus import CorpusError, Rejection

VIDEO = video_bytes(1, 6, 16, 16)


def facts(found):
    return {
        video.video_id: (video.split, video.labels["label"], video.labels["lesion"], video.labels["light"])
        for video in found.videos
    }


@pytest.mark.parametrize("layout", ["owners", "owners_flat"])
def test_lesion_class_and_light_come_from_the_path(layout, tmp_path):
    found = read_tree("colonoscopic", write_tree("colonoscopic", layout, tmp_path))
    lesions = {
        "hyperplastic_01": "train",
        "hyperplastic_05": "test",
        "serrated_03": "train",
        "serrated_15": "test",
        "adenoma_02": "train",
        "adenoma_40": "test",
    }
    assert facts(found) == {
        f"{lesion}_{light}": (split, lesion.split("_")[0], lesion, light)
        for lesion, split in lesions.items()
        for light in LIGHTS
    }
    assert (found.layout, found.rejected) == ("the owners' tree", [])
    example = found.videos[0].source
    expected = "Adenoma/adenoma_02/videos/NBI.mp4" if layout == "owners" else "adenoma/adenoma_02/NBI.mp4"
    assert example == expected


def test_a_fifth_of_each_class_is_for_testing(tmp_path):
    for name, count in (("hyperplasic", 21), ("serrated", 15), ("adenoma", 40)):
        for i in range(1, count + 1):
            for light in ("WL", "NBI"):
                write(tmp_path / name.capitalize() / f"{name}_{i:02d}" / "videos" / f"{light}.mp4", b"")
    found = read_tree("colonoscopic", tmp_path)
    count = {split: dict.fromkeys(CLASSES, 0) for split in ("train", "test")}
    for video in found.videos:
        count[video.split][video.labels["label"]] += 1
    assert count == {
        "train": {"hyperplastic": 34, "serrated": 24, "adenoma": 64},
        "test": {"hyperplastic": 8, "serrated": 6, "adenoma": 16},
    }


def test_processed_clips_have_no_labels_and_one_split(tmp_path):
    found = read_tree("colonoscopic", write_tree("colonoscopic", "endo_fm", tmp_path))
    assert facts(found) == {f"{i:05d}": ("train", None, None, None) for i in range(1, 6)}


@pytest.mark.parametrize("name", ["hyperplasic_01", "Hyperplastic_01", "HYPERPLASIC_1"])
def test_spellings_of_a_lesion(name, tmp_path):
    write(tmp_path / name / "wl.MP4", VIDEO)
    assert facts(read_tree("colonoscopic", tmp_path)) == {
        "hyperplastic_01_white_light": ("train", "hyperplastic", "hyperplastic_01", "white_light")
    }


def test_what_cannot_be_told_is_left_out_with_a_reason(tmp_path):
    root = write_tree("colonoscopic", "owners", tmp_path)
    write(root / "Adenoma" / "adenoma_02" / "videos" / "overview.mp4", VIDEO)
    write(root / "Adenoma" / "adenoma_x" / "videos" / "WL.mp4", VIDEO)
    write(root / "Adenoma" / "adenoma_02" / "WL.avi", VIDEO)  # sorted after adenoma_02/videos
    write(root / "00001.mp4", VIDEO)
    write(root / "opinions.xlsx", b"")
    found = read_tree("colonoscopic", root)
    assert found.rejected == [
        Rejection("00001.mp4", "no part of the layout; not read"),
        Rejection("Adenoma/adenoma_02/videos/overview.mp4", "expected WL.mp4 or NBI.mp4 in the folder of a lesion"),
        Rejection(
            "Adenoma/adenoma_02/WL.avi",
            "the id adenoma_02_white_light is taken by Adenoma/adenoma_02/videos/WL.mp4",
        ),
        Rejection("Adenoma/adenoma_x/videos/WL.mp4", "no part of the layout; not read"),
        Rejection("opinions.xlsx", "no part of the layout; not read"),
    ]
    assert len(found.videos) == 12


def test_a_link_to_a_lesion_changes_neither_its_name_nor_its_split(tmp_path):
    root = write_tree("colonoscopic", "owners", tmp_path)
    before = read_tree("colonoscopic", root)
    (root / "Adenoma" / "adenoma_00").symlink_to("adenoma_02")  # sorts before it, and would be for testing
    (root / "Adenoma" / "adenoma_99").symlink_to("adenoma_02")
    (root / "A").mkdir()
    (root / "A" / "adenoma_05").symlink_to(root / "Adenoma" / "adenoma_02")
    (root / "A" / "all").symlink_to("..")
    assert read_tree("colonoscopic", root) == before


def test_folders_above_the_raw_folder_say_nothing(tmp_path):
    root = tmp_path / "adenoma_05" / "raw"
    write(root / "WL.mp4", VIDEO)
    with pytest.raises(CorpusError, match=r"expected the owners' tree .*; found WL\.mp4\."):
        read_tree("colonoscopic", root)


def test_the_terms_forbid_publishing():
    assert not Colonoscopic.MAY_BE_PUBLISHED
