"""LVDMPipeline: schedulers, seeds, sizes, long videos, folders."""

import json
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_endora.baselines.lvdm.autoencoder_lvdm import LVDMAutoencoder
from diffusers_endora.baselines.lvdm.lvdm_loss import LATENT_SCALE, LATENT_SHIFT, make_lvdm_scheduler, official_ddim
from diffusers_endora.baselines.lvdm.pipeline_lvdm import LVDMPipeline
from diffusers_endora.baselines.lvdm.unet_lvdm import LVDMUNet3DModel

TINY_UNET = {
    "model_channels": 8,
    "channel_multipliers": (1, 2),
    "layers_per_stage": 1,
    "attention_stages": (1,),
    "num_attention_heads": 2,
    "norm_num_groups": 4,
    "sample_size": 4,
    "num_frames": 2,
}
LATENT_SHAPE = (1, 4, 2, 4, 4)


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny_unet(seed: int = 0, **settings) -> LVDMUNet3DModel:
    return randomised(LVDMUNet3DModel(**(TINY_UNET | settings)), seed)


def tiny_pipeline(unet: LVDMUNet3DModel | None = None, scheduler=None, **parts) -> LVDMPipeline:
    autoencoder = randomised(
        LVDMAutoencoder(base_channels=4, norm_num_groups=4, temporal_factor=2, spatial_factor=4), 1
    )
    pipe = LVDMPipeline(autoencoder, unet or tiny_unet(), scheduler or ddim(), num_inference_steps=2, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim() -> DDIMScheduler:
    return DDIMScheduler.from_config(make_lvdm_scheduler().config)


def long_pipeline(interpolates: bool = False, **settings) -> LVDMPipeline:
    """Clips of 2 latent frames; prediction by 3 (1 given), interpolation by 4 (2 given)."""
    parts = {"prediction_unet": tiny_unet(2, num_frames=3, conditioning="mask", num_noise_levels=11, **settings)}
    if interpolates:
        parts["interpolation_unet"] = tiny_unet(3, num_frames=4, conditioning="mask", num_noise_levels=11, **settings)
    return tiny_pipeline(tiny_unet(**settings), **parts)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def pipe() -> LVDMPipeline:
    return tiny_pipeline()


# --- short clips


def test_ddim_by_hand(pipe):
    """Song et al. 2021, equation 12 with eta = 0, from the given noise through both steps to the scaled latents."""
    noise = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(3))
    latents = pipe(latents=noise, output_type="latent").frames
    kept = (1 - make_lvdm_scheduler().betas).cumprod(0)
    expected = noise
    for timestep, next_kept in [(500, kept[0]), (0, torch.tensor(1.0))]:
        with torch.no_grad():
            eps = pipe.unet(expected, torch.tensor(timestep)).sample
        clean = (expected - (1 - kept[timestep]).sqrt() * eps) / kept[timestep].sqrt()
        expected = next_kept.sqrt() * clean + (1 - next_kept).sqrt() * eps
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-3)


def test_frames_are_the_decoded_unscaled_latents(pipe):
    noise = torch.randn(LATENT_SHAPE)
    latents = pipe(latents=noise, output_type="latent").frames
    frames = pipe(latents=noise, output_type="pt").frames
    with torch.no_grad():
        clip = pipe.autoencoder.decode(latents / 0.33422927 - 1.4606637).sample
    torch.testing.assert_close(frames, (clip / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    assert (pipe.config.latent_scale, pipe.config.latent_shift) == (LATENT_SCALE, LATENT_SHIFT)


def test_output_types(pipe):
    arguments = {"batch_size": 2, "generator": seeded(0, 1)}
    pil = pipe(**arguments).frames
    assert (len(pil), len(pil[0]), pil[0][0].size) == (2, 4, (16, 16))
    array = pipe(batch_size=2, generator=seeded(0, 1), output_type="np").frames
    tensor = pipe(batch_size=2, generator=seeded(0, 1), output_type="pt", return_dict=False)[0]
    assert array.shape == (2, 4, 16, 16, 3)
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert array.min() >= 0
    assert array.max() <= 1


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_any_scheduler_of_noise_serves(scheduler):
    pipe = tiny_pipeline(scheduler=scheduler.from_config(make_lvdm_scheduler().config))
    calls = []
    frames = pipe(
        num_inference_steps=3,
        generator=seeded(0),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: calls.append(step),
    ).frames
    assert calls == [0, 1, 2]
    assert pipe.num_timesteps == 3
    assert frames.isfinite().all()
    again = pipe(num_inference_steps=3, generator=seeded(0), output_type="latent").frames
    assert torch.equal(frames, again)


def test_euler_makes_the_steps_of_ddim():
    """DDIM is Euler's method in x / sqrt(abar) (Song et al. 2021, equation 14): equal where inputs are scaled."""
    noise, ends = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(5)), []
    for scheduler in (DDIMScheduler, EulerDiscreteScheduler):
        scheduler = scheduler.from_config(make_lvdm_scheduler().config, timestep_spacing="leading")
        ends.append(tiny_pipeline(scheduler=scheduler)(latents=noise, output_type="latent").frames)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3 * ends[0].std().item())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_a_clip_depends_on_its_own_generator_alone(scheduler):
    pipe = tiny_pipeline(scheduler=scheduler.from_config(make_lvdm_scheduler().config))
    settings = {"output_type": "latent", "eta": 1.0 if scheduler is DDIMScheduler else 0.0}
    both = pipe(batch_size=2, generator=seeded(4, 5), **settings).frames
    for clip, seed in enumerate((4, 5)):
        alone = pipe(generator=seeded(seed), **settings).frames
        torch.testing.assert_close(both[clip : clip + 1], alone, rtol=1e-3, atol=1e-3)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_eta_adds_noise_to_ddim(pipe):
    noise = torch.randn(LATENT_SHAPE)
    arguments = {"latents": noise, "output_type": "latent"}
    first, second = (pipe(**arguments, eta=1.0, generator=seeded(seed)).frames for seed in (0, 1))
    assert (first - second).abs().max() > 1e-2
    assert torch.equal(pipe(**arguments).frames, pipe(**arguments, generator=seeded(1)).frames)


