"""The training objective of the denoiser: its squared error, and the bound that trains its variance.

Formulas: "DDPM" is Ho et al. 2020, https://arxiv.org/abs/2006.11239; "iDDPM" is Nichol & Dhariwal 2021, "Improved
Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2102.09672. The parameterisations are those of
`make_scheduler`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from .objective import is_flow


class DiffusionLoss(NamedTuple):
    """
    Args:
        mse: `(B,)`, mean squared error of the predicted noise (DDPM eq. 14), v or velocity over all elements of a
            sample. `loss_weights` are its factors.
        vb: `(B,)`, the term of the variational bound at the sample's timestep, in bits per dimension. It trains the
            variance alone: no gradient reaches the prediction. Zeros for a model without variance channels.
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
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    class_labels: torch.Tensor | None = None,
    num_still_images: int = 0,
    output_spatial_states: tuple[int, ...] = (),
    guidance: Callable[..., torch.Tensor] | None = None,
) -> DiffusionLoss:
    """Both loss terms of every sample; Endora minimises `(mse + vb).mean()`, plus its prior.

    With 1000 steps that sum is L_simple + lambda L_vlb at lambda = 1/1000 (iDDPM eq. 16). As in the official code, vb
    is not rescaled for another number of steps. Both are computed in float32 whatever the dtype of the model. Nothing
    waits for the device, once the scheduler's tables are there.

    Args:
        transformer: an `EndoraTransformer3DModel`, bare or wrapped for distributed training. A bare one is fed in its
            own dtype, a wrapped one in that of `latents`.
        latents: clean latents `(B, C, F, h, w)`, the video frames first, then the still images.
        timesteps: `(B,)`, on any device: integers from 0 to `num_train_timesteps - 1`; for flow floats,
            sigma * `num_train_timesteps` from 0 to `num_train_timesteps`.
        noise: standard normal, of the shape of `latents`.
        scheduler: of `make_scheduler`. What is predicted is its `prediction_type`, "epsilon" or "v_prediction", with
            its `betas` as the noise schedule, or the velocity where it is a flow scheduler, whose `shift` plays no
            part. Its `variance_type` is not read, variance channels always are iDDPM's learned range.
        class_labels: integers `(B,)` or `(B, 1 + num_still_images)`, for a model with classes.
        num_still_images: how many of the F frames, counted from the end, are independent images.
        output_spatial_states: indices of spatial blocks whose outputs are returned, for the prior.
        guidance: what it returns for the noisy latents is added to what is to be predicted; see `Autoguidance`.

    Raises:
        ValueError: for shapes that do not agree, another prediction type, or a model whose output has neither C nor
            (without flow) 2 C channels.
    """
    batch_size, channels = latents.shape[:2]
    if noise.shape != latents.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}: expected that of latents, {tuple(latents.shape)}.")
    if timesteps.shape != (batch_size,):
        raise ValueError(f"timesteps has shape {tuple(timesteps.shape)}: expected one per sample, ({batch_size},).")
    if not is_flow(scheduler) and scheduler.config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise ValueError(
            f'prediction_type="{scheduler.config["prediction_type"]}": expected a scheduler for "epsilon" or '
            '"v_prediction", or a FlowMatchEulerDiscreteScheduler.'
        )

    # 1. Noise the latents and let the model predict
    dtype = getattr(transformer, "dtype", latents.dtype)
    latents, noise, timesteps = latents.float(), noise.float(), timesteps.to(latents.device)
    noisy, target = noisy_latents_and_target(latents, noise, timesteps, scheduler)
    if guidance is not None:
        target = target + guidance(noisy, timesteps, class_labels=class_labels, num_still_images=num_still_images)
    output = transformer(
        noisy.to(dtype),
        timestep=timesteps,
        class_labels=class_labels,
        num_still_images=num_still_images,
        output_spatial_states=output_spatial_states,
        return_dict=True,
    )
    # (B, C, F, h, w) each, or no variance
    prediction, variance = output.sample.float().tensor_split([channels], dim=1)
    if prediction.shape != latents.shape or variance.shape[1] not in ((0,) if is_flow(scheduler) else (0, channels)):
        raise ValueError(
            f"the transformer returned {tuple(output.sample.shape)} for latents {tuple(latents.shape)}: expected "
            f"{channels} channels" + ("." if is_flow(scheduler) else f", or {2 * channels} with those of variance.")
        )

    # 2. Score the prediction
    error = target - prediction
    mse = error.square().flatten(1).mean(1)
    if variance.shape[1] == 0:
        vb = torch.zeros_like(mse)
    else:
        vb = variational_bound(error.detach(), variance, latents, timesteps, bound_tables(scheduler, latents.device))
    return DiffusionLoss(mse, vb, tuple(output.spatial_states or ()))


