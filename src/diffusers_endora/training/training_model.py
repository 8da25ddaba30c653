"""The networks that are trained and what they minimise, as one module: what Accelerate wraps."""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from diffusers.models.attention_dispatch import AttentionBackendName

from ..models.transformer_endora import EndoraTransformer3DModel
from .autoguidance import Autoguidance
from .diffusion_loss import diffusion_loss
from .dino_prior import DinoPrior
from .objective import loss_weights


class Losses(NamedTuple):
    """
    Args:
        total: scalar, what is minimised.
        mse: `(B,)`, unweighted squared error of what the transformer predicts.
        vb: `(B,)`, the variational bound's term; zeros without variance channels.
        prior: scalar; zero without a prior.
    """

    total: torch.Tensor
    mse: torch.Tensor
    vb: torch.Tensor
    prior: torch.Tensor


class TrainingModel(nn.Module):
    """Endora's objective: weighted squared error + variational bound + prior_weight x prior, averaged over samples.

    One module, so that it is one DDP or FSDP unit tree and one DeepSpeed engine.

    Args:
        transformer: the denoiser. Labels are dropped by the caller (see `drop_labels`), no longer by itself.
        scheduler: the noise schedule and what is predicted.
        prior: its convolution is trained along.
        prior_weight: the paper's is 0.5.
        num_still_images: how many of the frames, counted from the end, are still images.
        weighting: of the squared error, see `loss_weights`; and its options.
        guidance: what the model learns to be guided by; not trained.
    """

    def __init__(
        self,
        transformer: EndoraTransformer3DModel,
        scheduler: Any,
        prior: DinoPrior | None = None,
        prior_weight: float = 0.5,
        num_still_images: int = 0,
        weighting: str = "none",
        gamma: float = 5.0,
        bias: float = 0.0,
        guidance: Autoguidance | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.prior = prior
        self.scheduler = scheduler
        self.prior_weight = prior_weight
        self.num_still_images = num_still_images
        self.guidance = guidance
        self.weighting: dict[str, Any] = {"weighting": weighting, "gamma": gamma, "bias": bias}
        if transformer.class_embedder is not None:
            transformer.class_embedder.dropout_prob = 0.0

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        teacher_tokens: list[torch.Tensor] | None = None,
    ) -> Losses:
        """
        Args:
            latents, noise: `(B, C, F, h, w)`.
            timesteps: `(B,)`.
            class_labels: `(B,)` or `(B, 1 + num_still_images)`.
            teacher_tokens: of the same frames, as `DinoPrior.extract` gives them; with a prior.
        """
        mse, vb, spatial_states = diffusion_loss(
            self.transformer,
            latents,
            timesteps,
            noise,
            self.scheduler,
            class_labels=class_labels,
            num_still_images=self.num_still_images,
            output_spatial_states=() if self.prior is None else self.prior.student_layers,
            guidance=self.guidance,
        )
        weights = loss_weights(self.scheduler, timesteps, **self.weighting)
        prior = mse.new_zeros(()) if self.prior is None else self.prior(spatial_states, teacher_tokens)
        total = (weights * mse + vb).mean() + self.prior_weight * prior
        return Losses(total, mse.detach(), vb.detach(), prior.detach())


def drop_labels(
    class_labels: torch.Tensor, uniform: torch.Tensor, probability: float, num_classes: int
) -> torch.Tensor:
    """Labels, some replaced by the null class `num_classes`, for classifier-free guidance (Ho & Salimans 2022).

    Args:
        class_labels: integers.
        uniform: random numbers in [0, 1) of the same shape; a label is dropped where its is below `probability`.
    """
    return torch.where(uniform < probability, num_classes, class_labels)


def use_plain_attention(transformer: EndoraTransformer3DModel) -> None:
    """Attention by matrix products and a softmax, in this model alone (`set_attention_backend` is for all).

    For training in bfloat16 on a CPU, where the backward of fused attention takes several times as long as in float32.
    """
    for processor in transformer.attn_processors.values():
        processor._attention_backend = AttentionBackendName._NATIVE_MATH
