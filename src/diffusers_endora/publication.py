"""What of a pipeline folder goes to the Hub: checked to load, without pickles, tokens and local paths."""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, get_token
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from .baselines.registry import ENDORA, PIPELINES, PipelineKind, kind_of, read_index
from .model_card import Sample, is_edited, last_name, model_card, name_of
from .pipelines.single_file import single_file_source

CONVERSION_RECORD = "conversion.json"
TRAINING_RECORDS = ("training.json", "training_args.json")
TRAINING_LOG = "training_log.jsonl"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
TEXTS = (".csv", ".json", ".jsonl", ".log", ".md", ".txt", ".yaml", ".yml")

# What of the repository is removed where it is not published anew, so that nothing of an earlier model, of whichever
# class, stays beside this one: folders with all that is in them, and the pipeline's code
COMPONENTS = sorted({"scheduler", *(name for kind in PIPELINES.values() for name in kind.models)})
OWNED_FOLDERS = (*COMPONENTS, "evaluation", "logs", "samples")
OWNED_FILES = ("pipeline.py",)

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
SECRET_NAME = re.compile(r"(token|secret|password|api_?key)$", re.IGNORECASE)
LOCAL_PATH = re.compile(r"(?<![\w/.~<])(?:file://)?~?(?:/[^\s/\"'<>|:;,()\[\]{}]+)+/?")


