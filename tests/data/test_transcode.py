"""Transcoding: the frames that `read_frames` gives, as many and at the same times, whatever the source is."""

import resource
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from av.video.frame import VideoFrame
from PIL import Image
from test_video_io import CLOSED_GOP, IRREGULAR, KINDS, NUM_FRAMES, encode, film, packets

from diffusers_endora.data.transcode import Cancelled, cancelled_when, encode_frames, scaled_size, transcode_video
from diffusers_endora.data.video_io import VideoError, iterate_frames, read_frames, read_video_info, write_video


def all_frames(source) -> np.ndarray:
    return read_frames(source, range(read_video_info(source).num_frames))


def times(source) -> list[tuple[Fraction, Fraction]]:
    """When each frame is shown, from the first on, and how long; in seconds."""
    shown = [(frame.pts * frame.time_base, frame.duration * frame.time_base) for frame in iterate_frames(source)]
    return [(pts - shown[0][0], duration) for pts, duration in shown]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of luma, in decibels."""
    luma = [x.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32) for x in (a, b)]
    return float(10 * np.log10(255**2 / np.mean((luma[0] - luma[1]) ** 2)))


def check_lossless(source: Path, out: Path) -> None:
    """The copy has the source's pixels and times, and nothing but key frames."""
    expected = all_frames(source)
    np.testing.assert_array_equal(np.stack([f.to_ndarray(format="rgb24") for f in iterate_frames(source)]), expected)
    assert transcode_video(source, out, quality="lossless") == out
    np.testing.assert_array_equal(all_frames(out), expected)
    assert times(out) == times(source)
    assert [is_key for *_, is_key in packets(out)] == [True] * len(expected)


@pytest.mark.parametrize("name", KINDS)
def test_lossless(name, tmp_path):
    source = encode(tmp_path / name, **KINDS[name])
    check_lossless(source, tmp_path / "out.mp4")
    if name.startswith("variable_rate"):
        assert [float(pts) for pts, _ in times(source)] == pytest.approx(
            [(pts - IRREGULAR[0]) / 90 for pts in IRREGULAR], abs=1e-3
        )


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(1), Fraction(25, 3)])
def test_rates(fps, tmp_path):
    time_base = 1 / fps
    source = encode(tmp_path / "in.mp4", options=CLOSED_GOP, num_frames=9, time_base=time_base)
    check_lossless(source, tmp_path / "out.mp4")
    assert times(tmp_path / "out.mp4") == [(i * time_base, time_base) for i in range(9)]
    assert read_video_info(tmp_path / "out.mp4").fps == pytest.approx(float(fps), rel=1e-9)


