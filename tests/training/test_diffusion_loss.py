"""The diffusion loss against the official numbers, torch.distributions and closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from diffusers import DDPMScheduler

from diffusers_endora.training.diffusion_loss import (
    bound_tables,
    diffusion_loss,
    noisy_latents_and_target,
    variational_bound,
)
from diffusers_endora.training.objective import loss_weights, make_scheduler, sample_timesteps

SHAPE = (3, 4, 2, 4, 4)  # (B, C, F, h, w)


def official_scheduler(num_train_timesteps: int = 1000, **settings) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps, beta_start=1e-4, beta_end=0.02, variance_type="learned_range", **settings
    )


def bound_of(scheduler, prediction, target, variance, latents, timesteps):
    tables = bound_tables(scheduler, torch.device("cpu"))
    return variational_bound(target - prediction, variance, latents, timesteps, tables)


class FixedDenoiser(nn.Module):
    """Answers `sample` to anything and remembers what it was asked."""

    def __init__(self, sample: torch.Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.sample, self.dtype = sample, dtype

    def forward(self, hidden_states, **kwargs):
        self.hidden_states, self.kwargs = hidden_states, kwargs
        states = tuple(torch.full((1,), index) for index in kwargs["output_spatial_states"])
        return SimpleNamespace(sample=self.sample, spatial_states=states)


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*(shape or SHAPE), generator=generator)


@pytest.mark.parametrize(
    ("name", "latents", "timesteps"), [("loss", "joint/x", "joint/t"), ("loss2", "loss2/x", "loss2/t")]
)
def test_agrees_with_the_official_loss(golden, official_checkpoint, name, latents, timesteps):
    from diffusers_endora.models.original_checkpoint import load_original_checkpoint

    transformer = load_original_checkpoint(official_checkpoint("unconditional"), num_attention_heads=4).eval()
    with torch.no_grad():
        loss = diffusion_loss(
            transformer,
            golden[latents].transpose(1, 2),
            golden[timesteps],
            golden[f"{name}/noise"].transpose(1, 2),
            official_scheduler(),
            num_still_images=8,
        )
    torch.testing.assert_close(loss.mse, golden[f"{name}/mse"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.vb, golden[f"{name}/vb"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_train_timesteps", [1000, 50])
@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=["epsilon", "v", "zero_snr"],
)
def test_later_terms_are_the_divergence_from_the_true_posterior(normal, num_train_timesteps, settings):
    scheduler = official_scheduler(num_train_timesteps, **settings)
    latents, noise, prediction, variance = normal(), normal(), normal(), normal()
    timesteps = torch.tensor([1, 17, num_train_timesteps - 1])
    _, target = noisy_latents_and_target(latents, noise, timesteps, scheduler)
    vb = bound_of(scheduler, prediction, target, variance, latents, timesteps)

    betas = scheduler.betas.double()
    alphas_cumprod = (1 - betas).cumprod(0)
    for row, t in enumerate(timesteps.tolist()):
        a, a_previous, beta = alphas_cumprod[t], alphas_cumprod[t - 1], betas[t]
        noisy = a.sqrt() * latents[row] + (1 - a).sqrt() * noise[row]
        if settings["prediction_type"] == "epsilon":
            predicted_x0 = (noisy - (1 - a).sqrt() * prediction[row]) / a.sqrt()
        else:
            predicted_x0 = a.sqrt() * noisy - (1 - a).sqrt() * prediction[row]
        x0_weight = a_previous.sqrt() * beta / (1 - a)  # DDPM eq. 7
        noisy_weight = (1 - beta).sqrt() * (1 - a_previous) / (1 - a)
        posterior_variance = (1 - a_previous) / (1 - a) * beta
        fraction = (variance[row] + 1) / 2
        model_variance = beta**fraction * posterior_variance ** (1 - fraction)
        true = torch.distributions.Normal(x0_weight * latents[row] + noisy_weight * noisy, posterior_variance.sqrt())
        model = torch.distributions.Normal(x0_weight * predicted_x0 + noisy_weight * noisy, model_variance.sqrt())
        bits = torch.distributions.kl_divergence(true, model).mean() / math.log(2)
        assert vb[row].item() == pytest.approx(bits.item(), rel=1e-4)


def test_a_perfect_prediction_diverges_by_its_variance_alone(normal):
    noise = normal()
    scheduler = official_scheduler()
    alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    timesteps = torch.tensor([1, 500, 999])
    smallest, largest = (
        bound_of(scheduler, noise, noise, torch.full(SHAPE, value), normal(), timesteps) for value in (-1.0, 1.0)
    )
    torch.testing.assert_close(smallest, torch.zeros(3))
    ratio = (1 - alphas_cumprod[timesteps - 1]) / (1 - alphas_cumprod[timesteps])  # posterior variance over beta
    torch.testing.assert_close(largest.double(), (ratio - 1 - ratio.log()) / 2 / math.log(2), rtol=1e-3, atol=1e-7)


def test_the_first_term_is_a_distribution_over_the_256_values(normal):
    latents = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1, 1)
    noise, variance = normal(256, 1, 1, 1, 1), torch.zeros(256, 1, 1, 1, 1)
    scheduler = official_scheduler()
    betas = scheduler.betas
    for mean in (-1.0, 0.3, 0.999):
        # the eps whose predicted x_0 is `mean` for every value: x_0 - mean = sqrt(beta / (1 - beta)) (eps - noise)
        eps = noise + (latents - mean) * ((1 - betas[0]) / betas[0]).sqrt()
        bits = bound_of(scheduler, eps, noise, variance, latents, torch.zeros(256, dtype=torch.long))
        probabilities = 2**-bits
        assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
        assert latents.flatten()[probabilities.argmax()].item() == pytest.approx(mean, abs=1 / 255)

    # the last mean once more, against the true normal distribution, whose variance is halfway between the two limits
    posterior_variance = betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))
    distribution = torch.distributions.Normal(0.999, (posterior_variance * betas[0]) ** 0.25)
    edges = distribution.cdf((torch.arange(255) + 0.5) / 127.5 - 1)
    expected = torch.cat([edges, torch.ones(1)]) - torch.cat([torch.zeros(1), edges])
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-3)


def test_the_bound_trains_the_variance_and_the_error_trains_the_noise(normal):
    sample = normal(3, 8, 2, 4, 4).requires_grad_()
    timesteps = torch.tensor([0, 1, 700])
    loss = diffusion_loss(FixedDenoiser(sample), normal(), timesteps, normal(), official_scheduler())
    (mse_grad,) = torch.autograd.grad(loss.mse.sum(), sample, retain_graph=True)
    (vb_grad,) = torch.autograd.grad(loss.vb.sum(), sample)
    assert mse_grad[:, :4].flatten(1).norm(dim=1).min() > 0
    assert vb_grad[:, 4:].flatten(1).norm(dim=1).min() > 0
    assert not mse_grad[:, 4:].any()
    assert not vb_grad[:, :4].any()


def test_mse_is_the_mean_over_a_sample(normal):
    noise, eps = normal(), normal()
    loss = diffusion_loss(FixedDenoiser(eps), normal(), torch.tensor([0, 5, 999]), noise, official_scheduler())
    torch.testing.assert_close(loss.mse, torch.stack([(a - b).pow(2).mean() for a, b in zip(eps, noise, strict=True)]))


def test_all_parameterisations_score_the_same_noise(normal):
    """Predictions that mean one and the same eps differ in their errors by the signal's coefficient alone."""
    latents, noise, eps = normal(), normal(), normal()
    timesteps = torch.tensor([1, 300, 700])
    variance = normal()
    losses = {}
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = make_scheduler(prediction_type)
        a = scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        v = (eps - (1 - a).sqrt() * noisy) / a.sqrt()
        prediction = torch.cat([eps if prediction_type == "epsilon" else v, variance], dim=1)
        losses[prediction_type] = diffusion_loss(FixedDenoiser(prediction), latents, timesteps, noise, scheduler)
    torch.testing.assert_close(losses["v_prediction"].mse * a.flatten(), losses["epsilon"].mse)
    torch.testing.assert_close(losses["v_prediction"].vb, losses["epsilon"].vb, rtol=1e-4, atol=0)

    sigma = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    velocity = FixedDenoiser((eps - noisy) / (1 - sigma))  # eps - x_0 for the x_0 that belongs to eps
    flow = diffusion_loss(velocity, latents, 1000 * sigma.flatten(), noise, make_scheduler("flow"))
    torch.testing.assert_close(velocity.hidden_states, noisy)
    torch.testing.assert_close(flow.mse * (1 - sigma.flatten()) ** 2, losses["epsilon"].mse)
    assert torch.equal(flow.vb, torch.zeros(3))


