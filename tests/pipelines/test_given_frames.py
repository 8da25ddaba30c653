"""Clips from given frames, variations of a clip, and clips longer than the training's."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FasterCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
)
from test_pipeline_endora import FLOW_SERVED, SERVED, generate, official_scheduler, seeded, tiny_kl, tiny_pipeline

SCHEDULERS = [(name, "noise") for name in sorted(SERVED)] + [(name, "flow") for name in sorted(FLOW_SERVED)]
NOT_HALFWAY = {"LMSDiscreteScheduler", "PNDMScheduler"}
HALFWAY = [pair for pair in SCHEDULERS if pair[0] not in NOT_HALFWAY]
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
CLIP = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)


def pipeline_with(scheduler: str, objective: str = "noise", **config):
    """A tiny pipeline for noise or for flow, sampled by a scheduler made from its own one's config."""
    if scheduler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    if objective == "flow":
        pipe = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), out_channels=4, **config)
    else:
        pipe = tiny_pipeline(**config)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def record_inputs(pipe) -> list[tuple[torch.Tensor, float]]:
    """What the transformer gets at each step, and its timestep; not between the two halves of a step of Heun's."""
    seen = []

    def remember(module, args, kwargs):
        if getattr(pipe.scheduler, "state_in_first_order", True):
            seen.append((kwargs["hidden_states"].clone(), kwargs["timestep"][0].item()))

    pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    return seen


def noised(code: torch.Tensor, noise: torch.Tensor, timestep: float, objective: str) -> torch.Tensor:
    """By the formula of the forward process."""
    signal, amount = levels(timestep, objective)
    return signal * code + amount * noise


def levels(timestep: float, objective: str) -> tuple[float, float]:
    """How much of a clip and of noise there is at a timestep."""
    if objective == "flow":
        return 1 - timestep / 1000, timestep / 1000
    log_alphas = official_scheduler().alphas_cumprod.double().log().numpy()
    alpha = np.exp(np.interp(timestep, np.arange(1000), log_alphas))
    return alpha**0.5, (1 - alpha) ** 0.5


