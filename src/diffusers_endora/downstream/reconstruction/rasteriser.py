"""Depth-sorted, differentiable splatting of 3D Gaussians, in plain torch.

A Gaussian's image is that of Zwicker et al. 2001, "EWA volume splatting", equation 27: its covariance seen by the
camera, through the Jacobian of the projection at its centre. Pixels are composited front to back as by Kerbl et al.
2023 (https://arxiv.org/abs/2308.04079, section 4 and equation 3), whose constants are kept: 0.3 square pixels are
added to each image covariance, an alpha is at most 0.99, and one below 1/255 is left out.

The image is cut into squares of 8 pixels. A square is rendered by dense tensors over the Gaussians that may reach it,
nearest first, and its pixels; squares go together as long as these have at most `chunk_size` entries. The backward
pass computes each chunk anew, so that the dense tensors are bounded by the chunk, whatever the number of Gaussians and
pixels. What grows with them is the list of which Gaussian reaches which square, some tens of bytes a pair.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLUR = 0.3  # square pixels
MOST_ALPHA = 0.99
LEAST_ALPHA = 1 / 255
NEAR = 0.01  # what is nearer to the camera's plane is left out, in the scene's units
SQUARE = 8  # pixels
CHUNK_SIZE = 500_000  # entries of a dense tensor, of which there are about ten at a time


@dataclass(frozen=True)
class Rendering:
    """What a camera sees.

    Attributes:
        colour: `(H, W, 3)`, over a black background.
        depth: `(H, W)`, along the optical axis, averaged over the Gaussians by what each adds to the pixel; 0 where
            there is none.
        alpha: `(H, W)`, in [0, 1]: how much of what lies behind is covered.
    """

    colour: torch.Tensor
    depth: torch.Tensor
    alpha: torch.Tensor


def rasterise(
    means: torch.Tensor,
    quaternions: torch.Tensor,
    scales: torch.Tensor,
    opacities: torch.Tensor,
    colours: torch.Tensor,
    world_to_camera: torch.Tensor,
    intrinsics: torch.Tensor,
    height: int,
    width: int,
    chunk_size: int = CHUNK_SIZE,
    backend: str = "torch",
) -> Rendering:
    """Renders Gaussians; differentiable in all that describes them, and in the pose.

    Args:
        means: `(N, 3)`, in the world.
        quaternions: `(N, 4)`, w first, of any length but zero: from a Gaussian's own axes to the world's.
        scales: `(N, 3)`, standard deviations along its axes, positive.
        opacities: `(N,)`, in [0, 1].
        colours: `(N, 3)`.
        world_to_camera: `(4, 4)`; intrinsics: `(3, 3)`, in pixels; see `cameras` for the axes.
        height, width: of the image.
        chunk_size: most pairs of a Gaussian and a pixel at a time; a single square of 8x8 pixels may have more.
        backend: `"torch"`, or `"gsplat"` for the CUDA kernels of https://github.com/nerfstudio-project/gsplat, which
            need that package and a GPU, and have no `chunk_size`.

    Raises:
        ValueError: a size or chunk size that is not positive, another backend, or shapes that do not fit.
        ImportError: `backend="gsplat"` without the package.
    """
    _check(means, quaternions, scales, opacities, colours, height, width, chunk_size)
    if backend == "gsplat":
        return _rasterise_by_gsplat(
            means, quaternions, scales, opacities, colours, world_to_camera, intrinsics, height, width
        )
    if backend != "torch":
        raise ValueError(f"backend={backend!r}: expected 'torch' or 'gsplat'")

    # 1. what each Gaussian looks like, those nearest first
    camera_means = means @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    order = torch.argsort(camera_means[:, 2].detach(), stable=True)
    order = order[camera_means.detach()[order, 2] > NEAR]
    camera_means, opacities = camera_means[order], opacities[order]
    axes = world_to_camera[:3, :3] @ rotation_matrices(quaternions[order]) * scales[order, None, :]
    centres, covariances = project_gaussians(camera_means, axes, intrinsics, height, width)
    determinants = covariances[:, 0] * covariances[:, 2] - covariances[:, 1] ** 2
    conics = covariances[:, [2, 1, 0]] * covariances.new_tensor([1.0, -1.0, 1.0]) / determinants[:, None]
    splats = torch.cat([centres, conics, opacities[:, None]], 1)  # (N, 6)
    features = torch.cat([colours[order], camera_means[:, 2:], torch.ones_like(opacities)[:, None]], 1)  # (N, 5)

    # 2. the squares that each can reach, and the image, square by square
    boxes = _reached_boxes(centres.detach(), covariances.detach(), opacities.detach(), height, width)
    chunks = _chunks(boxes, height, width, chunk_size)
    image = _Composite.apply(splats, features, chunks, height, width)
    alpha = image[..., 4]
    depth = torch.where(alpha > 0, image[..., 3] / torch.where(alpha > 0, alpha, 1), 0)
    return Rendering(image[..., :3], depth, alpha)


def rotation_matrices(quaternions: torch.Tensor) -> torch.Tensor:
    """Quaternions `(N, 4)`, w first, of any length but zero, to `(N, 3, 3)`."""
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    entries = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(entries, 1).reshape(-1, 3, 3)


def project_gaussians(
    camera_means: torch.Tensor, axes: torch.Tensor, intrinsics: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres `(N, 2)` and covariances `(N, 3)` (xx, xy, yy) in the image, `BLUR` added.

    Args:
        camera_means: `(N, 3)`.
        axes: `(N, 3, 3)`: columns are the Gaussian's axes in the camera, as long as its standard deviations.

    The Jacobian is taken at most 0.3 half-images outside the image, as in the official implementation of Kerbl et al.:
    farther out the linear image would be far too large.
    """
    x, y, z = camera_means.unbind(1)
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    ratio_x, ratio_y = x / z, y / z
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    bounded_x = ratio_x.clamp(-(cx + 0.5) / fx - margin_x, (width - 0.5 - cx) / fx + margin_x)
    bounded_y = ratio_y.clamp(-(cy + 0.5) / fy - margin_y, (height - 0.5 - cy) / fy + margin_y)
    across = (fx / z)[:, None] * (axes[:, 0] - bounded_x[:, None] * axes[:, 2])  # (N, 3): the rows of J R S
    along = (fy / z)[:, None] * (axes[:, 1] - bounded_y[:, None] * axes[:, 2])
    covariances = [(across * across).sum(1) + BLUR, (across * along).sum(1), (along * along).sum(1) + BLUR]
    return torch.stack([fx * ratio_x + cx, fy * ratio_y + cy], 1), torch.stack(covariances, 1)


