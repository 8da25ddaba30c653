"""Frozen networks that turn clips into features: what all of them share, and how one is chosen by name."""

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import nn


class FeatureExtractor(ABC):
    """A frozen network with its preprocessing: uint8 clips in, float32 features out.

    The network always sees batches of one fixed size, `units_per_forward` (a unit is a clip, or a frame where
    `per_frame`), the last one filled up with repetitions. So the features of a clip do not depend on the clips that
    come with it, nor on how a caller cuts the corpus into batches.

    Attributes:
        name: in the field's terms, such as `"i3d"`.
        outputs: name -> width. `"features"` is always there; networks that classify may add `"logits"`.
        per_frame: a row of features per frame instead of per clip.
        min_frames: shortest clip that the network takes.
        preprocessing: what is done to the pixels and which reference it follows, in one sentence. Part of `key`.
        weights: where the weights came from: the name of a file or an id on the Hub.
        weights_hash: hash of the weights, hexadecimal, see `hash_weights`.
    """

    name: str
    outputs: dict[str, int]
    per_frame: bool
    min_frames: int = 1
    preprocessing: str
    weights: str
    weights_hash: str

    def __init__(self, network: nn.Module, device: str | torch.device = "cpu", units_per_forward: int = 1):
        self.device = torch.device(device)
        self.network = network.eval().to(self.device)
        self.units_per_forward = units_per_forward

    @property
    def key(self) -> str:
        """Identifies the numbers that come out: equal keys mean the same network, weights and preprocessing."""
        mark = hashlib.sha256(f"{self.name}\n{self.weights_hash}\n{self.preprocessing}".encode()).hexdigest()
        return f"{self.name}-{mark[:16]}"

    @abstractmethod
    def forward(self, units: torch.Tensor) -> dict[str, torch.Tensor]:
        """Preprocess and run the network once.

        Args:
            units: uint8 on `device`, clips `(U, F, H, W, 3)`, or frames `(U, H, W, 3)` where `per_frame`.

        Returns:
            float32 `(U, width)` for each of `outputs`.
        """

    @torch.inference_mode()
    def __call__(self, clips: np.ndarray | torch.Tensor) -> dict[str, np.ndarray]:
        """Features of clips.

        Args:
            clips: uint8 RGB `(B, F, H, W, 3)`.

        Returns:
            float32 `(B, R, width)` for each of `outputs`; R is F where `per_frame`, else 1.

        Raises:
            ValueError: the clips are not as described or too short, or the network's output is not finite.
        """
        clips = torch.as_tensor(clips)
        if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[-1] != 3 or 0 in clips.shape:
            raise ValueError(
                f"clips: expected uint8 RGB (B, F, H, W, 3), got {clips.dtype} of shape {tuple(clips.shape)}"
            )
        num_clips, num_frames = clips.shape[:2]
        if num_frames < self.min_frames:
            raise ValueError(
                f"clips of {num_frames} frames: {self.name} needs at least {self.min_frames} frames a clip"
            )
        units = clips.flatten(0, 1) if self.per_frame else clips
        rows: dict[str, list[torch.Tensor]] = {output: [] for output in self.outputs}
        for batch in units.split(self.units_per_forward):
            filled = torch.cat([batch, batch[-1:].expand(self.units_per_forward - len(batch), *batch.shape[1:])])
            for output, values in self.forward(filled.to(self.device)).items():
                rows[output].append(values[: len(batch)].float().cpu())
        features = {output: torch.cat(values).unflatten(0, (num_clips, -1)) for output, values in rows.items()}
        for output, values in features.items():
            if not values.isfinite().all():
                raise ValueError(f"{self.name}: {output} are not finite; the weights do not fit the network")
        return {output: values.numpy() for output, values in features.items()}


def hash_weights(network: nn.Module) -> str:
    """SHA-256 over the names, shapes and values of all parameters and buffers; 64 hexadecimal digits.

    Of quantised ones, which are subclasses of tensors, the values that they stand for, and the class.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu()
        kind = "" if type(values) is torch.Tensor else f" {type(values).__name__}"
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}{kind}\n".encode())
        values = values.dequantize() if kind else values
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
    return digest.hexdigest()


def find_weights(weights: str | os.PathLike[str], network: str) -> Path:
    """A local path as it is, or a file on the Hub, `owner/name/file`, downloaded.

    Args:
        network: how the error names what the weights are for.

    Raises:
        ValueError: it is neither. (huggingface_hub's own errors are OSErrors.)
    """
    if Path(weights).is_file():
        return Path(weights)
    owner, _, rest = os.fspath(weights).partition("/")
    name, _, file = rest.partition("/")
    if owner in ("", ".", "..", "~") or not file or Path(weights).exists():
        raise ValueError(
            f"{weights}: expected the weights of {network}, a file that exists or owner/name/file on the Hub"
        )
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except HFValidationError as error:
        raise ValueError(f"{weights}: is not a file, and not owner/name/file on the Hub ({error})") from error
