"""When a training no longer gets better on videos that it does not see."""

import math
from typing import Any


class EarlyStopping:
    """Says when a held-out loss has not fallen for `patience` evaluations in a row.

    Args:
        patience: number of evaluations; None never stops.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best_loss = float("inf")
        self.best_step = 0
        self.num_worse = 0
        self.last_loss = float("inf")
        self.last_step = 0

    def update(self, loss: float, step: int) -> bool:
        """Counts an evaluation in; returns whether it is the best so far."""
        self.last_loss, self.last_step = loss, step
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step, self.num_worse = loss, step, 0
        else:
            self.num_worse += 1
        return is_best

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.num_worse >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, json."""
        return {
            "best_loss": self.best_loss if self.best_step else None,
            "best_step": self.best_step,
            "num_worse": self.num_worse,
            "last_loss": self.last_loss if math.isfinite(self.last_loss) else None,
            "last_step": self.last_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss = float("inf") if state["best_loss"] is None else state["best_loss"]
        self.last_loss = float("inf") if state["last_loss"] is None else state["last_loss"]
        self.best_step, self.num_worse, self.last_step = state["best_step"], state["num_worse"], state["last_step"]
