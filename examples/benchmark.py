"""Many models on many corpora: the tables of a paper, as markdown, csv and a picture.

    python examples/benchmark.py benchmark.yaml

The file names corpora, models and, where one table of all is not enough, tables:

    output: benchmark                # relative paths start at the file's folder
    corpora:
      Colonoscopic: {real: colonoscopic/test, train: colonoscopic/train}
      Kvasir-Capsule: {real: capsule/test}
    models:                          # pipeline folders, Hub ids, or folders of clips of other methods
      StyleGAN-V: {Colonoscopic: stylegan_v/colonoscopic, Kvasir-Capsule: stylegan_v/capsule}
      Endora: {Colonoscopic: endora-colonoscopic, Kvasir-Capsule: endora-capsule}
      Endora without prior: {Colonoscopic: endora-no-prior}
    tables:
      Table 1: [StyleGAN-V, Endora]
      Table 3: [Endora without prior, Endora]
    options: {protocol: endora-strict, metrics: [fvd, kvd, prdc], num_clips: 2048}

A model can also be trained here, on every corpus, by the stages of its training, command lines of example scripts:

      Endora:
        training:
          - train_autoencoder.py --train_data_dir {train} --output_dir {output} --max_train_steps 2000
          - >-
            train_endora.py --train_data_dir {train} --pretrained_vae {stage_1} --output_dir {output}
            --max_train_steps 9000

`{train}` is the corpus' training folder, `{output}` the folder of the stage, `{stage_1}` that of an earlier one; the
last is evaluated. The seconds that each took and its floating-point operations, counted by a run of its first steps,
are the table `training.md`. A stage that was killed goes on if its command says `--resume_from_checkpoint latest`; its
seconds are those of all its runs.

`options` are those of `endora evaluate`, those of schedulers for pipelines that have one; a list as `protocol` makes
each table for each of them. A corpus may have `options` of its own beside `real` and `train`, as `{num_clips: 100}`
where it is small. Each pair of model and corpus gets its full report in `output`; a pair that fails says why
in its row, and the others go on. What is sampled or computed is kept: a second run repeats nothing. Several processes
share the work: `torchrun --nproc_per_node 2 examples/benchmark.py benchmark.yaml`; trainings can run beforehand, one
by one or side by side: `examples/benchmark.py benchmark.yaml --train_only --models Endora --corpora Colonoscopic`.
"""

import argparse
import contextlib
import csv
import inspect
import json
import logging
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from diffusers_endora import cli
from diffusers_endora.baselines.registry import kind_of
from diffusers_endora.files import written_atomically
from diffusers_endora.metrics.distributed import shared_state
from diffusers_endora.metrics.protocols import PROTOCOLS
from diffusers_endora.metrics.report import new_figure, save_figure, with_spread
from diffusers_endora.training.compute import count_training, steps_of

logger = logging.getLogger("benchmark")

PATHS = {"cache_dir", "dino_model", "i3d_weights", "inception_weights", "other_corpus", "videomae_model"}
OF_SCHEDULERS = {"num_inference_steps", "scheduler"}  # options that some pipelines have no use for
TRAINING = "training"  # in a model's entry, in place of its folders
NO_OPTIONS = {"real", "fake", "train", "output", "samples_dir", "more_metrics"}
OPTIONS = set(inspect.signature(cli.evaluate).parameters) - NO_OPTIONS


