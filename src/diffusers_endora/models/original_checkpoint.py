"""Checkpoints of the official Endora code (https://github.com/CUHK-AIM-Group/Endora): reading, writing, the way back.

An official `.pt` holds `{"ema": state_dict}`. The model takes from it what its layers use. What no layer uses, and
what the model computes instead of storing, goes into `OriginalExtras`; with them the official file can be written
again bit for bit.
"""

import json
import math
import os
import pickle
import re
import uuid
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from .transformer_endora import EndoraTransformer3DModel, spatial_position_table, temporal_position_table

# A checkpoint does not tell its heads. Widths of the official sizes: XL, L, B, S.
OFFICIAL_HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}

# The exponential moving average runs over the position tables too and lets them drift by up to about 2e-4.
TABLE_TOLERANCE = 1e-3

# Layers that the official class has and never uses, of one size in every model.
UNUSED_SHAPES = {
    "linear.weight": (1152, 384),
    "linear.bias": (1152,),
    "linear_2.weight": (1152, 1536),
    "linear_2.bias": (1152,),
}

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class OriginalExtras:
    """What an official checkpoint holds beyond the model, for a bit-exact way back.

    Args:
        tensors: by official name: `pos_embed` `(1, N, D)` and `temp_embed` `(1, F, D)` as stored; `linear.*` and
            `linear_2.*`, which no layer uses; `cov.weight` `(1152, 384, 2, 2)`, the convolution of the DINO prior,
            where the checkpoint comes from joint training with still images. Any of them may be absent.
        keys: all keys of the state dict in the order of the file, with the prefix `module.` where it has one. None for
            the order of the official class.
        wrapper: "ema" or "model", the key under which the file holds the state dict; None for a bare state dict.
        dtypes: by key, the dtype of the tensors that are not float32.
        block_order: as in `EndoraTransformer3DModel`; None for that of the exported model.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: list[str] | None = None
    wrapper: str | None = "ema"
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    block_order: str | None = None

    FILE_NAME = "original_extras.safetensors"

    def save(self, path: str | os.PathLike) -> None:
        """Writes tensors and layout to a safetensors file; the layout is in its metadata."""
        layout = {
            "keys": self.keys,
            "wrapper": self.wrapper,
            "dtypes": {key: str(dtype).removeprefix("torch.") for key, dtype in self.dtypes.items()},
            "block_order": self.block_order,
        }
        save_file(self.tensors, path, metadata={"format": "pt", "original_layout": json.dumps(layout)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "OriginalExtras":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or was not written by `save`.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                layout = json.loads((file.metadata() or {})["original_layout"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            by_name = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
            dtypes = {key: by_name[name] for key, name in layout["dtypes"].items()}
            keys, wrapper = layout["keys"], layout["wrapper"]
            if wrapper not in (None, "ema", "model"):
                raise ValueError("unknown wrapper")
            if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
                raise ValueError("keys are not names")
            return cls(tensors, keys, wrapper, dtypes, layout["block_order"])
        except (safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: is damaged, or not a file of extras as `endora convert` writes it.") from error


def load_original_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
    block_order: str = "interleaved",
    num_attention_heads: int | None = None,
) -> EndoraTransformer3DModel:
    """The model in a checkpoint of the official code, in float32 on the CPU and in eval mode.

    Depth, width, patch and latent size, frames, classes and channels are those of the tensors. Nothing in the file is
    executed: a pickle of anything but tensors is refused.

    Args:
        path_or_state_dict: an official `.pt`, or its content: `{"ema": state_dict}`, `{"model": state_dict}` ("ema"
            comes first where there are both, and other entries are ignored) or a bare state dict, with or without the
            prefix `module.` of DistributedDataParallel. The tensors are copied: neither file nor state dict is
            referred to afterwards.
        block_order: "interleaved", or "sequential" for the paper's ablation without interlacing, whose files have the
            same keys, so that only the caller can know.
        num_attention_heads: None for the official number of a width (1152 and 1024: 16, 768: 12, 384: 6).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or needs code to be read; keys are missing or unexpected (all are
            named); shapes do not fit; a stored position table differs from the computed one by more than 1e-3; a
            weight is not finite; the number of heads is needed and not given, or does not divide the width.
    """
    return read_original_checkpoint(path_or_state_dict, block_order, num_attention_heads)[0]


def read_original_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
    block_order: str = "interleaved",
    num_attention_heads: int | None = None,
) -> tuple[EndoraTransformer3DModel, OriginalExtras]:
    """`load_original_checkpoint`, with what the file holds beyond the model."""
    if isinstance(path_or_state_dict, Mapping):
        name, content = "state dict", path_or_state_dict
    else:
        name, content = os.fspath(path_or_state_dict), read_torch_file(Path(path_or_state_dict))
    wrapper, stored = find_state_dict(content, name)
    del content

    # 1. The layout of the file, then its keys without the prefix of DistributedDataParallel
    extras = OriginalExtras(
        keys=list(stored),
        wrapper=wrapper,
        dtypes={key: tensor.dtype for key, tensor in stored.items() if tensor.dtype != torch.float32},
        block_order=block_order,
    )
    prefix = "module." if all(key.startswith("module.") for key in stored) else ""
    state_dict = {key.removeprefix(prefix): tensor.detach() for key, tensor in stored.items()}
    check_keys(state_dict, name)

    # 2. The model, without memory for its weights
    config = infer_config(state_dict, block_order, num_attention_heads, name)
    try:
        with torch.device("meta"):
            transformer = EndoraTransformer3DModel(**config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    names = parameter_names(config["num_layers"], block_order, config["num_classes"] is not None)
    check_shapes(state_dict, transformer, names, name)
    check_tables(state_dict, config, name)

    # 3. Its weights: copies, so that none refers to the file or is a part of a larger tensor
    weights: dict[str, torch.Tensor] = {}
    for key, parameters in names.items():
        if not torch.isfinite(state_dict[key]).all():
            raise ValueError(f"{name}: {key} has values that are not finite.")
        for parameter, part in zip(parameters, state_dict[key].chunk(len(parameters)), strict=True):
            weights[parameter] = part.to("cpu", torch.float32, copy=True).contiguous()
    transformer.load_state_dict(weights, strict=True, assign=True)

    extras.tensors = {
        key: tensor.to("cpu", copy=True).contiguous() for key, tensor in state_dict.items() if key not in names
    }
    return transformer.eval(), extras


def save_original_checkpoint(
    transformer: EndoraTransformer3DModel,
    path: str | os.PathLike,
    extras: OriginalExtras | str | os.PathLike | None = None,
) -> dict[str, str]:
    """Writes a checkpoint that the official code loads. It appears whole or not at all.

    Without extras the file is `{"ema": state_dict}` in the order of the official class, without `cov.weight`, which
    the official sampler does not have. With the extras of `read_original_checkpoint` and unchanged float32 weights it
    equals the official file: same wrapper, same keys in the same order, same tensors bit for bit. Tensors get the
    dtype they had in that file, or float32 without extras, whatever the dtype of the model: a model cast to half
    precision has lost the bits that the file would need.

    Args:
        transformer: a model of square training size.
        path: the `.pt` to write; its folder exists. A file that is there is replaced.
        extras: the extras or the path of their file.

    Returns:
        Keys that neither the model nor the extras hold, each with what was written: "computed" for position tables,
        "zeros, no layer uses it" for the unused layers, which the official code needs to load the file strictly.

    Raises:
        FileNotFoundError: the folder of `path` or the file of extras does not exist.
        ValueError: the extras belong to another model; or the official format cannot express the model: LoRA layers,
            fused projections, a training size that is not square, classes without a null class.
    """
    if extras is None:
        extras = OriginalExtras()
    elif not isinstance(extras, OriginalExtras):
        extras = OriginalExtras.load(extras)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder {path.parent} does not exist; create it first.")

    # 1. What belongs into the file
    config: Any = transformer.config
    block_order = extras.block_order or config.block_order
    names = parameter_names(config.num_layers, config.block_order, config.num_classes is not None)
    parameters = transformer.state_dict()
    foreign = sorted(set(parameters) ^ {parameter for group in names.values() for parameter in group})
    if foreign:
        raise ValueError(
            f"the model differs from the official one in {', '.join(foreign)}: unload or fuse LoRA layers and unfuse "
            "projections before exporting."
        )
    if config.num_classes is not None and transformer.null_class is None:
        raise ValueError("class_dropout_prob=0: the official format knows models with a null class only.")
    order = official_order(names, "cov.weight" in extras.tensors)
    keys = order if extras.keys is None else extras.keys
    if block_order != config.block_order or {key.removeprefix("module.") for key in keys} != set(order):
        raise ValueError(
            f"the extras belong to another model: they describe {len(keys)} tensors in {block_order} order, and this "
            f"model has {len(order)} in {config.block_order} order."
        )

    # 2. Tensors that no layer holds
    regenerated = {}
    others = dict(extras.tensors)
    for key, table in position_tables(transformer).items():
        if key not in others:
            others[key] = table
            regenerated[key] = "computed"
        elif others[key].shape != table.shape:
            raise ValueError(
                f"the extras belong to another model: {key} is {tuple(others[key].shape)} there, and this model's is "
                f"{tuple(table.shape)}."
            )
    for key, shape in UNUSED_SHAPES.items():
        if key not in others:
            others[key] = torch.zeros(shape)
            regenerated[key] = "zeros, no layer uses it"

    # 3. The state dict; torch.save writes whole storages, so each tensor gets one of its own size
    state_dict: OrderedDict[str, torch.Tensor] = OrderedDict()
    for key in keys:
        official = key.removeprefix("module.")
        group = [parameters[parameter].detach() for parameter in names.get(official, ())]
        tensor = others[official] if not group else group[0] if len(group) == 1 else torch.cat(group)
        tensor = tensor.to("cpu", extras.dtypes.get(key, torch.float32)).contiguous()
        state_dict[key] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor

    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        torch.save(state_dict if extras.wrapper is None else {extras.wrapper: state_dict}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return regenerated


def read_torch_file(path: Path) -> Any:
    """The content of a file written by `torch.save`: tensors and plain containers, nothing that runs code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is a folder, or the file is empty, damaged, no checkpoint, or holds other objects.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected a .pt file of the official code.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty (0 bytes).")
    try:
        # A memory-mapped compressed archive would load without an error, its tensors made of compressed bytes.
        mappable = False
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                mappable = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the format; what matters of it is said below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damage shows as RuntimeError, EOFError, KeyError, UnpicklingError and others
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise ValueError(
                f"{path}: refused, because it holds {refused[1]} beside tensors, and reading that could run code from "
                "the file; expected a state dict of tensors alone."
            ) from error
        raise ValueError(
            f"{path}: is damaged, or not a checkpoint written by torch.save; expected a state dict of tensors alone."
        ) from error


