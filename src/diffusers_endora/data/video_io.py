"""Read (seek, decode) and write clips with PyAV.

A source is a video file, the bytes of one, or a folder of image frames. Frames are uint8 RGB `(F, H, W, 3)`. Frame `i`
is the `i`-th frame in presentation order, counted from 0: what a decoder that starts at the beginning puts out `i`-th.
"""

import hashlib
import io
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeGuard, cast

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..files import file_hash, natural_order, written_atomically

PathName: TypeAlias = str | os.PathLike[str]
VideoSource: TypeAlias = PathName | bytes

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

# What write_video writes for each codec; "png" is a folder and has no extension.
CODEC_EXTENSIONS = {"h264": ".mp4", "ffv1": ".mkv", "png": ""}

# What a file can say about itself in every format that write_video writes: players and image viewers show both.
METADATA_NAMES = ("title", "comment")

# Containers whose packets carry the time of *display*. Others (AVI, ASF) number packets in decoding order, which is
# the order of display only where the codec does not reorder frames.
_CONTAINERS_WITH_DISPLAY_TIMES = ("matroska", "mov", "mpeg", "mpegts")

# Decoders that look at `skip_frame` before each packet. Frames nothing refers to are half of a usual file of these.
_CODECS_WITH_SKIPPING = ("h264", "hevc")


class VideoError(ValueError):
    """A source cannot be read as asked: one sentence that names the file and says why."""


@dataclass(frozen=True)
class VideoInfo:
    """What `read_video_info` finds out.

    Attributes:
        source: the path, or `"N bytes in memory"`.
        num_frames: `read_frames` takes the indices 0 to `num_frames - 1`.
        fps: frames per second, the average over the video where the rate varies.
        width: pixels as displayed, after rotation. The sample aspect ratio is not applied.
        height: likewise.
        codec: FFmpeg's name of the codec, such as `"h264"`, or the extension of the images in a folder.
        duration: seconds, `num_frames / fps`.
        rotation: degrees clockwise by which the stored frames are turned for display: 0, 90, 180 or 270.
    """

    source: str
    num_frames: int
    fps: float
    width: int
    height: int
    codec: str
    duration: float
    rotation: int


# --- reading ---------------------------------------------------------------------------------------------------------


def read_video_info(source: VideoSource, image_fps: float = 25.0) -> VideoInfo:
    """Number of frames, rate and size of a video, from its packets and its first frame; nothing else is decoded.

    The frames are counted, never taken from the header, which may not say (mkv, webm, mpegts) or be wrong (fragmented
    mp4, truncated files). Not counted are packets that an edit list hides, hidden VP8 frames, leading frames whose
    reference is not in the file, and a last packet that is cut off. Damage inside a file shows only in decoding, so
    `read_frames` may still raise for a frame that was counted.

    Args:
        source: path of a video, its bytes, or a folder of image frames.
        image_fps: the rate reported for a folder of images, which has none of its own.

    Raises:
        FileNotFoundError: there is nothing at that path.
        VideoError: the source holds no video that can be decoded. In a folder only the first image is opened.
    """
    name = source_name(source)
    if _is_folder(source):
        paths = _frame_files(source)
        height, width = _image_size(paths[0])
        return VideoInfo(
            source=name,
            num_frames=len(paths),
            fps=image_fps,
            width=width,
            height=height,
            codec=paths[0].suffix.lower().lstrip("."),
            duration=len(paths) / image_fps,
            rotation=0,
        )
    index = _frame_index(source)
    return VideoInfo(
        source=name,
        num_frames=index.num_frames,
        fps=index.fps,
        width=index.width,
        height=index.height,
        codec=index.codec,
        duration=index.num_frames / index.fps,
        rotation=index.orientation.rotation,
    )


