"""Sets of generated clips, drawn once: resumable, shared among processes, lossless."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..baselines.registry import ENDORA, kind_of_pipeline
from ..data.provenance import synthetic_metadata
from ..data.video_io import write_video
from ..files import written_atomically
from .distributed import shared_state
from .feature_extractors import hash_weights


def sample_clips(
    pipeline: Any,
    folder: Path,
    num_clips: int,
    seed: int,
    num_inference_steps: int | None = 250,
    timesteps: list[int] | None = None,
    num_frames: int = 16,
    batch_size: int = 1,
) -> Path:
    """Fills `folder` with `clip_00000.mkv`, ... (FFV1, lossless); clips that are there are not drawn again.

    Clip `i` depends on `seed` and `i` alone, not on the number of clips or of processes, nor on what was there before:
    the batches are always the same and full ones, the last with clips that are not kept. (Another `batch_size` can
    change the rounding of matrix products.) A model with classes draws them in turn: clip `i` has class
    `i % num_classes`. Processes started together share the work; each returns when all clips are there.

    Args:
        pipeline: an `EndoraPipeline`, `StyleGANVPipeline`, `MoStGANVPipeline` or `LVDMPipeline`.
        num_inference_steps, timesteps: as for the pipeline, where it takes them.

    Returns:
        `folder`.

    Raises:
        ValueError: the folder holds clips of another model or other settings, or the model gives no finite pixels.
    """
    state = shared_state()
    kind = kind_of_pipeline(pipeline)
    num_classes = getattr(pipeline, kind.main).config.num_classes
    if hasattr(pipeline, "prepare_scheduler"):
        pipeline.prepare_scheduler()  # before its settings are recorded: sampling would change them
    sampler = {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
    taken = inspect.signature(type(pipeline).__call__).parameters
    sampler = {name: value for name, value in sampler.items() if name in taken}
    settings = settings_of(pipeline, sampler, num_frames, seed)
    record = folder / "sampling.json"
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{folder}: holds clips of another model or other settings; choose another output folder")
        if not record.is_file() and any(folder.glob("clip_*")):
            raise ValueError(f"{folder}: holds clips without a sampling.json; choose another output folder")
        for stale in [*folder.glob(".clip_*"), *folder.glob(".sampling-*")]:  # of a process that was killed
            stale.unlink()
        with written_atomically(record) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    state.wait_for_everyone()

    model_hash = settings.get("weights", settings)[kind.main]
    metadata = synthetic_metadata(
        pipeline.config.get("_name_or_path") or kind.class_name, f"{model_hash} (of the tensors)"
    )
    paths = [folder / f"clip_{i:05d}.mkv" for i in range(num_clips)]
    batches = [range(first, first + batch_size) for first in range(0, num_clips, batch_size)]
    missing = [batch for batch in batches if not all(path.is_file() for path in paths[batch.start : batch.stop])]
    state.wait_for_everyone()  # before a process adds a clip, so that all see the same batches missing
    mine = missing[state.process_index :: state.num_processes]
    pipeline.set_progress_bar_config(disable=True)
    hidden = not mine or not state.is_main_process
    for batch in tqdm(mine, desc=f"sampling, seed {seed}", unit="batch", disable=hidden):
        output = pipeline(
            batch_size=batch_size,
            num_frames=num_frames,
            **sampler,
            class_labels=None if num_classes is None else [i % num_classes for i in batch],
            generator=[clip_generator(seed, i) for i in batch],
            output_type="np",
        )
        clips = output.frames
        if not np.isfinite(clips).all():
            raise ValueError(f"{folder}: the model gives pixels that are not finite; is its precision enough?")
        for i, clip in zip(batch, (clips * 255).round().astype(np.uint8), strict=True):
            if i < num_clips and not paths[i].is_file():
                write_video(paths[i], clip, fps=8, codec="ffv1", metadata=metadata)
    state.wait_for_everyone()
    return folder


def settings_of(pipeline: Any, sampler: dict[str, Any], num_frames: int, seed: int) -> dict[str, Any]:
    """What the clips of a set depend on, for `sampling.json`."""
    kind = kind_of_pipeline(pipeline)
    main = getattr(pipeline, kind.main)
    models = {name: getattr(pipeline, name, None) for name in kind.models}
    weights = {name: hash_weights(model) for name, model in models.items() if model is not None}
    settings: dict[str, Any] = weights if kind is ENDORA else {"pipeline": kind.class_name, "weights": weights}
    if kind.has_scheduler:
        config = pipeline.scheduler.config
        settings["scheduler"] = type(pipeline.scheduler).__name__
        settings["scheduler_config"] = {k: str(v) for k, v in config.items() if not k.startswith("_")}
    settings |= {**sampler, "num_frames": num_frames, "dtype": str(main.dtype)}
    if kind is ENDORA:
        settings |= {"backend": backend_of(main), "cache": described_cache(main)}
    return {**settings, "seed": seed}


def backend_of(transformer: torch.nn.Module) -> str:
    """What computes it: "torch", or what took the place of a module's forward says."""
    return next((part.forward.backend for part in transformer.modules() if hasattr(part.forward, "backend")), "torch")


def described_cache(transformer: Any) -> str | None:
    """The cache across steps that is enabled, with its settings."""
    if not getattr(transformer, "is_cache_enabled", False):
        return None
    config = transformer._cache_config
    settings = {name: value for name, value in vars(config).items() if not callable(value)}
    return f"{type(config).__name__} {settings}"


def clip_generator(seed: int, i: int) -> torch.Generator:
    """The source of noise of clip `i` of a set; sets of different seeds share none."""
    mixed = np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) % 2**63)
