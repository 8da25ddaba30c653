"""Time, cores and memory of `endora prepare`: ten times the videos, all cores, the largest rows.

    python benchmarks/prepare_corpus.py

Every preparation runs in a process of its own, whose resident memory (with that of its children) is read from /proc
every 50 ms; Linux only. The videos are generated. Seconds are those of the preparation, without Python's imports.

- size: the time and CPU time of a video, and the memory, at 10,000 tiny videos over those at 1,000 in the same run.
- cores: CPU seconds over wall seconds times cores, and wall seconds, over those of bare processes, one per core, which
  do the same encoding or rendering and nothing else: what threads lose by Python's lock, and all book-keeping.
- rows: memory with videos as large as a row may be.

The ratios hold on a machine that is not idle, too; utilisation itself does not.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_endora.data.corpora import num_cores
from diffusers_endora.data.corpora.corpus import MAX_VIDEO_BYTES, SourceVideo
from diffusers_endora.data.corpora.phantom import Phantom, PhantomConfig
from diffusers_endora.data.corpora.prepare import prepare_corpus
from diffusers_endora.data.transcode import transcode_video
from diffusers_endora.data.video_io import write_video

PHANTOM = PhantomConfig(name="videos", num_videos=4 * num_cores())


def write_drifting_video(path: Path, seed: int, num_frames: int, height: int, width: int) -> None:
    """A smooth texture that drifts, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, : width + num_frames] / 40
    waves = [np.sin(a * rows + b * columns + c) for a, b, c in rng.uniform(-3, 3, (3, 3))]
    texture = (np.stack(waves, axis=-1) * 80 + 128).astype(np.int16)
    frames = np.stack([texture[:, i : i + width] + rng.integers(-6, 7, (height, width, 1)) for i in range(num_frames)])
    write_video(path, frames.clip(0, 255).astype(np.uint8), 25)


# --- one preparation, watched ----------------------------------------------------------------------------------------


def prepare_and_tell(arguments: dict[str, Any]) -> None:
    """What the watched process does."""
    options = arguments.pop("options")
    before = os.times()
    prepared = prepare_corpus(output_dir=Path(arguments.pop("output_dir")), **arguments, **options)
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])  # with the children's
    print(json.dumps({"seconds": prepared.took, "cpu": cpu, "videos": prepared.summary["videos"]}))


def resident_mib(pid: int) -> float:
    """Of a process and its children; 0 when it has ended."""
    try:
        of_threads = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    own = pages * resource.getpagesize() / 2**20
    return own + sum(resident_mib(int(child)) for children in of_threads for child in children)


