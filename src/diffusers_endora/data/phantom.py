"""A procedurally rendered colon: video with exact depth, camera and labels, and no licence to ask for.

The wall is a height field `R(s, theta)` around a smooth random centreline. A pixel's ray is swept through the planes
orthogonal to the centreline until it leaves the lumen, then the crossing is refined by regula falsi, so that depth is
a property of one fixed surface and agrees between frames. Polyps (ellipsoids) and the instrument (capsules) are
intersected in closed form. Lengths are mm, angles radians, time seconds, colour linear until the tone curve.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

CLASSES = ("lumen", "polyp", "instrument")

_STEP = 0.5  # mm between two rows of the wall table
_COLUMNS = 256  # of the wall table, once around
_SIGHT = 250.0  # mm of colon ahead of a camera; its bends end every line of sight before that
_FIELD_OF_VIEW = np.deg2rad(116)  # across the image diagonal
_MAX_TILT = np.tan(np.deg2rad(24))  # optical axis against centreline: keeps every ray ahead of the camera's plane
_NARROWEST, _MAX_OFFSET = 9.0, 4.5  # mm: radius of the tightest fold, distance of the camera from the centreline
_TILE = (1024, 512)  # texture cells along and around: two for each cell of the wall table
_CELL = _STEP / 2  # mm; the texture repeats every 256 mm
_REFINEMENTS = 7  # of a wall crossing: 999 in 1000 are then converged to float32
_VISIBLE = 0.003  # fraction of the frame's pixels an object must cover to count as visible

_SHAPE, _FOLDS, _TEXTURE, _COLOUR, _PATH, _POLYP, _INSTRUMENT, _LABEL, _SENSOR = range(9)  # random streams of a seed


@dataclass(frozen=True)
class PhantomClip:
    """A rendered clip with its ground truth.

    Attributes:
        frames: uint8 `(F, H, W, 3)`, sRGB.
        depth: float32 `(F, H, W)`, mm, > 0: z-depth of what the pixel's centre sees, that is its distance along the
            optical axis, not along the ray.
        camera_to_world: float32 `(F, 4, 4)`, mm: maps homogeneous camera points to the world. Camera axes are those of
            OpenCV: x right, y down, z forward. The world is the frame of the centreline's first point.
        intrinsics: float32 `(F, 3, 3)`, pixels, pinhole without distortion; pixel centres have integer coordinates, so
            pixel `(u, v)` at depth `z` is the camera point `z * inv(K) @ (u, v, 1)`.
        has_polyp, has_instrument: what was placed in the scene.
        polyp_visible, instrument_visible: bool `(F,)`: it covers at least 0.3 % of the frame's pixels.
        fps: frames per second.

    All is rigid but the instrument, which moves with the scope and by itself: depth on it is right in its own frame.
    """

    frames: np.ndarray
    depth: np.ndarray
    camera_to_world: np.ndarray
    intrinsics: np.ndarray
    has_polyp: bool
    has_instrument: bool
    polyp_visible: np.ndarray
    instrument_visible: np.ndarray
    fps: float


def render_phantom_clip(
    seed: int,
    num_frames: int = 16,
    height: int = 128,
    width: int = 128,
    *,
    polyp: bool | None = None,
    instrument: bool | None = None,
    fps: float = 8.0,
) -> PhantomClip:
    """Renders a flight through the colon that `seed` describes.

    The same arguments give the same bytes. Size only samples the same scene more finely, and a longer clip starts with
    the frames of the shorter one. The scope advances 10 to 18 mm a second whatever `fps` is.

    Args:
        seed: non-negative; shape, texture, colour, flight and objects.
        num_frames, height, width: positive; any size, square or not.
        polyp, instrument: place one or not; None lets the seed decide (one in two, one in three).
        fps: frames per second, positive.

    Raises:
        ValueError: an argument outside these ranges.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed}: expected a non-negative integer")
    _check_positive_integers(num_frames=num_frames, height=height, width=width)
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps={fps}: expected a positive number")
    drawn = _stream(seed, _LABEL).random(2)
    has_polyp = bool(drawn[0] < 1 / 2) if polyp is None else bool(polyp)
    has_instrument = bool(drawn[1] < 1 / 3) if instrument is None else bool(instrument)

    # 1. the scene and the flight through it
    flight = _Flight.draw(seed)
    times = np.arange(num_frames) / fps
    colon = _Colon.grow(seed, flight.position(times[-1]) + _SIGHT, flight.position(0.0), has_polyp)
    tool = _Instrument.draw(seed) if has_instrument else None
    poses = flight.poses(times, colon)

    # 2. one ray `(x, y, 1)` a pixel: its multiples are points, and the multiple is the depth
    focal = 0.5 * np.hypot(height, width) / np.tan(_FIELD_OF_VIEW / 2)
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    rows, columns = np.mgrid[:height, :width].reshape(2, -1)
    x = ((columns - intrinsics[0, 2]) / focal).astype(np.float32)
    y = ((rows - intrinsics[1, 2]) / focal).astype(np.float32)

    # 3. trace, shade, expose
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    depth = np.empty((num_frames, height, width), np.float32)
    polyp_visible, instrument_visible = np.zeros((2, num_frames), bool)
    for i, (time, pose) in enumerate(zip(times, poses, strict=True)):
        radiance, z, is_polyp, is_tool = _render_frame(colon, tool, pose, flight.position(time), time, x, y)
        radiance *= (1 - 0.75 * ((x * x + y * y) / np.tan(_FIELD_OF_VIEW / 2) ** 2) ** 2)[:, None]  # vignette
        frames[i] = _develop(radiance.reshape(height, width, 3), _stream(seed, _SENSOR, i))
        depth[i] = z.reshape(height, width)
        polyp_visible[i], instrument_visible[i] = is_polyp.mean() >= _VISIBLE, is_tool.mean() >= _VISIBLE
    cameras = np.tile(intrinsics.astype(np.float32), (num_frames, 1, 1))
    labels = (has_polyp, has_instrument, polyp_visible, instrument_visible)
    return PhantomClip(frames, depth, poses.astype(np.float32), cameras, *labels, float(fps))


