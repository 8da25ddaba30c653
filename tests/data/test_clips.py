"""Which frames, which pixels and which labels make an item; and that broken files harm neither a run nor a batch.

Most videos here are folders of PNG frames in which frame `i` of video `v` has red = v, green = i and a blue left half,
so that an item shows where it came from.
"""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_endora.data import clips
from diffusers_endora.data.clips import (
    ClipDataset,
    find_videos,
    resize_and_crop_clip,
    resize_and_crop_image,
    sample_strided,
    sample_window,
)
from diffusers_endora.data.video_io import VideoError, read_frames, write_video


def marked_frames(video: int, num_frames: int) -> np.ndarray:
    frames = np.zeros((num_frames, 16, 24, 3), np.uint8)
    frames[..., 0] = video
    frames[..., 1] = np.arange(num_frames)[:, None, None]
    frames[:, :, :12, 2] = 255
    return frames


def write_corpus(root: Path, lengths: list[int], name: str = "{:02d}") -> Path:
    """A video per length; video `v` is the folder `name.format(v)`."""
    for video, num_frames in enumerate(lengths):
        folder = root / name.format(video)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_video(folder, marked_frames(video, num_frames), 25, "png")
    return root


def origins(video: torch.Tensor) -> list[tuple[int, int]]:
    """(video, frame) of each frame of an item's `video`, float32 (F, 3, H, W) in [-1, 1]."""
    colours = ((video + 1) * 127.5).round().int()
    assert (colours[:, :2] == colours[:, :2, :1, :1]).all()
    return [(int(r), int(g)) for r, g in colours[:, :2, 0, 0]]


def is_flipped(video: torch.Tensor) -> torch.Tensor:
    """Whether each frame has its blue half on the right, (F,)."""
    return video[:, 2, 0, -1] > video[:, 2, 0, 0]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- which frames ----------------------------------------------------------------------------------------------------


def test_the_official_window(rng):
    assert sample_window(48, 16, 48, rng).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 47]
    for total in range(16, 50):  # to 49 frames there is one window, and it starts at 0
        expected = np.linspace(0, min(total, 48) - 1, 16).astype(int)
        np.testing.assert_array_equal(sample_window(total, 16, 48, rng), expected)
    assert sample_window(20, 16, 48, rng).dtype == np.int64


@pytest.mark.parametrize(("total", "last_start"), [(49, 0), (50, 1), (100, 51)])
def test_every_start_to_total_minus_49_is_drawn_equally_often(total, last_start, rng):
    draws = [sample_window(total, 16, 48, rng) for _ in range(100 * (last_start + 1))]
    starts = Counter(int(indices[0]) for indices in draws)
    assert sorted(starts) == list(range(last_start + 1))
    assert all(60 < count < 140 for count in starts.values())  # 100 expected, standard deviation 10
    assert all(indices[-1] - indices[0] == 47 for indices in draws)


def test_strided_clips_have_an_exact_stride_and_every_possible_start(rng):
    draws = [sample_strided(50, 16, 3, rng) for _ in range(200)]
    assert {int(indices[0]) for indices in draws} == {0, 1, 2, 3, 4}  # 46 frames fit five times into 50
    assert all((np.diff(indices) == 3).all() for indices in draws)
    assert sample_strided(46, 16, 3, rng).tolist() == list(range(0, 46, 3))


def test_a_video_that_is_too_short_for_a_clip(rng):
    with pytest.raises(ValueError, match=r"num_frames=16: expected 1 to 15, as the video has 15 frames"):
        sample_window(15, 16, 48, rng)
    with pytest.raises(ValueError, match=r"num_frames=16: expected 1 to 12, .* the window 12"):
        sample_window(100, 16, 12, rng)
    with pytest.raises(ValueError, match=r"a clip spans 46 frames, but the video has 45"):
        sample_strided(45, 16, 3, rng)


# --- which pixels ----------------------------------------------------------------------------------------------------


