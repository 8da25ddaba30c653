"""Generation of clips with LVDM (He et al. 2022, https://arxiv.org/abs/2211.13221)."""

import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from ...files import written_atomically
from ...pipelines.pipeline_output import EndoraPipelineOutput
from ..checks import numbers_of, require_generators
from ..folder_class import require_folder_class
from .autoencoder_lvdm import LVDMAutoencoder
from .lvdm_loss import LATENT_SCALE, LATENT_SHIFT, make_lvdm_scheduler
from .unet_lvdm import LVDMUNet3DModel

logger = logging.get_logger(__name__)

# Latent height and width that the endoscopy configs sample at (`image_size: 32` in
# https://github.com/CUHK-AIM-Group/Endora, Other-Methods/LVDM/configs/lvdm_short), though they train on clips of
# `resolution: 128`, whose latents are 16x16. The number is that of the configs for 256x256 pixels that they come from.
OFFICIAL_SAMPLING_SIZE = 32

# Latent frames that a chunk of a long video sees of each neighbour when it is decoded.
DECODE_OVERLAP = 1


class LongVideo(NamedTuple):
    """How a long video comes about: clips in a row at every `stride`-th latent frame, then the frames in between.

    Args:
        stride: latent frames from one predicted frame to the next; 1 without interpolation.
        num_clips: clips of the prediction model, each of which begins with the last frame of the one before.
        num_gaps: gaps between predicted frames to interpolate.
        num_noise_frames: latent frames that noise is needed for, which may be more than the video has.
    """

    stride: int
    num_clips: int
    num_gaps: int
    num_noise_frames: int


