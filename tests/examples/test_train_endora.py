"""The training script end to end on small real components: what it writes, how it resumes, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Video
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from hub_server import TOKEN, Fault, HubServer
from safetensors.torch import load_file, save_file
from script_runs import EXAMPLES, as_flags, read_log, run_main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTModel

from diffusers_endora import DinoPrior, EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.data.corpora.phantom import Phantom
from diffusers_endora.data.video_io import read_video_info
from diffusers_endora.training import trainer
from diffusers_endora.training.checkpoints import find_damage
from diffusers_endora.training.trainer import Trainer
from diffusers_endora.training.training_clips import TrainingClips
from diffusers_endora.training.training_model import use_plain_attention
from diffusers_endora.training.validation import Validation

SCRIPT = EXAMPLES / "train_endora.py"
MODEL = "model.safetensors"  # in a checkpoint
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def arguments(material: dict[str, str], output_dir: Path | None, **changes) -> list[str]:
    options = {
        "train_data_dir": material["videos"],
        "pretrained_vae": material["vae"],
        "dino_model": material["teacher"],
        "output_dir": output_dir,
        "preset": "demo",
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "patch_size": 2,
        "resolution": 32,
        "num_still_images": 2,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "num_validation_clips": 1,
        "validation_inference_steps": 2,
        "dataloader_num_workers": 0,
        **changes,
    }
    return as_flags(options)


def train(material: dict[str, str], output_dir: Path | None, **changes) -> None:
    """Runs the script's `main` in this process."""
    run_main(SCRIPT, arguments(material, output_dir, **changes))


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory) -> Path:
    """A class-conditional training with the prior, not interrupted."""
    output_dir = tmp_path_factory.mktemp("trained") / "out"
    train(material, output_dir, class_conditional=True)
    return output_dir