def test_without_signal_v_is_the_clip_and_velocity_leads_to_it(normal):
    """At the last timestep with zero terminal SNR x_T is noise alone, and v = -x_0; at sigma = 1 u = x_1 - x_0."""
    latents, noise = normal(), normal()
    last = torch.full((3,), 999)
    model = FixedDenoiser(torch.cat([-latents, normal()], dim=1))
    loss = diffusion_loss(model, latents, last, noise, make_scheduler("v_prediction", zero_terminal_snr=True))
    assert torch.equal(model.hidden_states, noise)
    assert torch.equal(loss.mse, torch.zeros(3))
    assert loss.vb.isfinite().all()
    model = FixedDenoiser(noise - latents)
    loss = diffusion_loss(model, latents, torch.full((3,), 1000.0), noise, make_scheduler("flow"))
    assert torch.equal(model.hidden_states, noise)
    assert torch.equal(loss.mse, torch.zeros(3))


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "flow"])
def test_the_loss_reads_nothing_back_from_the_device(objective):
    """Tensors on the meta device have no values to read."""
    scheduler = make_scheduler(objective)
    latents = torch.empty(SHAPE, device="meta")
    sample = torch.empty(3, 4 if objective == "flow" else 8, *SHAPE[2:], device="meta", requires_grad=True)
    timesteps = sample_timesteps(scheduler, torch.empty(3, device="meta"), "logit_normal")
    loss = diffusion_loss(FixedDenoiser(sample), latents, timesteps, latents, scheduler)
    weights = loss_weights(scheduler, timesteps, "sigmoid")
    (weights * loss.mse + loss.vb).mean().backward()
    assert sample.grad.shape == sample.shape


