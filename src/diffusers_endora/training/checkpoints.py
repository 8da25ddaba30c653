"""Training checkpoints that appear whole or not at all."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .processes import by_main_process, raise_everywhere

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
AVERAGE = "ema.safetensors"  # the moving average of the transformer

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
    """The checkpoint that `--resume_from_checkpoint NAME` means; an intact one.

    Args:
        output_dir: training folder.
        name: "latest" (None where there is none yet), the name of a checkpoint in `output_dir`, or a path. The latest
            is the newest intact one; what is passed over is logged.

    Raises:
        ValueError: for a name that is not there, or a damaged checkpoint; for "latest", if all are damaged.
    """
    finish_interrupted(Path(output_dir))
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        for checkpoint in reversed(checkpoints):
            damage = find_damage(checkpoint)
            if damage is None:
                return checkpoint
            logger.warning("%s is passed over: %s", checkpoint, damage)
        if checkpoints:
            raise ValueError(f"{output_dir}: all of {len(checkpoints)} checkpoints are damaged, see the log.")
        return None
    for path in (Path(output_dir) / name, Path(name)):
        if path.is_dir() and CHECKPOINT_NAME.fullmatch(path.name):
            if damage := find_damage(path):
                raise ValueError(f"{path} is damaged: {damage}.")
            return path
    available = ", ".join(path.name for path in checkpoints) or "none"
    raise ValueError(f"resume_from_checkpoint={name}: no such checkpoint; available in {output_dir}: {available}.")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its `manifest.json`, or None; reads all of it."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, (size, _) in expected.items():
        if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != size:
            return f"{name} is missing or cut off"
    with ThreadPoolExecutor(max_workers=4) as threads:
        digests = list(threads.map(file_digest, [checkpoint / name for name in expected]))
    wrong = [name for (name, (_, sha256)), digest in zip(expected.items(), digests, strict=True) if digest != sha256]
    return f"{wrong[0]} has another hash" if wrong else None


def save_checkpoint(
    output_dir: str | Path, step: int, save: Callable[[Path], object], state: Any, total_limit: int | None = None
) -> Path:
    """Writes `checkpoint-<step>` beside its final name and renames it when it is whole, on the disk and verified.

    A process killed on the way leaves a folder `checkpoint-<step>.partial`, which nothing reads and the next save
    removes. Once the new one has been read back from the disk and agrees with its `manifest.json` (size and SHA-256 of
    every file), checkpoints over `total_limit` are removed, oldest first, never the new one.

    All processes call it, on one file system.

    Args:
        output_dir: training folder.
        step: the optimiser step that the state belongs to.
        save: writes the state of the calling process into the folder it is given; called by every process.
        state: the processes, an `accelerate.PartialState` or `Accelerator`.
        total_limit: number of checkpoints to keep; None keeps all.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: in every process, where one cannot write (a full disk); the checkpoints that were there are untouched,
            and nothing is left of the new one.
    """
    output_dir = Path(output_dir)
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}.partial"

    def begin() -> None:
        finish_interrupted(output_dir)
        for leftover in output_dir.glob("checkpoint-*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def finish() -> None:
        seal(partial)
        if final.exists():
            remove(final)
        partial.rename(final)
        sync_to_disk(output_dir)
        if total_limit is not None:
            others = [path for path in list_checkpoints(output_dir) if path != final]
            for old in others[: max(0, len(others) + 1 - total_limit)]:
                remove(old)

    try:
        by_main_process(state, begin)
        failure = None
        try:
            save(partial)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own
            failure = str(error)
        raise_everywhere(state, failure)
        by_main_process(state, finish)
    except OSError as error:
        if state.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise OSError(f"{final} could not be written ({reason}); earlier checkpoints are untouched.") from error
    return final


def leave_out_frozen(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
    """A hook of `Accelerator.save_state`, by which it writes what is trained and not what lies in a base model.

    Sharded models, whose weights Accelerate writes by itself, are written whole.
    """
    for model, state in zip(models, weights, strict=False):  # no weights of sharded models
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                del state[name]


def finish_interrupted(output_dir: Path) -> None:
    """Gives checkpoints their names that were whole but not yet renamed when their process was killed."""
    for partial in output_dir.glob("checkpoint-*.partial"):
        final = partial.with_suffix("")
        if CHECKPOINT_NAME.fullmatch(final.name) and not final.exists() and find_damage(partial) is None:
            partial.rename(final)


def seal(folder: Path) -> None:
    """Brings a folder's files to the disk, lists them in `manifest.json`, and reads them back from the disk.

    Raises:
        OSError: what is on the disk is not what was written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=4) as threads:
        digests = list(threads.map(file_digest, files))  # from memory
    manifest = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, folder / MANIFEST]:
        sync_to_disk(path)
    if damage := find_damage(folder):
        raise OSError(f"read back from the disk, {damage}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside_after(checkpoint: Path) -> list[Path]:
    """Renames the later checkpoints beside one to `<name>.abandoned`, so that none is taken for the training's latest.

    Returns:
        Their new paths.
    """
    renamed = []
    for path in list_checkpoints(checkpoint.parent):
        if checkpoint_step(path) > checkpoint_step(checkpoint):
            target = path.with_name(f"{path.name}.abandoned")
            if target.exists():
                shutil.rmtree(target)
            renamed.append(path.rename(target))
    return renamed


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a process that was killed left half written in a training's folder, but for checkpoints."""
    for pattern in (".new-*", ".best-*", "*.tmp"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that is replaced and never changed; a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint such that a kill on the way leaves no half of it under its name."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old.partial")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk,.

    Where the system can forget what it has of a file in memory, what is read next comes from the disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if path.is_file() and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