@dataclass(frozen=True)
class Publication:
    """What will be one commit.

    Attributes:
        files: path in the repository -> the file, or its content.
        notes: sentences for the person who publishes.
        owned_folders: of the repository, in which every other file is removed.
        owned_files: of the repository, each of which is removed unless it is among `files`.
    """

    files: dict[str, Path | bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    owned_folders: tuple[str, ...] = OWNED_FOLDERS
    owned_files: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Bytes by path in the repository."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def prepare_publication(
    folder: str | Path,
    repo_id: str,
    license: str | None = None,
    report: str | Path | None = None,
    datasets: Sequence[str] = (),
    overwrite_card: bool = False,
    token: str | None = None,
) -> Publication:
    """Checks a pipeline folder and chooses what of it is published. Writes nothing and asks the Hub nothing.

    The folder is of an `EndoraPipeline`, `StyleGANVPipeline`, `MoStGANVPipeline` or `LVDMPipeline`.

    | in the repository | from |
    |---|---|
    | `model_index.json` | the published form, see `EndoraPipeline.save_config` |
    | `pipeline.py` | the self-contained pipeline, of Endora alone |
    | the components' folders, such as `transformer/` | configurations and safetensors |
    | `README.md` | the one that a person wrote or edited, else made anew |
    | `training.json`, `training_args.json`, `conversion.json`, `training_log.jsonl`, `logs/` | where they are |
    | `samples/clip.mp4`, `samples/contact_sheet.png` | the last step in `validation/`, else `samples/` |
    | `evaluation/report.json` | `report` |

    Local absolute paths become their last names, and tokens and passwords are taken out; a log that is no text and
    holds one stays at home, anything else that does is refused.

    Args:
        folder: of a training or a conversion.
        repo_id: for the card.
        license: as the Hub writes it (https://huggingface.co/docs/hub/repositories-licenses). Required for a folder
            with a `conversion.json`, and for one of which nothing says where it comes from and no card states one.
        report: folder or `report.json` of `endora evaluate`, of this model.
        datasets: ids on the Hub of the training data.
        overwrite_card: make a new `README.md` though the one in the folder was edited by hand.
        token: must not be in what is published; those of the environment must not be either.

    Raises:
        ValueError: the folder would not load, a licence is missing, the report is of another model, or something holds
            a token or a local path.
    """
    folder = Path(folder)
    kind = check_pipeline_folder(folder)
    training = read_training(folder)
    conversion = read_record(folder / CONVERSION_RECORD)
    if conversion is not None:
        of_kind: dict[str, type] = {"block_order": str, "vae": str} if kind is ENDORA else {}
        expect_fields(folder / CONVERSION_RECORD, conversion, source=dict, **of_kind)
        expect_fields(folder / CONVERSION_RECORD, conversion["source"], file=str, sha256=str)
    private = private_strings(folder, token, training, conversion)
    publication = Publication(owned_files=OWNED_FILES)
    files, notes = publication.files, publication.notes

    # 1. The models
    files["model_index.json"] = published_index(folder, kind)
    if kind is ENDORA:
        files["pipeline.py"] = single_file_source().encode()
    for component in components_of(folder, kind):
        for path in sorted((folder / component).iterdir()):
            if path.suffix == ".safetensors":
                files[f"{component}/{path.name}"] = path
            elif path.suffix == ".json":
                files[f"{component}/{path.name}"] = published_config(path)

    # 2. Records and logs
    for name in (*TRAINING_RECORDS, CONVERSION_RECORD):
        if (record := read_record(folder / name)) is not None:
            files[name] = to_json(without_private(record))
    if (folder / TRAINING_LOG).is_file():
        files[TRAINING_LOG] = published_text(folder / TRAINING_LOG)
    for path in sorted(path for path in (folder / "logs").rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix in TEXTS:
            files[name] = published_text(path)
        elif what := private_content(path.read_bytes(), private):
            notes.append(f"{name}: holds {what} and stays here")
        else:
            files[name] = path
    records = [name for name in files if "/" not in name and name not in ("model_index.json", "pipeline.py")]

    # 3. What there is to see, and the numbers
    sample = find_sample(folder)
    if sample is not None:
        files["samples/clip.mp4"], files["samples/contact_sheet.png"] = Path(sample.clip), Path(sample.sheet)
        sample = Sample("samples/clip.mp4", "samples/contact_sheet.png", sample.step)
    measured = None
    if report is not None:
        measured = read_report(Path(report))
        if (problem := report_of_another_model(measured, folder, kind)) is not None:
            raise ValueError(f"{report}: {problem}")
        if not model_in_report(measured):
            notes.append(f"{report}: does not say which model made its clips; it is taken for a report of this one")
        files["evaluation/report.json"] = to_json(measured)

    # 4. The card
    card = folder / "README.md"
    text = read_text(card) if card.is_file() else None
    stated = None if text is None else stated_license(card, text)
    is_by_hand = text is not None and is_edited(text) and not overwrite_card
    if stated is None and not is_by_hand:
        stated = ((training or {}).get("arguments") or {}).get("license")
    license = chosen_license(folder, license, stated, training, conversion, is_by_hand, kind)
    if license is None:
        notes.append("the card states no licence; --license adds one")
    if is_by_hand and text is not None:
        files["README.md"] = text.encode()
        notes.append("README.md was written or edited by hand and is published as it is (--overwrite_card: a new one)")
        if report is not None or datasets:
            notes.append("what --report and --dataset say is therefore not in it")
    else:
        facts = without_private(training), without_private(conversion)
        try:
            text = model_card(folder, repo_id, *facts, license, datasets, measured, sample, records)
        except (AttributeError, KeyError, TypeError, TemplateError) as error:
            raise ValueError(
                f"{folder}: no card can be made of its records ({error}); expected them as they were written, or a "
                "README.md of your own"
            ) from error
        files["README.md"] = text.encode()

    # 5. Nothing private
    refuse_private(publication, folder, private)
    return publication


# --- does it load? ---------------------------------------------------------------------------------------------------


def check_pipeline_folder(folder: Path) -> PipelineKind:
    """What the folder is of.

    Raises:
        ValueError: it is not whole: index, configurations, all weights, and no pickles.
    """
    index = read_index(folder)
    kind = kind_of(folder)
    for component in components_of(folder, kind):
        named = index.get(component)
        if not isinstance(named, list) or len(named) != 2 or named[-1] is None:
            raise ValueError(f"{folder / 'model_index.json'}: names no {component}")
        part = folder / component
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        if read_record(part / name) is None:
            raise ValueError(f"{part}: has no {name}; the folder would not load")
        if pickles := sorted(path for path in part.iterdir() if path.suffix in PICKLES):
            raise ValueError(
                f"{pickles[0]}: is a pickle, which can run code when it is loaded; save the pipeline with "
                "save_pretrained, which writes safetensors, and remove it"
            )
    for component in components_of(folder, kind):
        if component != "scheduler":
            shapes = weights_of(folder / component)
            if class_name := kind.models[component]:
                check_weights(folder / component, class_name, shapes)
    return kind


def components_of(folder: Path, kind: PipelineKind) -> list[str]:
    """The folders of a pipeline's parts: those that its class needs, and what else of its own the index names."""
    index = read_index(folder)
    components = [
        name for name in kind.models if name not in kind.optional_models or (index.get(name) or [None])[-1] is not None
    ]
    return sorted([*components, *(["scheduler"] if kind.has_scheduler else [])])


def weights_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights that a model's folder loads.

    Raises:
        ValueError: a file is missing or cut short.
    """
    index = read_record(folder / f"{WEIGHTS_NAME}.index.json")
    if index is not None:
        expect_fields(folder / f"{WEIGHTS_NAME}.index.json", index, weight_map=dict)
    names = [WEIGHTS_NAME] if index is None else sorted({str(name) for name in index["weight_map"].values()})
    shapes: dict[str, tuple[int, ...]] = {}
    for path in [folder / name for name in names] + sorted(folder.glob("*.safetensors")):
        if not path.is_file():
            raise ValueError(f"{path}: is missing; the folder would not load")
        try:
            with safe_open(path, framework="pt") as file:
                if path.name in names:
                    shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: is damaged or cut short ({error})") from error
    if index is not None and (missing := sorted(set(index["weight_map"]) - set(shapes))):
        raise ValueError(f"{folder}: its files lack {len(missing)} weights that its index names: {missing[0]}, ...")
    return shapes


def check_weights(folder: Path, class_name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises a ValueError unless the weights are those of the configuration."""
    model_class = model_class_named(class_name)
    config = model_class.load_config(folder)
    with torch.device("meta"):
        model = model_class.from_config(config)
    for name, tensor in model.state_dict().items():
        if name not in shapes:
            raise ValueError(f"{folder}: lacks the weights {name}, which its config.json asks for")
        if shapes[name] != tuple(tensor.shape):
            raise ValueError(
                f"{folder}: {name} has the shape {shapes[name]}, and its config.json asks for {tuple(tensor.shape)}"
            )


def model_class_named(class_name: str) -> Any:
    import diffusers_endora

    return getattr(diffusers_endora, class_name)


def safetensors_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def published_index(folder: Path, kind: PipelineKind) -> bytes:
    """`model_index.json` as the class's `to_json_string` writes it, whoever saved the folder."""
    index = read_index(folder)
    index["_class_name"] = kind.class_name
    for component in components_of(folder, kind):
        if class_name := kind.models.get(component):
            index[component] = ["diffusers", class_name]
    index.pop("_name_or_path", None)
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def published_config(path: Path) -> Path | bytes:
    """A configuration, without the place on a disk that it was loaded from."""
    config = json.loads(path.read_text(encoding="utf-8"))
    source = config.get("_name_or_path") if isinstance(config, dict) else None
    if not source or name_of(source) == source:
        return path
    del config["_name_or_path"]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


# --- where it comes from ---------------------------------------------------------------------------------------------


def write_conversion_record(folder: Path, checkpoint: Path, **facts: Any) -> None:
    """Writes `conversion.json`, which says of a pipeline folder that it was converted, and from what.

    Args:
        facts: what else the conversion was told: of Endora `block_order` and `vae`.
    """
    from . import __version__

    with Path(checkpoint).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"source": {"file": Path(checkpoint).name, "sha256": digest}, **facts, "diffusers_endora": __version__}
    (folder / CONVERSION_RECORD).write_bytes(to_json(record))


