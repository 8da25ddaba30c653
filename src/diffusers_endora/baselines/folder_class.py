"""Refuses to load a pipeline's folder as a pipeline of another class."""

import os
from pathlib import Path

from .registry import class_name_of, read_index


def require_folder_class(path_or_repo: str | os.PathLike, expected_class_name: str) -> None:
    """Checks that a local folder is of a pipeline class, before its parts are loaded.

    Nothing is checked where `path_or_repo` is not a folder on this machine or has no `model_index.json`; diffusers
    says what is wrong then.

    Args:
        path_or_repo: what `from_pretrained` was given.
        expected_class_name: the class whose `from_pretrained` it was.

    Raises:
        ValueError: the folder is of another class; the message names both.
    """
    folder = Path(path_or_repo)
    if not (folder / "model_index.json").is_file():
        return
    class_name = class_name_of(read_index(folder))
    if class_name != expected_class_name:
        raise ValueError(
            f"{folder}: is of class {class_name}, expected {expected_class_name}; "
            f"load it by {class_name}.from_pretrained."
        )
