"""The training set: which frames of which video make a clip, how they are cropped, and which still images join them.

Facts of the official loader are from CUHK-AIM-Group/Endora (`datasets/*_image_datasets.py`, `datasets/__init__.py`,
`process_data.py`) and Vchitect/Latte (`datasets/video_transforms.py`), on which it builds.
"""

import copy
import logging
import math
import os
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..files import natural_order, walk_folders
from .clip_rows import (
    Rows,
    choose_columns,
    fetched,
    is_stream,
    label_of,
    open_source,
    stated_num_frames,
    undecoded,
    video_of,
)
from .video_io import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    VideoError,
    VideoSource,
    content_hash,
    file_stamps,
    list_images,
    read_frames,
    read_image,
    read_video_info,
)

logger = logging.getLogger(__name__)

_PROGRESS_BAR_FROM = 200  # videos
_DECODED_AT_A_TIME = 2**28  # bytes of full-size frames held while a video is brought into memory
_MAX_ATTEMPTS = 64  # other videos tried in place of one that fails
_NOT_OF_STREAMS = {"still_images": None, "epoch_over": "frames", "cache_gb": 0.0}  # option -> value that says nothing


# --- which frames ----------------------------------------------------------------------------------------------------


def sample_window(total: int, num_frames: int, window: int, rng: np.random.Generator) -> np.ndarray:
    """Frame indices of the official clip: `num_frames` spread evenly over a random window.

    The window starts uniformly in `[0, max(0, total - window - 1)]`, both included, and ends after `window` frames or
    with the video; the indices are `linspace(start, end - 1, num_frames)` rounded down. With 16 of 48 frames the
    stride is 3.13. A video shorter than the window gives all of its length.

    Args:
        total: frames of the video, at least `num_frames`.

    Returns:
        int64 `(num_frames,)`, ascending.

    Raises:
        ValueError: the video or the window is shorter than `num_frames`.
    """
    if not 1 <= num_frames <= min(total, window):
        raise ValueError(
            f"num_frames={num_frames}: expected 1 to {min(total, window)}, as the video has {total} frames and the "
            f"window {window}"
        )
    start = int(rng.integers(0, max(0, total - window - 1), endpoint=True))
    end = min(start + window, total)
    return np.linspace(start, end - 1, num_frames).astype(np.int64)


def sample_strided(total: int, num_frames: int, frame_interval: int, rng: np.random.Generator) -> np.ndarray:
    """Frame indices at an exact stride: `start, start + frame_interval, ...`, from a uniformly drawn possible start.

    Returns:
        int64 `(num_frames,)`, ascending.

    Raises:
        ValueError: the clip would be longer than the video.
    """
    span = (num_frames - 1) * frame_interval + 1
    if num_frames < 1 or frame_interval < 1 or span > total:
        raise ValueError(
            f"num_frames={num_frames}, frame_interval={frame_interval}: a clip spans {span} frames, "
            f"but the video has {total}"
        )
    start = int(rng.integers(0, total - span, endpoint=True))
    return start + frame_interval * np.arange(num_frames, dtype=np.int64)


def fixed_starts(total: int, span: int, num_clips: int) -> np.ndarray:
    """Where clips that span `span` frames start, spread evenly from the first possible place to the last.

    Returns:
        int64, ascending: `num_clips`, or as many as there are places; one clip starts at 0.
    """
    return np.linspace(0, total - span, min(num_clips, total - span + 1)).round().astype(np.int64)


# --- which pixels ----------------------------------------------------------------------------------------------------


def resize_and_crop_clip(frames: np.ndarray, height: int, width: int, antialias: bool = False) -> torch.Tensor:
    """Scale a clip until it covers `height x width`, crop the centre. Bilinear, `align_corners=False`, as officially.

    Args:
        frames: uint8 RGB `(F, H, W, 3)`.
        antialias: filter before shrinking. The official loader does not, which aliases above a factor of 2: its
            corpora are 256 pixels high, HD video is not.

    Returns:
        float32 `(F, 3, height, width)` in [-1, 1].
    """
    clip = torch.empty(len(frames), 3, height, width)
    # The next larger float, as 128 / H * H may come out below 128.
    scale = math.nextafter(max(height / frames.shape[1], width / frames.shape[2]), math.inf)
    for i, frame in enumerate(frames):  # one by one: 16 HD frames are 177 MB as floats
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, scale_factor=scale, mode="bilinear", align_corners=False, antialias=antialias)
        top, left = _centre(pixels.shape[2], height), _centre(pixels.shape[3], width)
        clip[i] = pixels[0, :, top : top + height, left : left + width]
    return clip.div_(127.5).sub_(1).clamp_(-1, 1)


