"""From a clip to a scene: poses and depth by one of two paths, then the fit of the Gaussians."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...data.video_io import check_clip
from .gaussians import DeformableGaussians, gaussians_from_depth
from .monocular_depth import MonocularDepth, align_depth, photometric_poses
from .scores import depth_total_variation, image_scores, structural_similarity
from .structure_from_motion import RegistrationError, SparseScene, structure_from_motion, valid_pixels

HELD_OUT_EVERY, FIRST_HELD_OUT = 8, 4  # views 4, 12, 20, ... are held out: each lies between others
LEAST_FRAMES = 8
MOST_GAUSSIANS = 20_000
OBSERVATION_RADIUS = 4.0  # pixels: how far from a point of the sparse scene its depth is believed

# weights of the loss, for a scene whose median depth is 1
SSIM_WEIGHT = 0.2  # the absolute difference has the rest, as in Kerbl et al. 2023, equation 7
DEPTH_WEIGHT = 0.2
VARIATION_WEIGHT = 0.02
MOTION_WEIGHT = 1.0
COLOUR_CHANGE_WEIGHT = 0.02

LEARNING_RATES = {
    "means": 2e-3,
    "log_scales": 2e-2,
    "quaternions": 1e-2,
    "opacity_logits": 5e-2,
    "colours": 1e-2,
    "motion": 5e-4,
    "colour_change": 5e-3,
}


@dataclass(frozen=True)
class PosedClip:
    """What the fit needs to know of a clip; lengths are in units in which the median depth is 1.

    Attributes:
        path: `"structure from motion"`, `"monocular depth"` or `"given"`: where poses and depth come from.
        frames: uint8 `(F, H, W, 3)`, those that have a pose.
        indices: `(F,)`, which of the clip's frames they are.
        camera_to_world: `(F, 4, 4)`; intrinsics: `(3, 3)`.
        depth: `(F, H, W)`, where the Gaussians start.
        depth_confidence: `(F, H, W)` in [0, 1]: how far a pixel's depth counts in the loss.
        registration_rate: frames that structure from motion registered, over all; None if it was not tried.
        facts: numbers of the path, for the report.
    """

    path: str
    frames: np.ndarray
    indices: np.ndarray
    camera_to_world: np.ndarray
    intrinsics: np.ndarray
    depth: np.ndarray
    depth_confidence: np.ndarray
    registration_rate: float | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Reconstruction:
    """A fitted scene.

    Attributes:
        posed: what it was fitted to.
        scene: the Gaussians.
        is_held_out: bool `(F,)`, of the posed frames.
        scores: see `reconstruct`.
        seconds: of the fit, by the clock and of the processor.
    """

    posed: PosedClip
    scene: DeformableGaussians
    is_held_out: np.ndarray
    scores: dict[str, Any]
    seconds: dict[str, float]

    def times(self) -> np.ndarray:
        """When each posed frame is, `(F,)` in [0, 1]."""
        return clip_times(self.posed)

    @torch.no_grad()
    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """All posed frames as the scene shows them: uint8 `(F, H, W, 3)`, and their depth, `(F, H, W)`."""
        images, maps = [], []
        for rendering in _renderings(self.scene, self.posed, range(len(self.posed.frames))):
            images.append((rendering.colour.clamp(0, 1) * 255).round().to(torch.uint8))
            maps.append(rendering.depth)
        return torch.stack(images).numpy(), torch.stack(maps).numpy()


def clip_times(posed: PosedClip) -> np.ndarray:
    """When each posed frame is, `(F,)`: 0 at the first, 1 at the last."""
    return (posed.indices - posed.indices[0]) / max(1, posed.indices[-1] - posed.indices[0])


def held_out_views(num_frames: int) -> np.ndarray:
    """Which views are held out, bool `(F,)`: every 8th, from the fifth on."""
    return np.arange(num_frames) % HELD_OUT_EVERY == FIRST_HELD_OUT


def check_frames(frames: np.ndarray) -> None:
    """Refuses clips from which nothing can be reconstructed whatever the method.

    Raises:
        ValueError: too few or too small frames, frames that are black or of one colour, or all the same.
    """
    check_clip(frames, "frames")
    if len(frames) < LEAST_FRAMES:
        raise ValueError(f"the clip has {len(frames)} frames: expected {LEAST_FRAMES} or more, of a camera that moves")
    if min(frames.shape[1:3]) < 32:
        raise ValueError(f"frames of {frames.shape[2]}x{frames.shape[1]} pixels: expected 32 or more on each side")
    if (flat := frames.std(axis=(1, 2)).max(axis=1) < 2).any():
        raise ValueError(
            f"{int(flat.sum())} of {len(frames)} frames are black or of one colour (the first is frame "
            f"{int(flat.argmax())}): nothing to reconstruct"
        )
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    if change.max() < 0.5:
        raise ValueError(f"the clip stands still (frames differ by at most {change.max():.2f} of 255): no parallax")


def find_poses(
    frames: np.ndarray,
    intrinsics: np.ndarray,
    depth_model: MonocularDepth | None = None,
    refine_focal_length: bool = False,
    use_structure_from_motion: bool = True,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> PosedClip:
    """Poses and depth of a clip: by structure from motion, else by the depth model and photometric alignment.

    Args:
        frames: uint8 RGB `(F, H, W, 3)`.
        intrinsics: `(3, 3)`.
        depth_model: for the second path; with the first, its depth is brought to that of the sparse points.
        refine_focal_length: let structure from motion find the focal length, from the given one on.
        use_structure_from_motion: without it the second path is taken at once.
        say: told which path was taken, and the registration rate.

    Raises:
        ValueError: a clip that `check_frames` refuses, or neither path gives poses; the sentence says why.
    """
    check_frames(frames)
    is_valid = valid_pixels(frames)
    if (share := is_valid.mean()) < 0.2:
        raise ValueError(f"{share:.0%} of the pixels are neither border nor highlights: expected 20% or more")
    rate = None
    failure = "structure from motion was not asked for"
    if use_structure_from_motion:
        try:
            sparse = structure_from_motion(frames, intrinsics, is_valid, refine_focal_length, seed)
        except RegistrationError as error:
            failure, rate = str(error), error.registration_rate
        else:
            say(
                f"path: structure from motion, registration rate {sparse.registration_rate:.0%} "
                f"({int(sparse.is_registered.sum())} of {len(frames)} frames), {len(sparse.points)} points"
            )
            return _posed_by_sparse(frames, sparse, depth_model, is_valid)
    said_rate = "not tried" if rate is None else f"{rate:.0%}"
    if depth_model is None:
        raise ValueError(f"registration rate {said_rate}: {failure}; give a --depth_model for the path without it")
    say(f"path: monocular depth, registration rate {said_rate} ({failure})")
    try:
        found = photometric_poses(frames, depth_model.predict(frames), intrinsics, is_valid)
    except ValueError as error:
        raise ValueError(f"registration rate {said_rate}: {failure}; by monocular depth, {error}") from error
    unit = float(np.median(found.depth))
    correlations = {"mean": float(found.correlations.mean()), "min": float(found.correlations.min())}
    facts = {"unit": unit, "correlation_after_alignment": correlations}
    return _scaled(
        PosedClip(
            "monocular depth",
            frames,
            np.arange(len(frames)),
            found.camera_to_world,
            intrinsics,
            found.depth,
            is_valid.astype(np.float32),
            rate,
            facts,
        ),
        unit,
    )


def with_given_poses(
    frames: np.ndarray, intrinsics: np.ndarray, camera_to_world: np.ndarray, depth: np.ndarray
) -> PosedClip:
    """A clip whose poses `(F, 4, 4)` and depth `(F, H, W)` are known: what is then wrong is the renderer's."""
    check_frames(frames)
    unit = float(np.median(depth))
    ones = np.ones(depth.shape, np.float32)
    posed = PosedClip(
        "given", frames, np.arange(len(frames)), camera_to_world, intrinsics, depth, ones, None, {"unit": unit}
    )
    return _scaled(posed, unit)


