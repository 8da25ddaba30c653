"""One picture that shows a batch of clips: a row per clip, time from left to right."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import written_atomically
from .video_io import check_clip


def save_contact_sheet(
    path: str | os.PathLike[str],
    clips: np.ndarray,
    max_frames: int = 16,
    min_tile: int = 64,
    gap: int = 2,
    background: int = 255,
) -> Path:
    """Save clips as one PNG: a row per clip, frames from left to right.

    Clips of more than `max_frames` frames are shown by `max_frames` of them, evenly spaced from the first to the last.
    Small frames are enlarged by a whole factor without smoothing, so that a pixel stays a square of one colour.

    Args:
        path: a name that ends in `.png`; its folder must exist. The file appears when it is complete.
        clips: uint8 RGB `(B, F, H, W, 3)`.
        max_frames: most frames in a row.
        min_tile: enlarge frames until their shorter side has at least this many pixels.
        gap: pixels between frames.
        background: grey level of the gaps, 0 to 255.

    Returns:
        `path`.

    Raises:
        ValueError: an argument is not as described.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a contact sheet is a PNG image; expected a name that ends in .png")
    check_clip(clips, "clips", ndim=5)
    if max_frames < 1:
        raise ValueError(f"max_frames={max_frames}: expected a positive integer")

    num_frames = clips.shape[1]
    shown = np.linspace(0, num_frames - 1, min(num_frames, max_frames)).round().astype(int)
    tiles = clips[:, shown]
    scale = max(1, -(-min_tile // min(tiles.shape[2:4])))  # rounded up
    tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)

    rows, columns, height, width = tiles.shape[:4]
    sheet_shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(sheet_shape, background, dtype=np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = tiles[row, column]
    with written_atomically(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    return path
