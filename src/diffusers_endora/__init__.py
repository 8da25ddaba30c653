"""Endora (MICCAI 2024), the endoscopy video generation model, for Hugging Face diffusers.

Importing the package makes its classes known to diffusers, so that published folders load by
`DiffusionPipeline.from_pretrained(folder)`. Everything beyond the model and the pipeline is imported when it is used,
the baselines of the paper's Table 1 among it.
"""

import importlib
from typing import TYPE_CHECKING

import diffusers
from diffusers import ModelMixin  # noqa: F401 - for the loader of diffusers, see register_with_diffusers
from diffusers.pipelines import pipeline_loading_utils

from .models.transformer_endora import EndoraTransformer3DModel, EndoraTransformer3DModelOutput
from .pipelines.pipeline_endora import EndoraPipeline
from .pipelines.pipeline_output import EndoraPipelineOutput

if TYPE_CHECKING:
    from .baselines.lvdm.autoencoder_lvdm import LVDMAutoencoder
    from .baselines.lvdm.pipeline_lvdm import LVDMPipeline
    from .baselines.lvdm.unet_lvdm import LVDMUNet3DModel
    from .baselines.mostgan_v.discriminator_mostgan_v import MoStGANVDiscriminator
    from .baselines.mostgan_v.generator_mostgan_v import MoStGANVGenerator
    from .baselines.mostgan_v.pipeline_mostgan_v import MoStGANVPipeline
    from .baselines.registry import load_pipeline
    from .baselines.stylegan_v.discriminator_stylegan_v import StyleGANVDiscriminator
    from .baselines.stylegan_v.generator_stylegan_v import StyleGANVGenerator
    from .baselines.stylegan_v.pipeline_stylegan_v import StyleGANVPipeline
    from .bundled import bundled_model
    from .data.clips import ClipDataset
    from .data.phantom import render_phantom_clip
    from .models.original_checkpoint import load_original_checkpoint, save_original_checkpoint
    from .training.diffusion_loss import diffusion_loss
    from .training.dino_prior import DinoPrior

__version__ = "0.1.0"

# The classes of the baselines, which diffusers finds as its own
BASELINE_CLASSES = {
    "LVDMAutoencoder": "baselines.lvdm.autoencoder_lvdm",
    "LVDMPipeline": "baselines.lvdm.pipeline_lvdm",
    "LVDMUNet3DModel": "baselines.lvdm.unet_lvdm",
    "MoStGANVDiscriminator": "baselines.mostgan_v.discriminator_mostgan_v",
    "MoStGANVGenerator": "baselines.mostgan_v.generator_mostgan_v",
    "MoStGANVPipeline": "baselines.mostgan_v.pipeline_mostgan_v",
    "StyleGANVDiscriminator": "baselines.stylegan_v.discriminator_stylegan_v",
    "StyleGANVGenerator": "baselines.stylegan_v.generator_stylegan_v",
    "StyleGANVPipeline": "baselines.stylegan_v.pipeline_stylegan_v",
}

LAZY_NAMES = {
    **BASELINE_CLASSES,
    "ClipDataset": "data.clips",
    "DinoPrior": "training.dino_prior",
    "bundled_model": "bundled",
    "diffusion_loss": "training.diffusion_loss",
    "load_original_checkpoint": "models.original_checkpoint",
    "load_pipeline": "baselines.registry",
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
    "LVDMAutoencoder",
    "LVDMPipeline",
    "LVDMUNet3DModel",
    "MoStGANVDiscriminator",
    "MoStGANVGenerator",
    "MoStGANVPipeline",
    "StyleGANVDiscriminator",
    "StyleGANVGenerator",
    "StyleGANVPipeline",
    "bundled_model",
    "diffusion_loss",
    "load_original_checkpoint",
    "load_pipeline",
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

    Published folders name a model as `["diffusers", "EndoraTransformer3DModel"]`; a plain save by diffusers' own
    methods names this package, which its loader accepts only as a registered library. The loader asks the library for
    each registered name and tells by the base class how a model is loaded; `ModelMixin`, which stands here for the
    models of the baselines, is one that it finds without importing them.
    """
    loading_methods = {
        "EndoraTransformer3DModel": ["save_pretrained", "from_pretrained"],
        "ModelMixin": ["save_pretrained", "from_pretrained"],
    }
    pipeline_loading_utils.LOADABLE_CLASSES["diffusers_endora"] = loading_methods
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(loading_methods)
    diffusers.EndoraTransformer3DModel = EndoraTransformer3DModel
    diffusers.EndoraPipeline = EndoraPipeline

    # The baselines are imported when diffusers is asked for them (PEP 562, which comes before the lookup of its own).
    earlier = vars(diffusers).get("__getattr__")

    def baseline_or_earlier(name: str):
        if name in BASELINE_CLASSES:
            return __getattr__(name)
        if earlier is not None:
            return earlier(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    diffusers.__getattr__ = baseline_or_earlier


register_with_diffusers()