@dataclass(frozen=True)
class Benchmark:
    """What a yaml file asks for."""

    output: Path
    corpora: dict[str, dict[str, str]]
    options_of: dict[str, dict[str, Any]]  # by corpus
    models: dict[str, dict[str, str]]
    trainings: dict[str, list[str]]  # stages of the models that are trained here
    tables: dict[str, list[str]]
    protocols: list[str]
    options: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One model on one corpus: the rows of its report, or why there is none."""

    rows: dict[str, dict[str, Any]]
    error: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)  # of its training: command, seconds, operations


def read_benchmark(path: Path) -> Benchmark:
    """Reads and checks a yaml file.

    Raises:
        ValueError: it is no yaml, lacks something or names something that is not known.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as yaml ({' '.join(str(error).split())})") from error
    known = {"output", "corpora", "models", "tables", "options"}
    if not isinstance(content, dict) or not {"corpora", "models"} <= set(content) <= known:
        raise ValueError(f"{path}: expected corpora and models, and perhaps output, tables and options")
    corpora, models = content["corpora"], content["models"]
    for kind, entries in (("corpora", corpora), ("models", models)):
        if not isinstance(entries, dict) or not entries or not all(isinstance(of, dict) for of in entries.values()):
            raise ValueError(f"{path}: {kind}: expected names, each with its paths")
    for name, corpus in corpora.items():
        if "real" not in corpus or not set(corpus) <= {"real", "train", "options"}:
            raise ValueError(
                f"{path}: corpus {name}: expected real and perhaps train and options, got {', '.join(corpus)}"
            )
    trainings = {name: of[TRAINING] for name, of in models.items() if TRAINING in of}
    for name, stages in trainings.items():
        if set(models[name]) != {TRAINING} or not isinstance(stages, list) or not all(map(is_stage, stages)):
            raise ValueError(
                f"{path}: model {name}: expected training to be its command lines, and no folders beside it"
            )
        if without := [corpus for corpus, paths in corpora.items() if "train" not in paths]:
            raise ValueError(f"{path}: model {name}: corpus {without[0]} has no train, which training needs")
        for stage in stages:
            try:
                steps_of(shlex.split(stage))
            except ValueError as error:
                raise ValueError(f"{path}: model {name}: {error}") from error
    folders = {name: sources for name, sources in models.items() if name not in trainings}
    for name, sources in folders.items():
        if other := sorted(set(sources) - set(corpora)):
            raise ValueError(f"{path}: model {name}: {other[0]} is none of the corpora ({', '.join(corpora)})")
    tables = content.get("tables") or {"Benchmark": list(models)}
    for name, rows in tables.items():
        if other := [row for row in rows if row not in models]:
            raise ValueError(f"{path}: table {name}: {other[0]} is none of the models ({', '.join(models)})")
    options = content.get("options") or {}
    options_of = {name: corpus.pop("options", None) or {} for name, corpus in corpora.items()}
    for known_here, given in ((OPTIONS, options), *((OPTIONS - {"protocol"}, own) for own in options_of.values())):
        if not isinstance(given, dict):
            raise ValueError(f"{path}: options: expected names with values, got {given}")
        if other := sorted(set(given) - known_here):
            raise ValueError(f"{path}: option {other[0]}: expected one of {', '.join(sorted(known_here))}")
    options = dict(options)
    protocols = options.pop("protocol", "endora-strict")
    protocols = protocols if isinstance(protocols, list) else [protocols]
    if other := [name for name in protocols if name not in PROTOCOLS] or ([] if protocols else ["none"]):
        raise ValueError(f"{path}: protocol {other[0]}: expected one of {', '.join(PROTOCOLS)}, or a list of them")
    output = path.parent / content.get("output", "benchmark")
    sources = {name: folders.get(name, dict.fromkeys(corpora, "")) for name in models}
    return Benchmark(output, corpora, options_of, sources, trainings, tables, protocols, options)


