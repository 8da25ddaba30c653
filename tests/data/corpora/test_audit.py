"""`endora audit`: what is the same footage and what is not, black and frozen videos, text, the report, bad input."""

import io
import json
import re
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageDraw, ImageFont
from trees import write_tree

from diffusers_endora.data.audit.audit import audit_corpus
from diffusers_endora.data.audit.burned_in_text import LEAST_FRAMES, TextDetector, joined, strokes_crossed
from diffusers_endora.data.audit.examination import examine, sample_frames, thumbnail
from diffusers_endora.data.audit.frame_hash import MIRROR, hash_frame, lit_square, to_grey
from diffusers_endora.data.audit.listing import WHOLE, list_folder
from diffusers_endora.data.audit.near_duplicates import CONFIRM, FIND, find_overlaps
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.video_io import VideoError, read_frames, write_video

FPS = 8.0


@pytest.fixture(scope="module")
def flights():
    """Frames of three flights, uint8 `(40, 96, 128, 3)` each, through different colons."""
    return [render_phantom_clip(seed, 40, 96, 128, fps=FPS, instrument=False).frames for seed in (0, 1, 2)]


def half(frames):
    return np.stack([np.asarray(Image.fromarray(f).reduce(2)) for f in frames])


def written(frames, *lines, size=12, colour="white"):
    """Frames with lines of text, `(x, y, text)` each, and the boxes of these lines."""
    cover = Image.new("L", frames.shape[2:0:-1])
    boxes = []
    for x, y, text in lines:
        ImageDraw.Draw(cover).text((x, y), text, fill=255, font=ImageFont.load_default(size))
        boxes.append(ImageDraw.Draw(cover).textbbox((x, y), text, font=ImageFont.load_default(size)))
    share = np.asarray(cover, np.float32)[..., None] / 255
    ink = np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
    return (frames * (1 - share) + ink * share).round().astype(np.uint8), boxes


def reread(frames, folder, crf):
    """Frames as an H.264 file gives them back."""
    return read_frames(write_video(folder / "reread.mp4", frames, FPS, crf=crf), range(len(frames)))


def bits(a, b):
    """Differing bits of the first 64 and of all."""
    differing = np.bitwise_count(a ^ b)
    return int(differing[0]), int(differing.sum())


def are_alike(a, b):
    quick, all_bits = bits(a, b)
    return quick <= FIND and all_bits <= CONFIRM


def hash_of(frame):
    return hash_frame(to_grey(frame))


# --- hashes of frames ------------------------------------------------------------------------------------------------


def under_a_mask(frame, margin=30):
    """The frame in a round view within black margins, as an endoscope's processor puts it out."""
    height, width = frame.shape[:2]
    y, x = np.mgrid[:height, :width]
    view = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) < min(height, width) / 2
    return np.pad(np.where(view[..., None], frame, 0), ((0, 0), (margin, margin), (0, 0)))


def test_a_copy_has_nearly_the_same_hash_and_another_scene_has_not(flights, tmp_path):
    scenes = [frames[i] for frames in flights for i in (0, 39)]
    for i, scene in enumerate(scenes):
        for change in (
            reread(scene[None], tmp_path, crf=35)[0],
            half(scene[None])[0],
            np.clip(scene * 1.1, 0, 255).astype(np.uint8),
            scene[2:-2, 3:-3],  # 5 % cropped
            under_a_mask(scene, 0),
        ):
            assert are_alike(hash_of(change), hash_of(scene))
        for other in scenes[i + 1 :]:
            assert not are_alike(hash_of(other), hash_of(scene))


def test_black_border_and_text_in_it_are_not_hashed(flights):
    masked = [under_a_mask(frames[0]) for frames in flights]
    for frame in masked:
        labelled = written(frame[None], (2, 20, "DOE"), (2, 40, "JANE"), size=10)[0][0]
        cut = frame[:, 30:-30][:, 16:-16]  # to the middle square, as the official preparation
        assert (labelled[:, :30] > 200).any()
        assert cut.shape[0] == cut.shape[1] == 96
        assert bits(hash_of(labelled), hash_of(frame))[1] <= 20
        assert are_alike(hash_of(cut), hash_of(frame))
    # the mask, which they share, makes no two of them alike
    assert all(bits(hash_of(a), hash_of(b))[1] > 1.3 * CONFIRM for a in masked for b in masked if a is not b)


