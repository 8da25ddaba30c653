"""Where evaluated clips come from: the videos of a source, the clips taken from them, and what identifies these."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data.clips import find_videos, fixed_starts
from ..data.video_io import VIDEO_EXTENSIONS, VideoError, content_hash, list_images, read_frames, read_video_info
from ..files import file_hash

LOSSLESS_CODECS = {"ffv1", "png", "bmp", "npy", "array", "rawvideo", "huffyuv", "ffvhuff", "utvideo"}

_PROGRESS_BAR_FROM = 200  # videos


@dataclass(frozen=True)
class ParquetRow:
    """A video stored in a Parquet file, whose bytes are read when they are needed and not kept."""

    path: Path
    row_group: int
    index: int

    def read(self) -> bytes:
        """The bytes of the video's file."""
        row = row_group_videos(self.path, self.path.stat().st_mtime_ns, self.row_group)[self.index]
        return row["bytes"] if isinstance(row, dict) else row


@lru_cache(maxsize=1)
def row_group_videos(path: Path, mtime_ns: int, row_group: int) -> list[Any]:
    """The column `video` of a row group; the last one is kept until the file changes, as clips come video by video."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(row_group, columns=["video"]).column(0).to_pylist()


@dataclass(frozen=True, eq=False)
class Video:
    """One video of a source, opened but not decoded.

    Attributes:
        name: how messages and reports name it.
        location: a path, a row of a Parquet file, or an array uint8 `(F, H, W, 3)`.
        row: number of the clip in a `.npy` file that holds several, else None.
        codec: FFmpeg's name of the codec, the extension of images, `"npy"` or `"array"`.
    """

    name: str
    location: Path | ParquetRow | np.ndarray = field(repr=False)
    num_frames: int
    height: int
    width: int
    codec: str
    row: int | None = None

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the file (of a folder: of its images in order), with the row in it."""
        digest = hashlib.sha256()
        if isinstance(self.location, np.ndarray):
            digest.update(f"{self.location.shape} {self.location.dtype}".encode())
            digest.update(np.ascontiguousarray(self.location).tobytes())
        elif isinstance(self.location, ParquetRow):
            digest.update(self.location.read())
        elif self.row is None:
            return content_hash(self.location)
        else:
            digest.update(file_hash(self.location).encode())
        if self.row is not None:
            digest.update(f" row {self.row}".encode())
        return digest.hexdigest()

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices`, uint8 `(len(indices), H, W, 3)`."""
        if isinstance(self.location, np.ndarray):
            return as_uint8(self.location[list(indices)], self.name)
        if self.codec == "npy":
            assert isinstance(self.location, Path)
            array = load_npy(self.location)
            return as_uint8((array if self.row is None else array[self.row])[list(indices)], self.name)
        source = self.location.read() if isinstance(self.location, ParquetRow) else self.location
        return read_frames(source, indices)


@dataclass(frozen=True)
class Clip:
    """Some frames of a video, in order."""

    video: Video
    indices: tuple[int, ...]

    @cached_property
    def key(self) -> str:
        """Identifies the content: the file's hash and the frames."""
        return f"{self.video.content_hash}:{','.join(map(str, self.indices))}"

    def read(self) -> np.ndarray:
        """uint8 `(F, H, W, 3)`.

        Raises:
            VideoError, ValueError: frames are damaged or, in an array, not pixels.
        """
        return self.video.read(self.indices)


def load_npy(path: Path) -> np.ndarray:
    """A `.npy` file, mapped and not read.

    Raises:
        VideoError: it is not an array file, or not of clips.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise VideoError(f"{path}: cannot be read as an array ({str(error).splitlines()[0]})") from error
    check_layout(array, str(path))
    return array


def check_layout(array: np.ndarray, name: str) -> None:
    """Raises a VideoError unless the array is one clip `(F, H, W, 3)` or several `(N, F, H, W, 3)`."""
    if array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape:
        raise VideoError(
            f"{name}: expected clips (N, F, H, W, 3) or one clip (F, H, W, 3), got the shape {array.shape}"
        )
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise VideoError(f"{name}: expected uint8 or floats in [0, 1], got {array.dtype}")


def as_uint8(frames: np.ndarray, name: str) -> np.ndarray:
    """uint8 frames as they are; floats in [0, 1] rounded to 256 levels, as saving them as a video would.

    Raises:
        VideoError: pixels are not finite, or floats lie outside [0, 1].
    """
    if frames.dtype == np.uint8:
        return np.ascontiguousarray(frames)
    if not np.isfinite(frames).all():
        raise VideoError(f"{name}: has pixels that are not finite (NaN or infinity)")
    low, high = float(frames.min()), float(frames.max())
    if low < 0 or high > 1:
        raise VideoError(f"{name}: expected uint8 or floats in [0, 1], got floats from {low:.3g} to {high:.3g}")
    return (frames * 255.0).round().astype(np.uint8)


def as_array(clips: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array or a tensor as an array, channels last: `(B, F, 3, H, W)` is taken as well as `(B, F, H, W, 3)`."""
    array = clips.detach().cpu().numpy() if isinstance(clips, torch.Tensor) else clips
    if array.ndim == 5 and array.shape[-1] != 3 and array.shape[2] == 3:
        array = array.transpose(0, 1, 3, 4, 2)
    return array


def open_videos(source: str | os.PathLike[str] | np.ndarray | torch.Tensor | Sequence[Any]) -> list[Video]:
    """The videos of a source, in natural order of their names. All must be readable.

    Args:
        source: a folder (searched recursively) of video files, folders of frames, `.npy` files or Parquet files with a
            column `video`; a single such file; clips, see `as_array`, uint8 or floats in [0, 1]; or a list of these.

    Raises:
        ValueError: there is nothing there, it holds no video, or one of them cannot be read.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        array = as_array(source)
        check_layout(array, "the array")
        clips = array[None] if array.ndim == 4 else array
        return [_of_array(f"clip {i}", clip) for i, clip in enumerate(clips)]
    if not isinstance(source, str | os.PathLike):
        if not isinstance(source, Sequence):
            raise ValueError(f"a {type(source).__name__}: expected a path, an array of clips or a list of these")
        videos = [video for item in source for video in open_videos(item)]
        if not videos:
            raise ValueError("an empty list: expected at least one clip")
        return videos
    root = Path(source)
    if not root.exists():
        raise ValueError(f"{root}: expected a folder of clips or a video, but there is nothing there")
    if root.is_file():
        paths = [root]
    else:
        paths, _ = find_videos(root)
        if len(paths) > 1 and root in paths and [image.name for image in list_images(root)] == ["contact_sheet.png"]:
            paths.remove(root)  # `endora generate --format png` puts it beside the folders of frames
        paths += sorted(path for path in root.rglob("*.npy") if not path.name.startswith("."))
        paths = paths or sorted(path for path in root.rglob("*.parquet") if not path.name.startswith("."))
    if not paths:
        raise ValueError(
            f"{root}: holds no clips; expected videos ({', '.join(VIDEO_EXTENSIONS)}), folders of frames, .npy or "
            ".parquet files"
        )
    progress = tqdm(paths, desc=f"opening {root.name}", unit="file", disable=len(paths) < _PROGRESS_BAR_FROM)
    return [video for path in progress for video in _open_file(path, root)]


def _open_file(path: Path, root: Path) -> list[Video]:
    name = str(path)
    if path.suffix.lower() == ".npy":
        array = load_npy(path)
        num_frames, height, width = array.shape[-4:-1]
        if array.ndim == 4:
            return [Video(name, path, num_frames, height, width, "npy")]
        return [Video(f"{name}[{i}]", path, num_frames, height, width, "npy", i) for i in range(len(array))]
    if path.suffix.lower() == ".parquet":
        return _open_parquet(path)
    info = read_video_info(path)
    return [Video(name, path, info.num_frames, info.height, info.width, info.codec)]


def _open_parquet(path: Path) -> list[Video]:
    """Rows `{"video": {"path", "bytes"}}`, as `datasets.Video(decode=False)` stores them."""
    import pyarrow.parquet

    try:
        num_row_groups = pyarrow.parquet.ParquetFile(path).num_row_groups
        if "video" not in pyarrow.parquet.read_schema(path).names:
            raise ValueError("it has none")
    except Exception as error:  # pyarrow raises many kinds
        raise VideoError(f"{path}: has no readable column 'video' ({str(error).splitlines()[0]})") from error
    videos: list[Video] = []
    for row_group in range(num_row_groups):
        for i, row in enumerate(row_group_videos(path, path.stat().st_mtime_ns, row_group)):
            name = f"{path}[{len(videos)}]"
            value = row.get("bytes") or row.get("path") if isinstance(row, dict) else row
            if not isinstance(value, bytes | str):
                raise VideoError(f"{name}: expected {{'path', 'bytes'}}, got {type(value).__name__}")
            info = read_video_info(Path(value) if isinstance(value, str) else value)
            location = Path(value) if isinstance(value, str) else ParquetRow(path, row_group, i)
            videos.append(Video(name, location, info.num_frames, info.height, info.width, info.codec))
    return videos


def _of_array(name: str, clip: np.ndarray) -> Video:
    num_frames, height, width = clip.shape[:3]
    return Video(name, clip, num_frames, height, width, codec="array")


# --- which clips -----------------------------------------------------------------------------------------------------


def clip_indices(start: int, num_frames: int, span: int) -> tuple[int, ...]:
    """`num_frames` frames spread evenly over the `span` frames from `start` on, rounded down, as `sample_window`."""
    return tuple(np.linspace(start, start + span - 1, num_frames).astype(np.int64).tolist())


def clips_at_fixed_offsets(videos: Sequence[Video], num_clips: int, num_frames: int, span: int) -> list[Clip]:
    """As many clips as asked, or as there are, spread evenly over the videos and within each video.

    Every video gives equally many, as training draws videos equally often; what is left over comes from evenly spaced
    ones. First each gives at most what fits without overlap; only if that is not enough do clips of a video overlap.
    There is no chance in it.

    Returns:
        Clips in the order of the videos. Videos shorter than `span` give none.
    """
    long_enough = [i for i, video in enumerate(videos) if video.num_frames >= span]
    quotas = dict.fromkeys(long_enough, 0)
    for limit in (
        {i: videos[i].num_frames // span for i in quotas},
        {i: videos[i].num_frames - span + 1 for i in quotas},
    ):
        while (left := num_clips - sum(quotas.values())) > 0 and (
            open_ := [i for i in quotas if quotas[i] < limit[i]]
        ):
            chosen = np.linspace(0, len(open_) - 1, min(left, len(open_))).round().astype(int)
            for i in (open_[j] for j in chosen):
                quotas[i] += min(max(1, left // len(open_)), limit[i] - quotas[i])
    clips = []
    for i, quota in quotas.items():
        for start in fixed_starts(videos[i].num_frames, span, quota).tolist():
            clips.append(Clip(videos[i], clip_indices(start, num_frames, span)))
    return clips


def one_clip_per_video(videos: Sequence[Video], num_frames: int, seed: int) -> list[Clip]:
    """Consecutive frames at a random offset from every video: how the official evaluation takes real clips."""
    rng = np.random.default_rng(seed)
    clips = []
    for video in videos:
        start = int(rng.integers(0, max(0, video.num_frames - num_frames), endpoint=True))
        if video.num_frames >= num_frames:
            clips.append(Clip(video, clip_indices(start, num_frames, num_frames)))
    return clips


def whole_clips(videos: Sequence[Video], num_frames: int) -> list[Clip]:
    """The first `num_frames` frames of every generated clip.

    Raises:
        ValueError: a clip has fewer frames, or the clips differ in size.
    """
    first = videos[0]
    for video in videos:
        if video.num_frames < num_frames:
            raise ValueError(f"{video.name}: has {video.num_frames} frames; clips of {num_frames} frames are compared")
        if (video.height, video.width) != (first.height, first.width):
            raise ValueError(
                f"{video.name}: is {video.width}x{video.height} pixels, but {first.name} is "
                f"{first.width}x{first.height}; generated clips must have one size"
            )
    return [Clip(video, tuple(range(num_frames))) for video in videos]


def num_overlapping(clips: Sequence[Clip]) -> int:
    """How many clips share frames, or the time between them, with an earlier clip of the same video."""
    spans: dict[Any, list[tuple[int, int]]] = {}
    for clip in clips:
        spans.setdefault(clip.video, []).append((min(clip.indices), max(clip.indices)))
    count = 0
    for of_video in spans.values():
        end = -1
        for first, last in sorted(of_video):
            count += first <= end
            end = max(end, last)
    return count
