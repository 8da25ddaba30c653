"""The reference ladder: what a given Frechet distance means on a corpus, from real clips alone.

Held-out real clips, and the same clips corrupted in known ways, are compared with the reference clips, all at the same
N. The floor is what a perfect generator would score. The ladder is also a test of the metric: everything must score
worse than the floor, and of the corruptions of the same clips noise must score worst. Where another corpus lies above
the floor depends on that corpus: one that is far and narrow scores worse than noise, and rightly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from huggingface_hub import cached_assets_path
from tqdm import tqdm

from ..data.phantom import render_phantom_clip
from ..data.video_io import write_video
from .clip_sources import Clip
from .preparation import CORRUPTIONS, Preparation

FLOOR = "held-out real clips (the floor)"
GENERATED = "generated clips"
OTHER = "other corpus"


@dataclass(frozen=True)
class Rung:
    """A distance of `num_clips` clips to the reference clips, with its 95 % interval."""

    name: str
    value: float
    std: float
    low: float
    high: float
    num_clips: int


def halves(clips: Sequence[Clip]) -> tuple[list[Clip], list[Clip]]:
    """Two disjoint sets of clips: of every other video, or of the first and the second half of a single video.

    Raises:
        ValueError: there are too few clips.
    """
    videos = list(dict.fromkeys(clip.video for clip in clips))
    if len(videos) > 1:
        odd = set(videos[1::2])
        first = [clip for clip in clips if clip.video not in odd]
        second = [clip for clip in clips if clip.video in odd]
    else:
        in_order = sorted(clips, key=lambda clip: clip.indices)
        first = in_order[: len(in_order) // 2]
        end = max((max(clip.indices) for clip in first), default=-1)
        second = [clip for clip in in_order[len(first) :] if min(clip.indices) > end]
    size = min(len(first), len(second))
    if size < 2:
        raise ValueError(
            f"{len(clips)} real clips: the ladder compares two sets that share no video, or no time, with at least 2 "
            "clips each; give more real videos, or held-out ones with --train"
        )
    return first[:size], second[:size]


def phantom_clips(num_clips: int, num_frames: int, height: int, width: int) -> Path:
    """A folder with rendered colons, made once and kept in the Hugging Face cache: the other corpus by default."""
    folder = cached_assets_path("diffusers_endora", namespace="phantom", subfolder=f"{num_frames}x{height}x{width}")
    paths = [folder / f"clip_{i:05d}.mkv" for i in range(num_clips)]
    missing = [(i, path) for i, path in enumerate(paths) if not path.is_file()]
    for i, path in tqdm(missing, desc="rendering the other corpus", unit="clip", disable=not missing):
        clip = render_phantom_clip(i, num_frames, height, width, polyp=i % 3 == 1, instrument=i % 3 == 2)
        write_video(path, clip.frames, clip.fps, codec="ffv1")
    return folder


def ladder_features(
    features: Callable[[Sequence[Clip], Preparation, str], np.ndarray],
    held_out: Sequence[Clip],
    other: Sequence[Clip],
    preparation: Preparation,
) -> dict[str, np.ndarray]:
    """Features `(N, R, width)` of every rung but the generated clips, in the order of a report: noise last.

    Args:
        features: of clips after a preparation; the string is for the progress bar.
    """
    found = {FLOOR: features(held_out, preparation, FLOOR)}
    for corruption in CORRUPTIONS[:-1]:
        found[corruption] = features(held_out, replace(preparation, corruption=corruption), corruption)
    found[OTHER] = features(other, preparation, OTHER)
    noise = CORRUPTIONS[-1]
    found[noise] = features(held_out, replace(preparation, corruption=noise), noise)
    return found


def violations(rungs: Sequence[Rung]) -> list[str]:
    """What is wrong with the order, in sentences: the floor must be lowest, beyond doubt, and noise above the other
    corruptions.

    Generated clips may be anywhere.
    """
    by_name = {rung.name: rung for rung in rungs if rung.name != GENERATED}
    floor, noise = by_name[FLOOR], by_name[CORRUPTIONS[-1]]
    found = []
    for rung in by_name.values():
        if rung is floor:
            continue
        if rung.value <= floor.value:
            found.append(f"{rung.name} ({rung.value:.0f}) is not above the floor ({floor.value:.0f}).")
        elif rung.low <= floor.high:
            found.append(f"{rung.name} cannot be told from the floor: their 95 % intervals overlap.")
        if rung.name in CORRUPTIONS[:-1] and rung.value >= noise.value:
            found.append(f"{rung.name} ({rung.value:.0f}) is not below noise ({noise.value:.0f}).")
    return found
