"""The model that comes with the package."""

from pathlib import Path


def bundled_model() -> str:
    """Folder of a small class-conditional pipeline of rendered colons: 16 frames of 128x128, for offline use and tests.

    Labels: 0 instrument, 1 bare lumen, 2 polyp. Its `README.md` is the model card: on what it was trained, how, how good
    it is. `student/` in it holds a LoRA adapter and a scheduler for fewer calls.

    Example:
        >>> pipe = EndoraPipeline.from_pretrained(bundled_model())
        >>> frames = pipe(class_labels=[2]).frames[0]
    """
    return str(Path(__file__).parent / "phantom")