def reconstruct(
    posed: PosedClip,
    num_gaussians: int = 4000,
    num_steps: int = 300,
    num_basis: int = 4,
    lpips: torch.nn.Module | None = None,
    seed: int = 0,
    backend: str = "torch",
) -> Reconstruction:
    """Fits Gaussians to the views that are not held out.

    The loss is that of EndoGaussian (https://arxiv.org/abs/2401.12561, section 3.4) with Kerbl's SSIM: absolute
    difference and SSIM of the image, the logarithm of depth against that of the path where it is confident, total
    variation of the logarithm of depth; and squares of the coefficients of time. One view a step, by Adam, with rates
    that fall to a tenth. Gaussians are neither split nor removed.

    Poses of held-out views come from all frames, as is usual; the Gaussians never see their images.

    Args:
        num_basis: cosines in time of a Gaussian; 0: a rigid scene.
        lpips: adds LPIPS to the scores.
        backend: see `rasterise`; with `"gsplat"` the fit is on the GPU.

    Returns:
        Its `scores` have, for the views `held_out` and `training`, mean, standard deviation and number of `psnr`,
        `ssim`, `lpips` (with its weights), `depth_total_variation` and `alpha`, the share of the image that the scene
        covers.

    Raises:
        ValueError: a number that is not positive, more than `MOST_GAUSSIANS`, depth that is not positive, or a fit
            that ends in numbers that are not finite or shows nothing in a view.
    """
    if not 1 <= num_gaussians <= MOST_GAUSSIANS:
        raise ValueError(f"num_gaussians={num_gaussians}: expected 1 to {MOST_GAUSSIANS}")
    if num_steps < 1 or num_basis < 0:
        raise ValueError(f"num_steps={num_steps}, num_basis={num_basis}: expected 1 or more, and 0 or more")
    if not (np.isfinite(posed.depth).all() and (posed.depth > 0).all()):
        raise ValueError("depth: expected finite positive numbers everywhere")
    start, start_cpu = time.monotonic(), time.process_time()
    is_held_out = held_out_views(len(posed.frames))
    training = np.flatnonzero(~is_held_out)
    device = torch.device("cuda" if backend == "gsplat" else "cpu")
    frames = torch.from_numpy(posed.frames).to(device).permute(0, 3, 1, 2).float() / 255
    depth, confidence, intrinsics, poses = (
        torch.from_numpy(array).float().to(device)
        for array in (posed.depth, posed.depth_confidence, posed.intrinsics, posed.camera_to_world)
    )
    times, height, width = clip_times(posed), *posed.frames.shape[1:3]

    scene = gaussians_from_depth(
        frames[training], depth[training], poses[training], intrinsics, num_gaussians, num_basis, seed
    ).to(device)
    groups = [{"params": [getattr(scene, name)], "lr": rate} for name, rate in LEARNING_RATES.items()]
    optimizer = torch.optim.Adam(groups, eps=1e-15)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / num_steps))
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for _ in tqdm(range(num_steps), desc="fit", mininterval=5):
        if not order:
            order = rng.permutation(training).tolist()
        i = order.pop()
        seen = scene.render(torch.linalg.inv(poses[i]), intrinsics, height, width, float(times[i]), backend)
        image = seen.colour.permute(2, 0, 1)
        log_depth = (seen.depth + 1e-3).log()
        loss = (1 - SSIM_WEIGHT) * (image - frames[i]).abs().mean()
        loss = loss + SSIM_WEIGHT * (1 - structural_similarity(image[None], frames[i : i + 1])[0])
        loss = loss + DEPTH_WEIGHT * (confidence[i] * (log_depth - depth[i].log()).abs()).mean()
        variation = log_depth.diff(dim=0).abs().mean() + log_depth.diff(dim=1).abs().mean()
        loss = loss + VARIATION_WEIGHT * variation
        if num_basis:
            loss = loss + MOTION_WEIGHT * scene.motion.square().sum(0).mean()
            loss = loss + COLOUR_CHANGE_WEIGHT * scene.colour_change.square().sum(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not all(bool(parameter.isfinite().all()) for parameter in scene.parameters()):
        raise ValueError("the fit ended in numbers that are not finite")
    seconds = {"fit": time.monotonic() - start, "fit_processor": time.process_time() - start_cpu}
    scene = scene.cpu()  # what comes now is little, and needs no GPU
    scores = {
        name: _score(scene, posed, np.flatnonzero(chosen), lpips)
        for name, chosen in (("held_out", is_held_out), ("training", ~is_held_out))
    }
    return Reconstruction(posed, scene, is_held_out, scores, seconds)


def mean_and_std(values: list[float]) -> dict[str, float | int | None]:
    """Mean, standard deviation (None of fewer than two) and number."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}


@torch.no_grad()
def _score(
    scene: DeformableGaussians, posed: PosedClip, views: np.ndarray, lpips: torch.nn.Module | None
) -> dict[str, Any]:
    renderings = list(_renderings(scene, posed, views.tolist()))
    images = torch.stack([rendering.colour.clamp(0, 1).permute(2, 0, 1) for rendering in renderings])
    frames = torch.from_numpy(posed.frames[views]).permute(0, 3, 1, 2).float() / 255
    scores = image_scores(images, frames, lpips)
    scores["alpha"] = [float(rendering.alpha.mean()) for rendering in renderings]
    if not min(scores["alpha"]) > 0:
        raise ValueError(
            f"the scene covers nothing of view {views[int(np.argmin(scores['alpha']))]}: the fit has failed"
        )
    scores["depth_total_variation"] = depth_total_variation(
        torch.stack([rendering.depth for rendering in renderings])
    ).tolist()
    return {name: mean_and_std(values) for name, values in scores.items()}


def _renderings(scene: DeformableGaussians, posed: PosedClip, views: Any) -> Any:
    times, intrinsics = clip_times(posed), torch.from_numpy(posed.intrinsics).float()
    height, width = posed.frames.shape[1:3]
    for i in views:
        world_to_camera = torch.from_numpy(np.linalg.inv(posed.camera_to_world[i])).float()
        yield scene.render(world_to_camera, intrinsics, height, width, float(times[i]))


def _posed_by_sparse(
    frames: np.ndarray, sparse: SparseScene, depth_model: MonocularDepth | None, is_valid: np.ndarray
) -> PosedClip:
    kept = np.flatnonzero(sparse.is_registered)
    predicted = None if depth_model is None else depth_model.predict(frames[kept])
    maps, confidences = [], []
    for number, i in enumerate(kept):
        pixels, values = sparse.observations[i]
        if predicted is None:
            depth, confidence = dense_depth(pixels, values, *frames.shape[1:3])
        else:
            depth = align_depth(predicted[number], _inside(pixels, frames.shape[1:3]), values)
            confidence = is_valid[i].astype(np.float32)
        maps.append(depth)
        confidences.append(confidence)
    unit = float(np.median(np.stack(maps)))
    facts = {
        "unit": unit,
        "num_points": len(sparse.points),
        "reprojection_error_pixels": sparse.reprojection_error,
        "depth_between_points": "interpolated" if predicted is None else "depth model",
    }
    posed = PosedClip(
        "structure from motion",
        frames[kept],
        kept,
        sparse.camera_to_world[kept],
        sparse.intrinsics,
        np.stack(maps),
        np.stack(confidences),
        sparse.registration_rate,
        facts,
    )
    return _scaled(posed, unit)


def dense_depth(pixels: np.ndarray, values: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth between sparse points: the mean logarithm of the nearest eight, weighted by inverse squared distance.

    Args:
        pixels: `(N, 2)`, column and row; values: `(N,)`, positive.

    Returns:
        depth and its confidence, float32 `(H, W)`: `exp(-(d / r)^2 / 2)` for the distance d to the nearest point and
        r = `OBSERVATION_RADIUS`.
    """
    from scipy.spatial import cKDTree

    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    count = min(8, len(pixels))
    distance, nearest = cKDTree(pixels).query(np.stack([columns, rows], -1), k=count)
    distance, nearest = distance.reshape(height, width, count), nearest.reshape(height, width, count)
    weights = 1 / (distance**2 + 1)
    depth = np.exp((weights * np.log(values)[nearest]).sum(-1) / weights.sum(-1))
    return depth.astype(np.float32), np.exp(-0.5 * (distance[..., 0] / OBSERVATION_RADIUS) ** 2).astype(np.float32)


def _inside(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    return pixels.clip(0, [size[1] - 1, size[0] - 1])


def _scaled(posed: PosedClip, unit: float) -> PosedClip:
    """With `unit` as the unit of length."""
    poses = posed.camera_to_world.copy()
    poses[:, :3, 3] /= unit
    values = vars(posed) | {"camera_to_world": poses, "depth": posed.depth / unit}
    return PosedClip(**values)
