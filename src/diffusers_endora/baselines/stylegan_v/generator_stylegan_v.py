"""The generator of StyleGAN-V (Skorokhodov et al. 2022, https://arxiv.org/abs/2112.14683, section 3.1).

Reads top-down: mapping network, time encoder, motion encoder, synthesis layers and block, model. A video is a
continuous signal: every frame is synthesised by itself, from the content code of the clip and the motion code of its
time, which may be any non-negative real number.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..whole_model import WholeModel
from .operators import (
    EqualizedConv1d,
    EqualizedLinear,
    bias_act,
    fir_taps,
    modulated_conv2d,
    normalize_second_moment,
    upsample2d,
)

# Limit on the magnitude of activations, which keeps half precision from overflowing (the official `conv_clamp`).
ACTIVATION_LIMIT = 256.0

# Learning rate of the mapping network and of the motion convolutions, relative to the rest.
MAPPING_LR_MULTIPLIER = 0.01

# Share of the former mean that the running mean of w keeps at every batch.
MEAN_W_DECAY = 0.995

# The size at which synthesis begins.
FIRST_RESOLUTION = 4


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """Channels of the features at a resolution: `channel_base / resolution`, at most `channel_max`."""
    return min(channel_base // resolution, channel_max)


def require_positive_integers(config: dict, names: list[str]) -> None:
    """Raises a ValueError of one sentence for the first of the named settings that is not a positive integer."""
    for name in names:
        if isinstance(config[name], bool) or not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name}={config[name]}: expected a positive integer.")


def one_hot_labels(class_labels: torch.Tensor | None, num_classes: int | None, batch_size: int) -> torch.Tensor | None:
    """Labels `(B,)` as rows `(B, num_classes)` in float32; None for an unconditional model.

    Raises:
        ValueError: for labels given to an unconditional model, missing ones, another shape than `(B,)`, and labels
            that the model does not have.
    """
    if num_classes is None:
        if class_labels is not None:
            raise ValueError("class_labels were given: this model is unconditional (num_classes=None).")
        return None
    if class_labels is None:
        raise ValueError(f"class_labels=None: expected labels from 0 to {num_classes - 1}.")
    if tuple(class_labels.shape) != (batch_size,):
        raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}: expected ({batch_size},).")
    if class_labels.min() < 0 or class_labels.max() >= num_classes:
        raise ValueError(f"class_labels={class_labels.tolist()}: expected labels from 0 to {num_classes - 1}.")
    return F.one_hot(class_labels.long(), num_classes).float()


class MappingNetwork(nn.Module):
    """Maps a latent, a condition, or both, to a code of another width (StyleGAN2, figure 2).

    Args:
        z_dim: width of the latent; 0 for none.
        condition_dim: width of the condition, which is embedded linearly; 0 for none.
        out_dim: width of the layers and of the code.
        num_layers: number of layers.
    """

    def __init__(self, z_dim: int, condition_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        self.embed = EqualizedLinear(condition_dim, out_dim) if condition_dim > 0 else None
        in_dim = z_dim + (out_dim if condition_dim > 0 else 0)
        self.layers = nn.ModuleList(
            EqualizedLinear(
                out_dim if layer > 0 else in_dim,
                out_dim,
                activation="leaky_relu",
                lr_multiplier=MAPPING_LR_MULTIPLIER,
            )
            for layer in range(num_layers)
        )

    def forward(self, z: torch.Tensor | None, condition: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, z_dim)` and `(B, condition_dim)`, None where there is none, to `(B, out_dim)`."""
        inputs = [] if z is None else [normalize_second_moment(z)]
        if self.embed is not None and condition is not None:
            inputs.append(normalize_second_moment(self.embed(condition)))
        x = torch.cat(inputs, dim=1)
        for layer in self.layers:
            x = layer(x)
        return x


