"""The reference ladder: two sets that share nothing, and an order that a broken metric would break."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from diffusers_endora.metrics.clip_sources import clips_at_fixed_offsets, open_videos
from diffusers_endora.metrics.evaluation import evaluate, load_extractors
from diffusers_endora.metrics.protocols import STRICT
from diffusers_endora.metrics.reference_ladder import FLOOR, GENERATED, OTHER, Rung, halves, violations


def rungs(**values: float) -> list[Rung]:
    names = {"floor": FLOOR, "shuffled": "frames shuffled in time", "other": OTHER, "noise": "noise"}
    return [Rung(names.get(name, name), value, 5.0, value - 10, value + 10, 64) for name, value in values.items()]


def test_the_order_that_must_be():
    assert violations(rungs(floor=100, shuffled=150, other=300, noise=900)) == []
    (low,) = violations(rungs(floor=100, shuffled=90, other=300, noise=900))
    assert "frames shuffled in time (90) is not above the floor (100)" in low
    (close,) = violations(rungs(floor=100, shuffled=110, other=300, noise=900))
    assert "cannot be told from the floor" in close
    (high,) = violations(rungs(floor=100, shuffled=901, other=300, noise=900))
    assert "frames shuffled in time (901) is not below noise (900)" in high
    assert violations(rungs(floor=100, shuffled=150, other=1900, noise=900)) == []  # far and narrow
    (same,) = violations(rungs(floor=100, shuffled=150, other=105, noise=900))
    assert "other corpus cannot be told from the floor" in same
    generated = replace(rungs(floor=1)[0], name=GENERATED)
    assert violations([*rungs(floor=100, shuffled=150, noise=900), generated]) == []  # may be anywhere


def test_halves_share_no_video():
    videos = np.random.default_rng(0).integers(0, 256, (5, 40, 8, 8, 3), dtype=np.uint8)
    first, second = halves(clips_at_fixed_offsets(open_videos(videos), 20, 4, 8))
    assert len(first) == len(second) == 8  # 3 videos to 2, of 4 clips each
    assert not {clip.video.name for clip in first} & {clip.video.name for clip in second}


def test_halves_of_one_video_share_no_frame():
    (video,) = open_videos(np.random.default_rng(0).integers(0, 256, (1, 100, 8, 8, 3), dtype=np.uint8))
    first, second = halves(clips_at_fixed_offsets([video], 30, 4, 16))
    assert len(first) == len(second) > 5
    assert max(max(clip.indices) for clip in first) < min(min(clip.indices) for clip in second)
    with pytest.raises(ValueError, match="the ladder compares two sets that share no video"):
        halves(clips_at_fixed_offsets([video], 3, 4, 60))


@pytest.mark.slow
def test_fvd_orders_the_ladder_of_a_laparoscopy(shared_file, tmp_path):
    corpus = shared_file("clips/cholecystectomy/endo.mp4").parent
    protocol = STRICT.changed(num_clips=64, frame_interval=1)
    ladder = evaluate(
        corpus, [], load_extractors([], ladder=True), [], protocol, ladder=True, cache_dir=tmp_path, num_resamples=20
    )["ladder"]
    assert ladder["rungs"][0]["name"] == FLOOR
    assert len(ladder["rungs"]) == 6
    assert ladder["is_ordered"], ladder["violations"]
