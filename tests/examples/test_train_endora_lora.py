"""The LoRA script end to end on a small pipeline: what it trains and leaves alone, what it writes, what it refuses."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_runs import EXAMPLES, as_flags, read_log, run_main, write_videos

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.adapter_page import ADAPTER_WEIGHTS
from diffusers_endora.hub import prepare, publish_folder
from diffusers_endora.metrics.feature_extractors import hash_weights
from diffusers_endora.training.adapter import add_adapter, follow_base, put_adapter_into, training_scheduler
from diffusers_endora.training.arguments import new_parser
from diffusers_endora.training.objective import make_scheduler
from diffusers_endora.training.trainer import Trainer

SCRIPT = EXAMPLES / "train_endora_lora.py"
MODEL = "model.safetensors"  # in a checkpoint
RANK, ALPHA = 2, 6


def tiny_pipeline(prediction_type: str = "epsilon", zero_terminal_snr: bool = False, **config) -> EndoraPipeline:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).eval()
    size = {"num_layers": 2, "sample_size": 8, "num_frames": 4, "out_channels": 4 if prediction_type == "flow" else 8}
    transformer = EndoraTransformer3DModel(2, 8, **{**size, **config}).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return EndoraPipeline(vae, transformer, make_scheduler(prediction_type, zero_terminal_snr))


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, str]:
    """A corpus of four 12-frame videos in two classes, a pipeline without classes and one of flow with two."""
    root = tmp_path_factory.mktemp("material")
    write_videos(root / "videos", 12)
    tiny_pipeline().save_pretrained(root / "base")
    tiny_pipeline("flow", num_classes=2).save_pretrained(root / "flow")
    return {name: str(root / name) for name in ("videos", "base", "flow")}


def train(material: dict[str, str], output_dir: Path, **changes) -> Trainer:
    """Runs the script's `main` in this process; returns the trainer it made."""
    options = {
        "pretrained_model": material["base"],
        "train_data_dir": material["videos"],
        "output_dir": output_dir,
        "rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.2,
        "learning_rate": 0.05,
        "num_still_images": 2,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_steps": 99,
        "num_validation_clips": 1,
        "validation_inference_steps": 2,
        "dataloader_num_workers": 0,
        **changes,
    }
    trainers = []
    initialise = Trainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", lambda self, *a, **k: trainers.append(self) or initialise(self, *a, **k))
        run_main(SCRIPT, as_flags(options))
    return trainers[0]


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory) -> tuple[Path, Trainer]:
    """A training that was not interrupted."""
    output_dir = tmp_path_factory.mktemp("trained") / "out"
    return output_dir, train(material, output_dir, license="cc-by-4.0")


def latents(pipe: EndoraPipeline, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=2, generator=generator, output_type="latent", return_dict=False, **options)[0]


def read_adapter(output_dir: Path) -> tuple[dict, dict]:
    """Its settings, and its weights as lists."""
    with safe_open(output_dir / ADAPTER_WEIGHTS, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    return settings, {name: value.tolist() for name, value in load_file(output_dir / ADAPTER_WEIGHTS).items()}


# What is trained


def test_the_adapter_loads_into_the_base_and_acts_alpha_over_rank_times(material, trained):
    pipe = EndoraPipeline.from_pretrained(material["base"])
    plain = latents(pipe)
    pipe.load_lora_weights(trained[0], adapter_name="adapted")
    adapted = latents(pipe)
    assert (adapted - plain).std() > 0.01 * plain.std()

    # the moving average of the last checkpoint, merged by hand
    average = load_file(trained[0] / "checkpoint-4" / "ema.safetensors")
    merged = EndoraPipeline.from_pretrained(material["base"])
    for name, module in merged.transformer.named_modules():
        if f"{name}.lora_A.default.weight" in average:
            a, b = (average.pop(f"{name}.lora_{side}.default.weight") for side in "AB")
            module.weight.data += ALPHA / RANK * b @ a
    assert not average
    assert (adapted - latents(merged)).abs().max() < 1e-5 * plain.std()

    pipe.set_adapters("adapted", 0.0)
    assert torch.equal(latents(pipe), plain)


def test_the_file_holds_the_adapter_and_its_settings(trained):
    settings, weights = read_adapter(trained[0])
    names = {name.rpartition(".lora_")[0] for name in weights}
    targets = ["to_k", "to_out.0", "to_q", "to_v"]
    # dropout is of the training; from the file diffusers would make modules that drop out in sampling
    facts = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "lora_dropout": 0.0}
    assert {name: settings[f"transformer.{name}"] for name in facts} == facts
    blocks = [f"{kind}_blocks.{index}" for kind in ("transformer", "temporal_transformer") for index in (0, 1)]
    assert names == {f"transformer.{block}.attn.{name}" for block in blocks for name in targets}