def find_state_dict(content: Any, name: str) -> tuple[str | None, Mapping[str, torch.Tensor]]:
    """The state dict in the content of a checkpoint, with the key it is under ("ema", "model", or None for bare).

    Raises:
        ValueError: there is none, or its values are not all strided tensors of float32, float16 or bfloat16.
    """
    expected = 'expected {"ema": state_dict}, {"model": state_dict} or a state dict'
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: holds a {type(content).__name__}; {expected}.")
    wrapper = next((key for key in ("ema", "model") if isinstance(content.get(key), Mapping)), None)
    state_dict = content if wrapper is None else content[wrapper]
    if len(state_dict) == 0:
        raise ValueError(f"{name}: holds an empty dict; {expected}.")
    others = [str(key) for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others or not all(isinstance(key, str) for key in state_dict):
        raise ValueError(f"{name}: holds a dict with other things than tensors ({', '.join(others[:8])}); {expected}.")
    unfit = [
        f"{key} ({str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')})"
        for key, tensor in state_dict.items()
        if tensor.dtype not in FLOAT_DTYPES
        or tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.is_nested
        # a few stored numbers spread by stride 0 over more memory than there is
        or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ]
    if unfit:
        raise ValueError(f"{name}: {', '.join(unfit)}: expected dense float32, float16 or bfloat16 tensors.")
    return wrapper, state_dict


def parameter_names(num_layers: int, block_order: str, has_classes: bool) -> dict[str, tuple[str, ...]]:
    """Official key -> names in `EndoraTransformer3DModel`, in official order; three names where rows are stacked.

    Only tensors that the model holds; see `official_order` for all.
    """
    modules: dict[str, tuple[str, ...]] = {
        "x_embedder.proj": ("patch_embed",),
        "t_embedder.mlp.0": ("time_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_embedder.linear_2",),
    }
    for index in range(2 * num_layers):
        if block_order == "interleaved":
            layer, over_time = divmod(index, 2)
        else:
            over_time, layer = divmod(index, num_layers)
        block = f"{'temporal_' if over_time else ''}transformer_blocks.{layer}"
        modules[f"blocks.{index}.attn.qkv"] = tuple(f"{block}.attn.to_{part}" for part in "qkv")
        modules[f"blocks.{index}.attn.proj"] = (f"{block}.attn.to_out.0",)
        modules[f"blocks.{index}.mlp.fc1"] = (f"{block}.ff.net.0.proj",)
        modules[f"blocks.{index}.mlp.fc2"] = (f"{block}.ff.net.2",)
        modules[f"blocks.{index}.adaLN_modulation.1"] = (f"{block}.modulation",)
    modules["final_layer.linear"] = ("proj_out",)
    modules["final_layer.adaLN_modulation.1"] = ("modulation_out",)

    names = {
        f"{official}.{kind}": tuple(f"{module}.{kind}" for module in group)
        for official, group in modules.items()
        for kind in ("weight", "bias")
    }
    if has_classes:
        names["y_embedder.embedding_table.weight"] = ("class_embedder.embedding_table.weight",)
    return names


def official_order(names: Mapping[str, tuple[str, ...]], has_prior: bool) -> list[str]:
    """All keys of an official state dict in the order of the official class, from those of `parameter_names`."""
    embedders = [key for key in names if key.startswith(("x_embedder.", "t_embedder.", "y_embedder."))]
    prior = ["cov.weight"] if has_prior else []
    rest = [key for key in names if key not in embedders]
    return ["pos_embed", "temp_embed", *embedders, *UNUSED_SHAPES, *prior, *rest]


def position_tables(transformer: EndoraTransformer3DModel) -> dict[str, torch.Tensor]:
    """`pos_embed` `(1, N, D)` and `temp_embed` `(1, F, D)` of the model's training size, in float32.

    Raises:
        ValueError: for a training size that is not square, which the official format cannot express.
    """
    config: Any = transformer.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"sample_size={size}: the official format knows square sizes only.")
    return computed_tables(
        height // config.patch_size, config.num_frames, config.num_attention_heads * config.attention_head_dim
    )