def read_frames(source: VideoSource, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Decode the frames at `indices`, in that order; duplicates are allowed.

    Decoding starts at the nearest key frame before each wanted frame. Where timestamps are missing or unreliable
    (B-frames in AVI, resets, a file that does not seek where it should) it starts at the beginning instead, which is
    slower and gives the same frames. Rotation and mirroring flags are applied (FFmpeg's autorotate convention); the
    sample aspect ratio is not. Colours are converted by swscale from the matrix and range that the stream states.

    Args:
        source: path of a video, its bytes, or a folder of image frames (natural order: `2.png` before `10.png`; files
            that are not images are ignored, and so is EXIF orientation).
        indices: integers in `[0, num_frames)`.

    Returns:
        uint8 RGB `(len(indices), H, W, 3)`.

    Raises:
        ValueError: an index is negative, too large or not an integer.
        FileNotFoundError: there is nothing at that path.
        VideoError: the source cannot be read, or a wanted frame is damaged, follows damage in its group of pictures or
            has another size than the first frame.
    """
    pictures: Iterable[tuple[int, np.ndarray]]
    if _is_folder(source):
        paths = _frame_files(source)
        height, width = _image_size(paths[0])
        positions = _positions(indices, len(paths), source_name(source))
        pictures = ((i, _sized_like(read_image(paths[i]), height, width, paths[i])) for i in positions)
    else:
        index = _frame_index(source)
        height, width = index.height, index.width
        positions = _positions(indices, index.num_frames, source_name(source))
        pictures = _decode(source, index, sorted(positions))
    frames = np.empty((len(indices), height, width, 3), dtype=np.uint8)
    for i, picture in pictures:
        frames[positions[i]] = picture
    return frames


def iterate_frames(source: VideoSource, image_fps: float = 25.0) -> Iterator[VideoFrame]:
    """All frames in order, one at a time, as PyAV's: upright, in the pixel format they are stored in.

    They are the frames that `read_frames` gives for the indices 0, 1, 2, ... Each has `pts`, `duration` and
    `time_base`, which tell when and how long it is shown; where a video's times are missing, its rate does.

    Args:
        source: path of a video, its bytes, or a folder of image frames.
        image_fps: frames per second of a folder of images.

    Raises:
        FileNotFoundError: there is nothing at that path.
        VideoError: the source cannot be read, or not to its end.
    """
    if _is_folder(source):
        paths = _frame_files(source)
        height, width = _image_size(paths[0])
        for i, path in enumerate(paths):
            picture = _sized_like(read_image(path), height, width, path)
            yield _timed(VideoFrame.from_ndarray(picture, format="rgb24"), i, 1, 1 / _as_fraction(image_fps))
        return

    index = _frame_index(source)
    name = source_name(source)
    num_decoded = 0
    with _opened(source) as (container, stream):
        for frame in _decoded(_packets(container, stream), stream, name):
            if index.pts is not None and (frame.pts is None or frame.pts != index.pts[num_decoded]):
                if frame.pts is not None and frame.pts < index.pts[num_decoded]:
                    continue  # a leading frame whose reference is not in the file
                break
            _check_intact(frame, num_decoded, name)
            upright = _upright(frame, index, f"{name}: frame {num_decoded}")
            if index.pts is None or stream.time_base is None:
                yield _timed(upright, num_decoded, 1, 1 / _as_fraction(index.fps))
            else:
                pts = index.pts[num_decoded : num_decoded + 2].tolist()
                at_rate = max(1, round(1 / (_as_fraction(index.fps) * stream.time_base)))
                duration = pts[1] - pts[0] if len(pts) == 2 else frame.duration or at_rate
                yield _timed(upright, pts[0], duration, stream.time_base)
            num_decoded += 1
            if num_decoded == index.num_frames:
                return
    raise VideoError(f"{name}: only {num_decoded} of its {index.num_frames} frames can be decoded")


def forget_videos() -> None:
    """Forgets the times of the frames of the videos read so far, which are kept for the next reading."""
    _scan_file.cache_clear()


def _as_fraction(fps: float) -> Fraction:
    """25 is 25, and 29.97002997 is 30000/1001."""
    return Fraction(fps).limit_denominator(1001)


def _timed(frame: VideoFrame, pts: int, duration: int, time_base: Fraction) -> VideoFrame:
    frame.pts, frame.duration, frame.time_base = pts, duration, time_base
    return frame


def _upright(frame: VideoFrame, index: "_FrameIndex", name: str) -> VideoFrame:
    """The frame as it is displayed: itself, or turned in RGB."""
    if index.orientation != _Orientation(False, False, False, 0):
        return VideoFrame.from_ndarray(np.ascontiguousarray(_picture(frame, index, name)), format="rgb24")
    if (frame.width, frame.height) != (index.width, index.height):
        got = f"{frame.width}x{frame.height}"
        raise VideoError(f"{name}: is {got} pixels, but the first frame is {index.width}x{index.height}")
    return frame


def read_image(path: PathName) -> np.ndarray:
    """Read one image as uint8 RGB `(H, W, 3)`. EXIF orientation is not applied, transparency is dropped.

    Raises:
        VideoError: the image cannot be read, or its channels have more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] not in "IF":  # I, I;16 and F would be clipped to white without a word
                return np.array(image.convert("RGB"))
            reason = f"expected 8 bits a channel, got mode {image.mode}"
    except Exception as error:
        raise _image_error(path, error) from error
    raise VideoError(f"{path}: cannot be read as an image ({reason})")


def list_images(folder: PathName) -> list[Path]:
    """Image files directly in `folder`, in natural order (`2.png` before `10.png`); hidden files are left out."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(IMAGE_EXTENSIONS) and not e.name.startswith(".")]
    return [Path(folder, name) for name in sorted(names, key=natural_order)]


def file_stamps(path: PathName) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time in ns of a file, or of each image of a folder; these change with the content."""
    files = list_images(path) if _is_folder(path) else [Path(path)]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def content_hash(source: VideoSource) -> str:
    """SHA-256 of a video: over that of its file, or of each image of its folder in order, or over its bytes."""
    digest = hashlib.sha256()
    if isinstance(source, bytes):
        digest.update(source)
    else:
        for path in list_images(source) if _is_folder(source) else [Path(source)]:
            digest.update(file_hash(path).encode())
    return digest.hexdigest()


def source_name(source: VideoSource) -> str:
    """How messages name a source."""
    return f"{len(source)} bytes in memory" if isinstance(source, bytes) else os.fspath(source)


def _is_folder(source: VideoSource) -> TypeGuard[PathName]:
    if isinstance(source, bytes):
        return False
    if not Path(source).exists():
        raise FileNotFoundError(f"{source}: expected a video file or a folder of frames, but there is nothing there")
    return Path(source).is_dir()


def _frame_files(folder: PathName) -> list[Path]:
    paths = list_images(folder)
    if not paths:
        raise VideoError(
            f"{folder}: expected a folder of frames ({', '.join(IMAGE_EXTENSIONS)}), found no image in it"
        )
    return paths


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:
        raise _image_error(path, error) from error


def _image_error(path: PathName, error: Exception) -> VideoError:
    """For whatever Pillow raises: OSError, SyntaxError, ValueError, struct.error and others, by format."""
    reason = "its content is no image" if isinstance(error, UnidentifiedImageError) else error
    return VideoError(f"{path}: cannot be read as an image ({reason})")


def _positions(indices: Sequence[int] | np.ndarray, num_frames: int, name: str) -> dict[int, list[int]]:
    """Frame -> where in `indices` it is wanted."""
    given = np.asarray(indices)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"indices={indices!r}: expected a flat list of integers")
    positions: dict[int, list[int]] = {}
    for position, i in enumerate(given.tolist()):
        if not 0 <= i < num_frames:
            raise ValueError(f"{name}: frame {i} was asked for, but its {num_frames} frames are 0 to {num_frames - 1}")
        positions.setdefault(i, []).append(position)
    return positions


