"""Resident memory of FVD's features over 2048 clips of 16x128x128: flat after the first 100, or not.

    python benchmarks/evaluation_memory.py

The clips come from lossless videos through `FeatureStore` with `I3DFeatures`, as in `endora evaluate`; the distance
between two halves follows. Memory is read from /proc every half second (Linux only).
"""

import argparse
import resource
import tempfile
import threading
from pathlib import Path

import numpy as np

from diffusers_endora.data.video_io import write_video
from diffusers_endora.metrics.clip_sources import clips_at_fixed_offsets, open_videos
from diffusers_endora.metrics.feature_store import FeatureStore
from diffusers_endora.metrics.frechet_distance import frechet_distance_of_features
from diffusers_endora.metrics.i3d import I3DFeatures
from diffusers_endora.metrics.preparation import Preparation

CLIPS_PER_VIDEO = 32


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def write_videos(folder: Path, num_videos: int) -> None:
    """Videos of a drifting colour gradient with noise."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 100, 128)
    for i in range(num_videos):
        base = ramp[:, None, None] * rng.uniform(0, 1, 3) + ramp[None, :, None] * rng.uniform(0, 1, 3)
        frames = np.stack([np.roll(base, t, axis=1) for t in range(16 * CLIPS_PER_VIDEO)])
        noisy = frames + rng.integers(0, 8, (len(frames), 128, 128, 1))
        write_video(folder / f"{i:03d}.mkv", noisy.astype(np.uint8), 25, codec="ffv1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_clips", type=int, default=2048)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "videos"
        folder.mkdir()
        write_videos(folder, -(-args.num_clips // CLIPS_PER_VIDEO))
        clips = clips_at_fixed_offsets(open_videos(folder), args.num_clips, 16, 16)
        store = FeatureStore(I3DFeatures(), Path(temporary) / "cache")
        seen: list[tuple[int, float]] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                seen.append((store.num_computed, resident_megabytes()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            features = store(clips, Preparation(None), "clips")["features"][:, 0]
            frechet_distance_of_features(features[::2], features[1::2])
        finally:
            done.set()
            watcher.join()
    marks = [100, *(mark for mark in (250, 500, 1000, 1500) if mark < args.num_clips), args.num_clips]
    for mark in marks:
        at_mark = max((megabytes for count, megabytes in seen if abs(count - mark) <= 16), default=float("nan"))
        print(f"after {mark:5d} clips  {at_mark:7.0f} MiB")
    early = max(megabytes for count, megabytes in seen if count <= 112)
    late = max(megabytes for count, megabytes in seen if count > 112)
    print(f"highest: {early:.0f} MiB up to the first 100, {late:.0f} MiB after; ratio {late / early:.3f}")


if __name__ == "__main__":
    main()
