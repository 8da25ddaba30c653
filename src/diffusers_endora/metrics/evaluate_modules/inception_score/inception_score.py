"""Inception score for `evaluate.load`; what it does is in `diffusers_endora.metrics.clip_metric`."""

import diffusers_endora.metrics.clip_metric


class InceptionScoreMetric(diffusers_endora.metrics.clip_metric.ClipMetric):
    metric = "is"
    result = "inception_score"
    description = "Inception score of the frames of generated clips, in 10 splits. Higher is better."
    reference = "https://arxiv.org/abs/1606.03498"
    needs_references = False
