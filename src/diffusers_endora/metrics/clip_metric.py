"""What the `evaluate` modules in `evaluate_modules` share: metrics on folders or arrays of clips."""

import warnings
from typing import Any

import datasets
import evaluate

from .clip_sources import open_videos
from .evaluation import evaluate as compare
from .evaluation import load_extractors
from .feature_extractors import FeatureExtractor
from .feature_store import FeatureStore
from .inception_score import inception_score
from .protocols import PROTOCOLS, STRICT, Protocol

CITATION = """\
@inproceedings{li2024endora,
  title={Endora: Video Generation Models as Endoscopy Simulators},
  author={Li, Chenxin and Liu, Hengyu and Liu, Yifan and Feng, Brandon Y. and Li, Wuyang and Liu, Xinyu and \
Chen, Zhen and Shao, Jing and Yuan, Yixuan},
  booktitle={MICCAI},
  year={2024}
}"""

INPUTS = """
Args:
    predictions: generated clips: a folder, a file, a list of these, or an array (N, F, H, W, 3), uint8 or floats in
        [0, 1].
    references: real ones, likewise, or longer videos that the protocol takes clips from. Not for the inception score.
    weights: of the network, see the metric's card.
    protocol: "endora-strict" or "endora-legacy".
    num_clips, num_frames, frame_interval, seed: change the protocol's numbers.
    cache_dir: where features are kept; by default in the Hugging Face cache.
    num_resamples: bootstrap resamples behind the spread.
Returns:
    the metric, its spread ("..._std"), "num_real" and "num_fake".
"""


class ClipMetric(evaluate.Metric):
    """A metric of `evaluation.METRICS` as a module of `evaluate`.

    `add_batch` takes paths; arrays go into `compute` directly, past the Arrow file that `evaluate` would write.
    """

    metric: str  # in METRICS
    result: str  # what `compute` calls it
    description: str
    reference: str
    needs_references = True

    def _info(self) -> evaluate.MetricInfo:
        names = ["predictions", "references"] if self.needs_references else ["predictions"]
        return evaluate.MetricInfo(
            description=self.description,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Value("string") for name in names}),
            reference_urls=[self.reference],
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Compute the metric."""
        if predictions is None and references is None:
            return super().compute(**kwargs)  # of the paths that were added
        if predictions is None or (references is None and self.needs_references):
            raise ValueError("expected both: predictions, the generated clips, and references, the real ones")
        return self._compute(predictions, references, **kwargs)

    def _compute(
        self,
        predictions: Any,
        references: Any = None,
        weights: str | None = None,
        protocol: str = STRICT.name,
        cache_dir: str | None = None,
        num_resamples: int = 50,
        **changes: Any,
    ) -> dict[str, Any]:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        chosen = PROTOCOLS[protocol].changed(num_seeds=1, **changes)
        extractors = load_extractors([self.metric], i3d_weights=weights, inception_weights=weights)
        if not self.needs_references:
            return self._compute_alone(predictions, extractors["inception"], chosen, cache_dir)
        report = compare(
            references,
            [predictions],
            extractors,
            [self.metric],
            chosen,
            cache_dir=cache_dir,
            num_resamples=num_resamples,
        )
        if not report:  # not the main process
            return {}
        for warning in report["warnings"]:
            warnings.warn(warning, stacklevel=3)
        (row,) = report["results"]
        result = {self.result: row["value"], f"{self.result}_std": row["spread"]["std"]}
        if row["infinity"] is not None:
            result[f"{self.result}_infinity"] = row["infinity"]["value"]
        return result | {"num_real": row["num_real"], "num_fake": row["num_fake"]}

    def _compute_alone(
        self, predictions: Any, extractor: FeatureExtractor, protocol: Protocol, cache_dir: str | None
    ) -> dict[str, Any]:
        """The inception score, which knows no real clips."""
        clips = protocol.select_fake(open_videos(predictions), protocol.num_clips_of_frames)
        preparation = protocol.preparation(protocol.resolution, is_fake=True, codec=clips[0].video.codec)
        logits = FeatureStore(extractor, cache_dir)(clips, preparation, "generated clips")["logits"]
        score = inception_score(logits.reshape(-1, logits.shape[-1]))
        return {self.result: score.mean, f"{self.result}_std": score.std, "num_fake": len(clips)}
