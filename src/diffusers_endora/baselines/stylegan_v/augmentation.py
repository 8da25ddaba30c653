"""Adaptive discriminator augmentation: clips, real and generated, are changed at random before they are judged.

After Karras et al. 2020, "Training generative adversarial networks with limited data"
(https://arxiv.org/abs/2006.06676), section 3 and appendix B: of its transforms the set `bgc`, which StyleGAN-V trains
with, that is pixel blitting, general geometric transforms and colour transforms. All frames of a clip are changed
alike (`video_consistent_aug` in https://github.com/universome/stylegan-v, `configs/model/stylegan-v.yaml`).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Lowpass filter of the orthonormal wavelet sym6 (Daubechies 1992, "Ten lectures on wavelets", chapter 8)
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
# Where the filter's weight lies: it is not quite symmetric, and by its middle a mirrored frame would be 0.4 pixels off
SYM6_CENTRE = sum(place * tap for place, tap in enumerate(SYM6)) / sum(SYM6)  # 5.10


class Transforms(NamedTuple):
    """What is done to each clip, float64 on the CPU.

    A point of a frame is `(x, y, 1)`, in pixels from the frame's centre, x to the right and y down.
    """

    blits: torch.Tensor  # (B, 3, 3), old to new points: mirrored, turned by quarters, shifted by whole pixels
    geometry: torch.Tensor  # (B, 3, 3), old to new points, of what comes after the blits
    colours: torch.Tensor  # (B, 4, 4), (r, g, b, 1) in [-1, 1] to new ones


class AdaptiveAugmentation(nn.Module):
    """Changes each clip at random, and adapts how often to how far the discriminator overfits.

    Every transform of `draw_transforms` is applied to a clip with the same probability, which begins at 0. Clips that
    none meets stay exactly as they are. Blits alone copy pixels; what is beyond a border is reflected.

    Both derivatives by the frames exist, as R1 needs them: the penalised gradient is that by the real frames before
    augmentation.

    Args:
        target: what the mean sign of the discriminator's logits for real clips is held at (paper, section 3.2).
        adaptation_clips: in how many clips the probability goes from 0 to 1. The paper's is 500,000;
            StyleGAN-V trains with 100,000.
        rotates: whether clips are turned, by quarters or by any angle. MoStGAN-V's set is called `bgc_noro`.

    Attributes:
        probability: buffer `()`, float32 in [0, 1].
    """

    probability: torch.Tensor

    def __init__(self, target: float = 0.6, adaptation_clips: int = 100_000, rotates: bool = True) -> None:
        super().__init__()
        self.target = target
        self.adaptation_clips = adaptation_clips
        self.rotates = rotates
        self.register_buffer("probability", torch.zeros(()))

    def forward(self, frames: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Changes clips.

        Args:
            frames: `(B, F, 3, H, W)` of square frames in [-1, 1].
            generator: of the CPU, that the transforms are drawn from.

        Returns:
            The same shape; colours may leave [-1, 1].

        Raises:
            ValueError: another shape.
        """
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] != frames.shape[4]:
            raise ValueError(f"frames of shape {tuple(frames.shape)}: expected (B, F, 3, H, W) with H = W.")
        transforms = draw_transforms(
            len(frames), frames.shape[-1], float(self.probability), generator, rotates=self.rotates
        )
        return apply_transforms(frames, transforms)

    @torch.no_grad()
    def adapt(self, mean_sign: float, num_clips: int) -> None:
        """Moves the probability a step towards where the signs of the logits for real clips have their target.

        More of them positive than the target's share means overfitting, and the probability rises; else it falls
        (paper, section 3.2). It stays in [0, 1].

        Args:
            mean_sign: of the logits for real clips since the last call, in [-1, 1].
            num_clips: that the training has seen since then, real ones.
        """
        direction = (mean_sign > self.target) - (mean_sign < self.target)
        self.probability.add_(direction * num_clips / self.adaptation_clips).clamp_(0, 1)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def draw_transforms(
    batch_size: int, side: int, probability: float, generator: torch.Generator | None = None, rotates: bool = True
) -> Transforms:
    """Draws the transforms of clips whose frames have `side` x `side` pixels, each with `probability`.

    Distributions and order are those of appendix B of the paper: mirroring, quarter turns and shifts by whole pixels
    of up to an eighth of the side, all uniform; scaling by 2^n with n of standard deviation 0.2, rotation, the same
    scaling of one axis against the other, rotation again, and a shift by an eighth of the side as its standard
    deviation; brightness + 0.2 n, contrast x 2^(n/2), reflection of the luma, rotation of the hue by any angle and
    saturation x 2^n. The two rotations together happen with `probability`.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch_size, generator=generator, dtype=torch.float64)

    def normal(deviation: float) -> torch.Tensor:
        return deviation * torch.randn(batch_size, generator=generator, dtype=torch.float64)

    def happens(share: float = probability) -> torch.Tensor:
        return torch.rand(batch_size, generator=generator, dtype=torch.float64) < share

    def maybe(value: torch.Tensor, neutral: float, is_applied: torch.Tensor) -> torch.Tensor:
        return torch.where(is_applied, value, neutral)

    # 1. Pixel blitting
    is_mirrored = (uniform(0, 2) >= 1) & happens()
    quarters = maybe(uniform(0, 4).floor(), 0, happens() & rotates)
    is_shifted = happens()
    shift_x, shift_y = (maybe((side * uniform(-1 / 8, 1 / 8)).round(), 0, is_shifted) for _ in range(2))
    blits = translation(shift_x, shift_y) @ quarter_turn(quarters) @ scaling(1.0 - 2.0 * is_mirrored, 1.0)

    # 2. General geometric transforms
    scale = maybe(2 ** normal(0.2), 1, happens())
    rotation_probability = 1 - math.sqrt(1 - probability)  # one of two or both: `probability`
    angle_before = maybe(uniform(-math.pi, math.pi), 0, happens(rotation_probability) & rotates)
    stretch = maybe(2 ** normal(0.2), 1, happens())
    angle_after = maybe(uniform(-math.pi, math.pi), 0, happens(rotation_probability) & rotates)
    is_moved = happens()
    move_x, move_y = (maybe(side * normal(1 / 8), 0, is_moved) for _ in range(2))
    geometry = rotation(angle_before) @ scaling(scale, scale)
    geometry = translation(move_x, move_y) @ rotation(angle_after) @ scaling(stretch, 1 / stretch) @ geometry

    # 3. Colour
    colours = brightness(maybe(normal(0.2), 0, happens()))
    colours = contrast(maybe(2 ** normal(0.5), 1, happens())) @ colours
    colours = luma_flip((uniform(0, 2) >= 1) & happens()) @ colours
    colours = hue_rotation(maybe(uniform(-math.pi, math.pi), 0, happens())) @ colours
    colours = saturation(maybe(2 ** normal(1.0), 1, happens())) @ colours
    return Transforms(blits, geometry, colours)


def _matrices(rows: list[list[Any]]) -> torch.Tensor:
    """Matrices `(B, n, n)` of entries that are tensors `(B,)` or numbers."""
    entries = torch.broadcast_tensors(*(torch.as_tensor(entry, dtype=torch.float64) for row in rows for entry in row))
    return torch.stack(entries, dim=-1).unflatten(-1, (len(rows), len(rows)))


def translation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _matrices([[1, 0, x], [0, 1, y], [0, 0, 1]])


def scaling(x: Any, y: Any) -> torch.Tensor:
    return _matrices([[x, 0, 0], [0, y, 0], [0, 0, 1]])


def rotation(angle: torch.Tensor) -> torch.Tensor:
    """Turns from the axis of x to that of y, by an angle in radians."""
    return _matrices([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])


def quarter_turn(quarters: torch.Tensor) -> torch.Tensor:
    """The same by quarters of a turn, without rounding."""
    return rotation(quarters * (math.pi / 2)).round()


def brightness(amount: torch.Tensor) -> torch.Tensor:
    """Adds to all three colours."""
    return _matrices([[1, 0, 0, amount], [0, 1, 0, amount], [0, 0, 1, amount], [0, 0, 0, 1]])


def contrast(factor: torch.Tensor) -> torch.Tensor:
    """Multiplies all three colours."""
    return _matrices([[factor, 0, 0, 0], [0, factor, 0, 0], [0, 0, factor, 0], [0, 0, 0, 1]])


def _onto_luma() -> torch.Tensor:
    """The projection `(4, 4)` of a colour onto the grey axis, (1, 1, 1)."""
    projection = torch.zeros(4, 4, dtype=torch.float64)
    projection[:3, :3] = 1 / 3
    return projection


def luma_flip(is_flipped: torch.Tensor) -> torch.Tensor:
    """Where it is asked for, reflects colours at the plane of luma 0, keeping hue and saturation."""
    return torch.eye(4, dtype=torch.float64) - 2 * _onto_luma() * is_flipped[:, None, None]


def hue_rotation(angle: torch.Tensor) -> torch.Tensor:
    """Turns colours around the grey axis: a third of a turn makes red green, green blue, and blue red (Rodrigues)."""
    sine = angle.sin() / math.sqrt(3)
    across = _matrices([[0, -sine, sine, 0], [sine, 0, -sine, 0], [-sine, sine, 0, 0], [0, 0, 0, 0]])
    cosine = angle.cos()[:, None, None]
    is_colour = torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))
    unit = torch.eye(4, dtype=torch.float64)
    return unit + (cosine - 1) * (is_colour - _onto_luma()) + across


def saturation(factor: torch.Tensor) -> torch.Tensor:
    """Multiplies the distance of colours from the grey axis."""
    is_colour = torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))
    return torch.eye(4, dtype=torch.float64) + (factor[:, None, None] - 1) * (is_colour - _onto_luma())


# --- what is done ----------------------------------------------------------------------------------------------------


def apply_transforms(frames: torch.Tensor, transforms: Transforms) -> torch.Tensor:
    """Changes the clips that a transform is for; the others are handed through.

    Args:
        frames: `(B, F, 3, H, W)`.
    """
    unit = torch.eye(3, dtype=torch.float64)
    is_blitted = (transforms.blits != unit).any(2).any(1)
    is_warped = (transforms.geometry != unit).any(2).any(1)
    is_coloured = (transforms.colours != torch.eye(4, dtype=torch.float64)).any(2).any(1)
    for chosen, matrices, change in (
        (is_blitted & ~is_warped, transforms.blits, blit),
        (is_warped, transforms.geometry @ transforms.blits, warp),  # at once: what a blit moves out may come back
        (is_coloured, transforms.colours, recolour),
    ):
        places = chosen.nonzero().flatten()
        if len(places) == len(frames):
            frames = change(frames, matrices)
        elif len(places):
            on_device = places.to(frames.device)
            frames = frames.index_copy(0, on_device, change(frames[on_device], matrices[places]))
    return frames


def blit(frames: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Puts each pixel elsewhere, by matrices that map centres of pixels to centres of pixels."""
    side = frames.shape[-1]
    centres = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # (3, H W)
    sources = (torch.linalg.inv(matrices) @ points)[:, :2] + (side - 1) / 2
    columns, rows = (side - 1 - (side - 1 - sources.round().long().abs()).abs()).unbind(1)  # reflected at the borders
    index = (rows * side + columns).to(frames.device)[:, None, None]  # (B, 1, 1, H W)
    pixels = frames.flatten(3)
    return pixels.gather(3, index.expand(pixels.shape)).view_as(frames)


