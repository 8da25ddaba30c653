"""Which videos a corpus has, and in which split each of them is: of a folder, of shards, of an owner's raw folder."""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ..clip_rows import holds_shards, video_of
from ..clips import find_videos
from ..video_io import VIDEO_EXTENSIONS, VideoError, VideoSource

WHOLE = "all"  # the split of videos that say nothing of splits
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+$")
_ROW_COLUMNS = ("video_id", "start_frame")


@dataclass(frozen=True)
class InParquet:
    """A row of a Parquet file."""

    path: Path
    row_group: int
    index: int


@dataclass(frozen=True)
class InTar:
    """A member of an uncompressed tar file: where its bytes are."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class ListedVideo:
    """A video of a corpus, not opened yet.

    Attributes:
        name: the path below the corpus' folder; of a row the shard and the row's id.
        split: `"train"`, `"validation"`, `"test"`, `"unlabelled"`, a shard's own word, or `WHOLE`.
        location: a video file, a folder of frames, or the place in a shard.
        video_id: what a row says it is taken from; rows of one id in one split are parts of one video.
        image_fps: frames per second of a folder of frames.
    """

    name: str
    split: str
    location: Path | InParquet | InTar
    video_id: str | None = None
    image_fps: float = 25.0


@dataclass
class Listing:
    """A corpus.

    Attributes:
        source: what the report calls it.
        folder: where it is.
        videos: in natural order.
        unreadable: what cannot be listed, as (name, reason).
        notes: what a person should know, one sentence each.
    """

    source: str
    folder: Path
    videos: list[ListedVideo]
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def list_folder(folder: Path) -> Listing:
    """The videos of a folder, by its shards where it has Parquet or tar files, else as files and folders of frames.

    The split is the first folder on the way to a video, or the first word of a shard's name, that is one of train,
    validation, test, unlabelled or another usual spelling of these.

    Raises:
        ValueError: there is no such folder, or it holds no video.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of videos or shards, but there is no such folder.")
    if holds_shards(folder):
        listing = _list_shards(folder)
    else:
        paths, num_others = find_videos(folder)
        videos = []
        for path in paths:
            below = path.relative_to(folder)
            videos.append(ListedVideo(printable(below.as_posix()), split_of(below, is_file=path.is_file()), path))
        listing = Listing(printable(str(folder)), folder, videos)
        if num_others:
            listing.notes.append(f"{num_others} files are neither videos nor frames of one, and were not looked at")
    if not listing.videos and not listing.unreadable:
        raise ValueError(
            f"{folder}: holds no video; expected video files ({', '.join(VIDEO_EXTENSIONS)}), folders of frames, "
            "or Parquet or tar files with videos."
        )
    if len({video.split for video in listing.videos}) == 1:
        listing.notes.append(
            "all videos are in one split; splits are told by folders or shards named train, validation or test"
        )
    return listing


def list_corpus(name: str, data_dir: Path, config_name: str = "videos", **options: Any) -> Listing:
    """The videos that the builder of a corpus finds in an owner's raw folder, in the splits that it gives them.

    Args:
        options: of the corpus' config, such as `split_protocol` and `fold`.

    Raises:
        ValueError: there is no such corpus or option, or the folder is not as expected.
    """
    from ..corpora import corpus_class
    from ..corpora.corpus import changed_config

    builder = corpus_class(name)
    configs = {config.name: config for config in builder.BUILDER_CONFIGS}
    if config_name not in configs:
        raise ValueError(f"config {config_name!r}: {name} has {', '.join(configs)}.")
    config = changed_config(configs[config_name], options)
    config.data_dir = str(data_dir)
    found = builder.read_folder(data_dir, config)
    videos = [ListedVideo(v.source, v.split, v.path, v.video_id, v.image_fps) for v in found.videos]
    rejected = [(rejection.source, rejection.reason) for rejection in found.rejected]
    source = f"{name} in {printable(str(data_dir))}, {found.layout}"
    return Listing(source, data_dir, videos, rejected, list(found.notes))


def split_of(path: PurePath, is_file: bool = True) -> str:
    """The split that a path below the corpus' folder names."""
    words = path.parts[:-1] if is_file else path.parts
    return next((_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS), WHOLE)


