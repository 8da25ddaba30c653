"""Model cards say what happened in training; publishing leaves the training's own files behind."""

from huggingface_hub import ModelCard

import diffusers_endora.hub as hub

ARGUMENTS = {
    "train_data_dir": "/data/colonoscopic",
    "dataset_name": None,
    "pretrained_vae": "stabilityai/sd-vae-ft-mse",
    "dino_model": "facebook/dino-vits8",
    "prior": "official",
    "prior_weight": 0.5,
    "preset": "xl-2",
    "num_frames": 16,
    "frame_interval": None,
    "window": 48,
    "resolution": 128,
    "num_still_images": 8,
    "train_batch_size": 5,
    "seed": 0,
    "hub_model_id": "me/endora-colonoscopic",
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "constant",
    "use_ema": True,
    "ema_decay": 0.9999,
}
RESULTS = {
    "steps": 10,
    "averaged_steps": 10,
    "mse": 0.0123,
    "gaussian_mse": 0.0456,
    "num_parameters": 673_681_568,
    "num_videos": 210,
    "num_broken": 2,
    "learning_rate": 1e-4,
    "num_processes": 4,
    "mixed_precision": "no",
}


def test_card_shows_both_ways_to_load_and_what_was_measured(tmp_path):
    path = hub.save_model_card(tmp_path, ARGUMENTS, RESULTS, class_names=["hyperplastic", "adenoma"])
    card = ModelCard.load(path)
    assert card.data.library_name == "diffusers"
    assert 'EndoraPipeline.from_pretrained("me/endora-colonoscopic")' in card.text
    assert 'custom_pipeline="me/endora-colonoscopic", trust_remote_code=True' in card.text
    assert "colonoscopic: 210 videos, 2 more could not be read" in card.text
    assert "xl-2, 673.7 M parameters" in card.text
    assert "official, weight 0.5, teacher facebook/dino-vits8" in card.text
    assert "0.0123 over the last 10 steps; a per-position Gaussian predictor" in card.text
    assert "`1` adenoma" in card.text
    assert "`2` the null class" in card.text
    assert "/data" not in card.content


def test_card_of_an_unconditional_model_without_prior(tmp_path):
    path = hub.save_model_card(tmp_path, {**ARGUMENTS, "prior": "none", "dino_model": None}, RESULTS)
    text = path.read_text()
    assert "| prior | none |" in text
    assert "null class" not in text


def test_local_components_are_named_without_their_paths(tmp_path):
    (tmp_path / "my-vae").mkdir()
    arguments = {**ARGUMENTS, "pretrained_vae": str(tmp_path / "my-vae"), "hub_model_id": None}
    text = hub.save_model_card(tmp_path, arguments, RESULTS).read_text()
    assert "| VAE | my-vae |" in text
    assert str(tmp_path) not in text


def test_publish_uploads_the_pipeline_and_not_the_checkpoints(tmp_path, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, exist_ok, private):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, repo_id, allow_patterns):
            calls.update(folder=folder_path, repo_id=repo_id, allowed=allow_patterns)
            return "https://huggingface.co/me/model/commit/1"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert hub.publish_folder(tmp_path, "me/model", token="t").endswith("/commit/1")
    assert calls["repo_id"] == "me/model"
    assert calls["token"] == "t"
    assert calls["allowed"] == hub.PUBLISHED_FILES
