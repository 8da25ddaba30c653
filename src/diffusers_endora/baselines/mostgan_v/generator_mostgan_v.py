"""The generator of MoStGAN-V (Shen et al. 2023, https://arxiv.org/abs/2304.02777, section 3).

StyleGAN-V (`generator_stylegan_v.py`) shows a clip's motion to its first layer alone. Here every frame has several
motion styles as well, and the filters of the larger layers each attend to those that suit them (MoStAtt). Reads
top-down: attention, layer, block, model.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config

from ..stylegan_v.generator_stylegan_v import (
    ACTIVATION_LIMIT,
    StyleGANVGenerator,
    SynthesisBlock,
    SynthesisLayer,
    require_positive_integers,
)
from ..stylegan_v.operators import LEAKY_SLOPE, EqualizedLinear, bias_act, per_sample_conv2d, upsample2d

# The layers of these resolutions attend to the motion styles (the official `mod_layers`).
MODULATED_RESOLUTIONS = (16, 32, 64, 128)


def rank_one_kernels(factors: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Outer products of one vector for each axis of a filter: input channels, rows, columns.

    Args:
        factors: `(..., C + 2 * kernel_size)`, the three vectors one after the other.
        kernel_size: side of the filters, k.

    Returns:
        `(..., C, k, k)`.
    """
    channels = factors.shape[-1] - 2 * kernel_size
    by_channel, by_row, by_column = factors.split([channels, kernel_size, kernel_size], dim=-1)
    return by_channel[..., :, None, None] * by_row[..., None, :, None] * by_column[..., None, None, :]


