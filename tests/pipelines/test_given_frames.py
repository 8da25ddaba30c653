"""Clips from given frames, variations of a clip, and clips longer than the training's."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from test_pipeline_endora import SERVED, generate, official_scheduler, seeded, tiny_kl, tiny_pipeline

FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
CLIP = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)


def pipeline_with(scheduler: str, **config):
    """A tiny pipeline of noise, or of flow for a scheduler of flow."""
    if scheduler in FLOW:
        return tiny_pipeline(scheduler=getattr(diffusers, scheduler)(), out_channels=4, **config)
    if scheduler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
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


def noised(code: torch.Tensor, noise: torch.Tensor, timestep: float, is_flow: bool) -> torch.Tensor:
    """By the formula of the forward process."""
    if is_flow:
        return (1 - timestep / 1000) * code + timestep / 1000 * noise
    log_alphas = official_scheduler().alphas_cumprod.double().log().numpy()
    alpha = np.exp(np.interp(timestep, np.arange(1000), log_alphas))
    return alpha**0.5 * code + (1 - alpha) ** 0.5 * noise


def encoded(pipe, frames: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(frames).movedim(-1, -3)[None].float() / 127.5 - 1
    return pipe.encode_frames(pixels)


@pytest.mark.parametrize("scheduler", sorted(SERVED | FLOW))
def test_given_frames_have_the_noise_of_every_step_and_stay(scheduler):
    pipe = pipeline_with(scheduler)
    noise = torch.randn(1, 4, 4, 8, 8, generator=seeded(1))
    seen = record_inputs(pipe)
    arguments = {"latents": noise, "num_inference_steps": 5}
    latents = generate(pipe, image=IMAGE, last_image=IMAGE[::-1].copy(), **arguments)
    first, last = encoded(pipe, IMAGE[None]), encoded(pipe, IMAGE[None, ::-1].copy())
    assert torch.equal(latents[:, :, :1], first)
    assert torch.equal(latents[:, :, -1:], last)
    assert len(seen) >= 5
    for model_input, timestep in seen:
        for frame, code in ((0, first), (3, last)):
            expected = noised(code[:, :, 0], noise[:, :, frame], timestep, scheduler in FLOW)
            torch.testing.assert_close(model_input[:, :, frame], expected.float(), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(latents[:, :, 1], generate(pipe, **arguments)[:, :, 1])  # its neighbour follows


@pytest.mark.parametrize("scheduler", sorted(SERVED | FLOW))
def test_variation_starts_from_the_noised_clip(scheduler):
    pipe = pipeline_with(scheduler)
    noise = torch.randn(1, 4, 4, 8, 8, generator=seeded(1))
    seen = record_inputs(pipe)
    latents = generate(pipe, video=CLIP, strength=0.5, latents=noise, num_inference_steps=8)
    assert latents.shape == noise.shape
    assert latents.isfinite().all()
    model_input, timestep = seen[0]
    expected = noised(encoded(pipe, CLIP), noise, timestep, scheduler in FLOW)
    torch.testing.assert_close(model_input, expected.float(), rtol=2e-3, atol=2e-3)
    num_calls = len(seen)
    seen.clear()
    generate(pipe, latents=noise, num_inference_steps=8)
    assert num_calls == pytest.approx(len(seen) / 2, abs=1)  # PNDM begins with more


def test_variation_of_strength_1_is_a_new_clip():
    pipe = tiny_pipeline()
    assert torch.equal(generate(pipe, video=CLIP, strength=1.0), generate(pipe))


def test_a_weak_variation_with_a_perfect_denoiser_gives_the_clip_back():
    pipe = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), out_channels=4)
    noise = torch.randn(1, 4, 4, 8, 8, generator=seeded(1))
    code = encoded(pipe, CLIP)
    pipe.predict = lambda *inputs, **named: noise - code  # the velocity of the straight line between the two
    latents = generate(pipe, video=CLIP, strength=0.3, latents=noise, num_inference_steps=10)
    torch.testing.assert_close(latents, code, rtol=0, atol=1e-5)


def test_frames_may_come_in_any_of_the_usual_forms():
    pipe = tiny_pipeline(vae=tiny_kl())
    reference = generate(pipe, image=IMAGE, video=None)
    floats = IMAGE.astype(np.float32) / 255
    for image in (PIL.Image.fromarray(IMAGE), floats, torch.from_numpy(floats).permute(2, 0, 1), IMAGE[None, None]):
        torch.testing.assert_close(generate(pipe, image=image), reference)
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
        ({"image": CLIP}, "image has 4 frames: expected 1"),
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
