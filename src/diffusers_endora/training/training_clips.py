"""The sequence of clips that a training sees, with the random numbers of each."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.clips import ClipDataset
from .feature_cache import FeatureCache


class TrainingClips(Dataset[dict[str, Any]]):
    """Item `k` is the k-th clip of the training: what it shows and what is drawn for it.

    Epochs follow each other without a seam: item `k` is item `permutation[k % n]` of epoch `k // n` of a dataset of
    `n`, each epoch in an order of its own. An item, its random numbers included, is a function of seed and `k`. Clips
    shared out among processes, batches and accumulated micro-batches in whatever way therefore make the same step,
    and a training goes on where it stopped by going on at its `k`.

    An item has

    - `video`, `frame_ids` and, of a dataset with labels, `class_labels`, as `ClipDataset` gives them; with caches, in
      place of `video`, what they keep of its frames, `(F, ...)` each;
    - `position`: `k`;
    - `timestep_uniform`: float32 `()` in [0, 1), which the timestep is made from;
    - `label_uniform`: float32 of the shape of `class_labels`, which decides whether a label is dropped;
    - `noise` and `posterior_noise`: standard normal, float32 `(C, F, h, w)` and `(F, C, h, w)`.

    Args:
        dataset: the corpus.
        latent_shape: `(C, h, w)`.
        seed: non-negative.
        stop: the number of clips in the training.
        caches: filled; what is read instead of pixels; with none, `video` is.
        reads_pixels: whether `video` is there beside what caches keep.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        latent_shape: tuple[int, int, int],
        seed: int,
        stop: int,
        caches: tuple[FeatureCache, ...] = (),
        reads_pixels: bool = True,
    ) -> None:
        self.dataset = dataset
        self.latent_shape = latent_shape
        self.seed = seed
        self.stop = stop
        self.caches = caches
        self.reads_pixels = reads_pixels
        self._damaged = frozenset().union(*(cache.damaged for cache in caches))
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # an epoch and its permutation

    def __len__(self) -> int:
        return self.stop

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position}: expected 0 to {len(self) - 1}")
        epoch, place = self.place(position)
        if self.reads_pixels:
            item = self.dataset.item(epoch, place)
        else:
            item = self.dataset.item_without_pixels(epoch, place, self._damaged)
        for cache in self.caches:
            item |= cache.read(item["frame_ids"].tolist())
        item["position"] = torch.tensor(position)
        return item | self.random_numbers(position, len(item["frame_ids"]), item.get("class_labels"))

    def place(self, position: int) -> tuple[int, int]:
        """Epoch and index in the dataset of the clip at `position`."""
        epoch, k = divmod(position, len(self.dataset))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, 2))
            self._order = (epoch, rng.permutation(len(self.dataset)))
        return epoch, int(self._order[1][k])

    def random_numbers(
        self, position: int, num_frames: int, class_labels: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What is drawn for the clip at `position`."""
        generator = torch.Generator().manual_seed(_seed_of(self.seed, position))
        channels, height, width = self.latent_shape
        drawn = {
            "timestep_uniform": torch.rand((), generator=generator),
            "noise": torch.randn(channels, num_frames, height, width, generator=generator),
            "posterior_noise": torch.randn(num_frames, *self.latent_shape, generator=generator),
        }
        if class_labels is not None:
            drawn["label_uniform"] = torch.rand(class_labels.shape, generator=generator)
        return drawn

    def describe(self, position: int) -> str:
        """Which clip that was, for a person: `video a/1.mp4 from frame 12 (epoch 0, item 7)`."""
        epoch, place = self.place(position)
        first = int(self.dataset.item_without_pixels(epoch, place, frozenset())["frame_ids"][0])
        name, frame = self.dataset.frame_of(first)
        return f"{name} from frame {frame} (epoch {epoch}, item {place})"


def batches_from(
    clips: TrainingClips, first: int, batch_size: int, num_workers: int, accelerator: Any
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of this process from the clip at position `first` on, on its device."""
    loader = DataLoader(
        clips,
        batch_size=batch_size,
        sampler=range(first, len(clips)),
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=2 if num_workers else None,
    )
    return iter(accelerator.prepare_data_loader(loader))


def _seed_of(seed: int, position: int) -> int:
    return int(np.random.SeedSequence((seed, position, 3)).generate_state(1, np.uint64)[0] >> 1)
