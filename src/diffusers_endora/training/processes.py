"""The processes of a training: that they find each other, and agree, so that none waits for one that has failed."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from safetensors import SafetensorError

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether Accelerate is to be told `cpu=True`: it was asked to, or there is nothing else.

    Where there is no accelerator and it is not told so, it takes each of several processes for the only one.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def raise_everywhere(state: Any, failure: str | None) -> None:
    """Raises an OSError in every process if one of them has failed; all call it.

    Args:
        state: the processes, an `accelerate.PartialState` or `Accelerator`.
        failure: what went wrong in this process, or None.
    """
    failures = gather_object([failure]) if state.num_processes > 1 else [failure]
    for message in failures:
        if message is not None:
            raise OSError(message)


def by_main_process(state: Any, function: Callable[[], T]) -> T:
    """What `function` returns, or the ValueError or OSError that it raises, in the main process; in every process.

    An error of safetensors, which has its own for a full disk, becomes an OSError.
    """
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
        except SafetensorError as error:
            outcome[1] = OSError(str(error))
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