def test_the_mirror_image_differs_in_the_odd_coefficients(flights):
    for frames in flights:
        assert bits(hash_of(frames[7][:, ::-1].copy()) ^ MIRROR, hash_of(frames[7]))[1] <= 4


def test_frames_without_structure_have_no_hash():
    y, x = np.mgrid[:96, :96]
    falling_light = 200 * np.exp(-((y - 40) ** 2 + (x - 50) ** 2) / 5000)
    noise = np.random.default_rng(0).normal(0, 2, (96, 96))
    for levels in (np.zeros((96, 96)), np.full((96, 96), 16), 120 + noise, falling_light, falling_light + noise):
        assert hash_of(np.repeat(np.clip(levels, 0, 255).astype(np.uint8)[..., None], 3, axis=2)) is None
    assert lit_square(np.zeros((96, 96), np.uint8)) is None
    assert hash_of(np.full((1, 1, 3), 90, np.uint8)) is None


def test_the_lit_square_is_the_middle_of_what_is_lit():
    grey = np.zeros((100, 200), np.uint8)
    grey[10:90, 40:180] = 100
    grey[20:30, 2:20] = 255  # text
    assert lit_square(grey) == (70, 10, 150, 90)


# --- which frames ----------------------------------------------------------------------------------------------------


def test_a_frame_of_every_part_is_looked_at():
    np.testing.assert_array_equal(sample_frames(40, 25.0, 1.0), np.arange(40))
    for num_frames, fps, number in ((1000, 25.0, 64), (25_000, 25.0, 1000), (250, 1.0, 250)):
        frames = sample_frames(num_frames, fps, 1.0)
        assert len(frames) == number
        part = num_frames / number
        for i, frame in enumerate(frames):
            assert int(i * part) <= frame < (i + 1) * part
    # not at even distances, but at the same moments in the same video at another rate
    assert len(set(np.diff(sample_frames(25_000, 25.0, 1.0)))) > 10
    np.testing.assert_allclose(sample_frames(25_000, 25, 1.0) / 25, sample_frames(10_000, 10, 1.0) / 10, atol=0.1)


def test_a_video_of_one_frame(flights, tmp_path):
    found = examine(write_video(tmp_path / "a.mp4", flights[0][:1], FPS), num_thumbnails=8)
    assert (len(found.samples), len(found.hashes), found.frozen_share, found.black_share) == (1, 1, None, 0.0)
    assert (found.text, found.text_was_looked_for) == ([], False)
    assert found.thumbnails.shape == (1, 128, 128, 3)


def test_damaged_frames_are_counted_and_the_others_used(flights, tmp_path):
    path = write_video(tmp_path / "a", flights[0][:6], FPS, codec="png")
    (path / "000002.png").write_bytes(b"no image")
    found = examine(path)
    np.testing.assert_array_equal(found.samples, [0, 1, 3, 4, 5])
    assert len(found.damaged) == 1
    assert "cannot be read as an image" in found.damaged[0]
    for image in path.iterdir():
        Image.fromarray(flights[0][0]).save(image)
    first, *others = sorted(path.iterdir())
    for image in others:
        Image.new("RGB", (8, 8)).save(image)
    assert len(examine(path).damaged) == 5
    first.write_bytes(first.read_bytes()[:200])  # its size can be read, its pixels cannot
    with pytest.raises(VideoError, match="no frame of the sample can be decoded"):
        examine(path)


def test_frames_are_told_frozen_whatever_the_encoder_and_a_clock_do(flights, tmp_path):
    still = np.repeat(flights[0][:1], 30, axis=0)
    ticking = np.stack([written(still[:1], (90, 80, f"{i:02d}"), size=10)[0][0] for i in range(30)])
    halting = np.concatenate([flights[0][:15], np.repeat(flights[0][15:16], 15, axis=0)])
    shares = [
        examine(write_video(tmp_path / "a.mp4", frames, FPS, crf=30)).frozen_share
        for frames in (still, ticking, flights[0][:30], halting)
    ]
    assert shares[:3] == [1.0, 1.0, 0.0]
    assert shares[3] == pytest.approx(14 / 29)