def noisy_latents_and_target(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and what the model is to predict from it: the noise, v or the velocity, each `(B, C, F, h, w)`."""
    if is_flow(scheduler):
        sigma = (timesteps / scheduler.config["num_train_timesteps"]).view(-1, 1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, noise - latents  # Esser et al. 2024, eq. 13
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config["prediction_type"] == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, timesteps)
    return noisy, noise


class BoundTables(NamedTuple):
    """What the bound needs of the noise schedule, one float32 number per timestep.

    Args:
        min_log: logarithm of the smallest variance, that of the true posterior.
        max_log: logarithm of the largest variance, beta.
        mean_coefficient: the error of the mean of x_{t-1} over that of the prediction.
    """

    min_log: torch.Tensor
    max_log: torch.Tensor
    mean_coefficient: torch.Tensor


@functools.lru_cache(maxsize=8)  # a copy to the device waits for it: once for a training, not at every step
def bound_tables(scheduler: DDPMScheduler, device: torch.device) -> BoundTables:
    """The tables of a scheduler for noise or v on a device, made in float64: 1 - abar cancels to 1e-4 at t = 0."""
    betas = scheduler.betas.double().cpu()
    alphas_cumprod = (1 - betas).cumprod(0)
    previous_alphas_cumprod = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous_alphas_cumprod) / (1 - alphas_cumprod)  # iDDPM eq. 10
    posterior_variance[0] = posterior_variance[1]  # it is 0 at t = 0, where the logarithm needs a number
    # The mean holds x_0 with sqrt(previous abar) beta / (1 - abar) (DDPM eq. 7), and x_0 the prediction with
    # -sqrt(1 - abar) for v, -sqrt((1 - abar) / abar) for the noise. Only the latter is infinite without signal.
    if scheduler.config["prediction_type"] == "v_prediction":
        mean_coefficient = betas * (previous_alphas_cumprod / (1 - alphas_cumprod)).sqrt()
    else:
        mean_coefficient = betas / ((1 - betas) * (1 - alphas_cumprod)).sqrt()  # DDPM eq. 11
    tables = (posterior_variance.log(), betas.log(), mean_coefficient)
    return BoundTables(*(table.float().to(device) for table in tables))


def variational_bound(
    error: torch.Tensor,
    variance: torch.Tensor,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    tables: BoundTables,
) -> torch.Tensor:
    """One term of the variational bound (iDDPM eq. 4-6) per sample, in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) for t = 0, where x_0 counts as an
    8-bit value on [-1, 1]. The predicted x_0 is not clipped.

    Args:
        error: the true noise or v less the predicted one, `(B, C, F, h, w)`.
        variance: the model's variance channels, same shape: -1 for the smallest variance, 1 for the largest.
        latents: x_0, same shape.
        timesteps: integers `(B,)`.
        tables: `bound_tables` of the scheduler, on the device of the others.

    Returns:
        `(B,)`.
    """
    min_log, max_log, mean_coefficient = (table[timesteps].view(-1, 1, 1, 1, 1) for table in tables)

    # 1. The mean of the model's x_{t-1}, relative to the true posterior mean, which at t = 0 is x_0
    mean_error = mean_coefficient * error

    # 2. Its variance
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