def resize_and_crop_image(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    """The same for one still image, with Pillow's Lanczos filter, as the official script makes its still images.

    (It also stores them as JPEG of quality 75; that loss is not imitated.) An image of the right size is not filtered.

    Args:
        image: uint8 RGB `(H, W, 3)`.

    Returns:
        float32 `(3, height, width)` in [-1, 1].
    """
    old_height, old_width = image.shape[:2]
    if height * old_width >= width * old_height:  # the height decides
        new_height, new_width = height, height * old_width // old_height
    else:
        new_height, new_width = width * old_height // old_width, width
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS))
    top, left = _centre(new_height, height), _centre(new_width, width)
    pixels = torch.from_numpy(resized[top : top + height, left : left + width].copy())
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


def _centre(size: int, cropped: int) -> int:
    return round((size - cropped) / 2)  # half to even, as the official crop


# --- which videos ----------------------------------------------------------------------------------------------------


def find_videos(root: str | os.PathLike[str]) -> tuple[list[Path], int]:
    """Videos below a folder: video files, and folders of frames. Sub-folders and links are followed.

    A folder of frames directly contains images and no video; images beside videos are taken for thumbnails.

    Returns:
        Paths in natural order, and the number of visible files that are neither a video nor a frame of one.
    """
    videos: list[Path] = []
    num_ignored = 0
    for folder, files in walk_folders(root):
        in_folder = [folder / name for name in files if name.lower().endswith(VIDEO_EXTENSIONS)]
        num_frames = sum(name.lower().endswith(IMAGE_EXTENSIONS) for name in files)
        if not in_folder and num_frames:
            videos.append(folder)
            num_ignored += len(files) - num_frames
        else:
            videos += in_folder
            num_ignored += len(files) - len(in_folder)
    return sorted(videos, key=lambda path: natural_order(path.relative_to(root).as_posix())), num_ignored


@dataclass(frozen=True)
class _Source:
    """A video, or a still image."""

    name: str
    location: Path | int  # a path, or the number of a row
    label: int | None
    num_frames: int = 0  # of a video that has been opened, or whose row states it


