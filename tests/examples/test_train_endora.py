"""The training script end to end on small real components: what it writes, how it resumes, what it refuses."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Video
from diffusers import AutoencoderTiny
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from diffusers_endora import EndoraPipeline
from diffusers_endora.data.corpora.phantom import Phantom
from diffusers_endora.data.video_io import read_video_info, write_video

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_endora.py"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, str]:
    """A corpus of four 20-frame videos in two classes, a tiny VAE (4x), a tiny ViT/8."""
    root = tmp_path_factory.mktemp("material")
    rng = np.random.default_rng(0)
    for index in range(4):
        start = rng.integers(0, 200, size=(1, 32, 32, 3))
        frames = (start + np.arange(20).reshape(20, 1, 1, 1)).astype(np.uint8)
        folder = root / "videos" / ("a", "b")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{index}.mp4", frames, fps=8)
    (root / "videos" / "a" / "broken.mp4").write_bytes(b"")
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    counts = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    AutoencoderTiny(**blocks, **counts).save_pretrained(root / "vae")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(root / "teacher")
    return {"videos": str(root / "videos"), "vae": str(root / "vae"), "teacher": str(root / "teacher")}


def arguments(material: dict[str, str], output_dir: Path, **changes) -> list[str]:
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
    flags = []
    for name, value in options.items():
        flags += [f"--{name}"] if value is True else [] if value is None else [f"--{name}", str(value)]
    return flags


def train(material: dict[str, str], output_dir: Path, **changes) -> None:
    """Runs the script's `main` in this process."""
    spec = importlib.util.spec_from_file_location("train_endora", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    AcceleratorState._reset_state(True)
    argv, sys.argv = sys.argv, [str(SCRIPT), *arguments(material, output_dir, **changes)]
    try:
        module.main()
    finally:
        sys.argv = argv
        AcceleratorState._reset_state(True)


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
    assert read_video_info(trained / "validation" / "step-4" / "clip_0.mp4").num_frames == 16
    results = json.loads((trained / "training.json").read_text())["results"]
    assert results["steps"] == results["averaged_steps"] == 4
    assert 0 < results["gaussian_mse"] < 1
    assert 0 < results["prior"] < 2


def test_the_saved_weights_are_the_moving_average(trained):
    saved = load_file(trained / WEIGHTS)
    average = load_file(trained / "checkpoint-4/transformer_ema/diffusion_pytorch_model.safetensors")
    last = load_file(trained / "checkpoint-4/model.safetensors")
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


@pytest.mark.parametrize("checkpoint", ["latest", "checkpoint-2"])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(material, trained, tmp_path, checkpoint):
    train(material, tmp_path, class_conditional=True, max_train_steps=2, validation_steps=100)
    (tmp_path / "checkpoint-9.partial").mkdir()  # what a kill during a save leaves
    train(material, tmp_path, class_conditional=True, resume_from_checkpoint=checkpoint)
    for name in ("model.safetensors", "model_1.safetensors", "transformer_ema/diffusion_pytorch_model.safetensors"):
        straight, resumed = load_file(trained / "checkpoint-4" / name), load_file(tmp_path / "checkpoint-4" / name)
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), name
    assert not (tmp_path / "checkpoint-9.partial").exists()


def test_resuming_across_epochs_with_accumulation_is_exact(material, tmp_path):
    options = {
        "prior": "none",
        "dino_model": None,
        "train_batch_size": 16,  # 5 batches an epoch: the third step of an epoch is one micro-batch
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
    name = "checkpoint-5/model.safetensors"
    straight, stopped = load_file(tmp_path / "straight" / name), load_file(tmp_path / "stopped" / name)
    assert all(torch.equal(straight[key], stopped[key]) for key in straight)
    results = [
        json.loads((tmp_path / run / "training.json").read_text())["results"] for run in ("straight", "stopped")
    ]
    assert results[0] == results[1]
    assert results[0]["averaged_steps"] == 5


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
    # what would be published: the pipeline and its card, nothing of the training
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(filter_repo_objects(files, allow_patterns=PUBLISHED_FILES)) == [
        "README.md",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize("change", [{"train_batch_size": 4}, {"num_layers": 2}, {"seed": 1}])
def test_resuming_another_training_is_refused(material, tmp_path, change):
    options = {"prior": "none", "dino_model": None, "max_train_steps": 2, "validation_steps": 99}
    train(material, tmp_path, **options)
    with pytest.raises(SystemExit) as raised:
        train(material, tmp_path, **{**options, **change}, resume_from_checkpoint="latest")
    assert "checkpoint-2 is of another training" in str(raised.value.code)
    assert (next(iter(change)) if "num_layers" not in change else "transformer") in str(raised.value.code)


def test_cached_latents_and_frames_change_nothing(material, tmp_path):
    options = {"prior": "none", "dino_model": None, "max_train_steps": 2, "validation_steps": 100}
    train(material, tmp_path / "plain", cache_frames_gb=0, **options)
    train(material, tmp_path / "cached", cache_frames_gb=1, cache_latents=True, **options)
    plain, cached = load_file(tmp_path / "plain" / WEIGHTS), load_file(tmp_path / "cached" / WEIGHTS)
    for name in plain:
        torch.testing.assert_close(plain[name], cached[name], rtol=1e-3, atol=1e-4)


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


def test_two_processes_on_cpu(material, tmp_path):
    # `accelerate launch` leaves several CPU processes to mpirun or torchrun
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    options = {"max_train_steps": 2, "checkpointing_steps": 2, "validation_steps": 2}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, *arguments(material, tmp_path / "out", **options)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 clips x 2 processes" in run.stdout
    assert (tmp_path / "out" / "checkpoint-2" / "random_states_1.pkl").exists()
    EndoraPipeline.from_pretrained(tmp_path / "out")


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
    assert "eps-MSE" in run.stdout
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
        ({"num_frames": 64}, "--window 48: expected at least --num_frames 64"),
        ({"lr_scheduler": "none"}, "--lr_scheduler"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1: expected 0 or more"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(material, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as raised:
        train(material, tmp_path / "out", **changes)
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
        ({"resolution": 36}, "--resolution 36: expected a multiple of 8"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "no such checkpoint"),
    ],
)
def test_what_cannot_be_loaded_ends_in_one_sentence_and_writes_nothing(
    material, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as raised:
        train(material, tmp_path / "out", **changes)
    assert str(raised.value.code).startswith("train_endora.py: error: ")
    assert message in str(raised.value.code)
    assert not (tmp_path / "out").exists()
