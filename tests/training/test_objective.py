"""The objectives against closed forms, and against each other through the error of one and the same noise."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_endora.training.objective import loss_weights, make_scheduler, predicts_variance, sample_timesteps

VP = [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]


def signal_and_noise(scheduler, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared coefficients of x_0 and eps in x_t, read off the scheduler's own noising of 1 and 0."""
    ones, zeros = torch.ones(len(timesteps), dtype=torch.float64), torch.zeros(len(timesteps), dtype=torch.float64)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return (1 - timesteps.double() / 1000) ** 2, (timesteps.double() / 1000) ** 2
    return scheduler.add_noise(ones, zeros, timesteps) ** 2, scheduler.add_noise(zeros, ones, timesteps) ** 2


# The scheduler


def test_the_default_is_the_official_scheduler():
    scheduler = make_scheduler("epsilon")
    expected = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    assert {**scheduler.config, "_use_default_values": None} == {**expected.config, "_use_default_values": None}


def test_the_config_is_a_record_that_survives_saving(tmp_path):
    make_scheduler("v_prediction", zero_terminal_snr=True).save_pretrained(tmp_path)
    scheduler = DDPMScheduler.from_pretrained(tmp_path)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.alphas_cumprod[0] == pytest.approx(make_scheduler("epsilon").alphas_cumprod[0].item())
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999  # sampling starts where there is no signal


def test_all_but_flow_learn_the_variance():
    assert all(predicts_variance(make_scheduler(*objective)) for objective in VP)
    assert not predicts_variance(make_scheduler("flow"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample",), 'prediction_type="sample": expected "epsilon", "v_prediction" or "flow"'),
        (("epsilon", True), r'zero_terminal_snr=True with prediction_type="epsilon": .*; expected "v_prediction"'),
        (("flow", True), r'zero_terminal_snr=True with prediction_type="flow": .*; expected False'),
    ],
)
def test_objectives_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(*arguments)


# Timesteps


def test_uniform_timesteps():
    uniform = torch.tensor([0.0, 0.0009999, 0.001, 0.5, 1 - 2**-24])
    timesteps = sample_timesteps(make_scheduler("epsilon"), uniform)
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == [0, 0, 1, 500, 999]
    assert torch.equal(sample_timesteps(make_scheduler("flow"), uniform), 1000 * uniform)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5), (3.0, 2.0)])
def test_logit_normal_timesteps_have_the_density_of_their_paper(mean, std):
    """Esser et al. 2024, eq. 19, as the slope of the timesteps over their uniform numbers."""
    uniform = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    place = sample_timesteps(make_scheduler("flow"), uniform, "logit_normal", mean, std) / 1000
    slope = torch.gradient(place, spacing=(uniform,))[0]
    logit = torch.log(place / (1 - place))
    density = torch.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * place * (1 - place))
    torch.testing.assert_close((slope * density)[100:-100], torch.ones(799, dtype=torch.float64), rtol=1e-3, atol=0)
    indices = sample_timesteps(make_scheduler("v_prediction"), uniform, "logit_normal", mean, std)
    assert torch.equal(indices, (1000 * place).floor().long())


def test_the_ends_of_the_uniform_numbers_are_timesteps():
    uniform = torch.tensor([0.0, 1 - 2**-24])
    assert sample_timesteps(make_scheduler("epsilon"), uniform, "logit_normal", 0.0, 9.0).tolist() == [0, 999]
    assert sample_timesteps(make_scheduler("flow"), uniform, "logit_normal", 0.0, 9.0).tolist() == [0, 1000]


def test_densities_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match='density="normal": expected "uniform" or "logit_normal"'):
        sample_timesteps(make_scheduler("flow"), torch.rand(2), "normal")
    with pytest.raises(ValueError, match="logit_std=0: expected a positive number"):
        sample_timesteps(make_scheduler("flow"), torch.rand(2), "logit_normal", logit_std=0)


# Weights


@pytest.mark.parametrize("objective", [("v_prediction", False), ("v_prediction", True), ("flow", False)])
@pytest.mark.parametrize(
    ("weighting", "of_the_noise"),
    [
        ("min_snr", lambda snr: (3.0 / snr).clamp(max=1)),
        ("sigmoid", lambda snr: 1 / (1 + snr * math.exp(-0.7))),
    ],
)
def test_a_weighting_is_one_function_of_snr_whatever_is_predicted(objective, weighting, of_the_noise):
    """weight(v) |v - v'|^2 = weight(eps) |eps - eps'|^2, with the errors of one eps' seen through x_t."""
    scheduler = make_scheduler(*objective)
    timesteps = torch.tensor([1, 40, 250, 500, 800, 990])
    timesteps = timesteps.float() if objective[0] == "flow" else timesteps
    signal, noise = signal_and_noise(scheduler, timesteps)
    a, s = signal.sqrt(), noise.sqrt()
    x0, eps, eps_hat = 0.3, -1.1, 0.4
    x_t = a * x0 + s * eps
    x0_hat = (x_t - s * eps_hat) / a
    error = (
        (eps - x0) - (eps_hat - x0_hat) if objective[0] == "flow" else (a * eps - s * x0) - (a * eps_hat - s * x0_hat)
    )
    weights = loss_weights(scheduler, timesteps, weighting, gamma=3.0, bias=0.7).double()
    expected = of_the_noise(signal / noise) * (eps - eps_hat) ** 2
    torch.testing.assert_close(weights * error**2, expected, rtol=1e-4, atol=0)
    if objective == ("v_prediction", False):
        weights = loss_weights(make_scheduler("epsilon"), timesteps, weighting, gamma=3.0, bias=0.7).double()
        torch.testing.assert_close(weights, of_the_noise(signal / noise), rtol=1e-4, atol=0)


def test_sigmoid_is_the_smooth_form_of_min_snr():
    scheduler, timesteps = make_scheduler("epsilon"), torch.arange(1000)
    hard = loss_weights(scheduler, timesteps, "min_snr", gamma=5.0)
    smooth = loss_weights(scheduler, timesteps, "sigmoid", bias=math.log(5.0))
    assert (smooth <= hard).all()
    assert (smooth >= hard / 2).all()
    ends = torch.tensor([0, 999])
    torch.testing.assert_close(smooth[ends], hard[ends], rtol=1e-3, atol=0)
    middle = (hard == 1).nonzero()[0, 0]  # log SNR = log gamma
    assert smooth[middle].item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "sigmoid"])
def test_weights_are_finite_to_the_ends(weighting):
    zero_snr, flow = make_scheduler("v_prediction", zero_terminal_snr=True), make_scheduler("flow")
    indices, sigmas = torch.arange(1000), torch.linspace(0, 1000, 1001)
    of_v, of_velocity = loss_weights(zero_snr, indices, weighting), loss_weights(flow, sigmas, weighting)
    for weights in (of_v, of_velocity):
        assert weights.isfinite().all()
        assert (weights[1:-1] > 0).all()
        assert weights[-1] == (weighting == "none")
    assert torch.equal(loss_weights(make_scheduler("epsilon"), indices, "none"), torch.ones(1000))


def test_weightings_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match='weighting="snr": expected "none", "min_snr" or "sigmoid"'):
        loss_weights(make_scheduler("epsilon"), torch.tensor([1]), "snr")
    with pytest.raises(ValueError, match="gamma=0: expected a positive number"):
        loss_weights(make_scheduler("epsilon"), torch.tensor([1]), "min_snr", gamma=0)