def test_sizes(pipe):
    assert pipe(num_frames=2, height=8, width=24, output_type="pt").frames.shape == (1, 2, 3, 8, 24)
    assert pipe(output_type="pt").frames.shape == (1, 4, 3, 16, 16)
    assert pipe(official_sampling_size=True, output_type="latent").frames.shape == (1, 4, 2, 32, 32)


def test_classes_and_guidance():
    unet = tiny_unet(num_classes=3)
    pipe = tiny_pipeline(unet)
    noise = torch.randn(2, 4, 2, 4, 4)
    arguments = {"latents": noise, "num_inference_steps": 1, "output_type": "latent"}
    guided = pipe(class_labels=[0, 2], guidance_scale=3.0, **arguments).frames
    with torch.no_grad():
        timestep = torch.tensor(0)
        conditional = unet(noise, timestep, torch.tensor([0, 2])).sample
        unconditional = unet(noise, timestep, torch.tensor([3, 3])).sample
    eps = unconditional + 3 * (conditional - unconditional)
    kept = 1 - make_lvdm_scheduler().betas[0]
    torch.testing.assert_close(guided, (noise - (1 - kept).sqrt() * eps) / kept.sqrt(), rtol=1e-4, atol=1e-4)
    plain = pipe(batch_size=2, **arguments).frames  # by the null class
    torch.testing.assert_close(plain, (noise - (1 - kept).sqrt() * unconditional) / kept.sqrt(), rtol=1e-4, atol=1e-4)
    assert torch.equal(pipe(batch_size=2, class_labels=1, **arguments).frames,
                       pipe(class_labels=torch.tensor([1, 1]), **arguments).frames)  # fmt: skip


