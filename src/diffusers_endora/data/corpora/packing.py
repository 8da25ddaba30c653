"""Rows to shards: Parquet with the videos inside, or WebDataset tar files. The same rows give the same bytes."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Array2D, Array3D, ClassLabel, Value

from .corpus import Row

FileFormat = Literal["parquet", "webdataset"]
EXTENSIONS = {"parquet": ".parquet", "webdataset": ".tar"}

# Streaming reads a row group at a time, and so do the first rows wait for one; larger rows are groups of their own.
_ROW_GROUP_BYTES = 2**24
_ROW_GROUP_ROWS = 1000

# A sample of WebDataset ends where the part of the name before its first dot changes
_ARRAY_FEATURES = (Array2D, Array3D)
_QUOTED = str.maketrans({"%": "%25", ".": "%2E", "/": "%2F"})


def write_shards(
    data: Path,
    split: str,
    rows: Iterator[tuple[str, Row]],
    features: datasets.Features,
    file_format: FileFormat,
    max_shard_bytes: int,
) -> list[Path]:
    """Writes rows as `data/<split>-00000-of-00001.parquet`, ... (or `.tar`) and returns these.

    A row group or sample is held in memory at a time.

    Args:
        data: an existing folder.
        rows: unique keys, and rows of `features` with the video as `{"path", "bytes"}`.
        max_shard_bytes: a shard is closed when it has this many bytes.

    Raises:
        OSError: `data` cannot be written to.
    """
    writer: _ParquetShard | _TarShard | None = None
    shards: list[Path] = []
    try:
        for key, row in rows:
            if writer is None:
                shards.append(data / f"{split}-{len(shards):05d}")
                writer = (_ParquetShard if file_format == "parquet" else _TarShard)(shards[-1], features)
            writer.write(key, row)
            del row  # which may be large, before the next is read
            if writer.num_bytes >= max_shard_bytes:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    return [path.rename(f"{path}-of-{len(shards):05d}{EXTENSIONS[file_format]}") for path in shards]


class _ParquetShard:
    """Writes rows into groups of about `_ROW_GROUP_BYTES`."""

    def __init__(self, path: Path, features: datasets.Features) -> None:
        self.num_bytes = 0
        self._group: list[Row] = []
        self._bytes_in_group = 0
        self._features = features
        self._arrays = [name for name, feature in features.items() if isinstance(feature, _ARRAY_FEATURES)]
        self._schema = features.arrow_schema
        # Statistics and dictionaries of videos and arrays would only cost memory, and videos do not compress
        leaves = _parquet_columns(self._schema)
        small = [leaf for leaf in leaves if leaf != "video.bytes" and leaf.split(".")[0] not in self._arrays]
        self._writer = pyarrow.parquet.ParquetWriter(
            path,
            self._schema,
            compression=dict.fromkeys(leaves, "SNAPPY") | {"video.bytes": "NONE"},
            use_dictionary=small,
            write_statistics=small,
        )

    def write(self, key: str, row: Row) -> None:
        size = len(row["video"]["bytes"]) + sum(row[name].nbytes for name in self._arrays)
        if self._group and self._bytes_in_group + size > _ROW_GROUP_BYTES:
            self._write_group()
        self._group.append(row)
        self._bytes_in_group += size
        self.num_bytes += size
        if self._bytes_in_group >= _ROW_GROUP_BYTES or len(self._group) == _ROW_GROUP_ROWS:
            self._write_group()

    def close(self) -> None:
        if self._group:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        """Videos and arrays go into Arrow's buffers as they are; datasets converts the other columns."""
        columns = {"video": self._videos()}
        for name in self._arrays:
            columns[name] = _array_column([row[name] for row in self._group], self._schema.field(name).type)
        others = datasets.Features({name: f for name, f in self._features.items() if name not in columns})
        table = datasets.Dataset.from_list([{n: row[n] for n in others} for row in self._group], others).data.table
        columns |= {name: table[name].combine_chunks().cast(self._schema.field(name).type) for name in others}
        group = pyarrow.Table.from_arrays([columns[field.name] for field in self._schema], schema=self._schema)
        self._writer.write_table(group, row_group_size=len(self._group))
        self._group, self._bytes_in_group = [], 0

    def _videos(self) -> pyarrow.Array:
        """The group's videos; a single one, which may be large, is not copied."""
        videos = [row["video"]["bytes"] for row in self._group]
        offsets = np.cumsum([0, *map(len, videos)], dtype=np.int32)
        buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(videos))]
        content = pyarrow.Array.from_buffers(pyarrow.binary(), len(videos), buffers)
        paths = pyarrow.array([row["video"]["path"] for row in self._group], pyarrow.string())
        of_name = {"bytes": content, "path": paths}
        fields = list(self._schema.field("video").type)
        return pyarrow.StructArray.from_arrays([of_name[field.name] for field in fields], fields=fields)


