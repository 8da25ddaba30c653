"""The closed form agrees with the error of the optimal predictor, measured."""

import pytest
import torch

from diffusers_endora.training.gaussian_baseline import GaussianBaseline


def test_eps_mse_is_the_error_of_the_optimal_linear_predictor():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 2, 2, generator=generator)
    std = torch.rand(4, 2, 2, generator=generator) + 0.5
    latents = mean + std * torch.randn(20_000, 4, 2, 2, generator=generator)
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])
    baseline = GaussianBaseline()
    for clip in latents.split(100):
        baseline.update(clip.transpose(0, 1)[None])

    errors = []
    for alpha in alphas_cumprod:
        eps = torch.randn(latents.shape, generator=generator)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * eps
        gain = (1 - alpha).sqrt() / (alpha * std**2 + 1 - alpha)
        errors.append((gain * (noisy - alpha.sqrt() * mean) - eps).square().mean())
    assert baseline.eps_mse(alphas_cumprod) == pytest.approx(torch.stack(errors).mean().item(), rel=0.01)


def test_state_survives_a_checkpoint():
    baseline, restored = GaussianBaseline(), GaussianBaseline()
    baseline.update(torch.randn(1, 4, 3, 2, 2))
    restored.load_state_dict(baseline.state_dict())
    alphas_cumprod = torch.tensor([0.5])
    assert restored.eps_mse(alphas_cumprod) == baseline.eps_mse(alphas_cumprod)


def test_needs_latents():
    with pytest.raises(ValueError, match="no latents"):
        GaussianBaseline().eps_mse(torch.tensor([0.5]))