def encoded(pipe, frames: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(frames).movedim(-1, -3)[None].float() / 127.5 - 1
    return pipe.encode_frames(pixels)


@pytest.mark.parametrize(("scheduler", "objective"), SCHEDULERS)
def test_given_frames_have_the_noise_of_every_step_and_stay(scheduler, objective):
    pipe = pipeline_with(scheduler, objective)
    noise = torch.randn(1, 4, 4, 8, 8, generator=seeded(1))
    seen = record_inputs(pipe)
    arguments = {"latents": noise, "num_inference_steps": 5}
    latents = generate(pipe, image=IMAGE, last_image=IMAGE[::-1], strength=1.0, **arguments)
    first, last = encoded(pipe, IMAGE[None]), encoded(pipe, IMAGE[None, ::-1].copy())
    assert torch.equal(latents[:, :, :1], first)
    assert torch.equal(latents[:, :, -1:], last)
    assert len(seen) >= 4
    for model_input, timestep in seen:
        for frame, code in ((0, first), (3, last)):
            expected = noised(code[:, :, 0], noise[:, :, frame], timestep, objective)
            torch.testing.assert_close(model_input[:, :, frame], expected.float(), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(latents[:, :, 1], generate(pipe, **arguments)[:, :, 1])  # its neighbour follows


@pytest.mark.parametrize(("scheduler", "objective"), HALFWAY)
def test_variation_starts_from_the_noised_clip(scheduler, objective):
    pipe = pipeline_with(scheduler, objective)
    noise = torch.randn(1, 4, 4, 8, 8, generator=seeded(1))
    seen = record_inputs(pipe)
    latents = generate(pipe, video=CLIP, strength=0.5, latents=noise, num_inference_steps=8)
    assert latents.shape == noise.shape
    model_input, timestep = seen[0]
    expected = noised(encoded(pipe, CLIP), noise, timestep, objective)
    torch.testing.assert_close(model_input, expected.float(), rtol=2e-3, atol=2e-3)
    num_calls = len(seen)
    seen.clear()
    generate(pipe, latents=noise, num_inference_steps=8)
    assert num_calls == pytest.approx(len(seen) / 2, abs=1)


@pytest.mark.parametrize(("scheduler", "objective"), HALFWAY)
@pytest.mark.parametrize("given", [("image",), ("last_image",), ("image", "last_image")])
def test_frames_begin_as_the_noised_images(scheduler, objective, given):
    pipe = pipeline_with(scheduler, objective)
    noise = torch.randn(1, 4, 4, 8, 8, generator=seeded(1))
    images = {"image": IMAGE, "last_image": IMAGE[::-1].copy()}
    seen = record_inputs(pipe)
    generate(pipe, **{name: images[name] for name in given}, strength=0.5, latents=noise, num_inference_steps=8)
    first, last = (encoded(pipe, images[name][None]) for name in (given[0], given[-1]))
    begin = torch.cat([(1 - share) * first + share * last for share in (0, 1 / 3, 2 / 3, 1)], dim=2)
    model_input, timestep = seen[0]
    torch.testing.assert_close(model_input, noised(begin, noise, timestep, objective).float(), rtol=2e-3, atol=2e-3)


def test_variation_of_strength_1_is_a_new_clip():
    pipe = tiny_pipeline()
    assert torch.equal(generate(pipe, video=CLIP, strength=1.0), generate(pipe))


@pytest.mark.parametrize(("scheduler", "objective"), HALFWAY)
def test_a_perfect_denoiser_gives_the_clip_back(scheduler, objective):
    """From halfway as well as from pure noise."""
    pipe = pipeline_with(scheduler, objective)
    code = encoded(pipe, CLIP)

    def predict(model_input, context, timestep, *conditions):
        signal, amount = levels(timestep.item(), objective)
        noise = (model_input - signal * code) / max(amount, 1e-6)
        if objective == "flow":
            return (noise - code).float()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1).float()

    pipe.predict = predict
    arguments = {"video": CLIP, "num_inference_steps": 20}
    errors = [
        ((generate(pipe, strength=strength, **arguments) - code).std() / code.std()).item() for strength in (1.0, 0.5)
    ]
    assert errors[0] < 0.1  # DEIS, SA and TCD leave 0.08: what noise there is at the last of 20 timesteps
    assert errors[1] < max(1.5 * errors[0], 0.02)


@pytest.mark.parametrize("scheduler", sorted(NOT_HALFWAY))
def test_schedulers_that_cannot_begin_halfway_are_refused(scheduler):
    with pytest.raises(ValueError, match=f"strength=0.5: {scheduler} cannot begin halfway"):
        generate(pipeline_with(scheduler), video=CLIP, strength=0.5, num_inference_steps=8)


def test_noise_is_right_where_timesteps_repeat():
    pipe = tiny_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.scheduler.set_timesteps(100)
    sigmas = pipe.scheduler.sigmas
    assert len(pipe.scheduler.timesteps.unique()) < 100
    noise = torch.randn(1, 4, 4, 8, 8, generator=seeded(1))
    seen = record_inputs(pipe)
    generate(pipe, image=IMAGE, strength=1.0, latents=noise, num_inference_steps=100)
    code = encoded(pipe, IMAGE[None])
    for (model_input, _), sigma in zip(seen, sigmas, strict=False):
        expected = (code[:, :, 0] + sigma * noise[:, :, 0]) / (1 + sigma**2) ** 0.5
        torch.testing.assert_close(model_input[:, :, 0], expected, rtol=1e-4, atol=1e-4)


def test_callbacks_may_keep_latents():
    kept = []
    latents = []

    def keep(pipe, step, timestep, inputs):
        kept.append(inputs["latents"])
        latents.append(inputs["latents"].clone())
        return {}

    generate(tiny_pipeline(), image=IMAGE, callback_on_step_end=keep)
    assert all(torch.equal(a, b) for a, b in zip(kept, latents, strict=True))


@pytest.mark.parametrize("config", [PyramidAttentionBroadcastConfig, FasterCacheConfig])
def test_windows_are_refused_with_caches_that_would_mix_them(config):
    pipe = tiny_pipeline()
    options = {"is_guidance_distilled": True} if config is FasterCacheConfig else {}
    cache = config(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep, **options
    )
    pipe.transformer.enable_cache(cache)
    generate(pipe, window_overlap=2)  # no more than one
    with pytest.raises(ValueError, match="in which windows would take each other's attention"):
        generate(pipe, num_frames=6, window_overlap=2)


def test_frames_may_come_in_any_of_the_usual_forms():
    pipe = tiny_pipeline(vae=tiny_kl())
    reference = generate(pipe, image=IMAGE, video=None)
    floats = IMAGE.astype(np.float32) / 255
    for image in (PIL.Image.fromarray(IMAGE), floats, torch.from_numpy(floats).permute(2, 0, 1), IMAGE[None, None]):
        torch.testing.assert_close(generate(pipe, image=image), reference)
    images = np.stack([IMAGE, IMAGE[::-1]])
    for one_each in (images, [PIL.Image.fromarray(image) for image in images]):
        pair = generate(pipe, image=one_each, batch_size=2, generator=[seeded(0), seeded(1)])
        torch.testing.assert_close(pair[:1], reference, rtol=0, atol=1e-4 * reference.std().item())
        torch.testing.assert_close(pair[1:, :, :1], encoded(pipe, images[1:]))
    larger = PIL.Image.fromarray(IMAGE).resize((64, 64))
    assert generate(pipe, image=larger).shape == reference.shape
    frames = [PIL.Image.fromarray(frame) for frame in CLIP]
    torch.testing.assert_close(generate(pipe, video=frames), generate(pipe, video=CLIP))
    two = np.stack([CLIP, CLIP[::-1]])
    generators = {"generator": [seeded(3), seeded(4)]}
    both = generate(pipe, video=two, batch_size=2, **generators)
    alone = generate(pipe, video=CLIP[::-1].copy(), generator=[seeded(4)])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4 * alone.std().item())
    assert generate(pipe, video=two[0].repeat(2, axis=0)).shape[2] == 8  # num_frames is the video's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": IMAGE[:8]}, r"image has shape .*: expected 3 channels of 16x16 pixels"),
        ({"image": "frame.png"}, "image is a str: expected PIL images"),
        ({"image": []}, "image is a list: expected PIL images"),
        ({"image": CLIP}, "expected 3 channels of 16x16 pixels, for 1 clip or 1"),
        ({"image": CLIP[None]}, "image has 4 frames: expected 1"),
        ({"image": CLIP[None, :0]}, r"image has shape \(1, 0, 3, 16, 16\)"),
        ({"image": IMAGE.astype(object)}, "image is a ndarray: expected PIL images"),
        ({"image": IMAGE.astype(np.float32)}, r"image has values from .* expected uint8 or floats in \[0, 1\]"),
        ({"image": PIL.Image.new("RGB", (32, 16))}, r"image has images of \[\(32, 16\)\] pixels: expected all of one"),
        ({"image": np.full((16, 16, 3), np.nan, np.float32)}, "image has values from nan"),
        ({"video": CLIP, "num_frames": 3}, "video has 4 frames: expected 3"),
        ({"video": np.stack([CLIP] * 3), "batch_size": 2}, "for 1 clip or 2"),
        ({"video": CLIP, "strength": 0.0}, "strength=0.0: expected more than 0"),
        ({"video": CLIP, "strength": 1.5}, "strength=1.5: expected more than 0 and at most 1"),
        ({"video": CLIP, "strength": 0.1}, "strength=0.1 of 3 steps leaves none"),
        ({"last_image": IMAGE, "num_frames": 1}, "last_image with num_frames=1"),
        ({"window_overlap": 4}, "window_overlap=4: expected 1 to 3 frames"),
        ({"window_overlap": 0}, "window_overlap=0: expected 1 to 3 frames"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_pipeline(), **arguments)


