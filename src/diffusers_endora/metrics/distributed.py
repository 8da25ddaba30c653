"""The processes that share an evaluation."""

from accelerate import PartialState

from ..training.processes import on_cpu


def shared_state(cpu: bool = False) -> PartialState:
    """The state of this process among those started by `accelerate launch` or `torchrun`.

    `PartialState()` alone takes each of several processes on CPUs for the only one. (And on CPUs `accelerate launch`
    starts several only through MPI; `torchrun` does without.)

    Args:
        cpu: use no accelerator even where there is one.
    """
    return PartialState(cpu=cpu or on_cpu())
