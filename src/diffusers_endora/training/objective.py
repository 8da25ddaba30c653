"""What the denoiser learns to predict, at which timesteps, and how much each timestep counts.

Three parameterisations, told apart by the scheduler, which the saved pipeline gets as well: the noise (Ho et al. 2020,
https://arxiv.org/abs/2006.11239), v (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) and the velocity of
rectified flow (Liu et al. 2022, https://arxiv.org/abs/2209.03003; Esser et al. 2024, https://arxiv.org/abs/2403.03206).
"""

import math
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
        zero_terminal_snr: rescales the betas such that the last timestep is noise alone, and samples from that timestep
            on (Lin et al. 2023, https://arxiv.org/abs/2305.08891, algorithm 1 and section 3.3).

    Raises:
        ValueError: for another prediction type, or for `zero_terminal_snr` with one other than "v_prediction".
    """
    if prediction_type not in ("epsilon", "v_prediction", "flow"):
        raise ValueError(f'prediction_type="{prediction_type}": expected "epsilon", "v_prediction" or "flow".')
    if zero_terminal_snr and prediction_type != "v_prediction":
        reason = {
            "epsilon": "the noise says nothing of the clip where there is nothing but noise",
            "flow": "flow starts from noise alone as it is",
        }[prediction_type]
        raise ValueError(
            f'zero_terminal_snr=True with prediction_type="{prediction_type}": {reason}; expected "v_prediction".'
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
    raise NotImplementedError


def loss_weights(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    timesteps: torch.Tensor,
    weighting: Literal["none", "min_snr", "sigmoid"] | str = "none",
    gamma: float = 5.0,
    bias: float = 0.0,
) -> torch.Tensor:
    """The factor `(B,)` of each sample's `DiffusionLoss.mse`."""
    raise NotImplementedError
