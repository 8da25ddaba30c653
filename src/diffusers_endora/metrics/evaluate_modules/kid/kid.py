"""KID for `evaluate.load`; what it does is in `diffusers_endora.metrics.clip_metric`."""

import diffusers_endora.metrics.clip_metric


class KID(diffusers_endora.metrics.clip_metric.ClipMetric):
    metric = "kid"
    result = "kid"
    description = "Kernel Inception distance between the frames of generated and of real clips. Lower is better."
    reference = "https://arxiv.org/abs/1801.01401"
