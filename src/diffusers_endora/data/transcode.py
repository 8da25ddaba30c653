"""Encodes videos again, smaller and with a key frame for every frame, so that training decodes only what it uses."""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias

import av
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

from ..files import written_atomically
from .video_io import VideoError, VideoSource, iterate_frames, source_name

Quality: TypeAlias = Literal["visually_lossless", "lossless"]

# At 128 pixels luma keeps 40 to 44 dB on four kinds of endoscopy; 17, which suits video with motion, keeps 37 to 43.
VISUALLY_LOSSLESS_CRF = 12

# What is encoded from its stored planes, and the name of the same planes where the range is not part of it. Everything
# else goes through the RGB of `read_frames`.
_PLANES = {
    "yuv420p": "yuv420p",
    "yuv422p": "yuv422p",
    "yuv444p": "yuv444p",
    "yuvj420p": "yuv420p",
    "yuvj422p": "yuv422p",
    "yuvj444p": "yuv444p",
}

# Errors of the target: no fault of the video, and the next one would not fare better.
TARGET_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class Cancelled(Exception):
    """Encoding was told to stop, see `cancelled_when`."""


_is_cancelled: ContextVar[Callable[[], bool]] = ContextVar("is_cancelled", default=lambda: False)


@contextmanager
def cancelled_when(condition: Callable[[], bool]) -> Iterator[None]:
    """While this is open, encoding in this thread raises `Cancelled` at the next frame after `condition` holds."""
    token = _is_cancelled.set(condition)
    try:
        yield
    finally:
        _is_cancelled.reset(token)


def check_not_cancelled() -> None:
    """Raises `Cancelled` when the condition of `cancelled_when` holds."""
    if _is_cancelled.get()():
        raise Cancelled


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
        quality: `"visually_lossless"`: 4:2:0 at CRF 12. `"lossless"`: the (scaled) pixels as they are: the stored
            planes of upright, progressive 8-bit 4:2:0, 4:2:2 and 4:4:4 video of even size, the RGB of images and of
            all other video.
        image_fps: frames per second of a folder of images, which has none of its own.

    Raises:
        FileNotFoundError: there is nothing at the source.
        OSError: the disk is full or cannot be written to.
        VideoError: the source cannot be read to its end, or cannot be encoded.
    """
    try:
        encode_frames(path, iterate_frames(source, image_fps), short_side, quality)
    except VideoError as error:
        raise VideoError(str(error).replace(f"{path}: ", f"{source_name(source)}: ", 1)) from error
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
        Cancelled: see `cancelled_when`.
    """
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise VideoError(f"{path}: expected at least one frame")
    with written_atomically(path) as temporary:
        try:
            return _encode(temporary, chain([first], remaining), first, short_side, quality)
        except av.FFmpegError as error:
            if error.errno in TARGET_ERRORS:
                raise OSError(error.errno, f"{error.strerror}: {path}") from error
            raise VideoError(f"{path}: cannot be encoded ({error.strerror})") from error


def _encode(
    temporary: Path, frames: Iterator[VideoFrame], first: VideoFrame, short_side: int | None, quality: Quality
) -> int:
    width, height = scaled_size(first.width, first.height, short_side)
    is_odd = bool(width % 2 or height % 2)
    # Chroma of interlaced frames is read field by field, which the planes alone would not tell
    planes = None if first.interlaced_frame else _PLANES.get(first.format.name)
    codec, options = "libx264", {"crf": str(VISUALLY_LOSSLESS_CRF)}
    pixel_format = "yuv444p" if is_odd else "yuv420p"
    if quality == "lossless":
        options = {"qp": "0"}
        if planes is None or is_odd:
            codec, pixel_format = "libx264rgb", "rgb24"
        else:
            pixel_format = planes
    # One thread, as x264's output depends on their number, and no mbtree: see write_video.
    options |= {"preset": "veryfast", "x264-params": "mbtree=0", "g": "1"}

    assert first.time_base is not None
    start, num_frames = first.pts or 0, 0
    # +faststart would write the file twice; "bitexact" leaves out versions and random identifiers
    with av.open(str(temporary), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=1 / (first.time_base * (first.duration or 1)), options=options)
        assert isinstance(stream, VideoStream)
        context = stream.codec_context
        context.thread_count = 1
        context.flags |= av.codec.context.Flags.bitexact | av.codec.context.Flags.frame_duration
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        context.time_base = stream.time_base = first.time_base
        if pixel_format != "rgb24" and planes is None:
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = ColorRange.MPEG
        elif pixel_format != "rgb24":
            context.colorspace, context.color_range = first.colorspace, first.color_range
            context.color_primaries, context.color_trc = first.color_primaries, first.color_trc
            if first.format.name != planes:
                context.color_range = ColorRange.JPEG
        for frame in frames:
            check_not_cancelled()
            pts, duration = (frame.pts or 0) - start, frame.duration
            if planes is None or pixel_format == "rgb24":
                frame = frame.reformat(format="rgb24", threads=1)
            if (frame.width, frame.height) != (width, height) or frame.format.name != pixel_format:
                frame = frame.reformat(
                    width,
                    height,
                    pixel_format,
                    interpolation=Interpolation.LANCZOS,
                    dst_colorspace=Colorspace.ITU709 if planes is None and pixel_format != "rgb24" else None,
                    dst_color_range=context.color_range if pixel_format != "rgb24" else None,
                    threads=1,
                )
            frame.pts, frame.time_base, frame.duration = pts, first.time_base, duration
            frame.pict_type = PictureType.NONE  # x264 would warn that it is not what the source's encoder chose
            container.mux(stream.encode(frame))
            num_frames += 1
        container.mux(stream.encode(None))
    return num_frames


def scaled_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Width and height when the shorter side becomes `short_side`: in proportion, rounded to even, never larger."""
    if short_side is None or min(width, height) <= short_side:
        return width, height
    scale = Fraction(short_side, min(width, height))
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))
