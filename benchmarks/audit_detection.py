"""What `endora audit` finds and what it takes for something it is not.

    python benchmarks/audit_detection.py
    python benchmarks/audit_detection.py --material ../shared/clips

Copies of frames and videos are changed in known ways and looked for; different scenes are compared with each other;
text is written into clean videos. Material: rendered colons, and, with --material, endoscopic stills (every image
below `hyperkvasir/` and `kvasir_capsule/` is a scene of its own) and a video (`cholecystectomy/endo.mp4`). Prints
tables for docs/results.md.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from diffusers_endora.data.audit.burned_in_text import TextDetector
from diffusers_endora.data.audit.examination import Examination, examine
from diffusers_endora.data.audit.frame_hash import hash_frame, to_grey
from diffusers_endora.data.audit.near_duplicates import CONFIRM, FIND, find_overlaps
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.video_io import list_images, read_frames, read_image, write_video


def resized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def half(frame: np.ndarray) -> np.ndarray:
    return resized(frame, frame.shape[1] // 2, frame.shape[0] // 2)


def cropped(frame: np.ndarray, share: float, place: float = 0.5) -> np.ndarray:
    height, width = (round(side * (1 - share)) for side in frame.shape[:2])
    top, left = round((frame.shape[0] - height) * place), round((frame.shape[1] - width) * place)
    return frame[top : top + height, left : left + width]


def brighter(frame: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(frame * factor, 0, 255).astype(np.uint8)


def encoded(frame: np.ndarray, crf: int) -> np.ndarray:
    even = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
    with tempfile.TemporaryDirectory() as folder:
        return read_frames(write_video(Path(folder, "a.mp4"), np.stack([even] * 3), 25, crf=crf), [2])[0]


def official_still(frame: np.ndarray) -> np.ndarray:
    """As the official preparation makes it: short side to 128, centre crop, JPEG of quality 75."""
    scale = 128 / min(frame.shape[:2])
    small = resized(frame, max(128, round(frame.shape[1] * scale)), max(128, round(frame.shape[0] * scale)))
    top, left = (small.shape[0] - 128) // 2, (small.shape[1] - 128) // 2
    buffer = io.BytesIO()
    Image.fromarray(small[top : top + 128, left : left + 128]).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "H.264, CRF 30": lambda frame: encoded(frame, 30),
    "H.264, CRF 40": lambda frame: encoded(frame, 40),
    "half size": half,
    "10 % brighter": lambda frame: brighter(frame, 1.1),
    "20 % darker": lambda frame: brighter(frame, 0.8),
    "half size, brighter, CRF 30": lambda frame: encoded(brighter(half(frame), 1.1), 30),
    "128x128 JPEG of the official preparation": official_still,
    "5 % cropped": lambda frame: cropped(frame, 0.05),
    "5 % cropped, half size, CRF 30": lambda frame: encoded(half(cropped(frame, 0.05)), 30),
    "5 % cropped from one corner": lambda frame: cropped(frame, 0.05, 0),
    "10 % cropped": lambda frame: cropped(frame, 0.10),
}


def hash_of(frame: np.ndarray) -> np.ndarray:
    found = hash_frame(to_grey(frame))
    assert found is not None
    return found


def distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differing bits of 64 and of 256."""
    bits = np.bitwise_count(a ^ b)
    return bits[..., 0], bits.sum(axis=-1)


def frames_section(stills: list[np.ndarray], rendered: list[np.ndarray]) -> None:
    print(f"\nFrames: {len(stills)} endoscopic stills, {len(rendered)} rendered, each of another scene\n")
    print("| change | found | bits of 64, median (largest) | bits of 256, median (largest) |\n|---|---|---|---|")
    scenes = stills + rendered[: max(60, len(stills))]
    originals = np.array([hash_of(scene) for scene in scenes])
    for name, change in CHANGES.items():
        quick, all_bits = distances(np.array([hash_of(change(scene)) for scene in scenes]), originals)
        found = (quick <= FIND) & (all_bits <= CONFIRM)
        print(
            f"| {name} | {found.mean():.1%} | {np.median(quick):.0f} ({quick.max()}) | "
            f"{np.median(all_bits):.0f} ({all_bits.max()}) |"
        )
    everything = np.array([hash_of(frame) for frame in stills + rendered])
    quick, all_bits = distances(everything[:, None], everything[None])
    pairs = np.triu_indices(len(everything), 1)
    both = (quick <= FIND) & (all_bits <= CONFIRM)
    print(
        f"\nDifferent scenes, {len(pairs[0])} pairs: {both[pairs].sum()} taken for the same; within {FIND} of 64 bits "
        f"{(quick[pairs] <= FIND).mean():.1e}; nearest {all_bits[pairs].min()} of 256 bits, median "
        f"{np.median(all_bits[pairs]):.0f}, standard deviation {all_bits[pairs].std():.1f} (threshold {CONFIRM})"
    )


