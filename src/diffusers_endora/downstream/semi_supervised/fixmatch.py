"""The objective of FixMatch (Sohn et al. 2020, https://arxiv.org/abs/2001.07685), as pure functions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class FixMatchLoss:
    """The parts of the objective, scalar tensors.

    Attributes:
        total: what is minimised, `supervised + unlabelled_weight * unlabelled`.
        supervised: cross-entropy of the labelled clips.
        unlabelled: cross-entropy of the unlabelled clips that count, divided by the number of all.
        share: of the unlabelled clips, those that count.
    """

    total: torch.Tensor
    supervised: torch.Tensor
    unlabelled: torch.Tensor
    share: torch.Tensor


def fixmatch_loss(
    labelled_logits: torch.Tensor,
    labels: torch.Tensor,
    weak_probabilities: torch.Tensor,
    fitted_logits: torch.Tensor,
    threshold: float = 0.95,
    unlabelled_weight: float = 1.0,
) -> FixMatchLoss:
    """Equations 3 and 4 of the paper.

    `supervised = mean_b H(p_b, p(weak view of labelled clip b))` (eq. 3) and
    `unlabelled = mean_b 1[max q_b >= threshold] H(argmax q_b, p(strong view of unlabelled clip b))` (eq. 4), where
    `q_b` are the probabilities of the weak view of unlabelled clip b, of which no gradient is taken (sections 2.1 and
    2.2). Natural logarithms.

    Args:
        labelled_logits: `(B, K)`, of weak views.
        labels: int64 `(B,)`.
        weak_probabilities: `(U, K)`, `q`: softmax of the weak views' logits, aligned or not.
        fitted_logits: `(U, K)`: those of the **strong** views. (The official Endora code put the weak views' in their
            place, see `train_classifier`.)
        threshold: in [0, 1], the paper's tau.
        unlabelled_weight: the paper's lambda_u.
    """
    supervised = F.cross_entropy(labelled_logits, labels)
    confidence, pseudo_labels = weak_probabilities.detach().max(dim=1)
    counts = (confidence >= threshold).to(fitted_logits.dtype)
    unlabelled = (F.cross_entropy(fitted_logits, pseudo_labels, reduction="none") * counts).mean()
    return FixMatchLoss(supervised + unlabelled_weight * unlabelled, supervised, unlabelled, counts.mean())


def align_distribution(
    probabilities: torch.Tensor, class_shares: torch.Tensor, mean_probabilities: torch.Tensor
) -> torch.Tensor:
    """Distribution alignment of ReMixMatch (Berthelot et al. 2020, https://arxiv.org/abs/1911.09785, section 3.1).

    `q * class_shares / mean_probabilities`, scaled so that each row sums to 1: guesses are pulled towards the shares
    that the classes have among the labelled clips.

    Args:
        probabilities: `(U, K)`, q.
        class_shares: `(K,)`, shares of the classes among the labelled clips.
        mean_probabilities: `(K,)`, mean of q over recent batches.
    """
    aligned = probabilities * class_shares / mean_probabilities.clamp_min(1e-6)
    return aligned / aligned.sum(dim=1, keepdim=True)


def cosine_decay(step: int, num_steps: int) -> float:
    """Factor of the learning rate at `step` of `num_steps`, `cos(7 pi step / (16 num_steps))` (section 2.4)."""
    return float(torch.cos(torch.tensor(7 * torch.pi * step / (16 * num_steps))))
