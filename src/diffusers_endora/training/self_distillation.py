"""Self-distillation of small ViTs, for teachers of the prior: data2vec (Baevski et al. 2022,
https://arxiv.org/abs/2202.03555) on pictures.

A student sees a picture with most of its patches hidden, and predicts there what a teacher, its moving average, makes
of the whole picture. (DINO's own training, by views and prototypes, did not leave its plateau in the thousand steps of
small batches that a CPU affords: on pictures as alike as endoscopy's all outputs became the same.)
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTModel


class SelfDistillation(nn.Module):
    """Student, teacher and loss.

    Args:
        vit: what is trained, in place, with `use_mask_token`; the teacher starts as its copy.
        num_target_layers: last blocks whose outputs are averaged to what the student predicts.
    """

    def __init__(self, vit: ViTModel, num_target_layers: int = 6) -> None:
        super().__init__()
        width = vit.config.hidden_size
        self.student, self.teacher = vit, copy.deepcopy(vit).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.num_target_layers = num_target_layers

    def forward(self, pixels: torch.Tensor, is_hidden: torch.Tensor) -> torch.Tensor:
        """Mean squared error at the hidden patches; 1 is what knowing nothing of the picture scores.

        Args:
            pixels: `(B, 3, H, W)` in [-1, 1].
            is_hidden: bool `(B, N)`, patches row by row.
        """
        expected = self.targets(pixels)[is_hidden]
        tokens = self.student(pixels, bool_masked_pos=is_hidden, interpolate_pos_encoding=True).last_hidden_state
        return F.mse_loss(self.predictor(tokens[:, 1:][is_hidden]).float(), expected)

    @torch.no_grad()
    def targets(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the teacher makes of each patch, `(B, N, width)`, float32.

        Outputs of the last blocks, each token of mean 0 and variance 1, averaged (section 3.3). From each place the
        batch's mean is taken, and each channel is scaled to a variance of 1, so that neither the same for all pictures
        nor nothing at all is a way out.
        """
        states = self.teacher(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        chosen = [
            F.layer_norm(state[:, 1:].float(), state.shape[-1:]) for state in states[1:][-self.num_target_layers :]
        ]
        tokens = torch.stack(chosen).mean(0)
        tokens = tokens - tokens.mean(0)
        return tokens / tokens.square().mean((0, 1)).sqrt().clamp_min(1e-3)

    @torch.no_grad()
    def update_teacher(self, progress: float, momentum: float = 0.99) -> None:
        """The teacher follows the student, ever more slowly: its momentum goes to 1 by a cosine as `progress` does."""
        rate = (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), rate)


def hidden_patches(batch: int, side: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Which patches of `side` x `side` are hidden: blobs, `share` of all; bool `(batch, side * side)`."""
    coarse = torch.rand(batch, 1, max(2, side // 3), max(2, side // 3), generator=generator)
    heights = F.interpolate(coarse, (side, side), mode="bicubic").flatten(1)
    ranks = heights.argsort(dim=1).argsort(dim=1)
    return ranks < round(share * side * side)


def random_views(
    pixels: torch.Tensor, side: int, area: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """A random part of each picture, resampled, perhaps mirrored, blurred and of other colour.

    Args:
        pixels: `(B, 3, H, W)` in [-1, 1].
        side: of the views, in pixels.
        area: least and largest part of a picture; proportions are between 3:4 and 4:3.
        generator: on the CPU, of all that is drawn.

    Returns:
        `(B, 3, side, side)` in [-1, 1].
    """
    batch = len(pixels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(batch).uniform_(low, high, generator=generator)

    # 1. which part
    surface, aspect = uniform(*area), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    half_width, half_height = (surface * aspect).sqrt().clamp(max=1), (surface / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = half_width * uniform(-1, 1).sign()
    theta[:, 1, 1] = half_height
    theta[:, 0, 2] = (1 - half_width) * uniform(-1, 1)
    theta[:, 1, 2] = (1 - half_height) * uniform(-1, 1)
    grid = F.affine_grid(theta, [batch, 3, side, side], align_corners=False)
    views = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False) / 2 + 0.5

    # 2. brightness, contrast and saturation, of four in five
    changed = (uniform(0, 1) < 0.8).float()
    brightness, contrast, saturation = (
        (1 + changed * uniform(-strength, strength))[:, None, None, None] for strength in (0.4, 0.4, 0.2)
    )
    views = views * brightness
    mean = views.mean((1, 2, 3), keepdim=True)
    views = mean + contrast * (views - mean)
    grey = views.mean(1, keepdim=True)
    views = (grey + saturation * (views - grey)).clamp(0, 1)

    # 3. blur, of one in two
    blurred = F.avg_pool2d(F.pad(views, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    is_blurred = (uniform(0, 1) < 0.5)[:, None, None, None]
    return torch.where(is_blurred, blurred, views) * 2 - 1


@torch.no_grad()
def nearest_neighbour_accuracy(
    known: torch.Tensor, known_classes: torch.Tensor, asked: torch.Tensor, asked_classes: torch.Tensor, k: int = 20
) -> float:
    """Share of features whose class wins the vote of the `k` nearest known ones, or of all where there are fewer.

    As in DINO's evaluation (Caron et al. 2021, https://arxiv.org/abs/2104.14294), a vote weighs exp(cosine / 0.07).

    Args:
        known, asked: `(N, C)` and `(M, C)`.
        known_classes, asked_classes: int `(N,)` and `(M,)`.
    """
    cosines, neighbours = (F.normalize(asked, dim=-1) @ F.normalize(known, dim=-1).T).topk(min(k, len(known)), dim=-1)
    votes = F.one_hot(known_classes[neighbours]) * (cosines / 0.07).exp()[..., None]
    return (votes.sum(1).argmax(-1) == asked_classes).float().mean().item()
