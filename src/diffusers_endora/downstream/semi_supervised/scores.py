"""How well videos are told apart: scores of two classes, beside those of classifiers that look at nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

MEASURES = {
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}


@dataclass(frozen=True)
class Scores:
    """In percent, as the paper's Table 2.

    Attributes:
        f1: of the positive class.
        balanced_accuracy: mean of sensitivity and specificity.
        auroc: area under the receiver operating characteristic; 50 where all videos get the same score.
        sensitivity: share of the positive videos that are called positive.
        specificity: share of the negative videos that are called negative.
    """

    f1: float
    balanced_accuracy: float
    auroc: float
    sensitivity: float
    specificity: float

    def as_dict(self) -> dict[str, float]:
        """Measure -> percent."""
        return asdict(self)


def choose_threshold(labels: Sequence[int] | np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold of the highest balanced accuracy (Youden's index), on validation videos.

    It lies half-way between two probabilities, so that it does not rest on one of them; of several as good, it is the
    highest.

    Args:
        labels: `(N,)`, 1 for positive.
        probabilities: `(N,)` of the positive class.

    Raises:
        ValueError: one of the classes is absent.
    """
    check_both_classes(labels, "the validation part")
    false_positives, true_positives, thresholds = roc_curve(labels, probabilities, drop_intermediate=False)
    best = int(np.argmax(true_positives - false_positives))
    if not np.isfinite(thresholds[best]):  # nothing is better than calling all negative
        return float(np.nextafter(probabilities.max(), np.inf))
    below = probabilities[probabilities < thresholds[best]]
    return float((thresholds[best] + below.max()) / 2) if len(below) else float(thresholds[best])


def score(labels: Sequence[int] | np.ndarray, probabilities: np.ndarray, threshold: float) -> Scores:
    """Scores of videos that are called positive from `threshold` on.

    Args:
        labels: `(N,)`, 1 for positive.
        probabilities: `(N,)` of the positive class.

    Raises:
        ValueError: one of the classes is absent.
    """
    check_both_classes(labels, "the test set")
    counts = confusion_matrix(labels, np.asarray(probabilities) >= threshold, labels=[0, 1])
    return _of_counts(counts, 100 * float(roc_auc_score(labels, probabilities)))


def trivial_scores(labels: Sequence[int] | np.ndarray, positive_share: float) -> dict[str, Scores]:
    """Scores of classifiers that do not look at the videos.

    Args:
        labels: of the test videos, `(N,)`, 1 for positive.
        positive_share: among the training videos: how often the third one says positive, by chance.

    Returns:
        All positive, all negative, and chance by prior; the last is of the expected counts.
    """
    check_both_classes(labels, "the test set")
    num_positive = int(np.sum(labels))
    num_negative = len(labels) - num_positive
    rates = {"all positive": 1.0, "all negative": 0.0, "chance by prior": positive_share}
    return {
        name: _of_counts(
            np.array(
                [[num_negative * (1 - rate), num_negative * rate], [num_positive * (1 - rate), num_positive * rate]]
            ),
            50.0,
        )
        for name, rate in rates.items()
    }


def check_both_classes(labels: Sequence[int] | np.ndarray, where: str) -> None:
    """Raises a ValueError unless both classes are there."""
    num_positive = int(np.sum(labels))
    if num_positive in (0, len(labels)):
        only = "positive" if num_positive else "negative"
        raise ValueError(f"{where} has {len(labels)} videos and all are {only}: expected both classes.")


def _of_counts(counts: np.ndarray, auroc: float) -> Scores:
    (true_negative, false_positive), (false_negative, true_positive) = counts.astype(float)
    sensitivity = true_positive / (true_positive + false_negative)
    specificity = true_negative / (true_negative + false_positive)
    f1 = 2 * true_positive / (2 * true_positive + false_positive + false_negative)
    percent = (100 * f1, 50 * (sensitivity + specificity), auroc, 100 * sensitivity, 100 * specificity)
    return Scores(*map(float, percent))
