"""The benchmark script: tables from a yaml file, a failure in its row, nothing computed twice."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("yaml")

from diffusers_endora.metrics import evaluation
from diffusers_endora.metrics.feature_extractors import FeatureExtractor

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MeanColour(FeatureExtractor):
    name, outputs, per_frame = "mean-colour", {"features": 3}, False
    weights, weights_hash, preprocessing = "none", "0", "none"
    num_calls = 0

    def __init__(self):
        import torch

        super().__init__(torch.nn.Identity())

    def forward(self, units):
        MeanColour.num_calls += 1
        return {"features": units.float().mean(dim=(1, 2, 3))}


YAML = """
output: out
corpora:
  Red: {real: red}
  Blue: {real: blue, train: train}
models:
  Good model: {Red: good_red, Blue: good_blue}
  Bad model: {Red: bad_red, Blue: bad_blue}
  Broken: {Red: broken}
tables:
  Table 1: [Broken, Bad model, Good model]
  Table 3: [Good model]
options: {metrics: [fvd, prdc], num_clips: 12, num_frames: 4, num_resamples: 5, cache_dir: CACHE}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_extractors", lambda *_: {"i3d": MeanColour()})
    rng = np.random.default_rng(0)
    colours = {"red": (150, 50, 50), "blue": (50, 50, 150), "train": (50, 50, 150)}
    colours |= {"good_red": (148, 50, 50), "good_blue": (50, 52, 150)}
    colours |= {"bad_red": (90, 50, 90), "bad_blue": (50, 120, 150)}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        clips = np.array(colour) + rng.integers(-20, 20, (12, 1, 1, 1, 3)) + rng.integers(-9, 9, (12, 4, 16, 16, 3))
        np.save(tmp_path / name / "clips.npy", clips.astype(np.uint8))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_text("no | video")
    (tmp_path / "benchmark.yaml").write_text(YAML.replace("CACHE", str(tmp_path / "cache")))
    return tmp_path


def run(benchmark, monkeypatch, path: Path, *flags: str) -> int:
    monkeypatch.setattr("sys.argv", ["benchmark.py", str(path), *flags])
    return benchmark.main()


def test_tables(benchmark, folder, monkeypatch, caplog):
    assert run(benchmark, monkeypatch, folder / "benchmark.yaml") == 0
    lines = (folder / "out" / "Table_1.md").read_text().splitlines()
    assert lines[2].startswith("| | Red, FVD ↓ | Red, precision ↑ |")
    assert lines[4].startswith("| Broken | failed: ")
    assert "a.mp4" in lines[4]
    assert lines[4].endswith("| - | - | - | - | - | - | - | - | - |")
    assert lines[5].startswith("| Bad model | ")
    assert "**" not in lines[5].split("|")[2]
    assert lines[6].split("|")[2].strip().startswith("**")
    assert " ± " in lines[6].split("|")[2]
    assert len((folder / "out" / "Table_3.md").read_text().splitlines()) == 7

    assert (folder / "out" / "Table_1.csv").read_text().splitlines()[0].endswith(",infinity,num_real,num_fake,error")
    rows = list(csv.DictReader((folder / "out" / "Table_1.csv").open()))
    fvd = {(row["model"], row["corpus"]): float(row["value"]) for row in rows if row["metric"] == "fvd"}
    assert set(fvd) == {(model, corpus) for model in ("Bad model", "Good model") for corpus in ("Red", "Blue")}
    for corpus in ("Red", "Blue"):
        assert fvd["Good model", corpus] < fvd["Bad model", corpus]
    assert [row["model"] for row in rows if row["error"]] == ["Broken"]
    assert (folder / "out" / "Table_1.png").stat().st_size > 5000
    assert (folder / "out" / "reports" / "Good_model" / "Blue" / "report.md").is_file()
    assert "Broken on Red failed" in caplog.text

    calls = MeanColour.num_calls
    before = (folder / "out" / "Table_1.md").read_text()
    assert run(benchmark, monkeypatch, folder / "benchmark.yaml") == 0
    assert MeanColour.num_calls == calls > 0
    assert (folder / "out" / "Table_1.md").read_text() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("corpora:", "corpuses:", "expected corpora and models"),
        ("{real: red}", "{fake: red}", "corpus Red: expected real"),
        ("{Red: broken}", "{Green: broken}", "Green is none of the corpora"),
        ("[Good model]", "[Best model]", "Best model is none of the models"),
        ("num_clips", "num_clip", "option num_clip: expected one of"),
        ("{real: red}", "{real: red, options: {num_clip: 3}}", "option num_clip: expected one of"),
        ("{real: red}", "{real: red, options: {protocol: endora-legacy}}", "option protocol: expected one of"),
        ("{real: red}", "{real: red, options: 3}", "options: expected names with values, got 3"),
        ("corpora:", "corpora: [", "cannot be read as yaml"),
        ("{metrics", "{protocol: [endora-strict, strict], metrics", "protocol strict: expected one of endora-strict"),
    ],
)
def test_mistakes_in_the_file_get_one_sentence(benchmark, folder, monkeypatch, capsys, old, new, message):
    path = folder / "benchmark.yaml"
    path.write_text(path.read_text().replace(old, new))
    assert run(benchmark, monkeypatch, path) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_table_for_each_protocol(benchmark, folder, monkeypatch):
    path = folder / "benchmark.yaml"
    changed = path.read_text().replace("{metrics", "{protocol: [endora-strict, endora-legacy], metrics")
    path.write_text(changed.replace("  Table 1: [Broken, Bad model, Good model]\n", ""))
    assert run(benchmark, monkeypatch, path) == 0
    tables = [(folder / "out" / f"Table_3_endora-{name}.md").read_text() for name in ("strict", "legacy")]
    assert "Good model" in tables[0]
    assert tables[0].replace("strict", "legacy") != tables[1]  # JPEG and mp4 of the official evaluation
    reports = folder / "out" / "reports"
    for name in ("endora-strict", "endora-legacy"):
        report = json.loads((reports / name / "Good_model" / "Blue" / "report.json").read_text())
        assert name in json.dumps(report["protocol"])


