"""The clips that an evaluation takes, as files."""

import numpy as np
import pytest
from script_runs import EXAMPLES, run_main

from diffusers_endora.data.video_io import read_frames, write_video

SCRIPT = EXAMPLES / "cut_clips.py"


@pytest.fixture
def videos(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "flight.mkv", noise, fps=8, codec="ffv1")
    return tmp_path / "videos", noise


def cut(videos, output_dir, **flags):
    options = {"num_frames": 4, "frame_interval": 2, "resolution": 32, **flags}
    run_main(SCRIPT, [str(videos), "--output_dir", str(output_dir), *(f"--{k}={v}" for k, v in options.items())])


def test_clips_are_at_fixed_offsets_without_loss(videos, tmp_path, capsys):
    folder, frames = videos
    cut(folder, tmp_path / "clips", num_clips=2)
    assert "2 clips" in capsys.readouterr().out
    for name, first in (("clip_0000.mkv", 0), ("clip_0001.mkv", 3)):
        np.testing.assert_array_equal(read_frames(tmp_path / "clips" / name, range(4)), frames[first : first + 7 : 2])
    assert len(list((tmp_path / "clips").iterdir())) == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"num_frames": 20}, "no video has the 39 frames of a clip"),
        ({"frame_interval": 0}, "frame_interval=0"),
        ({"num_clips": 1}, "num_clips=1"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(videos, tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as ended:
        cut(videos[0], tmp_path / "clips", **flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert error.startswith("cut_clips.py: error: ")
    assert sentence in error
    assert not (tmp_path / "clips").exists()


def test_other_files_stay_as_they_are(videos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cut(videos[0], videos[0])
    assert "is not empty; choose another folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cut(tmp_path / "none", tmp_path / "clips")
    assert capsys.readouterr().err.count("\n") == 1
