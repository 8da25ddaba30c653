"""The models that come with the package."""

from pathlib import Path


def bundled_model() -> str:
    """Folder of a small pipeline of rendered colons, 16 frames of 128x128: for offline use, demonstrations and tests.

    Classes: 0 instrument, 1 bare lumen, 2 polyp. `README.md` in it is the model card: on what it was trained, how, and
    how good it is.

    Example:
        >>> pipe = EndoraPipeline.from_pretrained(bundled_model())
        >>> frames = pipe(class_labels=[2]).frames[0]

    Raises:
        OSError: this installation came without it.
    """
    folder = Path(__file__).parent / "phantom"
    if not (folder / "model_index.json").is_file():
        raise OSError(
            f"{folder}: this installation came without the bundled model; name a pipeline folder or a Hub id"
        )
    return str(folder)


def bundled_depth_model() -> str:
    """Folder of a small depth model of rendered colons, of `transformers`; `README.md` in it is the model card.

    Raises:
        OSError: this installation came without it.
    """
    folder = Path(__file__).parent / "phantom_depth"
    if not (folder / "config.json").is_file():
        raise OSError(f"{folder}: this installation came without the depth model; name a folder or a Hub id")
    return str(folder)
