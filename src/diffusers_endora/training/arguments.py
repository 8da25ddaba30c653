"""The flags of the training scripts, which a yaml file can hold too."""

import argparse
import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import yaml
from diffusers.optimization import SchedulerType

from ..data.corpora import CORPORA
from .presets import TRANSFORMERS

LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the Hub writes them
SWITCH = argparse.BooleanOptionalAction


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every training has."""
    parser = empty_parser(description)
    add_data(parser.add_argument_group("data"))
    _add_objective(parser.add_argument_group("objective"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    add_run(parser.add_argument_group("run"))
    add_reports(parser.add_argument_group("validation and reports"))
    return parser


def empty_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--config` alone."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="yaml file with flags by name; those on the command line come first")
    return parser


def add_model(group: Any) -> None:
    """What a transformer that is made anew looks like."""
    group.add_argument("--pretrained_vae", help="folder or Hub id; the paper's is stabilityai/sd-vae-ft-mse")
    group.add_argument("--preset", choices=list(TRANSFORMERS), default="xl-2")
    for name in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size"):
        group.add_argument(f"--{name}", type=int, help="instead of the preset's")
    group.add_argument(
        "--block_order",
        choices=["interleaved", "sequential"],
        default="interleaved",
        help="sequential: all spatial, then all temporal blocks, rows 1 and 2 of the paper's table 3",
    )
    group.add_argument("--pretrained_model", help="pipeline folder or Hub id whose weights the training begins with")
    group.add_argument(
        "--weaker_model",
        help="pipeline or earlier checkpoint of --pretrained_model: the training learns to be guided away from it "
        "(autoguidance, Karras et al. 2024)",
    )
    group.add_argument("--autoguidance_scale", type=float, default=2.0, help="of --weaker_model; 1 is none")


def add_data(group: Any, is_endora: bool = True) -> None:
    """The corpus and its clips; with `is_endora` also still images, the dropping of labels and the caches."""
    group.add_argument(
        "--train_data_dir",
        help="folder of videos or frame folders, whose sub-folders are the classes; with --dataset_name the raw "
        "folder of that corpus",
    )
    group.add_argument(
        "--dataset_name",
        help="a folder of `endora prepare`, a dataset of the Hub with a video column, or a corpus by its name: "
        f"phantom, or with its raw folder {', '.join(sorted(CORPORA.keys() - {'phantom'}))}",
    )
    group.add_argument("--dataset_config_name")
    group.add_argument("--dataset_split", default="train")
    group.add_argument("--validation_split", help="split of --dataset_name that is held out")
    group.add_argument("--validation_data_dir", help="folder of videos that are held out")
    group.add_argument("--validation_fraction", type=float, help="part of the training videos that is held out")
    group.add_argument("--resolution", type=int, default=128, help="side of the square frames, in pixels")
    group.add_argument("--num_frames", type=int, default=16)
    group.add_argument(
        "--frame_interval", type=int, help="fixed stride between frames, instead of spreading them over the window"
    )
    group.add_argument("--window", type=int, default=48, help="length in frames of the window a clip is spread over")
    if is_endora:
        group.add_argument(
            "--num_still_images", type=int, default=8, help="still images trained along with every clip"
        )
    group.add_argument("--horizontal_flip", action=SWITCH, default=True)
    group.add_argument("--antialias", action=SWITCH, default=False, help="filter HD video before it is shrunk")
    group.add_argument("--class_conditional", action="store_true", help="learn the class of each video too")
    if is_endora:
        group.add_argument("--class_dropout_prob", type=float, default=0.1, help="labels dropped, for guidance")
    group.add_argument("--dataloader_num_workers", type=int, default=2)
    group.add_argument("--cache_frames_gb", type=float, default=1.0, help="decoded frames kept in memory, per worker")
    if not is_endora:
        return
    group.add_argument("--cache_features", help="folder for what VAE and teacher make of each frame, computed once")
    group.add_argument("--cache_latents", action=SWITCH, help="in --cache_features; by default yes")
    group.add_argument("--cache_dino", action=SWITCH, help="in --cache_features; by default yes")
    group.add_argument("--cache_latents_dtype", choices=["float16", "float32"], default="float16")
    group.add_argument("--cache_dino_dtype", choices=["float16", "float32", "int8"], default="float16")


def _add_objective(group: Any) -> None:
    group.add_argument("--prediction_type", choices=["epsilon", "v_prediction", "flow"], default="epsilon")
    group.add_argument("--zero_terminal_snr", action="store_true", help="Lin et al. 2023, with v_prediction")
    group.add_argument("--loss_weighting", choices=["none", "min_snr", "sigmoid"], default="none")
    group.add_argument("--snr_gamma", type=float, default=5.0, help="of min_snr, Hang et al. 2023")
    group.add_argument("--sigmoid_bias", type=float, default=0.0, help="of sigmoid, Hoogeboom et al. 2024")
    group.add_argument("--timestep_density", choices=["uniform", "logit_normal"], default="uniform")
    group.add_argument("--logit_mean", type=float, default=0.0, help="of logit_normal, Esser et al. 2024")
    group.add_argument("--logit_std", type=float, default=1.0, help="of logit_normal")
    group.add_argument("--prior", choices=["official", "paper", "repa", "none"], default="official")
    group.add_argument("--prior_weight", type=float, default=0.5)
    group.add_argument("--dino_model", help="folder or Hub id of the prior's teacher; paper: facebook/dino-vits8")


def _add_optimisation(group: Any) -> None:
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--train_batch_size", type=int, default=5, help="clips per device")
    group.add_argument("--max_train_steps", type=int, default=150_000)
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    group.add_argument("--allow_tf32", action=SWITCH, default=True)
    group.add_argument("--learning_rate", type=float, help="if not given 1e-4, for the preset demo 1e-3")
    group.add_argument("--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument(
        "--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for matrices of blocks, at AdamW's rate"
    )
    group.add_argument("--use_8bit_adam", action="store_true", help="needs the package bitsandbytes")
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=0.0)
    group.add_argument("--max_grad_norm", type=float, default=0.1, help="inf: gradients are not clipped")
    group.add_argument("--max_grad_norm_start", type=int, default=500_000, help="step that clipping starts at")
    group.add_argument("--use_ema", action=SWITCH, default=True)
    group.add_argument("--ema_decay", type=float, default=0.9999)
    group.add_argument(
        "--ema_warmup", action=SWITCH, default=False, help="for short trainings: soon forgets initial weights"
    )
    group.add_argument("--offload_ema", action="store_true", help="keep the moving average in the host's memory")
    group.add_argument("--max_loss", type=float, default=10.0, help="a step whose noise error is larger is bad")
    group.add_argument("--skip_bad_steps", action="store_true", help="leave bad steps out and count them; else stop")


def add_run(group: Any, is_endora: bool = True) -> None:
    """The folder and its checkpoints; with `is_endora` also early stopping."""
    group.add_argument("--output_dir")
    group.add_argument("--checkpointing_steps", type=int, default=10_000)
    group.add_argument("--checkpoints_total_limit", type=int)
    group.add_argument("--resume_from_checkpoint", help='name of a checkpoint in output_dir, a path, or "latest"')
    if is_endora:
        group.add_argument(
            "--early_stopping_patience", type=int, help="evaluations of the held-out loss without a fall"
        )


def add_reports(group: Any, is_endora: bool = True) -> None:
    """Validation, trackers and the Hub; with `is_endora` also how it samples, and the held-out loss."""
    group.add_argument("--validation_steps", type=int, default=10_000)
    group.add_argument("--num_validation_clips", type=int, default=2, help="generated and written at each validation")
    if is_endora:
        group.add_argument("--validation_inference_steps", type=int, default=50)
        group.add_argument(
            "--validation_loss_clips", type=int, default=64, help="held-out clips, if videos are held out"
        )
    group.add_argument("--validation_fvd", type=int, help="FVD of so many clips a side against held-out videos")
    group.add_argument("--validation_fvd_steps", type=int, help="every so many steps; by default at the end")
    group.add_argument("--fps", type=float, default=8.0, help="of the clips that validation writes")
    group.add_argument("--logging_steps", type=int, default=50)
    group.add_argument("--report_to", default="none", help='"tensorboard", "wandb", "trackio", ... or "none"')
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id")
    group.add_argument("--hub_token", help="by default the one of `hf auth login` or HF_TOKEN")
    group.add_argument("--hub_private", action="store_true")
    group.add_argument("--license", help="of the published model, such as apache-2.0")


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command line and its `--config`; exits with one line on stderr and code 2 if they are wrong."""
    args = read_flags(parser, argv)
    check_data(parser, args)
    for name in ("cache_latents", "cache_dino"):
        if getattr(args, name) is None:
            setattr(args, name, args.cache_features is not None)
        elif getattr(args, name) and args.cache_features is None:
            parser.error(f"--{name} needs --cache_features, the folder for it.")
    if args.output_dir is None:
        parser.error("--output_dir is required.")
    if args.prior != "none" and args.dino_model is None:
        parser.error("--dino_model is required with --prior: the paper's is facebook/dino-vits8.")
    check_destinations(parser, args)
    if args.optimizer == "muon" and args.use_8bit_adam:
        parser.error("--use_8bit_adam: is not for --optimizer muon.")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes.")
    if args.zero_terminal_snr and args.prediction_type != "v_prediction":
        parser.error("--zero_terminal_snr needs --prediction_type v_prediction: noise alone does not tell its noise.")

    if args.zero_terminal_snr and args.loss_weighting != "none":
        parser.error(
            f"--zero_terminal_snr needs --loss_weighting none: {args.loss_weighting} gives the last timestep weight 0."
        )

    positive = ["resolution", "num_frames", "train_batch_size", "max_train_steps", "gradient_accumulation_steps"]
    positive += ["checkpointing_steps", "validation_steps", "num_validation_clips", "logging_steps", "max_loss"]
    positive += ["validation_inference_steps", "frame_interval", "checkpoints_total_limit", "validation_loss_clips"]
    positive += ["early_stopping_patience", "snr_gamma", "logit_std", "validation_fvd", "validation_fvd_steps", "fps"]
    check_positive(parser, args, [*positive, "max_grad_norm"], without_limit=("max_loss", "max_grad_norm"))
    for name in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "rank"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    not_negative = ["num_still_images", "dataloader_num_workers", "cache_frames_gb", "lr_warmup_steps", "seed"]
    check_not_negative(parser, args, [*not_negative, "prior_weight", "adam_weight_decay", "max_grad_norm_start"])
    for name in ("ema_decay", "class_dropout_prob"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            parser.error(f"--{name} {value}: expected a number from 0 to 1.")
    check_reports(parser, args)
    return args


def read_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command line and its `--config`, each by itself."""
    config = parser.parse_known_args(argv)[0].config
    if config is not None:
        _set_defaults(parser, config)
    return parser.parse_args(argv)


def check_destinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses a Hub or a tracker that cannot be reached by what the flags and the installation say."""
    if args.push_to_hub and args.hub_model_id is None:
        parser.error("--push_to_hub needs --hub_model_id.")
    if args.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        parser.error('--report_to tensorboard needs the package tensorboard: pip install "diffusers-endora[train]".')


def check_positive(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: list[str], without_limit: tuple[str, ...] = ()
) -> None:
    """Refuses flags that are neither None nor positive and finite; those of `without_limit` may be infinite."""
    for name in names:
        value = getattr(args, name)
        is_without_limit = name in without_limit and value == math.inf
        if value is not None and not (0 < value < math.inf or is_without_limit):
            parser.error(f"--{name} {value}: expected a positive {'integer' if isinstance(value, int) else 'number'}.")


def check_not_negative(parser: argparse.ArgumentParser, args: argparse.Namespace, names: list[str]) -> None:
    """Refuses flags that are negative or infinite, and a seed that generators do not take."""
    for name in names:
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 or more.")
    if args.seed >= 2**63:
        parser.error(f"--seed {args.seed}: expected less than 2^63.")


def check_reports(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses an FVD that no validation comes to, and a licence that is none of the Hub's names."""
    if args.validation_fvd_steps is not None and args.validation_fvd is None:
        parser.error("--validation_fvd_steps needs --validation_fvd, the number of clips.")
    if args.validation_fvd_steps is not None and args.validation_fvd_steps % args.validation_steps:
        parser.error(
            f"--validation_fvd_steps {args.validation_fvd_steps}: expected a multiple of --validation_steps "
            f"{args.validation_steps}."
        )
    if args.license is not None and not LICENSE_NAME.fullmatch(args.license):
        parser.error(f"--license {args.license!r}: expected the Hub's name of a licence, such as cc-by-nc-4.0.")


def check_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses flags of the corpus that do not fit together."""
    if args.train_data_dir is None and args.dataset_name is None:
        parser.error("give --train_data_dir or --dataset_name.")
    if args.train_data_dir is not None and args.dataset_name is not None and not is_corpus(args):
        parser.error(
            f"give either --train_data_dir or --dataset_name; both are for a corpus by its name: {', '.join(CORPORA)}."
        )
    if args.dataset_name is not None and importlib.util.find_spec("datasets") is None:
        parser.error('--dataset_name needs the package datasets: pip install "diffusers-endora[train]".')
    if args.frame_interval is None and args.num_frames is not None and args.window < args.num_frames:
        parser.error(f"--window {args.window}: expected at least --num_frames {args.num_frames}.")
    held_out = ["validation_split", "validation_data_dir", "validation_fraction"]
    given = [f"--{name}" for name in held_out if getattr(args, name) is not None]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)}: expected one of them.")
    if args.validation_split is not None and args.dataset_name is None:
        parser.error("--validation_split needs --dataset_name.")
    if args.validation_fraction is not None and not 0 < args.validation_fraction < 1:
        parser.error(f"--validation_fraction {args.validation_fraction}: expected a number between 0 and 1.")
    for name in ("early_stopping_patience", "validation_fvd"):
        if getattr(args, name, None) is not None and not given:
            parser.error(f"--{name} needs held-out videos: one of --{', --'.join(held_out)}.")


def is_corpus(args: argparse.Namespace) -> bool:
    """Whether `--dataset_name` is a corpus by its name, and no folder that happens to be called so."""
    return args.dataset_name in CORPORA and not Path(args.dataset_name).is_dir()


def _set_defaults(parser: argparse.ArgumentParser, config: str) -> None:
    """Takes a yaml file's values as defaults of the flags of the same name, checked as those of a command line."""
    try:
        values = yaml.safe_load(Path(config).read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {config}: cannot be read ({' '.join(str(error).split())}).")
    if not isinstance(values, dict):
        parser.error(f"--config {config}: expected flags by name, such as `resolution: 128`.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for name, value in values.items():
        if name not in actions:
            parser.error(f"--config {config}: there is no flag {name}.")
        action = actions[name]
        if isinstance(action, SWITCH | argparse._StoreTrueAction):
            if not isinstance(value, bool):
                parser.error(f"--config {config}: {name}: {value!r}: expected true or false.")
        elif value is not None:
            try:
                convert: Any = action.type or str
                fits = isinstance(value, int | float | str) and not isinstance(value, bool)
                value = convert(str(value)) if fits else None
            except (TypeError, ValueError):
                value = None
            if value is None or (action.choices and value not in action.choices):
                parser.error(f"--config {config}: {name}: {values[name]!r} is not one of its values.")
        parser.set_defaults(**{name: value})


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The flags for `training.json`; infinity, which JSON does not have, is "inf"."""
    return {name: "inf" if value == math.inf else value for name, value in vars(args).items()}
