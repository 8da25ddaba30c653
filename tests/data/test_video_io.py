"""Reading: any frame of any kind of file equals that frame of a full sequential decode, or there is one clear error.

The reference is `decode_all`: PyAV from the first packet to the last, without seeking.
"""

import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from diffusers_endora.data import video_io
from diffusers_endora.data.video_io import VideoError, read_frames, read_video_info, write_video

NUM_FRAMES = 36
GRAIN = np.random.default_rng(0).integers(0, 64, (200, 200), dtype=np.uint8)


def moving_picture(i: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frame `i` of a film in which no two frames are alike, uint8 (H, W, 3)."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([columns * 2 + 3 * i, rows * 3 + i, (rows + columns) % 256], axis=-1).astype(np.uint8)
    picture //= 2
    picture += np.roll(GRAIN, i, axis=1)[:height, :width, None]
    picture[(2 * i) % (height - 8) : (2 * i) % (height - 8) + 8, (5 * i) % (width - 8) : (5 * i) % (width - 8) + 8] = (
        255
    )
    return picture


def film(num_frames: int = NUM_FRAMES, height: int = 64, width: int = 96) -> np.ndarray:
    return np.stack([moving_picture(i, height, width) for i in range(num_frames)])


def encode(
    path: Path,
    codec: str = "libx264",
    options: dict | None = None,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (64, 96),
    num_frames: int = NUM_FRAMES,
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    muxer: dict | None = None,
    display_matrix: list[int] | None = None,
) -> Path:
    """Encode the film with everything that `write_video` does not offer."""
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if time_base is not None:
            stream.time_base = stream.codec_context.time_base = time_base
        if display_matrix is not None:
            stream.set_display_matrix(display_matrix)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(moving_picture(i, *size), format="rgb24").reformat(format=pix_fmt)
            frame.pts = i if pts is None else pts[i]
            if time_base is not None:
                frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path) -> np.ndarray:
    """All frames of the file, decoded from beginning to end."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def packets(path: Path) -> list[tuple[int, int, int, bool]]:
    """(position in the file, size, pts, key frame) of every packet."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size, p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size]


X264 = "scenecut=0:b-adapt=0"  # always three B-frames, so that open groups have leading frames
OPEN_GOP = {"g": "10", "bf": "3", "x264-params": f"open-gop=1:{X264}"}
CLOSED_GOP = {"g": "10", "bf": "3", "x264-params": X264}
X265 = {"g": "10", "x265-params": "log-level=none:pools=1:open-gop=1:scenecut=0:b-adapt=0:bframes=3"}
IRREGULAR = np.random.default_rng(0).integers(1, 9, NUM_FRAMES).cumsum().tolist()