def _sized_like(picture: np.ndarray, height: int, width: int, name: object) -> np.ndarray:
    if picture.shape != (height, width, 3):
        got = f"{picture.shape[1]}x{picture.shape[0]}"
        raise VideoError(f"{name}: is {got} pixels, but the first frame is {width}x{height}; all must have one size")
    return picture


# --- the packets of a file -------------------------------------------------------------------------------------------


class _PacketTimes(NamedTuple):
    """When a packet is shown and decoded, in units of the stream's time base."""

    pts: int | None
    dts: int | None
    is_key_frame: bool
    is_shown: bool


class _KeyFrame(NamedTuple):
    """Where decoding can start, in units of the stream's time base."""

    pts: int
    seek_to: int


class _Orientation(NamedTuple):
    """How stored frames become displayed ones: first the transposition, then the flips."""

    transpose: bool
    flip_rows: bool
    flip_columns: bool
    rotation: int  # degrees clockwise


@dataclass(frozen=True)
class _FrameIndex:
    """What one pass over the packets of a video tells."""

    num_frames: int
    pts: np.ndarray | None  # (num_frames,) int64, ascending; None where timestamps cannot be relied on
    key_frames: tuple[_KeyFrame, ...]  # ascending; empty without pts
    fps: float
    width: int  # as displayed
    height: int
    codec: str
    orientation: _Orientation