def motion_modulated_weights(weight: torch.Tensor, styles: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The weights of a layer for every frame: modulated by content, then by the attended motion, and demodulated.

    Each content-modulated filter is the query of an attention whose keys and values are the kernels of the motion
    styles. What it attends to, scaled to a largest magnitude of 1 in the frame and passed through a leaky ReLU `l`,
    changes the filter by a factor `1 + l(.)`. Kernels of zeros leave the filters as they are, and so do, after
    demodulation, kernels of ones.

    Args:
        weight: `(O, C, k, k)`.
        styles: factors `(N, C)` of the input channels, of the content.
        kernels: `(N, S, C, k, k)`, one for each of S motion styles.

    Returns:
        `(N, O, C, k, k)`, every filter of norm 1.
    """
    # 1. Scores (N, O, S). The content's factors may as well scale the keys, which are fewer than the filters.
    keys = (kernels * styles[:, None, :, None, None]).flatten(2)
    scores = (keys @ weight.flatten(1).t()).transpose(1, 2) / math.sqrt(weight[0].numel())

    # 2. The attended kernels (N, O, C, k, k), as changes of the filters
    attended = scores.softmax(dim=2) @ kernels.flatten(2)
    largest = attended.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-8)
    changes = F.leaky_relu(attended / largest, LEAKY_SLOPE).view(-1, *weight.shape)

    # 3. The weights (N, O, C, k, k)
    weights = weight * styles[:, None, :, None, None] * (1 + changes)
    return weights * (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()


class MotionSynthesisLayer(SynthesisLayer):
    """A synthesis layer whose filters attend to motion styles (MoStAtt).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        w_dim: width of the code that modulates it.
        motion_style_dim: width of a motion style.
        up: 1, or 2 to double the size of the image first.
    """

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, motion_style_dim: int, up: int = 1):
        super().__init__(in_channels, out_channels, w_dim, up)
        self.hypernet = EqualizedLinear(motion_style_dim, in_channels + 2 * self.weight.shape[2], bias_init=1.0)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, w: torch.Tensor, motion_styles: torch.Tensor
    ) -> torch.Tensor:
        """Features `(N, in_channels, H, W)`, codes `(N, w_dim)` and motion styles `(N, S, motion_style_dim)` to
        `(N, out_channels, H * up, W * up)`."""
        with torch.autocast(x.device.type, enabled=False):  # norms and attention, in the precision of the codes
            factors = self.hypernet(motion_styles.flatten(0, 1)).unflatten(0, motion_styles.shape[:2])
            kernels = rank_one_kernels(factors, self.weight.shape[2])
            weights = motion_modulated_weights(self.weight.to(w.dtype), self.affine(w), kernels)
        x = per_sample_conv2d(x, weights.to(x.dtype), self.taps, self.up)
        return bias_act(x, self.bias, "leaky_relu", clamp=ACTIVATION_LIMIT)


class MotionSynthesisBlock(SynthesisBlock):
    """The layers of one resolution, which attend to motion styles, and the image so far.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        w_dim: width of the code that modulates the layers.
        motion_style_dim: width of a motion style.
    """

    conv0: MotionSynthesisLayer

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, motion_style_dim: int):
        super().__init__(in_channels, out_channels, w_dim, is_first=False)
        self.conv0 = MotionSynthesisLayer(in_channels, out_channels, w_dim, motion_style_dim, up=2)
        self.conv1 = MotionSynthesisLayer(out_channels, out_channels, w_dim, motion_style_dim)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, image: torch.Tensor, w: torch.Tensor, motion_styles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: features `(N, in_channels, H, W)`.
            image: `(N, 3, H, W)`.
            w: `(N, w_dim)`.
            motion_styles: `(N, S, motion_style_dim)`.

        Returns:
            Features `(N, out_channels, 2 H, 2 W)` and the image `(N, 3, 2 H, 2 W)`.
        """
        x = self.conv0(x, w, motion_styles)
        x = self.conv1(x, w, motion_styles)
        return x, upsample2d(image, self.taps) + self.to_rgb(x, w)


class MoStGANVGenerator(StyleGANVGenerator):
    """The generator of MoStGAN-V (https://arxiv.org/abs/2304.02777, section 3).

    That of StyleGAN-V with motion styles, which a network of two layers makes of a frame's content and motion codes,
    and which the filters of the layers at 16 to 128 pixels attend to. Called as `StyleGANVGenerator` is.

    The defaults are those of the official configuration (https://github.com/xiaoqian-shen/MoStGAN-V), at 128 pixels.
    In it, training leaves the motion styles out of the weights themselves and has them in the demodulation alone,
    unlike synthesis in full precision, and unlike the paper; here they modulate the weights in both.

    Args:
        resolution: height and width of the frames, a power of 2 from 16.
        num_frames: frames of a clip where a pipeline is given no other number; not a limit.
        z_dim: see `StyleGANVGenerator`, as for all that follow to `max_num_frames`.
        w_dim: likewise.
        num_mapping_layers: likewise.
        channel_base: likewise.
        channel_max: likewise.
        num_classes: likewise.
        motion_z_dim: likewise.
        motion_code_dim: likewise.
        motion_z_distance: likewise.
        motion_kernel_size: likewise.
        num_frequencies: likewise.
        max_period: likewise.
        max_num_frames: likewise.
        num_motion_styles: motion styles of a frame.
        motion_style_dim: width of a motion style.

    Raises:
        ValueError: for sizes that are not positive integers, and a resolution that is no power of 2 from 16.
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 128,
        num_frames: int = 16,
        z_dim: int = 512,
        w_dim: int = 512,
        num_mapping_layers: int = 2,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_classes: int | None = None,
        motion_z_dim: int = 512,
        motion_code_dim: int = 512,
        motion_z_distance: int = 16,
        motion_kernel_size: int = 11,
        num_frequencies: int = 256,
        max_period: int = 1024,
        max_num_frames: int = 1024,
        num_motion_styles: int = 8,
        motion_style_dim: int = 128,
    ):
        require_positive_integers(self.config, ["resolution", "num_motion_styles", "motion_style_dim"])
        if resolution < MODULATED_RESOLUTIONS[0]:
            raise ValueError(f"resolution={resolution}: expected a power of 2 from {MODULATED_RESOLUTIONS[0]}.")
        super().__init__(
            resolution=resolution,
            num_frames=num_frames,
            z_dim=z_dim,
            w_dim=w_dim,
            num_mapping_layers=num_mapping_layers,
            channel_base=channel_base,
            channel_max=channel_max,
            num_classes=num_classes,
            motion_z_dim=motion_z_dim,
            motion_code_dim=motion_code_dim,
            motion_z_distance=motion_z_distance,
            motion_kernel_size=motion_kernel_size,
            num_frequencies=num_frequencies,
            max_period=max_period,
            max_num_frames=max_num_frames,
        )
        hidden_dim = num_motion_styles * w_dim
        self.motion_style_mapping = nn.Sequential(
            EqualizedLinear(w_dim + 2 * num_frequencies, hidden_dim, activation="leaky_relu"),
            EqualizedLinear(hidden_dim, num_motion_styles * motion_style_dim),
        )

    def build_block(self, in_channels: int, out_channels: int, block_resolution: int) -> nn.Module:
        """The synthesis block of a resolution, with attention to motion styles at 16 to 128 pixels."""
        if block_resolution not in MODULATED_RESOLUTIONS:
            return super().build_block(in_channels, out_channels, block_resolution)
        return MotionSynthesisBlock(in_channels, out_channels, self.config.w_dim, self.config.motion_style_dim)

    def motion_styles(self, w: torch.Tensor, motion_codes: torch.Tensor) -> torch.Tensor:
        """Codes `(N, w_dim)` and motion codes `(N, 2 * num_frequencies)` to `(N, S, motion_style_dim)`.

        The official network does so for every layer, with the same result: only style mixing, which its
        configuration does not use, gives the layers different codes.
        """
        styles = self.motion_style_mapping(torch.cat([w, motion_codes], dim=1))
        return styles.unflatten(1, (self.config.num_motion_styles, self.config.motion_style_dim))

    def synthesize(self, w: torch.Tensor, motion_codes: torch.Tensor) -> torch.Tensor:
        """Codes `(N, w_dim)` and motion codes `(N, 2 * num_frequencies)` of N frames to the frames `(N, 3, H, W)`."""
        with torch.autocast(w.device.type, enabled=False):
            motion_styles = self.motion_styles(w, motion_codes)
        x, image = self.blocks[0](self.first_features(motion_codes), None, w)
        for block in self.blocks[1:]:
            if isinstance(block, MotionSynthesisBlock):
                x, image = block(x, image, w, motion_styles)
            else:
                x, image = block(x, image, w)
        return image
