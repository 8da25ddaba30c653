"""What a reconstruction leaves behind: a point file for viewers, videos, numbers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.video_io import write_video
from ...files import written_atomically
from .gaussians import DeformableGaussians
from .reconstruct import Reconstruction

HARMONIC = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))
ORBIT_FRAMES = 48
ORBIT_RADIUS = 0.12  # of the median depth
COLOURS_OF_DEPTH = "magma_r"  # near is light


def save_ply(path: str | os.PathLike[str], scene: DeformableGaussians, time: float) -> Path:
    """Writes the scene at one time as the `.ply` that viewers of 3D Gaussian splatting open.

    Binary, little endian, with the properties of the official implementation
    (https://github.com/graphdeco-inria/gaussian-splatting): `x y z nx ny nz f_dc_0..2 opacity scale_0..2 rot_0..3`;
    colours as coefficients of the constant spherical harmonic, opacities before the sigmoid, logarithms of scales,
    quaternions w first. Axes are those of the cameras' world (y down), lengths in units of the median depth.

    Args:
        path: a name that ends in `.ply`, in a folder that exists.
        time: in [0, 1].

    Raises:
        ValueError: another name.
    """
    path = Path(path)
    if path.suffix.lower() != ".ply":
        raise ValueError(f"{path}: expected a name that ends in .ply")
    means, colours = scene.at(time)
    columns = [
        *(means, torch.zeros_like(means), (colours - 0.5) / HARMONIC, scene.opacity_logits[:, None]),
        *(scene.log_scales, torch.nn.functional.normalize(scene.quaternions, dim=1)),
    ]
    table = torch.cat(columns, 1).detach().numpy().astype("<f4")
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), "opacity"]
    names += [*(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [*(f"property float {name}" for name in names), "end_header", ""]
    with written_atomically(path) as temporary:
        temporary.write_bytes("\n".join(header).encode("ascii") + table.tobytes())
    return path


def coloured_depth(depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray:
    """Depth maps `(F, H, W)` as uint8 `(F, H, W, 3)`, by their logarithm between two depths: near is light."""
    from matplotlib import colormaps

    with np.errstate(divide="ignore"):
        position = (np.log(depth) - np.log(nearest)) / max(np.log(farthest) - np.log(nearest), 1e-6)
    return (colormaps[COLOURS_OF_DEPTH](position.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)


def beside_source(reconstruction: Reconstruction) -> np.ndarray:
    """Source, rendering and depth of every posed frame side by side, uint8 `(F, H, 3 W, 3)`."""
    images, depth = reconstruction.render()
    nearest, farthest = np.percentile(depth[depth > 0], [1, 99])
    return np.concatenate([reconstruction.posed.frames, images, coloured_depth(depth, nearest, farthest)], axis=2)


@torch.no_grad()
def orbit(reconstruction: Reconstruction) -> np.ndarray:
    """Views from a circle about the middle camera, which all look at what it looks at: uint8 `(48, H, W, 3)`.

    The radius is 0.12 of the scene's median depth; time stands still.
    """
    posed, scene = reconstruction.posed, reconstruction.scene
    middle = len(posed.frames) // 2
    height, width = posed.frames.shape[1:3]
    intrinsics = torch.from_numpy(posed.intrinsics).float()
    pose, time = posed.camera_to_world[middle], float(reconstruction.times()[middle])
    views = []
    for angle in np.arange(ORBIT_FRAMES) / ORBIT_FRAMES * 2 * np.pi:
        moved = pose @ looking_at(ORBIT_RADIUS * np.array([np.cos(angle), np.sin(angle), 0]), np.array([0, 0, 1.0]))
        seen = scene.render(torch.from_numpy(np.linalg.inv(moved)).float(), intrinsics, height, width, time)
        views.append((seen.colour.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.stack(views).numpy()


def looking_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pose `(4, 4)` of a camera at `position` that looks at `target`, with its y axis as near to y as can be."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross([0, 1.0, 0], forward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    pose[:3, 3] = position
    return pose


def save_reconstruction(
    output_dir: str | os.PathLike[str], reconstruction: Reconstruction, fps: float, facts: Mapping[str, Any]
) -> Path:
    """Writes `scene.ply`, `beside_source.mp4`, `orbit.mp4` and `reconstruction.json` into a folder, made if absent.

    The json has the path taken, the registration rate, poses and intrinsics, scores, seconds, and `facts`.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    posed = reconstruction.posed
    save_ply(folder / "scene.ply", reconstruction.scene, time=0.5)
    write_video(folder / "beside_source.mp4", beside_source(reconstruction), fps)
    write_video(folder / "orbit.mp4", orbit(reconstruction), 24)
    record = {
        **facts,
        "path": posed.path,
        "registration_rate": posed.registration_rate,
        "path_facts": posed.facts,
        "num_gaussians": len(reconstruction.scene),
        "frames_posed": posed.indices.tolist(),
        "frames_held_out": posed.indices[reconstruction.is_held_out].tolist(),
        "scores": reconstruction.scores,
        "seconds": reconstruction.seconds,
        "intrinsics": posed.intrinsics.tolist(),
        "camera_to_world": posed.camera_to_world.tolist(),
    }
    with written_atomically(folder / "reconstruction.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return folder
