"""What the tests of the example scripts share: a corpus, a run of a script's `main`, its log."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from diffusers_endora.data.video_io import write_video

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def write_videos(folder: Path, num_frames: int) -> None:
    """Four videos of 32x32 that brighten frame by frame, in classes `a` and `b`."""
    rng = np.random.default_rng(0)
    for index in range(4):
        start = rng.integers(0, 200, size=(1, 32, 32, 3))
        frames = (start + np.arange(num_frames).reshape(-1, 1, 1, 1)).astype(np.uint8)
        path = folder / ("a", "b")[index % 2] / f"{index}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames, fps=8)


def as_flags(options: dict[str, Any]) -> list[str]:
    """A command line; `True` is a flag without a value, `None` none at all."""
    flags = []
    for name, value in options.items():
        flags += [f"--{name}"] if value is True else [] if value is None else [f"--{name}", str(value)]
    return flags


def run_main(script: Path, flags: list[str]) -> None:
    """Runs a script's `main` in this process."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *flags])
        try:
            module.main()
        finally:
            AcceleratorState._reset_state(True)


def read_log(output_dir: Path) -> list[dict]:
    """A dictionary per step."""
    return [json.loads(line) for line in (output_dir / "training_log.jsonl").read_text().splitlines()]
