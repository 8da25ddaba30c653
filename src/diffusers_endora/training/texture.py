"""How far the textures of pictures differ, wherever exactly their details lie."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

NUM_LEVELS = 2  # of the pyramid; what is coarser is left to the distance of pixels


def texture_distance(
    pictures: torch.Tensor,
    targets: torch.Tensor,
    generator: torch.Generator | None = None,
    window: int = 32,
    num_filters: int = 8,
) -> torch.Tensor:
    """Sliced Wasserstein distance between details of pictures and targets, window by window.

    Random filters of 5x5 respond to the two finest levels of a Laplacian pyramid; in each window the sorted responses
    are compared, not those of the same place. A blurred picture has too weak ones; a sharp one with the right kind of
    detail at other places is near. (Karras et al. 2018, https://arxiv.org/abs/1710.10196, section 5, measure this
    distance; Heitz et al. 2021, https://arxiv.org/abs/2006.07229, learn from it.)

    Args:
        pictures, targets: `(B, 3, H, W)`, of multiples of `window` pixels.
        generator: of the filters, on the CPU.
        window: side of the windows in pixels, even; half as much on the coarser level.
        num_filters: on each level.

    Returns:
        The mean absolute distance of the responses, in standard deviations of the targets' details, over both levels.

    Raises:
        ValueError: the sides are no multiples of `window`.
    """
    if any(side % window for side in targets.shape[-2:]):
        raise ValueError(f"pictures of {tuple(targets.shape[-2:])} pixels: expected multiples of {window}.")
    distances = []
    for level, (details, target) in enumerate(zip(_pyramid(pictures.float()), _pyramid(targets.float()), strict=True)):
        filters = torch.randn(num_filters, 3, 5, 5, generator=generator).to(target)
        filters /= filters.flatten(1).norm(dim=1)[:, None, None, None] * target.std().clamp_min(1e-6)
        side = window >> level
        responses = (F.conv2d(of, filters, padding=2) for of in (details, target))
        given, expected = (_windows(of, side).sort(-1).values for of in responses)
        distances.append(F.l1_loss(given, expected))
    return torch.stack(distances).mean()


def _pyramid(pictures: torch.Tensor) -> Iterator[torch.Tensor]:
    """Details of `(B, C, H, W)` at full size, then at half: what a coarser picture, magnified, leaves out."""
    for _ in range(NUM_LEVELS):
        coarse = F.avg_pool2d(pictures, 2)
        yield pictures - F.interpolate(coarse, scale_factor=2, mode="bilinear")
        pictures = coarse


def _windows(responses: torch.Tensor, side: int) -> torch.Tensor:
    """`(B, C, H, W)` to `(B, C, H / side, W / side, side * side)`."""
    blocks = responses.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return blocks.transpose(3, 4).flatten(4)
