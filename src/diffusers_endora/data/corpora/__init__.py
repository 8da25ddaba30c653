"""The corpora of the paper, the diagnosis benchmark and the phantom, as builders of `datasets`.

    from diffusers_endora.data.corpora import load_corpus_builder
    builder = load_corpus_builder("colonoscopic", "clips", data_dir="RAW")
    builder.download_and_prepare()
    rows = builder.as_dataset("train")

`endora prepare` writes the same rows to files that `load_dataset` reads.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

    from .corpus import CorpusBuilder

# name on the command line -> class, in the module of that name
CORPORA = {
    "cholectriplet": "CholecTriplet",
    "colonoscopic": "Colonoscopic",
    "kvasir_capsule": "KvasirCapsule",
    "phantom": "Phantom",
    "polypdiag": "PolypDiag",
}


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


def load_corpus(name: str, config_name: str = "videos", split: str = "train", **options: Any) -> "datasets.Dataset":
    """A split of a corpus, from its raw folder or rendered; kept in the cache of `datasets` for the next time.

    Raises:
        ValueError: there is no such corpus, config or split, or the raw folder is not as expected.
    """
    builder = load_corpus_builder(name, config_name, **options)
    builder.download_and_prepare()
    splits = [of_rows for of_rows, info in (builder.info.splits or {}).items() if info.num_examples]
    if not splits:
        raise ValueError(f"{options.get('data_dir')}: no video of {name} can be read; warnings above say why.")
    if split not in splits:
        raise ValueError(f"split {split!r}: {name} has {', '.join(splits)} here.")
    return builder.as_dataset(split=split)
