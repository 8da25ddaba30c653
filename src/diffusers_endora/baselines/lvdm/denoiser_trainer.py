"""The later stages of LVDM: the UNet that denoises latents, and those that continue and fill in clips."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ...data.clips import ClipDataset
from ...metrics.feature_extractors import hash_weights
from ...training.checkpoints import AVERAGE
from ...training.ema import MovingAverage
from ...training.objective import sample_timesteps
from ...training.trainer import GOLDEN_RATIO
from ...training.training_model import drop_labels
from ...training.validation import Validation
from .autoencoder_lvdm import LVDMAutoencoder
from .kernel_muon import KernelMuon
from .latent_clips import EncodedClips, LatentClips, encode_clips, latent_shape, latents_of, sample_latents
from .lvdm_loss import denoising_loss, latent_scale_and_shift, make_lvdm_scheduler
from .pipeline_lvdm import LVDMPipeline
from .stage_trainer import StageTrainer
from .unet_lvdm import LVDMUNet3DModel

STATISTICS_CLIPS = 256  # that the scale and the shift of latents are measured of
NOISE_LEVELS = 250  # of given latents (`max_noise_level` of the official configs)
GIVEN_NOISE_LEVEL = 100  # of sampled long videos, as in the official script
LATENT_FACTS = "latents.json"  # in a checkpoint


class Completion(NamedTuple):
    """What a UNet of the hierarchical long mode is trained to complete (paper, section 3.3).

    Args:
        component: of the pipeline.
        given: probabilities that the first latent frame is given, and that the first and the last are.
        stride: of the latent frames that it sees.
        num_latent_frames: that it sees.
    """

    component: str
    given: tuple[float, float]
    stride: int
    num_latent_frames: int

    @property
    def num_encoded_frames(self) -> int:
        """Latent frames of the clips that are encoded for it."""
        return (self.num_latent_frames - 1) * self.stride + 1


class DenoiserTrainer(StageTrainer):
    """Trains a UNet to predict the noise in latents, by the mean absolute error, and averages its weights.

    Args:
        args: the flags.
        accelerator: made from them.
        dataset: the corpus, in clips of the length that the stage encodes.
        held_out: videos for the held-out loss, or None.
        autoencoder: makes the latents; not trained.
        unet: what is trained.
        assemble: makes the pipeline of the UNet's weights, the scale and the shift of latents.
        statistics: scale and shift of latents; None: they are measured of the training's.
        completion: what the UNet is to complete, or None.

    Raises:
        ValueError: sizes of clips and networks do not fit, or `--validation_fvd` lacks something.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        dataset: ClipDataset,
        held_out: ClipDataset | None,
        autoencoder: LVDMAutoencoder,
        unet: LVDMUNet3DModel,
        assemble: Callable[[dict[str, torch.Tensor], float, float], LVDMPipeline],
        statistics: tuple[float, float] | None = None,
        completion: Completion | None = None,
    ) -> None:
        self.args = args
        self.completion = completion
        self.autoencoder = autoencoder.requires_grad_(False).eval().to(accelerator.device)
        self.scheduler = make_lvdm_scheduler()
        self.config = unet.config
        self.statistics = statistics
        shape = latent_shape(autoencoder, dataset.num_frames, args.resolution)
        if completion is not None:
            shape = (shape[0], completion.num_latent_frames, *shape[2:])

        # 1. Clips: encoded once, or in each step
        per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        source: Any = dataset
        if args.num_cached_clips:
            encoded_shape = latent_shape(autoencoder, dataset.num_frames, args.resolution)
            source = EncodedClips(
                dataset,
                self.autoencoder,
                encoded_shape,
                args.num_cached_clips,
                args.seed,
                args.dataloader_num_workers,
                accelerator.is_local_main_process,
            )
        given = None if completion is None else completion.given
        clips = LatentClips(source, shape, args.seed, args.max_train_steps * per_step, given)
        self.held_out = None
        if held_out is not None:
            count = min(args.validation_loss_clips, len(held_out))
            self.held_out = LatentClips(held_out, shape, args.seed + 1, count, given)

        # 2. The UNet, whose labels are dropped by what is drawn for each clip and no longer by itself
        self.dropout_prob = unet.config.class_dropout_prob
        if unet.class_embedder is not None:
            unet.class_embedder.dropout_prob = 0.0
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        super().__init__(
            args, accelerator, dataset, clips, args.train_batch_size, args.max_train_steps, {"unet": unet}
        )
        self.ema = MovingAverage(self.unet.parameters(), args.ema_decay, args.ema_warmup)
        self.validation = LVDMValidation(
            args,
            lambda weights: assemble(weights, *self.latent_statistics()),
            dataset.num_classes,
            held_out,
            accelerator,
            completion,
        )

    def make_optimizer(self, name: str, model: Any) -> torch.optim.Optimizer:
        """AdamW, as officially; Muon for matrices and kernels where the flags ask for it."""
        args = self.args
        options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
        if args.optimizer == "muon":
            return KernelMuon(model, model.conv_out.weight, **options)
        return torch.optim.AdamW(model.parameters(), **options, fused=True)

    @property
    def unet(self) -> LVDMUNet3DModel:
        return self.unwrapped("unet")

    def latent_statistics(self) -> tuple[float, float]:
        """The scale and the shift of latents, measured of the training's first clips where they are not known."""
        if self.statistics is None:
            latents = latents_of(self.clips, self.autoencoder, STATISTICS_CLIPS)
            self.statistics = latent_scale_and_shift(latents)
        return self.statistics

    # --- a step ------------------------------------------------------------------------------------------------------

    def backward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds the gradients of the mean loss of a batch."""
        timesteps = sample_timesteps(self.scheduler, batch["timestep_uniform"])
        loss = self.losses(self.models["unet"], batch, timesteps).mean()
        self.accelerator.backward(loss)
        return {"loss": loss}

    def losses(self, unet: Any, batch: dict[str, torch.Tensor], timesteps: torch.Tensor) -> torch.Tensor:
        """The loss of each clip of a batch of `LatentClips`, `(B,)`."""
        # 1. Latents
        moments = batch.get("moments")
        if moments is None:
            moments = encode_clips(self.autoencoder, batch["video"])
        if self.completion is not None:
            moments = moments[:, :, :: self.completion.stride]
        scale, shift = self.latent_statistics()
        latents = scale * (sample_latents(moments, batch["posterior_noise"]) + shift)

        # 2. What the UNet is told
        conditions: dict[str, Any] = {}
        if self.config.num_classes is not None:
            dropped = (batch["label_uniform"], self.dropout_prob, self.config.num_classes)
            conditions["class_labels"] = drop_labels(batch["class_labels"], *dropped)
        if self.completion is not None:
            conditions["given_mask"] = batch["given_mask"]
            conditions["given_noise"] = batch["given_noise"]
            conditions["noise_levels"] = (batch["noise_level_uniform"] * NOISE_LEVELS).long()
        return denoising_loss(unet, latents, timesteps, batch["noise"], self.scheduler, **conditions)

    def after_update(self) -> None:
        self.ema.step(self.unet.parameters())

    # --- reports -----------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, float]:
        """The held-out loss of the averaged weights, at timesteps that are spread evenly and the same each time."""
        if self.held_out is None:
            return {}
        num_timesteps = self.scheduler.config["num_train_timesteps"]

        def values_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            timesteps = ((batch["position"] + 0.5) * GOLDEN_RATIO % 1 * num_timesteps).long()
            if "label_uniform" in batch:
                batch["label_uniform"].fill_(1)  # none is dropped
            return {"held_out_loss": self.losses(self.unet, batch, timesteps)}

        self.unet.eval()
        with self.ema.swapped_into(self.unet.parameters()):
            measured = self.averages(self.held_out, values_of)
        self.unet.train()
        return measured

    def show(self, folder: Path) -> dict[str, float]:
        is_last = self.step == self.max_train_steps
        return self.validation(self.sampling_weights(), folder, self.step, is_last)

    def sampling_weights(self) -> dict[str, torch.Tensor]:
        """The moving average of the UNet's weights."""
        names = [name for name, _ in self.unet.named_parameters()]
        return dict(zip(names, self.ema.full_tensors(), strict=True))

    def pipeline(self) -> LVDMPipeline:
        """What has been trained, with all that sampling needs."""
        return self.validation.assemble(self.sampling_weights())

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        args = self.args
        names = ["optimizer", "adam_weight_decay", "ema_decay", "ema_warmup", "num_cached_clips", "latent_statistics"]
        return {
            **super().facts(),
            **{name: getattr(args, name) for name in names},
            "autoencoder": hash_weights(self.autoencoder)[:16],
            "completion": self.completion,
            "unet": {name: value for name, value in self.config.items() if not name.startswith("_")},
        }

    def write_state(self, folder: Path) -> None:
        tensors = {name: value.contiguous() for name, value in self.sampling_weights().items()}
        save_file(tensors, folder / AVERAGE, metadata={"format": "pt"})
        scale, shift = self.latent_statistics()
        state = {"scale": scale, "shift": shift, "ema_steps": self.ema.num_steps}
        (folder / LATENT_FACTS).write_text(json.dumps(state))

    def read_state(self, folder: Path) -> None:
        state = json.loads((folder / LATENT_FACTS).read_text())
        self.statistics = state["scale"], state["shift"]
        average = load_file(folder / AVERAGE)
        self.ema.load([average[name] for name, _ in self.unet.named_parameters()], state["ema_steps"])

    def results(self) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in self.unet.parameters())
        scale, shift = self.latent_statistics()
        return {
            **super().results(),
            **self.measure(),
            "num_parameters": parameters,
            "latent_scale": scale,
            "latent_shift": shift,
            "learning_rate": self.args.learning_rate,
        }