def test_ends_with_a_pipeline_a_card_and_validation_clips(trained):
    pipe = EndoraPipeline.from_pretrained(trained)
    assert pipe(class_labels=[0], num_inference_steps=2, output_type="np").frames.shape == (1, 16, 32, 32, 3)
    assert pipe.transformer.config.num_classes == 2
    card = (trained / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "4 videos, 1 more could not be read" in card
    assert "`1` b" in card
    assert "official, weight 0.5, teacher teacher" in card
    assert f"# {trained.name}\n" in card
    assert read_video_info(trained / "validation" / "step-4" / "clip_0.mp4").num_frames == 16
    results = json.loads((trained / "training.json").read_text())["results"]
    assert results["steps"] == results["averaged_steps"] == 4
    assert 0 < results["gaussian_mse"] < 1
    assert 0 < results["prior"] < 2


def test_the_saved_weights_are_the_moving_average(trained):
    saved = load_file(trained / WEIGHTS)
    average, last = load_file(trained / "checkpoint-4/ema.safetensors"), load_file(trained / "checkpoint-4" / MODEL)
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    assert any(not torch.equal(saved[name], last[f"transformer.{name}"]) for name in saved)


def test_the_log_has_a_line_for_every_step(trained):
    lines = read_log(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["mse"] + line["vb"] + 0.5 * line["prior"], rel=1e-6)
        assert line["grad_norm"] > 0
    results = json.loads((trained / "training.json").read_text())["results"]
    assert results["mse"] == pytest.approx(np.mean([line["mse"] for line in lines]))


def assert_same_training(one: Path, other: Path, checkpoint: str) -> None:
    """Bit for bit: weights, average, optimiser and the losses of every step."""
    for name in (MODEL, "ema.safetensors", "gaussian_baseline.safetensors"):
        first, second = load_file(one / checkpoint / name), load_file(other / checkpoint / name)
        assert all(torch.equal(first[key], second[key]) for key in first), name
    saved = [torch.load(run / checkpoint / "optimizer.bin") for run in (one, other)]
    for part in ("muon", "adamw") if "muon" in saved[0] else (None,):
        first, second = ((optimizer if part is None else optimizer[part])["state"] for optimizer in saved)
        assert first
        assert all(torch.equal(first[i][key], second[i][key]) for i in first for key in first[i])
    assert read_log(one) == read_log(other)


@pytest.mark.parametrize("checkpoint", ["latest", "checkpoint-2"])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(material, trained, tmp_path, checkpoint):
    train(material, tmp_path, class_conditional=True, max_train_steps=3, logging_steps=3, validation_steps=100)
    (tmp_path / "checkpoint-9.partial").mkdir()  # what a kill during a save leaves
    if checkpoint == "latest":
        (tmp_path / "checkpoint-3" / MODEL).unlink()  # damaged: the one before it is used
    train(material, tmp_path, class_conditional=True, resume_from_checkpoint=checkpoint)
    assert_same_training(trained, tmp_path, "checkpoint-4")
    assert not (tmp_path / "checkpoint-9.partial").exists()


def test_guidance_by_a_weaker_model_is_learnt_and_resumes_exactly(material, trained, tmp_path):
    options = {"class_conditional": True, "pretrained_model": trained, "weaker_model": trained / "checkpoint-2"}
    options |= {"autoguidance_scale": 50, "lr_scheduler": "cosine", "validation_steps": 99}
    train(material, tmp_path / "straight", **options)
    train(material, tmp_path / "stopped", **options)
    for name in ("checkpoint-4", "training.json"):
        path = tmp_path / "stopped" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(material, tmp_path / "stopped", **options, resume_from_checkpoint="latest")
    assert_same_training(tmp_path / "straight", tmp_path / "stopped", "checkpoint-4")
    first, unguided = read_log(tmp_path / "straight")[0], read_log(trained)[0]
    assert first["mse"] != unguided["mse"]
    with pytest.raises(SystemExit, match=r"checkpoint-4 is of another training: .*autoguidance_scale was 50"):
        train(material, tmp_path / "stopped", **{**options, "autoguidance_scale": 3}, resume_from_checkpoint="latest")


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_resuming_across_epochs_with_accumulation_is_exact(material, tmp_path, optimizer):
    options = {
        "optimizer": optimizer,
        "prior": "none",
        "dino_model": None,
        "train_batch_size": 16,  # 80 frames: an epoch ends within a micro-batch
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "max_train_steps": 5,
        "checkpointing_steps": 2,
        "validation_steps": 99,
        "dataloader_num_workers": 1,
    }
    train(material, tmp_path / "straight", **options)
    train(material, tmp_path / "stopped", **options)
    for name in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(tmp_path / "stopped" / name)
    train(material, tmp_path / "stopped", **options, resume_from_checkpoint="latest")
    assert_same_training(tmp_path / "straight", tmp_path / "stopped", "checkpoint-5")
    results = [
        json.loads((tmp_path / run / "training.json").read_text())["results"] for run in ("straight", "stopped")
    ]
    assert results[0] == results[1]
    assert results[0]["averaged_steps"] == 5


@pytest.mark.slow
def test_processes_and_accumulation_share_out_the_same_steps(material, tmp_path):
    options = {"max_train_steps": 20, "checkpointing_steps": 1, "validation_steps": 99, "class_conditional": True}
    options |= {"checkpoints_total_limit": 20, "logging_steps": 20}
    train(material, tmp_path / "one", train_batch_size=4, **options)
    train(material, tmp_path / "accumulated", train_batch_size=2, gradient_accumulation_steps=2, **options)
    # `accelerate launch` leaves several CPU processes to mpirun or torchrun
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, *arguments(material, tmp_path / "two", train_batch_size=2, **options)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 clips x 2 processes" in run.stdout
    EndoraPipeline.from_pretrained(tmp_path / "two")

    # what two processes began, one ends
    shutil.copytree(tmp_path / "two" / "checkpoint-15", tmp_path / "mixed" / "checkpoint-15")
    shutil.copy(tmp_path / "two" / "training_log.jsonl", tmp_path / "mixed")
    train(material, tmp_path / "mixed", train_batch_size=4, resume_from_checkpoint="latest", **options)

    # what was begun with whole steps is ended with accumulated ones
    shutil.copytree(tmp_path / "one" / "checkpoint-15", tmp_path / "divided" / "checkpoint-15")
    shutil.copy(tmp_path / "one" / "training_log.jsonl", tmp_path / "divided")
    accumulated = {"train_batch_size": 2, "gradient_accumulation_steps": 2, **options}
    train(material, tmp_path / "divided", resume_from_checkpoint="latest", **accumulated)

    expected = torch.load(tmp_path / "one" / "checkpoint-1" / "optimizer.bin")["state"]
    largest = max(state["exp_avg"].abs().max() for state in expected.values())
    for other in ("accumulated", "two"):
        # After a step from zero, Adam's first moment is a tenth of the gradient
        first = torch.load(tmp_path / other / "checkpoint-1" / "optimizer.bin")["state"]
        for i, state in expected.items():
            assert ((first[i]["exp_avg"] - state["exp_avg"]).abs().max() / largest).item() < 1e-6
    for other in ("accumulated", "two", "mixed", "divided"):
        for line, same in zip(read_log(tmp_path / "one"), read_log(tmp_path / other), strict=True):
            assert same == pytest.approx(line, rel=1e-5)


@pytest.mark.parametrize(("skips", "optimizer"), [(False, "adamw"), (True, "adamw"), (True, "muon")])
def test_a_bad_step_leaves_the_weights_alone(material, tmp_path, monkeypatch, skips, optimizer):
    random_numbers = TrainingClips.random_numbers

    def poisoned(self, position, *args):
        drawn = random_numbers(self, position, *args)
        if position == 5:  # of step 3
            drawn["noise"].fill_(float("nan"))
        return drawn

    options = {"prior": "none", "dino_model": None, "validation_steps": 99, "checkpointing_steps": 99}
    options["optimizer"] = optimizer
    monkeypatch.setattr(TrainingClips, "random_numbers", poisoned)
    if skips:
        train(material, tmp_path, **options, skip_bad_steps=True)
        log = read_log(tmp_path)
        assert [line.get("skipped", False) for line in log] == [False, False, True, False]
        assert log[2]["loss"] is None
        results = json.loads((tmp_path / "training.json").read_text())["results"]
        assert (results["skipped_steps"], results["averaged_steps"], results["steps"]) == (1, 3, 4)
        weights = load_file(tmp_path / "checkpoint-4" / MODEL)
        assert all(value.isfinite().all() for value in weights.values())
        return
    with pytest.raises(SystemExit) as raised:
        train(material, tmp_path, **options)
    message = str(raised.value.code)
    assert message.startswith("train_endora.py: error: step 3: the loss or its gradient is not finite")
    bad = json.loads((tmp_path / "bad_step.json").read_text())
    assert bad["step"] == 3
    assert [clip["position"] for clip in bad["clips"]] == [4, 5]
    assert np.isfinite([clip["squared_error"] for clip in bad["clips"]]).tolist() == [True, False]
    assert all(clip["clip"] in message and ".mp4 from frame" in clip["clip"] for clip in bad["clips"])
    # the state is that of a training that skips the step, and goes on like it
    train(material, tmp_path, **options, resume_from_checkpoint="latest")
    train(material, tmp_path / "skipping", **options, skip_bad_steps=True)
    assert_same_training(tmp_path, tmp_path / "skipping", "checkpoint-4")


@pytest.mark.slow
def test_a_step_is_bad_or_not_however_it_is_shared_out(material, tmp_path):
    options = {"prior": "none", "dino_model": None, "validation_steps": 99, "max_train_steps": 1, "logging_steps": 1}
    with pytest.raises(SystemExit, match="step 1: "):
        train(material, tmp_path / "errors", **options, max_loss=1e-9)
    clips = json.loads((tmp_path / "errors" / "bad_step.json").read_text())["clips"]
    errors = [clip["squared_error"] for clip in clips]
    options["max_loss"] = (max(errors) + np.mean(errors)) / 2  # above the step's mean, below one process'
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, *arguments(material, tmp_path / "two", train_batch_size=1, **options)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert read_log(tmp_path / "two")[0]["mse"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_step_beyond_all_reason_is_bad(material, tmp_path):
    options = {"prior": "none", "dino_model": None, "validation_steps": 99, "max_loss": 0.5}
    with pytest.raises(SystemExit, match=r"step 1: .* the noise error is above --max_loss 0\.5"):
        train(material, tmp_path, **options)
    assert json.loads((tmp_path / "bad_step.json").read_text())["step"] == 1


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk, which root may")
def test_a_full_disk_is_said_and_the_training_goes_on(material, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", disk], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        options = {"prior": "none", "dino_model": None, "validation_steps": 1, "checkpointing_steps": 1}
        options |= {"validation_fraction": 0.25, "early_stopping_patience": 9, "report_to": "tensorboard"}
        options |= {"logging_steps": 1, "max_train_steps": 6}
        (disk / "filler").write_bytes(bytes(150_000))
        with pytest.raises(SystemExit):  # in the end there is no room for the pipeline either
            train(material, disk, **options)
        captured = capsys.readouterr()
        printed = captured.out
        assert "train_endora.py: error: " in captured.err.splitlines()[-1]
        assert not list(disk.glob(".new-*"))
        kept = [path.name for path in sorted(disk.glob("checkpoint-*"))]
        assert kept[0] == "checkpoint-1"
        assert 1 <= len(kept) < 6
        assert "could not be written" in printed
        assert printed.count("earlier checkpoints are untouched") == 6 - len(kept)
        assert "not written: best.safetensors: Error while serializing: I/O error: No space left on device" in printed
        assert "step 6: not written: validation: " in printed
        assert [line["step"] for line in read_log(disk)][:1] == [1]
        assert [find_damage(disk / name) for name in kept] == [None] * len(kept)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # trackers may still hold their files


def test_early_stopping_publishes_the_best_weights(material, tmp_path, monkeypatch):
    losses = iter([0.9, 0.5, 0.6, 0.7, 0.1])
    monkeypatch.setattr(Trainer, "held_out_loss", lambda self: next(losses))
    options = {"prior": "none", "dino_model": None, "max_train_steps": 9, "checkpointing_steps": 1}
    options |= {"validation_steps": 1, "early_stopping_patience": 2, "validation_fraction": 0.25}
    train(material, tmp_path, **options)
    results = json.loads((tmp_path / "training.json").read_text())["results"]
    assert (results["steps"], results["weights_of_step"], results["held_out_loss"]) == (4, 2, 0.5)
    published, best = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "checkpoint-2" / "ema.safetensors")
    assert all(torch.equal(published[name], best[name]) for name in published)


def test_the_best_weights_come_with_a_checkpoint(material, tmp_path, monkeypatch):
    options = {"prior": "none", "dino_model": None, "max_train_steps": 3, "checkpointing_steps": 1}
    options |= {"validation_steps": 1, "early_stopping_patience": 9, "validation_fraction": 0.25}
    losses = iter([0.5, 0.4, 0.6, 0.7])
    monkeypatch.setattr(Trainer, "held_out_loss", lambda self: next(losses))
    train(material, tmp_path / "first", **options)
    best = load_file(tmp_path / "first" / "checkpoint-2" / "ema.safetensors")
    # elsewhere, from the checkpoint alone
    moved = tmp_path / "first" / "checkpoint-2"
    train(material, tmp_path / "second", **options, resume_from_checkpoint=moved)
    # in the same folder, whose own best weights are of another time
    (tmp_path / "first" / "best.safetensors").unlink()
    (tmp_path / "first" / "best.safetensors").write_bytes(b"")
    losses = iter([0.6])
    train(material, tmp_path / "first", **options, resume_from_checkpoint="checkpoint-2")
    for name in ("first", "second"):
        published = load_file(tmp_path / name / WEIGHTS)
        assert all(torch.equal(published[key], best[key]) for key in published)
        results = json.loads((tmp_path / name / "training.json").read_text())["results"]
        assert (results["weights_of_step"], results["held_out_loss"]) == (2, 0.4)
        assert "0.4000, of the weights of step 2 |" in (tmp_path / name / "README.md").read_text()
    assert (tmp_path / "first" / "checkpoint-3.abandoned").exists()


def test_a_folder_with_checkpoints_is_not_trained_over(material, trained, tmp_path):
    before = read_log(trained)
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        with pytest.raises(SystemExit, match="has the checkpoints of a training, up to checkpoint-4: go on"):
            train(material, trained, class_conditional=True, resume_from_checkpoint=checkpoint)
    assert read_log(trained) == before


def test_a_kl_posterior_is_sampled_alike_with_and_without_the_cache(material, tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(tmp_path / "vae")
    options = {"pretrained_vae": tmp_path / "vae", "prior": "none", "dino_model": None, "validation_steps": 99}
    options |= {"checkpointing_steps": 2}
    train(material, tmp_path / "plain", **options)
    cached = {**options, "cache_features": tmp_path / "cache"}
    train(material, tmp_path / "cached", **cached)
    train(material, tmp_path / "stopped", **{**cached, "max_train_steps": 2})
    train(material, tmp_path / "stopped", **cached, resume_from_checkpoint="latest")
    assert_same_training(tmp_path / "cached", tmp_path / "stopped", "checkpoint-4")
    for line, same in zip(read_log(tmp_path / "plain"), read_log(tmp_path / "cached"), strict=True):
        assert same == pytest.approx(line, rel=1e-4)


def test_a_training_ends_on_the_hub(material, tmp_path, monkeypatch, capsys):
    options = {"prior": "none", "dino_model": None, "max_train_steps": 1, "push_to_hub": True, "hub_token": TOKEN}
    options |= {"hub_model_id": "me/colon", "license": "mit"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match=r"train_endora\.py: error: the Hub cannot be reached"):
        train(material, tmp_path / "out", **options)
    with HubServer() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        train(material, tmp_path / "out", **options)
        files = hub.repositories["me/colon"].files()
        hub.faults = [Fault("POST /api/models/me/colon/commit", times=99, status=500)]
        with pytest.raises(SystemExit) as raised:
            train(material, tmp_path / "again", **options)
    assert raised.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("Not published: the Hub cannot be reached or keeps failing")
    assert message.endswith(f"endora publish {tmp_path / 'again'} me/colon")
    assert files[WEIGHTS] == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert b"license: mit" in files["README.md"]
    assert {"training.json", "training_log.jsonl", "samples/clip.mp4"} <= set(files)


def test_the_held_out_loss_is_of_other_videos_and_the_same_each_time(material, tmp_path):
    options = {"prior": "none", "dino_model": None, "max_train_steps": 2, "learning_rate": 1e-30, "use_ema": True}
    options |= {"validation_steps": 1, "validation_fraction": 0.25, "validation_loss_clips": 5}
    evaluated = []
    original = Trainer.held_out_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "held_out_loss", lambda self: evaluated.append((self, original(self))) or 1.0)
        train(material, tmp_path, **options)
    trainer = evaluated[0][0]
    names = {trainer.held_out.dataset.video_name(i) for i in range(trainer.held_out.dataset.num_videos)}
    assert len(names) == 1
    assert not names & {trainer.dataset.video_name(i) for i in range(trainer.dataset.num_videos)}
    assert evaluated[0][1] == evaluated[1][1]
    assert 0.9 < evaluated[0][1] < 1.1  # a new transformer predicts zeros


class ScalarReads(TorchDispatchMode):
    """Notes where numbers are read out of tensors, which on a GPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [frame for frame in traceback.extract_stack() if "diffusers_endora" in frame.filename]
            self.places.append(frames[-1].name)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device_but_the_flag_of_the_step_before(material, tmp_path):
    options = {"max_train_steps": 6, "logging_steps": 6, "checkpointing_steps": 6, "validation_steps": 6}
    options |= {"cache_features": tmp_path / "cache", "gradient_accumulation_steps": 2}  # labels on a CPU are checked
    read_of_steps = []
    original = Trainer._report
    with ScalarReads() as reads, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainer,
            "_report",
            lambda self, progress: (
                read_of_steps.append(reads.places[:]),
                original(self, progress),
                reads.places.clear(),
            ),
        )
        train(material, tmp_path / "out", **options)
    # the flag has been copied to the CPU by then, in the background
    assert read_of_steps[1:] == [["_stop_if_bad"]] * 5


def test_validation_reaches_the_tracker(material, tmp_path):
    options = {"prior": "none", "dino_model": None, "report_to": "tensorboard", "max_train_steps": 2}
    options |= {"validation_steps": 1, "logging_steps": 1, "validation_fraction": 0.25, "validation_loss_clips": 2}
    train(material, tmp_path, **options)
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars("held_out_loss")] == [1, 2]
    expected = {"loss", "mse", "vb", "grad_norm_last", "lr", "clips_per_second", "data_wait", "memory_gb"}
    assert expected <= set(tags["scalars"])
    assert any(tag.startswith("mse_t") for tag in tags["scalars"])
    assert tags["images"] == ["contact_sheet"]


@pytest.mark.slow
def test_fvd_on_a_schedule(material, tmp_path):
    fvds = []
    original = Validation.fvd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "fvd", lambda self, pipeline: fvds.append(original(self, pipeline)) or fvds[-1])
        options = {"prior": "none", "dino_model": None, "max_train_steps": 4, "validation_steps": 1}
        options |= {"validation_fraction": 0.5, "validation_fvd": 4, "validation_fvd_steps": 3}
        train(material, tmp_path, **options)
    assert len(fvds) == 2  # after step 3 and at the end
    assert all(value > 100 for value in fvds)  # an untrained model


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "v_prediction", "zero_terminal_snr": True},
        {"prediction_type": "flow", "timestep_density": "logit_normal"},
        {"prediction_type": "v_prediction", "loss_weighting": "min_snr"},
    ],
)
def test_other_recipes_reach_the_pipeline(material, tmp_path, options):
    train(material, tmp_path, **options, max_train_steps=1, prior="repa")
    pipe = EndoraPipeline.from_pretrained(tmp_path)
    if options["prediction_type"] == "flow":
        assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        assert pipe.transformer.config.out_channels == pipe.transformer.config.in_channels
    else:
        assert pipe.scheduler.config.prediction_type == "v_prediction"
        assert pipe.scheduler.config.rescale_betas_zero_snr == options.get("zero_terminal_snr", False)
    assert pipe(num_inference_steps=2, output_type="np").frames.shape == (1, 16, 32, 32, 3)


def test_a_config_file_sets_flags_and_the_command_line_overrides_them(material, tmp_path):
    (tmp_path / "config.yaml").write_text("prior: none\ndino_model: null\nmax_train_steps: 3\nuse_ema: false\n")
    train(material, tmp_path / "out", config=tmp_path / "config.yaml", dino_model=None, max_train_steps=1)
    written = json.loads((tmp_path / "out" / "training.json").read_text())["arguments"]
    assert (written["prior"], written["max_train_steps"], written["use_ema"]) == ("none", 1, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_steps: 3", "there is no flag max_steps"),
        ("- 3", "expected flags by name"),
        ("max_train_steps: many", "max_train_steps: 'many' is not one of its values"),
        ("prior: other", "prior: 'other' is not one of its values"),
        ("train_batch_size: 1.5", "train_batch_size: 1.5 is not one of its values"),
        ("use_ema: 1", "use_ema: 1: expected true or false"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_config_file_is_one_line(material, tmp_path, capsys, content, message):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(SystemExit) as raised:
        train(material, tmp_path / "out", config=tmp_path / "config.yaml")
    assert raised.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_resuming_a_finished_training_writes_its_results_again(material, tmp_path):
    options = {"prior": "none", "dino_model": None, "max_train_steps": 2, "validation_steps": 99}
    train(material, tmp_path, **options, hub_token="hf_secret")
    before = json.loads((tmp_path / "training.json").read_text())["results"]
    for name in ("training.json", "README.md", "model_index.json"):
        (tmp_path / name).unlink()
    train(material, tmp_path, **options, resume_from_checkpoint="latest")
    assert json.loads((tmp_path / "training.json").read_text())["results"] == before
    assert (tmp_path / "README.md").exists()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert written == []


def test_resuming_another_training_is_refused(material, tmp_path):
    options = {"max_train_steps": 2, "validation_steps": 99, "lr_scheduler": "cosine"}
    train(material, tmp_path / "out", **options)
    other = {"vae": tmp_path / "vae", "teacher": tmp_path / "teacher"}
    for name, path in other.items():
        shutil.copytree(material[name], path)
        weights = next(path.glob("*.safetensors"))
        save_file({key: value + 1 for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    changes = {"train_batch_size": 4, "num_layers": 2, "seed": 1, "max_train_steps": 3, "max_grad_norm": 2}
    changes["optimizer"] = "muon"
    changes |= {"pretrained_vae": other["vae"], "dino_model": other["teacher"]}
    names = {"train_batch_size": "clips_per_step", "num_layers": "transformer", "pretrained_vae": "vae"}
    names["dino_model"] = "teacher"
    for name, value in changes.items():
        with pytest.raises(SystemExit, match=f"checkpoint-2 is of another training: .*{names.get(name, name)} was "):
            train(material, tmp_path / "out", **{**options, name: value}, resume_from_checkpoint="latest")
    shutil.copytree(material["vae"], tmp_path / "the same")
    train(material, tmp_path / "out", **options, pretrained_vae=tmp_path / "the same", resume_from_checkpoint="latest")


def test_cached_features_change_nothing_and_need_no_networks(material, trained, tmp_path, monkeypatch):
    options = {"cache_features": tmp_path / "cache", "class_conditional": True, "validation_steps": 99}
    train(material, tmp_path / "filling", max_train_steps=1, mixed_precision="bf16", **options)
    monkeypatch.setattr(ViTModel, "forward", None)
    monkeypatch.setattr(AutoencoderTiny, "encode", None)
    monkeypatch.setattr(DinoPrior, "from_pretrained", None)
    train(material, tmp_path / "cached", **options, cache_frames_gb=0)
    for line, same in zip(read_log(trained), read_log(tmp_path / "cached"), strict=True):
        assert same == pytest.approx(line, rel=1e-4)


def test_a_dataset_with_a_video_column(material, tmp_path):
    files = sorted(path for path in Path(material["videos"]).rglob("*.mp4") if path.stat().st_size)
    rows = {"video": [{"bytes": path.read_bytes(), "path": path.name} for path in files], "label": [0, 1, 0, 1]}
    features = Features({"video": Video(decode=False), "label": ClassLabel(names=["lumen", "polyp"])})
    (tmp_path / "dataset").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "dataset" / "train.parquet")
    options = {"train_data_dir": None, "dataset_name": tmp_path / "dataset", "class_conditional": True}
    train(material, tmp_path / "out", max_train_steps=1, validation_steps=9, **options)
    assert "`1` polyp" in (tmp_path / "out" / "README.md").read_text()


def test_the_phantom_by_its_name(material, tmp_path, monkeypatch):
    options = {"train_data_dir": None, "dataset_name": "phantom", "dataset_config_name": "clips"}
    for config in Phantom.BUILDER_CONFIGS:
        monkeypatch.setattr(config, "num_videos", 3)
        for name, value in {"num_frames": 16, "height": 32, "width": 32}.items():
            monkeypatch.setattr(config, name, value)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    train(material, tmp_path / "out", max_train_steps=1, validation_steps=9, class_conditional=True, **options)
    assert "`2` instrument" in (tmp_path / "out" / "README.md").read_text()


def test_bfloat16_on_a_cpu_goes_by_plain_attention(material, tmp_path, monkeypatch):
    changed = []
    monkeypatch.setattr(trainer, "use_plain_attention", lambda model: changed.append(use_plain_attention(model)))
    options = {"max_train_steps": 3, "validation_steps": 9, "logging_steps": 1}
    for precision in ("no", "bf16"):
        train(material, tmp_path / precision, mixed_precision=precision, **options)
    assert len(changed) == 1
    full, half = (torch.tensor([row["mse"] for row in read_log(tmp_path / name)]) for name in ("no", "bf16"))
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)
    assert not torch.equal(half, full)


def test_plain_attention_is_that_of_one_model_alone():
    sizes = {"num_layers": 1, "sample_size": 4, "num_frames": 2}
    models = [EndoraTransformer3DModel(2, 8, **sizes) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    use_plain_attention(models[0])
    kernels = []
    for model in models:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), profile() as profiled, torch.no_grad():
            model(torch.ones(1, 4, 2, 4, 4), torch.tensor([5]))
        kernels.append({event.key for event in profiled.key_averages() if "flash" in event.key})
    assert not kernels[0]
    assert kernels[1]


@pytest.mark.slow
def test_accelerate_launch(material, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", str(SCRIPT)]
    options = {"max_train_steps": 1, "validation_steps": 9, "mixed_precision": "bf16", "gradient_checkpointing": True}
    run = subprocess.run(
        [*launch, *arguments(material, tmp_path / "out", **options)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "squared error" in run.stdout
    EndoraPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_vae": None}, "--pretrained_vae is required: the paper's is stabilityai/sd-vae-ft-mse"),
        ({"dino_model": None}, "--dino_model is required with --prior: the paper's is facebook/dino-vits8"),
        ({"train_data_dir": None}, "give --train_data_dir or --dataset_name"),
        ({"dataset_name": "a/b"}, "give either --train_data_dir or --dataset_name; both are for a corpus"),
        ({"train_batch_size": 0}, "--train_batch_size 0: expected a positive integer"),
        ({"push_to_hub": True}, "--push_to_hub needs --hub_model_id"),
        ({"fps": 0}, "--fps 0.0: expected a positive number"),
        ({"fps": "inf"}, "--fps inf: expected a positive number"),
        ({"max_grad_norm": 0}, "--max_grad_norm 0.0: expected a positive number"),
        ({"prior_weight": "nan"}, "--prior_weight nan: expected 0 or more"),
        ({"seed": 2**63}, "--seed 9223372036854775808: expected less than 2^63"),
        ({"num_frames": 64}, "--window 48: expected at least --num_frames 64"),
        ({"lr_scheduler": "none"}, "--lr_scheduler"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1: expected 0 or more"),
        ({"optimizer": "muon", "use_8bit_adam": True}, "--use_8bit_adam: is not for --optimizer muon"),
        ({"cache_latents": True}, "--cache_latents needs --cache_features"),
        ({"early_stopping_patience": 3}, "--early_stopping_patience needs held-out videos"),
        ({"validation_fraction": 1.5}, "--validation_fraction 1.5: expected a number between 0 and 1"),
        ({"validation_split": "test"}, "--validation_split needs --dataset_name"),
        ({"zero_terminal_snr": True}, "--zero_terminal_snr needs --prediction_type v_prediction"),
        ({"ema_decay": 2}, "--ema_decay 2.0: expected a number from 0 to 1"),
        ({"output_dir": None}, "--output_dir is required"),
        ({"patch_size": 0}, "--patch_size 0: expected a positive integer"),
        ({"weaker_model": "x"}, "--weaker_model needs --pretrained_model, the stronger one"),
        ({"autoguidance_scale": 0.5}, "--autoguidance_scale 0.5: expected 1 (none) or more"),
        ({"license": "My Licence"}, "--license 'My Licence': expected the Hub's name of a licence"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(material, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as raised:
        train(material, **{"output_dir": tmp_path / "out", **changes})
    assert raised.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "nowhere"}, "nowhere"),
        ({"train_data_dir": "nowhere", "dataset_name": "kvasir_capsule"}, "nowhere: expected the folder of kvasir"),
        ({"train_data_dir": None, "dataset_name": "colonoscopic"}, "colonoscopic needs the folder of the videos"),
        ({"pretrained_vae": "no/where"}, "stabilityai/sd-vae-ft-mse"),
        ({"dino_model": "no/where"}, "facebook/dino-vits8"),
        ({"pretrained_model": "no/where"}, "no/where: no transformer like that of this training"),
        ({"resolution": 36}, "--resolution 36: expected a multiple of 8"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "no such checkpoint"),
        ({"validation_fraction": 0.25, "validation_fvd": 4}, "1 held-out clips; FVD needs two or more"),
        ({"report_to": "clearml"}, "--report_to clearml: it is not installed"),
        ({"output_dir": "/dev/null/out"}, "--output_dir /dev/null/out: cannot be made"),
    ],
)
def test_what_cannot_be_loaded_ends_in_one_sentence_and_writes_nothing(
    material, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as raised:
        train(material, **{"output_dir": tmp_path / "out", **changes})
    assert str(raised.value.code).startswith("train_endora.py: error: ")
    assert message in str(raised.value.code)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_validate_with_fvd_and_stop_early(material, tmp_path):
    options = {"prior": "none", "dino_model": None, "max_train_steps": 40, "validation_steps": 1, "logging_steps": 1}
    options |= {"validation_fraction": 0.5, "validation_fvd": 4, "early_stopping_patience": 1, "learning_rate": 1e-30}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, *arguments(material, tmp_path, **options, report_to="tensorboard")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "training.json").read_text())["results"]
    assert results["stopped_early"]
    assert results["weights_of_step"] == results["steps"] - 1
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent), {"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("fvd")] == [results["steps"]]  # at the end, though it comes early


def kill_and_resume(command: list[str], output_dir: Path, num_kills: int, environment: dict[str, str]) -> int:
    """Starts a training again and again, killing it with SIGKILL at random instants; at last lets it end.

    Returns how many of the kills came while a checkpoint was being written.
    """
    rng, within_a_save = np.random.default_rng(0), 0
    for kill in range(num_kills + 1):
        resumed = [*command, *(["--resume_from_checkpoint", "latest"] if kill else [])]
        with subprocess.Popen(resumed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
            if kill < num_kills:
                before = {path.name for path in output_dir.glob("checkpoint-*")}
                if kill < num_kills // 4:  # also while it starts and fills its caches
                    time.sleep(rng.uniform(2, 12))
                else:
                    while process.poll() is None and {path.name for path in output_dir.glob("checkpoint-*")} <= before:
                        time.sleep(0.002)
                    time.sleep(rng.uniform(0, 0.4))
                if process.poll() is None:
                    # torchrun's processes are in sessions of their own, and would live on
                    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
                        victim.kill()
                    process.wait()
                within_a_save += any(output_dir.glob("checkpoint-*.partial"))
            output = process.communicate()[0].decode()
            assert process.returncode == (-signal.SIGKILL if kill < num_kills else 0), output[-3000:]
    return within_a_save


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "num_kills"), [(1, 20), (2, 4)])
def test_a_training_killed_at_random_instants_is_the_one_that_was_not(material, tmp_path, num_processes, num_kills):
    options = {"max_train_steps": 25 * num_kills, "checkpointing_steps": 1, "logging_steps": 1}
    options |= {"checkpoints_total_limit": 2, "class_conditional": True, "lr_scheduler": "cosine"}
    options |= {"validation_steps": 20, "validation_fraction": 0.25, "early_stopping_patience": 10**6}
    options |= {"dataloader_num_workers": 1}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = {
        name: [
            *launch,
            str(SCRIPT),
            *arguments(material, tmp_path / name, cache_features=tmp_path / f"{name}_cache", **options),
        ]
        for name in ("straight", "killed")
    }
    subprocess.run(commands["straight"], check=True, capture_output=True, env=environment)
    assert kill_and_resume(commands["killed"], tmp_path / "killed", num_kills, environment) > 0
    assert_same_training(tmp_path / "straight", tmp_path / "killed", f"checkpoint-{options['max_train_steps']}")
    straight, killed = (load_file(tmp_path / name / "best.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    assert not list((tmp_path / "killed").glob("*.partial"))
    assert not list((tmp_path / "killed").glob(".*"))
