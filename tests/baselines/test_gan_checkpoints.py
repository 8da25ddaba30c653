"""Official checkpoints of the GANs: names both ways, and `endora convert-legacy` from the file to a pipeline."""

import hashlib
import importlib
import json
import math
import os

import pytest
import torch
from network_pickles import DictConfig, network, save_snapshot
from tiny_pipelines import TINY_GENERATOR, tiny_generator

from diffusers_endora import (
    LVDMAutoencoder,
    LVDMUNet3DModel,
    MoStGANVDiscriminator,
    StyleGANVDiscriminator,
    load_pipeline,
)
from diffusers_endora.baselines import legacy_conversion
from diffusers_endora.baselines.lvdm.lvdm_loss import make_lvdm_scheduler
from diffusers_endora.baselines.lvdm.original_checkpoint import (
    AUTOENCODER_PREFIX,
    SCHEDULE_TABLES,
    UNET_PREFIX,
    official_autoencoder_names,
    official_unet_names,
)

MODELS = {"stylegan-v": "StyleGANV", "mostgan-v": "MoStGANV"}
TINY_DISCRIMINATOR = {
    "resolution": 16,
    "channel_base": 128,
    "channel_max": 8,
    "concat_resolution": 8,
    "num_mapping_layers": 2,
    "max_num_frames": 32,
}

# Of the official code, written down from `SynthesisNetwork`, `MappingNetwork` and `MotionMappingNetwork`, at 8 pixels
OFFICIAL_GENERATOR = """
mapping.fc0.weight mapping.fc0.bias mapping.fc1.weight mapping.fc1.bias mapping.w_avg
synthesis.motion_encoder.conv.0.weight synthesis.motion_encoder.conv.0.bias
synthesis.motion_encoder.conv.1.weight synthesis.motion_encoder.conv.1.bias
synthesis.motion_encoder.time_encoder.periods_predictor.weight
synthesis.motion_encoder.time_encoder.phase_predictor.weight
synthesis.motion_encoder.time_encoder.aligners_predictor.weight
synthesis.motion_encoder.time_encoder.freqs synthesis.motion_encoder.time_encoder.phase_scales
synthesis.b4.resample_filter synthesis.b4.input.input.const
synthesis.b4.conv1.weight synthesis.b4.conv1.bias synthesis.b4.conv1.resample_filter
synthesis.b4.conv1.affine.weight synthesis.b4.conv1.affine.bias
synthesis.b4.torgb.weight synthesis.b4.torgb.bias synthesis.b4.torgb.affine.weight synthesis.b4.torgb.affine.bias
synthesis.b8.resample_filter
synthesis.b8.conv0.weight synthesis.b8.conv0.bias synthesis.b8.conv0.resample_filter
synthesis.b8.conv0.affine.weight synthesis.b8.conv0.affine.bias
synthesis.b8.conv1.weight synthesis.b8.conv1.bias synthesis.b8.conv1.resample_filter
synthesis.b8.conv1.affine.weight synthesis.b8.conv1.affine.bias
synthesis.b8.torgb.weight synthesis.b8.torgb.bias synthesis.b8.torgb.affine.weight synthesis.b8.torgb.affine.bias
"""

# Of `Discriminator` at 16 pixels with `concat_res` 8
OFFICIAL_DISCRIMINATOR = """
time_encoder.const_embed.weight time_encoder.time_encoder.fourier_coefs
b16.resample_filter b16.fromrgb.weight b16.fromrgb.bias b16.fromrgb.resample_filter
b16.conv0.weight b16.conv0.bias b16.conv0.resample_filter b16.conv1.weight b16.conv1.bias b16.conv1.resample_filter
b16.skip.weight b16.skip.resample_filter
b8.resample_filter b8.conv0.weight b8.conv0.bias b8.conv0.resample_filter
b8.conv1.weight b8.conv1.bias b8.conv1.resample_filter b8.skip.weight b8.skip.resample_filter
mapping.embed.weight mapping.embed.bias mapping.fc0.weight mapping.fc0.bias mapping.fc1.weight mapping.fc1.bias
b4.conv.weight b4.conv.bias b4.conv.resample_filter b4.fc.weight b4.fc.bias b4.out.weight b4.out.bias
"""


def official(model: str):
    return importlib.import_module(f"diffusers_endora.baselines.{model.replace('-', '_')}.original_checkpoint")


