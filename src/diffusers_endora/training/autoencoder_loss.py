"""What an autoencoder of frames is trained with beside the distance of pixels, which alone leaves it blurred.

Features of a ViT as a perceptual distance, and a discriminator of patches (Isola et al. 2017,
https://arxiv.org/abs/1611.07004), with the hinge loss, as in VQGAN (Esser et al. 2021,
https://arxiv.org/abs/2012.09841).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class TokenDistance(nn.Module):
    """Mean squared distance of a frozen ViT's tokens, each of length 1, over some of its blocks.

    It is not LPIPS: nothing is fitted to what people find alike.

    Args:
        vit: a `transformers` ViT that is fed pixels in [-1, 1].
        layers: blocks whose outputs are compared.
    """

    def __init__(self, vit: Any, layers: tuple[int, ...] = (2, 5, 8, 11)) -> None:
        super().__init__()
        if not 0 <= min(layers) <= max(layers) < vit.config.num_hidden_layers:
            raise ValueError(f"layers={layers}: the network has blocks 0 to {vit.config.num_hidden_layers - 1}.")
        self.vit = vit.eval().requires_grad_(False)
        self.layers = layers

    def forward(
        self, reconstruction: torch.Tensor, pixels: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """A scalar in [0, 4].

        The grid of the ViT's patches is laid at a random place: else errors would settle along its edges.

        Args:
            reconstruction, pixels: `(B, 3, H, W)` in [-1, 1], sides a multiple of the patch and at least two of it.
        """
        patch = self.vit.config.patch_size
        top, left = torch.randint(patch, (2,), generator=generator).tolist()
        height, width = pixels.shape[2] - patch, pixels.shape[3] - patch
        part = (..., slice(top, top + height), slice(left, left + width))
        with torch.no_grad():
            expected = self._tokens(pixels[part])
        given = self._tokens(reconstruction[part])
        distances = [(a - b).square().sum(-1).mean() for a, b in zip(given, expected, strict=True)]
        return torch.stack(distances).mean()

    def _tokens(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        states = self.vit(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        return [F.normalize(self.vit.layernorm(states[layer + 1])[:, 1:].float(), dim=-1) for layer in self.layers]


class WithDetail(nn.Module):
    """Puts eight times what a mean over 3x3 pixels takes away beside the pixels: `(B, 3, H, W)` -> `(B, 6, H, W)`."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        coarse = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        return torch.cat([pixels, 8 * (pixels - coarse)], dim=1)


class PatchDiscriminator(nn.Sequential):
    """Scores overlapping patches, real above 0: `(B, 3, H, W)` -> `(B, 1, H / 8 - 1, W / 8 - 1)`.

    Fine detail, which reconstructions lack, is put before its eyes (`WithDetail`): without, it took hundreds of steps
    to tell them from real frames, and with it some tens. Its convolutions see 48x48 pixels, its normalisation the
    whole picture. Group normalisation takes the place of batch normalisation, by whose statistics a batch of real
    frames would be told from one of reconstructions.
    """

    def __init__(self, width: int = 32) -> None:
        layers: list[nn.Module] = [WithDetail(), nn.Conv2d(6, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for channels in (width, 2 * width):
            convolution = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, 4, padding=1))


def balance(loss: torch.Tensor, reference: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """The factor that makes the gradient of `loss` for the decoder's last layer as long as that of `reference`.

    VQGAN's adaptive weight (Esser et al. 2021, equation 7), with its bound for a gradient that vanishes: 1e-6 is added
    to that of `loss`. Both losses can still be differentiated afterwards.
    """
    norms = [torch.autograd.grad(of, last_layer, retain_graph=True)[0].norm() for of in (reference, loss)]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4).detach()


def discriminator_loss(real_scores: torch.Tensor, fake_scores: torch.Tensor) -> torch.Tensor:
    """Hinge loss (Lim & Ye 2017, https://arxiv.org/abs/1705.02894): 2 for scores of 0, 0 beyond +1 and -1."""
    return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()


def peak_signal_to_noise_ratio(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """In dB, of each picture: `(B, 3, H, W)` in [-1, 1] -> `(B,)`; what is out of range is cut off first."""
    error = (reconstruction.clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4
    return -10 * error.log10()