class AlignedTimeEncoder(nn.Module):
    """The acyclic positional encoding of time (section 3.1).

    Sinusoids whose periods and phases follow from the code of the anchor on the left; from them their own linear
    interpolation between the two anchors is taken, and that of a projection of the anchors' codes is added. At an
    anchor the encoding is that projection, whatever the side from which time comes, so that it is continuous.

    Args:
        code_dim: width of the codes at the anchors.
        num_frequencies: number of sinusoids; the encoding is twice as wide.
        min_period: the shortest period at initialisation, in frames.
        max_period: the longest one.
    """

    def __init__(self, code_dim: int, num_frequencies: int, min_period: float, max_period: float):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.min_period = min_period
        self.max_period = max_period
        # No biases: with them the encodings would be free to ignore the codes.
        self.period_predictor = EqualizedLinear(code_dim, num_frequencies, bias=False)
        self.phase_predictor = EqualizedLinear(code_dim, num_frequencies, bias=False)
        self.anchor_predictor = EqualizedLinear(code_dim, 2 * num_frequencies, bias=False)

    def frequencies(self) -> torch.Tensor:
        """Angular frequencies `(num_frequencies,)` in radians per frame, rising, of logarithmically spaced periods."""
        exponents = torch.linspace(
            math.log2(self.max_period), math.log2(self.min_period), self.num_frequencies, dtype=torch.float64
        )
        return 2 * math.pi / 2**exponents

    def forward(
        self, times: torch.Tensor, left_times: torch.Tensor, distance: float, left: torch.Tensor, right: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            times: `(N,)` in frames.
            left_times: `(N,)`, the times of the anchors on the left.
            distance: frames from one anchor to the next.
            left: `(N, code_dim)`, the codes of the anchors on the left.
            right: those on the right.

        Returns:
            `(N, 2 * num_frequencies)`.
        """
        # 1. The sinusoids, as functions of time; the phase is in turns of the longest period
        frequencies = self.frequencies().to(left)
        speeds = frequencies * (torch.tanh(self.period_predictor(left)) + 1)
        shifts = self.phase_predictor(left) * (frequencies * self.max_period / (2 * math.pi))

        def sinusoids(at: torch.Tensor) -> torch.Tensor:
            angles = speeds * at[:, None] + shifts
            return torch.cat([angles.sin(), angles.cos()], dim=1)

        # 2. Less their interpolation between the anchors, plus that of the anchors' own vectors
        share = ((times - left_times) / distance)[:, None]
        interpolated = torch.lerp(sinusoids(left_times), sinusoids(left_times + distance), share)
        anchors = torch.lerp(self.anchor_predictor(left), self.anchor_predictor(right), share)
        return sinusoids(times) - interpolated + anchors


class MotionEncoder(nn.Module):
    """Turns motion noise at anchors into a motion code at every time (section 3.1).

    Noise `z_0, z_1, ...` at anchors `distance` frames apart passes two convolutions along time without padding, so
    that a code depends on the noise near its anchor and nothing ever ends; see `AlignedTimeEncoder` for the rest.

    Args:
        z_dim: width of the noise.
        code_dim: width of the codes at the anchors.
        condition_dim: width of a condition appended to the noise at every anchor; 0 for none.
        kernel_size: length of the convolutions, in anchors.
        distance: frames from one anchor to the next, and the shortest period of the time encoder.
        num_frequencies: sinusoids of the time encoder.
        max_period: its longest period, in frames.
    """

    def __init__(
        self,
        z_dim: int,
        code_dim: int,
        condition_dim: int,
        kernel_size: int,
        distance: int,
        num_frequencies: int,
        max_period: int,
    ):
        super().__init__()
        self.distance = distance
        self.context = 2 * (kernel_size - 1)  # anchors of noise beyond those of codes
        self.convs = nn.ModuleList(
            [
                EqualizedConv1d(z_dim + condition_dim, z_dim, kernel_size, lr_multiplier=MAPPING_LR_MULTIPLIER),
                EqualizedConv1d(z_dim, code_dim, kernel_size, lr_multiplier=MAPPING_LR_MULTIPLIER),
            ]
        )
        self.time_encoder = AlignedTimeEncoder(code_dim, num_frequencies, distance, max_period)

    def num_anchors(self, last_time: float) -> int:
        """How many anchors of noise the times from 0 to `last_time` need."""
        return math.ceil(last_time / self.distance) + 2 + self.context

    def forward(
        self, times: torch.Tensor, motion_noise: torch.Tensor, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            times: `(B, F)` in frames, non-negative.
            motion_noise: `(B, anchors, z_dim)`, of at least `num_anchors(times.max())` anchors.
            condition: `(B, condition_dim)`, or None.

        Returns:
            Motion codes `(B, F, 2 * num_frequencies)`.
        """
        # 1. The anchors to the left of the times; of the noise, only what reaches those of each clip
        left_index = (times / self.distance).floor().long()  # (B, F)
        first = left_index.amin(dim=1, keepdim=True)  # (B, 1)
        place = left_index - first
        window = int(place.max()) + 2 + self.context
        rows = (first + torch.arange(window, device=times.device))[:, :, None]  # (B, window, 1)
        # a clip of less time than others in its batch may end before its window does; its surplus is not used
        rows = rows.clamp_max(motion_noise.shape[1] - 1)
        x = motion_noise.gather(1, rows.expand(-1, -1, motion_noise.shape[2]))
        if condition is not None:
            x = torch.cat([x, condition[:, None].expand(-1, window, -1)], dim=2)

        # 2. Codes at the anchors, (B, window - context, code_dim)
        x = x.transpose(1, 2)
        for conv in self.convs:
            x = conv(x)
        codes = x.transpose(1, 2)

        # 3. Codes at the times
        place = place[:, :, None].expand(-1, -1, codes.shape[2])
        left, right = codes.gather(1, place), codes.gather(1, place + 1)
        encoded = self.time_encoder(
            times.flatten(),
            left_index.flatten().to(times.dtype) * self.distance,
            self.distance,
            left.flatten(0, 1),
            right.flatten(0, 1),
        )
        return encoded.unflatten(0, times.shape)


class SynthesisLayer(nn.Module):
    """A modulated 3x3 convolution with leaky ReLU (StyleGAN2, figure 2), without its noise.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        w_dim: width of the code that modulates it.
        up: 1, or 2 to double the size of the image first.
    """

    taps: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, up: int = 1):
        super().__init__()
        self.up = up
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("taps", fir_taps(), persistent=False)

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """`(N, in_channels, H, W)` and `(N, w_dim)` to `(N, out_channels, H * up, W * up)`."""
        x = modulated_conv2d(x, self.weight, self.affine(w), self.taps, self.up)
        return bias_act(x, self.bias, "leaky_relu", clamp=ACTIVATION_LIMIT)


