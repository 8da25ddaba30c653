"""The `endora` command with the baselines' pipelines: found by their folders, sampled, evaluated, refused."""

import hashlib
import json
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import BASELINES, tiny_pipeline

import diffusers_endora
from diffusers_endora import EndoraPipeline, LVDMPipeline, StyleGANVPipeline, load_pipeline
from diffusers_endora.baselines.lvdm.lvdm_loss import official_ddim
from diffusers_endora.baselines.registry import PIPELINES, kind_of
from diffusers_endora.cli import choose_scheduler
from diffusers_endora.data.provenance import hash_of_weights
from diffusers_endora.data.video_io import read_frames
from diffusers_endora.metrics.evaluation import sampling_of
from diffusers_endora.metrics.sampling import sample_clips


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved pipeline of each class."""
    root = tmp_path_factory.mktemp("baselines")
    for name in BASELINES:
        tiny_pipeline(name).save_pretrained(root / name)
    return {name: root / name for name in BASELINES}


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


def frames_of(pipeline, **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return (pipeline(generator=generator, output_type="np", **options).frames[0] * 255).round().astype(np.uint8)


# --- found by their folders


@pytest.mark.parametrize("name", BASELINES)
def test_a_folder_loads_as_what_it_is(folders, name):
    expected = frames_of(tiny_pipeline(name))
    for loaded in (load_pipeline(folders[name]), DiffusionPipeline.from_pretrained(folders[name])):
        assert type(loaded) is getattr(diffusers_endora, name)
        assert np.array_equal(frames_of(loaded), expected)
    assert load_pipeline(folders[name], dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", diffusers_endora.BASELINE_CLASSES)
def test_diffusers_has_the_classes(name):
    assert getattr(diffusers, name) is getattr(diffusers_endora, name)


def test_diffusers_has_nothing_else_by_that():
    assert not hasattr(diffusers, "StyleGANVTransformer")
    assert diffusers.UNet2DModel.__name__ == "UNet2DModel"


def test_an_index_that_names_the_package_loads_as_well(folders, tmp_path):
    """As a plain save by diffusers' own methods would have written it."""
    pipeline = tiny_pipeline("StyleGANVPipeline")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["generator"][0] = "diffusers_endora"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert np.array_equal(frames_of(DiffusionPipeline.from_pretrained(tmp_path)), frames_of(pipeline))


def test_what_is_no_pipeline_of_the_package_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index\.json; expected a pipeline folder\.$"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"absent: is no folder, and not owner/name on the Hub\.$"):
        load_pipeline(tmp_path / "absent")
    for text, message in {
        '{"_class_name": "DiTPipeline"}': "is a DiTPipeline; expected an EndoraPipeline, StyleGANVPipeline, "
        r"MoStGANVPipeline or LVDMPipeline\.$",
        "{": "is no JSON",
        "[]": "holds a list; expected a JSON object",
    }.items():
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_pipeline(tmp_path)


@pytest.mark.parametrize("name", BASELINES)
def test_a_folder_of_another_class_is_refused_both_ways(folders, tmp_path, name):
    message = rf"is of class {name}, expected EndoraPipeline; load it by diffusers_endora\.{name}\.from_pretrained\.$"
    with pytest.raises(ValueError, match=message):
        EndoraPipeline.from_pretrained(folders[name])
    other = StyleGANVPipeline if name == "LVDMPipeline" else LVDMPipeline
    with pytest.raises(ValueError, match=f"is of class {name}, expected {other.__name__}"):
        other.from_pretrained(folders[name])


def test_the_registry_knows_the_components(folders):
    for name, folder in folders.items():
        kind = kind_of(folder)
        assert kind is PIPELINES[name]
        parts = {path.name for path in folder.iterdir() if path.is_dir()}
        assert parts == {*kind.required_models, *(["scheduler"] if kind.has_scheduler else [])}


# --- generate