def test_a_thumbnail_keeps_the_shape_of_the_frame():
    tile = thumbnail(np.full((100, 400, 3), 200, np.uint8))
    assert tile.shape == (128, 128, 3)
    assert ((tile > 0).any(axis=(1, 2)).sum(), (tile > 0).any(axis=(0, 2)).sum()) == (32, 128)


# --- videos that overlap ---------------------------------------------------------------------------------------------


def test_overlaps_are_those_of_a_comparison_of_all_with_all():
    rng = np.random.default_rng(0)
    hashes = [rng.integers(0, 2**64, (n, 4), dtype=np.uint64) for n in (70, 0, 3000, 1, 2, 2000, 130)]

    def flipped(of, number):  # bits, the first few of them among the first 64
        where = np.zeros(256, bool)
        where[rng.permutation(64)[: min(number, FIND)]] = True
        where[64 + rng.permutation(192)[: max(0, number - FIND)]] = True
        return of ^ np.packbits(where).view(np.uint64)

    hashes[5][:3] = [flipped(hashes[0][i], CONFIRM) for i in (0, 69, 5)]  # at the edge, in two blocks of queries
    hashes[6][7:9] = [flipped(hashes[2][i], 9) for i in (2999, 4)]
    hashes[6][100] = flipped(hashes[0][3], 9)  # one frame alone is not enough,
    hashes[6][101] = hashes[3][0]  # but where the other has no more
    hashes[4][:] = [hashes[5][1500] ^ MIRROR, flipped(hashes[5][1999] ^ MIRROR, 20)]
    hashes[6][50:52] = [flipped(hashes[4][i], CONFIRM + 1) for i in (0, 1)]
    found = {(o.first, o.second): o for o in find_overlaps(hashes, range(7), num_threads=2)}
    assert set(found) == {(0, 5), (2, 6), (3, 6), (4, 5)}
    assert found[0, 5].partners == (3, 3)
    assert (found[0, 5].span_first, found[0, 5].span_second) == ((0, 69), (0, 2))
    assert (found[2, 6].span_first, found[2, 6].span_second) == ((4, 2999), (7, 8))
    assert found[2, 6].shares == (2 / 3000, 2 / 130)
    assert {pair for pair, overlap in found.items() if overlap.is_mirrored} == {(4, 5)}


def test_rows_of_one_group_are_not_compared_and_a_still_scene_counts_once():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**64, (2, 5, 4), dtype=np.uint64)
    still = np.repeat(a[2:3], 9, axis=0)
    assert [(o.first, o.second) for o in find_overlaps([a, a, a], ["x", "y", "x"])] == [(0, 1), (1, 2)]
    found = find_overlaps([a, b, still], range(3))
    assert [(o.first, o.second, o.hashes, o.span_first) for o in found] == [(0, 2, (5, 1), (2, 2))]
    # two frames of a video that are like one of another are no evidence of their being one
    assert find_overlaps([np.concatenate([a, a[:1] ^ np.uint64(1)]), np.concatenate([a[:1], b])], range(2)) == []
    assert find_overlaps([], []) == []


# --- text ------------------------------------------------------------------------------------------------------------


def regions(frames):
    detector = TextDetector()
    for frame in frames:
        detector.add(frame)
    return detector.regions()


