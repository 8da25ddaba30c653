"""What a reconstruction is worth: of its images, and of its depth."""

import numpy as np
import torch


def image_scores(
    rendered: torch.Tensor, frames: torch.Tensor, lpips: torch.nn.Module | None = None
) -> dict[str, list[float]]:
    """Scores of rendered images against the frames, each `(F, 3, H, W)` in [0, 1]; a list per frame for each.

    `psnr` in dB, of the mean squared error over pixels and channels (infinite for equal images); `ssim` of Wang et
    al. 2004, "Image quality assessment", IEEE TIP 13(4), with its Gaussian window of 11 pixels, by torchmetrics;
    `lpips` with the weights that `baselines.lvdm.lvdm_loss.load_lpips` reads, if they are given.
    """
    error = (rendered - frames).square().mean((1, 2, 3))
    scores = {"psnr": (-10 * error.log10()).tolist(), "ssim": structural_similarity(rendered, frames).tolist()}
    if lpips is not None:
        with torch.no_grad():
            scores["lpips"] = lpips(rendered * 2 - 1, frames * 2 - 1).flatten().tolist()
    return scores


def structural_similarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SSIM of images `(F, 3, H, W)` in [0, 1], `(F,)`, differentiable."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    result = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
    return result.reshape(-1)  # type: ignore[union-attr]


def depth_total_variation(depth: torch.Tensor) -> torch.Tensor:
    """How rough depth maps `(F, H, W)`, positive, are: `(F,)`, without unit.

    The mean over pixels of `|d(u + 1, v) - d(u, v)|` plus that of `|d(u, v + 1) - d(u, v)|`, over the map's mean
    depth, so that the unknown scale of a reconstruction does not enter. Smooth is not right: a plane scores 0.
    """
    across = depth.diff(dim=2).abs().mean((1, 2))
    along = depth.diff(dim=1).abs().mean((1, 2))
    return (across + along) / depth.mean((1, 2))


def depth_scores(predicted: np.ndarray, truth: np.ndarray, alignment: str = "median") -> dict[str, float]:
    """Errors of depth against the truth, arrays of one shape; pixels where either is not positive are left out.

    Args:
        alignment: `"median"` multiplies the prediction by the median of truth over prediction, one factor for all that
            is given; `"none"` takes it as it is.

    Returns:
        `abs_rel`, the mean of `|predicted - truth| / truth`, and `delta_1.25`, the share of pixels whose ratio to the
        truth, or its inverse, is below 1.25 (Eigen et al. 2014, https://arxiv.org/abs/1406.2283, section 4.2).

    Raises:
        ValueError: another alignment, or no pixel where both are positive.
    """
    if alignment not in ("median", "none"):
        raise ValueError(f"alignment={alignment!r}: expected 'median' or 'none'")
    is_known = (predicted > 0) & (truth > 0)
    if not is_known.any():
        raise ValueError("depth: expected a pixel where prediction and truth are positive, found none")
    of_model, of_truth = predicted[is_known].astype(np.float64), truth[is_known].astype(np.float64)
    if alignment == "median":
        of_model *= np.median(of_truth / of_model)
    ratio = np.maximum(of_model / of_truth, of_truth / of_model)
    return {
        "abs_rel": float(np.mean(np.abs(of_model - of_truth) / of_truth)),
        "delta_1.25": float((ratio < 1.25).mean()),
    }
