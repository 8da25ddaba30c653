"""The adversarial losses against hand computations, and their derivatives against finite differences."""

import math

import pytest
import torch

from diffusers_endora.baselines.stylegan_v.gan_loss import (
    discriminator_loss,
    generator_loss,
    lazy_correction,
    r1_penalty,
    r1_weight,
)


def test_losses_are_negative_log_probabilities():
    logits = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    is_real = logits.sigmoid()
    assert torch.allclose(generator_loss(logits), -is_real.log())
    assert torch.allclose(discriminator_loss(logits, logits), -is_real.log() - (1 - is_real).log())
    assert generator_loss(logits)[1] == pytest.approx(math.log(2))


def test_losses_stay_finite_where_the_discriminator_is_sure():
    far = torch.tensor([-1e4, 1e4])
    assert generator_loss(far).tolist() == [1e4, 0]
    assert discriminator_loss(-far, far).tolist() == [0, 2e4]


def quadratic_discriminator(frames: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`(B, F, C, H, W)` to logits `(B,)`: the weighted sum of squares, whose gradient is `2 weights frames`."""
    return (frames.square() * weights).sum((1, 2, 3, 4))


def test_r1_is_the_mean_over_frames_of_the_gradients_squared_norm():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    penalty = r1_penalty(quadratic_discriminator(frames, weights), frames)
    by_hand = (2 * weights * frames.detach()).square().sum((2, 3, 4)).mean(1)
    assert penalty.shape == (2,)
    assert torch.allclose(penalty, by_hand)


def test_r1_can_be_minimised_by_the_discriminators_weights():
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(2, 2, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def penalty(weights: torch.Tensor) -> torch.Tensor:
        return r1_penalty(quadratic_discriminator(frames, weights), frames)

    assert torch.autograd.gradcheck(penalty, weights)
    (gradient,) = torch.autograd.grad(penalty(weights).sum(), weights)
    by_hand = (8 * weights * frames.square()).detach().sum(0) / 2  # of 4 w^2 x^2, mean over 2 frames
    assert torch.allclose(gradient, by_hand)


def test_official_weights_and_corrections():
    assert r1_weight(128, 64) == pytest.approx(0.0512)
    assert r1_weight(256, 64) == pytest.approx(0.2048)
    assert lazy_correction(16) == 16 / 17
