"""The denoiser of LVDM (He et al. 2022, https://arxiv.org/abs/2211.13221, section 3.2): a space-time factorised UNet.

Reads top-down: attention, residual block, resampling, stages, model. The architecture is that of the official code
(https://github.com/YingqingHe/LVDM, `lvdm/models/modules/openaimodel3d.py` and `attention_temporal.py`) with the
settings of its `configs/lvdm_short/sky.yaml`, which Endora's endoscopy configs share
(https://github.com/CUHK-AIM-Group/Endora, `Other-Methods/LVDM/configs/lvdm_short`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput

from ..whole_model import WholeModel


class LVDMSpatialAttention(nn.Module):
    """Self-attention over the pixels of every frame, added to its input.

    Args:
        channels: width C of the features.
        heads: number of heads; divides C.
        norm_num_groups: groups of the GroupNorm, whose statistics are those of a frame.
    """

    def __init__(self, channels: int, heads: int, norm_num_groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, C, F, H, W)` to `(B, C, F, H, W)`."""
        batch_size, _, num_frames, height, width = hidden_states.shape
        frames = hidden_states.transpose(1, 2).flatten(0, 1).flatten(2)  # (B F, C, H W)
        tokens = self.norm(frames).transpose(1, 2)
        query, key, value = (
            tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tensor in self.to_qkv(tokens).chunk(3, dim=-1)
        )  # (B F, heads, H W, C / heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended = self.to_out(attended).unflatten(0, (batch_size, num_frames)).unflatten(2, (height, width))
        return hidden_states + attended.permute(0, 4, 1, 2, 3)


