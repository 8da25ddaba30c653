"""Generation of clips with StyleGAN-V (https://arxiv.org/abs/2112.14683)."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from ...files import written_atomically
from ...pipelines.pipeline_output import EndoraPipelineOutput
from ..checks import numbers_of, require_generators
from ..folder_class import require_folder_class
from .generator_stylegan_v import StyleGANVGenerator

# Frames that are synthesised at a time, of all clips together; every frame of a clip depends on its time alone.
FRAMES_AT_A_TIME = 32

# Frames of a call, and their largest time, which memory ends long before.
MOST_FRAMES = 2**20


class StyleGANVPipeline(DiffusionPipeline):
    """Generates clips in one pass, unconditionally or by class.

    Args:
        generator: the network; it says the size and the usual length of a clip.

    Raises:
        ValueError: for a generator of another class.

    Example:
        >>> import torch
        >>> from diffusers_endora import StyleGANVPipeline

        >>> pipe = StyleGANVPipeline.from_pretrained("path/to/a/stylegan-v/folder")
        >>> clip = pipe(generator=torch.Generator().manual_seed(0)).frames[0]
        >>> slow = pipe(times=[frame / 4 for frame in range(64)], generator=torch.Generator().manual_seed(0)).frames[0]
    """

    model_cpu_offload_seq = "generator"
    generator_class_name = "StyleGANVGenerator"
    generator: StyleGANVGenerator

    def __init__(self, generator: StyleGANVGenerator):
        super().__init__()
        if type(generator).__name__ != self.generator_class_name:  # one of a derived class would be saved as this one
            raise ValueError(f"generator is a {type(generator).__name__}: expected a {self.generator_class_name}.")
        name_or_path = generator.config.get("_name_or_path")
        if name_or_path and Path(name_or_path).exists():  # a published folder is not to tell where it was made
            generator.register_to_config(_name_or_path=None)
        self.register_modules(generator=generator)
        self.video_processor = VideoProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "StyleGANVPipeline":
        """As of every diffusers pipeline.

        Raises:
            ValueError: for the folder of a pipeline of another class.
        """
        require_folder_class(pretrained_model_name_or_path, cls.__name__)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def check_inputs(
        self,
        batch_size: int,
        times: torch.Tensor,
        height: int,
        width: int,
        class_labels: list[int] | None,
        truncation_psi: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
    ) -> None:
        """Raises a ValueError of one sentence for the first argument of `__call__` that does not fit."""
        config = self.generator.config
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected a positive integer.")
        if times.ndim != 1 or times.shape[0] == 0:
            raise ValueError(f"times has shape {tuple(times.shape)}: expected (F,), with F of 1 or more.")
        if not ((times >= 0) & (times <= MOST_FRAMES)).all():
            raise ValueError(f"times={times.tolist()}: expected numbers of frames from 0 to {MOST_FRAMES}.")
        for name, value in {"height": height, "width": width}.items():
            if value != config.resolution:
                raise ValueError(f"{name}={value}: expected {config.resolution}, the only size of this model.")
        if class_labels is not None:
            if config.num_classes is None:
                raise ValueError(f"class_labels={class_labels}: this model is unconditional (num_classes=None).")
            if any(not isinstance(label, int) or not 0 <= label < config.num_classes for label in class_labels):
                raise ValueError(f"class_labels={class_labels}: expected labels from 0 to {config.num_classes - 1}.")
            if len(class_labels) != batch_size:
                raise ValueError(
                    f"batch_size={batch_size} with {len(class_labels)} class_labels: expected one label for each clip."
                )
        elif config.num_classes is not None:
            raise ValueError(f"class_labels=None: expected labels from 0 to {config.num_classes - 1}.")
        if not isinstance(truncation_psi, int | float) or not math.isfinite(truncation_psi):
            raise ValueError(f"truncation_psi={truncation_psi!r}: expected a finite number, 1 for none.")
        require_generators(generator, batch_size)
        if latents is not None and tuple(latents.shape) != (batch_size, config.z_dim):
            raise ValueError(f"latents has shape {tuple(latents.shape)}: expected {(batch_size, config.z_dim)}.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type="{output_type}": expected "pil", "np" or "pt".')

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        times: Sequence[float] | torch.Tensor | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> EndoraPipelineOutput | tuple:
        """Generates clips.

        Args:
            batch_size: number of clips; the number of labels where `class_labels` is a list.
            num_frames: frames of a clip, at the times 0, 1, ...; by default what the model was trained for.
            height: pixels; only the size of the model.
            width: likewise.
            times: the times of the frames instead of `num_frames`, in frames: any non-negative real numbers. Steps
                below 1 are slow motion; a frame of a time is the same whatever the other times are.
            class_labels: one label per clip, or one int for all; needed by a class-conditional model.
            truncation_psi: draws the content codes towards their mean: 1 not at all, 0 wholly. Less variety, and as a
                rule better frames.
            generator: one for the batch, or a list with one per clip, which makes a clip independent of its batch.
            latents: content latents `(B, z_dim)` of unit variance, instead of drawing them. Motion is drawn all the
                same.
            output_type: "pil", "np" or "pt"; see `EndoraPipelineOutput`.
            return_dict: False for a tuple `(frames,)`.

        Returns:
            `EndoraPipelineOutput`, or `(frames,)`.

        Raises:
            ValueError: for an argument that does not fit the model.
        """
        # 1. Defaults and checks
        config, device = self.generator.config, self._execution_device
        height = config.resolution if height is None else height
        width = config.resolution if width is None else width
        if class_labels is not None:
            labels = numbers_of("class_labels", class_labels)
            class_labels = labels.flatten().tolist() * (batch_size if labels.ndim == 0 else 1)
            batch_size = len(class_labels) if batch_size == 1 else batch_size
        if times is None:
            num_frames = config.num_frames if num_frames is None else num_frames
            if isinstance(num_frames, bool) or not isinstance(num_frames, int) or not 1 <= num_frames <= MOST_FRAMES:
                raise ValueError(f"num_frames={num_frames}: expected a positive integer up to {MOST_FRAMES}.")
            times = range(num_frames)
        elif num_frames is not None:
            raise ValueError(f"num_frames={num_frames} with times: expected one of them.")
        frame_times = numbers_of("times", times).float()
        self.check_inputs(
            batch_size, frame_times, height, width, class_labels, truncation_psi, generator, latents, output_type
        )

        # 2. Content latents (B, z_dim), then motion noise, in float32 whatever the precision of the model
        if latents is None:
            latents = randn_tensor((batch_size, config.z_dim), generator, device, torch.float32)
        latents = latents.to(device, torch.float32)
        motion_noise = self.generator.draw_motion_noise(batch_size, float(frame_times.max()), generator, device)
        device_labels = None if class_labels is None else torch.tensor(class_labels, device=device)

        # 3. Frames, some at a time: (B, F, 3, H, W)
        was_training = self.generator.training
        self.generator.eval()
        chunks = [
            self.generator(
                latents,
                chunk.to(device).expand(batch_size, -1),
                device_labels,
                motion_noise,
                truncation_psi,
                return_dict=False,
            )[0].float()
            for chunk in frame_times.split(max(1, FRAMES_AT_A_TIME // batch_size))
        ]
        self.generator.train(was_training)
        frames = torch.cat(chunks, dim=1)
        if not frames.isfinite().all():
            raise ValueError(
                f"{type(self.generator).__name__} in {self.generator.dtype} left values that are not finite: expected "
                "more precision."
            )

        # 4. Output
        frames = self.video_processor.postprocess_video(frames.transpose(1, 2), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        return EndoraPipelineOutput(frames=frames)

    def to_json_string(self) -> str:
        """The `model_index.json` of the published form, which names the classes as diffusers' own."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = type(self).__name__
        index["generator"] = ["diffusers", self.generator_class_name]
        index.pop("_name_or_path", None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes `to_json_string()` in one move: the file that makes a folder loadable is whole or not there."""
        with written_atomically(Path(json_file_path)) as unfinished:
            unfinished.write_text(self.to_json_string(), encoding="utf-8")
