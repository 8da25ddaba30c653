"""What there is to know of one video: its format, the hashes of its frames, whether they change, what is burned in."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..video_io import VideoError, VideoInfo, VideoSource, read_frames, read_video_info, source_name
from .burned_in_text import LEAST_FRAMES, Box, TextDetector
from .frame_hash import NUM_WORDS, hash_frame, to_grey

FEWEST_SAMPLES = 64  # frames looked at, of videos that have so many
FRAMES_FOR_TEXT = 32  # at most: text stays, so that more would only take time
_DECODED_AT_A_TIME = 2**27  # bytes of full-size frames, in each thread

_DARK = 24  # grey levels: black of limited range, not expanded, is 16
_ALL_DARK = 0.98  # of a black frame's pixels
_CHANGE = 3  # grey levels: less is what encoders do to a still picture
_CHANGED = 0.02  # of a changed frame's cells: a clock changes fewer
_CELLS = (16, 16)  # of a frame, their means being compared

THUMBNAIL = 128  # pixels, the side of a square
_PICTURE = 640  # pixels, the longer side


@dataclass
class Examination:
    """The facts of a video.

    Attributes:
        info: number of frames, rate, size, codec.
        samples: the frames looked at, int64 ascending.
        hashes: uint64 `(h, 4)` of the samples that have one, see `frame_hash`.
        hashed: the frame of each hash, int64 `(h,)`.
        digest: SHA-256 of size, number of frames and pixels of the samples.
        brightness: mean luminance, 0 to 255.
        black_share: of the samples.
        frozen_share: of the samples after the first, those that do not differ from the one before; None with one.
        text: regions of burned-in text, in pixels.
        text_was_looked_for: there were enough different frames.
        damaged: why samples could not be decoded, a reason for each of these.
        thumbnails: uint8 `(n, 128, 128, 3)`, evenly spaced; empty unless asked for.
        picture: a sample, uint8 RGB, of a longer side of at most 640 pixels, where there is text.
        picture_scale: its pixels for a pixel of the video.
    """

    info: VideoInfo
    samples: np.ndarray
    hashes: np.ndarray
    hashed: np.ndarray
    digest: str
    brightness: float
    black_share: float
    frozen_share: float | None
    text: list[Box]
    text_was_looked_for: bool
    damaged: list[str] = field(default_factory=list)
    thumbnails: np.ndarray = field(default_factory=lambda: np.zeros((0, THUMBNAIL, THUMBNAIL, 3), np.uint8))
    picture: np.ndarray | None = None
    picture_scale: float = 1.0


def examine(
    source: VideoSource, image_fps: float = 25.0, seconds_between: float = 1.0, num_thumbnails: int = 0
) -> Examination:
    """Looks at a sample of a video's frames, one after the other; memory does not grow with the video.

    Args:
        source: path of a video, its bytes, or a folder of image frames.
        image_fps: frames per second of a folder of images.
        seconds_between: at least one frame in as much time is looked at.
        num_thumbnails: how many small pictures are kept.

    Raises:
        FileNotFoundError: there is nothing at that path.
        VideoError: it is no video, or none of the samples can be decoded.
        OSError: it cannot be read.
    """
    info = read_video_info(source, image_fps)
    wanted = sample_frames(info.num_frames, info.fps, seconds_between)
    for_text = {int(wanted[i]) for i in evenly(len(wanted), FRAMES_FOR_TEXT)}
    for_thumbnails = {int(wanted[i]) for i in evenly(len(wanted), num_thumbnails)}

    digest = hashlib.sha256(f"{info.width} {info.height} {info.num_frames}".encode())
    detector = TextDetector()
    seen, hashed, hashes, brightness, is_black, is_frozen, thumbnails = [], [], [], [], [], [], []
    damaged: list[str] = []
    picture: np.ndarray | None = None
    previous: np.ndarray | None = None
    last_for_text: np.ndarray | None = None
    for i, frame in _decoded(source, wanted, info, damaged):
        grey = to_grey(frame)
        cells = np.asarray(Image.fromarray(grey).resize(_CELLS, Image.Resampling.BOX))
        black = bool((grey < _DARK).mean() >= _ALL_DARK)
        seen.append(i)
        digest.update(np.ascontiguousarray(frame).data)
        brightness.append(float(grey.mean()))
        is_black.append(black)
        if previous is not None:
            is_frozen.append(not _differ(cells, previous))
        previous = cells
        frame_hash = None if black else hash_frame(grey)
        if frame_hash is not None:
            hashed.append(i)
            hashes.append(frame_hash)
        if i in for_text and (last_for_text is None or _differ(cells, last_for_text)):
            detector.add(frame)
            last_for_text = cells
        if i in for_thumbnails:
            thumbnails.append(thumbnail(frame))
        if picture is None or len(seen) == len(wanted) // 2:
            picture = _within(frame, _PICTURE)
    if not seen:
        raise VideoError(f"no frame of the sample can be decoded ({damaged[0]})")

    text = detector.regions()
    return Examination(
        info=info,
        samples=np.array(seen, np.int64),
        hashes=np.array(hashes, np.uint64).reshape(-1, NUM_WORDS),
        hashed=np.array(hashed, np.int64),
        digest=digest.hexdigest(),
        brightness=float(np.mean(brightness)),
        black_share=float(np.mean(is_black)),
        frozen_share=float(np.mean(is_frozen)) if is_frozen else None,
        text=text,
        text_was_looked_for=detector.num_frames >= LEAST_FRAMES,
        damaged=damaged,
        thumbnails=np.array(thumbnails, np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL, 3),
        picture=picture.copy() if text and picture is not None else None,  # not a view of all the frames decoded
        picture_scale=1.0 if picture is None else picture.shape[1] / info.width,
    )


def sample_frames(num_frames: int, fps: float, seconds_between: float) -> np.ndarray:
    """Frames to look at: one in each of equal parts of the video, at a place in the part that is drawn once for all.

    Were they evenly spaced, two long recordings of one scene that start at different times would never be seen at the
    same moments. The same video has the same sample, also at another rate.

    Returns:
        int64, ascending: 64 frames or one for each `seconds_between`, whichever is more; all where there are fewer.
    """
    number = max(FEWEST_SAMPLES, int(np.ceil(round(num_frames / fps / seconds_between, 6))))
    if number >= num_frames:
        return np.arange(num_frames, dtype=np.int64)
    place = np.random.default_rng(0).random(number)
    return ((np.arange(number) + place) * (num_frames / number)).astype(np.int64)


def evenly(length: int, number: int) -> list[int]:
    """At most `number` of the positions 0 to `length - 1`, evenly spaced from the first to the last."""
    return np.linspace(0, length - 1, min(length, number)).round().astype(int).tolist()


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """The frame within a square of 128 pixels, on black."""
    small = _within(frame, THUMBNAIL)
    tile = np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)
    top, left = (THUMBNAIL - small.shape[0]) // 2, (THUMBNAIL - small.shape[1]) // 2
    tile[top : top + small.shape[0], left : left + small.shape[1]] = small
    return tile


def _within(frame: np.ndarray, side: int) -> np.ndarray:
    """The frame with its longer side at `side` pixels, or as it is where it is smaller."""
    height, width = frame.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return frame
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def _differ(cells: np.ndarray, others: np.ndarray) -> bool:
    changed = np.abs(cells.astype(np.int16) - others) >= _CHANGE
    return bool(changed.mean() >= _CHANGED)


def _decoded(
    source: VideoSource, wanted: np.ndarray, info: VideoInfo, damaged: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """The wanted frames, a few held at a time; the reasons for those that cannot be decoded go to `damaged`."""
    at_a_time = max(1, _DECODED_AT_A_TIME // (info.height * info.width * 3))
    for start in range(0, len(wanted), at_a_time):
        part = wanted[start : start + at_a_time]
        try:
            frames = list(read_frames(source, part))
        except VideoError:
            frames = []
        if frames:
            yield from zip(part.tolist(), frames, strict=True)
            continue
        for i in part.tolist():  # the others of this part may be whole
            try:
                yield i, read_frames(source, [i])[0]
            except VideoError as error:
                damaged.append(str(error).removeprefix(f"{source_name(source)}: "))
