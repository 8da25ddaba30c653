"""The flags that `train_semi_supervised.py` and `benchmark_augmentation.py` share."""

import argparse
from dataclasses import fields

from .trainer import TrainingSettings
from .videos import ClipShape

SHAPE, SETTINGS = ClipShape(), TrainingSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them; defaults are those of `ClipShape` and `TrainingSettings`."""
    data = parser.add_argument_group("videos")
    data.add_argument("--train_data", required=True, help="folder of classes, dataset, or with --train_labels videos")
    data.add_argument("--train_labels", help="file of lines <video>,<label>")
    data.add_argument("--train_split", help="of a dataset; train unless given")
    data.add_argument("--test_data", required=True, help="as --train_data; chooses nothing")
    data.add_argument("--test_labels", help="as --train_labels")
    data.add_argument("--test_split", help="of a dataset; test unless given")
    data.add_argument("--positive_class", help="all others are negative; of two classes the second unless given")
    data.add_argument("--num_frames", type=int, default=SHAPE.num_frames)
    data.add_argument("--resolution", type=int, default=SHAPE.resolution, help="side of the square frames, in pixels")
    data.add_argument("--frame_interval", type=int, help="instead of a clip over --window frames")
    data.add_argument("--window", type=int, default=SHAPE.window)
    data.add_argument("--clips_per_video", type=int, default=4, help="at most, to judge a video by")
    data.add_argument("--cache_gb", type=float, default=1.0, help="memory for decoded videos, per source of clips")

    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--num_labelled", type=int, default=40, help="the paper's n; half of each class")
    protocol.add_argument("--num_unlabelled", type=int, default=200, help="the paper's m")
    protocol.add_argument("--first_of_class", action="store_true", help="label the first of each class, as officially")
    protocol.add_argument("--validation_fraction", type=float, default=0.2, help="of the training videos")
    protocol.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])

    training = parser.add_argument_group("training")
    training.add_argument(
        "--classifier", help="folder or id of a video or image classifier; unless given a small one from nothing"
    )
    training.add_argument("--max_train_steps", type=int, default=SETTINGS.max_train_steps)
    training.add_argument("--train_batch_size", type=int, default=SETTINGS.train_batch_size, help="labelled clips")
    training.add_argument("--unlabelled_ratio", type=int, default=SETTINGS.unlabelled_ratio, help="FixMatch's mu")
    training.add_argument("--unlabelled_weight", type=float, default=SETTINGS.unlabelled_weight, help="lambda_u")
    training.add_argument("--confidence_threshold", type=float, default=SETTINGS.confidence_threshold, help="tau")
    training.add_argument("--distribution_alignment", action="store_true", help="ReMixMatch's")
    training.add_argument("--learning_rate", type=float, default=SETTINGS.learning_rate)
    training.add_argument("--weight_decay", type=float, default=SETTINGS.weight_decay)
    training.add_argument("--ema_decay", type=float, default=SETTINGS.ema_decay, help="0: the last weights")
    training.add_argument("--validation_steps", type=int, default=SETTINGS.validation_steps)
    training.add_argument("--checkpointing_steps", type=int, default=SETTINGS.checkpointing_steps)
    training.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default=SETTINGS.mixed_precision)
    training.add_argument("--num_workers", type=int, default=SETTINGS.num_workers, help="that read clips")
    parser.add_argument("--output_dir", required=True)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with one sentence where a number is outside its range."""
    positive = "num_frames resolution window clips_per_video num_labelled num_unlabelled max_train_steps"
    positive += " train_batch_size unlabelled_ratio validation_steps checkpointing_steps"
    for name in positive.split():
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    for name in ("unlabelled_weight", "learning_rate", "weight_decay", "cache_gb"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name} {getattr(args, name)}: expected a number from 0 up.")
    for name in ("confidence_threshold", "ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a number in [0, 1].")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: expected different integers from 0 up.")


def settings_from(args: argparse.Namespace) -> TrainingSettings:
    """The flags that are of the training."""
    return TrainingSettings(**{field.name: getattr(args, field.name) for field in fields(TrainingSettings)})
