"""Which videos are labelled, validated with, and left."""

import numpy as np
import pytest

from diffusers_endora.downstream.semi_supervised.splits import draw_splits

LABELS = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1] * 5)  # 35 positive, 25 negative


@pytest.mark.parametrize("first_of_class", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parts_are_disjoint_complete_and_balanced(seed, first_of_class):
    splits = draw_splits(LABELS, 20, 0.2, seed, first_of_class)
    assert sorted(splits.labelled + splits.validation + splits.rest) == list(range(60))
    assert LABELS[splits.labelled].sum() == 10
    assert len(splits.labelled) == 20
    assert LABELS[splits.validation].sum() == 7  # a fifth of 35, and of 25
    assert len(splits.validation) == 12


def test_seed_draws():
    first, again, other = (draw_splits(LABELS, 20, 0.2, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.labelled != other.labelled


def test_official_labelled_set_is_the_first_of_each_class():
    positive, negative = np.flatnonzero(LABELS == 1)[:10], np.flatnonzero(LABELS == 0)[:10]
    for seed in (0, 1):
        splits = draw_splits(LABELS, 20, 0.2, seed, first_of_class=True)
        assert splits.labelled == sorted([*positive, *negative])
    assert draw_splits(LABELS, 20, 0.2, 0, True).validation != draw_splits(LABELS, 20, 0.2, 1, True).validation


@pytest.mark.parametrize(
    ("labels", "num_labelled", "fraction", "message"),
    [
        ([1] * 9, 4, 0.2, "the training videos have no negative one: expected 2 to be labelled."),
        ([0] * 9, 4, 0.2, "the training videos have no positive one: expected 2 to be labelled."),
        ([1] * 9 + [0] * 3, 6, 0.2, "have 3 negative ones: 3 to be labelled and 1 for validation are too many."),
        ([1, 0] * 9, 5, 0.2, "num_labelled=5: expected an even number"),
        ([1, 0] * 9, 4, 1.0, "validation_fraction=1.0: expected a number between 0 and 1."),
    ],
)
def test_what_cannot_be_split_is_refused(labels, num_labelled, fraction, message):
    with pytest.raises(ValueError, match=message):
        draw_splits(labels, num_labelled, fraction, seed=0)
