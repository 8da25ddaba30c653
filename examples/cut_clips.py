"""Cuts the clips that an evaluation takes from a corpus: what the best of models would generate.

    python examples/cut_clips.py VIDEOS --output_dir clips --num_clips 256 --frame_interval 1 --resolution 64
    endora evaluate --real TEST --fake clips --output report

Of training videos, they are the row that a table of models should have: what real clips of other videos score. They
lie at fixed offsets, spread evenly over all videos, as the real clips of `endora-strict`, and are written without
loss (FFV1).
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from diffusers_endora.data.video_io import VideoError, write_video
from diffusers_endora.files import replacing_entries
from diffusers_endora.metrics.clip_sources import open_videos
from diffusers_endora.metrics.protocols import PROTOCOLS

FPS = 8  # of what is written; an evaluation does not ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_clips", type=int, default=2048, help="at most")
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--frame_interval", type=int, help="instead of frames spread over --window")
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--resolution", type=int, default=128, help="side of the square that is cut out, in pixels")
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("num_clips", "num_frames", "frame_interval", "window")}
    try:
        if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
            raise ValueError(f"--output_dir {args.output_dir}: is not empty; choose another folder")
        protocol = PROTOCOLS["endora-strict"].changed(**shape)
        square = (args.resolution, args.resolution)
        prepare = protocol.changed(resolution=square).preparation(square, is_fake=False, codec="")
        clips = protocol.select_real(open_videos(args.videos))
        if not clips:
            raise ValueError(f"{args.videos}: no video has the {protocol.span} frames of a clip")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with replacing_entries(args.output_dir) as folder:
            for i, clip in enumerate(tqdm(clips, desc="cut", unit="clip")):
                write_video(folder / f"clip_{i:04d}.mkv", prepare(clip.read(), clip.key), FPS, codec="ffv1")
    except (ValueError, OSError, VideoError) as error:
        print(f"cut_clips.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.output_dir}: {len(clips)} clips")


if __name__ == "__main__":
    main()