class LVDMTemporalAttention(nn.Module):
    """Self-attention over the frames of every pixel with relative positions, added to its input.

    With distances clipped to `max_distance`, and `K` and `V` the learned tables of `2 max_distance + 1` rows (Shaw et
    al. 2018, https://arxiv.org/abs/1803.02155, equations 3 to 5), frame i attends to frame j with the logit

        (q_i . k_j) / sqrt(d) + q_j . K[i - j] / d^(1/4)

    and sums `v_j + V[j - i]`. That the second term has the query of j and not of i, and the fourth root, is how the
    official code computes it (`QKVAttention.forward`: "bct,tsc->bst"), and what its weights are trained with.

    Args:
        channels: width C of the features.
        heads: number of heads of width d = C / heads, which share the tables.
        max_distance: frames after which distances no longer differ.
        norm_num_groups: groups of the GroupNorm, whose statistics are those of a pixel over all frames.
    """

    def __init__(self, channels: int, heads: int, max_distance: int, norm_num_groups: int):
        super().__init__()
        self.heads = heads
        self.max_distance = max_distance
        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.relative_keys = nn.Parameter(torch.empty(2 * max_distance + 1, channels // heads))
        self.relative_values = nn.Parameter(torch.empty(2 * max_distance + 1, channels // heads))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, C, F, H, W)` to `(B, C, F, H, W)`."""
        batch_size, _, num_frames, height, width = hidden_states.shape
        pixels = hidden_states.permute(0, 3, 4, 1, 2).flatten(0, 2)  # (B H W, C, F)
        tokens = self.norm(pixels).transpose(1, 2)
        query, key, value = (
            tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tensor in self.to_qkv(tokens).chunk(3, dim=-1)
        )  # (B H W, heads, F, d)

        # 1. Distances j - i as rows of the tables, (F, F)
        frames = torch.arange(num_frames, device=hidden_states.device)
        distance = (frames[None, :] - frames[:, None]).clamp(-self.max_distance, self.max_distance)
        rows = distance + self.max_distance

        # 2. Logits of i for j
        scale = query.shape[-1] ** -0.25
        logits = (query * scale) @ (key * scale).transpose(-1, -2)
        logits = logits + torch.einsum("bhjd,ijd->bhij", query * scale, self.relative_keys[rows.T])

        # 3. Values, each with what it says by its distance
        weights = logits.float().softmax(dim=-1).to(value.dtype)
        attended = weights @ value + torch.einsum("bhij,ijd->bhid", weights, self.relative_values[rows])
        attended = self.to_out(attended.transpose(1, 2).flatten(2)).unflatten(0, (batch_size, height, width))
        return hidden_states + attended.permute(0, 4, 3, 1, 2)


class LVDMSpaceTimeAttention(nn.Module):
    """Spatial, then temporal attention."""

    def __init__(self, channels: int, heads: int, max_distance: int, norm_num_groups: int):
        super().__init__()
        self.spatial = LVDMSpatialAttention(channels, heads, norm_num_groups)
        self.temporal = LVDMTemporalAttention(channels, heads, max_distance, norm_num_groups)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.temporal(self.spatial(hidden_states))


class LVDMResBlock(nn.Module):
    """Two 1x3x3 convolutions, the second norm scaled and shifted by the embedding (Dhariwal & Nichol 2021, eq. 3).

    The convolutions see single frames; the GroupNorms take their statistics over all frames.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        embedding_dim: width of the embedding.
        norm_num_groups: groups of both GroupNorms.
        dropout: probability before the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, norm_num_groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels)
        self.conv1 = frame_convolution(in_channels, out_channels)
        self.modulation = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = frame_convolution(out_channels, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """`(B, in_channels, F, H, W)` to `(B, out_channels, F, H, W)`, by an activated `emb` `(B, embedding_dim)`."""
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        scale, shift = self.modulation(emb)[:, :, None, None, None].chunk(2, dim=1)
        residual = F.silu(self.norm2(residual) * (1 + scale) + shift)
        return self.shortcut(hidden_states) + self.conv2(self.dropout(residual))


class LVDMDownsample(nn.Module):
    """A 1x3x3 convolution of stride 2: `(B, C, F, H, W)` to `(B, C, F, H / 2, W / 2)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = frame_convolution(channels, channels, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)


class LVDMUpsample(nn.Module):
    """Repeated pixels and a 1x3x3 convolution: `(B, C, F, H, W)` to `(B, C, F, 2 H, 2 W)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = frame_convolution(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


class LVDMLayer(nn.Module):
    """A residual block and, where the stage has it, space-time attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        heads: int | None,
        max_distance: int,
        norm_num_groups: int,
        dropout: float,
    ):
        super().__init__()
        self.resnet = LVDMResBlock(in_channels, out_channels, embedding_dim, norm_num_groups, dropout)
        self.attention = (
            None if heads is None else LVDMSpaceTimeAttention(out_channels, heads, max_distance, norm_num_groups)
        )

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.resnet(hidden_states, emb)
        return hidden_states if self.attention is None else self.attention(hidden_states)


class LVDMStage(nn.Module):
    """What the stages of both ways share: layers, whose activations gradient checkpointing computes again."""

    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(self, layers: list[LVDMLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False

    def run_layer(self, layer: nn.Module, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, hidden_states, emb)
        return layer(hidden_states, emb)


class LVDMDownStage(LVDMStage):
    """The layers of one resolution on the way down, and the way to the next."""

    def __init__(self, layers: list[LVDMLayer], downsample: LVDMDownsample | None):
        super().__init__(layers)
        self.downsample = downsample

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`(B, C, F, H, W)` to the next resolution's, and every output that the way up will need, in their order."""
        outputs = []
        for layer in self.layers:
            hidden_states = self.run_layer(layer, hidden_states, emb)
            outputs.append(hidden_states)
        if self.downsample is not None:
            hidden_states = self.downsample(hidden_states)
            outputs.append(hidden_states)
        return hidden_states, outputs


class LVDMMiddleStage(LVDMStage):
    """The layers of the lowest resolution between the two ways."""

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = self.run_layer(layer, hidden_states, emb)
        return hidden_states


class LVDMUpStage(LVDMStage):
    """The layers of one resolution on the way up, and the way to the next."""

    def __init__(self, layers: list[LVDMLayer], upsample: LVDMUpsample | None):
        super().__init__(layers)
        self.upsample = upsample

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor, skips: list[torch.Tensor]) -> torch.Tensor:
        """`(B, C, F, H, W)` to the next resolution's; every layer takes the last of `skips` away and beside it."""
        for layer in self.layers:
            hidden_states = self.run_layer(layer, torch.cat([hidden_states, skips.pop()], dim=1), emb)
        return hidden_states if self.upsample is None else self.upsample(hidden_states)


@dataclass
class LVDMUNet3DModelOutput(BaseOutput):
    """
    Args:
        sample: predicted noise `(B, C, F, H, W)`.
    """

    sample: torch.Tensor


class LVDMUNet3DModel(WholeModel, ConfigMixin):
    """The space-time factorised UNet of LVDM.

    The defaults are the official short-video model of 548.9 million parameters, at the size of 16 frames of 128x128
    pixels: 4 latent frames of 16x16.

    With `conditioning="mask"` it is the model of the hierarchical long videos (paper, section 3.3; official
    `FrameInterpPredUNet`), which predicts and interpolates: some latent frames are given, they replace the noisy ones,
    and a channel that is 1 in the given frames and 0 in the others joins the input. Given latents may be noised
    (conditional latent perturbation); the timestep of that noise is embedded like a class.

    Args:
        in_channels: latent channels C.
        model_channels: channels of the first stage, an even number.
        channel_multipliers: channels of each stage over `model_channels`; every stage but the last halves height and
            width.
        layers_per_stage: residual blocks of a stage on the way down; there is one more on the way up.
        attention_stages: stages with attention, counted from 0 at full resolution; the middle always has it.
        num_attention_heads: heads of every attention.
        max_distance: latent frames after which relative positions no longer differ; None for `num_frames`, as in the
            official code.
        sample_size: latent height and width the model is trained at: an int, or (height, width).
        num_frames: latent frames the model is trained at.
        num_classes: number of class labels; None for an unconditional model.
        class_dropout_prob: probability that training replaces a label by the null class `num_classes`, for
            classifier-free guidance. 0 means that there is no null class.
        conditioning: None, or "mask" for a model that completes given latent frames.
        num_noise_levels: timesteps of noise that given latents may have, 0 to `num_noise_levels - 1` (251 in the
            official configs, of which training draws the first 250); 0 for a model that takes them clean alone.
        norm_num_groups: groups of every GroupNorm; divides the channels of every stage.
        dropout: probability in the residual blocks.

    `sample_size` and `num_frames` are training sizes, not limits.

    Raises:
        ValueError: for sizes that are not positive, widths that heads or groups do not divide, stages that do not
            exist, probabilities outside [0, 1], an unknown `conditioning`, or noise levels without conditioning.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LVDMLayer"]
    _repeated_blocks = ["LVDMLayer"]
    _skip_layerwise_casting_patterns = ["conv_in", "time_embedder", "class_embedder", "noise_level_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        model_channels: int = 256,
        channel_multipliers: tuple[int, ...] = (1, 2, 3, 4),
        layers_per_stage: int = 3,
        attention_stages: tuple[int, ...] = (1, 2, 3),
        num_attention_heads: int = 4,
        max_distance: int | None = None,
        sample_size: int | tuple[int, int] = 16,
        num_frames: int = 4,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        conditioning: str | None = None,
        num_noise_levels: int = 0,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        sizes = ["in_channels", "model_channels", "layers_per_stage", "num_attention_heads", "num_frames"]
        sizes += ["norm_num_groups"]
        sizes += [name for name in ("max_distance", "num_classes") if self.config[name] is not None]
        for name in sizes:
            if not isinstance(self.config[name], int) or self.config[name] < 1:
                raise ValueError(f"{name}={self.config[name]}: expected a positive integer.")
        if len(channel_multipliers) == 0 or any(multiplier < 1 for multiplier in channel_multipliers):
            raise ValueError(f"channel_multipliers={channel_multipliers}: expected positive integers.")
        num_stages = len(channel_multipliers)
        if any(not 0 <= stage < num_stages for stage in attention_stages):
            raise ValueError(f"attention_stages={attention_stages}: expected stages from 0 to {num_stages - 1}.")
        channels = [model_channels * multiplier for multiplier in channel_multipliers]
        for width in channels:
            if width % norm_num_groups != 0 or width % num_attention_heads != 0 or width % 2 != 0:
                raise ValueError(
                    f"a stage has {width} channels: expected an even multiple of norm_num_groups={norm_num_groups} "
                    f"and of num_attention_heads={num_attention_heads}."
                )
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        if len(sides) != 2 or any(side < 1 or side % 2 ** (num_stages - 1) != 0 for side in sides):
            raise ValueError(
                f"sample_size={sample_size}: expected one or two positive multiples of {2 ** (num_stages - 1)}, as "
                f"{num_stages} stages halve it {num_stages - 1} times."
            )
        for name in ("class_dropout_prob", "dropout"):
            if not 0 <= self.config[name] <= 1:
                raise ValueError(f"{name}={self.config[name]}: expected a probability.")
        if conditioning not in (None, "mask"):
            raise ValueError(f'conditioning="{conditioning}": expected None or "mask".')
        if not isinstance(num_noise_levels, int) or num_noise_levels < 0 or (num_noise_levels and not conditioning):
            raise ValueError(
                f"num_noise_levels={num_noise_levels} with conditioning={conditioning!r}: expected 0, or a positive "
                'integer with conditioning="mask".'
            )
        embedding_dim = 4 * model_channels
        max_distance = num_frames if max_distance is None else max_distance

        # 1. Timestep, class, noise level of given latents
        self.time_proj = Timesteps(model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(model_channels, embedding_dim)
        self.class_embedder = (
            None if num_classes is None else LabelEmbedding(num_classes, embedding_dim, class_dropout_prob)
        )
        self.noise_level_embedder = nn.Embedding(num_noise_levels, embedding_dim) if num_noise_levels else None

        # 2. Stages; `skips` are the channels of everything that the way up takes from the way down
        def layer(in_width: int, out_width: int, has_attention: bool) -> LVDMLayer:
            heads = num_attention_heads if has_attention else None
            return LVDMLayer(in_width, out_width, embedding_dim, heads, max_distance, norm_num_groups, dropout)

        self.conv_in = frame_convolution(in_channels + (conditioning == "mask"), model_channels)
        skips, width = [model_channels], model_channels
        down_stages = []
        for stage, out_width in enumerate(channels):
            layers = []
            for _ in range(layers_per_stage):
                layers.append(layer(width, out_width, stage in attention_stages))
                width = out_width
                skips.append(width)
            is_last = stage == num_stages - 1
            down_stages.append(LVDMDownStage(layers, None if is_last else LVDMDownsample(width)))
            skips += [] if is_last else [width]
        self.down_stages = nn.ModuleList(down_stages)
        self.mid_stage = LVDMMiddleStage([layer(width, width, True), layer(width, width, False)])
        up_stages = []
        for stage, out_width in reversed(list(enumerate(channels))):
            layers = []
            for _ in range(layers_per_stage + 1):
                layers.append(layer(width + skips.pop(), out_width, stage in attention_stages))
                width = out_width
            up_stages.append(LVDMUpStage(layers, LVDMUpsample(width) if stage > 0 else None))
        self.up_stages = nn.ModuleList(up_stages)

        # 3. Output
        self.norm_out = nn.GroupNorm(norm_num_groups, width)
        self.conv_out = frame_convolution(width, in_channels)

        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """The official initialisation: torch's own, and zeros where a branch ends, so that it begins as nothing."""
        for module in self.modules():
            if isinstance(module, LVDMResBlock):
                zero_parameters(module.conv2)
            elif isinstance(module, (LVDMSpatialAttention, LVDMTemporalAttention)):
                zero_parameters(module.to_out)
            if isinstance(module, LVDMTemporalAttention):
                nn.init.xavier_uniform_(module.relative_keys)
                nn.init.xavier_uniform_(module.relative_values)
        zero_parameters(self.conv_out)

    @property
    def null_class(self) -> int | None:
        """The label of the unconditional branch of classifier-free guidance; None where the model has none."""
        if self.config.num_classes is None or self.config.class_dropout_prob == 0:
            return None
        return self.config.num_classes

    def check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        given_latents: torch.Tensor | None,
        given_mask: torch.Tensor | None,
        noise_levels: torch.Tensor | None,
    ) -> None:
        """Raises a ValueError of one sentence for the first input of `forward` that does not fit."""
        shape, config = tuple(hidden_states.shape), self.config
        if len(shape) != 5 or min(shape) < 1 or shape[1] != config.in_channels:
            raise ValueError(
                f"hidden_states has shape {shape}: expected (batch, {config.in_channels}, frames, height, width)."
            )
        batch_size, _, num_frames, height, width = shape
        multiple = 2 ** (len(config.channel_multipliers) - 1)
        if height % multiple != 0 or width % multiple != 0:
            raise ValueError(
                f"hidden_states has height {height} and width {width}: expected positive multiples of {multiple}, "
                f"which {len(config.channel_multipliers)} stages can halve."
            )
        if not torch.is_tensor(timestep) or timestep.ndim > 1 or timestep.numel() not in (1, batch_size):
            given = f"has shape {tuple(timestep.shape)}" if torch.is_tensor(timestep) else f"is {timestep!r}"
            raise ValueError(f"timestep {given}: expected a tensor, a scalar or of shape ({batch_size},).")
        if config.num_classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this model is unconditional (num_classes=None).")
        else:
            largest = config.num_classes - 1 if self.null_class is None else self.null_class
            if class_labels is None:
                raise ValueError(
                    f"class_labels=None: this model needs one label for each of the {batch_size} samples, 0 to "
                    f"{config.num_classes - 1}" + ("." if self.null_class is None else f", or {largest} for none.")
                )
            if class_labels.dtype not in (torch.int32, torch.int64) or tuple(class_labels.shape) != (batch_size,):
                raise ValueError(
                    f"class_labels is {class_labels.dtype} of shape {tuple(class_labels.shape)}: expected integers of "
                    f"shape ({batch_size},)."
                )
            # Reading values would stall an accelerator and break a compiled graph; there the embedding objects.
            on_cpu = class_labels.device.type == "cpu" and not torch.compiler.is_compiling()
            if on_cpu and (class_labels.min() < 0 or class_labels.max() > largest):
                raise ValueError(f"class_labels={class_labels.tolist()}: expected labels from 0 to {largest}.")
        if config.conditioning is None:
            if given_latents is not None or given_mask is not None or noise_levels is not None:
                raise ValueError(
                    "given_latents, given_mask or noise_levels were given, but this model completes nothing "
                    "(conditioning=None)."
                )
            return
        if (given_latents is None) != (given_mask is None):
            raise ValueError("one of given_latents and given_mask is None: expected both, or neither.")
        if given_latents is not None and given_mask is not None:
            if tuple(given_latents.shape) != shape:
                raise ValueError(
                    f"given_latents has shape {tuple(given_latents.shape)}: expected that of hidden_states, {shape}."
                )
            if given_mask.dtype != torch.bool or tuple(given_mask.shape) != (batch_size, num_frames):
                raise ValueError(
                    f"given_mask is {given_mask.dtype} of shape {tuple(given_mask.shape)}: expected booleans of shape "
                    f"({batch_size}, {num_frames})."
                )
        if noise_levels is not None:
            levels = config.num_noise_levels
            if levels == 0:
                raise ValueError("noise_levels were given, but this model knows clean latents (num_noise_levels=0).")
            if noise_levels.dtype not in (torch.int32, torch.int64) or tuple(noise_levels.shape) != (batch_size,):
                raise ValueError(
                    f"noise_levels is {noise_levels.dtype} of shape {tuple(noise_levels.shape)}: expected integers of "
                    f"shape ({batch_size},) from 0 to {levels - 1}."
                )
            on_cpu = noise_levels.device.type == "cpu" and not torch.compiler.is_compiling()
            if on_cpu and (noise_levels.min() < 0 or noise_levels.max() >= levels):
                raise ValueError(f"noise_levels={noise_levels.tolist()}: expected levels from 0 to {levels - 1}.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        given_latents: torch.Tensor | None = None,
        given_mask: torch.Tensor | None = None,
        noise_levels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> LVDMUNet3DModelOutput | tuple:
        """
        Args:
            hidden_states: noisy latents `(B, C, F, H, W)`.
            timestep: diffusion timesteps, `(B,)` or a scalar.
            class_labels: integers `(B,)`. Required by a model with classes, refused by one without.
            given_latents: latents `(B, C, F, H, W)` of which those under `given_mask` take the place of the noisy
                ones; for `conditioning="mask"`. None where nothing is given: the model then generates unconditionally.
            given_mask: booleans `(B, F)`, True where a frame is given.
            noise_levels: integers `(B,)`, the timestep of the noise in the given latents. None embeds nothing.
            return_dict: False for a tuple `(sample,)`.

        Returns:
            `LVDMUNet3DModelOutput` or a tuple, with the predicted noise of `hidden_states`' shape.

        Raises:
            ValueError: for channels, sizes, timesteps, labels or given latents that do not fit the model.
        """
        self.check_inputs(hidden_states, timestep, class_labels, given_latents, given_mask, noise_levels)
        batch_size, dtype = hidden_states.shape[0], hidden_states.dtype

        # 1. Conditioning, activated once for all blocks: (B, 4 model_channels)
        emb = self.time_embedder(self.time_proj(timestep.reshape(-1)).to(dtype)).expand(batch_size, -1)
        if self.class_embedder is not None and class_labels is not None:
            # labels are dropped in training only, which sampling under no_grad is not, whatever the mode of the model
            drops_labels = self.training and torch.is_grad_enabled()
            embed = self.class_embedder if drops_labels else self.class_embedder.embedding_table
            emb = emb + embed(class_labels).to(dtype)
        if self.noise_level_embedder is not None and noise_levels is not None:
            emb = emb + self.noise_level_embedder(noise_levels).to(dtype)
        emb = F.silu(emb)

        # 2. Given latents in place of the noisy ones, and the channel that says where
        if self.config.conditioning == "mask":
            mask = hidden_states.new_zeros(batch_size, 1, *hidden_states.shape[2:])
            if given_latents is not None and given_mask is not None:
                is_given = given_mask[:, None, :, None, None]
                hidden_states = torch.where(is_given, given_latents.to(dtype), hidden_states)
                mask = mask + is_given.to(dtype)
            hidden_states = torch.cat([hidden_states, mask], dim=1)

        # 3. Down, middle, up
        hidden_states = self.conv_in(hidden_states)
        skips = [hidden_states]
        for down_stage in self.down_stages:
            hidden_states, outputs = down_stage(hidden_states, emb)
            skips += outputs
        hidden_states = self.mid_stage(hidden_states, emb)
        for up_stage in self.up_stages:
            hidden_states = up_stage(hidden_states, emb, skips)

        # 4. Output
        sample = self.conv_out(F.silu(self.norm_out(hidden_states)))
        return LVDMUNet3DModelOutput(sample=sample) if return_dict else (sample,)


def frame_convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv3d:
    """A 3x3 convolution of every frame by itself."""
    return nn.Conv3d(in_channels, out_channels, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1))


def zero_parameters(module: nn.Module) -> None:
    """Makes a layer's output zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