def test_the_base_is_not_trained(material, trained):
    model = trained[1].unwrapped.transformer
    base = load_file(Path(material["base"]) / "transformer" / "diffusion_pytorch_model.safetensors")
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    after = {name: value for name, value in after.items() if ".lora_" not in name}
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], base[name]) for name in base)
    in_optimiser = sum(len(group["params"]) for group in trained[1].optimizer.param_groups)
    assert in_optimiser == len(trained[1].trainable_names) == 4 * 4 * 2  # blocks x projections x (A, B)


def test_a_checkpoint_holds_what_is_trained_alone(trained):
    names = {name for name in trained[1].model.state_dict() if ".lora_" in name}
    assert load_file(trained[0] / "checkpoint-4" / MODEL).keys() == names
    assert all(f"transformer.{name}" in names for name in load_file(trained[0] / "checkpoint-4" / "ema.safetensors"))


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(material, trained, tmp_path):
    train(material, tmp_path, max_train_steps=3, license="cc-by-4.0")
    train(material, tmp_path, resume_from_checkpoint="latest", license="cc-by-4.0")
    one, other = trained[0] / "checkpoint-4", tmp_path / "checkpoint-4"
    for name in (MODEL, "ema.safetensors", "gaussian_baseline.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    first, second = (torch.load(folder / "optimizer.bin")["state"] for folder in (one, other))
    assert len(first) == len(second) == 32
    assert all(torch.equal(first[i][key], second[i][key]) for i in first for key in first[i])
    assert read_log(trained[0]) == read_log(tmp_path)
    for content in zip(*(read_adapter(run) for run in (trained[0], tmp_path)), strict=True):
        assert content[0] == content[1]


@pytest.mark.parametrize("change", [{"rank": 3}, {"lora_alpha": 2}, {"lora_targets": "to_q"}, {"base": "other"}])
def test_resuming_another_training_is_refused(material, trained, tmp_path, change):
    if "base" in change:
        pipe = EndoraPipeline.from_pretrained(material["base"])
        pipe.transformer.proj_out.bias.data += 1
        pipe.save_pretrained(tmp_path / "other")
        change = {"pretrained_model": tmp_path / "other"}
    name = {"pretrained_model": "base"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(SystemExit, match=rf"checkpoint-4 is of another training: {name} was "):
        train(material, tmp_path / "out", **change, resume_from_checkpoint=trained[0] / "checkpoint-4")


def test_gradient_checkpointing_reaches_an_adapter_in_a_frozen_model(material, trained, tmp_path):
    train(material, tmp_path, gradient_checkpointing=True, max_train_steps=2)
    for line, same in zip(read_log(trained[0])[:2], read_log(tmp_path), strict=True):
        assert same["grad_norm"] > 0
        assert same == pytest.approx(line, rel=1e-4)


def test_an_xl_2_needs_a_small_part_of_the_memory_of_training_all_of_it():
    with init_empty_weights():
        transformer = EndoraTransformer3DModel()
        parser = new_parser("")
        add_adapter(parser)
        args = parser.parse_args(["--lora_alpha", "16"])
        whole = sum(parameter.numel() for parameter in transformer.parameters())
        put_adapter_into(transformer, args)
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    assert whole == 673_681_568
    assert trained == 28 * 4 * 16 * (1152 + 1152)
    # gradients, Adam's two moments and the moving average; then with the weights, which both hold
    assert 4 * trained < 0.01 * 4 * whole
    assert whole + 5 * trained < 0.25 * 5 * whole


# The base decides


def test_a_class_conditional_pipeline_of_flow(material, tmp_path):
    """Its best weights by early stopping, with clips of a validation; the edited card stays."""
    (tmp_path / "README.md").write_text("My own card.")
    options = {"validation_steps": 1, "validation_fraction": 0.5, "validation_loss_clips": 2, "num_still_images": 0}
    options |= {"early_stopping_patience": 9, "max_train_steps": 2}
    options |= {"lora_targets": r".*blocks\.1\.(attn\.to_q|ff\..*proj)"}  # a regular expression
    trainer = train(material, tmp_path, pretrained_model=material["flow"], **options)
    assert isinstance(trainer.scheduler, FlowMatchEulerDiscreteScheduler)
    training = json.loads((tmp_path / "training.json").read_text())
    assert training["arguments"]["prediction_type"] == "flow"
    assert training["class_names"] == ["a", "b"]
    assert (tmp_path / "validation" / "step-2" / "clip_0.mp4").is_file()
    assert (tmp_path / "README.md").read_text() == "My own card."
    pipe = EndoraPipeline.from_pretrained(material["flow"])
    plain = latents(pipe, class_labels=[1])
    pipe.load_lora_weights(tmp_path)  # and not best.safetensors, which is beside it
    assert not torch.equal(latents(pipe, class_labels=[1]), plain)
    assert len(trainer.trainable_names) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"), [("epsilon", False), ("v_prediction", True), ("flow", False)]
)
def test_the_objective_is_the_base_s_whatever_it_samples_with(prediction_type, zero_snr):
    pipe = tiny_pipeline(prediction_type, zero_snr)
    of_training = pipe.scheduler
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if prediction_type == "flow" else {}
    if prediction_type != "flow":
        pipe.scheduler.register_to_config(beta_end=0.03)  # a noise schedule of its own
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **settings)
    parser = new_parser("")
    add_adapter(parser)
    args = parser.parse_args([])
    follow_base(args, pipe)
    assert (args.prediction_type, args.zero_terminal_snr) == (prediction_type, zero_snr)
    assert (args.resolution, args.num_frames, args.class_conditional) == (32, 4, False)
    scheduler = training_scheduler(args, pipe)
    assert type(scheduler) is type(of_training)
    if prediction_type != "flow":
        assert scheduler.config.prediction_type == prediction_type
        expected = type(of_training).from_config(of_training.config).alphas_cumprod
        assert torch.equal(scheduler.alphas_cumprod, expected)


