import copy
import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from peft import LoraConfig
from test_pipeline_endora import seeded, tiny_kl, tiny_pipeline

from diffusers_endora.metrics.evaluation import sampling_of
from diffusers_endora.metrics.sampling import sample_clips
from diffusers_endora.openvino_backend import use_openvino

pytest.importorskip("openvino")
pytestmark = pytest.mark.slow  # and apart from other tests: each shape is exported and compiled


@pytest.fixture(scope="module")
def pipes():
    """A pipeline of flow with classes, and the same by OpenVINO."""
    pipe = tiny_pipeline(vae=tiny_kl(), scheduler=FlowMatchEulerDiscreteScheduler(), out_channels=4, num_classes=3)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    other = copy.deepcopy(pipe)
    use_openvino(other, num_threads=1)
    return pipe, other


def generate(pipe, **arguments):
    arguments = {"num_inference_steps": 3, "generator": seeded(), "output_type": "np", **arguments}
    return torch.from_numpy(pipe(**arguments).frames)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"class_labels": [2], "guidance_scale": 2.0},
        {"num_frames": 6, "window_overlap": 1},
    ],
)
def test_same_clips(pipes, arguments):
    pipe, other = pipes
    torch.testing.assert_close(generate(other, **arguments), generate(pipe, **arguments), rtol=0, atol=2e-3)
    assert other.transformer.forward.graphs
    assert other.vae.decoder.forward.graphs


def test_a_graph_is_made_once_for_a_shape(pipes):
    _, other = pipes
    generate(other)
    graphs = dict(other.transformer.forward.graphs)
    generate(other, generator=seeded(1), class_labels=[1])
    assert other.transformer.forward.graphs == graphs


def test_what_graphs_do_not_know_runs_as_before(pipes, tmp_path):
    pipe, other = pipes
    latents, timestep, label = torch.randn(1, 4, 4, 8, 8), torch.tensor([500]), torch.tensor([1])
    with torch.no_grad():
        expected = pipe.transformer(latents, timestep, label, output_spatial_states=(0,))
        output = other.transformer(latents, timestep, label, output_spatial_states=(0,))
    assert torch.equal(output.sample, expected.sample)
    assert torch.equal(output.spatial_states[0], expected.spatial_states[0])
    assert other.transformer(latents, timestep, label).sample.requires_grad
    graphs = dict(other.transformer.forward.graphs)
    for each in pipes:
        each.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    torch.testing.assert_close(generate(other, num_frames=3), generate(pipe, num_frames=3), rtol=0, atol=2e-3)
    assert other.transformer.forward.graphs == graphs
    for each in pipes:
        each.transformer.disable_cache()
    other.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded), generate(pipe))


def test_lora_counts(pipes):
    """By torch while it is in layers of its own, by a new graph once it is fused."""
    pipe, other = pipes
    generate(other)
    plain = next(iter(other.transformer.forward.graphs.values()))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    for each in pipes:
        torch.manual_seed(0)
        each.transformer.add_adapter(config)
    with_lora = generate(pipe)
    torch.testing.assert_close(generate(other), with_lora, rtol=0, atol=2e-3)
    for each in pipes:
        each.fuse_lora(components=["transformer"])
        each.unload_lora_weights()
    torch.testing.assert_close(generate(other), with_lora, rtol=0, atol=2e-3)
    assert plain not in other.transformer.forward.graphs.values()


def test_gradients_and_caches(pipes):
    pipe, other = pipes
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    assert other.vae.decode(latents).sample.requires_grad
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(ValueError, match="has a cache enabled: disable it"):
        use_openvino(pipe)
    pipe.transformer.disable_cache()


def test_bf16_is_near(pipes):
    pipe, _ = pipes
    other = copy.deepcopy(pipe)
    use_openvino(other, "bf16", num_threads=1)
    difference = (generate(other) - generate(pipe)).abs().mean()
    assert 0 < difference < 0.05


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match=r"transformer is on cpu in torch.bfloat16: expected cpu and torch.float32"):
        use_openvino(tiny_pipeline().to(torch.bfloat16))
    with pytest.raises(ValueError, match="precision='fp16': expected f32 or bf16"):
        use_openvino(tiny_pipeline(), "fp16")


def test_sampled_clips_say_what_computed_them(pipes, tmp_path):
    pipe, other = (copy.deepcopy(one) for one in pipes)
    settings = {"num_clips": 1, "seed": 0, "num_inference_steps": 2, "num_frames": 4}
    sample_clips(other, tmp_path, **settings)
    assert json.loads((tmp_path / "sampling.json").read_text())["backend"] == "openvino f32"
    assert "torch.float32 by openvino f32" in sampling_of(tmp_path)
    with pytest.raises(ValueError, match="holds clips of another model or other settings"):
        sample_clips(pipe, tmp_path, **settings)
    sample_clips(pipe, tmp_path / "torch", **settings)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(ValueError, match="holds clips of another model or other settings"):
        sample_clips(pipe, tmp_path / "torch", **settings)


def test_still_images_run_by_torch_however_they_are_given(pipes):
    pipe, other = pipes
    inputs = torch.randn(1, 4, 6, 8, 8, generator=seeded()), torch.tensor([500]), torch.tensor([[1, 2, 0]])
    with torch.no_grad():
        assert torch.equal(other.transformer(*inputs, 2)[0], pipe.transformer(*inputs, 2)[0])
