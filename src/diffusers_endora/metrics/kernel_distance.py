"""Kernel distances between features: KID with Inception features, KVD with those of I3D."""

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.image.kid import poly_mmd

from .frechet_distance import check_features


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the squared maximum mean discrepancy over subsets."""

    mean: float
    std: float
    num_subsets: int
    subset_size: int


def kernel_distance(
    x: np.ndarray, y: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Unbiased squared MMD with the kernel `(x.y / width + 1)^3`, over random subsets.

    Binkowski et al., "Demystifying MMD GANs" (arXiv 1801.01401); the value of a pair of subsets is torchmetrics'.

    Args:
        x, y: features `(N, width)` and `(M, width)`.
        subset_size: or half of the smaller side where that is less, so that subsets differ.

    Raises:
        ValueError: features are not as described, or a side has fewer than 4 rows.
    """
    check_features(x, "features")
    check_features(y, "features", width=x.shape[1])
    if min(len(x), len(y)) < 4:
        raise ValueError(f"{min(len(x), len(y))} rows of features: a kernel distance needs 4 or more")
    size = min(subset_size, min(len(x), len(y)) // 2)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        first, second = (torch.from_numpy(of[rng.choice(len(of), size, replace=False)]).double() for of in (x, y))
        values.append(float(poly_mmd(first, second)))
    return KernelDistance(float(np.mean(values)), float(np.std(values, ddof=1)), num_subsets, size)