@pytest.mark.parametrize("name", BASELINES)
def test_generate_writes_clips_that_depend_on_their_seeds_alone(endora, folders, tmp_path, name):
    options = ("--num_clips", 3, "--batch_size", 2, "--seed", 5, "--format", "ffv1", "--num_frames", 4)
    assert endora("generate", folders[name], "--output", tmp_path / "three", *options)[0] == 0
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == [
        *("clip_0000.mkv", "clip_0001.mkv", "clip_0002.mkv", "contact_sheet.png", "generation.json")
    ]
    one = ("--num_clips", 1, "--seed", 7, "--format", "ffv1")
    assert endora("generate", folders[name], "--output", tmp_path / "one", *one)[0] == 0
    together, alone = (
        read_frames(tmp_path / file, range(4)).astype(int) for file in ("three/clip_0002.mkv", "one/clip_0000.mkv")
    )
    assert together.shape == (4, 16, 16, 3)
    assert np.abs(together - alone).max() <= 1  # batched products may round differently

    record = json.loads((tmp_path / "three/generation.json").read_text())
    assert record["pipeline"] == name
    main = PIPELINES[name].main
    weights = (folders[name] / main / "diffusion_pytorch_model.safetensors").read_bytes()
    assert record["model_hash"] == hash_of_weights(folders[name]) == hashlib.sha256(weights).hexdigest()
    assert [clip["seed"] for clip in record["clips"]] == [5, 6, 7]
    assert ("scheduler" in record) == ("scheduler" in record["arguments"]) == (name == "LVDMPipeline")
    assert ("truncation_psi" in record["arguments"]) == (name != "LVDMPipeline")
    assert "strength" not in record["arguments"]
    with av.open(str(tmp_path / "one/clip_0000.mkv")) as container:
        comment = container.metadata["COMMENT"]
    assert f"Model: {name}; SHA-256 of the weights: {record['model_hash']}; Seed: 7;" in comment


def test_truncation_is_handed_on(endora, folders, tmp_path):
    options = ("--format", "png", "--truncation_psi", 0.5)
    assert endora("generate", folders["StyleGANVPipeline"], "--output", tmp_path / "clips", *options)[0] == 0
    written = read_frames(tmp_path / "clips/clip_0000", range(4))
    pipeline = tiny_pipeline("StyleGANVPipeline")
    assert np.array_equal(written, frames_of(pipeline, truncation_psi=0.5))
    assert not np.array_equal(written, frames_of(pipeline))
    assert json.loads((tmp_path / "clips/generation.json").read_text())["arguments"]["truncation_psi"] == 0.5


@pytest.mark.parametrize(
    ("scheduler", "class_name"),
    [("ddpm", "DDPMScheduler"), ("ddim", "DDIMScheduler"), ("dpmsolver++", "DPMSolverMultistepScheduler")],
)
def test_schedulers_of_lvdm(endora, folders, tmp_path, scheduler, class_name):
    options = ("--scheduler", scheduler, "--num_inference_steps", 3)
    assert endora("generate", folders["LVDMPipeline"], "--output", tmp_path / "clips", *options)[0] == 0
    record = json.loads((tmp_path / "clips/generation.json").read_text())
    assert record["scheduler"]["class"] == class_name
    assert len(record["timesteps"]) == 3
    if scheduler == "ddim":  # the official timesteps: 1, 334, 667
        assert record["timesteps"] == [667.0, 334.0, 1.0]


def test_all_timesteps_of_lvdm(endora, folders, tmp_path):
    options = ("--output", tmp_path / "clips", "--num_inference_steps", 1000, "--scheduler", "ddim")
    code, _, error = endora("generate", folders["LVDMPipeline"], *options)
    assert code == 1
    assert "num_inference_steps=1000 does not suit DDIMScheduler: its timesteps go beyond 999" in error
    pipeline = tiny_pipeline("LVDMPipeline")
    pipeline.scheduler = official_ddim()
    scheduler, _ = choose_scheduler(pipeline, "ddpm", 1000)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("StyleGANVPipeline", ("--num_inference_steps", 50), "--num_inference_steps: StyleGANVPipeline has no such"),
        ("MoStGANVPipeline", ("--scheduler", "ddim"), "--scheduler: MoStGANVPipeline has no such setting"),
        ("StyleGANVPipeline", ("--guidance_scale", 1), "--guidance_scale: StyleGANVPipeline has no such setting"),
        ("StyleGANVPipeline", ("--image", "absent.png"), "--image: StyleGANVPipeline has no such setting"),
        ("StyleGANVPipeline", ("--window-overlap", 2), "--window_overlap: StyleGANVPipeline has no such setting"),
        ("StyleGANVPipeline", ("--backend", "openvino"), "--backend openvino: is for EndoraPipeline alone; StyleGANV"),
        ("LVDMPipeline", ("--truncation_psi", 0.5), "--truncation_psi: LVDMPipeline has no such setting"),
        ("LVDMPipeline", ("--strength", 0.7), "--strength: LVDMPipeline has no such setting"),
        ("LVDMPipeline", ("--video", "absent.mp4"), "--video: LVDMPipeline has no such setting"),
        ("LVDMPipeline", ("--backend", "openvino"), "--backend openvino: is for EndoraPipeline alone; LVDMPipeline"),
        ("StyleGANVPipeline", ("--height", 32), "height=32: expected 16, the only size of this model"),
        ("StyleGANVPipeline", ("--class_label", 0), "this model is unconditional"),
        ("StyleGANVPipeline", ("--visible_mark",), "frames of 16x16 pixels are too small for the mark"),
    ],
)
def test_what_a_class_does_not_take_is_refused(refused, folders, tmp_path, name, flags, message):
    assert message in refused("generate", folders[name], "--output", tmp_path / "clips", *flags)
    assert not (tmp_path / "clips").exists()


