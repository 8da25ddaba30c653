"""The discriminator of StyleGAN-V (Skorokhodov et al. 2022, https://arxiv.org/abs/2112.14683, section 3.2).

Reads top-down: time encoder, block, epilogue, model. It sees a few frames of a clip and how far apart they are.
"""

import math

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config

from ..whole_model import WholeModel
from .generator_stylegan_v import (
    ACTIVATION_LIMIT,
    MappingNetwork,
    channels_at,
    one_hot_labels,
    require_positive_integers,
)
from .operators import EqualizedConv2d, EqualizedLinear, minibatch_standard_deviation

# Width of the learned embedding of a time difference.
DIFFERENCE_EMBEDDING_DIM = 256

# The features of a frame are narrowed by this factor where the frames are concatenated.
FRAME_CHANNELS_DIVISOR = 2

# The size of the features that the epilogue flattens.
LAST_RESOLUTION = 4


class TimeDifferenceEncoder(nn.Module):
    """Encodes how far apart successive frames are: a learned embedding of whole frames, and sinusoids.

    Args:
        max_num_frames: differences are less than this; the sinusoids have periods from 2 times it down to about 4.
    """

    def __init__(self, max_num_frames: int):
        super().__init__()
        self.max_num_frames = max_num_frames
        self.num_frequencies = math.ceil(math.log2(max_num_frames))
        self.embedding = nn.Embedding(max_num_frames, DIFFERENCE_EMBEDDING_DIM)
        self.difference_dim = DIFFERENCE_EMBEDDING_DIM + 2 * self.num_frequencies

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """Times `(B, F)`, in frames, to `(B, (F - 1) * difference_dim)`.

        Raises:
            ValueError: for times that fall, or whose steps are not less than `max_num_frames`.
        """
        differences = times.diff(dim=1)  # (B, F - 1)
        whole = differences.round().long()
        if not ((differences >= 0) & (whole < self.max_num_frames)).all():
            raise ValueError(
                f"times with steps from {differences.min():g} to {differences.max():g} frames: expected rising times "
                f"with steps up to {self.max_num_frames - 1}."
            )
        octaves = torch.arange(self.num_frequencies, device=times.device, dtype=times.dtype)
        angles = differences[:, :, None] * (math.pi * 2**octaves / 2**self.num_frequencies)
        learned = self.embedding(whole).to(angles.dtype)
        return torch.cat([learned, angles.sin(), angles.cos()], dim=2).flatten(1)


class DiscriminatorBlock(nn.Module):
    """A residual block that halves the size (StyleGAN2, figure 7c).

    Args:
        in_channels: channels of the input.
        hidden_channels: channels between the two convolutions.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int):
        super().__init__()
        act, clamp = "leaky_relu", ACTIVATION_LIMIT
        self.conv0 = EqualizedConv2d(in_channels, hidden_channels, 3, activation=act, clamp=clamp)
        self.conv1 = EqualizedConv2d(hidden_channels, out_channels, 3, activation=act, down=2, clamp=clamp)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, bias=False, down=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H / 2, W / 2)`."""
        gain = math.sqrt(0.5)  # of two summands: keeps the variance
        return self.skip(x, gain) + self.conv1(self.conv0(x), gain)


class DiscriminatorEpilogue(nn.Module):
    """From the last features to a logit, by projection on the mapped condition where there is one.

    The projection is that of Miyato & Koyama 2018 (https://arxiv.org/abs/1802.05637).

    Args:
        in_channels: channels of the features.
        condition_dim: width of the mapped condition; 0 for none.
        hidden_dim: width of the last hidden layer.
    """

    def __init__(self, in_channels: int, condition_dim: int, hidden_dim: int):
        super().__init__()
        act = "leaky_relu"
        self.conv = EqualizedConv2d(in_channels + 1, in_channels, 3, activation=act, clamp=ACTIVATION_LIMIT)
        self.hidden = EqualizedLinear(in_channels * LAST_RESOLUTION**2, hidden_dim, activation=act)
        self.out = EqualizedLinear(hidden_dim, max(condition_dim, 1))

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """`(B, in_channels, 4, 4)` and `(B, condition_dim)` or None to logits `(B,)`."""
        x = self.conv(minibatch_standard_deviation(x))
        x = self.out(self.hidden(x.flatten(1)))
        if condition is None:
            return x.squeeze(1)
        return (x * condition).sum(dim=1) / math.sqrt(condition.shape[1])


