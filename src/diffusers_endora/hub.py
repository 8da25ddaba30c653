"""Model pages: the card of a trained folder, and its way to the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md")

# What makes a model page; checkpoints, logs and whatever else lies in a training's folder stay at home
PUBLISHED_FILES = ["README.md", "model_index.json", "pipeline.py", "scheduler/*", "transformer/*", "vae/*"]


def save_model_card(
    folder: str | Path, arguments: dict[str, Any], results: dict[str, Any], class_names: list[str] | None = None
) -> Path:
    """Writes `README.md` of a trained pipeline folder from the template `model_card.md`.

    Args:
        folder: where the card goes.
        arguments: of the training script, by flag name.
        results: what the training measured: `steps`, `averaged_steps`, `mse`, `gaussian_mse`, `num_parameters`,
            `num_videos`, `num_broken`, `learning_rate`.
        class_names: of a class-conditional model, in the order of their labels.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["endora", "endoscopy", "video-generation", "diffusers-endora"],
    )
    facts = {
        **arguments,
        **results,
        "class_names": class_names,
        "model_name": (arguments.get("hub_model_id") or folder.resolve().name).split("/")[-1],
        "repo_id": arguments.get("hub_model_id") or folder.resolve().name,
        "data": arguments.get("dataset_name") or Path(arguments["train_data_dir"]).resolve().name,
        "vae": arguments["pretrained_vae"],
    }
    for name in ("data", "vae", "dino_model"):  # a Hub id as it is, a local folder by its last name
        if facts.get(name) and Path(facts[name]).is_dir():
            facts[name] = Path(facts[name]).resolve().name
    card = ModelCard.from_template(card_data, template_path=str(TEMPLATE), **facts)
    card.save(folder / "README.md")
    return folder / "README.md"


def publish_folder(folder: str | Path, repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Uploads a pipeline folder to the Hub: the models, `model_index.json`, `pipeline.py` and the card, nothing else.

    Args:
        folder: a pipeline folder, for example the output of a training.
        repo_id: "name/model"; made where it does not exist.
        token: of the Hub; by default the one of `hf auth login` or `HF_TOKEN`.
        private: for a repository that is made.

    Returns:
        The address of the commit.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: where the Hub refuses.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
    commit = api.upload_folder(folder_path=str(folder), repo_id=repo_id, allow_patterns=PUBLISHED_FILES)
    return str(commit)
