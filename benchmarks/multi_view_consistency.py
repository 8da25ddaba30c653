"""How far clips are pictures of one rigid scene: the share of their SIFT matches that one camera motion explains.

    endora generate --output outputs/clips --num_clips 8 --class_label 1
    python benchmarks/multi_view_consistency.py --clips outputs/clips

A video gives as many clips as fit into it one after the other. Beside them are measured, at the same size and length:
rendered colons, which are rigid; the same through the bundled model's autoencoder, which blurs them as it blurs what
the model generates; and clips whose frames come from one rendered colon each, which share nothing: what chance gives.
See `epipolar_consistency` for the definition. Means and standard deviations are over clips; a clip without any match,
or one that stands still, which any motion would explain, is left out and counted.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffusers_endora import bundled_model
from diffusers_endora.data.clips import find_videos, resize_and_crop_clip
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.video_io import read_frames, read_video_info
from diffusers_endora.downstream.reconstruction.cameras import pinhole_intrinsics
from diffusers_endora.downstream.reconstruction.reconstruct import mean_and_std
from diffusers_endora.downstream.reconstruction.structure_from_motion import epipolar_consistency

LEAST_CHANGE = 0.5  # of 255, between some two frames of a clip that does not stand still
SEEDS = range(9, 200, 10)  # the test split of the phantom corpus


def read_clips(path: Path, num_frames: int, frame_interval: int, resolution: int) -> list[np.ndarray]:
    """The clips of a video, one after the other, uint8 `(F, H, W, 3)`.

    Raises:
        ValueError: it is shorter than one.
    """
    total, span = read_video_info(path).num_frames, (num_frames - 1) * frame_interval + 1
    if total < span:
        raise ValueError(f"{path}: has {total} frames, a clip takes {span}")
    clips = []
    for first in range(0, total - span + 1, span):
        frames = read_frames(path, first + frame_interval * np.arange(num_frames))
        pixels = resize_and_crop_clip(frames, resolution, resolution, antialias=True)
        clips.append(as_frames(pixels))
    return clips


def as_frames(pixels: torch.Tensor) -> np.ndarray:
    """`(F, 3, H, W)` in [-1, 1] to uint8 `(F, H, W, 3)`."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def through_autoencoder(vae: AutoencoderKL, clip: np.ndarray) -> np.ndarray:
    """What the autoencoder makes of a clip."""
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1
    return as_frames(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)


def report(name: str, clips: list[np.ndarray], field_of_view: float, frame_distance: int) -> None:
    """Measures clips and prints a line."""
    moving = [
        clip for clip in clips if np.abs(np.diff(clip.astype(np.int16), axis=0)).mean((1, 2, 3)).max() >= LEAST_CHANGE
    ]
    found = [
        epipolar_consistency(clip, pinhole_intrinsics(clip.shape[1], clip.shape[2], field_of_view), frame_distance)
        for clip in moving
    ]
    shares = [float(row["inlier_share"]) for row in found if row["inlier_share"] is not None]
    if not shares:
        print(f"{name:24s} no match in any of {len(clips)} clips")
        return
    share, matches = mean_and_std(shares), mean_and_std([float(row["num_matches"] or 0) for row in found])
    spreads = ["" if value["std"] is None else f" ± {value['std']:.3f}" for value in (share, matches)]
    print(
        f"{name:24s} inlier share {share['mean']:.3f}{spreads[0]} ({share['n']} of {len(clips)} clips), "
        f"matches per pair {matches['mean']:.1f}{spreads[1]}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=Path, nargs="+", required=True, help="videos, or folders of them")
    parser.add_argument("--num_frames", type=int, default=16, help="of a clip")
    parser.add_argument("--frame_interval", type=int, default=1, help="take every n-th frame of a video")
    parser.add_argument("--resolution", type=int, default=128, help="side of the square frames, in pixels")
    parser.add_argument("--frame_distance", type=int, default=2)
    parser.add_argument("--field_of_view", type=float, default=116.0, help="degrees across the diagonal")
    parser.add_argument("--num_rendered", type=int, default=8, help="rendered colons to compare with, at most 20")
    args = parser.parse_args()
    for name in ("num_frames", "frame_interval", "resolution"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    if args.frame_distance >= args.num_frames:
        parser.error(f"--frame_distance {args.frame_distance}: expected less than --num_frames {args.num_frames}.")
    if not 0 < args.frame_distance < args.num_rendered <= len(SEEDS):
        parser.error(
            f"expected 0 < --frame_distance < --num_rendered <= {len(SEEDS)}."
        )  # or mixed frames share a colon
    try:
        paths = [path for name in args.clips for path in (find_videos(name)[0] if name.is_dir() else [name])]
        if not paths:
            raise ValueError(f"--clips {' '.join(map(str, args.clips))}: no video found")
        size = (args.num_frames, args.frame_interval, args.resolution)
        clips = [clip for path in paths for clip in read_clips(path, *size)]
        report("given clips", clips, args.field_of_view, args.frame_distance)
        rendered = [
            render_phantom_clip(
                seed, args.num_frames, args.resolution, args.resolution, polyp=False, instrument=False
            ).frames
            for seed in SEEDS[: args.num_rendered]
        ]
        report("rendered colons", rendered, 116.0, args.frame_distance)
        vae = AutoencoderKL.from_pretrained(bundled_model(), subfolder="vae").float()
        blurred = [through_autoencoder(vae, clip) for clip in rendered]
        report("the same, autoencoder", blurred, 116.0, args.frame_distance)
        mixed = [
            np.stack([rendered[(first + i) % len(rendered)][i] for i in range(args.num_frames)])
            for first in range(len(rendered))
        ]
        report("frames of other colons", mixed, 116.0, args.frame_distance)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"multi_view_consistency.py: error: {error}")


if __name__ == "__main__":
    main()
