"""EndoraPipeline: the official samplers' numbers, every scheduler of diffusers, and what its users expect."""

import contextlib
import copy
import inspect
import io

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    MagCacheConfig,
    PNDMScheduler,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.models.original_checkpoint import load_original_checkpoint
from diffusers_endora.training.objective import make_scheduler

LATENT_SHAPE = (1, 4, 4, 8, 8)  # (B, C, F, h, w)
SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
SERVED = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
# Those whose own default betas are Stable Diffusion's, not Endora's.
OTHER_BETAS = {
    "DPMSolverSDEScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
}
REQUIRED_SETTINGS = {
    "AmusedScheduler": {"mask_token_id": 1},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def official_scheduler() -> DDPMScheduler:
    return DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")


def tiny_transformer(**config) -> EndoraTransformer3DModel:
    config = {"num_layers": 1, "sample_size": 8, "num_frames": 4, **config}
    transformer = EndoraTransformer3DModel(num_attention_heads=2, attention_head_dim=8, **config)
    torch.manual_seed(0)
    for parameter in transformer.parameters():  # as initialised, it would answer 0 to anything
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


def tiny_vae(**config) -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), **blocks, **config
    ).eval()


def tiny_kl(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, **blocks, **config).eval()


def tiny_pipeline(vae=None, scheduler=None, **config) -> EndoraPipeline:
    pipe = EndoraPipeline(vae or tiny_vae(), tiny_transformer(**config), scheduler or official_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: EndoraPipeline, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "generator": seeded(), "output_type": "latent", **arguments}
    return pipe(**arguments).frames