def test_tables_are_made_once(normal, monkeypatch):
    scheduler, model = make_scheduler("v_prediction"), FixedDenoiser(normal(3, 8, 2, 4, 4))
    arguments = (model, normal(), torch.tensor([0, 5, 999]), normal(), scheduler)
    expected = diffusion_loss(*arguments)
    monkeypatch.delattr(scheduler, "betas")
    assert torch.equal(diffusion_loss(*arguments).vb, expected.vb)


def test_a_model_without_variance_channels_has_no_bound(normal):
    loss = diffusion_loss(FixedDenoiser(normal()), normal(), torch.tensor([0, 5, 999]), normal(), official_scheduler())
    assert torch.equal(loss.vb, torch.zeros(3))


def test_the_model_is_asked_as_a_transformer_is(normal):
    latents, noise, timesteps = normal(), normal(), torch.tensor([0, 5, 999])
    model, scheduler, labels = FixedDenoiser(normal()), official_scheduler(), torch.tensor([1, 0, 2])
    loss = diffusion_loss(model, latents, timesteps, noise, scheduler, labels, 1, (2, 0))
    a = scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1, 1)
    torch.testing.assert_close(model.hidden_states, a.sqrt() * latents + (1 - a).sqrt() * noise)
    assert torch.equal(model.kwargs.pop("timestep"), timesteps)
    assert model.kwargs == {
        "class_labels": labels, "num_still_images": 1, "output_spatial_states": (2, 0), "return_dict": True
    }  # fmt: skip
    assert [state.item() for state in loss.spatial_states] == [2, 0]


def test_half_precision_models_are_scored_in_float32(normal):
    latents, noise, sample = normal(), normal(), normal(3, 8, 2, 4, 4).bfloat16()
    timesteps, scheduler = torch.tensor([0, 5, 999]), official_scheduler()
    half = FixedDenoiser(sample, torch.bfloat16)
    loss = diffusion_loss(half, latents, timesteps, noise, scheduler)
    reference = diffusion_loss(FixedDenoiser(sample.float()), latents, timesteps, noise, scheduler)
    assert half.hidden_states.dtype == torch.bfloat16
    assert loss.mse.dtype == loss.vb.dtype == torch.float32
    assert torch.equal(loss.mse, reference.mse)
    assert torch.equal(loss.vb, reference.vb)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": torch.zeros(1, 4, 2, 4, 4)}, "noise has shape"),
        ({"timesteps": torch.tensor([1])}, "timesteps has shape"),
        ({"scheduler": DDPMScheduler(prediction_type="sample")}, 'prediction_type="sample"'),
        ({"transformer": FixedDenoiser(torch.zeros(3, 7, 2, 4, 4))}, "expected 4 channels, or 8 with"),
        ({"transformer": FixedDenoiser(torch.zeros(3, 3, 2, 4, 4))}, "expected 4 channels, or 8 with"),
        (
            {"transformer": FixedDenoiser(torch.zeros(3, 8, 2, 4, 4)), "scheduler": make_scheduler("flow")},
            r"expected 4 channels\.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(normal, changes, message):
    arguments = {
        "transformer": FixedDenoiser(normal()),
        "latents": normal(),
        "timesteps": torch.tensor([0, 5, 999]),
        "noise": normal(),
        "scheduler": official_scheduler(),
    }
    with pytest.raises(ValueError, match=message):
        diffusion_loss(**(arguments | changes))
