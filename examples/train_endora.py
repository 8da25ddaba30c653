"""Trains Endora on a folder of videos or a Hugging Face video dataset.

    accelerate launch examples/train_endora.py --train_data_dir VIDEOS --output_dir OUT \
        --pretrained_vae stabilityai/sd-vae-ft-mse --dino_model facebook/dino-vits8

The defaults are the paper's: XL/2, 16 frames of 128x128 and 8 still images a clip, 5 clips per device, AdamW at 1e-4,
EMA 0.9999, the DINO prior at weight 0.5, 150,000 steps. Every random number of a step is a function of the seed, the
step and the process, so that a training that was stopped goes on as if it had not been.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_endora import ClipDataset, DinoPrior, EndoraPipeline, EndoraTransformer3DModel, diffusion_loss
from diffusers_endora.data.contact_sheet import save_contact_sheet
from diffusers_endora.data.corpora import CORPORA, load_corpus
from diffusers_endora.data.video_io import write_video
from diffusers_endora.hub import publish_folder, save_model_card
from diffusers_endora.models.autoencoder import load_vae
from diffusers_endora.training.checkpoints import checkpoint_step, find_checkpoint, save_checkpoint
from diffusers_endora.training.dino_prior import student_layers_for
from diffusers_endora.training.gaussian_baseline import GaussianBaseline
from diffusers_endora.training.latents import LatentCache, encode_clips
from diffusers_endora.training.loss_history import LossHistory
from diffusers_endora.training.presets import LEARNING_RATES, TRANSFORMERS

RUN_FACTS = "run.json"  # in a checkpoint
LOSS_WINDOW = 200  # optimiser steps that the reported losses are averaged over


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; exits with one line on stderr and code 2 where they do not fit together."""
    parser = argparse.ArgumentParser(
        description="Trains Endora on a folder of videos or a Hugging Face video dataset.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    switch = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument(
        "--train_data_dir",
        help="folder of videos or frame folders, whose sub-folders are the classes; with --dataset_name the raw "
        "folder of that corpus",
    )
    data.add_argument(
        "--dataset_name",
        help="a folder of `endora prepare`, a dataset of the Hub with a video column, or a corpus by its name: "
        f"phantom, or with its raw folder {', '.join(sorted(CORPORA.keys() - {'phantom'}))}",
    )
    data.add_argument("--dataset_config_name")
    data.add_argument("--dataset_split", default="train")
    data.add_argument("--resolution", type=int, default=128, help="side of the square frames, in pixels")
    data.add_argument("--num_frames", type=int, default=16)
    data.add_argument(
        "--frame_interval", type=int, help="fixed stride between frames, instead of spreading them over the window"
    )
    data.add_argument("--window", type=int, default=48, help="length in frames of the window a clip is spread over")
    data.add_argument("--num_still_images", type=int, default=8, help="still images trained along with every clip")
    data.add_argument("--horizontal_flip", action=switch, default=True)
    data.add_argument("--antialias", action=switch, default=False, help="filter HD video before it is shrunk")
    data.add_argument("--class_conditional", action="store_true", help="learn the class of each video too")
    data.add_argument("--dataloader_num_workers", type=int, default=2)
    data.add_argument("--cache_frames_gb", type=float, default=1.0, help="decoded frames kept in memory, per worker")
    data.add_argument("--cache_latents", action="store_true", help="keep the VAE's output of every frame in memory")

    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_vae", help="folder or Hub id; the paper's is stabilityai/sd-vae-ft-mse")
    model.add_argument("--preset", choices=list(TRANSFORMERS), default="xl-2")
    for name in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size"):
        model.add_argument(f"--{name}", type=int, help="instead of the preset's")
    model.add_argument("--prior", choices=["official", "paper", "none"], default="official")
    model.add_argument("--prior_weight", type=float, default=0.5)
    model.add_argument("--dino_model", help="folder or Hub id of the prior's teacher; paper: facebook/dino-vits8")

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", required=True)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--train_batch_size", type=int, default=5, help="clips per device")
    training.add_argument("--max_train_steps", type=int, default=150_000)
    training.add_argument("--gradient_accumulation_steps", type=int, default=1)
    training.add_argument("--gradient_checkpointing", action="store_true")
    training.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    training.add_argument("--allow_tf32", action=switch, default=True)
    training.add_argument("--learning_rate", type=float, help="the preset's by default: 1e-4, demo 1e-3")
    training.add_argument("--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="constant")
    training.add_argument("--lr_warmup_steps", type=int, default=0)
    training.add_argument("--adam_beta1", type=float, default=0.9)
    training.add_argument("--adam_beta2", type=float, default=0.999)
    training.add_argument("--adam_weight_decay", type=float, default=0.0)
    training.add_argument("--max_grad_norm", type=float, default=0.1)
    training.add_argument("--max_grad_norm_start", type=int, default=500_000, help="step that clipping starts at")
    training.add_argument("--use_ema", action=switch, default=True)
    training.add_argument("--ema_decay", type=float, default=0.9999)
    training.add_argument("--checkpointing_steps", type=int, default=10_000)
    training.add_argument("--checkpoints_total_limit", type=int)
    training.add_argument("--resume_from_checkpoint", help='name of a checkpoint in output_dir, a path, or "latest"')

    reports = parser.add_argument_group("validation and reports")
    reports.add_argument("--validation_steps", type=int, default=10_000)
    reports.add_argument("--num_validation_clips", type=int, default=2)
    reports.add_argument("--validation_inference_steps", type=int, default=50)
    reports.add_argument("--fps", type=float, default=8.0, help="of the clips that validation writes")
    reports.add_argument("--logging_steps", type=int, default=50)
    reports.add_argument("--report_to", default="none", help='"tensorboard", "wandb", ... or "none"')
    reports.add_argument("--push_to_hub", action="store_true")
    reports.add_argument("--hub_model_id")
    reports.add_argument("--hub_token", help="by default the one of `hf auth login` or HF_TOKEN")

    args = parser.parse_args(argv)
    is_corpus = args.dataset_name in CORPORA and not Path(args.dataset_name).is_dir()
    if args.train_data_dir is None and args.dataset_name is None:
        parser.error("give --train_data_dir or --dataset_name.")
    if args.train_data_dir is not None and args.dataset_name is not None and not is_corpus:
        parser.error(
            f"give either --train_data_dir or --dataset_name; both are for a corpus by its name: {', '.join(CORPORA)}."
        )
    if args.pretrained_vae is None:
        parser.error("--pretrained_vae is required: the paper's is stabilityai/sd-vae-ft-mse.")
    if args.prior != "none" and args.dino_model is None:
        parser.error("--dino_model is required with --prior: the paper's is facebook/dino-vits8.")
    if args.push_to_hub and args.hub_model_id is None:
        parser.error("--push_to_hub needs --hub_model_id.")
    if args.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        parser.error('--report_to tensorboard needs the package tensorboard: pip install "diffusers-endora[train]".')
    positive = ["resolution", "num_frames", "train_batch_size", "max_train_steps", "gradient_accumulation_steps"]
    positive += ["checkpointing_steps", "validation_steps", "num_validation_clips", "logging_steps"]
    positive += ["validation_inference_steps", "frame_interval", "checkpoints_total_limit"]
    for name in positive:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected a positive integer.")
    for name in ("num_still_images", "dataloader_num_workers", "cache_frames_gb", "lr_warmup_steps", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 or more.")
    if not args.fps > 0:
        parser.error(f"--fps {args.fps}: expected a positive number.")
    if args.frame_interval is None and args.window < args.num_frames:
        parser.error(f"--window {args.window}: expected at least --num_frames {args.num_frames}.")
    if args.dataset_name is not None and importlib.util.find_spec("datasets") is None:
        parser.error('--dataset_name needs the package datasets: pip install "diffusers-endora[train]".')
    return args


def load_data(args: argparse.Namespace) -> ClipDataset:
    """The clips to train on; an item is a function of seed, epoch and index alone."""
    if args.dataset_name in CORPORA and not Path(args.dataset_name).is_dir():
        source = load_corpus(
            args.dataset_name, args.dataset_config_name or "videos", args.dataset_split, data_dir=args.train_data_dir
        )
    elif args.dataset_name is not None:
        from datasets import load_dataset

        source = load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split)
    else:
        source = args.train_data_dir
    return ClipDataset(
        source,
        num_frames=args.num_frames,
        resolution=args.resolution,
        frame_interval=args.frame_interval,
        window=args.window,
        num_still_images=args.num_still_images,
        horizontal_flip=args.horizontal_flip,
        antialias=args.antialias,
        class_labels=args.class_conditional,
        cache_gb=args.cache_frames_gb,
        seed=args.seed,
    )


def build_transformer(args: argparse.Namespace, vae, num_classes: int | None) -> EndoraTransformer3DModel:
    """A new transformer of the preset's size; a ValueError where patches and VAE do not divide the resolution."""
    config = dict(TRANSFORMERS[args.preset])
    config.update({name: getattr(args, name) for name in config if getattr(args, name) is not None})
    blocks = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
    vae_scale_factor = 2 ** (len(blocks) - 1)
    if args.resolution % (vae_scale_factor * config["patch_size"]) != 0:
        raise ValueError(
            f"--resolution {args.resolution}: expected a multiple of {vae_scale_factor * config['patch_size']}, the "
            f"VAE's factor {vae_scale_factor} times the patch size {config['patch_size']}."
        )
    return EndoraTransformer3DModel(
        in_channels=vae.config.latent_channels,
        out_channels=2 * vae.config.latent_channels,
        sample_size=args.resolution // vae_scale_factor,
        num_frames=args.num_frames,
        num_classes=num_classes,
        **config,
    )


def build_prior(args: argparse.Namespace, transformer: EndoraTransformer3DModel) -> DinoPrior | None:
    """The DINO prior with its teacher, fitted to the transformer; None for `--prior none`."""
    if args.prior == "none":
        return None
    side = transformer.config.sample_size // transformer.config.patch_size
    prior = DinoPrior.from_pretrained(
        args.dino_model,
        student_layers=student_layers_for(transformer.config.num_layers),
        student_grid=(side, side),
        objective=args.prior,
    )
    patch_size = prior.teacher.config.patch_size
    if args.resolution % patch_size != 0:
        raise ValueError(f"--resolution {args.resolution}: expected a multiple of the teacher's patch {patch_size}.")
    return prior


def validate(pipeline: EndoraPipeline, args: argparse.Namespace, folder: Path, num_classes: int | None) -> Path:
    """Samples clips with fixed seeds and writes them with a contact sheet into `folder`; returns the sheet's path."""
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(args.num_validation_clips)]
    labels = None if num_classes is None else [index % num_classes for index in range(args.num_validation_clips)]
    frames = pipeline(
        batch_size=args.num_validation_clips,
        num_inference_steps=args.validation_inference_steps,
        class_labels=labels,
        generator=generators,
        output_type="np",
        return_dict=False,
    )[0]
    clips = (frames * 255).round().astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for index, clip in enumerate(clips):
        write_video(folder / f"clip_{index}.mp4", clip, fps=args.fps)
    return save_contact_sheet(folder / "contact_sheet.png", clips)


