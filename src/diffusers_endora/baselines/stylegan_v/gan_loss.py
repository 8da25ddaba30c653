"""The adversarial objective of StyleGAN-V and MoStGAN-V: the logistic losses, and the gradient penalty R1."""

import torch
import torch.nn.functional as F


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The non-saturating loss of each generated clip, `-log sigmoid(D(G(z)))` (Goodfellow et al. 2014, section 3).

    Args:
        fake_logits: of the discriminator for generated clips, `(B,)`.

    Returns:
        `(B,)`, positive.
    """
    return F.softplus(-fake_logits)


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The logistic loss of pairs of clips, `-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z))))` (Goodfellow et al. 2014).

    Args:
        real_logits, fake_logits: of the discriminator for real and generated clips, `(B,)`.

    Returns:
        `(B,)`, positive.
    """
    return F.softplus(-real_logits) + F.softplus(fake_logits)


def r1_penalty(real_logits: torch.Tensor, real_frames: torch.Tensor) -> torch.Tensor:
    """The squared norm of the logit's gradient by a frame, mean over the frames of each real clip.

    This is `|grad D(x)|^2` of Mescheder et al. 2018, equation 9, whose weight is `gamma / 2`. It can be differentiated
    by the discriminator's weights. With lazy regularisation (Karras et al. 2020, "Analyzing and improving the image
    quality of StyleGAN", section 3.1) it is minimised in every k-th step alone, k times as strongly. StyleGAN-V takes
    the mean over a clip's frames, not their sum (https://github.com/universome/stylegan-v, `src/training/loss.py`).

    Args:
        real_logits: of the discriminator for the clips, `(B,)`; that of a clip depends on no other clip, or the sum of
            the logits is what is differentiated.
        real_frames: what the logits were computed of, `(B, F, C, H, W)`, requiring gradients.

    Returns:
        `(B,)`, not negative.
    """
    (gradients,) = torch.autograd.grad(real_logits.sum(), real_frames, create_graph=True)
    return gradients.square().sum((2, 3, 4)).mean(1)


def r1_weight(resolution: int, clips_per_step: int) -> float:
    """The official gamma of R1 where none is given: 0.0002 x pixels of a frame / clips of a step.

    From the settings `auto` of Karras et al. 2020, "Training generative adversarial networks with limited data"
    (https://github.com/NVlabs/stylegan2-ada-pytorch, `train.py`), which StyleGAN-V keeps.
    """
    return 0.0002 * resolution**2 / clips_per_step


def lazy_correction(interval: int) -> float:
    """What rate and betas of Adam are corrected by where a regulariser has a step of its own every `interval` steps.

    The rate is multiplied by `c = interval / (interval + 1)` and the betas are raised to the power `c` (Karras et al.
    2020, "Analyzing and improving the image quality of StyleGAN", appendix B).
    """
    return interval / (interval + 1)