@contextmanager
def _opened(source: VideoSource) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video for decoding in one thread; every FFmpeg error inside becomes a VideoError that names the file."""
    name = source_name(source)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), "r") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream) or stream.codec_context is None:
                missing = "no video stream" if stream is None else "a codec that FFmpeg does not know"
                raise VideoError(f"{name}: cannot be read as a video (it has {missing})")
            # One thread: data workers share the cores already, and the result cannot depend on their number.
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"{name}: cannot be read as a video ({error.strerror})") from error


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """The packets of `stream` from the current position on, without a last one that is cut off."""
    previous: Packet | None = None
    spacing = 0  # what all positions are multiples of
    with suppress(av.FFmpegError):  # a file that ends in the middle of something ends there
        for packet in container.demux(stream):
            if packet.size == 0:  # end-of-stream marks, and AVI's "show the last frame again"
                continue
            if previous is not None:
                yield previous
            previous = packet
            spacing = math.gcd(spacing, packet.pos or 0)
    if previous is not None and not previous.is_corrupt and not _is_cut_off(container, previous, spacing):
        yield previous


def _is_cut_off(container: InputContainer, last: Packet, spacing: int) -> bool:
    """Whether a transport stream, which does not say how long its packets are, ends in the middle of a block.

    Blocks have 188 bytes, with time codes (m2ts) 192, with error correction 204: whichever `spacing`, what the
    positions of all packets are multiples of, is a multiple of. A cut between blocks goes unnoticed.
    """
    if container.format.name != "mpegts" or last.pos is None:
        return False
    return all(container.size % block or spacing % block for block in (188, 192, 204))


def _frame_index(source: VideoSource) -> _FrameIndex:
    if isinstance(source, bytes):
        return _scan(source)
    status = Path(source).stat()
    return _scan_file(os.fspath(source), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _scan_file(path: str, mtime_ns: int, size: int) -> _FrameIndex:
    """`_scan` of a file, remembered until the file changes; forked data workers inherit what is remembered."""
    return _scan(path)


def _scan(source: VideoSource) -> _FrameIndex:
    """Read all packets, decode up to the first frame."""
    name = source_name(source)
    first: VideoFrame | None = None
    times: list[_PacketTimes] = []  # in decoding order
    with _opened(source) as (container, stream):
        for packet in _packets(container, stream):
            if first is None:
                with suppress(av.FFmpegError):  # what fails before the first frame is not part of the video
                    first = next(iter(stream.codec_context.decode(packet)), None)
            is_shown = not packet.is_discard and not _is_hidden_vp8(packet, stream)
            times.append(_PacketTimes(packet.pts, packet.dts, packet.is_keyframe, is_shown))
        if first is None:  # a video shorter than the decoder's delay
            first = next(iter(stream.codec_context.decode(None)), None)
        if first is None:
            raise VideoError(f"{name}: cannot be read as a video (no frame of it can be decoded)")

        num_frames = sum(t.is_shown for t in times)
        key_frames: list[_KeyFrame] = []
        pts = _display_times(container, stream, times)
        if pts is not None and first.pts is not None:
            pts = pts[np.searchsorted(pts, first.pts) :]  # drops leading frames whose reference is not in the file
            num_frames = len(pts)
            for t in times:
                if t.is_key_frame and t.pts is not None:
                    key_frames.append(_KeyFrame(pts=t.pts, seek_to=t.pts if t.dts is None else t.dts))
        orientation = _orientation(first, name)
        turned = orientation.transpose
        return _FrameIndex(
            num_frames=num_frames,
            pts=pts,
            key_frames=tuple(sorted(key_frames)),
            fps=_frame_rate(stream, pts),
            width=first.height if turned else first.width,
            height=first.width if turned else first.height,
            codec=stream.codec_context.name,
            orientation=orientation,
        )


def _is_hidden_vp8(packet: Packet, stream: VideoStream) -> bool:
    """A VP8 frame that is only a reference: bit 4 of its first byte says whether it is shown (RFC 6386, 9.1)."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def _display_times(container: InputContainer, stream: VideoStream, times: list[_PacketTimes]) -> np.ndarray | None:
    """The shown packets' times in ascending order, or None where they do not tell the order of display."""
    pts = {t.pts for t in times if t.pts is not None and t.is_shown}
    dts = [t.dts for t in times if t.dts is not None]
    if len(pts) < sum(t.is_shown for t in times):  # missing or repeated
        return None
    if any(after <= before for before, after in pairwise(dts)):  # the clock restarts somewhere
        return None
    has_display_times = not set(container.format.name.split(",")).isdisjoint(_CONTAINERS_WITH_DISPLAY_TIMES)
    if not has_display_times and stream.codec_context.has_b_frames:
        return None
    return np.array(sorted(pts), dtype=np.int64)