def write_phantom_corpus(
    output_dir: str | Path,
    num_videos: int,
    num_frames: int = 64,
    height: int = 128,
    width: int = 128,
    seed: int = 0,
) -> list[Path]:
    """Writes `num_videos` clips as `output_dir/<class>/<class>_<seed>.mp4`, the folder being the label.

    The classes `lumen`, `polyp`, `instrument` take turns; video `i` is rendered from seed `seed + i` at 8 frames per
    second. Returns the paths in that order.

    Raises:
        ValueError: a count or size that is not a positive integer, or a negative seed.
    """
    from diffusers_endora.data.video_io import write_video

    _check_positive_integers(num_videos=num_videos, num_frames=num_frames, height=height, width=width)
    paths = []
    for i in tqdm(range(num_videos), desc="phantom videos"):
        label = CLASSES[i % len(CLASSES)]
        clip = render_phantom_clip(
            seed + i, num_frames, height, width, polyp=label == "polyp", instrument=label == "instrument"
        )
        path = Path(output_dir) / label / f"{label}_{seed + i:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, clip.frames, clip.fps)
        paths.append(path)
    return paths


# --- the scene -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Colon:
    """The wall, its texture and its polyps. Row `i` of the wall tables lies at arc length `i * _STEP`."""

    centre: np.ndarray  # (S, 3)
    axes: np.ndarray  # (S, 3, 3): the tangent T and the two normals N, B
    curvature: np.ndarray  # (S, 2): along N and B, 1/mm
    radius: np.ndarray  # (S, _COLUMNS + 2), the first columns repeated at the end
    relief: np.ndarray  # (S, _COLUMNS + 2, 4): dR/ds, dR/dtheta, height of the folds, foot of the polyps
    texture: np.ndarray  # see _mucosa_texture
    polyps: list[tuple[float, np.ndarray, np.ndarray]]  # ellipsoids: arc length, centre (3,), quadric (3, 3)
    mucosa: np.ndarray  # albedos, (3,)
    blood: np.ndarray
    growth: np.ndarray

    @classmethod
    def grow(cls, seed: int, length: float, entrance: float, has_polyp: bool) -> "_Colon":
        """The first `length` mm, with polyps, if any, from a little behind `entrance` on."""
        s = np.arange(int(length / _STEP) + 8) * _STEP
        theta = (np.arange(_COLUMNS) / _COLUMNS * 2 - 1) * np.pi
        centre, axes, curvature = _centreline(seed, s)
        texture, undulation = _mucosa_texture(seed)

        # 1. tube and folds; three taeniae pull the tube to a rounded triangle
        rng = _stream(seed, _SHAPE)
        calibre = rng.uniform(20, 25) + _wander(rng, 3.0, 1 / 150, 1 / 60)(s)[:, None]
        corners = theta - _wander(rng, 1.5, 1 / 300, 1 / 120)(s)[:, None]
        radius = calibre * (1 + rng.uniform(0.03, 0.10) * np.cos(3 * corners))
        radius += 0.5 * undulation[np.arange(len(s)) * 2 % _TILE[0], ::2]
        folds = _haustral_folds(seed, s, theta)

        # 2. polyps on the outside of bends, where the scope looks: a mound in the wall, the folds before it flattened
        sites, foot = [], np.zeros_like(radius)
        rng, at = _stream(seed, _POLYP), entrance
        while has_polyp and at < s[-1] - 60:
            at += rng.uniform(32, 42)
            bend = curvature[int((at - 10) / _STEP)]
            angle, size = np.arctan2(-bend[1], -bend[0]) + rng.normal(0, 0.4), rng.uniform(4, 7)
            along, around = s[:, None] - at, _wrap(theta - angle)
            folds *= 1 - 0.9 * np.exp(-(((along + 8) / 13) ** 2) - (around / 0.7) ** 2)
            away = (along**2 + (calibre * around) ** 2) / (1.35 * size) ** 2
            radius -= 0.5 * size * np.exp(-away)
            foot = np.maximum(foot, np.exp(-(away**1.5)))
            sites.append((at, angle, size))
        radius = _NARROWEST + np.logaddexp(0, radius - folds - _NARROWEST)

        # 3. and on each mound one to three ellipsoids
        polyps = []
        for number, (at, angle, size) in enumerate(sites):
            rng = _stream(seed, _POLYP, 1 + number)
            row, column = int(at / _STEP), int((angle / np.pi + 1) / 2 * _COLUMNS) % _COLUMNS
            outward = np.cos(angle) * axes[row, 1] + np.sin(angle) * axes[row, 2]
            basis = np.stack([outward, axes[row, 0], np.cross(outward, axes[row, 0])])
            wall = radius[row, column]
            size = min(size, (wall - _NARROWEST + 1) / 1.5)
            for lobe in range(rng.integers(1, 4)):
                semi = size * rng.uniform((0.65, 0.8, 0.8), (0.95, 1.15, 1.15)) * (0.75 if lobe else 1.0)
                shift = size * rng.uniform(-0.6, 0.6, 2) * (lobe > 0)
                middle = centre[row] + np.array([wall - 0.3 * semi[0], *shift]) @ basis
                polyps.append((at, middle, basis.T @ np.diag(semi**-2) @ basis))

        # 4. colour
        rng = _stream(seed, _COLOUR)
        orange, pink, brown = (0.80, 0.19, 0.085), (0.80, 0.23, 0.16), (0.62, 0.15, 0.08)
        mucosa = rng.dirichlet((1.0, 1.0, 0.6)) @ np.array([orange, pink, brown])
        blood = np.array([0.36, 0.03, 0.02]) * rng.uniform(0.9, 1.2)
        growth = mucosa * rng.uniform(0.85, 1.15) * np.array([1.05, *[rng.uniform(0.62, 1.25)] * 2])

        slope_theta = (np.roll(radius, -1, 1) - np.roll(radius, 1, 1)) * (_COLUMNS / (4 * np.pi))
        relief = np.stack([np.gradient(radius, _STEP, axis=0), slope_theta, folds, foot], axis=-1)
        single = [a.astype(np.float32) for a in (radius, relief, mucosa, blood, growth)]
        radius, relief = (np.concatenate([a, a[:, :2]], axis=1) for a in single[:2])
        return cls(centre, axes, curvature, radius, relief, texture, polyps, *single[2:])


