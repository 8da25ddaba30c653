import pytest
import torch
from transformers import ViTConfig, ViTModel

from diffusers_endora.training.autoencoder_loss import (
    PatchDiscriminator,
    TokenDistance,
    balance,
    discriminator_loss,
    peak_signal_to_noise_ratio,
)


def small_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    return ViTModel(config, add_pooling_layer=False)


def test_token_distance():
    distance = TokenDistance(small_vit(), layers=(0, 2))
    pixels = torch.randn(2, 3, 32, 32).clamp(-1, 1)
    assert distance(pixels, pixels) == 0
    near, far = pixels + 0.01 * torch.randn_like(pixels), torch.randn_like(pixels)
    generator = torch.Generator()
    near, far = (distance(other, pixels, generator.manual_seed(0)) for other in (near, far))
    assert 0 < near < far < 4
    reconstruction = torch.randn(2, 3, 32, 32, requires_grad=True)
    distance(reconstruction, pixels).backward()
    assert reconstruction.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        TokenDistance(small_vit(), layers=(0, 3))


def test_discriminator_sees_patches_of_48_pixels_and_no_other_picture():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=4)
    pictures = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(discriminator(pictures)[:1], discriminator(pictures[:1]))
    for i, layer in enumerate(discriminator):
        if isinstance(layer, torch.nn.GroupNorm):  # which looks at a whole picture
            discriminator[i] = torch.nn.Identity()
    pixels = torch.randn(1, 3, 128, 128, requires_grad=True)
    scores = discriminator(pixels)
    assert scores.shape == (1, 1, 15, 15)
    scores[0, 0, 7, 7].backward()
    touched = pixels.grad.abs().sum((0, 1, 2)).nonzero()
    assert touched.max() - touched.min() + 1 == 48


def test_hinge_loss():
    assert discriminator_loss(torch.zeros(3), torch.zeros(3)) == 2
    assert discriminator_loss(torch.full((3,), 1.5), torch.full((3,), -1.5)) == 0


def test_peak_signal_to_noise_ratio():
    pixels = torch.zeros(2, 3, 4, 4)
    given = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 5.0)])  # the latter is cut to 1
    torch.testing.assert_close(peak_signal_to_noise_ratio(given, pixels), torch.tensor([20.0, 6.0206]))


def test_balanced_losses_pull_the_last_layer_equally_hard():
    torch.manual_seed(0)
    body, last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    out = last(body(torch.randn(3, 4)).tanh())
    reference, loss = out.abs().mean(), 50 * out.square().sum()
    factor = balance(loss, reference, last.weight)
    assert not factor.requires_grad
    lengths = [torch.autograd.grad(of, last.weight, retain_graph=True)[0].norm() for of in (reference, factor * loss)]
    torch.testing.assert_close(*lengths, rtol=1e-4, atol=0)
