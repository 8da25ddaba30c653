"""Files and folders: written whole or not at all, walked, sorted, told apart by content."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a name in the folder of `path` to write a file or a folder to; renames it to `path` on success.

    On any failure what was written is removed. A folder replaces only an empty folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder {path.parent} does not exist; create it first")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path}: is a folder with files in it, which are not overwritten; choose another name")
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_entries(folder: Path) -> Iterator[Path]:
    """Yields a new folder inside `folder`; on success its entries take the place of those of the same name there.

    On a failure before that, what was written is removed and `folder` is as it was. Entries are replaced one after the
    other: where that fails, each is the old one or the new one, whole.
    """
    temporary = folder / f".new-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        yield temporary
        for entry in sorted(temporary.iterdir()):
            target, old = folder / entry.name, temporary / f".old-{entry.name}"
            if target.is_dir():
                target.rename(old)
            try:
                entry.replace(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def walk_folders(root: str | os.PathLike[str]) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, each with its visible files: real folders first, then links, each folder once.

    A folder with several names has the one without a link, or of links the first that is met. Hidden names
    (`.DS_Store`, `._00001.mp4`) and `__MACOSX` are left out.
    """
    visited = set()
    starts = [Path(root)]
    while starts:
        links = []
        for folder, subfolders, files in (step for start in starts for step in os.walk(start)):
            real = os.path.realpath(folder)
            if real in visited:
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
            links += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
            yield Path(folder), sorted(name for name in files if not name.startswith("."))
        starts = links


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares runs of digits as numbers: `frame2` before `frame10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name.lower())], name


_HASHES: dict[tuple[str, int, int], str] = {}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered until its size or time changes."""
    status = path.stat()
    seen = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if seen not in _HASHES:
        with path.open("rb") as file:
            _HASHES[seen] = hashlib.file_digest(file, "sha256").hexdigest()
    return _HASHES[seen]