class LVDMPipeline(DiffusionPipeline):
    """Generates clips, unconditionally or by class, and long videos where it has the models for it.

    Args:
        autoencoder: decodes latents to clips.
        unet: the denoiser of short clips.
        scheduler: any diffusers scheduler that steps from predicted noise, with the noise schedule of
            `make_lvdm_scheduler()`, which is the official sampler's, 1000 steps.
        prediction_unet: continues a clip (paper, section 3.3): a UNet with `conditioning="mask"` trained to predict.
        interpolation_unet: fills in between latent frames: the same, trained to interpolate. With it,
            `prediction_unet` is one trained on every `interpolation_unet.config.num_frames - 1`-th latent frame.
        prediction_stride: latent frames from one that `prediction_unet` makes to the next; None where it is not known,
            and is taken to be what the interpolation needs.
        latent_scale: latents z of the autoencoder are trained on as `latent_scale * (z + latent_shift)`; by default
            the numbers of the official endoscopy and sky configs.
        latent_shift: likewise.
        num_inference_steps: of a call that gives none, saved with the pipeline.

    Example:
        >>> import torch
        >>> from diffusers_endora import LVDMPipeline

        >>> pipe = LVDMPipeline.from_pretrained("path/to/an/lvdm/folder")
        >>> clip = pipe(num_inference_steps=50, generator=torch.Generator().manual_seed(0)).frames[0]
    """

    model_cpu_offload_seq = "unet->prediction_unet->interpolation_unet->autoencoder"
    _optional_components = ["prediction_unet", "interpolation_unet"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        autoencoder: LVDMAutoencoder,
        unet: LVDMUNet3DModel,
        scheduler: KarrasDiffusionSchedulers,
        prediction_unet: LVDMUNet3DModel | None = None,
        interpolation_unet: LVDMUNet3DModel | None = None,
        latent_scale: float = LATENT_SCALE,
        latent_shift: float = LATENT_SHIFT,
        num_inference_steps: int = 50,
        prediction_stride: int | None = None,
    ):
        super().__init__()
        models: dict[str, Any] = {"autoencoder": autoencoder, "unet": unet}
        models |= {"prediction_unet": prediction_unet, "interpolation_unet": interpolation_unet}
        for model in models.values():  # a published folder is not to tell where on a disk its parts were made
            if model is not None and model.config.get("_name_or_path") and Path(model.config._name_or_path).exists():
                model.register_to_config(_name_or_path=None)
        self.register_modules(**models, scheduler=scheduler)
        if not (math.isfinite(latent_scale) and latent_scale > 0 and math.isfinite(latent_shift)):
            raise ValueError(
                f"latent_scale={latent_scale}, latent_shift={latent_shift}: expected a positive and a finite number."
            )
        self.register_to_config(
            latent_scale=latent_scale,
            latent_shift=latent_shift,
            num_inference_steps=num_inference_steps,
            prediction_stride=prediction_stride,
        )
        self.video_processor = VideoProcessor(vae_scale_factor=autoencoder.config.spatial_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "LVDMPipeline":
        """As of every diffusers pipeline.

        Raises:
            ValueError: for the folder of a pipeline of another class.
        """
        require_folder_class(pretrained_model_name_or_path, cls.__name__)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

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
        class_labels: list[int] | None,
        guidance_scale: float,
        given_guidance_scale: float,
        given_noise_level: int | None,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        decode_chunk_size: int | None,
    ) -> None:
        """Raises a ValueError of one sentence for the first argument of `__call__` that does not fit."""
        config, factors = self.unet.config, self.autoencoder.config
        counts = {"batch_size": batch_size, "num_inference_steps": num_inference_steps}
        if decode_chunk_size is not None:
            counts["decode_chunk_size"] = decode_chunk_size
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value}: expected a positive integer.")
        multiple = factors.spatial_factor * 2 ** (len(config.channel_multipliers) - 1)
        sizes = {"num_frames": (num_frames, factors.temporal_factor, "frames"), "height": (height, multiple, "pixels")}
        for name, (value, of, unit) in (sizes | {"width": (width, multiple, "pixels")}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % of != 0:
                raise ValueError(f"{name}={value}: expected a positive multiple of {of} {unit}.")
        limit = self.scheduler.config.num_train_timesteps
        if num_inference_steps > limit:
            raise ValueError(f"{num_inference_steps=}: expected at most {limit}, the timesteps of training.")
        if factors.latent_channels != config.in_channels:
            raise ValueError(
                f"the autoencoder has {factors.latent_channels} latent channels and the unet {config.in_channels}: "
                "expected equal numbers."
            )
        trained_frames = config.num_frames * factors.temporal_factor
        is_long = num_frames > trained_frames
        if is_long and self.prediction_unet is None:
            raise ValueError(
                f"num_frames={num_frames}: this pipeline has no prediction_unet and makes clips of at most "
                f"{trained_frames} frames, what its unet was trained at."
            )
        for name in self._optional_components:
            model = getattr(self, name)
            if model is None or not is_long:
                continue
            if model.config.conditioning != "mask" or model.config.num_frames < (3 if "inter" in name else 2):
                raise ValueError(
                    f"{name} has conditioning={model.config.conditioning!r} and num_frames={model.config.num_frames}: "
                    'expected "mask" and more frames than are given.'
                )
            for setting in ("in_channels", "num_classes", "class_dropout_prob"):
                if model.config[setting] != config[setting]:
                    raise ValueError(
                        f"{name} has {setting}={model.config[setting]} and the unet {config[setting]}: expected equal "
                        "values."
                    )
            if given_noise_level is not None and not 0 <= given_noise_level < model.config.num_noise_levels:
                raise ValueError(
                    f"given_noise_level={given_noise_level}: {name} has num_noise_levels="
                    f"{model.config.num_noise_levels}; expected None or a level below that."
                )
        made_apart = self.config.prediction_stride
        if is_long and self.interpolation_unet is not None:
            filled_in = self.interpolation_unet.config.num_frames - 1
            if made_apart not in (None, filled_in):
                raise ValueError(
                    f"prediction_unet makes frames {made_apart} latent frames apart, and interpolation_unet fills in "
                    f"between frames {filled_in} apart: expected the same."
                )
        elif is_long and made_apart not in (None, 1):
            logger.warning(f"Motion is {made_apart} times as fast as in training: there is no interpolation_unet.")
        if not is_long and (given_noise_level is not None or given_guidance_scale != 1):
            raise ValueError(
                f"given_noise_level={given_noise_level}, given_guidance_scale={given_guidance_scale}: nothing is "
                f"given in a clip of at most {trained_frames} frames; expected None and 1."
            )
        if class_labels is not None:
            if config.num_classes is None:
                raise ValueError(f"class_labels={class_labels}: this model is unconditional (num_classes=None).")
            largest = config.num_classes - 1 if self.unet.null_class is None else self.unet.null_class
            if any(not isinstance(label, int) or not 0 <= label <= largest for label in class_labels):
                raise ValueError(f"class_labels={class_labels}: expected labels from 0 to {largest}.")
            if len(class_labels) != batch_size:
                raise ValueError(
                    f"batch_size={batch_size} with {len(class_labels)} class_labels: expected one label for each clip."
                )
        elif config.num_classes is not None and self.unet.null_class is None:
            raise ValueError(
                f"class_labels=None: this model has no null class and needs labels from 0 to {config.num_classes - 1}."
            )
        for name, scale in {"guidance_scale": guidance_scale, "given_guidance_scale": given_guidance_scale}.items():
            if not isinstance(scale, int | float) or not (math.isfinite(scale) and scale >= 1):
                raise ValueError(f"{name}={scale!r}: expected 1 (no guidance) or more.")
        if guidance_scale > 1 and (self.unet.null_class is None or class_labels is None):
            reason = "has no null class" if self.unet.null_class is None else "was given no class_labels"
            raise ValueError(f"guidance_scale={guidance_scale}: guidance needs classes, and the model {reason}.")
        takes_eta = "eta" in inspect.signature(type(self.scheduler).step).parameters
        if not 0 <= eta <= 1 or (eta > 0 and not takes_eta):
            raise ValueError(
                f"eta={eta} with {type(self.scheduler).__name__}: expected 0, or up to 1 with a DDIMScheduler."
            )
        require_generators(generator, batch_size)
        if latents is not None:
            expected = self.latent_shape(batch_size, num_frames, height, width)
            if tuple(latents.shape) != expected:
                raise ValueError(f"latents has shape {tuple(latents.shape)}: expected {expected}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type="{output_type}": expected "pil", "np", "pt" or "latent".')
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={unknown}: expected names from {self._callback_tensor_inputs}."
            )

    def prepare_scheduler(self) -> None:
        """Makes the scheduler fit the model, in latent space, or refuses it by name.

        `clip_sample` and `thresholding` are switched off, since latents are not bounded by 1.

        Raises:
            ValueError: for a scheduler that does not step from predicted noise along betas.
        """
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        own_settings = inspect.signature(type(scheduler).__init__).parameters  # the config may hold inherited ones
        settings = {setting: scheduler.config.get(setting) for setting in own_settings}
        step = getattr(type(scheduler), "step", None)
        required = [
            parameter.name
            for parameter in (inspect.signature(step).parameters.values() if step else ())
            if parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        refusals = {
            "its noise schedule is not one of betas": "beta_start" not in settings or "snr_shift_scale" in settings,
            f"it steps from prediction_type={settings.get('prediction_type')!r}": (
                settings.get("prediction_type", "epsilon") != "epsilon"
            ),
            "its step is not one from noise to clip": (
                required != ["self", "model_output", "timestep", "sample"] or "Inverse" in name
            ),
            "use_flow_sigmas=True is for flow matching": settings.get("use_flow_sigmas"),
            "rescale_betas_zero_snr=True starts where predicted noise says nothing of the clip": (
                settings.get("rescale_betas_zero_snr")
            ),
            f"variance_type={settings.get('variance_type')!r} needs variance channels": (
                settings.get("variance_type") in ("learned", "learned_range")
            ),
        }
        for reason, applies in refusals.items():
            if applies:
                raise ValueError(
                    f"{name} cannot sample from LVDM, which predicts noise: {reason}. Expected a scheduler such as "
                    "DDPMScheduler or DDIMScheduler."
                )
        official = make_lvdm_scheduler().alphas_cumprod
        alphas_cumprod = scheduler.alphas_cumprod.cpu()
        if alphas_cumprod.shape != official.shape or not torch.allclose(alphas_cumprod, official, atol=1e-6):
            logger.warning(
                f"{name} has another noise schedule than LVDM's training. Unless this model was trained with it, set "
                'num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear".'
            )
        for setting in ("clip_sample", "thresholding"):
            if settings.get(setting):
                logger.warning(f"{name} has {setting}=True, which cuts latents to [-1, 1]: setting it to False.")
                scheduler.register_to_config(**{setting: False})

    def prepare_timesteps(self, num_inference_steps: int, device: torch.device) -> torch.Tensor:
        """The scheduler's timesteps, noisiest first, and no memory of another clip; a ValueError if it cannot."""
        name = type(self.scheduler).__name__
        try:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        except (AssertionError, IndexError, ValueError) as error:
            reason = str(error) or "it has no timesteps for so many"
            raise ValueError(f"{num_inference_steps=} does not suit {name}: {reason}") from error
        if not self.scheduler.timesteps.isfinite().all():
            raise ValueError(f"{num_inference_steps=} does not suit {name}: its timesteps are not finite; take more.")
        if self.scheduler.timesteps.max() > (last := self.scheduler.config.num_train_timesteps - 1):
            raise ValueError(
                f"{num_inference_steps=} does not suit {name}: its timesteps go beyond {last}, the last of training; "
                "take fewer, or another steps_offset."
            )
        return self.scheduler.timesteps

    def long_video(self, num_latent_frames: int) -> LongVideo | None:
        """How a video of so many latent frames comes about; None for one clip of the unet."""
        if num_latent_frames <= self.unet.config.num_frames:
            return None
        clip_length = self.prediction_unet.config.num_frames
        stride = 1 if self.interpolation_unet is None else self.interpolation_unet.config.num_frames - 1
        num_gaps = math.ceil((num_latent_frames - 1) / stride)
        num_clips = max(1, math.ceil(num_gaps / (clip_length - 1)))
        return LongVideo(stride, num_clips, num_gaps, num_clips * (clip_length - 1) * stride + 1)

    def latent_shape(self, batch_size: int, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """The shape `(B, C, f, h, w)` of a call's starting noise."""
        factors = self.autoencoder.config
        num_latent_frames = num_frames // factors.temporal_factor
        long_video = self.long_video(num_latent_frames)
        return (
            batch_size,
            self.unet.config.in_channels,
            num_latent_frames if long_video is None else long_video.num_noise_frames,
            height // factors.spatial_factor,
            width // factors.spatial_factor,
        )

    def predict(
        self,
        unet: LVDMUNet3DModel,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | None,
        null_labels: torch.Tensor | None,
        given: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """The noise in latents `(B, C, F, h, w)` in float32, guided away from that of no class and of no given frames.

        Both guidances are additive (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, equation 6; LVDM, section
        3.3, "unconditional guidance").
        """
        latents = latents.to(unet.dtype)
        noise = unet(latents, timestep, labels, **given, return_dict=False)[0].float()
        guided = noise
        if self._guidance_scale > 1:
            of_no_class = unet(latents, timestep, null_labels, **given, return_dict=False)[0].float()
            guided = guided + (self._guidance_scale - 1) * (noise - of_no_class)
        if self._given_guidance_scale > 1 and given:
            of_nothing = unet(latents, timestep, labels, return_dict=False)[0].float()
            guided = guided + (self._given_guidance_scale - 1) * (noise - of_nothing)
        return guided

    def decode_latents(self, latents: torch.Tensor, decode_chunk_size: int | None = None) -> torch.Tensor:
        """Latents `(B, C, f, h, w)` to clips `(B, 3, F, H, W)` in about [-1, 1], one clip at a time.

        With `decode_chunk_size`, so many latent frames at a time, each chunk with a frame of its neighbours, which
        saves memory and changes the result a little: the decoder's norms see the chunk instead of the clip.
        """
        latents = latents / self.config.latent_scale - self.config.latent_shift
        latents = latents.to(self.autoencoder.dtype)
        num_frames, factor = latents.shape[2], self.autoencoder.config.temporal_factor
        chunk_size = decode_chunk_size or num_frames
        clips = []
        for clip_latents in latents.split(1):
            chunks = []
            for start in range(0, num_frames, chunk_size):
                first, stop = max(0, start - DECODE_OVERLAP), start + chunk_size
                decoded = self.autoencoder.decode(clip_latents[:, :, first : stop + DECODE_OVERLAP]).sample
                chunks.append(decoded[:, :, (start - first) * factor :][:, :, : (stop - start) * factor].float())
            clips.append(torch.cat(chunks, dim=2))
        return torch.cat(clips)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LVDMPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        eta: float = 0.0,
        official_sampling_size: bool = False,
        given_noise_level: int | None = None,
        given_guidance_scale: float = 1.0,
        decode_chunk_size: int | None = None,
    ) -> EndoraPipelineOutput | tuple:
        """Generates clips.

        More frames than the unet was trained at are a long video (paper, section 3.3): `prediction_unet` makes a clip
        from nothing, then clip after clip from the last latent frame of the one before; with `interpolation_unet`
        these are every `stride`-th latent frame, and it fills in between two of them. Latent frames that a model was
        given are in the video as they were given.

        Args:
            batch_size: number of clips; the number of labels where `class_labels` is a list.
            num_frames: frames of a clip, a multiple of the autoencoder's `temporal_factor`; by default what the unet
                was trained at.
            height: pixels, a multiple of the autoencoder's `spatial_factor` and of what the unet halves; by default
                the training size.
            width: likewise.
            num_inference_steps: denoising steps of a clip; by default those saved with the pipeline.
            class_labels: one label per clip, or one int for all. None draws from a class-conditional model
                unconditionally, by its null class.
            guidance_scale: classifier-free guidance by class. 1 is off.
            generator: one for the batch, or a list with one per clip, which makes a clip independent of its batch.
            latents: starting noise of unit variance, of the shape that `latent_shape` gives, instead of drawing it. In
                a long video each clip takes the part of its frames.
            output_type: "pil", "np", "pt" or "latent"; see `EndoraPipelineOutput`. Latents are scaled ones.
            return_dict: False for a tuple `(frames,)`.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after every step; the
                dictionary it returns may hold changed latents. In a long video, steps are counted over all its clips
                and the latents are those of the clip at hand.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets; only "latents" exists.
            eta: noise that a DDIM step adds (Song et al. 2021, https://arxiv.org/abs/2010.02502, equation 16), 0 to 1;
                the official DDIM sampler has 1.
            official_sampling_size: sample latents of 32x32, clips of 256x256 pixels, whatever the unet was trained at,
                as the official endoscopy configs do (`image_size: 32`) with a unet trained at 16x16. For comparisons
                with numbers that were computed so; clips are better at the size of the training, the default.
            given_noise_level: conditional latent perturbation (paper, section 3.3), in long videos: the timestep whose
                noise is added to what a model is given, so that it does not take over its errors. The official script
                has 100. None adds nothing.
            given_guidance_scale: unconditional guidance (paper, section 3.3), in long videos: away from what the model
                predicts when nothing is given. 1 is off; the official script's `uncond_scale` of 0.1 is 1.1 here.
            decode_chunk_size: latent frames decoded at a time, all by default; see `decode_latents`.

        Returns:
            `EndoraPipelineOutput`, or `(frames,)`.

        Raises:
            ValueError: for an argument that does not fit the models, or a scheduler that cannot serve them.
        """
        # 1. Defaults and checks
        config, factors = self.unet.config, self.autoencoder.config
        sample_size = config.sample_size
        if official_sampling_size:
            if height is not None or width is not None:
                raise ValueError(f"official_sampling_size=True with height={height}, width={width}: expected no size.")
            sample_size = OFFICIAL_SAMPLING_SIZE
        sample_height, sample_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        height = sample_height * factors.spatial_factor if height is None else height
        width = sample_width * factors.spatial_factor if width is None else width
        num_frames = config.num_frames * factors.temporal_factor if num_frames is None else num_frames
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        if class_labels is not None:
            given_labels = numbers_of("class_labels", class_labels)
            class_labels = given_labels.flatten().tolist() * (batch_size if given_labels.ndim == 0 else 1)
            batch_size = len(class_labels) if batch_size == 1 else batch_size
        self.prepare_scheduler()
        self.check_inputs(
            batch_size,
            num_frames,
            height,
            width,
            num_inference_steps,
            class_labels,
            guidance_scale,
            given_guidance_scale,
            given_noise_level,
            eta,
            generator,
            latents,
            output_type,
            list(callback_on_step_end_tensor_inputs),
            decode_chunk_size,
        )
        self._guidance_scale, self._given_guidance_scale = guidance_scale, given_guidance_scale
        self._current_timestep, self._interrupt = None, False
        device = self._execution_device

        # 2. Starting noise in float32, whatever the precision of the models, and labels
        shape = self.latent_shape(batch_size, num_frames, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        noise = latents.to(device, torch.float32)
        null_labels = None
        if self.unet.null_class is not None:
            null_labels = torch.full((batch_size,), self.unet.null_class, device=device)
        labels = null_labels if class_labels is None else torch.tensor(class_labels, device=device)
        step_kwargs: dict[str, Any] = {}
        step_parameters = inspect.signature(type(self.scheduler).step).parameters
        if "generator" in step_parameters:
            step_kwargs["generator"] = generator
        if "eta" in step_parameters:
            step_kwargs["eta"] = eta
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda latents, timestep: latents)

        # 3. Denoising of one clip
        num_latent_frames = num_frames // factors.temporal_factor
        long_video = self.long_video(num_latent_frames)
        steps = self.prepare_timesteps(num_inference_steps, device)
        num_clips = 1 if long_video is None else long_video.num_clips
        if long_video is not None and long_video.stride > 1:
            num_clips += long_video.num_gaps
        self._num_timesteps = len(steps) * num_clips
        progress_bar = self.progress_bar(total=self._num_timesteps)
        num_steps_done = 0

        def denoise(
            unet: LVDMUNet3DModel, clip_noise: torch.Tensor, given_frames: dict[int, torch.Tensor]
        ) -> torch.Tensor:
            """Clean latents `(B, C, F, h, w)` from noise of that shape and latents `(B, C, h, w)` by their place."""
            nonlocal num_steps_done
            given: dict[str, torch.Tensor] = {}
            if given_frames:
                places = list(given_frames)
                given_latents = torch.zeros_like(clip_noise)
                given_latents[:, :, places] = torch.stack(list(given_frames.values()), dim=2)
                given_mask = torch.zeros(batch_size, clip_noise.shape[2], dtype=torch.bool, device=device)
                given_mask[:, places] = True
                if given_noise_level is not None:
                    shape = (batch_size, clip_noise.shape[1], len(places), *clip_noise.shape[3:])
                    added = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                    kept = self.scheduler.alphas_cumprod[given_noise_level].item()
                    given_latents[:, :, places] = kept**0.5 * given_latents[:, :, places] + (1 - kept) ** 0.5 * added
                    given["noise_levels"] = torch.full((batch_size,), given_noise_level, device=device)
                given |= {"given_latents": given_latents, "given_mask": given_mask}
            timesteps = self.prepare_timesteps(num_inference_steps, device)
            latents = clip_noise * self.scheduler.init_noise_sigma
            for timestep in timesteps:
                if self.interrupt:
                    break
                self._current_timestep = timestep
                model_input = scale_model_input(latents, timestep)
                prediction = self.predict(unet, model_input, timestep, labels, null_labels, given)
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    inputs = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    returned = callback_on_step_end(self, num_steps_done, timestep, inputs) or {}
                    if returned.get("latents", latents).shape != latents.shape:
                        raise ValueError(
                            f"callback_on_step_end returned latents of shape {tuple(returned['latents'].shape)}: "
                            f"expected {tuple(latents.shape)}."
                        )
                    latents = returned.get("latents", latents)
                num_steps_done += 1
                progress_bar.update()
            latents = latents.clone() if given_frames else latents  # callbacks may have kept them
            for place, frame in given_frames.items():
                latents[:, :, place] = frame
            return latents

        # 4. A short clip; or clip after clip, then what lies between their frames
        if long_video is None:
            latents = denoise(self.unet, noise, {})
        else:
            stride, clip_length = long_video.stride, self.prediction_unet.config.num_frames
            latents = torch.zeros_like(noise)
            predicted = noise[:, :, ::stride].clone()  # becomes latents, clip by clip
            for clip in range(long_video.num_clips):
                start = clip * (clip_length - 1)
                part = slice(start, start + clip_length)
                known = {} if clip == 0 else {0: predicted[:, :, start].clone()}
                predicted[:, :, part] = denoise(self.prediction_unet, predicted[:, :, part], known)
            latents[:, :, ::stride] = predicted
            for gap in range(long_video.num_gaps if stride > 1 else 0):
                part = slice(gap * stride, (gap + 1) * stride + 1)
                known = {0: predicted[:, :, gap], stride: predicted[:, :, gap + 1]}
                latents[:, :, part] = denoise(self.interpolation_unet, noise[:, :, part], known)
            latents = latents[:, :, :num_latent_frames]
        progress_bar.close()
        self._current_timestep = None
        if not latents.isfinite().all():
            raise ValueError(
                f"{type(self.scheduler).__name__} with {len(steps)} timesteps and a unet in {self.unet.dtype} left "
                "values that are not finite: expected other steps, or more precision."
            )

        # 5. Frames
        if output_type == "latent":
            frames = latents
        else:
            clip_pixels = self.decode_latents(latents, decode_chunk_size)
            frames = self.video_processor.postprocess_video(clip_pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return EndoraPipelineOutput(frames=frames) if return_dict else (frames,)

    def to_json_string(self) -> str:
        """The `model_index.json` of the published form, which names the classes as diffusers' own."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = type(self).__name__
        for name in ("autoencoder", "unet", "prediction_unet", "interpolation_unet"):
            if getattr(self, name) is not None:
                index[name] = ["diffusers", type(getattr(self, name)).__name__]
        index.pop("_name_or_path", None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes `to_json_string()` in one move: the file that makes a folder loadable is whole or not there."""
        with written_atomically(Path(json_file_path)) as unfinished:
            unfinished.write_text(self.to_json_string(), encoding="utf-8")
