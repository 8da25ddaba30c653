"""From a raw folder to Parquet or WebDataset shards that `load_dataset` reads, resumable at any moment.

Videos are made ready one by one in `OUT.incomplete/units`, each appearing whole; when all are there they are packed
into `OUT.incomplete/packed`, which becomes `OUT` in one rename. What was killed goes on with the units that are there.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import av
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..transcode import TARGET_ERRORS, cancelled_when
from ..video_io import VideoError, forget_videos
from . import corpus_class, num_cores
from .corpus import (
    MAX_VIDEO_BYTES,
    SPLITS,
    CorpusBuilder,
    CorpusConfig,
    Rejection,
    SourceVideo,
    changed_config,
    is_row_as_it_is,
    stamp,
)
from .packing import FileFormat, write_shards
from .publishing import write_card
from .summary import count_row, new_counts, summary_lines

RECORD = "prepared.json"  # in OUT: what it was made from and what is in it
REJECTED = "rejected.jsonl"
_UNIT = "unit.json"
_VERSION = 1  # of the units and shards: raised when the same input gives other bytes


@dataclass(frozen=True)
class Prepared:
    """What `prepare_corpus` made.

    Attributes:
        output_dir: the folder.
        summary: counts of videos, rows, frames, seconds and, by column, classes; by split and in all.
        rejected: what was left out.
        notes: what a person should know.
        took: seconds of this run; None where it had been prepared before, from the same files with the same options.
    """

    output_dir: Path
    summary: dict[str, Any]
    rejected: list[Rejection]
    notes: list[str]
    took: float | None


@dataclass(frozen=True)
class Task:
    """What there is to do.

    Attributes:
        builder, config: the corpus and how rows are made from it.
        settings: what decides a unit beside its video.
        videos: those of the raw folder.
        stamps: `stamp_of` the videos at the beginning, by id.
        units: the folder of the units.
    """

    builder: type[CorpusBuilder]
    config: CorpusConfig
    settings: dict[str, Any]
    videos: list[SourceVideo]
    stamps: dict[str, list[int]]
    units: Path

    def unit(self, video: SourceVideo) -> Path:
        """Where the video's unit is, or will be; another file, other options or another encoder have another one."""
        file = [video.video_id, video.source, self.stamps[video.video_id], video.image_fps]
        return self.units / digest([_VERSION, av.__version__, self.settings, file])[:20]

    def check_unchanged(self, video: SourceVideo) -> None:
        """Raises a ValueError for a video that is another than it was at the beginning."""
        if stamp_of(video) != self.stamps[video.video_id]:
            raise ValueError(f"{video.path}: has changed since the preparation began; run it again.")


