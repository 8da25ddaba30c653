"""One video split in time."""

import numpy as np
import pytest
from script_runs import EXAMPLES, run_main

from diffusers_endora.data.video_io import read_frames, read_video_info, write_video

SCRIPT = EXAMPLES / "split_video.py"


@pytest.fixture
def video(tmp_path):
    frames = np.repeat(np.arange(0, 200, 10, dtype=np.uint8), 32 * 48 * 3).reshape(20, 32, 48, 3)
    return write_video(tmp_path / "flight.mkv", frames, fps=8, codec="ffv1")


def test_the_end_is_for_testing(video, tmp_path):
    out = tmp_path / "corpus"
    run_main(SCRIPT, [str(video), "--output_dir", str(out), "--num_test_frames", "8", "--short_side", "16"])
    for split, first, count in (("train", 0, 12), ("test", 12, 8)):
        info = read_video_info(out / split / "flight.mp4")
        assert (info.num_frames, info.height, info.width) == (count, 16, 24)
        grey = read_frames(out / split / "flight.mp4", range(count)).mean(axis=(1, 2, 3))
        assert np.abs(grey - 10 * np.arange(first, first + count)).max() < 2


@pytest.mark.parametrize(("count", "message"), [("20", "expected 1 to 19, of 20 frames"), ("0", "expected 1 to 19")])
def test_both_parts_have_frames(video, tmp_path, count, message):
    with pytest.raises(SystemExit, match=message):
        run_main(SCRIPT, [str(video), "--output_dir", str(tmp_path / "corpus"), "--num_test_frames", count])
    assert not (tmp_path / "corpus").exists()


def test_no_video(tmp_path):
    with pytest.raises(SystemExit, match=r"split_video.py: error: .*none.mp4"):
        run_main(SCRIPT, [str(tmp_path / "none.mp4"), "--output_dir", str(tmp_path / "out"), "--num_test_frames", "1"])
