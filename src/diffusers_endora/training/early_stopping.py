"""When a training no longer gets better on videos that it does not see."""

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

    def update(self, loss: float, step: int) -> bool:
        """Counts an evaluation in; returns whether it is the best so far."""
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
        best_loss = self.best_loss if self.best_step else None
        return {"best_loss": best_loss, "best_step": self.best_step, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss = float("inf") if state["best_loss"] is None else state["best_loss"]
        self.best_step, self.num_worse = state["best_step"], state["num_worse"]
