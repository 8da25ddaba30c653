"""FVD for `evaluate.load`; what it does is in `diffusers_endora.metrics.clip_metric`."""

import diffusers_endora.metrics.clip_metric


class FVD(diffusers_endora.metrics.clip_metric.ClipMetric):
    metric = "fvd"
    result = "fvd"
    description = "Frechet video distance: of the I3D features of generated and real clips. Lower is better."
    reference = "https://arxiv.org/abs/1812.01717"