def part_of(benchmark: Benchmark, models: list[str] | None, corpora: list[str] | None) -> Benchmark:
    """A benchmark of some of its models and corpora; None: all.

    Raises:
        ValueError: a name is not in it.
    """
    for kind, names, known in (("model", models, benchmark.models), ("corpus", corpora, benchmark.corpora)):
        if other := [name for name in names or [] if name not in known]:
            raise ValueError(f"{kind} {other[0]}: expected one of {', '.join(known)}")
    kept = {
        model: {corpus: source for corpus, source in sources.items() if corpora is None or corpus in corpora}
        for model, sources in benchmark.models.items()
        if models is None or model in models
    }
    tables = {name: [row for row in rows if row in kept] for name, rows in benchmark.tables.items()}
    return replace(
        benchmark,
        corpora={name: of for name, of in benchmark.corpora.items() if corpora is None or name in corpora},
        models=kept,
        trainings={name: stages for name, stages in benchmark.trainings.items() if name in kept},
        tables={name: rows for name, rows in tables.items() if rows},
    )


def is_stage(stage: Any) -> bool:
    """Whether it is a command line that can be split."""
    try:
        return bool(isinstance(stage, str) and shlex.split(stage))
    except ValueError:  # an open quotation mark
        return False


def locate(source: str, folder: Path) -> str:
    """A path relative to the yaml file's folder; what is not there stays as it is, and may be a Hub id."""
    return str(folder / source) if (folder / source).exists() else source


def run(benchmark: Benchmark, folder: Path, protocol: str) -> dict[tuple[str, str], Outcome]:
    """Evaluates every model on every corpus that it has clips of."""
    outcomes = {}
    needed = {model for rows in benchmark.tables.values() for model in rows}
    for model in (name for name in benchmark.models if name in needed):
        for corpus, source in benchmark.models[model].items():
            options: dict[str, Any] = {**benchmark.options, **benchmark.options_of[corpus], "protocol": protocol}
            options |= {name: locate(options[name], folder) for name in PATHS & options.keys()}
            options |= {name: locate(path, folder) for name, path in benchmark.corpora[corpus].items()}
            several = [protocol] if len(benchmark.protocols) > 1 else []
            output = benchmark.output.joinpath("reports", *several, slug(model), slug(corpus))
            stages: list[dict[str, Any]] = []
            try:
                fake = locate(source, folder)
                if model in benchmark.trainings:
                    stages = train(benchmark, folder, model, corpus)
                    fake = stages[-1]["output"]
                if cli.is_pipeline(fake) and not kind_of(fake).has_scheduler:
                    options = {name: value for name, value in options.items() if name not in OF_SCHEDULERS}
                samples = benchmark.output / "samples" / slug(model) / slug(corpus)  # the same for every protocol
                cli.evaluate(fake=fake, output=output, samples_dir=samples, **options)
            except Exception as error:  # whatever it is, the other models go on
                is_told = isinstance(error, ValueError | OSError)  # in its sentence
                logger.error("%s on %s failed: %s", model, corpus, error, exc_info=not is_told)
                outcomes[model, corpus] = Outcome({}, " ".join(f"{error}".split()) or type(error).__name__, stages)
                continue
            if shared_state().is_main_process:
                report = json.loads((output / "report.json").read_text(encoding="utf-8"))
                outcomes[model, corpus] = Outcome({row["metric"]: row for row in report["results"]}, stages=stages)
    return outcomes


# --- training --------------------------------------------------------------------------------------------------------


