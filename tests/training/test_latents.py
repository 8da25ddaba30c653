"""Latents are what the pipeline's decoder expects back, with each VAE's own scaling."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from diffusers_endora.training.latents import LatentCache, encode_clips


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
    latents = encode_clips(vae, clips, torch.Generator().manual_seed(1), chunk_size=2)
    assert latents.shape == (2, 4, 3, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(clips[0, 0:2]).latent_dist
        first = (posterior.sample(torch.Generator().manual_seed(1)) - 0.1) * 0.3
    torch.testing.assert_close(latents[0, :, :2].transpose(0, 1), first, rtol=1e-5, atol=1e-6)


def test_tiny_autoencoder_has_no_posterior(clips):
    vae = tiny_vae()
    with torch.no_grad():
        expected = vae.encode(clips.flatten(0, 1)).latents.unflatten(0, (2, 3)).transpose(1, 2) * 0.5
    torch.testing.assert_close(encode_clips(vae, clips, chunk_size=4), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_vae", [tiny_kl, tiny_vae])
def test_cache_encodes_a_frame_once_and_gives_the_same_latents(clips, make_vae, monkeypatch):
    vae = make_vae()
    cache, frame_ids = LatentCache(vae), torch.arange(6).view(2, 3)
    expected = encode_clips(vae, clips, torch.Generator().manual_seed(1), chunk_size=6)
    torch.testing.assert_close(
        cache.encode_clips(clips, frame_ids, torch.Generator().manual_seed(1)), expected, rtol=1e-4, atol=1e-5
    )
    monkeypatch.setattr(vae, "encode", None)  # a second encoding would fail
    again = cache.encode_clips(clips.flip(1), frame_ids.flip(1), torch.Generator().manual_seed(1))
    assert again.shape == expected.shape
    if make_vae is tiny_vae:
        torch.testing.assert_close(again.flip(2), expected, rtol=1e-4, atol=1e-5)
