"""The phantom corpus: rendered colons with depth, camera and labels, made on demand and free of any licence."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from datasets import Array2D, Array3D, ClassLabel, List, Value

from ..phantom import CLASSES
from ..transcode import encode_frames
from ..video_io import read_video_info
from .corpus import (
    CorpusBuilder,
    CorpusConfig,
    CorpusError,
    CorpusFolder,
    Row,
    SourceVideo,
    check_positive_integers,
    row_of_file,
    windows,
)
from .rendering import render_beside_others

_TRUTH = ("depth", "camera_to_world", "intrinsics", "polyp_visible", "instrument_visible")
_FPS = 8


@dataclass
class PhantomConfig(CorpusConfig):
    """What is rendered: video `i` from seed `seed + i`."""

    num_videos: int = 90
    num_frames: int = 64
    height: int = 128
    width: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integers(
            num_videos=self.num_videos, num_frames=self.num_frames, height=self.height, width=self.width
        )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: expected a non-negative integer")
        if self.short_side is not None and self.short_side < min(self.height, self.width):
            raise ValueError(
                f"short_side={self.short_side}: the phantom is rendered at any size; choose it by height and width "
                f"({self.height}x{self.width})"
            )


class Phantom(CorpusBuilder):
    """Rows of rendered colons.

    A seed is one colon, of one class (the seed's remainder by three) and in one split (its last digit: 8 is
    `validation`, 9 is `test`), whatever the other options are; so what was trained on is not met in a later `test`.
    `depth` is float32 `(F, H, W)` in mm, `camera_to_world` `(F, 4, 4)`, `intrinsics` `(3, 3)`; see `PhantomClip`.
    """

    CORPUS = "phantom"
    MAY_BE_PUBLISHED = True
    TERMS = "Apache-2.0; rendered, no patient is shown"
    BUILDER_CONFIG_CLASS = PhantomConfig
    BUILDER_CONFIGS = [PhantomConfig(name="videos"), PhantomConfig(name="clips", kind="clips", clip_length=16)]

    @classmethod
    def label_features(cls, config: Any) -> dict[str, Any]:
        return {
            "label": ClassLabel(names=list(CLASSES)),
            "depth": Array3D((None, config.height, config.width), "float32"),
            "camera_to_world": Array3D((None, 4, 4), "float32"),
            "intrinsics": Array2D((3, 3), "float32"),
            "polyp_visible": List(Value("bool")),
            "instrument_visible": List(Value("bool")),
        }

    @classmethod
    def read_folder(cls, data_dir: Path | None, config: Any) -> CorpusFolder:
        if data_dir is not None:
            raise CorpusError(f"{data_dir}: the phantom is rendered and takes no folder.")
        videos = []
        for i in range(config.num_videos):
            seed = config.seed + i
            label = CLASSES[seed % len(CLASSES)]
            video_id = f"{label}_{seed:06d}"
            videos.append(
                SourceVideo(video_id, Path(f"{video_id}.mp4"), split_of_seed(seed), f"seed {seed}", {"label": label})
            )
        return CorpusFolder("rendered colons", videos)

    @classmethod
    def write_rows(cls, video: SourceVideo, folder: Path, config: Any) -> list[Row]:
        label = video.labels["label"]
        seed = int(video.video_id.rpartition("_")[2])
        clip = render_beside_others(
            seed=seed,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            polyp=label == "polyp",
            instrument=label == "instrument",
            fps=_FPS,
        )
        parts = windows(config.num_frames, config.clip_length) if config.kind == "clips" else [(0, config.num_frames)]
        rows = []
        for i, (start, stop) in enumerate(parts):
            path = folder / f"{i}.mp4"
            encode_frames(path, timed_frames(clip.frames[start:stop]), None, config.quality)
            truth = {name: getattr(clip, name)[start:stop] for name in _TRUTH}
            truth["intrinsics"] = truth["intrinsics"][0]  # the camera does not zoom
            np.savez_compressed(folder / f"{i}.npz", **truth)
            info = read_video_info(path)
            rows.append(row_of_file(path.name, start, info, info) | {"source_frames": config.num_frames})
        return rows

    @classmethod
    def labels_of_row(cls, labels: dict[str, Any], row: Row, folder: Path) -> dict[str, Any]:
        with np.load((folder / row["file"]).with_suffix(".npz")) as truth:
            return labels | {name: truth[name] for name in _TRUTH}


def split_of_seed(seed: int) -> str:
    """`train`, `validation` or `test`: the split that the colon of a seed belongs to, in every corpus of phantoms."""
    return {8: "validation", 9: "test"}.get(seed % 10, "train")


def timed_frames(frames: np.ndarray) -> Iterator[VideoFrame]:
    """PyAV frames from uint8 RGB `(F, H, W, 3)`, with times."""
    for i, picture in enumerate(frames):
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.duration, frame.time_base = i, 1, Fraction(1, _FPS)
        yield frame
