"""Publishing the baselines' pipelines: what goes, what the card says, and that it loads from the Hub."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_pipelines import BASELINES, tiny_pipeline

from diffusers_endora.baselines.registry import PIPELINES
from diffusers_endora.hub import publish_folder, save_model_card
from diffusers_endora.metrics.feature_extractors import hash_weights
from diffusers_endora.model_card import is_edited, size_of_clips
from diffusers_endora.publication import Publication, prepare_publication, write_conversion_record

ARGUMENTS = {
    "train_data_dir": "/data/patients/colon",
    "dataset_name": None,
    "output_dir": "/home/somebody/run",
    "license": "cc-by-nc-4.0",
    "train_batch_size": 8,
    "learning_rate": 0.0025,
    "r1_gamma": None,
    "augmentation": True,
    "seed": 0,
    "num_frames": 4,
    "frame_interval": None,
    "window": 48,
}
RESULTS = {
    "steps": 20,
    "clips_seen": 160,
    "num_parameters": 1_500_000,
    "num_discriminator_parameters": 2_500_000,
    "num_videos": 7,
    "num_processes": 1,
    "r1_gamma": 0.1024,
    "real_sign": 0.25,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """The output of a training of each class, with what may lie beside the pipeline."""
    root = tmp_path_factory.mktemp("trainings")
    for name in BASELINES:
        pipeline = tiny_pipeline(name, num_classes=2)
        pipeline.save_pretrained(root / name)
        training = {"arguments": ARGUMENTS, "results": RESULTS, "class_names": ["polyp", "normal"]}
        (root / name / "training.json").write_text(json.dumps(training))
        (root / name / "discriminator").mkdir()
        (root / name / "discriminator/config.json").write_text("{}")
        save_model_card(root / name, ARGUMENTS, RESULTS, ["polyp", "normal"])
    return {name: root / name for name in BASELINES}


@pytest.fixture
def copy(trained, tmp_path):
    """`copy(name) -> folder`, to be changed."""
    return lambda name: Path(shutil.copytree(trained[name], tmp_path / name))


def change_weights(path: Path, drop: str | None = None, reshape: str | None = None) -> None:
    weights = load_file(path)
    if drop is not None:
        del weights[drop]
    if reshape is not None:
        weights[reshape] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_published_of_a_training(trained, name):
    kind = PIPELINES[name]
    publication = prepare_publication(trained[name], "me/model")
    parts = {"scheduler/scheduler_config.json"} if kind.has_scheduler else set()
    for model in kind.required_models:
        parts |= {f"{model}/config.json", f"{model}/diffusion_pytorch_model.safetensors"}
    assert set(publication.files) == {"README.md", "model_index.json", "training.json", *parts}
    index = json.loads(publication.files["model_index.json"])
    assert index["_class_name"] == name
    assert {index[model][0] for model in kind.required_models} == {"diffusers"}
    assert [index[model][1] for model in kind.required_models] == [kind.models[m] for m in kind.required_models]
    assert not [note for note in publication.notes if "licence" in note]  # the training states one
    for content in publication.files.values():
        text = content if isinstance(content, bytes) else content.read_bytes()
        assert b"/data/patients" not in text
        assert b"/home/somebody" not in text


@pytest.mark.parametrize("name", BASELINES)
def test_the_card_says_what_it_is_and_how_it_was_trained(trained, name):
    kind = PIPELINES[name]
    text = prepare_publication(trained[name], "me/model").files["README.md"].decode()
    assert not is_edited(text)
    data = ModelCard(text).data
    assert data.license == "cc-by-nc-4.0"
    assert "endora" not in data.tags
    assert kind.method.lower() in data.tags
    paragraphs = " ".join(text.split())
    for fact in (
        f"Endoscopy clips of 4 frames, 16x16 pixels, from [{kind.method}]({kind.paper})",
        f"from diffusers_endora import {name}",
        f'{name}.from_pretrained("me/model")',
        "The package `diffusers-endora` has to be installed and imported",
        "endora generate me/model --output clips --num_clips 4 --class_label 0",
        "- `0` polyp",
        "- `1` normal",
        "| data | colon: 7 videos |",
        "| model | 1.5 M parameters; discriminator 2.5 M |",
        "| clip | 4 frames, spread over a window of 48 |",
        "| steps | 20 of 8 clips: 160 clips seen |",
        "`learning_rate` 0.0025, `r1_gamma` 0.1024, `augmentation` True, `seed` 0",
        "| measured | `real_sign` 0.25 |",
        "Not for diagnosis.",
        "not the authors' own",
    ):
        assert fact in paragraphs, fact
    assert kind.citation in text
    assert ("null class" in text) == (name == "LVDMPipeline")
    assert "pipeline.py" not in text
    assert "None" not in text


def test_records_that_say_little_make_a_card(copy):
    folder = copy("StyleGANVPipeline")
    (folder / "README.md").unlink()
    (folder / "training.json").write_text(json.dumps({"arguments": {}, "results": {}}))
    text = prepare_publication(folder, "me/model", license="mit").files["README.md"].decode()
    assert "| data | not recorded |\n| clip | 4 frames |\n" in text
    assert "| steps" not in text


def test_the_card_of_a_conversion_states_its_origin(copy, tmp_path):
    folder = copy("MoStGANVPipeline")
    for name in ("README.md", "training.json"):
        (folder / name).unlink()
    (tmp_path / "network.pkl").write_bytes(b"a pickle")
    write_conversion_record(folder, tmp_path / "network.pkl", model="mostgan-v")
    with pytest.raises(ValueError, match="whose licence allows non-commercial use only; say with --license"):
        prepare_publication(folder, "me/model")
    text = prepare_publication(folder, "me/model", license="cc-by-nc-4.0").files["README.md"].decode()
    assert "Converted with `diffusers-endora` from a checkpoint of the official code." in text
    assert "| checkpoint | `network.pkl` of the [official code](https://github.com/xiaoqian-shen/MoStGAN-V)" in text
    assert "the official code builds on StyleGAN2-ADA, whose licence allows non-commercial use only" in text
    assert "## Training" not in text


@pytest.mark.parametrize("name", BASELINES)
def test_sizes_are_read_from_the_configurations(trained, name):
    assert size_of_clips(trained[name], PIPELINES[name]) == (16, 4)


def test_what_would_not_load_is_refused(copy):
    folder = copy("LVDMPipeline")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    for message, change in {
        r"unet: lacks the weights conv_in\.weight": {"drop": "conv_in.weight"},
        r"unet: conv_in\.bias has the shape \(3, 3\)": {"reshape": "conv_in.bias"},
    }.items():
        change_weights(weights, **change)
        with pytest.raises(ValueError, match=message):
            prepare_publication(folder, "me/model")
        weights.write_bytes(before)
    (folder / "autoencoder/pytorch_model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.ckpt: is a pickle"):
        prepare_publication(folder, "me/model")
    (folder / "autoencoder/pytorch_model.ckpt").unlink()
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"scheduler: has no scheduler_config\.json; the folder would not load"):
        prepare_publication(folder, "me/model")


def test_the_models_of_long_videos_go_where_the_pipeline_has_them(tmp_path):
    pipeline = tiny_pipeline("LVDMPipeline")
    pipeline.register_modules(prediction_unet=pipeline.unet)
    pipeline.save_pretrained(tmp_path)
    files = set(prepare_publication(tmp_path, "me/model", license="mit").files)
    assert "prediction_unet/diffusion_pytorch_model.safetensors" in files
    assert not any(name.startswith("interpolation_unet") for name in files)
    (tmp_path / "prediction_unet/config.json").unlink()
    with pytest.raises(ValueError, match=r"prediction_unet: has no config\.json"):
        prepare_publication(tmp_path, "me/model", license="mit")


def test_a_report_has_to_be_of_the_model(trained, tmp_path):
    own = hash_weights(tiny_pipeline("StyleGANVPipeline", num_classes=2).generator)
    report = {"protocol": {"name": "endora-strict", "changes": {}, "seed": 0}, "results": [], "warnings": []}
    report["real"] = {"num_clips": 2, "source": "videos"}
    for digest in (own, "0" * 64):
        said = f"StyleGANVPipeline, torch.float32, generator {digest[:16]}"
        (tmp_path / "report.json").write_text(json.dumps(report | {"fake": {"source": "clips", "sampling": said}}))
        if digest == own:
            publication = prepare_publication(trained["StyleGANVPipeline"], "me/model", report=tmp_path)
            assert "evaluation/report.json" in publication.files
            continue
        with pytest.raises(ValueError, match="is of another model: generator 0000000000000000"):
            prepare_publication(trained["StyleGANVPipeline"], "me/model", report=tmp_path)


# --- the Hub


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


LOADED_FROM_THE_HUB = """
import sys
from diffusers_endora import EndoraPipeline, cli, load_pipeline