def excerpts_section(folder: Path, num_excerpts: int) -> None:
    print(
        "\nExcerpts, encoded anew at CRF 30 and half the rate, of a rendered flight of 90 s at 12 frames per second\n"
    )
    flight = render_phantom_clip(0, 1080, 96, 96, fps=12).frames
    other = examine(write_video(folder / "other.mp4", render_phantom_clip(1, 360, 96, 96, fps=12).frames, 12))
    whole = examine(write_video(folder / "whole.mp4", flight, 12))
    rng = np.random.default_rng(0)
    print(
        "| seconds | found | frames of the excerpt with a partner, median | found in another flight |\n"
        "|---|---|---|---|"
    )
    for seconds in (2, 5, 10, 30, 60):
        excerpts: list[Examination] = []
        for _ in range(num_excerpts):
            start = int(rng.integers(0, len(flight) - 12 * seconds))
            part = flight[start : start + 12 * seconds : 2]
            excerpts.append(examine(write_video(folder / "part.mp4", part, 6, crf=30)))
        hits, shares, wrong = 0, [], 0
        for excerpt in excerpts:
            found = find_overlaps([whole.hashes, excerpt.hashes], range(2), 1)
            hits += len(found)
            shares.append(found[0].shares[1] if found else 0.0)
            wrong += len(find_overlaps([other.hashes, excerpt.hashes], range(2), 1))
        print(f"| {seconds} | {hits} of {num_excerpts} | {np.median(shares):.0%} | {wrong} |")


def with_text(frames: np.ndarray, x: int, y: int, text: str, size: int, colour: str) -> np.ndarray:
    """Frames with text on them, edges of letters smoothed."""
    height, width = frames.shape[1:3]
    cover = Image.new("L", (width, height))
    ImageDraw.Draw(cover).text((x, y), text, fill=255, font=ImageFont.load_default(size))
    share = np.asarray(cover, np.float32)[..., None] / 255
    ink = np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)), np.float32)
    return (frames * (1 - share) + ink * share).round().astype(np.uint8)


def text_in(frames: np.ndarray, crf: int | None, folder: Path) -> bool:
    if crf is not None:
        frames = read_frames(write_video(folder / "text.mp4", frames, 25, crf=crf), np.arange(len(frames)))
    detector = TextDetector()
    for frame in frames:
        detector.add(frame)
    return bool(detector.regions())


def text_section(folder: Path, video: Path | None, num_rendered: int) -> None:
    print("\nText, in the border and over the view, white, yellow, green and black, H.264 at CRF 23 and 30\n")
    print("| material | letters, pixels | found |\n|---|---|---|")
    clean = [
        render_phantom_clip(seed, 16, 128, 128, fps=8, instrument=seed % 2 == 0).frames
        for seed in tqdm(range(num_rendered), desc="rendering", leave=False)
    ]
    for size in (10, 12):
        places = [(4, 4, "JANE DOE", "white"), (40, 70, "12/04/61", "white"), (60, 110, "ID 0482", "yellow")]
        found = [
            text_in(with_text(frames, x, y, text, size, colour), 23, folder)
            for frames in clean[:12]
            for x, y, text, colour in places
        ]
        print(f"| rendered, 128x128 | {size} | {sum(found)} of {len(found)} |")
    false = sum(text_in(frames, None, folder) for frames in clean)
    num_clean = len(clean)
    if video is not None:
        frames = read_frames(video, np.linspace(0, 249, 16).astype(int))
        for size in (10, 12, 14, 18, 24, 36, 48):
            items = [
                (20, 30, "DOE, JANE  F 1961-04-12", "white"),
                (20, 300, "ID 0048213", "yellow"),
                (500, 400, "DOE, JANE  F 1961", "white"),
                (560, 500, "12:34:56", "lime"),
                (600, 560, "Dr. Smith", "black"),
            ]
            found = [
                text_in(with_text(frames, x, y, text, size, colour), crf, folder)
                for x, y, text, colour in items
                for crf in (23, 30)
            ]
            print(f"| laparoscopy, 1280x720 | {size} | {sum(found)} of {len(found)} |")
        for start in range(0, 234, 26):
            for step in (1, 2, 4, 6):  # also at 640x360, 320x180 and 213x120
                part = read_frames(video, np.arange(start, start + 16))[:, ::step, ::step]
                false += text_in(part, None, folder)
                num_clean += 1
    print(f"\nClean videos, 16 frames each: text seen in {false} of {num_clean}")


def speed_section(num_videos: int, frames_each: int) -> None:
    rng = np.random.default_rng(0)
    hashes = [rng.integers(0, 2**64, (frames_each, 4), dtype=np.uint64) for _ in range(num_videos)]
    hashes[-1] = hashes[0]
    start = time.perf_counter()
    found = find_overlaps(hashes, range(num_videos))
    seconds = time.perf_counter() - start
    pairs = num_videos * (num_videos - 1) / 2 * frames_each**2
    print(
        f"\nComparing {num_videos} videos of {frames_each} random hashes: {seconds:.0f} s, "
        f"{seconds / pairs * 1e9:.2f} ns a pair of hashes, mirrored ones included; {len(found)} of 1 pair found"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--material", type=Path, help="folder with hyperkvasir/, kvasir_capsule/, cholecystectomy/")
    parser.add_argument("--num_rendered", type=int, default=400, help="rendered scenes; default 400")
    parser.add_argument("--num_excerpts", type=int, default=20, help="of each length; default 20")
    parser.add_argument("--num_videos", type=int, default=10_000, help="of the timing; default 10000")
    args = parser.parse_args()
    stills, video = [], None
    if args.material is not None:
        folders = [args.material / name for name in ("hyperkvasir", "kvasir_capsule")]
        stills = [read_image(path) for folder in folders for path in list_images(folder)]
        video = args.material / "cholecystectomy" / "endo.mp4"
    seeds = tqdm(range(1000, 1000 + args.num_rendered), desc="rendering", leave=False)
    rendered = [render_phantom_clip(seed, 1, 96, 96).frames[0] for seed in seeds]
    frames_section(stills, rendered)
    with tempfile.TemporaryDirectory() as folder:
        excerpts_section(Path(folder), args.num_excerpts)
        text_section(Path(folder), video, 60)
    speed_section(args.num_videos, 32)


if __name__ == "__main__":
    main()
