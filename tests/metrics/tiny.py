"""A feature network that costs nothing, and clips for it."""

import numpy as np
import torch

from diffusers_endora.metrics.feature_extractors import FeatureExtractor


class MeanAndStep(FeatureExtractor):
    """Mean colour, and mean difference of successive frames."""

    name, outputs, per_frame = "mean-and-step", {"features": 6}, False
    weights, weights_hash, preprocessing = "none", "0", "none"

    def __init__(self):
        super().__init__(torch.nn.Identity())

    def forward(self, units: torch.Tensor) -> dict[str, torch.Tensor]:
        clips = units.float()
        steps = clips.diff(dim=1).abs().mean(dim=(1, 2, 3))
        return {"features": torch.cat([clips.mean(dim=(1, 2, 3)), steps], dim=1)}


def make_clips(seed: int, num_clips: int = 21) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 100, (num_clips, 1, 1, 1, 3))
    return (low + rng.integers(0, 100 + 50 * seed, (num_clips, 4, 6, 8, 3))).astype(np.uint8)
