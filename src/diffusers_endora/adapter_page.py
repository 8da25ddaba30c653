"""The page of a LoRA adapter on the Hub: its card, and what of its folder is published."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import TemplateError
from safetensors import SafetensorError

from .model_card import PIPELINE_TAG, Sample, is_edited, last_name, name_of, with_marker
from .publication import (
    TRAINING_LOG,
    Publication,
    chosen_license,
    find_sample,
    private_strings,
    published_text,
    read_text,
    read_training,
    refuse_private,
    safetensors_metadata,
    stated_license,
    to_json,
    without_private,
)

TEMPLATE = Path(__file__).with_name("adapter_card.md")
ADAPTER_WEIGHTS = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` looks


def adapter_card(
    training: dict[str, Any],
    repo_id: str,
    license: str | None = None,
    sample: Sample | None = None,
    files: Sequence[str] = (),
) -> str:
    """The text of an adapter's card, with the marker that tells whether it was edited later.

    Args:
        training: `training.json` of `examples/train_endora_lora.py`: `arguments`, `results`, `class_names` and `base`.
        repo_id: what the card tells people to load.
        license: as the Hub writes it; None leaves the field out.
        sample: what to show.
        files: names of the records published beside the card.
    """
    arguments, base = training["arguments"], training["base"]
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        base_model=base["name"] if base["is_on_hub"] else None,
        tags=["diffusers-endora", "endora", "endoscopy", "lora", "medical", "synthetic-data", "video-generation"],
        license=license,
    )
    facts = {
        **arguments,
        **training["results"],
        "prior": arguments["prior"],  # among the results it is the mean of the loss
        "base": base,
        "base_link": f"[{base['name']}](https://huggingface.co/{base['name']})" if base["is_on_hub"] else base["name"],
        "class_names": training["class_names"],
        "model_name": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "data": name_of(arguments["dataset_name"]) or last_name(arguments["train_data_dir"]),
        "teacher": name_of(arguments["dino_model"]),
        "sample": sample,
        "files": ", ".join(f"`{file}`" for file in files),
    }
    return with_marker(str(ModelCard.from_template(card_data, template_path=str(TEMPLATE), **facts)))


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder is an adapter's, and no pipeline's."""
    return (Path(folder) / ADAPTER_WEIGHTS).is_file() and not (Path(folder) / "model_index.json").exists()


def check_adapter_file(path: Path) -> None:
    """Raises a ValueError unless it is a whole safetensors file with an adapter's settings."""
    try:
        metadata = safetensors_metadata(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged or cut short ({error})") from error
    if "lora_adapter_metadata" not in metadata:
        raise ValueError(f"{path}: holds no settings of an adapter; expected what train_endora_lora.py writes")


def prepare_adapter_publication(
    folder: str | Path,
    repo_id: str,
    license: str | None = None,
    overwrite_card: bool = False,
    token: str | None = None,
) -> Publication:
    """Chooses what of an adapter's folder is published: adapter, card, records and a clip. Asks the Hub nothing.

    Local paths become their last names. A card that was edited by hand is published as it is.

    Args:
        folder: the output of `examples/train_endora_lora.py`.
        repo_id: for the card.
        license: as the Hub writes it; by default the training's.
        overwrite_card: make a new `README.md` though the one in the folder was edited by hand.
        token: must not be in what is published; those of the environment must not be either.

    Raises:
        ValueError: there is no adapter, or a damaged one, the card states another licence, or something holds a token
            or a local path.
    """
    folder = Path(folder)
    training = read_training(folder)
    if training is None or not is_adapter_folder(folder):
        raise ValueError(f"{folder}: expected the folder of an adapter, with {ADAPTER_WEIGHTS} and training.json.")
    private = private_strings(folder, token, training)
    check_adapter_file(folder / ADAPTER_WEIGHTS)
    training = without_private(training)
    publication = Publication(owned_folders=("samples",))
    files = publication.files

    # 1. Weights and records
    files[ADAPTER_WEIGHTS] = folder / ADAPTER_WEIGHTS
    files["training.json"] = to_json(training)
    if (folder / TRAINING_LOG).is_file():
        files[TRAINING_LOG] = published_text(folder / TRAINING_LOG)
    records = [name for name in files if name != ADAPTER_WEIGHTS]

    # 2. What there is to see, and the card
    sample = find_sample(folder)
    if sample is not None:
        files["samples/clip.mp4"], files["samples/contact_sheet.png"] = Path(sample.clip), Path(sample.sheet)
        sample = Sample("samples/clip.mp4", "samples/contact_sheet.png", sample.step)
    card = folder / "README.md"
    text = read_text(card) if card.is_file() else None
    stated = None if text is None else stated_license(card, text)
    is_by_hand = text is not None and is_edited(text) and not overwrite_card
    if stated is None and not is_by_hand:
        stated = training["arguments"].get("license")
    license = chosen_license(folder, license, stated, training, None, is_by_hand)
    if is_by_hand and text is not None:
        files["README.md"] = text.encode()
        publication.notes.append("README.md was written or edited by hand and is published as it is")
    else:
        try:
            files["README.md"] = adapter_card(training, repo_id, license, sample, records).encode()
        except (AttributeError, KeyError, TypeError, TemplateError) as error:
            raise ValueError(f"{folder}: no card can be made of its training.json ({error})") from error
    if license is None:
        publication.notes.append("the card states no licence; --license adds one")

    refuse_private(publication, folder, private)
    return publication