def tiny_discriminator(model: str, **settings):
    torch.manual_seed(1)
    settings = TINY_DISCRIMINATOR | settings
    if model == "mostgan-v":
        return MoStGANVDiscriminator(**settings, motion_style_dim=5).eval()
    return StyleGANVDiscriminator(**settings).eval()


def generated(generator, class_labels=None) -> torch.Tensor:
    torch.manual_seed(2)
    z, times = torch.randn(2, 6), torch.tensor([[0.0, 1.5, 7.0], [2.0, 3.0, 9.0]])
    noise = generator.draw_motion_noise(2, 9.0, torch.Generator().manual_seed(3))
    labels = None if class_labels is None else torch.tensor(class_labels)
    with torch.no_grad():
        return generator(z, times, labels, noise, truncation_psi=0.7).sample


def settings_of(distance: int = 4) -> dict:
    return {"cfg": {"motion": {"motion_z_distance": distance}, "sampling": {"max_num_frames": 32}}, "arguments": {}}


# --- names


def test_names_are_those_of_the_official_code():
    generator = tiny_generator(resolution=8)
    assert set(official("stylegan-v").official_tensors(generator)) == set(OFFICIAL_GENERATOR.split())
    names = set(official("mostgan-v").official_tensors(tiny_generator("MoStGANVGenerator")))
    of_blocks = {name for name in names if name.startswith("synthesis.b16.")}
    assert {name.rpartition(".")[0] for name in names if "multimotionmap" in name} == {
        "synthesis.multimotionmap.0",
        "synthesis.multimotionmap.1",
    }
    assert {name for name in of_blocks if "hypernet" in name} == {
        f"synthesis.b16.conv{place}.hypernet.{kind}" for place in (0, 1) for kind in ("weight", "bias")
    }
    assert set(official("stylegan-v").official_tensors(tiny_discriminator("stylegan-v"))) == set(
        OFFICIAL_DISCRIMINATOR.split()
    )


def test_what_is_computed_is_what_the_official_code_keeps():
    tensors = official("stylegan-v").official_tensors(tiny_generator())
    freqs = tensors["synthesis.motion_encoder.time_encoder.freqs"][0]
    expected = [2 * math.pi / 2**exponent for exponent in (5, 3.5, 2)]  # periods of 32 to 4 frames
    assert freqs.tolist() == pytest.approx(expected)
    scales = tensors["synthesis.motion_encoder.time_encoder.phase_scales"][0]
    assert scales.tolist() == pytest.approx([32 / (2 * math.pi / frequency) for frequency in expected])
    row = torch.tensor([1.0, 3, 3, 1]) / 8
    assert torch.equal(tensors["synthesis.b8.conv0.resample_filter"], row[:, None] * row)
    tensors = official("stylegan-v").official_tensors(tiny_discriminator("stylegan-v"))
    coefficients = tensors["time_encoder.time_encoder.fourier_coefs"]
    assert coefficients.tolist() == [pytest.approx([math.pi * 2**power / 32 for power in range(5)])]


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("model", MODELS)
def test_networks_come_back_from_their_official_names(model, num_classes):
    generator = tiny_generator(f"{MODELS[model]}Generator", num_classes=num_classes)
    tensors = official(model).official_tensors(generator)
    again = official(model).convert_generator(tensors, settings_of())
    unlike = {name for name, value in generator.config.items() if again.config.get(name) != value}
    assert unlike <= {"num_frames", "_use_default_values"}  # the file does not tell the length of a clip
    labels = None if num_classes is None else [2, 0]
    assert torch.equal(generated(again, labels), generated(generator, labels))

    discriminator = tiny_discriminator(model, num_classes=num_classes)
    again = official(model).convert_discriminator(official(model).official_tensors(discriminator))
    unlike = {name for name, value in discriminator.config.items() if again.config.get(name) != value}
    assert unlike <= {"_use_default_values"}
    frames, times = torch.rand(2, 3, 3, 16, 16), torch.tensor([[0.0, 1, 5], [2, 3, 9]])
    labels = None if num_classes is None else torch.tensor([2, 0])
    assert torch.equal(again(frames, times, labels), discriminator(frames, times, labels))


