"""A scene of Gaussians that move: its parameters, and where they start."""

import math

import numpy as np
import torch

from .cameras import transform, unproject
from .rasteriser import Rendering, rasterise


class DeformableGaussians(torch.nn.Module):
    """Gaussians whose centres and colours are smooth functions of time.

    At time t in [0, 1] a Gaussian's centre is `mean + sum_k a_k cos(pi k t)`, k = 1 to `num_basis`, and its colour
    likewise. The coefficients are the Gaussian's own, as in Deform3DGS (Yang et al. 2024,
    https://arxiv.org/abs/2405.17835, section 2.2), where EndoGaussian (https://arxiv.org/abs/2401.12561, section 3.3)
    has a network over feature planes; colours may change because the light is on the camera. Shapes and opacities
    stay.

    Args:
        means: `(N, 3)`.
        scales: `(N,)`, standard deviations; the Gaussians start as balls.
        colours: `(N, 3)` in [0, 1].
        num_basis: number of cosines; with 0 the scene is rigid.
        opacity: of all at the start.
    """

    def __init__(
        self,
        means: torch.Tensor,
        scales: torch.Tensor,
        colours: torch.Tensor,
        num_basis: int = 4,
        opacity: float = 0.6,
    ) -> None:
        super().__init__()
        count = len(means)
        self.means = torch.nn.Parameter(means.clone())
        self.log_scales = torch.nn.Parameter(scales.log()[:, None].repeat(1, 3))
        self.quaternions = torch.nn.Parameter(torch.tensor([1.0, 0, 0, 0]).repeat(count, 1))
        self.opacity_logits = torch.nn.Parameter(torch.full((count,), math.log(opacity / (1 - opacity))))
        self.colours = torch.nn.Parameter(colours.clone())
        self.motion = torch.nn.Parameter(torch.zeros(num_basis, count, 3))
        self.colour_change = torch.nn.Parameter(torch.zeros(num_basis, count, 3))

    def __len__(self) -> int:
        return len(self.means)

    def at(self, time: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres and colours, each `(N, 3)`, at a time in [0, 1]."""
        k = torch.arange(1, len(self.motion) + 1, device=self.means.device)
        basis = torch.cos(math.pi * k * time)[:, None, None].to(self.means)
        return self.means + (basis * self.motion).sum(0), self.colours + (basis * self.colour_change).sum(0)

    def render(
        self,
        world_to_camera: torch.Tensor,
        intrinsics: torch.Tensor,
        height: int,
        width: int,
        time: float,
        backend: str = "torch",
    ) -> Rendering:
        """What a camera sees at a time; see `rasterise`."""
        means, colours = self.at(time)
        scales, opacities = self.log_scales.exp(), self.opacity_logits.sigmoid()
        return rasterise(
            *(means, self.quaternions, scales, opacities, colours, world_to_camera, intrinsics, height, width),
            backend=backend,
        )


def gaussians_from_depth(
    frames: torch.Tensor,
    depth: torch.Tensor,
    camera_to_world: torch.Tensor,
    intrinsics: torch.Tensor,
    num_gaussians: int,
    num_basis: int,
    seed: int = 0,
) -> DeformableGaussians:
    """Gaussians at pixels of several views, drawn by chance from each, at their depth and in their colour.

    A Gaussian's deviation is the side of the area that it has of one view when all Gaussians share it.

    Args:
        frames: `(F, 3, H, W)` in [0, 1]; depth: `(F, H, W)`; camera_to_world: `(F, 4, 4)`; intrinsics: `(3, 3)`.
    """
    generator = torch.Generator().manual_seed(seed)
    num_views, height, width = depth.shape
    shares = np.diff(np.linspace(0, num_gaussians, num_views + 1).round().astype(int)).tolist()
    means, scales, colours = [], [], []
    spacing = math.sqrt(height * width / num_gaussians)
    for frame, map_, pose, share in zip(frames, depth, camera_to_world, shares, strict=True):
        chosen = torch.randperm(height * width, generator=generator)[:share].to(map_.device)
        points = transform(pose, unproject(map_, intrinsics)).reshape(-1, 3)
        means.append(points[chosen])
        scales.append(map_.reshape(-1)[chosen] * spacing / intrinsics[0, 0])
        colours.append(frame.permute(1, 2, 0).reshape(-1, 3)[chosen])
    return DeformableGaussians(torch.cat(means), torch.cat(scales), torch.cat(colours), num_basis)
