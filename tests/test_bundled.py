"""The model that comes with the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from diffusers_endora import EndoraPipeline, bundled_model
from diffusers_endora.data.phantom import CLASSES, render_phantom_clip
from diffusers_endora.data.video_io import read_frames

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "src/diffusers_endora/bundled/phantom/model_index.json").is_file(), reason="no bundled model yet"
)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = EndoraPipeline.from_pretrained(bundled_model())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def clips(pipeline):
    """A clip of each class (instrument, lumen, polyp), `(3, 16, 128, 128, 3)` in [0, 1]."""
    generators = [torch.Generator().manual_seed(label) for label in range(3)]
    return pipeline(class_labels=[0, 1, 2], generator=generators, output_type="np").frames


def test_it_is_small_and_safe():
    files = [path for path in Path(bundled_model()).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".py"}
    assert (Path(bundled_model()) / "README.md").is_file()


def test_few_calls_by_default(pipeline):
    assert pipeline.config.num_inference_steps <= 10
    assert pipeline.transformer.config.num_classes == len(CLASSES)


@pytest.mark.slow
def test_clips_move_smoothly_and_have_the_colours_of_the_corpus(clips):
    assert clips.shape == (3, 16, 128, 128, 3)
    rendered = [
        render_phantom_clip(9 * seed, 16, 128, 128, polyp=seed % 3 == 1, instrument=seed % 3 == 2).frames / 255
        for seed in range(6)
    ]
    means, expected = clips.mean((1, 2, 3)), np.stack([clip.mean((0, 1, 2)) for clip in rendered])
    margin = 0.5 * (expected.max(0) - expected.min(0))
    assert ((expected.min(0) - margin < means) & (means < expected.max(0) + margin)).all()
    changes = [np.abs(np.diff(clip, axis=0)).mean() for clip in [*clips, *rendered]]
    assert 0.3 * min(changes[3:]) < min(changes[:3])
    assert max(changes[:3]) < 1.5 * max(changes[3:])


def test_an_instrument_is_grey(clips):
    saturation = (clips.max(-1) - clips.min(-1)) / clips.max(-1).clip(1e-3)
    bright = clips.max(-1) > 0.35
    grey = ((saturation < 0.25) & bright).mean((1, 2, 3))
    assert grey[0] > 3 * grey[1:].max()


@pytest.mark.slow
def test_long_clips_change_no_more_at_seams_than_elsewhere(pipeline):
    generator = torch.Generator().manual_seed(0)
    (clip,) = pipeline(class_labels=[1], num_frames=40, window_overlap=8, generator=generator, output_type="np").frames
    changes = np.abs(np.diff(clip, axis=0)).mean((1, 2, 3))
    is_seam = np.isin(np.arange(1, 40), (8, 16, 24, 32))  # where a window begins or ends
    assert changes[~is_seam].min() <= changes[is_seam].min()
    assert changes[is_seam].max() <= changes[~is_seam].max()


@pytest.mark.slow
def test_frames_follow_a_given_image(pipeline):
    images = [render_phantom_clip(seed, 1, 128, 128).frames[0] for seed in (100, 101)]
    clips = [
        pipeline(image=image, class_labels=[1], generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
        for image in images
    ]
    for i, clip in enumerate(clips):
        changes = np.abs(np.diff(clip, axis=0)).mean((1, 2, 3))
        assert changes[0] < 2 * changes[1:].max()
        distances = [np.abs(clip[4] - image / 255).mean() for image in images]
        assert distances[i] < distances[1 - i]


@pytest.mark.slow
def test_the_command_takes_it_without_being_told(tmp_path):
    command = [sys.executable, "-m", "diffusers_endora.cli", "generate", "--output", tmp_path, "--class_label", "0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(read_frames(tmp_path / "clip_0000.mp4", range(16))) == 16
    with av.open(tmp_path / "clip_0000.mp4") as container:
        assert "bundled with diffusers-endora" in container.metadata["comment"]


@pytest.mark.slow
def test_the_wheel_has_it(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = [p.relative_to(ROOT / "src").as_posix() for p in Path(bundled_model()).rglob("*") if p.is_file()]
    assert set(expected) <= set(names)