def _frame_rate(stream: VideoStream, pts: np.ndarray | None) -> float:
    """Frames per second: what the container states where the frames' times bear it out, else their average."""
    stated = float(stream.average_rate or stream.guessed_rate or 25)
    if pts is None or len(pts) < 2 or stream.time_base is None:
        return stated
    measured = (len(pts) - 1) / float(int(pts[-1] - pts[0]) * stream.time_base)
    # Matroska rounds times to milliseconds, so the average of a constant rate lies a little beside it.
    return stated if abs(stated - measured) <= 0.005 * measured else measured


def _orientation(frame: VideoFrame, name: str) -> _Orientation:
    """Read the display matrix (libavutil/display.h): (column, row) -> (a column + c row, b column + d row)."""
    matrix = cast(SideDataContainer, frame.side_data).get(SideDataType.DISPLAYMATRIX)  # PyAV's stub says otherwise
    if matrix is None:
        return _Orientation(False, False, False, 0)
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    if b == c == 0 and a and d:
        return _Orientation(False, flip_rows=d < 0, flip_columns=a < 0, rotation=180 if a < 0 and d < 0 else 0)
    if a == d == 0 and b and c:
        return _Orientation(True, flip_rows=b < 0, flip_columns=c < 0, rotation=90 if b > 0 else 270)
    raise VideoError(f"{name}: is to be shown turned by {-frame.rotation} degrees; expected 0, 90, 180 or 270")


# --- decoding --------------------------------------------------------------------------------------------------------


class _CannotSeek(Exception):
    """The file does not seek to where it says there is a key frame, or decodes to other times than it says."""