def test_callbacks_may_change_latents(pipe):
    ended = pipe(callback_on_step_end=lambda *_: {"latents": torch.zeros(LATENT_SHAPE)}, output_type="latent").frames
    assert ended.eq(0).all()
    with pytest.raises(ValueError, match=r"returned latents of shape \(1,\): expected \(1, 4, 2, 4, 4\)"):
        pipe(callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_a_callback_can_stop(pipe):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True

    pipe(num_inference_steps=5, callback_on_step_end=stop, output_type="latent")
    assert steps == [0]


def test_clip_sample_is_switched_off():
    scheduler = DDIMScheduler.from_config(make_lvdm_scheduler().config, clip_sample=True)
    pipe, noise = tiny_pipeline(scheduler=scheduler), torch.randn(LATENT_SHAPE)
    latents = pipe(latents=noise, output_type="latent").frames
    assert not pipe.scheduler.config.clip_sample
    assert torch.equal(latents, tiny_pipeline()(latents=noise, output_type="latent").frames)


def test_decoding_in_chunks_keeps_the_frames_in_place(pipe):
    """A decoder that marks its latents' numbers in its frames, so that a shifted or doubled frame would show."""
    latents = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(2, 4, -1, 2, 2)
    marking = SimpleNamespace(
        config=SimpleNamespace(temporal_factor=2),
        dtype=torch.float32,
        decode=lambda part: SimpleNamespace(sample=part[:, :3].repeat_interleave(2, dim=2)),
    )
    stand_in = SimpleNamespace(autoencoder=marking, config=SimpleNamespace(latent_scale=1.0, latent_shift=0.0))
    for chunk_size in (None, 1, 2, 3, 7, 9):
        clip = LVDMPipeline.decode_latents(stand_in, latents, chunk_size)
        assert clip.shape == (2, 3, 14, 2, 2)
        assert clip[0, 0, :, 0, 0].tolist() == [number // 2 for number in range(14)]
    whole = pipe.decode_latents(latents)
    assert torch.equal(whole, pipe.decode_latents(latents, 7))


# --- long videos


def test_a_long_video_is_planned():
    plan = long_pipeline().long_video(2)
    assert plan is None
    assert long_pipeline().long_video(3) == (1, 1, 2, 3)
    assert long_pipeline().long_video(6) == (1, 3, 5, 7)
    assert long_pipeline(True).long_video(3) == (3, 1, 1, 7)
    assert long_pipeline(True).long_video(14) == (3, 3, 5, 19)


@pytest.mark.parametrize("interpolates", [False, True])
def test_long_videos_have_their_length(interpolates):
    pipe = long_pipeline(interpolates)
    for num_frames in (6, 14):
        assert pipe(num_frames=num_frames, output_type="pt").frames.shape == (1, num_frames, 3, 16, 16)


def test_prediction_goes_on_from_the_last_frame():
    """By hand: a clip from nothing, then two from the last latent frame, each from its part of the noise."""
    pipe = long_pipeline()
    noise = torch.randn(1, 4, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = pipe(num_frames=12, latents=noise, num_inference_steps=1, output_type="latent").frames
    assert latents.shape == (1, 4, 6, 4, 4)
    unet, kept = pipe.prediction_unet, 1 - make_lvdm_scheduler().betas[0]

    def one_step(part: torch.Tensor, **given) -> torch.Tensor:
        with torch.no_grad():
            eps = unet(part, torch.tensor(0), **given).sample
        return (part - (1 - kept).sqrt() * eps) / kept.sqrt()

    expected = [one_step(noise[:, :, :3])]
    for start in (2, 4):
        given = {"given_latents": torch.zeros(1, 4, 3, 4, 4), "given_mask": torch.tensor([[True, False, False]])}
        given["given_latents"][:, :, 0] = expected[-1][:, :, -1]
        expected.append(one_step(noise[:, :, start : start + 3], **given)[:, :, 1:])
    torch.testing.assert_close(latents, torch.cat(expected, dim=2)[:, :, :6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise_level", [None, 10])
def test_given_latents_are_kept(noise_level):
    """Every model's clip holds what it was given; what is perturbed is the model's view of it."""
    pipe = long_pipeline(interpolates=True)
    seen = {"prediction_unet": [], "interpolation_unet": []}
    for name, calls in seen.items():
        getattr(pipe, name).register_forward_hook(
            lambda module, inputs, kwargs, output, calls=calls: calls.append(kwargs), with_kwargs=True
        )
    latents = pipe(
        num_frames=14, generator=seeded(0), num_inference_steps=1, output_type="latent", given_noise_level=noise_level
    ).frames
    assert latents.shape[2] == 7  # predicted: latent frames 0, 3, 6
    assert [len(calls) for calls in seen.values()] == [1, 2]
    assert "given_latents" not in seen["prediction_unet"][0]
    for gap, call in enumerate(seen["interpolation_unet"]):
        assert call["given_mask"].tolist() == [[True, False, False, True]]
        for place in (0, 3):
            difference = call["given_latents"][:, :, place] - latents[:, :, 3 * gap + place]
            if noise_level is None:
                assert difference.eq(0).all()
                assert "noise_levels" not in call
            else:
                kept = (1 - make_lvdm_scheduler().betas).cumprod(0)[noise_level]
                added = call["given_latents"][:, :, place] - kept.sqrt() * latents[:, :, 3 * gap + place]
                assert added.std() == pytest.approx((1 - kept).sqrt().item(), rel=0.35)
                assert call["noise_levels"].tolist() == [noise_level]


def test_guidance_away_from_nothing_given():
    pipe = long_pipeline()
    noise = torch.randn(1, 4, 5, 4, 4)
    arguments = {"num_frames": 10, "latents": noise, "num_inference_steps": 1, "output_type": "latent"}
    plain, guided = (pipe(**arguments, given_guidance_scale=scale).frames for scale in (1.0, 3.0))
    assert torch.equal(plain[:, :, :3], guided[:, :, :3])  # nothing is given in the first clip
    unet, kept = pipe.prediction_unet, 1 - make_lvdm_scheduler().betas[0]
    given = {"given_latents": plain[:, :, 2:], "given_mask": torch.tensor([[True, False, False]])}
    with torch.no_grad():
        conditional = unet(noise[:, :, 2:], torch.tensor(0), **given).sample
        free = unet(noise[:, :, 2:], torch.tensor(0)).sample
    expected = (noise[:, :, 2:] - (1 - kept).sqrt() * (free + 3 * (conditional - free))) / kept.sqrt()
    torch.testing.assert_close(guided[:, :, 3:], expected[:, :, 1:], rtol=1e-4, atol=1e-4)


def test_long_videos_depend_on_their_own_generator_alone():
    pipe = long_pipeline(interpolates=True, num_classes=2)
    settings = {"num_frames": 14, "output_type": "latent", "given_noise_level": 5, "eta": 1.0}
    both = pipe(class_labels=[0, 1], guidance_scale=2.0, generator=seeded(4, 5), **settings).frames
    alone = pipe(class_labels=[1], guidance_scale=2.0, generator=seeded(5), **settings).frames
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)


def test_steps_are_counted_over_all_clips():
    pipe, steps = long_pipeline(interpolates=True), []
    pipe(num_frames=14, callback_on_step_end=lambda pipe, step, *_: steps.append(step), output_type="latent")
    assert steps == list(range(2 * 3))  # 1 clip and 2 gaps
    assert pipe.num_timesteps == 6


def test_a_folder_without_prediction_makes_no_long_video(pipe):
    with pytest.raises(ValueError, match=r"num_frames=6: this pipeline has no prediction_unet .* at most 4 frames"):
        pipe(num_frames=6)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"conditioning": None, "num_noise_levels": 0}, {}, "prediction_unet has conditioning=None"),
        ({"num_frames": 1}, {}, "num_frames=1: expected"),
        ({"num_classes": 2}, {}, "prediction_unet has num_classes=2 and the unet None"),
        ({}, {"given_noise_level": 11}, "given_noise_level=11: prediction_unet has num_noise_levels=11"),
        ({}, {"given_guidance_scale": 0.5}, "given_guidance_scale=0.5: expected 1"),
        ({}, {"latents": torch.zeros(1, 4, 6, 4, 4)}, r"expected \(1, 4, 7, 4, 4\)"),
    ],
)
def test_models_that_cannot_continue_are_refused(settings, arguments, message):
    defaults = {"num_frames": 3, "conditioning": "mask", "num_noise_levels": 11}
    pipe = tiny_pipeline(prediction_unet=tiny_unet(2, **(defaults | settings)))
    with pytest.raises(ValueError, match=message):
        pipe(num_frames=12, **arguments)