def printable(name: str) -> str:
    """A name that any terminal and file takes: bytes that are not UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


# --- shards ----------------------------------------------------------------------------------------------------------


def _list_shards(folder: Path) -> Listing:
    listing = Listing(printable(str(folder)), folder, [])
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".tar")):
        below = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in below.parts):
            continue
        words = _SHARD_NUMBER.sub("", path.stem)
        split = _SPLITS.get(words.lower()) or split_of(below)
        if split == WHOLE and words != path.stem:
            split = words
        name = printable(below.as_posix())
        try:
            listing.videos += (_rows if path.suffix == ".parquet" else _samples)(path, name, split)
        except ModuleNotFoundError:  # pyarrow is not there
            raise
        except Exception as error:  # pyarrow and tarfile raise many kinds
            listing.unreadable.append((name, f"cannot be read as a shard ({_one_line(error)})"))
    return listing


def _rows(path: Path, name: str, split: str) -> list[ListedVideo]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if "video" not in file.schema_arrow.names:
            raise ValueError(f"expected a column 'video', found {', '.join(file.schema_arrow.names)}")
        columns = [column for column in _ROW_COLUMNS if column in file.schema_arrow.names]
        videos: list[ListedVideo] = []
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns).to_pylist() if columns else []
            rows = rows or [{}] * file.metadata.row_group(group).num_rows
            for index, row in enumerate(rows):
                video_id, key = _key(row, len(videos))
                videos.append(ListedVideo(f"{name}: {key}", split, InParquet(path, group, index), video_id))
    return videos


def _samples(path: Path, name: str, split: str) -> list[ListedVideo]:
    """The samples of a WebDataset shard: members that share the name up to the first dot."""
    videos: list[ListedVideo] = []
    with tarfile.open(path, "r:") as tar:
        facts: dict[str, dict[str, Any]] = {}
        members: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            folders, _, last = member.name.rpartition("/")
            key, _, extension = last.partition(".")
            key = f"{folders}/{key}" if folders else key
            if not member.isfile():
                continue
            if f".{extension.lower()}" in VIDEO_EXTENSIONS:
                members[key] = member
            elif extension == "json":
                content = tar.extractfile(member)
                assert content is not None
                stated = json.loads(content.read())
                facts[key] = {column: stated.get(column) for column in _ROW_COLUMNS}
        for key, member in members.items():
            video_id, said = _key(facts.get(key, {}), key)
            where = InTar(path, member.offset_data, member.size)
            videos.append(ListedVideo(printable(f"{name}: {said}"), split, where, video_id))
    if not videos:
        raise ValueError("it has no video")
    return videos


def _key(row: dict[str, Any], otherwise: int | str) -> tuple[str | None, str]:
    """The id of a row's video, and how the row is called."""
    video_id, start = row.get("video_id"), row.get("start_frame")
    if not isinstance(video_id, str):
        return None, f"row {otherwise}" if isinstance(otherwise, int) else otherwise
    return video_id, f"{video_id}, from frame {start}" if start else video_id


def open_videos(videos: list[ListedVideo]) -> Iterator[tuple[ListedVideo, VideoSource | VideoError]]:
    """What `video_io` reads each video from: a path, or the bytes in a shard, of which one row group is held.

    A video whose bytes cannot be had comes with the reason.
    """
    group: tuple[Path, int] | None = None
    rows: list[dict[str, Any]] = []
    for video in videos:
        where = video.location
        if isinstance(where, Path):
            yield video, where
            continue
        try:
            if isinstance(where, InTar):
                with where.path.open("rb") as file:
                    file.seek(where.offset)
                    content = file.read(where.size)
                yield video, content
                continue
            if group != (where.path, where.row_group):
                import pyarrow.parquet

                rows = []  # first, so that two groups are never held
                with pyarrow.parquet.ParquetFile(where.path) as parquet:
                    rows = parquet.read_row_group(where.row_group, columns=["video"]).to_pylist()
                group = (where.path, where.row_group)
            source = video_of(rows[where.index], "video")
            rows[where.index] = {}
            yield video, source if isinstance(source, bytes) else Path(source)
        except VideoError as error:
            yield video, error
        except Exception as error:  # of pyarrow, and of the disk
            yield video, VideoError(f"cannot be read from its shard ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
