"""Videos with labels, and clips without: where they come from and how the training reads them."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...baselines.registry import kind_of, load_pipeline
from ...data.clips import ClipDataset
from ...data.corpora.corpus import read_number, read_table
from ...data.video_io import VideoError
from ...metrics.sampling import sample_clips
from ...training.processes import on_cpu


@dataclass(frozen=True)
class ClipShape:
    """Frames of a clip, pixels of a frame, how far frames lie apart (`frame_interval`, or spread over `window`)."""

    num_frames: int = 16
    resolution: int = 128
    frame_interval: int | None = None
    window: int = 48

    @property
    def span(self) -> int:
        """Frames that a video has to have."""
        return self.num_frames if self.frame_interval is None else (self.num_frames - 1) * self.frame_interval + 1

    def open(self, source: Any, **options: Any) -> ClipDataset:
        """A `ClipDataset` of such clips, an item per video, not mirrored: views do that."""
        return ClipDataset(
            source,
            self.num_frames,
            self.resolution,
            frame_interval=self.frame_interval,
            window=self.window,
            horizontal_flip=False,
            antialias=True,
            **{"epoch_over": "videos"} | options,
        )


@dataclass(frozen=True)
class LabelledVideos:
    """Videos of two classes.

    Attributes:
        random_clips: item i of an epoch is a clip of video i.
        fixed_clips: for evaluation, see `ClipDataset`.
        labels: int64 `(N,)`, 1 for the positive class.
        class_names: as the corpus has them.
        positive_class: of `class_names`; all others are negative.
    """

    random_clips: ClipDataset
    fixed_clips: ClipDataset
    labels: np.ndarray
    class_names: list[str]
    positive_class: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_left_out(self) -> int:
        """Videos of the source that are not used: broken, too short, or without a label."""
        clips = self.random_clips
        return clips.num_broken + len(clips.too_short) + clips.num_unlabelled

    def digest(self) -> str:
        """SHA-256 of the names of the videos and of their labels."""
        names = [[self.random_clips.video_name(i), int(label)] for i, label in enumerate(self.labels)]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def open_labelled(
    source: str | os.PathLike[str],
    shape: ClipShape,
    positive_class: str | None = None,
    label_file: str | os.PathLike[str] | None = None,
    split: str | None = None,
    clips_per_video: int = 4,
    cache_gb: float = 1.0,
) -> LabelledVideos:
    """Opens videos with labels.

    Args:
        source: a folder with a sub-folder per class, a prepared dataset or one of the Hub, or, with `label_file`, a
            folder of videos.
        positive_class: name of a class; None: the second of two.
        label_file: see `read_label_file`.
        split: of a dataset; None: `train`.
        clips_per_video: at most so many clips are looked at to judge a video.
        cache_gb: memory for decoded videos, see `ClipDataset`.

    Raises:
        ValueError: there are no such videos, they do not match their labels, or it is not clear what is positive.
    """
    videos = source if label_file is None else read_label_file(Path(source), Path(label_file))
    options: dict[str, Any] = {"class_labels": True, "split": split}
    random_clips = shape.open(videos, cache_gb=cache_gb, **options)
    fixed_clips = shape.open(videos, fixed_offsets=True, clips_per_video=clips_per_video, cache_gb=cache_gb, **options)
    names = random_clips.class_names or []
    if positive_class is None:
        if len(names) != 2:
            raise ValueError(
                f"{source}: has {len(names)} classes ({', '.join(names)}); name the one that counts as positive with "
                "--positive_class."
            )
        positive_class = names[1]
    if positive_class not in names:
        raise ValueError(f"--positive_class {positive_class}: {source} has the classes {', '.join(names)}.")
    positive = names.index(positive_class)
    labels = np.array([random_clips.video_label(i) == positive for i in range(random_clips.num_videos)], np.int64)
    return LabelledVideos(random_clips, fixed_clips, labels, names, positive_class)


def read_label_file(folder: Path, label_file: Path) -> list[dict[str, Any]]:
    """Rows for `ClipDataset` from a file with lines `<video>,<label>`, as the lists of PolypDiag have them.

    Args:
        folder: that the names of the videos begin in.
        label_file: labels are integers from 0 up; there is no header, and a quotation mark is a character as others.

    Raises:
        ValueError: a file is not there or no text, a line is not as described, or a video is listed twice.
    """
    if not label_file.is_file():
        raise ValueError(f"{label_file}: there is no such file of labels.")
    rows: dict[str, dict[str, Any]] = {}
    for number, cells in read_table(label_file, ","):
        where = f"{label_file}, line {number}"
        label = read_number(cells[1]) if len(cells) == 2 and cells[0] else None
        if label is None:
            raise ValueError(f"{where}: expected <video>,<label from 0 up>, got {','.join(cells)[:80]!r}.")
        name = os.path.normpath(cells[0])
        if name in rows:
            raise ValueError(f"{where}: {name} is listed twice.")
        if not (folder / name).exists():
            raise ValueError(f"{where}: there is no {name} in {folder}; labels and videos do not match.")
        rows[name] = {"video": str(folder / name), "label": label}
    if not rows:
        raise ValueError(f"{label_file}: is empty; expected lines <video>,<label from 0 up>.")
    return list(rows.values())


@dataclass(frozen=True)
class Clips:
    """Some videos of a dataset, each of which gives a clip in every epoch."""

    dataset: ClipDataset
    videos: Sequence[int]

    def read(self, epoch: int, position: int) -> np.ndarray:
        """The clip that video `position` of these gives in an epoch, uint8 `(F, H, W, 3)`.

        Raises:
            VideoError: the video is damaged; another does not take its place.
        """
        video = self.videos[position]
        item = self.dataset.item(epoch, video)
        first = int(item["frame_ids"][0])
        if self.dataset.frame_of(first)[0] != self.dataset.video_name(video):
            name = self.dataset.video_name(video)
            raise VideoError(f"{name}: {self.dataset.broken_files.get(name, 'cannot be read')}.")
        return as_uint8(item["video"])


def as_uint8(clip: torch.Tensor) -> np.ndarray:
    """Pixels `(F, 3, H, W)` in [-1, 1] as uint8 `(F, H, W, 3)`."""
    return ((clip + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def pixels_of(clips: torch.Tensor) -> torch.Tensor:
    """Clips, uint8 `(B, F, H, W, 3)`, as pixels `(B, F, 3, H, W)` in [-1, 1]."""
    return clips.permute(0, 1, 4, 2, 3).float().div(127.5).sub(1)


def open_unlabelled(
    source: str | Path, shape: ClipShape, num_clips: int, samples_dir: Path, cache_gb: float = 1.0
) -> ClipDataset:
    """Opens a folder or dataset of clips, or generates clips with a pipeline.

    Args:
        source: a folder of clips, a prepared dataset or one of the Hub, or a pipeline of this package: its folder or
            id on the Hub. A pipeline generates `num_clips` clips, of the frames that are needed (seed 0, its own
            number of steps, all of its classes in turn), into `samples_dir`, where those that are there stay.

    Raises:
        ValueError: there is no such thing.
    """
    if is_pipeline(source):
        device = torch.device("cpu") if on_cpu() else torch.accelerator.current_accelerator()
        pipeline = load_pipeline(source).to(device)
        steps = pipeline.config.get("num_inference_steps")
        num_frames = -(-shape.span // 4) * 4  # LVDM makes frames by fours
        source = sample_clips(pipeline, samples_dir, num_clips, 0, steps, num_frames=num_frames)
    return shape.open(source, cache_gb=cache_gb)


def is_pipeline(source: str | Path) -> bool:
    """Whether a folder or a name on the Hub is that of a pipeline."""
    if Path(source).is_dir():
        return (Path(source) / "model_index.json").is_file()
    try:
        kind_of(source)
    except (ValueError, OSError):
        return False
    return True
