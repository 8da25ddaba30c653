import logging

import numpy as np
import pytest
import torch

from diffusers_endora.data.frames import as_pixels, load_frames
from diffusers_endora.data.video_io import read_frames, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for label, size in (("a", (16, 16)), ("b", (16, 24))):
        (root / label).mkdir()
        write_video(root / label / "0.mp4", rng.integers(0, 256, (3, *size, 3), dtype=np.uint8), fps=8)
    (root / "b" / "broken.mp4").write_bytes(b"no video")
    return root


def test_every_frame_with_its_class(videos, caplog):
    with caplog.at_level(logging.WARNING):
        frames, classes = load_frames(videos, 16)
    assert frames.shape == (6, 3, 16, 16)
    assert frames.dtype == torch.uint8
    assert classes == ["a"] * 3 + ["b"] * 3
    assert "broken.mp4" in caplog.text
    exact = torch.from_numpy(read_frames(videos / "a" / "0.mp4", range(3))).permute(0, 3, 1, 2)
    assert torch.equal(frames[:3], exact)  # of the right size: not resampled
    wide = torch.from_numpy(read_frames(videos / "b" / "0.mp4", range(3))).permute(0, 3, 1, 2)
    # the centre, by a resampling of scale 1
    assert (frames[3:].int() - wide[..., 4:20].int()).abs().max() <= 1
    assert as_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_nothing_to_read(videos, tmp_path):
    with pytest.raises(ValueError, match="there is none"):
        load_frames(tmp_path / "absent", 16)
    with pytest.raises(ValueError, match="at least one video that can be read; there is none"):
        load_frames(tmp_path, 16)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"1 found, none can be read, such as .*broken.mp4"):
        load_frames(tmp_path, 16)
