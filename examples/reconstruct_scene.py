"""Reconstructs the 3D scene of a clip: camera poses, deformable Gaussians, depth and new views.

    python examples/reconstruct_scene.py CLIP --output_dir scene
    python examples/reconstruct_scene.py CLIP --output_dir scene --depth_model DEPTH_MODEL

Without a clip it renders a phantom colon and reconstructs that. Poses come from structure from motion (pycolmap);
where that fails, from a monocular depth model and photometric alignment, if a model is given: a folder or a Hub id of
any depth model of `transformers`, or `phantom` for the small one of rendered colons that comes with the package. Which
path was taken and the registration rate are printed, and are in `reconstruction.json` beside all other numbers. Every
8th view, from the fifth on, is held out of the fit.

The focal length of most clips is not known. It follows from --field_of_view, a guess unless you know your scope;
--refine_focal_length lets structure from motion find it from there.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

from diffusers_endora.baselines.lvdm.lvdm_loss import load_lpips
from diffusers_endora.bundled import bundled_depth_model
from diffusers_endora.data.clips import resize_and_crop_clip
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.video_io import read_frames, read_video_info
from diffusers_endora.downstream.reconstruction.cameras import pinhole_intrinsics
from diffusers_endora.downstream.reconstruction.monocular_depth import MonocularDepth
from diffusers_endora.downstream.reconstruction.reconstruct import MOST_GAUSSIANS, find_poses, reconstruct
from diffusers_endora.downstream.reconstruction.scene_files import save_reconstruction

PHANTOM_SEED = 9


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clip", nargs="?", help="video file or folder of frames; without it, a rendered colon")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_frames", type=int, default=16, help="of the clip")
    parser.add_argument("--first_frame", type=int, default=0)
    parser.add_argument("--frame_interval", type=int, default=1, help="take every n-th frame: more parallax")
    parser.add_argument("--resolution", type=int, default=128, help="side of the square that is cut out, in pixels")
    parser.add_argument("--field_of_view", type=float, default=116.0, help="degrees across the square's diagonal")
    parser.add_argument("--refine_focal_length", action="store_true", help="by structure from motion")
    parser.add_argument("--depth_model", help="folder, Hub id, or `phantom`; without it there is no second path")
    parser.add_argument("--path", choices=["auto", "monocular"], default="auto", help="monocular: the second at once")
    parser.add_argument("--lpips_weights", help="safetensors file; without it there is no LPIPS")
    parser.add_argument("--num_gaussians", type=int, default=4000)
    parser.add_argument("--num_steps", type=int, default=300)
    parser.add_argument("--num_basis", type=int, default=4, help="cosines in time of a Gaussian; 0 is a rigid scene")
    parser.add_argument("--fps", type=float, default=8.0, help="of the videos that are written")
    parser.add_argument("--backend", choices=["torch", "gsplat"], default="torch", help="gsplat: package and GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("num_frames", "frame_interval", "resolution", "num_gaussians", "num_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    for name, low, high in (("fps", 0, math.inf), ("field_of_view", 0, 180)):
        if not low < getattr(args, name) < high:
            parser.error(f"--{name} {getattr(args, name)}: expected a number between {low} and {high}.")
    for name in ("num_basis", "first_frame", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: expected 0 or more.")
    if args.num_gaussians > MOST_GAUSSIANS:
        parser.error(f"--num_gaussians {args.num_gaussians}: expected at most {MOST_GAUSSIANS}.")
    if args.clip is None and (args.first_frame, args.frame_interval) != (0, 1):
        parser.error("--first_frame and --frame_interval are of a clip; without one, a colon is rendered.")
    if args.path == "monocular" and args.depth_model is None:
        parser.error("--path monocular needs a --depth_model.")
    return args


def load_clip(args: argparse.Namespace) -> np.ndarray:
    """The frames asked for, uint8 `(F, H, W, 3)`."""
    if args.clip is None:
        size = args.resolution
        return render_phantom_clip(PHANTOM_SEED, args.num_frames, size, size, instrument=False).frames
    indices = args.first_frame + args.frame_interval * np.arange(args.num_frames)
    available = read_video_info(args.clip).num_frames
    if not 0 <= indices[0] <= indices[-1] < available:
        raise ValueError(
            f"{args.clip}: has {available} frames, but frames {indices[0]} to {indices[-1]} were asked for; give "
            "another --num_frames, --frame_interval or --first_frame"
        )
    pixels = resize_and_crop_clip(read_frames(args.clip, indices), args.resolution, args.resolution, antialias=True)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def check_writable(folder: Path) -> None:
    """Raises an OSError where `folder` cannot be made or written into: before the work, which takes minutes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"--output_dir {folder}: {existing} is no folder that can be written to")


def main() -> None:
    args = parse_args()
    try:
        # 1. The clip and what is known of it
        if (args.output_dir / "reconstruction.json").exists():
            raise ValueError(f"--output_dir {args.output_dir}: holds a reconstruction already; choose another folder")
        frames = load_clip(args)
        intrinsics = pinhole_intrinsics(args.resolution, args.resolution, args.field_of_view)
        lpips = None if args.lpips_weights is None else load_lpips(args.lpips_weights)
        depth_model = None
        if args.depth_model is not None:
            name = bundled_depth_model() if args.depth_model == "phantom" else args.depth_model
            depth_model = MonocularDepth.from_pretrained(name)

        # 2. Poses, the fit, files
        check_writable(args.output_dir)
        posed = find_poses(
            frames,
            intrinsics,
            depth_model,
            args.refine_focal_length,
            use_structure_from_motion=args.path == "auto",
            seed=args.seed,
        )
        result = reconstruct(posed, args.num_gaussians, args.num_steps, args.num_basis, lpips, args.seed, args.backend)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        save_reconstruction(args.output_dir, result, args.fps, {"arguments": arguments})
    except (ValueError, OSError, ImportError) as error:
        print(f"reconstruct_scene.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    for views, scores in result.scores.items():
        shown = [
            f"{name} {score['mean']:.3f}" + ("" if score["std"] is None else f" ± {score['std']:.3f}")
            for name, score in scores.items()
        ]
        print(f"{views.replace('_', ' ')} views ({scores['psnr']['n']}): {', '.join(shown)}")
    print(f"{args.output_dir}: scene.ply, beside_source.mp4, orbit.mp4, reconstruction.json")


if __name__ == "__main__":
    main()
