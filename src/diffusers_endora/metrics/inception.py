"""The Inception network of FID, KID and the inception score: "inception-2015-12-05", as TensorFlow had it.

It differs from torchvision's Inception v3 in its average pools, which do not count padding, in a max pool in the last
block, in its 1008 classes and in TensorFlow 1's resize. Layers and names of parameters are those of torch-fidelity
(https://github.com/toshas/torch-fidelity, `feature_extractor_inceptionv3.py`), which torchmetrics uses, too.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .feature_extractors import FeatureExtractor, find_weights, hash_weights
from .i3d import load_torchscript

WHERE_TO_GET = (
    "torch-fidelity's weights-inception-2015-12-05-6726825d.pth (release v0.2.0 on GitHub), the "
    "same as .safetensors, or NVIDIA's inception-2015-12-05.pt"
)


class BasicConv2d(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(hidden)))


def average_pool(hidden: torch.Tensor) -> torch.Tensor:
    """3x3, the size kept, padding not counted."""
    return F.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35x35 blocks."""

    def __init__(self, in_channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(in_channels, pool_channels, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch1x1(hidden),
            self.branch5x5_2(self.branch5x5_1(hidden)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden))),
            self.branch_pool(average_pool(hidden)),
        ]
        return torch.cat(branches, dim=1)


class InceptionB(nn.Module):
    """From 35x35 to 17x17."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch3x3(hidden),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden))),
            F.max_pool2d(hidden, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class InceptionC(nn.Module):
    """17x17 blocks, their 7x7 convolutions in two steps."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        row: Any = {"kernel": (1, 7), "padding": (0, 3)}
        column: Any = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_channels, channels, 1)
        self.branch7x7_2 = BasicConv2d(channels, channels, **row)
        self.branch7x7_3 = BasicConv2d(channels, 192, **column)
        self.branch7x7dbl_1 = BasicConv2d(in_channels, channels, 1)
        self.branch7x7dbl_2 = BasicConv2d(channels, channels, **column)
        self.branch7x7dbl_3 = BasicConv2d(channels, channels, **row)
        self.branch7x7dbl_4 = BasicConv2d(channels, channels, **column)
        self.branch7x7dbl_5 = BasicConv2d(channels, 192, **row)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(hidden)))
        branches = [
            self.branch1x1(hidden),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(hidden))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(hidden)),
        ]
        return torch.cat(branches, dim=1)


class InceptionD(nn.Module):
    """From 17x17 to 8x8."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch3x3_2(self.branch3x3_1(hidden)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(hidden)))),
            F.max_pool2d(hidden, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class InceptionE(nn.Module):
    """8x8 blocks; the last one has a max pool where the others average."""

    def __init__(self, in_channels: int, is_last: bool):
        super().__init__()
        self.is_last = is_last
        row: Any = {"kernel": (1, 3), "padding": (0, 1)}
        column: Any = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, **row)
        self.branch3x3_2b = BasicConv2d(384, 384, **column)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, **row)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, **column)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        single = self.branch3x3_1(hidden)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(hidden))
        pooled = F.max_pool2d(hidden, 3, stride=1, padding=1) if self.is_last else average_pool(hidden)
        branches = [
            self.branch1x1(hidden),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)


class FIDInception(nn.Module):
    """The network; see the head of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.MaxPool_2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, is_last=False)
        self.Mixed_7c = InceptionE(2048, is_last=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled features and logits.

        Args:
            images: `(N, 3, H, W)`, values 0 to 255, any size.

        Returns:
            `(N, 2048)`, and `(N, 1008)` without the last layer's bias, as the inception score takes them.
        """
        hidden = (resize_as_tensorflow1(images.float(), 299) - 128) / 128
        for name, layer in self.named_children():
            if name != "fc":
                hidden = layer(hidden)
        features = hidden.mean(dim=(2, 3))
        return features, F.linear(features, self.fc.weight)


def resize_as_tensorflow1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resize of `(N, C, H, W)` where output pixel i samples input position `i * H / size`, not pixel centres.

    That is `tf.image.resize_bilinear(align_corners=False)` of TensorFlow 1.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        if length == size:
            continue
        position = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = position.floor().long().clamp(max=length - 1)
        weight = (position - low).view([-1, 1] if dim == 2 else [-1])
        near, far = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
        images = near + weight * (far - near)
    return images


def load_fid_inception(path: Path) -> FIDInception:
    """A `FIDInception` from a safetensors file or torch-fidelity's `.pth`.

    Raises:
        ValueError: the file is neither, or its names or shapes are not the network's.
    """
    network = FIDInception()
    try:
        safe = path.suffix == ".safetensors"
        state_dict = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                state_dict.setdefault(name, tensor)
        network.load_state_dict(state_dict)
    except Exception as error:  # safetensors and torch raise several kinds, torch's with a line per parameter
        reason = "; ".join(str(error).split("\n\t")[1:2]) or str(error).splitlines()[0]
        raise ValueError(f"{path}: does not hold the weights of the FID Inception ({reason.strip()[:200]})") from error
    return network.eval()


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features of FID and KID, and the logits of the inception score, of every frame.

    Args:
        weights: torch-fidelity's `.pth`, a `.safetensors` file with the same names, NVIDIA's network as TorchScript
            (`.pt`; it is code, and run as such), or an id on the Hub, `owner/name/file`. There is no default.
        device: where the network runs.

    Raises:
        ValueError: no weights are given, or they are not this network's.
    """

    name = "inception"
    outputs = {"features": 2048, "logits": 1008}
    per_frame = True
    preprocessing = (
        "bilinear resize of the whole frame to 299x299 as TensorFlow 1 (align_corners=False, no half-pixel centres), "
        "(x - 128) / 128; as torch-fidelity"
    )

    def __init__(self, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"):
        if weights is None:
            raise ValueError(f"FID, KID and the inception score need --inception_weights: {WHERE_TO_GET}")
        path = find_weights(weights, "the FID Inception")
        self.is_torchscript = path.suffix == ".pt"
        network = load_torchscript(path) if self.is_torchscript else load_fid_inception(path)
        if self.is_torchscript:
            self.preprocessing = "inside the TorchScript file, which takes pixels from 0 to 255"
        self.weights = os.fspath(weights)
        self.weights_hash = hash_weights(network)
        super().__init__(network, device, units_per_forward=8 if torch.device(device).type == "cpu" else 64)

    def forward(self, units: torch.Tensor) -> dict[str, torch.Tensor]:
        images = units.permute(0, 3, 1, 2)
        if not self.is_torchscript:
            features, logits = self.network(images)
            return {"features": features, "logits": logits}
        # It gives probabilities; their logarithms are logits up to a constant
        probabilities = self.network(images, no_output_bias=True)
        tiny = torch.finfo(torch.float32).tiny
        return {"features": self.network(images, return_features=True), "logits": probabilities.clamp(min=tiny).log()}