def stated_license(path: Path, text: str) -> str | None:
    """The licence in the metadata of a card.

    Raises:
        ValueError: the metadata is no YAML.
    """
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.get("license")
    except YAMLError as error:
        raise ValueError(f"{path}: its metadata is no YAML ({error})") from error


def chosen_license(
    folder: Path,
    given: str | None,
    stated: str | None,
    training: dict[str, Any] | None,
    conversion: dict[str, Any] | None,
    is_by_hand: bool,
    kind: PipelineKind = ENDORA,
) -> str | None:
    """The licence that the card states: never a default.

    Args:
        given: by the person who publishes.
        stated: by the card in the folder, or by the training.
        is_by_hand: whether that card is published as it is.
        kind: of a conversion: it knows what the official licence is.

    Raises:
        ValueError: one is needed and not given, or the card that is published states another one.
    """
    if given is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
        raise ValueError(
            f"--license {given!r}: expected the Hub's name of a licence, such as mit or cc-by-nc-4.0 "
            "(https://huggingface.co/docs/hub/repositories-licenses)"
        )
    if given is None and conversion is not None:
        raise ValueError(
            f"{folder}: is converted from {conversion['source']['file']}, and {kind.official_license}; say with "
            "--license (such as cc-by-nc-4.0) under which you may publish it: there is no default"
        )
    if given is None and stated is None and training is None:
        raise ValueError(
            f"{folder}: holds neither training.json nor {CONVERSION_RECORD}, so that nothing says where the model "
            "comes from; say with --license under which licence you may publish it: there is no default"
        )
    if is_by_hand and given is not None and given != stated:
        raise ValueError(
            f"{folder / 'README.md'}: was edited by hand and states "
            + ("no licence" if stated is None else f"the licence {stated}")
            + f", not {given}; write `license: {given}` into its metadata, or add --overwrite_card for a new card"
        )
    return given or stated


