"""Does a model give back its training clips? A comparison of distances to the nearest training clip.

After the tests of data copying in feature space (Meehan et al., "A non-parametric test to detect data-copying in
generative models", AISTATS 2020, arXiv 2004.05675), with a quantile in place of their rank test: of held-out real
clips, one in a hundred lies nearer to its nearest training clip than the 1st percentile of these distances; of the
clips of a model that copies, more do.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from .neighbourhood import nearest


@dataclass(frozen=True)
class Memorisation:
    """The outcome of an audit.

    Attributes:
        percentile: of the held-out distances that is the threshold.
        threshold: Euclidean distance in feature space.
        fraction: of generated clips that are nearer to a training clip than the threshold.
        fraction_low, fraction_high: its 95 % interval (Clopper and Pearson).
        expected: the fraction for a model that is no nearer than held-out clips.
        closest: the nearest pairs, as (distance, number of the generated clip, number of the training clip).
    """

    percentile: float
    threshold: float
    fraction: float
    fraction_low: float
    fraction_high: float
    expected: float
    num_generated: int
    num_train: int
    num_held_out: int
    closest: tuple[tuple[float, int, int], ...]


def audit_memorisation(
    generated: np.ndarray, train: np.ndarray, held_out: np.ndarray, percentile: float = 1.0, num_closest: int = 8
) -> Memorisation:
    """Compares how near generated and held-out clips come to training clips.

    Args:
        generated, train, held_out: features `(N, width)`. Where training mirrors clips, `train` holds both.
        num_closest: how many of the nearest pairs are returned, each training clip once.

    Raises:
        ValueError: a set is empty or has other widths.
    """
    distances, indices = nearest(generated, train)
    threshold = float(np.percentile(nearest(held_out, train)[0], percentile))
    num_nearer = int((distances < threshold).sum())
    interval = binomtest(num_nearer, len(generated)).proportion_ci(0.95)
    closest: dict[int, tuple[float, int, int]] = {}
    for i in np.argsort(distances, kind="stable").tolist():
        closest.setdefault(int(indices[i]), (float(distances[i]), i, int(indices[i])))
        if len(closest) == num_closest:
            break
    return Memorisation(
        percentile=percentile,
        threshold=threshold,
        fraction=num_nearer / len(generated),
        fraction_low=float(interval.low),
        fraction_high=float(interval.high),
        expected=percentile / 100,
        num_generated=len(generated),
        num_train=len(train),
        num_held_out=len(held_out),
        closest=tuple(closest.values()),
    )
