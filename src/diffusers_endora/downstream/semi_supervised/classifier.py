"""Classifiers of clips: a small one for training from nothing, and those of `transformers`."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

IMAGE_PROCESSOR = "preprocessor_config.json"


class ResidualBlock(nn.Module):
    """A (2+1)D convolution, over space, then time, beside a projection (https://arxiv.org/abs/1711.11248)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(in_channels, out_channels, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
        self.spatial_norm = nn.GroupNorm(norm_groups, out_channels)
        self.temporal = nn.Conv3d(out_channels, out_channels, (3, 1, 1), 1, (1, 0, 0), bias=False)
        self.temporal_norm = nn.GroupNorm(norm_groups, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1, (1, 2, 2), bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(B, C, F, H, W)` to `(B, C', F, H/2, W/2)`."""
        branch = F.relu(self.spatial_norm(self.spatial(hidden)))
        branch = self.temporal_norm(self.temporal(branch))
        return F.relu(branch + self.shortcut(hidden))


class SmallVideoClassifier(ModelMixin, ConfigMixin):
    """A (2+1)D residual network of 0.17 M parameters, for a few dozen clips and a CPU.

    Groups are normalised, not batches: labelled, weak and strong views have different statistics. Of each frame the
    largest response counts, wherever it is: what is to be found may be small.

    Args:
        num_classes: K.
        channels: after the first convolution, then of each block; multiples of `norm_groups`. Each halves height and
            width.
    """

    @register_to_config
    def __init__(
        self, num_classes: int = 2, channels: tuple[int, ...] = (16, 32, 64, 128), norm_groups: int = 8
    ) -> None:
        super().__init__()
        first, *others = channels
        self.stem = nn.Conv3d(3, first, (1, 5, 5), stride=(1, 2, 2), padding=(0, 2, 2), bias=False)
        self.stem_norm = nn.GroupNorm(norm_groups, first)
        pairs = zip(channels, others, strict=False)
        self.blocks = nn.ModuleList(ResidualBlock(before, after, norm_groups) for before, after in pairs)
        self.head = nn.Linear(channels[-1], num_classes)
        self.to(memory_format=torch.channels_last_3d)  # 1.4 times as fast on a CPU

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `(B, F, 3, H, W)` in [-1, 1] to logits `(B, K)`."""
        hidden = clips.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        hidden = F.relu(self.stem_norm(self.stem(hidden)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.amax(dim=(3, 4)).mean(dim=2))


class TransformersClassifier(nn.Module):
    """A classifier of `transformers` behind the layout and range of this package.

    A video classifier (VideoMAE, TimeSformer, ViViT) gets the clip; an image classifier (ViT) gets every frame, and
    the logits of the frames are averaged. Frames are resized to the size that it is made for, and normalised as its
    `preprocessor_config.json` says, else to [-1, 1].

    Args:
        network: of `AutoModelForVideoClassification` or `AutoModelForImageClassification`.
        takes_clips: whether it is the former.
        mean, std: of each channel, of pixels in [0, 1].
    """

    def __init__(
        self,
        network: Any,
        takes_clips: bool,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.network = network
        self.takes_clips = takes_clips
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `(B, F, 3, H, W)` in [-1, 1] to logits `(B, K)`."""
        side = self.network.config.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        frames = clips.flatten(0, 1)
        if frames.shape[2:] != size:
            frames = F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = ((frames + 1) / 2 - mean) / std
        if self.takes_clips:
            return self.network(pixels.unflatten(0, clips.shape[:2])).logits
        return self.network(pixels).logits.unflatten(0, clips.shape[:2]).mean(dim=1)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the network, as safetensors, and its normalisation; `load_classifier` reads them."""
        self.network.save_pretrained(folder)
        facts = {"image_mean": self.mean, "image_std": self.std}
        (Path(folder) / IMAGE_PROCESSOR).write_text(json.dumps(facts, indent=2))


def load_classifier(name: str | os.PathLike[str], num_frames: int, num_classes: int = 2) -> nn.Module:
    """A classifier of clips of `num_frames` frames, from a folder or the Hub.

    Weights of another number of classes keep everything but the last layer, which begins anew, as does the head of a
    network without one.

    Args:
        name: what `SmallVideoClassifier` or `TransformersClassifier` saved, or a folder or id of a video or image
            classifier of `transformers` or of the network in it.

    Raises:
        ValueError: it does not load, or is made for clips of another length.
    """
    if is_small(name):
        classifier = SmallVideoClassifier.from_pretrained(name)
        if classifier.config.num_classes != num_classes:
            classifier.head = nn.Linear(classifier.head.in_features, num_classes)
            classifier.register_to_config(num_classes=num_classes)
        return classifier
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForVideoClassification
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    )

    try:
        config = AutoConfig.from_pretrained(name)
        takes_clips = config.model_type in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES
        if not takes_clips and config.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            raise ValueError(f"its model_type is {config.model_type!r}")
        if not getattr(config, "image_size", None):
            raise ValueError(f"{config.model_type!r} does not say its image_size")
        auto_class = AutoModelForVideoClassification if takes_clips else AutoModelForImageClassification
        network = auto_class.from_pretrained(name, num_labels=num_classes, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name}: does not load as a video or image classifier of transformers ({reason})."
        ) from error
    if takes_clips and getattr(config, "num_frames", num_frames) != num_frames:
        raise ValueError(f"{name}: takes clips of {config.num_frames} frames; add --num_frames {config.num_frames}.")
    facts = normalisation_of(name)
    return TransformersClassifier(network, takes_clips, **facts)


def is_small(name: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a `SmallVideoClassifier`.

    Raises:
        ValueError: its `config.json` is none.
    """
    path = Path(name) / "config.json"
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected json ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected the config of a model, got {str(config)[:80]}.")
    return config.get("_class_name") == SmallVideoClassifier.__name__


def normalisation_of(name: str | os.PathLike[str]) -> dict[str, Any]:
    """`mean` and `std` in the `preprocessor_config.json` of a folder or of a model on the Hub; empty without one."""
    from transformers.utils import cached_file

    path = cached_file(
        os.fspath(name),
        IMAGE_PROCESSOR,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    facts = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    return {key: facts[f"image_{key}"] for key in ("mean", "std") if facts.get(f"image_{key}") is not None}