@torch.no_grad()
def _reached_boxes(
    centres: torch.Tensor, covariances: torch.Tensor, opacities: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """First and last column and row `(N, 4)` of the pixels whose alpha may reach `LEAST_ALPHA`; last < first if none.

    The ellipse `d' inv(S) d = r^2` is `r sqrt(S_xx)` wide to each side.
    """
    reach = (2 * (opacities.clamp(min=1e-12) / LEAST_ALPHA).log()).clamp(min=0).sqrt()
    extent = reach[:, None] * covariances[:, [0, 2]].sqrt() + 1e-3  # rounding
    sizes = centres.new_tensor([width, height])
    low = (centres - extent).ceil().clamp(min=0).minimum(sizes)
    high = (centres + extent).floor().minimum(sizes - 1).clamp(min=-1)
    is_out = (opacities < LEAST_ALPHA) | (high < low).any(1)
    high = torch.where(is_out[:, None], low - 1, high)
    return torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1).long()


@dataclass(frozen=True)
class _Chunk:
    """Squares that are rendered together.

    Attributes:
        squares: `(T,)`, numbered row by row.
        splats: `(T, K)`, those that may reach each square, nearest first; the rest is the number of splats, N, which
            stands for one that nobody sees.
    """

    squares: torch.Tensor
    splats: torch.Tensor


