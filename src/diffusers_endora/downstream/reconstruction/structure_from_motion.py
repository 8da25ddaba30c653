"""Camera poses and sparse points of a clip, by COLMAP, and how far its frames agree with one rigid scene."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .cameras import resized_intrinsics

SIFT_SIDE = 256  # pixels: frames are scaled so for SIFT, small ones up (their blobs are a pixel or two wide)
MOST_FEATURES = 2048  # per frame
WINDOW = 10  # frames that a frame is matched with, after it
FIRST_ANGLES = (6.0, 2.0)  # degrees at which the rays of the first two frames meet at least: tried in turn
LEAST_POINTS = 50  # of a scene
LEAST_OBSERVED = 8  # points in a frame that counts as registered
LEAST_REGISTERED = 0.8  # of the frames: below, the clip is not reconstructed by this path
MOST_REPROJECTION, LEAST_ANGLE = 4.0, 1.5  # pixels of the frames, degrees: of a point of the scene
DARK, BRIGHT = 16, 230  # of 255: no channel above is border if it never is; all channels above is a highlight


class RegistrationError(ValueError):
    """Structure from motion gives no poses: one sentence that says why.

    Attributes:
        registration_rate: registered frames over all.
    """

    def __init__(self, message: str, registration_rate: float) -> None:
        super().__init__(message)
        self.registration_rate = registration_rate


@dataclass(frozen=True)
class SparseScene:
    """What structure from motion finds, in units of its own.

    Attributes:
        is_registered: bool `(F,)`.
        camera_to_world: `(F, 4, 4)`, nan where a frame is not registered.
        intrinsics: `(3, 3)`, of the frames as given.
        points: `(M, 3)`.
        observations: for each frame the pixels `(n, 2)` and the depths `(n,)` of the points that it sees.
        reprojection_error: mean, in pixels of the frames as given.
    """

    is_registered: np.ndarray
    camera_to_world: np.ndarray
    intrinsics: np.ndarray
    points: np.ndarray
    observations: list[tuple[np.ndarray, np.ndarray]]
    reprojection_error: float

    @property
    def registration_rate(self) -> float:
        return float(self.is_registered.mean())


def valid_pixels(frames: np.ndarray) -> np.ndarray:
    """Pixels that show tissue or instruments: bool `(F, H, W)` of uint8 frames `(F, H, W, 3)`.

    Left out are the black border, that is what is dark in every frame and touches the image's edge, and highlights,
    each with two pixels around it.
    """
    from scipy import ndimage

    labels, _ = ndimage.label(frames.max(axis=(0, 3)) < DARK)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    border = ndimage.binary_dilation(np.isin(labels, edge[edge > 0]), iterations=2)
    highlights = frames.min(axis=3) > BRIGHT
    around = ndimage.binary_dilation(highlights, np.ones((1, 3, 3), bool), iterations=2)
    return ~(around | border)


def structure_from_motion(
    frames: np.ndarray,
    intrinsics: np.ndarray,
    is_valid: np.ndarray | None = None,
    refine_focal_length: bool = False,
    seed: int = 0,
) -> SparseScene:
    """Poses and points by pycolmap: SIFT, sequential matching, incremental mapping (Schoenberger and Frahm 2016,
    "Structure-from-motion revisited").

    Two settings are not COLMAP's: it starts from two frames whose rays meet at 6 degrees, or else 2 (not 16), and
    admits motion straight ahead, since that is how an endoscope moves.

    Args:
        frames: uint8 RGB `(F, H, W, 3)`.
        intrinsics: `(3, 3)`, one focal length.
        is_valid: bool `(F, H, W)`, pixels that may have features; None: `valid_pixels`.
        refine_focal_length: let a last bundle adjustment find it, from the given one on. (Where it was free from the
            first frames on, most real clips failed.)

    Raises:
        RegistrationError: too few frames are registered, or too few points found.
        ImportError: pycolmap is not installed.
    """
    pycolmap = _pycolmap()
    is_valid = valid_pixels(frames) if is_valid is None else is_valid
    with _database(frames, intrinsics, is_valid, WINDOW, seed) as (database, scale):
        best, points = 0, 0
        for angle in FIRST_ANGLES:
            options = pycolmap.IncrementalPipelineOptions()
            options.num_threads, options.random_seed, options.multiple_models = 1, seed, False
            options.ba_refine_focal_length = options.ba_refine_extra_params = False
            options.mapper.abs_pose_refine_focal_length = options.mapper.abs_pose_refine_extra_params = False
            options.min_model_size = 3
            options.mapper.init_min_num_inliers, options.mapper.abs_pose_min_num_inliers = 40, 15
            options.mapper.init_min_tri_angle, options.mapper.init_max_forward_motion = angle, 1.0
            output = database.parent / f"models_{angle}"
            output.mkdir()
            models = pycolmap.incremental_mapping(database, database.parent / "frames", output, options=options)
            if not models:
                continue
            model = max(models.values(), key=lambda model: model.num_reg_images())
            if refine_focal_length:
                adjustment = pycolmap.BundleAdjustmentOptions()
                adjustment.refine_focal_length, adjustment.refine_extra_params = True, False
                adjustment.print_summary = False
                pycolmap.bundle_adjustment(model, adjustment)
                pycolmap.ObservationManager(model).filter_all_points3D(MOST_REPROJECTION * scale, LEAST_ANGLE)
                if not model.num_points3D():
                    continue
            sparse = _read(model, len(frames), scale)
            if not sparse.reprojection_error < MOST_REPROJECTION:  # it has diverged
                continue
            if sparse.registration_rate >= LEAST_REGISTERED and len(sparse.points) >= LEAST_POINTS:
                return sparse
            if (registered := int(sparse.is_registered.sum())) >= best:
                best, points = registered, len(sparse.points)
    raise RegistrationError(
        f"structure from motion registered {best} of {len(frames)} frames with {points} points (expected "
        f"{LEAST_REGISTERED:.0%} of the frames and {LEAST_POINTS} points)",
        best / len(frames),
    )


def epipolar_consistency(
    frames: np.ndarray, intrinsics: np.ndarray, frame_distance: int = 2, most_error: float = 1.0, seed: int = 0
) -> dict[str, float | int | None]:
    """How far a clip is the picture of one rigid scene: the share of SIFT matches that one camera motion explains.

    Between each frame and the one `frame_distance` after it, SIFT features are matched (ratio test 0.8, both ways). An
    essential matrix is fitted by RANSAC (COLMAP's), and a match counts if its Sampson error is at most `most_error`
    pixels of the frames as given. The share is over the matches of all pairs of frames; a pair with fewer than 8, too
    few for a fit, adds its matches and no inlier. A clip that stands still scores near 1 too.

    Args:
        frames: uint8 `(F, H, W, 3)`; intrinsics: `(3, 3)`.

    Returns:
        `inlier_share`, None where there is no match at all; `num_matches`, per pair of frames; `num_pairs`.

    Raises:
        ValueError: the clip has no two frames that far apart.
    """
    if not 0 < frame_distance < len(frames):
        raise ValueError(f"frame_distance={frame_distance}: expected 1 to {len(frames) - 1} for {len(frames)} frames")
    pycolmap = _pycolmap()
    with _database(frames, intrinsics, valid_pixels(frames), frame_distance, seed, 1) as (path, scale):
        database = pycolmap.Database.open(path)
        images = sorted(database.read_all_images(), key=lambda image: image.name)
        camera = database.read_camera(images[0].camera_id)
        ransac = pycolmap.RANSACOptions()
        ransac.max_error, ransac.random_seed = most_error * scale, seed
        inliers = matches = 0
        pairs = list(zip(images, images[frame_distance:], strict=False))
        for first, second in pairs:
            found = database.read_matches(first.image_id, second.image_id)
            matches += len(found)
            if len(found) >= 8:
                points = [
                    database.read_keypoints(image.image_id)[found[:, side], :2].astype(np.float64)
                    for side, image in enumerate((first, second))
                ]
                fit = pycolmap.estimate_essential_matrix(*points, camera, camera, ransac)
                inliers += 0 if fit is None else int(fit["num_inliers"])
        database.close()
    return {
        "inlier_share": inliers / matches if matches else None,
        "num_matches": matches / len(pairs),
        "num_pairs": len(pairs),
    }


def _pycolmap() -> Any:
    try:
        import pycolmap
    except ImportError as error:
        raise ImportError(
            "structure from motion needs pycolmap: pip install 'diffusers-endora[reconstruction]'"
        ) from error
    pycolmap.logging.minloglevel = 3
    return pycolmap


@contextmanager
def _database(
    frames: np.ndarray, intrinsics: np.ndarray, is_valid: np.ndarray, window: int, seed: int, least_matches: int = 15
) -> Iterator[tuple[Path, float]]:
    """A temporary folder with the scaled frames and a COLMAP database of their features and matches; the scale.

    COLMAP forgets the matches of two frames that have fewer than `least_matches`.
    """
    pycolmap = _pycolmap()
    height, width = frames.shape[1:3]
    scale = SIFT_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    of_scaled = resized_intrinsics(intrinsics, scale)
    pycolmap.set_random_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "frames").mkdir()
        (folder / "masks").mkdir()
        for i, (frame, mask) in enumerate(zip(frames, is_valid, strict=True)):
            Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC).save(folder / "frames" / f"{i:06d}.png")
            white = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
            white.save(folder / "masks" / f"{i:06d}.png.png")
        reader = pycolmap.ImageReaderOptions()
        reader.camera_model, reader.mask_path = "SIMPLE_PINHOLE", folder / "masks"
        # COLMAP's pixel centres lie at halves
        reader.camera_params = ",".join(
            f"{value:.6f}" for value in (of_scaled[0, 0], of_scaled[0, 2] + 0.5, of_scaled[1, 2] + 0.5)
        )
        extraction = pycolmap.FeatureExtractionOptions()
        extraction.num_threads = 1
        extraction.sift.max_num_features = MOST_FEATURES
        extraction.sift.peak_threshold = 0.002  # mucosa has little contrast; COLMAP's 0.0067 finds a tenth of it
        database = folder / "database.db"
        pycolmap.extract_features(
            database,
            folder / "frames",
            camera_mode=pycolmap.CameraMode.SINGLE,
            reader_options=reader,
            extraction_options=extraction,
            device=pycolmap.Device.cpu,
        )
        matching = pycolmap.FeatureMatchingOptions()
        matching.num_threads = 1
        pairing = pycolmap.SequentialPairingOptions()
        pairing.overlap, pairing.quadratic_overlap = window, False
        verification = pycolmap.TwoViewGeometryOptions()
        verification.min_num_inliers = least_matches
        pycolmap.match_sequential(
            database,
            matching_options=matching,
            pairing_options=pairing,
            verification_options=verification,
            device=pycolmap.Device.cpu,
        )
        yield database, scale


def _read(model: Any, num_frames: int, scale: float) -> SparseScene:
    poses = np.full((num_frames, 4, 4), np.nan)
    is_registered = np.zeros(num_frames, bool)
    observations = [(np.zeros((0, 2)), np.zeros(0))] * num_frames
    camera = next(iter(model.cameras.values()))
    focal, cx, cy = camera.params
    of_scaled = np.array([[focal, 0, cx - 0.5], [0, focal, cy - 0.5], [0, 0, 1]])
    for image in model.images.values():
        if not image.has_pose:
            continue
        i = int(Path(image.name).stem)
        world_to_camera = np.eye(4)
        world_to_camera[:3] = image.cam_from_world().matrix()
        seen = [point for point in image.points2D if point.has_point3D()]
        pixels = np.array([point.xy for point in seen]).reshape(-1, 2) / scale - 0.5
        world = np.array([model.points3D[point.point3D_id].xyz for point in seen]).reshape(-1, 3)
        depth = world @ world_to_camera[2, :3] + world_to_camera[2, 3]
        if (depth > 0).sum() >= LEAST_OBSERVED:
            poses[i], is_registered[i] = np.linalg.inv(world_to_camera), True
            observations[i] = (pixels[depth > 0], depth[depth > 0])
    points = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    error = model.compute_mean_reprojection_error() / scale
    return SparseScene(is_registered, poses, resized_intrinsics(of_scaled, 1 / scale), points, observations, error)
