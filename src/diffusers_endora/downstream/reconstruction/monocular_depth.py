"""Depth of single frames by a network, and camera poses from frames with depth."""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError

from .cameras import project, resized_intrinsics, se3_exponential, transform, unproject

# models of transformers that predict depth; the others predict its inverse, up to scale and shift, unless their config
# has `depth_estimation_type="metric"`
DEPTH_MODELS = ("glpn", "zoedepth", "tipsv2_dpt")

LEVELS = (4, 2, 1)  # each image is aligned at these fractions of its size
ITERATIONS = 12  # at most, per level
CONTRAST_WINDOW = 5  # pixels from the middle: brightness is taken relative to these
LEAST_CORRELATION = 0.3  # of two frames after alignment; unrelated frames are below
LEAST_GAIN = 0.02  # in the mean correlation, by the motion: a camera that stands still gains nothing


class MonocularDepth:
    """A depth model of `transformers` with its image processor.

    Args:
        model: from `AutoModelForDepthEstimation`, in eval mode.
        processor: makes `pixel_values` from PIL images.
        is_inverse: it predicts the inverse of depth, up to scale and shift, as DPT and Depth Anything do.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, is_inverse: bool) -> None:
        self.model, self.processor, self.is_inverse = model, processor, is_inverse

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> "MonocularDepth":
        """A model by folder or Hub id.

        Raises:
            ValueError: there is no depth model of that name, or its weights are damaged or not all there.
            OSError: it lacks its image processor.
        """
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        try:
            model, info = AutoModelForDepthEstimation.from_pretrained(name, output_loading_info=True)
        except SafetensorError as error:
            raise ValueError(f"{name}: its weights are damaged ({error})") from error
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(
                f"{name}: expected a folder or Hub id of a depth model of transformers ({reason})"
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name}: lacks {len(missing)} tensors of its depth model, as {missing[0]}")
        model = model.eval()
        processor = AutoImageProcessor.from_pretrained(name)
        is_metric = getattr(model.config, "depth_estimation_type", "relative") == "metric"
        return cls(model, processor, not (model.config.model_type in DEPTH_MODELS or is_metric))

    @torch.no_grad()
    def predict(self, frames: np.ndarray) -> np.ndarray:
        """Depth, float32 `(F, H, W)`, positive, of uint8 RGB frames `(F, H, W, 3)`.

        Metric, if the model is. Of a model of inverse depth it is the inverse of what it says, over its median in each
        frame, with nothing nearer than a fifth of the median or farther than ten times it; the unknown shift is 0.
        """
        maps = []
        for frame in frames:
            inputs = self.processor(images=Image.fromarray(frame), return_tensors="pt")
            predicted = self.model(**inputs).predicted_depth[:, None].float()
            if getattr(self.model.config, "model_type", "") == "zoedepth":  # its processor has padded the frame
                predicted = self._cropped(predicted, frame.shape[:2])
            resized = F.interpolate(predicted, frame.shape[:2], mode="bilinear", align_corners=False)[0, 0]
            if self.is_inverse:
                median = resized.median().clamp(min=1e-6)
                resized = 1 / (resized / median).clamp(0.1, 5)
            maps.append(resized.clamp(min=1e-3))
        return torch.stack(maps).numpy()

    def _cropped(self, predicted: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """ZoeDepth's map without its padding, `3 sqrt(side / 2)` pixels of the frame on each side."""
        pads = [int(math.sqrt(side / 2) * 3) for side in size]
        edges = [
            round(pad / (side + 2 * pad) * length)
            for pad, side, length in zip(pads, size, predicted.shape[2:], strict=True)
        ]
        return predicted[..., edges[0] : predicted.shape[2] - edges[0], edges[1] : predicted.shape[3] - edges[1]]


