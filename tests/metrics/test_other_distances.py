"""Kernel distance, inception score, neighbourhoods and the memorisation audit, against obvious references."""

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from diffusers_endora.metrics.inception_score import inception_score
from diffusers_endora.metrics.kernel_distance import kernel_distance
from diffusers_endora.metrics.memorisation import audit_memorisation
from diffusers_endora.metrics.neighbourhood import jackknife_manifold, nearest, precision_recall_density_coverage


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_kernel_distance_is_the_written_formula():
    x, y = normal(0, 40, 6), normal(1, 40, 6) + 0.5

    def kernel(a, b):
        return (a @ b.T / 6 + 1) ** 3

    n = 20
    result = kernel_distance(x, y, num_subsets=400, seed=3)
    assert result.subset_size == n
    full = (
        (kernel(x, x).sum() - np.trace(kernel(x, x))) / (40 * 39)
        + (kernel(y, y).sum() - np.trace(kernel(y, y))) / (40 * 39)
        - 2 * kernel(x, y).mean()
    )
    assert result.mean == pytest.approx(full, abs=4 * result.std / np.sqrt(400))  # unbiased over subsets
    assert result == kernel_distance(x, y, num_subsets=400, seed=3)


def test_kernel_distance_agrees_with_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = normal(0, 64, 6), normal(1, 64, 6) + 0.5
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=200, subset_size=32)
    torch.manual_seed(0)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    mean, std = metric.compute()
    result = kernel_distance(x, y, num_subsets=200, subset_size=32)
    assert result.mean == pytest.approx(mean.item(), abs=6 * result.std / np.sqrt(200))
    assert result.std == pytest.approx(std.item(), rel=0.25)


def test_kernel_distance_of_one_distribution_is_about_zero():
    result = kernel_distance(normal(0, 400, 5), normal(1, 400, 5))
    assert abs(result.mean) < 2 * result.std


def test_inception_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = normal(0, 40, 12) * 3
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(torch.from_numpy(logits))
    assert inception_score(logits, num_splits=1).mean == pytest.approx(metric.compute()[0].item(), rel=1e-6)


def test_inception_score_of_known_predictions():
    certain = np.eye(10).repeat(2, axis=0)[np.arange(20) % 20] * 1e4  # one class an image, all classes equally often
    assert inception_score(certain, num_splits=1).mean == pytest.approx(10)
    assert inception_score(np.zeros((20, 10))).mean == pytest.approx(1)
    split = inception_score(certain, num_splits=10)  # contiguous: both images of a split have the same class
    assert (split.mean, split.std) == (pytest.approx(1), pytest.approx(0))


def test_neighbourhoods_are_as_defined():
    real, fake = normal(0, 60, 4), normal(1, 70, 4) * 0.8 + 0.7

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radius(a, k):
        return np.sort(distances(a, a), axis=1)[:, k]  # column 0 is the row itself

    between = distances(fake, real)
    result = precision_recall_density_coverage(real, fake)
    assert result.precision == (between <= radius(real, 3)).any(1).mean()
    assert result.recall == (between <= radius(fake, 3)[:, None]).any(0).mean()
    assert result.density == pytest.approx((between <= radius(real, 5)).sum() / (5 * 70))
    assert result.coverage == (between <= radius(real, 5)).any(0).mean()
    assert 0 < result.recall < 1
    assert 0 < result.precision < 1
    np.testing.assert_allclose(nearest(fake, real)[0], between.min(1), rtol=1e-6)
    np.testing.assert_array_equal(nearest(fake, real)[1], between.argmin(1))


def test_same_distribution_overlaps_and_far_ones_do_not():
    near = precision_recall_density_coverage(normal(0, 500, 3), normal(1, 500, 3))
    assert min(near.precision, near.recall, near.coverage) > 0.9
    assert near.density == pytest.approx(1, abs=0.1)
    far = precision_recall_density_coverage(normal(0, 500, 3), normal(1, 500, 3) + 50)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_a_copying_model_is_found_and_an_honest_one_is_not():
    train, held_out, fresh = normal(0, 300, 8), normal(1, 300, 8), normal(2, 300, 8)
    honest = audit_memorisation(fresh, train, held_out)
    assert honest.fraction_low <= honest.expected <= honest.fraction_high
    copies = fresh.copy()
    copies[::10] = train[:30] + 1e-3
    copying = audit_memorisation(copies, train, held_out)
    assert copying.fraction >= 0.1
    assert copying.fraction_low > copying.expected
    assert [(i, j) for _, i, j in copying.closest] == [
        pair for pair in ((i, j) for _, i, j in copying.closest) if pair[0] == 10 * pair[1]
    ]
    assert len({j for _, _, j in copying.closest}) == 8


def test_bad_features():
    x = normal(0, 10, 4)
    with pytest.raises(ValueError, match="3 rows of features: a kernel distance needs 4"):
        kernel_distance(x[:3], x)
    with pytest.raises(ValueError, match="5 rows of features: neighbourhoods need more than 5"):
        precision_recall_density_coverage(x, x[:5])
    with pytest.raises(ValueError, match="9 images: the inception score needs 10"):
        inception_score(x[:9])
    for function in (kernel_distance, precision_recall_density_coverage, nearest):
        with pytest.raises(ValueError, match="not finite"):
            function(x, x * np.nan)
        with pytest.raises(ValueError, match=r"expected the shape \(N, "):
            function(x, x[:, :2])


def test_the_spread_of_coverage_is_that_of_repeated_samples():
    rng = np.random.default_rng(0)

    def sample():
        return rng.normal(size=(200, 3)), rng.normal(0.5, 1, size=(200, 3))

    repeated = np.std([precision_recall_density_coverage(*sample()).coverage for _ in range(60)], ddof=1)
    claimed = np.mean([jackknife_manifold(*sample(), seed=i)["coverage"]["std"] for i in range(8)])
    assert 0.6 < claimed / repeated < 1.7
    assert jackknife_manifold(*(of[:11] for of in sample())) == {}
