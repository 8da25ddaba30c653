"""Scores against counts by hand."""

import numpy as np
import pytest

from diffusers_endora.downstream.semi_supervised.scores import choose_threshold, score, trivial_scores

POLYPDIAG = [1] * 60 + [0] * 20  # its test videos: 60 abnormal, 20 normal


def test_scores_by_hand():
    labels = [1, 1, 1, 0, 0]
    probabilities = np.array([0.9, 0.8, 0.2, 0.7, 0.1])
    scores = score(labels, probabilities, threshold=0.5)
    # 2 of 3 found, 1 of 2 negatives called positive; of 6 pairs 0.9, 0.8 > 0.7 and 0.1, 0.2 > 0.1 alone: 5 in order
    assert scores.sensitivity == pytest.approx(200 / 3)
    assert scores.specificity == pytest.approx(50)
    assert scores.balanced_accuracy == pytest.approx((200 / 3 + 50) / 2)
    assert scores.f1 == pytest.approx(100 * 4 / 6)
    assert scores.auroc == pytest.approx(500 / 6)


def test_all_abnormal_scores_85_7_on_polypdiag():
    trivial = trivial_scores(POLYPDIAG, positive_share=102 / 173)
    assert round(trivial["all positive"].f1, 1) == 85.7
    assert trivial["all positive"].balanced_accuracy == 50
    assert trivial["all positive"].specificity == 0
    assert trivial["all negative"].f1 == 0
    assert trivial["all negative"].sensitivity == 0
    chance = trivial["chance by prior"]
    assert chance.balanced_accuracy == pytest.approx(50)
    assert chance.sensitivity == pytest.approx(100 * 102 / 173)
    # 60 p found, 20 p wrongly called positive, 60 (1 - p) missed
    p = 102 / 173
    assert chance.f1 == pytest.approx(100 * 120 * p / (120 * p + 20 * p + 60 * (1 - p)))
    assert {scores.auroc for scores in trivial.values()} == {50}
    constant = score(POLYPDIAG, np.full(80, 0.5), threshold=0.5)
    assert constant == trivial["all positive"]


def test_threshold_is_half_way_at_the_best_balanced_accuracy():
    labels = np.array([0, 0, 0, 1, 1])
    probabilities = np.array([0.1, 0.3, 0.7, 0.6, 0.9])
    # from 0.6 on: 2 of 2 found, 2 of 3 refused, which is the best; half-way to 0.3
    threshold = choose_threshold(labels, probabilities)
    assert threshold == pytest.approx(0.45)
    assert score(labels, probabilities, threshold).balanced_accuracy == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_threshold_of_a_classifier_that_is_worse_than_none():
    threshold = choose_threshold([1, 0], np.array([0.2, 0.8]))
    assert score([1, 0], np.array([0.2, 0.8]), threshold).balanced_accuracy == 50


@pytest.mark.parametrize("labels", [[1, 1], [0, 0]])
def test_one_class_alone_is_refused(labels):
    which = "positive" if labels[0] else "negative"
    with pytest.raises(ValueError, match=f"the test set has 2 videos and all are {which}: expected both classes."):
        score(labels, np.array([0.1, 0.2]), 0.5)
    with pytest.raises(ValueError, match="the validation part has 2 videos"):
        choose_threshold(labels, np.array([0.1, 0.2]))
