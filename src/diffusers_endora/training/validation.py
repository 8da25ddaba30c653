"""What a training shows of itself on the way: sampled clips, and how far they are from held-out ones."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.clips import ClipDataset
from ..data.contact_sheet import save_contact_sheet
from ..data.provenance import synthetic_metadata
from ..data.video_io import read_image, write_video
from ..metrics.feature_extractors import hash_weights


class Validation:
    """Samples clips with fixed seeds; writes them and a contact sheet, also into the trackers; on request their FVD.

    Args:
        args: the flags of `arguments`.
        assemble: makes a pipeline of the transformer's weights.
        num_classes: clips of all classes are sampled in turn; None for an unconditional model.
        held_out: videos that FVD compares with, or None.
        accelerator: whose trackers get the pictures.

    Raises:
        ValueError: FVD is asked for, and there are no I3D weights or fewer than two held-out clips.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        assemble: Callable[[dict[str, torch.Tensor]], Any],
        num_classes: int | None,
        held_out: ClipDataset | None,
        accelerator: Any,
    ) -> None:
        self.args = args
        self.assemble = assemble
        self.num_classes = num_classes
        self.held_out = held_out
        self.accelerator = accelerator
        self.metric = None
        if args.validation_fvd is not None:
            from ..metrics import FrechetVideoDistance

            num_clips = 0 if held_out is None else min(args.validation_fvd, len(held_out))
            if num_clips < 2:
                raise ValueError(
                    f"--validation_fvd {args.validation_fvd}: {num_clips} held-out clips; FVD needs two or more."
                )
            self.metric = FrechetVideoDistance(sync_on_compute=False)  # the main process computes it alone

    def __call__(self, weights: dict[str, torch.Tensor], folder: Path, step: int, is_last: bool) -> dict[str, float]:
        """Writes clips into `folder`; returns numbers for the trackers.

        Args:
            weights: of what is trained.
            step: that they are of.
            is_last: whether the training ends with it.
        """
        args = self.args
        pipeline = self.assemble(weights).to(self.accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        clips = self.sample(pipeline, args.num_validation_clips)
        folder.mkdir(parents=True, exist_ok=True)
        name = args.hub_model_id or Path(args.output_dir).name
        metadata = synthetic_metadata(
            f"{name}, step {step}", f"{hash_weights(self.trained_part(pipeline))} (of the tensors)"
        )
        for index, clip in enumerate(clips):
            write_video(folder / f"clip_{index}.mp4", clip, fps=args.fps, metadata=metadata)
        sheet = save_contact_sheet(folder / "contact_sheet.png", clips)
        self._show(clips, sheet, step)
        every = args.validation_fvd_steps
        is_due = is_last or (every is not None and step % every == 0)
        return {"fvd": self.fvd(pipeline)} if args.validation_fvd is not None and is_due else {}

    def trained_part(self, pipeline: Any) -> torch.nn.Module:
        """The network of a pipeline that is trained."""
        return pipeline.transformer

    def sampling_options(self, pipeline: Any) -> dict[str, Any]:
        """What a pipeline is called with beside seeds and classes."""
        return {"num_inference_steps": self.args.validation_inference_steps}

    def sample(self, pipeline: Any, num_clips: int) -> np.ndarray:
        """Clips of the seeds from `--seed` on, uint8 `(num_clips, F, H, W, 3)`."""
        sampled = []
        for first in range(0, num_clips, 8):
            seeds = range(first, min(first + 8, num_clips))
            frames = pipeline(
                batch_size=len(seeds),
                **self.sampling_options(pipeline),
                class_labels=None if self.num_classes is None else [seed % self.num_classes for seed in seeds],
                generator=[torch.Generator().manual_seed(self.args.seed + seed) for seed in seeds],
                output_type="np",
                return_dict=False,
            )[0]
            sampled.append((np.asarray(frames) * 255).round().astype(np.uint8))
        return np.concatenate(sampled)

    def fvd(self, pipeline: Any) -> float:
        """FVD between as many sampled and held-out clips as `--validation_fvd` says, at most those there are."""
        assert self.held_out is not None
        assert self.metric is not None
        count = min(self.args.validation_fvd, len(self.held_out))
        metric = self.metric.to(self.accelerator.device)
        metric.reset()
        places = np.linspace(0, len(self.held_out) - 1, count).round().astype(int)
        for place in places:
            video = self.held_out[int(place)]["video"][: self.args.num_frames]
            metric.update(((video[None] + 1) / 2).clamp(0, 1), real=True)
        for clip in self.sample(pipeline, count):
            metric.update(torch.from_numpy(clip[None]), real=False)
        return float(metric.compute())

    def _show(self, clips: np.ndarray, sheet: Path, step: int) -> None:
        """The contact sheet into the trackers, and the clips into those that take videos."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("contact_sheet", read_image(sheet), step, dataformats="HWC")
            elif tracker.name in ("wandb", "trackio"):
                library = importlib.import_module(tracker.name)
                frames = clips.transpose(0, 1, 4, 2, 3)  # (N, F, 3, H, W)
                shown = {
                    "clips": [library.Video(clip, fps=int(self.args.fps), format="mp4") for clip in frames],
                    "contact_sheet": library.Image(str(sheet)),
                }
                tracker.log(shown, step=step)
