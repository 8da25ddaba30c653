"""Trains LVDM (He et al. 2022, https://arxiv.org/abs/2211.13221), a baseline of the paper's table 1, on videos.

    accelerate launch examples/train_lvdm.py --train_data_dir VIDEOS --output_dir OUT

trains the 3-D autoencoder, then the UNet that denoises its latents, and ends with an `LVDMPipeline` in OUT; what the
first stage leaves is in OUT/autoencoder-training. One after the other, and then the models of long videos:

    accelerate launch examples/train_lvdm.py --stage autoencoder --train_data_dir VIDEOS --output_dir AE
    accelerate launch examples/train_lvdm.py --stage denoiser --pretrained_autoencoder AE --train_data_dir VIDEOS \
        --output_dir SHORT
    accelerate launch examples/train_lvdm.py --stage prediction --pretrained_model SHORT --train_data_dir VIDEOS \
        --output_dir PREDICTION
    accelerate launch examples/train_lvdm.py --stage interpolation --pretrained_model PREDICTION \
        --train_data_dir VIDEOS --output_dir LONG

The defaults are those of the official configs for endoscopy; `--preset demo` gives clips of 64x64 pixels within half
an hour on two CPU cores. `--lpips_weights` adds the perceptual distance, which the official autoencoder is trained
with.

Every random number of a clip is a function of the seed and the clip's place in the training, so that a training that
was stopped goes on by `--resume_from_checkpoint latest` as if it had not been.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from safetensors import SafetensorError

from diffusers_endora.baselines.lvdm.autoencoder_lvdm import LVDMAutoencoder
from diffusers_endora.baselines.lvdm.autoencoder_trainer import AutoencoderTrainer
from diffusers_endora.baselines.lvdm.denoiser_trainer import DenoiserTrainer
from diffusers_endora.baselines.lvdm.lvdm_arguments import make_parser, parse_lvdm_arguments
from diffusers_endora.baselines.lvdm.lvdm_loss import LATENT_SCALE, LATENT_SHIFT, official_ddim
from diffusers_endora.baselines.lvdm.pipeline_lvdm import LVDMPipeline
from diffusers_endora.baselines.lvdm.stage_networks import (
    completing_unet,
    follow_pipeline,
    for_completion,
    load_autoencoder,
    new_autoencoder,
    new_unet,
    with_weights,
)
from diffusers_endora.baselines.lvdm.stage_trainer import StageTrainer
from diffusers_endora.data.clips import ClipDataset
from diffusers_endora.data.video_io import VideoError
from diffusers_endora.files import replacing_entries
from diffusers_endora.hub import save_model_card
from diffusers_endora.training.arguments import recorded
from diffusers_endora.training.processes import by_main_process
from diffusers_endora.training.setup import begin, end_training, load_clips, make_accelerator, publish, start_trackers
from diffusers_endora.training.training_run import BadStep

FIRST_STAGE = "autoencoder-training"  # folder within --output_dir; `autoencoder` is a part of the pipeline there


def main() -> None:
    """Trains as the command line says; see the module's docstring."""
    args = parse_lvdm_arguments(make_parser("Trains LVDM on a folder of videos or a Hugging Face video dataset."))
    hub_token, args.hub_token = args.hub_token, None  # not for logs and files
    try:
        accelerator = make_accelerator(args)
        resume_from = begin(args, accelerator, hub_token)
        if args.stage in ("prediction", "interpolation"):
            train_for_long_videos(args, accelerator, resume_from)
        elif args.stage == "denoiser":
            autoencoder = load_autoencoder(args.pretrained_autoencoder)
            train_denoiser(args, accelerator, resume_from, *load_clips(args), autoencoder)
        elif args.stage == "autoencoder":
            train_autoencoder(args, accelerator, resume_from, *load_clips(args), new_autoencoder(args))
        else:
            train_both(args, accelerator, resume_from)
        failed = accelerator.is_main_process and args.push_to_hub and not publish(args, hub_token)
        end_training(accelerator)
    except (ValueError, OSError, SafetensorError, BadStep, VideoError) as error:
        sys.exit(f"train_lvdm.py: error: {' '.join(str(error).split())}")  # diffusers' errors have several lines
    if failed:
        sys.exit(1)


# --- stages ----------------------------------------------------------------------------------------------------------


def train_both(args: argparse.Namespace, accelerator: Accelerator, resume_from: Path | None) -> None:
    """The autoencoder, in a folder of its own, then the denoiser."""
    dataset, held_out = load_clips(args)
    autoencoder = new_autoencoder(args)
    with init_empty_weights():
        new_unet(args, autoencoder, dataset.num_classes)  # sizes that do not fit are found now
    first_args = copy.copy(args)
    first_args.stage, first_args.push_to_hub = "autoencoder", False
    first_args.output_dir = str(Path(args.output_dir) / FIRST_STAGE)
    first_accelerator = make_accelerator(first_args)
    resume_first_from = begin(first_args, first_accelerator, None)
    train_autoencoder(first_args, first_accelerator, resume_first_from, dataset, held_out, autoencoder)
    for tracker in first_accelerator.trackers:  # the processes stay together
        tracker.finish()
    train_denoiser(args, accelerator, resume_from, dataset, held_out, autoencoder)


