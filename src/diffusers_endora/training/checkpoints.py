"""Training checkpoints that appear whole or not at all."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The finished checkpoints of a training folder, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The training step in the name of a checkpoint.

    Raises:
        ValueError: for a folder not named `checkpoint-<step>`.
    """
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is no checkpoint: expected a folder named checkpoint-<step>.")
    return int(match.group(1))


def find_checkpoint(output_dir: str | Path, name: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint NAME` means.

    Args:
        output_dir: training folder.
        name: "latest" (None where there is none yet), the name of a checkpoint in `output_dir`, or a path.

    Raises:
        ValueError: for a name that is not there.
    """
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        return checkpoints[-1] if checkpoints else None
    for path in (Path(output_dir) / name, Path(name)):
        if path.is_dir() and CHECKPOINT_NAME.fullmatch(path.name):
            return path
    available = ", ".join(path.name for path in checkpoints) or "none"
    raise ValueError(f"resume_from_checkpoint={name}: no such checkpoint; available in {output_dir}: {available}.")


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    save: Callable[[Path], object],
    wait_for_everyone: Callable[[], None],
    is_main_process: bool,
    total_limit: int | None = None,
) -> Path:
    """Writes `checkpoint-<step>` beside its final name and renames it when all processes are done.

    A process killed on the way leaves a folder `checkpoint-<step>.partial`, which nothing reads and the next save
    removes. Checkpoints over `total_limit` are removed once the new one is in place: oldest first, never the new one.

    Args:
        output_dir: training folder.
        step: the optimiser step that the state belongs to.
        save: writes the state of the calling process into the folder it is given; called by every process.
        wait_for_everyone: barrier of all processes.
        is_main_process: whether the caller is the one that renames and removes.
        total_limit: number of checkpoints to keep; None keeps all.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: where the state cannot be written (a full disk); the checkpoints that were there are untouched.
    """
    output_dir = Path(output_dir)
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}.partial"
    if is_main_process:
        for leftover in output_dir.glob("checkpoint-*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    wait_for_everyone()
    try:
        save(partial)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final} could not be written ({error}); earlier checkpoints are untouched.") from error
    wait_for_everyone()
    if is_main_process:
        for path in partial.rglob("*"):
            if path.is_file():
                sync_to_disk(path)
        if final.exists():
            remove(final)
        partial.rename(final)
        sync_to_disk(output_dir)
        if total_limit is not None:
            others = [path for path in list_checkpoints(output_dir) if path != final]
            for old in others[: max(0, len(others) + 1 - total_limit)]:
                remove(old)
    wait_for_everyone()
    return final


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint such that a kill on the way leaves no half of it under its name."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old.partial")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk and not only on their way."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