def prepare_corpus(
    corpus: str,
    data_dir: str | os.PathLike[str] | None,
    output_dir: str | os.PathLike[str],
    config_name: str = "videos",
    file_format: FileFormat = "parquet",
    num_proc: int | None = None,
    max_shard_bytes: int = 500_000_000,
    **options: Any,
) -> Prepared:
    """Writes a corpus as shards with a card.

    `output_dir` has `data/<split>-00000-of-00001.parquet` (or `.tar`), `README.md`, `rejected.jsonl` and
    `prepared.json`; it appears when it is complete. Until then `<output_dir>.incomplete` takes up to twice its size.
    The same input gives the same bytes, interrupted or not and whatever `num_proc` is.

    Args:
        corpus: a name of `CORPORA`.
        data_dir: the raw folder; None for the phantom.
        config_name: `"videos"`, `"clips"` or another config of the corpus.
        num_proc: videos that are encoded at a time, each by one thread; None: one per core.
        max_shard_bytes: a shard is closed when it has this many bytes.
        options: of the corpus' config, such as `short_side` and, of what is encoded, `quality`.

    Raises:
        ValueError: an argument is not as described or has no effect, the raw folder is not as expected, nothing in it
            is usable, it changed meanwhile, `output_dir` holds something else, or another process prepares it.
        OSError: the target is full or cannot be written to. What is done stays for the next try.
    """
    start = time.perf_counter()
    builder = corpus_class(corpus)
    config = choose_config(builder, config_name, data_dir, options)
    if file_format not in get_args(FileFormat):
        raise ValueError(f"format {file_format!r}: expected one of {', '.join(get_args(FileFormat))}.")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc={num_proc}: expected a positive integer.")
    output = Path(output_dir).resolve()
    work = output.with_name(f"{output.name}.incomplete")
    check_places(output, work, data_dir)

    # 1. What there is to do
    found = builder.read_folder(None if data_dir is None else Path(data_dir), config)
    if "quality" in options and all(is_row_as_it_is(video, config) for video in found.videos):
        raise ValueError(
            f"quality={config.quality!r}: nothing is encoded without short_side (--transcode) or config clips; "
            "leave it out."
        )
    settings = {"corpus": corpus, "config": config_name, **config.options()}
    stamps = {video.video_id: stamp_of(video) for video in found.videos}
    task = Task(builder, config, settings, found.videos, stamps, work / "units")
    settings = settings | {"format": file_format, "max_shard_bytes": max_shard_bytes}
    content = [[v.video_id, v.source, v.split, stamps[v.video_id], v.labels] for v in found.videos]
    identity = digest([_VERSION, settings, content, [asdict(rejection) for rejection in found.rejected]])
    record = {"identity": identity, "settings": settings, "layout": found.layout}
    if (earlier := finished(output, record)) is not None:
        discard_work(work)
        return Prepared(output, *earlier, found.notes, None)
    packed = work / "packed"
    try:
        task.units.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", timeout=0):
            if (earlier := finished(output, record)) is not None:  # by another process, meanwhile
                discard_work(work)
                return Prepared(output, *earlier, found.notes, None)

            # 2. Videos, as many at a time as there are cores
            keep_units(task)
            make_units(task, num_proc or num_cores())

            # 3. Shards, as a whole
            shutil.rmtree(packed, ignore_errors=True)
            (packed / "data").mkdir(parents=True)
            rejected = list(found.rejected)
            features = builder.features(config)
            summary: dict[str, Any] = {"splits": {}}
            with tqdm(total=len(found.videos), desc="packing", unit="video") as progress:
                for split in SPLITS:
                    counts = new_counts(features)
                    rows = complete_rows(task, split, features, counts, rejected, progress)
                    shards = write_shards(packed / "data", split, rows, features, file_format, max_shard_bytes)
                    if shards:
                        counts["seconds"] = round(counts["seconds"], 3)
                        num_bytes = sum(path.stat().st_size for path in shards)
                        summary["splits"][split] = counts | {"shards": len(shards), "bytes": num_bytes}
            for name in ("videos", "rows", "frames", "seconds", "bytes"):
                summary[name] = round(sum(counts[name] for counts in summary["splits"].values()), 3)
            if not summary["rows"]:
                discard_work(work)
                example = rejected[len(found.rejected)]  # of the videos; those before are of other files, too
                raise ValueError(f"{data_dir}: no video is usable, such as {example.source}: {example.reason}")
            lines = [json.dumps(asdict(rejection), ensure_ascii=False) + "\n" for rejection in rejected]
            (packed / REJECTED).write_text("".join(lines), encoding="utf-8")
            (packed / RECORD).write_text(json.dumps(record | {"summary": summary}, indent=2) + "\n", encoding="utf-8")
            write_card(packed, builder, config, summary, found.layout, found.notes, len(rejected), file_format)
            bring_to_disk(packed)
            packed.replace(output)
            discard_work(work)
    except Timeout as error:
        raise ValueError(f"{output}: another process is preparing it.") from error
    except OSError as error:
        if error.errno not in TARGET_ERRORS:
            raise
        remedy = f"what is done is kept in {work}, the same command goes on with it"
        raise OSError(error.errno, f"{os.strerror(error.errno)}; {remedy}") from error
    return Prepared(output, summary, rejected, found.notes, time.perf_counter() - start)