def test_what_does_not_fit_is_one_sentence():
    convert = official("stylegan-v").convert_generator
    tensors = official("stylegan-v").official_tensors(tiny_generator())
    cases = {
        r"lacks synthesis\.b8\.conv0\.bias; is it": {"synthesis.b8.conv0.bias": None},
        r"has synthesis\.b8\.conv0\.noise_strength, which a StyleGANVGenerator does not; is it": {
            "synthesis.b8.conv0.noise_strength": torch.zeros(())
        },
        r"lacks mapping\.w_avg and has odd, which": {"mapping.w_avg": None, "odd": torch.zeros(1)},
        r"synthesis\.b8\.conv0\.bias has shape \(9,\); a StyleGANVGenerator of this size has \(8,\)": {
            "synthesis.b8.conv0.bias": torch.zeros(9)
        },
        r"synthesis\.b8\.resample_filter is not that of the official settings": {
            "synthesis.b8.resample_filter": torch.full((4, 4), 1 / 16)
        },
        r"the network lacks mapping\.fc0\.weight": {name: None for name in tensors if name.startswith("mapping.fc")},
        r"the network has no blocks of resolutions": {name: None for name in tensors if "conv1" in name},
    }
    for message, changes in cases.items():
        changed = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        with pytest.raises(ValueError, match=message) as error:
            convert(changed, settings_of())
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="motion codes 8 frames apart and a shortest period of 4 frames"):
        convert(tensors, settings_of(8))
    assert convert(tensors, {}).config.motion_z_distance == 4  # without settings: the shortest period
    of_other = official("mostgan-v").official_tensors(tiny_generator("MoStGANVGenerator"))
    with pytest.raises(
        ValueError, match=r"has synthesis\.b16\.conv0\.hypernet\.bias, .* and 4 more, which a StyleGAN"
    ):
        convert(of_other, settings_of())
    with pytest.raises(ValueError, match=r"lacks synthesis\.multimotionmap\.0\.weight"):
        official("mostgan-v").convert_generator(tensors, settings_of())


