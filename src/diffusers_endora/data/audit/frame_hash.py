"""A perceptual hash of a frame that sees the tissue and not the black border around it.

The DCT hash of Zauner ("Implementation and benchmarking of perceptual image hash functions", Upper Austria University
of Applied Sciences, 2010) with four changes for endoscopy, where all pictures share a mask, a vignette and a colour:
the square in the middle of the lit area is hashed and not the frame; in logarithms of luminance, in which brightness
is an offset; divided by local contrast, so that folds count and the fall of light does not; and under a round window
that fades out what lies at the mask's edge or in its corners, such as text.

256 coefficients are kept, slowest first, as their signs. The first 64 bits alone are a hash that is quick to compare;
`near_duplicates` finds with these and confirms with all.
"""

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

NUM_WORDS = 4  # of 64 bits
_SIDE = 64  # pixels of the picture whose coefficients are taken
_FREQUENCIES = 20  # half periods across the picture, in both directions
_LOCAL = 10.0  # pixels of `_SIDE`: what is called local contrast
_DARKEST = 16  # grey levels: below lies the border. Black of limited range, not expanded, is 16.
_EDGE = 0.35  # of the fullest row or column: those with fewer lit pixels are border
_SMALLEST_VIEW = 16  # pixels of the lit square
_WORKING_SIDE = 192  # pixels: about the shorter side at which the lit area is looked for
# Frames without structure finer than that of light falling on an even wall have no hash: their signs would be those of
# noise. By this measure 37 endoscopic stills have 3.1 and more, even walls up to 1.9.
_LEAST_CONTRAST = 2.3
_FINE = 5  # half periods across the picture


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the 256 lowest frequencies without the mean, by distance from it."""
    v, u = np.mgrid[:_FREQUENCIES, :_FREQUENCIES]
    order = np.argsort((u * u + v * v).ravel(), kind="stable")[1 : 1 + 64 * NUM_WORDS]
    return v.ravel()[order], u.ravel()[order]


_V, _U = _frequencies()
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(_FREQUENCIES), np.arange(_SIDE) + 0.5)).astype(np.float32)
_COSINES *= np.float32(np.sqrt(2 / _SIDE))  # of norm one, but for the mean
_IS_FINE = np.hypot(*np.mgrid[:_FREQUENCIES, :_FREQUENCIES]) >= _FINE
_Y, _X = (np.mgrid[:_SIDE, :_SIDE] + 0.5) / _SIDE * 2 - 1
_RADIUS = np.hypot(_X, _Y)
_VIEW = (_RADIUS < 1).astype(np.float32)
_WINDOW = (np.sin(np.pi / 2 * np.clip((1 - _RADIUS) / 0.25, 0, 1)) ** 2).astype(np.float32)
_BLUR = gaussian_filter(np.eye(_SIDE), (_LOCAL, 0)).astype(np.float32)  # as a matrix it is four times as fast
_VIEW_NEARBY = _BLUR @ _VIEW @ _BLUR.T + np.float32(1e-6)

# What the hash of the mirror image differs in: the coefficients that are odd from left to right.
MIRROR = np.packbits(_U % 2 == 1).view(np.uint64)


def to_grey(frame: np.ndarray) -> np.ndarray:
    """The frame, uint8 RGB `(H, W, 3)`, as uint8 luminance with a shorter side of 192 to 383 pixels, or its own."""
    picture = Image.fromarray(frame)
    factor = min(picture.size) // _WORKING_SIDE
    if factor > 1:
        picture = picture.reduce(factor)
    return np.asarray(picture.convert("L"))


def hash_frame(grey: np.ndarray) -> np.ndarray | None:
    """The hash of a picture of `to_grey`.

    Returns:
        uint64 `(4,)`, or None for a picture with too little structure to be told from another.
    """
    square = lit_square(grey)
    if square is None:
        return None
    picture = Image.fromarray(grey).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=square)
    levels = 60 * np.log(np.asarray(picture, dtype=np.float32) + 16)  # at mid-grey, half a level for each grey level
    levels -= _BLUR @ (levels * _VIEW) @ _BLUR.T / _VIEW_NEARBY
    fine = (_COSINES @ (levels * _WINDOW) @ _COSINES.T)[_IS_FINE]
    if np.sqrt((fine**2).sum() / _WINDOW.sum()) < _LEAST_CONTRAST:
        return None
    variance = _BLUR @ (levels * levels * _VIEW) @ _BLUR.T / _VIEW_NEARBY
    coefficients = _COSINES @ (levels / np.sqrt(variance + 3) * _WINDOW) @ _COSINES.T
    return np.packbits(coefficients[_V, _U] > 0).view(np.uint64)


def lit_square(grey: np.ndarray) -> tuple[float, float, float, float] | None:
    """The square in the middle of what is not border: left, top, right, bottom in pixels; None in a black frame.

    Text in a border, which fills little of a row or column, does not widen it. Cutting the picture to this square, as
    the preparation of training data does, does not change it.
    """
    lit = grey > max(_DARKEST, 0.1 * float(np.percentile(grey, 95)))
    if not lit.any():
        return None
    (left, right), (top, bottom) = _span(lit.mean(axis=0)), _span(lit.mean(axis=1))
    side = min(right - left, bottom - top)
    if side < _SMALLEST_VIEW:
        return None
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    return x, y, x + side, y + side


def _span(filled: np.ndarray) -> tuple[int, int]:
    inside = np.flatnonzero(filled >= _EDGE * filled.max())
    return int(inside[0]), int(inside[-1]) + 1
