"""The autoencoder of LVDM (He et al. 2022, https://arxiv.org/abs/2211.13221, section 3.1): clips to 3-D latents.

Reads top-down: convolutions, residual block, encoder, decoder, model. The architecture is that of the official code
(https://github.com/YingqingHe/LVDM, `lvdm/models/autoencoder3d.py`), which took it from TATS.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from ..whole_model import WholeModel


def same_padding(kernel_size: int, stride: tuple[int, int, int]) -> tuple[int, ...]:
    """What `F.pad` adds so that a convolution divides every dimension by exactly its stride, last dimension first.

    Where the sum is odd, the larger part comes before the first element.
    """
    total = [kernel_size - step for step in reversed(stride)]
    return tuple(side for amount in total for side in (amount - amount // 2, amount // 2))


class LVDMConv3d(nn.Module):
    """A 3-D convolution on edges that are repeated outwards: `(B, C, F, H, W)` to sizes divided by `stride`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: tuple[int, int, int] = (1, 1, 1)
    ):
        super().__init__()
        self.padding = same_padding(kernel_size, stride)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden_states, self.padding, mode="replicate"))


class LVDMConvTranspose3d(nn.Module):
    """A transposed 3-D convolution on repeated edges: `(B, C, F, H, W)` to sizes multiplied by `stride`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: tuple[int, int, int]):
        super().__init__()
        self.padding = same_padding(kernel_size, stride)
        self.conv = nn.ConvTranspose3d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size - 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden_states, self.padding, mode="replicate"))


class LVDMAutoencoderResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and the input added."""

    def __init__(self, channels: int, norm_num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.conv1 = LVDMConv3d(channels, channels, 3)
        self.norm2 = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.conv2 = LVDMConv3d(channels, channels, 3)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        return hidden_states + self.conv2(F.silu(self.norm2(residual)))


class LVDMEncoderBlock(nn.Module):
    """A strided convolution and one residual block."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int], norm_num_groups: int):
        super().__init__()
        self.down = LVDMConv3d(in_channels, out_channels, 4, stride)
        self.res = LVDMAutoencoderResBlock(out_channels, norm_num_groups)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.res(self.down(hidden_states))


class LVDMDecoderBlock(nn.Module):
    """A strided transposed convolution and two residual blocks."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int], norm_num_groups: int):
        super().__init__()
        self.up = LVDMConvTranspose3d(in_channels, out_channels, 4, stride)
        self.res1 = LVDMAutoencoderResBlock(out_channels, norm_num_groups)
        self.res2 = LVDMAutoencoderResBlock(out_channels, norm_num_groups)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.res2(self.res1(self.up(hidden_states)))


class LVDMEncoder(nn.Module):
    """Clips `(B, in_channels, F, H, W)` to moments `(B, out_channels, F / f_t, H / f_s, W / f_s)`.

    Every block halves height and width, the first `log2(f_t)` blocks also the frames, and every block doubles the
    channels.
    """

    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base_channels: int,
        strides: list[tuple[int, int, int]],
        norm_num_groups: int,
    ):
        super().__init__()
        self.conv_in = LVDMConv3d(in_channels, base_channels, 3)
        widths = [base_channels * 2**level for level in range(len(strides) + 1)]
        self.blocks = nn.ModuleList(
            [
                LVDMEncoderBlock(widths[level], widths[level + 1], stride, norm_num_groups)
                for level, stride in enumerate(strides)
            ]
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = LVDMConv3d(widths[-1], out_channels, 3)
        self.gradient_checkpointing = False

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(clip)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class LVDMDecoder(nn.Module):
    """Latents `(B, in_channels, f, h, w)` to clips `(B, out_channels, f * f_t, h * f_s, w * f_s)`.

    The blocks are as many as the encoder's and narrow from `2^n base_channels` to `2 base_channels`. As in the
    official code the first blocks double the frames, and no norm comes before the last convolution.
    """

    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base_channels: int,
        strides: list[tuple[int, int, int]],
        norm_num_groups: int,
    ):
        super().__init__()
        widths = [base_channels * 2**level for level in range(len(strides), 0, -1)]
        self.blocks = nn.ModuleList(
            [
                LVDMDecoderBlock(
                    in_channels if level == 0 else widths[level - 1], widths[level], stride, norm_num_groups
                )
                for level, stride in enumerate(strides)
            ]
        )
        self.conv_out = LVDMConv3d(widths[-1], out_channels, 3)
        self.gradient_checkpointing = False

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = latents
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return self.conv_out(hidden_states)


class LVDMLatentDistribution(DiagonalGaussianDistribution):
    """diffusers' diagonal Gaussian, whose divergence sums over all dimensions of 5-D latents."""

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> torch.Tensor:
        """The divergence from `other`, by default from the standard normal, `(B,)`."""
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean).square() / other.var + self.var / other.var - 1.0
            terms = terms - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)