def train(
    benchmark: Benchmark, folder: Path, model: str, corpus: str, with_operations: bool = True
) -> list[dict[str, Any]]:
    """Trains a model on a corpus, stage by stage; a stage that is there is not trained again.

    Returns:
        For each stage its `command`, `output`, `steps`, `seconds`, whether it `is_finished` and, if asked for, its
        `operations`; each has a file of its own.

    Raises:
        ValueError: a stage fails, or its folder was trained by another command.
    """
    if shared_state().num_processes > 1:
        raise ValueError("training is made for one process; evaluate in several once the models are there")
    home = benchmark.output / "models" / slug(model) / slug(corpus)
    places = {"{train}": locate(benchmark.corpora[corpus]["train"], folder)}
    stages: list[dict[str, Any]] = []
    for number, line in enumerate(benchmark.trainings[model], start=1):
        output, record = home / f"stage_{number}", home / f"stage_{number}.json"
        written = line.replace("{train}", benchmark.corpora[corpus]["train"])  # the same wherever it is run from
        command = shlex.split(line)
        for name, place in places.items():
            command = [part.replace(name, place) for part in command]
        command[0] = locate(command[0], folder)
        stage = {"command": written, "steps": steps_of(command), "seconds": 0.0}
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else stage
        if known["command"] != written:
            raise ValueError(f"{output}: was trained by another command; choose another output folder")
        if not known.get("is_finished"):
            home.mkdir(parents=True, exist_ok=True)
            known = run_stage(command, output, known, record)
        if with_operations and "operations" not in known:
            try:
                known = {**known, "operations": count_training(command)}
                write_json(record, known)
            except ValueError as error:  # the model is there all the same
                logger.error("operations are not counted: %s", error)
        places[f"{{stage_{number}}}"] = str(output)
        stages.append({**known, "output": str(output)})
    return stages


def train_all(benchmark: Benchmark, folder: Path) -> int:
    """Trains what is to be trained; returns the exit code, 1 where a training failed."""
    code = 0
    for model in benchmark.trainings:
        for corpus in benchmark.models[model]:
            try:
                train(benchmark, folder, model, corpus, with_operations=False)
            except (ValueError, OSError) as error:  # the others go on
                logger.error("%s on %s failed: %s", model, corpus, error)
                code = 1
    return code


def run_stage(command: list[str], output: Path, stage: dict[str, Any], record: Path) -> dict[str, Any]:
    """Runs a stage to its end, keeping its record.

    The record is written while it runs, so that the seconds of a run that was killed are not lost.
    """
    logger.warning("%s", " ".join(command).replace("{output}", str(output)))
    with record.with_suffix(".log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *(part.replace("{output}", str(output)) for part in command)], stdout=log, stderr=log
        )
        before, start = stage["seconds"], time.monotonic()
        code = None
        try:
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=10)
                stage = {**stage, "seconds": round(before + time.monotonic() - start, 3)}
                write_json(record, stage)
        finally:
            process.kill()
    if code:
        said = record.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(f"{Path(command[0]).name} failed: {said[-1] if said else f'exit code {code}'}")
    stage = {**stage, "is_finished": True}
    write_json(record, stage)
    return stage


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file whole."""
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_training_table(benchmark: Benchmark, outcomes: dict[tuple[str, str], Outcome]) -> None:
    """Writes what the trainings took, `training.md`."""
    lines = ["| model | corpus | steps | seconds | 10^15 operations |", "|---" * 5 + "|"]
    for (model, corpus), outcome in outcomes.items():
        if outcome.stages:
            steps = " + ".join(f"{stage['steps']}" for stage in outcome.stages)
            seconds = added_up([stage["seconds"] for stage in outcome.stages], "{:.0f}")
            is_counted = all("operations" in stage for stage in outcome.stages)
            operations = [stage.get("operations", 0) / 1e15 for stage in outcome.stages]
            shown = added_up(operations, "{:.3g}") if is_counted else "not counted"
            lines.append(f"| {model} | {corpus} | {steps} | {seconds} | {shown} |")
    with written_atomically(benchmark.output / "training.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def added_up(values: list[float], text: str) -> str:
    """`a + b = c`, each as `text` says; one value alone."""
    parts = " + ".join(text.format(value) for value in values)
    return parts if len(values) == 1 else f"{parts} = {text.format(sum(values))}"


def slug(name: str) -> str:
    """A name as a folder: letters, digits, `-`, `_` and `.`."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"


