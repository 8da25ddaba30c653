"""Features are computed once, found again by content, and the same however the work is cut."""

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from diffusers_endora.metrics.clip_sources import open_videos, whole_clips
from diffusers_endora.metrics.feature_extractors import FeatureExtractor
from diffusers_endora.metrics.feature_store import FeatureStore
from diffusers_endora.metrics.preparation import CORRUPTIONS, Preparation, corrupt


class MeanColour(FeatureExtractor):
    """Mean colour of a clip, or of each frame."""

    name, outputs, weights_hash, preprocessing = "mean-colour", {"features": 3}, "0", "none"

    def __init__(self, per_frame: bool = False):
        super().__init__(torch.nn.Identity(), units_per_forward=4)
        self.per_frame = per_frame

    def forward(self, units: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": units.float().mean(dim=tuple(range(1, units.ndim - 1)))}


@pytest.fixture
def clips():
    return whole_clips(open_videos(np.random.default_rng(0).integers(0, 256, (37, 16, 8, 8, 3), dtype=np.uint8)), 16)


@pytest.mark.parametrize("per_frame", [False, True])
def test_features_come_in_order_and_once(tmp_path, clips, per_frame):
    extractor = MeanColour(per_frame)
    extractor.preprocessing = str(per_frame)
    store = FeatureStore(extractor, tmp_path)
    features = store(clips, Preparation(None), "clips")["features"]
    assert store.num_computed == 37
    expected = np.stack([clip.read().mean(axis=(1, 2)) for clip in clips])
    expected = expected if per_frame else expected.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(features, expected, rtol=1e-5)
    again = FeatureStore(extractor, tmp_path)
    np.testing.assert_array_equal(again(clips[::-1], Preparation(None), "clips")["features"], features[::-1])
    assert again.num_computed == 0


def test_interruption_loses_a_part_at_most(tmp_path, clips):
    extractor = MeanColour()

    calls = iter(range(100))

    def interrupted(units):
        if next(calls) == 6:  # of 4 clips each; a part has 16
            raise KeyboardInterrupt
        return MeanColour.forward(extractor, units)

    extractor.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        FeatureStore(extractor, tmp_path)(clips, Preparation(None), "clips")
    store = FeatureStore(MeanColour(), tmp_path)
    assert len(store(clips, Preparation(None), "clips")["features"]) == 37
    assert store.num_computed == 37 - 16
    assert not list(store.folder.glob(".*"))


def test_damaged_parts_are_computed_again(tmp_path, clips):
    store = FeatureStore(MeanColour(), tmp_path)
    features = store(clips, Preparation(None), "clips")["features"]
    parts = sorted(store.folder.iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:40])
    parts[1].write_text("nonsense")
    again = FeatureStore(MeanColour(), tmp_path)
    np.testing.assert_array_equal(again(clips, Preparation(None), "clips")["features"], features)
    assert again.num_computed > 0


def test_preparation_and_network_are_part_of_the_identity(tmp_path, clips):
    FeatureStore(MeanColour(), tmp_path)(clips[:3], Preparation(None), "clips")
    for preparation in (
        Preparation((4, 4)),
        Preparation(None, jpeg_quality=75),
        Preparation(None, corruption="noise"),
    ):
        store = FeatureStore(MeanColour(), tmp_path)
        store(clips[:3], preparation, "clips")
        assert store.num_computed == 3
    other = MeanColour()
    other.weights_hash = "1"
    store = FeatureStore(other, tmp_path)
    store(clips[:3], Preparation(None), "clips")
    assert store.num_computed == 3


def test_a_bad_clip_ends_the_run_with_its_sentence(tmp_path):
    videos = open_videos([np.zeros((16, 8, 8, 3), np.float32), np.full((16, 8, 8, 3), np.nan, np.float32)])
    with pytest.raises(ValueError, match="not finite"):
        FeatureStore(MeanColour(), tmp_path)(whole_clips(videos, 16), Preparation(None), "clips")


def test_corruptions_do_what_they_say():
    frames = np.random.default_rng(1).integers(0, 256, (16, 128, 128, 3), dtype=np.uint8)
    by_name = {name: corrupt(frames, name, "key") for name in CORRUPTIONS}
    assert all(corrupted.shape == frames.shape for corrupted in by_name.values())
    assert all(not np.array_equal(corrupted, frames) for corrupted in by_name.values())
    shuffled = by_name["frames shuffled in time"]
    assert sorted(frame.tobytes() for frame in shuffled) == sorted(frame.tobytes() for frame in frames)
    assert (by_name["first frame repeated"] == frames[0]).all()
    assert by_name["blurred"].std() < frames.std()
    np.testing.assert_array_equal(by_name["noise"], corrupt(frames, "noise", "key"))
    assert not np.array_equal(by_name["noise"], corrupt(frames, "noise", "other key"))
    with pytest.raises(ValueError, match="expected one of"):
        corrupt(frames, "rotated", "key")


def test_preparation_resizes_and_compresses():
    smooth = np.linspace(0, 255, 64 * 96 * 3).reshape(1, 64, 96, 3).round().astype(np.uint8).repeat(16, axis=0)
    for resize in ("antialiased", "lanczos"):
        prepared = Preparation((32, 32), resize=resize)(smooth, "key")
        assert prepared.shape == (16, 32, 32, 3)
        assert prepared.dtype == np.uint8
        centre = smooth[:, :, 16:80].reshape(16, 32, 2, 32, 2, 3).mean(axis=(2, 4))
        assert np.abs(prepared - centre)[:, 4:-4, 4:-4].max() < 2
    for lossy in (Preparation(None, jpeg_quality=75), Preparation(None, mp4_crf=5)):
        compressed = lossy(smooth, "key").astype(int)
        assert 0 < np.abs(compressed - smooth).mean() < 4
    assert Preparation((64, 96))(smooth, "key") is smooth