# --- convert-legacy


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Writes network pickles: `snapshot(model, **networks) -> path`."""

    def write(model: str, **networks):
        made_of = {
            "G_ema": official(model).official_tensors(tiny_generator(f"{MODELS[model]}Generator")),
            "D": official(model).official_tensors(tiny_discriminator(model)),
        }
        made = {name: network(tensors, plain=("time_encoder",)) for name, tensors in made_of.items()}
        made["G_ema"].cfg = DictConfig(settings_of()["cfg"])
        return save_snapshot(tmp_path / "network-snapshot-000025.pkl", monkeypatch, made | networks)

    return write


@pytest.fixture
def refused(endora):
    def run(*arguments) -> str:
        code, _, err = endora(*arguments)
        assert code == 1
        assert err.startswith("endora: error: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize("model", MODELS)
def test_a_snapshot_becomes_a_pipeline_that_generates_the_same(endora, refused, snapshot, tmp_path, request, model):
    if model == "mostgan-v":
        request.getfixturevalue("read_here")
    path, out = snapshot(model), tmp_path / "deep" / "model"
    code, said, _ = endora("convert-legacy", path, "--model", model, "--output", out, "--trust_pickle")
    assert code == 0
    assert said.startswith(f"{out}: {MODELS[model]}Pipeline, 16x16 pixels, ")
    assert list(out.parent.iterdir()) == [out]
    pipeline = load_pipeline(out)
    assert type(pipeline).__name__ == f"{MODELS[model]}Pipeline"
    assert pipeline.generator.config.max_num_frames == TINY_GENERATOR["max_num_frames"]
    generator = tiny_generator(f"{MODELS[model]}Generator")
    assert torch.equal(generated(pipeline.generator), generated(generator))
    saved = type(tiny_discriminator(model)).from_pretrained(out / "discriminator")
    for name, tensor in tiny_discriminator(model).state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
    record = json.loads((out / "conversion.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["source"] == {"file": path.name, "sha256": digest}
    assert record["model"] == model

    line = refused("publish", out, "me/model", "--dry_run")
    assert "whose licence allows non-commercial use only; say with --license" in line
    code, listed, _ = endora("publish", out, "me/model", "--dry_run", "--license", "cc-by-nc-4.0")
    assert code == 0
    assert " conversion.json\n" in listed
    assert "discriminator" not in listed  # it is no part of the pipeline
    line = refused("convert-legacy", path, "--model", model, "--output", out, "--trust_pickle")
    assert "is not empty; choose another name or add --overwrite" in line


@pytest.fixture
def read_here(monkeypatch, tmp_path):
    """Reads pickles in this process, which saves the start of another; what they may look up is the same."""
    from safetensors.torch import load_file

    from diffusers_endora.baselines import legacy_pickle

    def read(path):
        try:
            legacy_pickle.read_here(path, tmp_path / "answer")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tensors: dict = {}
        for key, tensor in load_file(tmp_path / "answer").items():
            tensors.setdefault(key.partition("/")[0], {})[key.partition("/")[2]] = tensor
        (tmp_path / "answer").unlink()
        return legacy_pickle.NetworkPickle(tensors, {"G_ema": settings_of()})

    monkeypatch.setattr(legacy_conversion, "read_network_pickle", read)


class RunsCode:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_errors_leave_nothing_behind(refused, snapshot, read_here, tmp_path):
    out = tmp_path / "model"
    path = snapshot("stylegan-v")
    before = sorted(tmp_path.rglob("*"))
    to = ("--output", out, "--model")
    assert "brings Python code along, which the official loader runs" in refused(
        "convert-legacy", path, *to, "mostgan-v"
    )
    trusted = ("--trust_pickle", *to)
    line = refused("convert-legacy", path, *trusted, "mostgan-v")
    assert "as the generator of MoStGAN-V: the network lacks synthesis.multimotionmap.0.weight" in line
    line = refused("convert-legacy", path, *to, "lvdm")
    assert path.name in line
    assert "--last_weights: is for --model lvdm" in refused(
        "convert-legacy", path, *trusted, "stylegan-v", "--last_weights"
    )
    assert "absent.pkl: is no file" in refused("convert-legacy", tmp_path / "absent.pkl", *trusted, "stylegan-v")
    assert sorted(tmp_path.rglob("*")) == before

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in refused("convert-legacy", path, *trusted, "stylegan-v")
    mark = tmp_path / "ran"
    snapshot("stylegan-v", extra=RunsCode(mark))
    line = refused("convert-legacy", path, *trusted, "stylegan-v")
    assert "asks for posix.system, which no network pickle needs and which could run code; nothing was run." in line
    assert not mark.exists()
    assert not out.exists()


def test_a_discriminator_that_does_not_fit_is_left_out_and_said(endora, snapshot, read_here, tmp_path):
    path = snapshot("stylegan-v", D=network({"b4.out.bias": torch.ones(1)}))
    command = ("convert-legacy", path, "--model", "stylegan-v", "--trust_pickle", "--output")
    code, said, _ = endora(*command, tmp_path / "one")
    assert code == 0
    assert said.startswith("note: the discriminator is left out: the network has no blocks of resolutions")
    snapshot("stylegan-v", D=None)
    code, said, _ = endora(*command, tmp_path / "two")
    assert said.startswith("note: the file holds no discriminator\n")
    for name in ("one", "two"):
        assert not (tmp_path / name / "discriminator").exists()
        assert torch.equal(generated(load_pipeline(tmp_path / name).generator), generated(tiny_generator()))


def test_an_lvdm_checkpoint_becomes_a_pipeline(endora, refused, tmp_path):
    stages = {"channel_multipliers": (1,), "layers_per_stage": 1, "attention_stages": (0,)}
    models = {
        "unet": LVDMUNet3DModel(model_channels=32, sample_size=2, num_frames=1, class_dropout_prob=0, **stages),
        "autoencoder": LVDMAutoencoder(),
    }
    state_dict = dict.fromkeys(SCHEDULE_TABLES, make_lvdm_scheduler().betas)
    for names, model, prefix in (
        (official_unet_names(models["unet"]), models["unet"], UNET_PREFIX),
        (official_autoencoder_names(models["autoencoder"]), models["autoencoder"], AUTOENCODER_PREFIX),
    ):
        state_dict |= {f"{prefix}{name}": model.state_dict()[ours] for name, ours in names.items()}
    torch.save({"state_dict": state_dict}, tmp_path / "epoch=1.ckpt")
    out = tmp_path / "model"
    command = ("convert-legacy", tmp_path / "epoch=1.ckpt", "--model", "lvdm", "--output", out)
    assert "has no moving average" in refused(*command)
    command += ("--last_weights",)
    assert "--resolution 20: expected a multiple of 8 pixels" in refused(*command, "--resolution", 20)
    assert not out.exists()
    assert endora(*command, "--resolution", 16)[0] == 0
    converted = load_pipeline(out)
    assert converted.unet.config.sample_size == 2
    assert type(converted.scheduler).__name__ == "DDIMScheduler"
    for name in models:
        expected = models[name].state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in getattr(converted, name).state_dict().items())
    assert json.loads((out / "conversion.json").read_text())["model"] == "lvdm"
    assert "under the MIT licence, which does not name the weights" in refused("publish", out, "me/model", "--dry_run")
