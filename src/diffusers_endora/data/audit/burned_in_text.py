"""Burned-in text, found without reading it: strokes that stay where they are while the scene moves.

Edges of the scene point now here, now there, so that their mean over time vanishes; edges of an overlay do not. Of the
edges that persist, those of text come in opposite pairs, left and right as well as above and below, within the width
of a stroke, which neither the rim of the view nor a straight line has; and a line of text crosses several strokes.
(Strokes as pairs of opposite edges: Epshtein et al., "Detecting text in natural scenes with stroke width transform",
CVPR 2010. Edges that agree over frames: the usual cue in detectors of captions.)
"""

import numpy as np
from PIL import Image
from scipy import ndimage

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two are outside

LEAST_FRAMES = 12  # that differ: with fewer, structures of a scene pass for overlays
_LARGEST_SIDE = 1080  # pixels of the shorter side: larger frames are halved, thirded, ...
_EDGE = 6.0  # grey levels per pixel of the mean gradient
_PERSISTENT = 0.5  # share of an edge's energy that its mean holds: 1 for an overlay on black, 0 for a moving scene
_STROKE = 13  # pixels in which both sides of a stroke lie
_OPPOSITE = 1.0  # grey levels per pixel: mean of the weaker side over that window
_LETTER_GAP = 9  # pixels between letters of a line, at most
_FEWEST_STROKES = 3.5  # crossed by a line of text: about two letters
_STROKES_PER_HEIGHT = 0.5  # strokes in as much width as the line is high; writing has 1 to 2.5
_TALLEST_LINE = 12  # pixels; of higher regions, which may be several lines, so much is taken for the height
_SMALLEST = (10, 4)  # pixels, width and height


class TextDetector:
    """Takes in frames of one video, one at a time, and then tells where text is. Memory does not grow with frames."""

    def __init__(self) -> None:
        self.num_frames = 0
        self._factor = 1
        self._gradient = np.zeros(0, np.int32)  # (2, H, W, 3): sums of differences from left to right, from top down
        self._energy = np.zeros(0, np.float32)  # (H, W, 3): sum of their squares

    def add(self, frame: np.ndarray) -> None:
        """Takes in a frame, uint8 RGB `(H, W, 3)`; all of one size."""
        self._factor = -(-min(frame.shape[:2]) // _LARGEST_SIDE)
        picture = np.asarray(Image.fromarray(frame).reduce(self._factor) if self._factor > 1 else frame, np.int16)
        if self.num_frames == 0:
            self._gradient = np.zeros((2, *picture.shape), np.int32)
            self._energy = np.zeros(picture.shape, np.float32)
        for along, inner, after, before in (
            (self._gradient[0], np.s_[:, 1:-1], np.s_[:, 2:], np.s_[:, :-2]),
            (self._gradient[1], np.s_[1:-1], np.s_[2:], np.s_[:-2]),
        ):
            difference = picture[after] - picture[before]
            along[inner] += difference
            self._energy[inner] += np.square(difference, dtype=np.float32)
        self.num_frames += 1

    def regions(self) -> list[Box]:
        """Where text is, from the top down; a box holds a line or several. Empty with fewer than 12 frames."""
        if self.num_frames < LEAST_FRAMES:
            return []
        x, y, persists = self._persistent_edges()

        # 1. strokes: opposite edges side by side, in both directions
        def weaker_side(gradient: np.ndarray) -> np.ndarray:
            sides = (np.where(persists, np.maximum(sign * gradient, 0), 0) for sign in (1, -1))
            return np.minimum(*(ndimage.uniform_filter(side, _STROKE, mode="constant") for side in sides))

        strokes = np.minimum(weaker_side(x), weaker_side(y)) > _OPPOSITE
        strokes &= ndimage.binary_dilation(persists, np.ones((3, 3)))

        # 2. lines: strokes with the gaps between letters closed
        padded = ndimage.binary_closing(np.pad(strokes, _LETTER_GAP), np.ones((1, _LETTER_GAP)))
        labels, _ = ndimage.label(padded[_LETTER_GAP:-_LETTER_GAP, _LETTER_GAP:-_LETTER_GAP], np.ones((3, 3)))
        lines = []
        for number, at in enumerate(ndimage.find_objects(labels), start=1):
            height, width = labels[at].shape
            if width < _SMALLEST[0] or height < _SMALLEST[1]:
                continue
            edges = np.where((labels[at] == number) & persists[at], x[at], 0)
            crossed = strokes_crossed(np.where(np.abs(edges) > _EDGE / 2, np.sign(edges), 0))
            if crossed < _FEWEST_STROKES or crossed / width * min(height, _TALLEST_LINE) < _STROKES_PER_HEIGHT:
                continue
            lines.append((at[1].start, at[0].start, at[1].stop, at[0].stop))
        factor = self._factor
        return [(a * factor, b * factor, c * factor, d * factor) for a, b, c, d in joined(lines)]

    def _persistent_edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mean gradient `(H, W)` to the right and down, in the colour that shows it best, and where it holds."""
        n = self.num_frames
        x, y = self._gradient.astype(np.float32) / (2 * n)
        energy = self._energy / (4 * n)
        # the energy of the mean, less what n frames of changing direction leave in it
        of_mean = np.maximum(x * x + y * y - energy / n, 0) / (1 - 1 / n)
        share = of_mean / (energy + 1e-6)
        colour = np.where(share > _PERSISTENT, of_mean, 0).argmax(axis=-1)[..., None]
        x, y, share = (np.take_along_axis(array, colour, axis=-1)[..., 0] for array in (x, y, share))
        return x, y, (np.hypot(x, y) > _EDGE) & (share > _PERSISTENT)


def strokes_crossed(signs: np.ndarray) -> float:
    """How many strokes a line through a region crosses: half the changes of sign in a row, 70th percentile of rows.

    Args:
        signs: `(H, W)` of the gradient to the right: 1, -1, or 0 where there is no edge.
    """
    changes = []
    for row in signs:
        edges = row[row != 0]
        changes.append(np.count_nonzero(edges[1:] != edges[:-1]))
    return float(np.percentile(changes, 70)) / 2


def joined(boxes: list[Box]) -> list[Box]:
    """Boxes with those joined that touch or lie within a line's height of each other, from the top down."""
    remaining, regions = sorted(boxes, key=lambda box: (box[1], box[0])), []
    while remaining:
        region = remaining.pop(0)
        while True:
            reach = max(8, min(32, region[3] - region[1]))
            near = [
                box
                for box in remaining
                if box[0] < region[2] + reach
                and region[0] - reach < box[2]
                and box[1] < region[3] + reach
                and region[1] - reach < box[3]
            ]
            if not near:
                break
            remaining = [box for box in remaining if box not in near]
            left, top, right, bottom = zip(region, *near, strict=True)
            region = (min(left), min(top), max(right), max(bottom))
        regions.append(region)
    return regions
