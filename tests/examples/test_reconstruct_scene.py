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
        ({"fps": "inf"}, "--fps inf: expected a number between 0 and inf"),
        ({"field_of_view": 200}, "--field_of_view 200.0: expected a number between 0 and 180"),
        ({"num_basis": -1}, "--num_basis -1: expected 0 or more"),
        ({"num_gaussians": 30000}, "--num_gaussians 30000: expected at most 20000"),
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


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        run_main(
            EXAMPLES / "reconstruct_scene.py", as_flags({"output_dir": tmp_path / "file" / "scene", "resolution": 32})
        )
    assert "is no folder that can be written to" in capsys.readouterr().err


def test_a_scene_from_nothing_but_the_package(tmp_path, capsys):
    options = {"num_frames": 8, "resolution": 48, "num_steps": 2, "num_gaussians": 200}
    options |= {"path": "monocular", "depth_model": "phantom", "output_dir": tmp_path / "scene"}
    run_main(EXAMPLES / "reconstruct_scene.py", as_flags(options))
    assert "path: monocular depth, registration rate not tried" in capsys.readouterr().out
    record = json.loads((tmp_path / "scene" / "reconstruction.json").read_text())
    assert record["path"] == "monocular depth"
    assert record["frames_held_out"] == [4]
    assert {path.name for path in (tmp_path / "scene").iterdir()} == {
        "scene.ply",
        "beside_source.mp4",
        "orbit.mp4",
        "reconstruction.json",
    }


def test_a_trained_depth_model_loads_and_predicts(tmp_path):
    sizes = {"num_colons": 1, "num_test_colons": 2, "frames_per_colon": 1, "size": 32}
    run_main(
        EXAMPLES / "train_depth_model.py", as_flags({"output_dir": tmp_path / "model", "max_train_steps": 20, **sizes})
    )
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert 0 < facts["held_out"]["abs_rel, alignment median"]["mean"] < 2
    model = MonocularDepth.from_pretrained(tmp_path / "model")
    depth = model.predict(np.zeros((2, 48, 40, 3), np.uint8))
    assert not model.is_inverse
    assert depth.shape == (2, 48, 40)
    assert (depth > 0).all()
