"""The whole way, as examples/whole_way.sh goes it: from nothing to a model page and a clip generated from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer

from diffusers_endora.data.video_io import read_video_info

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "whole_way.sh"


@pytest.mark.slow
def test_from_a_corpus_to_a_published_model_and_its_clips(tmp_path):
    sizes = {
        "NUM_VIDEOS": "10",
        "VAE_STEPS": "60",
        "TEACHER_STEPS": "10",
        "MAX_TRAIN_STEPS": "60",
        "VALIDATION_STEPS": "2",
        "PATIENCE": "1",
    }
    with HubServer() as hub:
        environment = {
            **os.environ,
            **sizes,
            "NUM_CLIPS": "6",
            "LEARNING_RATE": "0.01",  # too much, so that the loss soon rises
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "huggingface"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [SCRIPT, tmp_path / "work", "me/colon"]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
        assert hub.repositories["me/colon"]
    work = tmp_path / "work"
    training = json.loads((work / "model" / "training.json").read_text())["results"]
    assert training["num_processes"] == 2
    assert training["stopped_early"]
    assert 0 < training["weights_of_step"] < training["steps"] < 60
    clips = sorted((work / "clips").glob("*.mp4"))
    assert len(clips) == 3
    assert read_video_info(clips[0]).num_frames == 16
