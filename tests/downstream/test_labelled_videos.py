"""Labels and videos, unlabelled clips, and test videos among them."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_endora import StyleGANVGenerator, StyleGANVPipeline
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.video_io import VideoError, read_frames, write_video
from diffusers_endora.downstream.semi_supervised.leaks import fingerprints, refuse_leaks
from diffusers_endora.downstream.semi_supervised.videos import (
    Clips,
    ClipShape,
    as_uint8,
    is_pipeline,
    open_labelled,
    open_unlabelled,
    pixels_of,
    read_label_file,
)

SHAPE = ClipShape(num_frames=2, resolution=32, frame_interval=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six rendered videos of 4 frames in the folders `a`, `b` and `c`."""
    root = tmp_path_factory.mktemp("corpus")
    for seed in range(6):
        path = root / "abc"[seed % 3] / f"{seed}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, render_phantom_clip(seed, 4, 48, 48).frames, fps=8)
    return root


def test_one_class_counts_as_positive(corpus):
    videos = open_labelled(corpus, SHAPE, "b")
    names = [videos.random_clips.video_name(i) for i in range(len(videos))]
    assert videos.labels.tolist() == [int("/b/" in name) for name in names]
    assert videos.labels.sum() == 2
    assert len(videos.fixed_clips) == 18  # of 4 frames, three places for two
    assert list(videos.fixed_clips.fixed_clips_of(1)) == [3, 4, 5]


def test_rows_with_labels(corpus, tmp_path):
    (tmp_path / "list.txt").write_text("b/1.mp4,1\na/0.mp4,0\nc/2.mp4,1\n")
    videos = open_labelled(corpus, SHAPE, label_file=tmp_path / "list.txt")
    assert videos.labels.tolist() == [1, 0, 1]  # in the order of the list
    assert videos.positive_class == "1"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a/0.mp4,0\nb/9.mp4,1\n", r"list.txt, line 2: there is no b/9.mp4 in .*; labels and videos do not match\."),
        ("a/0.mp4,0\na/0.mp4,1\n", r"list.txt, line 2: a/0.mp4 is listed twice\."),
        ("a/0.mp4\n", r"list.txt, line 1: expected <video>,<label from 0 up>, got 'a/0.mp4'\."),
        ("a/0.mp4,polyp\n", r"list.txt, line 1: expected <video>,<label from 0 up>, got 'a/0.mp4,polyp'\."),
        ("a/0.mp4,0\n./a/0.mp4,1\n", r"list.txt, line 2: a/0.mp4 is listed twice\."),
        (",1\n", r"list.txt, line 1: expected <video>,<label from 0 up>, got ',1'\."),
        ("", r"list.txt: is empty; expected lines <video>,<label from 0 up>\."),
    ],
)
def test_label_files_that_do_not_match_are_refused(corpus, tmp_path, lines, message):
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_label_file(corpus, tmp_path / "list.txt")