def test_halving_averages_pairs_of_pixels(rng):
    frames = rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    means = frames.reshape(2, 128, 2, 128, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(resize_and_crop_clip(frames, 128, 128), means / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("size", [(256, 340), (340, 256), (720, 1280), (97, 129), (64, 64)])
def test_clips_are_resized_as_in_the_official_loader(size, rng):
    frames = rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    pixels = F.interpolate(pixels, scale_factor=128 / min(size), mode="bilinear", align_corners=False)
    top, left = (round((side - 128) / 2.0) for side in pixels.shape[2:])
    expected = pixels[:, :, top : top + 128, left : left + 128] * 2 - 1
    np.testing.assert_allclose(resize_and_crop_clip(frames, 128, 128), expected, atol=2e-6)


def test_rounding_never_makes_a_clip_smaller_than_the_crop():
    sides = [side for side in range(64, 800) if int(128 / side * side) < 128]
    assert len(sides) > 10
    for side in sides:
        for size in ((side, side + 1), (side + 1, side), (side, side)):
            assert resize_and_crop_clip(np.zeros((1, *size, 3), np.uint8), 128, 128).shape == (1, 3, 128, 128)


@pytest.mark.parametrize("size", [(90, 300), (300, 90), (95, 129), (720, 1280)])
def test_rectangles_are_covered(size):
    assert resize_and_crop_clip(np.zeros((1, *size, 3), np.uint8), 96, 128).shape == (1, 3, 96, 128)
    assert resize_and_crop_image(np.zeros((*size, 3), np.uint8), 96, 128).shape == (3, 96, 128)


def test_antialiasing_removes_what_the_smaller_picture_cannot_show():
    stripes = np.zeros((1, 512, 512, 3), np.uint8)
    stripes[:, :, ::4] = 255  # one bright column in four, shrunk four times
    assert resize_and_crop_clip(stripes, 128, 128).std() < 1e-6
    np.testing.assert_allclose(resize_and_crop_clip(stripes, 128, 128).mean(), -1)  # the bright columns are missed
    np.testing.assert_allclose(resize_and_crop_clip(stripes, 128, 128, antialias=True).mean(), -0.5, atol=0.01)


def test_still_images_are_resized_by_pillow_and_kept_if_they_fit(rng):
    image = rng.integers(0, 256, (256, 340, 3), dtype=np.uint8)
    resized = np.array(Image.fromarray(image).resize((170, 128), Image.Resampling.LANCZOS))[:, 21:149]
    kept = image[:128, :128]
    for given, expected in ((image, resized), (kept, kept)):
        pixels = resize_and_crop_image(given, 128, 128)
        np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


# --- which videos ----------------------------------------------------------------------------------------------------


def test_videos_and_folders_of_frames_are_found_among_other_files(tmp_path):
    for name in (
        "video10.mp4", "video2.MP4", "deep/er/NBI.avi", "frames/000000.png", "frames/000001.png", "frames/.DS_Store",
        "deep/thumbnail.jpg", "deep/WL.mkv", ".DS_Store", "train.csv", "._video2.mp4", "__MACOSX/video2.mp4",
        ".git/a.mp4",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    videos, num_ignored = find_videos(tmp_path)
    assert [v.relative_to(tmp_path).as_posix() for v in videos] == [
        "deep/er/NBI.avi", "deep/WL.mkv", "frames", "video2.MP4", "video10.mp4",
    ]  # fmt: skip
    assert num_ignored == 2  # the thumbnail and the list; hidden files do not count


# --- items -----------------------------------------------------------------------------------------------------------


def test_an_item_is_one_window_of_its_video(tmp_path):
    dataset = ClipDataset(write_corpus(tmp_path, [60, 20, 100]), resolution=8, seed=3)
    assert (len(dataset), dataset.num_videos, dataset.total_frames) == (180, 3, 180)
    flips = 0
    for index in range(0, 180, 3):
        video = dataset[index + 1]["video"]
        assert (video.shape, video.dtype) == ((16, 3, 8, 8), torch.float32)
        assert origins(video) == [(1, i) for i in np.linspace(0, 19, 16).astype(int)]
        flips += int(is_flipped(video)[0])
        assert is_flipped(video).all() or not is_flipped(video).any()
    assert 15 < flips < 45  # of 60

    starts = set()
    for index in range(2, 180, 3):
        where = origins(dataset[index]["video"])
        start = where[0][1]
        assert where == [(2, i) for i in np.linspace(start, start + 47, 16).astype(int)]
        starts.add(start)
    assert len(starts) > 25  # of the 52 possible in 60 draws


def test_an_epoch_draws_all_videos_equally_often(tmp_path):
    root = write_corpus(tmp_path, [30, 16, 17])
    by_frames = ClipDataset(root, resolution=8)
    assert [origins(by_frames[i]["video"])[0][0] for i in range(len(by_frames))] == [i % 3 for i in range(63)]
    by_videos = ClipDataset(root, resolution=8, epoch_over="videos")
    assert [origins(by_videos[i]["video"])[0][0] for i in range(len(by_videos))] == [0, 1, 2]
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"index {index}: expected 0 to 2"):
            by_videos[index]


def test_exact_stride_resolution_and_no_flip(tmp_path):
    dataset = ClipDataset(
        write_corpus(tmp_path, [12, 9]), num_frames=4, frame_interval=3, resolution=(8, 12), horizontal_flip=False
    )
    assert dataset.num_videos == 1  # nine frames are too few for 1 + 3 x 3
    for index in range(12):
        video = dataset[index]["video"]
        assert video.shape == (4, 3, 8, 12)
        start = origins(video)[0][1]
        assert origins(video) == [(0, start + 3 * k) for k in range(4)]
        assert not is_flipped(video).any()


def test_still_images_are_neighbours_in_a_list_that_was_shuffled_once(tmp_path):
    dataset = ClipDataset(write_corpus(tmp_path, [20, 16]), resolution=8, num_still_images=4)
    stills = []
    for index in range(36):
        video = dataset[index]["video"]
        assert video.shape == (20, 3, 8, 8)
        assert not is_flipped(video[16:]).any()
        stills.append(origins(video[16:]))
    for index in range(36):
        assert stills[index][1:] == stills[(index + 1) % 36][:3]
    order = [first for first, *_ in stills]
    assert sorted(order) == [(0, i) for i in range(20)] + [(1, i) for i in range(16)]
    assert order != sorted(order)

    dataset.set_epoch(5)  # the same order in each epoch, which the epoch's length divides
    assert [origins(dataset[i]["video"][16:17])[0] for i in range(36)] == order
    by_videos = ClipDataset(tmp_path, resolution=8, num_still_images=1, epoch_over="videos")
    drawn = []
    for epoch in range(18):  # short epochs go on in the list
        by_videos.set_epoch(epoch)
        drawn += [origins(by_videos[i]["video"][16:])[0] for i in range(2)]
    assert drawn == order


def test_still_images_from_a_folder(tmp_path):
    corpus = write_corpus(tmp_path / "videos", [16, 16], "class{}/clip")
    images = write_corpus(tmp_path / "images", [0 + 2, 3, 2], "class{}/clip")
    with pytest.raises(ValueError, match=r"'class2' is not a class; expected one of class0, class1"):
        ClipDataset(corpus, num_still_images=2, still_images=images, class_labels=True)
    dataset = ClipDataset(corpus, resolution=8, num_still_images=2, still_images=images)
    drawn = {origin for index in range(7) for origin in origins(dataset[index]["video"][16:])}
    assert drawn == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)}


