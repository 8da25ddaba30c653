"""Checkpoints of the official LVDM code (https://github.com/YingqingHe/LVDM), and of its copy for endoscopy
(https://github.com/CUHK-AIM-Group/Endora, `Other-Methods/LVDM`): reading them into the models.

A `.ckpt` of PyTorch Lightning holds `{"state_dict": ...}`. That of a denoiser has the UNet
(`model.diffusion_model.*`), its moving average (`model_ema.*`, names without their dots), the noise schedule (`betas`
and tables made from it) and the autoencoder (`first_stage_model.*`); that of an autoencoder has its networks and its
loss (`loss.*`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from ...models.original_checkpoint import FLOAT_DTYPES, read_torch_file
from .autoencoder_lvdm import LVDMAutoencoder
from .lvdm_loss import make_lvdm_scheduler
from .unet_lvdm import LVDMUNet3DModel

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
EMA_PREFIX = "model_ema."
EMA_COUNTERS = {"model_ema.decay", "model_ema.num_updates"}

# Tables of the noise schedule, all made from `betas`; and the scale where it was measured in training.
SCHEDULE_TABLES = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}
OPTIONAL_TABLES = {"scale_factor", "logvar"}

RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "modulation",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
ATTENTION = {
    "norm_s": "spatial.norm",
    "norm_t": "temporal.norm",
    "qkv_s": "spatial.to_qkv",
    "qkv_t": "temporal.to_qkv",
    "proj_out_s": "spatial.to_out",
    "proj_out_t": "temporal.to_out",
}


@dataclass
class LVDMCheckpoint:
    """What a denoiser's checkpoint holds.

    Args:
        unet: the denoiser, in float32 on the CPU and in eval mode.
        autoencoder: likewise.
        scheduler: with the checkpoint's noise schedule.
    """

    unet: LVDMUNet3DModel
    autoencoder: LVDMAutoencoder
    scheduler: DDPMScheduler


def load_lvdm_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
    use_ema: bool = True,
    sample_size: int = 16,
    temporal_factor: int = 4,
    num_attention_heads: int = 4,
) -> LVDMCheckpoint:
    """The models in a denoiser's checkpoint: of short clips, or of prediction or interpolation in long videos.

    Depth, widths, channels, classes and frames are those of the tensors. Nothing in the file is executed: a pickle of
    anything but tensors and plain values is refused. `LVDMPipeline(checkpoint.autoencoder, checkpoint.unet,
    checkpoint.scheduler)` samples from it; what the latents are scaled by is in the official config alone, and the
    pipeline's defaults are those for sky and endoscopy. (UCF-101: 0.220142075 and 0.5837740898.)

    Args:
        path_or_state_dict: an official `.ckpt`, or its content: `{"state_dict": ...}` or a bare state dict.
        use_ema: the moving average instead of the last weights. The official script for short clips
            (`scripts/sample_uncond.py`) samples from the last weights, that for long videos from the average.
        sample_size: latent height and width that it was trained at: 16 for endoscopy, 32 for sky and UCF-101.
        temporal_factor: frames per latent frame; the tensors do not tell it.
        num_attention_heads: 4 in every official config; the tensors do not tell it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or needs code to be read; names are missing or unknown, shapes do not
            fit, a weight is not finite, or there is no moving average.
    """
    name, state_dict = read_state_dict(path_or_state_dict)
    if not any(key.startswith(UNET_PREFIX) for key in state_dict):
        raise ValueError(f"{name}: has no {UNET_PREFIX}*; expected the checkpoint of an official denoiser.")

    # 1. The models, without memory for their weights
    unet_config = infer_unet_config(state_dict, sample_size, num_attention_heads, name)
    autoencoder_config = infer_autoencoder_config(state_dict, AUTOENCODER_PREFIX, temporal_factor, name)
    unet = empty_model(LVDMUNet3DModel, unet_config, name)
    autoencoder = empty_model(LVDMAutoencoder, autoencoder_config, name)

    # 2. Names
    unet_names = official_unet_names(unet)
    autoencoder_names = official_autoencoder_names(autoencoder)
    ema_names = {ema_name(official): ours for official, ours in unet_names.items()}
    has_ema = any(key.startswith(EMA_PREFIX) for key in state_dict)
    if use_ema and not has_ema:
        raise ValueError(f"{name}: has no moving average ({EMA_PREFIX}*); pass use_ema=False for the last weights.")
    expected = {UNET_PREFIX + key for key in unet_names} | {AUTOENCODER_PREFIX + key for key in autoencoder_names}
    expected |= SCHEDULE_TABLES | (set(ema_names) | EMA_COUNTERS if has_ema else set())
    check_names(set(state_dict), expected, OPTIONAL_TABLES, name)

    # 3. Weights
    taken = ema_names if use_ema else {UNET_PREFIX + key: ours for key, ours in unet_names.items()}
    fill(unet, taken, state_dict, name)
    fill(autoencoder, {AUTOENCODER_PREFIX + key: ours for key, ours in autoencoder_names.items()}, state_dict, name)
    return LVDMCheckpoint(unet, autoencoder, scheduler_of(state_dict["betas"]))


def load_lvdm_autoencoder_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any], temporal_factor: int = 4
) -> LVDMAutoencoder:
    """The autoencoder in its own checkpoint, in float32 on the CPU and in eval mode.

    Its loss (`loss.*`: LPIPS, the discriminator, the variance) is left out.

    Args:
        path_or_state_dict: an official `.ckpt`, or its content: `{"state_dict": ...}` or a bare state dict.
        temporal_factor: frames per latent frame; the tensors do not tell it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_lvdm_checkpoint`.
    """
    name, state_dict = read_state_dict(path_or_state_dict)
    networks = {key: tensor for key, tensor in state_dict.items() if not key.startswith("loss.")}
    config = infer_autoencoder_config(networks, "", temporal_factor, name)
    autoencoder = empty_model(LVDMAutoencoder, config, name)
    names = official_autoencoder_names(autoencoder)
    check_names(set(networks), set(names), set(), name)
    fill(autoencoder, names, networks, name)
    return autoencoder


def read_state_dict(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
) -> tuple[str, dict[str, torch.Tensor]]:
    """What to call the checkpoint in messages, and its tensors by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no state dict, or one with other things than tensors.
    """
    if isinstance(path_or_state_dict, Mapping):
        name, content = "state dict", path_or_state_dict
    else:
        name, content = os.fspath(path_or_state_dict), read_torch_file(Path(path_or_state_dict))
    state_dict = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state_dict, Mapping) or len(state_dict) == 0:
        raise ValueError(f'{name}: expected {{"state_dict": ...}} or a state dict of tensors.')
    others = [str(key) for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{name}: holds other things than tensors ({some_of(others)}); expected a state dict.")
    return name, {str(key): tensor.detach() for key, tensor in state_dict.items()}


def infer_unet_config(
    state_dict: Mapping[str, torch.Tensor], sample_size: int, num_attention_heads: int, name: str
) -> dict[str, Any]:
    """The configuration of the UNet that the tensors under `model.diffusion_model.` belong to.

    Raises:
        ValueError: a tensor that tells it is missing or has another number of dimensions.
    """

    def size_of(key: str, dimension: int) -> int:
        tensor = state_dict.get(UNET_PREFIX + key)
        if tensor is None or tensor.ndim <= dimension:
            raise ValueError(f"{name}: lacks {UNET_PREFIX}{key}, or has it in another shape.")
        return tensor.shape[dimension]

    # 1. The way down, block by block
    model_channels = size_of("input_blocks.0.0.weight", 0)
    multipliers: list[int] = []
    attention_stages: list[int] = []
    layers_by_stage, block = [0], 1
    while any(key.startswith(f"{UNET_PREFIX}input_blocks.{block}.") for key in state_dict):
        if f"{UNET_PREFIX}input_blocks.{block}.0.op.weight" in state_dict:
            layers_by_stage.append(0)
        else:
            stage = len(layers_by_stage) - 1
            layers_by_stage[stage] += 1
            multipliers[stage:] = [size_of(f"input_blocks.{block}.0.out_layers.3.weight", 0) // model_channels]
            if f"{UNET_PREFIX}input_blocks.{block}.1.qkv_s.weight" in state_dict:
                attention_stages.append(stage)
        block += 1
    if len(set(layers_by_stage)) != 1 or layers_by_stage[0] == 0:
        raise ValueError(f"{name}: stages have {layers_by_stage} residual blocks: expected equal numbers.")

    # 2. Frames, channels and what is embedded
    num_frames = (size_of("middle_block.1.relative_position_k.embeddings_table", 0) - 1) // 2
    channels, in_channels = size_of("out.2.weight", 0), size_of("input_blocks.0.0.weight", 1)
    if in_channels - channels not in (0, 1):
        raise ValueError(
            f"{name}: the UNet takes {in_channels} channels and returns {channels}: expected equal numbers, or one "
            "more for the mask of given frames."
        )
    num_embedded = size_of("label_emb.weight", 0) if f"{UNET_PREFIX}label_emb.weight" in state_dict else 0
    completes = in_channels == channels + 1
    return {
        "in_channels": channels,
        "model_channels": model_channels,
        "channel_multipliers": tuple(multipliers),
        "layers_per_stage": layers_by_stage[0],
        "attention_stages": tuple(sorted(set(attention_stages))),
        "num_attention_heads": num_attention_heads,
        "sample_size": sample_size,
        "num_frames": num_frames,
        # the same embedding holds classes, or the noise levels of given frames
        "num_classes": num_embedded if num_embedded and not completes else None,
        "class_dropout_prob": 0.0,
        "conditioning": "mask" if completes else None,
        "num_noise_levels": num_embedded if completes else 0,
    }


def infer_autoencoder_config(
    state_dict: Mapping[str, torch.Tensor], prefix: str, temporal_factor: int, name: str
) -> dict[str, Any]:
    """The configuration of the autoencoder that the tensors under `prefix` belong to.

    Raises:
        ValueError: a tensor that tells it is missing.
    """
    sizes = {}
    for key in ("encoder.conv_first.conv.weight", "quant_conv.conv.weight"):
        if prefix + key not in state_dict or state_dict[prefix + key].ndim != 5:
            raise ValueError(f"{name}: lacks {prefix}{key}; expected the checkpoint of an official 3-D autoencoder.")
        sizes[key] = state_dict[prefix + key].shape
    num_blocks = 0
    while f"{prefix}encoder.conv_blocks.{num_blocks}.down.conv.weight" in state_dict:
        num_blocks += 1
    return {
        "in_channels": sizes["encoder.conv_first.conv.weight"][1],
        "latent_channels": sizes["quant_conv.conv.weight"][0] // 2,
        "base_channels": sizes["encoder.conv_first.conv.weight"][0],
        "temporal_factor": temporal_factor,
        "spatial_factor": 2**num_blocks,
    }


def empty_model(model_class: type, config: dict[str, Any], name: str) -> Any:
    """A model without memory for its weights; a ValueError names the checkpoint that its configuration is of."""
    try:
        with torch.device("meta"):
            return model_class(**config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def official_unet_names(unet: LVDMUNet3DModel) -> dict[str, str]:
    """Official name, without its prefix -> name in the model, of every parameter."""
    config: Any = unet.config
    modules = {
        "time_embed.0": "time_embedder.linear_1",
        "time_embed.2": "time_embedder.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "norm_out",
        "out.2": "conv_out",
    }
    parameters = {}
    if config.num_classes is not None:
        parameters["label_emb.weight"] = "class_embedder.embedding_table.weight"
    if config.num_noise_levels:
        parameters["label_emb.weight"] = "noise_level_embedder.weight"

    # 1. Residual blocks and attentions: a layer of the model -> the official block that has both, at which places
    num_stages, layers = len(config.channel_multipliers), config.layers_per_stage
    blocks = {}
    for stage in range(num_stages):
        first = 1 + stage * (layers + 1)  # every stage ends with a block that downsamples
        for layer in range(layers):
            blocks[f"down_stages.{stage}.layers.{layer}"] = f"input_blocks.{first + layer}", 0, 1
        if stage < num_stages - 1:
            modules[f"input_blocks.{first + layers}.0.op"] = f"down_stages.{stage}.downsample.conv"
        for layer in range(layers + 1):
            blocks[f"up_stages.{stage}.layers.{layer}"] = f"output_blocks.{stage * (layers + 1) + layer}", 0, 1
        if stage < num_stages - 1:  # in the last block of a stage, behind its attention where it has one
            has_attention = num_stages - 1 - stage in config.attention_stages
            upsample = f"output_blocks.{(stage + 1) * (layers + 1) - 1}.{1 + has_attention}.conv"
            modules[upsample] = f"up_stages.{stage}.upsample.conv"
    blocks["mid_stage.layers.0"] = "middle_block", 0, 1
    blocks["mid_stage.layers.1"] = "middle_block", 2, 3
    existing = {name for name, _ in unet.named_parameters()}
    for layer_name, (block, residual, attention) in blocks.items():
        for official, ours in RES_BLOCK.items():
            modules[f"{block}.{residual}.{official}"] = f"{layer_name}.resnet.{ours}"
        if f"{layer_name}.resnet.shortcut.weight" in existing:
            modules[f"{block}.{residual}.skip_connection"] = f"{layer_name}.resnet.shortcut"
        if f"{layer_name}.attention.temporal.relative_keys" in existing:
            for official, ours in ATTENTION.items():
                modules[f"{block}.{attention}.{official}"] = f"{layer_name}.attention.{ours}"
            for kind, table in {"k": "relative_keys", "v": "relative_values"}.items():
                key = f"{block}.{attention}.relative_position_{kind}.embeddings_table"
                parameters[key] = f"{layer_name}.attention.temporal.{table}"

    # 2. Every module has a weight and a bias
    for official, ours in modules.items():
        for kind in ("weight", "bias"):
            parameters[f"{official}.{kind}"] = f"{ours}.{kind}"
    return parameters


def official_autoencoder_names(autoencoder: LVDMAutoencoder) -> dict[str, str]:
    """Official name, without its prefix -> name in the model, of every parameter.

    The weight of a `SamePadConv3d` has two official names, `X.weight` and `X.conv.weight`.
    """
    convolutions = {
        "encoder.conv_first": "encoder.conv_in",
        "encoder.final_block.2": "encoder.conv_out",
        "decoder.conv_out": "decoder.conv_out",
    }
    modules = {"encoder.final_block.0": "encoder.norm_out"}
    for block in range(len(autoencoder.encoder.blocks)):
        convolutions[f"encoder.conv_blocks.{block}.down"] = f"encoder.blocks.{block}.down"
        modules[f"decoder.conv_blocks.{block}.up.convt"] = f"decoder.blocks.{block}.up.conv"
        residuals = {f"encoder.conv_blocks.{block}.res": f"encoder.blocks.{block}.res"}
        residuals |= {
            f"decoder.conv_blocks.{block}.{res}": f"decoder.blocks.{block}.{res}" for res in ("res1", "res2")
        }
        for official, ours in residuals.items():
            for number in (1, 2):
                modules[f"{official}.norm{number}"] = f"{ours}.norm{number}"
                convolutions[f"{official}.conv{number}"] = f"{ours}.conv{number}"
    modules |= {f"{official}.conv": f"{ours}.conv" for official, ours in convolutions.items()}
    convolutions |= {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    modules |= {f"{name}.conv": name for name in ("quant_conv", "post_quant_conv")}
    names = {
        f"{official}.{kind}": f"{ours}.{kind}" for official, ours in modules.items() for kind in ("weight", "bias")
    }
    return names | {f"{official}.weight": names[f"{official}.conv.weight"] for official in convolutions}


def ema_name(official: str) -> str:
    """The name in the moving average of a UNet's parameter, which has its dots removed but for the first."""
    return EMA_PREFIX + f"diffusion_model.{official}".replace(".", "")


def check_names(found: set[str], expected: set[str], optional: set[str], name: str) -> None:
    """Raises a ValueError that lists names that are missing, and those that are neither expected nor optional."""
    missing, unknown = sorted(expected - found), sorted(found - expected - optional)
    faults = []
    if missing:
        faults.append(f"lacks {some_of(missing)}")
    if unknown:
        faults.append(f"has the unknown {some_of(unknown)}")
    if faults:
        raise ValueError(f"{name}: {' and '.join(faults)}; expected the names of the official LVDM code.")


def fill(model: Any, names: Mapping[str, str], state_dict: Mapping[str, torch.Tensor], name: str) -> None:
    """Gives a model on the meta device its weights, copied to float32, and puts it into eval mode.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, or two names of one weight whose values
            differ.
    """
    shapes = {ours: parameter.shape for ours, parameter in model.named_parameters()}
    weights: dict[str, torch.Tensor] = {}
    for official, ours in names.items():
        tensor = state_dict[official]
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: {official} is {tensor.dtype}: expected floating-point numbers.")
        # a 1-D convolution of one element is a linear map
        if tensor.ndim == 3 and tensor.shape[2] == 1 and len(shapes[ours]) == 2:
            tensor = tensor.squeeze(2)
        if tensor.shape != shapes[ours]:
            raise ValueError(
                f"{name}: {official} has shape {tuple(state_dict[official].shape)}: expected {tuple(shapes[ours])}."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: {official} has values that are not finite.")
        weight = tensor.to("cpu", torch.float32, copy=True).contiguous()
        if ours in weights and not torch.equal(weights[ours], weight):
            raise ValueError(f"{name}: {official} differs from the other name of the same weight.")
        weights[ours] = weight
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()


def scheduler_of(betas: torch.Tensor) -> DDPMScheduler:
    """The scheduler of a checkpoint's betas: `make_lvdm_scheduler()` where they are the official ones."""
    scheduler = make_lvdm_scheduler()
    if betas.shape == scheduler.betas.shape and torch.allclose(betas.float().cpu(), scheduler.betas, atol=1e-7):
        return scheduler
    return DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        clip_sample=False,
        variance_type="fixed_small",
    )


def some_of(names: list[str]) -> str:
    """Up to eight names, and how many more there are."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + rest