pipeline = load_pipeline("me/model")
print(type(pipeline).__name__, pipeline.generator.config.num_classes)
try:
    EndoraPipeline.from_pretrained("me/model")
except ValueError as error:
    print("of class StyleGANVPipeline, expected EndoraPipeline" in str(error))
sys.argv = ["endora", "generate", "me/model", "--class_label", "1", "--output", sys.argv[1]]
cli.main()
"""


def test_a_baseline_takes_the_place_of_an_endora(hub, trained):
    publish_folder(trained["StyleGANVPipeline"], "me/model")
    earlier = hub.repositories["me/model"].files()
    stale = {"pipeline.py": b"code", "transformer/config.json": b"{}", "unet/config.json": b"{}", "notes.txt": b"mine"}
    hub.repositories["me/model"].commit("main", earlier | stale)
    publish_folder(trained["StyleGANVPipeline"], "me/model")
    assert set(hub.repositories["me/model"].files()) == set(earlier) | {"notes.txt"}


@pytest.mark.slow
def test_a_published_baseline_loads_and_generates_by_its_id(hub, trained, tmp_path):
    publish_folder(trained["StyleGANVPipeline"], "me/model")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": TOKEN}
    environment["HF_HUB_DISABLE_XET"] = "1"
    command = [sys.executable, "-c", LOADED_FROM_THE_HUB, str(tmp_path / "clips")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[:2] == ["StyleGANVPipeline 2", "True"]
    record = json.loads((tmp_path / "clips/generation.json").read_text())
    assert (record["pipeline"], record["arguments"]["model"]) == ("StyleGANVPipeline", "me/model")


def test_an_adapter_leaves_the_code_of_a_pipeline_beside_it():
    assert Publication().owned_files == ()