class ClipSampler:
    """What the two datasets have in common: which frames of a video make a clip, and in which form.

    See `ClipDataset` for the arguments.
    """

    def __init__(
        self,
        num_frames: int,
        resolution: int | tuple[int, int],
        frame_interval: int | None,
        window: int,
        num_still_images: int,
        horizontal_flip: bool,
        antialias: bool,
        fixed_offsets: bool,
        clips_per_video: int,
        seed: int,
    ) -> None:
        self.height, self.width = (resolution, resolution) if isinstance(resolution, int) else resolution
        if min(self.height, self.width) < 1:
            raise ValueError(f"resolution={resolution}: expected a positive integer or a pair (height, width)")
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: expected a positive integer")
        if frame_interval is not None and frame_interval < 1:
            raise ValueError(f"frame_interval={frame_interval}: expected a positive integer, or None for the window")
        if frame_interval is None and window < num_frames:
            raise ValueError(f"window={window}: expected at least num_frames={num_frames}")
        if num_still_images < 0:
            raise ValueError(f"num_still_images={num_still_images}: expected an integer from 0 up")
        if clips_per_video < 1:
            raise ValueError(f"clips_per_video={clips_per_video}: expected a positive integer")
        if seed < 0:
            raise ValueError(f"seed={seed}: expected an integer from 0 up")
        self.num_frames = num_frames
        self.frame_interval = frame_interval
        self.window = window
        self.num_still_images = num_still_images
        self.horizontal_flip = horizontal_flip
        self.antialias = antialias
        self.fixed_offsets = fixed_offsets
        self.clips_per_video = clips_per_video
        self.seed = seed
        self.class_names: list[str] | None = None
        # In shared memory, so that data workers see a new epoch
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that items belong to from now on; reaches the persistent workers of a DataLoader too."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: expected an integer from 0 up")
        self._epoch.fill_(epoch)

    @property
    def num_classes(self) -> int | None:
        """How many labels there are, or None where that is not known."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def shortest_video(self) -> int:
        """Frames that a video needs for a clip."""
        return self.num_frames if self.frame_interval is None else (self.num_frames - 1) * self.frame_interval + 1

    def draw_frames(self, total: int, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
        """Indices of a random clip of a video of `total` frames, and whether it is mirrored."""
        if self.frame_interval is None:
            indices = sample_window(total, self.num_frames, self.window, rng)
        else:
            indices = sample_strided(total, self.num_frames, self.frame_interval, rng)
        return indices, bool(self.horizontal_flip and rng.random() < 0.5)

    def num_fixed_clips(self, total: int) -> int:
        """How many clips a video of `total` frames gives with `fixed_offsets`."""
        return min(self.clips_per_video, total - self._fixed_span(total) + 1)

    def fixed_frames(self, total: int, number: int) -> np.ndarray:
        """Indices of clip `number` of the `num_fixed_clips(total)` of a video."""
        span = self._fixed_span(total)
        start = fixed_starts(total, span, self.clips_per_video)[number]
        return np.linspace(start, start + span - 1, self.num_frames).astype(np.int64)

    def _fixed_span(self, total: int) -> int:
        return min(self.window, total) if self.frame_interval is None else self.shortest_video

    def resized(self, frames: np.ndarray) -> torch.Tensor:
        """Frames `(F, H, W, 3)` as the pixels of a clip."""
        return resize_and_crop_clip(frames, self.height, self.width, self.antialias)


class ClipDataset(ClipSampler, Dataset[dict[str, torch.Tensor]]):
    """Clips of 16 frames with, on request, still images for joint training and class labels.

    **Items.** `dataset[i]` is a dict that PyTorch's default collate function can batch:

    - `video`: float32 `(num_frames + num_still_images, 3, H, W)` in [-1, 1], the clip's frames first;
    - `frame_ids`: int64 `(num_frames + num_still_images,)`; frames with the same number have the same pixels;
    - `class_labels` (with `class_labels=True`): int64 `()`, or `(1 + num_still_images,)` when there are still images:
      the clip's label, then each still image's.

    **Epochs.** As officially, an epoch has as many items as the corpus has frames, and item `i` is a clip of video
    `i % num_videos`: all videos are drawn equally often, however long they are, each time with another window. With
    `epoch_over="videos"` an epoch draws each video `clips_per_video` times.

    **Evaluation.** With `fixed_offsets` an item has no chance in it and is the same in every epoch: each video gives
    `clips_per_video` clips, or as many as it has places for, spread evenly from its first to its last possible
    window, never mirrored, in the order of the videos. Nothing takes the place of a damaged clip: it is an error.

    **Streams.** For a `datasets.IterableDataset`, or with `streaming=True`, the call gives a `StreamingClipDataset`,
    which reads shards one after the other and keeps none; see there.

    **Still images.** All frames of the usable videos are shuffled once (by `seed`). Item `i` gets the
    `num_still_images` neighbours from entry `i` of that list on; in epoch `e`, from entry `e * len(dataset) + i` on,
    counted around the list. They are not flipped. Seeking single frames in long groups of pictures is slow: with
    `still_images=` they come from a folder of image files instead, as officially.

    **Repeatability.** An item is a function of `(seed, epoch, index)` alone: neither the number of workers or
    processes nor an interruption changes it. Call `set_epoch` before each epoch; persistent workers see it.
    (`accelerate` forwards its own `set_epoch` to the dataset in some set-ups only, so a training script should call
    this one itself.) A `torchdata.stateful_dataloader.StatefulDataLoader` goes on with the very next item.

    **Broken files** never end a run or enter a batch. Files that cannot be opened and videos shorter than a clip are
    found when the dataset is built, from the packets and the first frame, and left out. A file that turns out to be
    damaged when frames are decoded is logged once and kept in `broken_files`; the clip is replaced by one of another
    video, drawn from the item's own random numbers. Its intact parts stay in use.

    Args:
        source: a folder of videos (see `find_videos`); a folder of Parquet or WebDataset shards, as `endora prepare`
            writes; the id of a dataset on the Hub; or rows: a `datasets.Dataset` or a list of dicts whose
            `video_column` holds `{"path": ..., "bytes": ...}`, as `datasets.Video(decode=False)` gives, or a path or
            a URL that fsspec opens. A column `num_frames` is taken at its word, so that videos need not be opened to
            be counted.
        num_frames: frames in a clip.
        resolution: side of the square, or `(height, width)`, in pixels.
        frame_interval: take every `frame_interval`-th frame instead of spreading the clip over `window`.
        window: frames that a clip is spread over, see `sample_window`. Unused with `frame_interval`.
        num_still_images: still images in an item.
        still_images: folder with image files, searched recursively. With class labels, one sub-folder per class.
        horizontal_flip: mirror a clip as a whole with probability 0.5.
        antialias: see `resize_and_crop_clip`.
        class_labels: give labels. In a folder the label is the first sub-folder on the way to the video, numbered in
            alphabetical order; in rows it is the integer in `label_column`. Rows whose label is None or -1 are left
            out.
        video_column: column of the rows that holds the video; None: `video`, or the only one of that type.
        label_column: column of the rows that holds the label; None: `label`, or WebDataset's `cls`.
        epoch_over: `"frames"` or `"videos"`: the length of an epoch.
        fixed_offsets: clips for evaluation, see above.
        clips_per_video: clips that a video gives in an epoch, with `fixed_offsets` or `epoch_over="videos"`.
        cache_gb: memory, per process, for videos that are decoded once and kept, resized, in both orientations. Serves
            clips as long as it lasts, video by video; a frame of 128x128 takes 0.4 MB. Items do not depend on it.
        seed: non-negative; all random choices derive from it.
        split: of a folder of shards or a dataset of the Hub; None: `"train"`.
        streaming: see above.

    Attributes:
        num_videos: usable videos.
        total_frames: frames in the usable videos.
        class_names: names of the labels, or None.
        too_short: name -> number of frames, of the videos that are shorter than a clip.
        num_ignored_files: visible files in the folder that belong to no video.
        num_unlabelled: rows that are left out because they have no label.

    Raises:
        ValueError: an argument is not as described, or there is no usable video; the message says what was found.
    """

    def __new__(cls, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        """A `StreamingClipDataset` for a stream; a DataLoader tells the two apart by their class."""
        if kwargs.get("streaming") or is_stream(source):
            from .streaming_clips import StreamingClipDataset

            for name, without in _NOT_OF_STREAMS.items():
                if kwargs.get(name, without) != without:
                    raise ValueError(f"{name}={kwargs[name]!r}: is not for streams, which keep nothing")
            kept = {k: v for k, v in kwargs.items() if k != "streaming" and k not in _NOT_OF_STREAMS}
            return StreamingClipDataset(source, *args, **kept)
        if "shuffle_buffer" in kwargs:
            raise ValueError("shuffle_buffer: is for streams; DataLoader(shuffle=True) shuffles the other items")
        return super().__new__(cls)

    def __init__(
        self,
        source: str | os.PathLike[str] | Rows | Any,
        num_frames: int = 16,
        resolution: int | tuple[int, int] = 128,
        *,
        frame_interval: int | None = None,
        window: int = 48,
        num_still_images: int = 0,
        still_images: str | os.PathLike[str] | None = None,
        horizontal_flip: bool = True,
        antialias: bool = False,
        class_labels: bool = False,
        video_column: str | None = None,
        label_column: str | None = None,
        epoch_over: Literal["frames", "videos"] = "frames",
        fixed_offsets: bool = False,
        clips_per_video: int = 1,
        cache_gb: float = 0.0,
        seed: int = 0,
        split: str | None = None,
        streaming: bool = False,
    ) -> None:
        super().__init__(
            num_frames,
            resolution,
            frame_interval,
            window,
            num_still_images,
            horizontal_flip,
            antialias,
            fixed_offsets,
            clips_per_video,
            seed,
        )
        if still_images is not None and num_still_images == 0:
            raise ValueError("num_still_images=0 with a folder of still_images: expected how many an item takes")
        if epoch_over not in ("frames", "videos"):
            raise ValueError(f"epoch_over={epoch_over!r}: expected 'frames' or 'videos'")
        if clips_per_video != 1 and epoch_over == "frames" and not fixed_offsets:
            raise ValueError(
                f"clips_per_video={clips_per_video}: is for fixed_offsets or epoch_over='videos'; the length of an "
                "epoch over frames is their number"
            )
        self.epoch_over = epoch_over
        self._cache: dict[int, torch.Tensor] = {}  # video -> both orientations of all its frames, (2, n, 3, H, W)
        self._cache_room = round(cache_gb * 1e9)
        self._uncached: set[int] = set()
        self.num_ignored_files = 0
        self.too_short: dict[str, int] = {}
        self._unreadable: dict[str, str] = {}
        self.num_unlabelled = 0
        self._rows: Rows = []
        self._video_column = ""

        opened = open_source(source, split, streaming=False)
        if isinstance(opened, Path):
            found = self._found_in_folder(opened, class_labels)
        else:
            found = self._found_in_rows(opened, class_labels, video_column, label_column)
        self._videos = self._usable(found, os.fspath(source) if isinstance(source, str | os.PathLike) else "the rows")
        self._still_images = [] if still_images is None else self._found_still_images(Path(still_images))
        self._number_frames()

    def _number_frames(self) -> None:
        """Everything that follows from which videos there are."""
        self.num_videos = len(self._videos)
        self._first_frame = np.cumsum([0] + [video.num_frames for video in self._videos])  # number within the corpus
        self.total_frames = int(self._first_frame[-1])
        if self.fixed_offsets:
            self._first_clip = np.cumsum([0] + [self.num_fixed_clips(video.num_frames) for video in self._videos])
        self._still_order = np.empty(0, dtype=np.int64)
        if self.num_still_images:
            num_entries = len(self._still_images) or self.total_frames
            self._still_order = np.random.default_rng(self.seed).permutation(num_entries)
        # In shared memory: the training process sees which files its data workers found damaged.
        self._is_damaged = torch.zeros(self.num_videos + len(self._still_images), dtype=torch.bool).share_memory_()
        self._damage: dict[int, str] = {}

    def split(self, fraction: float, clips_per_video: int = 1) -> tuple["ClipDataset", "ClipDataset"]:
        """This dataset without some of its videos, and those videos with `fixed_offsets`: to train, and to hold out.

        Args:
            fraction: of the videos that is held out, at least one; drawn by `seed`.
            clips_per_video: clips that a video held out gives.

        Raises:
            ValueError: a fraction outside (0, 1), or no video is left to train on.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction={fraction}: expected a number between 0 and 1")
        count = max(1, round(fraction * self.num_videos))
        if count == self.num_videos:
            raise ValueError(
                f"fraction={fraction} holds out all of {self.num_videos} videos: expected some to train on"
            )
        order = np.random.default_rng((self.seed, 1)).permutation(self.num_videos)
        parts = []
        for chosen in (order[count:], order[:count]):
            part = copy.copy(self)
            part._videos = [self._videos[i] for i in sorted(chosen)]
            part._cache, part._uncached = {}, set()
            part._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
            parts.append(part)
        train, held_out = parts
        held_out.fixed_offsets, held_out.clips_per_video, held_out.horizontal_flip = True, clips_per_video, False
        held_out._cache_room = 0
        for part in parts:
            part._number_frames()
        return train, held_out

    def __len__(self) -> int:
        if self.fixed_offsets:
            return int(self._first_clip[-1])
        return self.total_frames if self.epoch_over == "frames" else self.num_videos * self.clips_per_video

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.item(int(self._epoch), index)

    def item(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        """Item `index` of an epoch, whichever epoch `set_epoch` chose.

        Raises:
            IndexError: there is no such item.
        """
        parts, item = self._parts(epoch, index, self._pixels, self._still_pixels)
        clip, *stills = parts
        return {"video": torch.cat([clip] + [image[None] for image in stills]), **item}

    def item_without_pixels(self, epoch: int, index: int, damaged: Container[int]) -> dict[str, torch.Tensor]:
        """`item` less `video`, without reading a video: for a training on features of frames that are kept.

        Args:
            damaged: ids of frames that cannot be decoded; another clip or image takes the place of one with them.
        """

        def check_clip(i: int, indices: np.ndarray, is_flipped: bool) -> None:
            self._check_undamaged(self._frame_ids(i, indices, is_flipped), damaged)

        def check_still(entry: int) -> None:
            self._check_undamaged([3 * entry + 2], damaged)

        return self._parts(epoch, index, check_clip, check_still)[1]

    def _parts(
        self,
        epoch: int,
        index: int,
        read_clip: Callable[[int, np.ndarray, bool], Any],
        read_still: Callable[[int], Any],
    ) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """What the two functions read of an item, the clip first, and its ids and labels."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index}: expected 0 to {len(self) - 1}")
        index, epoch = int(index), 0 if self.fixed_offsets else epoch
        clip, frame_ids, label = self._clip(epoch, index, read_clip)
        stills = [self._still(epoch, index, slot, read_still) for slot in range(self.num_still_images)]
        item = {"frame_ids": torch.tensor(frame_ids + [still_id for _, still_id, _ in stills])}
        if self.class_names is not None:
            labels = [label] + [still_label for _, _, still_label in stills]
            item["class_labels"] = torch.tensor(labels if stills else label, dtype=torch.int64)
        return [clip] + [image for image, _, _ in stills], item

    def state_dict(self) -> dict[str, Any]:
        """The epoch, which a `StatefulDataLoader` keeps beside the position that its sampler has."""
        return {"epoch": int(self._epoch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on in the epoch of a `state_dict`."""
        self.set_epoch(state_dict["epoch"])

    @property
    def broken_files(self) -> dict[str, str]:
        """Name -> reason, of all files that cannot be opened or have turned out to be damaged so far."""
        found_by_worker = "damaged; the data worker that found it has logged how"
        damaged = self._is_damaged.nonzero().flatten().tolist()
        return self._unreadable | {self._name(i): self._damage.get(i, found_by_worker) for i in damaged}

    @property
    def num_broken(self) -> int:
        """How many files are in `broken_files`."""
        return len(self.broken_files)

    # --- frames for what is computed once ----------------------------------------------------------------------------

    @property
    def frame_variants(self) -> list[int]:
        """Forms that items show a frame in: 0 as it is, 1 mirrored, 2 as a still image. Frame ids are 3 frame + form.

        Raises:
            ValueError: still images that are no frames of the videos.
        """
        if self._still_images:
            raise ValueError("still_images of a folder have no features by frame: expected still images of the videos")
        flips = self.horizontal_flip and not self.fixed_offsets
        return [0] + [1] * flips + [2] * (self.num_still_images > 0)

    @property
    def num_frames_of_videos(self) -> list[int]:
        """Frames of each usable video, in the order that frame ids count them."""
        return [video.num_frames for video in self._videos]

    def video_name(self, i: int) -> str:
        """How messages name video `i`."""
        return self._videos[i].name

    def video_label(self, i: int) -> int | None:
        """The label of video `i`, None without `class_labels`."""
        return self._videos[i].label

    def fixed_clips_of(self, i: int) -> range:
        """The items that video `i` gives, with `fixed_offsets`."""
        return range(int(self._first_clip[i]), int(self._first_clip[i + 1]))

    def frame_of(self, frame_id: int) -> tuple[str, int]:
        """Name of the video that a frame id belongs to, and the number of the frame in it."""
        i = self._video_of_frame(frame_id // 3)
        return self._videos[i].name, frame_id // 3 - int(self._first_frame[i])

    def open_video(self, i: int) -> VideoSource:
        """What the functions of `video_io` read video `i` from: a path or bytes."""
        return self._open(self._videos[i])

    def video_stamps(self, i: int) -> list[tuple[str, int, int]] | None:
        """Name, size and time of the files of video `i`, which change with its content; None where it is no file."""
        location = self._videos[i].location
        return file_stamps(location) if isinstance(location, Path) else None

    def video_hash(self, i: int) -> str:
        """SHA-256 of the content of video `i`."""
        return content_hash(self._open(self._videos[i]))

    def read_variants(self, i: int, frames: range) -> torch.Tensor:
        """Frames of video `i` in each of `frame_variants`, float32 `(variants, len(frames), 3, H, W)` in [-1, 1].

        Raises:
            VideoError: one of them is damaged.
        """
        pixels = read_frames(self._open(self._videos[i]), frames)
        read = {
            0: lambda: self.resized(pixels),
            1: lambda: self.resized(pixels[:, :, ::-1]),
            2: lambda: torch.stack([resize_and_crop_image(image, self.height, self.width) for image in pixels]),
        }
        return torch.stack([read[variant]() for variant in self.frame_variants])

    # --- an item -----------------------------------------------------------------------------------------------------

    def _clip(
        self, epoch: int, index: int, read: Callable[[int, np.ndarray, bool], Any]
    ) -> tuple[Any, list[int], int | None]:
        """The clip of an item as `read` gives it, the ids of its frames, and its label."""
        if self.fixed_offsets:
            i = int(np.searchsorted(self._first_clip, index, side="right")) - 1
            indices = self.fixed_frames(self._videos[i].num_frames, index - int(self._first_clip[i]))
            return read(i, indices, False), self._frame_ids(i, indices, False), self._videos[i].label
        for attempt in range(_MAX_ATTEMPTS):
            rng = np.random.default_rng((self.seed, epoch, index, 0, attempt))
            i = int(rng.integers(self.num_videos)) if attempt else index % self.num_videos
            indices, is_flipped = self.draw_frames(self._videos[i].num_frames, rng)
            try:
                clip = read(i, indices, is_flipped)
            except (ValueError, OSError) as error:
                self._report_damage(i, error)
                continue
            return clip, self._frame_ids(i, indices, is_flipped), self._videos[i].label
        raise self._too_much_damage()

    def _frame_ids(self, i: int, indices: np.ndarray, is_flipped: bool) -> list[int]:
        """A frame has three ids: as it is, mirrored, and as a still image, which is resized by another filter."""
        return (3 * (self._first_frame[i] + indices) + is_flipped).tolist()

    def _pixels(self, i: int, indices: np.ndarray, is_flipped: bool) -> torch.Tensor:
        """Frames of video `i`, mirrored or not, float32 `(len(indices), 3, H, W)` in [-1, 1], from memory if kept."""
        if i not in self._cache and i not in self._uncached:
            self._keep(i)
        if i in self._cache:
            return self._cache[i][int(is_flipped), torch.from_numpy(indices)]
        frames = read_frames(self._open(self._videos[i]), indices)
        return self.resized(frames[:, :, ::-1] if is_flipped else frames)

    def _keep(self, i: int) -> None:
        """Decodes all of video `i` into memory if there is room; a video that has damage anywhere is not kept."""
        num_frames = self._videos[i].num_frames
        size = 2 * num_frames * 3 * self.height * self.width * 4
        if size > self._cache_room:
            self._uncached.add(i)
            return
        kept = torch.empty(2, num_frames, 3, self.height, self.width)
        source = self._open(self._videos[i])
        try:
            info = read_video_info(source)
            at_a_time = max(16, _DECODED_AT_A_TIME // (info.height * info.width * 3))
            for first in range(0, num_frames, at_a_time):
                frames = read_frames(source, range(first, min(first + at_a_time, num_frames)))
                kept[0, first : first + len(frames)] = self.resized(frames)
                kept[1, first : first + len(frames)] = self.resized(frames[:, :, ::-1])
        except (ValueError, OSError):
            self._uncached.add(i)  # its intact frames are still read one clip at a time
            return
        self._cache[i] = kept
        self._cache_room -= size

    def _still(self, epoch: int, index: int, slot: int, read: Callable[[int], Any]) -> tuple[Any, int, int | None]:
        """One still image of an item as `read` gives it, its id, and its label."""
        num_entries = len(self._still_order)
        for attempt in range(_MAX_ATTEMPTS):
            rng = np.random.default_rng((self.seed, epoch, index, 1 + slot, attempt))
            place = int(rng.integers(num_entries)) if attempt else (epoch * len(self) + index + slot) % num_entries
            entry = int(self._still_order[place])
            if self._still_images:
                i, label = self.num_videos + entry, self._still_images[entry].label
            else:
                i = self._video_of_frame(entry)
                label = self._videos[i].label
            try:
                image = read(entry)
            except (ValueError, OSError) as error:
                self._report_damage(i, error)
                continue
            return image, 3 * entry + 2, label
        raise self._too_much_damage()

    def _still_pixels(self, entry: int) -> torch.Tensor:
        """A still image, float32 `(3, H, W)` in [-1, 1]."""
        if self._still_images:
            image = read_image(self._still_images[entry].name)
        else:
            i = self._video_of_frame(entry)
            image = read_frames(self._open(self._videos[i]), [entry - int(self._first_frame[i])])[0]
        return resize_and_crop_image(image, self.height, self.width)

    def _video_of_frame(self, frame: int) -> int:
        """Number of the video that frame `frame` of the corpus belongs to."""
        return int(np.searchsorted(self._first_frame, frame, side="right")) - 1

    @staticmethod
    def _check_undamaged(frame_ids: list[int], damaged: Container[int]) -> None:
        if any(frame_id in damaged for frame_id in frame_ids):
            raise VideoError("a frame could not be decoded when its features were computed")

    def _open(self, video: _Source) -> VideoSource:
        """What the functions of `video_io` take: a path or bytes."""
        if isinstance(video.location, Path):
            return video.location
        return fetched(video_of(self._rows[video.location], self._video_column))

    def _name(self, i: int) -> str:
        """Name of a video, or of a still image, which are numbered after the videos."""
        return (self._videos[i] if i < self.num_videos else self._still_images[i - self.num_videos]).name

    def _report_damage(self, i: int, error: Exception) -> None:
        if not self._is_damaged[i]:
            self._is_damaged[i] = True
            self._damage[i] = _reason(error, self._name(i))
            logger.warning("damaged file, another takes its place: %s: %s", self._name(i), self._damage[i])

    def _too_much_damage(self) -> VideoError:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.broken_files.items())[:3])
        return VideoError(f"{_MAX_ATTEMPTS} draws in a row met damaged data ({reasons}); check the corpus")

    # --- building ----------------------------------------------------------------------------------------------------

    def _found_in_folder(self, root: Path, class_labels: bool) -> list[_Source]:
        if not root.is_dir():
            raise ValueError(f"{root}: expected a folder with videos, but there is no such folder")
        paths, self.num_ignored_files = find_videos(root)
        if class_labels:
            self.class_names = sorted({_class_folder(path, root) for path in paths})
        return [_Source(str(path), path, self._folder_label(path, root)) for path in paths]

    def _found_still_images(self, root: Path) -> list[_Source]:
        paths = [path for folder, _ in walk_folders(root) for path in list_images(folder)]
        if not paths:
            raise ValueError(
                f"{root}: expected a folder with still images ({', '.join(IMAGE_EXTENSIONS)}), found none"
            )
        paths.sort(key=lambda path: natural_order(path.relative_to(root).as_posix()))
        return [_Source(str(path), path, self._folder_label(path, root)) for path in paths]

    def _folder_label(self, path: Path, root: Path) -> int | None:
        if self.class_names is None:
            return None
        name = _class_folder(path, root)
        if name not in self.class_names:
            raise ValueError(f"{path}: {name!r} is not a class; expected one of {', '.join(self.class_names)}")
        return self.class_names.index(name)

    def _found_in_rows(
        self, rows: Any, class_labels: bool, video_column: str | None, label_column: str | None
    ) -> list[_Source]:
        features = getattr(rows, "features", None)
        columns = choose_columns(features, class_labels, video_column, label_column)
        self._rows, self._video_column = undecoded(rows, columns) if features else rows, columns.video
        facts: Any = rows
        if features:  # without the videos, which need not be read for this
            facts = (
                [{}] * len(rows)
                if columns.names == [columns.video]
                else rows.select_columns(columns.names[1:]).with_format(None)
            )

        found = []
        for i, row in enumerate(facts):
            label = None if columns.label is None else label_of(row, columns.label, f"row {i}")
            if columns.label is not None and label is None:
                self.num_unlabelled += 1
            else:
                found.append(_Source(f"row {i}", i, label, stated_num_frames(row, columns) or 0))
        if self.num_unlabelled:
            logger.warning("left out: %d of %d rows have no %s", self.num_unlabelled, len(rows), columns.label)
            if not found:
                raise ValueError(f"label_column={columns.label!r}: expected labels, but no row has one")
        if class_labels:
            highest = max((video.label or 0 for video in found), default=-1)
            self.class_names = columns.class_names or [str(label) for label in range(1 + highest)]
        return found

    def _usable(self, found: list[_Source], origin: str) -> list[_Source]:
        """The videos that can be opened and hold a clip; the others are remembered and reported."""
        needed = self.shortest_video
        usable = []
        for video in tqdm(found, desc="opening videos", unit="video", disable=len(found) < _PROGRESS_BAR_FROM):
            try:
                num_frames = video.num_frames or read_video_info(self._open(video)).num_frames
            except (ValueError, OSError) as error:
                self._unreadable[video.name] = _reason(error, video.name)
                logger.warning("broken file, left out: %s: %s", video.name, self._unreadable[video.name])
                continue
            if num_frames < needed:
                self.too_short[video.name] = num_frames
            else:
                usable.append(replace(video, num_frames=num_frames))

        short = f"{len(self.too_short)} of {len(found)} videos have fewer than the {needed} frames of a clip"
        if self.too_short:
            short += " (such as {}: {})".format(*next(iter(self.too_short.items())))
            logger.warning("left out: %s", short)
        if not usable:
            broken = f"{len(self._unreadable)} cannot be read"
            if self._unreadable:
                broken += " (such as {}: {})".format(*next(iter(self._unreadable.items())))
            raise ValueError(
                f"{origin}: expected at least one usable video ({', '.join(VIDEO_EXTENSIONS)} or a folder of frames); "
                f"{len(found)} found, of which {broken}; {short}; {self.num_ignored_files} other files were ignored"
            )
        return usable


def _class_folder(path: Path, root: Path) -> str:
    """The first sub-folder of `root` on the way to `path`."""
    parts = path.relative_to(root).parts
    if len(parts) < 2:
        raise ValueError(f"{path}: class labels need one sub-folder of {root} per class, but this lies directly in it")
    return parts[0]


def _reason(error: Exception, name: str) -> str:
    """The error's sentence without the name of the file that it begins with."""
    return str(error).removeprefix(f"{name}: ")
