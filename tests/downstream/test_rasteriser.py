"""The rasteriser against a loop over Gaussians, its gradients, and identities of its image."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from diffusers_endora.downstream.reconstruction.rasteriser import rasterise

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "rasteriser.py"


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark, which has the loop."""
    spec = importlib.util.spec_from_file_location("rasteriser_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def one_gaussian(z: float = 5.0, opacity: float = 0.8, scale: float = 0.5) -> list[torch.Tensor]:
    """On the optical axis of a camera whose image has its centre at pixel (10, 10)."""
    intrinsics = torch.tensor([[20.0, 0, 10], [0, 20, 10], [0, 0, 1]])
    scene = [torch.tensor([[0.0, 0, z]]), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), scale)]
    return [*scene, torch.tensor([opacity]), torch.tensor([[0.2, 0.4, 0.6]]), torch.eye(4), intrinsics]


@pytest.mark.parametrize("chunk_size", [500_000, 5_000])
def test_image_and_gradients_are_those_of_the_loop(benchmark, chunk_size):
    scene, size = benchmark.random_scene(150, 40), (35, 43)  # a size that squares of 8 do not fit
    with torch.no_grad():
        scene[3][:10] = 0.9995  # above the largest alpha
    ours = rasterise(*scene, *size, chunk_size=chunk_size)
    loop = benchmark.by_loop(*scene, *size)
    weights = torch.rand(5, *size, generator=torch.Generator().manual_seed(1))

    def loss(rendering):
        parts = [*rendering.colour.unbind(-1), rendering.depth, rendering.alpha]
        return sum((weight * part).mean() for weight, part in zip(weights, parts, strict=True))

    for name, tolerance in (("colour", 1e-5), ("alpha", 1e-5), ("depth", 1e-4)):
        torch.testing.assert_close(getattr(ours, name), getattr(loop, name), rtol=1e-5, atol=tolerance)
    expected = torch.autograd.grad(loss(loop), scene[:5])
    for gradient, of_loop in zip(torch.autograd.grad(loss(ours), scene[:5]), expected, strict=True):
        torch.testing.assert_close(gradient, of_loop, rtol=1e-3, atol=1e-5 * of_loop.abs().max().item())


def test_gradients_are_those_of_finite_differences(benchmark):
    scene = [tensor.detach().double() for tensor in benchmark.random_scene(6, 12, seed=3)]
    weights = torch.rand(3, 12 * 12 * 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def sums(*parameters):
        seen = rasterise(*parameters, scene[6], 12, 12, chunk_size=300)
        return weights @ torch.cat([seen.colour.flatten(), seen.depth.flatten(), seen.alpha.flatten()])

    parameters = [tensor.requires_grad_() for tensor in scene[:6]]  # the pose, too
    assert torch.autograd.gradcheck(sums, parameters, atol=1e-5)


def test_depth_is_z_of_the_one_gaussian_and_colour_is_alpha_times_its_own():
    seen = rasterise(*one_gaussian(z=5.0, opacity=0.8), 21, 21)
    assert seen.alpha[10, 10] == pytest.approx(0.8)
    torch.testing.assert_close(seen.depth[seen.alpha > 0], torch.full((int((seen.alpha > 0).sum()),), 5.0))
    torch.testing.assert_close(seen.colour, seen.alpha[..., None] * torch.tensor([0.2, 0.4, 0.6]))
    assert seen.alpha[0, 0] == 0  # and there the depth is 0
    assert seen.depth[0, 0] == 0


def test_alpha_falls_as_the_projected_covariance_says():
    # 20 / 5 pixels a unit: a deviation of 0.5 is 2 pixels, 0.3 square pixels are added
    seen = rasterise(*one_gaussian(z=5.0, opacity=0.8, scale=0.5), 21, 21)
    expected = 0.8 * torch.exp(torch.tensor(-0.5 * 9 / (4 + 0.3)))
    assert seen.alpha[10, 13].item() == pytest.approx(expected.item(), rel=1e-5)
    assert seen.alpha[13, 10].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_nearer_gaussian_covers_the_farther_whatever_their_order():
    near, far = one_gaussian(z=2.0, opacity=0.9), one_gaussian(z=6.0, opacity=0.5)
    both = [torch.cat([b, a]) for a, b in zip(near[:5], far[:5], strict=True)]
    seen = rasterise(*both, *near[5:], 21, 21)
    alpha = 0.9 + 0.1 * 0.5
    assert seen.alpha[10, 10] == pytest.approx(alpha)
    assert seen.depth[10, 10] == pytest.approx((0.9 * 2 + 0.05 * 6) / alpha)


def test_what_is_behind_the_camera_or_outside_is_not_seen():
    behind = one_gaussian(z=-5.0)
    outside = one_gaussian(z=5.0)
    outside[0] = torch.tensor([[100.0, 0, 5]])
    for scene in (behind, outside):
        seen = rasterise(*scene, 21, 21)
        assert seen.alpha.abs().max() == 0
        assert seen.colour.abs().max() == 0


def test_a_gaussian_moves_with_the_camera():
    scene = one_gaussian()
    moved = one_gaussian()
    moved[0], moved[5] = moved[0] + torch.tensor([1.0, 2, 3]), torch.eye(4)
    moved[5][:3, 3] = torch.tensor([-1.0, -2, -3])
    torch.testing.assert_close(rasterise(*scene, 21, 21).colour, rasterise(*moved, 21, 21).colour)


def test_bad_arguments_are_named():
    scene = one_gaussian()
    with pytest.raises(ValueError, match="height=0: expected a positive integer"):
        rasterise(*scene, 0, 21)
    with pytest.raises(ValueError, match="backend='cuda'"):
        rasterise(*scene, 21, 21, backend="cuda")
    with pytest.raises(ValueError, match="for one N"):
        rasterise(scene[0], scene[1][:0], *scene[2:], 21, 21)


def test_gsplat_gives_the_same_image(benchmark):
    pytest.importorskip("gsplat", reason="needs gsplat, which is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device for gsplat")
    scene = [tensor.detach().cuda() for tensor in benchmark.random_scene(500, 64)]
    ours, theirs = (rasterise(*scene, 64, 64, backend=backend) for backend in ("torch", "gsplat"))
    torch.testing.assert_close(theirs.colour, ours.colour, rtol=0, atol=0.02)
    torch.testing.assert_close(theirs.alpha, ours.alpha, rtol=0, atol=0.02)
