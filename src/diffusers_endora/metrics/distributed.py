"""The processes that share an evaluation."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def shared_state(cpu: bool = False) -> PartialState:
    """The state of this process among those started by `accelerate launch` or `torchrun`.

    `PartialState()` alone takes each of several processes on CPUs for the only one. (And on CPUs `accelerate launch`
    starts several only through MPI; `torchrun` does without.)

    Args:
        cpu: use no accelerator even where there is one.
    """
    on_cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)