def _centreline(seed: int, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre (S, 3), parallel-transport frame (S, 3, 3) and curvature (S, 2).

    The frame obeys T' = k1 N + k2 B, N' = -k1 T, B' = -k2 T (Bishop, "There is more than one way to frame a curve",
    1975), integrated by the exact rotation of each step.
    """
    rng = _stream(seed, _SHAPE, 1)
    bend = 1 / 55 + _wander(rng, 1 / 100, 1 / 200, 1 / 60)(s)  # never straight: every line of sight meets the wall
    way = rng.uniform(-np.pi, np.pi) + _wander(rng, 3.0, 1 / 900, 1 / 350)(s)
    curvature = bend[:, None] * np.stack([np.cos(way), np.sin(way)], axis=1)
    axes = np.empty((len(s), 3, 3))
    axes[0] = np.roll(np.eye(3), 1, axis=0)  # the tangent is the world's z axis
    for i, (k1, k2) in enumerate(curvature[:-1]):
        tangent, *normals = axes[i]
        k = np.hypot(k1, k2)
        sin, cos, n1, n2 = np.sin(k * _STEP), np.cos(k * _STEP), k1 / k, k2 / k
        inward = n1 * normals[0] + n2 * normals[1]
        sway = (cos - 1) * inward - sin * tangent
        axes[i + 1] = cos * tangent + sin * inward, normals[0] + n1 * sway, normals[1] + n2 * sway
    centre = np.zeros((len(s), 3))
    centre[1:] = np.cumsum((axes[1:, 0] + axes[:-1, 0]) * (_STEP / 2), axis=0)
    return centre, axes, curvature


def _haustral_folds(seed: int, s: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """How far the semilunar folds stand into the lumen, (S, _COLUMNS): crescents between the three taeniae."""
    rng = _stream(seed, _FOLDS)
    spacing, height = rng.uniform(20, 32), rng.uniform(6.0, 10.0)
    taeniae = rng.uniform(-np.pi, np.pi)
    folds = np.zeros((len(s), len(theta)))
    ring = rng.uniform(0, spacing)
    while ring < s[-1] + 30:
        for third in range(3):
            at, middle = ring + rng.normal(0, 3.5), taeniae + third * 2 * np.pi / 3 + rng.normal(0, 0.25)
            rise, half_width, half_angle = rng.uniform((0.1 * height, 2.2, 0.75), (1.15 * height, 3.4, 1.25))
            lean, wave, phase = rng.normal(0, 1.6), rng.uniform(0, 0.9), rng.uniform(0, 2 * np.pi)
            window = slice(*np.searchsorted(s, (at - 20, at + 20)))
            around = _wrap(theta - middle)
            crest = at + lean * np.sin(around) + wave * np.sin(3 * theta + phase) + 1.5 * np.cos(around)
            along = (s[window, None] - crest) / half_width
            crescent = np.exp(-((around / half_angle) ** 4))
            folds[window] += rise * crescent / (1 + 0.5 * along**2 + along**4) ** 0.75
        ring += spacing * rng.uniform(0.75, 1.3)
        taeniae += rng.normal(0, 0.12)
    return folds


def _mucosa_texture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What repeats along the wall: texture and the height of its long waves.

    The texture is float32 `_TILE + 2` by 5, the first rows and columns repeated: vessels 0 to 1, tint about 0 +- 1,
    slopes of the fine bumps along s and around, wetness 0 to 1.4. The waves are `_TILE`, of unit variance.
    """
    rng = _stream(seed, _TEXTURE)
    k = np.hypot(np.fft.fftfreq(_TILE[0], _CELL)[:, None], np.fft.rfftfreq(_TILE[1], _CELL)).astype(np.float32)
    k[0, 0] = 1e-6

    def field(wavelength: float, octaves: float = 0.6) -> np.ndarray:
        """A periodic Gaussian random field of unit variance with a log-normal band of wavelengths, in mm."""
        band = np.exp(-0.5 * (np.log2(k * wavelength) / octaves) ** 2)
        phases = rng.standard_normal((2, *k.shape), dtype=np.float32)
        noise = np.fft.irfft2((phases[0] + 1j * phases[1]) * band, s=_TILE).astype(np.float32)
        return noise / noise.std()

    undulation = field(28.0)
    vessels = np.clip(_vessel_trees(rng) * (0.75 + 0.25 * field(14.0)), 0, 1)
    net = np.clip(1 - np.abs(field(5.0, 0.4)) / 0.16, 0, 1) * np.clip(0.5 + 0.5 * field(18.0), 0, 1)
    vessels = rng.uniform(0.55, 1.05) * np.maximum(vessels, 0.3 * net)
    tint = 0.6 * field(16.0) + 0.4 * field(3.5) + 0.35 * field(1.0)
    bumps = 0.05 * field(5.0) + 0.035 * field(1.8) + 0.016 * field(0.8)
    slopes = [(np.roll(bumps, -1, axis) - np.roll(bumps, 1, axis)) / (2 * _CELL) for axis in (0, 1)]
    wet = rng.uniform(0.5, 1.2) * np.clip(0.3 + 0.5 * field(9.0, 0.8), 0, 1.2)
    texture = np.stack([vessels, tint, *slopes, wet], axis=-1)
    return np.pad(texture, ((0, 2), (0, 2), (0, 0)), mode="wrap"), undulation


