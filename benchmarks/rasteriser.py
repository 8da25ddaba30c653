"""Time of the rasteriser, forward and backward, against a loop over Gaussians; its memory against the chunk size.

    python benchmarks/rasteriser.py

The loop composites one Gaussian after the other over the whole image, by the same formulas, under autograd. Both draw
the same scene: Gaussians that cover the image a few times over, as those of a fitted scene do. The two alternate, and
the ratio is taken pair by pair, of processor time, which other work on the machine changes little. Peak memory is
the process's, less what it has before the call.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from diffusers_endora.downstream.reconstruction.cameras import pinhole_intrinsics
from diffusers_endora.downstream.reconstruction.rasteriser import (
    LEAST_ALPHA,
    MOST_ALPHA,
    NEAR,
    Rendering,
    project_gaussians,
    rasterise,
    rotation_matrices,
)


def by_loop(
    means: torch.Tensor,
    quaternions: torch.Tensor,
    scales: torch.Tensor,
    opacities: torch.Tensor,
    colours: torch.Tensor,
    world_to_camera: torch.Tensor,
    intrinsics: torch.Tensor,
    height: int,
    width: int,
) -> Rendering:
    """The same image, one Gaussian after the other, nearest first."""
    camera_means = means @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    axes = world_to_camera[:3, :3] @ rotation_matrices(quaternions) * scales[:, None, :]
    centres, covariances = project_gaussians(camera_means, axes, intrinsics, height, width)
    v, u = torch.meshgrid(torch.arange(height).to(means), torch.arange(width).to(means), indexing="ij")
    colour = torch.zeros(height, width, 3, dtype=means.dtype)
    depth, through = torch.zeros_like(v), torch.ones_like(v)
    for i in torch.argsort(camera_means[:, 2].detach(), stable=True).tolist():
        if camera_means[i, 2] <= NEAR:
            continue
        xx, xy, yy = covariances[i].unbind()
        dx, dy = u - centres[i, 0], v - centres[i, 1]
        power = -0.5 * (yy * dx * dx - 2 * xy * dx * dy + xx * dy * dy) / (xx * yy - xy * xy)
        alpha = opacities[i] * power.exp()
        alpha = torch.where(alpha >= LEAST_ALPHA, alpha.clamp(max=MOST_ALPHA), 0)
        weight = through * alpha
        colour = colour + weight[..., None] * colours[i]
        depth = depth + weight * camera_means[i, 2]
        through = through * (1 - alpha)
    alpha = 1 - through
    return Rendering(colour, torch.where(alpha > 0, depth / torch.where(alpha > 0, alpha, 1), 0), alpha)


def random_scene(num_gaussians: int, size: int, seed: int = 0, coverage: float = 6.0) -> list[torch.Tensor]:
    """Means, quaternions, scales, opacities, colours, pose and intrinsics; the last two get no gradients.

    A Gaussian's standard deviation is such that the squares of two deviations' side cover the image `coverage` times.
    """
    generator = torch.Generator().manual_seed(seed)
    intrinsics = torch.from_numpy(pinhole_intrinsics(size, size, 116)).float()
    pixels = torch.rand(num_gaussians, 2, generator=generator) * size
    z = 10 + 40 * torch.rand(num_gaussians, generator=generator)
    means = torch.cat([(pixels - intrinsics[:2, 2]) / intrinsics[0, 0] * z[:, None], z[:, None]], 1)
    deviation = 0.5 * size * (coverage / num_gaussians) ** 0.5 * z / intrinsics[0, 0]
    scales = deviation[:, None] * (0.5 + torch.rand(num_gaussians, 3, generator=generator))
    quaternions = torch.randn(num_gaussians, 4, generator=generator)
    opacities = 0.1 + 0.89 * torch.rand(num_gaussians, generator=generator)
    colours = torch.rand(num_gaussians, 3, generator=generator)
    scene = [means, quaternions, scales, opacities, colours]
    return [tensor.requires_grad_() for tensor in scene] + [torch.eye(4), intrinsics]


def timed(render: Callable[..., Rendering], scene: list[torch.Tensor], size: int) -> tuple[float, float, Rendering]:
    """Seconds of processor time forward and backward, and the rendering."""
    start = time.process_time()
    rendering = render(*scene, size, size)
    middle = time.process_time()
    (rendering.colour.sum() + rendering.depth.sum() + rendering.alpha.sum()).backward()
    return middle - start, time.process_time() - middle, rendering


def peak_memory(num_gaussians: int, size: int, chunk_size: int) -> float:
    """MB that a forward and backward pass take at their peak, beyond what the process has before (Linux)."""
    scene = random_scene(num_gaussians, size)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
    timed(partial(rasterise, chunk_size=chunk_size), scene, size)
    return memory("VmHWM") - before


def mapped_from(size: int) -> None:
    """Lets the C library take memory of this size and more, in bytes, from the system by itself (glibc)."""
    ctypes.CDLL("libc.so.6").mallopt(-3, size)


def memory(name: str) -> float:
    """A line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_gaussians", type=int, default=2000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of (loop, ours) that are timed")
    args = parser.parse_args()

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.num_gaussians} Gaussians, {args.size} px"
    )
    mapped_from(64 * 1024)  # freed tensors go back to the system at once, and every peak is a new one
    print("peak memory, forward and backward:")
    for num_gaussians in (5_000, 20_000):
        for chunk_size in (125_000, 500_000, 2_000_000):
            megabytes = peak_memory(num_gaussians, args.size, chunk_size)
            print(f"{num_gaussians:6d} Gaussians, chunk_size {chunk_size:8d}: {megabytes:7.1f} MB")
    mapped_from(32 * 1024**2)

    scene = random_scene(args.num_gaussians, args.size)
    timed(rasterise, scene, args.size)
    times: dict[str, list[tuple[float, float]]] = {"loop": [], "ours": []}
    images: dict[str, list[torch.Tensor]] = {}
    for _ in range(args.repeats):
        for name, render in (("loop", by_loop), ("ours", rasterise)):
            forward, backward, rendering = timed(render, scene, args.size)
            times[name].append((forward, backward))
            images[name] = [part.detach() for part in (rendering.colour, rendering.alpha, rendering.depth)]
            del rendering  # and the graph of the loop, which is large
    for name, values in times.items():
        forward, backward = (statistics.median(part) for part in zip(*values, strict=True))
        print(f"{name}  forward {forward * 1e3:8.1f} ms, backward {backward * 1e3:8.1f} ms (medians)")
    for part, name in enumerate(("forward", "backward")):
        ratios = [slow[part] / fast[part] for slow, fast in zip(*times.values(), strict=True)]
        print(f"ratio {name:8s} {statistics.median(ratios):6.1f}  (min {min(ratios):.1f}, max {max(ratios):.1f})")
    ratios = [sum(slow) / sum(fast) for slow, fast in zip(*times.values(), strict=True)]
    print(f"ratio {'both':8s} {statistics.median(ratios):6.1f}  (min {min(ratios):.1f}, max {max(ratios):.1f})")
    colour, alpha, depth = ((a - b).abs() for a, b in zip(images["ours"], images["loop"], strict=True))
    relative_depth = (depth / images["loop"][2].clamp(min=1)).max().item()
    print(
        f"largest difference: colour {colour.max():.1e}, alpha {alpha.max():.1e}, depth, relative {relative_depth:.1e}"
    )


if __name__ == "__main__":
    main()
