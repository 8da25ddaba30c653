"""Videos in the rows of a dataset: where the rows come from, and which columns hold the video and its label."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

from .video_io import VideoError, VideoSource

Rows: TypeAlias = Sequence[dict[str, Any]]  # or a datasets.Dataset

_SHARD_EXTENSIONS = (".parquet", ".tar")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class RowColumns:
    """Which columns matter.

    Attributes:
        video: holds `{"path": ..., "bytes": ...}`, bytes or a path.
        label: holds integers from 0 up, None or -1 where there is no label; None where labels are not asked for.
        class_names: names of the labels, where the dataset states them.
        num_frames: holds the number of the video's frames, where there is such a column.
    """

    video: str
    label: str | None
    class_names: list[str] | None
    num_frames: str | None

    @property
    def names(self) -> list[str]:
        """The columns, each once."""
        return [name for name in dict.fromkeys((self.video, self.label, self.num_frames)) if name is not None]


def choose_columns(
    features: Any, class_labels: bool, video_column: str | None, label_column: str | None
) -> RowColumns:
    """The columns to read, from the features of a dataset; `features` is empty or None for plain dicts.

    Raises:
        ValueError: there is no such column.
    """
    if not features:
        label = (label_column or "label") if class_labels else None
        return RowColumns(video_column or "video", label, None, "num_frames")
    if video_column is None:  # WebDataset names its columns after the extensions of files
        of_type = [name for name, feature in features.items() if type(feature).__name__ == "Video"]
        video_column = "video" if "video" in features or len(of_type) != 1 else of_type[0]
    if label_column is None:
        label_column = "label" if "label" in features or "cls" not in features else "cls"
    for option, name in [("video_column", video_column), ("label_column", label_column if class_labels else None)]:
        if name is not None and name not in features:
            raise ValueError(f"{option}={name!r}: expected one of the columns {', '.join(features)}")
    return RowColumns(
        video=video_column,
        label=label_column if class_labels else None,
        class_names=getattr(features[label_column], "names", None) if class_labels else None,
        num_frames="num_frames" if "num_frames" in features else None,
    )


def video_of(row: dict[str, Any], column: str) -> VideoSource:
    """What the functions of `video_io` take, a path or bytes; or a URL, which `fetched` reads.

    Raises:
        VideoError: the column holds something else.
    """
    value = row.get(column)
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str | bytes | os.PathLike):
        got = type(value).__name__
        raise VideoError(f"column {column!r}: expected {{'path', 'bytes'}} or a path, got {got}")
    return value


def fetched(source: VideoSource) -> VideoSource:
    """The bytes behind a URL such as `hf://...` or `zip://a.mp4::b.zip`, by fsspec; what is no URL as it is.

    Raises:
        VideoError: they cannot be read.
    """
    if not (isinstance(source, str) and "://" in source):
        return source
    import fsspec

    try:
        with fsspec.open(source, "rb") as file:
            return file.read()
    except Exception as error:  # of many kinds, by protocol
        raise VideoError(f"{source}: cannot be read ({type(error).__name__}: {error})") from error


def label_of(row: dict[str, Any], column: str, name: str) -> int | None:
    """The label of a row, None where it has none.

    Raises:
        ValueError: it is no integer from -1 up.
    """
    label = row.get(column)
    if label is not None and (not isinstance(label, Integral) or isinstance(label, bool) or label < -1):
        raise ValueError(f"{name}: {column}={label!r}: expected an integer label from 0 up, or None or -1 for none")
    return None if label is None or label == -1 else int(label)


def stated_num_frames(row: dict[str, Any], columns: RowColumns) -> int | None:
    """The number of frames that a row states of its video."""
    value = None if columns.num_frames is None else row.get(columns.num_frames)
    return int(value) if isinstance(value, Integral) and int(value) > 0 else None


def open_source(source: Any, split: str | None, streaming: bool) -> Any:
    """A folder of videos as its path; everything else as rows: a `datasets.Dataset`, an `IterableDataset`, a list.

    Args:
        source: a folder of videos, a folder of shards (as `endora prepare` writes), a dataset of the Hub, or rows.
        split: of the dataset; None: `"train"`.
        streaming: read shards while training and not before.

    Raises:
        ValueError: there is no such thing.
    """
    if isinstance(source, str | os.PathLike):
        if not os.fspath(source):
            raise ValueError("source is an empty name: expected a folder or the id of a dataset")
        folder = Path(source)
        if folder.is_dir() and not holds_shards(folder):
            if streaming:
                raise ValueError(
                    f"{folder}: streaming is for Parquet or WebDataset shards (endora prepare makes them) and for the "
                    "Hub; videos in a folder are read when they are needed anyway"
                )
            return folder
        if not folder.is_dir() and (isinstance(source, os.PathLike) or not _HUB_ID.fullmatch(source)):
            raise ValueError(f"{source}: expected a folder with videos, but there is no such folder")
        return _loaded(os.fspath(source), split or "train", streaming)
    if isinstance(source, dict) and source and all(hasattr(rows, "features") for rows in source.values()):
        if (split or "train") not in source:
            raise ValueError(f"split={split or 'train'!r}: expected one of {', '.join(map(str, source))}")
        source, split = source[split or "train"], None
    if split is not None:
        raise ValueError(f"split={split!r}: is for folders of shards and the Hub; select it before you pass rows")
    if streaming and not is_stream(source):
        if not hasattr(source, "to_iterable_dataset"):
            raise ValueError(f"streaming=True with a {type(source).__name__}: expected a datasets.IterableDataset")
        return source.to_iterable_dataset()
    if not hasattr(source, "features"):
        is_list = not isinstance(source, dict) and hasattr(source, "__len__") and hasattr(source, "__getitem__")
        others = (type(row).__name__ for row in source if not isinstance(row, dict)) if is_list else iter([""])
        other = next(others, None)
        if other is not None:
            of_what = f" of {other}" if is_list else ""
            raise ValueError(
                f"source is a {type(source).__name__}{of_what}: expected a folder, the id of a dataset, a "
                "datasets.Dataset or IterableDataset, or a list of dicts"
            )
    return source


def is_stream(rows: Any) -> bool:
    """Whether rows are a `datasets.IterableDataset`, or splits of one; datasets is not imported for it."""
    if isinstance(rows, dict):
        return any(map(is_stream, rows.values()))
    return any(f"{c.__module__}.{c.__name__}" == "datasets.iterable_dataset.IterableDataset" for c in type(rows).mro())


def holds_shards(folder: Path) -> bool:
    """Whether a folder, directly or in its folder `data`, has Parquet or tar files."""
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    return any(path.suffix in _SHARD_EXTENSIONS for place in places for path in place.iterdir())


def _loaded(name: str, split: str, streaming: bool) -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(f'{name}: needs the package datasets: pip install "diffusers-endora[train]"') from error
    try:
        return load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # of many kinds: not there, no access, no connection, broken shards, no such split
        reason = " ".join(str(error).split())[:300]
        where = "cannot be loaded" if Path(name).is_dir() else "is no folder here, and cannot be loaded from the Hub"
        raise ValueError(f"{name}: {where} ({type(error).__name__}: {reason})") from error


def undecoded(rows: Any, columns: RowColumns) -> Any:
    """Rows of a dataset with the columns of `columns` alone, and the video as it is stored.

    Reading a row then does not read its other columns, and torchcodec, which `datasets` decodes with, is not needed.
    """
    rows = rows.select_columns(columns.names).with_format(None)
    feature = rows.features[columns.video]
    return rows.cast_column(columns.video, type(feature)(decode=False)) if getattr(feature, "decode", False) else rows