# --- folders


@pytest.mark.parametrize("interpolates", [None, False, True])
def test_a_folder_loads_as_it_was_saved(tmp_path, interpolates):
    pipe = tiny_pipeline(latent_scale=0.5, latent_shift=-0.25) if interpolates is None else long_pipeline(interpolates)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    model = ["diffusers", "LVDMUNet3DModel"]
    assert index == {
        "_class_name": "LVDMPipeline",
        "_diffusers_version": diffusers.__version__,
        "autoencoder": ["diffusers", "LVDMAutoencoder"],
        "unet": model,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "prediction_unet": [None, None] if interpolates is None else model,
        "interpolation_unet": model if interpolates else [None, None],
        "latent_scale": 0.5 if interpolates is None else LATENT_SCALE,
        "latent_shift": -0.25 if interpolates is None else LATENT_SHIFT,
        "prediction_stride": None,
        "num_inference_steps": 2,
    }
    for loader in (LVDMPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is LVDMPipeline
        assert (loaded.prediction_unet is None) == (interpolates is None)
        settings = {"num_frames": 4 if interpolates is None else 8, "output_type": "pt"}
        assert torch.equal(
            loaded(generator=seeded(7), **settings).frames, pipe(generator=seeded(7), **settings).frames
        )


def test_a_folder_of_another_class_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "EndoraPipeline"}))
    with pytest.raises(ValueError, match=r"EndoraPipeline.*LVDMPipeline"):
        LVDMPipeline.from_pretrained(tmp_path)