def test_class_labels_are_sub_folders(tmp_path):
    dataset = ClipDataset(
        write_corpus(tmp_path, [16, 20, 18], "grade{0}/patient/clip"), resolution=8, class_labels=True
    )
    assert (dataset.class_names, dataset.num_classes) == (["grade0", "grade1", "grade2"], 3)
    for index in range(6):
        item = dataset[index]
        assert item["class_labels"].dtype == torch.int64
        assert item["class_labels"].shape == ()
        assert item["class_labels"] == origins(item["video"])[0][0]

    dataset = ClipDataset(tmp_path, resolution=8, class_labels=True, num_still_images=3)
    for index in range(6):
        item = dataset[index]
        where = origins(item["video"])
        assert item["class_labels"].tolist() == [where[0][0], *(video for video, _ in where[16:])]

    assert ClipDataset(tmp_path / "grade0").class_names is None
    assert "class_labels" not in ClipDataset(tmp_path / "grade0", resolution=8)[0]
    with pytest.raises(ValueError, match=r"clip: class labels need one sub-folder of .*patient per class"):
        ClipDataset(tmp_path / "grade0" / "patient", class_labels=True)


def test_rows_of_paths_and_bytes(tmp_path):
    for video, num_frames in enumerate((16, 20)):
        write_video(tmp_path / f"{video}.mkv", marked_frames(video, num_frames), 25, "ffv1")
    rows = [
        {"video": {"path": str(tmp_path / "0.mkv"), "bytes": None}, "grade": 4},
        {"video": {"path": "elsewhere/1.mkv", "bytes": (tmp_path / "1.mkv").read_bytes()}, "grade": 1},
        {"video": str(tmp_path / "1.mkv"), "grade": 0},
        {"video": {"path": None, "bytes": None}, "grade": 0},
        {"video": {"path": "elsewhere/1.mkv", "bytes": b""}, "grade": 0},
    ]
    dataset = ClipDataset(rows, resolution=8, class_labels=True, label_column="grade", num_still_images=1)
    assert (dataset.num_videos, dataset.total_frames, dataset.num_classes) == (3, 56, 5)
    assert list(dataset.broken_files) == ["row 3", "row 4"]
    assert dataset.broken_files["row 3"] == "column 'video': expected {'path', 'bytes'} or a path, got NoneType"
    assert dataset.broken_files["row 4"].startswith("0 bytes in memory: cannot be read as a video (")
    for index, (video, grade) in enumerate([(0, 4), (1, 1), (1, 0)]):
        item = dataset[index]
        assert origins(item["video"])[0][0] == video
        assert item["class_labels"].tolist()[0] == grade
    with pytest.raises(ValueError, match=r"label_column='label': expected labels, but no row has one"):
        ClipDataset(rows, class_labels=True)
    with pytest.raises(ValueError, match=r"the rows: .*such as row 0: column 'clip': expected .* got NoneType"):
        ClipDataset(rows, video_column="clip")