def test_what_endora_does_not_take_is_refused(refused, tmp_path):
    line = refused("generate", "--output", tmp_path / "clips", "--truncation_psi", 1)
    assert "--truncation_psi: EndoraPipeline has no such setting" in line


# --- evaluate


@pytest.mark.parametrize("name", BASELINES)
def test_a_set_of_clips_is_drawn_once_and_recorded(tmp_path, name):
    pipeline = tiny_pipeline(name, num_classes=2)
    folder = tmp_path / "seed_3"
    options = {"num_inference_steps": 2, "num_frames": 4}
    sample_clips(pipeline, folder, 3, 3, batch_size=2, **options)
    clips = {path.name: read_frames(path, range(4)).astype(int) for path in sorted(folder.glob("*.mkv"))}
    assert list(clips) == ["clip_00000.mkv", "clip_00001.mkv", "clip_00002.mkv"]
    (folder / "clip_00001.mkv").unlink()
    sample_clips(pipeline, folder, 2, 3, batch_size=1, **options)
    again = read_frames(folder / "clip_00001.mkv", range(4)).astype(int)
    assert np.abs(again - clips["clip_00001.mkv"]).max() <= 1

    settings = json.loads((folder / "sampling.json").read_text())
    assert settings["pipeline"] == name
    assert set(settings["weights"]) == set(PIPELINES[name].required_models)
    assert ("scheduler" in settings) == ("num_inference_steps" in settings) == (name == "LVDMPipeline")
    main = PIPELINES[name].main
    said = sampling_of(folder)
    assert f"{main} {settings['weights'][main][:16]}" in said
    assert said.startswith(f"{name}, ")
    next(getattr(pipeline, main).parameters()).data += 1
    with pytest.raises(ValueError, match="holds clips of another model or other settings"):
        sample_clips(pipeline, folder, 3, 3, batch_size=2, **options)


def test_evaluate_samples_a_baseline_first(endora, refused, folders, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    from diffusers_endora.metrics import evaluation
    from diffusers_endora.metrics.feature_extractors import FeatureExtractor

    class MeanColour(FeatureExtractor):
        name, outputs, per_frame = "mean-colour", {"features": 3}, False
        weights, weights_hash, preprocessing = "none", "0", "none"

        def forward(self, units):
            return {"features": units.float().mean(dim=(1, 2, 3))}

    monkeypatch.setattr(evaluation, "load_extractors", lambda *_: {"i3d": MeanColour(torch.nn.Identity())})
    real = np.random.default_rng(0).integers(0, 255, (6, 4, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "real.npy", real)
    folder = folders["StyleGANVPipeline"]
    arguments = ["--real", tmp_path / "real.npy", "--fake", folder, "--output", tmp_path / "report"]
    arguments += ["--metrics", "fvd", "--num_clips", 4, "--num_frames", 4, "--num_seeds", 2]
    arguments += ["--cache_dir", tmp_path / "features", "--device", "cpu"]
    line = refused("evaluate", *arguments, "--num_inference_steps", 5)
    assert "--num_inference_steps: StyleGANVPipeline has no such setting" in line
    assert not (tmp_path / "report").exists()
    code, out, _ = endora("evaluate", *arguments)
    assert code == 0
    assert out.startswith("FVD: ")
    assert len(list((tmp_path / "report/samples").rglob("*.mkv"))) == 8
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["fake"]["sampling"].startswith("StyleGANVPipeline, torch.float32, generator ")
