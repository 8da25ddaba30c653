"""The script that trains LVDM, on small networks: what its stages write, how they resume, what they refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from script_runs import EXAMPLES, as_flags, read_log, run_main

from diffusers_endora import LVDMAutoencoder, LVDMPipeline
from diffusers_endora.data.video_io import read_video_info

SCRIPT = EXAMPLES / "train_lvdm.py"
FIRST_STAGE = "autoencoder-training"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def arguments(material: dict[str, str], folder: Path, **changes) -> list[str]:
    options = {
        "train_data_dir": material["videos"],
        "output_dir": folder,
        "preset": "demo",
        "resolution": 32,
        "num_frames": 8,
        "window": 8,
        "autoencoder_channels": 4,
        "autoencoder_steps": 4,
        "model_channels": 8,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "num_cached_clips": 3,
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "num_validation_clips": 1,
        "validation_inference_steps": 2,
        "validation_loss_clips": 2,
        "dataloader_num_workers": 0,
        **changes,
    }
    return as_flags(options)


def train(material: dict[str, str], output_dir: Path | None, **changes) -> None:
    run_main(SCRIPT, arguments(material, output_dir, **changes))


def refusal(flags: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code and the error's line of a run that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(SCRIPT, flags)
    message = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    return 1 if isinstance(ended.value.code, str) else ended.value.code, message.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory) -> Path:
    """Both stages, class-conditional, not interrupted."""
    output_dir = tmp_path_factory.mktemp("trained") / "out"
    train(material, output_dir, class_conditional=True, validation_fraction=0.25, max_grad_norm="inf")
    return output_dir


def test_both_stages_end_with_a_pipeline_of_averaged_weights(trained):
    pipe = LVDMPipeline.from_pretrained(trained)
    assert pipe(class_labels=[0], num_inference_steps=2, output_type="np").frames.shape == (1, 8, 32, 32, 3)
    saved, average = load_file(trained / WEIGHTS), load_file(trained / "checkpoint-4" / "ema.safetensors")
    assert all(torch.equal(saved[name], average[name]) for name in average)
    first = load_file(trained / FIRST_STAGE / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, first[name]) for name, weight in pipe.autoencoder.state_dict().items())
    results = json.loads((trained / "training.json").read_text())["results"]
    assert pipe.config.latent_scale == results["latent_scale"]
    assert pipe.unet.config.num_classes == 2
    assert "library_name: diffusers" in (trained / "README.md").read_text()


def test_what_the_stages_measured_stands_in_their_training_json(trained):
    texts = [(folder / "training.json").read_text() for folder in (trained / FIRST_STAGE, trained)]
    of_stages = [json.loads(text, parse_constant=pytest.fail) for text in texts]  # JSON has neither NaN nor infinity
    for facts in of_stages:
        assert facts["arguments"]["preset"] == "demo"
        assert facts["class_names"] == ["a", "b"]
        assert facts["results"]["steps"] == facts["results"]["averaged_steps"] == 4
        assert facts["results"]["seconds"] > 0
        assert facts["results"]["num_parameters"] > 1000
        assert facts["results"]["num_broken"] == 1
    assert 5 < of_stages[0]["results"]["held_out_psnr_db"] < 30
    assert 0.5 < of_stages[1]["results"]["held_out_loss"] < 1


def test_the_stages_show_what_they_learnt(trained):
    assert (trained / FIRST_STAGE / "validation" / "step-4" / "reconstructions.png").is_file()
    assert read_video_info(trained / "validation" / "step-4" / "clip_0.mp4").num_frames == 8
    assert (trained / "validation" / "step-4" / "contact_sheet.png").is_file()
    for folder in (trained / FIRST_STAGE, trained):
        assert [line["step"] for line in read_log(folder)] == [1, 2, 3, 4]


def test_a_resumed_training_of_both_stages_is_the_uninterrupted_one_bit_for_bit(material, trained, tmp_path):
    options = {"class_conditional": True, "validation_fraction": 0.25, "max_grad_norm": "inf"}
    options["resume_from_checkpoint"] = "latest"
    train(material, tmp_path, **options)  # "latest" of a training that has not begun
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()  # damaged: the one before it is used
    damaged = tmp_path / FIRST_STAGE / "checkpoint-4" / "optimizer.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(material, tmp_path, **options)
    for stage in (FIRST_STAGE, "."):
        assert read_log(tmp_path / stage) == read_log(trained / stage)
    for name in (WEIGHTS, "autoencoder/diffusion_pytorch_model.safetensors"):
        one, other = load_file(tmp_path / name), load_file(trained / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_checkpoints_are_limited_and_a_used_folder_is_not_mixed_with(material, trained, tmp_path, capsys):
    train(
        material, tmp_path, stage="autoencoder", max_train_steps=None, checkpointing_steps=1, checkpoints_total_limit=2
    )
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    LVDMAutoencoder.from_pretrained(tmp_path)
    code, message = refusal(arguments(material, trained, class_conditional=True), capsys)
    assert code == 1
    assert "has the checkpoints of a training" in message


def test_the_models_of_long_videos_join_the_pipeline(material, trained, tmp_path, capsys):
    sizes = {"resolution": None, "num_frames": None, "autoencoder_steps": None, "class_conditional": True}
    sizes |= {"num_cached_clips": 2, "latent_stride": 2}
    code, message = refusal(
        arguments(material, tmp_path / "x", stage="interpolation", pretrained_model=trained, **sizes), capsys
    )
    assert code == 1
    assert "has no prediction_unet: train it first" in message
    train(material, tmp_path / "prediction", stage="prediction", pretrained_model=trained, **sizes)
    pipe = LVDMPipeline.from_pretrained(tmp_path / "prediction")
    assert pipe.prediction_unet.config.conditioning == "mask"
    assert pipe.interpolation_unet is None
    assert pipe.config.prediction_stride == 2
    of_prediction = {"stage": "interpolation", "pretrained_model": tmp_path / "prediction"}
    code, message = refusal(
        arguments(material, tmp_path / "x", **of_prediction, **{**sizes, "latent_stride": 3}), capsys
    )
    assert message.endswith("error: --latent_stride 3: the prediction_unet was trained with 2.")
    train(material, tmp_path / "long", **of_prediction, **{**sizes, "latent_stride": None})
    pipe = LVDMPipeline.from_pretrained(tmp_path / "long")
    assert pipe.interpolation_unet.config.num_frames == 3
    assert pipe(num_frames=20, num_inference_steps=1, class_labels=1, output_type="np").frames.shape[1] == 20
    first = load_file(trained / WEIGHTS)
    assert all(torch.equal(weight, first[name]) for name, weight in pipe.unet.state_dict().items())
    assert read_video_info(tmp_path / "long" / "validation" / "step-4" / "clip_0.mp4").num_frames == 12
    code, message = refusal(
        arguments(
            material, tmp_path / "y", stage="prediction", pretrained_model=trained, **{**sizes, "resolution": 64}
        ),
        capsys,
    )
    assert message.endswith("error: --resolution 64: --pretrained_model was trained at 32.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "denoiser"}, "--stage denoiser needs --pretrained_autoencoder."),
        ({"stage": "prediction"}, "--stage prediction needs --pretrained_model."),
        ({"pretrained_autoencoder": "x"}, "--pretrained_autoencoder is for --stage denoiser, not for the first two"),
        ({"pretrained_model": "x"}, "--pretrained_model is for --stage prediction or --stage interpolation, not for"),
        ({"stage": "autoencoder"}, "--max_train_steps is for --stage denoiser or"),
        ({"stage": "nothing"}, "invalid choice: 'nothing'"),
        ({"resume_from_checkpoint": "checkpoint-2"}, "expected latest, or --stage, whose checkpoint it is."),
        ({"mixed_precision": "fp16"}, "invalid choice: 'fp16'"),
        ({"disc_temporal_kernel_size": 2}, "--disc_temporal_kernel_size 2: expected an odd number."),
        ({"learning_rate": -1}, "--learning_rate -1.0: expected a positive number."),
        ({"autoencoder_steps": 0}, "--autoencoder_steps 0: expected a positive integer."),
        ({"ema_decay": 1.5}, "--ema_decay 1.5: expected a number from 0 to 1."),
        ({"train_data_dir": None}, "give --train_data_dir or --dataset_name."),
        ({"output_dir": None}, "--output_dir is required."),
        ({"push_to_hub": True}, "--push_to_hub needs --hub_model_id."),
        ({"validation_fvd": 2}, "--validation_fvd needs held-out videos"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_read(material, tmp_path, capsys, changes, message):
    code, error = refusal(arguments(material, tmp_path / "out", **changes), capsys)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "/nowhere"}, "/nowhere"),
        (
            {"resolution": 40},
            "--resolution 40: expected a multiple of 32, the autoencoder's 8 times what the UNet's 3",
        ),
        ({"num_frames": 6}, "--num_frames 6: expected a multiple of the autoencoder's 4."),
        ({"lpips_weights": "/nowhere"}, "/nowhere"),
        ({"stage": "denoiser", "pretrained_autoencoder": "/nowhere", "autoencoder_steps": None}, "/nowhere"),
        ({"autoencoder_channels": 3}, "norm_num_groups=8: expected a divisor of 2 * base_channels=6."),
    ],
)
def test_material_that_does_not_fit_gets_one_sentence(material, tmp_path, capsys, changes, message):
    code, error = refusal(arguments(material, tmp_path / "out", **changes), capsys)
    assert code == 1
    assert error.startswith("train_lvdm.py: error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(material, tmp_path):
    options = {"autoencoder_steps": 12, "max_train_steps": 12, "checkpointing_steps": 3, "validation_steps": 99}
    train(material, tmp_path / "straight", **options)
    flags = arguments(material, tmp_path / "killed", **options, resume_from_checkpoint="latest")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for checkpoint in (f"{FIRST_STAGE}/checkpoint-3", "checkpoint-3"):  # killed in the first stage, then in the second
        process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 300
        while not (tmp_path / "killed" / checkpoint).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_main(SCRIPT, flags)
    for stage in (FIRST_STAGE, "."):
        assert read_log(tmp_path / "killed" / stage) == read_log(tmp_path / "straight" / stage)
    one, other = (load_file(tmp_path / run / WEIGHTS) for run in ("killed", "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_processes_make_the_same_steps_as_one(material, tmp_path):
    options = {"autoencoder_batch_size": 4, "train_batch_size": 4, "disc_weight": 0.5, "num_cached_clips": 0}
    options |= {"optimizer": "adamw", "class_conditional": True, "checkpointing_steps": 4, "disc_start": 9}
    train(material, tmp_path / "one", **options)
    options |= {"autoencoder_batch_size": 2, "train_batch_size": 2}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command = [*launch, *arguments(material, tmp_path / "two", **options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for stage, names in ((FIRST_STAGE, ("loss", "pixel", "kl")), (".", ("loss",))):
        for one, two in zip(read_log(tmp_path / "one" / stage), read_log(tmp_path / "two" / stage), strict=True):
            assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=2e-3)
    options |= {"disc_start": 1, "max_train_steps": 1}  # and the discriminator takes part
    command = [*launch, *arguments(material, tmp_path / "adversarial", **options)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert read_log(tmp_path / "adversarial" / FIRST_STAGE)[-1]["discriminator"] > 0
