"""What a training reports of its steps, without waiting for the device at every step."""

import json
import logging
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

import torch

from .training_model import Losses

logger = logging.getLogger(__name__)

COLUMNS = ("loss", "mse", "vb", "prior", "grad_norm", "is_bad")


class TrainingLog:
    """Keeps each step's losses on the training device until `flush`, which writes them as lines of json.

    Args:
        path: `training_log.jsonl`, one line per optimiser step: `step`, the losses, averaged over all processes and
            accumulated micro-batches, the gradient's norm, the learning rate. A number that is not finite is null.
        window: number of steps that `means` are over; steps without an update because of a bad loss are left out.
        num_timesteps: of the training schedule; the squared error is reported by quarters of it, too.
    """

    NUM_BUCKETS = 4

    def __init__(self, path: str | Path, window: int, num_timesteps: int) -> None:
        self.path = Path(path)
        self.num_timesteps = num_timesteps
        self.window: deque[dict[str, float]] = deque(maxlen=window)
        self.num_bad_steps = 0
        self._unwritten: list[dict[str, Any]] = []
        self._micro_batches: list[torch.Tensor] = []
        self._steps: list[tuple[int, float, torch.Tensor]] = []  # step, learning rate, row of COLUMNS
        self._buckets: torch.Tensor | None = None  # (2, NUM_BUCKETS): sums of the squared error, and counts

    def add(self, losses: Losses, timesteps: torch.Tensor) -> None:
        """The losses of a micro-batch of the step under way, and the timesteps `(B,)` that they are of."""
        scalars = [losses.total.detach(), losses.mse.mean(), losses.vb.mean(), losses.prior]
        self._micro_batches.append(torch.stack([value.float() for value in scalars]))
        places = (timesteps * self.NUM_BUCKETS / self.num_timesteps).long().clamp(0, self.NUM_BUCKETS - 1)
        if self._buckets is None:
            self._buckets = torch.zeros(2, self.NUM_BUCKETS, device=losses.mse.device)
        self._buckets[0].index_add_(0, places, losses.mse.float())
        self._buckets[1].index_add_(0, places, torch.ones_like(losses.mse, dtype=torch.float32))

    def step_losses(self) -> torch.Tensor:
        """`loss, mse, vb, prior` of the step under way in this process, on the device."""
        return torch.stack(self._micro_batches).mean(0)

    def end_step(self, step: int, learning_rate: float, grad_norm: torch.Tensor, is_bad: torch.Tensor) -> None:
        """Ends the step under way; `grad_norm` and `is_bad` are scalars on the device."""
        row = torch.cat([self.step_losses(), grad_norm.float().reshape(1), is_bad.float().reshape(1)])
        self._steps.append((step, learning_rate, row))
        self._micro_batches = []

    def flush(self, accelerator: Any) -> dict[str, float]:
        """Writes the steps since the last call; all processes call it.

        Returns:
            What a tracker is to show: the means over the window, the last gradient norm, and the squared error since
            the last call by quarter of the timesteps.
        """
        if not self._steps:
            return self.means()
        rows = accelerator.reduce(torch.stack([row for _, _, row in self._steps]), reduction="mean").tolist()
        lines = []
        for (step, learning_rate, _), values in zip(self._steps, rows, strict=True):
            row = dict(zip(COLUMNS, values, strict=True))
            is_bad = row.pop("is_bad") > 0
            self.num_bad_steps += is_bad
            if not is_bad:
                self.window.append(row)
            kept = {name: value if math.isfinite(value) else None for name, value in row.items()}
            lines.append({"step": step, **kept, "lr": learning_rate} | ({"skipped": True} if is_bad else {}))
        if accelerator.is_main_process:
            self._write(lines)
        assert self._buckets is not None
        sums, counts = accelerator.reduce(self._buckets, reduction="sum").tolist()
        edges = [round(i * self.num_timesteps / self.NUM_BUCKETS) for i in range(self.NUM_BUCKETS + 1)]
        by_timestep = {
            f"mse_t{edges[i]}_{edges[i + 1] - 1}": sums[i] / counts[i] for i in range(self.NUM_BUCKETS) if counts[i]
        }
        self._steps, self._buckets = [], None
        return {**self.means(), "grad_norm_last": rows[-1][COLUMNS.index("grad_norm")], **by_timestep}

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Appends lines; those that a full disk does not take are kept for the next time."""
        self._unwritten += lines
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in self._unwritten)
            except OSError:
                os.truncate(self.path, size)
                raise
            self._unwritten = []
        except OSError as error:
            logger.warning("%s: %d lines are kept for later (%s)", self.path, len(self._unwritten), error)

    def means(self) -> dict[str, float]:
        """Means over the window; empty before the first `flush`."""
        if not self.window:
            return {}
        return {name: math.fsum(row[name] for row in self.window) / len(self.window) for name in self.window[0]}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, json; after a `flush`."""
        return {"window": list(self.window), "num_bad_steps": self.num_bad_steps}

    def load_state_dict(self, state: dict[str, Any], step: int, is_main_process: bool) -> None:
        """Goes on after `step`: lines of later steps, of a training that was killed, are taken out of the file."""
        self.window.clear()
        self.window.extend(state["window"])
        self.num_bad_steps = state["num_bad_steps"]
        if is_main_process and self.path.exists():
            kept = []
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):  # cut off by a kill
                    continue
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(self.path)
