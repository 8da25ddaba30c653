"""The steps of a training that a script writes out, with checkpoints."""

from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm

from .checkpoints import checkpoint_step, find_checkpoint, save_checkpoint


def resumable_steps(
    accelerator: Accelerator, output_dir: Path, max_steps: int, checkpointing_steps: int
) -> Iterator[int]:
    """Yields the steps still to be made, from 0; goes on from the latest checkpoint in `output_dir`.

    What `accelerator.prepare` got (models, optimisers, schedules) is saved every `checkpointing_steps` and at the end,
    by `save_checkpoint`; the latest two are kept. A script that seeds its random numbers by the step goes on exactly.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    done = 0
    checkpoint = find_checkpoint(output_dir, "latest")
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        done = checkpoint_step(checkpoint)
        accelerator.print(f"Resumed from {checkpoint}.")
    for step in tqdm(range(done, max_steps), initial=done, total=max_steps, desc="train"):
        yield step
        if (step + 1) % checkpointing_steps == 0 or step + 1 == max_steps:
            try:
                save_checkpoint(output_dir, step + 1, lambda path: accelerator.save_state(str(path)), accelerator, 2)
            except OSError as error:
                accelerator.print(f"step {step + 1}: {error}")
