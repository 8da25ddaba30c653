"""Means of the losses over the last steps, without waiting for the device at every step."""

from collections import deque

import torch


class LossHistory:
    """Remembers each step's losses on the training device; a checkpoint keeps them.

    Args:
        window: number of optimiser steps that are remembered.
    """

    def __init__(self, window: int):
        self.steps: deque[dict[str, torch.Tensor]] = deque(maxlen=window)
        self.micro_batches: list[dict[str, torch.Tensor]] = []

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """The losses, scalars by name, of one micro-batch of the step under way."""
        self.micro_batches.append({name: value.detach() for name, value in losses.items()})

    def end_step(self) -> None:
        """Makes the micro-batches since the last call one step, with their mean."""
        names = self.micro_batches[0]
        self.steps.append({name: torch.stack([loss[name] for loss in self.micro_batches]).mean() for name in names})
        self.micro_batches = []

    def means(self) -> dict[str, torch.Tensor]:
        """The mean of each loss over the remembered steps; empty before the first."""
        if not self.steps:
            return {}
        last = self.steps[-1]  # steps before a resume lie on the CPU
        return {name: torch.stack([step[name].to(last[name].device) for step in self.steps]).mean() for name in last}

    def state_dict(self) -> dict:
        return {"steps": [{name: value.cpu() for name, value in step.items()} for step in self.steps]}

    def load_state_dict(self, state: dict) -> None:
        self.steps.clear()
        self.steps.extend(state["steps"])
