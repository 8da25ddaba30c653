"""How near reconstructions of rendered colons come to the truth: depth, poses, held-out views.

    python benchmarks/reconstruction.py --output_dir outputs/reconstruction --depth_model phantom

Each colon (a seed of the test split) is reconstructed by each path: `given`, with the true poses and the true depth
where the Gaussians start, which leaves the renderer's errors alone; `sfm`, structure from motion; `sfm_depth`, the
same with the depth model's depth between the points; `monocular`, the depth model and photometric alignment. Depth is
that of the fitted scene in all frames and in the held-out ones, after one factor per clip (the median ratio); poses
after the best similarity, in mm. Means and standard deviations are over colons. A path that fails is reported with
its sentence and counted. What is done stays in the folder, a json per reconstruction.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_endora.bundled import bundled_depth_model
from diffusers_endora.data.phantom import PhantomClip, render_phantom_clip
from diffusers_endora.downstream.reconstruction.cameras import pose_errors
from diffusers_endora.downstream.reconstruction.monocular_depth import MonocularDepth
from diffusers_endora.downstream.reconstruction.reconstruct import (
    PosedClip,
    find_poses,
    mean_and_std,
    reconstruct,
    with_given_poses,
)
from diffusers_endora.downstream.reconstruction.scene_files import save_reconstruction
from diffusers_endora.downstream.reconstruction.scores import depth_scores
from diffusers_endora.files import written_atomically

PATHS = ("given", "sfm", "sfm_depth", "monocular")
DECIMALS = {"held-out PSNR": 2, "seconds of processor": 0}


def pose(clip: PhantomClip, path: str, depth_model: MonocularDepth | None) -> PosedClip:
    """Poses of a clip by a path."""
    intrinsics = clip.intrinsics[0].astype(np.float64)
    if path == "given":
        return with_given_poses(clip.frames, intrinsics, clip.camera_to_world.astype(np.float64), clip.depth)
    if path == "monocular":
        return find_poses(clip.frames, intrinsics, depth_model, use_structure_from_motion=False)
    return find_poses(clip.frames, intrinsics, depth_model if path == "sfm_depth" else None)


def evaluate(clip: PhantomClip, path: str, depth_model: MonocularDepth | None, args: argparse.Namespace) -> Any:
    """Reconstruction and numbers of one clip by one path."""
    start = time.process_time()
    posed = pose(clip, path, depth_model)
    result = reconstruct(posed, args.num_gaussians, args.num_steps, args.num_basis)
    seconds = time.process_time() - start
    _, depth = result.render()
    truth, held_out = clip.depth[posed.indices], result.is_held_out
    numbers = {
        "held-out PSNR": result.scores["held_out"]["psnr"]["mean"],
        "held-out SSIM": result.scores["held_out"]["ssim"]["mean"],
        **{f"depth {name}": value for name, value in depth_scores(depth, truth).items()},
        **{f"held-out depth {name}": value for name, value in depth_scores(depth[held_out], truth[held_out]).items()},
        **{f"depth at the start {name}": value for name, value in depth_scores(posed.depth, truth).items()},
    }
    if path != "given":
        true_poses = clip.camera_to_world[posed.indices].astype(np.float64)
        numbers |= {f"pose {name}": value for name, value in pose_errors(posed.camera_to_world, true_poses).items()}
    if posed.registration_rate is not None:
        numbers["registration rate"] = posed.registration_rate
    return result, {**numbers, "seconds of processor": seconds}


def table(outcomes: dict[str, list[dict[str, Any]]]) -> str:
    """Mean ± standard deviation over clips, a column per path."""
    names = list(dict.fromkeys(name for rows in outcomes.values() for row in rows for name in row["numbers"]))
    lines = ["| | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 1) + "|"]
    for name in names:
        cells = []
        for rows in outcomes.values():
            values = [row["numbers"][name] for row in rows if name in row["numbers"]]
            digits = DECIMALS.get(name, 3)
            summary = mean_and_std(values) if values else None
            std = "" if summary is None or summary["std"] is None else f" ± {summary['std']:.{digits}f}"
            cells.append("-" if summary is None else f"{summary['mean']:.{digits}f}{std}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    counts = [f"{sum(not row['error'] for row in rows)} of {len(rows)}" for rows in outcomes.values()]
    lines.append("| clips reconstructed | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[9, 19, 29, 39, 49])
    parser.add_argument("--paths", choices=PATHS, nargs="+", default=PATHS)
    parser.add_argument("--depth_model", help="of the paths with depth: folder, Hub id, or `phantom`, the bundled one")
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second of flight, 10 to 18 mm")
    parser.add_argument("--num_gaussians", type=int, default=4000)
    parser.add_argument("--num_steps", type=int, default=300)
    parser.add_argument("--num_basis", type=int, default=4)
    args = parser.parse_args()
    if {"monocular", "sfm_depth"} & set(args.paths) and args.depth_model is None:
        parser.error("the paths `monocular` and `sfm_depth` need a --depth_model.")
    try:
        name = bundled_depth_model() if args.depth_model == "phantom" else args.depth_model
        depth_model = None if name is None else MonocularDepth.from_pretrained(name)
    except (ValueError, OSError) as error:
        sys.exit(f"reconstruction.py: error: {error}")
    if {"sfm", "sfm_depth"} & set(args.paths) and importlib.util.find_spec("pycolmap") is None:
        parser.error("the paths `sfm` and `sfm_depth` need pycolmap: pip install 'diffusers-endora[reconstruction]'.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = [args.num_frames, args.size, args.fps, args.num_gaussians, args.num_steps, args.num_basis]

    outcomes: dict[str, list[dict[str, Any]]] = {path: [] for path in args.paths}
    for seed in args.seeds:
        clip = None
        for path in args.paths:
            record = args.output_dir / f"{path}_{seed}.json"
            of_path = [*settings, args.depth_model if path in ("sfm_depth", "monocular") else None]
            if record.is_file() and (known := json.loads(record.read_text()))["settings"] == of_path:
                outcomes[path].append(known)
                continue
            if clip is None:
                clip = render_phantom_clip(seed, args.num_frames, args.size, args.size, instrument=False, fps=args.fps)
            print(f"seed {seed}, {path}", flush=True)
            row: dict[str, Any] = {"settings": of_path, "numbers": {}, "error": ""}
            try:
                result, row["numbers"] = evaluate(clip, path, depth_model, args)
                save_reconstruction(args.output_dir / f"{path}_{seed}", result, clip.fps, {"seed": seed})
            except ValueError as error:
                row["error"] = str(error)
                print(f"seed {seed}, {path}: failed: {error}")
            with written_atomically(record) as temporary:
                temporary.write_text(json.dumps(row, indent=1))
            outcomes[path].append(row)
    with written_atomically(args.output_dir / "table.md") as temporary:
        temporary.write_text(table(outcomes) + "\n", encoding="utf-8")
    print(table(outcomes))


if __name__ == "__main__":
    main()