def train_autoencoder(
    args: argparse.Namespace,
    accelerator: Accelerator,
    resume_from: Path | None,
    dataset: ClipDataset,
    held_out: ClipDataset | None,
    autoencoder: LVDMAutoencoder,
) -> None:
    """Clips to latents and back."""
    torch.manual_seed(args.seed)  # the same initial weights of the discriminator in every process
    trainer = AutoencoderTrainer(args, accelerator, dataset, held_out, autoencoder)
    if args.lpips_weights is None:
        accelerator.print("Without --lpips_weights there is no perceptual distance, which the official loss has.")
    results = run(args, accelerator, trainer, resume_from, autoencoder)
    finish(args, accelerator, results, dataset, trainer.autoencoder.save_pretrained)


def train_denoiser(
    args: argparse.Namespace,
    accelerator: Accelerator,
    resume_from: Path | None,
    dataset: ClipDataset,
    held_out: ClipDataset | None,
    autoencoder: LVDMAutoencoder,
) -> None:
    """Noise to latents."""
    torch.manual_seed(args.seed)  # the same initial weights in every process
    unet = new_unet(args, autoencoder, dataset.num_classes)

    def assemble(weights: dict[str, torch.Tensor], scale: float, shift: float) -> LVDMPipeline:
        return LVDMPipeline(
            autoencoder,
            with_weights(unet, weights),
            official_ddim(),
            latent_scale=scale,
            latent_shift=shift,
            num_inference_steps=args.validation_inference_steps,
        )

    statistics = (LATENT_SCALE, LATENT_SHIFT) if args.latent_statistics == "official" else None
    trainer = DenoiserTrainer(args, accelerator, dataset, held_out, autoencoder, unet, assemble, statistics)
    results = run(args, accelerator, trainer, resume_from, unet)
    finish(args, accelerator, results, dataset, lambda folder: trainer.pipeline().save_pretrained(str(folder)))


def train_for_long_videos(args: argparse.Namespace, accelerator: Accelerator, resume_from: Path | None) -> None:
    """The models of the hierarchical long mode, each of which begins with the weights of the pipeline's UNet."""
    pipe = LVDMPipeline.from_pretrained(args.pretrained_model)
    completion = follow_pipeline(args, pipe)
    dataset, held_out = load_clips(for_completion(args, pipe, completion))
    if dataset.num_classes != pipe.unet.config.num_classes:
        raise ValueError(
            f"the corpus has {dataset.num_classes} classes and --pretrained_model {pipe.unet.config.num_classes}: "
            "expected the same, in the same order."
        )
    unet = completing_unet(pipe.unet, completion)

    def assemble(weights: dict[str, torch.Tensor], scale: float, shift: float) -> LVDMPipeline:
        parts = {**pipe.components, completion.component: with_weights(unet, weights)}
        return LVDMPipeline(
            **parts,
            latent_scale=scale,
            latent_shift=shift,
            num_inference_steps=pipe.config.num_inference_steps,
            prediction_stride=args.latent_stride,
        )

    statistics = pipe.config.latent_scale, pipe.config.latent_shift
    trainer = DenoiserTrainer(
        args, accelerator, dataset, held_out, pipe.autoencoder, unet, assemble, statistics, completion
    )
    results = run(args, accelerator, trainer, resume_from, unet)
    finish(args, accelerator, results, dataset, lambda folder: trainer.pipeline().save_pretrained(str(folder)))


# --- a stage from its first step to its last -------------------------------------------------------------------------


def run(
    args: argparse.Namespace, accelerator: Accelerator, trainer: StageTrainer, resume_from: Path | None, network: Any
) -> dict[str, Any]:
    """Takes the steps, from a checkpoint on if there is one; returns what was measured."""
    if resume_from is not None:
        trainer.resume(resume_from)
        accelerator.print(f"Resumed from {resume_from} at step {trainer.step}.")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    start_trackers("lvdm", args, accelerator)
    dataset = trainer.dataset
    accelerator.print(
        f"{type(network).__name__}: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, "
        f"{dataset.num_videos} videos ({dataset.num_broken} broken, {len(dataset.too_short)} too short, "
        f"{dataset.num_unlabelled} without a label), {trainer.clips_per_batch} clips x {accelerator.num_processes} "
        f"processes x {args.gradient_accumulation_steps} accumulated, {trainer.max_train_steps} steps"
    )
    try:
        trainer.fit()
    except (BadStep, VideoError):
        end_training(accelerator)
        raise
    return trainer.results()


def finish(
    args: argparse.Namespace,
    accelerator: Accelerator,
    results: dict[str, Any],
    dataset: ClipDataset,
    save: Callable[[Path], object],
) -> None:
    """Writes the result of a stage and its `training.json`, in the main process."""

    def write() -> None:
        facts = {"arguments": recorded(args), "results": results, "class_names": dataset.class_names}
        with replacing_entries(Path(args.output_dir)) as folder:
            save(folder)
            (folder / "training.json").write_text(json.dumps(facts, indent=2))
        if args.stage != "autoencoder":
            save_model_card(args.output_dir, vars(args), results, dataset.class_names)

    by_main_process(accelerator, write)
    measured = {name: value for name, value in results.items() if isinstance(value, float)}
    accelerator.print(f"{args.output_dir}: {', '.join(f'{name} {value:.4g}' for name, value in measured.items())}")


if __name__ == "__main__":
    main()
