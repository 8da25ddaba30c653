"""Clips as a 3-D autoencoder sees them: what is drawn for each, and their latents."""

from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...data.clips import ClipDataset
from ...training.training_clips import TrainingClips
from .autoencoder_lvdm import LVDMAutoencoder
from .lvdm_loss import draw_given_mask

ENCODED_AT_A_TIME = 4  # clips


def latent_shape(autoencoder: LVDMAutoencoder, num_frames: int, resolution: int) -> tuple[int, int, int, int]:
    """The shape `(C, F', h, w)` of a clip's latents.

    Raises:
        ValueError: the autoencoder's factors do not divide the clip.
    """
    config = autoencoder.config
    if num_frames % config.temporal_factor:
        raise ValueError(
            f"--num_frames {num_frames}: expected a multiple of the autoencoder's {config.temporal_factor}."
        )
    if resolution % config.spatial_factor:
        raise ValueError(
            f"--resolution {resolution}: expected a multiple of the autoencoder's {config.spatial_factor}."
        )
    side = resolution // config.spatial_factor
    return config.latent_channels, num_frames // config.temporal_factor, side, side


class LatentClips(TrainingClips):
    """`TrainingClips` with random numbers of the shape that a 3-D autoencoder's latents have.

    An item has `video` (or what takes its place) and `class_labels` as there, and what is drawn for the clip:

    - `posterior_noise`, `noise`, `given_noise`: standard normal, float32 `(C, F', h, w)`;
    - `timestep_uniform`, `noise_level_uniform`: float32 `()` in [0, 1);
    - `label_uniform`: float32 of the shape of `class_labels`;
    - `given_mask`: booleans `(F',)`, with `given`.

    Args:
        dataset: the corpus, or encoded clips of it.
        latent_shape: `(C, F', h, w)`.
        seed: non-negative.
        stop: the number of clips in the training.
        given: probabilities that latent frames are given for prediction, and for interpolation; see `draw_given_mask`.
    """

    def __init__(
        self,
        dataset: Any,
        latent_shape: tuple[int, int, int, int],
        seed: int,
        stop: int,
        given: tuple[float, float] | None = None,
    ) -> None:
        channels, _, height, width = latent_shape
        super().__init__(dataset, (channels, height, width), seed, stop)
        self.clip_shape = latent_shape
        self.given = given

    def random_numbers(
        self, position: int, num_frames: int, class_labels: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What is drawn for the clip at `position`."""
        entropy = np.random.SeedSequence((self.seed, position, 5)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> 1))
        drawn = {name: torch.rand((), generator=generator) for name in ("timestep_uniform", "noise_level_uniform")}
        for name in ("posterior_noise", "noise", "given_noise"):
            drawn[name] = torch.randn(self.clip_shape, generator=generator)
        if class_labels is not None:
            drawn["label_uniform"] = torch.rand(class_labels.shape, generator=generator)
        if self.given is not None:
            drawn["given_mask"] = draw_given_mask(1, self.clip_shape[1], *self.given, generator)[0]
        return drawn


@torch.no_grad()
def encode_clips(autoencoder: LVDMAutoencoder, clips: torch.Tensor) -> torch.Tensor:
    """Mean and logarithm of the variance of clips' latents, float32 `(B, 2 C, F', h, w)`.

    Args:
        autoencoder: on the device of `clips`.
        clips: `(B, F, 3, H, W)` in [-1, 1].
    """
    return autoencoder.encode(clips.transpose(1, 2).to(autoencoder.dtype)).latent_dist.parameters.float()


def sample_latents(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A sample of the posterior, as the official trainer draws: `(B, 2 C, F', h, w)` and noise -> `(B, C, F', h, w)`.

    The logarithm of the variance is cut off at -30 and 20, as everywhere in diffusers.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


class EncodedClips:
    """A number of a corpus' clips, encoded once and kept in memory; takes the corpus' place in `LatentClips`.

    They are the first clips of the training on the corpus itself, mirrored or not as they come there.

    Args:
        dataset: the corpus.
        autoencoder: encodes; on its device.
        latent_shape: `(C, F', h, w)` of a clip.
        num_clips: how many; each takes `8 C F' h w` bytes.
        seed: of the training.
        num_workers: that read videos meanwhile.
        shows_progress: in the main process.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        autoencoder: LVDMAutoencoder,
        latent_shape: tuple[int, int, int, int],
        num_clips: int,
        seed: int,
        num_workers: int = 0,
        shows_progress: bool = True,
    ) -> None:
        self.dataset = dataset
        clips = LatentClips(dataset, latent_shape, seed, num_clips)
        loader = DataLoader(clips, ENCODED_AT_A_TIME, num_workers=num_workers)
        kept: dict[str, list[torch.Tensor]] = {"moments": [], "frame_ids": [], "class_labels": []}
        for batch in tqdm(loader, desc="encode", disable=not shows_progress):
            batch["moments"] = encode_clips(autoencoder, batch["video"].to(autoencoder.device)).cpu()
            for name in kept.keys() & batch.keys():
                kept[name].append(batch[name])
        self.items = {name: torch.cat(parts).share_memory_() for name, parts in kept.items() if parts}

    def __len__(self) -> int:
        return len(self.items["moments"])

    def item(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        """Clip `index`, the same in every epoch: `moments`, `frame_ids` and, where there are any, `class_labels`."""
        return {name: values[index] for name, values in self.items.items()}

    def item_without_pixels(self, epoch: int, index: int, damaged: Container[int]) -> dict[str, torch.Tensor]:
        """The same: there are no pixels in it."""
        return self.item(epoch, index)

    def frame_of(self, frame_id: int) -> tuple[str, int]:
        """See `ClipDataset.frame_of`."""
        return self.dataset.frame_of(frame_id)


def latents_of(clips: LatentClips, autoencoder: LVDMAutoencoder, count: int) -> torch.Tensor:
    """Samples of the posterior of the first `count` clips of a training, `(count, C, F', h, w)` on the CPU."""
    latents = []
    for place in range(min(count, len(clips))):
        item: dict[str, Any] = clips[place]
        moments = item.get("moments")
        if moments is None:
            moments = encode_clips(autoencoder, item["video"][None].to(autoencoder.device))[0].cpu()
        latents.append(sample_latents(moments[None], item["posterior_noise"][None]))
    return torch.cat(latents)
