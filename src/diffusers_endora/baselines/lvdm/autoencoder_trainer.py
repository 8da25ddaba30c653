"""The first stage of LVDM: the 3-D autoencoder, trained on clips against a discriminator of patches."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator

from ...data.clips import ClipDataset
from ...data.contact_sheet import save_contact_sheet
from .autoencoder_lvdm import LVDMAutoencoder, LVDMLatentDistribution
from .kernel_muon import KernelMuon
from .latent_clips import LatentClips, latent_shape
from .lvdm_loss import LVDMAutoencoderLoss, VideoPatchDiscriminator, hinge_discriminator_loss, load_lpips
from .stage_trainer import StageTrainer


class ReconstructionModel(nn.Module):
    """The autoencoder as its training calls it: one forward from clips to what the loss looks at."""

    def __init__(self, autoencoder: LVDMAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, clips: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            clips: `(B, 3, F, H, W)` in [-1, 1].
            noise: standard normal, of the latents' shape, which makes a sample of their distribution.

        Returns:
            What is decoded of the sample, `(B, 3, F, H, W)`, and the parameters of the distribution.
        """
        distribution = self.autoencoder.encode(clips).latent_dist
        latents = distribution.mean + distribution.std * noise
        return self.autoencoder.decode(latents).sample, distribution.parameters


