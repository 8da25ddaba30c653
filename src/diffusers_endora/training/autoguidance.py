"""Guidance by a weaker version of the model, learnt into the weights: sampling then costs no second call."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..models.transformer_endora import EndoraTransformer3DModel
from ..pipelines.pipeline_endora import EndoraPipeline
from .checkpoints import AVERAGE


class Autoguidance:
    """What is added to a training's target: `(scale - 1) (strong - weak)`, both as they were when it began.

    Where a model is unsure, a weaker version of it (trained for a shorter time) errs the same way and farther, so that
    going on from the weaker to the stronger leads to sharper samples: `weak + scale (strong - weak)` (Karras et al.
    2024, https://arxiv.org/abs/2406.02507). A model trained to this target does by itself what guidance does in
    two calls (for classifier-free guidance: Tang et al. 2025, https://arxiv.org/abs/2502.12154).

    Args:
        strong, weak: of one configuration; not trained.
        scale: 1 is none.
    """

    def __init__(self, strong: EndoraTransformer3DModel, weak: EndoraTransformer3DModel, scale: float) -> None:
        self.strong = copy.deepcopy(strong).eval().requires_grad_(False)
        self.weak = weak.eval().requires_grad_(False)
        self.scale = scale

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, **conditions: Any) -> torch.Tensor:
        """`(B, C, F, h, w)` in float32, of noisy latents of that shape and the model's other inputs."""
        strong, weak = (
            model.to(noisy.device)(noisy, timesteps, **conditions).sample[:, : noisy.shape[1]].float()
            for model in (self.strong, self.weak)
        )
        return (self.scale - 1) * (strong - weak)


def load_transformer_like(
    transformer: EndoraTransformer3DModel, prediction_type: str, path_or_repo: str
) -> EndoraTransformer3DModel:
    """The transformer of a pipeline, or the moving average in a checkpoint.

    Args:
        transformer, prediction_type: what its configuration and what it predicts have to be.
        path_or_repo: folder of a pipeline or of a checkpoint, or a pipeline's Hub id.

    Raises:
        ValueError: there is none, or another.
    """
    average = Path(path_or_repo) / AVERAGE
    predicted = prediction_type  # by a checkpoint, which does not say
    try:
        if average.is_file():
            loaded = copy.deepcopy(transformer)
            loaded.load_state_dict(load_file(average))
        else:
            predicted = EndoraPipeline.load_config(path_or_repo).get("prediction_type", predicted)
            loaded = EndoraTransformer3DModel.from_pretrained(path_or_repo, subfolder="transformer")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".: ")
        raise ValueError(
            f"{path_or_repo}: no transformer like that of this training ({reason}); expected a pipeline, or a "
            f"checkpoint with {AVERAGE}."
        ) from error
    ours = {**transformer.config, "prediction_type": prediction_type}
    theirs = {**loaded.config, "prediction_type": predicted}
    for name, value in ours.items():
        if not name.startswith("_") and theirs.get(name) != value:
            raise ValueError(f"{path_or_repo}: its {name} is {theirs.get(name)}, that of this training {value}.")
    return loaded