def test_a_saved_model_does_not_say_where_it_came_from(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "here")
    pipe = tiny_pipeline(LVDMUNet3DModel.from_pretrained(tmp_path / "here"))
    pipe.save_pretrained(tmp_path / "folder")
    texts = [path.read_text() for path in (tmp_path / "folder").rglob("*.json")]
    assert len(texts) == 4
    assert not any(str(tmp_path) in text for text in texts)


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a positive integer"),
        ({"num_inference_steps": 2.0}, "num_inference_steps=2.0: expected a positive integer"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: expected at most 1000"),
        ({"decode_chunk_size": 0}, "decode_chunk_size=0: expected a positive integer"),
        ({"num_frames": 3}, "num_frames=3: expected a positive multiple of 2 frames"),
        ({"num_frames": 0}, "num_frames=0: expected a positive multiple of 2 frames"),
        ({"height": 12}, "height=12: expected a positive multiple of 8 pixels"),
        ({"width": True}, "width=True: expected a positive multiple of 8 pixels"),
        ({"official_sampling_size": True, "height": 16}, "official_sampling_size=True with height=16"),
        ({"class_labels": [1]}, "unconditional"),
        ({"guidance_scale": 2.0}, "guidance needs classes, and the model has no null class"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5: expected 1"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan: expected 1"),
        ({"guidance_scale": "2"}, "guidance_scale='2': expected 1"),
        ({"class_labels": "a"}, "class_labels='a': expected numbers"),
        ({"generator": 3}, "generator is a int: expected a torch.Generator"),
        ({"eta": 1.5}, "eta=1.5 with DDIMScheduler"),
        ({"batch_size": 2, "generator": seeded(0)}, "1 generators for batch_size=2"),
        ({"latents": torch.zeros(1, 4, 4, 4, 4)}, r"latents has shape \(1, 4, 4, 4, 4\): expected \(1, 4, 2, 4, 4\)"),
        ({"latents": torch.full(LATENT_SHAPE, torch.nan)}, "left values that are not finite"),
        ({"output_type": "gif"}, 'output_type="gif"'),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "expected names from"),
        ({"given_noise_level": 3}, "nothing is given in a clip of at most 4 frames"),
    ],
)
def test_bad_arguments_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"num_classes": 2}, {"class_labels": [0, 3]}, "expected labels from 0 to 2"),
        ({"num_classes": 2}, {"class_labels": [0, 1], "batch_size": 3}, "batch_size=3 with 2 class_labels"),
        ({"num_classes": 2}, {"guidance_scale": 2.0}, "was given no class_labels"),
        ({"num_classes": 2, "class_dropout_prob": 0.0}, {}, "has no null class and needs labels from 0 to 1"),
        ({"in_channels": 3}, {}, "4 latent channels and the unet 3"),
    ],
)
def test_bad_labels_and_models_are_refused(settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(tiny_unet(**settings))(**arguments)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), "its noise schedule is not one of betas"),
        (DDIMScheduler(prediction_type="v_prediction"), "it steps from prediction_type='v_prediction'"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True"),
        (DDPMScheduler(variance_type="learned_range"), "needs variance channels"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "flow"),
    ],
)
def test_schedulers_for_other_models_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} cannot sample from LVDM.*{message}"):
        tiny_pipeline(scheduler=scheduler)()


def test_eta_needs_ddim():
    pipe = tiny_pipeline(scheduler=DDPMScheduler.from_config(make_lvdm_scheduler().config))
    with pytest.raises(ValueError, match=r"eta=1\.0 with DDPMScheduler"):
        pipe(eta=1.0)


@pytest.mark.parametrize("numbers", [{"latent_scale": 0.0}, {"latent_shift": math.inf}])
def test_a_scale_of_nothing_is_refused(numbers):
    with pytest.raises(ValueError, match="expected a positive and a finite number"):
        tiny_pipeline(**numbers)


def test_timesteps_beyond_those_of_training_are_refused(pipe):
    pipe = LVDMPipeline(pipe.autoencoder, pipe.unet, official_ddim())
    with pytest.raises(ValueError, match="num_inference_steps=1000 does not suit DDIMScheduler: its timesteps go bey"):
        pipe(num_inference_steps=1000)
    assert pipe.prepare_timesteps(999, "cpu").max() == 999


def test_models_of_different_strides_make_no_long_video():
    pipe = long_pipeline(interpolates=True)  # fills in between every third latent frame
    pipe = LVDMPipeline(**pipe.components, prediction_stride=2)
    with pytest.raises(ValueError, match="makes frames 2 latent frames apart, and interpolation_unet fills"):
        pipe(num_frames=8, num_inference_steps=1)
    assert pipe(num_frames=4, num_inference_steps=1, output_type="np").frames.shape[1] == 4
    pipe = LVDMPipeline(**pipe.components, prediction_stride=3)
    assert pipe(num_frames=8, num_inference_steps=1, output_type="np").frames.shape[1] == 8
