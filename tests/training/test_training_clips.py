"""The sequence of clips: a function of seed and place, however it is shared out."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_endora import ClipDataset
from diffusers_endora.data.video_io import write_video
from diffusers_endora.training.training_clips import TrainingClips

LATENT_SHAPE = (4, 2, 2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ClipDataset:
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir()
        write_video(folder / label / "0.mp4", rng.integers(0, 255, (5, 16, 16, 3), dtype=np.uint8), fps=8)
    options = {"num_frames": 4, "window": 5, "resolution": 16, "num_still_images": 2, "class_labels": True}
    return ClipDataset(folder, **options, cache_gb=1)


def clips(dataset: ClipDataset, seed: int = 0, stop: int = 30) -> TrainingClips:
    return TrainingClips(dataset, LATENT_SHAPE, seed, stop)


def test_an_epoch_has_every_item_once_and_the_next_another_order(dataset):
    places = [clips(dataset).place(k) for k in range(20)]
    assert [epoch for epoch, _ in places] == [0] * 10 + [1] * 10
    first, second = ([index for _, index in places[i : i + 10]] for i in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [clips(dataset, seed=1).place(k)[1] for k in range(10)] != first


def test_an_item_is_that_of_the_dataset_with_standard_normal_noise(dataset):
    item = clips(dataset)[12]
    expected = dataset.item(*clips(dataset).place(12))
    for name, value in expected.items():
        assert torch.equal(item[name], value)
    assert item["noise"].shape == (4, 6, 2, 2)
    assert item["posterior_noise"].shape == (6, 4, 2, 2)
    assert item["label_uniform"].shape == item["class_labels"].shape == (3,)
    drawn = torch.cat([clips(dataset).random_numbers(k, 50, None)["noise"].flatten() for k in range(20)])
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    uniform = torch.stack([clips(dataset).random_numbers(k, 1, None)["timestep_uniform"] for k in range(400)])
    assert 0 <= uniform.min() < 0.02
    assert 0.98 < uniform.max() < 1


def test_workers_batches_and_the_first_place_change_nothing(dataset):
    straight = [clips(dataset)[k] for k in range(30)]
    for workers, batch_size, start in [(0, 5, 10), (2, 3, 12)]:
        loader = DataLoader(clips(dataset), batch_size, sampler=range(start, 30), num_workers=workers)
        batches = list(loader)
        for name in straight[0]:
            values = torch.cat([batch[name] for batch in batches])
            assert torch.equal(values, torch.stack([item[name] for item in straight[start:]])), name


def test_a_person_can_find_the_clip(dataset):
    description = clips(dataset).describe(13)
    epoch, index = clips(dataset).place(13)
    assert ("/a/0.mp4" if index % 2 == 0 else "/b/0.mp4") in description
    assert f"(epoch {epoch}, item {index})" in description


def test_places_beyond_the_training(dataset):
    with pytest.raises(IndexError, match="position 30: expected 0 to 29"):
        clips(dataset)[30]
