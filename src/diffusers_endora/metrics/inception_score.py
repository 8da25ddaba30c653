"""The inception score."""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from .frechet_distance import check_features


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over splits."""

    mean: float
    std: float
    num_splits: int


def inception_score(logits: np.ndarray, num_splits: int = 10) -> InceptionScore:
    """`exp(mean KL(p(y|x) || p(y)))`, in 10 contiguous splits of the images in the order given.

    Salimans et al., "Improved techniques for training GANs" (arXiv 1606.03498). As there and in StyleGAN's evaluation
    the images are not shuffled (torchmetrics shuffles), and logits are those without the last layer's bias. Frames of
    one clip look alike, so a split holds whole clips where their number allows.

    Args:
        logits: `(N, classes)`.

    Raises:
        ValueError: there are fewer images than splits, or logits are not as described.
    """
    check_features(logits, "logits")
    if len(logits) < num_splits:
        raise ValueError(f"{len(logits)} images: the inception score needs {num_splits} or more, one per split")
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    scores = []
    for split in np.array_split(log_p, num_splits):
        p = np.exp(split)
        log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (split - log_marginal)).sum(axis=1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), num_splits)
