"""StyleGANVPipeline: what its users expect of a clip, a seed, a time, a saved folder and a wrong argument."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_endora import EndoraPipelineOutput, StyleGANVGenerator, StyleGANVPipeline
from diffusers_endora.baselines.folder_class import require_folder_class
from diffusers_endora.baselines.stylegan_v import pipeline_stylegan_v


def make_pipeline(**config) -> StyleGANVPipeline:
    torch.manual_seed(0)
    config = {
        "resolution": 16,
        "num_frames": 6,
        "z_dim": 8,
        "w_dim": 12,
        "channel_base": 128,
        "channel_max": 16,
        "motion_z_dim": 6,
        "motion_code_dim": 7,
        "motion_z_distance": 4,
        "motion_kernel_size": 3,
        "num_frequencies": 5,
        **config,
    }
    return StyleGANVPipeline(StyleGANVGenerator(**config).eval())


@pytest.fixture(scope="module")
def pipe() -> StyleGANVPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def class_pipe() -> StyleGANVPipeline:
    return make_pipeline(num_classes=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(pipe: StyleGANVPipeline, **kwargs) -> torch.Tensor:
    return pipe(**{"generator": seeded(), "output_type": "pt", **kwargs}).frames


def test_outputs(pipe):
    tensor = clips(pipe, batch_size=2)
    assert tensor.shape == (2, 6, 3, 16, 16)
    assert tensor.min() >= 0
    assert tensor.max() <= 1
    array = clips(pipe, batch_size=2, output_type="np")
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    output = pipe(batch_size=2, generator=seeded())
    assert isinstance(output, EndoraPipelineOutput)
    assert [len(clip) for clip in output.frames] == [6, 6]
    assert isinstance(output.frames[0][0], PIL.Image.Image)
    np.testing.assert_allclose(np.asarray(output.frames[1][5]), 255 * array[1, 5], atol=0.51)
    assert torch.equal(pipe(generator=seeded(), output_type="pt", return_dict=False)[0], clips(pipe))


def test_frames_are_the_generator_s(pipe):
    """Content is drawn first, then motion; -1 is black and 1 white."""
    generator = seeded()
    z = torch.randn(1, 8, generator=generator)
    noise = pipe.generator.draw_motion_noise(1, 5, generator)
    with torch.no_grad():
        sample = pipe.generator(z, torch.arange(6.0)[None], motion_noise=noise).sample
    assert torch.allclose(clips(pipe), (sample / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_chunks_give_the_clip_at_once(pipe, monkeypatch):
    long = clips(pipe, batch_size=2, num_frames=40)
    monkeypatch.setattr(pipeline_stylegan_v, "FRAMES_AT_A_TIME", 1000)
    assert torch.allclose(clips(pipe, batch_size=2, num_frames=40), long, atol=1e-4)
    monkeypatch.setattr(pipeline_stylegan_v, "FRAMES_AT_A_TIME", 1)
    assert torch.allclose(clips(pipe, batch_size=2, num_frames=40), long, atol=1e-4)
    assert torch.allclose(clips(pipe, batch_size=2), long[:, :6], atol=1e-4)  # a longer clip begins like a shorter one


def test_times_are_continuous(pipe):
    frames = clips(pipe, num_frames=4)
    fine = clips(pipe, times=[step / 4 for step in range(13)])
    assert fine.shape[1] == 13
    assert torch.allclose(fine[:, ::4], frames, atol=1e-4)
    assert (fine[:, 1] - fine[:, 0]).abs().max() > 0
    assert torch.allclose(clips(pipe, times=torch.tensor([3, 1])), frames[:, [3, 1]], atol=1e-4)
    near = clips(pipe, times=np.array([2.0, 2.0001]))
    assert (near[:, 1] - near[:, 0]).abs().max() < 1e-2


def test_a_clip_depends_on_its_own_generator(pipe):
    both = clips(pipe, batch_size=2, generator=[seeded(1), seeded(2)])
    for index, seed in enumerate((1, 2)):
        alone = clips(pipe, generator=seeded(seed))
        assert torch.allclose(both[index : index + 1], alone, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-2


def test_latents_are_the_content(pipe):
    latents = torch.randn(1, 8, generator=seeded(5))
    assert torch.equal(clips(pipe, latents=latents), clips(pipe, latents=latents))
    assert (clips(pipe, latents=latents) - clips(pipe, latents=-latents)).abs().max() > 1e-2
    other_motion = clips(pipe, latents=latents, generator=seeded(9))
    assert (clips(pipe, latents=latents) - other_motion).abs().max() > 1e-3


def test_truncation_to_nothing_leaves_the_mean_content(pipe):
    latents = torch.randn(2, 8, generator=seeded(5))
    generators = [seeded(7), seeded(7)]
    first, second = clips(pipe, batch_size=2, latents=latents, generator=generators, truncation_psi=0.0)
    assert torch.allclose(first, second, atol=1e-4)


def test_class_labels(class_pipe):
    frames = clips(class_pipe, class_labels=[0, 2], generator=[seeded(), seeded()])
    assert frames.shape[0] == 2
    assert (frames[0] - frames[1]).abs().max() > 1e-2
    for_all = clips(class_pipe, class_labels=2, batch_size=2, generator=[seeded(), seeded()])
    assert torch.allclose(for_all, frames[1:].expand(2, -1, -1, -1, -1), atol=1e-4)
    assert torch.allclose(clips(class_pipe, class_labels=torch.tensor([2])), frames[1:], atol=1e-4)


def test_a_call_leaves_the_model_as_it_was():
    pipe = make_pipeline()
    pipe.generator.train()
    frames = clips(pipe)
    assert pipe.generator.training
    assert not frames.requires_grad
    assert torch.equal(pipe.generator.mean_w, torch.zeros(12))


def test_save_and_load(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "one")
    loaded = StyleGANVPipeline.from_pretrained(tmp_path / "one")
    assert torch.equal(clips(loaded), clips(pipe))
    loaded.save_pretrained(tmp_path / "two")
    index = json.loads((tmp_path / "two/model_index.json").read_text())
    index.pop("_diffusers_version")
    assert index == {"_class_name": "StyleGANVPipeline", "generator": ["diffusers", "StyleGANVGenerator"]}
    assert str(tmp_path) not in (tmp_path / "two/generator/config.json").read_text()
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "two"), StyleGANVPipeline)
    half = StyleGANVPipeline.from_pretrained(tmp_path / "two", dtype=torch.bfloat16)
    assert half.generator.dtype == torch.bfloat16
    assert (clips(half) - clips(pipe)).abs().mean() < 0.02


def test_a_folder_of_another_class_is_refused(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is of class StyleGANVPipeline, expected LVDMPipeline; load it by StyleGANVP"
    ):
        require_folder_class(tmp_path, "LVDMPipeline")
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "EndoraPipeline"]}')
    with pytest.raises(ValueError, match="is of class EndoraPipeline, expected StyleGANVPipeline"):
        StyleGANVPipeline.from_pretrained(tmp_path)
    require_folder_class("owner/a-model-on-the-hub", "StyleGANVPipeline")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a positive integer"),
        ({"num_frames": 0}, "num_frames=0: expected a positive integer"),
        ({"num_frames": 2.5}, "num_frames=2.5: expected a positive integer"),
        ({"times": []}, r"times has shape \(0,\): expected \(F,\)"),
        ({"times": [[0.0, 1.0]]}, r"times has shape \(1, 2\): expected \(F,\)"),
        ({"times": [0.0, -1.0]}, r"times=\[0.0, -1.0\]: expected numbers of frames from 0"),
        ({"times": [float("nan")]}, "expected numbers of frames"),
        ({"times": [2.0**21]}, "expected numbers of frames from 0 to 1048576"),
        ({"times": "ab"}, "times='ab': expected numbers"),
        ({"times": 3.5}, r"times has shape \(\): expected \(F,\)"),
        ({"times": [0.0, 1.0], "num_frames": 2}, "num_frames=2 with times: expected one of them"),
        ({"num_frames": 10**11}, "num_frames=100000000000: expected a positive integer up to 1048576"),
        ({"generator": (torch.Generator(),)}, "generator is a tuple: expected a torch.Generator, or a list"),
        ({"generator": 3}, "generator is a int"),
        ({"truncation_psi": "0.5"}, "truncation_psi='0.5': expected a finite number"),
        ({"class_labels": "a"}, "class_labels='a': expected numbers"),
        ({"height": 32}, "height=32: expected 16, the only size of this model"),
        ({"width": 8}, "width=8: expected 16"),
        ({"class_labels": 0}, r"class_labels=\[0\]: this model is unconditional"),
        ({"truncation_psi": float("inf")}, "truncation_psi=inf: expected a finite number"),
        ({"generator": [seeded()], "batch_size": 2}, "1 generators for batch_size=2"),
        ({"latents": torch.zeros(1, 9)}, r"latents has shape \(1, 9\): expected \(1, 8\)"),
        ({"output_type": "latent"}, 'output_type="latent": expected "pil", "np" or "pt"'),
    ],
)
def test_arguments_that_do_not_fit(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        clips(pipe, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "class_labels=None: expected labels from 0 to 2"),
        ({"class_labels": [0, 3]}, r"class_labels=\[0, 3\]: expected labels from 0 to 2"),
        ({"class_labels": 1.5}, r"class_labels=\[1.5\]: expected labels from 0 to 2"),
        ({"class_labels": [0, 1], "batch_size": 3}, "batch_size=3 with 2 class_labels"),
    ],
)
def test_class_labels_that_do_not_fit(class_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        clips(class_pipe, **arguments)


def test_values_that_are_not_finite_are_refused():
    pipe = make_pipeline()
    pipe.generator.const.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"StyleGANVGenerator in torch\.float32 left values that are not finite"):
        clips(pipe)


def test_a_generator_of_a_derived_class_is_refused():
    class Other(StyleGANVGenerator):
        pass

    with pytest.raises(ValueError, match=r"generator is a Other: expected a StyleGANVGenerator\."):
        StyleGANVPipeline(Other(resolution=8, channel_max=8, z_dim=8, w_dim=8, motion_z_dim=8, motion_code_dim=8))