# name of the file -> how it is encoded
KINDS: dict[str, dict] = {
    "open_gop.mp4": {"options": OPEN_GOP},
    "open_gop.mkv": {"options": OPEN_GOP},
    "open_gop.ts": {"options": OPEN_GOP},
    "open_gop.m2ts": {"options": OPEN_GOP, "muxer": {"mpegts_m2ts_mode": "1"}},
    "b_frames_without_times.avi": {"options": OPEN_GOP},
    "no_b_frames.avi": {"options": CLOSED_GOP | {"bf": "0"}},
    "variable_rate.mp4": {"options": OPEN_GOP, "time_base": Fraction(1, 90), "pts": IRREGULAR},
    "variable_rate.mkv": {"options": CLOSED_GOP, "time_base": Fraction(1, 90), "pts": IRREGULAR},
    "starts_late.mp4": {"options": CLOSED_GOP, "pts": [i + 30 for i in range(NUM_FRAMES)]},
    "negative_decoding_times.mp4": {"options": OPEN_GOP, "muxer": {"use_editlist": "0"}},
    "fragmented.mp4": {"options": OPEN_GOP, "muxer": {"movflags": "frag_keyframe"}},
    "odd_size.mp4": {"options": CLOSED_GOP, "pix_fmt": "yuv444p", "size": (97, 129)},
    "intra_refresh.mp4": {"options": {"g": "10", "x264-params": f"intra-refresh=1:{X264}"}},
    "one_group.mp4": {"options": {"g": "600", "x264-params": X264}},
    "all_key_frames.mp4": {"options": {"g": "1"}},
    "ten_bits.mp4": {"options": CLOSED_GOP, "pix_fmt": "yuv420p10le"},
    "full_range.mp4": {"options": CLOSED_GOP, "pix_fmt": "yuvj420p"},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc.ts": {"codec": "libx265", "options": X265},
    "mpeg4_as_opencv_writes.mp4": {"codec": "mpeg4", "options": {"g": "12"}},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "10", "bf": "2"}},
    "mpeg1_without_times.mpg": {"codec": "mpeg1video", "options": {"g": "10", "bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "cpu-used": "8", "lag-in-frames": "8"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "10", "cpu-used": "8"}},
    "wmv2.wmv": {"codec": "wmv2", "options": {"g": "10"}},
    "lossless.mkv": {"codec": "ffv1", "pix_fmt": "bgr0", "options": {"g": "1"}},
    "one_frame.mp4": {"num_frames": 1},
    "two_frames.mp4": {"num_frames": 2, "options": CLOSED_GOP},
}


@pytest.mark.parametrize("name", KINDS)
def test_any_frames_equal_those_of_a_full_decode(name, tmp_path):
    path = encode(tmp_path / name, **KINDS[name])
    expected = decode_all(path)
    num_frames = len(expected)

    info = read_video_info(path)
    assert info.num_frames == num_frames == KINDS[name].get("num_frames", NUM_FRAMES)
    assert (info.height, info.width) == expected.shape[1:3]
    assert info.duration == pytest.approx(num_frames / info.fps)

    np.testing.assert_array_equal(read_frames(path, range(num_frames)), expected)
    draw = random.Random(name)
    for count in (1, 1, 1, 2, 5):
        indices = [draw.randrange(num_frames) for _ in range(count)]
        np.testing.assert_array_equal(read_frames(path, indices), expected[indices], err_msg=f"{name} {indices}")

    data = path.read_bytes()
    assert read_video_info(data).num_frames == num_frames
    np.testing.assert_array_equal(read_frames(data, indices), expected[indices])


@pytest.mark.parametrize("name", ["open_gop.mp4", "open_gop.mkv", "open_gop.ts", "mpeg2.mpg", "vp9.webm", "hevc.mp4"])
def test_decoding_starts_at_a_key_frame(name, tmp_path, monkeypatch):
    path = encode(tmp_path / name, **KINDS[name] | {"num_frames": 72})  # mpg files must be long to seek badly
    expected = decode_all(path)
    monkeypatch.setattr(video_io, "_decode_from_start", lambda *_: pytest.fail("decoded from the beginning"))
    for i in range(0, 72, 3):
        np.testing.assert_array_equal(read_frames(path, [i])[0], expected[i])


def test_a_file_that_does_not_seek_is_decoded_from_the_start(tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mp4", **KINDS["open_gop.mp4"])

    def cannot_seek(*_):
        raise video_io._CannotSeek

    monkeypatch.setattr(video_io, "_packets_from", cannot_seek)
    np.testing.assert_array_equal(read_frames(path, [31, 2]), decode_all(path)[[31, 2]])


@pytest.mark.parametrize("side", ["start", "end"])
def test_frames_that_an_edit_list_hides_are_not_part_of_the_video(side, tmp_path):
    first_pts = -7 if side == "start" else 0
    path = encode(tmp_path / "clip.mp4", options=CLOSED_GOP, pts=[i + first_pts for i in range(NUM_FRAMES)])
    if side == "end":
        data = bytearray(path.read_bytes())
        duration = data.index(b"elst") + 12  # after the type, the flags and the number of entries
        data[duration : duration + 4] = (600).to_bytes(4, "big")  # milliseconds: 15 frames
        path.write_bytes(data)
    expected = decode_all(path)
    assert len(expected) == {"start": NUM_FRAMES - 7, "end": 15}[side] < len(packets(path))
    assert read_video_info(path).num_frames == len(expected)
    np.testing.assert_array_equal(read_frames(path, range(len(expected))), expected)
    for i in (0, len(expected) - 1):
        np.testing.assert_array_equal(read_frames(path, [i])[0], expected[i])


def test_a_clock_that_restarts(tmp_path):
    late = encode(tmp_path / "late.ts", options=CLOSED_GOP, pts=[i + 300 for i in range(NUM_FRAMES)])
    early = encode(tmp_path / "early.ts", options=CLOSED_GOP)
    both = tmp_path / "both.ts"
    both.write_bytes(late.read_bytes() + early.read_bytes())
    expected = decode_all(both)
    assert read_video_info(both).num_frames == len(expected) == 2 * NUM_FRAMES
    np.testing.assert_array_equal(read_frames(both, range(30)), expected[:30])
    with pytest.raises(VideoError, match=r"both.ts: is damaged"):  # the joint breaks the stream's packet counters
        read_frames(both, [NUM_FRAMES + 2])


def test_leading_frames_without_their_reference_are_not_part_of_the_video(tmp_path):
    whole = encode(tmp_path / "whole.ts", **KINDS["open_gop.ts"])
    first_key, second_key = [position for position, _, _, is_key in packets(whole) if is_key][:2]
    cut = tmp_path / "cut.ts"
    cut.write_bytes(whole.read_bytes()[:first_key] + whole.read_bytes()[second_key:])  # tables, then an open group
    expected = decode_all(cut)
    assert len(expected) < len(packets(cut))  # there are such frames
    assert read_video_info(cut).num_frames == len(expected)
    np.testing.assert_array_equal(read_frames(cut, range(len(expected))), expected)


def test_hidden_vp8_frames_are_not_counted(tmp_path):
    path = encode(tmp_path / "clip.webm", **KINDS["vp8.webm"])
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        hidden = next(bytes(p) for i, p in enumerate(container.demux(video=0)) if i == 15)
    data[data.index(hidden)] &= ~0x10  # show_frame
    path.write_bytes(data)
    expected = decode_all(path)
    assert len(expected) == NUM_FRAMES - 1
    assert read_video_info(path).num_frames == NUM_FRAMES - 1
    np.testing.assert_array_equal(read_frames(path, range(NUM_FRAMES - 1)), expected)


def test_the_average_rate_of_a_variable_one(tmp_path):
    path = encode(tmp_path / "clip.mp4", **KINDS["variable_rate.mp4"])
    assert read_video_info(path).fps == pytest.approx(90 * (NUM_FRAMES - 1) / (IRREGULAR[-1] - IRREGULAR[0]), rel=0.01)


def test_a_stated_rate_is_not_blurred_by_timestamps_in_milliseconds(tmp_path):
    assert read_video_info(write_video(tmp_path / "clip.mkv", film(8), 30000 / 1001, "ffv1")).fps == 30000 / 1001


@pytest.mark.parametrize(
    ("matrix", "expected", "rotation"),
    [
        ((1, 0, 0, 1), lambda f: f, 0),
        (
            (0, 1, -1, 0),
            lambda f: np.rot90(f, -1, (1, 2)),
            90,
        ),  # a phone held upright: the top row becomes the right column
        ((-1, 0, 0, -1), lambda f: np.rot90(f, 2, (1, 2)), 180),
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1, (1, 2)), 270),
        ((-1, 0, 0, 1), lambda f: f[:, :, ::-1], 0),
        ((1, 0, 0, -1), lambda f: f[:, ::-1], 0),
        ((0, 1, 1, 0), lambda f: f.transpose(0, 2, 1, 3), 90),
    ],
)
def test_frames_are_as_displayed(matrix, expected, rotation, tmp_path):
    a, b, c, d = (value << 16 for value in matrix)
    path = encode(tmp_path / "clip.mp4", num_frames=4, display_matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    shown = expected(decode_all(path))
    info = read_video_info(path)
    assert (info.height, info.width, info.rotation) == (*shown.shape[1:3], rotation)
    np.testing.assert_array_equal(read_frames(path, range(4)), shown)


def test_an_oblique_display_matrix_is_refused(tmp_path):
    path = encode(
        tmp_path / "clip.mp4", num_frames=2, display_matrix=[46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30]
    )
    with pytest.raises(VideoError, match=r"clip.mp4: is to be shown turned by 45 degrees; expected 0, 90, 180 or 270"):
        read_frames(path, [0])


@pytest.mark.parametrize("indices", [[-1], [36], [0, 100], [1.0], ["0"], [[0]], 3])
def test_bad_indices(indices, tmp_path):
    path = encode(tmp_path / "clip.mp4")
    with pytest.raises(
        ValueError, match=r"clip.mp4: frame -?\d+ was asked for, but its 36 frames are 0 to 35|flat list of"
    ):
        read_frames(path, indices)


def test_no_indices(tmp_path):
    assert read_frames(encode(tmp_path / "clip.mp4"), []).shape == (0, 64, 96, 3)


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = write_video(tmp_path / "clip.mkv", film(5), 25, "ffv1")
    read_frames(path, [4])
    write_video(path, film(9)[::-1], 25, "ffv1")
    np.testing.assert_array_equal(read_frames(path, [8])[0], moving_picture(0))


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["open_gop.mp4", "fragmented.mp4", "open_gop.mkv", "hevc.ts", "no_b_frames.avi", "vp9.webm"]
)
@pytest.mark.parametrize("cut_packet", [8, 22, 35])
def test_the_whole_frames_of_a_truncated_file_are_right(name, cut_packet, tmp_path):
    kind = KINDS[name]
    if name == "open_gop.mp4":
        kind = kind | {"muxer": {"movflags": "faststart"}}  # the index comes first and promises all frames
    path = encode(tmp_path / name, **kind)
    whole = {frame.tobytes() for frame in decode_all(path)}
    position, size, _, _ = packets(path)[cut_packet]
    path.write_bytes(path.read_bytes()[: position + size // 2])

    num_frames = read_video_info(path).num_frames
    assert cut_packet - 1 <= num_frames <= cut_packet
    assert all(frame.tobytes() in whole for frame in read_frames(path, range(num_frames)))


def test_a_transport_stream_that_is_cut_off(tmp_path):
    path = encode(tmp_path / "clip.ts", **KINDS["hevc.ts"])  # FFmpeg fills the gaps in HEVC without a word
    whole = {frame.tobytes() for frame in decode_all(path)}
    data = path.read_bytes()
    number, start = [(i, position) for i, (position, _, _, is_key) in enumerate(packets(path)) if is_key][-1]
    cuts = [cut for cut in range(start + 2600, start + 4000) if cut % 188]
    by_chance = [cut for cut in cuts if cut % 192 == 0 or cut % 204 == 0]  # blocks of other kinds of stream
    for cut in cuts[::200] + by_chance[:4]:
        path.write_bytes(data[:cut])
        assert read_video_info(path).num_frames == number
        assert all(frame.tobytes() in whole for frame in read_frames(path, range(number - 3, number)))


@pytest.mark.parametrize("block", [192, 204])
def test_a_cut_that_suits_another_kind_of_transport_stream(block, tmp_path):
    """The last packet begins, and the file ends, where they would with blocks of another length."""
    path = encode(tmp_path / "clip.ts", **KINDS["hevc.ts"])
    data = path.read_bytes()
    number, start = [(i, position) for i, (position, _, _, is_key) in enumerate(packets(path)) if is_key][-1]
    empty = b"\x47\x1f\xff\x10" + bytes(184)  # a block of no stream
    num_empty = next(n for n in range(block) if (start + 188 * n) % block == 0)
    data = num_empty * empty + data
    start += 188 * num_empty
    cut = next(cut for cut in range(start + 2600, start + 4000) if cut % block == 0 and cut % 188)
    path.write_bytes(data[:cut])
    assert read_video_info(path).num_frames == number


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("part", ["whole", "half"])  # FFmpeg raises an error for one, fills the gap for the other
def test_damage_spoils_its_group_of_pictures_only(codec, part, tmp_path):
    options = {"libx264": {"g": "12", "bf": "0", "x264-params": X264}, "mpeg4": {"g": "12"}}[codec]
    path = encode(tmp_path / "clip.mp4", codec=codec, options=options)
    whole = decode_all(path)
    position, size, _, is_key = packets(path)[15]
    assert not is_key
    data = bytearray(path.read_bytes())
    start = position if part == "whole" else position + size // 2
    data[start : position + size] = bytes(position + size - start)
    path.write_bytes(data)

    assert read_video_info(path).num_frames == NUM_FRAMES
    np.testing.assert_array_equal(read_frames(path, [0, 11, 12, 14]), whole[[0, 11, 12, 14]])
    np.testing.assert_array_equal(read_frames(path, range(24, 36)), whole[24:])
    for i in (15, 16, 23):
        with pytest.raises(VideoError, match=r"clip.mp4: .*damaged"):
            read_frames(path, [i])


@pytest.mark.parametrize(
    "content",
    [b"", b"this is not a video\n" * 50, bytes(5000), np.random.default_rng(0).bytes(5000)],
    ids=["empty", "text", "zeros", "noise"],
)
@pytest.mark.parametrize("extension", [".mp4", ".mkv", ".avi", ".mpg", ".wmv"])
def test_what_is_not_a_video(content, extension, tmp_path):
    path = tmp_path / f"clip{extension}"
    path.write_bytes(content)
    for source, name in ((path, str(path)), (content, f"{len(content)} bytes in memory")):
        for read in (read_video_info, lambda s: read_frames(s, [0])):
            with pytest.raises(VideoError) as error:
                read(source)
            assert str(error.value).startswith(f"{name}: cannot be read as a video (")
            assert "\n" not in str(error.value)


def test_an_index_that_is_cut_off(tmp_path):
    path = encode(tmp_path / "clip.mp4")
    path.write_bytes(path.read_bytes()[:-400])  # without faststart the index is at the end
    with pytest.raises(VideoError, match=r"clip.mp4: cannot be read as a video \((Invalid data|End of file)"):
        read_video_info(path)


def test_sound_without_pictures(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"sound.mp4: .*no video stream"):
        read_video_info(path)


def test_a_codec_that_nobody_knows(tmp_path):
    path = encode(tmp_path / "clip.mp4", codec="mpeg4", num_frames=3)
    path.write_bytes(path.read_bytes().replace(b"mp4v", b"zzzz").replace(b"esds", b"zzzz"))
    with pytest.raises(
        VideoError, match=r"clip.mp4: cannot be read as a video \(it has a codec that FFmpeg does not know"
    ):
        read_frames(path, [0])


def test_nothing_there(tmp_path):
    for read in (read_video_info, lambda path: read_frames(path, [0])):
        with pytest.raises(FileNotFoundError, match=r"absent.mp4: expected a video file or a folder of frames"):
            read(tmp_path / "absent.mp4")


# --- folders of frames -----------------------------------------------------------------------------------------------


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path):
    for i in range(12):
        Image.fromarray(moving_picture(i)).save(tmp_path / f"frame{i}.{'PNG' if i % 2 else 'bmp'}")
    for stray in (".DS_Store", "labels.csv", ".hidden.png"):
        (tmp_path / stray).write_bytes(b"not an image")
    info = read_video_info(tmp_path, image_fps=10)
    assert (info.num_frames, info.height, info.width, info.fps, info.duration) == (12, 64, 96, 10, 1.2)
    np.testing.assert_array_equal(read_frames(str(tmp_path), [11, 2, 10, 2]), film(12)[[11, 2, 10, 2]])


def test_faults_in_a_folder_of_frames_name_the_image(tmp_path):
    with pytest.raises(VideoError, match=r"expected a folder of frames .*found no image"):
        read_frames(tmp_path, [0])
    for i in range(4):
        Image.fromarray(moving_picture(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:3000])
    (tmp_path / "2.png").write_bytes(b"")
    Image.fromarray(moving_picture(3, 32, 96)).save(tmp_path / "3.png")
    read_frames(tmp_path, [0])
    for i, fault in (
        (1, "cannot be read as an image"),
        (2, "cannot be read as an image"),
        (3, "is 96x32 pixels, but"),
    ):
        with pytest.raises(VideoError, match=rf"{i}.png: {fault}"):
            read_frames(tmp_path, [0, i])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16"])
def test_image_modes(mode, tmp_path):
    grey = moving_picture(0)[..., 0]
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "0.png")
    if mode == "I;16":
        with pytest.raises(VideoError, match=r"0.png: .*expected 8 bits a channel, got mode I"):
            read_frames(tmp_path, [0])
    else:
        np.testing.assert_array_equal(read_frames(tmp_path, [0])[0], np.repeat(grey[..., None], 3, -1))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (97, 129), (1, 1)])