def main() -> None:
    """Trains as the command line says; see the module's docstring."""
    args = parse_args()
    hub_token, args.hub_token = args.hub_token, None  # not for logs and files
    output_dir = Path(args.output_dir)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        )
    except ValueError as error:
        sys.exit(f"train_endora.py: error: {error}")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    torch.backends.cudnn.allow_tf32 = args.allow_tf32
    torch.manual_seed(args.seed)  # the same initial weights in every process

    # 1. Data and models; what is wrong with the user's input shows here
    try:
        vae = load_vae(args.pretrained_vae).requires_grad_(False)
        dataset = load_data(args)
        num_classes = dataset.num_classes
        transformer = build_transformer(args, vae, num_classes)
        prior = build_prior(args, transformer)
        resume_from = None
        if args.resume_from_checkpoint is not None:
            resume_from = find_checkpoint(output_dir, args.resume_from_checkpoint)
        if resume_from is not None:
            check_same_run(resume_from, run_facts(args, accelerator, dataset, transformer))
        if args.push_to_hub and accelerator.is_main_process:
            HfApi(token=hub_token).create_repo(args.hub_model_id, exist_ok=True)  # refused now or never
    except (ValueError, OSError) as error:
        sys.exit(f"train_endora.py: error: {error}")
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    output_dir.mkdir(parents=True, exist_ok=True)

    # 2. Optimiser, learning rate, EMA
    parameters = [*transformer.parameters(), *(prior.parameters() if prior is not None else ())]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=LEARNING_RATES[args.preset] if args.learning_rate is None else args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    loader = DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=len(dataset) >= args.train_batch_size * accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )
    facts = run_facts(args, accelerator, dataset, transformer)
    transformer, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)
    vae.to(accelerator.device)
    student_layers: tuple[int, ...] = ()
    if prior is not None:
        student_layers = prior.student_layers
        prior = accelerator.prepare(prior.to(accelerator.device))
    ema = None
    if args.use_ema:
        model = accelerator.unwrap_model(transformer, keep_torch_compile=False)
        ema = EMAModel(
            model.parameters(), decay=args.ema_decay, model_cls=EndoraTransformer3DModel, model_config=model.config
        )
        ema.to(accelerator.device)
    baseline, history = GaussianBaseline(), LossHistory(LOSS_WINDOW)
    accelerator.register_for_checkpointing(lr_scheduler, baseline, history)  # the rate is per step, not per process
    cache = LatentCache(vae) if args.cache_latents else None

    def save_state(folder: Path) -> None:
        accelerator.save_state(str(folder))
        if ema is not None and accelerator.is_main_process:
            ema.save_pretrained(str(folder / "transformer_ema"))
        if accelerator.is_main_process:
            (folder / RUN_FACTS).write_text(json.dumps(facts, indent=2))

    # 3. Resume
    steps_per_epoch = max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    step = 0
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        if ema is not None:
            loaded = EMAModel.from_pretrained(str(resume_from / "transformer_ema"), EndoraTransformer3DModel)
            ema.load_state_dict(loaded.state_dict())
            ema.to(accelerator.device)
        step = checkpoint_step(resume_from)
        accelerator.print(f"Resumed from {resume_from} at step {step}.")

    if args.report_to != "none":
        accelerator.init_trackers("endora", config={key: str(value) for key, value in vars(args).items()})
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    accelerator.print(
        f"{dataset.num_videos} videos ({dataset.num_broken} broken, {len(dataset.too_short)} too short, "
        f"{dataset.num_unlabelled} without a label, {dataset.num_ignored_files} other files ignored), "
        f"{num_parameters / 1e6:.1f} M parameters, "
        f"{args.train_batch_size} clips x {accelerator.num_processes} processes x {args.gradient_accumulation_steps} "
        f"accumulated, {args.max_train_steps} steps"
    )

    # 4. Train
    alphas_cumprod = scheduler.alphas_cumprod.to(accelerator.device)
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="train", disable=not accelerator.is_local_main_process
    )
    while step < args.max_train_steps:
        epoch, first_step = divmod(step, steps_per_epoch)
        dataset.set_epoch(epoch)
        loader.set_epoch(epoch)
        first_batch = first_step * args.gradient_accumulation_steps
        batches = skip_first_batches(loader, first_batch) if first_batch else loader
        for micro_step, batch in enumerate(batches, start=first_batch):
            # Every random number from here on is a function of seed, epoch, batch and process
            entropy = [args.seed, epoch, micro_step, accelerator.process_index]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            with accelerator.accumulate(transformer, *([prior] if prior is not None else [])):
                # 4.1 Pixels to latents
                clips = batch["video"]
                latents = encode_clips(vae, clips) if cache is None else cache.encode_clips(clips, batch["frame_ids"])
                baseline.update(latents)

                # 4.2 Losses
                noise = torch.randn_like(latents)
                timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
                mse, vb, spatial_states = diffusion_loss(
                    transformer,
                    latents,
                    timesteps,
                    noise,
                    scheduler,
                    class_labels=batch.get("class_labels"),
                    num_still_images=args.num_still_images,
                    output_spatial_states=student_layers,
                )
                losses = {"mse": mse.mean(), "vb": vb.mean()}
                loss = losses["mse"] + losses["vb"]
                if prior is not None:
                    losses["prior"] = prior(spatial_states, accelerator.unwrap_model(prior).extract(clips))
                    loss = loss + args.prior_weight * losses["prior"]

                # 4.3 Update
                accelerator.backward(loss)
                if accelerator.sync_gradients and step >= args.max_grad_norm_start:
                    accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            history.add(losses)
            if not accelerator.sync_gradients:
                continue
            lr_scheduler.step()
            history.end_step()
            if ema is not None:
                ema.step(accelerator.unwrap_model(transformer, keep_torch_compile=False).parameters())
            step += 1
            progress.update()

            # 4.4 Reports, checkpoints, validation
            if step % args.logging_steps == 0 or step == args.max_train_steps:
                means = mean_losses(accelerator, history)
                progress.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
                accelerator.log({**means, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                save_checkpoint(
                    output_dir,
                    step,
                    save_state,
                    accelerator.wait_for_everyone,
                    accelerator.is_main_process,
                    args.checkpoints_total_limit,
                )
            if step % args.validation_steps == 0 or step == args.max_train_steps:
                if accelerator.is_main_process:
                    pipeline = build_pipeline(accelerator, transformer, ema, vae, scheduler)
                    sheet = validate(pipeline, args, output_dir / "validation" / f"step-{step}", num_classes)
                    progress.write(f"step {step}: {sheet}")
                accelerator.wait_for_everyone()
            if step == args.max_train_steps:
                break
    progress.close()

    # 5. Results
    final = {
        "steps": step,
        "averaged_steps": len(history.steps),
        **mean_losses(accelerator, history),
        "gaussian_mse": baseline.eps_mse(alphas_cumprod),  # of the latents that the main process saw
        "num_parameters": num_parameters,
        "num_videos": dataset.num_videos,
        "num_broken": dataset.num_broken,
        "learning_rate": optimizer.defaults["lr"],
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    if accelerator.is_main_process:
        build_pipeline(accelerator, transformer, ema, vae, scheduler).save_pretrained(str(output_dir))
        (output_dir / "training.json").write_text(json.dumps({"arguments": vars(args), "results": final}, indent=2))
        save_model_card(output_dir, vars(args), final, dataset.class_names)
        accelerator.print(
            f"eps-MSE {final['mse']:.4f}, mean of the last {final['averaged_steps']} steps: "
            f"{final['mse'] / final['gaussian_mse']:.3f} x the {final['gaussian_mse']:.4f} of a per-position "
            "Gaussian predictor on the same latents"
        )
        accelerator.print(f"Pipeline: {output_dir}")
        if args.push_to_hub:
            accelerator.print(f"Published: {publish_folder(output_dir, args.hub_model_id, token=hub_token)}")
    accelerator.end_training()


def mean_losses(accelerator: Accelerator, history: LossHistory) -> dict[str, float]:
    """Means over the steps in `history` and over all processes."""
    means = history.means()
    values = accelerator.reduce(torch.stack(list(means.values())).to(accelerator.device), reduction="mean")
    return dict(zip(means, values.tolist(), strict=True))


def run_facts(args: argparse.Namespace, accelerator: Accelerator, dataset: ClipDataset, transformer) -> dict:
    """What has to be the same for a resumed training to be the training that was stopped."""
    return {
        "num_processes": accelerator.num_processes,
        "train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "frames_in_corpus": len(dataset),
        "seed": args.seed,
        "prior": args.prior,
        "use_ema": args.use_ema,
        "transformer": {name: value for name, value in transformer.config.items() if not name.startswith("_")},
    }


def check_same_run(checkpoint: Path, facts: dict) -> None:
    """Raises a ValueError that names what differs between a checkpoint's training and this one."""
    if not (checkpoint / RUN_FACTS).is_file():
        raise ValueError(f"{checkpoint} has no {RUN_FACTS}: expected a checkpoint of this script.")
    earlier = json.loads((checkpoint / RUN_FACTS).read_text())
    differing = [name for name in facts if earlier.get(name) != json.loads(json.dumps(facts[name]))]
    if differing:
        changes = ", ".join(f"{name} was {earlier.get(name)} and is {facts[name]}" for name in differing)
        raise ValueError(f"{checkpoint} is of another training: {changes}.")


def build_pipeline(accelerator: Accelerator, transformer, ema: EMAModel | None, vae, scheduler) -> EndoraPipeline:
    """A pipeline with a copy of the trained weights: their moving average where there is one."""
    source = accelerator.unwrap_model(transformer, keep_torch_compile=False)
    model = EndoraTransformer3DModel.from_config(source.config).to(accelerator.device).eval()
    model.load_state_dict(source.state_dict())
    if ema is not None:
        ema.copy_to(model.parameters())
    return EndoraPipeline(vae=vae, transformer=model, scheduler=DDPMScheduler.from_config(scheduler.config))


if __name__ == "__main__":
    main()