def covers(region, box):
    """The share of a box that lies within a region."""
    width = min(region[2], box[2]) - max(region[0], box[0])
    height = min(region[3], box[3]) - max(region[1], box[1])
    return max(0, width) * max(0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


@pytest.mark.parametrize(("size", "colour"), [(10, "white"), (14, "yellow"), (18, "lime")])
def test_text_is_found_where_it_is_over_a_moving_scene(size, colour, flights, tmp_path):
    for frames in flights:
        labelled, boxes = written(frames[:16], (6, 4, "JANE DOE"), (30, 70, "12.04.61"), size=size, colour=colour)
        found = regions(reread(labelled, tmp_path, crf=28))
        assert len(found) == 2
        for region, box in zip(found, boxes, strict=True):
            assert covers(region, box) > 0.75
            assert covers(box, region) > 0.35


def test_clean_scenes_the_rim_of_a_view_and_instruments_have_no_text(flights):
    for frames in flights:
        assert regions(frames) == []
        assert regions([under_a_mask(frame) for frame in frames]) == []
    for seed in range(3):
        assert regions(render_phantom_clip(seed, 16, 96, 96, instrument=True).frames) == []
    frame_around = np.stack([np.pad(f[4:-4, 4:-4], ((4, 4), (4, 4), (0, 0)), constant_values=255) for f in flights[0]])
    assert regions(frame_around) == []
    bars = flights[0].copy()  # opposite edges, but in one direction only
    bars[:, 20:80, 20:50:6] = 255
    bars[:, 20:80, 21:50:6] = 255
    assert regions(bars) == []


def test_highlights_that_come_and_go_are_no_text(flights):
    """Their edges are so strong that the mean over a few frames is not small; but it holds little of their energy."""
    rng = np.random.default_rng(0)
    sparkling = flights[0][:LEAST_FRAMES].copy()
    for frame in sparkling:
        for y, x in rng.integers(0, [94, 126], (150, 2)):
            frame[y : y + 2, x : x + 2] = 255
    assert regions(sparkling) == []


def test_the_picture_of_text_does_not_keep_the_frames_in_memory(flights, tmp_path):
    found = examine(write_video(tmp_path / "a.mp4", written(flights[0], (6, 4, "JANE DOE"))[0], FPS))
    assert found.picture.shape == (96, 128, 3)
    assert found.picture.base is None


def test_text_is_not_looked_for_in_too_few_frames(flights):
    labelled = written(flights[0], (6, 4, "JANE DOE"))[0]
    assert len(regions(labelled[:LEAST_FRAMES])) == 1
    assert regions(labelled[: LEAST_FRAMES - 1]) == []


def test_large_frames_are_reduced_and_boxes_are_in_their_pixels(flights):
    large = written(np.repeat(np.repeat(flights[0][:12], 12, axis=1), 12, axis=2), (100, 400, "JANE DOE"), size=60)
    (region,) = regions(large[0])
    assert large[0].shape[1] == 1152
    assert covers(region, large[1][0]) > 0.75


def test_strokes_and_neighbouring_boxes():
    assert strokes_crossed(np.array([[0, 1, 1, 0, -1, 0, 1, -1], [1, 1, 1, 1, 1, 1, 1, 1]])) == 0.7 * 3 / 2
    boxes = [(10, 10, 40, 20), (45, 11, 60, 19), (10, 24, 30, 30), (200, 10, 230, 20)]
    assert joined(boxes) == [(10, 10, 60, 30), (200, 10, 230, 20)]


def test_text_in_a_real_laparoscopy(shared_file, tmp_path):
    video = shared_file("clips/cholecystectomy/endo.mp4")
    clean = half(read_frames(video, np.linspace(0, 249, 16).astype(int)))
    assert regions(clean) == []
    assert regions(reread(clean, tmp_path, crf=35)) == []
    labelled, boxes = written(clean, (6, 20, "DOE, JANE"), (400, 300, "ID 0048213"), size=16)
    found = regions(reread(labelled, tmp_path, crf=28))
    assert [any(covers(region, box) > 0.75 for region in found) for box in boxes] == [True, True]


def test_text_that_a_real_processor_wrote(shared_file):
    """The left border of a colonoscopic still, with name and dates in it, beside a moving view."""
    still = np.asarray(Image.open(shared_file("clips/hyperkvasir/07.jpg")).convert("RGB"))
    moving = read_frames(shared_file("clips/cholecystectomy/endo.mp4"), np.linspace(0, 249, 16).astype(int))
    frames = np.stack([np.asarray(Image.fromarray(f[:, 280:1000]).resize((280, 280))) for f in moving])
    assert regions(frames) == []
    frames[:, :, :54] = still[:, :54]
    assert any(covers(region, (8, 70, 50, 118)) > 0.8 for region in regions(frames))


def test_real_stills_are_scenes_of_their_own(shared_file, tmp_path):
    folders = [shared_file(f"clips/{name}") for name in ("hyperkvasir", "kvasir_capsule")]
    stills = [np.asarray(Image.open(path).convert("RGB")) for folder in folders for path in sorted(folder.glob("*"))]
    assert len(stills) == 36
    hashes = [hash_of(still) for still in stills]
    pairs = [(i, j) for i in range(36) for j in range(i)]
    assert not any(are_alike(hashes[i], hashes[j] ^ side) for i, j in pairs for side in (MIRROR, MIRROR ^ MIRROR))
    for still, of_still in zip(stills, hashes, strict=True):
        assert are_alike(hash_of(reread(half(still[None]), tmp_path, crf=30)[0]), of_still)


# --- a corpus --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(endora):
    """Runs `endora audit ...`: `run(*arguments) -> (exit code, stdout, stderr without progress bars)`."""

    def run_(*arguments):
        code, out, err = endora("audit", *arguments)
        return code, out, re.sub(r"\r.*video/s\]\n?|\r|.*\?video/s\]", "", err)

    return run_


@pytest.fixture(scope="module")
def corpus(flights, tmp_path_factory):
    """A folder with three splits and everything that can be wrong."""
    root = tmp_path_factory.mktemp("corpus")
    a, b, c = flights
    for name in ("train", "validation", "test"):
        (root / name).mkdir()
    write_video(root / "train/a.mp4", a, FPS)
    write_video(root / "train/b.mp4", b, FPS)
    (root / "train/a_again.mp4").write_bytes((root / "train/a.mp4").read_bytes())
    write_video(root / "test/encoded_anew.mp4", half(a), FPS, crf=30)
    write_video(root / "validation/excerpt.mp4", b[8:32:2], FPS / 2, crf=30)
    write_video(root / "test/mirrored", b[:, :, ::-1].copy(), FPS, codec="png")
    write_video(root / "train/labelled.mp4", written(c, (6, 4, "JANE DOE"))[0], FPS)
    write_video(root / "train/later.mp4", half(c[20:]), FPS)
    write_video(root / "train/black.mp4", np.zeros_like(a[:20]), FPS)
    write_video(root / "test/black.mp4", np.zeros_like(a[:20]), FPS)
    write_video(root / "test/frozen.mp4", np.repeat(c[20:21], 20, axis=0), 30.0)
    (root / "test/broken.mp4").write_bytes(b"not a video" * 50)
    (root / "test/notes.txt").write_text("nothing")
    return root


def pairs_of(facts):
    return {(*(v["name"] for v in o["videos"]), o["is_mirrored"], o["across_splits"]) for o in facts["overlapping"]}


def test_what_is_wrong_with_a_corpus_is_found_and_nothing_else(corpus, tmp_path, run):
    code, out, err = run(corpus, "--output", tmp_path / "report", "--num_proc", 2)
    assert (code, err) == (0, "")
    facts = json.loads((tmp_path / "report/audit.json").read_text())
    assert pairs_of(facts) == {
        ("test/encoded_anew.mp4", "train/a.mp4", False, True),
        ("test/mirrored", "train/b.mp4", True, True),
        ("test/mirrored", "validation/excerpt.mp4", True, True),
        ("train/b.mp4", "validation/excerpt.mp4", False, True),
        ("test/frozen.mp4", "train/labelled.mp4", False, True),
        ("test/frozen.mp4", "train/later.mp4", False, True),
        ("train/labelled.mp4", "train/later.mp4", False, False),
    }
    assert [{v["name"] for v in group["videos"]} for group in facts["identical"]] == [
        {"train/a.mp4", "train/a_again.mp4"}
    ]
    whole, excerpt = next(o for o in facts["overlapping"] if o["videos"][0]["name"] == "train/b.mp4")["videos"]
    assert (whole["from_second"], excerpt["from_second"]) == (pytest.approx(1.0, abs=0.3), 0.0)
    assert (whole["to_second"], excerpt["to_second"]) == (pytest.approx(3.75, abs=0.3), 2.75)
    assert (whole["share"], excerpt["share"]) == (pytest.approx(0.6, abs=0.15), 1.0)

    videos = {video["name"]: video for video in facts["videos"]}
    assert {name for name, video in videos.items() if video["is_black"]} == {"train/black.mp4", "test/black.mp4"}
    assert {name for name, video in videos.items() if video["is_frozen"]} == {"test/frozen.mp4"}
    assert {name for name, video in videos.items() if video["text_regions"]} == {"train/labelled.mp4"}
    assert [entry["name"] for entry in facts["unreadable"]] == ["test/broken.mp4"]
    assert {row["split"]: row["videos"] for row in facts["splits"]} == {"train": 6, "test": 4, "validation": 1}
    assert facts["num_leaks"] == 6
    assert facts["num_overlapping"] == {"across": 6, "all": 7}
    assert "LEAK: in more than one split: 6 pairs of videos that share footage\n" in out
    assert "within a split: 1 group of identical videos, 1 pair of videos that share footage\n" in out
    assert "warning: burned-in text, which may identify a patient, in 1 video\n" in out
    assert "black: 2 videos\nfrozen: 1 video\n" in out
    assert "unreadable or left out: 1\n" in out


def test_the_report_is_a_page_and_pictures(corpus, tmp_path, run):
    report = tmp_path / "new" / "report"
    assert run(corpus, "--output", report)[0] == 0
    assert {path.name for path in report.iterdir()} == {
        "audit.json",
        "audit.md",
        "contact_sheet.png",
        "text_regions.png",
    }
    page = (report / "audit.md").read_text()
    assert "| 128x96 | 8 | h264 | 6 | 200 |" in page
    assert "- mirrored: test/mirrored (test, 0 to 1.56 s, 100% of its frames); train/b.mp4 (train, 0 to" in page
    assert "1 files are neither videos nor frames of one" in page
    assert "- test/broken.mp4: cannot be read as a video" in page
    rows = page.split("## Rows of contact_sheet.png\n\n")[1].split("\n\n")[0].splitlines()
    assert len(rows) == 11
    with Image.open(report / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * 130 - 2, 11 * 130 - 2)

        dark = [np.asarray(sheet)[130 * i : 130 * i + 128, :128].max() < 20 for i in range(11)]
    assert [row for row, black in zip(rows, dark, strict=True) if black] == ["- test/black.mp4", "- train/black.mp4"]
    with Image.open(report / "text_regions.png") as picture:
        assert ((np.asarray(picture)[..., 1] == 255) & (np.asarray(picture)[..., 0] == 0)).sum() > 100  # the box


def test_strict_is_for_scripts(corpus, flights, tmp_path, run):
    assert run(corpus, "--output", tmp_path / "a", "--strict")[0] == 3
    assert (tmp_path / "a/audit.md").is_file()
    for name, frames in zip(("train", "test"), flights, strict=False):
        (tmp_path / "fine" / name).mkdir(parents=True)
        write_video(tmp_path / "fine" / name / "a.mp4", frames[:12], FPS)
    code, out, _ = run(tmp_path / "fine", "--output", tmp_path / "b", "--strict")
    assert code == 0
    assert "no footage found in more than one split\n" in out
    code, out, _ = run(tmp_path / "fine/train", "--output", tmp_path / "c", "--strict")
    assert (code, "more than one split" in out) == (0, False)
    assert "- all videos are in one split; splits are told by" in (tmp_path / "c/audit.md").read_text()


def test_two_runs_give_the_same_report(corpus, tmp_path):
    for name, num_proc in (("a", 1), ("b", 3)):
        audit_corpus(list_folder(corpus), tmp_path / name, num_proc=num_proc)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_splits_are_told_by_folders_and_by_names_of_shards(flights, tmp_path):
    for path in ("adenoma/Train/x.mp4", "adenoma/val/y.mp4", "other/train_set.mp4", "testing/z/deep.mp4"):
        (tmp_path / "a" / path).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "a" / path, flights[0][:1], FPS)
    found = {video.name: video.split for video in list_folder(tmp_path / "a").videos}
    assert found == {
        "adenoma/Train/x.mp4": "train",
        "adenoma/val/y.mp4": "validation",
        "other/train_set.mp4": WHOLE,
        "testing/z/deep.mp4": "test",
    }
    for path in (
        "data/train-00000-of-00002.parquet",
        "data/dev-00000-of-00001.parquet",
        "fold_1-00000-of-00001.parquet",
    ):
        write_parquet(tmp_path / "b" / path, [{"video_id": "x"}], flights[0][:1])
    write_parquet(tmp_path / "b/data/test/0.parquet", [{}], flights[0][:1])
    found = {video.name: video.split for video in list_folder(tmp_path / "b").videos}
    assert found == {
        "data/train-00000-of-00002.parquet: x": "train",
        "data/dev-00000-of-00001.parquet: x": "validation",
        "fold_1-00000-of-00001.parquet: x": "fold_1",
        "data/test/0.parquet: row 0": "test",
    }


