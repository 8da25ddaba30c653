"""How far clips are pictures of one rigid scene: the share of their SIFT matches that one camera motion explains.

    endora generate --output outputs/clips --num_clips 8 --class_label 1
    python benchmarks/multi_view_consistency.py --clips outputs/clips

Rendered colons, which are rigid, are measured beside the clips at the same size and length, and so are clips whose
frames come from one rendered colon each, which share nothing. See `epipolar_consistency` for the definition. Means and
standard deviations are over clips; a clip without any match is counted and left out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from diffusers_endora.data.clips import find_videos
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.video_io import read_frames, read_video_info
from diffusers_endora.downstream.reconstruction.cameras import pinhole_intrinsics
from diffusers_endora.downstream.reconstruction.reconstruct import mean_and_std
from diffusers_endora.downstream.reconstruction.structure_from_motion import epipolar_consistency

SEEDS = range(9, 200, 10)  # the test split of the phantom corpus


def report(name: str, clips: list[np.ndarray], field_of_view: float, frame_distance: int) -> None:
    """Measures clips and prints a line."""
    found = [
        epipolar_consistency(clip, pinhole_intrinsics(clip.shape[1], clip.shape[2], field_of_view), frame_distance)
        for clip in clips
    ]
    shares = [float(row["inlier_share"]) for row in found if row["inlier_share"] is not None]
    matches = mean_and_std([float(row["num_matches"] or 0) for row in found])
    if not shares:
        print(f"{name:24s} no match in any of {len(clips)} clips")
        return
    share = mean_and_std(shares)
    spreads = ["" if value["std"] is None else f" ± {value['std']:.3f}" for value in (share, matches)]
    print(
        f"{name:24s} inlier share {share['mean']:.3f}{spreads[0]} ({share['n']} of {len(clips)} clips), "
        f"matches per pair {matches['mean']:.1f}{spreads[1]}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=Path, nargs="+", required=True, help="videos, or folders of them")
    parser.add_argument("--frame_distance", type=int, default=2)
    parser.add_argument("--field_of_view", type=float, default=116.0, help="degrees across the diagonal")
    parser.add_argument("--num_rendered", type=int, default=8, help="rendered colons to compare with, at most 20")
    args = parser.parse_args()
    try:
        paths = [path for name in args.clips for path in (find_videos(name)[0] if name.is_dir() else [name])]
        if not paths:
            raise ValueError(f"--clips {' '.join(map(str, args.clips))}: no video found")
        clips = [read_frames(path, np.arange(read_video_info(path).num_frames)) for path in paths]
        length, height, width = clips[0].shape[:3]
        report("given clips", clips, args.field_of_view, args.frame_distance)
        rendered = [
            render_phantom_clip(seed, length, height, width, polyp=False, instrument=False).frames
            for seed in SEEDS[: args.num_rendered]
        ]
        report("rendered colons", rendered, 116.0, args.frame_distance)
        mixed = [
            np.stack([rendered[(first + i) % len(rendered)][i] for i in range(length)])
            for first in range(len(rendered))
        ]
        report("frames of other colons", mixed, 116.0, args.frame_distance)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"multi_view_consistency.py: error: {error}")


if __name__ == "__main__":
    main()
