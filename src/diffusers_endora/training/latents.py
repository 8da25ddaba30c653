"""Pixels to latents, the way the pipeline expects them back."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKL | AutoencoderTiny,
    clips: torch.Tensor,
    generator: torch.Generator | None = None,
    chunk_size: int = 24,
) -> torch.Tensor:
    """Encodes clips frame by frame.

    Args:
        vae: an `AutoencoderKL`, whose posterior is sampled (as the official trainer does), or an `AutoencoderTiny`,
            which has none. Its own shift and scale are applied.
        clips: `(B, F, 3, H, W)` in [-1, 1].
        generator: source of the posterior samples; torch's global one by default.
        chunk_size: frames that go through the VAE at a time; changes memory, not results.

    Returns:
        Latents `(B, C, F, H/8, W/8)` in float32, of about unit variance (the factor 8 is the VAE's).
    """
    latents = []
    for frames in clips.flatten(0, 1).to(vae.dtype).split(chunk_size):
        encoded = vae.encode(frames)
        latents.append(encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents)
    return scale_latents(vae, torch.cat(latents).float()).unflatten(0, clips.shape[:2]).transpose(1, 2)


def scale_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """What a VAE's encoder puts out, shifted and scaled as its config says to about unit variance."""
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


class LatentCache:
    """Remembers each frame's VAE posterior, so that a frame is encoded once in a training and not once a step.

    On the VAE's device, per process, without a limit: 8 KB a frame for 16x16x4 latents of an `AutoencoderKL`, so meant
    for corpora of up to a few 100,000 frames. Frames are encoded one at a time, so that what is remembered does not
    depend on which frames came together.

    Args:
        vae: as for `encode_clips`.
    """

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny):
        self.vae = vae
        self.mean: dict[int, torch.Tensor] = {}
        self.std: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def encode_clips(
        self, clips: torch.Tensor, frame_ids: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """As the function `encode_clips`, for frames that `frame_ids`, integers `(B, F)`, identify in the corpus."""
        ids = frame_ids.flatten().tolist()
        for frame_id, frame in zip(ids, clips.flatten(0, 1).to(self.vae.dtype), strict=True):
            if frame_id not in self.mean:
                encoded = self.vae.encode(frame[None])
                if hasattr(encoded, "latent_dist"):
                    self.mean[frame_id] = encoded.latent_dist.mean[0].float()
                    self.std[frame_id] = encoded.latent_dist.std[0].float()
                else:
                    self.mean[frame_id] = encoded.latents[0].float()
        latents = torch.stack([self.mean[frame_id] for frame_id in ids])
        if self.std:
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
            latents = latents + noise * torch.stack([self.std[frame_id] for frame_id in ids])
        return scale_latents(self.vae, latents).unflatten(0, clips.shape[:2]).transpose(1, 2)
