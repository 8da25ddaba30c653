"""The flags of `examples/train_lvdm.py`, and its presets."""

import argparse
from typing import Any

from diffusers.optimization import SchedulerType

from ...training.arguments import (
    SWITCH,
    add_data,
    add_reports,
    add_run,
    check_data,
    check_destinations,
    check_not_negative,
    check_positive,
    check_reports,
    empty_parser,
    read_flags,
)

STAGES = ("autoencoder", "denoiser", "prediction", "interpolation")

# What flags that are not given are. "paper": the official configs for endoscopy
# (https://github.com/CUHK-AIM-Group/Endora, Other-Methods/LVDM/configs), which state epochs; the steps are those that
# the adversarial loss starts at and as many again, and for the denoiser Endora's. "demo": two CPU cores, half an hour.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "resolution": 128,
        "autoencoder_channels": 32,
        "autoencoder_steps": 100_000,
        "autoencoder_batch_size": 1,
        "autoencoder_learning_rate": 3.6e-5,
        "kl_weight": 0.0,
        "disc_weight": 0.5,
        "disc_start": 50_001,
        "model_channels": 256,
        "layers_per_stage": 3,
        "max_train_steps": 150_000,
        "train_batch_size": 3,
        "learning_rate": 6e-5,
        "adam_weight_decay": 0.01,
        "gradient_accumulation_steps": 2,
        "optimizer": "adamw",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_grad_norm": float("inf"),
        "ema_decay": 0.9999,
        "num_cached_clips": 0,
        "validation_steps": 10_000,
        "checkpointing_steps": 10_000,
    },
    "demo": {
        "resolution": 64,
        "autoencoder_channels": 8,
        "autoencoder_steps": 600,
        "autoencoder_batch_size": 2,
        "autoencoder_learning_rate": 3e-3,
        "kl_weight": 1e-3,
        "disc_weight": 0.0,
        "disc_start": 0,
        "model_channels": 64,
        "layers_per_stage": 1,
        "max_train_steps": 2000,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "adam_weight_decay": 0.0,
        "gradient_accumulation_steps": 1,
        "optimizer": "muon",
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "max_grad_norm": 1.0,
        "ema_decay": 0.995,
        "num_cached_clips": 2000,
        "validation_steps": 500,
        "checkpointing_steps": 250,
    },
}
LATENT_STRIDE = 4
LONG_VIDEO_LEARNING_RATE = 8e-5  # of prediction and interpolation in the official configs (configs/lvdm_long)