def spreads(row: dict[str, Any]) -> dict[str, float]:
    """What a spread is of -> standard deviation: over seeds of sampling, and what the metric has of its own."""
    found = {}
    if row["std_over_seeds"] is not None:
        found[f"{len(row['per_seed'])} sets of samples"] = row["std_over_seeds"]
    if row["spread"]:
        found[row["spread"]["kind"]] = row["spread"]["std"]
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def columns(rows: list[str], corpora: list[str], outcomes: dict[tuple[str, str], Outcome]) -> list[tuple[str, str]]:
    """Pairs of corpus and metric, as far as any model has them."""
    found = []
    for corpus in corpora:
        of_corpus = [outcomes[model, corpus] for model in rows if (model, corpus) in outcomes]
        metrics = dict.fromkeys(metric for outcome in of_corpus for metric in outcome.rows)
        found += [(corpus, metric) for metric in metrics]
        if of_corpus and not metrics:
            found.append((corpus, ""))  # all failed
    return found


def cells(
    rows: list[str], cols: list[tuple[str, str]], outcomes: dict[tuple[str, str], Outcome]
) -> list[list[tuple[str, bool]]]:
    """Texts with whether they are the best of their column; a failure is told in the first column of its corpus."""
    best = {}
    for corpus, metric in cols:
        present = [
            outcomes[model, corpus].rows[metric]
            for model in rows
            if (model, corpus) in outcomes and metric in outcomes[model, corpus].rows
        ]
        values = {row["value"] for row in present}
        if len(values) > 1:  # nothing is best among equals
            best[corpus, metric] = min(values) if present[0]["better"] == "lower" else max(values)
    table = []
    for model in rows:
        line: list[tuple[str, bool]] = []
        told = set()
        for corpus, metric in cols:
            outcome = outcomes.get((model, corpus))
            if outcome is None:
                line.append(("-", False))
            elif metric in outcome.rows:
                row = outcome.rows[metric]
                text = with_spread(row["value"], *spreads(row).values())
                line.append((text, best.get((corpus, metric)) == row["value"]))
            else:
                line.append(("-" if corpus in told else f"failed: {outcome.error}", False))
                told.add(corpus)
        table.append(line)
    return table


def header(col: tuple[str, str], outcomes: dict[tuple[str, str], Outcome]) -> str:
    """`corpus, metric` with an arrow to where it gets better."""
    corpus, metric = col
    if not metric:
        return corpus
    row = next(
        outcome.rows[metric] for (_, of), outcome in outcomes.items() if of == corpus and metric in outcome.rows
    )
    return f"{corpus}, {row['label']} {'↓' if row['better'] == 'lower' else '↑'}"


def write_table(name: str, rows: list[str], benchmark: Benchmark, outcomes: dict[tuple[str, str], Outcome]) -> None:
    """Writes one table as `.md`, `.csv` and `.png`."""
    cols = columns(rows, list(benchmark.corpora), outcomes)
    headers = [header(col, outcomes) for col in cols]
    texts = cells(rows, cols, outcomes)
    path = benchmark.output / f"{slug(name)}.md"
    kinds = {
        f"{row['label']}: {' / '.join(of_row)}"
        for outcome in outcomes.values()
        for row in outcome.rows.values()
        if (of_row := spreads(row))
    }
    legend = f"Mean ± standard deviations ({'; '.join(sorted(kinds))}). Best in bold. " if kinds else ""
    note = f"{legend}Protocol and warnings: see reports/."
    with written_atomically(path) as temporary:
        page = "\n".join([f"# {name}", "", markdown_table(rows, headers, texts), "", note]) + "\n"
        temporary.write_text(page, encoding="utf-8")
    write_csv(path.with_suffix(".csv"), rows, list(benchmark.corpora), outcomes)
    draw_table(path.with_suffix(".png"), rows, headers, texts)