def assert_same(latents: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` standard deviations: random noise predictions leave latents far from unit variance."""
    torch.testing.assert_close(latents, expected, rtol=0, atol=tolerance * expected.std().item())


@pytest.fixture
def pipe() -> EndoraPipeline:
    return tiny_pipeline()


@pytest.fixture
def class_pipe() -> EndoraPipeline:
    return tiny_pipeline(num_classes=3)


@pytest.fixture
def warnings_of_diffusers(caplog):
    """What diffusers' loggers, which do not propagate, have to say."""
    logger = logging.get_logger("diffusers_endora.pipelines.pipeline_endora")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


class PointDenoiser:
    """The exact noise predictor of a data set of one clip: every solver has to end at that clip."""

    def __init__(self, clip: torch.Tensor):
        self.clip = clip
        alphas_cumprod = DDPMScheduler().alphas_cumprod.double()
        self.log_noise_to_signal = torch.log((1 - alphas_cumprod) / alphas_cumprod)

    def __call__(self, hidden_states, timestep, **kwargs):
        timestep = timestep.double().clamp(0, 999)
        below, above = timestep.floor().long(), timestep.ceil().long()
        log_ratio = torch.lerp(self.log_noise_to_signal[below], self.log_noise_to_signal[above], timestep - below)
        alpha = torch.sigmoid(-log_ratio).view(-1, 1, 1, 1, 1)
        eps = ((hidden_states - alpha.sqrt() * self.clip) / (1 - alpha).sqrt()).float()
        return torch.cat([eps, torch.zeros_like(eps)], dim=1), ()


@pytest.fixture
def point_pipe(pipe, monkeypatch):
    clip = 2 * torch.randn(LATENT_SHAPE, generator=seeded(1))
    monkeypatch.setattr(pipe.transformer, "forward", PointDenoiser(clip))
    pipe.clip = clip
    return pipe


# Official numbers


@pytest.fixture
def official_pipe(official_checkpoint):
    transformer = load_original_checkpoint(official_checkpoint("unconditional"), num_attention_heads=4).eval()
    pipe = EndoraPipeline(tiny_vae(), transformer, official_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_agrees(latents: torch.Tensor, official: torch.Tensor) -> None:
    """Within 1e-4 standard deviations of the official `(B, F, C, h, w)`."""
    assert_same(latents.transpose(1, 2), official, tolerance=1e-4)


def test_ddpm_takes_the_official_steps(official_pipe, golden, monkeypatch):
    noises = iter(golden["ddpm10/step_noise"].transpose(2, 3))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(noises))
    latents = generate(official_pipe, num_inference_steps=10, latents=golden["ddpm10/x_T"].transpose(1, 2))
    assert_agrees(latents, golden["ddpm10/out"])


@pytest.mark.parametrize("steps", [10, 50])
def test_respacing_is_the_official_one(golden, steps):
    timesteps = tiny_pipeline().prepare_timesteps(steps, None, torch.device("cpu"))
    assert timesteps.tolist() == golden[f"ddpm{steps}/timesteps"].flip(0).tolist()


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_takes_the_official_steps(official_pipe, golden, steps):
    official_pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        official_pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=1, final_sigmas_type="zero"
    )
    timesteps = golden[f"ddpm{steps}/timesteps"].flip(0).tolist()
    latents = generate(official_pipe, timesteps=timesteps, latents=golden[f"ddim{steps}/x_T"].transpose(1, 2))
    assert official_pipe.num_timesteps == steps
    assert_agrees(latents, golden[f"ddim{steps}/out"])


def test_guidance_mixes_noise_and_keeps_the_conditional_variance(official_checkpoint, golden, monkeypatch):
    transformer = load_original_checkpoint(official_checkpoint("class_conditional"), num_attention_heads=4).eval()
    pipe = EndoraPipeline(tiny_vae(), transformer, official_scheduler())
    predictions = []
    step = pipe.scheduler.step
    monkeypatch.setattr(
        pipe.scheduler, "step", lambda output, *a, **k: predictions.append(output) or step(output, *a, **k)
    )

    latents = golden["class/x"][:1].transpose(1, 2)
    generate(pipe, latents=latents, timesteps=[400], class_labels=[3], guidance_scale=4.0)
    cond, uncond = golden["class/cfg_cond"], golden["class/cfg_uncond"]
    eps = uncond[:, :, :4] + 4.0 * (cond[:, :, :4] - uncond[:, :, :4])
    assert_agrees(predictions[0][:, :4], eps)
    assert_agrees(predictions[0][:, 4:], cond[:, :, 4:])


# Schedulers


def scheduler_of(name: str, config=None):
    settings = REQUIRED_SETTINGS.get(name, {})
    try:
        scheduler_class = getattr(diffusers, name)
        return scheduler_class(**settings) if config is None else scheduler_class.from_config(config, **settings)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_arrives_at_the_clip_or_is_refused_by_name(point_pipe, name):
    point_pipe.scheduler = scheduler_of(name)
    if name not in SERVED:
        with pytest.raises(ValueError, match=f"^{name} cannot sample from Endora"):
            generate(point_pipe)
        return
    latents = generate(point_pipe, num_inference_steps=50)
    assert latents.isfinite().all()
    if name not in OTHER_BETAS:
        # some solvers end at timestep 0, where noise of 1% is left
        torch.testing.assert_close(latents, point_pipe.clip, rtol=0, atol=0.06)


@pytest.mark.parametrize("name", sorted(SERVED))
def test_a_scheduler_made_from_the_pipelines_config_arrives_at_the_clip(point_pipe, name):
    point_pipe.scheduler = scheduler_of(name, point_pipe.scheduler.config)
    latents = generate(point_pipe, num_inference_steps=50)
    torch.testing.assert_close(latents, point_pipe.clip, rtol=0, atol=0.06)


@pytest.mark.parametrize("name", sorted(SERVED))
def test_a_scheduler_made_from_a_default_ddpm_has_its_noise_schedule(name):
    pipe = tiny_pipeline(scheduler=DDPMScheduler())
    config = scheduler_of(name, pipe.scheduler.config).config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (1e-4, 0.02, "linear")


@pytest.mark.parametrize("scheduler_class", [LCMScheduler, HeunDiscreteScheduler, TCDScheduler])
def test_warns_of_another_noise_schedule(pipe, warnings_of_diffusers, scheduler_class):
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    generate(pipe)
    assert "noise schedule" not in warnings_of_diffusers.text
    pipe.scheduler = scheduler_class()
    generate(pipe)
    assert f"{scheduler_class.__name__} has another noise schedule" in warnings_of_diffusers.text


@pytest.mark.parametrize(
    ("scheduler_class", "settings"),
    [
        (DDPMScheduler, {"prediction_type": "v_prediction"}),
        (DDIMScheduler, {"prediction_type": "sample"}),
        (UniPCMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}),
        (DDIMScheduler, {"rescale_betas_zero_snr": True}),
        (EulerDiscreteScheduler, {"rescale_betas_zero_snr": True}),
        (DDPMScheduler, {"variance_type": "learned"}),
        (DDPMScheduler, {"variance_type": "fixed_large_log"}),
    ],
)
def test_a_setting_for_another_model_is_refused_by_name(pipe, scheduler_class, settings):
    pipe.scheduler = scheduler_class(**settings)
    with pytest.raises(ValueError, match=f"^{scheduler_class.__name__} .*{list(settings)[-1]}"):
        generate(pipe)


def test_learned_variance_needs_variance_channels():
    pipe = tiny_pipeline(out_channels=4)
    with pytest.raises(ValueError, match=r"DDPMScheduler .* does not predict"):
        generate(pipe)
    pipe.scheduler = DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    assert generate(pipe).isfinite().all()


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDPMParallelScheduler])
def test_learned_variance_survives_the_way_through_another_scheduler(pipe, scheduler_class):
    expected = generate(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    generate(pipe)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    assert_same(generate(pipe), expected)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, variance_type="fixed_small")
    assert not torch.allclose(generate(pipe), expected, atol=1e-2)


def test_a_subclass_of_ddpm_gets_the_variance(pipe):
    class MyScheduler(DDPMScheduler):
        pass

    expected = generate(pipe)
    pipe.scheduler = MyScheduler.from_config(pipe.scheduler.config)
    assert_same(generate(pipe), expected)


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_latents_are_not_clipped(point_pipe, warnings_of_diffusers, setting):
    assert point_pipe.clip.abs().max() > 3
    point_pipe.scheduler = DDIMScheduler(**{"clip_sample": False, setting: True})
    torch.testing.assert_close(generate(point_pipe), point_pipe.clip, rtol=0, atol=0.06)
    assert f"{setting}=True" in warnings_of_diffusers.text


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (PNDMScheduler(), {"num_inference_steps": 2}, "num_inference_steps=2 does not suit PNDMScheduler"),
        (
            KDPM2AncestralDiscreteScheduler(beta_start=1e-4, beta_end=0.02),
            {"num_inference_steps": 2},
            "num_inference_steps=2 does not suit KDPM2AncestralDiscreteScheduler",
        ),
        (LCMScheduler(), {"num_inference_steps": 60}, "num_inference_steps=60 does not suit LCMScheduler"),
        (DDIMScheduler(), {"num_inference_steps": 1001}, "num_inference_steps=1001: expected at most 1000"),
        # two of its 1000 timesteps are equal
        (UniPCMultistepScheduler(), {"num_inference_steps": 1000}, "UniPCMultistepScheduler with 1000 .* not finite"),
        (DDIMScheduler(), {"timesteps": [999, 0]}, "DDIMScheduler takes no explicit timesteps"),
        (EulerDiscreteScheduler(), {"timesteps": [0, 999]}, "expected a falling list"),
        (EulerDiscreteScheduler(), {"timesteps": [500, 500]}, "expected a falling list"),
        (EulerDiscreteScheduler(), {"timesteps": [1000, 0]}, "expected a falling list"),
        (EulerDiscreteScheduler(), {"timesteps": []}, "expected a falling list"),
        (
            EulerDiscreteScheduler(use_karras_sigmas=True),
            {"timesteps": [999, 0]},
            r"timesteps=\[999, 0\] does not suit EulerDiscreteScheduler",
        ),
    ],
)
def test_steps_that_a_scheduler_cannot_take_are_refused_by_name(point_pipe, scheduler, arguments, message):
    point_pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        generate(point_pipe, **arguments)


@pytest.mark.parametrize("scheduler", [official_scheduler(), EulerDiscreteScheduler(), DPMSolverMultistepScheduler()])
def test_explicit_timesteps_are_the_ones_the_model_sees(point_pipe, scheduler):
    point_pipe.scheduler = scheduler
    seen = []
    latents = generate(
        point_pipe,
        timesteps=[999, 500, 123, 4],
        callback_on_step_end=lambda pipe, step, timestep, inputs: seen.append(int(timestep)) or {},
    )
    assert seen == [999, 500, 123, 4]
    torch.testing.assert_close(latents, point_pipe.clip, rtol=0, atol=0.06)


# Objectives


OBJECTIVES = {
    "epsilon": make_scheduler("epsilon"),
    "v": make_scheduler("v_prediction"),
    "zero_snr": make_scheduler("v_prediction", zero_terminal_snr=True),
    "flow": make_scheduler("flow"),
}
MEAN, STD = 2.0, 0.5


class GaussianDenoiser:
    """The best predictor for clips of independent elements N(MEAN, STD^2); class label c has mean c * MEAN."""

    def __init__(self, objective: str):
        self.objective = objective
        self.alphas_cumprod = getattr(OBJECTIVES[objective], "alphas_cumprod", None)

    def __call__(self, hidden_states, timestep, class_labels=None, **kwargs):
        if self.objective == "flow":
            s = timestep.double() / 1000
            a = 1 - s
        else:
            timestep = timestep.double().clamp(0, 999)
            below, above = (self.alphas_cumprod.double()[t.long()] for t in (timestep.floor(), timestep.ceil()))
            a = torch.lerp(below, above, timestep.frac()).sqrt()
            s = (1 - a**2).sqrt()
        mean = MEAN * torch.ones_like(a) if class_labels is None else MEAN * class_labels
        a, s, mean = (value.view(-1, 1, 1, 1, 1) for value in (a, s, mean))
        surprise = (hidden_states - a * mean) / (a**2 * STD**2 + s**2)  # Bishop 2006, eq. 2.116
        x0, eps = mean + a * STD**2 * surprise, s * surprise
        if self.objective == "flow":
            return ((eps - x0).float(),)
        prediction = eps if self.objective == "epsilon" else a * eps - s * x0
        return (torch.cat([prediction, torch.zeros_like(prediction)], dim=1).float(),)


def gaussian_pipe(objective: str, monkeypatch, **config) -> EndoraPipeline:
    scheduler = copy.deepcopy(OBJECTIVES[objective])
    pipe = tiny_pipeline(scheduler=scheduler, out_channels=4 if objective == "flow" else 8, **config)
    monkeypatch.setattr(pipe.transformer, "forward", GaussianDenoiser(objective))
    return pipe


SOLVERS = ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete"]


@pytest.mark.parametrize(
    ("objective", "name"),
    [(objective, name) for objective in ("epsilon", "v", "zero_snr") for name in ("DDPM", *SOLVERS)]
    + [("v", "HeunDiscrete"), ("v", "DEISMultistep")]
    + [("flow", name) for name in ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")]
    + [("flow", name) for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")],
)
def test_the_best_predictor_of_a_gaussian_samples_that_gaussian(monkeypatch, objective, name):
    pipe = gaussian_pipe(objective, monkeypatch)
    pipe.scheduler = scheduler_of(f"{name}Scheduler", pipe.scheduler.config)
    noise = torch.randn(8, *LATENT_SHAPE[1:], generator=seeded(1))
    latents = generate(pipe, batch_size=8, num_inference_steps=200 if name == "DDPM" else 50, latents=noise)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.04)
    assert latents.std().item() == pytest.approx(STD, abs=0.03)
    if name != "DDPM":  # the others follow an ordinary differential equation, which stretches the noise
        torch.testing.assert_close(latents, MEAN + STD * noise, rtol=0, atol=0.13)


@pytest.mark.parametrize("objective", ["epsilon", "zero_snr", "flow"])
def test_guidance_reaches_beyond_the_class_in_what_is_predicted(monkeypatch, objective):
    """Predictions are linear in the mean: away from the null class at MEAN, a scale of 3 takes class 0 to -2 MEAN."""
    pipe = gaussian_pipe(objective, monkeypatch, num_classes=1)
    if objective == "epsilon":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    arguments = {"num_inference_steps": 100, "class_labels": [0] * 8, "guidance_scale": 3.0}
    latents = generate(pipe, **arguments)
    assert latents.mean().item() == pytest.approx(-2 * MEAN, abs=0.06)
    assert latents.std().item() == pytest.approx(STD, abs=0.03)


OF_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SERVED = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "UniPCMultistepScheduler",
}
ZERO_SNR_SERVED = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}


@pytest.mark.parametrize(
    ("objective", "served"), [("v", SERVED), ("zero_snr", ZERO_SNR_SERVED), ("flow", FLOW_SERVED)]
)
@pytest.mark.parametrize("name", sorted(SERVED | FLOW_SERVED))
def test_a_scheduler_made_from_the_pipelines_config_serves_its_objective_or_is_refused(objective, served, name):
    pipe = tiny_pipeline(scheduler=copy.deepcopy(OBJECTIVES[objective]), out_channels=4 if objective == "flow" else 8)
    pipe.scheduler = scheduler_of(name, pipe.scheduler.config)
    if name in served:
        pipe.prepare_scheduler()
    else:
        with pytest.raises(ValueError, match=f"^{name} cannot sample from Endora, which predicts"):
            pipe.prepare_scheduler()


@pytest.mark.parametrize(
    ("objective", "scheduler", "message"),
    [
        ("v", DDIMScheduler(), "predicts v: it steps from prediction_type='epsilon'"),
        ("v", FlowMatchEulerDiscreteScheduler(), "predicts v: it steps from prediction_type='flow_prediction'"),
        ("epsilon", FlowMatchEulerDiscreteScheduler(), "predicts noise: it steps from prediction_type='flow_pred"),
        ("flow", DDPMScheduler(), "predicts the velocity of rectified flow: it steps from prediction_type='epsilon'"),
        ("flow", UniPCMultistepScheduler(), "it steps from prediction_type='epsilon'"),
        ("flow", UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=False steps through"),
        ("flow", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True takes noise for clip"),
        ("flow", DEISMultistepScheduler(**OF_FLOW), "its last step leaves noise in the clip"),
        ("flow", UniPCMultistepScheduler(**OF_FLOW, final_sigmas_type="sigma_min"), "its last step leaves noise"),
    ],
)
def test_a_scheduler_for_another_objective_is_refused_by_name(monkeypatch, objective, scheduler, message):
    pipe = gaussian_pipe(objective, monkeypatch)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"^{type(scheduler).__name__} cannot sample from Endora, .*{message}"):
        generate(pipe)


def test_flow_has_no_variance_channels():
    with pytest.raises(ValueError, match="the transformer has variance channels, which flow does not"):
        generate(tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler()))


def test_an_objective_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="prediction_type='sample': expected one of epsilon, v_prediction, flow_pred"):
        generate(tiny_pipeline(scheduler=DDIMScheduler(prediction_type="sample")))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_saved_folder_knows_what_its_model_predicts(monkeypatch, tmp_path, warnings_of_diffusers, objective):
    pipe = gaussian_pipe(objective, monkeypatch)
    pipe.save_pretrained(tmp_path)
    loaded = EndoraPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(pipe.scheduler)
    for setting in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "shift"):
        assert loaded.scheduler.config.get(setting) == OBJECTIVES[objective].config.get(setting)
    assert loaded.config.prediction_type == pipe.config.prediction_type
    loaded.prepare_scheduler()
    assert "noise schedule" not in warnings_of_diffusers.text
    other = EndoraPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match="it steps from prediction_type='sample'"):
        other.prepare_scheduler()


def test_the_shift_of_flow_is_handed_on_and_back():
    pipe = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), out_channels=4)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.prepare_scheduler()
    assert pipe.scheduler.config.flow_shift == 3
    back = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert back.config.shift == 3
    pipe.scheduler = UniPCMultistepScheduler.from_config(back.config, flow_shift=2.0)
    pipe.prepare_scheduler()
    assert pipe.scheduler.config.flow_shift == 2


def test_explicit_timesteps_of_flow(monkeypatch):
    pipe = gaussian_pipe("flow", monkeypatch)
    seen = []
    generate(
        pipe,
        timesteps=[1000, 500.5, 20],
        callback_on_step_end=lambda pipe, step, timestep, inputs: seen.append(timestep.item()) or {},
    )
    assert seen == [1000, 500.5, 20]
    with pytest.raises(ValueError, match="expected a falling list of timesteps from 0 to 1000"):
        generate(pipe, timesteps=[1001, 500])
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler takes no explicit timesteps"):
        generate(pipe, timesteps=[900, 500])


# Seeds and batches


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_a_seed_gives_the_same_clip_alone_or_in_a_batch(pipe, scheduler_class):
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    for output_type in ("latent", "pt"):
        generators = [seeded(5), seeded(6), seeded(7)]
        batch = generate(pipe, batch_size=3, generator=generators, output_type=output_type)
        for clip, seed in zip(batch, (5, 6, 7), strict=True):
            assert_same(clip, generate(pipe, generator=seeded(seed), output_type=output_type)[0], tolerance=1e-4)
        assert (batch[0] - batch[1]).std() > 0.1 * batch.std()


def test_a_seed_gives_the_same_clip_whatever_the_global_state(pipe):
    torch.manual_seed(1)
    first = generate(pipe)
    torch.manual_seed(2)
    assert torch.equal(generate(pipe), first)
    assert not torch.equal(generate(pipe, generator=seeded(1)), first)


def test_given_latents_replace_drawn_ones(pipe):
    pipe.scheduler = EulerDiscreteScheduler()  # starts from sigma_max times unit noise
    latents = torch.randn(LATENT_SHAPE, generator=seeded())
    kept = latents.clone()
    assert_same(generate(pipe, latents=latents), generate(pipe))
    assert torch.equal(latents, kept)


def test_other_lengths_and_sizes_than_in_training(pipe):
    assert generate(pipe, num_frames=6, height=24, width=32).shape == (1, 4, 6, 12, 16)
    assert generate(pipe).shape == LATENT_SHAPE


# Classes


def test_labels_come_in_every_usual_form(class_pipe):
    expected = generate(class_pipe, class_labels=[2, 2])
    assert expected.shape[0] == 2
    for labels in (torch.tensor([2, 2]), np.array([2, 2]), [[2], [2]], [torch.tensor(2), torch.tensor(2)]):
        assert torch.equal(generate(class_pipe, class_labels=labels), expected)
    for label in (2, torch.tensor(2), np.int64(2)):
        assert torch.equal(generate(class_pipe, class_labels=label, batch_size=2), expected)
    assert not torch.allclose(generate(class_pipe, class_labels=[1, 2])[0], expected[0], atol=1e-3)


def test_without_labels_a_class_model_samples_its_null_class(class_pipe):
    assert torch.equal(generate(class_pipe), generate(class_pipe, class_labels=[3]))
    assert not torch.allclose(generate(class_pipe), generate(class_pipe, class_labels=[0]), atol=1e-3)


def test_guidance_of_one_is_none_and_of_more_pulls_to_the_class(class_pipe):
    plain = generate(class_pipe, class_labels=[0])
    assert torch.equal(generate(class_pipe, class_labels=[0], guidance_scale=1.0), plain)
    assert not class_pipe.do_classifier_free_guidance
    assert not torch.allclose(generate(class_pipe, class_labels=[0], guidance_scale=3.0), plain, atol=1e-3)
    null = generate(class_pipe, class_labels=[3])
    assert_same(generate(class_pipe, class_labels=[3], guidance_scale=3.0), null)


def test_a_callback_changes_the_guidance_of_the_steps_after_it(class_pipe):
    class_pipe.scheduler = EulerDiscreteScheduler()

    def guided(first: float, second: float) -> torch.Tensor:
        def callback(pipe, step, timestep, inputs):
            pipe._guidance_scale = second
            return inputs

        return generate(
            class_pipe, timesteps=[600, 500], class_labels=[1], guidance_scale=first, callback_on_step_end=callback
        )

    constant, changed, switched_off = guided(2.0, 2.0), guided(2.0, 4.0), guided(2.0, 0.0)
    assert class_pipe.guidance_scale == 0.0
    # eps is linear in the scale and the last step in eps: scale 4 is as far from 2 as scale 0 (off: 1) is, twice
    assert_same(changed - constant, 2 * (constant - switched_off), tolerance=1e-3)
    assert (changed - constant).std() > 1e-2 * constant.std()


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a positive integer"),
        ({"num_frames": 2.0}, "num_frames=2.0: expected a positive integer"),
        ({"num_inference_steps": -1}, "num_inference_steps=-1"),
        ({"decode_chunk_size": 0}, "decode_chunk_size=0"),
        ({"height": 15}, "height=15: expected a positive multiple of 4 pixels"),
        ({"width": 0}, "width=0"),
        ({"class_labels": [3, 4]}, r"class_labels=\[3, 4\]: expected labels from 0 to 2, or 3 for the null class"),
        ({"class_labels": -1}, "class_labels="),
        ({"class_labels": [1.5]}, r"class_labels=\[1.5\]"),
        ({"class_labels": []}, "batch_size=0"),
        ({"class_labels": [1, 2], "batch_size": 3}, "batch_size=3 with 2 class_labels"),
        ({"guidance_scale": 0.5, "class_labels": [1]}, "guidance_scale=0.5: expected 1"),
        ({"guidance_scale": 2.0}, "was given no class_labels"),
        ({"generator": [seeded()], "batch_size": 2}, "1 generators for batch_size=2"),
        ({"latents": torch.zeros(1, 4, 4, 8, 9)}, "latents has shape"),
        ({"output_type": "numpy"}, 'output_type="numpy": expected "pil"'),
        ({"callback_on_step_end_tensor_inputs": ["eps"]}, "callback_on_step_end_tensor_inputs="),
    ],
)
def test_an_argument_that_does_not_fit_is_named(class_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(class_pipe, **arguments)


def test_an_unconditional_model_takes_neither_labels_nor_guidance(pipe):
    with pytest.raises(ValueError, match=r"class_labels=\[1\]: this model is unconditional"):
        generate(pipe, class_labels=[1])
    with pytest.raises(ValueError, match="guidance needs classes"):
        generate(pipe, guidance_scale=2.0)


def test_a_model_without_null_class_needs_labels_and_has_no_guidance():
    pipe = tiny_pipeline(num_classes=3, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="class_labels=None: this model has no null class"):
        generate(pipe)
    with pytest.raises(ValueError, match="has no null class"):
        generate(pipe, class_labels=[1], guidance_scale=2.0)
    assert generate(pipe, class_labels=[1]).isfinite().all()


def test_the_call_has_the_arguments_of_diffusers():
    parameters = inspect.signature(EndoraPipeline.__call__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    assert optional >= {"num_inference_steps", "generator", "latents", "output_type", "return_dict"}
    assert set(parameters) - optional == {"self"}


# Output


def test_output_types_hold_the_same_clip(pipe):
    latents = generate(pipe, batch_size=2)
    pt, array, pil = (generate(pipe, batch_size=2, output_type=output_type) for output_type in ("pt", "np", "pil"))
    assert latents.shape == (2, 4, 4, 8, 8)
    assert latents.dtype == torch.float32
    assert pt.shape == (2, 4, 3, 16, 16)
    assert array.shape == (2, 4, 16, 16, 3)
    assert pt.min() >= 0 <= pt.max() <= 1
    assert pt.std() > 0.01
    np.testing.assert_allclose(array, pt.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    assert [len(clip) for clip in pil] == [4, 4]
    assert pil[0][0].size == (16, 16)
    np.testing.assert_allclose(np.asarray(pil[1][2]) / 255, array[1, 2], atol=1 / 255)
    torch.testing.assert_close(pt, (pipe.decode_latents(latents).transpose(1, 2) / 2 + 0.5).clamp(0, 1))


def test_tuple_and_output_object_hold_the_same(pipe):
    frames = pipe(num_inference_steps=2, generator=seeded(), output_type="pt", return_dict=False)
    assert isinstance(frames, tuple)
    assert len(frames) == 1
    assert torch.equal(frames[0], pipe(num_inference_steps=2, generator=seeded(), output_type="pt")[0])


def test_each_vae_decodes_in_its_own_units():
    """AutoencoderKL and AutoencoderTiny, frame by frame: z / scaling_factor + shift_factor."""
    latents = torch.randn(2, 4, 3, 8, 8, generator=seeded())
    for vae in (tiny_kl(scaling_factor=0.2, shift_factor=0.7), tiny_vae(scaling_factor=0.5, shift_factor=0.1)):
        decoded = tiny_pipeline(vae).decode_latents(latents)
        for clip in range(2):
            for frame in range(3):
                z = latents[clip : clip + 1, :, frame] / vae.config.scaling_factor + vae.config.shift_factor
                torch.testing.assert_close(decoded[clip, :, frame], vae.decode(z).sample[0])
    vae = tiny_kl()  # as in Stable Diffusion: 0.18215 and no shift
    decoded = tiny_pipeline(vae).decode_latents(latents)
    torch.testing.assert_close(decoded[:, :, 0], vae.decode(latents[:, :, 0] / 0.18215).sample)


@pytest.mark.parametrize("vae", [tiny_vae, tiny_kl])
def test_pixels_of_a_vae_are_counted_by_its_blocks(vae):
    assert tiny_pipeline(vae()).vae_scale_factor == 2
    assert generate(tiny_pipeline(vae()), output_type="pt").shape == (1, 4, 3, 16, 16)


def test_decode_chunk_size_bounds_memory_and_changes_nothing(pipe, monkeypatch):
    latents = torch.randn(2, 4, 5, 8, 8, generator=seeded())
    expected, decode = pipe.decode_latents(latents), pipe.vae.decode
    for chunk_size in (1, 3, 100):
        sizes = []
        monkeypatch.setattr(pipe.vae, "decode", lambda chunk, sizes=sizes: sizes.append(len(chunk)) or decode(chunk))
        torch.testing.assert_close(pipe.decode_latents(latents, chunk_size), expected)
        assert sum(sizes) == 10
        assert max(sizes) == min(chunk_size, 10)


# Callbacks, progress


def test_callbacks_see_and_change_the_latents(pipe):
    steps = []

    def callback(pipe, step, timestep, inputs):
        assert set(inputs) == set(pipe._callback_tensor_inputs) == {"latents"}
        assert pipe.current_timestep == timestep
        steps.append(step)
        return {"latents": torch.zeros_like(inputs["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert generate(pipe, callback_on_step_end=callback).abs().max() == 0
    assert steps == [0, 1, 2]
    assert pipe.current_timestep is None


def test_a_callback_that_returns_what_it_got_changes_nothing(pipe):
    expected = generate(pipe)
    for names in (["latents"], []):
        same = generate(
            pipe,
            callback_on_step_end=lambda pipe, step, timestep, inputs: inputs,
            callback_on_step_end_tensor_inputs=names,
        )
        assert torch.equal(same, expected)


def test_a_callback_can_interrupt(pipe):
    steps = []

    def callback(pipe, step, timestep, inputs):
        steps.append(step)
        pipe._interrupt = step == 1
        return inputs

    generate(pipe, num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]
    generate(pipe, callback_on_step_end=lambda pipe, step, timestep, inputs: steps.append(step) or inputs)
    assert steps == [0, 1, 0, 1, 2]


def test_progress_bar_counts_the_steps_or_is_silent(pipe):
    def printed(**config) -> str:
        pipe.set_progress_bar_config(**config)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            generate(pipe)
        return stderr.getvalue()

    assert "3/3" in printed()
    assert printed(disable=True) == ""


# Precision and placement


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_casts_the_models_not_the_sampler(pipe, monkeypatch, dtype):
    expected = generate(pipe, output_type="pt")
    pipe.to(dtype)
    assert pipe.transformer.dtype == pipe.vae.dtype == dtype
    seen, step = [], pipe.scheduler.step
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].dtype), with_kwargs=True
    )
    monkeypatch.setattr(
        pipe.scheduler,
        "step",
        lambda *args, **kwargs: seen.extend((args[0].dtype, args[2].dtype)) or step(*args, **kwargs),
    )
    frames = generate(pipe, output_type="pt")
    assert seen == 3 * [dtype, torch.float32, torch.float32]
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames, expected, rtol=0, atol=0.05)


def test_half_precision_models_beside_a_float32_vae(pipe):
    expected = generate(pipe, output_type="pt")
    pipe.transformer.to(torch.bfloat16)
    torch.testing.assert_close(generate(pipe, output_type="pt"), expected, rtol=0, atol=0.05)


def test_layerwise_casting(pipe):
    expected = generate(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    latents = generate(pipe)
    assert not torch.equal(latents, expected)
    assert_same(latents, expected, tolerance=0.05)


def test_model_offload_runs_the_transformer_then_the_vae():
    pipe, expected = tiny_pipeline(tiny_kl()), generate(tiny_pipeline(tiny_kl()), output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(generate(pipe, output_type="pt"), expected)
        transformer_hook, vae_hook = pipe._all_hooks
        assert transformer_hook.model is pipe.transformer
        assert vae_hook.model is pipe.vae
        assert vae_hook.hook.prev_module_hook is transformer_hook


def test_sequential_offload():
    """What `enable_sequential_cpu_offload` does to each model; itself it asks for an accelerator."""
    pipe, expected = tiny_pipeline(tiny_kl()), generate(tiny_pipeline(tiny_kl()), output_type="pt")
    for model in (pipe.transformer, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        assert model.device.type == "meta"
    torch.testing.assert_close(generate(pipe, output_type="pt"), expected)


@pytest.mark.parametrize(
    "settings", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(pipe, settings):
    expected = generate(pipe, output_type="pt")
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, **settings)
    torch.testing.assert_close(generate(pipe, output_type="pt"), expected)


def test_attention_slicing_changes_nothing():
    pipe = tiny_pipeline(tiny_kl())
    expected = generate(pipe, output_type="pt")
    pipe.enable_attention_slicing(slice_size=1)
    torch.testing.assert_close(generate(pipe, output_type="pt"), expected)


# Caches


def cache_configs(pipe: EndoraPipeline) -> dict:
    ranges = {
        f"{axis}_attention_{setting}": value
        for axis in ("spatial", "temporal")
        for setting, value in (("block_skip_range", 2), ("timestep_skip_range", (-1, 1001)))
    }
    return {
        "first_block": FirstBlockCacheConfig(threshold=1e6),
        "mag": MagCacheConfig(
            threshold=10.0, max_skip_steps=1, retention_ratio=0.0, num_inference_steps=4, mag_ratios=torch.ones(4)
        ),
        "taylor_seer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=0),
        "pyramid": PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: pipe.current_timestep, **ranges),
        "faster": FasterCacheConfig(
            current_timestep_callback=lambda: pipe.current_timestep,
            unconditional_batch_skip_range=2,
            attention_weight_callback=lambda module: 0.5,
            **ranges,
        ),
    }


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("name", ["first_block", "mag", "taylor_seer", "pyramid", "faster"])
def test_a_cache_takes_effect_starts_afresh_and_goes(name):
    pipe = tiny_pipeline(num_classes=3, num_layers=2)
    arguments = {"class_labels": [1], "guidance_scale": 2.0, "num_inference_steps": 4}
    expected = generate(pipe, **arguments)
    pipe.transformer.enable_cache(cache_configs(pipe)[name])
    cached = generate(pipe, **arguments)
    assert (cached - expected).abs().max() > 1e-5
    assert_same(generate(pipe, **arguments), cached)  # nothing is left of the clip before
    pipe.transformer.disable_cache()
    assert_same(generate(pipe, **arguments), expected)


def test_cached_states_of_guided_and_plain_calls_are_kept_apart(class_pipe, monkeypatch):
    contexts, cache_context = [], class_pipe.transformer.cache_context
    monkeypatch.setattr(
        class_pipe.transformer, "cache_context", lambda name: contexts.append(name) or cache_context(name)
    )
    generate(class_pipe, class_labels=[1])
    generate(class_pipe, class_labels=[1], guidance_scale=2.0)
    assert contexts == 3 * ["cond"] + 3 * ["cond_uncond"]


# Components


def test_components_are_those_of_the_constructor(pipe):
    assert set(pipe.components) == {"vae", "transformer", "scheduler"}
    assert pipe.components["transformer"] is pipe.transformer


def test_from_pipe_shares_the_models(pipe):
    other = EndoraPipeline.from_pipe(pipe, scheduler=EulerDiscreteScheduler())
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    assert type(pipe.scheduler) is DDPMScheduler
    assert generate(other).isfinite().all()


def test_lora_scales_loads_and_goes(pipe, tmp_path):
    peft = pytest.importorskip("peft")
    plain = generate(pipe)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    adapted = generate(pipe)
    assert (adapted - plain).std() > 1e-2 * plain.std()
    assert_same(generate(pipe, attention_kwargs={"scale": 0.0}), plain, tolerance=1e-4)
    weights = peft.get_peft_model_state_dict(pipe.transformer)
    EndoraPipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights)

    other = tiny_pipeline()
    other.load_lora_weights(tmp_path)
    assert_same(generate(other), adapted, tolerance=1e-4)
    other.fuse_lora()
    assert_same(generate(other), adapted, tolerance=1e-4)
    other.unfuse_lora()
    other.unload_lora_weights()
    assert_same(generate(other), plain, tolerance=1e-4)


def test_faster_cache_without_guidance_is_refused_unless_told_so(class_pipe):
    config = {
        "current_timestep_callback": lambda: class_pipe.current_timestep,
        "attention_weight_callback": lambda _: 0.3,
    }
    class_pipe.transformer.enable_cache(FasterCacheConfig(**config))
    with pytest.raises(ValueError, match="set is_guidance_distilled=True"):
        generate(class_pipe, class_labels=[1, 1])
    assert generate(class_pipe, class_labels=[1, 1], guidance_scale=2.0).isfinite().all()
    class_pipe.transformer.disable_cache()
    class_pipe.transformer.enable_cache(FasterCacheConfig(**config, is_guidance_distilled=True))
    assert generate(class_pipe, class_labels=[1, 1]).isfinite().all()


def test_guidance_that_is_no_number_is_refused(class_pipe):
    with pytest.raises(ValueError, match="guidance_scale=nan: expected 1"):
        generate(class_pipe, class_labels=[1], guidance_scale=float("nan"))


def test_a_vae_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="the VAE has 3 latent channels and the transformer 4"):
        generate(tiny_pipeline(vae=tiny_vae(latent_channels=3)))


def test_a_callback_may_return_nothing_but_no_other_shape(pipe):
    plain = generate(pipe)
    assert torch.equal(generate(pipe, callback_on_step_end=lambda *_: None), plain)
    with pytest.raises(ValueError, match="callback_on_step_end returned latents of shape"):
        generate(pipe, callback_on_step_end=lambda pipe, step, t, inputs: {"latents": inputs["latents"][:, :, :1]})


def test_a_model_in_training_mode_keeps_its_labels(class_pipe):
    labels = [1] * 8
    expected = generate(class_pipe, class_labels=labels)
    class_pipe.transformer.train()
    assert torch.equal(generate(class_pipe, class_labels=labels), expected)


def test_a_saved_folder_does_not_tell_where_its_parts_lay(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "secret")
    EndoraPipeline.from_pretrained(tmp_path / "secret").save_pretrained(tmp_path / "published")
    for config in (tmp_path / "published").rglob("*.json"):
        assert "secret" not in config.read_text(), config