def test_a_part_has_tables_of_itself(benchmark, folder, monkeypatch, capsys):
    path = folder / "benchmark.yaml"
    assert run(benchmark, monkeypatch, path, "--models", "Good model", "--corpora", "Blue") == 0
    rows = list(csv.DictReader((folder / "out" / "Table_1.csv").open()))
    assert {(row["model"], row["corpus"]) for row in rows} == {("Good model", "Blue")}
    capsys.readouterr()
    for flag, name in (("--models", "None"), ("--corpora", "Green")):
        assert run(benchmark, monkeypatch, path, flag, name) == 1
        assert f"{name}: expected one of" in capsys.readouterr().err


def test_options_of_schedulers_are_for_pipelines_that_have_one(benchmark, folder, monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark.cli, "evaluate", lambda **options: calls.append(options))
    for name, kind in (("good_red", "StyleGANVPipeline"), ("good_blue", "EndoraPipeline")):
        (folder / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    path = folder / "benchmark.yaml"
    options = "{protocol: [endora-strict, endora-legacy], num_inference_steps: 50, metrics"
    text = path.read_text().replace("{metrics", options)
    path.write_text(text.replace("{real: blue,", "{real: blue, options: {num_clips: 8},"))
    with pytest.raises(FileNotFoundError):  # no report is written
        run(benchmark, monkeypatch, path, "--models", "Good model", "--corpora", "Red")
    with pytest.raises(FileNotFoundError):
        run(benchmark, monkeypatch, path, "--models", "Good model", "--corpora", "Blue")
    assert ["num_inference_steps" in call for call in calls] == [False, True]
    assert [call["num_clips"] for call in calls] == [12, 8]
    assert [call["samples_dir"].parts[-3:] for call in calls] == [
        ("samples", "Good_model", "Red"),  # of whatever protocol
        ("samples", "Good_model", "Blue"),
    ]


TRAINED = """
output: out
corpora:
  Red: {real: red, train: red}
  Blue: {real: blue, train: blue}
models:
  Copier:
    training:
      - duplicate.py --max_train_steps 1 --output_dir {output} {train}
      - duplicate.py --max_train_steps 2 --output_dir {output} "{stage_1}"
options: {metrics: [fvd], num_clips: 12, num_frames: 4, num_resamples: 5, cache_dir: CACHE}
"""

# What it makes are the clips that it was given, but for those of a corpus called blue
COPY = """
import shutil, sys
from pathlib import Path
_, _, steps, _, output, source = sys.argv
if "blue" in source:
    sys.exit("duplicate.py: error: not blue.")
Path(output).parent.mkdir(parents=True, exist_ok=True)
shutil.copytree(source, output)
"""


@pytest.fixture
def trained(folder, benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "count_training", lambda command: 2e15 * benchmark.steps_of(command))
    (folder / "duplicate.py").write_text(COPY)
    (folder / "benchmark.yaml").write_text(TRAINED.replace("CACHE", str(folder / "cache")))
    return folder


def test_models_are_trained_once_and_what_it_took_is_told(benchmark, trained, monkeypatch, caplog):
    assert run(benchmark, monkeypatch, trained / "benchmark.yaml") == 0
    home = trained / "out" / "models" / "Copier" / "Red"
    assert (home / "stage_2" / "clips.npy").read_bytes() == (trained / "red" / "clips.npy").read_bytes()
    rows = list(csv.DictReader((trained / "out" / "Benchmark.csv").open()))
    assert {row["corpus"]: row["error"] for row in rows} == {
        "Red": "",
        "Blue": "duplicate.py failed: duplicate.py: error: not blue.",
    }
    assert "Copier on Blue failed" in caplog.text
    records = [json.loads((home / f"stage_{number}.json").read_text()) for number in (1, 2)]
    assert [record["steps"] for record in records] == [1, 2]
    assert [record["operations"] for record in records] == [2e15, 4e15]
    assert all(record["seconds"] > 0 for record in records)
    (line,) = [line for line in (trained / "out" / "training.md").read_text().splitlines() if "Copier" in line]
    assert line.startswith("| Copier | Red | 1 + 2 | ")
    assert line.endswith(" | 2 + 4 = 6 |")

    before = [(home / f"stage_{number}.json").stat().st_mtime_ns for number in (1, 2)]
    assert run(benchmark, monkeypatch, trained / "benchmark.yaml") == 0
    assert [(home / f"stage_{number}.json").stat().st_mtime_ns for number in (1, 2)] == before


def test_trainings_can_run_before_the_evaluation(benchmark, trained, monkeypatch, caplog):
    path = trained / "benchmark.yaml"
    assert run(benchmark, monkeypatch, path, "--train_only", "--corpora", "Red") == 0
    out = trained / "out"
    records = sorted((out / "models").glob("*/*/stage_*.json"))
    assert [record.parent.name for record in records] == ["Red", "Red"]
    assert all(json.loads(record.read_text())["is_finished"] for record in records)
    assert not any("operations" in json.loads(record.read_text()) for record in records)
    assert not list(out.glob("*.md"))

    assert run(benchmark, monkeypatch, path, "--train_only") == 1  # the corpus called blue
    assert "Copier on Blue failed: duplicate.py failed: duplicate.py: error: not blue." in caplog.text
    assert run(benchmark, monkeypatch, path) == 0  # trained again, the copies would find their folders there
    assert all("operations" in json.loads(record.read_text()) for record in records)
    rows = list(csv.DictReader((out / "Benchmark.csv").open()))
    assert next(row for row in rows if row["corpus"] == "Red")["error"] == ""


def test_a_training_whose_operations_cannot_be_counted_is_evaluated(benchmark, trained, monkeypatch, caplog):
    def refuse(command):
        raise ValueError("no")

    monkeypatch.setattr(benchmark, "count_training", refuse)
    assert run(benchmark, monkeypatch, trained / "benchmark.yaml", "--corpora", "Red") == 0
    assert "operations are not counted: no" in caplog.text
    assert (trained / "out" / "training.md").read_text().strip().endswith("| not counted |")
    assert "failed" not in (trained / "out" / "Benchmark.md").read_text()


def test_what_was_trained_is_known_from_another_folder(benchmark, trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert run(benchmark, monkeypatch, Path("benchmark.yaml"), "--corpora", "Red") == 0
    (trained / "elsewhere").mkdir()
    monkeypatch.chdir(trained / "elsewhere")
    assert run(benchmark, monkeypatch, Path("../benchmark.yaml"), "--corpora", "Red") == 0


def test_a_model_of_another_training_is_not_taken(benchmark, trained, monkeypatch):
    run(benchmark, monkeypatch, trained / "benchmark.yaml")
    path = trained / "benchmark.yaml"
    path.write_text(path.read_text().replace("max_train_steps 2", "max_train_steps 3"))
    assert run(benchmark, monkeypatch, path) == 1
    rows = list(csv.DictReader((trained / "out" / "Benchmark.csv").open()))
    assert "was trained by another command" in next(row["error"] for row in rows if row["corpus"] == "Red")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", train: blue", "", "corpus Blue has no train"),
        ("--max_train_steps 2 ", "", "expected one of --max_train_steps and --autoencoder_steps with a number"),
        ("    training:", "    Red: red\n    training:", "and no folders beside it"),
        ('"{stage_1}"', '"{stage_1}', "expected training to be its command lines"),
    ],
)
def test_trainings_that_do_not_fit_are_refused(benchmark, trained, monkeypatch, capsys, old, new, message):
    path = trained / "benchmark.yaml"
    path.write_text(path.read_text().replace(old, new))
    assert run(benchmark, monkeypatch, path) == 1
    assert message in capsys.readouterr().err