def warp(frames: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Moves the content of frames by any invertible affine map.

    Frames are extended by reflection, made twice as fine by the wavelet sym6, looked up bilinearly, and made coarse
    again by the same wavelet (appendix B.2 of the paper); as it is orthonormal, pixels that do not move keep their
    values. Farther than a frame away from its border there is nothing (0, a grey).
    """
    side = frames.shape[-1]
    inverse = torch.linalg.inv(matrices)

    # 1. How far beyond its border a frame is looked up
    half, reach = (side - 1) / 2, (len(SYM6) - 1 - SYM6_CENTRE) / 2  # of the filter, in pixels
    corners = torch.tensor([[-1.0, -1, 1, 1], [-1, 1, -1, 1], [0, 0, 0, 0]], dtype=torch.float64) * (half + reach)
    corners[2] = 1
    farthest = (inverse @ corners)[:, :2].abs().max().item()
    margin = min(max(math.ceil(farthest + reach - half), 0), side - 1)

    # 2. Finer, looked up, coarser
    finer, coarser = (_synthesis(side, extent).to(frames) for extent in (margin, 0))
    pixels = frames.flatten(1, 2)
    fine = finer @ pixels @ finer.T
    looked_at, looked_up = len(coarser), len(finer)  # sides of the fine frames
    # `affine_grid` has -1 and 1 at their borders: a point p from a frame's centre is at (4 p + offset) / side there
    offset = torch.full((2,), 2 * SYM6_CENTRE - (len(SYM6) - 1), dtype=torch.float64)
    linear, shift = inverse[:, :2, :2], inverse[:, :2, 2]
    shift = (4 * shift + offset - linear @ offset) / looked_up
    theta = torch.cat([linear * (looked_at / looked_up), shift[:, :, None]], dim=2)
    size = [*pixels.shape[:2], looked_at, looked_at]
    grid = F.affine_grid(theta, size, align_corners=False).to(frames)
    return (coarser.T @ _Lookup.apply(fine, grid) @ coarser).view_as(frames)


def recolour(frames: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Changes each colour by a matrix on `(r, g, b, 1)`."""
    matrices = matrices.to(frames)
    pixels = frames.flatten(3)
    return (matrices[:, None, :3, :3] @ pixels + matrices[:, None, :3, 3:]).view_as(frames)


def _synthesis(side: int, margin: int) -> torch.Tensor:
    """The matrix `(2 (side + 2 margin) + 10, side)` that extends a row of pixels by reflection and makes it finer.

    Without a margin its columns are orthonormal, so that its transpose undoes it.
    """
    extended = F.pad(torch.eye(side, dtype=torch.float64)[None], (margin, margin), mode="reflect")[0]
    wavelet = torch.tensor(SYM6, dtype=torch.float64)[None, None]
    return F.conv_transpose1d(extended[:, None], wavelet, stride=2)[:, 0].T


class _Lookup(torch.autograd.Function):
    """`grid_sample`, bilinear, 0 outside, linear in the pixels; of which torch has no second derivative."""

    @staticmethod
    def forward(ctx: Any, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = pixels.shape
        return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (grid,) = ctx.saved_tensors
        return _LookupTransposed.apply(gradient, grid, ctx.shape), None


class _LookupTransposed(torch.autograd.Function):
    """The derivative of `_Lookup`, its transpose, whose derivative is `_Lookup` again."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, grid: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(grid)
        pixels = gradient.new_zeros(shape)  # of which only the shape matters
        bilinear, zeros, align_corners, wanted = 0, 0, False, (True, False)
        return torch.ops.aten.grid_sampler_2d_backward(gradient, pixels, grid, bilinear, zeros, align_corners, wanted)[
            0
        ]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (grid,) = ctx.saved_tensors
        return _Lookup.apply(gradient, grid), None, None
