"""What the denoiser learns to predict, at which timesteps, and how much each timestep counts.

Three parameterisations, told apart by the scheduler, which the saved pipeline gets as well: the noise (Ho et al. 2020,
https://arxiv.org/abs/2006.11239), v (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) and the velocity of
rectified flow (Liu et al. 2022, https://arxiv.org/abs/2209.03003; Esser et al. 2024, https://arxiv.org/abs/2403.03206).
"""

from typing import Literal

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler


def make_scheduler(
    prediction_type: Literal["epsilon", "v_prediction", "flow"] | str, zero_terminal_snr: bool = False
) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler of a training, which belongs into the pipeline that is saved from it.

    Its config is the record of what the model predicts: losses, weights and `EndoraPipeline` read it there.

    Args:
        prediction_type: "epsilon" for the noise, as in the official code; "v_prediction" for
            v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, section 4); "flow" for the velocity eps - x_0
            of x_t = (1 - sigma) x_0 + sigma eps (Esser et al. 2024, section 2).
        zero_terminal_snr: rescales the betas such that the last timestep is noise alone, and sampling starts from it
            (Lin et al. 2023, https://arxiv.org/abs/2305.08891, algorithm 1 and section 3.3).

    Raises:
        ValueError: for another prediction type, or for `zero_terminal_snr` with one other than "v_prediction".
    """
    if prediction_type not in ("epsilon", "v_prediction", "flow"):
        raise ValueError(f'prediction_type="{prediction_type}": expected "epsilon", "v_prediction" or "flow".')
    if zero_terminal_snr and prediction_type == "epsilon":
        raise ValueError(
            'zero_terminal_snr=True with prediction_type="epsilon": where there is nothing but noise, the noise says '
            'nothing of the clip; expected "v_prediction".'
        )
    if zero_terminal_snr and prediction_type == "flow":
        raise ValueError(
            'zero_terminal_snr=True with prediction_type="flow": flow starts from nothing but noise as it is; '
            "expected False."
        )
    if prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(
        prediction_type=prediction_type,
        variance_type="learned_range",
        clip_sample=False,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if zero_terminal_snr else "linspace",
    )


def is_flow(scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler) -> bool:
    """Whether the scheduler is one of rectified flow, whose timesteps are 1000 sigma instead of indices."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def predicts_variance(scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler) -> bool:
    """Whether the model needs variance channels: `out_channels` twice `in_channels`, instead of equal."""
    return not is_flow(scheduler)


def sample_timesteps(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    uniform: torch.Tensor,
    density: Literal["uniform", "logit_normal"] | str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> torch.Tensor:
    """Timesteps of a batch from uniform random numbers, so that the caller owns the randomness.

    Args:
        scheduler: of `make_scheduler`.
        uniform: `(B,)` in [0, 1), on any device.
        density: "uniform", or "logit_normal": the place u in (0, 1) on the way from clip to noise has a normally
            distributed logit log(u / (1 - u)), which favours the middle (Esser et al. 2024, section 3.1).
        logit_mean, logit_std: of that logit; a positive mean favours the noisy end.

    Returns:
        `(B,)`, on the device of `uniform`: integers floor(u T) from 0 to T - 1 for DDPM, floats 1000 sigma with
        sigma = u for flow.

    Raises:
        ValueError: for another density, or a `logit_std` that is not positive.
    """
    if density not in ("uniform", "logit_normal"):
        raise ValueError(f'density="{density}": expected "uniform" or "logit_normal".')
    if density == "logit_normal":
        if not logit_std > 0:
            raise ValueError(f"logit_std={logit_std}: expected a positive number.")
        # the normal quantile of a uniform number is a standard normal one; 0 has -inf, whose sigmoid is 0 again
        uniform = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(uniform))
    num_train_timesteps = scheduler.config["num_train_timesteps"]
    if is_flow(scheduler):
        return uniform * num_train_timesteps
    return (uniform * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)  # a sigmoid can round to 1


def coefficients(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of clip and noise in what the model sees, x_t = a x_0 + b eps, and in what it is to predict, c x_0 + d eps.

    Args:
        scheduler: of `make_scheduler`.
        timesteps: `(B,)`, on the CPU.

    Returns:
        a, b, c, d, each `(B,)`: for the noise c = 0 and d = 1, for v c = -b and d = a, for the velocity c = -1, d = 1.
    """
    if is_flow(scheduler):
        sigma = timesteps / scheduler.config["num_train_timesteps"]
        return 1 - sigma, sigma, -torch.ones_like(sigma), torch.ones_like(sigma)
    signal = scheduler.alphas_cumprod.cpu()[timesteps]
    a, b = signal.sqrt(), (1 - signal).sqrt()
    if scheduler.config["prediction_type"] == "v_prediction":
        return a, b, -b, a
    return a, b, torch.zeros_like(a), torch.ones_like(a)


def loss_weights(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    timesteps: torch.Tensor,
    weighting: Literal["none", "min_snr", "sigmoid"] | str = "none",
    gamma: float = 5.0,
    bias: float = 0.0,
) -> torch.Tensor:
    """The factor of each sample's `DiffusionLoss.mse`, the squared error of what the model predicts.

    The weightings are those of the error of the *noise*, at the signal-to-noise ratio SNR of the timestep: abar over
    1 - abar, or for flow (1 - sigma)^2 over sigma^2.

    - "none": 1 for what is predicted, whatever it is.
    - "min_snr": min(1, gamma / SNR), that is min(SNR, gamma) for the error of x_0 (Hang et al. 2023,
      https://arxiv.org/abs/2303.09556, section 3.4).
    - "sigmoid": sigmoid(bias - log SNR) (Kingma & Gao 2023, https://arxiv.org/abs/2303.00848; Hoogeboom et al. 2024,
      https://arxiv.org/abs/2410.19324). Theirs is the weight of an integral over log SNR, for which they also divide
      by the density of the timesteps on that axis. Here that density is left in, as with "min_snr", of which this is
      the smooth form at gamma = exp(bias).

    At a known x_t the error of the noise is that of v times sqrt(abar), and that of the velocity times 1 - sigma. The
    weight of what is predicted is therefore the noise's times that factor squared: min(abar, gamma (1 - abar)) for
    "min_snr" and v. It is finite everywhere, and 0 where no signal is left: the last timestep of a schedule with zero
    terminal SNR is trained by "none" alone.

    Args:
        scheduler: of `make_scheduler`. Its table of abar moves to the device of `timesteps` and stays there.
        timesteps: `(B,)`, as `sample_timesteps` gives them.
        weighting: "none", "min_snr" or "sigmoid".
        gamma: of "min_snr", the SNR above which a timestep counts less; the paper's is 5.
        bias: of "sigmoid", the log SNR at which a timestep counts half. Smaller values favour the noisy end.

    Returns:
        `(B,)` floats.

    Raises:
        ValueError: for another weighting, or a `gamma` that is not positive.
    """
    if weighting not in ("none", "min_snr", "sigmoid"):
        raise ValueError(f'weighting="{weighting}": expected "none", "min_snr" or "sigmoid".')
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}: expected a positive number.")

    # 1. The squared coefficients of clip and noise in x_t
    if is_flow(scheduler):
        sigma = timesteps / scheduler.config["num_train_timesteps"]
        signal, noise = (1 - sigma).square(), sigma.square()
    else:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)  # as its `add_noise` does
        signal = scheduler.alphas_cumprod[timesteps]
        noise = 1 - signal
    if weighting == "none":
        return torch.ones_like(signal)

    # 2. The weight of the noise's error, times `signal` so that nothing is divided by an SNR of 0
    if weighting == "min_snr":
        weights = torch.minimum(signal, gamma * noise)
    else:
        weights = signal * torch.sigmoid(bias + noise.log() - signal.log())
    return weights / signal if scheduler.config.get("prediction_type") == "epsilon" else weights