class LVDMAutoencoder(WholeModel, ConfigMixin):
    """The 3-D convolutional autoencoder of LVDM.

    The defaults are the official ones for sky, taichi, UCF-101 and endoscopy (`configs/videoae/sky.yaml`; Endora's
    `Other-Methods/LVDM/configs/videoae/col.yaml`): 16 frames of 128x128 become 4 latent frames of 16x16.

    Args:
        in_channels: channels of a clip.
        latent_channels: channels of the latents.
        base_channels: width before the first block; every block doubles it.
        temporal_factor: frames per latent frame, a power of two up to `spatial_factor`.
        spatial_factor: pixels per side of a latent, a power of two from 2.
        norm_num_groups: groups of every GroupNorm; divides `2 * base_channels`.

    Raises:
        ValueError: for sizes that are not positive, factors that are not such powers of two, or groups that do not
            divide the channels.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LVDMEncoderBlock", "LVDMDecoderBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        base_channels: int = 32,
        temporal_factor: int = 4,
        spatial_factor: int = 8,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        for name in ("in_channels", "latent_channels", "base_channels", "norm_num_groups"):
            if not isinstance(self.config[name], int) or self.config[name] < 1:
                raise ValueError(f"{name}={self.config[name]}: expected a positive integer.")
        for name, smallest in {"temporal_factor": 1, "spatial_factor": 2}.items():
            factor = self.config[name]
            if not isinstance(factor, int) or factor < smallest or factor & (factor - 1) != 0:
                raise ValueError(f"{name}={factor}: expected a power of two from {smallest}.")
        if temporal_factor > spatial_factor:
            raise ValueError(
                f"temporal_factor={temporal_factor}: expected at most spatial_factor={spatial_factor}, as every block "
                "halves height and width."
            )
        if (2 * base_channels) % norm_num_groups != 0:
            raise ValueError(
                f"norm_num_groups={norm_num_groups}: expected a divisor of 2 * base_channels={2 * base_channels}."
            )
        num_blocks, num_temporal_blocks = spatial_factor.bit_length() - 1, temporal_factor.bit_length() - 1
        strides = [(2 if level < num_temporal_blocks else 1, 2, 2) for level in range(num_blocks)]

        self.encoder = LVDMEncoder(in_channels, 2 * latent_channels, base_channels, strides, norm_num_groups)
        self.quant_conv = nn.Conv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(latent_channels, latent_channels, 1)
        self.decoder = LVDMDecoder(latent_channels, in_channels, base_channels, strides, norm_num_groups)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, at which the adversarial loss is weighed."""
        return self.get_parameter("decoder.conv_out.conv.weight")

    def encode(self, clip: torch.Tensor, return_dict: bool = True) -> Any:
        """
        Args:
            clip: `(B, in_channels, F, H, W)` in [-1, 1]; F a multiple of `temporal_factor`, H and W of
                `spatial_factor`.
            return_dict: False for a tuple.

        Returns:
            `AutoencoderKLOutput` whose `latent_dist` is a diagonal Gaussian of latents
            `(B, latent_channels, F / temporal_factor, H / spatial_factor, W / spatial_factor)`.

        Raises:
            ValueError: for another shape.
        """
        config = self.config
        shape = tuple(clip.shape)
        if len(shape) != 5 or shape[0] < 1 or shape[1] != config.in_channels:
            raise ValueError(f"clip has shape {shape}: expected (batch, {config.in_channels}, frames, height, width).")
        factors = {"frames": config.temporal_factor, "height": config.spatial_factor, "width": config.spatial_factor}
        for (name, factor), size in zip(factors.items(), shape[2:], strict=True):
            if size < 1 or size % factor != 0:
                raise ValueError(f"clip has {name} {size} in shape {shape}: expected a positive multiple of {factor}.")
        latent_dist = LVDMLatentDistribution(self.quant_conv(self.encoder(clip)))
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        """
        Args:
            latents: `(B, latent_channels, f, h, w)` of any size.
            return_dict: False for a tuple.

        Returns:
            `DecoderOutput` whose `sample` is `(B, in_channels, f * temporal_factor, h * spatial_factor,
            w * spatial_factor)`, in about [-1, 1].

        Raises:
            ValueError: for another shape.
        """
        shape = tuple(latents.shape)
        if len(shape) != 5 or min(shape) < 1 or shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents has shape {shape}: expected (batch, {self.config.latent_channels}, frames, height, width)."
            )
        sample = self.decoder(self.post_quant_conv(latents))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encodes and decodes, with the arguments of diffusers' `AutoencoderKL`.

        Args:
            sample: a clip, as in `encode`.
            sample_posterior: decode a sample, drawn by `generator`, rather than the mode.
            return_dict: False for a tuple `(reconstruction,)`.

        Returns:
            `DecoderOutput` whose `sample` has the clip's shape.
        """
        latent_dist = self.encode(sample).latent_dist
        latents = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return self.decode(latents, return_dict=return_dict)
