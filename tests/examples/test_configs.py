"""The files in examples/configs and examples/accelerate_configs say what the script and Accelerate understand."""

import importlib
import json
import shlex
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from script_runs import EXAMPLES, read_log
from test_train_endora import SCRIPT, train

from diffusers_endora import EndoraTransformer3DModel
from diffusers_endora.baselines.gan_arguments import parse_gan_arguments
from diffusers_endora.baselines.gan_recipes import MOSTGAN_V, STYLEGAN_V
from diffusers_endora.baselines.lvdm.lvdm_arguments import make_parser, parse_lvdm_arguments
from diffusers_endora.data.video_io import write_video
from diffusers_endora.models import transformer_endora
from diffusers_endora.training.arguments import add_model, new_parser, parse_arguments

BENCHMARK = EXAMPLES / "configs" / "table1_demo.yaml"
CONFIGS = [path for path in sorted((EXAMPLES / "configs").glob("*.yaml")) if path != BENCHMARK]
ACCELERATE_CONFIGS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))
CORPORA = ["cholectriplet", "colonoscopic", "kvasir_capsule", "phantom", "polypdiag"]
ROWS = [  # of the paper's table 3: file, still images, block order, prior
    ("table3_1_baseline", 0, "sequential", "none"),
    ("table3_2_modified_diffusion", 8, "sequential", "none"),
    ("table3_3_spatiotemporal_encoding", 8, "interleaved", "none"),
    ("table3_4_prior", 8, "interleaved", "official"),
]


def name_of(path: Path) -> str:
    return path.stem


def parse(**flags: Any) -> dict[str, Any]:
    parser = new_parser("")
    add_model(parser.add_argument_group("model"))
    return vars(parse_arguments(parser, [f"--{name}={value}" for name, value in flags.items()]))


# --- configs of the script -------------------------------------------------------------------------------------------


def test_there_is_a_config_for_every_corpus_and_every_row_of_the_ablation():
    assert [path.stem for path in CONFIGS] == [*CORPORA, *(name for name, *_ in ROWS)]


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_config_is_the_papers_recipe(config):
    folder = {} if config.stem == "phantom" else {"train_data_dir": "RAW"}
    args = parse(config=config, output_dir="OUT", **folder)
    defaults = parse(train_data_dir="RAW", output_dir="OUT", dino_model="facebook/dino-vits8")
    data = ["config", "train_data_dir", "dataset_name", "validation_fraction", "validation_split", "pretrained_vae"]
    of_rows = ["num_still_images", "block_order", "prior", "dino_model"]
    stopping = ["validation_steps", "early_stopping_patience", "checkpointing_steps", "checkpoints_total_limit"]
    spelled_out = ["learning_rate", "mixed_precision"]  # what the preset and Accelerate would choose
    for name, default in defaults.items():
        if name not in [*data, *of_rows, *stopping, *spelled_out]:
            assert args[name] == default, name
    assert (args["learning_rate"], args["mixed_precision"]) == (1e-4, "no")
    assert args["pretrained_vae"] == "stabilityai/sd-vae-ft-mse"
    assert args["early_stopping_patience"] == 5
    row = next((row for row in ROWS if row[0] == config.stem), ROWS[-1])
    assert (args["num_still_images"], args["block_order"], args["prior"]) == row[1:]
    assert args["dino_model"] == (None if args["prior"] == "none" else "facebook/dino-vits8")
    assert args["dataset_name"] == (config.stem if config.stem in CORPORA else "colonoscopic")
    assert f"--config examples/configs/{config.name}" in config.read_text()  # the command on top


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A raw folder of Colonoscopic: four clips as Endo-FM numbers them."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for index in range(4):
        start = rng.integers(0, 200, size=(1, 32, 32, 3))
        write_video(folder / f"{index:05d}.mp4", (start + np.arange(20).reshape(20, 1, 1, 1)).astype(np.uint8), fps=8)
    return folder


