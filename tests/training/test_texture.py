import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance

from diffusers_endora.training.texture import texture_distance


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def targets():
    return torch.rand(2, 3, 64, 64, generator=seeded())


def test_it_is_a_sliced_wasserstein_distance_of_details(targets):
    pictures = torch.rand(2, 3, 64, 64, generator=seeded(1)) ** 2
    expected = []
    generator = seeded(2)
    pair = [pictures, targets]
    for side in (32, 16):
        coarse = [F.avg_pool2d(of, 2) for of in pair]
        details = [
            of - F.interpolate(small, scale_factor=2, mode="bilinear") for of, small in zip(pair, coarse, strict=True)
        ]
        filters = torch.randn(8, 3, 5, 5, generator=generator)
        filters = filters / filters.square().sum((1, 2, 3), keepdim=True).sqrt() / details[1].std()
        a, b = (F.conv2d(of, filters, padding=2) for of in details)
        corners = range(0, a.shape[-1], side)
        expected.append(
            sum(
                wasserstein_distance(
                    a[i, k, y : y + side, x : x + side].flatten(), b[i, k, y : y + side, x : x + side].flatten()
                )
                for i in range(2)
                for k in range(8)
                for y in corners
                for x in corners
            )
            / (2 * 8 * len(corners) ** 2)
        )
        pair = coarse
    distance = texture_distance(pictures, targets, seeded(2))
    assert distance.item() == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_blur_is_farther_than_the_same_texture_elsewhere(targets):
    assert texture_distance(targets, targets) == 0
    blurred = F.avg_pool2d(F.pad(targets, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    distances = [texture_distance(of, targets, seeded(1)).item() for of in (blurred, targets.roll(8, -1))]
    assert distances[0] > 5 * distances[1] > 0


def test_descending_it_restores_the_spread_of_details(targets):
    picture = (0.5 + 0.3 * (targets - 0.5)).requires_grad_()
    (gradient,) = torch.autograd.grad(texture_distance(picture, targets, seeded(1)), picture)
    details = picture - F.interpolate(F.avg_pool2d(picture, 2), scale_factor=2, mode="bilinear")
    assert (gradient * details).sum() < 0


def test_sides_that_do_not_divide(targets):
    with pytest.raises(ValueError, match=r"pictures of \(64, 40\) pixels: expected multiples of 32"):
        texture_distance(targets[..., :40], targets[..., :40])