@pytest.mark.parametrize("decode", [False, True])
def test_a_datasets_dataset(decode, tmp_path):
    datasets = pytest.importorskip("datasets")
    videos = [
        {"path": None, "bytes": write_video(tmp_path / f"{v}.mkv", marked_frames(v, 16), 25, "ffv1").read_bytes()}
        for v in range(3)
    ]
    features = datasets.Features(
        {"video": datasets.Video(decode=False), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"video": videos, "label": [1, 0, 1]}, features=features)
    rows = rows.cast_column("video", datasets.Video(decode=decode))  # decoding would need torchcodec
    dataset = ClipDataset(rows, resolution=8, class_labels=True)
    assert dataset.class_names == ["no", "yes"]
    for index in range(3):
        item = dataset[index]
        assert origins(item["video"])[0][0] == index
        assert item["class_labels"] == [1, 0, 1][index]
    with pytest.raises(ValueError, match=r"label_column='kind': expected one of the columns video, label"):
        ClipDataset(rows, class_labels=True, label_column="kind")
    assert len(ClipDataset(datasets.DatasetDict(train=rows), resolution=8)) == 48
    with pytest.raises(ValueError, match=r"split='test': expected one of train"):
        ClipDataset(datasets.DatasetDict(train=rows), split="test")
    for bad in ({"video": videos}, {}, iter(videos), 3, ["a.mp4"], [1, 2], np.zeros((2, 3)), [{}, "a.mp4"], [None]):
        with pytest.raises(ValueError, match=r"expected a folder, the id of a dataset, .* or a list of dicts"):
            ClipDataset(bad)


