"""The training objective of the denoiser: the squared error of the noise and the bound that trains the variance.

Formulas: "DDPM" is Ho et al. 2020, https://arxiv.org/abs/2006.11239; "iDDPM" is Nichol & Dhariwal 2021, "Improved
Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2102.09672.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


class DiffusionLoss(NamedTuple):
    """
    Args:
        mse: `(B,)`, mean squared error of the predicted noise over all elements of a sample (DDPM eq. 14).
        vb: `(B,)`, the term of the variational bound at the sample's timestep, in bits per dimension. It trains the
            variance alone: no gradient reaches the predicted noise. Zeros for a model without variance channels.
        spatial_states: the `(B, F, N, D)` outputs of the spatial blocks asked for, in the order asked for.
    """

    mse: torch.Tensor
    vb: torch.Tensor
    spatial_states: tuple[torch.Tensor, ...]


def diffusion_loss(
    transformer: nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    scheduler: DDPMScheduler,
    class_labels: torch.Tensor | None = None,
    num_still_images: int = 0,
    output_spatial_states: tuple[int, ...] = (),
) -> DiffusionLoss:
    """Both loss terms of every sample; Endora minimises `(mse + vb).mean()`, plus its prior.

    With 1000 steps that sum is L_simple + lambda L_vlb at lambda = 1/1000 (iDDPM eq. 16). As in the official code, vb
    is not rescaled for another number of steps. Both are computed in float32 whatever the dtype of the model.

    Args:
        transformer: an `EndoraTransformer3DModel`, bare or wrapped for distributed training. A bare one is fed in its
            own dtype, a wrapped one in that of `latents`.
        latents: clean latents `(B, C, F, h, w)`, the video frames first, then the still images.
        timesteps: integers `(B,)` from 0 to `num_train_timesteps - 1`, on any device.
        noise: standard normal, of the shape of `latents`.
        scheduler: its `betas` are the noise schedule. Its `prediction_type` has to be "epsilon"; its `variance_type`
            is not read, variance channels always are iDDPM's learned range.
        class_labels: integers `(B,)` or `(B, 1 + num_still_images)`, for a model with classes.
        num_still_images: how many of the F frames, counted from the end, are independent images.
        output_spatial_states: indices of spatial blocks whose outputs are returned, for the prior.

    Raises:
        ValueError: for shapes that do not agree, another prediction type, or a model whose output has neither C nor
            2 C channels.
    """
    batch_size, channels = latents.shape[:2]
    if noise.shape != latents.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}: expected that of latents, {tuple(latents.shape)}.")
    if timesteps.shape != (batch_size,):
        raise ValueError(f"timesteps has shape {tuple(timesteps.shape)}: expected one per sample, ({batch_size},).")
    if scheduler.config["prediction_type"] != "epsilon":
        raise ValueError(f'prediction_type="{scheduler.config["prediction_type"]}": expected an "epsilon" scheduler.')

    # 1. Noise the latents and let the model predict the noise
    dtype = getattr(transformer, "dtype", latents.dtype)
    latents, noise, timesteps = latents.float(), noise.float(), timesteps.to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    output = transformer(
        noisy.to(dtype),
        timestep=timesteps,
        class_labels=class_labels,
        num_still_images=num_still_images,
        output_spatial_states=output_spatial_states,
        return_dict=True,
    )
    eps, variance = output.sample.float().tensor_split([channels], dim=1)  # (B, C, F, h, w) each, or no variance
    if eps.shape != latents.shape or variance.shape[1] not in (0, channels):
        raise ValueError(
            f"the transformer returned {tuple(output.sample.shape)} for latents {tuple(latents.shape)}: expected "
            f"{channels} channels of noise, or {2 * channels} of noise and variance."
        )

    # 2. Score the prediction
    mse = (eps - noise).square().flatten(1).mean(1)
    if variance.shape[1] == 0:
        vb = torch.zeros_like(mse)
    else:
        vb = variational_bound(eps.detach(), variance, latents, noise, timesteps, scheduler.betas)
    return DiffusionLoss(mse, vb, tuple(output.spatial_states or ()))


def variational_bound(
    eps: torch.Tensor,
    variance: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    betas: torch.Tensor,
) -> torch.Tensor:
    """One term of the variational bound (iDDPM eq. 4-6) per sample, in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) for t = 0, where x_0 counts as an
    8-bit value on [-1, 1]. The predicted x_0 is not clipped.

    Args:
        eps: predicted noise `(B, C, F, h, w)`.
        variance: the model's variance channels, same shape: -1 for the smallest variance, 1 for the largest.
        latents, noise: x_0 and the noise that was added to it, same shape.
        timesteps: integers `(B,)`.
        betas: the noise schedule, one number per timestep.

    Returns:
        `(B,)`.
    """
    # 1. The schedule, in float64: 1 - alphas_cumprod cancels to 1e-4 at t = 0
    betas = betas.double().cpu()
    alphas_cumprod = (1 - betas).cumprod(0)
    previous_alphas_cumprod = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous_alphas_cumprod) / (1 - alphas_cumprod)  # iDDPM eq. 10
    posterior_variance[0] = posterior_variance[1]  # it is 0 at t = 0, where the logarithm needs a number
    eps_coefficient = betas / ((1 - betas) * (1 - alphas_cumprod)).sqrt()  # DDPM eq. 11
    min_log, max_log, eps_coefficient = (
        table.float().to(eps.device)[timesteps].view(-1, 1, 1, 1, 1)
        for table in (posterior_variance.log(), betas.log(), eps_coefficient)
    )

    # 2. The model's distribution of x_{t-1}: its mean relative to the true posterior mean, which at t = 0 is x_0
    mean_error = eps_coefficient * (noise - eps)  # DDPM eq. 11, at the predicted and at the true noise
    fraction = (variance + 1) / 2
    log_variance = fraction * max_log + (1 - fraction) * min_log  # iDDPM eq. 15

    # 3. Its divergence from the true posterior N(mean, exp(min_log)) (iDDPM eq. 6)
    kl = 0.5 * (log_variance - min_log - 1 + (min_log - log_variance).exp() + mean_error**2 / log_variance.exp())

    # 4. The likelihood of x_0's bin, half a bin being 1/255; the outermost bins are open (iDDPM eq. 5, DDPM eq. 13)
    std = (0.5 * log_variance).exp()
    cdf_above = normal_cdf((1 / 255 - mean_error) / std)
    cdf_below = normal_cdf((-1 / 255 - mean_error) / std)
    cdf_above = torch.where(latents > 0.999, 1, cdf_above)
    cdf_below = torch.where(latents < -0.999, 0, cdf_below)
    negative_log_likelihood = -(cdf_above - cdf_below).clamp(min=1e-12).log()

    is_first = (timesteps == 0).view(-1, 1, 1, 1, 1)
    return torch.where(is_first, negative_log_likelihood, kl).flatten(1).mean(1) / math.log(2)


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The standard normal distribution function in the approximation that tanh-GELU uses, as the official bound does.

    Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2; within 3e-4 of the true one.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
