"""Trains Endora on a folder of videos or a Hugging Face video dataset.

    accelerate launch examples/train_endora.py --train_data_dir VIDEOS --output_dir OUT \
        --pretrained_vae stabilityai/sd-vae-ft-mse --dino_model facebook/dino-vits8

The defaults are the paper's: XL/2, 16 frames of 128x128 and 8 still images a clip, 5 clips per device, AdamW at 1e-4,
EMA 0.9999, the DINO prior at weight 0.5, 150,000 steps. `--config` takes flags from a yaml file (examples/configs).

Every random number of a clip is a function of the seed and the clip's place in the training, so that a training that
was stopped goes on as if it had not been, and processes, batch size and accumulation share out the same steps.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.data.video_io import VideoError
from diffusers_endora.files import replacing_entries
from diffusers_endora.hub import save_model_card
from diffusers_endora.metrics.feature_extractors import hash_weights
from diffusers_endora.models.autoencoder import load_vae, load_vae_config
from diffusers_endora.pipelines.pipeline_endora import prediction_type_of
from diffusers_endora.training.arguments import add_model, new_parser, parse_arguments, recorded
from diffusers_endora.training.autoguidance import Autoguidance, load_transformer_like
from diffusers_endora.training.objective import make_scheduler
from diffusers_endora.training.presets import LEARNING_RATES
from diffusers_endora.training.setup import (
    begin,
    build_prior,
    build_transformer,
    end_training,
    load_clips,
    make_accelerator,
    networks_of,
    open_caches,
    publish,
    start_trackers,
)
from diffusers_endora.training.trainer import Trainer, summary
from diffusers_endora.training.training_model import TrainingModel
from diffusers_endora.training.training_run import BadStep
from diffusers_endora.training.validation import Validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; exits with one line on stderr and code 2 where they do not fit together."""
    parser = new_parser("Trains Endora on a folder of videos or a Hugging Face video dataset.")
    add_model(parser.add_argument_group("model"))
    args = parse_arguments(parser, argv)
    if args.pretrained_vae is None:
        parser.error("--pretrained_vae is required: the paper's is stabilityai/sd-vae-ft-mse.")
    if args.weaker_model is not None and args.pretrained_model is None:
        parser.error("--weaker_model needs --pretrained_model, the stronger one.")
    if not 1 <= args.autoguidance_scale < math.inf:
        parser.error(f"--autoguidance_scale {args.autoguidance_scale}: expected 1 (none) or more.")
    return args


def main() -> None:
    """Trains as the command line says; see the module's docstring."""
    args = parse_args()
    hub_token, args.hub_token = args.hub_token, None  # not for logs and files
    output_dir = Path(args.output_dir)
    try:
        accelerator = make_accelerator(args)
    except ValueError as error:
        sys.exit(f"train_endora.py: error: {error}")

    try:
        # 1. The checkpoint to go on from
        resume_from = begin(args, accelerator, hub_token)

        # 2. Networks and corpus
        scheduler = make_scheduler(args.prediction_type, args.zero_terminal_snr)
        vae_config = load_vae_config(args.pretrained_vae)
        dataset, held_out = load_clips(args)
        torch.manual_seed(args.seed)  # the same initial weights in every process
        transformer = build_transformer(args, vae_config, scheduler, dataset.num_classes)
        predicts = prediction_type_of(scheduler)
        guidance = None
        origin: dict[str, str] = {}  # what a resumed training has to share
        if args.pretrained_model is not None:
            transformer = load_transformer_like(transformer, predicts, args.pretrained_model)
            origin["pretrained_model"] = hash_weights(transformer)[:16]
        if args.weaker_model is not None:
            weaker = load_transformer_like(transformer, predicts, args.weaker_model)
            guidance = Autoguidance(transformer, weaker, args.autoguidance_scale)
            origin |= {"weaker_model": hash_weights(weaker)[:16], "autoguidance_scale": str(args.autoguidance_scale)}
        prior = build_prior(args, transformer)
        origin |= networks_of(args)
        datasets = [dataset] if held_out is None else [dataset, held_out]
        caches = open_caches(args, datasets, vae_config, prior, accelerator)
        model = TrainingModel(
            transformer,
            scheduler,
            prior,
            args.prior_weight,
            args.num_still_images,
            weighting=args.loss_weighting,
            gamma=args.snr_gamma,
            bias=args.sigmoid_bias,
            guidance=guidance,
        )

        # 3. The training
        def assemble(weights: dict[str, torch.Tensor]) -> EndoraPipeline:
            with init_empty_weights():
                sampler = EndoraTransformer3DModel.from_config(transformer.config)
            sampler.load_state_dict(weights, assign=True)
            own_scheduler = type(scheduler).from_config(scheduler.config)
            return EndoraPipeline(load_vae(args.pretrained_vae), sampler.eval(), own_scheduler)

        validation = Validation(args, assemble, dataset.num_classes, held_out, accelerator)
        trainer = Trainer(
            args,
            accelerator,
            model,
            vae_config,
            dataset,
            caches[0],
            held_out,
            caches[-1],
            validate=validation,
            learning_rate=LEARNING_RATES[args.preset] if args.learning_rate is None else args.learning_rate,
            origin=origin,
        )
        if resume_from is not None:
            trainer.resume(resume_from)
            accelerator.print(f"Resumed from {resume_from} at step {trainer.step}.")
        output_dir.mkdir(parents=True, exist_ok=True)
        start_trackers("endora", args, accelerator)
    except (ValueError, OSError) as error:
        sys.exit(f"train_endora.py: error: {error}")
    accelerator.print(
        f"{dataset.num_videos} videos ({dataset.num_broken} broken, {len(dataset.too_short)} too short, "
        f"{dataset.num_unlabelled} without a label, {dataset.num_ignored_files} other files ignored), "
        f"{sum(parameter.numel() for parameter in transformer.parameters()) / 1e6:.1f} M parameters, "
        f"{args.train_batch_size} clips x {accelerator.num_processes} processes x {args.gradient_accumulation_steps} "
        f"accumulated, {args.max_train_steps} steps"
    )
    try:
        trainer.fit()
    except (BadStep, VideoError) as error:
        end_training(accelerator)
        sys.exit(f"train_endora.py: error: {error}")

    # 4. Results
    results = trainer.results()
    weights, published = trainer.final_weights()
    results |= published
    failed = False
    if accelerator.is_main_process:
        facts = {"arguments": recorded(args), "results": results, "class_names": dataset.class_names}
        try:
            with replacing_entries(output_dir) as folder:
                assemble(weights).save_pretrained(str(folder))
                (folder / "training.json").write_text(json.dumps(facts, indent=2))
            save_model_card(output_dir, vars(args), results, dataset.class_names)
            print(summary(results))
            print(f"Pipeline: {output_dir}")
        except (ValueError, OSError, SafetensorError) as error:
            print(f"train_endora.py: error: {error}", file=sys.stderr)
            failed = True
        if args.push_to_hub and not failed:
            failed = not publish(args, hub_token)
    end_training(accelerator)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
