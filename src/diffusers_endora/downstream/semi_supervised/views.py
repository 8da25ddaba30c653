"""Weak and strong views of a clip for FixMatch: whatever is done, is done alike to all frames of the clip.

Weak is flip and shift, strong adds RandAugment in FixMatch's form and Cutout: Sohn et al. 2020,
https://arxiv.org/abs/2001.07685, section 2.3 and the appendix's list for RandAugment. The operations are Pillow's, for
which RandAugment (https://arxiv.org/abs/1909.13719) and its predecessor AutoAugment were defined.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = 127  # what Cutout, shears, shifts and rotations leave
MAX_SHIFT = 0.125  # of a weak view, share of the side
MAX_CUTOUT = 0.5  # side of the patch, share of the frame's width
NUM_OPERATIONS = 2  # drawn for each strong view

Colours = Callable[[Image.Image, float], Image.Image]


def weak_view(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors a clip with probability 1/2 and shifts it by up to an eighth, with the mirror image beyond its edge.

    Args:
        clip: uint8 `(F, H, W, 3)`.

    Returns:
        uint8 `(F, H, W, 3)`.
    """
    height, width = clip.shape[1:3]
    is_mirrored = rng.random() < 0.5
    max_down, max_right = int(MAX_SHIFT * height), int(MAX_SHIFT * width)
    top, left = rng.integers(0, 2 * max_down + 1), rng.integers(0, 2 * max_right + 1)
    if is_mirrored:
        clip = clip[:, :, ::-1]
    padded = np.pad(clip, ((0, 0), (max_down, max_down), (max_right, max_right), (0, 0)), mode="reflect")
    return np.ascontiguousarray(padded[:, top : top + height, left : left + width])


def strong_view(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A weak view, changed by two operations of random strength, with a grey square somewhere.

    Args:
        clip: uint8 `(F, H, W, 3)`.

    Returns:
        uint8 `(F, H, W, 3)`.
    """
    view = weak_view(clip, rng)
    names = list(OPERATIONS)
    for i in rng.integers(0, len(names), NUM_OPERATIONS):
        view = apply_operation(view, names[i], float(rng.random()))
    return cut_out(view, rng)


def apply_operation(clip: np.ndarray, name: str, strength: float) -> np.ndarray:
    """One operation of `OPERATIONS` on all frames of a clip alike.

    Operations that go by the histogram or the mean take those of the whole clip, so that no frame is treated apart.

    Args:
        clip: uint8 `(F, H, W, 3)`.
        name: of `OPERATIONS`.
        strength: in [0, 1], from the lower end of the operation's range to the upper one.
    """
    low, high, colours, matrix = OPERATIONS[name]
    value = low + strength * (high - low)
    num_frames, height, width = clip.shape[:3]
    if colours is not None:
        stacked = Image.fromarray(clip.reshape(num_frames * height, width, 3))
        return np.asarray(colours(stacked, value)).reshape(clip.shape)
    frames = [Image.fromarray(frame) for frame in clip]
    if matrix is None:  # a filter over neighbours, which must not reach from one frame into the next
        return np.stack([np.asarray(ImageEnhance.Sharpness(frame).enhance(value)) for frame in frames])
    coefficients = matrix(value, width, height)
    fill = (GREY, GREY, GREY)
    return np.stack(
        [
            np.asarray(frame.transform(frame.size, Image.Transform.AFFINE, coefficients, fillcolor=fill))
            for frame in frames
        ]
    )


def cut_out(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clip with a grey square at one place, of a side from 0 to half of the width; parts may lie outside."""
    height, width = clip.shape[1:3]
    side = round(rng.random() * MAX_CUTOUT * width)
    top, left = int(rng.integers(height)) - side // 2, int(rng.integers(width)) - side // 2
    covered = clip.copy()
    covered[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = GREY
    return covered


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    x, y = width / 2, height / 2
    return (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)


# name -> lowest and highest value (the appendix's list), what is done to colours, or the coefficients (a, ..., f) of
# Pillow's affine map, by which pixel (x, y) of the view is (a x + b y + c, d x + e y + f) of the frame
OPERATIONS: dict[str, tuple[float, float, Colours | None, Callable[..., tuple[float, ...]] | None]] = {
    "identity": (0, 0, lambda image, _: image, None),
    "autocontrast": (0, 0, lambda image, _: ImageOps.autocontrast(image), None),
    "equalize": (0, 0, lambda image, _: ImageOps.equalize(image), None),
    "brightness": (0.05, 0.95, lambda image, value: ImageEnhance.Brightness(image).enhance(value), None),
    "color": (0.05, 0.95, lambda image, value: ImageEnhance.Color(image).enhance(value), None),
    "contrast": (0.05, 0.95, lambda image, value: ImageEnhance.Contrast(image).enhance(value), None),
    "posterize": (4, 8, lambda image, value: ImageOps.posterize(image, round(value)), None),
    "solarize": (0, 256, lambda image, value: ImageOps.solarize(image, round(value)), None),
    "sharpness": (0.05, 0.95, None, None),
    "rotate": (-30, 30, None, _rotation),
    "shear_x": (-0.3, 0.3, None, lambda value, width, height: (1, value, 0, 0, 1, 0)),
    "shear_y": (-0.3, 0.3, None, lambda value, width, height: (1, 0, 0, value, 1, 0)),
    "translate_x": (-0.3, 0.3, None, lambda value, width, height: (1, 0, value * width, 0, 1, 0)),
    "translate_y": (-0.3, 0.3, None, lambda value, width, height: (1, 0, 0, 0, 1, value * height)),
}