# --- shards ----------------------------------------------------------------------------------------------------------


def video_bytes(frames, crf=20):
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        from pathlib import Path

        return write_video(Path(folder, "a.mp4"), frames, FPS, crf=crf).read_bytes()


def write_parquet(path, rows, frames):
    """A shard with a row of `frames` for each dict; the frames of a row may be its own, under `frames`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        {"video": {"bytes": video_bytes(row.get("frames", frames)), "path": "a.mp4"}}
        | {name: value for name, value in row.items() if name != "frames"}
        for row in rows
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), path, row_group_size=2)


def write_tar(path, rows, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, row in enumerate(rows):
            stated = {name: value for name, value in row.items() if name != "frames"}
            for extension, content in (
                ("mp4", video_bytes(row.get("frames", frames))),
                ("json", json.dumps(stated).encode()),
                ("cls", b"0"),
            ):
                member = tarfile.TarInfo(f"{i:03d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(("extension", "write"), [("parquet", write_parquet), ("tar", write_tar)])
def test_shards_are_read_row_by_row(extension, write, flights, tmp_path):
    a, b, c = flights
    parts = [
        {"video_id": "one", "start_frame": 0, "frames": a[:20]},
        {"video_id": "one", "start_frame": 20, "frames": a[18:38]},  # parts of one video, in one split
        {"video_id": "two", "start_frame": 0, "frames": b[:20]},
    ]
    data = tmp_path / "prepared/data"
    write(data / f"train-00000-of-00001.{extension}", parts, None)
    leaks = [
        {"video_id": "three", "start_frame": 0, "frames": half(b[4:16])},
        {"video_id": "one", "start_frame": 40, "frames": c[:20]},
    ]
    write(data / f"test-00000-of-00001.{extension}", leaks, None)
    (data / f"validation-00000-of-00001.{extension}").write_bytes(b"half a shard")
    audit, facts = audit_corpus(list_folder(tmp_path / "prepared"), tmp_path / "report")
    test, train = (f"data/{name}-00000-of-00001.{extension}" for name in ("test", "train"))
    assert [video.name for video in audit.videos] == [
        f"{test}: three",
        f"{test}: one, from frame 40",
        f"{train}: one",
        f"{train}: one, from frame 20",
        f"{train}: two",
    ]
    assert pairs_of(facts) == {(f"{test}: three", f"{train}: two", False, True)}
    assert facts["ids_in_several_splits"] == {"one": ["test", "train"]}
    assert facts["num_leaks"] == 2
    ((name, reason),) = audit.unreadable
    assert name == f"data/validation-00000-of-00001.{extension}"
    assert reason.startswith("cannot be read as a shard (")
    assert [e.info.num_frames for e in audit.examinations] == [12, 20, 20, 20, 20]


def test_rows_without_a_video_are_counted(flights, tmp_path):
    folder = tmp_path / "shards"
    write_parquet(folder / "train-00000-of-00001.parquet", [{}, {}, {}], flights[0][:3])
    table = pyarrow.parquet.read_table(folder / "train-00000-of-00001.parquet").to_pylist()
    table[0]["video"] = {"bytes": None, "path": None}
    table[1]["video"] = {"bytes": b"no video", "path": "a.mp4"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / "words.parquet")
    audit, _ = audit_corpus(list_folder(folder), tmp_path / "report")
    assert [video.name for video in audit.videos] == ["train-00000-of-00001.parquet: row 2"]
    reasons = {name.split(".parquet")[0] + name[-2:]: reason for name, reason in audit.unreadable}
    assert "expected a column 'video', found text" in reasons["wordset"]
    assert reasons["train-00000-of-00001 0"].startswith("column 'video': expected")
    assert reasons["train-00000-of-00001 1"].startswith("cannot be read as a video")


def test_the_raw_folder_of_a_corpus_has_its_own_splits(tmp_path, run):
    raw = write_tree("cholectriplet", "cholect50", tmp_path / "raw", num_frames=6)
    code, _, err = run("cholectriplet", "--data_dir", raw, "--output", tmp_path / "a")
    assert (code, err) == (0, "")
    facts = json.loads((tmp_path / "a/audit.json").read_text())
    by_split = {video["name"]: video["split"] for video in facts["videos"]}
    assert set(by_split.values()) == {"train", "validation", "test"}
    assert facts["notes"] == ["splits: cholect50"]
    assert {video["fps"] for video in facts["videos"]} == {1.0}
    options = ("--split_protocol", "cholect50-crossval", "--fold", 2)
    assert run("cholectriplet", "--data_dir", raw, "--output", tmp_path / "b", *options)[0] == 0
    facts = json.loads((tmp_path / "b/audit.json").read_text())
    assert {video["name"]: video["split"] for video in facts["videos"]} != by_split


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_audited_is_refused_in_a_sentence(flights, tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.mp4").write_bytes(b"")
    (tmp_path / "good").mkdir()
    write_video(tmp_path / "good/a.mp4", flights[0][:2], FPS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    good, report = tmp_path / "good", tmp_path / "report"
    for arguments, expected in (
        (
            (tmp_path / "nowhere", "--output", report),
            "nowhere: expected a folder of videos or shards, but there is no",
        ),
        ((tmp_path / "empty", "--output", report), "empty: holds no video; expected video files"),
        ((tmp_path / "bad", "--output", report), "none of its 1 videos can be read, such as a.mp4: "),
        ((good, "--output", tmp_path / "full"), "full: is not empty; choose another folder"),
        ((good, "--output", tmp_path / "file"), "file: is a file; expected a name"),
        ((good, "--output", tmp_path / "file/report"), "cannot be made in"),
        ((good, "--output", good / "report"), "lies in the corpus"),
        ((good, "--output", good), "is not empty"),
        ((good, "--output", report, "--seconds_between", "0"), "--seconds_between 0.0: expected a positive number"),
        ((good, "--output", report, "--fold", "1"), "--fold: belongs to a corpus with --data_dir"),
        (("colonoscopic", "--output", report), "colonoscopic: give its folder with --data_dir"),
        (("colon", "--data_dir", good, "--output", report), "colon: is no corpus; expected one of"),
        (("colonoscopic", "--data_dir", good, "--output", report, "--fold", "1"), "fold: is no option here"),
        (("colonoscopic", "--data_dir", good, "--output", report), "expected the owners' tree"),
        (("phantom", "--data_dir", good, "--output", report), "the phantom is rendered and takes no folder"),
    ):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1), arguments
        assert err.startswith("endora: error: ")
        assert expected in err
    assert not report.exists()
    assert (tmp_path / "full/thesis.tex").read_text() == "x"


def test_a_report_that_cannot_be_finished_leaves_nothing(flights, tmp_path, monkeypatch):
    (tmp_path / "good").mkdir()
    write_video(tmp_path / "good/a.mp4", flights[0][:2], FPS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_endora.data.audit.report.save_contact_sheet", full)
    with pytest.raises(OSError, match="No space left"):
        audit_corpus(list_folder(tmp_path / "good"), tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_names_that_are_not_utf8(flights, tmp_path, run):
    folder = tmp_path / "corpus"
    folder.mkdir()
    content = video_bytes(flights[0][:3])
    for name in (b"caf\xe9.mp4", b"a|b\n.mp4"):
        (folder / "x").write_bytes(content)
        (folder / "x").rename(str(folder / name.decode("utf-8", "surrogateescape")))
    (folder / b"bad\xe9.mp4".decode("utf-8", "surrogateescape")).write_bytes(b"no")
    code, out, err = run(folder, "--output", tmp_path / "report")
    assert (code, err) == (0, "")
    assert "within a split: 1 group of identical videos" in out
    page = (tmp_path / "report/audit.md").read_text(encoding="utf-8")
    assert "caf\\udce9.mp4" in page
    assert "bad\\udce9.mp4: cannot be read as a video" in page


@pytest.mark.slow
def test_a_missing_package_is_named():
    script = (
        "import sys; sys.modules['scipy'] = None; sys.argv = ['endora', 'audit', '.', '--output', 'report']\n"
        "from diffusers_endora.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'needs scipy: pip install "diffusers-endora[metrics,train]"' in done.stderr
