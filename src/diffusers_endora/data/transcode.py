"""Encodes videos again, smaller and with a key frame for every frame, so that training decodes only what it uses."""

import errno
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias

import av
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

from .video_io import VideoError, VideoSource, iterate_frames, written_atomically

Quality: TypeAlias = Literal["visually_lossless", "lossless"]

VISUALLY_LOSSLESS_CRF = 17  # as write_video
_LOSSLESS_FORMATS = ("yuv420p", "yuv422p", "yuv444p")  # that x264 stores as they are
_FULL_RANGE_FORMATS = {"yuvj420p": "yuv420p", "yuvj422p": "yuv422p", "yuvj444p": "yuv444p"}


def transcode_video(
    source: VideoSource,
    path: Path,
    short_side: int | None = None,
    quality: Quality = "visually_lossless",
    image_fps: float = 25.0,
) -> Path:
    """Encodes a video, or a folder of frames, as an H.264 file in which every frame is a key frame.

    The frames are those of `read_frames`, as many and at the same times, variable rates included; times are counted
    from the first frame. The same source gives the same bytes.

    Args:
        source: path of a video, its bytes, or a folder of image frames.
        path: the `.mp4` to write; its folder must exist. The file appears when it is complete.
        short_side: pixels of the shorter side, the other in proportion; both even, by Lanczos. Smaller videos are not
            enlarged. None keeps the size.
        quality: `"visually_lossless"`: 4:2:0 at CRF 17. `"lossless"`: the (scaled) pixels as they are: the stored
            planes of 8-bit 4:2:0, 4:2:2 and 4:4:4 video, RGB of images and of all other video.
        image_fps: frames per second of a folder of images, which has none of its own.

    Raises:
        FileNotFoundError: there is nothing at the source.
        OSError: the disk is full or cannot be written to.
        VideoError: the source cannot be read to its end, or cannot be encoded.
    """
    encode_frames(path, iterate_frames(source, image_fps), short_side, quality)
    return path


def encode_frames(
    path: Path,
    frames: Iterable[VideoFrame],
    short_side: int | None = None,
    quality: Quality = "visually_lossless",
) -> int:
    """Encodes the frames of `iterate_frames`, or a part of them, as `transcode_video`; returns their number.

    Raises:
        OSError: the disk is full or cannot be written to.
        VideoError: there is no frame, or it cannot be encoded.
    """
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise VideoError(f"{path.name}: expected at least one frame")
    width, height = scaled_size(first.width, first.height, short_side)
    has_planes = _planar_format(first) in _LOSSLESS_FORMATS and not (width % 2 or height % 2)
    if quality == "lossless":
        codec, options = ("libx264", {"qp": "0"}) if has_planes else ("libx264rgb", {"qp": "0"})
        pixel_format = _planar_format(first) if has_planes else "rgb24"
    else:
        codec, options = "libx264", {"crf": str(VISUALLY_LOSSLESS_CRF)}
        pixel_format = "yuv444p" if width % 2 or height % 2 else "yuv420p"
    # Without mbtree, see write_video; intra frames have no use for it.
    options |= {"preset": "veryfast", "x264-params": "mbtree=0", "g": "1"}

    with written_atomically(path) as temporary:
        try:
            return _encode(temporary, chain([first], remaining), first, (width, height), codec, pixel_format, options)
        except av.FFmpegError as error:
            if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise OSError(error.errno, f"{path}: cannot be written ({error.strerror})") from error
            raise VideoError(f"{path.name}: cannot be encoded ({error.strerror})") from error


def _encode(
    temporary: Path,
    frames: Iterator[VideoFrame],
    first: VideoFrame,
    size: tuple[int, int],
    codec: str,
    pixel_format: str,
    options: dict[str, str],
) -> int:
    width, height = size
    assert first.time_base is not None
    start, num_frames = first.pts or 0, 0
    # +faststart would write the file twice; "bitexact" leaves out versions and random identifiers
    with av.open(str(temporary), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=_rate(first), options=options)
        assert isinstance(stream, VideoStream)
        context = stream.codec_context
        context.thread_count = 1  # x264's output depends on the number of threads
        context.flags |= av.codec.context.Flags.bitexact | av.codec.context.Flags.frame_duration
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        context.time_base = stream.time_base = first.time_base
        is_rgb_source = not _planar_format(first).startswith("yuv")
        if pixel_format != "rgb24" and is_rgb_source:
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = ColorRange.MPEG
        elif pixel_format != "rgb24":
            context.colorspace, context.color_range = first.colorspace, first.color_range
            context.color_primaries, context.color_trc = first.color_primaries, first.color_trc
            if first.format.name in _FULL_RANGE_FORMATS:
                context.color_range = ColorRange.JPEG
        for frame in frames:
            scaled = frame
            if (frame.width, frame.height) != size or frame.format.name != pixel_format:
                scaled = frame.reformat(
                    width,
                    height,
                    pixel_format,
                    interpolation=Interpolation.LANCZOS,
                    dst_colorspace=Colorspace.ITU709 if is_rgb_source and pixel_format != "rgb24" else None,
                    dst_color_range=context.color_range if pixel_format != "rgb24" else None,
                    threads=1,
                )
            scaled.pts, scaled.time_base, scaled.duration = (frame.pts or 0) - start, frame.time_base, frame.duration
            scaled.pict_type = av.video.frame.PictureType.NONE  # not what the source's encoder chose
            container.mux(stream.encode(scaled))
            num_frames += 1
        container.mux(stream.encode(None))
    return num_frames


def scaled_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Width and height when the shorter side becomes `short_side`: in proportion, rounded to even, never larger."""
    if short_side is None or min(width, height) <= short_side:
        return width, height
    scale = Fraction(short_side, min(width, height))
    return (max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2)))


def _planar_format(frame: VideoFrame) -> str:
    return _FULL_RANGE_FORMATS.get(frame.format.name, frame.format.name)


def _rate(frame: VideoFrame) -> Fraction:
    assert frame.time_base is not None
    return 1 / (frame.time_base * (frame.duration or 1))
