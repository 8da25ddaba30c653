"""Pinhole cameras and their poses: motions, alignment of two trajectories, pose errors.

Camera axes are those of OpenCV: x right, y down, z forward. Pixel centres have integer coordinates, so pixel `(u, v)`
at depth `z` (along the optical axis) is the camera point `z * inv(K) @ (u, v, 1)`. A pose is the 4x4 matrix that maps
homogeneous camera points to the world.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


def pinhole_intrinsics(height: int, width: int, field_of_view: float) -> np.ndarray:
    """Intrinsics `(3, 3)`, in pixels, of a camera that looks through the centre of its image.

    Args:
        height, width: of the image, in pixels.
        field_of_view: degrees across the image's diagonal, between 0 and 180.

    Raises:
        ValueError: a field of view out of range.
    """
    if not 0 < field_of_view < 180:
        raise ValueError(f"field_of_view={field_of_view}: expected degrees between 0 and 180")
    focal = 0.5 * math.hypot(height, width) / math.tan(math.radians(field_of_view) / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def resized_intrinsics(intrinsics: np.ndarray, scale: float) -> np.ndarray:
    """Intrinsics after both sides of the image were scaled; the image's edges, at -0.5, stay where they are."""
    resized = intrinsics.copy()
    resized[:2, :2] *= scale
    resized[:2, 2] = (intrinsics[:2, 2] + 0.5) * scale - 0.5
    return resized


def unproject(depth: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """Depth maps `(..., H, W)` to camera points `(..., H, W, 3)`, with one camera `(3, 3)` for all."""
    height, width = depth.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(height, dtype=depth.dtype, device=depth.device),
        torch.arange(width, dtype=depth.dtype, device=depth.device),
        indexing="ij",
    )
    x, y = (u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1]
    return torch.stack([x * depth, y * depth, depth], dim=-1)


def project(points: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """Camera points `(..., 3)` with z > 0 to pixels `(..., 2)`."""
    return points[..., :2] / points[..., 2:] * torch.stack([intrinsics[0, 0], intrinsics[1, 1]]) + intrinsics[:2, 2]


def transform(pose: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Points `(..., 3)` through one rigid motion `(4, 4)`."""
    return points @ pose[:3, :3].T + pose[:3, 3]


def se3_exponential(twists: torch.Tensor) -> torch.Tensor:
    """Twists `(..., 6)`, translation before rotation, to rigid motions `(..., 4, 4)`.

    The exponential map of SE(3), by the matrix exponential, which is differentiable at zero too (Blanco 2010, "A
    tutorial on SE(3) transformation parameterizations", section 9.4, https://arxiv.org/abs/2103.15980).
    """
    zero = torch.zeros_like(twists[..., 0])
    x, y, z = twists[..., 3:].unbind(-1)
    generator = torch.stack(
        [
            torch.stack([zero, -z, y, twists[..., 0]], -1),
            torch.stack([z, zero, -x, twists[..., 1]], -1),
            torch.stack([-y, x, zero, twists[..., 2]], -1),
            torch.stack([zero, zero, zero, zero], -1),
        ],
        -2,
    )
    return torch.linalg.matrix_exp(generator)


@dataclass(frozen=True)
class Similarity:
    """The map `scale * rotation @ x + translation` of the world."""

    scale: float
    rotation: np.ndarray  # (3, 3)
    translation: np.ndarray  # (3,)

    def of_points(self, points: np.ndarray) -> np.ndarray:
        """Points `(..., 3)`."""
        return self.scale * points @ self.rotation.T + self.translation

    def of_poses(self, poses: np.ndarray) -> np.ndarray:
        """Camera-to-world poses `(F, 4, 4)`: the cameras move along and turn, and stay cameras."""
        moved = poses.copy()
        moved[:, :3, :3] = self.rotation @ poses[:, :3, :3]
        moved[:, :3, 3] = self.of_points(poses[:, :3, 3])
        return moved


def align_points(source: np.ndarray, target: np.ndarray) -> Similarity:
    """The similarity that brings `source` nearest to `target`, both `(N, 3)`, in the least squares.

    Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns", IEEE TPAMI 13(4),
    equations 40 to 42.

    Raises:
        ValueError: fewer than three points, or all of `source` in one place.
    """
    if len(source) < 3 or len(source) != len(target):
        raise ValueError(f"expected two lists of the same three or more points, got {len(source)} and {len(target)}")
    of_source, of_target = source - source.mean(0), target - target.mean(0)
    variance = np.square(of_source).sum() / len(source)
    if variance <= 1e-18 * max(1.0, np.square(source).max()):
        raise ValueError("all points of the source are in one place: expected a trajectory that moves")
    u, singular, vt = np.linalg.svd(of_target.T @ of_source / len(source))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(signs) @ vt
    scale = float((singular * signs).sum() / variance)
    return Similarity(scale, rotation, target.mean(0) - scale * rotation @ source.mean(0))


def align_poses(estimated: np.ndarray, truth: np.ndarray) -> Similarity:
    """The similarity that brings estimated poses nearest to the true ones, both `(F, 4, 4)`.

    Aligned are the camera centres and one point ahead of and one below each, at the path's spread: centres alone leave
    the roll about a straight path open, and paths in endoscopy are nearly straight.

    Raises:
        ValueError: as `align_points`, or an estimated path that stands still.
    """
    return align_points(_camera_marks(estimated, estimated, "estimated"), _camera_marks(truth, truth, "true"))


def _camera_marks(poses: np.ndarray, path: np.ndarray, name: str) -> np.ndarray:
    """Centres and points ahead and below, `(3 F, 3)`; how far depends on the path alone, so that it scales with it."""
    spread = np.sqrt(np.square(path[:, :3, 3] - path[:, :3, 3].mean(0)).sum(1).mean())
    if not spread > 1e-9:
        raise ValueError(f"the {name} cameras all stand in one place: expected a path")
    centres = poses[:, :3, 3]
    return np.concatenate([centres, centres + spread * poses[:, :3, 2], centres + spread * poses[:, :3, 1]])


def pose_errors(estimated: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Errors of estimated camera-to-world poses `(F, 4, 4)` after the best similarity (`align_poses`).

    Sturm et al. 2012, "A benchmark for the evaluation of RGB-D SLAM systems", section V, with the frame distance 1.

    Returns:
        `ate`: absolute trajectory error, root mean square over frames, in the units of `truth`; `ate_relative`: over
        the length of the true path; `rpe_translation`, `rpe_rotation_degrees`: relative pose error from frame to
        frame, root mean squares; `path_length`.

    Raises:
        ValueError: fewer than three poses, or a path that stands still.
    """
    aligned = align_poses(estimated, truth).of_poses(estimated)
    ate = float(np.sqrt(np.square(aligned[:, :3, 3] - truth[:, :3, 3]).sum(1).mean()))
    path_length = float(np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum())
    steps = [np.linalg.inv(poses[:-1]) @ poses[1:] for poses in (aligned, truth)]
    errors = np.linalg.inv(steps[1]) @ steps[0]
    cosine = np.clip((np.trace(errors[:, :3, :3], axis1=1, axis2=2) - 1) / 2, -1, 1)
    return {
        "ate": ate,
        "ate_relative": ate / path_length,
        "rpe_translation": float(np.sqrt(np.square(errors[:, :3, 3]).sum(1).mean())),
        "rpe_rotation_degrees": float(np.rad2deg(np.sqrt(np.square(np.arccos(cosine)).mean()))),
        "path_length": path_length,
    }