def test_windows_cover_the_clip_and_share_frames():
    pipe = tiny_pipeline()  # trained at 4 frames
    assert pipe.windows(4, 2) == [slice(0, 4)]
    assert pipe.windows(9, None) == [slice(0, 9)]
    assert pipe.windows(8, 2) == [slice(0, 4), slice(2, 6), slice(4, 8)]
    assert pipe.windows(9, 1) == [slice(0, 4), slice(3, 7), slice(5, 9)]


def test_windows_are_averaged_by_their_distance_from_an_end():
    pipe = tiny_pipeline()

    def predict(model_input, context, *conditions):
        return torch.cat([model_input, model_input], dim=1) + int(context.removeprefix("cond_"))

    pipe.predict = predict
    predicted = pipe.predict_by_windows(torch.zeros(1, 4, 6, 8, 8), pipe.windows(6, 2))
    # frames 2 and 3 are the third and last of window 0 (weights 2, 1), the first and second of window 1 (1, 2)
    assert predicted[0, 0, :, 0, 0].tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1])


def test_long_clips_by_windows():
    pipe = tiny_pipeline(num_classes=3)
    arguments = {"class_labels": [1], "guidance_scale": 2.0}
    assert torch.equal(generate(pipe, window_overlap=2, **arguments), generate(pipe, **arguments))
    seen = record_inputs(pipe)
    long = generate(pipe, num_frames=10, window_overlap=2, **arguments)
    assert long.shape == (1, 4, 10, 8, 8)
    assert len(seen) == 3 * 4
    assert all(model_input.shape == (2, 4, 4, 8, 8) for model_input, _ in seen)
    # a clip does not depend on what is beside it in the batch
    pair = [seeded(0), seeded(5)]
    both = generate(pipe, num_frames=10, window_overlap=2, class_labels=[1, 2], guidance_scale=2.0, generator=pair)
    torch.testing.assert_close(both[:1], long, rtol=1e-3, atol=1e-3 * long.std().item())


def test_long_clip_with_first_and_last_frame():
    pipe = pipeline_with("DPMSolverMultistepScheduler")
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    latents = generate(pipe, num_frames=10, window_overlap=2, image=IMAGE, last_image=IMAGE)
    assert torch.equal(latents[:, :, 0], latents[:, :, 9])


def test_nothing_given_changes_nothing():
    pipe = tiny_pipeline()
    assert torch.equal(generate(pipe, strength=0.2), generate(pipe))  # of no video