def _vessel_trees(rng: np.random.Generator) -> np.ndarray:
    """Branching vessels drawn on the torus of the texture, `_TILE`, 0 to 1: walkers that turn, thin out and fork."""
    size = np.array(_TILE) * _CELL
    count = 16  # each a pair of walkers that part back to back
    where = rng.uniform(0, 1, (count, 2)) * size
    heading, girth = rng.uniform(-np.pi, np.pi, count), rng.uniform(0.35, 0.6, count)
    where, girth, heading = np.tile(where, (2, 1)), np.tile(girth, 2), np.concatenate([heading, heading + np.pi])
    turning = np.zeros(2 * count)
    drawn = []
    while len(heading):
        drawn.append(np.column_stack([where, girth]))
        turning = 0.85 * turning + rng.normal(0, 0.03, len(heading))
        heading = heading + turning
        where = where + 0.35 * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        girth = girth * 0.995
        fork = rng.random(len(heading)) < 0.028
        swing = rng.choice((-1.0, 1.0), fork.sum()) * rng.uniform(0.4, 1.0, fork.sum())
        where = np.concatenate([where, where[fork]])
        heading = np.concatenate([heading, heading[fork] + swing])
        turning = np.concatenate([turning, -0.5 * turning[fork]])
        girth = np.concatenate([np.where(fork, 0.9, 1.0) * girth, 0.7 * girth[fork]])
        alive = girth > 0.11
        where, heading, turning, girth = where[alive], heading[alive], turning[alive], girth[alive]
    points = np.concatenate(drawn)
    cells = points[:, :2] / _CELL
    near = np.floor(cells).astype(int)
    canvas = np.zeros(_TILE[0] * _TILE[1], np.float32)
    strength = np.clip(points[:, 2] / 0.35, 0.4, 1)
    for i in range(-3, 5):
        for j in range(-3, 5):
            away = ((near[:, 0] + i - cells[:, 0]) ** 2 + (near[:, 1] + j - cells[:, 1]) ** 2) * _CELL**2
            index = (near[:, 0] + i) % _TILE[0] * _TILE[1] + (near[:, 1] + j) % _TILE[1]
            np.maximum.at(canvas, index, (strength * np.exp(-away / points[:, 2] ** 2)).astype(np.float32))
    return canvas.reshape(_TILE)


