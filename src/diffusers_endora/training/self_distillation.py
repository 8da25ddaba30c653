"""DINO's self-distillation (Caron et al. 2021, https://arxiv.org/abs/2104.14294), for small teachers of the prior.

A student ViT sees small and large views of a picture and learns to say of each what a teacher, its moving average,
says of the large ones. What keeps it from saying the same of all pictures is not DINO's running centre, which on small
batches of pictures as alike as endoscopy's does not, but the assignment of SwAV and DINOv2 (Oquab et al. 2023,
https://arxiv.org/abs/2304.07193, section 4): within a batch all prototypes are given away alike.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTModel


class ProjectionHead(nn.Module):
    """From a [CLS] token to scores of prototypes (section 3.1): a perceptron, length 1, a weight-normalised layer."""

    def __init__(self, width: int, hidden: int, bottleneck: int, num_prototypes: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.perceptron = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for module in self.perceptron:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, bottleneck))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, width)` -> `(B, num_prototypes)`, cosines."""
        return F.linear(F.normalize(self.perceptron(tokens), dim=-1), F.normalize(self.prototypes, dim=-1))


class SelfDistillation(nn.Module):
    """Student, teacher and loss.

    Args:
        vit: what is trained, in place; the teacher starts as its copy.
        num_prototypes: dimensions of the output, 65,536 in the paper; few for small batches.
        student_temperature, teacher_temperature: the paper's 0.1 and 0.04, without its warm-up to 0.07.
    """

    def __init__(
        self,
        vit: ViTModel,
        num_prototypes: int = 128,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
    ) -> None:
        super().__init__()
        width = vit.config.hidden_size
        self.student, self.student_head = vit, ProjectionHead(width, 4 * width, width, num_prototypes)
        self.teacher, self.teacher_head = copy.deepcopy(vit), copy.deepcopy(self.student_head)
        self.teacher.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature

    def forward(self, large: list[torch.Tensor], small: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Equation 3: cross-entropy between teacher and student over all pairs of different views.

        Args:
            large, small: views of the same pictures, each `(B, 3, side, side)` in [-1, 1].

        Returns:
            The loss, and the mean entropy of the teacher's output, nats: near log(num_prototypes) for long, the
            training has collapsed.
        """
        scores = self._scores(self.student, self.student_head, large)
        if small:
            scores = torch.cat([scores, self._scores(self.student, self.student_head, small)])
        with torch.no_grad():
            targets = self._scores(self.teacher, self.teacher_head, large).flatten(0, 1)
            certain = balanced_assignment(targets / self.teacher_temperature).unflatten(0, (len(large), -1))
        log_probabilities = F.log_softmax(scores / self.student_temperature, dim=-1)
        # not by einsum, which autocast would take to bfloat16
        cross_entropy = -(certain[:, None] * log_probabilities[None]).sum(-1).mean(-1)  # (large views, views)
        others = ~torch.eye(*cross_entropy.shape, dtype=torch.bool, device=cross_entropy.device)
        entropy = -(certain * certain.clamp_min(1e-12).log()).sum(-1).mean()
        return cross_entropy[others].mean(), entropy

    @staticmethod
    def _scores(vit: nn.Module, head: nn.Module, views: list[torch.Tensor]) -> torch.Tensor:
        """`(views, B, num_prototypes)`, float32."""
        tokens = vit(torch.cat(views), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return head(tokens).float().unflatten(0, (len(views), -1))

    @torch.no_grad()
    def update_teacher(self, progress: float, momentum: float = 0.996) -> None:
        """The teacher follows the student, ever more slowly: its momentum goes to 1 by a cosine as `progress` does.

        The paper starts at 0.996; a short training wants less.
        """
        rate = (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2
        for slow, fast in ((self.teacher, self.student), (self.teacher_head, self.student_head)):
            torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)


def balanced_assignment(scores: torch.Tensor, num_iterations: int = 3) -> torch.Tensor:
    """Probabilities `(N, K)` after scores, of sum 1 in each row and about N / K in each column (Sinkhorn-Knopp)."""
    log_probabilities = scores - scores.logsumexp((0, 1))
    for _ in range(num_iterations):
        log_probabilities = log_probabilities - log_probabilities.logsumexp(0, keepdim=True)
        log_probabilities = log_probabilities - log_probabilities.logsumexp(1, keepdim=True)
    return log_probabilities.exp()


def random_views(
    pixels: torch.Tensor, side: int, area: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """A random part of each picture, resampled, perhaps mirrored, blurred and of other colour.

    Args:
        pixels: `(B, 3, H, W)` in [-1, 1].
        side: of the views, in pixels.
        area: least and largest part of a picture; proportions are between 3:4 and 4:3.

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

    As in the paper's evaluation, a vote weighs exp(cosine / 0.07).

    Args:
        known, asked: `(N, C)` and `(M, C)`.
        known_classes, asked_classes: int `(N,)` and `(M,)`.
    """
    cosines, neighbours = (F.normalize(asked, dim=-1) @ F.normalize(known, dim=-1).T).topk(min(k, len(known)), dim=-1)
    votes = F.one_hot(known_classes[neighbours]) * (cosines / 0.07).exp()[..., None]
    return (votes.sum(1).argmax(-1) == asked_classes).float().mean().item()
