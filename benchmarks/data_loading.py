"""Clips per second of `ClipDataset`, against decoding the whole file for each clip as the official loader does.

    python benchmarks/data_loading.py
    python benchmarks/data_loading.py --video colonoscopy.mp4

The reference (CUHK-AIM-Group/Endora reads with `torchvision.io.read_video`, which is PyAV inside) decodes and converts
every frame of the file, stacks them, takes 16 of 48, resizes, crops and normalises these. It is timed twice: with
PyAV's default threads, and with frame threads on all cores, where it is fastest. Ours runs in one thread, so that data
workers multiply it: on the original file; on it as `endora prepare --transcode 128` writes it, as a file, as a row of
a Parquet dataset and streamed from the Parquet file. All give the same form of clip, and the pixels of the first are
compared for equal indices. Without --video, a video is made: h264 at FFmpeg's defaults (key frames 250 frames apart),
60 s, 25 fps, 768x576, from a rendered colon played to and fro under sensor noise.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import torch
from av.video.stream import VideoStream
from PIL import Image
from tqdm import tqdm

from diffusers_endora.data.clips import ClipDataset, resize_and_crop_clip, sample_window
from diffusers_endora.data.corpora.prepare import prepare_corpus
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.streaming_clips import StreamingClipDataset
from diffusers_endora.data.video_io import read_video_info


def write_original(path: Path, seconds: int) -> None:
    """The video that is made where none is given."""
    width, height, fps = 768, 576, 25
    drawn = render_phantom_clip(0, 60, height // 4, width // 4, fps=fps).frames
    to_and_fro = [*drawn, *drawn[-2:0:-1]]
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in tqdm(range(seconds * fps), desc="making a video", unit="frame"):
            enlarged = Image.fromarray(to_and_fro[i % len(to_and_fro)]).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            noise = rng.integers(-4, 5, (height, width, 1), dtype=np.int16)
            picture = np.clip(np.asarray(enlarged, np.int16) + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def whole_file_clip(path: Path, thread_type: str | None, indices: np.ndarray | None, rng: np.random.Generator):
    """A clip by decoding everything."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if thread_type is not None:
            stream.thread_type = thread_type
        frames = torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]))
    if indices is None:
        indices = sample_window(len(frames), 16, 48, rng)
    return resize_and_crop_clip(frames[torch.from_numpy(indices)].numpy(), 128, 128)


def endless(dataset: StreamingClipDataset) -> Iterator[torch.Tensor]:
    """Clips of a stream, epoch after epoch."""
    epoch = 0
    while True:
        dataset.set_epoch(epoch)
        yield from (item["video"] for item in dataset)
        epoch += 1


def seconds_per_clip(take: Callable[[], object], num_clips: int) -> float:
    start = time.perf_counter()
    for _ in range(num_clips):
        take()
    return (time.perf_counter() - start) / num_clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--video", type=Path, help="an original video file; made if absent")
    parser.add_argument("--seconds", type=int, default=60, help="length of the video that is made")
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which every way is timed once")
    parser.add_argument("--num_clips", type=int, default=20, help="clips of ours in a round; the references take one")
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as temporary:
        raw, prepared, files = (Path(temporary) / name for name in ("raw", "prepared", "files"))
        raw.mkdir()
        files.mkdir()
        original = raw / "00001.mp4"
        if args.video is None:
            write_original(original, args.seconds)
        else:
            shutil.copy(args.video, original)
        prepare_corpus("colonoscopic", raw, prepared, short_side=128)
        options = {"horizontal_flip": False, "antialias": False}
        row = ClipDataset(prepared, **options)  # type: ignore[arg-type]
        video = pq.read_table(prepared / "data", columns=["video"])["video"][0].as_py()["bytes"]
        (files / "00001.mp4").write_bytes(video)
        folder, transcoded = ClipDataset(raw, **options), ClipDataset(files, **options)  # type: ignore[arg-type]
        stream = endless(ClipDataset(prepared, streaming=True, clips_per_video=8, **options))  # type: ignore[arg-type]
        numbers = iter(range(10**9))
        rng = np.random.default_rng(0)
        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "whole file, PyAV's default threads": (1, lambda: whole_file_clip(original, None, None, rng)),
            "whole file, frame threads": (1, lambda: whole_file_clip(original, "FRAME", None, rng)),
            "original file": (args.num_clips, lambda: folder[next(numbers) % len(folder)]),
            "prepared, as a file": (args.num_clips, lambda: transcoded[next(numbers) % len(transcoded)]),
            "prepared, row of a dataset": (args.num_clips, lambda: row[next(numbers) % len(row)]),
            "prepared, streamed, 8 clips a row": (args.num_clips, lambda: next(stream)),
        }
        info, small = read_video_info(original), read_video_info(video)
        print(f"{info.num_frames} frames of {info.width}x{info.height}, {info.codec}, {original.stat().st_size} bytes")
        print(f"prepared: {small.num_frames} frames of {small.width}x{small.height}, {len(video)} bytes")
        indices = sample_window(info.num_frames, 16, 48, np.random.default_rng((0, 0, 0, 0, 0)))
        difference = (folder[0]["video"] - whole_file_clip(original, None, indices, rng)).abs().max().item()
        print(f"largest difference from the reference's pixels, original file: {difference}")

        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in tqdm(range(args.repeats), desc="rounds"):
            for name, (num_clips, take) in ways.items():
                times[name].append(seconds_per_clip(take, num_clips))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{cores} cores; ratios of clips per second, round by round: median (min to max)")
    references = list(islice(times, 2))
    print(f"{'':36s} {'ms a clip':>10s}   {'x ' + references[0]:>36s}   {'x ' + references[1]:>28s}")
    for name, values in times.items():
        cells = []
        for reference in references:
            ratios = [slow / fast for slow, fast in zip(times[reference], values, strict=True)]
            cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
        print(f"{name:36s} {1000 * statistics.median(values):10.1f}   {cells[0]:>36s}   {cells[1]:>28s}")


if __name__ == "__main__":
    main()