def choose_config(
    builder: type[CorpusBuilder], name: str, data_dir: str | os.PathLike[str] | None, options: dict[str, Any]
) -> CorpusConfig:
    """The config of that name with other options.

    Raises:
        ValueError: the corpus has no such config or no such option, or a value is out of range.
    """
    configs = {config.name: config for config in builder.BUILDER_CONFIGS}
    if name not in configs:
        raise ValueError(f"config {name!r}: {builder.CORPUS} has {', '.join(configs)}.")
    if "clip_length" in options and configs[name].kind != "clips":
        raise ValueError(f"clip_length={options['clip_length']}: config {name!r} has no clips; choose config clips.")
    config = changed_config(configs[name], options)
    config.data_dir = None if data_dir is None else os.fspath(data_dir)
    return config


# --- places ----------------------------------------------------------------------------------------------------------


def check_places(output: Path, work: Path, data_dir: str | os.PathLike[str] | None) -> None:
    """Raises a ValueError where writing to `output` or `work` would harm something."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; expected a folder.")
    if output.is_mount():
        raise ValueError(f"{output}: is a mount point, which cannot be replaced; choose a folder in it.")
    if data_dir is not None and output.is_relative_to(Path(data_dir).resolve()):
        raise ValueError(f"{output}: lies in the raw folder {data_dir}; choose a folder elsewhere.")
    if work.exists() and not (
        work.is_dir() and {p.name for p in work.iterdir()} <= {"units", ".units", "packed", "lock"}
    ):
        raise ValueError(f"{work}: is not what an interrupted preparation leaves; move it away.")


def finished(output: Path, record: dict[str, Any]) -> tuple[dict[str, Any], list[Rejection]] | None:
    """Summary and rejections where `output` has been prepared already, None where nothing is there.

    Raises:
        ValueError: it holds something else, or what was made with other options or from other files.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return None
    remedy = "choose another folder or remove it."
    try:
        earlier = json.loads((output / RECORD).read_text(encoding="utf-8"))
        settings, summary = earlier["settings"], earlier["summary"]
        lines = (output / REJECTED).read_text(encoding="utf-8").split("\n")  # names may hold other line endings
        rejected = [Rejection(**json.loads(line)) for line in lines if line]
        is_same = earlier["identity"] == record["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output}: is not empty and holds no prepared corpus; {remedy}") from error
    if is_same:
        return summary, rejected
    for name in dict.fromkeys((*record["settings"], *settings)):
        was, now = settings.get(name), record["settings"].get(name)
        if was != now:
            raise ValueError(f"{output}: was prepared with {name} {was} and not {now}; {remedy}")
    raise ValueError(f"{output}: was prepared from other files, or the raw folder has changed since; {remedy}")


def discard(folder: Path) -> None:
    """Removes a folder; killed in between, what is left is not taken for whole."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}")
    if hidden != folder:
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
    shutil.rmtree(hidden)


def discard_work(work: Path) -> None:
    """Removes what a preparation leaves, if anything."""
    if (work / "units").is_dir():
        discard(work / "units")
    shutil.rmtree(work, ignore_errors=True)


def bring_to_disk(folder: Path) -> None:
    """Brings the files of a folder to the disk, so that after a power cut its new name does not stand for less."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- units -----------------------------------------------------------------------------------------------------------


def stamp_of(video: SourceVideo) -> list[int]:
    """What changes with the video's file; nothing where there is no file, as of the phantom."""
    try:
        return stamp(video)
    except OSError:
        return []


