"""The scripts that reconstruct scenes and train a depth model, as they are run."""

import json

import numpy as np
import pytest
from script_runs import EXAMPLES, as_flags, run_main

from diffusers_endora.data.video_io import write_video
from diffusers_endora.downstream.reconstruction.monocular_depth import MonocularDepth


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "reconstruct_scene.py: error: 16 of 16 frames are black or of one colour (the first is frame 0)"),
        ({"frame_interval": 2}, "has 16 frames, but frames 0 to 30 were asked for"),
        ({"num_frames": 1}, "the clip has 1 frames: expected 8 or more"),
        ({"depth_model": str(EXAMPLES)}, "config.json"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, options, sentence):
    clip = write_video(tmp_path / "black.mp4", np.zeros((16, 64, 64, 3), np.uint8), fps=8)
    flags = as_flags({"output_dir": tmp_path / "scene", "resolution": 64, **options})
    with pytest.raises(SystemExit) as exit_:
        run_main(EXAMPLES / "reconstruct_scene.py", [str(clip), *flags])
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "scene").exists()


def test_a_trained_depth_model_loads_and_predicts(tmp_path):
    sizes = {"num_colons": 1, "num_test_colons": 2, "frames_per_colon": 1, "size": 32}
    run_main(
        EXAMPLES / "train_depth_model.py", as_flags({"output_dir": tmp_path / "model", "max_train_steps": 2, **sizes})
    )
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert 0 < facts["held_out"]["abs_rel, alignment median"]["mean"] < 2
    model = MonocularDepth.from_pretrained(tmp_path / "model")
    depth = model.predict(np.zeros((2, 48, 40, 3), np.uint8))
    assert not model.is_inverse
    assert depth.shape == (2, 48, 40)
    assert (depth > 0).all()
