"""Renders videos of one split of the phantom corpus into a folder of classes, which every other example can read.

    python examples/render_phantom.py --output_dir outputs/phantom/train --split train --num_videos 2000

Seeds, classes and splits are those of `endora prepare phantom`: a seed is one colon, its remainder by three the class,
its last digit the split. Videos that are there stay, so that a killed run goes on where it was and a larger
`--num_videos` adds to a corpus; `rendering.json` says of which split, length and size they are.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from diffusers_endora.data.corpora.phantom import split_of_seed
from diffusers_endora.data.phantom import CLASSES, render_phantom_clip
from diffusers_endora.data.video_io import write_video
from diffusers_endora.files import written_atomically


def seeds_of_split(split: str) -> Iterator[int]:
    """All seeds of a split, in order."""
    return (seed for seed in itertools.count() if split_of_seed(seed) == split)


def render(output_dir: Path, seed: int, num_frames: int, size: int) -> None:
    """Writes `output_dir/<class>/<class>_<seed>.mp4`, unless it is there."""
    label = CLASSES[seed % len(CLASSES)]
    path = output_dir / label / f"{label}_{seed:06d}.mp4"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = render_phantom_clip(seed, num_frames, size, size, polyp=label == "polyp", instrument=label == "instrument")
    write_video(path, clip.frames, clip.fps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--split", choices=["train", "validation", "test"], default="train")
    parser.add_argument("--num_videos", type=int, default=2000)
    parser.add_argument("--num_frames", type=int, default=32, help="8 a second")
    parser.add_argument("--size", type=int, default=128, help="side of the square frames, in pixels")
    parser.add_argument("--num_processes", type=int, default=2)
    args = parser.parse_args()
    for name in ("num_videos", "num_frames", "size", "num_processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    settings = {"split": args.split, "num_frames": args.num_frames, "size": args.size}
    record = args.output_dir / "rendering.json"
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if record.exists() and (of_others := json.loads(record.read_text())) != settings:
            raise ValueError(f"{args.output_dir}: holds videos of {of_others}; choose another --output_dir.")
        with written_atomically(record) as temporary:
            temporary.write_text(json.dumps(settings))
    except (ValueError, OSError) as error:
        sys.exit(f"render_phantom.py: error: {error}")
    seeds = itertools.islice(seeds_of_split(args.split), args.num_videos)
    with ProcessPoolExecutor(args.num_processes) as pool:
        videos = [pool.submit(render, args.output_dir, seed, args.num_frames, args.size) for seed in seeds]
        for video in tqdm(videos, desc=f"{args.split} videos"):
            video.result()


if __name__ == "__main__":
    main()
