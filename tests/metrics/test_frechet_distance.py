"""The Frechet distance against closed forms and scipy, its streams, its spread and its extrapolation."""

import warnings

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy.linalg import sqrtm

from diffusers_endora.metrics.frechet_distance import (
    Moments,
    RankDeficientWarning,
    Spread,
    bootstrap_frechet_difference,
    bootstrap_frechet_distance,
    frechet_distance,
    frechet_distance_infinity,
    frechet_distance_of_features,
)


def features(num_rows: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(100 + seed).standard_normal((width, width)) / np.sqrt(width) + np.eye(width)
    return (rng.standard_normal((num_rows, width)) @ mix + shift).astype(np.float32)


def reference(x: np.ndarray, y: np.ndarray, ddof: int = 1) -> float:
    """As the formula is written."""
    first, second = (np.cov(of.astype(np.float64), rowvar=False, ddof=ddof) for of in (x, y))
    root = sqrtm(first @ second)
    difference = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    return float(difference @ difference + np.trace(first + second - 2 * root.real))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_agrees_with_sqrtm(width, ddof):
    x, y = features(500, width, 0), features(400, width, 1, shift=0.3)
    expected = (
        reference(x, y, ddof)
        if width > 1
        else (x.mean(dtype=float) - y.mean(dtype=float)) ** 2
        + (x.std(dtype=float, ddof=ddof) - y.std(dtype=float, ddof=ddof)) ** 2
    )
    assert frechet_distance(Moments.of(x), Moments.of(y), ddof) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_of_features(x, y, ddof) == pytest.approx(expected, rel=1e-6)


def test_closed_form_of_known_moments():
    x, y = Moments(3), Moments(3)
    x.count = y.count = 101
    x.mean, y.mean = np.array([1.0, 2, 3]), np.array([0.0, 0, 3])
    x.scatter, y.scatter = 100 * np.diag([1.0, 4, 9]), 100 * np.diag([4.0, 16, 9])
    assert frechet_distance(x, y) == pytest.approx(5 + 1 + 4 + 0, rel=1e-12)


def test_is_symmetric_and_zero_for_the_same():
    x, y = Moments.of(features(300, 20, 0)), Moments.of(features(300, 20, 1))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_rank_deficient_is_finite_exact_and_said():
    x, y = features(20, 64, 0), features(30, 64, 1, shift=0.5)
    with pytest.warns(RankDeficientWarning, match="20 rows of features of width 64"):
        streamed = frechet_distance(Moments.of(x), Moments.of(y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        direct = frechet_distance_of_features(x, y)
    assert streamed == pytest.approx(direct, rel=1e-9)
    # Embedded in more dimensions, the distance of well-conditioned features stays what it is
    wide = [np.pad(of, ((0, 0), (0, 40))) for of in (features(200, 8, 0), features(200, 8, 1))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert frechet_distance(*(Moments.of(of) for of in wide)) == pytest.approx(
            reference(wide[0][:, :8], wide[1][:, :8]), rel=1e-6
        )


def test_streams_merge_to_the_whole(tmp_path):
    x = features(1000, 16, 0) + 1e3  # a mean far from zero cancels in naive sums
    whole = Moments.of(x)
    parts = [Moments(16) for _ in range(3)]
    for i, rows in enumerate(np.array_split(x, 17)):
        parts[i % 3].update(rows)
    parts[1].save(tmp_path / "part.safetensors")
    merged = Moments.load(tmp_path / "part.safetensors")
    merged.merge(parts[2])
    merged.merge(Moments(16))
    merged.merge(parts[0])
    assert merged.count == 1000
    np.testing.assert_allclose(merged.mean, x.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged.covariance(), np.cov(x.astype(np.float64), rowvar=False), rtol=0, atol=1e-11)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=0, atol=1e-8)


def test_bootstrap_is_about_as_wide_as_fresh_samples():
    fresh = [
        frechet_distance_of_features(
            np.random.default_rng((1, i)).standard_normal((300, 8)),
            np.random.default_rng((2, i)).standard_normal((300, 8)) * 1.5,
        )
        for i in range(200)
    ]
    x = np.random.default_rng((1, 0)).standard_normal((300, 1, 8))
    y = np.random.default_rng((2, 0)).standard_normal((300, 1, 8)) * 1.5
    spread = bootstrap_frechet_distance(x, y, num_resamples=100)
    assert 0.6 < spread.std / np.std(fresh) < 1.6
    assert spread.low < frechet_distance_of_features(x[:, 0], y[:, 0]) < spread.high
    assert spread == bootstrap_frechet_distance(x, y, num_resamples=100)
    assert spread != bootstrap_frechet_distance(x, y, num_resamples=100, seed=1)


def test_bootstrap_draws_whole_clips():
    """Sixteen equal rows of a clip are no more evidence than one, so the spread is that of single rows."""
    x, y = features(100, 4, 0)[:, None], features(100, 4, 1)[:, None]
    single = bootstrap_frechet_distance(x, y, ddof=0)
    repeated = bootstrap_frechet_distance(x.repeat(16, axis=1), y.repeat(16, axis=1), ddof=0)
    assert repeated.std == pytest.approx(single.std, rel=1e-5)


def test_difference_of_pairs_is_surer_than_of_strangers():
    real, y = features(200, 4, 0)[:, None], features(200, 4, 1)[:, None]
    near = y + 0.01 * features(200, 4, 2)[:, None]
    value, paired = bootstrap_frechet_difference(near, y, real)
    distances = [frechet_distance_of_features(of[:, 0], real[:, 0]) for of in (near, y)]
    assert value == pytest.approx(distances[0] - distances[1])
    _, of_strangers = bootstrap_frechet_difference(features(200, 4, 3)[:, None], y, real)
    assert paired.std < of_strangers.std / 5
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * paired.std)
    assert bootstrap_frechet_difference(y, y, real) == (0, Spread(0.0, 0.0, 0.0, 200))
    with pytest.raises(ValueError, match="expected equal shapes"):
        bootstrap_frechet_difference(y[:-1], y, real)


def test_extrapolation_is_nearer_the_truth():
    """Two samples of one distribution: the true distance is 0, and what is measured is bias."""
    x, y = (np.random.default_rng(seed).standard_normal((600, 1, 30)) for seed in (0, 1))
    plain = frechet_distance_of_features(x[:, 0], y[:, 0])
    extrapolated = frechet_distance_infinity(x, y)
    assert abs(extrapolated.value) < 0.25 * plain
    assert extrapolated.standard_error < plain
    assert extrapolated.reason is None
    assert len(extrapolated.sizes) == len(extrapolated.values) == 15
    assert extrapolated.sizes[-1] == 600
    assert extrapolated.values[-1] == pytest.approx(plain, rel=1e-9)
    assert np.all(np.diff(extrapolated.values) < 0)


def test_extrapolation_from_too_few_says_so():
    x = np.random.default_rng(0).standard_normal((40, 1, 64))
    assert "means little" in frechet_distance_infinity(x, x[::-1] + 1).reason
    few = frechet_distance_infinity(x[:20], x[20:])
    assert few.value is None
    assert "20 clips a side are too few" in few.reason


def test_bad_features():
    x = features(10, 4, 0)
    with pytest.raises(ValueError, match=r"expected the shape \(N, 4\), got \(10, 3\)"):
        frechet_distance_of_features(x, x[:, :3])
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(np.where(x > 2, np.nan, x) * np.inf)
    with pytest.raises(ValueError, match="1 rows of features: a covariance needs 2 or more"):
        frechet_distance(Moments.of(x), Moments.of(x[:1]))
    with pytest.raises(ValueError, match="1 rows"):
        frechet_distance_of_features(x[:1], x)
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet_distance(Moments.of(x[:, :3]), Moments.of(x))
    with pytest.raises(ValueError, match="got \\(0, 4\\)"):
        Moments.of(x[:0])
    with pytest.raises(ValueError, match="num_resamples=1"):
        bootstrap_frechet_distance(x[:, None], x[:, None], num_resamples=1)


@pytest.mark.parametrize(("num_x", "num_y"), [(6, 6), (6, 40), (6, 500), (500, 6), (30, 500)])
def test_from_features_and_from_moments_are_the_same(num_x, num_y):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num_x, 12)), rng.normal(0.3, 1.2, size=(num_y, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)
        expected = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-9)
