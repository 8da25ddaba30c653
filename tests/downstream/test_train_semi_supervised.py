"""The scripts from videos to a table, on tiny videos of two brightnesses."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from diffusers_endora.data.video_io import write_video
from diffusers_endora.downstream.semi_supervised.classifier import load_classifier
from diffusers_endora.downstream.semi_supervised.trainer import train_classifier
from diffusers_endora.downstream.semi_supervised.videos import open_labelled

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def write_corpus(folder: Path, num_videos: int, seed: int) -> Path:
    """Videos of 4 frames of noise, in `dark` and `light`."""
    rng = np.random.default_rng(seed)
    for number in range(num_videos):
        name, low, high = (("dark", 0, 120), ("light", 90, 256))[number % 2]
        path = folder / name / f"{number}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, rng.integers(low, high, (4, 16, 16, 3), dtype=np.uint8), fps=8, codec="ffv1")
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    return {
        "train_data": write_corpus(root / "train", 16, seed=0),
        "test_data": write_corpus(root / "test", 6, seed=1),
        "clips": write_corpus(root / "clips", 6, seed=2),
    }


OPTIONS = {"num_frames": 2, "frame_interval": 1, "resolution": 16, "num_labelled": 4, "num_unlabelled": 6}
OPTIONS |= {"max_train_steps": 6, "validation_steps": 3, "train_batch_size": 2, "checkpointing_steps": 2}


def run(script: str, *more: str, **options) -> int:
    """Runs a script's `main` in this process; the exit code."""
    flags = [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *flags, *more])
        try:
            module.main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
        finally:
            AcceleratorState._reset_state(True)
    return 0


def test_from_videos_to_a_table(corpora, tmp_path, capsys):
    data = {name: corpora[name] for name in ("train_data", "test_data")}
    options = {**OPTIONS, **data, "unlabelled": corpora["clips"], "output_dir": tmp_path / "out"}
    assert run("train_semi_supervised.py", seeds="0 1", **options) == 0
    printed = capsys.readouterr().out
    assert "training: 16 videos, 8 'light' and 8 others (0 broken, 0 too short, 0 without a label)" in printed
    assert (tmp_path / "out" / "table.md").read_text() in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["trivial"]) == ["all positive", "all negative", "chance by prior"]
    assert list(results["methods"]) == ["supervised only", "FixMatch"]
    first = results["runs"][0]
    assert [look["step"] for look in first["history"]] == [3, 6]
    assert not set(first["labelled"]) & set(first["validation"])
    for finished in results["runs"]:
        assert all("/train/" in name for name in finished["labelled"] + finished["validation"])
        assert len(finished["test_probabilities"]) == 6
    gains = results["methods"]["FixMatch"]["gain"]["auroc"]
    by_method = [results["methods"][name]["scores"]["auroc"]["values"] for name in ("FixMatch", "supervised only")]
    assert gains["values"] == [a - b for a, b in zip(*by_method, strict=True)]
    assert gains["std"] == pytest.approx(np.std(gains["values"], ddof=1))
    for name in ("views.png", "curves.png"):
        assert (tmp_path / "out" / name).is_file()
    folder = tmp_path / "out" / "seed_1" / "FixMatch"
    assert load_classifier(folder / "classifier", 2)(torch.zeros(1, 2, 3, 16, 16)).shape == (1, 2)
    assert not list(folder.glob("checkpoint-*"))

    # A run that is there is kept; one that is not comes out as before
    before = (tmp_path / "out" / "results.json").read_text()
    shutil.rmtree(folder)
    kept = (tmp_path / "out" / "seed_0" / "FixMatch" / "run.json").stat().st_mtime_ns
    assert run("train_semi_supervised.py", seeds="0 1", **options) == 0
    assert (tmp_path / "out" / "results.json").read_text() == before
    assert (tmp_path / "out" / "seed_0" / "FixMatch" / "run.json").stat().st_mtime_ns == kept
    capsys.readouterr()
    assert run("train_semi_supervised.py", seeds="0", **options | {"max_train_steps": 7}) == 2
    assert "holds a run of other settings (max_train_steps was 6 and is 7); choose another" in capsys.readouterr().err
    fewer = shutil.copytree(corpora["test_data"], tmp_path / "test")
    next((fewer / "dark").iterdir()).unlink()
    assert run("train_semi_supervised.py", seeds="0", **options | {"test_data": fewer}) == 2
    assert "test_videos was" in capsys.readouterr().err


