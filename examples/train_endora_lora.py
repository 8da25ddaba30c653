"""Adapts an Endora pipeline to another corpus by LoRA: few weights are trained, the pipeline's own stay as they are.

    accelerate launch examples/train_endora_lora.py --pretrained_model PIPELINE \
        --train_data_dir VIDEOS --output_dir OUT

Writes OUT/pytorch_lora_weights.safetensors, which `pipe.load_lora_weights("OUT")` puts into the same pipeline, and a
card. Size of the clips, classes and what is predicted are the pipeline's; a flag that says otherwise is refused.

Defaults: rank 16 in the attention projections of all blocks, AdamW at 1e-4, gradients clipped at norm 1, EMA 0.999
with warm-up, 5,000 steps. No DINO prior: it has shaped the pipeline's features already, and its projection, which a
pipeline does not hold, would begin at random; `--prior official --dino_model facebook/dino-vits8` adds it. The rest
is as in train_endora.py: clips, caches, resuming, and checkpoints, which hold the adapter alone.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from diffusers_endora import EndoraPipeline
from diffusers_endora.adapter_page import ADAPTER_WEIGHTS, adapter_card
from diffusers_endora.data.video_io import VideoError
from diffusers_endora.files import replacing_entries
from diffusers_endora.metrics.feature_extractors import hash_weights
from diffusers_endora.model_card import is_edited, name_of
from diffusers_endora.models.autoencoder import load_vae_config
from diffusers_endora.training.adapter import (
    add_adapter,
    check_adapter,
    follow_base,
    load_base,
    put_adapter_into,
    save_adapter,
    training_scheduler,
)
from diffusers_endora.training.arguments import new_parser, parse_arguments, recorded
from diffusers_endora.training.setup import (
    begin,
    build_prior,
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
    parser = new_parser("Adapts an Endora pipeline to another corpus by LoRA.")
    add_adapter(parser)
    args = parse_arguments(parser, argv)
    check_adapter(parser, args)
    if importlib.util.find_spec("peft") is None:
        parser.error('LoRA needs the package peft: pip install "diffusers-endora[lora]".')
    return args


def main() -> None:
    """Trains as the command line says; see the module's docstring."""
    args = parse_args()
    hub_token, args.hub_token = args.hub_token, None  # not for logs and files
    output_dir = Path(args.output_dir)
    try:
        accelerator = make_accelerator(args)
        if (output_dir / "model_index.json").exists():
            raise ValueError(f"{output_dir} is a pipeline's folder: choose another --output_dir for the adapter.")
        # 1. The checkpoint to go on from
        resume_from = begin(args, accelerator, hub_token)

        # 2. The base, what is trained of it, and the corpus
        is_on_hub = not Path(args.pretrained_model).is_dir()
        base_folder, base = load_base(args.pretrained_model)
        follow_base(args, base)
        args.pretrained_vae = str(base_folder / "vae")
        scheduler, transformer = training_scheduler(args, base), base.transformer
        del base  # its VAE
        base_hash = hash_weights(transformer)
        vae_config = load_vae_config(args.pretrained_vae)
        dataset, held_out = load_clips(args)
        if dataset.num_classes != transformer.config.num_classes:
            raise ValueError(
                f"the corpus has {dataset.num_classes} classes and the base {transformer.config.num_classes}: "
                "expected the same classes in the same order."
            )
        torch.manual_seed(args.seed)  # the same initial weights in every process
        put_adapter_into(transformer, args)
        prior = build_prior(args, transformer)
        datasets = [dataset] if held_out is None else [dataset, held_out]
        caches = open_caches(args, datasets, vae_config, prior, accelerator)
        weighting = {"weighting": args.loss_weighting, "gamma": args.snr_gamma, "bias": args.sigmoid_bias}
        model = TrainingModel(transformer, scheduler, prior, args.prior_weight, args.num_still_images, **weighting)

        # 3. The training
        def assemble(weights: dict[str, torch.Tensor]) -> EndoraPipeline:
            pipe = EndoraPipeline.from_pretrained(base_folder)
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(folder, transformer, weights)
                pipe.load_lora_weights(folder)
            return pipe

        trainer = Trainer(
            args,
            accelerator,
            model,
            vae_config,
            dataset,
            caches[0],
            held_out,
            caches[-1],
            validate=Validation(args, assemble, dataset.num_classes, held_out, accelerator),
            learning_rate=args.learning_rate,
            origin={
                **networks_of(args),
                "base": base_hash,
                **{name: getattr(args, name) for name in ("rank", "lora_alpha", "lora_dropout", "lora_targets")},
            },
        )
        if resume_from is not None:
            trainer.resume(resume_from)
            accelerator.print(f"Resumed from {resume_from} at step {trainer.step}.")
        output_dir.mkdir(parents=True, exist_ok=True)
        start_trackers("endora_lora", args, accelerator)
    except (ValueError, OSError) as error:
        sys.exit(f"train_endora_lora.py: error: {error}")
    num_trained = sum(parameter.numel() for parameter in trainer.averaged())
    accelerator.print(
        f"{dataset.num_videos} videos ({dataset.num_broken} broken, {len(dataset.too_short)} too short), "
        f"{num_trained / 1e6:.2f} M parameters of the adapter, "
        f"{args.train_batch_size} clips x {accelerator.num_processes} processes x {args.gradient_accumulation_steps} "
        f"accumulated, {args.max_train_steps} steps"
    )
    try:
        trainer.fit()
    except (BadStep, VideoError) as error:
        end_training(accelerator)
        sys.exit(f"train_endora_lora.py: error: {error}")

    # 4. Results
    results = {**trainer.results(), "num_trained_parameters": num_trained}
    weights, published = trainer.final_weights()
    results |= published
    failed = False
    if accelerator.is_main_process:
        origin = {"name": name_of(args.pretrained_model), "is_on_hub": is_on_hub, "transformer": base_hash}
        training = {
            "arguments": recorded(args),
            "results": results,
            "class_names": dataset.class_names,
            "base": origin,
        }
        card = output_dir / "README.md"
        try:
            with replacing_entries(output_dir) as folder:
                save_adapter(folder, transformer, weights)
                (folder / "training.json").write_text(json.dumps(training, indent=2))
                if not card.is_file() or not is_edited(card.read_text(encoding="utf-8")):
                    text = adapter_card(training, args.hub_model_id or output_dir.resolve().name, args.license)
                    (folder / "README.md").write_text(text, encoding="utf-8")
            print(summary(results))
            print(f"Adapter: {output_dir / ADAPTER_WEIGHTS}")
        except (ValueError, OSError, SafetensorError) as error:
            print(f"train_endora_lora.py: error: {error}", file=sys.stderr)
            failed = True
        if args.push_to_hub and not failed:
            failed = not publish(args, hub_token)
    end_training(accelerator)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