# What of the networks' configurations has no flag
AUTOENCODERS: dict[str, dict[str, Any]] = {"paper": {"norm_num_groups": 32}, "demo": {"norm_num_groups": 8}}
UNETS: dict[str, dict[str, Any]] = {
    "paper": {"channel_multipliers": (1, 2, 3, 4), "attention_stages": (1, 2, 3), "norm_num_groups": 32},
    "demo": {"channel_multipliers": (1, 2, 2), "attention_stages": (1, 2), "norm_num_groups": 8},
}


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with all flags of the script."""
    parser = empty_parser(description)
    group = parser.add_argument_group("stages and networks")
    group.add_argument(
        "--stage", choices=STAGES, help="if not given the autoencoder, then the denoiser on its latents"
    )
    group.add_argument("--preset", choices=list(PRESETS), default="paper", help="of sizes, steps and rates not given")
    group.add_argument("--pretrained_autoencoder", help="folder that the denoiser is trained on the latents of")
    group.add_argument("--pretrained_model", help="pipeline folder or Hub id that is to make long videos")
    group.add_argument("--autoencoder_channels", type=int, help="before the first block; each block doubles them")
    group.add_argument("--model_channels", type=int, help="of the UNet's first stage")
    group.add_argument("--layers_per_stage", type=int, help="residual blocks of the UNet on the way down")
    group.add_argument(
        "--latent_stride",
        type=int,
        help="latent frames from one that --stage prediction makes to the next, if not given "
        f"{LATENT_STRIDE}; --stage interpolation fills in as many as the prediction was trained with",
    )
    group.add_argument("--gradient_checkpointing", action="store_true")

    add_data(parser.add_argument_group("data"), is_endora=False)
    _add_autoencoder(parser.add_argument_group("autoencoder"))
    _add_denoiser(parser.add_argument_group("denoiser"))
    _add_optimisation(parser.add_argument_group("optimisation of all stages"))
    add_run(parser.add_argument_group("run"), is_endora=False)
    reports = parser.add_argument_group("validation and reports")
    add_reports(reports, is_endora=False)
    reports.add_argument("--validation_inference_steps", type=int, default=50)
    reports.add_argument("--validation_loss_clips", type=int, default=64, help="measured at each validation")
    # the preset's, the pretrained model's
    parser.set_defaults(resolution=None, num_frames=None, validation_steps=None, checkpointing_steps=None)
    parser.set_defaults(num_still_images=0)
    return parser


def _add_autoencoder(group: Any) -> None:
    group.add_argument("--autoencoder_steps", type=int, help="of --stage autoencoder")
    group.add_argument("--autoencoder_batch_size", type=int, help="clips per device")
    group.add_argument("--autoencoder_learning_rate", type=float)
    group.add_argument("--lpips_weights", help="safetensors file of the perceptual distance; without, there is none")
    group.add_argument("--kl_weight", type=float, help="of a clip's divergence, beside the error summed over a frame")
    group.add_argument("--disc_weight", type=float, help="of the adversarial loss; 0: no discriminator")
    group.add_argument("--disc_start", type=int, help="step that the adversarial loss starts at")
    group.add_argument(
        "--disc_temporal_kernel_size",
        type=int,
        default=1,
        help="frames that each of the discriminator's convolutions sees; 1, as officially: it judges frames",
    )


def _add_denoiser(group: Any) -> None:
    group.add_argument("--max_train_steps", type=int, help="of the UNet")
    group.add_argument("--train_batch_size", type=int, help="clips per device")
    group.add_argument("--learning_rate", type=float)
    group.add_argument("--adam_weight_decay", type=float)
    group.add_argument("--ema_decay", type=float)
    group.add_argument("--ema_warmup", action=SWITCH, default=True, help="soon forgets initial weights")
    group.add_argument("--class_dropout_prob", type=float, default=0.1, help="labels dropped, for guidance")
    group.add_argument(
        "--num_cached_clips",
        type=int,
        help="clips encoded once, which all steps then draw from; 0: each step encodes its own",
    )
    group.add_argument(
        "--latent_statistics",
        choices=["measured", "official"],
        default="measured",
        help="scale and shift of latents; official: the configs' constants, for the official autoencoder's latents",
    )


def _add_optimisation(group: Any) -> None:
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--gradient_accumulation_steps", type=int)
    group.add_argument("--mixed_precision", choices=["no", "bf16"])
    group.add_argument("--allow_tf32", action=SWITCH, default=True)
    group.add_argument("--optimizer", choices=["adamw", "muon"], help="muon: for kernels and matrices, at Adam's rate")
    group.add_argument("--lr_scheduler", choices=[kind.value for kind in SchedulerType])
    group.add_argument("--lr_warmup_steps", type=int)
    group.add_argument("--max_grad_norm", type=float, help="inf: gradients are not clipped")


def parse_lvdm_arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command line and its `--config`; exits with one line on stderr and code 2 if they are wrong."""
    args = read_flags(parser, argv)
    _check_stage(parser, args)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            is_for_long_videos = name == "learning_rate" and args.stage in ("prediction", "interpolation")
            follows_model = name == "resolution" and args.pretrained_model is not None
            value = LONG_VIDEO_LEARNING_RATE if is_for_long_videos and args.preset == "paper" else value
            setattr(args, name, None if follows_model else value)
    if args.num_frames is None and args.pretrained_model is None:
        args.num_frames = 16
    check_data(parser, args)
    if args.output_dir is None:
        parser.error("--output_dir is required.")
    check_destinations(parser, args)
    check_reports(parser, args)

    positive = ["resolution", "num_frames", "window", "frame_interval", "autoencoder_channels", "model_channels"]
    positive += ["layers_per_stage", "latent_stride", "autoencoder_steps", "autoencoder_batch_size"]
    positive += ["autoencoder_learning_rate", "disc_temporal_kernel_size", "max_train_steps", "train_batch_size"]
    positive += ["learning_rate", "gradient_accumulation_steps", "max_grad_norm", "checkpointing_steps"]
    positive += ["checkpoints_total_limit", "validation_steps", "num_validation_clips", "validation_inference_steps"]
    positive += ["validation_loss_clips", "validation_fvd", "validation_fvd_steps", "fps", "logging_steps"]
    check_positive(parser, args, positive, without_limit=("max_grad_norm",))
    not_negative = ["dataloader_num_workers", "cache_frames_gb", "kl_weight", "disc_weight", "disc_start"]
    not_negative += ["adam_weight_decay", "num_cached_clips", "lr_warmup_steps", "seed"]
    check_not_negative(parser, args, not_negative)
    for name in ("ema_decay", "class_dropout_prob"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a number from 0 to 1.")
    if args.disc_temporal_kernel_size % 2 == 0:
        parser.error(f"--disc_temporal_kernel_size {args.disc_temporal_kernel_size}: expected an odd number.")
    return args


def _check_stage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses flags of other stages than the one that is trained."""
    stage = args.stage
    needed = {
        "denoiser": "pretrained_autoencoder",
        "prediction": "pretrained_model",
        "interpolation": "pretrained_model",
    }
    if stage in needed and getattr(args, needed[stage]) is None:
        parser.error(f"--stage {stage} needs --{needed[stage]}.")
    of_stages = {
        "pretrained_autoencoder": ("denoiser",),
        "pretrained_model": ("prediction", "interpolation"),
        "autoencoder_steps": (None, "autoencoder"),
        "max_train_steps": (None, "denoiser", "prediction", "interpolation"),
        "validation_fvd": (None, "denoiser"),
    }
    for name, stages in of_stages.items():
        if getattr(args, name) is not None and stage not in stages:
            named = " or ".join(f"--stage {of}" for of in stages if of is not None)
            given = f"--stage {stage}" if stage else "the first two stages together"
            parser.error(f"--{name} is for {named}, not for {given}.")
    if stage == "autoencoder" and args.push_to_hub:
        parser.error("--push_to_hub is for stages that end with a pipeline, not for --stage autoencoder.")
    if stage is None and args.resume_from_checkpoint not in (None, "latest"):
        parser.error(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: expected latest, or --stage, whose checkpoint "
            "it is."
        )