@pytest.mark.parametrize(("codec", "name"), [("ffv1", "clip.mkv"), ("png", "clip")])
def test_lossless_round_trip(codec, name, size, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    path = write_video(tmp_path / name, frames, 10, codec)
    np.testing.assert_array_equal(read_frames(path, range(5)), frames)
    assert codec == "png" or read_video_info(path).fps == 10


@pytest.mark.parametrize(("size", "pix_fmt"), [((64, 96), "yuv420p"), ((97, 129), "yuv444p")])
def test_h264_looks_the_same(size, pix_fmt, tmp_path):
    frames = film(12, *size)
    path = write_video(tmp_path / "clip.mp4", frames, 24000 / 1001)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", pix_fmt)
        assert stream.average_rate == Fraction(24000, 1001)
        assert stream.codec_context.colorspace == 1  # BT.709, so that players of HD and SD agree
    error = read_frames(path, range(12)).astype(float) - frames
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 29  # chroma at half resolution costs most of it here
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 2  # a wrong colour matrix or range shifts whole channels


def test_h264_keeps_flat_colours(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 90, 80]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (6, 32, 32, 3)).copy()
    shown = read_frames(write_video(tmp_path / "clip.mp4", frames, 25), range(6))
    assert np.abs(shown.astype(int) - frames).max() <= 4


