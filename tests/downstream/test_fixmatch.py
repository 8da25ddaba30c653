"""FixMatch's objective against computation by hand."""

import math

import pytest
import torch

from diffusers_endora.downstream.semi_supervised.fixmatch import align_distribution, cosine_decay, fixmatch_loss
from diffusers_endora.downstream.semi_supervised.trainer import RecentPredictions, TrainingSettings, step_loss


def logits(*probabilities: float) -> torch.Tensor:
    """Two-class logits whose softmax gives these probabilities of the second class."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([(1 - p).log(), p.log()], dim=1)


LABELLED, LABELS = logits(0.75, 0.5), torch.tensor([1, 0])
WEAK = torch.tensor([[0.02, 0.98], [0.04, 0.96], [0.3, 0.7], [0.96, 0.04]], dtype=torch.float64)
STRONG = logits(0.5, 0.25, 0.9, 0.2)
# H of each: labelled 0.75 and 0.5; unlabelled 0.5 for class 1, 0.25 for class 1, (not counted), 0.8 for class 0
SUPERVISED = -(math.log(0.75) + math.log(0.5)) / 2
UNLABELLED = -(math.log(0.5) + math.log(0.25) + math.log(0.8)) / 4


def test_loss_is_that_of_the_paper():
    loss = fixmatch_loss(LABELLED, LABELS, WEAK, STRONG, threshold=0.95, unlabelled_weight=3.0)
    assert loss.supervised.item() == pytest.approx(SUPERVISED)
    assert loss.unlabelled.item() == pytest.approx(UNLABELLED)  # divided by 4, not by the 3 that count
    assert loss.total.item() == pytest.approx(SUPERVISED + 3 * UNLABELLED)
    assert loss.share.item() == 0.75


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.98, -math.log(0.5) / 4), (0.99, 0.0), (0.0, UNLABELLED - math.log(0.9) / 4)],
)
def test_threshold_says_which_clips_count(threshold, expected):
    loss = fixmatch_loss(LABELLED, LABELS, WEAK, STRONG, threshold=threshold)
    assert loss.unlabelled.item() == pytest.approx(expected)


def test_no_gradient_through_pseudo_labels():
    weak, strong = WEAK.clone().requires_grad_(), STRONG.clone().requires_grad_()
    fixmatch_loss(LABELLED, LABELS, weak, strong).total.backward()
    assert weak.grad is None
    assert (strong.grad.abs().sum(dim=1) > 0).tolist() == [True, True, False, True]


def test_distribution_alignment():
    probabilities = torch.tensor([[0.6, 0.4], [0.8, 0.2]])
    aligned = align_distribution(probabilities, torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]))
    # 0.6 * 2/3 = 0.4 against 0.4 * 2 = 0.8; 0.8 * 2/3 = 0.533 against 0.2 * 2 = 0.4
    torch.testing.assert_close(aligned, torch.tensor([[1 / 3, 2 / 3], [4 / 7, 3 / 7]]))
    same = torch.tensor([0.3, 0.7])
    torch.testing.assert_close(align_distribution(probabilities, same, same), probabilities)


def test_recent_predictions_are_of_the_last_128_batches():
    recent = RecentPredictions()
    assert recent.count_in(torch.tensor([[0.2, 0.8], [0.4, 0.6]])).tolist() == pytest.approx([0.3, 0.7])
    for _ in range(128):
        mean = recent.count_in(torch.tensor([[0.5, 0.5]]))
    assert mean.tolist() == [0.5, 0.5]


class ByBrightness(torch.nn.Module):
    """The logits `(0, gain * mean pixel)` of each clip."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        positive = self.gain * clips.mean(dim=(1, 2, 3, 4))
        return torch.stack([torch.zeros_like(positive), positive], dim=1)


def clips(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1, 1).expand(-1, 2, 4, 4, 3)


def cross_entropy(positive_logit: float, label: int) -> float:
    return math.log(1 + math.exp(-positive_logit if label else positive_logit))


@pytest.mark.parametrize("endora_legacy", [False, True])
def test_a_step_fits_strong_views_and_the_official_code_weak_ones(endora_legacy):
    # 255 is a pixel of 1, 0 of -1, 191 of 191 / 127.5 - 1
    batch = {"labelled": clips(255), "labels": torch.tensor([1]), "weak": clips(255), "strong": clips(191)}
    settings = TrainingSettings(confidence_threshold=0.9)
    loss = step_loss(ByBrightness(4.0), batch, torch.ones(2) / 2, RecentPredictions(), settings, endora_legacy)
    assert loss.supervised.item() == pytest.approx(cross_entropy(4.0, 1), rel=1e-5)
    fitted = 4.0 if endora_legacy else 4 * (191 / 127.5 - 1)
    assert loss.unlabelled.item() == pytest.approx(cross_entropy(fitted, 1), rel=1e-5)


def test_a_step_with_alignment_turns_a_guess_around():
    # positive with probability 0.6 where the mean says 0.8: aligned 0.6 * 0.5 / 0.8 against 0.4 * 0.5 / 0.2
    gain = math.log(0.6 / 0.4)
    batch = {"labelled": clips(255), "labels": torch.tensor([1]), "weak": clips(255), "strong": clips(255)}
    recent = RecentPredictions()
    recent.count_in(torch.tensor([[0.0, 1.0]]))  # with this batch's 0.6 the mean is 0.8
    settings = TrainingSettings(confidence_threshold=0.7, distribution_alignment=True)
    loss = step_loss(ByBrightness(gain), batch, torch.ones(2) / 2, recent, settings, False)
    assert loss.share.item() == 1.0  # 8/11, over the threshold, which 0.6 is not
    assert loss.unlabelled.item() == pytest.approx(cross_entropy(gain, 0), rel=1e-5)


def test_cosine_decay():
    assert cosine_decay(0, 100) == 1.0
    assert cosine_decay(100, 100) == pytest.approx(math.cos(7 * math.pi / 16), rel=1e-5)
