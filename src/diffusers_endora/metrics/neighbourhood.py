"""Distances to nearest neighbours in feature space: precision and recall, density and coverage, nearest clips."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

from .frechet_distance import check_features


@dataclass(frozen=True)
class Manifold:
    """Four views of the overlap of generated and real features; all are better when higher.

    Attributes:
        precision: generated rows within the neighbourhood of a real one, as a fraction.
        recall: real rows within the neighbourhood of a generated one, as a fraction.
        density: neighbourhoods of real rows that a generated row lies in, on average, over k; may exceed 1.
        coverage: real rows with a generated one in their neighbourhood, as a fraction.
        num_neighbours: k of precision and recall, and of density and coverage.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    num_neighbours: tuple[int, int]


def precision_recall_density_coverage(
    real: np.ndarray, fake: np.ndarray, num_neighbours: tuple[int, int] = (3, 5)
) -> Manifold:
    """Precision and recall (Kynkaanniemi et al., arXiv 1904.06991, k = 3), density and coverage (Naeem et al.,
    arXiv 2002.09797, k = 5). A neighbourhood is the ball around a row through its k-th nearest other row.

    Args:
        real, fake: features `(N, width)` and `(M, width)`.

    Raises:
        ValueError: features are not as described, or a side has no more rows than k.
    """
    check_features(real, "features")
    check_features(fake, "features", width=real.shape[1])
    if min(len(real), len(fake)) <= max(num_neighbours):
        raise ValueError(
            f"{min(len(real), len(fake))} rows of features: neighbourhoods need more than {max(num_neighbours)}"
        )
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    few, many = num_neighbours
    real_few, real_many, fake_few = _radii(real, few), _radii(real, many), _radii(fake, few)
    num_precise = num_balls = first = 0
    is_recalled, is_covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for distances in pairwise_distances_chunked(fake, real, working_memory=256):  # (some generated rows, real rows)
        num_precise += int((distances <= real_few).any(axis=1).sum())
        num_balls += int((distances <= real_many).sum())
        is_covered |= (distances <= real_many).any(axis=0)
        is_recalled |= (distances <= fake_few[first : first + len(distances), None]).any(axis=0)
        first += len(distances)
    return Manifold(
        precision=num_precise / len(fake),
        recall=float(is_recalled.mean()),
        density=num_balls / (many * len(fake)),
        coverage=float(is_covered.mean()),
        num_neighbours=num_neighbours,
    )


def jackknife_manifold(
    real: np.ndarray, fake: np.ndarray, seed: int = 0, num_halves: int = 20
) -> dict[str, dict[str, object]]:
    """The spread of each number of `precision_recall_density_coverage`, by the delete-half jackknife.

    Resampling with replacement would put rows into their own neighbourhoods; halves drawn without it do not, and the
    standard deviation over them estimates that of the whole (Shao and Wu, "A general theory for jackknife variance
    estimation", 1989).

    Returns:
        Name -> `{"kind", "std"}`; empty where half a side is too small for the neighbourhoods.
    """
    if min(len(real), len(fake)) // 2 <= 5:
        return {}
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(num_halves):
        real_half, fake_half = (of[rng.permutation(len(of))[: len(of) // 2]] for of in (real, fake))
        drawn.append(precision_recall_density_coverage(real_half, fake_half))
    return {
        part: {
            "kind": f"{num_halves} random halves",
            "std": float(np.std([getattr(of, part) for of in drawn], ddof=1)),
        }
        for part in ("precision", "recall", "density", "coverage")
    }


def nearest(queries: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each query the Euclidean distance to the nearest reference, and the number of that reference.

    Args:
        queries, references: features `(N, width)` and `(M, width)`.

    Returns:
        float64 `(N,)` and int64 `(N,)`.

    Raises:
        ValueError: features are not as described.
    """
    check_features(references, "features")
    check_features(queries, "features", width=references.shape[1])
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(references.astype(np.float64))
    distances, indices = search.kneighbors(queries.astype(np.float64))
    return distances[:, 0], indices[:, 0]


def _radii(features: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Distance of each row to its k-th nearest other row, `(N,)`."""
    search = NearestNeighbors(n_neighbors=num_neighbours, algorithm="brute").fit(features)
    return search.kneighbors()[0][:, -1]  # without a query, rows are not their own neighbours
