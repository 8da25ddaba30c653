import shutil

import pytest
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from script_runs import EXAMPLES, as_flags, run_main

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.training.trajectories import record_trajectories


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny pipeline of flow, whose ways are curved."""
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    config = {"num_layers": 1, "sample_size": 4, "num_frames": 2, "out_channels": 4, "num_classes": 3}
    transformer = EndoraTransformer3DModel(2, 8, **config)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("base")
    EndoraPipeline(vae, transformer, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


def distil(base, output_dir, **changes):
    options = {
        "num_steps": 2,
        "num_trajectories": 8,
        "rank": 4,
        "max_train_steps": 200,
        "checkpointing_steps": 100,
        "learning_rate": 1e-2,
        **changes,
    }
    run_main(EXAMPLES / "distill_endora.py", as_flags({"pretrained_model": base, "output_dir": output_dir, **options}))


def test_student_comes_nearer_in_as_few_steps(base, tmp_path):
    distil(base, tmp_path / "out")
    states, labels, _ = record_trajectories(
        EndoraPipeline.from_pretrained(base), tmp_path / "out" / "trajectories", 8, 2, 4
    )
    pipe = EndoraPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    errors = []
    for is_student in (False, True):
        if is_student:
            pipe.load_lora_weights(tmp_path / "out")
        latents = pipe(
            latents=states[:, 0].float(), class_labels=labels.tolist(), num_inference_steps=2, output_type="latent"
        ).frames
        errors.append((latents - states[:, -1]).square().mean().item())
    assert errors[1] < 0.7 * errors[0]

    # killed halfway, it goes on to the same adapter
    shutil.copytree(tmp_path / "out" / "trajectories", tmp_path / "again" / "trajectories")
    shutil.copytree(tmp_path / "out" / "checkpoint-100", tmp_path / "again" / "checkpoint-100")
    distil(base, tmp_path / "again")
    name = "pytorch_lora_weights.safetensors"
    whole, resumed = (load_file(tmp_path / folder / name) for folder in ("out", "again"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_trajectories": 6}, "6 trajectories: expected a multiple of the batch size 4"),
        ({"lora_targets": "nothing"}, "--lora_targets nothing"),
        ({"pretrained_model": "nowhere/at-all"}, "does not load"),
    ],
)
def test_refusals(base, tmp_path, changes, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=message):
        distil(changes.pop("pretrained_model", base), tmp_path / "out", **changes)


def test_wrong_numbers(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distil(base, tmp_path / "out", num_steps=0)
    assert "--num_steps 0: expected a positive integer" in capsys.readouterr().err