def watched(corpus: str, data_dir: Path | None, **arguments: Any) -> dict[str, Any]:
    """Prepares in a process of its own; seconds, CPU seconds, and a list `memory` of MiB over time."""
    names = ("config_name", "file_format", "num_proc")
    with tempfile.TemporaryDirectory() as temporary:
        call = {name: arguments.pop(name) for name in names if name in arguments}
        call |= {"corpus": corpus, "data_dir": data_dir and str(data_dir), "output_dir": f"{temporary}/out"}
        command = [sys.executable, __file__, "--only", json.dumps(call | {"options": arguments})]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        memory = []
        while process.poll() is None:
            memory.append(resident_mib(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        told = process.stdout.read()
        if process.returncode:
            raise RuntimeError(f"the preparation of {corpus} failed")
        return json.loads(told.splitlines()[-1]) | {"memory": memory}


# --- the parts -------------------------------------------------------------------------------------------------------


def measure_size(folder: Path, counts: list[int]) -> None:
    patterns = [folder / f"pattern_{i}.mp4" for i in range(20)]
    for i, path in enumerate(patterns):
        write_drifting_video(path, i, 8, 32, 32)
    per_video, cpu_per_video, peaks = [], [], []
    for count in counts:
        raw = folder / f"raw_{count}"
        raw.mkdir()
        for i in range(count):
            shutil.copyfile(patterns[i % len(patterns)], raw / f"{i + 1:05d}.mp4")
        result = watched("colonoscopic", raw, short_side=16)
        assert result["videos"] == count
        of_work = [mib for mib in result["memory"] if mib > 0]
        tenths = [max(part) for part in np.array_split(np.array(of_work[len(of_work) // 10 :]), 10)]
        per_video.append(result["seconds"] / count)
        cpu_per_video.append(result["cpu"] / count)
        peaks.append(max(of_work))
        print(
            f"{count:6d} videos  {result['seconds']:6.1f} s  {1000 * per_video[-1]:5.2f} ms and "
            f"{1000 * cpu_per_video[-1]:5.2f} CPU ms a video  peak {peaks[-1]:4.0f} MiB, by tenths of the time "
            f"{' '.join(f'{mib:.0f}' for mib in tenths)}",
            flush=True,
        )
        shutil.rmtree(raw)
    print(
        f"{counts[-1]} over {counts[0]} videos: time a video x {per_video[-1] / per_video[0]:.2f}, CPU time a video x "
        f"{cpu_per_video[-1] / cpu_per_video[0]:.2f}, peak memory x {peaks[-1] / peaks[0]:.3f}"
    )


def transcode_share(paths: list[Path], folder: Path) -> None:
    for path in paths:
        transcode_video(path, folder / path.name, 128)


def render_share(videos: list[SourceVideo], folder: Path) -> None:
    for video in videos:
        (folder / video.video_id).mkdir()
        Phantom.write_rows(video, folder / video.video_id, PHANTOM)


def bare_processes(share: Callable[[list[Any], Path], None], work: list[Any]) -> tuple[float, float]:
    """Wall and CPU seconds of one process per core, each with its share of the work."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as temporary:
        processes = [
            context.Process(target=share, args=(work[i :: num_cores()], Path(temporary))) for i in range(num_cores())
        ]
        before, start = os.times(), time.perf_counter()
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        after, seconds = os.times(), time.perf_counter() - start
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return seconds, cpu


def measure_cores(folder: Path, repeats: int) -> None:
    raw = folder / "raw"
    raw.mkdir()
    num_videos = 4 * num_cores()
    for i in range(num_videos):
        write_drifting_video(raw / f"{i + 1:05d}.mp4", i, 100, 480, 640)
    kinds: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("640x480 videos to 128", transcode_share, sorted(raw.iterdir()), {"data_dir": raw, "short_side": 128}),
        ("phantom of 64x128x128", render_share, Phantom.read_folder(None, PHANTOM).videos, {"data_dir": None}),
    ]
    for name, share, work, options in kinds:
        corpus = "colonoscopic" if options["data_dir"] else "phantom"
        if corpus == "phantom":
            options |= {"num_videos": num_videos, "num_frames": PHANTOM.num_frames}
        utilisation: list[float] = []
        of_bare: list[float] = []
        ratios: list[float] = []
        peak = 0.0
        for _ in range(repeats):
            seconds, cpu = bare_processes(share, work)
            of_bare.append(cpu / (seconds * num_cores()))
            result = watched(corpus, **options)
            utilisation.append(result["cpu"] / (result["seconds"] * num_cores()))
            ratios.append(result["seconds"] / seconds)
            peak = max(peak, *result["memory"])
        print(
            f"{name}, {num_videos} on {num_cores()} cores: utilisation {spread(utilisation)}, of bare processes "
            f"{spread(of_bare)}; time over theirs {spread(ratios)}; peak {peak:.0f} MiB",
            flush=True,
        )


def spread(values: list[float]) -> str:
    return f"{np.median(values):.2f} (min {min(values):.2f}, max {max(values):.2f})"


def measure_rows(folder: Path) -> None:
    raw = folder / "raw"
    raw.mkdir()
    for i in range(3):
        path = raw / f"{i + 1:05d}.mp4"
        write_drifting_video(path, i, 8, 32, 32)
        padding = MAX_VIDEO_BYTES - path.stat().st_size
        with path.open("ab") as file:  # a box that readers skip
            file.write(padding.to_bytes(4, "big") + b"free")
            file.write(os.urandom(padding - 8))
    small = folder / "small"
    small.mkdir()
    write_drifting_video(small / "00001.mp4", 0, 8, 32, 32)
    floor = max(watched("colonoscopic", small)["memory"])
    for file_format in ("parquet", "webdataset"):
        peak = max(watched("colonoscopic", raw, file_format=file_format)["memory"])
        largest = MAX_VIDEO_BYTES / 2**20
        print(
            f"three videos of {largest:.0f} MiB, {file_format}: peak {peak:.0f} MiB, {peak - floor:.0f} more than a "
            f"tiny one takes = {(peak - floor) / largest:.2f} x the largest row",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 3000, 10000], help="of tiny videos")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of (bare processes, preparation)")
    parser.add_argument("--parts", nargs="+", choices=["size", "cores", "rows"], default=["size", "cores", "rows"])
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        prepare_and_tell(json.loads(args.only))
        return
    for part in args.parts:
        with tempfile.TemporaryDirectory() as temporary:
            if part == "size":
                measure_size(Path(temporary), args.counts)
            elif part == "cores":
                measure_cores(Path(temporary), args.repeats)
            else:
                measure_rows(Path(temporary))


if __name__ == "__main__":
    main()