class ToRGBLayer(nn.Module):
    """A modulated 1x1 convolution to colours, without demodulation.

    Args:
        in_channels: channels of the input.
        w_dim: width of the code that modulates it.
    """

    def __init__(self, in_channels: int, w_dim: int):
        super().__init__()
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """`(N, in_channels, H, W)` and `(N, w_dim)` to `(N, 3, H, W)`."""
        x = modulated_conv2d(x, self.weight, self.affine(w) * self.weight_gain, demodulate=False)
        return bias_act(x, self.bias, clamp=ACTIVATION_LIMIT)


class SynthesisBlock(nn.Module):
    """The layers of one resolution, and the image so far (StyleGAN2, figure 7b: skip connections).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        w_dim: width of the code that modulates the layers.
        is_first: the block of the first resolution, which does not double the size and has one convolution.
    """

    taps: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, is_first: bool):
        super().__init__()
        self.conv0 = None if is_first else SynthesisLayer(in_channels, out_channels, w_dim, up=2)
        self.conv1 = SynthesisLayer(in_channels if is_first else out_channels, out_channels, w_dim)
        self.to_rgb = ToRGBLayer(out_channels, w_dim)
        self.register_buffer("taps", fir_taps(), persistent=False)

    def forward(
        self, x: torch.Tensor, image: torch.Tensor | None, w: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: features `(N, in_channels, H, W)`.
            image: `(N, 3, H, W)`, None in the first block.
            w: `(N, w_dim)`.

        Returns:
            Features `(N, out_channels, 2 H, 2 W)` and the image `(N, 3, 2 H, 2 W)`; H and W in the first block.
        """
        if self.conv0 is not None:
            x = self.conv0(x, w)
        x = self.conv1(x, w)
        colours = self.to_rgb(x, w)
        return x, colours if image is None else upsample2d(image, self.taps) + colours


@dataclass
class StyleGANVGeneratorOutput(BaseOutput):
    """
    Args:
        sample: frames `(B, F, 3, H, W)` in about [-1, 1].
    """

    sample: torch.Tensor


class StyleGANVGenerator(WholeModel, ConfigMixin):
    """The generator of StyleGAN-V (https://arxiv.org/abs/2112.14683, section 3.1). No noise is injected.

    The defaults are those of the official configuration (https://github.com/universome/stylegan-v), at 128 pixels.

    Args:
        resolution: height and width of the frames, a power of 2 from 8.
        num_frames: frames of a clip where a pipeline is given no other number; not a limit.
        z_dim: width of the latents.
        w_dim: width of the codes that modulate the layers.
        num_mapping_layers: layers of the mapping network.
        channel_base: channels times resolution, where that is less than `channel_max`; the official 16384 below
            512 pixels, 32768 from there.
        channel_max: largest number of channels.
        num_classes: number of class labels; None for an unconditional model.
        motion_z_dim: width of the motion noise.
        motion_code_dim: width of the motion codes at the anchors.
        motion_z_distance: frames from one anchor to the next, and the shortest period of the time encoder.
        motion_kernel_size: length of the convolutions along the anchors.
        num_frequencies: sinusoids of the time encoder; the motion codes of frames are twice as wide.
        max_period: the longest period of the time encoder, in frames.
        max_num_frames: motion noise is drawn for at least so many frames, so that up to there a clip begins as a
            longer one from the same seed.

    Raises:
        ValueError: for sizes that are not positive integers, and a resolution that is no power of 2 from 8.
    """

    # Rounded, the periods of the motion would drift apart from those trained, the further the later.
    _keep_in_fp32_modules = ["mapping", "mean_w", "motion_encoder"]
    mean_w: torch.Tensor

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
    ):
        super().__init__()
        names = ["resolution", "num_frames", "z_dim", "w_dim", "num_mapping_layers", "channel_base", "channel_max"]
        names += ["motion_z_dim", "motion_code_dim", "motion_z_distance", "motion_kernel_size", "num_frequencies"]
        names += ["max_period", "max_num_frames"] + (["num_classes"] if num_classes is not None else [])
        require_positive_integers(self.config, names)
        if resolution < 2 * FIRST_RESOLUTION or resolution & (resolution - 1) != 0:
            raise ValueError(f"resolution={resolution}: expected a power of 2 from {2 * FIRST_RESOLUTION}.")
        if channel_base < resolution:
            raise ValueError(f"channel_base={channel_base}: expected at least resolution={resolution}.")

        # 1. Codes: content, its running mean, motion
        self.mapping = MappingNetwork(z_dim, num_classes or 0, w_dim, num_mapping_layers)
        self.register_buffer("mean_w", torch.zeros(w_dim))
        self.motion_encoder = MotionEncoder(
            motion_z_dim,
            motion_code_dim,
            num_classes or 0,
            motion_kernel_size,
            motion_z_distance,
            num_frequencies,
            max_period,
        )

        # 2. Synthesis, from a learned constant and the motion codes
        channels = channels_at(FIRST_RESOLUTION, channel_base, channel_max)
        self.const = nn.Parameter(torch.randn(1, channels, FIRST_RESOLUTION, FIRST_RESOLUTION))
        self.blocks = nn.ModuleList()
        in_channels, block_resolution = channels + 2 * num_frequencies, FIRST_RESOLUTION
        while block_resolution <= resolution:
            out_channels = channels_at(block_resolution, channel_base, channel_max)
            self.blocks.append(self.build_block(in_channels, out_channels, block_resolution))
            in_channels, block_resolution = out_channels, 2 * block_resolution

    def build_block(self, in_channels: int, out_channels: int, block_resolution: int) -> nn.Module:
        """The synthesis block of a resolution; called while the model is made, after its configuration is known."""
        return SynthesisBlock(
            in_channels, out_channels, self.config.w_dim, is_first=block_resolution == FIRST_RESOLUTION
        )

    def draw_motion_noise(
        self,
        batch_size: int,
        last_time: float,
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Noise `(B, anchors, motion_z_dim)` for the times from 0 to `last_time` (and to `max_num_frames - 1`).

        Args:
            batch_size: number of clips.
            last_time: the latest time, in frames.
            generator: one for the batch, or a list with one per clip.
            device: where the noise is to lie; the model's by default.
        """
        num_anchors = self.motion_encoder.num_anchors(max(last_time, self.config.max_num_frames - 1))
        shape = (batch_size, num_anchors, self.config.motion_z_dim)
        return randn_tensor(shape, generator, torch.device(device or self.device), torch.float32)

    def map_latents(
        self, z: torch.Tensor, condition: torch.Tensor | None = None, truncation_psi: float = 1.0
    ) -> torch.Tensor:
        """Latents `(B, z_dim)` and one-hot labels `(B, num_classes)` or None to codes `(B, w_dim)`.

        In training mode the running mean of the codes follows them. `truncation_psi` other than 1 draws the codes
        towards it (Karras et al. 2019, https://arxiv.org/abs/1812.04948, appendix B).
        """
        w = self.mapping(z, condition)
        if self.training:
            mean = w.detach().mean(dim=0).to(self.mean_w.dtype)
            self.mean_w.copy_(mean.lerp(self.mean_w, MEAN_W_DECAY))
        return w if truncation_psi == 1 else torch.lerp(self.mean_w.to(w.dtype), w, truncation_psi)

    def synthesize(self, w: torch.Tensor, motion_codes: torch.Tensor) -> torch.Tensor:
        """Codes `(N, w_dim)` and motion codes `(N, 2 * num_frequencies)` of N frames to the frames `(N, 3, H, W)`."""
        x, image = self.blocks[0](self.first_features(motion_codes), None, w)
        for block in self.blocks[1:]:
            x, image = block(x, image, w)
        return image

    def first_features(self, motion_codes: torch.Tensor) -> torch.Tensor:
        """`(N, 2 * num_frequencies)` to `(N, C + 2 * num_frequencies, 4, 4)`: the constant and the motion codes."""
        constant = self.const.expand(motion_codes.shape[0], -1, -1, -1)
        motion = motion_codes[:, :, None, None].expand(-1, -1, *constant.shape[2:])
        return torch.cat([constant, motion.to(constant.dtype)], dim=1)

    def forward(
        self,
        z: torch.Tensor,
        times: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        motion_noise: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        return_dict: bool = True,
    ) -> StyleGANVGeneratorOutput | tuple[torch.Tensor]:
        """
        Args:
            z: latents `(B, z_dim)` of unit variance.
            times: `(B, F)`, the times of the frames, in frames; any non-negative real numbers in any order.
            class_labels: integer labels `(B,)`; None for an unconditional model.
            motion_noise: from `draw_motion_noise`; None draws it. The frame of a time depends on nothing else than
                this and the latent of its clip, and not on the other times.
            truncation_psi: 1 for the codes as they are, 0 for the mean code.
            return_dict: False for a tuple `(sample,)`.

        Returns:
            `StyleGANVGeneratorOutput`, or `(sample,)`.

        Raises:
            ValueError: for shapes that do not fit, times that are negative or not finite, labels that the model does
                not have, and motion noise that ends before the last time needs it.
        """
        # 1. Checks
        batch_size, config = z.shape[0], self.config
        if z.ndim != 2 or z.shape[1] != config.z_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}: expected (B, {config.z_dim}).")
        if times.ndim != 2 or times.shape[0] != batch_size or times.shape[1] == 0:
            raise ValueError(f"times has shape {tuple(times.shape)}: expected ({batch_size}, F), with F of 1 or more.")
        if not (times.isfinite() & (times >= 0)).all():
            raise ValueError("times has values that are negative or not finite: expected frames from 0.")
        last_time = float(times.max())
        if motion_noise is None:
            motion_noise = self.draw_motion_noise(batch_size, last_time, device=z.device)
        num_anchors = self.motion_encoder.num_anchors(last_time)
        if (
            motion_noise.ndim != 3
            or motion_noise.shape[::2] != (batch_size, config.motion_z_dim)
            or motion_noise.shape[1] < num_anchors
        ):
            raise ValueError(
                f"motion_noise has shape {tuple(motion_noise.shape)}: expected ({batch_size}, {num_anchors} or more, "
                f"{config.motion_z_dim}) for times up to {last_time:g}."
            )

        # 2. Content codes (B, w_dim) and motion codes (B, F, 2 * num_frequencies): small, and in full precision
        precision = torch.promote_types(self.dtype, torch.float32)
        with torch.autocast(z.device.type, enabled=False):
            condition = one_hot_labels(class_labels, config.num_classes, batch_size)
            condition = None if condition is None else condition.to(z.device, precision)
            w = self.map_latents(z.to(precision), condition, truncation_psi)
            motion_codes = self.motion_encoder(
                times.to(z.device, precision), motion_noise.to(z.device, precision), condition
            )

        # 3. Frames, each by itself
        num_frames = times.shape[1]
        sample = self.synthesize(w.repeat_interleave(num_frames, dim=0), motion_codes.flatten(0, 1))
        sample = sample.unflatten(0, (batch_size, num_frames))
        if not return_dict:
            return (sample,)
        return StyleGANVGeneratorOutput(sample=sample)
