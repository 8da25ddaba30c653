"""What a training of a LoRA adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds to a training.

PEFT puts two matrices A `(rank, in)` and B `(out, rank)` beside a linear map W, which then is W + alpha / rank B A. B
begins at zero, so that training begins at the base model.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from ..models.transformer_endora import EndoraTransformer3DModel
from ..pipelines.pipeline_endora import EndoraPipeline
from .objective import make_scheduler

# The four projections of the attention of every spatial and temporal block
ATTENTION_PROJECTIONS = "to_q,to_k,to_v,to_out.0"
NAME_OF_ADAPTER = "default"  # PEFT's, while it is trained

# What of a scheduler's config the objective depends on, beside what is predicted
NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")

# Flags that the base pipeline answers
OF_THE_BASE = (
    "resolution",
    "num_frames",
    "class_conditional",
    "class_dropout_prob",
    "prediction_type",
    "zero_terminal_snr",
)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """The flags of an adapter, and defaults for a short training of few weights.

    Flags that the base pipeline answers have no default: see `follow_base`.
    """
    group = parser.add_argument_group("adapter")
    group.add_argument("--pretrained_model", help="folder or Hub id of the pipeline that is adapted")
    group.add_argument("--rank", type=int, default=16)
    group.add_argument("--lora_alpha", type=int, help="the adapter counts alpha / rank times; by default the rank")
    group.add_argument("--lora_dropout", type=float, default=0.0)
    group.add_argument(
        "--lora_targets",
        default=ATTENTION_PROJECTIONS,
        help="modules that are adapted: ends of their names, divided by commas, or a regular expression of the names",
    )
    parser.set_defaults(
        **dict.fromkeys(OF_THE_BASE),
        prior="none",
        learning_rate=1e-4,
        max_train_steps=5_000,
        checkpointing_steps=500,
        validation_steps=500,
        max_grad_norm=1.0,
        max_grad_norm_start=0,
        ema_decay=0.999,
        ema_warmup=True,
    )


def check_adapter(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with one line on stderr and code 2 where flags of `add_adapter` are wrong; fills in `lora_alpha`."""
    if args.pretrained_model is None:
        parser.error("--pretrained_model is required: the folder or Hub id of the pipeline to adapt.")
    if args.push_to_hub and args.hub_model_id == args.pretrained_model:
        parser.error(f"--hub_model_id {args.hub_model_id}: is the base pipeline's; an adapter has a page of its own.")
    if args.optimizer == "muon":
        parser.error("--optimizer muon: is for whole matrices; adapters are trained by adamw.")
    args.lora_alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    for name in ("rank", "lora_alpha"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    if not 0 <= args.lora_dropout < 1:
        parser.error(f"--lora_dropout {args.lora_dropout}: expected a number from 0 to below 1.")
    try:
        re.compile(args.lora_targets)
    except re.error as error:
        parser.error(f"--lora_targets {args.lora_targets}: is no regular expression ({error}).")


def load_base(path_or_repo: str) -> tuple[Path, EndoraPipeline]:
    """A pipeline, and the folder on this machine that it is in.

    Raises:
        ValueError: there is none.
    """
    try:
        folder = path_or_repo if Path(path_or_repo).is_dir() else EndoraPipeline.download(path_or_repo)
        pipe = EndoraPipeline.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f'--pretrained_model "{path_or_repo}" does not load ({reason}): expected a folder or Hub id of an '
            "EndoraPipeline."
        ) from error
    return Path(folder), pipe


def follow_base(args: argparse.Namespace, pipe: EndoraPipeline) -> None:
    """Fills in the flags that the base pipeline answers.

    Raises:
        ValueError: a flag says otherwise, or the base is none that can be trained.
    """
    config = pipe.transformer.config
    if not isinstance(config.sample_size, int):
        raise ValueError(
            f"--pretrained_model {args.pretrained_model}: its frames are not square: expected square ones."
        )
    predicts_flow = pipe.config.prediction_type == "flow_prediction"
    answers = {
        "resolution": config.sample_size * pipe.vae_scale_factor,
        "num_frames": config.num_frames,
        "class_conditional": config.num_classes is not None,
        "class_dropout_prob": config.class_dropout_prob,
        "prediction_type": "flow" if predicts_flow else pipe.config.prediction_type,
        "zero_terminal_snr": bool(pipe.scheduler.config.get("rescale_betas_zero_snr")),
    }
    for name in OF_THE_BASE:
        given = getattr(args, name)
        if given is not None and given != answers[name]:
            raise ValueError(
                f"--{name} {given}: the base {args.pretrained_model} has {answers[name]}, which an adapter keeps; "
                "leave the flag out."
            )
        setattr(args, name, answers[name])
    if args.zero_terminal_snr and args.loss_weighting != "none":
        raise ValueError(
            f"--loss_weighting {args.loss_weighting}: gives the last timestep weight 0, and the base has zero "
            "terminal SNR; expected none."
        )


def training_scheduler(args: argparse.Namespace, pipe: EndoraPipeline) -> Any:
    """The scheduler of the base's own training, whichever one it samples with. After `follow_base`."""
    scheduler = make_scheduler(args.prediction_type, args.zero_terminal_snr)
    of_both = scheduler.config.keys() & pipe.scheduler.config.keys() & set(NOISE_SCHEDULE)
    return type(scheduler).from_config(scheduler.config, **{name: pipe.scheduler.config[name] for name in of_both})


def put_adapter_into(transformer: EndoraTransformer3DModel, args: argparse.Namespace) -> None:
    """Freezes a transformer and puts a new adapter into it, whose parameters are those that require gradients.

    Raises:
        ValueError: no module has such a name, or one that has is none that PEFT adapts.
    """
    from peft import LoraConfig

    names = re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", args.lora_targets)
    targets = re.split(r"\s*,\s*", args.lora_targets) if names else args.lora_targets
    transformer.requires_grad_(False)
    try:
        transformer.add_adapter(
            LoraConfig(
                r=args.rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=targets
            ),
            adapter_name=NAME_OF_ADAPTER,
        )
    except ValueError as error:
        raise ValueError(f"--lora_targets {args.lora_targets}: {' '.join(str(error).split())}") from error


def save_adapter(folder: str | Path, transformer: EndoraTransformer3DModel, weights: dict[str, torch.Tensor]) -> None:
    """Writes an adapter, with its rank, alpha and targets, as `EndoraPipeline.load_lora_weights` reads it.

    Args:
        transformer: of `put_adapter_into`, for the adapter's settings.
        weights: as its `state_dict` names them.
    """
    from peft import get_peft_model_state_dict

    settings = transformer.peft_config[NAME_OF_ADAPTER].to_dict()
    settings["lora_dropout"] = 0.0  # of the training: what diffusers loads would drop out in sampling too
    EndoraPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, weights, adapter_name=NAME_OF_ADAPTER),
        # the order of a set changes from run to run
        transformer_lora_adapter_metadata={
            name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()
        },
    )
