"""Pixels to latents, the way the pipeline expects them back."""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny


@torch.no_grad()
def encode_frames(
    vae: AutoencoderKL | AutoencoderTiny, frames: torch.Tensor, chunk_size: int = 24
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The posterior of each frame's latents.

    Args:
        vae: an `AutoencoderKL`, or an `AutoencoderTiny`, whose latents are certain.
        frames: `(n, 3, H, W)` in [-1, 1].
        chunk_size: frames that go through the VAE at a time; changes memory, not results.

    Returns:
        Mean and log-variance, float32 `(n, C, h, w)`, before scaling; no log-variance for an `AutoencoderTiny`.
    """
    means, log_variances = [], []
    for chunk in frames.to(vae.dtype).split(chunk_size):
        encoded = vae.encode(chunk)
        if hasattr(encoded, "latent_dist"):
            means.append(encoded.latent_dist.mean.float())
            log_variances.append(encoded.latent_dist.logvar.float())
        else:
            means.append(encoded.latents.float())
    return torch.cat(means), torch.cat(log_variances) if log_variances else None


def sample_latents(
    vae_config: Any, mean: torch.Tensor, log_variance: torch.Tensor | None, noise: torch.Tensor
) -> torch.Tensor:
    """Latents of about unit variance: a sample of the posterior, as the official trainer draws, shifted and scaled.

    Args:
        vae_config: its `shift_factor` (None counts as 0) and `scaling_factor` are applied.
        mean: `(..., C, h, w)`.
        log_variance: of the same shape, or None where the latents are certain.
        noise: standard normal, of the same shape; unused without `log_variance`.
    """
    latents = mean.float()
    if log_variance is not None:
        latents = latents + (0.5 * log_variance.float()).exp() * noise
    return (latents - (getattr(vae_config, "shift_factor", None) or 0.0)) * vae_config.scaling_factor