class StyleGANVDiscriminator(WholeModel, ConfigMixin):
    """The discriminator of StyleGAN-V (https://arxiv.org/abs/2112.14683, section 3.2).

    Frames pass the first residual blocks one by one; at `concat_resolution` the features of the frames of a clip are
    concatenated along the channels. The times of the frames count by their differences alone.

    Args:
        resolution: height and width of the frames, a power of 2 larger than `concat_resolution`.
        num_frames_per_clip: frames of a clip; the official training shows 3.
        channel_base: see `StyleGANVGenerator`.
        channel_max: likewise.
        num_classes: number of class labels; None for an unconditional model.
        concat_resolution: where the frames are concatenated, a power of 2 from 8.
        num_mapping_layers: layers of the network that maps labels and time differences; 8 is the default of the
            official class and gives the published number of parameters, the official training script sets 2.
        max_num_frames: successive frames are less than this far apart.

    Raises:
        ValueError: for sizes that are not positive integers, and resolutions that do not fit.
    """

    # Images whose features are concatenated for every frame of a clip: the frame itself.
    images_per_frame = 1

    @register_to_config
    def __init__(
        self,
        resolution: int = 128,
        num_frames_per_clip: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_classes: int | None = None,
        concat_resolution: int = 16,
        num_mapping_layers: int = 8,
        max_num_frames: int = 1024,
    ):
        super().__init__()
        names = ["resolution", "num_frames_per_clip", "channel_base", "channel_max", "concat_resolution"]
        names += ["num_mapping_layers", "max_num_frames"] + (["num_classes"] if num_classes is not None else [])
        require_positive_integers(self.config, names)
        if concat_resolution < 2 * LAST_RESOLUTION or concat_resolution & (concat_resolution - 1) != 0:
            raise ValueError(
                f"concat_resolution={concat_resolution}: expected a power of 2 from {2 * LAST_RESOLUTION}."
            )
        if resolution <= concat_resolution or resolution & (resolution - 1) != 0:
            raise ValueError(
                f"resolution={resolution}: expected a power of 2 larger than concat_resolution={concat_resolution}."
            )
        if channel_base < resolution * FRAME_CHANNELS_DIVISOR:
            raise ValueError(
                f"channel_base={channel_base}: expected at least {FRAME_CHANNELS_DIVISOR} times "
                f"resolution={resolution}."
            )

        # 1. Residual blocks, of frames down to the resolution of concatenation, of clips from there
        widths = {}
        block_resolution = resolution
        while block_resolution >= LAST_RESOLUTION:
            widths[block_resolution] = channels_at(block_resolution, channel_base, channel_max)
            block_resolution //= 2
        self.from_rgb = EqualizedConv2d(3, widths[resolution], 1, activation="leaky_relu", clamp=ACTIVATION_LIMIT)
        self.frame_blocks, self.clip_blocks = nn.ModuleList(), nn.ModuleList()
        frame_channels = widths[concat_resolution] // FRAME_CHANNELS_DIVISOR
        for block_resolution in list(widths)[:-1]:
            in_channels, out_channels = widths[block_resolution], widths[block_resolution // 2]
            if block_resolution // 2 == concat_resolution:
                out_channels = frame_channels
            if block_resolution == concat_resolution:
                in_channels = frame_channels * num_frames_per_clip * self.images_per_frame
            blocks = self.frame_blocks if block_resolution > concat_resolution else self.clip_blocks
            blocks.append(DiscriminatorBlock(in_channels, widths[block_resolution], out_channels))

        # 2. The condition, of labels and time differences, and the logit
        self.time_encoder = TimeDifferenceEncoder(max_num_frames) if num_frames_per_clip > 1 else None
        condition_dim = num_classes or 0
        if self.time_encoder is not None:
            condition_dim += (num_frames_per_clip - 1) * self.time_encoder.difference_dim
        last_channels = widths[LAST_RESOLUTION]
        self.mapping = MappingNetwork(0, condition_dim, last_channels, num_mapping_layers) if condition_dim else None
        self.epilogue = self.build_epilogue(last_channels, last_channels if condition_dim else 0)

    def build_epilogue(self, in_channels: int, condition_dim: int) -> DiscriminatorEpilogue:
        """The last layers; called while the model is made, after its configuration is known."""
        return DiscriminatorEpilogue(in_channels, condition_dim, hidden_dim=in_channels)

    def check_inputs(self, frames: torch.Tensor, times: torch.Tensor) -> None:
        """Raises a ValueError of one sentence for frames or times whose shape does not fit."""
        num_frames, side = self.config.num_frames_per_clip, self.config.resolution
        if frames.ndim != 5 or tuple(frames.shape[1:]) != (num_frames, 3, side, side):
            raise ValueError(f"frames has shape {tuple(frames.shape)}: expected (B, {num_frames}, 3, {side}, {side}).")
        if tuple(times.shape) != tuple(frames.shape[:2]):
            raise ValueError(f"times has shape {tuple(times.shape)}: expected {tuple(frames.shape[:2])}.")

    def clip_features(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames `(B, F, 3, H, W)` to features of the clips `(B, C, 4, 4)`."""
        x = self.from_rgb(frames.flatten(0, 1).to(self.dtype))
        for block in self.frame_blocks:
            x = block(x)
        x = x.unflatten(0, frames.shape[:2]).flatten(1, 2)  # (B, F * C, h, w)
        for block in self.clip_blocks:
            x = block(x)
        return x

    def map_condition(self, times: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor | None:
        """Times `(B, F)` and one-hot labels `(B, num_classes)` or None to `(B, C)`; None where nothing conditions."""
        if self.mapping is None:
            return None
        parts = [] if condition is None else [condition.to(times.dtype)]
        if self.time_encoder is not None:
            parts.append(self.time_encoder(times))
        return self.mapping(None, torch.cat(parts, dim=1))

    def forward(
        self, frames: torch.Tensor, times: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            frames: `(B, F, 3, H, W)` in [-1, 1]. B is at most 4 or a multiple of 4, the groups of the minibatch
                standard deviation.
            times: `(B, F)`, the times of the frames, in frames, rising.
            class_labels: integer labels `(B,)`; None for an unconditional model.

        Returns:
            Logits `(B,)`, in float32 or more; large for real clips.

        Raises:
            ValueError: for shapes that do not fit, times that fall or lie too far apart, labels that the model does
                not have, and a batch that does not fall into groups.
        """
        self.check_inputs(frames, times)
        condition = one_hot_labels(class_labels, self.config.num_classes, frames.shape[0])
        features = self.clip_features(frames)
        # what is left is small, and done in full precision
        precision = torch.promote_types(self.dtype, torch.float32)
        with torch.autocast(frames.device.type, enabled=False):
            condition = None if condition is None else condition.to(frames.device)
            mapped = self.map_condition(times.to(frames.device, precision), condition)
            return self.epilogue(features.to(precision), mapped)
