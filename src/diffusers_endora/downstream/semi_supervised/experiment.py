"""Runs of several methods over several seeds, each kept, and what they add up to."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...data.clips import ClipDataset
from ...files import replacing_entries, written_atomically
from ...metrics.report import BLUE, GREY, ORANGE, new_figure, save_figure
from ...training.checkpoints import list_checkpoints, remove
from .scores import MEASURES, choose_threshold, score, trivial_scores
from .splits import draw_splits
from .trainer import TrainingSettings, predict, train_classifier
from .videos import Clips, LabelledVideos

logger = logging.getLogger(__name__)

SUPERVISED = "supervised only"
REST = "rest"  # in place of an unlabelled source: the training videos that are neither labelled nor for validation
RUN = "run.json"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: in tables and, with other characters, as a folder.
        source: of the unlabelled clips, as the command line names it, or `REST`; None for labelled clips alone.
        endora_legacy: see `train_classifier`.
    """

    name: str
    source: str | None = None
    endora_legacy: bool = False

    @property
    def folder_name(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name)


@dataclass(frozen=True)
class Protocol:
    """What all runs share.

    Attributes:
        num_labelled, validation_fraction, first_of_class: see `draw_splits`.
        num_unlabelled: clips, the paper's m.
        seeds: a run each.
    """

    num_labelled: int
    num_unlabelled: int
    validation_fraction: float
    first_of_class: bool
    seeds: list[int]


@dataclass(frozen=True)
class Experiment:
    """What the runs of all methods and seeds share.

    Attributes:
        train, test: the labelled videos.
        sources: the unlabelled clips of the methods, by source.
        protocol, settings: of the splits, and of each training.
        make_classifier: makes a new one, its random weights by torch's generator.
        description: what else runs depend on, as JSON has it; a folder takes runs of one description.
    """

    train: LabelledVideos
    test: LabelledVideos
    sources: dict[str, ClipDataset]
    protocol: Protocol
    settings: TrainingSettings
    make_classifier: Callable[[], nn.Module]
    description: dict[str, Any]


def run_all(experiment: Experiment, methods: list[Method], output_dir: Path) -> dict[str, Any]:
    """Every method with every seed; runs that are there are not repeated. Writes and returns what `summarise` makes.

    Raises:
        ValueError: a class is absent, or `output_dir` has runs of another description.
        VideoError: a video is damaged.
    """
    runs: list[dict[str, Any]] = []
    for seed in experiment.protocol.seeds:  # all methods of a seed first: what is there can be compared
        for method in methods:
            runs.append(run(experiment, method, seed, output_dir / f"seed_{seed}" / method.folder_name))
            results = summarise(runs, experiment.train, experiment.test)
            write_results(results, output_dir)
    return results