def align_depth(predicted: np.ndarray, points: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A depth map `(H, W)` brought to the depths of some of its pixels: a scale and a shift of its inverse.

    The inverse is fitted by least squares, three times over, each time without the points whose residual exceeds 2.5
    robust deviations (1.48 times the median of absolute residuals). With fewer than 8 points the scale alone is
    taken, from the median; a fit that would turn the depth around is not taken, and what was before stays.

    Args:
        points: pixels `(N, 2)`, column and row, inside the image; `values`: their depths `(N,)`, positive.
    """
    columns, rows = np.round(points).astype(int).T
    inverse = 1 / predicted.astype(np.float64)
    of_map, of_points = inverse[rows, columns], 1 / values
    scale, shift = float(np.median(of_points / of_map)), 0.0
    is_kept = np.ones(len(values), bool)
    for _ in range(3):
        if is_kept.sum() < 8:
            break
        system = np.stack([of_map[is_kept], np.ones(is_kept.sum())], 1)
        fitted = np.linalg.lstsq(system, of_points[is_kept], rcond=None)[0]
        if fitted[0] <= 0 or (fitted[0] * inverse + fitted[1]).min() <= 0.1 * of_points.min():
            break
        scale, shift = map(float, fitted)
        residual = np.abs(scale * of_map + shift - of_points)
        is_kept = residual <= 2.5 * 1.48 * np.median(residual) + 1e-12
    return (1 / (scale * inverse + shift)).astype(np.float32)


@dataclass(frozen=True)
class PhotometricPoses:
    """Poses of a clip from its frames and their depth.

    Attributes:
        camera_to_world: `(F, 4, 4)`; the world is the first camera's frame.
        depth: `(F, H, W)`, each frame's multiplied so that it agrees with its predecessor.
        correlations: `(F - 1,)`, of each frame with the one before after alignment, of local contrast, in [-1, 1].
    """

    camera_to_world: np.ndarray
    depth: np.ndarray
    correlations: np.ndarray


def photometric_poses(
    frames: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray, is_valid: np.ndarray
) -> PhotometricPoses:
    """Camera poses by direct image alignment from frame to frame.

    Steinbruecker, Sturm and Cremers 2011, "Real-time visual odometry from dense RGB-D images": the motion that makes
    a frame, moved by its depth, look like the next, by Gauss-Newton from coarse to fine, with Huber's weights. Local
    contrast is compared, since the light moves with the camera.

    Args:
        frames: uint8 `(F, H, W, 3)`.
        depth: `(F, H, W)`, positive.
        intrinsics: `(3, 3)`.
        is_valid: bool `(F, H, W)`: pixels that may be compared (not highlights, not the border).

    Raises:
        ValueError: two frames do not look alike after alignment, or alignment makes nothing better, as when the camera
            stands still.
    """
    contrast = local_contrast(torch.from_numpy(frames).float().mean(-1) / 255)
    maps, valid = torch.from_numpy(depth).float(), torch.from_numpy(is_valid)
    cameras = torch.from_numpy(intrinsics).float()
    pose, poses, scales, correlations = torch.eye(4), [torch.eye(4)], [1.0], []
    unmoved: list[float] = []
    motion = torch.eye(4)
    for i in range(len(frames) - 1):
        # the motion before this one is a good guess, and none another: the better is taken
        tries = [
            _align_pair(contrast[i : i + 2], scales[-1] * maps[i], valid[i : i + 2], cameras, guess)
            for guess in ([motion, torch.eye(4)] if i else [motion])
        ]
        motion, correlation = max(tries, key=lambda result: result[1])
        correlations.append(correlation)
        unmoved.append(_correlation(contrast[i + 1], contrast[i], valid[i]))
        seen, z, is_seen = _sample(maps[i + 1][None], scales[-1] * maps[i], cameras, motion)
        ratio = (z / seen[0])[is_seen & valid[i]]
        scales.append(float(ratio.median()) if len(ratio) else scales[-1])
        pose = pose @ torch.linalg.inv(motion)
        poses.append(pose)
    result = PhotometricPoses(
        torch.stack(poses).double().numpy(),
        depth * np.array(scales, np.float32)[:, None, None],
        np.array(correlations),
    )
    if (worst := float(result.correlations.min())) < LEAST_CORRELATION:
        at = int(result.correlations.argmin())
        raise ValueError(
            f"frames {at} and {at + 1} do not look alike after alignment (correlation {worst:.2f}, expected "
            f"{LEAST_CORRELATION} or more): no overlap, or nothing but noise"
        )
    if (gain := float(result.correlations.mean() - np.mean(unmoved))) < LEAST_GAIN:
        raise ValueError(
            f"the camera stands still: aligned frames correlate by {gain:.3f} more than unmoved ones, expected "
            f"{LEAST_GAIN} or more"
        )
    return result


def local_contrast(grey: torch.Tensor) -> torch.Tensor:
    """Images `(F, H, W)` less their mean over a window, over their standard deviation in it."""
    side = 2 * CONTRAST_WINDOW + 1

    def blur(images: torch.Tensor) -> torch.Tensor:
        padded = F.pad(images[:, None], (CONTRAST_WINDOW,) * 4, mode="reflect")
        return F.avg_pool2d(padded, side, stride=1)[:, 0]

    centred = grey - blur(grey)
    return centred / (blur(centred.square()) + 1e-4).sqrt()


def _sample(
    images: torch.Tensor, depth: torch.Tensor, intrinsics: torch.Tensor, motion: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images `(C, H, W)` of a second camera where the pixels of the first appear in it.

    Returns the samples `(C, H, W)`, the depth of the points in the second camera, and which pixels it sees.
    """
    height, width = depth.shape
    points = transform(motion, unproject(depth, intrinsics))
    z = points[..., 2].clamp(min=1e-6)
    u, v = project(torch.cat([points[..., :2], z[..., None]], -1), intrinsics).unbind(-1)
    is_seen = (points[..., 2] > 1e-6) & (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
    grid = torch.stack([2 * u / (width - 1) - 1, 2 * v / (height - 1) - 1], -1)
    return F.grid_sample(images[None], grid[None], align_corners=True, padding_mode="border")[0], z, is_seen


def _align_pair(
    contrast: torch.Tensor, depth: torch.Tensor, valid: torch.Tensor, intrinsics: torch.Tensor, guess: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Motion `(4, 4)` from the first camera to the second, and the correlation of the images after it."""
    motion = guess
    for level in LEVELS:
        images = F.avg_pool2d(contrast[None], level)[0]
        scaled = torch.from_numpy(resized_intrinsics(intrinsics.numpy(), 1 / level))
        map_ = F.avg_pool2d(depth[None, None], level)[0, 0]
        is_valid = F.avg_pool2d(valid[None].float(), level)[0].min(0).values == 1
        padded = F.pad(images[1][None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        slopes = torch.stack(
            [images[1], (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2, (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2]
        )
        damping, error, candidate = 1e-3, float("inf"), motion
        for _ in range(ITERATIONS):
            (moved, along_u, along_v), _, is_seen = _sample(slopes, map_, scaled, candidate)
            is_used = is_seen & is_valid
            if is_used.sum() < 30:
                break
            residual = (moved - images[0])[is_used]
            spread = 1.345 * (1.48 * residual.abs().median() + 1e-6)
            weights = (spread / residual.abs().clamp(min=1e-12)).clamp(max=1)
            here = float((weights * residual.square()).mean())
            if here >= error:  # a step back, and a shorter one
                damping *= 10
                if damping > 1e3:
                    break
            else:
                motion, damping = candidate, max(damping / 10, 1e-6)
                x, y, z = transform(motion, unproject(map_, scaled))[is_used].unbind(-1)
                gu, gv = along_u[is_used] * scaled[0, 0], along_v[is_used] * scaled[1, 1]
                of_z = -(gu * x + gv * y) / z**2
                gx, gy = gu / z, gv / z
                jacobian = torch.stack([gx, gy, of_z, of_z * y - gy * z, gx * z - of_z * x, gy * x - gx * y], 1)
                # translations in units of depth, so that the damping treats both alike
                unit = torch.cat([z.median().expand(3), torch.ones(3)])
                jacobian = jacobian * unit
                normal = (jacobian * weights[:, None]).T @ jacobian
                right = (jacobian * weights[:, None]).T @ residual
                if error - here < 1e-5 * here:
                    break
                error = here
            step = -torch.linalg.solve(normal + damping * normal.diagonal().mean() * torch.eye(6), right) * unit
            candidate = se3_exponential(step) @ motion
    (moved,), _, is_seen = _sample(contrast[1:], depth, intrinsics, motion)
    is_used = is_seen & valid[0]
    if is_used.sum() < 0.2 * is_used.numel():
        return motion, -1.0
    return motion, _correlation(moved, contrast[0], is_used)


def _correlation(first: torch.Tensor, second: torch.Tensor, is_used: torch.Tensor) -> float:
    """Pearson's, over the pixels that are used; 0 where an image has no contrast."""
    return float(torch.nan_to_num(torch.corrcoef(torch.stack([first[is_used], second[is_used]])))[0, 1])
