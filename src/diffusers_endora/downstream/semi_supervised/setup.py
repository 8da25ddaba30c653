"""From the flags of the scripts to a table: videos, unlabelled clips, leaks, runs."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn

from ... import bundled_model
from ...data.clips import ClipDataset
from ...data.contact_sheet import save_contact_sheet
from ...data.video_io import VideoError
from .arguments import settings_from
from .classifier import SmallVideoClassifier, load_classifier
from .experiment import REST, Experiment, Method, Protocol, run_all
from .leaks import fingerprints, refuse_leaks
from .scores import check_both_classes
from .splits import draw_splits
from .videos import Clips, ClipShape, LabelledVideos, open_labelled, open_unlabelled
from .views import strong_view, weak_view

BUNDLED = "bundled"  # in place of a pipeline: the one that comes with the package


def run_script(name: str, args: argparse.Namespace, methods: list[Method]) -> None:
    """Runs the methods and prints the table; a mistake is one sentence on stderr and exit code 2."""
    try:
        run_methods(args, methods)
    except (ValueError, OSError, SafetensorError, VideoError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[0].startswith("Caught "):  # by a process that reads clips: its traceback ends with the sentence
            lines = lines[-1:]
        print(f"{name}: error: {' '.join(' '.join(lines).split())}", file=sys.stderr)
        sys.exit(2)
    print((Path(args.output_dir) / "table.md").read_text(encoding="utf-8"))


def run_methods(args: argparse.Namespace, methods: list[Method]) -> dict[str, Any]:
    """Runs the methods as the flags say, after a look for test videos among what is trained on.

    Returns:
        What `summarise` makes.

    Raises:
        ValueError: videos, labels, clips or classifier are not as they have to be, or there is a leak.
        OSError: the Hub does not have something, or the disk does not take it.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    shape = ClipShape(args.num_frames, args.resolution, args.frame_interval, args.window)
    protocol = Protocol(
        args.num_labelled, args.num_unlabelled, args.validation_fraction, args.first_of_class, args.seeds
    )
    make_classifier = classifier_maker(args.classifier, args.num_frames)

    # 1. Videos
    shared = {"clips_per_video": args.clips_per_video, "cache_gb": args.cache_gb}
    train = open_labelled(args.train_data, shape, args.positive_class, args.train_labels, args.train_split, **shared)
    test_split = args.test_split or (
        None if Path(args.test_data).is_dir() and not is_dataset(args.test_data) else "test"
    )
    test = open_labelled(args.test_data, shape, train.positive_class, args.test_labels, test_split, **shared)
    if test.class_names != train.class_names:
        raise ValueError(
            f"{args.test_data}: has the classes {', '.join(test.class_names)}; {args.train_data} has "
            f"{', '.join(train.class_names)}."
        )
    for name, videos in (("training", train), ("test", test)):
        print(described(name, videos))
    check_both_classes(test.labels, "the test set")
    if args.first_of_class and train.num_left_out:
        raise ValueError(
            f"{args.train_data}: {train.num_left_out} videos are left out, and --first_of_class would take others in "
            "their place; mend or remove them, or choose shorter clips."
        )
    splits = [
        draw_splits(train.labels, args.num_labelled, args.validation_fraction, seed, args.first_of_class)
        for seed in args.seeds
    ]

    # 2. Unlabelled clips, each source once
    opened: dict[str, ClipDataset] = {}
    for method in methods:
        source = method.source
        if source is not None and source not in (REST, *opened):
            samples_dir = output_dir / "generated" / method.folder_name
            where = bundled_model() if source == BUNDLED else source
            opened[source] = open_unlabelled(where, shape, args.num_unlabelled, samples_dir, args.cache_gb)
            print(
                f"unlabelled: {source}, {opened[source].num_videos} clips, {len(opened[source].too_short)} too short"
            )

    available = {source: dataset.num_videos for source, dataset in opened.items()}
    available[REST] = min(len(split.rest) for split in splits)
    for source in (method.source for method in methods if method.source is not None):
        if available[source] < args.num_unlabelled:
            raise ValueError(
                f"{source}: has {available[source]} unlabelled clips; --num_unlabelled {args.num_unlabelled} asks for "
                "more."
            )

    # 3. Leaks
    used = {video for split in splits for video in (*split.labelled, *split.validation)}
    if any(method.source == REST for method in methods):
        used |= {video for split in splits for video in split.rest}
    tested = fingerprints(test.fixed_clips, range(len(test)))
    refuse_leaks(fingerprints(train.random_clips, sorted(used)), tested, str(args.train_data))
    for source, dataset in opened.items():
        refuse_leaks(fingerprints(dataset, range(dataset.num_videos)), tested, source)

    # 4. Runs
    shown = next(iter(opened.values()), train.random_clips)
    show_views(Clips(shown, range(shown.num_videos)), output_dir / "views.png")
    named = ("classifier", "train_data", "train_labels", "train_split", "test_data", "test_labels", "clips_per_video")
    description = {
        **asdict(shape),
        **{name: getattr(args, name) for name in named},
        "test_split": test_split,
        "positive_class": train.positive_class,
        "train_videos": train.digest(),
        "test_videos": test.digest(),
    }
    experiment = Experiment(train, test, opened, protocol, settings_from(args), make_classifier, description)
    return run_all(experiment, methods, output_dir)


def classifier_maker(name: str | None, num_frames: int) -> Callable[[], nn.Module]:
    """What makes a new classifier: the one that was named, as often as asked, or a small one."""
    if name is None:
        return SmallVideoClassifier
    load_classifier(name, num_frames)  # what does not load is found before anything is read
    return lambda: load_classifier(name, num_frames)


def is_dataset(source: str) -> bool:
    """Whether a folder holds shards, of which there are splits."""
    from ...data.clip_rows import holds_shards

    return holds_shards(Path(source))


def described(name: str, videos: LabelledVideos) -> str:
    """How many there are, and what was left out."""
    dataset = videos.random_clips
    return (
        f"{name}: {len(videos)} videos, {int(videos.labels.sum())} {videos.positive_class!r} and "
        f"{int((1 - videos.labels).sum())} others ({dataset.num_broken} broken, {len(dataset.too_short)} too short, "
        f"{dataset.num_unlabelled} without a label)"
    )


def show_views(clips: Clips, path: Path) -> None:
    """A contact sheet of one clip: as it is, two weak views, four strong ones."""
    clip = clips.read(0, 0)
    makers = [weak_view] * 2 + [strong_view] * 4
    views = [make(clip, np.random.default_rng(number)) for number, make in enumerate(makers)]
    save_contact_sheet(path, np.stack([clip, *views]), max_frames=8)
