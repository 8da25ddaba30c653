"""The flags of train_stylegan_v.py and train_mostgan_v.py, which a yaml file can hold too."""

import argparse
import math
from typing import Any

from ..training.arguments import (
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
from .gan_recipes import GANRecipe

FRAMES_PER_CLIP = 3  # that the discriminator sees (StyleGAN-V, section 3.3, and its `configs/sampling/base.yaml`)
MINIBATCH_GROUP = 4  # clips that the discriminator compares, by its minibatch standard deviation

# Flags that are not given. "paper" is the official configuration: 25 million frames in steps of 64 clips of 3 frames,
# a half-width StyleGAN2 below 512 pixels. "demo" learns something on two CPU cores within half an
# hour, for which each GAN has its number of steps.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "resolution": 128,
        "train_batch_size": 64,
        "max_train_steps": 130_000,
        "channel_base": 16384,
        "channel_max": 512,
        "code_dim": 512,
        "augmentation": True,
        "initial_contrast": 1.0,
    },
    "demo": {
        "resolution": 64,
        "train_batch_size": 4,
        "channel_base": 1024,
        "channel_max": 64,
        "code_dim": 128,
        "r1_gamma": 2.0,  # by the official rule 0.2, with which few steps teach less
        "ema_rampup": 0.05,  # the average soon forgets the first weights
        "initial_contrast": 0.1,  # else it takes thousands of steps to recover from learning that frames have less
        "augmentation": False,  # so short a training hardly overfits, and learns less from what is augmented
    },
}


def parse_gan_arguments(recipe: GANRecipe, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a training of this GAN; exits with one line on stderr and code 2 where they are wrong.

    Flags that are not given have the value of the preset.
    """
    parser = empty_parser(f"Trains {recipe.name} on a folder of videos or a Hugging Face video dataset.")
    add_data(parser.add_argument_group("data"), is_endora=False)
    _add_model(parser.add_argument_group("model"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    add_run(parser.add_argument_group("run"), is_endora=False)
    add_reports(parser.add_argument_group("validation and reports"), is_endora=False)
    # What is not of these trainings, but what the loading of clips asks for
    parser.set_defaults(resolution=None, num_still_images=0, validation_loss_clips=1)
    args = read_flags(parser, argv)
    if args.preset == "demo" and args.max_train_steps is None:
        args.max_train_steps = recipe.demo_steps
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    check_data(parser, args)
    if args.output_dir is None:
        parser.error("--output_dir is required.")
    check_destinations(parser, args)
    positive = ["resolution", "num_frames", "train_batch_size", "max_train_steps", "gradient_accumulation_steps"]
    positive += ["checkpointing_steps", "validation_steps", "num_validation_clips", "logging_steps", "frame_interval"]
    positive += ["checkpoints_total_limit", "validation_fvd", "validation_fvd_steps", "fps", "channel_base"]
    positive += ["channel_max", "code_dim", "motion_z_distance", "learning_rate", "augmentation_clips", "ema_kimg"]
    check_positive(parser, args, [*positive, "ema_rampup", "initial_contrast"])
    check_not_negative(parser, args, ["dataloader_num_workers", "cache_frames_gb", "seed"])
    if args.resolution < 32 or args.resolution & (args.resolution - 1):
        parser.error(f"--resolution {args.resolution}: expected a power of 2 from 32.")
    if args.num_frames < FRAMES_PER_CLIP:
        parser.error(
            f"--num_frames {args.num_frames}: expected {FRAMES_PER_CLIP} or more, as the discriminator sees so many."
        )
    if args.train_batch_size > MINIBATCH_GROUP and args.train_batch_size % MINIBATCH_GROUP:
        parser.error(
            f"--train_batch_size {args.train_batch_size}: expected at most {MINIBATCH_GROUP} or a multiple of it, the "
            "groups of the minibatch standard deviation."
        )
    if args.r1_gamma is not None and not 0 <= args.r1_gamma < math.inf:
        parser.error(f"--r1_gamma {args.r1_gamma}: expected 0 or more.")
    if not -1 <= args.augmentation_target <= 1:
        parser.error(f"--augmentation_target {args.augmentation_target}: expected a number from -1 to 1.")
    check_reports(parser, args)
    return args


def _add_model(group: Any) -> None:
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="paper",
        help="values of flags that are not given: paper, the official configuration at 128 pixels; demo, small "
        "networks at 64 pixels, for a CPU",
    )
    group.add_argument("--channel_base", type=int, help="channels times resolution, instead of the preset's")
    group.add_argument("--channel_max", type=int, help="largest number of channels, instead of the preset's")
    group.add_argument("--code_dim", type=int, help="width of latents and codes, instead of the preset's")
    group.add_argument(
        "--initial_contrast",
        type=float,
        help="factor of what each resolution first adds to the frames, which officially vary more than real ones do "
        "(1); instead of the preset's",
    )
    group.add_argument(
        "--motion_z_distance", type=int, default=16, help="frames between the anchors of motion; more for slow motion"
    )


def _add_optimisation(group: Any) -> None:
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--train_batch_size", type=int, help="clips per device, instead of the preset's")
    group.add_argument("--max_train_steps", type=int, help="instead of the preset's")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--mixed_precision", choices=["no", "bf16"])
    group.add_argument("--allow_tf32", action=SWITCH, default=True)
    group.add_argument("--learning_rate", type=float, default=0.0025, help="of both networks, before lazy correction")
    group.add_argument(
        "--r1_gamma",
        type=float,
        help="weight of R1; if not given 2 for demo, else 10 for MoStGAN-V and 0.0002 x resolution^2 / "
        "clips of a step for StyleGAN-V",
    )
    group.add_argument(
        "--augmentation", action=SWITCH, help="adaptive discriminator augmentation, instead of the preset's"
    )
    group.add_argument("--augmentation_target", type=float, default=0.6, help="mean sign of the logits of real clips")
    group.add_argument(
        "--augmentation_clips", type=int, default=100_000, help="clips in which its probability gets from 0 to 1"
    )
    group.add_argument(
        "--ema_kimg",
        type=float,
        help="half-life of the generator's moving average, in thousands of clips; if not given 10/32 of the clips of "
        "a step",
    )
    group.add_argument(
        "--ema_rampup",
        type=float,
        help="limit of that half-life as a share of the frames seen so far; if not given none, for demo 0.05",
    )
