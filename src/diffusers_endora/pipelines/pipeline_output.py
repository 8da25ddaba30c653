"""What `EndoraPipeline` returns."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class EndoraPipelineOutput(BaseOutput):
    """
    Args:
        frames: by `output_type`: "pil", a list of clips, each a list of images; "np", an array `(B, F, H, W, C)` and
            "pt", a tensor `(B, F, C, H, W)`, both in [0, 1]; "latent", latents `(B, C, F, H/8, W/8)`.
    """

    frames: torch.Tensor | np.ndarray | list[list[Image.Image]]
