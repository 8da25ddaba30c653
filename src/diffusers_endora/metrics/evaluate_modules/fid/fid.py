"""FID for `evaluate.load`; what it does is in `diffusers_endora.metrics.clip_metric`."""

import diffusers_endora.metrics.clip_metric


class FID(diffusers_endora.metrics.clip_metric.ClipMetric):
    metric = "fid"
    result = "fid"
    description = "Frechet Inception distance between the frames of generated and of real clips. Lower is better."
    reference = "https://arxiv.org/abs/1706.08500"
