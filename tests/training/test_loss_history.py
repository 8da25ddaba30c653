"""Means are over optimiser steps, whatever the number of micro-batches, and survive a checkpoint."""

import pytest
import torch

from diffusers_endora.training.loss_history import LossHistory


def add_step(history: LossHistory, *values: float) -> None:
    for value in values:
        history.add({"mse": torch.tensor(value)})
    history.end_step()


def test_a_step_counts_once_and_old_steps_leave():
    history = LossHistory(window=2)
    assert history.means() == {}
    add_step(history, 100.0)
    add_step(history, 1.0, 3.0)
    add_step(history, 4.0)
    assert len(history.steps) == 2
    assert history.means()["mse"].item() == pytest.approx((2 + 4) / 2)


def test_a_restored_history_goes_on():
    history, restored = LossHistory(window=3), LossHistory(window=3)
    add_step(history, 1.0)
    restored.load_state_dict(history.state_dict())
    for each in (history, restored):
        add_step(each, 2.0, 4.0)
    assert restored.means()["mse"].item() == history.means()["mse"].item() == 2.0
