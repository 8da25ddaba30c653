"""What the trainings of clips have in common: trackers, checkpoints, and going on from one.

Those of parts (autoencoder, teacher, distillation) are simpler: `resumable_steps`.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from accelerate import Accelerator

from ..data.clips import ClipDataset
from .checkpoints import checkpoint_step, save_checkpoint, set_aside_after
from .processes import by_main_process

RUN_FACTS = "run.json"  # in a checkpoint
T = TypeVar("T")


class BadStep(Exception):
    """A step whose loss or gradient is not finite, or whose noise error is beyond all reason."""


class TrainingRun:
    """The part of a training that does not depend on what is trained.

    Args:
        args: the flags.
        accelerator: made from them.
        dataset: the corpus.
        max_train_steps: optimiser steps.
    """

    facts_of_earlier_versions: ClassVar[dict[str, Any]] = {}  # what was the case before `facts` had it

    def __init__(
        self, args: argparse.Namespace, accelerator: Accelerator, dataset: ClipDataset, max_train_steps: int
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.dataset = dataset
        self.max_train_steps = max_train_steps
        self.output_dir = Path(args.output_dir)
        self.step = 0

    def facts(self) -> dict[str, Any]:
        """What has to be the same for a resumed training to be the training that was stopped."""
        raise NotImplementedError

    def write_checkpoint(self, folder: Path) -> None:
        """Writes the state of the calling process, and `run.json`, into a checkpoint."""
        raise NotImplementedError

    def digest_of_corpus(self) -> str:
        """Of the lengths of its videos, for `facts`."""
        return hashlib.sha256(json.dumps(self.dataset.num_frames_of_videos).encode()).hexdigest()[:16]

    def save(self) -> Path | None:
        """Writes a checkpoint; None, and a message, where the disk does not take it: the training goes on."""
        limit = self.args.checkpoints_total_limit
        try:
            return save_checkpoint(self.output_dir, self.step, self.write_checkpoint, self.accelerator, limit)
        except OSError as error:
            self.accelerator.print(f"step {self.step}: {error}")
            return None

    def state_of_same_run(self, checkpoint: Path) -> dict[str, Any]:
        """What a checkpoint's `run.json` says.

        Raises:
            ValueError: it is of another training, or beyond the end of this one; what differs is named.
        """
        # 1. Is it of this script?
        try:
            state = json.loads((checkpoint / RUN_FACTS).read_text())
            earlier = dict(state["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{checkpoint} has no {RUN_FACTS} with the facts of a training: expected a checkpoint of this script."
            ) from None

        # 2. Of this training?
        facts, earlier = json.loads(json.dumps(self.facts())), {**self.facts_of_earlier_versions, **earlier}
        if differing := [name for name in facts if name in earlier and earlier[name] != facts[name]]:
            changes = ", ".join(f"{name} was {earlier[name]} and is {facts[name]}" for name in differing)
            raise ValueError(f"{checkpoint} is of another training: {changes}.")
        if unknown := sorted(facts.keys() - earlier.keys()):
            self.accelerator.print(f"{checkpoint} does not say what these were, taken to be as now: {unknown}")
        if (step := checkpoint_step(checkpoint)) > self.max_train_steps:
            raise ValueError(
                f"{checkpoint} is of step {step}, beyond the {self.max_train_steps} steps of the training; ask for "
                "more steps, or go on from an earlier checkpoint."
            )
        return state

    def set_aside_later_ones(self, checkpoint: Path) -> None:
        """Renames the checkpoints after one that the training goes on from; in the main process."""
        if checkpoint.parent.resolve() == self.output_dir.resolve():
            for path in set_aside_after(checkpoint):
                self.accelerator.print(f"Set aside, as the training goes on from an earlier one: {path}")

    def track(self, values: dict[str, float]) -> None:
        """Tells the trackers."""
        if self.args.report_to != "none":
            self.unless_the_disk_is_full("trackers", lambda: self.accelerator.log(values, step=self.step))

    def unless_the_disk_is_full(self, what: str, write: Callable[[], T]) -> T | None:
        """What the main process' `write` returns; where it cannot write, None and a message: the training goes on."""
        try:
            return by_main_process(self.accelerator, write)
        except OSError as error:
            self.accelerator.print(f"step {self.step}: not written: {what}: {error}")
            return None
