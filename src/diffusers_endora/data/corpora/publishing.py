"""What makes a prepared folder a dataset of the Hub: its card, and the upload."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.utils import validate_repo_id

from . import corpus_class
from .corpus import CorpusBuilder, CorpusConfig
from .packing import EXTENSIONS, FileFormat, webdataset_features

CARDS = Path(__file__).with_name("cards")
_MAX_CLASSES_IN_CARD = 30
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}  # of the Hub, in rows


def write_card(
    folder: Path,
    builder: type[CorpusBuilder],
    config: CorpusConfig,
    summary: dict[str, Any],
    layout: str,
    notes: list[str],
    num_rejected: int,
    file_format: FileFormat,
) -> None:
    """Writes README.md: the corpus' card, with what is in this folder, and how `load_dataset` is to read it."""
    card = DatasetCard((CARDS / f"{builder.CORPUS}.md").read_text(encoding="utf-8"))
    splits: dict[str, dict[str, Any]] = summary["splits"]

    # 1. For load_dataset
    card_data: Any = card.data
    files = [{"split": split, "path": f"data/{split}-*{EXTENSIONS[file_format]}"} for split in splits]
    card_data.configs = [{"config_name": config.name, "data_files": files, "default": True}]
    features = builder.features(config)
    if file_format == "webdataset":
        features = webdataset_features(features)
    sizes = datasets.SplitDict()
    for split, counts in splits.items():
        sizes.add(datasets.SplitInfo(split, num_bytes=counts["bytes"], num_examples=counts["rows"]))
    info = datasets.DatasetInfo(
        features=features, splits=sizes, download_size=summary["bytes"], dataset_size=summary["bytes"]
    )
    DatasetInfosDict({config.name: info}).to_dataset_card_data(card_data)
    limit = next((limit for limit in _SIZES if summary["rows"] < limit), None)
    card_data.size_categories = [_SIZES[limit] if limit else "n>1M"]

    # 2. For people
    unused = {"kind"} if config.kind == "clips" else {"kind", "clip_length"}
    used = {name: value for name, value in config.options().items() if value is not None and name not in unused}
    options = ", ".join(f"{name} {value}" for name, value in used.items())
    lines = [
        "## This folder",
        "",
        f"Made from {layout} as config `{config.name}` ({options}).",
        f"Left out, with reasons in `rejected.jsonl`: {num_rejected}.",
        *[f"Note: {note}." for note in notes],
        "",
        *table(
            ["split", "videos", "rows", "frames", "minutes"],
            [
                [split, counts["videos"], counts["rows"], counts["frames"], f"{counts['seconds'] / 60:.1f}"]
                for split, counts in splits.items()
            ],
        ),
    ]
    for column in next(iter(splits.values()))["classes"]:
        of_split = {split: counts["classes"][column] for split, counts in splits.items()}
        of_class = {name: [counts[name] for counts in of_split.values()] for name in next(iter(of_split.values()))}
        if len(of_class) <= _MAX_CLASSES_IN_CARD and any(map(any, of_class.values())):
            lines += ["", *table([f"`{column}`", *of_split], [[name, *counts] for name, counts in of_class.items()])]
    card.text = card.text.rstrip() + "\n\n" + "\n".join(lines) + "\n"
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def table(header: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a table in Markdown."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]


def check_may_push(corpus: str, repo_id: str, private: bool, has_the_right: bool, api: Any = None) -> None:
    """Asks before the work what would forbid the upload after it.

    Args:
        has_the_right: the user says that the owners allow them to publish the corpus.
        api: a `HfApi`.

    Raises:
        ValueError: a public push would break the owners' terms, or the repository is public and should be private.
        huggingface_hub.errors.HFValidationError, HfHubHTTPError, LocalTokenNotFoundError: no valid name, nobody is
            logged in, or the Hub refuses.
        ConnectionError: the Hub cannot be reached.
    """
    builder = corpus_class(corpus)
    if not private and not builder.MAY_BE_PUBLISHED and not has_the_right:
        raise ValueError(
            f"{corpus} is not pushed publicly: {builder.TERMS}. Push it privately (--private, the default), or add "
            "--i_have_the_right if the owners have given you that right."
        )
    validate_repo_id(repo_id)
    api = HfApi() if api is None else api
    with reached_hub():
        api.whoami()
        if private and api.repo_exists(repo_id, repo_type="dataset"):
            check_is_private(api, repo_id)


@contextmanager
def reached_hub() -> Iterator[None]:
    """Turns what the HTTP library raises, where there is no answer, into a ConnectionError."""
    try:
        yield
    except Exception as error:
        # httpx or httpx2, by huggingface_hub's version; with an answer it is an HfHubHTTPError
        if isinstance(error, OSError | ValueError) or not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(f"the Hub cannot be reached: {error}") from error


def check_is_private(api: Any, repo_id: str) -> None:
    """Raises a ValueError for a public repository."""
    if not api.repo_info(repo_id, repo_type="dataset").private:
        raise ValueError(f"{repo_id} is a public repository; expected a private one, so nothing was uploaded.")


def push_to_hub(folder: Path, repo_id: str, private: bool, api: Any = None) -> str:
    """Uploads a prepared folder to a dataset repository, in one commit, and returns its address.

    A repository that is not there is made; one that is there keeps being public or private. What an upload that broke
    off has sent already is not sent again.

    Raises:
        ValueError: the repository is public and should be private.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        ConnectionError: the Hub cannot be reached.
    """
    api = HfApi() if api is None else api
    with reached_hub():
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        if private:
            check_is_private(api, repo_id)
        api.upload_folder(folder_path=folder, repo_id=repo_id, repo_type="dataset", commit_message="Prepared corpus")
    return f"https://huggingface.co/datasets/{repo_id}"
