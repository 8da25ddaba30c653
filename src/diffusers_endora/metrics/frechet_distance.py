"""The Frechet distance between features, what it is uncertain by, and where it tends with more clips.

`d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` for means m and covariances S (Dowson and Landau, 1982); FVD, FID
and their kin are this with the features of different networks (Heusel et al., arXiv 1706.08500; Unterthiner et al.,
arXiv 1812.01717).
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy.stats import linregress

from ..files import written_atomically

_ROWS_AT_A_TIME = 4096


class RankDeficientWarning(UserWarning):
    """There are fewer rows of features than dimensions: the distance is finite, but a covariance is not estimated."""


class Moments:
    """Mean and scatter of features, streamed in float64: memory does not grow with the number of rows.

    Kept are deviations from the running mean, so that nothing cancels (Chan, Golub and LeVeque, "Updating formulae and
    a pairwise algorithm for computing sample variances", 1979). Moments of parts merge to those of the whole.

    Attributes:
        count: rows seen.
        mean: `(width,)`.
        scatter: `(width, width)`, the sum of outer products of the deviations from the mean.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Moments of features `(N, width)`."""
        check_features(features, "features")
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: np.ndarray) -> None:
        """Adds features `(N, width)`.

        Raises:
            ValueError: they have another width or are not finite.
        """
        check_features(features, "features", width=len(self.mean))
        for first in range(0, len(features), _ROWS_AT_A_TIME):
            rows = features[first : first + _ROWS_AT_A_TIME].astype(np.float64)
            mean = rows.mean(axis=0)
            self._add(len(rows), mean, _gram(rows - mean))

    def merge(self, other: "Moments") -> None:
        """Adds what another stream has seen.

        Raises:
            ValueError: it has another width.
        """
        if len(other.mean) != len(self.mean):
            raise ValueError(f"moments of width {len(other.mean)}: expected {len(self.mean)}")
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.scatter = self.scatter + scatter + np.outer(difference, difference) * (self.count * count / total)
        self.count = total

    def covariance(self, ddof: int = 1) -> np.ndarray:
        """`(width, width)`: the scatter over `count - ddof`. 1 is unbiased, 0 what the official evaluation does.

        Raises:
            ValueError: there are fewer than 2 rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} rows of features: a covariance needs 2 or more")
        return self.scatter / (self.count - ddof)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file."""
        with written_atomically(Path(path)) as temporary:
            save_file({"count": np.array([self.count]), "mean": self.mean, "scatter": self.scatter}, temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Moments":
        """Reads what `save` wrote."""
        tensors = load_file(path)
        moments = cls(len(tensors["mean"]))
        moments.count, moments.mean, moments.scatter = int(tensors["count"][0]), tensors["mean"], tensors["scatter"]
        return moments


def frechet_distance(x: Moments, y: Moments, ddof: int = 1) -> float:
    """The (squared) Frechet distance between two sets of features.

    The trace of the root comes from eigenvalues of a symmetric matrix: with `S1 = L L'`, `S1 S2` and `L' S2 L` have
    the same. Where a covariance has not full rank, factors of both are taken from their eigenvectors instead, and the
    trace is the sum of the singular values of `A1' A2`.

    Args:
        ddof: see `Moments.covariance`.

    Raises:
        ValueError: a side has fewer than 2 rows, or the widths differ.

    Warns:
        RankDeficientWarning: a side has no more rows than features have dimensions.
    """
    if len(x.mean) != len(y.mean):
        raise ValueError(f"features of width {len(x.mean)} and {len(y.mean)}: expected the same")
    first, second = (torch.from_numpy(moments.covariance(ddof)) for moments in (x, y))
    is_deficient = min(x.count, y.count) <= len(x.mean)
    if is_deficient:
        warnings.warn(
            f"{min(x.count, y.count)} rows of features of width {len(x.mean)}: the covariance has not full rank, and "
            "the distance can be compared only with others at exactly the same N.",
            RankDeficientWarning,
            stacklevel=2,
        )
    trace_of_root = _trace_of_root(first, second, is_deficient)
    return _distance(x.mean - y.mean, first.trace() + second.trace(), trace_of_root)


def frechet_distance_of_features(x: np.ndarray, y: np.ndarray, ddof: int = 1) -> float:
    """The same from features `(N, width)` and `(M, width)`; without a covariance where there are few rows.

    Then the trace of the root is the sum of the singular values of the product of the centred features, which is also
    exact. No warning is given.

    Raises:
        ValueError: a side has fewer than 2 rows, the widths differ, or features are not finite.
    """
    check_features(x, "features")
    check_features(y, "features", width=x.shape[1])
    return _weighted_distance(x, np.ones(len(x)), y, np.ones(len(y)), ddof)


def _weighted_distance(x: np.ndarray, x_weights: np.ndarray, y: np.ndarray, y_weights: np.ndarray, ddof: int) -> float:
    """Frechet distance where row `i` counts `weights[i]` times."""
    for weights in (x_weights, y_weights):
        if weights.sum() < 2:
            raise ValueError(f"{weights.sum():.0f} rows of features: a covariance needs 2 or more")
    sides = [_WeightedRows(x, x_weights, ddof), _WeightedRows(y, y_weights, ddof)]
    means = [side.mean() for side in sides]
    numbers = sorted(len(side.rows) for side in sides)
    is_deficient = numbers[0] <= x.shape[1]
    if is_deficient and numbers[1] <= 4 * x.shape[1]:
        factors = [side.factor(mean) for side, mean in zip(sides, means, strict=True)]
        trace = sum(factor.square().sum() for factor in factors)
        root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    else:
        first, second = (side.covariance(mean) for side, mean in zip(sides, means, strict=True))
        trace = first.trace() + second.trace()
        root = _trace_of_root(first, second, is_deficient)
    return _distance((means[0] - means[1]).numpy(), trace, root)


class _WeightedRows:
    """Rows of features with how often each counts, made double a few at a time."""

    def __init__(self, features: np.ndarray, weights: np.ndarray, ddof: int):
        self.features = features
        self.rows = np.flatnonzero(weights)
        self.weights = torch.from_numpy(weights[self.rows])[:, None]
        self.ddof = ddof

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, len(self.rows), _ROWS_AT_A_TIME):
            part = slice(first, first + _ROWS_AT_A_TIME)
            yield torch.from_numpy(self.features[self.rows[part]].astype(np.float64)), self.weights[part]

    def mean(self) -> torch.Tensor:
        total = torch.stack([(rows * weights).sum(0) for rows, weights in self.chunks()]).sum(0)
        return total / self.weights.sum()

    def factor(self, mean: torch.Tensor) -> torch.Tensor:
        """A with `A' A` the covariance, a row per row."""
        scaled = [(rows - mean) * weights.sqrt() for rows, weights in self.chunks()]
        return torch.cat(scaled) / (self.weights.sum() - self.ddof).sqrt()

    def covariance(self, mean: torch.Tensor) -> torch.Tensor:
        scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for rows, weights in self.chunks():
            scaled = (rows - mean) * weights.sqrt()
            scatter.addmm_(scaled.T, scaled)
        return scatter / (self.weights.sum() - self.ddof)


def _trace_of_root(first: torch.Tensor, second: torch.Tensor, is_deficient: bool) -> torch.Tensor:
    """`tr((S1 S2)^(1/2))` of covariances."""
    lower, failed = torch.linalg.cholesky_ex(first)
    if is_deficient or failed:
        return torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
    return torch.linalg.eigvalsh(lower.T @ second @ lower).clamp(min=0).sqrt().sum()


def _distance(difference: np.ndarray, trace: torch.Tensor | float, trace_of_root: torch.Tensor) -> float:
    return max(0.0, float(difference @ difference) + float(trace) - 2 * float(trace_of_root))


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """A with `A A' = covariance`, a column per eigenvalue that is not rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _gram(rows: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(rows).T @ torch.from_numpy(rows)).numpy()