def _decode(source: VideoSource, index: _FrameIndex, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Decode the frames `wanted` (ascending, without duplicates), from key frames if possible; may repeat some."""
    name = source_name(source)
    try:
        with _opened(source) as (container, stream):
            for key_frame, group in groupby(wanted, key=lambda i: _key_frame_before(index, i)):
                yield from _decode_from_key_frame(container, stream, index, key_frame, list(group), name)
    except _CannotSeek:
        yield from _decode_from_start(source, index, wanted)


def _key_frame_before(index: _FrameIndex, i: int) -> _KeyFrame:
    """The last key frame shown no later than frame `i`; leading frames of a later one need this one too."""
    if index.pts is None:
        raise _CannotSeek
    position = bisect_right(index.key_frames, index.pts[i], key=lambda key_frame: key_frame.pts)
    if position == 0:
        raise _CannotSeek
    return index.key_frames[position - 1]


def _decode_from_key_frame(
    container: InputContainer,
    stream: VideoStream,
    index: _FrameIndex,
    key_frame: _KeyFrame,
    wanted: list[int],
    name: str,
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode `wanted` from `key_frame` on."""
    assert index.pts is not None
    waiting = [(i, int(index.pts[i])) for i in reversed(wanted)]
    packets = _packets_from(container, stream, key_frame)
    for frame in _decoded(packets, stream, name, shown_pts={pts for _, pts in waiting}):
        if frame.pts is not None and frame.pts < key_frame.pts:  # a leading frame: needs what is before the key frame
            continue
        i, pts = waiting[-1]
        if frame.pts is None or frame.pts > pts or frame.pts != index.pts[np.searchsorted(index.pts, frame.pts)]:
            raise _CannotSeek
        _check_intact(frame, i, name)
        if frame.pts == pts:
            yield i, _picture(frame, index, f"{name}: frame {i}")
            waiting.pop()
            if not waiting:
                return
    raise _CannotSeek


def _packets_from(container: InputContainer, stream: VideoStream, key_frame: _KeyFrame) -> Iterator[Packet]:
    """The packets from `key_frame` on; the decoder must not see any before it."""
    for seconds_before in (0, 1, 4, 16):  # MPEG program and transport streams have no index and land where they land
        try:
            container.seek(key_frame.seek_to - round(seconds_before / (stream.time_base or 1)), stream=stream)
        except av.FFmpegError as error:
            raise _CannotSeek from error
        packets = _packets(container, stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts == key_frame.pts:
                return chain([packet], packets)
            if packet.dts is not None and packet.dts > key_frame.seek_to:
                break
    raise _CannotSeek


def _decode_from_start(source: VideoSource, index: _FrameIndex, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Decode `wanted` from the beginning, counting frames."""
    name = source_name(source)
    waiting = wanted[::-1]
    num_decoded = 0
    with _opened(source) as (container, stream):
        for i, frame in enumerate(_decoded(_packets(container, stream), stream, name)):
            _check_intact(frame, i, name)
            if i == waiting[-1]:
                yield i, _picture(frame, index, f"{name}: frame {i}")
                waiting.pop()
                if not waiting:
                    return
            num_decoded += 1
    raise VideoError(f"{name}: only {num_decoded} of its {index.num_frames} frames can be decoded")


def _decoded(
    packets: Iterable[Packet], stream: VideoStream, name: str, shown_pts: set[int] | None = None
) -> Iterator[VideoFrame]:
    """Decode packets, then what the decoder holds back. Damage that FFmpeg notices after the first frame is an error.

    With `shown_pts`, frames at other times are decoded only as far as the decoder needs them for these.
    """
    num_decoded = 0
    for packet in packets:
        if shown_pts is not None and stream.codec_context.name in _CODECS_WITH_SKIPPING:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in shown_pts else "NONREF"
        try:
            frames = stream.codec_context.decode(packet)
            is_damaged = packet.is_corrupt
        except av.FFmpegError:
            frames = []
            is_damaged = True
        if is_damaged and num_decoded:  # the decoder would go on with guesses, which later frames build on
            raise VideoError(f"{name}: is damaged near byte {packet.pos}")
        num_decoded += len(frames)
        yield from frames
    yield from stream.codec_context.decode(None)


def _check_intact(frame: VideoFrame, i: int, name: str) -> None:
    if frame.is_corrupt:  # parts of it are guesses, which later frames build on
        raise VideoError(f"{name}: frame {i} is damaged or depends on damaged data")


def _picture(frame: VideoFrame, index: _FrameIndex, name: str) -> np.ndarray:
    picture = frame.to_ndarray(format="rgb24", threads=1)
    if index.orientation.transpose:
        picture = picture.transpose(1, 0, 2)
    if index.orientation.flip_rows:
        picture = picture[::-1]
    if index.orientation.flip_columns:
        picture = picture[:, ::-1]
    return _sized_like(picture, index.height, index.width, name)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_video(
    path: PathName,
    frames: np.ndarray,
    fps: float,
    codec: str = "h264",
    crf: int = 17,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a clip; the same frames and metadata always give the same bytes.

    | codec | file | quality |
    |---|---|---|
    | `"h264"` | `.mp4`, 4:2:0, BT.709: plays everywhere | by `crf`; 17 looks the same, pixels change |
    | `"ffv1"` | `.mkv` | lossless |
    | `"png"` | a folder of `000000.png`, `000001.png`, ... | lossless, keeps no `fps` |

    4:2:0 needs even sizes. An H.264 clip of an odd size is written as 4:4:4, keeping every pixel; FFmpeg, VLC and
    Chrome play it, QuickTime and Safari do not.

    The clip is written beside `path` under another name and renamed when it is complete: a failure leaves nothing
    behind, and a file that was there stays.

    Args:
        path: file with the codec's extension, or a folder that is absent or empty for `"png"`. Its parent must exist.
        frames: uint8 RGB `(F, H, W, 3)`.
        fps: frames per second, positive.
        codec: `"h264"`, `"ffv1"` or `"png"`.
        crf: quality of H.264, 0 (best) to 51.
        metadata: `title` and `comment` of the file, or of each image; `synthetic_metadata` makes those of a generated
            clip.

    Returns:
        `path`.

    Raises:
        ValueError: an argument is not as described.
        VideoError: FFmpeg refuses to encode the frames.
        OSError: the disk does not take the file.
    """
    path = Path(path)
    check_clip(frames, "frames")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps}: expected a positive number")
    if codec not in CODEC_EXTENSIONS:
        raise ValueError(f"codec={codec!r}: expected one of {', '.join(map(repr, CODEC_EXTENSIONS))}")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf={crf}: expected 0 to 51")
    metadata = metadata or {}
    if unknown := sorted(set(metadata) - set(METADATA_NAMES)):  # FFmpeg would drop them and say nothing
        raise ValueError(f"metadata {unknown[0]!r}: expected {' or '.join(map(repr, METADATA_NAMES))}")
    extension = path.suffix.lower()
    if codec == "png" and extension in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS:
        raise ValueError(f"{path}: codec 'png' writes a folder of images; expected a name without {extension!r}")
    if codec != "png" and extension != CODEC_EXTENSIONS[codec]:
        raise ValueError(f"{path}: codec {codec!r} writes {CODEC_EXTENSIONS[codec]} files; expected that extension")

    with written_atomically(path) as temporary:
        if codec == "png":
            temporary.mkdir()
            text = PngInfo()
            for name, value in metadata.items():
                text.add_itxt(name.capitalize(), value)  # the keywords of the PNG specification
            for i, frame in enumerate(frames):
                Image.fromarray(frame).save(temporary / f"{i:06d}.png", pnginfo=text)
        else:
            _encode(temporary, frames, fps, codec, crf, metadata, path)
    return path


def check_clip(clip: np.ndarray, name: str, ndim: int = 4) -> None:
    """Raise ValueError unless `clip` is uint8 RGB `(F, H, W, 3)`, or `(B, F, H, W, 3)` with `ndim=5`; not empty."""
    layout = {4: "(F, H, W, 3)", 5: "(B, F, H, W, 3)"}[ndim]
    if not isinstance(clip, np.ndarray) or clip.dtype != np.uint8:
        got = f"{type(clip).__name__} of {clip.dtype}" if hasattr(clip, "dtype") else type(clip).__name__
        raise ValueError(f"{name}: expected a uint8 numpy array {layout}, got a {got}")
    if clip.ndim != ndim or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"{name}: expected the shape {layout} with no empty axis, got {clip.shape}")


def _encode(
    temporary: Path, frames: np.ndarray, fps: float, codec: str, crf: int, metadata: Mapping[str, str], path: Path
) -> None:
    height, width = frames.shape[1:3]
    if codec == "ffv1":
        pixel_format, options = "bgr0", {"g": "1"}
    else:
        pixel_format = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        # No mbtree: with AVX-512 it reads memory that x264 has not set, so that the bytes change from run to run.
        options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
    muxer_options = {"fflags": "+bitexact"}  # neither the library's version nor random identifiers in the file
    if codec == "h264":
        muxer_options["movflags"] = "+faststart"  # plays while it loads
    try:
        with av.open(str(temporary), "w", options=muxer_options) as container:
            container.metadata.update(metadata)
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1_000_000), options=options)
            assert isinstance(stream, VideoStream)
            context = stream.codec_context
            context.thread_count = 1  # x264's output depends on the number of threads
            context.flags |= av.codec.context.Flags.bitexact
            stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
            if codec == "h264":
                context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
                context.color_range = ColorRange.MPEG
            for i, array in enumerate(frames):
                frame = VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
                if codec == "h264":
                    frame = frame.reformat(
                        format=pixel_format, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                    )
                else:
                    frame = frame.reformat(format=pixel_format)
                frame.pts = i
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        kind = OSError if isinstance(error, OSError) else VideoError  # a full disk is no fault of the frames
        raise kind(f"{path}: cannot be written with codec {codec!r} ({error.strerror})") from error