def test_label_files_of_spreadsheets_are_read(corpus, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa/0.mp4,0\r\nb/1.mp4,1\r\n\r\n")
    assert [row["label"] for row in read_label_file(corpus, tmp_path / "list.txt")] == [0, 1]
    (tmp_path / "list.txt").write_bytes("a/0.mp4,0\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"list\.txt"):
        read_label_file(corpus, tmp_path / "list.txt")


def test_unclear_classes_are_refused(corpus):
    with pytest.raises(ValueError, match=r"has 3 classes \(a, b, c\); name the one that counts as positive"):
        open_labelled(corpus, SHAPE)
    with pytest.raises(ValueError, match=r"--positive_class d: .* has the classes a, b, c\."):
        open_labelled(corpus, SHAPE, "d")
    with pytest.raises(ValueError, match=r"labels\.txt: there is no such file of labels\."):
        open_labelled(corpus, SHAPE, label_file=corpus / "labels.txt")


def test_clips_are_read_as_pixels(corpus):
    dataset = open_unlabelled(corpus, SHAPE, 6, corpus / "none")
    clip = Clips(dataset, [3]).read(0, 0)
    assert clip.shape == (2, 32, 32, 3)
    item = dataset.item(0, 3)["video"]
    assert np.array_equal(clip, as_uint8(item))
    torch.testing.assert_close(pixels_of(torch.from_numpy(clip[None]))[0], item, atol=0.5 / 127.5 + 1e-6, rtol=0)
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    assert np.array_equal(as_uint8(pixels_of(levels)[0]), levels[0].numpy())


def test_no_other_video_takes_the_place_of_a_damaged_one(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    dataset = open_unlabelled(tmp_path / "corpus", SHAPE, 6, tmp_path)
    path = tmp_path / "corpus" / "b" / "1.mp4"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-400])  # after the dataset has looked at it
    assert dataset.video_name(2) == str(path)
    epoch = next(epoch for epoch in range(20) if dataset.item(epoch, 2)["frame_ids"][0] // 3 // 4 != 2)
    with pytest.raises(VideoError, match=r"b/1\.mp4: "):
        Clips(dataset, [2]).read(epoch, 0)


def test_a_pipeline_is_known_by_its_index(corpus, tmp_path):
    assert not is_pipeline(corpus)
    assert not is_pipeline("no such/name of a repository")
    (tmp_path / "model_index.json").write_text("{}")
    assert is_pipeline(tmp_path)


def test_a_pipeline_generates_what_is_not_there(tmp_path):
    torch.manual_seed(0)
    sizes = {"resolution": 16, "num_frames": 4, "z_dim": 6, "w_dim": 8, "channel_base": 128, "channel_max": 8}
    motion = {"motion_z_dim": 4, "motion_code_dim": 5, "motion_z_distance": 4, "motion_kernel_size": 3}
    times = {"num_frequencies": 3, "max_period": 32, "max_num_frames": 32}
    StyleGANVPipeline(generator=StyleGANVGenerator(**sizes, **motion, **times)).save_pretrained(tmp_path / "model")
    shape = ClipShape(num_frames=2, resolution=16, frame_interval=5)
    dataset = open_unlabelled(tmp_path / "model", shape, 3, tmp_path / "samples")
    assert dataset.num_videos == 3
    assert dataset.num_frames_of_videos == [8, 8, 8]  # 6 are needed
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("clip_*.mkv")}
    open_unlabelled(tmp_path / "model", shape, 4, tmp_path / "samples")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(list((tmp_path / "samples").glob("clip_*.mkv"))) == 4


def test_test_videos_among_clips_are_refused(corpus, tmp_path):
    tested = open_labelled(corpus / "", SHAPE, "a").fixed_clips
    of_test = fingerprints(tested, range(6))
    for seed in (11, 12):
        write_video(tmp_path / f"{seed}.mp4", render_phantom_clip(seed, 4, 48, 48).frames, fps=8)
    clean = open_unlabelled(tmp_path, SHAPE, 2, tmp_path)
    refuse_leaks(fingerprints(clean, range(2)), of_test, "clips")

    copied = read_frames(corpus / "b" / "1.mp4", range(4))
    write_video(tmp_path / "13.mkv", copied, fps=25, codec="ffv1")  # the same pixels in another file
    leaking = open_unlabelled(tmp_path, SHAPE, 3, tmp_path)
    with pytest.raises(ValueError, match=r"clips: 1 of 3 clips is in the test set \(.*13\.mkv is .*b/1\.mp4\)"):
        refuse_leaks(fingerprints(leaking, range(3)), of_test, "clips")

    (tmp_path / "13.mkv").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (12, 90, 3), np.uint8)
    wall = np.asarray(Image.fromarray(noise).resize((360, 48), Image.Resampling.BICUBIC))
    long = np.stack([wall[:, i : i + 48] for i in range(300)])  # every fourth frame is looked at
    (tmp_path / "long" / "a").mkdir(parents=True)
    (tmp_path / "long" / "b").mkdir()
    write_video(tmp_path / "long" / "a" / "long.mp4", long, fps=8)
    write_video(tmp_path / "long" / "b" / "other.mp4", render_phantom_clip(4, 8, 48, 48).frames, fps=8)
    (tmp_path / "cut").mkdir()
    write_video(tmp_path / "cut" / "cut.mp4", long[71:87], fps=8, crf=24)
    of_long = fingerprints(open_labelled(tmp_path / "long", SHAPE, "a").fixed_clips, range(2))
    cut = open_unlabelled(tmp_path / "cut", SHAPE, 1, tmp_path)
    with pytest.raises(ValueError, match=r"1 of 1 clips is in the test set \(.*cut\.mp4 shares footage with .*long"):
        refuse_leaks(fingerprints(cut, range(1)), of_long, "clips")
    brighter = np.clip(copied.astype(int) + 12, 0, 255).astype(np.uint8)
    write_video(tmp_path / "13.mp4", brighter, fps=8, crf=24)  # encoded anew, and brighter
    leaking = open_unlabelled(tmp_path, SHAPE, 3, tmp_path)
    with pytest.raises(
        ValueError, match=r"1 of 3 clips is in the test set \(.*13\.mp4 shares footage with .*1\.mp4\)"
    ):
        refuse_leaks(fingerprints(leaking, range(3)), of_test, "clips")
