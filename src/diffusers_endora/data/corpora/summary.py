"""What is counted of a corpus: rows, frames, seconds and classes of each split."""

from collections.abc import Iterator
from typing import Any

from datasets import ClassLabel, List

from .packing import class_id


def new_counts(features: dict[str, Any]) -> dict[str, Any]:
    """What `count_row` adds to; `classes` counts by column and class."""
    columns = [column for name, feature in features.items() for column in class_columns(name, feature)]
    classes = {name: dict.fromkeys(label.names, 0) for name, label in columns}
    return {"videos": 0, "rows": 0, "frames": 0, "seconds": 0.0, "classes": classes}


def count_row(counts: dict[str, Any], features: dict[str, Any], row: dict[str, Any]) -> None:
    """Adds a row to `counts`."""
    counts["rows"] += 1
    counts["frames"] += row["num_frames"]
    counts["seconds"] += row["num_frames"] / row["fps"]
    for column, feature in features.items():
        for name, class_name in class_names(column, feature, row[column]):
            counts["classes"][name][class_name] += 1


def class_columns(name: str, feature: Any) -> Iterator[tuple[str, ClassLabel]]:
    """The classes that a column has, in lists or structs or plainly."""
    if isinstance(feature, ClassLabel):
        yield name, feature
    elif isinstance(feature, dict):
        for key, of_key in feature.items():
            yield from class_columns(f"{name}.{key}", of_key)
    elif isinstance(feature, List):
        yield from class_columns(name, feature.feature)


def class_names(name: str, feature: Any, value: Any) -> Iterator[tuple[str, str]]:
    """The classes in a column's value, each with its name in `class_columns`."""
    if value is None:
        return
    if isinstance(feature, ClassLabel):
        yield name, feature.int2str(class_id(feature, value))
    elif isinstance(feature, dict):
        for key, of_key in feature.items():
            yield from class_names(f"{name}.{key}", of_key, value[key])
    elif isinstance(feature, List) and any(class_columns(name, feature)):
        for entry in value:
            yield from class_names(name, feature.feature, entry)


def summary_lines(summary: dict[str, Any]) -> Iterator[str]:
    """The counts of each split, for people."""
    for split, counts in summary["splits"].items():
        yield (
            f"{split}: {counts['videos']} videos, {counts['rows']} rows, {counts['frames']} frames, "
            f"{counts['seconds']:.1f} s"
        )
        for column, of_class in counts["classes"].items():
            there = [f"{name} {count}" for name, count in of_class.items() if count]
            if there:
                more = f" and {len(there) - 15} more" if len(there) > 15 else ""
                yield f"  {column}: {', '.join(there[:15])}{more}"