@dataclass(frozen=True)
class _Flight:
    """Where the scope is at a time, in seconds: arc length, offset from the centreline, tilt and roll."""

    speed: float
    surge: Callable
    offset: Callable
    tilt: Callable
    roll: Callable

    @classmethod
    def draw(cls, seed: int) -> "_Flight":
        rng = _stream(seed, _PATH)

        def drift(slow: float, tremor: float, size: tuple[int, ...] = ()) -> Callable:
            drifting, trembling = _wander(rng, slow, 0.05, 0.35, size), _wander(rng, tremor, 0.8, 2.5, size)
            return lambda time: drifting(time) + trembling(time)

        speed, surge = rng.uniform(10, 18), _wander(rng, 4.0, 0.1, 0.4)
        return cls(speed, surge, drift(7.0, 0.25, (2,)), drift(0.7, 0.02, (2,)), drift(0.9, 0.02))

    def position(self, time: Any) -> Any:
        """Arc length in mm."""
        return 20.0 + self.speed * time + self.surge(time)

    def poses(self, times: np.ndarray, colon: _Colon) -> np.ndarray:
        """Camera-to-world matrices, (F, 4, 4): the scope looks at the lumen a little ahead, not quite steadily."""
        s = self.position(times)
        tangent, *normals = np.moveaxis(_lerp(colon.axes, s / _STEP), 1, 0)
        offset = _soft_limit(self.offset(times), _MAX_OFFSET)
        eye = _lerp(colon.centre, s / _STEP) + offset[:, :1] * normals[0] + offset[:, 1:] * normals[1]
        ahead = _lerp(colon.centre, (s + 22) / _STEP) - eye
        aim = np.stack([_dot(ahead, normal) / _dot(ahead, tangent) for normal in normals], axis=1)
        aim = _soft_limit(aim + self.tilt(times), _MAX_TILT)
        roll = self.roll(times)[:, None]
        z = tangent + aim[:, :1] * normals[0] + aim[:, 1:] * normals[1]
        y = np.cross(z, np.cos(roll) * normals[0] + np.sin(roll) * normals[1])
        poses = np.tile(np.eye(4), (len(times), 1, 1))
        poses[:, :3, :3] = np.stack([_unit(np.cross(y, z)), _unit(y), _unit(z)], axis=2)
        poses[:, :3, 3] = eye
        return poses


@dataclass(frozen=True)
class _Instrument:
    """A biopsy forceps in the camera's own frame: a shaft from outside the image and two jaws that open and close."""

    clock: float
    depth: float
    colour: np.ndarray
    reach: Callable
    sway: Callable
    jaw: Callable

    @classmethod
    def draw(cls, seed: int) -> "_Instrument":
        rng = _stream(seed, _INSTRUMENT)
        clock, depth, grey = rng.uniform(0, 2 * np.pi), rng.uniform(13, 19), rng.choice([0.15, 0.38], p=[0.4, 0.6])
        reach, sway = _wander(rng, 6.0, 0.15, 0.5), _wander(rng, 1.8, 0.15, 0.6, (2,))
        return cls(clock, depth, grey + np.array([0, 0.01, 0.03]), reach, sway, _wander(rng, 1.0, 0.2, 0.6))

    def capsules(self, time: float) -> list[tuple[np.ndarray, np.ndarray, float, bool]]:
        """Ends and radius, mm in camera coordinates, of the shaft and the jaws, and whether the part is wound wire."""
        aside = np.array([np.cos(self.clock), np.sin(self.clock), 0.0])
        base = 6.5 * aside
        hinge = 2.2 * aside + np.array([*self.sway(time), self.depth + self.reach(time)])
        axis, spread = _direction(base, hinge), 0.5 + 0.35 * self.jaw(time)
        tips = [
            hinge + 3.8 * (np.cos(spread) * axis + np.sin(way * spread) * np.cross(axis, aside)) for way in (-1, 1)
        ]
        return [(base, hinge, 1.15, True), *((hinge, tip, 0.6, False) for tip in tips)]


# --- rays and light --------------------------------------------------------------------------------------------------


