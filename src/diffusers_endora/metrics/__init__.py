"""Distances between real and generated clips. The names below are imported when they are used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluation import evaluate, load_extractors
    from .frechet_video_distance import FrechetVideoDistance
    from .i3d import I3DFeatures
    from .inception import InceptionFeatures
    from .vit_features import DinoFeatures, VideoMAEFeatures

LAZY_NAMES = {
    "DinoFeatures": "vit_features",
    "FrechetVideoDistance": "frechet_video_distance",
    "I3DFeatures": "i3d",
    "InceptionFeatures": "inception",
    "VideoMAEFeatures": "vit_features",
    "evaluate": "evaluation",
    "load_extractors": "evaluation",
}

__all__ = [
    "DinoFeatures",
    "FrechetVideoDistance",
    "I3DFeatures",
    "InceptionFeatures",
    "VideoMAEFeatures",
    "evaluate",
    "load_extractors",
]


def __getattr__(name: str):
    if name in LAZY_NAMES:
        return getattr(importlib.import_module(f".{LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