@pytest.mark.parametrize(("codec", "name"), [("h264", "clip.mp4"), ("ffv1", "clip.mkv")])
def test_the_same_frames_give_the_same_bytes(codec, name, tmp_path):
    frames = film(24, 97, 129)
    first = write_video(tmp_path / name, frames, 25, codec).read_bytes()
    for i in range(5):
        _ = [
            np.random.default_rng(i).bytes(1000 * 3**size) for size in range(8)
        ]  # leaves other contents in free memory
        assert write_video(tmp_path / name, frames, 25, codec).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("clip.avi", {}, r"codec 'h264' writes .mp4 files"),
        ("clip.mp4", {"codec": "ffv1"}, r"codec 'ffv1' writes .mkv files"),
        ("clip.mp4", {"codec": "png"}, r"codec 'png' writes a folder"),
        ("clip.mp4", {"codec": "vp9"}, r"codec='vp9': expected one of 'h264', 'ffv1', 'png'"),
        ("clip.mp4", {"fps": 0}, r"fps=0: expected a positive number"),
        ("clip.mp4", {"fps": float("nan")}, r"fps=nan: expected a positive number"),
        (
            "clip.mp4",
            {"frames": film(2) / 255},
            r"frames: expected a uint8 numpy array \(F, H, W, 3\), got a ndarray of f",
        ),
        (
            "clip.mp4",
            {"frames": film(2)[None]},
            r"frames: expected the shape \(F, H, W, 3\) .*got \(1, 2, 64, 96, 3\)",
        ),
        ("clip.mp4", {"frames": film(2)[:0]}, r"no empty axis, got \(0, 64, 96, 3\)"),
        ("absent/clip.mp4", {}, r"its folder .*absent does not exist"),
    ],
)
def test_bad_arguments_of_write_video(name, arguments, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_video(tmp_path / name, **({"frames": film(2), "fps": 25} | arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("codec", "name"), [("h264", "clip.mp4"), ("ffv1", "clip.mkv"), ("png", "clip")])
def test_a_failure_leaves_what_was_there(codec, name, tmp_path, monkeypatch):
    if codec != "png":
        (tmp_path / name).write_bytes(b"before")

    class Interrupted:
        calls = 0

        def __getattr__(self, attribute):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return getattr(Image if codec == "png" else av.VideoFrame, attribute)

    monkeypatch.setattr(video_io, "Image" if codec == "png" else "VideoFrame", Interrupted())
    monkeypatch.setattr(video_io, "VideoStream", object)  # its isinstance check is not what is tested
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / name, film(5), 25, codec)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([] if codec == "png" else [(name, b"before")])


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    (tmp_path / "clip").mkdir()
    write_video(tmp_path / "clip", film(2), 25, "png")  # an empty one is fine
    with pytest.raises(FileExistsError, match=r"clip: is a folder with files in it"):
        write_video(tmp_path / "clip", film(2), 25, "png")
    assert len(list((tmp_path / "clip").iterdir())) == 2


# --- a real clip -----------------------------------------------------------------------------------------------------


def test_real_endoscopy(shared_file):
    path = shared_file("clips/cholecystectomy/endo.mp4")
    info = read_video_info(path)
    assert (info.num_frames, info.width, info.height, info.fps, info.codec) == (250, 1280, 720, 25, "h264")
    indices = np.linspace(100, 147, 16).astype(int)
    with av.open(str(path)) as container:
        frames = [frame for i, frame in enumerate(container.decode(video=0)) if i in indices]
    expected = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    np.testing.assert_array_equal(read_frames(path, indices[::-1]), expected[::-1])
