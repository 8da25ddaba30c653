"""Checkpoints of the baselines' official codes to pipelines of this package: what `endora convert-legacy` does."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .legacy_pickle import read_network_pickle
from .registry import LVDM, MOSTGAN_V, STYLEGAN_V, pipeline_class

GANS = {"stylegan-v": STYLEGAN_V, "mostgan-v": MOSTGAN_V}


@dataclass(frozen=True)
class Converted:
    """What a checkpoint became.

    Attributes:
        pipeline: of the class that was asked for.
        discriminator: of a GAN, where the file holds one that fits; no part of the pipeline.
        note: why there is no discriminator; None where there is one, or none belongs to the model.
    """

    pipeline: DiffusionPipeline
    discriminator: Any = None
    note: str | None = None


def convert_network_pickle(path: Path, model: str) -> Converted:
    """The averaged generator of a network pickle as a pipeline, and its discriminator.

    Args:
        path: `network-snapshot-*.pkl` of the official code; read by `read_network_pickle`.
        model: "stylegan-v" or "mostgan-v".

    Raises:
        ValueError: the file is not read, or its generator is not one of the model's.
    """
    kind = GANS[model]
    official: Any = importlib.import_module(f".{model.replace('-', '_')}.original_checkpoint", __package__)
    networks = read_network_pickle(path)
    try:
        generator = official.convert_generator(networks.tensors["G_ema"], networks.settings["G_ema"])
    except ValueError as error:
        raise ValueError(f"{path}: as the generator of {kind.method}: {error}") from error
    pipeline: Any = pipeline_class(kind)
    if "D" not in networks.tensors:
        return Converted(pipeline(generator=generator), note="the file holds no discriminator")
    try:
        discriminator = official.convert_discriminator(networks.tensors["D"])
    except ValueError as error:
        return Converted(pipeline(generator=generator), note=f"the discriminator is left out: {error}")
    return Converted(pipeline(generator=generator), discriminator)


def convert_lvdm_checkpoint(path: Path, resolution: int = 128, use_ema: bool = True) -> Converted:
    """The models of a checkpoint of the official LVDM for short clips as a pipeline, with the official DDIM sampler.

    Args:
        path: `.ckpt` of a denoiser, which holds the autoencoder as well; nothing in it is executed.
        resolution: pixels of the clips that it was trained on, which the file does not tell.
        use_ema: the moving average of the weights, or the last ones.

    Raises:
        ValueError: the file is not read, is not such a checkpoint, or is one for long videos.
    """
    from .lvdm.lvdm_loss import official_ddim
    from .lvdm.original_checkpoint import load_lvdm_checkpoint

    if resolution < 8 or resolution % 8:
        raise ValueError(f"--resolution {resolution}: expected a multiple of 8 pixels.")
    checkpoint = load_lvdm_checkpoint(path, use_ema, sample_size=resolution // 8)
    if checkpoint.unet.config.conditioning is not None:
        raise ValueError(
            f"{path}: is a model that continues or fills in clips; expected that of short clips, which a pipeline "
            "needs."
        )
    pipeline: Any = pipeline_class(LVDM)
    return Converted(pipeline(checkpoint.autoencoder, checkpoint.unet, official_ddim(checkpoint.scheduler.config)))
