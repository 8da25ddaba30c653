"""The modules for `evaluate.load`: they load from their folders, and give the numbers of an evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

pytest.importorskip("scipy")
pytest.importorskip("evaluate")

import evaluate
from test_inception import seeded_weights

import diffusers_endora.metrics.clip_metric as clip_metric
from diffusers_endora.metrics.evaluation import evaluate as compare
from diffusers_endora.metrics.evaluation import load_extractors
from diffusers_endora.metrics.protocols import STRICT

MODULES = Path(clip_metric.__file__).parent / "evaluate_modules"


@pytest.fixture(autouse=True, scope="module")
def own_caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, str(tmp_path_factory.mktemp(name)))
        yield


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> str:
    """The seeded weights: no real ones, but the real network."""
    shapes = json.loads((Path(__file__).parent / "inception_state_dict.json").read_text())
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(seeded_weights(shapes), path)
    return str(path)


def clips(seed: int, num_clips: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    moving = np.linspace(0, 60, 16)[:, None, None, None] + rng.integers(0, 120, (num_clips, 1, 8, 8, 3))
    return np.repeat(np.repeat(moving, 4, axis=2), 4, axis=3).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fvd_of_arrays_and_of_paths(tmp_path):
    fvd = evaluate.load(str(MODULES / "fvd"))
    of_arrays = fvd.compute(predictions=clips(0), references=clips(1), cache_dir=tmp_path / "cache", num_resamples=5)
    report = compare(
        clips(1), [clips(0)], load_extractors(["fvd"]), ["fvd"], STRICT, cache_dir=tmp_path / "cache", num_resamples=5
    )
    assert of_arrays["fvd"] == report["results"][0]["value"] > 0
    assert set(of_arrays) == {"fvd", "fvd_std", "fvd_infinity", "num_real", "num_fake"}
    assert of_arrays["fvd_std"] > 0

    for name, seed in (("fake", 0), ("real", 1)):
        (tmp_path / name).mkdir()
        for i, clip in enumerate(clips(seed)):
            np.save(tmp_path / name / f"{i}.npy", clip)
    options = {"cache_dir": str(tmp_path / "other"), "num_resamples": 5}
    assert fvd.compute(predictions=tmp_path / "fake", references=str(tmp_path / "real"), **options) == of_arrays
    paths = [[str(path) for path in sorted((tmp_path / name).iterdir())] for name in ("fake", "real")]
    fvd.add_batch(predictions=paths[0], references=paths[1])
    assert fvd.compute(**options) == of_arrays


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fid", "kid", "inception_score"])
def test_image_metrics(tmp_path, inception_weights, name):
    metric = evaluate.load(str(MODULES / name))
    short = {"predictions": clips(0)[:, :4, :, :]} | (
        {} if name == "inception_score" else {"references": clips(1)[:, :4]}
    )
    result = metric.compute(**short, weights=inception_weights, num_frames=4, cache_dir=tmp_path / "cache")
    assert np.isfinite(result[name])
    assert result[f"{name}_std"] >= 0
    assert result["num_fake"] == 4


@pytest.mark.parametrize("name", ["fid", "kid", "inception_score"])
def test_no_inception_no_number(name):
    metric = evaluate.load(str(MODULES / name))
    with pytest.raises(ValueError, match="--inception_weights"):
        metric.compute(predictions=clips(0), references=clips(1))


def test_one_side_is_not_enough():
    with pytest.raises(ValueError, match="expected both: predictions"):
        evaluate.load(str(MODULES / "fvd")).compute(predictions=clips(0))
    with pytest.raises(ValueError, match="protocol 'lax': expected one of endora-strict"):
        evaluate.load(str(MODULES / "fvd")).compute(predictions=clips(0), references=clips(1), protocol="lax")


def test_every_module_has_a_card():
    folders = sorted(path.name for path in MODULES.iterdir() if not path.name.startswith("_"))
    assert folders == ["fid", "fvd", "inception_score", "kid"]
    for name in folders:
        card = (MODULES / name / "README.md").read_text()
        assert card.startswith("---\ntitle: ")
        assert f'evaluate.load("path/to/evaluate_modules/{name}")' in card
