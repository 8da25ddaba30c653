"""Splits one video in time: its beginning to train on, its end to test on.

    python examples/split_video.py VIDEO.mp4 --output_dir corpus --num_test_frames 100

writes `corpus/train/VIDEO.mp4` and `corpus/test/VIDEO.mp4` (H.264, every frame a key frame, see `transcode_video`).
The two show the same scene moments apart, so that a model is tested on what it has nearly seen: enough to try things
out, and nothing to report as held out.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

from diffusers_endora.data.transcode import encode_frames
from diffusers_endora.data.video_io import iterate_frames, read_video_info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_test_frames", type=int, required=True, help="at the end of the video")
    parser.add_argument("--short_side", type=int, default=128, help="pixels that the shorter side becomes")
    args = parser.parse_args()
    if args.short_side < 2:
        parser.error(f"--short_side {args.short_side}: expected 2 or more.")
    try:
        count = read_video_info(args.video).num_frames
        if not 0 < args.num_test_frames < count:
            raise ValueError(
                f"--num_test_frames {args.num_test_frames}: expected 1 to {count - 1}, of {count} frames."
            )
        frames = iterate_frames(args.video)
        for split, num_frames in (("train", count - args.num_test_frames), ("test", args.num_test_frames)):
            path = args.output_dir / split / f"{args.video.stem}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"{path}: {encode_frames(path, islice(frames, num_frames), args.short_side)} frames")
    except (ValueError, OSError) as error:
        sys.exit(f"split_video.py: error: {error}")


if __name__ == "__main__":
    main()
