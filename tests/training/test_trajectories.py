import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.training.trajectories import flow_solver, record_trajectories, straight_velocity


def tiny_pipeline(scheduler=None, **config) -> EndoraPipeline:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    config = {"num_layers": 1, "sample_size": 4, "num_frames": 2, "out_channels": 4, "num_classes": 3, **config}
    transformer = EndoraTransformer3DModel(2, 8, **config).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return EndoraPipeline(vae, transformer, scheduler or FlowMatchEulerDiscreteScheduler())


def test_states_are_those_of_the_sampler(tmp_path):
    pipe = tiny_pipeline()
    states, labels, sigmas = record_trajectories(pipe, tmp_path, 4, 3, 2, flow_shift=2.0, batch_size=2)
    assert states.shape == (4, 4, 4, 2, 4, 4)
    assert labels.tolist() == [0, 1, 2, 3]  # the last is the null class
    assert sigmas[-1] == 0
    student = flow_solver(pipe, 1, 2.0)
    student.set_timesteps(3)
    torch.testing.assert_close(student.sigmas.float(), sigmas)
    options = {"num_inference_steps": 6, "class_labels": [2], "output_type": "latent"}
    clip = pipe(latents=states[2:3, 0].float(), **options).frames
    torch.testing.assert_close(states[2:3, 3].float(), clip, rtol=0, atol=0.01 * clip.std().item())


def test_what_is_there_is_not_sampled_again(tmp_path):
    pipe = tiny_pipeline()
    states, _, _ = record_trajectories(pipe, tmp_path, 4, 2, 1, batch_size=2)
    (tmp_path / "part_000002.safetensors").unlink()
    stamp = (tmp_path / "part_000000.safetensors").stat().st_mtime_ns
    again, _, _ = record_trajectories(pipe, tmp_path, 4, 2, 1, batch_size=2)
    assert torch.equal(again, states)
    assert (tmp_path / "part_000000.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="holds trajectories of another calls_per_segment"):
        record_trajectories(pipe, tmp_path, 4, 2, 2, batch_size=2)


def test_a_refused_run_leaves_the_folder_free(tmp_path):
    with pytest.raises(ValueError, match="expected at most 1000"):
        record_trajectories(tiny_pipeline(), tmp_path, 2, 3, 400, batch_size=2)
    states, labels, _ = record_trajectories(
        tiny_pipeline(sample_size=(4, 6), num_classes=None), tmp_path, 2, 3, 2, batch_size=2
    )
    assert states.shape == (2, 4, 4, 2, 4, 6)
    assert labels.tolist() == [-1, -1]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"predicts epsilon: expected rectified flow"):
        record_trajectories(tiny_pipeline(DDPMScheduler(), out_channels=8), tmp_path, 4, 2)
    with pytest.raises(ValueError, match="3 trajectories: expected a multiple of the batch size 2"):
        record_trajectories(tiny_pipeline(), tmp_path, 3, 2, batch_size=2)


def test_straight_velocity_leads_to_the_end_of_a_segment():
    states, sigmas = torch.randn(5, 4, 2, 3), torch.tensor([1.0, 0.7, 0.2, 0.0])
    segments = torch.tensor([0, 1, 2, 0, 2])
    velocity = straight_velocity(states, sigmas, segments)
    rows = torch.arange(5)
    spans = (sigmas[segments + 1] - sigmas[segments]).reshape(-1, 1, 1)
    torch.testing.assert_close(states[rows, segments] + spans * velocity, states[rows, segments + 1])
