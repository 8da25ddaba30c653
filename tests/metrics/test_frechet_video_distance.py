"""FrechetVideoDistance: the distance of features, streamed, from any layout, and of all processes together."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("torchmetrics")

from tiny import MeanAndStep, make_clips

from diffusers_endora.metrics import FrechetVideoDistance
from diffusers_endora.metrics.frechet_distance import RankDeficientWarning, frechet_distance_of_features

SCRIPT = """
import sys
import numpy as np, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tiny import MeanAndStep, make_clips
from diffusers_endora.metrics import FrechetVideoDistance
dist.init_process_group("gloo")
rank = dist.get_rank()
fvd = FrechetVideoDistance(MeanAndStep())
fvd.update(make_clips(0)[rank::2], real=True)
if rank == 0:  # one process has no generated clips
    fvd.update(make_clips(1), real=False)
value = fvd.compute().item()
assert fvd.real_count.ndim == 0 and int(fvd.real_count) == len(make_clips(0)[rank::2])
if rank == 1:
    print(repr(value))
dist.destroy_process_group()  # a process that ends with gloo's threads can be aborted
"""


def distance(real: np.ndarray, fake: np.ndarray) -> float:
    return frechet_distance_of_features(*(MeanAndStep()(clips)["features"][:, 0] for clips in (real, fake)))


def test_it_is_the_distance_of_the_features_however_they_come():
    fvd = FrechetVideoDistance(MeanAndStep())
    real, fake = make_clips(0), make_clips(1)
    fvd.update(real[:5], real=True)
    fvd.update(torch.from_numpy(real[5:]).permute(0, 1, 4, 2, 3), real=True)
    fvd.update(fake[:7].astype(np.float32) / 255, real=False)
    fvd.update(torch.from_numpy(fake[7:]).permute(0, 1, 4, 2, 3) / 255, real=False)
    assert fvd.compute().item() == pytest.approx(distance(real, fake), rel=1e-9)
    fvd.reset()
    with (
        pytest.raises(ValueError, match="0 real clips: a distance needs 2"),
        pytest.warns(UserWarning, match="before the"),
    ):
        fvd.compute()


def test_real_clips_can_outlive_a_reset():
    fvd = FrechetVideoDistance(MeanAndStep(), reset_real_features=False)
    fvd.update(make_clips(0), real=True)
    for seed in (1, 2):
        fvd.update(make_clips(seed), real=False)
        assert fvd.compute().item() == pytest.approx(distance(make_clips(0), make_clips(seed)), rel=1e-9)
        fvd.reset()


def test_few_clips_give_a_warning():
    fvd = FrechetVideoDistance(MeanAndStep())
    fvd.update(make_clips(0)[:4], real=True)
    fvd.update(make_clips(1)[:4], real=False)
    with pytest.warns(RankDeficientWarning, match="4 rows of features of width 6"):
        assert fvd.compute().isfinite()


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (np.zeros((4, 6, 8, 3), np.uint8), r"expected \(B, F, H, W, 3\)"),
        (np.zeros((1, 4, 6, 8, 3), np.int64), "got int64"),
        (np.full((1, 4, 6, 8, 3), np.nan, np.float32), "not finite"),
        (np.full((1, 4, 6, 8, 3), -1, np.float32), "floats from -1 to -1"),
    ],
)
def test_what_is_no_clip_is_refused(clips, message):
    fvd = FrechetVideoDistance(MeanAndStep())
    with pytest.raises(ValueError, match=message):
        fvd.update(clips, real=True)


@pytest.mark.slow
def test_two_processes_give_the_distance_of_the_whole(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = str(Path(__file__).resolve().parent)
    done = subprocess.run([*command, folder], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(distance(make_clips(0), make_clips(1)), rel=1e-9)
