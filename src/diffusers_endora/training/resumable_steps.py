"""The steps of a training that a script writes out, with checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from .checkpoints import checkpoint_step, find_checkpoint, remove_leftovers, save_checkpoint

FACTS = "arguments.json"


def resume(accelerator: Accelerator, output_dir: Path, arguments: dict[str, Any]) -> int:
    """Loads the latest checkpoint in `output_dir` into what `accelerator.prepare` got; the number of steps made.

    Args:
        arguments: of the training, as JSON has them; those of the checkpoint have to be the same.

    Raises:
        ValueError: all checkpoints are damaged, or the latest is of other arguments.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    checkpoint = find_checkpoint(output_dir, "latest")
    if checkpoint is None:
        return 0
    if not (checkpoint / FACTS).is_file():
        raise ValueError(f"{checkpoint} is of another training; choose another output folder.")
    earlier = json.loads((checkpoint / FACTS).read_text())
    if differing := [name for name in arguments if earlier.get(name) != arguments[name]]:
        changes = ", ".join(f"--{name} was {earlier.get(name)} and is {arguments[name]}" for name in differing)
        raise ValueError(f"{checkpoint} is of another training ({changes}); choose another output folder.")
    accelerator.load_state(str(checkpoint))
    accelerator.print(f"Resumed from {checkpoint}.")
    return checkpoint_step(checkpoint)


def resumable_steps(
    accelerator: Accelerator,
    output_dir: Path,
    done: int,
    max_steps: int,
    checkpointing_steps: int,
    arguments: dict[str, Any],
) -> Iterator[int]:
    """Yields the steps from `done` on, and saves a checkpoint after every `checkpointing_steps` and at the end.

    What `accelerator.prepare` got (models, optimisers, schedules) is saved by `save_checkpoint`, with `arguments`; the
    latest two are kept. A disk that does not take it is reported, and the training goes on. A script that seeds its
    random numbers by the step goes on exactly.
    """

    def save(folder: Path) -> None:
        accelerator.save_state(str(folder))
        (folder / FACTS).write_text(json.dumps(arguments, indent=1))

    for step in tqdm(range(done, max_steps), initial=done, total=max_steps, desc="train"):
        yield step
        if (step + 1) % checkpointing_steps == 0 or step + 1 == max_steps:
            try:
                save_checkpoint(output_dir, step + 1, save, accelerator, 2)
            except OSError as error:
                accelerator.print(f"step {step + 1}: {error}")