def run(experiment: Experiment, method: Method, seed: int, folder: Path) -> dict[str, Any]:
    """One method with one seed: `run.json`, the classifier and the probabilities of the test videos, in `folder`."""
    train, test, protocol = experiment.train, experiment.test, experiment.protocol
    description = {
        "method": method.name,
        "source": method.source,
        "endora_legacy": method.endora_legacy,
        "seed": seed,
        **{name: value for name, value in asdict(protocol).items() if name != "seeds"},
        **experiment.settings.deciding(),
        **experiment.description,
    }
    record = folder / RUN
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if differing := [name for name in description if known["description"].get(name) != description[name]]:
            changes = ", ".join(f"{n} was {known['description'].get(n)} and is {description[n]}" for n in differing)
            raise ValueError(f"{folder}: holds a run of other settings ({changes}); choose another --output_dir.")
        remove_checkpoints(folder)
        return known
    splits = draw_splits(
        train.labels, protocol.num_labelled, protocol.validation_fraction, seed, protocol.first_of_class
    )
    unlabelled = None
    if method.source is not None:
        dataset = train.random_clips if method.source == REST else experiment.sources[method.source]
        videos = splits.rest if method.source == REST else range(dataset.num_videos)
        chosen = np.random.default_rng((seed, 1)).permutation(len(videos))[: protocol.num_unlabelled]
        unlabelled = Clips(dataset, [videos[int(i)] for i in sorted(chosen)])
    torch.manual_seed(seed)  # the same initial weights for all methods
    logger.warning("%s, seed %d", method.name, seed)
    trained = train_classifier(
        experiment.make_classifier(),
        train,
        splits.labelled,
        splits.validation,
        unlabelled,
        experiment.settings,
        seed,
        folder,
        {**description, "labelled": splits.labelled, "validation": splits.validation},
        method.endora_legacy,
    )
    threshold = choose_threshold(
        train.labels[splits.validation], predict(trained.classifier, train, splits.validation)
    )
    probabilities = predict(trained.classifier, test, range(len(test)))
    result = {
        "description": description,
        "threshold": threshold,
        "scores": score(test.labels, probabilities, threshold).as_dict(),
        "history": trained.history,
        "labelled": [train.random_clips.video_name(i) for i in splits.labelled],
        "validation": [train.random_clips.video_name(i) for i in splits.validation],
        "test_probabilities": probabilities.tolist(),
    }
    with replacing_entries(folder) as new:
        (new / "classifier").mkdir()
        trained.classifier.cpu().save_pretrained(new / "classifier")  # type: ignore[operator]
        (new / RUN).write_text(json.dumps(result, indent=1), encoding="utf-8")
    remove_checkpoints(folder)
    return result


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a run that is kept."""
    for checkpoint in list_checkpoints(folder):
        remove(checkpoint)


def summarise(runs: list[dict[str, Any]], train: LabelledVideos, test: LabelledVideos) -> dict[str, Any]:
    """Mean and spread of each method, its difference from the supervised runs of the same seeds, trivial classifiers.

    Spreads are standard deviations over seeds (N - 1), None with one seed.
    """
    methods: dict[str, list[dict[str, Any]]] = {}
    for finished in runs:
        methods.setdefault(finished["description"]["method"], []).append(finished)
    supervised = {of["description"]["seed"]: of["scores"] for of in methods.get(SUPERVISED, [])}
    summary: dict[str, Any] = {}
    for name, of_method in methods.items():
        summary[name] = {
            "seeds": [of["description"]["seed"] for of in of_method],
            "scores": {measure: mean_and_spread([of["scores"][measure] for of in of_method]) for measure in MEASURES},
        }
        if name != SUPERVISED and supervised:
            summary[name]["gain"] = {
                measure: mean_and_spread(
                    [of["scores"][measure] - supervised[of["description"]["seed"]][measure] for of in of_method]
                )
                for measure in MEASURES
            }
    return {
        "positive_class": test.positive_class,
        "test": {
            "positive": int(test.labels.sum()),
            "negative": int(len(test) - test.labels.sum()),
            "left_out": test.num_left_out,
        },
        "trivial": {
            name: scores.as_dict() for name, scores in trivial_scores(test.labels, float(train.labels.mean())).items()
        },
        "methods": summary,
        "runs": runs,
    }


def mean_and_spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (N - 1; None of one value), and how many values are above 0."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "num_positive": sum(v > 0 for v in values), "values": values}


# --- tables and curves -----------------------------------------------------------------------------------------------


def write_results(results: dict[str, Any], output_dir: Path) -> None:
    """Writes `results.json`, `table.md` and `curves.png`."""
    with written_atomically(output_dir / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
    with written_atomically(output_dir / "table.md") as temporary:
        temporary.write_text(table(results), encoding="utf-8")
    draw_curves(results, output_dir / "curves.png")


def table(results: dict[str, Any]) -> str:
    """Markdown: the trivial classifiers, the methods, and the gains over the supervised runs of the same seeds."""
    head = ["| | " + " | ".join(MEASURES.values()) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    lines = list(head)
    for name, scores in results["trivial"].items():
        lines.append(f"| {name} | " + " | ".join(f"{scores[measure]:.1f}" for measure in MEASURES) + " |")
    for name, of_method in results["methods"].items():
        lines.append(f"| {name} | " + " | ".join(shown(of_method["scores"][measure]) for measure in MEASURES) + " |")
    gains = {name: of_method["gain"] for name, of_method in results["methods"].items() if "gain" in of_method}
    if gains:
        lines += ["", f"Gain over {SUPERVISED}, by seed (seeds with a gain):", "", *head]
        for name, gain in gains.items():
            cells = [
                f"{shown(gain[m], sign='+')} ({gain[m]['num_positive']} of {len(gain[m]['values'])})" for m in MEASURES
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    counts = sorted({len(of_method["seeds"]) for of_method in results["methods"].values()})
    of_seeds = "one seed" if counts == [1] else f"mean ± standard deviation over {' or '.join(map(str, counts))} seeds"
    test = results["test"]
    lines += [
        "",
        f"Percent, {of_seeds}. {results['positive_class']!r} is positive: "
        f"{test['positive']} of {test['positive'] + test['negative']} test videos "
        f"({test['left_out']} left out as broken, too short or without a label). Model and threshold are chosen on "
        "validation videos.",
    ]
    return "\n".join(lines) + "\n"


def shown(value: dict[str, Any], sign: str = "") -> str:
    """`mean ± std`, or the mean alone."""
    mean = f"{value['mean']:{sign}.1f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.1f}"


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Validation AUROC over the steps, mean over seeds, and test AUROC of every seed, at the right."""
    figure, axes = new_figure(6.4, 3.4)
    colours = [GREY, BLUE, ORANGE, "#2a9d5c", "#8e5bb5", "#b58a2a", "#c2417c"]
    last = max(look["step"] for of in results["runs"] for look in of["history"])
    for number, (name, of_method) in enumerate(results["methods"].items()):
        histories = [of["history"] for of in results["runs"] if of["description"]["method"] == name]
        steps = [look["step"] for look in histories[0]]
        mean = np.mean([[look["validation_auroc"] for look in history] for history in histories], axis=0)
        colour = colours[number % len(colours)]
        axes.plot(steps, mean, color=colour, linewidth=1.5, label=name)
        place = last * (1.06 + 0.05 * number)
        values = of_method["scores"]["auroc"]["values"]
        axes.scatter([place] * len(values), values, s=12, color=colour, alpha=0.7, linewidths=0)
        axes.plot([place - 0.015 * last, place + 0.015 * last], [np.mean(values)] * 2, color=colour, linewidth=2)
    axes.axvline(last * 1.02, color=GREY, linewidth=0.5)
    axes.set_xlabel("step; right of the line: test AUROC, a dot per seed")
    axes.set_ylabel("validation AUROC, %")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    save_figure(figure, path)
