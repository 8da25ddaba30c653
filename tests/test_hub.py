"""Model cards say what happened in training, and what was measured; a card that a person edited is theirs."""

import logging

import pytest
from huggingface_hub import ModelCard

from diffusers_endora import hub
from diffusers_endora.model_card import Sample, is_edited, model_card

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
REPORT = {
    "protocol": {"name": "endora-strict", "changes": {"num_clips": 64}, "seed": 3},
    "real": {"source": "test_videos", "num_clips": 64},
    "results": [
        {
            "metric": "fvd",
            "label": "FVD",
            "better": "lower",
            "value": 460.7,
            "network": "i3d",
            "num_real": 64,
            "num_fake": 64,
            "per_seed": [450.0, 471.4],
            "std_over_seeds": 15.1,
            "spread": {"kind": "bootstrap over clips", "std": 9.0, "low": 440.0, "high": 480.0},
            "infinity": None,
        }
    ],
    "memorisation": {
        "fraction": 0.25,
        "fraction_low": 0.1,
        "fraction_high": 0.4,
        "expected": 0.01,
        "percentile": 1.0,
        "num_generated": 64,
        "num_train": 210,
        "num_held_out": 64,
        "network": "i3d",
        "closest": [{"distance": 1.5, "generated": "clip_0001", "training": "jane_doe.mp4"}],
    },
    "warnings": ["64 rows do not fill 400 dimensions."],
}


def test_card_shows_both_ways_to_load_and_what_was_measured(tmp_path):
    path = hub.save_model_card(tmp_path, ARGUMENTS, RESULTS, class_names=["hyperplastic", "adenoma"])
    card = ModelCard.load(path)
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.get("license") is None
    assert 'EndoraPipeline.from_pretrained("me/endora-colonoscopic")' in card.text
    assert 'custom_pipeline="me/endora-colonoscopic", trust_remote_code=True' in card.text
    assert "colonoscopic: 210 videos, 2 more could not be read" in card.text
    assert "xl-2, 673.7 M parameters" in card.text
    assert "10 of 5 clips x 4 processes x 1 accumulated: 200 clips seen" in card.text
    assert "official, weight 0.5, teacher facebook/dino-vits8" in card.text
    assert "0.0123 over the last 10 steps; a per-position Gaussian predictor" in card.text
    assert "`1` adenoma" in card.text
    assert "`2` the null class" in card.text
    assert "**Not for diagnosis.**" in card.text
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


def test_card_with_a_report(tmp_path):
    training = {"arguments": {**ARGUMENTS, "dataset_name": "me/colon"}, "results": RESULTS}
    sample = Sample("samples/clip.mp4", "samples/contact_sheet.png", 10)
    card = ModelCard(model_card(tmp_path, "me/model", training, license="mit", report=REPORT, sample=sample))
    assert card.data.datasets == ["me/colon"]
    assert card.data.license == "mit"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("fvd", "FVD", 460.7)
    assert result.dataset_name == "test_videos"
    assert result.metric_args["protocol"] == "endora-strict"
    assert result.metric_args["std_over_seeds"] == 15.1
    assert "endora-strict, changed: num_clips = 64; seed 3; real clips: 64 of test_videos" in card.text
    assert "| FVD ↓ | **460.7** | ± 15 (2 seeds)" in card.text
    assert "- 64 rows do not fill 400 dimensions." in card.text
    assert "25.0 % (95 %: 10.0 to 40.0 %)" in card.text
    assert "may give back training clips" in card.text
    assert "jane_doe" not in card.content
    assert "(samples/clip.mp4)" in card.text
    assert "at step 10" in card.text


def test_card_of_a_conversion_states_its_origin(tmp_path):
    conversion = {"source": {"file": "colon.pt", "sha256": "ab" * 32}, "block_order": "sequential", "vae": "a/vae"}
    text = model_card(tmp_path, "me/model", conversion=conversion, license="cc-by-nc-4.0")
    assert (
        f"`colon.pt` of the [official code](https://github.com/CUHK-AIM-Group/Endora), SHA-256 `{'ab' * 32}`" in text
    )
    assert "| order of the blocks | sequential |" in text
    assert "come without a licence" in text
    assert "## Training" not in text


def test_a_card_knows_whether_it_was_edited(tmp_path, caplog):
    path = hub.save_model_card(tmp_path, ARGUMENTS, RESULTS)
    generated = path.read_text()
    assert not is_edited(generated)
    assert not is_edited(generated.replace("\n", "\r\n"))
    assert is_edited("# Written by a person\n")
    path.write_text(generated.replace("Every clip is synthetic.", "Every clip is made up."))
    edited = path.read_text()
    assert is_edited(edited)
    with caplog.at_level(logging.WARNING):
        hub.save_model_card(tmp_path, ARGUMENTS, RESULTS)
    assert path.read_text() == edited
    assert "edited by hand" in caplog.text


@pytest.mark.parametrize("missing", [["mse", "gaussian_mse", "num_parameters"], ["num_processes", "steps"]])
def test_a_card_does_without_what_was_not_recorded(tmp_path, missing):
    results = {name: value for name, value in RESULTS.items() if name not in missing}
    text = hub.save_model_card(tmp_path, ARGUMENTS, results).read_text()
    assert "None" not in text
    assert "Undefined" not in text