class DiscriminatorModel(nn.Module):
    """The discriminator as its training calls it: one forward from real and reconstructed clips to its loss."""

    def __init__(self, discriminator: VideoPatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, clips: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        return hinge_discriminator_loss(self.discriminator(clips), self.discriminator(reconstruction))


class AutoencoderTrainer(StageTrainer):
    """Trains an `LVDMAutoencoder` and, with `--disc_weight`, the discriminator that judges its reconstructions.

    In a step the autoencoder is trained first; the discriminator then sees the same reconstructions.

    Args:
        args: the flags.
        accelerator: made from them.
        dataset: the corpus.
        held_out: videos that are measured, or None: then clips of the training are.
        autoencoder: what is trained.

    Raises:
        ValueError: clips are too small for the discriminator or the autoencoder, or `--lpips_weights` are none.
        OSError: there are no `--lpips_weights`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        dataset: ClipDataset,
        held_out: ClipDataset | None,
        autoencoder: LVDMAutoencoder,
    ) -> None:
        self.args = args
        shape = latent_shape(autoencoder, args.num_frames, args.resolution)
        if args.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        models: dict[str, nn.Module] = {"autoencoder": ReconstructionModel(autoencoder)}
        if args.disc_weight > 0:
            if args.resolution < 24:
                raise ValueError(f"--resolution {args.resolution}: expected 24 or more, or --disc_weight 0.")
            discriminator = VideoPatchDiscriminator(temporal_kernel_size=args.disc_temporal_kernel_size)
            models["discriminator"] = DiscriminatorModel(discriminator)
        perceptual = None if args.lpips_weights is None else load_lpips(args.lpips_weights).to(accelerator.device)
        self.loss = LVDMAutoencoderLoss(
            perceptual,
            kl_weight=args.kl_weight,
            discriminator_weight=args.disc_weight,
            discriminator_start=args.disc_start,
        ).requires_grad_(False)  # its one parameter is not trained officially either
        self.loss.to(accelerator.device)
        steps, size = args.autoencoder_steps, args.autoencoder_batch_size
        clips = LatentClips(
            dataset, shape, args.seed, steps * size * accelerator.num_processes * args.gradient_accumulation_steps
        )
        super().__init__(args, accelerator, dataset, clips, size, steps, models)
        source, seed = (dataset, args.seed) if held_out is None else (held_out, args.seed + 1)
        self.measured_clips = LatentClips(source, shape, seed, min(args.validation_loss_clips, len(source)))
        self.prefix = "train" if held_out is None else "held_out"

    def make_optimizer(self, name: str, model: Any) -> torch.optim.Optimizer:
        """Adam with the official betas; Muon for the autoencoder's kernels where the flags ask for it."""
        options: dict[str, Any] = {"lr": self.args.autoencoder_learning_rate, "betas": (0.5, 0.9)}
        if name == "autoencoder" and self.args.optimizer == "muon":
            return KernelMuon(model, model.autoencoder.last_layer, **options)
        return torch.optim.Adam(model.parameters(), **options)

    @property
    def autoencoder(self) -> LVDMAutoencoder:
        return self.unwrapped("autoencoder").autoencoder

    def backward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds the gradients of both networks; returns the parts of their losses."""
        clips = batch["video"].transpose(1, 2)
        is_adversarial = "discriminator" in self.models and self.step >= self.args.disc_start
        discriminator = None
        if is_adversarial:
            discriminator = self.unwrapped("discriminator").discriminator.requires_grad_(False)
        reconstruction, parameters = self.models["autoencoder"](clips, batch["posterior_noise"])
        with self.accelerator.autocast():
            losses = self.loss(
                clips,
                reconstruction,
                LVDMLatentDistribution(parameters.float()),
                self.step,
                discriminator,
                self.autoencoder.last_layer,
            )
        self.accelerator.backward(losses.total)
        values = losses._asdict()
        values["loss"] = values.pop("total")
        if "discriminator" in self.models:
            values["discriminator"] = losses.pixel.new_zeros(())
        if discriminator is not None:
            discriminator.requires_grad_(True)
            values["discriminator"] = self.models["discriminator"](clips, reconstruction.detach())
            self.accelerator.backward(values["discriminator"])
        return values

    def measure(self) -> dict[str, float]:
        """PSNR and mean absolute error of reconstructions from the mode of the posterior."""

        def values_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            clips = batch["video"]
            error = self.reconstructed(clips) - clips
            return {
                f"{self.prefix}_psnr_db": peak_signal_to_noise_ratio(error).mean(1),
                f"{self.prefix}_l1": error.abs().mean((1, 2, 3, 4)),
            }

        return self.averages(self.measured_clips, values_of)

    def show(self, folder: Path) -> dict[str, float]:
        """A contact sheet of clips, each above what the autoencoder makes of it."""
        count = min(self.args.num_validation_clips, len(self.measured_clips))
        clips = torch.stack([self.measured_clips[place]["video"] for place in range(count)])
        rows = torch.stack([clips, self.reconstructed(clips.to(self.accelerator.device)).cpu()], 1).flatten(0, 1)
        pixels = ((rows + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
        save_contact_sheet(folder / "reconstructions.png", np.ascontiguousarray(pixels.numpy()))
        return {}

    @torch.no_grad()
    def reconstructed(self, clips: torch.Tensor) -> torch.Tensor:
        """What the autoencoder makes of `(B, F, 3, H, W)` by the mode of the posterior, in [-1, 1]."""
        latents = self.autoencoder.encode(clips.transpose(1, 2)).latent_dist.mode()
        return self.autoencoder.decode(latents).sample.transpose(1, 2).clamp(-1, 1)

    def facts(self) -> dict[str, Any]:
        args = self.args
        names = ["kl_weight", "disc_weight", "disc_start", "disc_temporal_kernel_size", "optimizer"]
        facts = super().facts() | {name: getattr(args, name) for name in names}
        facts["perceptual"] = args.lpips_weights is not None
        facts["autoencoder"] = {k: v for k, v in self.autoencoder.config.items() if not k.startswith("_")}
        return facts

    def results(self) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in self.autoencoder.parameters())
        return {**super().results(), **self.measure(), "num_parameters": parameters}


def peak_signal_to_noise_ratio(error: torch.Tensor) -> torch.Tensor:
    """In dB, of each frame: differences `(B, F, 3, H, W)` of pixels in [-1, 1] -> `(B, F)`."""
    return -10 * (error.square().mean((2, 3, 4)) / 4).log10()