def _array_column(arrays: list[np.ndarray], kind: pyarrow.ExtensionType) -> pyarrow.Array:
    """A column of `ArrayXD`, whose storage is lists in lists."""
    values = pyarrow.array(np.concatenate([array.ravel() for array in arrays]))
    for axis in reversed(range(arrays[0].ndim)):
        lengths = np.concatenate([np.full(np.prod(a.shape[:axis], dtype=int), a.shape[axis]) for a in arrays])
        values = pyarrow.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), values)
    return pyarrow.ExtensionArray.from_storage(kind, values.cast(kind.storage_type))


def _parquet_columns(schema: pyarrow.Schema) -> list[str]:
    """The names of a schema's leaves, as Parquet has them."""
    sink = io.BytesIO()
    pyarrow.parquet.ParquetWriter(sink, schema).close()
    leaves = pyarrow.parquet.ParquetFile(sink).schema
    return [leaves.column(i).path for i in range(len(leaves))]


class _TarShard:
    """Writes samples.

    A sample has `<key>.mp4` (so named whatever the container is: readers look at the content), `<key>.json` with the
    other columns, `<key>.cls` with the label as a number, where there is one, and `<key>.<column>.npy` for arrays.
    """

    def __init__(self, path: Path, features: datasets.Features) -> None:
        self.num_bytes = 0
        self._features = features
        self._tar = tarfile.open(path, "w")  # noqa: SIM115

    def write(self, key: str, row: Row) -> None:
        name = key.translate(_QUOTED)
        arrays = [column for column, feature in self._features.items() if isinstance(feature, _ARRAY_FEATURES)]
        others = {
            column: value.tolist() if isinstance(value, np.ndarray) else value
            for column, value in row.items()
            if column != "video" and column not in arrays
        }
        self._add(f"{name}.mp4", row["video"]["bytes"])
        self._add(f"{name}.json", json.dumps(others, ensure_ascii=False).encode())
        if row.get("label") is not None:
            self._add(f"{name}.cls", str(class_id(self._features["label"], row["label"])).encode())
        for column in arrays:
            buffer = io.BytesIO()
            np.save(buffer, row[column], allow_pickle=False)
            self._add(f"{name}.{column}.npy", buffer.getvalue())

    def close(self) -> None:
        self._tar.close()

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # its time is 1970, its owner 0
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))
        self.num_bytes += len(content)


def webdataset_features(features: datasets.Features) -> datasets.Features:
    """What `load_dataset` has to know of the tar files: left to infer it, it would want all samples alike."""
    arrays = {column: feature for column, feature in features.items() if isinstance(feature, _ARRAY_FEATURES)}
    others = {column: f for column, f in features.items() if column != "video" and column not in arrays}
    of_sample = {"mp4": features["video"], "json": others}
    if "label" in features:
        of_sample["cls"] = features["label"]
    of_sample |= {f"{column}.npy": feature for column, feature in arrays.items()}
    return datasets.Features(of_sample | {"__key__": Value("string"), "__url__": Value("string")})


def row_of_sample(sample: dict[str, Any]) -> Row:
    """The row, as Parquet has it, of a sample that `load_dataset` gives from the tar files; its columns are in
    another order."""
    arrays = {name.removesuffix(".npy"): value for name, value in sample.items() if name.endswith(".npy")}
    return {"video": sample["mp4"], **sample["json"], **arrays}


def class_id(feature: ClassLabel, value: str | int) -> int:
    """The number of a class that is given by name or number."""
    return feature.str2int(value) if isinstance(value, str) else value