def read_report(path: Path) -> dict[str, Any]:
    """A report of `endora evaluate` as it is published: without local paths and the names of training videos."""
    path = path / "report.json" if path.is_dir() else path
    report = read_record(path)
    if report is None:
        raise ValueError(f"{path}: is not there; expected the folder or the report.json of `endora evaluate`")
    expect_fields(path, report, protocol=dict, results=list, real=dict, warnings=list)
    for section in ("fake", "memorisation"):
        if report.get(section) is not None:
            expect_fields(path, report, **{section: dict})
    for side in ("real", "fake"):
        if report.get(side):
            report[side]["source"] = last_name(str(report[side].get("source") or ""))
    if report.get("memorisation"):  # names of videos can be names of people
        expect_fields(path, report["memorisation"], closest=list)
        pairs = report["memorisation"]["closest"]
        report["memorisation"]["closest"] = [
            {"distance": pair.get("distance")} for pair in pairs if isinstance(pair, dict)
        ]
    return without_private(report)


def model_in_report(report: dict[str, Any]) -> str | None:
    """The beginning of the hash of the network that made the clips, where the report knows it."""
    mains = "|".join(sorted({kind.main for kind in PIPELINES.values()}))
    found = re.search(rf"\b(?:{mains}) ([0-9a-f]{{16}})", str((report.get("fake") or {}).get("sampling")))
    return found[1] if found else None


def report_of_another_model(report: dict[str, Any], folder: Path, kind: PipelineKind) -> str | None:
    """Why the report is not of the model in `folder`; None where it is, or does not say."""
    from .metrics.feature_extractors import hash_weights

    named = model_in_report(report)
    if named is None:
        return None
    model = model_class_named(kind.models[kind.main] or "").from_pretrained(folder / kind.main)
    own = hash_weights(model)
    return None if own.startswith(named) else f"is of another model: {kind.main} {named}, and this one is {own[:16]}"


def find_sample(folder: Path) -> Sample | None:
    """A clip and a contact sheet: of the last step in `validation/`, else of `samples/`; paths on this machine."""
    of_steps = []
    for place in (folder / "validation").glob("*"):
        number = re.search(r"(\d+)$", place.name)
        if number and place.is_dir():
            of_steps.append((int(number[1]), place))
    for step, place in [*sorted(of_steps, reverse=True), (None, folder / "samples")]:
        clips, sheet = sorted(place.glob("*.mp4")), place / "contact_sheet.png"
        if clips and sheet.is_file():
            return Sample(str(clips[0]), str(sheet), step)
    return None