@pytest.mark.parametrize(("name", "num_still_images", "block_order", "prior"), ROWS)
def test_a_row_of_the_ablation_trains(
    material,
    clips,
    tmp_path,
    monkeypatch,
    name,
    num_still_images,
    block_order,
    prior,
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    changes = {"config": EXAMPLES / "configs" / f"{name}.yaml", "train_data_dir": clips, "num_still_images": None}
    changes |= {"num_layers": 2, "max_train_steps": 2, "validation_steps": 2, "validation_loss_clips": 1}
    changes |= {"dino_model": None} if prior == "none" else {}
    train(material, tmp_path / "out", **changes)
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["arguments"]["num_still_images"] == num_still_images
    assert json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["block_order"] == block_order
    assert facts["results"]["steps"] == 2
    assert 0 < facts["results"]["held_out_loss"] < 2
    lines = read_log(tmp_path / "out")
    assert all(line["grad_norm"] > 0 and line["lr"] == 1e-4 for line in lines)
    assert all((line["prior"] > 0) == (prior != "none") for line in lines)


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_trains_the_four_systems_with_flags_that_they_have(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    benchmark, autoencoder = (importlib.import_module(name) for name in ("benchmark", "train_autoencoder"))

    def of_endora(argv: list[str]) -> Any:
        parser = new_parser("")
        add_model(parser.add_argument_group("model"))
        return parse_arguments(parser, argv)

    def of_autoencoder(argv: list[str]) -> Any:
        monkeypatch.setattr("sys.argv", ["train_autoencoder.py", *argv])
        return autoencoder.parse_args()

    parsers = {
        "train_stylegan_v.py": partial(parse_gan_arguments, STYLEGAN_V),
        "train_mostgan_v.py": partial(parse_gan_arguments, MOSTGAN_V),
        "train_lvdm.py": lambda argv: parse_lvdm_arguments(make_parser(""), argv),
        "train_autoencoder.py": of_autoencoder,
        "train_endora.py": of_endora,
    }
    read = benchmark.read_benchmark(BENCHMARK)
    assert list(read.trainings) == ["StyleGAN-V", "MoStGAN-V", "LVDM", "Endora"]
    assert read.protocols == ["endora-strict", "endora-legacy"]
    for stage in chain.from_iterable(read.trainings.values()):
        script, *argv = shlex.split(stage)
        assert (BENCHMARK.parent / script).is_file()
        args = parsers[Path(script).name](argv)
        assert args.resolution == 64
        assert getattr(args, "frame_interval", 1) == read.options["frame_interval"]


# --- configs of Accelerate -------------------------------------------------------------------------------------------


def launch(name: str, *flags: str) -> Any:
    """The arguments that `accelerate launch --config_file` goes on with."""
    path = EXAMPLES / "accelerate_configs" / f"{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *flags, str(SCRIPT)])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize(
    ("name", "distributed_type", "num_processes", "num_machines"),
    [
        ("cpu", DistributedType.NO, 1, 1),
        ("deepspeed_zero2", DistributedType.DEEPSPEED, 8, 1),
        ("fsdp2", DistributedType.FSDP, 8, 1),
        ("multi_gpu", DistributedType.MULTI_GPU, 8, 1),
        ("multi_node", DistributedType.MULTI_GPU, 16, 2),
        ("single_gpu", DistributedType.NO, 1, 1),
    ],
)
def test_accelerate_understands_a_config(name, distributed_type, num_processes, num_machines):
    path = EXAMPLES / "accelerate_configs" / f"{name}.yaml"
    assert path in ACCELERATE_CONFIGS
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == distributed_type
    args = launch(name)
    assert (args.num_processes, args.num_machines, args.use_cpu) == (num_processes, num_machines, name == "cpu")
    assert args.mixed_precision == "no"
    flags = vars(launch_command_parser().parse_args([str(SCRIPT)]))
    for section in ("fsdp_config", "deepspeed_config"):  # whose keys Accelerate does not look at
        assert yaml.safe_load(path.read_text()).get(section, {}).keys() <= flags.keys()
    text = path.read_text()
    assert f"--config_file examples/accelerate_configs/{path.name}" in text
    assert (name == "cpu") != ("Not tested on GPUs" in text)


def test_every_accelerate_config_is_tested():
    assert len(ACCELERATE_CONFIGS) == 6


def test_flags_of_the_launcher_override_a_config():
    args = launch("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--num_processes", "4")
    prepare_multi_gpu_env(args)
    assert (args.node_rank, args.rdzv_endpoint, args.nproc_per_node) == (1, "10.0.0.1:29500", "2")


def test_fsdp2_wraps_every_block_and_loads_the_teacher_in_every_process(monkeypatch):
    for name, value in prepare_multi_gpu_env(launch("fsdp2")).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is False
    assert set(plugin.transformer_cls_names_to_wrap) == set(EndoraTransformer3DModel._no_split_modules)
    assert all(hasattr(transformer_endora, name) for name in plugin.transformer_cls_names_to_wrap)
    plugin.set_auto_wrap_policy(
        EndoraTransformer3DModel(num_attention_heads=1, attention_head_dim=4, num_layers=2, num_frames=2)
    )


def test_deepspeed_takes_flags_from_the_script_and_does_not_clip():
    args = launch("deepspeed_zero2")
    assert (args.zero_stage, args.gradient_accumulation_steps, args.gradient_clipping) == (2, "auto", 0.0)
