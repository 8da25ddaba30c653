"""Latents are what the pipeline's decoder expects back, with each VAE's own scaling."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from diffusers_endora.training.latents import encode_frames, sample_latents


@pytest.fixture
def clips():
    return torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny_kl(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
                         up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, **config).eval()  # fmt: skip


def tiny_vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**blocks, **counts, scaling_factor=0.5).eval()


def test_kl_posterior_is_sampled_then_shifted_and_scaled(clips):
    vae = tiny_kl(scaling_factor=0.3, shift_factor=0.1)
    frames = clips.flatten(0, 1)
    mean, log_variance = encode_frames(vae, frames, chunk_size=4)
    with torch.no_grad():
        posterior = vae.encode(frames).latent_dist
        expected = (posterior.sample(torch.Generator().manual_seed(1)) - 0.1) * 0.3
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    latents = sample_latents(vae.config, mean, log_variance, noise)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)


def test_tiny_autoencoder_has_no_posterior(clips):
    vae = tiny_vae()
    frames = clips.flatten(0, 1)
    mean, log_variance = encode_frames(vae, frames, chunk_size=4)
    assert log_variance is None
    with torch.no_grad():
        expected = vae.encode(frames).latents * 0.5
    latents = sample_latents(vae.config, mean, None, torch.full_like(mean, torch.nan))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
