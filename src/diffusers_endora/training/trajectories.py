"""A teacher's way from noise to clips, recorded at a few places: what a student of few steps learns from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..files import written_atomically
from ..metrics.feature_extractors import hash_weights
from ..metrics.sampling import clip_generator

if TYPE_CHECKING:
    from ..pipelines.pipeline_endora import EndoraPipeline

FACTS = "trajectories.json"
SEED = 2**31 - 1  # of noises that no evaluation draws


def flow_solver(pipeline: "EndoraPipeline", order: int, flow_shift: float) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of an order: 2 for the teacher; 1, straight steps from place to place, for the student."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
        solver_order=order,
        algorithm_type="dpmsolver++",
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=flow_shift,
        final_sigmas_type="zero",
    )


def record_trajectories(
    pipeline: "EndoraPipeline",
    folder: Path,
    num_clips: int,
    num_segments: int,
    calls_per_segment: int = 4,
    flow_shift: float = 1.0,
    batch_size: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples clips and keeps their latents at the ends of `num_segments` equal numbers of steps.

    Clips have noise of their own, and classes in turn, the null class among them. What is in the folder is not sampled
    again.

    Args:
        pipeline: of rectified flow; its scheduler is replaced.
        folder: gets a safetensors file for each batch, whole or not at all, and what they were made with.
        num_clips: a multiple of `batch_size`.
        num_segments, calls_per_segment: parts of the way, and network calls of the teacher in each.
        flow_shift: of the timesteps (Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 5.3.2); above 1 the
            noisy segments are shorter.

    Returns:
        States `(num_clips, num_segments + 1, C, F, h, w)` in float16, from noise to clip; labels `(num_clips,)`, -1
        for none; sigmas `(num_segments + 1,)`, from near 1 to 0.

    Raises:
        ValueError: a model that does not predict flow, a number of clips that batches do not divide, or a folder with
            trajectories of another model or other settings.
    """
    if pipeline.config.prediction_type != "flow_prediction":
        raise ValueError(
            f"the model predicts {pipeline.config.prediction_type}: expected rectified flow (flow_prediction)."
        )
    if num_clips % batch_size:
        raise ValueError(f"{num_clips} trajectories: expected a multiple of the batch size {batch_size}.")
    facts = {
        "transformer": hash_weights(pipeline.transformer),
        "num_segments": num_segments,
        "calls_per_segment": calls_per_segment,
        "flow_shift": flow_shift,
        "batch_size": batch_size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".part_*"):  # of a process that was killed
        leftover.unlink()
    if any(folder.glob("part_*")):
        earlier = json.loads((folder / FACTS).read_text())
        if differing := [name for name in facts if earlier.get(name) != facts[name]]:
            raise ValueError(f"{folder}: holds trajectories of another {differing[0]}; choose another folder.")
    else:
        with written_atomically(folder / FACTS) as temporary:
            temporary.write_text(json.dumps(facts, indent=2))

    pipeline.scheduler = flow_solver(pipeline, 2, flow_shift)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (config.in_channels, config.num_frames, height, width)
    num_labels = (config.num_classes or 0) + (pipeline.transformer.null_class is not None)
    parts = []
    for first in tqdm(range(0, num_clips, batch_size), desc="trajectories", unit="batch"):
        path = folder / f"part_{first:06d}.safetensors"
        if not path.exists():
            labels = [i % num_labels for i in range(first, first + batch_size)] if num_labels else None
            states: list[torch.Tensor] = []

            def keep(pipe: Any, step: int, timestep: torch.Tensor, inputs: dict[str, Any], states=states) -> dict:
                if (step + 1) % calls_per_segment == 0:
                    states.append(inputs["latents"])
                return {}

            generators = [clip_generator(SEED, i) for i in range(first, first + batch_size)]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            pipeline(
                batch_size=batch_size,
                class_labels=labels,
                latents=noise,
                num_inference_steps=num_segments * calls_per_segment,
                output_type="latent",
                callback_on_step_end=keep,
            )
            tensors = {
                "states": torch.stack([noise, *(state.cpu() for state in states)], dim=1).half(),
                "labels": torch.tensor([-1] * batch_size if labels is None else labels),
            }
            with written_atomically(path) as temporary:
                save_file(tensors, temporary)
        parts.append(load_file(path))
    pipeline.scheduler.set_timesteps(num_segments * calls_per_segment)
    sigmas = pipeline.scheduler.sigmas[::calls_per_segment].float()
    return torch.cat([part["states"] for part in parts]), torch.cat([part["labels"] for part in parts]), sigmas


def straight_velocity(states: torch.Tensor, sigmas: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The velocity that leads in one step from a segment's beginning to its end.

    Args:
        states: `(B, segments + 1, ...)`.
        sigmas: `(segments + 1,)`.
        segments: int `(B,)`.
    """
    rows = torch.arange(len(states))
    change = states[rows, segments + 1].float() - states[rows, segments].float()
    spans = (sigmas[segments + 1] - sigmas[segments]).reshape(-1, *[1] * (change.ndim - 1))
    return change / spans
