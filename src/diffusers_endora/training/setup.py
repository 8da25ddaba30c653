"""From flags to the parts of a training: corpus, networks, caches."""

import argparse
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration

from ..data.clips import ClipDataset
from ..data.corpora import load_corpus
from ..hub import create_repository, publish_folder
from ..models.autoencoder import is_certain, load_vae, vae_scale_factor
from ..models.transformer_endora import EndoraTransformer3DModel
from ..publication import without_private
from .arguments import is_corpus
from .checkpoints import find_checkpoint, list_checkpoints
from .dino_prior import DinoPrior, student_layers_for
from .feature_cache import FeatureCache, FrameFeatures, Shard, check_space, network_digest, readable_size
from .latents import encode_frames
from .objective import predicts_variance
from .presets import TRANSFORMERS
from .processes import by_main_process, on_cpu

# pixels (n, 3, H, W) to outputs (n, ...) by name
Compute: TypeAlias = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The processes, their precision and their trackers.

    Raises:
        ValueError: Accelerate cannot do what the flags ask for here.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    folder = Path(args.output_dir)
    accelerator = Accelerator(
        cpu=on_cpu(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # the others wait while the main process samples clips or reads a checkpoint back
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
    )
    if args.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to {args.report_to}: it is not installed.")
    return accelerator


def begin(args: argparse.Namespace, accelerator: Accelerator, hub_token: str | None) -> Path | None:
    """Refuses what can be refused before anything is computed; makes the repository that the training is to end in.

    Returns:
        The checkpoint to go on from, or None for a training from its first step.

    Raises:
        ValueError: there is no such checkpoint, the training would be mixed with another one's, or its folder cannot
            be made.
        OSError: the Hub refuses the repository.
    """
    output_dir, name = Path(args.output_dir), args.resume_from_checkpoint

    def choose() -> Path | None:
        ancestor = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise ValueError(f"--output_dir {output_dir}: cannot be made or written to.")
        checkpoint = None if name is None else find_checkpoint(output_dir, name)
        if checkpoint is None or checkpoint.parent.resolve() != output_dir.resolve():
            refuse_used_folder(output_dir)
        if args.push_to_hub:
            create_repository(args.hub_model_id, hub_token, args.hub_private or None)
        if checkpoint is None:
            for left in ("training_log.jsonl", "best.safetensors", "bad_step.json"):  # by a training of no checkpoints
                (output_dir / left).unlink(missing_ok=True)
        return checkpoint

    return by_main_process(accelerator, choose)


def refuse_used_folder(output_dir: Path) -> None:
    """Raises a ValueError where another training has left checkpoints."""
    if checkpoints := list_checkpoints(output_dir):
        raise ValueError(
            f"{output_dir} has the checkpoints of a training, up to {checkpoints[-1].name}: go on with it by "
            "--resume_from_checkpoint latest, or choose another --output_dir."
        )


def start_trackers(project: str, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Starts the trackers of `--report_to`; they are told the flags without what is private, as logs are published."""
    if args.report_to != "none":
        facts = without_private(vars(args))
        accelerator.init_trackers(project, config={key: str(value) for key, value in facts.items()})


def end_training(accelerator: Accelerator) -> None:
    """Closes the trackers, and says so where one has something left that the disk does not take."""
    try:
        accelerator.end_training()
    except OSError as error:
        accelerator.print(f"trackers: {error}")
        accelerator.state.destroy_process_group()


def publish(args: argparse.Namespace, hub_token: str | None) -> bool:
    """Publishes what a training has written; where that fails, says how it can be done later, and returns False."""
    try:
        private = args.hub_private or None
        address = publish_folder(
            args.output_dir, args.hub_model_id, token=hub_token, private=private, license=args.license
        )
    except (ValueError, OSError) as error:
        print(
            f"Not published: {error}. The training is complete; to publish it later: endora publish {args.output_dir} "
            f"{args.hub_model_id}",
            file=sys.stderr,
        )
        return False
    print(f"Published: {address}")
    return True


def load_clips(args: argparse.Namespace) -> tuple[ClipDataset, ClipDataset | None]:
    """The clips to train on, and those of held-out videos where the flags name some.

    Raises:
        ValueError: there is no such corpus, or nothing usable in it.
    """
    train = _clips_of(_source(args, args.dataset_split, args.train_data_dir), args)
    clips_per_video = max(args.validation_loss_clips, args.validation_fvd or 0)
    if args.validation_fraction is not None:
        return train.split(args.validation_fraction, clips_per_video)
    if args.validation_data_dir is not None:
        held_out = args.validation_data_dir
    elif args.validation_split is not None:
        held_out = _source(args, args.validation_split, args.train_data_dir)
    else:
        return train, None
    options = {"fixed_offsets": True, "horizontal_flip": False, "cache_gb": 0.0}
    return train, _clips_of(held_out, args, **options, clips_per_video=clips_per_video)


def _source(args: argparse.Namespace, split: str, folder: str | None) -> Any:
    if is_corpus(args):
        return load_corpus(args.dataset_name, args.dataset_config_name or "videos", split, data_dir=folder)
    if args.dataset_name is not None:
        from datasets import load_dataset

        return load_dataset(args.dataset_name, args.dataset_config_name, split=split)
    return folder


def _clips_of(source: Any, args: argparse.Namespace, **changes: Any) -> ClipDataset:
    options: dict[str, Any] = {
        "num_frames": args.num_frames,
        "resolution": args.resolution,
        "frame_interval": args.frame_interval,
        "window": args.window,
        "num_still_images": args.num_still_images,
        "horizontal_flip": args.horizontal_flip,
        "antialias": args.antialias,
        "class_labels": args.class_conditional,
        "cache_gb": args.cache_frames_gb,
        "seed": args.seed,
    }
    return ClipDataset(source, **{**options, **changes})


def build_transformer(
    args: argparse.Namespace, vae_config: Any, scheduler: Any, num_classes: int | None
) -> EndoraTransformer3DModel:
    """A new transformer of the preset's size; a ValueError where patches and VAE do not divide the resolution."""
    config = dict(TRANSFORMERS[args.preset])
    config.update({name: getattr(args, name) for name in config if getattr(args, name) is not None})
    factor = vae_scale_factor(vae_config)
    if args.resolution % (factor * config["patch_size"]) != 0:
        raise ValueError(
            f"--resolution {args.resolution}: expected a multiple of {factor * config['patch_size']}, the VAE's "
            f"factor {factor} times the patch size {config['patch_size']}."
        )
    channels = vae_config.latent_channels
    return EndoraTransformer3DModel(
        in_channels=channels,
        out_channels=2 * channels if predicts_variance(scheduler) else channels,
        sample_size=args.resolution // factor,
        num_frames=args.num_frames,
        num_classes=num_classes,
        class_dropout_prob=args.class_dropout_prob,
        block_order=args.block_order,
        **config,
    )


def build_prior(args: argparse.Namespace, transformer: EndoraTransformer3DModel) -> DinoPrior | None:
    """The DINO prior, fitted to the transformer; without its teacher if tokens are cached; None for `--prior none`."""
    if args.prior == "none":
        return None
    side = transformer.config.sample_size // transformer.config.patch_size
    build = DinoPrior.from_config if args.cache_dino else DinoPrior.from_pretrained
    return build(
        args.dino_model,
        student_layers=student_layers_for(transformer.config.num_layers),
        student_grid=(side, side),
        student_width=transformer.config.num_attention_heads * transformer.config.attention_head_dim,
        objective=args.prior,
    )


def networks_of(args: argparse.Namespace) -> dict[str, str]:
    """Which VAE and which teacher a training has, by their content."""
    networks = {"vae": args.pretrained_vae} | ({} if args.prior == "none" else {"teacher": args.dino_model})
    return {name: network_digest(path)[:16] for name, path in networks.items()}


def open_caches(
    args: argparse.Namespace, datasets: list[ClipDataset], vae_config: Any, prior: DinoPrior | None, accelerator: Any
) -> list[tuple[FeatureCache, ...]]:
    """The caches that the flags ask for, filled, for each dataset; loads a network only where something is missing.

    Prints what they take on disk before anything is computed.

    Raises:
        ValueError: the disk has no room for them.
        OSError: it could not be written, or a network does not load.
    """
    kinds: list[tuple[FrameFeatures, Callable[[], Compute]]] = []
    if args.cache_latents:
        kinds.append((latent_features(args, vae_config), lambda: _latents_by(args.pretrained_vae, accelerator)))
    if args.cache_dino and prior is not None:
        kinds.append((token_features(args, prior), lambda: _tokens_by(args, prior, accelerator)))
    opened: list[tuple[FeatureCache, ...]] = []
    to_fill: list[tuple[FeatureCache, list[Shard], Callable[[], Compute]]] = []
    for dataset in datasets:
        caches = []
        for features, make in kinds:
            cache = FeatureCache(args.cache_features, dataset, features, accelerator)
            missing = cache.missing()
            accelerator.print(
                f"{features.name} of {dataset.total_frames} frames in {len(cache.variants)} forms: "
                f"{readable_size(cache.num_bytes)}, {readable_size(cache.bytes_of(missing))} of them to compute, in "
                f"{cache.folder}"
            )
            caches.append(cache)
            to_fill.append((cache, missing, make))
        opened.append(tuple(caches))
    if to_fill:
        needed = sum(cache.bytes_of(missing) for cache, missing, _ in to_fill)
        by_main_process(accelerator, lambda: check_space(args.cache_features, needed))
    for cache, missing, make in to_fill:
        cache.fill(missing, make() if missing else _nothing)
    return opened


def latent_features(args: argparse.Namespace, vae_config: Any) -> FrameFeatures:
    """What is kept of the VAE's posterior of a frame."""
    side = args.resolution // vae_scale_factor(vae_config)
    shape: tuple[int, ...] = (vae_config.latent_channels, side, side)
    shapes = {"latent_mean": shape} | ({} if is_certain(vae_config) else {"latent_log_variance": shape})
    return FrameFeatures("latents", network_digest(args.pretrained_vae), shapes, args.cache_latents_dtype)


def token_features(args: argparse.Namespace, prior: DinoPrior) -> FrameFeatures:
    """What is kept of the teacher's tokens of a frame."""
    key = f"{network_digest(args.dino_model)} {prior.objective} {prior.teacher_layers}"
    shape = (len(prior.teacher_layers), *prior.token_shape(args.resolution, args.resolution))
    return FrameFeatures("tokens", key, {"tokens": shape}, args.cache_dino_dtype)


def _latents_by(path_or_repo: str, accelerator: Any) -> Compute:
    vae = load_vae(path_or_repo).requires_grad_(False)
    vae.to(accelerator.device)

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, log_variance = encode_frames(vae, pixels.to(accelerator.device))
        return {"latent_mean": mean} | ({} if log_variance is None else {"latent_log_variance": log_variance})

    return compute


def _tokens_by(args: argparse.Namespace, prior: DinoPrior, accelerator: Any) -> Compute:
    teacher = DinoPrior.from_pretrained(
        args.dino_model,
        teacher_layers=prior.teacher_layers,
        student_layers=prior.student_layers,
        objective=prior.objective,
        student_width=prior.student_width,
    ).to(accelerator.device)

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = [
            torch.stack(teacher.extract(chunk[None].to(accelerator.device)), dim=2)[0] for chunk in pixels.split(24)
        ]
        return {"tokens": torch.cat(tokens)}  # (n, layers, M, C)

    return compute


def _nothing(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    raise AssertionError("nothing is missing")