def check_features(features: np.ndarray, name: str, width: int | None = None) -> None:
    """Raises a ValueError unless features are finite, `(N, width)`, with at least one row."""
    if features.ndim != 2 or 0 in features.shape or (width is not None and features.shape[1] != width):
        raise ValueError(f"{name}: expected the shape (N, {width or 'width'}), got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: have values that are not finite (NaN or infinity)")


# --- how certain -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """How much a number would change with other clips.

    Attributes:
        std: standard deviation over the resamples.
        low, high: the 95 % interval, `value -+ 1.96 std`.
    """

    std: float
    low: float
    high: float
    num_resamples: int


def bootstrap_frechet_distance(
    x: np.ndarray, y: np.ndarray, ddof: int = 1, num_resamples: int = 50, seed: int = 0
) -> Spread:
    """Bootstrap over clips of both sides.

    A resample has fewer distinct clips than the sample and so a larger distance, whatever the truth; percentiles of
    the resamples would not even hold the value. Only their standard deviation is used, in a normal interval around the
    value (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). The interval is about the
    distance at this N; its bias against infinitely many clips is what `frechet_distance_infinity` is about.

    Args:
        x, y: features `(clips, rows of a clip, width)`; all rows of a clip are drawn together.

    Raises:
        ValueError: `num_resamples` is less than 2, or features are not as described.
    """
    if num_resamples < 2:
        raise ValueError(f"num_resamples={num_resamples}: expected 2 or more")
    flat = [features.reshape(-1, features.shape[-1]) for features in (x, y)]
    value = frechet_distance_of_features(flat[0], flat[1], ddof)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(num_resamples):
        weights = [
            np.repeat(rng.multinomial(len(of), np.full(len(of), 1 / len(of))), of.shape[1]).astype(np.float64)
            for of in (x, y)
        ]
        resampled.append(_weighted_distance(flat[0], weights[0], flat[1], weights[1], ddof))
    std = float(np.std(resampled, ddof=1))
    return Spread(std, max(0.0, value - 1.96 * std), value + 1.96 * std, num_resamples)


def bootstrap_frechet_difference(
    x: np.ndarray, y: np.ndarray, real: np.ndarray, ddof: int = 1, num_resamples: int = 200, seed: int = 0
) -> tuple[float, Spread]:
    """How much farther from `real` is `x` than `y`, clip `i` of both being made from the same noise.

    The pairs are drawn together, and the same real clips for both distances, so that what they share cancels.

    Args:
        x, y, real: features `(clips, rows of a clip, width)`, as many of `x` as of `y`.

    Returns:
        The difference of the distances, and its spread, as of `bootstrap_frechet_distance` but not cut off at 0.

    Raises:
        ValueError: numbers of clips that differ, or `num_resamples` less than 2.
    """
    if x.shape != y.shape or num_resamples < 2:
        raise ValueError(
            f"{x.shape} and {y.shape} with {num_resamples=}: expected equal shapes and 2 or more resamples"
        )
    flat_x, flat_y, flat_real = (of.reshape(-1, of.shape[-1]) for of in (x, y, real))
    value = frechet_distance_of_features(flat_x, flat_real, ddof) - frechet_distance_of_features(
        flat_y, flat_real, ddof
    )
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(num_resamples):
        drawn, drawn_real = (
            np.repeat(rng.multinomial(len(of), np.full(len(of), 1 / len(of))), of.shape[1]).astype(np.float64)
            for of in (x, real)
        )
        distances = [_weighted_distance(flat, drawn, flat_real, drawn_real, ddof) for flat in (flat_x, flat_y)]
        resampled.append(distances[0] - distances[1])
    std = float(np.std(resampled, ddof=1))
    return value, Spread(std, value - 1.96 * std, value + 1.96 * std, num_resamples)


@dataclass(frozen=True)
class Extrapolation:
    """A Frechet distance extrapolated to infinitely many clips.

    Attributes:
        value: None where there are too few clips, see `reason`.
        standard_error: of the intercept of the fit. The points share clips, so it is too small rather than too large.
        reason: why there is no value, or why it means little; else None.
        sizes: clips a side behind each point of the fit.
        values: distances at these sizes.
    """

    value: float | None
    standard_error: float | None
    reason: str | None
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def frechet_distance_infinity(
    x: np.ndarray, y: np.ndarray, ddof: int = 1, seed: int = 0, num_sizes: int = 15, repeats: int = 3
) -> Extrapolation:
    """The distance at N -> infinity, from a straight line through the distances of subsets against 1/N.

    Chong and Forsyth, "Effectively unbiased FID and inception score" (arXiv 1911.07023): 15 sizes. Here they go from a
    quarter of the clips to all, both sides are cut to the same N, and each point but the last is a mean over a few
    random subsets.

    Args:
        x, y: features `(clips, rows of a clip, width)`.
    """
    largest = min(len(x), len(y))
    if largest < 32:
        return Extrapolation(
            None, None, f"{largest} clips a side are too few to extrapolate from; 32 or more are.", (), ()
        )
    rng = np.random.default_rng(seed)
    sizes = np.linspace(largest // 4, largest, num_sizes).round().astype(int)
    values = []
    for size in sizes.tolist():
        drawn = []
        for _ in range(1 if size == len(x) == len(y) else repeats):
            parts = [of[rng.choice(len(of), size, replace=False)].reshape(-1, of.shape[-1]) for of in (x, y)]
            drawn.append(frechet_distance_of_features(parts[0], parts[1], ddof))
        values.append(float(np.mean(drawn)))
    fit = linregress(1 / sizes, values)
    reason = None
    if largest * x.shape[1] <= 2 * x.shape[2]:
        reason = (
            f"{largest * x.shape[1]} rows of features of width {x.shape[2]}: the distance is not yet linear in 1/N, "
            "and the extrapolation means little."
        )
    return Extrapolation(
        float(fit.intercept), float(fit.intercept_stderr), reason, tuple(sizes.tolist()), tuple(values)
    )