def _render_frame(
    colon: _Colon, tool: _Instrument | None, pose: np.ndarray, s: float, time: float, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Radiance (P, 3), depth (P,) and the masks of polyp and instrument, (P,) each, for the rays `(x, y, 1)`."""
    rotation, eye = pose[:3, :3], pose[:3, 3]
    depth, arc, u, v, axes = _trace_wall(colon, rotation, eye, s, x, y)
    rays = np.stack([x, y, np.ones_like(x)], axis=1)

    # 1. the wall: its normal is the gradient of R(s, theta) - rho, pointing into the lumen
    rho, turn = np.sqrt(u * u + v * v), (np.arctan2(v, u) + np.float32(np.pi)) / np.float32(2 * np.pi)
    slope_s, slope_theta, fold, foot = _bilinear(colon.relief, arc / _STEP, turn * _COLUMNS).T
    # folds lengthen the wall: with their height added to s, their near faces are not textured in streaks
    vessels, tint, bump_s, bump_theta, wet = _bilinear(
        colon.texture, (arc + fold) / _CELL % _TILE[0], turn * _TILE[1] % _TILE[1]
    ).T
    bend = _lerp(colon.curvature, arc / _STEP).astype(np.float32)
    slope_s = (slope_s / np.maximum(1 - bend[:, 0] * u - bend[:, 1] * v, np.float32(0.2)))[:, None]
    cos, sin = (u / rho)[:, None], (v / rho)[:, None]
    e_s, e_rho, e_theta = axes[:, 0], cos * axes[:, 1] + sin * axes[:, 2], cos * axes[:, 2] - sin * axes[:, 1]
    smooth = _unit(slope_s * e_s + (slope_theta / rho)[:, None] * e_theta - e_rho)
    bumpy = smooth + bump_s[:, None] * _unit(e_s + slope_s * e_rho) + bump_theta[:, None] * e_theta
    crest = np.clip(fold / 8, 0, 1)
    albedo = colon.mucosa * (1 + 0.1 * tint + 0.1 * crest)[:, None]
    albedo[:, 1:] *= (1 + 0.1 * tint)[:, None]
    albedo += foot[:, None] * (colon.growth - albedo)
    albedo += (0.9 * vessels * (1 - 0.4 * crest))[:, None] * (colon.blood - albedo)
    is_polyp, is_tool = foot > 0.75, np.zeros(len(x), bool)

    # 2. polyps, textured by their own coordinates; light leaks through their thin rim
    for at, centre, quadric in colon.polyps:
        if not s - 12 < at < s + _SIGHT:
            continue
        z, front = _ray_ellipsoid(rays, rotation.T @ (centre - eye), rotation.T @ quadric @ rotation)
        front &= z < depth
        depth[front], is_polyp[front] = z[front], True
        local = _times(rays[front] * z[front, None], rotation.T) + (eye - centre).astype(np.float32)
        across = [(local[:, i] + 0.7 * local[:, 2]) / (0.6 * _CELL) % size for i, size in enumerate(_TILE)]
        _, tint, *bump, wet[front] = _bilinear(colon.texture, *across).T
        smooth[front] = _unit(_unit(_times(local, quadric @ rotation)) - 0.18 * _unit(rays[front]))
        bumpy[front] = smooth[front] + _times(np.stack(bump, axis=1), rotation[:2])
        albedo[front] = colon.growth * (1 + 0.16 * tint)[:, None]

    # 3. the instrument; the turns of its wire face the lens although the shaft points away from it
    if tool is not None:
        for start, end, radius, coiled in tool.capsules(time):
            z, front, normal, along = _ray_capsule(rays, start, end, radius)
            front &= z < depth
            depth[front], is_polyp[front], is_tool[front] = z[front], False, True
            smooth[front] = bumpy[front] = normal[front]
            albedo[front] = tool.colour
            if coiled:
                tilt = 1.5 + np.sin(along[front] * np.float32(2 * np.pi / 1.3))
                smooth[front] = bumpy[front] = _unit(normal[front] + tilt[:, None] * _direction(end, start))

    return _shade(rays, depth, smooth, bumpy, albedo, wet, is_tool), depth, is_polyp, is_tool


def _trace_wall(
    colon: _Colon, rotation: np.ndarray, eye: np.ndarray, s: float, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where the rays leave the lumen: depth, arc length, the two normal coordinates (P,) and the axes there (P, 3, 3).

    A point p has arc length s where p . T(s) = c(s) . T(s), and coordinates u = (p - c) . N, v = (p - c) . B. With p =
    depth * (x, y, 1) the first equation gives the depth at which a ray meets the plane of s, so the ray is walked by
    planes and the unknown of the refinement is s. Between rows T, N, B and c . T, c . N, c . B are linear: this is the
    definition of the surface, whichever camera looks at it.
    """
    first, count = int(s / _STEP), int(_SIGHT / _STEP)
    axes, radius = colon.axes[first : first + count + 2], colon.radius[first : first + count + 2]
    planes = np.empty((count + 2, 3, 4), np.float32)
    planes[..., :3] = np.einsum("sij,jk->sik", axes, rotation)
    planes[..., 3] = np.einsum("sij,sj->si", axes, colon.centre[first : first + count + 2] - eye)

    def escape(
        x: np.ndarray, y: np.ndarray, plane: np.ndarray, wall: Callable
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where rays meet a plane: depth, u, v, and mm outside the wall, whose radius at a column `wall` tells."""
        (t0, t1, t2, tc), (n0, n1, n2, nc), (b0, b1, b2, bc) = plane
        z = tc / np.maximum(x * t0 + y * t1 + t2, np.float32(1e-3))
        u = z * (x * n0 + y * n1 + n2) - nc
        v = z * (x * b0 + y * b1 + b2) - bc
        column = (np.arctan2(v, u) + np.float32(np.pi)) * np.float32(_COLUMNS / (2 * np.pi))
        return z, u, v, np.sqrt(u * u + v * v) - wall(column)

    # 1. walk, with steps that grow with distance; rays that have left the lumen drop out
    active, before = np.arange(len(x)), np.full(len(x), -1, np.float32)
    low, high, f_low, f_high = np.empty((4, len(x)), np.float32)
    row, previous = 1, s / _STEP - first
    while len(active):
        *_, f = escape(x[active], y[active], planes[row], partial(_lerp, radius[row]))
        out = (f >= 0) | (row == count)
        gone = active[out]
        low[gone], high[gone], f_low[gone], f_high[gone] = previous, row, before[out], f[out]
        active, before, previous = active[~out], f[~out], row
        row = min(row + 1 + row // 80, count)

    # 2. regula falsi with the Illinois rule (Dowell and Jarratt, BIT 11, 1971)
    kept = np.zeros(len(x), np.int8)
    for _ in range(_REFINEMENTS):
        at = np.clip(low + (high - low) * (f_low / np.minimum(f_low - f_high, -1e-9)), low, high)
        plane = _lerp(planes.reshape(-1, 12), at)
        z, u, v, f = escape(x, y, plane.T.reshape(3, 4, -1), partial(_bilinear, radius, at))
        outside = f >= 0
        f_low = np.where(outside, np.where(kept == 1, 0.5 * f_low, f_low), f)
        f_high = np.where(outside, f, np.where(kept == -1, 0.5 * f_high, f_high))
        low, high = np.where(outside, low, at), np.where(outside, at, high)
        kept = np.where(outside, 1, -1)
    return z, (at + first) * _STEP, u, v, plane.reshape(-1, 3, 4)[..., :3]


def _ray_ellipsoid(rays: np.ndarray, centre: np.ndarray, quadric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First crossing of `z * ray` with `(p - centre)' quadric (p - centre) = 1`: depth, and if there is one, (P,)."""
    x, y, _ = rays.T
    (qxx, qxy, qxz), (_, qyy, qyz), (_, _, qzz) = quadric.tolist()
    bx, by, bz = (quadric @ centre).tolist()
    a = x * (qxx * x + 2 * qxy * y + 2 * qxz) + y * (qyy * y + 2 * qyz) + qzz
    b = bx * x + by * y + bz
    inside = b * b - a * float(centre @ quadric @ centre - 1)
    z = (b - np.sqrt(np.maximum(inside, 0))) / a
    return z, (inside > 0) & (z > 0)


def _ray_capsule(
    rays: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First crossing of `z * ray` with the tube of `radius` around a segment, round at its end.

    Depth, whether there is one, outward normal (P, 3), and distance from the end along the axis.
    """
    length, axis = float(np.linalg.norm(end - start)), _direction(start, end)
    # the cylinder is a circle to the parts of ray and start that are orthogonal to the axis
    ahead, behind = _dot(rays, axis), float(start @ axis)
    across, aside = rays - ahead[:, None] * axis, (start - behind * axis).astype(np.float32)
    a, b = _dot(across, across), _dot(across, aside)
    inside = b * b - a * float(aside @ aside - radius**2)
    z = (b - np.sqrt(np.maximum(inside, 0))) / np.maximum(a, np.float32(1e-9))
    along = z * ahead - behind
    hit = (inside > 0) & (z > 0) & (along > 0) & (along < length)
    z_tip, tip = _ray_ellipsoid(rays, end, np.eye(3) / radius**2)
    tip &= z_tip * ahead - behind >= length
    z = np.where(tip, z_tip, z)
    along = np.clip(z * ahead - behind, 0, length)
    normal = (rays * z[:, None] - start.astype(np.float32) - along[:, None] * axis) / np.float32(radius)
    return z, hit | tip, normal, length - along


def _shade(
    rays: np.ndarray,
    depth: np.ndarray,
    smooth: np.ndarray,
    bumpy: np.ndarray,
    albedo: np.ndarray,
    wet: np.ndarray,
    is_metal: np.ndarray,
) -> np.ndarray:
    """Radiance (P, 3) under a point light at the lens, falling with the square of the distance.

    Wrapped Lambert for light scattered under the mucosa, and a wet film by Blinn ("Models of light reflection for
    computer synthesized pictures", SIGGRAPH 1977), whose half vector is the ray itself as light and eye coincide.
    """
    squared = _dot(rays, rays)
    light = (400 / (squared * depth * depth))[:, None]
    towards = -rays / np.sqrt(squared)[:, None]
    shine = np.maximum(_dot(_unit(bumpy), towards), 0)[:, None]
    cos = np.maximum(0.5 * (_dot(smooth, towards)[:, None] + shine), 0)
    wrap = np.array([0.22, 0.12, 0.08], np.float32)
    film = wet[:, None] * (2.2 * shine**500 + 0.05 * shine**16)
    radiance = light * (albedo * (cos + wrap) / (1 + wrap) + film)
    # polished metal scatters little; it mirrors the light and, around it, the lit wall
    mirror = albedo * (0.06 + 0.75 * shine**4) * np.array([1.0, 0.88, 0.84], np.float32)
    metal = mirror + light * (0.01 * shine + 0.25 * shine**120)
    return np.where(is_metal[:, None], metal, radiance)


def _develop(radiance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Radiance (H, W, 3) to uint8 sRGB: lens blur, automatic exposure, tone curve, sensor noise."""
    image = np.pad(np.minimum(radiance, 4), ((1, 1), (1, 1), (0, 0)), mode="edge")
    image = 0.18 * (image[:-2] + image[2:]) + 0.64 * image[1:-1]
    image = 0.18 * (image[:, :-2] + image[:, 2:]) + 0.64 * image[:, 1:-1]
    exposure = 0.9 / (0.1 + np.sqrt(np.minimum(image, 1.5)).mean()) ** 1.2
    signal = np.maximum(1 - np.exp(-exposure * image), 1e-4) ** (1 / 2.2)
    signal = 0.5 * signal + 0.5 * signal * signal * (3 - 2 * signal)
    noise = rng.standard_normal(signal.shape, dtype=np.float32)
    return np.clip(255 * (0.02 + 0.98 * signal) + 1.3 * noise, 0, 255).astype(np.uint8)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _stream(seed: int, *which: int) -> np.random.Generator:
    """An independent generator for each use of a seed."""
    return np.random.default_rng([int(seed), *which])


def _wander(
    rng: np.random.Generator, amplitude: float, slowest: float, fastest: float, size: tuple[int, ...] = ()
) -> Callable:
    """A smooth random function of one variable, within +- amplitude: five sines of log-uniform frequency.

    With a `size` its values are arrays of that shape, after the shape of the argument.
    """
    frequency = 2 * np.pi * np.exp(rng.uniform(np.log(slowest), np.log(fastest), (*size, 5)))
    phase, weight = rng.uniform(0, 2 * np.pi, (*size, 5)), rng.uniform(0.5, 1, (*size, 5))
    weight *= amplitude / weight.sum(-1, keepdims=True)
    return lambda at: (np.sin(np.multiply.outer(at, frequency) + phase) * weight).sum(-1)


def _soft_limit(vectors: np.ndarray, limit: float) -> np.ndarray:
    """Vectors `(..., n)` shortened smoothly so that none is longer than `limit`."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-12
    return vectors * (limit * np.tanh(length / limit) / length)


def _direction(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Unit vector (3,), float32, from one point to another."""
    return ((end - start) / np.linalg.norm(end - start)).astype(np.float32)


def _wrap(angle: np.ndarray) -> np.ndarray:
    """The same angles within -pi to pi."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


# Per-ray products avoid BLAS, whose rounding may depend on the number of threads.


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products (P,) of vectors (P, 3) with vectors (P, 3) or with one vector (3,)."""
    return a[:, 0] * b[..., 0] + a[:, 1] * b[..., 1] + a[:, 2] * b[..., 2]


def _times(vectors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Row vectors (P, n) times a matrix (n, 3), in float32."""
    return np.einsum("pi,ij->pj", vectors, matrix.astype(np.float32))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (P, 3) scaled to length one."""
    return vectors / np.sqrt(_dot(vectors, vectors))[:, None]


def _lerp(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation along the first axis of `table` at the fractional rows `at`, (P,)."""
    low = at.astype(np.int32)
    weight = (at - low).reshape(-1, *(1,) * (table.ndim - 1))
    a = table.take(low, axis=0)
    return a + weight * (table.take(low + 1, axis=0) - a)


def _bilinear(table: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of `table` (rows, columns, ...) at fractional rows and columns, (P,)."""
    i, j = row.astype(np.int32), column.astype(np.int32)
    a, b = row - i, column - j
    corner = i * table.shape[1] + j
    flat = table.reshape(-1, *table.shape[2:])
    if table.ndim > 2:
        a, b = a[:, None], b[:, None]
    top = flat.take(corner, axis=0)
    top += b * (flat.take(corner + 1, axis=0) - top)
    corner += table.shape[1]
    bottom = flat.take(corner, axis=0)
    bottom += b * (flat.take(corner + 1, axis=0) - bottom)
    return top + a * (bottom - top)


def _check_positive_integers(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int | np.integer) or value <= 0:
            raise ValueError(f"{name}={value}: expected a positive integer")