def test_frames_that_an_edit_list_hides(tmp_path):
    source = encode(tmp_path / "in.mp4", options=CLOSED_GOP, pts=[i - 7 for i in range(NUM_FRAMES)])
    data = bytearray(source.read_bytes())
    duration = data.index(b"elst") + 12  # after the type, the flags and the number of entries
    data[duration : duration + 4] = (600).to_bytes(4, "big")  # milliseconds: 15 frames
    source.write_bytes(data)
    check_lossless(source, tmp_path / "out.mp4")
    assert read_video_info(tmp_path / "out.mp4").num_frames == 15 < len(packets(source))


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (1, 0, 0, -1)])
def test_turned_and_mirrored(matrix, tmp_path):
    a, b, c, d = (value << 16 for value in matrix)
    source = encode(tmp_path / "in.mp4", num_frames=4, display_matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    check_lossless(source, tmp_path / "out.mp4")
    assert read_video_info(tmp_path / "out.mp4").rotation == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("interlaced.mp4", {"options": {"flags": "+ildct+ilme", "x264-params": "interlaced=1", "g": "10"}}),
        ("interlaced.mpg", {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme", "g": "10"}}),
        ("full_range_444.mp4", {"pix_fmt": "yuvj444p"}),
        ("full_range_422.avi", {"codec": "mjpeg", "pix_fmt": "yuvj422p"}),
        ("bt2020_full_range.mp4", {"options": {"colorspace": "bt2020nc", "color_range": "pc"}}),
        ("gray.mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
        ("411.mkv", {"codec": "ffv1", "pix_fmt": "yuv411p"}),
    ],
)
def test_colours(name, kind, tmp_path):
    source = encode(tmp_path / name, num_frames=4, **kind)
    check_lossless(source, tmp_path / "out.mp4")
    transcode_video(source, tmp_path / "lossy.mp4")
    assert psnr(all_frames(tmp_path / "lossy.mp4"), all_frames(source)) > 38  # a wrong matrix or range: 15 to 30


def test_a_range_that_the_format_alone_tells(tmp_path):
    planes = np.random.default_rng(0).integers(0, 256, (96, 64), dtype=np.uint8)  # of 64 rows and columns
    frame = VideoFrame.from_ndarray(planes, format="yuvj420p")
    frame.pts, frame.duration, frame.time_base = 0, 1, Fraction(1, 25)
    assert frame.color_range == 0  # not stated
    expected = frame.to_ndarray(format="rgb24")
    encode_frames(tmp_path / "out.mp4", [frame], quality="lossless")
    np.testing.assert_array_equal(all_frames(tmp_path / "out.mp4")[0], expected)


@pytest.mark.parametrize("size", [(64, 96), (33, 47)])
def test_rgb_comes_back_as_it_was(size, tmp_path):
    frames = film(5, *size)
    write_video(tmp_path / "frames", frames, 4, codec="png")
    transcode_video(tmp_path / "frames", tmp_path / "out.mp4", quality="lossless", image_fps=1.0)
    np.testing.assert_array_equal(all_frames(tmp_path / "out.mp4"), frames)
    assert times(tmp_path / "out.mp4") == [(i, 1) for i in range(5)]


@pytest.mark.parametrize(
    ("material", "decibels"),
    [("cholecystectomy/endo.mp4", 41), ("colonoscopy_frames", 43), ("hyperkvasir", 40), ("kvasir_capsule", 41)],
)
def test_visually_lossless_on_real_endoscopy(material, decibels, shared_file, tmp_path):
    source = shared_file("clips") / material
    frames = list(islice(iterate_frames(source), 24))
    for quality in ("lossless", "visually_lossless"):
        encode_frames(tmp_path / f"{quality}.mp4", iter(frames), 128, quality)
    exact, lossy = (tmp_path / f"{quality}.mp4" for quality in ("lossless", "visually_lossless"))
    assert psnr(all_frames(lossy), all_frames(exact)) > decibels
    assert lossy.stat().st_size < 0.4 * exact.stat().st_size


def test_sizes():
    assert scaled_size(1280, 720, 128) == (228, 128)
    assert scaled_size(340, 256, 128) == (170, 128)
    assert scaled_size(256, 454, 128) == (128, 228)  # 227 is odd
    assert scaled_size(101, 77, 128) == (101, 77)  # not enlarged
    assert scaled_size(101, 77, None) == (101, 77)
    assert scaled_size(4000, 3, 2) == (2666, 2)


def test_scaling_is_that_of_pillow_s_lanczos(tmp_path):
    ramp = np.linspace(20, 220, 240)
    frame = np.stack([ramp[:180, None] + 0 * ramp, ramp + 0 * ramp[:180, None], 0 * ramp + ramp[180:0:-1, None]], -1)
    frames = frame.round().astype(np.uint8)[None]
    write_video(tmp_path / "frames", frames, 4, codec="png")
    transcode_video(tmp_path / "frames", tmp_path / "out.mp4", 60, "lossless")
    expected = np.asarray(Image.fromarray(frames[0]).resize((80, 60), Image.Resampling.LANCZOS))
    assert np.abs(all_frames(tmp_path / "out.mp4")[0].astype(int) - expected).max() <= 2


@pytest.mark.parametrize("quality", ["visually_lossless", "lossless"])
def test_the_same_source_gives_the_same_bytes(quality, tmp_path):
    source = encode(tmp_path / "in.mp4", **KINDS["open_gop.mp4"])
    once, again = (transcode_video(source, tmp_path / name, 32, quality) for name in ("a.mp4", "b.mp4"))
    assert once.read_bytes() == again.read_bytes()


def test_a_damaged_source_leaves_nothing_and_is_named(tmp_path):
    source = encode(tmp_path / "in.mp4", options=CLOSED_GOP)
    position, size, *_ = packets(source)[20]
    data = bytearray(source.read_bytes())
    data[position + 8 : position + size] = bytes(size - 8)
    source.write_bytes(data)
    with pytest.raises(VideoError, match=r"in\.mp4: .*damaged"):
        transcode_video(source, tmp_path / "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_no_frames(tmp_path):
    with pytest.raises(VideoError, match="expected at least one frame"):
        encode_frames(tmp_path / "out.mp4", iter(()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty: expected a folder of frames"):
        transcode_video(tmp_path / "empty", tmp_path / "out.mp4")
    with pytest.raises(FileNotFoundError):
        transcode_video(tmp_path / "nowhere.mp4", tmp_path / "out.mp4")


def test_cancelling_stops_at_the_next_frame(tmp_path):
    source = encode(tmp_path / "in.mp4", num_frames=9)
    decoded = []

    def frames():
        for frame in iterate_frames(source):
            decoded.append(frame)
            yield frame

    with cancelled_when(lambda: len(decoded) == 3), pytest.raises(Cancelled):
        encode_frames(tmp_path / "out.mp4", frames())
    assert len(decoded) == 3
    assert not (tmp_path / "out.mp4").exists()
    assert encode_frames(tmp_path / "out.mp4", iterate_frames(source)) == 9


@contextmanager
def files_of_at_most(num_bytes: int):
    """A disk that is full, for this process' next file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 1000, 40_000])
def test_a_full_disk_is_no_fault_of_the_video(num_bytes, tmp_path):
    source = encode(tmp_path / "in.mp4")
    size = transcode_video(source, tmp_path / "out.mp4").stat().st_size
    (tmp_path / "out.mp4").unlink()
    assert size > 60_000
    with files_of_at_most(num_bytes), pytest.raises(OSError, match="File too large"):
        transcode_video(source, tmp_path / "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_the_last_bytes_of_a_file_do_not_fit(tmp_path):
    source = encode(tmp_path / "in.mp4")
    size = transcode_video(source, tmp_path / "out.mp4").stat().st_size
    with files_of_at_most(size - 1), pytest.raises(OSError, match="File too large"):
        transcode_video(source, tmp_path / "again.mp4")
    with files_of_at_most(size):
        transcode_video(source, tmp_path / "again.mp4")
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "out.mp4").read_bytes()
