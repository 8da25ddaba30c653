"""From a raw folder to Parquet or WebDataset shards that `load_dataset` reads, resumable at any moment.

Videos are encoded one by one into `OUT.incomplete/units`, each appearing whole; when all are there they are packed
into `OUT.incomplete/packed`, which becomes `OUT` in one rename. What was killed goes on with the units that are there.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.parquet
from datasets.info import DatasetInfosDict
from filelock import FileLock, Timeout
from huggingface_hub import DatasetCard
from tqdm.auto import tqdm

from ..video_io import VideoError
from . import corpus_class
from .corpus import SPLITS, CorpusBuilder, CorpusConfig, Rejection, SourceVideo, changed_config, stamp

FileFormat = Literal["parquet", "webdataset"]

RECORD = "prepared.json"  # in OUT: what it was made from and what is in it
_UNIT = "unit.json"
_VERSION = 1  # of the units and shards: raised when the same input gives other bytes
_ROW_GROUP_BYTES = 2**26  # about what is held in memory at a time, unless one row is larger


@dataclass(frozen=True)
class Prepared:
    """What `prepare_corpus` made.

    Attributes:
        output_dir: the folder.
        summary: counts of videos, rows, frames, seconds and classes, by split and in all.
        rejected: what was left out.
        notes: what a person should know.
        was_there: it had been prepared before from the same files with the same options.
    """

    output_dir: Path
    summary: dict[str, Any]
    rejected: list[Rejection]
    notes: list[str]
    was_there: bool = False


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
    `prepared.json`; it appears when it is complete. The same input gives the same bytes, interrupted or not.

    Args:
        corpus: a name of `CORPORA`.
        data_dir: the raw folder; None for the phantom.
        config_name: `"videos"`, `"clips"` or another config of the corpus.
        num_proc: videos that are encoded at a time, each by one thread; None: one per core.
        max_shard_bytes: a shard is closed when it has this many bytes of video.
        options: of the corpus' config, such as `short_side` and `quality`.

    Raises:
        ValueError: an argument is not as described, the raw folder is not as expected, nothing in it is usable, or
            `output_dir` holds something else.
        OSError: the target is full or cannot be written to. What is done stays for the next try.
    """
    builder = corpus_class(corpus)
    config = choose_config(builder, config_name, data_dir, options)
    output = Path(output_dir).absolute()
    if file_format not in ("parquet", "webdataset"):
        raise ValueError(f"format {file_format!r}: expected parquet or webdataset.")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc={num_proc}: expected a positive integer.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; expected a folder.")

    # 1. What there is to do
    found = builder.read_folder(None if data_dir is None else Path(data_dir), config)
    settings = [_VERSION, corpus, config.options()]
    keys = {video.video_id: unit_key(video, settings) for video in found.videos}
    content = [[video.source, video.split, keys[video.video_id], video.labels] for video in found.videos]
    identity = digest([settings, file_format, max_shard_bytes, content])
    work = output.with_name(f"{output.name}.incomplete")
    if output.is_dir() and any(output.iterdir()):
        earlier = read_record(output)
        if earlier is None or earlier["identity"] != identity:
            what = "other files or options" if earlier else "something else"
            raise ValueError(f"{output}: holds what was made from {what}; choose another folder or remove it.")
        shutil.rmtree(work, ignore_errors=True)
        rejected = [Rejection(**r) for r in map(json.loads, (output / "rejected.jsonl").read_text().splitlines())]
        return Prepared(output, earlier["summary"], rejected, found.notes, was_there=True)
    units = work / "units"
    units.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            # 2. Videos, as many at a time as there are cores
            for path in units.iterdir():
                if path.name not in keys.values():  # half-written, or of other options
                    shutil.rmtree(path)
            make_units(builder, config, found.videos, keys, units, num_proc or len(os.sched_getaffinity(0)))

            # 3. Shards, as a whole
            packed = work / "packed"
            shutil.rmtree(packed, ignore_errors=True)
            (packed / "data").mkdir(parents=True)
            rejected = list(found.rejected)
            unit_of = {video_id: units / key for video_id, key in keys.items()}
            summary = pack(
                builder, config, found.videos, unit_of, packed / "data", file_format, max_shard_bytes, rejected
            )
            if not summary["rows"]:
                raise ValueError(f"{data_dir}: no video is usable, such as {rejected[0].source}: {rejected[0].reason}")
            lines = [json.dumps(rejection.__dict__, ensure_ascii=False) + "\n" for rejection in rejected]
            (packed / "rejected.jsonl").write_text("".join(lines), encoding="utf-8")
            write_card(packed, builder, config, summary, found.layout, found.notes, len(rejected), file_format)
            record: dict[str, Any] = {
                "identity": identity,
                "corpus": corpus,
                "layout": found.layout,
                "config": config_name,
            }
            record |= {"options": config.options(), "format": file_format, "summary": summary}
            (packed / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            sync(packed)
            packed.replace(output)
    except Timeout as error:
        raise ValueError(f"{output}: another process is preparing it.") from error
    shutil.rmtree(work, ignore_errors=True)
    return Prepared(output, summary, rejected, found.notes)


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
    config = changed_config(configs[name], options)
    config.data_dir = None if data_dir is None else os.fspath(data_dir)
    return config


# --- units -----------------------------------------------------------------------------------------------------------


def make_units(
    builder: type[CorpusBuilder],
    config: CorpusConfig,
    videos: list[SourceVideo],
    keys: dict[str, str],
    units: Path,
    num_proc: int,
) -> None:
    """Makes the units that are not there. Threads suffice: what takes time releases Python's lock."""
    missing = [video for video in videos if not (units / keys[video.video_id]).is_dir()]
    with (
        tqdm(total=len(videos), initial=len(videos) - len(missing), desc=builder.CORPUS, unit="video") as progress,
        ThreadPoolExecutor(num_proc) as pool,
    ):
        futures = [pool.submit(make_unit, builder, config, video, units / keys[video.video_id]) for video in missing]
        try:
            for future in as_completed(futures):
                future.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make_unit(builder: type[CorpusBuilder], config: CorpusConfig, video: SourceVideo, unit: Path) -> None:
    """Writes one video's files and what is known of them, or why it is left out, into a folder that appears whole.

    Raises:
        OSError: the target is full or cannot be written to.
    """
    temporary = unit.with_name(f".{unit.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        content: dict[str, Any]
        try:
            rows = builder.write_rows(video, temporary, config)
            content = {"rows": rows, "misfits": builder.misfits(video, rows[0]["source_frames"])}
        except VideoError as error:
            for path in temporary.iterdir():
                path.unlink()
            content = {"rejected": reason(error, video)}
        (temporary / _UNIT).write_text(json.dumps(content), encoding="utf-8")
        temporary.rename(unit)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def reason(error: VideoError, video: SourceVideo) -> str:
    """The error's sentence without the names of the file that it may begin with."""
    return (
        str(error)
        .removeprefix(f"{video.path}: ")
        .removeprefix(f"{video.source}: ")
        .replace(f"{video.path.parent}/", "")
    )


def unit_key(video: SourceVideo, settings: list[Any]) -> str:
    """Names the unit of a video; another file or other options have another key."""
    try:
        of_file = stamp(video)
    except OSError:  # the phantom's has no file
        of_file = []
    return digest([settings, video.video_id, video.source, of_file, video.image_fps])[:20]


def digest(content: Any) -> str:
    """SHA-256 of what json can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(
    builder: type[CorpusBuilder],
    config: CorpusConfig,
    videos: list[SourceVideo],
    unit_of: dict[str, Path],
    data: Path,
    file_format: FileFormat,
    max_shard_bytes: int,
    rejected: list[Rejection],
) -> dict[str, Any]:
    """Writes the shards of all splits, one row group or sample at a time; adds to `rejected`; returns the summary."""
    features = builder.features(config)
    summary: dict[str, Any] = {"videos": 0, "rows": 0, "frames": 0, "seconds": 0.0, "splits": {}}
    with tqdm(total=len(videos), desc="packing", unit="video") as progress:
        for split in [split for split in SPLITS if any(video.split == split for video in videos)]:
            counts: dict[str, Any] = {"videos": 0, "rows": 0, "frames": 0, "seconds": 0.0, "classes": Counter()}

            def rows(split: str = split, counts: dict[str, Any] = counts) -> Iterator[tuple[str, dict[str, Any]]]:
                for video in videos:
                    if video.split != split:
                        continue
                    progress.update()
                    unit = unit_of[video.video_id]
                    content = json.loads((unit / _UNIT).read_text(encoding="utf-8"))
                    if "rejected" in content:
                        rejected.append(Rejection(video.source, content["rejected"]))
                        continue
                    try:
                        for fact in content["rows"]:
                            key, row = builder.complete_row(video, fact, unit)
                            counts["rows"] += 1
                            counts["frames"] += row["num_frames"]
                            counts["seconds"] += row["num_frames"] / row["fps"]
                            if row.get("label") is not None:
                                counts["classes"][row["label"]] += 1
                            yield key, row
                    except VideoError as error:
                        rejected.append(Rejection(video.source, reason(error, video)))
                        continue
                    rejected.extend(Rejection(video.source, misfit) for misfit in content["misfits"])
                    counts["videos"] += 1

            write = write_parquet if file_format == "parquet" else write_webdataset
            num_shards = write(data, split, rows(), features, max_shard_bytes)
            if counts["rows"]:
                counts["seconds"] = round(counts["seconds"], 3)
                counts["classes"] = dict(sorted(counts["classes"].items()))
                summary["splits"][split] = counts | {"shards": num_shards}
    for name in ("videos", "rows", "frames", "seconds"):
        summary[name] = round(sum(counts[name] for counts in summary["splits"].values()), 3)
    return summary


def write_parquet(
    data: Path,
    split: str,
    rows: Iterator[tuple[str, dict[str, Any]]],
    features: datasets.Features,
    max_shard_bytes: int,
) -> int:
    """Writes Parquet shards and returns their number. Row groups are small, as streaming reads one at a time."""
    schema = features.arrow_schema
    # Videos do not compress; statistics and dictionaries of them would only cost memory
    columns = [name for name in parquet_columns(schema) if name != "video.bytes"]
    options: dict[str, Any] = {
        "compression": dict.fromkeys(columns, "SNAPPY") | {"video.bytes": "NONE"},
        "use_dictionary": columns,
        "write_statistics": columns,
    }
    shards: list[Path] = []
    writer: pyarrow.parquet.ParquetWriter | None = None
    group: list[dict[str, Any]] = []
    in_group = in_shard = 0

    def flush() -> None:
        nonlocal group, in_group
        if group:
            assert writer is not None
            table = datasets.Dataset.from_list(group, features=features).data.table
            writer.write_table(table.cast(schema).combine_chunks(), row_group_size=len(group))
            group, in_group = [], 0

    for _, row in rows:
        if writer is None:
            shards.append(data / f"{split}-{len(shards):05d}")
            writer = pyarrow.parquet.ParquetWriter(shards[-1], schema, **options)
            in_shard = 0
        size = size_of(row)
        if group and in_group + size > _ROW_GROUP_BYTES:
            flush()
        group.append(row)
        in_group += size
        in_shard += size
        if in_shard >= max_shard_bytes:
            flush()
            writer.close()
            writer = None
    flush()
    if writer is not None:
        writer.close()
    return name_shards(shards, ".parquet")


def size_of(row: dict[str, Any]) -> int:
    """Bytes of a row, roughly: of its video and its arrays."""
    arrays = sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))
    return len(row["video"]["bytes"]) + arrays


def parquet_columns(schema: Any) -> list[str]:
    """The names of a schema's leaves, as Parquet has them."""
    sink = io.BytesIO()
    pyarrow.parquet.ParquetWriter(sink, schema).close()
    parquet_schema = pyarrow.parquet.ParquetFile(sink).schema
    return [parquet_schema.column(i).path for i in range(len(parquet_schema))]


def write_webdataset(
    data: Path,
    split: str,
    rows: Iterator[tuple[str, dict[str, Any]]],
    features: datasets.Features,
    max_shard_bytes: int,
) -> int:
    """Writes tar shards and returns their number.

    A sample has `<key>.mp4` (or the video's own extension), `<key>.json` with the other columns, `<key>.cls` with the
    label as a number, where there is one, and `<key>.npz` with arrays.
    """
    shards: list[Path] = []
    tar: tarfile.TarFile | None = None
    in_shard = 0
    for key, row in rows:
        if tar is None:
            shards.append(data / f"{split}-{len(shards):05d}")
            tar = tarfile.open(shards[-1], "w")  # noqa: SIM115
            in_shard = 0
        name = key.replace(".", "_").replace("/", "-")
        video = row.pop("video")
        arrays = {column: value for column, value in row.items() if isinstance(value, np.ndarray)}
        others = {column: value for column, value in row.items() if column not in arrays}
        members = {Path(video["path"]).suffix: video["bytes"]}
        members[".json"] = json.dumps(others, ensure_ascii=False).encode()
        if others.get("label") is not None:
            members[".cls"] = str(features["label"].str2int(others["label"])).encode()
        if arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
            members[".npz"] = buffer.getvalue()
        for extension, content in members.items():
            member = tarfile.TarInfo(name + extension)  # its time is 1970, its owner 0
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            in_shard += len(content)
        if in_shard >= max_shard_bytes:
            tar.close()
            tar = None
    if tar is not None:
        tar.close()
    return name_shards(shards, ".tar")


def name_shards(shards: list[Path], extension: str) -> int:
    """Gives shards the names that say how many there are."""
    for path in shards:
        path.rename(path.with_name(f"{path.name}-of-{len(shards):05d}{extension}"))
    return len(shards)


def write_card(
    packed: Path,
    builder: type[CorpusBuilder],
    config: CorpusConfig,
    summary: dict[str, Any],
    layout: str,
    notes: list[str],
    num_rejected: int,
    file_format: FileFormat,
) -> None:
    """Writes README.md: the corpus' card, with what is in this folder."""
    card = DatasetCard((Path(__file__).parent / "cards" / f"{builder.CORPUS}.md").read_text(encoding="utf-8"))
    extension = {"parquet": "parquet", "webdataset": "tar"}[file_format]
    files = [{"split": split, "path": f"data/{split}-*.{extension}"} for split in summary["splits"]]
    card_data: Any = card.data
    card_data.configs = [{"config_name": config.name, "data_files": files, "default": True}]
    if file_format == "parquet":
        splits = datasets.SplitDict()
        for split, counts in summary["splits"].items():
            splits.add(datasets.SplitInfo(split, num_examples=counts["rows"]))
        info = datasets.DatasetInfo(features=builder.features(config), splits=splits)
        DatasetInfosDict({config.name: info}).to_dataset_card_data(card_data)
    lines = ["| split | videos | rows | frames | minutes | classes |", "|---|---|---|---|---|---|"]
    for split, counts in summary["splits"].items():
        classes = ", ".join(f"{name} {count}" for name, count in counts["classes"].items()) or "-"
        cells = [split, counts["videos"], counts["rows"], counts["frames"], f"{counts['seconds'] / 60:.1f}", classes]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    changed = {name: value for name, value in config.options().items() if value is not None}
    text = [
        "## This folder",
        "",
        f"Made from {layout} as config `{config.name}`: " + ", ".join(f"{k} {v}" for k, v in changed.items()) + ".",
        f"Left out, with reasons in `rejected.jsonl`: {num_rejected}.",
        *[f"Note: {note}." for note in notes],
        "",
        *lines,
    ]
    card.text = card.text.rstrip() + "\n\n" + "\n".join(text) + "\n"
    (packed / "README.md").write_text(str(card), encoding="utf-8")


def read_record(output: Path) -> dict[str, Any] | None:
    """`prepared.json` of an earlier run, or None where the folder is something else."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record["identity"], str) and "summary" in record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sync(folder: Path) -> None:
    """Brings the files of a folder to the disk, so that its new name never stands for less."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- publishing ------------------------------------------------------------------------------------------------------


def check_may_push(corpus: str, private: bool, has_the_right: bool) -> None:
    """Raises a ValueError where a public push would break the owners' terms."""
    builder = corpus_class(corpus)
    if not private and not builder.MAY_BE_PUBLISHED and not has_the_right:
        raise ValueError(
            f"{corpus} is not pushed publicly: {builder.TERMS}. Push it privately (--private, the default), or add "
            "--i_have_the_right if the owners have given you that right."
        )


def push_to_hub(folder: Path, repo_id: str, private: bool, api: Any = None) -> str:
    """Uploads a prepared folder to a dataset repository and returns its address.

    Raises:
        ValueError: the repository is public and the push should be private.
    """
    from huggingface_hub import HfApi

    api = HfApi() if api is None else api
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type="dataset").private:  # it was there before
        raise ValueError(f"{repo_id} is a public repository already; expected a private one, so nothing was uploaded.")
    api.upload_folder(folder_path=folder, repo_id=repo_id, repo_type="dataset", commit_message="Prepared corpus")
    return f"https://huggingface.co/datasets/{repo_id}"


Reporter = Callable[[str], None]


def report(prepared: Prepared, say: Reporter) -> None:
    """The summary, a line each."""
    summary = prepared.summary
    for note in prepared.notes:
        say(f"note: {note}")
    for split, counts in summary["splits"].items():
        classes = ", ".join(f"{name} {count}" for name, count in counts["classes"].items())
        say(
            f"{split}: {counts['videos']} videos, {counts['rows']} rows, {counts['frames']} frames, "
            f"{counts['seconds']:.1f} s" + (f" ({classes})" if classes else "")
        )
    if prepared.rejected:
        say(f"left out: {len(prepared.rejected)}, all in {prepared.output_dir / 'rejected.jsonl'}")
        for rejection in prepared.rejected[:5]:
            say(f"  {rejection.source}: {rejection.reason}")
    state = "was there already" if prepared.was_there else "written"
    say(
        f"{prepared.output_dir}: {summary['videos']} videos, {summary['rows']} rows, {summary['frames']} frames, "
        f"{summary['seconds']:.1f} s, {state}"
    )
