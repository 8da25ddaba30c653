"""The corpora of the paper, the diagnosis benchmark and the phantom, as builders of `datasets`.

    from diffusers_endora.data.corpora import load_corpus_builder
    builder = load_corpus_builder("colonoscopic", "clips", data_dir="RAW")
    builder.download_and_prepare()
    rows = builder.as_dataset("train")

`endora prepare` writes the same rows to files that `load_dataset` reads.
"""

import importlib
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

    from .corpus import CorpusBuilder

logger = logging.getLogger(__name__)

_VIDEOS_PER_PROCESS = 8  # at least: a process takes about two seconds to start

# name on the command line -> class, in the module of that name
CORPORA = {
    "cholectriplet": "CholecTriplet",
    "colonoscopic": "Colonoscopic",
    "kvasir_capsule": "KvasirCapsule",
    "phantom": "Phantom",
    "polypdiag": "PolypDiag",
}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def corpus_class(name: str) -> "type[CorpusBuilder]":
    """The builder class of a corpus.

    Raises:
        ValueError: there is no such corpus, or the package datasets is missing.
    """
    if name not in CORPORA:
        raise ValueError(f"{name}: is no corpus; expected one of {', '.join(CORPORA)}.")
    try:
        return getattr(importlib.import_module(f".{name}", __name__), CORPORA[name])
    except ModuleNotFoundError as error:
        raise ValueError(f'needs {error.name}: pip install "diffusers-endora[train]"') from error


def load_corpus_builder(name: str, config_name: str = "videos", **options: Any) -> "CorpusBuilder":
    """A builder of `datasets`; options are `data_dir`, `cache_dir` and those of the corpus' config."""
    return corpus_class(name)(config_name=config_name, **options)


def load_corpus(
    name: str, config_name: str = "videos", split: str = "train", num_proc: int | None = None, **options: Any
) -> "datasets.Dataset":
    """A split of a corpus, from its raw folder or rendered; kept in the cache of `datasets` for the next time.

    What is left out or doubtful is logged, also where the rows come from the cache.

    Args:
        num_proc: processes that make the rows; None: one per core, where there are several videos for each.
        options: `data_dir`, `cache_dir` and those of the corpus' config.

    Raises:
        ValueError: there is no such corpus, config or split, the raw folder is not as expected, or a row cannot be
            made.
    """
    builder = load_corpus_builder(name, config_name, **options)
    from datasets.exceptions import DatasetGenerationError

    folder = None if builder.config.data_dir is None else Path(builder.config.data_dir)
    found = builder.read_folder(folder, builder.config)
    is_cached = bool(builder.info.splits)
    for rejection in found.rejected if is_cached else []:  # else the builder logs it
        logger.warning("%s: %s", rejection.source, rejection.reason)
    num_proc = num_proc or min(num_cores(), len(found.videos) // _VIDEOS_PER_PROCESS)
    try:
        builder.download_and_prepare(num_proc=num_proc if num_proc > 1 else None)
    except DatasetGenerationError as error:
        # From another process the cause comes as the text of a traceback, in which the first error is the cause
        lines = str(error.__cause__ or error).splitlines()
        errors = [match[1] for line in lines if (match := re.match(r"[\w.]+(?:Error|Exception): (.+)", line))]
        reason = errors[0] if errors else " ".join(lines)
        raise ValueError(f"{name}: its rows could not be made: {reason}") from error
    splits = [of_rows for of_rows, info in (builder.info.splits or {}).items() if info.num_examples]
    if not splits:
        raise ValueError(f"{options.get('data_dir')}: no video of {name} can be read; warnings above say why.")
    if split not in splits:
        raise ValueError(f"split {split!r}: {name} has {', '.join(splits)} here.")
    rows = builder.as_dataset(split=split)
    there = set(rows.unique("video_id"))
    missing = [video.source for video in found.videos if video.split == split and video.video_id not in there]
    if is_cached and missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        logger.warning("left out of %s, as they cannot be read: %s%s", split, ", ".join(missing[:3]), more)
    return rows
