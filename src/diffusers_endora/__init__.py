"""Endora (MICCAI 2024), the endoscopy video generation model, for Hugging Face diffusers.

Importing the package makes its classes known to diffusers, so that published folders load by
`DiffusionPipeline.from_pretrained(folder)`. Everything beyond the model and the pipeline is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from .models.transformer_endora import EndoraTransformer3DModel, EndoraTransformer3DModelOutput
from .pipelines.pipeline_endora import EndoraPipeline
from .pipelines.pipeline_output import EndoraPipelineOutput

if TYPE_CHECKING:
    from .bundled import bundled_model
    from .data.clips import ClipDataset
    from .data.phantom import render_phantom_clip
    from .models.original_checkpoint import load_original_checkpoint, save_original_checkpoint
    from .training.diffusion_loss import diffusion_loss
    from .training.dino_prior import DinoPrior

__version__ = "0.1.0"

LAZY_NAMES = {
    "ClipDataset": "data.clips",
    "DinoPrior": "training.dino_prior",
    "bundled_model": "bundled",
    "diffusion_loss": "training.diffusion_loss",
    "load_original_checkpoint": "models.original_checkpoint",
    "render_phantom_clip": "data.phantom",
    "save_original_checkpoint": "models.original_checkpoint",
}

__all__ = [
    "ClipDataset",
    "DinoPrior",
    "EndoraPipeline",
    "EndoraPipelineOutput",
    "EndoraTransformer3DModel",
    "EndoraTransformer3DModelOutput",
    "bundled_model",
    "diffusion_loss",
    "load_original_checkpoint",
    "render_phantom_clip",
    "save_original_checkpoint",
]


def __getattr__(name: str):
    if name in LAZY_NAMES:
        return getattr(importlib.import_module(f".{LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_with_diffusers() -> None:
    """Lets diffusers find the classes by the names in a `model_index.json`, in both forms that occur.

    Published folders name the transformer as `["diffusers", "EndoraTransformer3DModel"]`; a plain save by diffusers'
    own methods names this package, which its loader accepts only as a registered library.
    """
    loading_methods = {"EndoraTransformer3DModel": ["save_pretrained", "from_pretrained"]}
    pipeline_loading_utils.LOADABLE_CLASSES["diffusers_endora"] = loading_methods
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(loading_methods)
    diffusers.EndoraTransformer3DModel = EndoraTransformer3DModel
    diffusers.EndoraPipeline = EndoraPipeline


register_with_diffusers()