def computed_tables(grid_size: int, num_frames: int, width: int) -> dict[str, torch.Tensor]:
    like = torch.empty(width)
    return {
        "pos_embed": spatial_position_table(grid_size, grid_size, like)[None],
        "temp_embed": temporal_position_table(num_frames, like).transpose(0, 1),
    }


def check_keys(state_dict: Mapping[str, torch.Tensor], name: str) -> None:
    """Raises a ValueError that names every missing and every unexpected key.

    The number of blocks is that of the highest index, made even; `cov.weight` and `y_embedder` are free to be there.
    """
    indices = [int(match[1]) for match in (re.match(r"blocks\.([0-9]{1,3})\.", key) for key in state_dict) if match]
    num_layers = max(indices, default=1) // 2 + 1
    has_classes = any(key.startswith("y_embedder.") for key in state_dict)
    names = parameter_names(num_layers, "interleaved", has_classes)
    expected = official_order(names, "cov.weight" in state_dict)
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in set(expected)]
    if missing or unexpected:
        parts = [f"missing keys: {', '.join(missing)}"] if missing else []
        parts += [f"unexpected keys: {', '.join(unexpected)}"] if unexpected else []
        raise ValueError(f"{name}: is no official Endora checkpoint of {2 * num_layers} blocks: {'; '.join(parts)}.")


