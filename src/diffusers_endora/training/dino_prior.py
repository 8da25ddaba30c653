"""The paper's L_prior: what the denoiser's spatial blocks see shall correlate with what a frozen DINO sees.

Endora, https://arxiv.org/abs/2403.11050, section 2.3, and its official code, https://github.com/CUHK-AIM-Group/Endora.
"REPA" is Yu et al. 2024, "Representation Alignment for Generation", https://arxiv.org/abs/2410.06940.
"""

import contextlib
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.vit.modeling_vit import ViTEmbeddings

# The teachers and the name of the norm that follows their last block
FINAL_NORMS = {"vit": "layernorm", "dinov2": "layernorm", "dinov2_with_registers": "layernorm", "dinov3_vit": "norm"}


class DinoPrior(nn.Module):
    """The prior loss, with its frozen teacher and its trainable projection.

    Two of the objectives compare maps. A row of the comparison is one frame at one layer: the student's map over its N
    tokens and the teacher's. The loss is the mean over rows of 1 - Pearson's r between the two. The teacher's map
    comes about alike in both: its features, on their patch grid, are average-pooled to twice the student's grid (which
    does nothing at the official sizes, 16x16 for 8x8), halved by a trainable convolution of stride 2 without bias, and
    averaged over channels. They differ in what is compared:

    - "official", as the official code does: the teacher's features are its block outputs through its final norm, the
      convolution is 2x2, the student's map is its block output averaged over channels.
    - "paper", after section 2.3, whose text has attention maps and a 3x3 convolution of stride 2; the official code
      has neither. We read: an attention map of DINO is what DINO's paper shows under that name, the attention of
      the [CLS] token to the patches (https://arxiv.org/abs/2104.14294, figure 1), one map per head, and the heads are
      the channels of the convolution, which is padded by 1 to halve the grid. The student has no [CLS] token; the mean
      of a frame's tokens stands in as the query: softmax(mean(X) X^T / sqrt(D)), X the block output after LayerNorm.
      (The affinity of all tokens, softmax(X X^T / sqrt(D)), would be ruled by its diagonal at a width of 1152.)

    The third compares tokens:

    - "repa", after REPA, section 3.2: each of the student's tokens goes through a perceptron of three layers, one
      perceptron for each block, and the loss is the mean over tokens of 1 - their cosine with the teacher's, which is
      0 at best. (REPA's own is the negative cosine, which is 1 less.) The teacher's tokens are its block outputs
      through its final norm, average-pooled to the student's grid. REPA takes the teacher's last layer alone, for a
      block at about a third of the student's depth: `teacher_layers=(11,)` and `student_layers=(4,)` of 14.

    The teacher is no submodule: `parameters()`, `state_dict()` and `train()` pass it by, so an optimiser or a saved
    file holds the projection alone, while `.to()` moves both. The projection is trained with the denoiser; as a
    convolution its `projection.weight` is `cov.weight` of an official checkpoint.

    Args:
        teacher: a `ViTModel` (DINO), `Dinov2Model`, `Dinov2WithRegistersModel` or `DINOv3ViTModel`. It is frozen in
            place, and a `ViTModel` interpolates its position table as the official code does. Or the config of one:
            such a prior has no teacher (`teacher` is None) and compares with tokens that were extracted before.
        teacher_layers: indices of the teacher's blocks, from 0.
        student_layers: indices of the spatial blocks that they are paired with; None for `student_layers_for`.
        student_grid: rows and columns of the student's tokens, latent size over patch size.
        objective: "official", "paper" or "repa".
        projection_channels: output channels of the convolution, whatever the student's width. Only their mean enters,
            so the function is that of one channel; but the mean of many starts small, and Adam turns it faster. For
            "repa" the width of the perceptrons' hidden layers; REPA's is 2048.
        num_layers: the student's number of spatial blocks (its `config.num_layers`), for `student_layers=None`.
        student_width: channels of the student's tokens (its `inner_dim`), which "repa" needs and the others do not.

    Raises:
        ValueError: for another objective, another kind of teacher, layers beyond its depth, unequal numbers of
            layers, or "repa" without `student_width`.
    """

    teacher: PreTrainedModel | None
    projection: Any  # the convolution, or for "repa" the perceptrons
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        teacher: PreTrainedModel | PretrainedConfig,
        teacher_layers: tuple[int, ...] = (2, 5, 8, 11),
        student_layers: tuple[int, ...] | None = None,
        student_grid: tuple[int, int] = (8, 8),
        objective: str = "official",
        projection_channels: int = 1152,
        num_layers: int = 14,
        student_width: int | None = None,
    ):
        super().__init__()
        if objective not in ("official", "paper", "repa"):
            raise ValueError(f'objective="{objective}": expected "official", "paper" or "repa".')
        config = teacher if isinstance(teacher, PretrainedConfig) else teacher.config
        if config.model_type not in FINAL_NORMS:
            raise ValueError(f'the teacher is a "{config.model_type}": expected one of {", ".join(FINAL_NORMS)}.')
        depth = config.num_hidden_layers
        if not teacher_layers or any(not 0 <= layer < depth for layer in teacher_layers):
            raise ValueError(
                f"teacher_layers={tuple(teacher_layers)}: expected blocks of the teacher, 0 to {depth - 1}."
            )
        if student_layers is None:
            student_layers = student_layers_for(num_layers, teacher_layers)
        if len(student_layers) != len(teacher_layers):
            raise ValueError(
                f"student_layers={tuple(student_layers)}: expected one for each of teacher_layers="
                f"{tuple(teacher_layers)}."
            )

        self.teacher_layers = tuple(teacher_layers)
        self.student_layers = tuple(student_layers)
        self.student_grid = tuple(student_grid)
        self.objective = objective
        self.student_width = student_width
        self.config = config
        if objective == "repa":
            if student_width is None:
                raise ValueError('student_width=None with objective="repa": expected the width of the student.')
            widths = (student_width, projection_channels, projection_channels, config.hidden_size)
            self.projection = nn.ModuleList(perceptron(*widths) for _ in teacher_layers)
            for name, values in (("pixel_mean", IMAGENET_DEFAULT_MEAN), ("pixel_std", IMAGENET_DEFAULT_STD)):
                self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        elif objective == "paper":
            self.projection = nn.Conv2d(
                config.num_attention_heads, projection_channels, 3, stride=2, padding=1, bias=False
            )
        else:  # nn.Conv2d's own initialisation, as the official code leaves it
            self.projection = nn.Conv2d(config.hidden_size, projection_channels, 2, stride=2, bias=False)

        if isinstance(teacher, PretrainedConfig):
            self.teacher = None
            return
        if objective == "paper":
            teacher.set_attn_implementation("eager")  # the fused kernels do not return attention weights
        if isinstance(teacher.embeddings, ViTEmbeddings):
            positions = MethodType(interpolate_dino_positions, teacher.embeddings)
            teacher.embeddings.interpolate_pos_encoding = positions
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))  # not a submodule

    @classmethod
    def from_pretrained(
        cls,
        teacher: str | Path,
        teacher_layers: tuple[int, ...] = (2, 5, 8, 11),
        student_layers: tuple[int, ...] | None = None,
        student_grid: tuple[int, int] = (8, 8),
        objective: str = "official",
        projection_channels: int = 1152,
        num_layers: int = 14,
        student_width: int | None = None,
        **kwargs: Any,
    ) -> "DinoPrior":
        """Loads the teacher and builds the prior on it.

        Args:
            teacher: a folder, or the id of a Hub repository, of a vision transformer of `transformers`. The paper's is
                "facebook/dino-vits8".
            teacher_layers, student_layers, student_grid, objective, projection_channels, num_layers, student_width: as
                for the class.
            **kwargs: for `from_pretrained` of `transformers`: `local_files_only`, `revision`, `token`, `dtype`, ...

        Raises:
            ValueError: where the teacher cannot be loaded or is none of the kinds that the class takes.
        """
        with refusing_to_load(teacher):
            config = load_teacher_config(teacher, **kwargs)
            if config.model_type == "vit":
                kwargs["add_pooling_layer"] = False  # DINO has none
            model, loading = AutoModel.from_pretrained(teacher, config=config, output_loading_info=True, **kwargs)
            if loading["missing_keys"]:
                raise ValueError(f"its weights lack {sorted(loading['missing_keys'])[0]}")
        return cls(
            model,
            teacher_layers,
            student_layers,
            student_grid,
            objective,
            projection_channels,
            num_layers,
            student_width,
        )

    @classmethod
    def from_config(
        cls,
        teacher: str | Path,
        teacher_layers: tuple[int, ...] = (2, 5, 8, 11),
        student_layers: tuple[int, ...] | None = None,
        student_grid: tuple[int, int] = (8, 8),
        objective: str = "official",
        projection_channels: int = 1152,
        num_layers: int = 14,
        student_width: int | None = None,
        **kwargs: Any,
    ) -> "DinoPrior":
        """Builds the prior without its teacher, for training with tokens that were extracted before.

        Args:
            teacher: as for `from_pretrained`; only its `config.json` is read.
            teacher_layers, student_layers, student_grid, objective, projection_channels, num_layers, student_width: as
                for the class.
            **kwargs: for `AutoConfig.from_pretrained`.

        Raises:
            ValueError: where the config cannot be read or is of none of the kinds that the class takes.
        """
        with refusing_to_load(teacher):
            config = load_teacher_config(teacher, **kwargs)
        return cls(
            config,
            teacher_layers,
            student_layers,
            student_grid,
            objective,
            projection_channels,
            num_layers,
            student_width,
        )

    def _apply(self, fn, recurse=True):  # what .to(), .cuda(), .float() are made of
        if self.teacher is not None:
            self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def extract(self, clips: torch.Tensor) -> list[torch.Tensor]:
        """What the teacher makes of each frame, still images included.

        Args:
            clips: pixels `(B, F, 3, H, W)` in [-1, 1]. The teacher is fed them as they are, without ImageNet's mean
                and standard deviation, as in the official code; for "repa" with them, as in REPA. Where its patches
                do not divide H and W, the frames are resized for it: see `teacher_size`.

        Returns:
            For each teacher layer `(B, F, M, C)`, M patches row by row, [CLS] and register tokens dropped. "official"
            and "repa": tokens after the final norm, C the teacher's width. "paper": attention weights, C its number of
            heads.

        Raises:
            ValueError: for another layout of `clips`, or without a teacher.
        """
        if self.teacher is None:
            raise ValueError("this prior was built without its teacher: use from_pretrained to extract tokens.")
        if clips.ndim != 5 or clips.shape[2] != 3:
            raise ValueError(f"clips has shape {tuple(clips.shape)}: expected (batch, frames, 3, height, width).")
        pixels = clips.flatten(0, 1)
        size = self.teacher_size(*clips.shape[3:])
        if size != tuple(clips.shape[3:]):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        if self.objective == "repa":
            pixels = (pixels / 2 + 0.5 - self.pixel_mean) / self.pixel_std

        config = self.config
        options = {"interpolate_pos_encoding": True} if config.model_type == "vit" else {}  # the others always do
        output = self.teacher(
            pixels,
            output_hidden_states=self.objective != "paper",
            output_attentions=self.objective == "paper",
            **options,
        )
        num_other_tokens = 1 + getattr(config, "num_register_tokens", 0)  # they come first
        if self.objective != "paper":
            # hidden_states[0] is the input of block 0; all are taken before the final norm
            final_norm = getattr(self.teacher, FINAL_NORMS[config.model_type])
            maps = [final_norm(output.hidden_states[layer + 1]) for layer in self.teacher_layers]
        else:
            # (B F, heads, queries, keys) -> attention of [CLS] to all tokens, (B F, keys, heads)
            maps = [output.attentions[layer][:, :, 0].transpose(1, 2) for layer in self.teacher_layers]
        return [tokens[:, num_other_tokens:].unflatten(0, clips.shape[:2]) for tokens in maps]

    def teacher_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the teacher sees frames: theirs, or the nearest of their proportions that it can divide.

        DINOv2, in patches of 14 pixels, sees frames of 128x128 at 126x126.
        """
        patch_size = self.config.patch_size
        if height % patch_size == 0 and width % patch_size == 0:
            return height, width
        divisor = math.gcd(height, width)
        scale = max(1, round(divisor / patch_size)) * patch_size
        return height // divisor * scale, width // divisor * scale

    def token_shape(self, height: int, width: int) -> tuple[int, int]:
        """`(M, C)` of what `extract` gives for one frame of `height` x `width` pixels at one layer."""
        patches = math.prod(side // self.config.patch_size for side in self.teacher_size(height, width))
        return patches, self.config.num_attention_heads if self.objective == "paper" else self.config.hidden_size

    def forward(
        self, spatial_states: list[torch.Tensor] | tuple[torch.Tensor, ...], teacher_tokens: list[torch.Tensor]
    ) -> torch.Tensor:
        """The loss, a scalar in [0, 2] computed in float32: mean over layers, clips and frames of 1 - Pearson's r.

        For "repa": mean over layers, clips, frames and tokens of 1 - cosine. Nothing waits for the device.

        Args:
            spatial_states: the student's `(B, F, N, D)` at `student_layers`, N tokens of `student_grid` row by row.
            teacher_tokens: `extract` of the same frames, for each teacher layer `(B, F, M, C)`. M is a grid of the
                proportions of `student_grid`.

        Raises:
            ValueError: for numbers of layers, frames or tokens that do not fit.
        """
        if not len(spatial_states) == len(teacher_tokens) == len(self.teacher_layers):
            raise ValueError(
                f"{len(spatial_states)} spatial_states and {len(teacher_tokens)} teacher_tokens: expected one for "
                f"each of the {len(self.teacher_layers)} layers."
            )
        rows, columns = self.student_grid
        with torch.autocast(spatial_states[0].device.type, enabled=False):  # which refuses float16 on a CPU
            student, teacher = torch.stack(tuple(spatial_states)), torch.stack(tuple(teacher_tokens))
        if student.shape[:3] != teacher.shape[:3] or student.shape[3] != rows * columns:
            raise ValueError(
                f"spatial_states of shape {tuple(student.shape[1:])} for teacher_tokens of shape "
                f"{tuple(teacher.shape[1:])}: expected equal batch and frames, and {rows}x{columns} spatial tokens."
            )
        if self.objective == "repa" and student.shape[4] != self.student_width:
            raise ValueError(
                f"spatial_states has {student.shape[4]} channels: expected student_width={self.student_width}."
            )
        with torch.autocast(student.device.type, enabled=False):
            if self.objective == "repa":
                projected = self.projected_tokens(student.float())
                return (1 - F.cosine_similarity(projected, self.pooled_tokens(teacher.float()), dim=-1)).mean()
            student_maps = self.student_maps(student.float())
            teacher_maps = self.teacher_maps(teacher.float())
            # LayerNorm without affine centres the rows, so that their cosine is Pearson's r. A row that is constant
            # correlates with nothing: the floor `eps` under the norms leaves r = 0 and a finite gradient.
            student_maps = F.layer_norm(student_maps, student_maps.shape[-1:], eps=1e-6)
            teacher_maps = F.layer_norm(teacher_maps, teacher_maps.shape[-1:], eps=1e-6)
            correlation = F.cosine_similarity(student_maps, teacher_maps, dim=-1, eps=1e-3)
            return (1 - correlation).mean()

    def student_maps(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(layers, B, F, N, D)` to the student's map of each row, `(layers, B, F, N)`."""
        if self.objective == "official":
            return tokens.mean(-1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        query = tokens.mean(-2, keepdim=True)
        return (query @ tokens.mT / math.sqrt(tokens.shape[-1])).softmax(-1).squeeze(-2)

    def teacher_maps(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(layers, B, F, M, C)` to the teacher's map of each row, `(layers, B, F, N)`."""
        rows, columns = self.student_grid
        grid = F.adaptive_avg_pool2d(self.teacher_grid(tokens), (2 * rows, 2 * columns))
        # The mean over output channels of a convolution is the convolution with the mean kernel
        kernel = self.projection.weight.float().mean(0, keepdim=True)
        maps = F.conv2d(grid, kernel, stride=2, padding=self.projection.padding)
        return maps.flatten(1).unflatten(0, tokens.shape[:3])

    def projected_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The student's `(layers, B, F, N, D)`, each layer through its perceptron, to `(layers, B, F, N, C)`."""
        return torch.stack([project(layer) for project, layer in zip(self.projection, tokens, strict=True)])

    def pooled_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The teacher's `(layers, B, F, M, C)` on the student's grid, `(layers, B, F, N, C)`."""
        rows, columns = self.student_grid
        grid = F.adaptive_avg_pool2d(self.teacher_grid(tokens), (rows, columns))
        return grid.flatten(2).mT.unflatten(0, tokens.shape[:3])

    def teacher_grid(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(layers, B, F, M, C)` as images `(layers B F, C, rows, columns)`, of the student's proportions."""
        rows, columns = self.student_grid
        grid_rows = math.isqrt(tokens.shape[-2] * rows // columns)
        if grid_rows * grid_rows * columns != tokens.shape[-2] * rows:
            raise ValueError(
                f"teacher_tokens has {tokens.shape[-2]} patches: expected a grid of the proportions of the student's "
                f"{rows}x{columns}."
            )
        return tokens.flatten(0, 2).mT.unflatten(-1, (grid_rows, -1))


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers from width to width with SiLU between them, as REPA projects the student's tokens."""
    layers: list[nn.Module] = []
    for in_features, out_features in pairwise(widths):
        layers += [nn.Linear(in_features, out_features), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def load_teacher_config(teacher: str | Path, **kwargs: Any) -> PretrainedConfig:
    """The config of a folder or Hub repository; a ValueError for a network that is no teacher."""
    config = AutoConfig.from_pretrained(teacher, **kwargs)
    if config.model_type not in FINAL_NORMS:
        raise ValueError(f'its model_type is "{config.model_type}"')
    return config


@contextlib.contextmanager
def refusing_to_load(teacher: str | Path) -> Iterator[None]:
    """Turns what goes wrong in loading a teacher into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f'teacher="{teacher}" does not load ({reason}): expected a folder or Hub id of a vision transformer, '
            f'one of {", ".join(FINAL_NORMS)}, such as the paper\'s "facebook/dino-vits8".'
        ) from error


def student_layers_for(num_pairs: int, teacher_layers: tuple[int, ...] = (2, 5, 8, 11)) -> tuple[int, ...]:
    """The spatial blocks paired with the blocks of a 12-block teacher: what `output_spatial_states` has to be.

    The same indices from 12 (spatial, temporal) pairs up, as in the official XL and L; in a shallower student those at
    the same relative depth, where two teacher layers may share a block.

    Raises:
        ValueError: for a teacher layer without a counterpart: one beyond 11, unless the student is deep enough.
    """
    if num_pairs >= 12:
        layers = tuple(teacher_layers)
    else:
        layers = tuple(round(layer / 11 * (num_pairs - 1)) for layer in teacher_layers)
    if any(layer >= num_pairs for layer in layers):
        raise ValueError(
            f"teacher_layers={tuple(teacher_layers)} have no counterpart among {num_pairs} spatial blocks: give "
            "student_layers."
        )
    return layers


def interpolate_dino_positions(
    embeddings_module: ViTEmbeddings, embeddings: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """DINO's position table for another image size, to stand in for `ViTEmbeddings.interpolate_pos_encoding`.

    `transformers` hands the bicubic interpolation the size it wants. DINO hands it the ratio (size + 0.1) / trained
    size, and so samples the table at other places: 0.6 % closer together at 16x16
    (https://github.com/facebookresearch/dino/blob/main/vision_transformer.py, `interpolate_pos_encoding`).

    Args:
        embeddings_module: the `ViTEmbeddings` with the trained table `(1, 1 + S * S, D)`.
        embeddings: the tokens that the table is added to, `(B, 1 + M, D)`.
        height, width: image size in pixels.

    Returns:
        `(1, 1 + M, D)`.
    """
    table = embeddings_module.position_embeddings
    num_positions = table.shape[1] - 1
    if embeddings.shape[1] - 1 == num_positions and height == width:
        return table
    side = math.isqrt(num_positions)  # DINO's table is square
    grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, S, S)
    patch_height, patch_width = embeddings_module.patch_embeddings.patch_size
    ratio = (height // patch_height + 0.1) / side, (width // patch_width + 0.1) / side
    grid = F.interpolate(grid.float(), scale_factor=ratio, mode="bicubic").to(table.dtype)
    return torch.cat([table[:, :1], grid.flatten(2).mT], dim=1)
