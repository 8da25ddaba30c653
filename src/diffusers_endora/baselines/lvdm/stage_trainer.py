"""The loop that every stage of LVDM is trained by: exact after a kill, with checkpoints, a log and validations."""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator, DistributedType
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ...data.clips import ClipDataset
from ...training.checkpoints import checkpoint_step, remove_leftovers
from ...training.processes import by_main_process
from ...training.training_clips import batches_from
from ...training.training_log import TrainingLog
from ...training.training_run import RUN_FACTS, BadStep, TrainingRun
from .latent_clips import LatentClips

LOSS_WINDOW = 200  # optimiser steps that the reported losses are averaged over
PLAIN_PROCESSES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class StageLog(TrainingLog):
    """`TrainingLog` for losses that a stage names: `training_log.jsonl`, a line for each step."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, LOSS_WINDOW, num_timesteps=1)

    def add_step(self, step: int, values: dict[str, float], learning_rate: float, writes: bool) -> None:
        """A step's values; one that is not finite is null in the file and not in the means.

        Args:
            step: counted from 1.
            values: the same names at each step.
            learning_rate: that the step was taken with.
            writes: in the main process.
        """
        is_bad = not all(math.isfinite(value) for value in values.values())
        self.num_bad_steps += is_bad
        if not is_bad:
            self.window.append(values)
        if writes:
            kept = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._write([{"step": step, **kept, "lr": learning_rate}])


class StageTrainer(TrainingRun):
    """Takes the steps of a stage: clips, gradients, updates, log, validations, checkpoints.

    A stage is a subclass, which says what a step's losses are (`backward`), what is measured and shown on the way
    (`measure`, `show`), what it keeps beside models and optimisers (`write_state`, `read_state`), and what has to be
    the same for a resumed training to be the one that was stopped (`facts`).

    Every random number is a function of the seed and of the clip's place in the training or of the step, so that a
    training that is killed goes on as if it had not been.

    Args:
        args: the flags.
        accelerator: made from them.
        dataset: the corpus, for its facts and for the names of clips.
        clips: what is trained on, as many as the training takes.
        clips_per_batch: of one process.
        max_train_steps: optimiser steps.
        models: what is trained, by name.

    Raises:
        ValueError: the processes or their precision are none that the stages are made for.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        dataset: ClipDataset,
        clips: LatentClips,
        clips_per_batch: int,
        max_train_steps: int,
        models: dict[str, nn.Module],
    ) -> None:
        if accelerator.distributed_type not in PLAIN_PROCESSES:
            raise ValueError(
                f"{accelerator.distributed_type.value}: expected plain processes, on CPUs or GPUs, as LVDM's networks "
                "fit one device."
            )
        if accelerator.mixed_precision == "fp16":
            raise ValueError('mixed_precision fp16: expected "no" or "bf16", which need no scaling of losses.')
        super().__init__(args, accelerator, dataset, max_train_steps)
        self.clips = clips
        self.clips_per_batch = clips_per_batch
        self.clips_per_step = clips_per_batch * accelerator.num_processes * args.gradient_accumulation_steps
        self.seconds = 0.0  # that the steps took, validations and checkpoints included
        self.models = {name: accelerator.prepare(model) for name, model in models.items()}
        self.optimizers: dict[str, Any] = {}
        self.lr_schedulers = []
        for name, model in self.models.items():
            optimizer = self.make_optimizer(name, accelerator.unwrap_model(model))
            self.optimizers[name] = accelerator.prepare(optimizer)
            schedule = get_scheduler(
                args.lr_scheduler,
                optimizer,
                num_warmup_steps=args.lr_warmup_steps,
                num_training_steps=max_train_steps,
            )
            accelerator.register_for_checkpointing(schedule)  # not prepared: its steps are not per process
            self.lr_schedulers.append(schedule)
        self.log = StageLog(self.output_dir / "training_log.jsonl")

    # --- what a stage says -------------------------------------------------------------------------------------------

    def make_optimizer(self, name: str, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of a model, whose parameters are on their device."""
        raise NotImplementedError

    def backward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds a batch's gradients to those of the step under way; returns the losses, scalars to be logged."""
        raise NotImplementedError

    def after_update(self) -> None:
        """What follows an update of the weights, such as their moving average."""

    def measure(self) -> dict[str, float]:
        """What a validation measures; all processes call it."""
        raise NotImplementedError

    def show(self, folder: Path) -> dict[str, float]:
        """Writes what a validation shows into `folder`, in the main process; returns numbers for the trackers."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What has to be the same for a resumed training to be the training that was stopped."""
        args = self.args
        names = ["seed", "resolution", "num_frames", "frame_interval", "window", "horizontal_flip", "antialias"]
        names += ["lr_scheduler", "lr_warmup_steps", "max_grad_norm"]
        facts = {name: getattr(args, name) for name in names}
        facts["clips_per_step"] = self.clips_per_step
        facts["frames_of_videos"] = self.digest_of_corpus()
        facts["learning_rates"] = [schedule.base_lrs[0] for schedule in self.lr_schedulers]
        if args.lr_scheduler not in ("constant", "constant_with_warmup"):
            facts["max_train_steps"] = self.max_train_steps  # the rate depends on it
        return facts

    def write_state(self, folder: Path) -> None:
        """Writes into a checkpoint what models, optimisers and rates are not; in the main process."""

    def read_state(self, folder: Path) -> None:
        """Reads what `write_state` wrote; in every process."""

    # --- the loop ----------------------------------------------------------------------------------------------------

    def unwrapped(self, name: str) -> Any:
        """A model as it was before Accelerate wrapped it."""
        return self.accelerator.unwrap_model(self.models[name], keep_torch_compile=False)

    def fit(self) -> None:
        """Trains to the last step.

        Raises:
            BadStep: at a loss or gradient that is not finite; a checkpoint without that step has been written.
        """
        args, accelerator = self.args, self.accelerator
        progress = tqdm(
            total=self.max_train_steps, initial=self.step, desc="train", disable=not accelerator.is_local_main_process
        )
        if accelerator.is_main_process:
            remove_leftovers(self.output_dir)
        batches = self._batches()
        for model in self.models.values():
            model.train()
        began, before = time.perf_counter(), self.seconds
        while self.step < self.max_train_steps:
            sums: dict[str, torch.Tensor | float] = defaultdict(float)
            for micro_batch in range(args.gradient_accumulation_steps):
                batch = next(batches)
                # Dropout, where a model has any, is a function of seed, step and process
                entropy = (args.seed, self.step, micro_batch, accelerator.process_index, 6)
                torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
                with accelerator.accumulate(*self.models.values()):
                    for name, loss in self.backward(batch).items():
                        sums[name] += loss.detach().float() / args.gradient_accumulation_steps
            self._update(sums)
            progress.update()
            self.seconds = before + time.perf_counter() - began
            self._report(progress)
        self.seconds = before + time.perf_counter() - began
        progress.close()

    def _update(self, losses: dict[str, Any]) -> None:
        """The step of the optimisers, unless something is not finite; the step is counted and logged."""
        accelerator = self.accelerator
        means = accelerator.reduce(torch.stack(list(losses.values())), reduction="mean").tolist()
        values = dict(zip(losses, means, strict=True))
        for name, model in self.models.items():
            norm = nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            values["grad_norm" if len(self.models) == 1 else f"grad_norm_{name}"] = norm.item()
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        for name, optimizer in self.optimizers.items():
            if not bad:
                optimizer.step()
            self.models[name].zero_grad()
        self.step += 1
        self.log.add_step(self.step, values, self.lr_schedulers[0].get_last_lr()[0], accelerator.is_main_process)
        for schedule in self.lr_schedulers:
            schedule.step()
        if bad:
            first = (self.step - 1) * self.clips_per_step
            names = [self.clips.describe(place) for place in range(first, first + min(self.clips_per_step, 8))]
            saved = self.save()
            where = "no checkpoint could be written" if saved is None else f"the state without that step is in {saved}"
            raise BadStep(
                f"step {self.step}: {', '.join(bad)} not finite. Its clips: {'; '.join(names)}"
                f"{' ...' if self.clips_per_step > len(names) else ''}; {where}. "
                "--resume_from_checkpoint latest goes on after it; a lower learning rate may help."
            )
        self.after_update()

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of this process from the step that the training is at."""
        first, workers = self.step * self.clips_per_step, self.args.dataloader_num_workers
        return batches_from(self.clips, first, self.clips_per_batch, workers, self.accelerator)

    # --- reports -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def averages(
        self, clips: LatentClips, values_of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    ) -> dict[str, float]:
        """Means over clips, which the processes share out, of values by name, `(B,)` for a batch; all call it."""
        accelerator, size = self.accelerator, self.clips_per_batch
        own = range(len(clips))[accelerator.process_index :: accelerator.num_processes]
        counts = min(1, len(own))  # a process without a clip takes part with one that counts nothing
        sums: dict[str, torch.Tensor] = {}
        for first in range(0, max(1, len(own)), size):
            items = [clips[place] for place in own[first : first + size] or range(1)]
            batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
            values = values_of({name: value.to(accelerator.device) for name, value in batch.items()})
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + counts * value.double().sum()
        totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
        return {name: total / len(clips) for name, total in zip(sums, totals, strict=True)}

    def _report(self, progress: tqdm) -> None:
        """Logging, validation and checkpoint, where it is time for them."""
        args, step = self.args, self.step
        is_last = step == self.max_train_steps
        if step % args.logging_steps == 0 or is_last:
            means = self.log.means()
            progress.set_postfix({name: f"{value:.4f}" for name, value in means.items() if "grad" not in name})
            self.track(means | {"lr": self.lr_schedulers[0].get_last_lr()[0]})
        if step % args.validation_steps == 0 or is_last:
            measured = self.measure()
            shown = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
            if self.accelerator.is_main_process and shown:
                progress.write(f"step {step}: {shown}")
            folder = self.output_dir / "validation" / f"step-{step}"
            measured |= self.unless_the_disk_is_full("validation", lambda: self._shown(folder)) or {}
            self.track(measured)
        if step % args.checkpointing_steps == 0 or is_last:
            self.save()

    def _shown(self, folder: Path) -> dict[str, float]:
        folder.mkdir(parents=True, exist_ok=True)
        return self.show(folder)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def write_checkpoint(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            self.write_state(folder)
            state = {"facts": self.facts(), "log": self.log.state_dict(), "seconds": round(self.seconds, 3)}
            (folder / RUN_FACTS).write_text(json.dumps(state, indent=1))

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is of another training; what differs is named.
        """
        state = self.state_of_same_run(checkpoint)
        self.accelerator.load_state(str(checkpoint))
        self.accelerator.step = 0  # of the micro-batches of a step, which may be others than before
        self.read_state(checkpoint)
        self.step, self.seconds = checkpoint_step(checkpoint), state["seconds"]
        self.log.load_state_dict(state["log"], self.step, self.accelerator.is_main_process)
        by_main_process(self.accelerator, lambda: self.set_aside_later_ones(checkpoint))

    def results(self) -> dict[str, Any]:
        """What the training measured; all processes call it, after `fit`."""
        return {
            "steps": self.step,
            "averaged_steps": len(self.log.window),
            "skipped_steps": self.log.num_bad_steps,
            **self.log.means(),
            "seconds": round(self.seconds, 1),
            "num_videos": self.dataset.num_videos,
            "num_broken": self.dataset.num_broken,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
        }