# --- repeatability ---------------------------------------------------------------------------------------------------


def test_an_item_depends_on_seed_epoch_and_index_alone(tmp_path):
    root = write_corpus(tmp_path, [100, 100])
    arguments = {"resolution": 8, "num_still_images": 1}
    dataset, again = ClipDataset(root, **arguments), ClipDataset(root, **arguments)
    indices = list(range(0, 40, 2))  # all of one video
    items = [dataset[i]["video"] for i in indices]
    for index, item in reversed(list(zip(indices, items, strict=True))):
        assert torch.equal(again[index]["video"], item)

    def starts(some: ClipDataset) -> list[tuple[int, int]]:
        return [origins(some[i]["video"])[0] for i in indices]

    assert starts(ClipDataset(root, seed=1, **arguments)) != starts(dataset)
    first_epoch = starts(dataset)
    dataset.set_epoch(1)
    assert starts(dataset) != first_epoch
    dataset.set_epoch(0)
    assert starts(dataset) == first_epoch


def test_workers_do_not_change_items_and_persistent_ones_see_the_epoch(tmp_path):
    root = write_corpus(tmp_path, [60, 70], "class{}/clip")
    dataset = ClipDataset(root, resolution=8, num_still_images=2, class_labels=True)
    loader = DataLoader(dataset, batch_size=3, sampler=range(9), num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        batches = list(loader)
        assert [tuple(b["video"].shape) for b in batches] == [(3, 18, 3, 8, 8)] * 3
        assert [tuple(b["class_labels"].shape) for b in batches] == [(3, 3)] * 3
        here = ClipDataset(root, resolution=8, num_still_images=2, class_labels=True)
        here.set_epoch(epoch)
        for index in range(9):
            assert torch.equal(batches[index // 3]["video"][index % 3], here[index]["video"])
            assert torch.equal(batches[index // 3]["class_labels"][index % 3], here[index]["class_labels"])


# --- broken files ----------------------------------------------------------------------------------------------------


def test_broken_and_short_files_are_reported_once_and_left_out(tmp_path, caplog):
    write_video(tmp_path / "good.mkv", marked_frames(7, 16), 25, "ffv1")
    write_video(tmp_path / "short.mkv", marked_frames(1, 15), 25, "ffv1")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    whole = write_video(tmp_path / "cut.mp4", marked_frames(0, 30), 25).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:300])
    for stray in (".DS_Store", "list.csv"):
        (tmp_path / stray).write_text("")

    with caplog.at_level(logging.WARNING):
        dataset = ClipDataset(tmp_path, resolution=8)
        for index in range(16):
            assert origins(dataset[index]["video"])[0][0] == 7
    assert (dataset.num_videos, dataset.num_broken, dataset.num_ignored_files) == (1, 3, 1)
    assert dataset.too_short == {str(tmp_path / "short.mkv"): 15}
    assert sorted(Path(name).name for name in dataset.broken_files) == ["cut.mp4", "empty.mp4", "text.mp4"]
    assert all("cannot be read as a video (" in reason for reason in dataset.broken_files.values())
    messages = [record.getMessage() for record in caplog.records]
    for name in ("cut.mp4", "empty.mp4", "text.mp4", "short.mkv"):
        assert sum(name in message for message in messages) == 1
    assert "1 of 5 videos have fewer than the 16 frames of a clip" in messages[-1]


def test_no_usable_video(tmp_path):
    with pytest.raises(ValueError, match=r"absent: expected a folder with videos, but there is no such folder"):
        ClipDataset(tmp_path / "absent")
    (tmp_path / "list.csv").write_text("")
    with pytest.raises(ValueError, match=r"at least one usable video .*; 0 found, .* 1 other files were ignored"):
        ClipDataset(tmp_path)
    (tmp_path / "a.mp4").write_text("text")
    write_corpus(tmp_path, [3, 4])
    message = (
        r"3 found, of which 1 cannot be read \(such as .*a.mp4: cannot be read as a video .*\); "
        r"2 of 3 videos have fewer than the 16 frames of a clip \(such as .*00: 3\); 1 other files were ignored"
    )
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_fails_when_decoded_is_replaced(num_workers, tmp_path, caplog):
    root = write_corpus(tmp_path, [16, 16, 16])
    damaged = root / "01" / "000005.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    dataset = ClipDataset(root, resolution=8, num_still_images=2)
    assert (dataset.num_videos, dataset.num_broken) == (3, 0)  # not found without decoding all frames

    with caplog.at_level(logging.WARNING):
        batches = list(DataLoader(dataset, batch_size=4, num_workers=num_workers))
    if num_workers == 0:  # workers log in their own processes
        name = str(root / "01")
        reason = f"{damaged}: cannot be read as an image (its content is no image)"
        assert caplog.messages == [f"damaged file, another takes its place: {name}: {reason}"]
        assert dataset.broken_files == {name: reason}
    assert list(dataset.broken_files) == [str(root / "01")]

    videos = torch.cat([batch["video"] for batch in batches])
    assert len(videos) == len(dataset)
    for index, video in enumerate(videos):
        where = origins(video)
        assert (1, 5) not in where
        assert where[0][0] in {0: (0,), 1: (0, 2), 2: (2,)}[index % 3]
    assert {where[0][0] for where in map(origins, videos[1::3])} == {0, 2}  # no single stand-in
    assert any((1, 4) in origins(video[16:]) for video in videos)  # its intact frames stay in use
    again = ClipDataset(root, resolution=8, num_still_images=2)
    for index in reversed(range(48)):  # what was met before makes no difference
        assert torch.equal(again[index]["video"], videos[index])


def test_when_nothing_can_be_decoded(tmp_path):
    root = write_corpus(tmp_path, [16])
    (root / "00" / "000005.png").write_bytes(b"")
    with pytest.raises(VideoError, match=r"64 draws in a row met damaged data \(.*000005.png: cannot be read"):
        ClipDataset(root)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, r"num_frames=0: expected a positive integer"),
        ({"frame_interval": 0}, r"frame_interval=0: expected a positive integer"),
        ({"window": 15}, r"window=15: expected at least num_frames=16"),
        ({"resolution": 0}, r"resolution=0: expected a positive integer"),
        ({"num_still_images": -1}, r"num_still_images=-1: expected an integer from 0 up"),
        ({"still_images": "."}, r"num_still_images=0 with a folder of still_images"),
        ({"epoch_over": "clips"}, r"epoch_over='clips': expected 'frames' or 'videos'"),
        ({"seed": -1}, r"seed=-1: expected an integer from 0 up"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path, **arguments)


def test_real_endoscopy(shared_file, monkeypatch):
    path = shared_file("clips/cholecystectomy/endo.mp4")
    dataset = ClipDataset(path.parent, horizontal_flip=False, num_still_images=1)
    assert len(dataset) == 250
    drawn = []
    monkeypatch.setattr(clips, "sample_window", lambda *args: drawn.append(sample_window(*args)) or drawn[-1])
    item = dataset[7]["video"]
    assert item.shape == (17, 3, 128, 128)
    assert torch.equal(item[:16], resize_and_crop_clip(read_frames(path, drawn[0]), 128, 128))


# --- cache and frame ids ---------------------------------------------------------------------------------------------


def test_items_do_not_depend_on_the_cache(tmp_path):
    root = write_corpus(tmp_path, [20, 30, 60])
    options = {"resolution": 8, "num_still_images": 2, "seed": 3}
    plain, cached = ClipDataset(root, **options), ClipDataset(root, **options, cache_gb=1)
    room_for_one = ClipDataset(root, **options, cache_gb=2 * 20 * 3 * 8 * 8 * 4 / 1e9)
    for index in [0, 1, 2, 0, 50]:
        for name, value in plain[index].items():
            assert torch.equal(value, cached[index][name])
            assert torch.equal(value, room_for_one[index][name])
    assert set(cached._cache) == {0, 1, 2}
    assert set(room_for_one._cache) == {0}


def test_the_cache_brings_a_long_video_in_by_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "_DECODED_AT_A_TIME", 1)  # the least: 16 frames
    root = write_corpus(tmp_path, [50])
    plain, cached = ClipDataset(root, resolution=8), ClipDataset(root, resolution=8, cache_gb=1)
    assert torch.equal(plain[7]["video"], cached[7]["video"])


def test_a_damaged_video_gives_the_same_items_with_and_without_the_cache(tmp_path):
    root = write_corpus(tmp_path, [60, 60])
    (root / "00" / "000059.png").write_bytes(b"no image")
    items = []
    for cache_gb in (0, 1):
        dataset = ClipDataset(root, resolution=8, seed=1, cache_gb=cache_gb)
        items.append([dataset[index]["video"] for index in (0, 2, 0, 4, 6, 8)])
    assert all(torch.equal(plain, cached) for plain, cached in zip(*items, strict=True))


def test_equal_frame_ids_mean_equal_pixels(tmp_path):
    dataset = ClipDataset(write_corpus(tmp_path, [20, 40]), resolution=8, num_still_images=2)
    pixels = {}
    for index in range(len(dataset)):
        item = dataset[index]
        for frame_id, frame in zip(item["frame_ids"].tolist(), item["video"], strict=True):
            assert torch.equal(pixels.setdefault(frame_id, frame), frame)
    assert len(pixels) > 2 * 40  # frames, mirrored frames and still images are told apart


# --- evaluation, shards and resuming ---------------------------------------------------------------------------------


def test_fixed_starts_are_spread_from_the_first_to_the_last_place():
    assert clips.fixed_starts(100, 48, 3).tolist() == [0, 26, 52]
    assert clips.fixed_starts(100, 48, 1).tolist() == [0]
    assert clips.fixed_starts(49, 48, 5).tolist() == [0, 1]
    assert clips.fixed_starts(48, 48, 5).tolist() == [0]


def test_fixed_offsets_have_no_chance_in_them(tmp_path):
    root = write_corpus(tmp_path, [100, 20, 49])
    dataset = ClipDataset(root, resolution=8, fixed_offsets=True, clips_per_video=3)
    assert len(dataset) == 3 + 1 + 2
    starts = [(0, 0), (0, 26), (0, 52), (1, 0), (2, 0), (2, 1)]
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        assert [origins(item["video"])[0] for item in dataset] == starts
        assert not any(is_flipped(item["video"]).any() for item in dataset)
    assert [frame for _, frame in origins(dataset[1]["video"])] == [
        26 + i for i in (0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 47)
    ]
    strided = ClipDataset(root, num_frames=4, frame_interval=5, resolution=8, fixed_offsets=True, clips_per_video=2)
    assert [origins(item["video"]) for item in strided][1] == [(0, frame) for frame in (84, 89, 94, 99)]
    with pytest.raises(ValueError, match="clips_per_video=2: is for fixed_offsets"):
        ClipDataset(root, clips_per_video=2)
    assert len(ClipDataset(root, resolution=8, clips_per_video=2, epoch_over="videos")) == 6


def test_nothing_takes_the_place_of_a_damaged_clip_at_fixed_offsets(tmp_path):
    root = write_corpus(tmp_path, [20, 20])
    (root / "01" / "000007.png").write_bytes(b"no image")
    dataset = ClipDataset(root, resolution=8, num_frames=4, frame_interval=1, fixed_offsets=True, clips_per_video=17)
    assert origins(dataset[17]["video"])[0] == (1, 0)
    with pytest.raises(VideoError, match=r"000007\.png: cannot be read"):
        dataset[17 + 7]


def shards(tmp_path: Path) -> Path:
    """Parquet files of two splits, with numbers of frames."""
    datasets = pytest.importorskip("datasets")
    for split, first in (("train", 0), ("test", 3)):
        rows = [
            {
                "video": {
                    "path": f"{v}.mkv",
                    "bytes": write_video(tmp_path / f"{v}.mkv", marked_frames(v, 20), 25, "ffv1").read_bytes(),
                },
                "label": v if v != 1 else None,
                "num_frames": 20,
            }
            for v in range(first, first + 3)
        ]
        features = datasets.Features(
            {
                "video": datasets.Video(decode=False),
                "label": datasets.ClassLabel(num_classes=6),
                "num_frames": datasets.Value("int64"),
            }
        )
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    for path in tmp_path.glob("*.mkv"):
        path.unlink()
    return tmp_path


def test_a_folder_of_shards(tmp_path, caplog, monkeypatch):
    root = shards(tmp_path)
    monkeypatch.setattr(clips, "read_video_info", None)  # not needed: the rows say how many frames there are
    train, test = ClipDataset(root, resolution=8), ClipDataset(str(root), resolution=8, split="test")
    assert [origins(dataset[1]["video"])[0][0] for dataset in (train, test)] == [1, 4]
    labelled = ClipDataset(root, resolution=8, class_labels=True)
    assert (labelled.num_videos, labelled.num_unlabelled, labelled.num_classes) == (2, 1, 6)
    assert [int(labelled[i]["class_labels"]) for i in range(2)] == [0, 2]
    assert "1 of 3 rows have no label" in caplog.text
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*validation"):
        ClipDataset(root, split="validation")


def test_a_row_that_states_too_many_frames_is_replaced(tmp_path):
    datasets = pytest.importorskip("datasets")
    video = write_video(tmp_path / "0.mkv", marked_frames(0, 20), 25, "ffv1").read_bytes()
    other = write_video(tmp_path / "1.mkv", marked_frames(1, 20), 25, "ffv1").read_bytes()
    rows = datasets.Dataset.from_dict({"video": [video, other], "num_frames": [500, 20]})
    dataset = ClipDataset(rows, resolution=8)
    dataset._epoch.fill_(1)
    drawn = {origins(dataset[i]["video"])[0][0] for i in range(0, 40, 2)}
    assert drawn == {1}
    assert "its 20 frames are 0 to 19" in dataset.broken_files["row 0"]


def test_no_such_folder_and_no_such_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, split, streaming):
        raise ConnectionError(f"{name}, {split}, {streaming}:\nno connection")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reason = r"cannot be loaded from the Hub \(ConnectionError: nobody/nothing, train, False: no connection\)"
    with pytest.raises(ValueError, match=f"nobody/nothing: is no folder here, and {reason}"):
        ClipDataset("nobody/nothing")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_data_loader_goes_on_with_the_very_next_batch(num_workers, tmp_path):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    root = write_corpus(tmp_path, [60, 60, 60])

    def loader():
        dataset = ClipDataset(root, resolution=8, num_still_images=1, epoch_over="videos", clips_per_video=4)
        generator = torch.Generator().manual_seed(0)
        return dataset, stateful.StatefulDataLoader(
            dataset, batch_size=2, shuffle=True, num_workers=num_workers, generator=generator
        )

    dataset, whole = loader()
    dataset.set_epoch(2)
    expected = [batch["video"] for batch in whole]
    assert len(expected) == 6
    dataset, interrupted = loader()
    dataset.set_epoch(2)
    batches = iter(interrupted)
    for i in range(3):
        assert torch.equal(next(batches)["video"], expected[i])
    _, resumed = loader()  # in epoch 0, until the state says otherwise
    resumed.load_state_dict(interrupted.state_dict())
    rest = [batch["video"] for batch in resumed]
    assert len(rest) == 3
    assert all(torch.equal(*pair) for pair in zip(rest, expected[3:], strict=True))