def test_rows_of_the_benchmark(corpora, tmp_path):
    data = {name: corpora[name] for name in ("train_data", "test_data")}
    row, legacy = ("--row", "mine=" + str(corpora["clips"]), "real clips=rest"), "--legacy_row"
    options = {**OPTIONS, **data, "output_dir": tmp_path / "out", "seeds": "0"}
    code = run("benchmark_augmentation.py", *row, legacy, f"official={corpora['clips']}", **options)
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["methods"]) == ["supervised only", "mine", "real clips", "official"]
    assert [run["description"]["endora_legacy"] for run in results["runs"]] == [False, False, False, True]
    assert "| mine | " in (tmp_path / "out" / "table.md").read_text()


def test_a_killed_training_goes_on_exactly(corpora, tmp_path, monkeypatch):
    from diffusers_endora.downstream.semi_supervised import trainer
    from diffusers_endora.downstream.semi_supervised.classifier import SmallVideoClassifier
    from diffusers_endora.downstream.semi_supervised.videos import Clips, ClipShape, open_unlabelled

    shape = ClipShape(num_frames=2, resolution=16, frame_interval=1)
    videos = open_labelled(corpora["train_data"], shape)
    clips = open_unlabelled(corpora["clips"], shape, 6, tmp_path)
    settings = trainer.TrainingSettings(
        max_train_steps=6, train_batch_size=2, validation_steps=3, checkpointing_steps=2, distribution_alignment=True
    )

    def train(folder: Path) -> trainer.TrainedClassifier:
        AcceleratorState._reset_state(True)
        torch.manual_seed(0)
        classifier = SmallVideoClassifier(channels=(8, 16), norm_groups=4)
        unlabelled = Clips(clips, range(6))
        parts = [0, 1, 8, 9], [2, 3, 10, 11]
        return train_classifier(classifier, videos, *parts, unlabelled, settings, 0, folder, {"source": "clips"})

    whole = train(tmp_path / "whole")
    original = trainer.step_loss
    for last in (2, 5):  # before the first look at the validation part, and after it
        steps = iter(range(100))

        def killed(*args, steps=steps, last=last):
            if next(steps) == last:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "step_loss", killed)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / f"killed_{last}")
    assert (tmp_path / "killed_5" / "checkpoint-4").is_dir()
    early = train(tmp_path / "killed_2")
    assert [look["validation_auroc"] for look in early.history] == [look["validation_auroc"] for look in whole.history]
    resumed = train(tmp_path / "killed_5")
    assert resumed.history[0] == whole.history[0]
    for name, tensor in whole.classifier.state_dict().items():
        assert torch.equal(tensor, resumed.classifier.state_dict()[name]), name
    assert resumed.history[1]["validation_auroc"] == whole.history[1]["validation_auroc"]


def test_leaks_and_other_mistakes_are_one_sentence(corpora, tmp_path, capsys):
    good = {name: corpora[name] for name in ("train_data", "test_data")} | OPTIONS | {"seeds": "0"}

    def refused(script: str = "train_semi_supervised.py", **changes) -> str:
        capsys.readouterr()
        assert run(script, **good | {"output_dir": tmp_path / "out"} | changes) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error.splitlines()[-1]

    assert "6 of 6 clips are in the test set" in refused(unlabelled=corpora["test_data"])
    assert "clips are in the test set" in refused(test_data=corpora["train_data"])
    assert "has 6 unlabelled clips; --num_unlabelled 7 asks for more" in refused(
        unlabelled=corpora["clips"], num_unlabelled=7
    )
    one_class = tmp_path / "one_class"
    shutil.copytree(corpora["train_data"] / "dark", one_class / "dark")
    assert "has the classes dark" in refused(train_data=one_class, positive_class="light")
    assert "the training videos have 8 negative ones: 8 to be labelled" in refused(num_labelled=16)
    for label, name in ((0, "dark"), (1, "light")):
        lines = [f"{name}/{path.name},{label}\n" for path in sorted((corpora["test_data"] / name).iterdir())]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    both = (tmp_path / "dark.txt").read_text() + (tmp_path / "light.txt").read_text()
    (tmp_path / "both.txt").write_text(both)
    of_one = {"train_data": corpora["test_data"], "train_labels": tmp_path / "both.txt", "num_labelled": 2}
    assert "the test set has 3 videos and all are positive" in refused(
        **of_one, test_labels=tmp_path / "light.txt", positive_class="1"
    )
    assert "there is no such folder" in refused(unlabelled=tmp_path / "nothing")
    assert "--seeds 0 0: expected different integers" in refused(seeds="0 0")
    assert "--endora_legacy: is about unlabelled clips" in refused(endora_legacy="")
    assert "--row clips: expected NAME=CLIPS." in refused("benchmark_augmentation.py", row="clips")
    assert not (tmp_path / "out" / "seed_0").exists()
