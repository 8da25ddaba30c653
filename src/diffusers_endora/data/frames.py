"""All frames of a folder of videos in memory: what networks that know no time are trained on."""

import logging
import os
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .clips import find_videos, resize_and_crop_clip
from .video_io import VideoError, read_frames, read_video_info

logger = logging.getLogger(__name__)


def load_frames(root: str | os.PathLike[str], resolution: int) -> tuple[torch.Tensor, list[str]]:
    """Reads every frame of every video below `root`, scaled and cropped to a square as clips are.

    100,000 frames of 128x128 take 4.9 GB, twice that for a moment. Videos that cannot be read are left out, and logged
    with the reason.

    Args:
        root: folder of videos; see `find_videos`.
        resolution: side of the frames, in pixels.

    Returns:
        uint8 RGB `(N, 3, resolution, resolution)`, and for each frame the sub-folder of `root` that its video lies in
        ("" for none): its class, where videos are sorted by class.

    Raises:
        ValueError: no folder, or no video in it that can be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of videos; there is none")
    videos, _ = find_videos(root)
    frames, classes, reason = [], [], "there is none"
    for video in tqdm(videos, desc="reading frames", unit="video"):
        try:
            pictures = read_frames(video, range(read_video_info(video).num_frames))
        except (VideoError, OSError) as error:
            reason = f"{len(videos)} found, none can be read, such as {error}"
            logger.warning("broken file, left out: %s", error)
            continue
        if pictures.shape[1:3] == (resolution, resolution):
            pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        else:
            clip = resize_and_crop_clip(pictures, resolution, resolution)
            pixels = ((clip + 1) * 127.5).round().to(torch.uint8)
        frames.append(pixels.contiguous())
        parts = video.relative_to(root).parts
        classes += [parts[0] if len(parts) > 1 else ""] * len(pixels)
    if not frames:
        raise ValueError(f"{root}: expected at least one video that can be read; {reason}")
    return torch.cat(frames), classes


def as_pixels(frames: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 frames as float32 in [-1, 1], as networks take them."""
    return torch.as_tensor(frames).float() / 127.5 - 1
