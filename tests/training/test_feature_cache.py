"""Features are computed once, checked when they are read, and computed again only where they are wrong."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load, load_file, save_file

from diffusers_endora import ClipDataset
from diffusers_endora.data.video_io import write_video
from diffusers_endora.training import feature_cache
from diffusers_endora.training.feature_cache import FeatureCache, FrameFeatures, compressed

FEATURES = FrameFeatures("colours", "mean and edge", {"mean": (3,), "edge": (3, 16)})


def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": pixels.mean((2, 3)), "edge": pixels[:, :, 0]}


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "videos").mkdir()
    for index in range(3):
        frames = rng.integers(0, 255, (9 + index, 16, 16, 3), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{index}.mkv", frames, fps=8, codec="ffv1")
    return tmp_path / "videos"


def dataset_of(corpus, **options) -> ClipDataset:
    return ClipDataset(corpus, num_frames=4, window=8, resolution=16, num_still_images=2, **options)


def opened(tmp_path, corpus, features=FEATURES, **options) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", dataset_of(corpus, **options), features, PartialState(cpu=True))


def filled(*args, **options) -> FeatureCache:
    cache = opened(*args, **options)
    cache.fill(cache.missing(), compute)
    return cache


@pytest.mark.parametrize("frames_per_shard", [1024, 4])
def test_it_gives_what_the_network_makes_of_the_items_frames(tmp_path, corpus, monkeypatch, frames_per_shard):
    monkeypatch.setattr(feature_cache, "FRAMES_PER_SHARD", frames_per_shard)
    monkeypatch.setattr(feature_cache, "FRAMES_AT_A_TIME", 3)
    cache = filled(tmp_path, corpus)
    dataset = dataset_of(corpus)
    seen = set()
    for index in range(20):
        item = dataset.item(index // 10, index % 10)
        without = dataset.item_without_pixels(index // 10, index % 10, cache.damaged)
        assert torch.equal(item["frame_ids"], without["frame_ids"])
        seen |= {frame_id % 3 for frame_id in item["frame_ids"].tolist()}
        read, expected = cache.read(item["frame_ids"].tolist()), compute(item["video"])
        for name in expected:
            torch.testing.assert_close(read[name].float(), expected[name], rtol=1e-3, atol=1e-6)
    assert seen == {0, 1, 2}  # as it is, mirrored, still


def test_forms_that_are_alike_in_some_frames_alone_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "FRAMES_AT_A_TIME", 3)
    frames = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8)
    frames[:3] = frames[:3, :, :1]  # the first three are their own mirror images
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "0.mkv", frames, fps=8, codec="ffv1")
    cache = filled(tmp_path, tmp_path / "videos")
    dataset = dataset_of(tmp_path / "videos")
    for frame in range(9):
        pixels = dataset.read_variants(0, range(frame, frame + 1))[:, 0]
        read = cache.read([3 * frame + form for form in dataset.frame_variants])
        torch.testing.assert_close(read["edge"].float(), compute(pixels)["edge"], rtol=1e-3, atol=1e-3)


def test_shards_of_an_earlier_version_are_computed_again(tmp_path, corpus, caplog):
    cache = filled(tmp_path, corpus)
    path = cache.shards[0].path
    save_file(load_file(path), path, metadata={"damaged": "[]", "sha256": "0" * 64})
    assert [shard.path for shard in opened(tmp_path, corpus).missing()] == [path]
    assert "is of an earlier version" in caplog.text


def test_a_filled_cache_computes_nothing_and_reads_no_video(tmp_path, corpus, monkeypatch):
    filled(tmp_path, corpus)
    monkeypatch.setattr(ClipDataset, "video_hash", lambda *_: pytest.fail("a video was read"))
    assert opened(tmp_path, corpus).missing() == []


def test_what_it_takes_on_disk_is_as_estimated(tmp_path, corpus):
    cache = filled(tmp_path, corpus)
    size = sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors"))
    assert cache.num_bytes == 30 * 3 * (3 + 48) * 2
    # still images of 16x16 frames are the same as the frames themselves, and are kept once
    assert 0 <= size - cache.num_bytes * 2 / 3 < 500 * len(cache.shards)  # headers


@pytest.mark.parametrize(("resolution", "num_forms"), [(16, 2), (8, 3)])  # of 16: not scaled; of 8: by other filters
def test_forms_that_are_alike_are_computed_once(tmp_path, corpus, monkeypatch, resolution, num_forms):
    monkeypatch.setattr(feature_cache, "FRAMES_AT_A_TIME", 3)
    given = 0

    def means(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal given
        given += len(pixels)
        return {"mean": pixels.mean((2, 3))}

    dataset = ClipDataset(corpus, num_frames=4, window=8, resolution=resolution, num_still_images=2)
    features = FrameFeatures("means", "mean", {"mean": (3,)}, "float32")
    cache = FeatureCache(tmp_path / "cache", dataset, features, PartialState(cpu=True))
    cache.fill(cache.missing(), means)
    assert given == 30 * num_forms
    item = dataset.item(0, 1)
    torch.testing.assert_close(cache.read(item["frame_ids"].tolist())["mean"], item["video"].mean((2, 3)))


def test_only_what_is_damaged_or_new_is_computed(tmp_path, corpus, caplog):
    cache = filled(tmp_path, corpus)
    cut_off, changed, gone = (shard.path for shard in cache.shards)
    expected = {path: load(path.read_bytes()) for path in (cut_off, changed, gone)}
    cut_off.write_bytes(cut_off.read_bytes()[:-5])
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert {shard.path for shard in opened(tmp_path, corpus).missing()} == {cut_off, changed}
    assert "its hash is another" in caplog.text
    gone.unlink()
    cache = opened(tmp_path, corpus)
    assert len(cache.missing()) == 3
    cache.fill(cache.missing(), compute)
    assert all(
        torch.equal(load_file(path)[name], values[name]) for path, values in expected.items() for name in values
    )

    shutil.copy(corpus / "0.mkv", corpus / "2.mkv")  # its content is in the cache, under another name
    write_video(corpus / "3.mkv", np.zeros((8, 16, 16, 3), np.uint8), fps=8, codec="ffv1")
    missing = opened(tmp_path, corpus).missing()
    assert [shard.video for shard in missing] == [3]


def test_other_networks_sizes_and_forms_have_shards_of_their_own(tmp_path, corpus):
    filled(tmp_path, corpus)
    assert len(opened(tmp_path, corpus, FrameFeatures("colours", "other", FEATURES.shapes)).missing()) == 3
    assert len(opened(tmp_path, corpus, antialias=True).missing()) == 3
    assert len(opened(tmp_path, corpus, horizontal_flip=False).missing()) == 3
    dataset = ClipDataset(corpus, num_frames=4, window=8, resolution=8, num_still_images=2)
    assert len(FeatureCache(tmp_path / "cache", dataset, FEATURES, PartialState(cpu=True)).missing()) == 3


def test_a_computation_that_is_cut_short_goes_on(tmp_path, corpus):
    cache = opened(tmp_path, corpus)
    seen = []

    def dies(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return compute(pixels)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(cache.missing(), dies)
    assert len(opened(tmp_path, corpus).missing()) == 1
    assert not list(cache.folder.rglob(".*"))


def test_a_damaged_frame_is_left_out_of_the_training(tmp_path, corpus):
    frames = np.random.default_rng(1).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    folder = write_video(corpus / "0", frames, fps=8, codec="png")
    damaged = sorted(folder.glob("*.png"))[7]
    damaged.write_bytes(damaged.read_bytes()[:40])
    cache = filled(tmp_path, corpus)
    assert cache.damaged == {3 * 7, 3 * 7 + 1, 3 * 7 + 2}  # in all forms
    dataset = dataset_of(corpus)
    ids = [dataset.item_without_pixels(0, index, cache.damaged)["frame_ids"] for index in range(len(dataset))]
    assert not cache.damaged & set(torch.cat(ids).tolist())


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 5000))
    feature_cache.check_space(tmp_path, 5000)
    with pytest.raises(ValueError, match=r"the features of this corpus need 9.2 kB more, of which 5.0 kB are free"):
        feature_cache.check_space(tmp_path, 9180)


def test_videos_whose_files_have_the_same_names_sizes_and_times_are_told_apart(tmp_path):
    corpus = tmp_path / "videos"
    for name in ("a", "b"):
        frames = np.random.default_rng(ord(name)).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
        (corpus / name).mkdir(parents=True)
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(corpus / name / f"{i}.bmp")  # not compressed: all of one size
            os.utime(corpus / name / f"{i}.bmp", ns=(0, 0))
    filled(tmp_path, corpus)
    again = opened(tmp_path, corpus)
    assert again.missing() == []
    item = dataset_of(corpus).item(0, 0), dataset_of(corpus).item(0, 1)
    for clip in item:
        read = again.read(clip["frame_ids"].tolist())["mean"]
        torch.testing.assert_close(read.float(), compute(clip["video"])["mean"], rtol=1e-3, atol=1e-4)


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, corpus, monkeypatch):
    cache = opened(tmp_path, corpus)

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "save_file", no_space)
    with pytest.raises(
        OSError, match=r"No space left on device; what is finished stays, and the same command goes on"
    ):
        cache.fill(cache.missing(), compute)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_would_lose_too_much_is_kept_wider(dtype):
    values = torch.randn(1, 2, 8, 400, generator=torch.Generator().manual_seed(0))
    kept = compressed("x", values, dtype)
    assert str(kept["x"].dtype) == f"torch.{dtype}"
    restored = kept["x"].float() * kept.get("x.scale", torch.ones(())).float()
    error = (restored - values).square().mean().sqrt() / values.square().mean().sqrt()
    assert 0 < error < feature_cache.TOLERANCE[dtype]
    values[0, 1, :, 0] = 25  # an eight-bit step of these rows is a fifth of what the other channels are
    assert compressed("x", values, "int8")["x"].dtype == torch.float16
    assert compressed("x", values * 1e5, dtype)["x"].dtype == torch.float32  # beyond float16


def test_int8_reads_as_float16(tmp_path, corpus):
    features = FrameFeatures("colours", "edge", {"edge": (3, 16)}, "int8")
    cache = filled(tmp_path, corpus, features)
    item = dataset_of(corpus).item(0, 0)
    read = cache.read(item["frame_ids"].tolist())["edge"]
    assert read.dtype == torch.float16
    torch.testing.assert_close(read.float(), compute(item["video"])["edge"], rtol=0, atol=0.01)


def test_an_index_that_cannot_be_read_is_made_anew(tmp_path, corpus):
    cache = filled(tmp_path, corpus)
    index = json.loads((cache.folder / "index.json").read_text())
    (cache.folder / "index.json").write_text("{")
    cache = opened(tmp_path, corpus)
    assert cache.missing() == []
    cache.fill([], compute)
    assert json.loads((cache.folder / "index.json").read_text()) == index


def test_metadata_without_a_hash_is_not_trusted(tmp_path, corpus):
    cache = filled(tmp_path, corpus)
    path = cache.shards[0].path
    save_file(load_file(path), path)
    assert [shard.path for shard in opened(tmp_path, corpus).missing()] == [path]