class LVDMValidation(Validation):
    """`Validation` of an `LVDMPipeline`; with a `completion`, of videos that are long enough to need it.

    Args:
        completion: what the UNet is trained to complete, or None; else see there.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        assemble: Callable[[dict[str, torch.Tensor]], LVDMPipeline],
        num_classes: int | None,
        held_out: ClipDataset | None,
        accelerator: Any,
        completion: Completion | None,
    ) -> None:
        super().__init__(args, assemble, num_classes, held_out, accelerator)
        self.completion = completion

    def trained_part(self, pipeline: Any) -> torch.nn.Module:
        return getattr(pipeline, "unet" if self.completion is None else self.completion.component)

    def sampling_options(self, pipeline: Any) -> dict[str, Any]:
        """Those of short clips; of a completion, also a length that needs it, and the noise on given frames."""
        options = super().sampling_options(pipeline)
        if self.completion is None:
            return options
        num_frames = 2 * pipeline.prediction_unet.config.num_frames - 1  # a clip and its continuation
        if pipeline.interpolation_unet is not None:
            stride = pipeline.interpolation_unet.config.num_frames - 1
            num_frames = (pipeline.prediction_unet.config.num_frames - 1) * stride + 1
        factor = pipeline.autoencoder.config.temporal_factor
        return {**options, "num_frames": num_frames * factor, "given_noise_level": GIVEN_NOISE_LEVEL}
