"""From flags to the networks of LVDM's stages."""

import argparse
import copy
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights

from .autoencoder_lvdm import LVDMAutoencoder
from .denoiser_trainer import NOISE_LEVELS, Completion
from .latent_clips import latent_shape
from .lvdm_arguments import AUTOENCODERS, LATENT_STRIDE, UNETS
from .pipeline_lvdm import LVDMPipeline
from .unet_lvdm import LVDMUNet3DModel


def new_autoencoder(args: argparse.Namespace) -> LVDMAutoencoder:
    """An autoencoder of the preset's size."""
    torch.manual_seed(args.seed)  # the same initial weights in every process
    return LVDMAutoencoder(base_channels=args.autoencoder_channels, **AUTOENCODERS[args.preset])


def load_autoencoder(folder: str) -> LVDMAutoencoder:
    """The autoencoder of `--pretrained_autoencoder`: what the first stage wrote, or one in a pipeline's folder.

    Raises:
        ValueError: there is none.
    """
    for path in (Path(folder), Path(folder) / "autoencoder"):
        if (path / "config.json").is_file():
            config = json.loads((path / "config.json").read_text())
            if config.get("_class_name") == LVDMAutoencoder.__name__:
                return LVDMAutoencoder.from_pretrained(path)
    raise ValueError(f"--pretrained_autoencoder {folder}: expected the folder of an LVDMAutoencoder.")


def new_unet(args: argparse.Namespace, autoencoder: LVDMAutoencoder, num_classes: int | None) -> LVDMUNet3DModel:
    """A UNet of the preset's size for the autoencoder's latents; a ValueError where the sizes do not fit."""
    channels, num_frames, side, _ = latent_shape(autoencoder, args.num_frames, args.resolution)
    multipliers = UNETS[args.preset]["channel_multipliers"]
    multiple = autoencoder.config.spatial_factor * 2 ** (len(multipliers) - 1)
    if args.resolution % multiple:
        raise ValueError(
            f"--resolution {args.resolution}: expected a multiple of {multiple}, the autoencoder's "
            f"{autoencoder.config.spatial_factor} times what the UNet's {len(multipliers)} stages halve."
        )
    return LVDMUNet3DModel(
        in_channels=channels,
        model_channels=args.model_channels,
        layers_per_stage=args.layers_per_stage,
        sample_size=side,
        num_frames=num_frames,
        num_classes=num_classes,
        class_dropout_prob=args.class_dropout_prob,
        **UNETS[args.preset],
    )


def completing_unet(unet: LVDMUNet3DModel, completion: Completion) -> LVDMUNet3DModel:
    """A UNet that completes given latent frames and begins as `unet`, which is given nothing."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config["max_distance"] = unet.config.max_distance or unet.config.num_frames
    config |= {"conditioning": "mask", "num_noise_levels": NOISE_LEVELS + 1}
    config["num_frames"] = completion.num_latent_frames
    completing = LVDMUNet3DModel(**config)
    weights = unet.state_dict()
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, torch.zeros_like(first[:, :1])], dim=1)  # the mask's channel
    weights["noise_level_embedder.weight"] = torch.zeros_like(completing.noise_level_embedder.weight)
    completing.load_state_dict(weights)
    return completing


def with_weights(unet: LVDMUNet3DModel, weights: dict[str, torch.Tensor]) -> LVDMUNet3DModel:
    """Another UNet of the same configuration, with weights of its own."""
    with init_empty_weights():
        sampler = LVDMUNet3DModel.from_config(unet.config)
    sampler.load_state_dict(weights, assign=True)
    return sampler.eval()


def follow_pipeline(args: argparse.Namespace, pipe: LVDMPipeline) -> Completion:
    """What is to be completed; gives the flags the sizes that the pipeline was trained at.

    Raises:
        ValueError: flags say something else, or there is nothing yet to interpolate between.
    """
    config, factors = pipe.unet.config, pipe.autoencoder.config
    sizes = {"num_frames": config.num_frames * factors.temporal_factor}
    if not isinstance(config.sample_size, int):
        raise ValueError(f"--pretrained_model has sample_size={config.sample_size}: expected a square, one number.")
    sizes["resolution"] = config.sample_size * factors.spatial_factor
    for name, value in sizes.items():
        if getattr(args, name) not in (None, value):
            raise ValueError(f"--{name} {getattr(args, name)}: --pretrained_model was trained at {value}.")
        setattr(args, name, value)
    if args.frame_interval is None and args.window < args.num_frames:
        raise ValueError(f"--window {args.window}: expected at least the {args.num_frames} frames of a short clip.")
    args.class_dropout_prob = config.class_dropout_prob
    stride = pipe.config.prediction_stride
    is_known = args.latent_stride is not None and stride is not None
    if args.stage == "interpolation" and is_known and args.latent_stride != stride:
        raise ValueError(f"--latent_stride {args.latent_stride}: the prediction_unet was trained with {stride}.")
    if args.latent_stride is None:
        args.latent_stride = LATENT_STRIDE if args.stage == "prediction" or stride is None else stride
    if args.stage == "interpolation" and args.latent_stride < 2:
        raise ValueError(f"--latent_stride {args.latent_stride}: expected 2 or more; there is nothing to fill in.")
    if args.stage == "prediction":
        return Completion("prediction_unet", (0.5, 0.0), args.latent_stride, config.num_frames)
    if pipe.prediction_unet is None:
        raise ValueError("--pretrained_model has no prediction_unet: train it first, by --stage prediction.")
    return Completion("interpolation_unet", (0.0, 0.9), 1, args.latent_stride + 1)


def for_completion(args: argparse.Namespace, pipe: LVDMPipeline, completion: Completion) -> argparse.Namespace:
    """The flags with longer clips, in a window that is longer by as much, so that motion is as fast."""
    longer = copy.copy(args)
    longer.num_frames = completion.num_encoded_frames * pipe.autoencoder.config.temporal_factor
    longer.window = round(args.window * longer.num_frames / args.num_frames)
    return longer
