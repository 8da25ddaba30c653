"""What happens to a clip's pixels before a network sees them: size, codecs, and the corruptions of the ladder."""

import hashlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from ..data.clips import resize_and_crop_clip, resize_and_crop_image
from ..data.video_io import read_frames, write_video

CORRUPTIONS = ("frames shuffled in time", "first frame repeated", "blurred", "noise")


@dataclass(frozen=True)
class Preparation:
    """A chain of steps, each optional, in this order: mp4, resize and crop, JPEG, mirroring, corruption.

    Attributes:
        resolution: height and width in pixels: short side resized, centre cropped. None leaves the size.
        resize: `"antialiased"`: bilinear with antialiasing; `"lanczos"`: Pillow's Lanczos filter, as the official
            preprocessing. A clip that has the size already is not touched.
        mp4_crf: write the clip as H.264 of this quality and read it again.
        jpeg_quality: store every frame as JPEG and read it again.
        mirror: swap left and right.
        corruption: one of `CORRUPTIONS`, or None.
    """

    resolution: tuple[int, int] | None
    resize: Literal["antialiased", "lanczos"] = "antialiased"
    mp4_crf: int | None = None
    jpeg_quality: int | None = None
    mirror: bool = False
    corruption: str | None = None

    def __call__(self, frames: np.ndarray, key: str) -> np.ndarray:
        """uint8 `(F, H, W, 3)` to the same; `key` seeds what is random, so that a clip always ends the same."""
        if self.mp4_crf is not None:
            frames = through_mp4(frames, self.mp4_crf)
        if self.resolution is not None and frames.shape[1:3] != self.resolution:
            frames = self._resized(frames, *self.resolution)
        if self.jpeg_quality is not None:
            frames = np.stack([through_jpeg(frame, self.jpeg_quality) for frame in frames])
        if self.mirror:
            frames = np.ascontiguousarray(frames[:, :, ::-1])
        if self.corruption is not None:
            frames = corrupt(frames, self.corruption, key)
        return frames

    def _resized(self, frames: np.ndarray, height: int, width: int) -> np.ndarray:
        if self.resize == "lanczos":
            pixels = np.stack([resize_and_crop_image(frame, height, width).numpy() for frame in frames])
        else:
            pixels = resize_and_crop_clip(frames, height, width, antialias=True).numpy()
        return ((pixels.transpose(0, 2, 3, 1) + 1) * 127.5).round().astype(np.uint8)


def through_mp4(frames: np.ndarray, crf: int) -> np.ndarray:
    """Frames as they come back from an H.264 file (8 frames per second, 4:2:0)."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "clip.mp4", frames, fps=8, crf=crf)
        return read_frames(path.read_bytes(), range(len(frames)))


def through_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    """A frame as it comes back from a JPEG file (Pillow's defaults, 4:2:0)."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=quality)
    return np.array(Image.open(file))


def corrupt(frames: np.ndarray, corruption: str, key: str) -> np.ndarray:
    """A rung of the reference ladder.

    `"frames shuffled in time"`: a random order that is not the given one; `"first frame repeated"`: a still clip;
    `"blurred"`: a Gaussian of 1/128 of the height (1 pixel at 128), per frame; `"noise"`: uniform random pixels.

    Raises:
        ValueError: there is no such corruption.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{corruption} {key}".encode()).digest()[:8], "big"))
    if corruption == "frames shuffled in time":
        order = np.arange(len(frames))
        while len(frames) > 1 and (order == np.arange(len(frames))).all():
            order = rng.permutation(len(frames))
        return frames[order]
    if corruption == "first frame repeated":
        return np.repeat(frames[:1], len(frames), axis=0)
    if corruption == "blurred":
        sigma = frames.shape[1] / 128
        return gaussian_filter(frames.astype(np.float32), sigma=(0, sigma, sigma, 0)).round().astype(np.uint8)
    if corruption == "noise":
        return rng.integers(0, 256, frames.shape, dtype=np.uint8)
    raise ValueError(f"corruption={corruption!r}: expected one of {', '.join(map(repr, CORRUPTIONS))}")