def digest(content: Any) -> str:
    """SHA-256 of what json can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def keep_units(task: Task) -> None:
    """Removes units that are half-written or of other files or options. Rejected videos are tried again."""
    expected = {task.unit(video) for video in task.videos}
    for path in task.units.iterdir():
        if path not in expected or not has_rows(path):
            discard(path)


def has_rows(unit: Path) -> bool:
    """Whether a unit is whole and its video not rejected."""
    try:
        return "rows" in read_unit(unit)
    except (OSError, ValueError):  # half-removed
        return False


def read_unit(unit: Path) -> dict[str, Any]:
    """What `make_unit` wrote: `rows`, or why the video is `rejected`."""
    return json.loads((unit / _UNIT).read_text(encoding="utf-8"))


def make_units(task: Task, num_proc: int) -> None:
    """Makes the units that are not there. Threads suffice: what takes time releases Python's lock."""
    missing = [video for video in task.videos if not task.unit(video).is_dir()]
    num_videos = len(task.videos)
    failed = threading.Event()

    def make(video: SourceVideo) -> None:
        with cancelled_when(failed.is_set):
            make_unit(task, video)

    with (
        tqdm(total=num_videos, initial=num_videos - len(missing), desc=task.builder.CORPUS, unit="video") as progress,
        ThreadPoolExecutor(num_proc) as pool,
    ):
        futures = [pool.submit(make, video) for video in missing]
        try:
            for future in as_completed(futures):
                future.result()
                progress.update()
        except BaseException:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make_unit(task: Task, video: SourceVideo) -> None:
    """Writes one video's files and what is known of them, or why it is left out, into a folder that appears whole.

    Raises:
        OSError: the target is full or cannot be written to.
        ValueError: the video changed meanwhile.
    """
    unit = task.unit(video)
    temporary = unit.with_name(f".{unit.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        content: dict[str, Any]
        try:
            rows = task.builder.write_rows(video, temporary, task.config)
            for row in rows:
                check_size(video.path if row["file"] is None else temporary / row["file"])
            content = {"rows": rows}
        except (VideoError, FileNotFoundError) as error:  # what vanished is said below
            for path in temporary.iterdir():
                path.unlink()
            content = {"rejected": reason(error, video, temporary)}
        task.check_unchanged(video)
        (temporary / _UNIT).write_text(json.dumps(content), encoding="utf-8")
        bring_to_disk(temporary)
        temporary.rename(unit)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        forget_videos()  # this one is not read again, and what is remembered grows with every frame


def check_size(path: Path) -> None:
    """Raises a VideoError for a file that is too large for a row."""
    size = path.stat().st_size
    if size > MAX_VIDEO_BYTES:
        raise VideoError(
            f"has {size / 2**20:.0f} MiB, and a row at most {MAX_VIDEO_BYTES / 2**20:.0f}; make it smaller "
            "(--transcode) or cut it (--config clips)"
        )


def reason(error: Exception, video: SourceVideo, folder: Path) -> str:
    """The error's sentence without the files that it may begin with and the folders it may name."""
    sentence = re.sub(rf"^(?:{re.escape(str(folder))}/[^:/]*): ", "", str(error))
    return (
        sentence.removeprefix(f"{video.path}: ").removeprefix(f"{video.source}: ").replace(f"{video.path.parent}/", "")
    )


# --- rows ------------------------------------------------------------------------------------------------------------


def complete_rows(
    task: Task,
    split: str,
    features: dict[str, Any],
    counts: dict[str, Any],
    rejected: list[Rejection],
    progress: tqdm,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and row of all rows of a split, from their units; adds to `counts` and `rejected`.

    Raises:
        ValueError: a video that goes into a row as it is has changed.
    """
    for video in [video for video in task.videos if video.split == split]:
        unit = task.unit(video)
        content = read_unit(unit)
        if "rejected" in content:
            rejected.append(Rejection(video.source, content["rejected"]))
        else:
            if any(row["file"] is None for row in content["rows"]):
                task.check_unchanged(video)
            for of_row in content["rows"]:
                key, row = task.builder.complete_row(video, of_row, unit)
                count_row(counts, features, row)
                yield key, row
                del row  # which may be large, before the next is read
            counts["videos"] += 1
            misfits = task.builder.misfits(video, content["rows"][0]["source_frames"])
            rejected.extend(Rejection(video.source, misfit) for misfit in misfits)
        progress.update()


def report(prepared: Prepared, say: Callable[[str], None]) -> None:
    """The summary, a line each."""
    summary = prepared.summary
    for line in (*[f"note: {note}" for note in prepared.notes], *summary_lines(summary)):
        say(line)
    if prepared.rejected:
        say(f"left out or doubtful: {len(prepared.rejected)}, all in {prepared.output_dir / REJECTED}")
        for rejection in prepared.rejected[:5]:
            say(f"  {rejection.source}: {rejection.reason}")
    state = "was there already" if prepared.took is None else f"written in {prepared.took:.1f} seconds"
    say(
        f"{prepared.output_dir}: {summary['videos']} videos, {summary['rows']} rows, {summary['frames']} frames, "
        f"{summary['seconds']:.1f} s, {summary['bytes'] / 1e6:.1f} MB, {state}"
    )
