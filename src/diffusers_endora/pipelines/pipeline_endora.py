"""Generation of endoscopy clips with Endora (https://arxiv.org/abs/2403.11050)."""

import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FasterCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    PyramidAttentionBroadcastConfig,
)
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from ..models.transformer_endora import EndoraTransformer3DModel
from .pipeline_output import EndoraPipelineOutput
from .single_file import single_file_source

logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Example:
        >>> import torch
        >>> from diffusers_endora import EndoraPipeline

        >>> pipe = EndoraPipeline.from_pretrained("path/to/an/endora/folder")
        >>> clip = pipe(num_inference_steps=50, generator=torch.Generator().manual_seed(0)).frames[0]
        >>> clip[0].save("clip.gif", save_all=True, append_images=clip[1:], duration=125, loop=0)
"""

# The two schedulers whose `step` takes the variance channels that the transformer predicts beside the noise.
LEARNED_VARIANCE_SCHEDULERS = (DDPMScheduler, DDPMParallelScheduler)

# The schedulers that step through the noise of rectified flow and nothing else.
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)

# Multistep schedulers that build up their history from the first timestep alone.
NOT_HALFWAY = (PNDMScheduler, LMSDiscreteScheduler)

# Caches that hold one memory whatever the context, in which windows would take each other's attention.
CACHES_WITHOUT_CONTEXT = (FasterCacheConfig, PyramidAttentionBroadcastConfig)

# The settings of a scheduler that say how much noise a timestep stands for.
NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "shift")

# The package's other pipelines, whose folders have the same form.
BASELINE_PIPELINES = ("LVDMPipeline", "MoStGANVPipeline", "StyleGANVPipeline")

# What a denoiser may have been trained to predict.
PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "flow_prediction": "the velocity of rectified flow"}


def prediction_type_of(scheduler: Any) -> str:
    """What a scheduler steps from: its `prediction_type`, or "flow_prediction" for one of flow alone."""
    if isinstance(scheduler, FLOW_SCHEDULERS):
        return "flow_prediction"
    return scheduler.config.get("prediction_type", "epsilon")


class EndoraPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """Generates endoscopy clips, unconditionally or by class.

    Args:
        vae: decodes latents to frames, frame by frame; each VAE's own scaling and shift are used.
        transformer: the denoiser.
        scheduler: any diffusers scheduler for what the transformer predicts. The official sampler, for noise, is
            `DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")`, 250 steps.
            `OtherScheduler.from_config(pipe.scheduler.config)` inherits what the model was trained for.
        prediction_type: what the transformer was trained to predict: "epsilon", "v_prediction" or "flow_prediction".
            None takes it from the scheduler. It is saved with the pipeline, which refuses schedulers for another one.
        num_inference_steps: of a call that gives none, saved with the pipeline; the paper's 250. A model whose
            scheduler needs fewer says so here.

    LoRA weights load into the transformer (`load_lora_weights`).
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        transformer: EndoraTransformer3DModel,
        scheduler: KarrasDiffusionSchedulers | FlowMatchEulerDiscreteScheduler,
        prediction_type: str | None = None,
        num_inference_steps: int = 250,
    ):
        super().__init__()
        for model in (vae, transformer):  # a published folder is not to tell where on a disk its parts were made
            if model.config.get("_name_or_path") and Path(model.config["_name_or_path"]).exists():
                model.register_to_config(_name_or_path=None)
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            prediction_type=prediction_type or prediction_type_of(scheduler), num_inference_steps=num_inference_steps
        )
        blocks = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
        self.vae_scale_factor = 2 ** (len(blocks) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        # `OtherScheduler.from_config(pipe.scheduler.config)` drops what was left at its default, and some schedulers
        # default to Stable Diffusion's betas: the noise schedule belongs to the model and has to be handed on.
        unset = scheduler.config.get("_use_default_values", [])
        unset = [name for name in unset if name not in NOISE_SCHEDULE]
        # With the class's name, as in a loaded config, diffusers does not warn of what another class has no use for.
        scheduler.register_to_config(_use_default_values=unset, _class_name=type(scheduler).__name__)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As of every diffusers pipeline.

        Raises:
            ValueError: for the folder of one of the package's other pipelines.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        name = (loaded[0] if isinstance(loaded, tuple) else loaded).get("_class_name")
        if name in BASELINE_PIPELINES:
            raise ValueError(
                f"{pretrained_model_name_or_path}: is of class {name}, expected EndoraPipeline; load it by "
                f"diffusers_endora.{name}.from_pretrained."
            )
        return loaded

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int,
        timesteps: list[int] | None,
        class_labels: list[int] | None,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        decode_chunk_size: int | None,
        strength: float = 1.0,
        window_overlap: int | None = None,
    ) -> None:
        """Raises a ValueError of one sentence for the first argument of `__call__` that does not fit."""
        counts = {"batch_size": batch_size, "num_frames": num_frames, "num_inference_steps": num_inference_steps}
        if decode_chunk_size is not None:
            counts["decode_chunk_size"] = decode_chunk_size
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value}: expected a positive integer.")
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        for name, value in {"height": height, "width": width}.items():
            if not isinstance(value, int) or value < 1 or value % multiple != 0:
                raise ValueError(
                    f"{name}={value}: expected a positive multiple of {multiple} pixels, the VAE's factor "
                    f"{self.vae_scale_factor} times the patch size {self.transformer.config.patch_size}."
                )
        is_flow = isinstance(self.scheduler, FLOW_SCHEDULERS)
        limit = self.scheduler.config.num_train_timesteps
        if timesteps is None and num_inference_steps > limit:
            raise ValueError(f"{num_inference_steps=}: expected at most {limit}, the timesteps of training.")
        if timesteps is not None:
            last = limit if is_flow else limit - 1
            in_range = all(0 <= t <= last for t in timesteps)
            if len(timesteps) == 0 or not in_range or any(a <= b for a, b in zip(timesteps, timesteps[1:])):  # noqa: B905, RUF007
                raise ValueError(f"timesteps={timesteps}: expected a falling list of timesteps from 0 to {last}.")
            takes_timesteps = "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters
            if not takes_timesteps or self.scheduler.config.get("use_flow_sigmas"):
                raise ValueError(
                    f"{type(self.scheduler).__name__} takes no explicit timesteps; give num_inference_steps instead."
                )
        config, null_class = self.transformer.config, self.transformer.null_class
        if self.vae.config.latent_channels != config.in_channels:
            raise ValueError(
                f"the VAE has {self.vae.config.latent_channels} latent channels and the transformer "
                f"{config.in_channels}: expected equal numbers."
            )
        cache = getattr(self.transformer, "_cache_config", None)
        if isinstance(cache, FasterCacheConfig) and not cache.is_guidance_distilled and not guidance_scale > 1:
            raise ValueError(
                f"guidance_scale={guidance_scale} with FasterCache, which expects an unconditional half of the batch: "
                "set is_guidance_distilled=True in its config to sample without guidance."
            )
        if class_labels is not None:
            if config.num_classes is None:
                raise ValueError(f"class_labels={class_labels}: this model is unconditional (num_classes=None).")
            largest = config.num_classes - 1 if null_class is None else null_class
            if any(not isinstance(label, int) or not 0 <= label <= largest for label in class_labels):
                raise ValueError(
                    f"class_labels={class_labels}: expected labels from 0 to {config.num_classes - 1}"
                    + ("." if null_class is None else f", or {null_class} for the null class.")
                )
            if len(class_labels) != batch_size:
                raise ValueError(
                    f"batch_size={batch_size} with {len(class_labels)} class_labels: expected one label for each clip."
                )
        elif config.num_classes is not None and null_class is None:
            raise ValueError(
                f"class_labels=None: this model has no null class and needs labels from 0 to {config.num_classes - 1}."
            )
        if not (math.isfinite(guidance_scale) and guidance_scale >= 1):
            raise ValueError(f"guidance_scale={guidance_scale}: expected 1 (no guidance) or more.")
        if guidance_scale > 1 and (null_class is None or class_labels is None):
            reason = "has no null class" if null_class is None else "was given no class_labels"
            raise ValueError(f"guidance_scale={guidance_scale}: guidance needs classes, and the model {reason}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for batch_size={batch_size}: expected one for each clip.")
        if latents is not None:
            factor = self.vae_scale_factor
            expected = (batch_size, config.in_channels, num_frames, height // factor, width // factor)
            if tuple(latents.shape) != expected:
                raise ValueError(f"latents has shape {tuple(latents.shape)}: expected {expected}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type="{output_type}": expected "pil", "np", "pt" or "latent".')
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength}: expected more than 0 and at most 1.")
        if window_overlap is not None and not (
            isinstance(window_overlap, int) and 1 <= window_overlap < config.num_frames
        ):
            raise ValueError(
                f"window_overlap={window_overlap}: expected 1 to {config.num_frames - 1} frames, as a window has "
                f"{config.num_frames}."
            )
        if isinstance(cache, CACHES_WITHOUT_CONTEXT) and len(self.windows(num_frames, window_overlap)) > 1:
            raise ValueError(
                f"window_overlap={window_overlap} with {type(cache).__name__}, in which windows would take each "
                "other's attention: disable the cache, or take FirstBlockCache, TaylorSeer or MagCache."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={unknown}: expected names from {self._callback_tensor_inputs}."
            )

    def prepare_scheduler(self) -> None:
        """Makes the scheduler fit the model, in latent space, or refuses it by name.

        Settings that `from_config` hands on or a constructor presets, and that would spoil a clip, are replaced:
        `variance_type="learned_range"` for a scheduler that takes no variance channels (and back, on the return to
        DDPM), `clip_sample` and `thresholding`, since latents are not bounded by 1, and in a solver made from the
        config of a flow scheduler, which has no such settings, those that make it one of flow.

        Raises:
            ValueError: for a scheduler that does not step from what the transformer predicts alone, or that needs
                variance channels which it does not predict.
        """
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        own_settings = inspect.signature(type(scheduler).__init__).parameters  # the config may hold inherited ones
        prediction_type = self.config.prediction_type
        is_flow = prediction_type == "flow_prediction"
        if prediction_type not in PREDICTIONS:
            raise ValueError(
                f"{name} cannot sample from Endora with {prediction_type=}: expected one of {', '.join(PREDICTIONS)}."
            )
        if is_flow and "use_flow_sigmas" in own_settings and "shift" in scheduler.config:
            unset = scheduler.config.get("_use_default_values", [])
            of_flow = {
                "prediction_type": prediction_type,
                "use_flow_sigmas": True,
                "flow_shift": scheduler.config.shift,
            }
            scheduler.register_to_config(**{name: value for name, value in of_flow.items() if name in unset})
        settings = {setting: scheduler.config.get(setting) for setting in own_settings}
        step = getattr(type(scheduler), "step", None)
        required = [
            parameter.name
            for parameter in (inspect.signature(step).parameters.values() if step else ())
            if parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        predicts_variance = self.transformer.config.out_channels == 2 * self.transformer.config.in_channels

        # 1. Schedulers for other models
        refusals = {
            f"it steps from prediction_type={prediction_type_of(scheduler)!r}": (
                prediction_type_of(scheduler) != prediction_type
            ),
            "its step is not one from noise to clip": (
                required != ["self", "model_output", "timestep", "sample"] or "Inverse" in name
            ),
        }
        if is_flow:
            refusals |= {
                "use_flow_sigmas=False steps through the noise of betas": (
                    not isinstance(scheduler, FLOW_SCHEDULERS) and not settings.get("use_flow_sigmas")
                ),
                "invert_sigmas=True takes noise for clip": settings.get("invert_sigmas"),
                "its last step leaves noise in the clip (it has no final_sigmas_type='zero')": (
                    not isinstance(scheduler, FLOW_SCHEDULERS) and settings.get("final_sigmas_type") != "zero"
                ),
                "the transformer has variance channels, which flow does not": predicts_variance,
            }
        else:
            refusals |= {
                "its noise schedule is not one of betas": "beta_start" not in settings
                or "snr_shift_scale" in settings,
                "rescale_betas_zero_snr=True starts where predicted noise says nothing of the clip": (
                    settings.get("rescale_betas_zero_snr") and prediction_type == "epsilon"
                ),
                "it does not take the rescale_betas_zero_snr=True of the training": (
                    scheduler.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in settings
                ),
                "use_flow_sigmas=True is for flow matching": settings.get("use_flow_sigmas"),
            }
        examples = "DDPMScheduler or UniPCMultistepScheduler"
        if is_flow:
            examples = "FlowMatchEulerDiscreteScheduler or, with use_flow_sigmas=True, UniPCMultistepScheduler"
        for reason, applies in refusals.items():
            if applies:
                raise ValueError(
                    f"{name} cannot sample from Endora, which predicts {PREDICTIONS[prediction_type]}: {reason}. "
                    f"Expected a scheduler for {prediction_type=}, such as {examples}."
                )
        if not is_flow:
            rescaled = bool(settings.get("rescale_betas_zero_snr"))
            official = DDPMScheduler(rescale_betas_zero_snr=rescaled).alphas_cumprod
            alphas_cumprod = scheduler.alphas_cumprod.cpu()
            # some schedulers keep 2^-24 where it is 0
            if alphas_cumprod.shape != official.shape or not torch.allclose(alphas_cumprod, official, atol=1e-7):
                logger.warning(
                    f"{name} has another noise schedule than Endora's training. Unless this model was trained with "
                    'it, set num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear".'
                )

        # 2. Variance channels
        variance_type = scheduler.config.get("variance_type")
        if not isinstance(scheduler, LEARNED_VARIANCE_SCHEDULERS):
            if variance_type in ("learned", "learned_range"):
                logger.info(f"{name} takes no learned variance: clearing its variance_type={variance_type!r}.")
                scheduler.register_to_config(variance_type=None)
        elif variance_type is None:  # cleared above, on the way here through another scheduler
            scheduler.variance_type = "learned_range" if predicts_variance else "fixed_small"
            scheduler.register_to_config(variance_type=scheduler.variance_type)
        elif variance_type in ("learned", "fixed_large_log"):
            raise ValueError(
                f"{name} with variance_type={variance_type!r} cannot sample from Endora, whose variance channels "
                "interpolate: use variance_type='learned_range' or 'fixed_small'."
            )
        elif variance_type == "learned_range" and not predicts_variance:
            raise ValueError(
                f"{name} with variance_type={variance_type!r} needs variance channels, which this transformer "
                "does not predict: use variance_type='fixed_small'."
            )

        # 3. Clipping
        for setting in ("clip_sample", "thresholding"):
            if settings.get(setting):
                logger.warning(f"{name} has {setting}=True, which cuts latents to [-1, 1]: setting it to False.")
                scheduler.register_to_config(**{setting: False})

    def prepare_timesteps(
        self,
        num_inference_steps: int,
        timesteps: list[int] | None,
        device: torch.device,
        strength: float = 1.0,
        has_given_frames: bool = False,
    ) -> torch.Tensor:
        """The scheduler's timesteps, noisiest first, or the last `strength` of them; a ValueError if it cannot."""
        name = type(self.scheduler).__name__
        try:
            if timesteps is not None:
                self.scheduler.set_timesteps(timesteps=timesteps, device=device)
            else:
                self.scheduler.set_timesteps(num_inference_steps, device=device)
        except (IndexError, ValueError) as error:
            given = f"{num_inference_steps=}" if timesteps is None else f"{timesteps=}"
            raise ValueError(f"{given} does not suit {name}: {error}") from error
        steps = self.scheduler.timesteps
        if not steps.isfinite().all():
            raise ValueError(f"{num_inference_steps=} does not suit {name}: its timesteps are not finite; take more.")
        if strength < 1:
            if isinstance(self.scheduler, NOT_HALFWAY):
                raise ValueError(
                    f"strength={strength}: {name} cannot begin halfway; take another scheduler or strength=1."
                )
            order = getattr(self.scheduler, "order", 1)
            num_steps = len(steps) // order
            skipped = (num_steps - int(num_steps * strength)) * order
            if skipped >= len(steps):
                raise ValueError(f"strength={strength} of {num_steps} steps leaves none: expected more of either.")
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(skipped)
            steps = steps[skipped:]
        elif has_given_frames and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # else noise is looked up by timestep, of which two may be equal
        return steps

    def prepare_frames(self, name: str, frames: Any, batch_size: int, height: int, width: int) -> torch.Tensor:
        """Given frames as pixels `(1 or B, F, 3, H, W)` in [-1, 1]; a ValueError names the argument that they came by.

        PIL images of the clip's proportions are resized; arrays and tensors have to be of its size. Four dimensions
        are the frames of a `video`, of the others one frame for each clip.
        """
        if isinstance(frames, PIL.Image.Image):
            frames = [frames]
        if isinstance(frames, list) and frames and all(isinstance(frame, PIL.Image.Image) for frame in frames):
            sizes = {frame.size for frame in frames}
            if len(sizes) > 1 or any(w * height != h * width for w, h in sizes):
                raise ValueError(
                    f"{name} has images of {sorted(sizes)} pixels: expected all of one size, of the proportions of "
                    f"{width}x{height}."
                )
            resized = [frame.convert("RGB").resize((width, height), PIL.Image.Resampling.LANCZOS) for frame in frames]
            frames = np.stack([np.asarray(frame) for frame in resized])
        if isinstance(frames, np.ndarray) and frames.ndim in (3, 4, 5) and frames.dtype.kind in "uif":
            frames = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3)
        if not isinstance(frames, torch.Tensor) or frames.ndim not in (3, 4, 5):
            raise ValueError(
                f"{name} is a {type(frames).__name__}: expected PIL images, an array (frames, height, width, 3) or a "
                "tensor (frames, 3, height, width), for all clips or with the batch before."
            )
        if name != "video" and frames.ndim == 4:
            frames = frames[:, None]
        frames = frames[(None,) * (5 - frames.ndim)]
        if frames.shape[2:] != (3, height, width) or frames.shape[0] not in (1, batch_size) or frames.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(frames.shape)} as (batch, frames, channels, height, width): expected 3 "
                f"channels of {height}x{width} pixels, for 1 clip or {batch_size}."
            )
        pixels = frames / 255 if frames.dtype == torch.uint8 else frames.float()
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(
                f"{name} has values from {pixels.min():.3g} to {pixels.max():.3g}: expected uint8 or floats in [0, 1]."
            )
        return pixels * 2 - 1

    def encode_frames(self, pixels: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        """Pixels `(B, F, 3, H, W)` in [-1, 1] to latents `(B, C, F, h, w)` in float32: the mode of the posterior."""
        chunks = pixels.flatten(0, 1).to(self._execution_device, self.vae.dtype).split(chunk_size or 4)
        encoded = [self.vae.encode(chunk) for chunk in chunks]
        latents = torch.cat(
            [code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latents for code in encoded]
        )
        latents = latents.float() - (getattr(self.vae.config, "shift_factor", None) or 0.0)
        return (latents * self.vae.config.scaling_factor).unflatten(0, pixels.shape[:2]).transpose(1, 2)

    def clean_latents(self, codes: dict[str, torch.Tensor], num_frames: int) -> torch.Tensor:
        """What a clip begins as once it is noised, `(B, C, F, h, w)`: the given video, or the images mixed over time.

        `codes` has the latents of "video" `(B, C, F, h, w)`, or of "image", "last_image" or both `(B, C, 1, h, w)`.
        """
        if "video" in codes:
            return codes["video"]
        first = codes["image"] if "image" in codes else codes["last_image"]
        last = codes.get("last_image", first)
        share = torch.linspace(0, 1, num_frames, device=first.device)[:, None, None]
        return torch.lerp(first, last, share)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Latents as the scheduler has them at a timestep of its schedule."""
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(latents, timestep.reshape(1), noise)
        return self.scheduler.add_noise(latents, noise, timestep.reshape(1))

    def predict(
        self,
        model_input: torch.Tensor,
        context: str,
        timestep: torch.Tensor,
        labels: Any,
        null_labels: Any,
        attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        """What the transformer predicts of scaled latents `(B, C, F, h, w)`, guided, with the conditional variance.

        `context` names the memory of caches: calls of one name are successive steps of the same frames.
        """
        guided = self.do_classifier_free_guidance and labels is not None and null_labels is not None
        # the unconditional half of the batch first
        if guided:
            model_input = torch.cat([model_input, model_input])
            labels = torch.cat([null_labels, labels])
        with self.transformer.cache_context(f"{context}_uncond" if guided else context):
            prediction = self.transformer(
                hidden_states=model_input.to(self.transformer.dtype),
                timestep=timestep.expand(model_input.shape[0]),
                class_labels=labels,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0].float()
        if guided:
            channels = model_input.shape[1]
            uncond, prediction = prediction.chunk(2)
            uncond, cond, variance = uncond[:, :channels], prediction[:, :channels], prediction[:, channels:]
            prediction = torch.cat([uncond + self.guidance_scale * (cond - uncond), variance], dim=1)
        return prediction

    def predict_by_windows(self, model_input: torch.Tensor, windows: list[slice], *conditions: Any) -> torch.Tensor:
        """The predictions of windows, averaged; a frame weighs less the nearer it is to an end of its window."""
        shape = model_input.shape
        total = model_input.new_zeros(shape[0], self.transformer.config.out_channels, *shape[2:])
        weights = model_input.new_zeros(shape[2], 1, 1)
        for i, window in enumerate(windows):
            prediction = self.predict(model_input[:, :, window], f"cond_{i}", *conditions)
            length = prediction.shape[2]
            ramp = torch.arange(1, length + 1, device=prediction.device)
            weight = torch.minimum(ramp, ramp.flip(0)).float()[:, None, None]
            total[:, :, window] += prediction * weight
            weights[window] += weight
        return total / weights

    def windows(self, num_frames: int, overlap: int | None) -> list[slice]:
        """Parts of the clip that the transformer sees at a time: all of it, or windows as long as its training clips.

        Neighbours share `overlap` frames, the last two perhaps more.
        """
        length = self.transformer.config.num_frames
        if overlap is None or num_frames <= length:
            return [slice(0, num_frames)]
        starts = [*range(0, num_frames - length, length - overlap), num_frames - length]
        return [slice(start, start + length) for start in starts]

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Starting noise `(B, C, F, h, w)` in float32, whatever the precision of the models: one seed, one clip."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow has none

    def prepare_labels(self, class_labels: list[int] | None, batch_size: int, device: torch.device):
        """Labels `(B,)`, the null class where none are given, and null classes `(B,)` for guidance.

        None for labels that the model does not have.
        """
        null_class = self.transformer.null_class
        nulls = None if null_class is None else torch.full((batch_size,), null_class, device=device)
        return nulls if class_labels is None else torch.tensor(class_labels, device=device), nulls

    def decode_latents(self, latents: torch.Tensor, decode_chunk_size: int | None = None) -> torch.Tensor:
        """Latents `(B, C, F, h, w)` to frames `(B, 3, F, H, W)` in about [-1, 1].

        `decode_chunk_size` frames (4 by default) go through the VAE at a time; the result does not depend on it.
        """
        batch_size = latents.shape[0]
        frames = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype)
        frames = frames / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        decoded = [self.vae.decode(chunk).sample.float() for chunk in frames.split(decode_chunk_size or 4)]
        return torch.cat(decoded).unflatten(0, (batch_size, -1)).transpose(1, 2)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        decode_chunk_size: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        strength: float = 0.7,
        window_overlap: int | None = None,
    ) -> EndoraPipelineOutput | tuple:
        """Generates clips.

        Args:
            batch_size: number of clips; the number of labels where `class_labels` is a list.
            num_frames: frames of a clip; by default what the transformer was trained at.
            height: pixels, a multiple of the VAE's factor times the patch size; by default the training size.
            width: likewise.
            num_inference_steps: denoising steps; by default those saved with the pipeline, else the paper's 250.
            timesteps: explicit falling timesteps instead of `num_inference_steps`, where the scheduler takes them.
            class_labels: one label per clip, or one int for all. None draws from a class-conditional model
                unconditionally, by its null class.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022) on the channels of the noise, v or velocity;
                the variance stays the conditional one. 1 is off.
            generator: one for the batch, or a list with one per clip, which makes a clip independent of its batch.
            latents: starting noise `(B, C, F, H/8, W/8)` of unit variance, instead of drawing it.
            output_type: "pil", "np", "pt" or "latent"; see `EndoraPipelineOutput`.
            return_dict: False for a tuple `(frames,)`.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after every step; the
                dictionary it returns may hold changed latents.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets; only "latents" exists.
            decode_chunk_size: frames decoded at a time, 4 by default; changes memory, not results.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            image: the clip's first frame; `last_image`: its last. A PIL image, an array `(H, W, 3)` or a tensor
                `(3, H, W)`, uint8 or in [0, 1], for all clips, or a list of PIL images or a batch, one for each clip.
                All frames begin as this one, noised to `strength` of the way (between two images, as a mixture of
                both), and at every step the latents of the given frames are replaced by their own with the noise of
                that step (Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix I.2). Needs no training.
            last_image: see `image`; both give what lies in between.
            video: a clip to vary: PIL images, an array `(F, H, W, 3)` or a tensor `(F, 3, H, W)`, or a batch of clips
                as an array or a tensor. It is noised to `strength` of the way and denoised from there (SDEdit, Meng
                et al. 2022, https://arxiv.org/abs/2108.01073). `num_frames` is its length.
            strength: of the noise on `video` or images, in (0, 1]; that part of the steps is made. 1 keeps nothing of
                `video`, and leaves frames free that are not given: they then follow an image little.
            window_overlap: for clips longer than the transformer was trained at: it sees windows of that length, of
                which neighbours share so many frames; there its predictions are averaged, each weighing less towards
                the ends of its window (MultiDiffusion, Bar-Tal et al. 2023, https://arxiv.org/abs/2302.08113, along
                time). None lets it see all frames at once.

        Returns:
            `EndoraPipelineOutput`, or `(frames,)`.

        Raises:
            ValueError: for an argument that does not fit the models, or a scheduler that cannot serve them.
        """
        # 1. Defaults and checks
        sample_size = self.transformer.config.sample_size
        sample_height, sample_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        height = sample_height * self.vae_scale_factor if height is None else height
        width = sample_width * self.vae_scale_factor if width is None else width
        if class_labels is not None:
            labels = torch.as_tensor(class_labels)
            class_labels = labels.flatten().tolist() * (batch_size if labels.ndim == 0 else 1)
            batch_size = len(class_labels) if batch_size == 1 else batch_size
        if num_frames is None and video is not None and hasattr(video, "__len__"):
            is_batched = getattr(video, "ndim", 4) == 5
            num_frames = video.shape[1] if is_batched else len(video)
        num_frames = self.transformer.config.num_frames if num_frames is None else num_frames
        self.prepare_scheduler()
        self.check_inputs(
            batch_size,
            num_frames,
            height,
            width,
            num_inference_steps,
            timesteps,
            class_labels,
            guidance_scale,
            generator,
            latents,
            output_type,
            list(callback_on_step_end_tensor_inputs),
            decode_chunk_size,
            strength,
            window_overlap,
        )
        given = {"image": image, "last_image": last_image, "video": video}
        given = {
            name: self.prepare_frames(name, frames, batch_size, height, width)
            for name, frames in given.items()
            if frames is not None
        }
        if "last_image" in given and num_frames == 1:
            raise ValueError("last_image with num_frames=1: expected image alone, or more frames.")
        for name, pixels in given.items():
            expected = num_frames if name == "video" else 1
            if pixels.shape[1] != expected:
                raise ValueError(f"{name} has {pixels.shape[1]} frames: expected {expected}.")
        self._guidance_scale = guidance_scale
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device

        # 2. Timesteps
        strength = strength if given else 1.0
        steps = self.prepare_timesteps(num_inference_steps, timesteps, device, strength, bool(given))
        self._num_timesteps = len(steps)
        step_kwargs = {}
        if "generator" in inspect.signature(type(self.scheduler).step).parameters:
            step_kwargs["generator"] = generator

        # 3. Starting noise and labels
        channels = self.transformer.config.in_channels
        shape = (batch_size, channels, num_frames, height // self.vae_scale_factor, width // self.vae_scale_factor)
        noise = latents = self.prepare_latents(shape, device, generator, latents)
        codes = {
            name: self.encode_frames(pixels, decode_chunk_size).expand(batch_size, -1, -1, -1, -1)
            for name, pixels in given.items()
        }
        places = {"image": 0, "last_image": num_frames - 1}
        known = {places[name]: code for name, code in codes.items() if name in places}
        if codes:
            noise = latents / getattr(self.scheduler, "init_noise_sigma", 1.0)
        if strength < 1:
            latents = self.add_noise(self.clean_latents(codes, num_frames), noise, steps[0])
        windows = self.windows(num_frames, window_overlap)
        labels, null_labels = self.prepare_labels(class_labels, batch_size, device)
        wants_variance = getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range")
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda latents, timestep: latents)

        # 4. Denoising
        with self.progress_bar(total=len(steps)) as progress_bar:
            for step, timestep in enumerate(steps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep

                # 4.1 Frames that are given, with the noise of this step; not halfway through a step of second order
                latents = latents.clone() if known else latents  # callbacks may have kept them
                for frame, code in known.items() if getattr(self.scheduler, "state_in_first_order", True) else ():
                    part = slice(frame, frame + 1)
                    latents[:, :, part] = self.add_noise(code, noise[:, :, part], timestep)

                # 4.2 Prediction and variance, window by window
                model_input = scale_model_input(latents, timestep)
                conditions = (timestep, labels, null_labels, attention_kwargs)
                if len(windows) == 1:
                    prediction = self.predict(model_input, "cond", *conditions)
                else:
                    prediction = self.predict_by_windows(model_input, windows, *conditions)
                if not wants_variance:
                    prediction = prediction[:, :channels]

                # 4.3 x_t -> x_{t-1}
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    inputs = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    returned = callback_on_step_end(self, step, timestep, inputs) or {}
                    if returned.get("latents", latents).shape != latents.shape:
                        raise ValueError(
                            f"callback_on_step_end returned latents of shape {tuple(returned['latents'].shape)}: "
                            f"expected {tuple(latents.shape)}."
                        )
                    latents = returned.get("latents", latents)
                progress_bar.update()
        latents = latents.clone() if known else latents
        for frame, code in known.items():
            latents[:, :, frame : frame + 1] = code
        self._current_timestep = None
        if not latents.isfinite().all():
            raise ValueError(
                f"{type(self.scheduler).__name__} with {len(steps)} timesteps and a transformer in "
                f"{self.transformer.dtype} left values that are not finite: expected other steps, or more precision."
            )

        # 5. Frames
        if output_type == "latent":
            frames = latents
        else:
            video = self.decode_latents(latents, decode_chunk_size)
            frames = self.video_processor.postprocess_video(video, output_type=output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (frames,)
        return EndoraPipelineOutput(frames=frames)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` in the published form, and beside it the self-contained `pipeline.py`.

        The published form names the classes as diffusers' own, so that the folder loads with
        `EndoraPipeline.from_pretrained(folder)` where this package is imported, and with
        `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` where it is absent.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_text(single_file_source(), encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The `model_index.json` of the published form; see `save_config`."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = "EndoraPipeline"
        index["transformer"] = ["diffusers", "EndoraTransformer3DModel"]
        index.pop("_name_or_path", None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes `to_json_string()` in one move: the file that makes a folder loadable is whole or not there."""
        unfinished = Path(f"{os.fspath(json_file_path)}.tmp")
        unfinished.write_text(self.to_json_string(), encoding="utf-8")
        unfinished.replace(json_file_path)
