"""How many floating-point operations a training takes, counted by running its first steps.

The file is also the program that runs a script with every operation counted: it imports nothing of the package.
"""

import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

STEPS_FLAGS = ("--max_train_steps", "--autoencoder_steps")  # of the scripts in `examples`; a stage has one
OUTPUT = "{output}"  # stands in a command for the folder that a training writes
PERIOD = 16  # steps; lazy regularisation of GANs comes every so many


def steps_of(command: list[str]) -> int:
    """The number of steps that a training's command line asks for.

    Raises:
        ValueError: it says no number of steps, or several, or no `{output}` for its folder, or would publish.
    """
    line = " ".join(command)
    place = steps_place(command)
    if place is None or not command[place].isdigit():
        raise ValueError(f"training {line}: expected one of {' and '.join(STEPS_FLAGS)} with a number")
    if "--push_to_hub" in command:
        raise ValueError(f"training {line}: expected no --push_to_hub, as its steps are counted by shorter trainings")
    if not any(OUTPUT in part for part in command):
        raise ValueError(f"training {line}: expected {OUTPUT} where the folder goes that it writes")
    return int(command[place])


def steps_place(command: list[str]) -> int | None:
    """Where in a command line its number of steps stands; None where it has none, or several."""
    places = [place for place, part in enumerate(command[:-1], start=1) if part in STEPS_FLAGS]
    return places[0] if len(places) == 1 else None


def count_training(command: list[str]) -> int:
    """Floating-point operations of a training: matrix products, convolutions and attention, forwards and backwards.

    The script runs for 1 step and for 17, into folders that are removed; the difference is that of 16 steps, and what
    the first run has besides its step (caches, validation at the end) is counted once. A training whose length is at
    most 17 steps is counted whole. What begins later than that is not counted: validations on the way, and a loss that
    joins after so many steps. One multiplication with its addition are 2 operations, as in
    `torch.utils.flop_counter`.

    Args:
        command: script and arguments, with `{output}` for the folder that it writes and one of `STEPS_FLAGS`.

    Raises:
        ValueError: see `steps_of`, or the script fails.
    """
    steps = steps_of(command)
    if steps <= PERIOD + 1:
        return _count(command, steps)
    first = _count(command, 1)
    return first + (_count(command, 1 + PERIOD) - first) * (steps - 1) // PERIOD


def _count(command: list[str], steps: int) -> int:
    place = steps_place(command)
    assert place is not None
    with TemporaryDirectory() as folder:
        line = [
            part.replace(OUTPUT, f"{folder}/model") for part in [*command[:place], str(steps), *command[place + 1 :]]
        ]
        done = subprocess.run([sys.executable, "-P", __file__, *line], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"training {' '.join(command)}: does not run for {steps} steps: {reason}")
    return int(done.stdout.strip().splitlines()[-1])


class OperationCounter(TorchDispatchMode):
    """Counts what is computed inside, as `torch.utils.flop_counter.FlopCounterMode` does.

    That one also follows modules by hooks, which gradients of gradients, as of R1, cannot pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func.overloadpacket)
        if count is None:  # without autograd, what consists of other operations comes whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


def main() -> None:
    """Runs the script of the command line, with its arguments, and prints the count as its last line."""
    script, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    sys.path.insert(0, str(Path(script).parent))  # as if it were run by its name
    with sdpa_kernel(SDPBackend.MATH), OperationCounter() as counter:  # fused attention is not counted
        runpy.run_path(script, run_name="__main__")
    print(counter.total)


if __name__ == "__main__":
    main()
