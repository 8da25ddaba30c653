"""Which training videos are labelled, which are for validation, and which are left. The test set is no part of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Splits:
    """Numbers of training videos, ascending; no video is in two parts.

    Attributes:
        labelled: half of each class.
        validation: chooses model and threshold; its labels are used for that alone.
        rest: neither; their labels are not used.
    """

    labelled: list[int]
    validation: list[int]
    rest: list[int]


def draw_splits(
    labels: Sequence[int] | np.ndarray,
    num_labelled: int,
    validation_fraction: float,
    seed: int,
    first_of_class: bool = False,
) -> Splits:
    """Draws the labelled and the validation videos among the training videos.

    The labelled set has equally many of both classes. The validation part has the classes as the corpus has them; it
    is drawn from what is not labelled.

    Args:
        labels: `(N,)` of the training videos, 1 for positive.
        num_labelled: even.
        validation_fraction: of all training videos, in (0, 1).
        seed: non-negative.
        first_of_class: take the first of each class in the order of the corpus instead of drawing them, as the
            official Endora code does (`Downstream-Semi/datasets/ucf101.py`: the first 20 of each class of PolypDiag's
            `train.txt`). The validation part is drawn all the same.

    Raises:
        ValueError: a class is absent or has too few videos, or a number is not as described.
    """
    labels = np.asarray(labels)
    if num_labelled < 2 or num_labelled % 2:
        raise ValueError(f"num_labelled={num_labelled}: expected an even number, half for each class.")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}: expected a number between 0 and 1.")
    rng = np.random.default_rng((seed, 0))
    labelled: list[int] = []
    validation: list[int] = []
    rest: list[int] = []
    for label, name in enumerate(("negative", "positive")):
        videos = np.flatnonzero(labels == label)
        if not len(videos):
            raise ValueError(f"the training videos have no {name} one: expected {num_labelled // 2} to be labelled.")
        num_validation = max(1, round(validation_fraction * len(videos)))
        if num_labelled // 2 + num_validation > len(videos):
            raise ValueError(
                f"the training videos have {len(videos)} {name} ones: {num_labelled // 2} to be labelled and "
                f"{num_validation} for validation are too many."
            )
        order = rng.permutation(videos)
        if first_of_class:
            order = np.concatenate([videos[: num_labelled // 2], order[~np.isin(order, videos[: num_labelled // 2])]])
        parts = np.split(order, [num_labelled // 2, num_labelled // 2 + num_validation])
        for chosen, part in zip((labelled, validation, rest), parts, strict=True):
            chosen += part.tolist()
    return Splits(sorted(labelled), sorted(validation), sorted(rest))