@torch.no_grad()
def _chunks(boxes: torch.Tensor, height: int, width: int, chunk_size: int) -> list[_Chunk]:
    """Squares with similar numbers of Gaussians together, at most `chunk_size` pairs of a Gaussian and a pixel."""
    columns, rows = -(-width // SQUARE), -(-height // SQUARE)
    first, last = boxes[:, [0, 2]] // SQUARE, boxes[:, [1, 3]] // SQUARE
    sizes = torch.where((boxes[:, 1::2] < boxes[:, ::2]).any(1, keepdim=True), 0, last - first + 1)
    # all pairs of a Gaussian and a square; sorting is stable, so the Gaussians stay in the order of their depths
    counts = sizes[:, 0] * sizes[:, 1]
    splats = torch.repeat_interleave(counts)
    within = torch.arange(len(splats), device=boxes.device) - (counts.cumsum(0) - counts)[splats]
    down = within // sizes[splats, 0]
    squares = (first[splats, 1] + down) * columns + first[splats, 0] + within - down * sizes[splats, 0]
    squares, order = torch.sort(squares, stable=True)
    per_square = torch.bincount(squares, minlength=rows * columns)
    rank = torch.arange(len(squares), device=boxes.device) - (per_square.cumsum(0) - per_square)[squares]
    table = boxes.new_full((rows * columns, max(1, int(per_square.max()))), len(boxes))
    table[squares, rank] = splats[order]

    chunks, by_number = [], torch.argsort(per_square, descending=True)
    numbers = per_square[by_number].tolist()
    start = 0
    while start < len(numbers) and numbers[start] > 0:
        most = numbers[start]
        end = min(len(numbers), start + max(1, chunk_size // (most * SQUARE**2)))
        chunks.append(_Chunk(by_number[start:end], table[by_number[start:end], :most]))
        start = end
    return chunks


class _Composite(Function):
    """Features `(N, 5)` of depth-sorted splats `(N, 6)` to the image `(H, W, 5)`."""

    @staticmethod
    def forward(
        ctx: Any, splats: torch.Tensor, features: torch.Tensor, chunks: list[_Chunk], height: int, width: int
    ) -> torch.Tensor:
        ctx.save_for_backward(splats, features)
        ctx.chunks, ctx.size = chunks, (height, width)
        padded, padded_features = _with_unseen(splats, features)
        columns, rows = -(-width // SQUARE), -(-height // SQUARE)
        squares = features.new_zeros(rows * columns, SQUARE**2, features.shape[1])
        for chunk in chunks:
            alphas, through = _alphas(padded[chunk.splats], chunk.squares, columns)
            squares[chunk.squares] = (alphas * through).transpose(1, 2) @ padded_features[chunk.splats]
        return _joined(squares, rows, columns)[:height, :width]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        splats, features = ctx.saved_tensors
        height, width = ctx.size
        columns, rows = -(-width // SQUARE), -(-height // SQUARE)
        padding = (0, 0, 0, columns * SQUARE - width, 0, rows * SQUARE - height)
        of_squares = _cut(torch.nn.functional.pad(gradient, padding), rows, columns)
        padded, padded_features = _with_unseen(splats, features)
        of_splats, of_features = torch.zeros_like(padded), torch.zeros_like(padded_features)
        x, y = _offsets(splats)
        moments = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], 1)  # (P, 6)
        for chunk in ctx.chunks:
            here, of_image = padded[chunk.splats], of_squares[chunk.squares]  # (T, K, 6), (T, P, 5)
            alphas, through = _alphas(here, chunk.squares, columns)
            # 1. of features, and of alphas: an alpha adds its own light and dims what lies behind
            weights = alphas * through
            of_weights = padded_features[chunk.splats] @ of_image.transpose(1, 2)  # (T, K, P)
            added = weights * of_weights
            behind = added.sum(1, keepdim=True) - added.cumsum(1)
            of_powers = torch.where(
                alphas < MOST_ALPHA, alphas * (through * of_weights - behind / (1 - alphas)), 0
            )  # of the logarithm of alpha
            # 2. of splats: sums over the square's pixels, moved from its centre to that of the splat
            m, mx, my, mxx, mxy, myy = (of_powers @ moments).unbind(2)  # (T, K)
            cx, cy = _centres_in_squares(here, chunk.squares, columns)
            _, _, xx, xy, yy, opacity = here.unbind(2)
            dx, dy = mx - cx * m, my - cy * m
            of_chunk = torch.stack(
                [
                    xx * dx + xy * dy,
                    yy * dy + xy * dx,
                    -0.5 * (mxx - 2 * cx * mx + cx * cx * m),
                    -(mxy - cx * my - cy * mx + cx * cy * m),
                    -0.5 * (myy - 2 * cy * my + cy * cy * m),
                    m / opacity,
                ],
                2,
            )
            which = chunk.splats.reshape(-1)
            of_splats.index_add_(0, which, of_chunk.reshape(-1, of_chunk.shape[2]))
            of_features.index_add_(0, which, (weights @ of_image).reshape(-1, of_image.shape[2]))
        return of_splats[:-1], of_features[:-1], None, None, None


def _with_unseen(splats: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with one more splat, too faint to be seen."""
    unseen = splats.new_tensor([[0, 0, 1, 0, 1, LEAST_ALPHA / 2]])
    return torch.cat([splats, unseen]), torch.cat([features, features.new_zeros(1, features.shape[1])])


def _offsets(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Column and row of the pixels of a square, from its centre, each `(P,)`."""
    offset = torch.arange(SQUARE, dtype=like.dtype, device=like.device) - (SQUARE - 1) / 2
    return offset.repeat(SQUARE), offset.repeat_interleave(SQUARE)


def _centres_in_squares(
    splats: torch.Tensor, squares: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres `(T, K)` of splats `(T, K, 6)` from the centre of their square."""
    middle = (SQUARE - 1) / 2
    left, top = squares % columns * SQUARE + middle, squares // columns * SQUARE + middle
    return splats[..., 0] - left[:, None], splats[..., 1] - top[:, None]


def _alphas(splats: torch.Tensor, squares: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Alphas and what light comes through to each from the splats before it, `(T, K, P)`; splats are `(T, K, 6)`."""
    offset = torch.arange(SQUARE, dtype=splats.dtype, device=splats.device) - (SQUARE - 1) / 2
    cx, cy = _centres_in_squares(splats, squares, columns)
    _, _, xx, xy, yy, opacity = (part[..., None] for part in splats.unbind(2))
    dx, dy = offset - cx[..., None], offset - cy[..., None]  # (T, K, SQUARE)
    by_column, by_row = -0.5 * xx * dx * dx, opacity.log() - 0.5 * yy * dy * dy
    powers = (by_row[..., None] + by_column[..., None, :]).addcmul_(dy[..., None], (xy * dx)[..., None, :], value=-1)
    alphas = powers.flatten(2).exp_()
    alphas = torch.where(alphas >= LEAST_ALPHA, alphas.clamp_(max=MOST_ALPHA), 0)
    left = 1 - alphas
    return alphas, left.cumprod(1).div_(left)


def _joined(squares: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Squares `(rows * columns, P, C)` to the image `(H, W, C)`."""
    parts = squares.reshape(rows, columns, SQUARE, SQUARE, -1).transpose(1, 2)
    return parts.reshape(rows * SQUARE, columns * SQUARE, -1)


def _cut(image: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The reverse of `_joined`."""
    parts = image.reshape(rows, SQUARE, columns, SQUARE, -1).transpose(1, 2)
    return parts.reshape(rows * columns, SQUARE**2, -1)


def _rasterise_by_gsplat(
    means: torch.Tensor,
    quaternions: torch.Tensor,
    scales: torch.Tensor,
    opacities: torch.Tensor,
    colours: torch.Tensor,
    world_to_camera: torch.Tensor,
    intrinsics: torch.Tensor,
    height: int,
    width: int,
) -> Rendering:
    """The same by gsplat, whose pixel centres lie at halves."""
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise ImportError("backend='gsplat' needs the package gsplat and a CUDA device: pip install gsplat") from error
    shift = torch.zeros_like(intrinsics)
    shift[:2, 2] = 0.5
    image, alpha, _ = rasterization(
        means,
        quaternions,
        scales,
        opacities,
        colours,
        world_to_camera[None],
        (intrinsics + shift)[None],
        width,
        height,
        near_plane=NEAR,
        eps2d=BLUR,
        render_mode="RGB+ED",
        packed=False,
    )
    return Rendering(image[0, ..., :3], image[0, ..., 3], alpha[0, ..., 0])


def _check(
    means: torch.Tensor,
    quaternions: torch.Tensor,
    scales: torch.Tensor,
    opacities: torch.Tensor,
    colours: torch.Tensor,
    height: int,
    width: int,
    chunk_size: int,
) -> None:
    for name, value in (("height", height), ("width", width), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected a positive integer")
    shapes = [tuple(tensor.shape) for tensor in (means, quaternions, scales, opacities, colours)]
    count = len(means)
    if shapes != [(count, 3), (count, 4), (count, 3), (count,), (count, 3)]:
        raise ValueError(f"expected shapes (N, 3), (N, 4), (N, 3), (N,), (N, 3) for one N, got {shapes}")