# --- nothing private -------------------------------------------------------------------------------------------------


def without_private(value: Any) -> Any:
    """JSON with last names for local absolute paths, and without tokens, passwords and the like."""
    if isinstance(value, dict):
        return {name: without_private(part) for name, part in value.items() if not SECRET_NAME.search(str(name))}
    if isinstance(value, list):
        return [without_private(part) for part in value]
    if not isinstance(value, str):
        return value
    if is_local_path(value):
        return Path(value).name
    return text_without_private(value)


def text_without_private(text: str) -> str:
    """Text with last names for the local absolute paths in it, and without tokens."""
    text = LOCAL_PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)
    return TOKEN.sub("hf_...", text)


def published_text(path: Path) -> bytes:
    """A text file, JSON by the line or not, without local paths and tokens."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        with suppress(json.JSONDecodeError):
            return to_json(without_private(json.loads(text)))
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.dumps(without_private(json.loads(line))))
        except json.JSONDecodeError:
            name = line.partition(":")[0]  # of a line of YAML
            lines.append(f"{name}:" if SECRET_NAME.search(name.strip()) else text_without_private(line))
    return ("\n".join(lines) + "\n").encode()


def is_local_path(text: str) -> bool:
    return text.startswith(("/", "~/")) and len(text) > 1 and "\n" not in text


def private_strings(folder: Path, token: str | None, *records: Any) -> list[str]:
    """What must not be in a published file: tokens, and paths of this machine."""
    paths = {str(Path.home()), str(folder.resolve()), str(folder.absolute()), str(Path.cwd())}
    waiting = list(records)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and is_local_path(value):
            paths.add(value)
    tokens = {token, get_token()}
    is_telling = {path: path.count("/") > 1 or path == str(Path.home()) != "/" for path in paths}
    return [path for path in sorted(paths) if is_telling[path]] + [text for text in tokens if text and len(text) > 7]


def private_content(content: bytes, private: Sequence[str]) -> str | None:
    """What a file holds that must not be published, in words; None where there is nothing."""
    if TOKEN.search(content.decode("latin-1")):
        return "a token of the Hub"
    for text in private:
        if re.search(rb"(?<![\w.])" + re.escape(text.encode()) + rb"(?![\w-])", content):
            return f"the local path {text}" if text.startswith("/") else "a token of the Hub"
    return None


def refuse_private(publication: Publication, folder: Path, private: Sequence[str]) -> None:
    """Raises a ValueError for the first file of a publication that holds a token or a path of this machine."""
    for name, content in publication.files.items():
        if isinstance(content, bytes) and name != "pipeline.py":
            what = private_content(content, private)
        elif isinstance(content, Path) and content.suffix == ".safetensors":
            what = private_content(json.dumps(safetensors_metadata(content)).encode(), private)
        elif isinstance(content, Path) and not name.startswith("logs/"):
            what = private_content(content.read_bytes(), private)
        else:
            continue
        if what:
            raise ValueError(f"{folder / name if (folder / name).exists() else name}: holds {what}; take it out first")


# --- files -----------------------------------------------------------------------------------------------------------


def read_training(folder: Path) -> dict[str, Any] | None:
    """`training.json`, with its sections; None where there is none.

    Raises:
        ValueError: it is something else.
    """
    path = folder / "training.json"
    training = read_record(path)
    if training is not None:
        expect_fields(path, training, arguments=dict, results=dict)
    return training


def expect_fields(path: Path, record: dict[str, Any], **kinds: type) -> None:
    """Raises a ValueError for the first field of a record that is missing or of another kind."""
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            got = f"{type(record[name]).__name__}" if name in record else "none"
            raise ValueError(f"{path}: {name}: expected a {kind.__name__}, got {got}")


def read_text(path: Path) -> str:
    """Raises a ValueError where the file is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 ({error})") from error


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file.

    Raises:
        ValueError: it is something else.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: holds a {type(record).__name__}; expected a JSON object")
    return record


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
