"""The closed form agrees with the error of the optimal predictor, measured."""

import pytest
import torch

from diffusers_endora.training.diffusion_loss import noisy_latents_and_target
from diffusers_endora.training.gaussian_baseline import GaussianBaseline
from diffusers_endora.training.objective import coefficients, make_scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_it_is_the_error_of_the_optimal_linear_predictor(prediction_type):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 2, 2, generator=generator)
    std = torch.rand(4, 2, 2, generator=generator) + 0.5
    latents = mean + std * torch.randn(20_000, 4, 2, 2, generator=generator)
    baseline = GaussianBaseline()
    for clip in latents.split(100):
        baseline.update(clip.transpose(0, 1)[None])
    latents = latents[:, :, None]  # clips of one frame

    scheduler = make_scheduler(prediction_type)
    timesteps = torch.tensor([100, 500, 900])
    errors = []
    for timestep in timesteps:
        eps = torch.randn(latents.shape, generator=generator)
        noisy, target = noisy_latents_and_target(latents, eps, timestep.expand(len(latents)), scheduler)
        # the best linear predictor of each element, fitted
        x, y = noisy - noisy.mean(0), target - target.mean(0)
        slope = (x * y).mean(0) / x.square().mean(0)
        errors.append((y - slope * x).square().mean())
    expected = torch.stack(errors).mean().item()
    assert baseline.expected_error(*coefficients(scheduler, timesteps)) == pytest.approx(expected, rel=0.01)


def test_state_survives_a_checkpoint():
    baseline, restored = GaussianBaseline(), GaussianBaseline()
    baseline.update(torch.randn(1, 4, 3, 2, 2))
    restored.load_state_dict(baseline.state_dict())
    table = coefficients(make_scheduler("epsilon"), torch.arange(1000))
    assert restored.expected_error(*table) == baseline.expected_error(*table)


def test_needs_latents():
    with pytest.raises(ValueError, match="no latents"):
        GaussianBaseline().expected_error(*[torch.ones(1)] * 4)