# The page


def test_the_card_says_what_it_adapts_and_how_to_use_it(material, trained):
    card = ModelCard.load(trained[0] / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert "lora" in card.data.tags
    assert card.data.base_model is None  # on no Hub
    assert 'pipe.load_lora_weights("out", adapter_name="adapted")' in card.text
    base = EndoraTransformer3DModel.from_pretrained(material["base"], subfolder="transformer")
    assert hash_weights(base) in card.text
    assert f"rank {RANK}, alpha {ALPHA}, dropout 0.2" in card.text
    assert "| prior | none |" in card.text


def test_publishing_leaves_other_files_alone_and_no_local_path(material, trained, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        names = {"README.md", ADAPTER_WEIGHTS, "training.json", "training_log.jsonl"}
        publication = prepare(trained[0], "me/adapter")
        publish_folder(trained[0], "me/adapter")
        with pytest.raises(ValueError, match="is an adapter's, whose card shows no report"):
            publish_folder(trained[0], "me/adapter", datasets=["me/colon"])
        hub_options = {"push_to_hub": True, "hub_model_id": "me/trained", "max_train_steps": 1}
        train(material, tmp_path / "pushed", **hub_options)
        assert set(hub.repositories["me/trained"].files()) >= names
        files = hub.repositories["me/adapter"].files()
    assert set(publication.files) == names | {"samples/clip.mp4", "samples/contact_sheet.png"}
    assert files[ADAPTER_WEIGHTS] == (trained[0] / ADAPTER_WEIGHTS).read_bytes()
    for name, content in files.items():
        assert str(trained[0]).encode() not in content, name
        assert material["base"].encode() not in content, name
    assert "cc-by-4.0" in files["README.md"].decode()
    assert publication.owned_folders == ("samples",)  # a pipeline in the same repository stays


def test_an_adapter_is_checked_before_it_is_published(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "adapter")
    with pytest.raises(ValueError, match="--license 'No Licence': expected the Hub's name"):
        prepare(folder, "me/adapter", license="No Licence")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("cc-by-4.0", "mit") + "By hand.\n")
    with pytest.raises(ValueError, match=r"was edited by hand and states the licence mit, not apache-2\.0"):
        prepare(folder, "me/adapter", license="apache-2.0")
    assert (
        b"license: apache-2.0" in prepare(folder, "me/adapter", "apache-2.0", overwrite_card=True).files["README.md"]
    )
    weights = folder / ADAPTER_WEIGHTS
    save_file(load_file(weights), weights)
    with pytest.raises(ValueError, match="holds no settings of an adapter"):
        prepare(folder, "me/adapter")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        prepare(folder, "me/adapter")


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model": None}, "--pretrained_model is required"),
        ({"rank": 0}, "--rank 0: expected a positive integer"),
        ({"lora_alpha": -1}, "--lora_alpha -1: expected a positive integer"),
        ({"lora_dropout": 1}, "--lora_dropout 1.0: expected a number from 0 to below 1"),
        ({"lora_targets": "(to_q"}, "--lora_targets (to_q: is no regular expression"),
        ({"prior": "official"}, "--dino_model is required with --prior"),
        ({"pretrained_vae": "x"}, "unrecognized arguments: --pretrained_vae x"),
        ({"push_to_hub": True, "hub_model_id": "a/b", "pretrained_model": "a/b"}, "--hub_model_id a/b: is the base"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(material, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as raised:
        train(material, tmp_path / "out", **changes)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_peft_a_sentence_says_what_to_install(material, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(SystemExit):
        train(material, tmp_path / "out")
    assert 'pip install "diffusers-endora[lora]"' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "flow"}, "--prediction_type flow: the base .* has epsilon, which an adapter keeps"),
        ({"prediction_type": "v_prediction", "zero_terminal_snr": True}, "--prediction_type v_prediction: the base"),
        ({"resolution": 64}, "--resolution 64: the base .* has 32"),
        ({"num_frames": 8}, "--num_frames 8: the base .* has 4"),
        ({"class_conditional": True}, "--class_conditional True: the base .* has False"),
        ({"lora_targets": "to_x"}, "--lora_targets to_x: Target modules"),
        ({"lora_targets": "norm1"}, "--lora_targets norm1: Target module"),
        ({"pretrained_model": "no/where"}, '--pretrained_model "no/where" does not load'),
        ({"train_data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_what_contradicts_the_base_or_cannot_be_loaded_ends_in_one_sentence(
    material, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=rf"^train_endora_lora.py: error: .*{message}[^\n]*$"):
        train(material, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_other_classes_than_the_base_s_are_refused(material, tmp_path):
    tiny_pipeline(num_classes=3).save_pretrained(tmp_path / "three")
    with pytest.raises(SystemExit, match="the corpus has 2 classes and the base 3: expected the same classes"):
        train(material, tmp_path / "out", pretrained_model=tmp_path / "three")