def infer_config(
    state_dict: Mapping[str, torch.Tensor], block_order: str, num_attention_heads: int | None, name: str
) -> dict[str, Any]:
    """Arguments of `EndoraTransformer3DModel`, from the shapes of a state dict with all its keys.

    Raises:
        ValueError: for shapes that no model has, an unknown number of heads, heads that do not divide the width.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}

    def shape_of(key: str, *layout: str) -> tuple[int, ...]:
        shape = shapes[key]
        if len(shape) != len(layout) or 0 in shape:
            raise ValueError(f"{name}: {key} has shape {shape}; expected ({', '.join(layout)}), none of them 0.")
        return shape

    # 1. Sizes
    width, in_channels, patch_size, _ = shape_of("x_embedder.proj.weight", "width", "channels", "patch", "patch")
    _, num_patches, _ = shape_of("pos_embed", "1", "patches", "width")
    _, num_frames, _ = shape_of("temp_embed", "1", "frames", "width")
    hidden, _ = shape_of("blocks.0.mlp.fc1.weight", "hidden", "width")
    outputs, _ = shape_of("final_layer.linear.weight", "patch * patch * channels", "width")
    grid_size = math.isqrt(num_patches)
    if grid_size**2 != num_patches:
        raise ValueError(f"{name}: pos_embed has {num_patches} positions; expected a square number.")
    out_channels, remainder = divmod(outputs, patch_size**2)
    if remainder or out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"{name}: final_layer.linear has {outputs} outputs; expected {patch_size**2 * in_channels}, or "
            f"{2 * patch_size**2 * in_channels} with variance."
        )
    num_classes = None
    if "y_embedder.embedding_table.weight" in shapes:
        rows, _ = shape_of("y_embedder.embedding_table.weight", "classes + 1", "width")
        num_classes = rows - 1  # the last row is the null class
        if num_classes < 1:
            raise ValueError(f"{name}: y_embedder.embedding_table has 1 row; expected the classes and the null class.")
    mlp_ratio = hidden / width
    if int(width * mlp_ratio) < hidden:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)

    # 2. Heads
    if num_attention_heads is None:
        if width not in OFFICIAL_HEADS:
            official = ", ".join(f"{known} ({heads} heads)" for known, heads in OFFICIAL_HEADS.items())
            raise ValueError(
                f"{name}: a checkpoint does not tell its number of heads, so width {width} needs num_attention_heads; "
                f"known are {official}."
            )
        num_attention_heads = OFFICIAL_HEADS[width]
    if num_attention_heads < 1 or width % num_attention_heads != 0:
        raise ValueError(f"{name}: num_attention_heads={num_attention_heads} does not divide the width {width}.")

    return {
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": width // num_attention_heads,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_layers": sum(key.endswith(".attn.qkv.weight") for key in shapes) // 2,
        "sample_size": grid_size * patch_size,
        "patch_size": patch_size,
        "num_frames": num_frames,
        "mlp_ratio": mlp_ratio,
        "num_classes": num_classes,
        "block_order": block_order,
    }


def check_shapes(
    state_dict: Mapping[str, torch.Tensor],
    transformer: EndoraTransformer3DModel,
    names: Mapping[str, tuple[str, ...]],
    name: str,
) -> None:
    """Raises a ValueError that names every tensor of another shape than the model's."""
    parameters = transformer.state_dict()
    wrong = []
    for key, group in names.items():
        rows, *rest = parameters[group[0]].shape
        expected = (rows * len(group), *rest)
        if tuple(state_dict[key].shape) != expected:
            wrong.append(f"{key} is {tuple(state_dict[key].shape)} instead of {expected}")
    if wrong:
        raise ValueError(f"{name}: shapes do not fit together: {', '.join(wrong)}.")


def check_tables(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> None:
    """Raises a ValueError for a stored position table that is not the one the model computes."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    grid_size = config["sample_size"] // config["patch_size"]
    for key, computed in computed_tables(grid_size, config["num_frames"], width).items():
        stored = state_dict[key]
        if stored.shape != computed.shape:
            raise ValueError(f"{name}: {key} is {tuple(stored.shape)} instead of {tuple(computed.shape)}.")
        difference = (stored.to("cpu", torch.float32) - computed).abs().max().item()
        tolerance = TABLE_TOLERANCE + torch.finfo(stored.dtype).eps / 4  # half a step of values below 1
        if not difference <= tolerance:  # also where it is not a number
            raise ValueError(
                f"{name}: {key} differs from the computed table by up to {difference:.3g}, more than "
                f"{TABLE_TOLERANCE:g}."
            )