def markdown_table(rows: list[str], headers: list[str], texts: list[list[tuple[str, bool]]]) -> str:
    """The table, the best of a column in bold."""
    lines = ["| | " + " | ".join(headers) + " |", "|---" * (len(headers) + 1) + "|"]
    for model, line in zip(rows, texts, strict=True):
        shown = [f"**{text}**" if is_best else text.replace("|", "\\|") for text, is_best in line]
        lines.append(f"| {model} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[str], corpora: list[str], outcomes: dict[tuple[str, str], Outcome]) -> None:
    """Writes a line per number, in full precision, and one per failure."""
    names = [
        "model",
        "corpus",
        "metric",
        "value",
        "std_over_seeds",
        "spread",
        "spread_kind",
        "infinity",
        "num_real",
        "num_fake",
        "error",
    ]
    with written_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for model, corpus in ((model, corpus) for model in rows for corpus in corpora if (model, corpus) in outcomes):
            outcome = outcomes[model, corpus]
            for metric, row in outcome.rows.items():
                line = {"model": model, "corpus": corpus, "metric": metric, "std_over_seeds": row["std_over_seeds"]}
                if row["spread"]:
                    line |= {"spread": row["spread"]["std"], "spread_kind": row["spread"]["kind"]}
                line["infinity"] = row["infinity"]["value"] if row["infinity"] else None
                writer.writerow(line | {name: row[name] for name in ("value", "num_real", "num_fake")})
            if outcome.error is not None:
                writer.writerow({"model": model, "corpus": corpus, "error": outcome.error})


def draw_table(path: Path, rows: list[str], headers: list[str], texts: list[list[tuple[str, bool]]]) -> None:
    """Writes the table as a picture; long texts are cut."""
    short = [[text if len(text) <= 40 else text[:37] + "..." for text, _ in line] for line in texts]
    lengths = [max(map(len, [head, *column])) for head, column in zip(headers, zip(*short, strict=True), strict=True)]
    widths = [length + 3 for length in (max(map(len, rows)), *lengths)]
    figure, axes = new_figure(0.085 * sum(widths), 0.3 * (len(rows) + 1) + 0.1)
    axes.axis("off")
    drawn = axes.table(
        [[model, *line] for model, line in zip(rows, short, strict=True)],
        colLabels=["", *headers],
        colWidths=[width / sum(widths) for width in widths],
        cellLoc="center",
        bbox=[0, 0, 1, 1],
        edges="horizontal",
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (i, j), cell in drawn.get_celld().items():
        if j == 0:
            cell.get_text().set_horizontalalignment("left")
        elif i > 0 and texts[i - 1][j - 1][1]:
            cell.get_text().set_weight("bold")
    save_figure(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", type=Path, help="A yaml file, see the head of this script.")
    parser.add_argument("--models", nargs="+", help="These alone, with the tables of them alone.")
    parser.add_argument("--corpora", nargs="+", help="These alone.")
    parser.add_argument("--train_only", action="store_true", help="End when the models are trained.")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        benchmark = read_benchmark(arguments.benchmark)
        benchmark = part_of(benchmark, arguments.models, arguments.corpora)
    except ValueError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1
    benchmark.output.mkdir(parents=True, exist_ok=True)
    if arguments.train_only:
        return train_all(benchmark, arguments.benchmark.parent)
    succeeded = False
    for protocol in benchmark.protocols:
        outcomes = run(benchmark, arguments.benchmark.parent, protocol)
        succeeded = succeeded or any(outcome.rows for outcome in outcomes.values())
        if shared_state().is_main_process:
            for name, rows in benchmark.tables.items():
                title = f"{name}, {protocol}" if len(benchmark.protocols) > 1 else name
                write_table(title, rows, benchmark, outcomes)
                print((benchmark.output / f"{slug(title)}.md").read_text(encoding="utf-8"))
            if any(outcome.stages for outcome in outcomes.values()):
                write_training_table(benchmark, outcomes)
    if shared_state().is_main_process and (benchmark.output / "training.md").is_file():
        print((benchmark.output / "training.md").read_text(encoding="utf-8"))
    return 0 if succeeded or not shared_state().is_main_process else 1


if __name__ == "__main__":
    sys.exit(main())
