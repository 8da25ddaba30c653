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

`options` are those of `endora evaluate`. Each pair of model and corpus gets its full report in `output`; a pair that
fails says why in its row, and the others go on. What is sampled or computed is kept: a second run repeats nothing.
Several processes share the work: `torchrun --nproc_per_node 2 examples/benchmark.py benchmark.yaml`.
"""

import argparse
import csv
import inspect
import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffusers_endora import cli
from diffusers_endora.files import written_atomically
from diffusers_endora.metrics.distributed import shared_state
from diffusers_endora.metrics.report import new_figure, save_figure, with_spread

logger = logging.getLogger("benchmark")

PATHS = {"cache_dir", "dino_model", "i3d_weights", "inception_weights", "other_corpus", "videomae_model"}
OPTIONS = set(inspect.signature(cli.evaluate).parameters) - {"real", "fake", "train", "output", "more_metrics"}


@dataclass(frozen=True)
class Benchmark:
    """What a yaml file asks for."""

    output: Path
    corpora: dict[str, dict[str, str]]
    models: dict[str, dict[str, str]]
    tables: dict[str, list[str]]
    options: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One model on one corpus: the rows of its report, or why there is none."""

    rows: dict[str, dict[str, Any]]
    error: str | None = None


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
        if "real" not in corpus or not set(corpus) <= {"real", "train"}:
            raise ValueError(f"{path}: corpus {name}: expected real and perhaps train, got {', '.join(corpus)}")
    for name, sources in models.items():
        if other := sorted(set(sources) - set(corpora)):
            raise ValueError(f"{path}: model {name}: {other[0]} is none of the corpora ({', '.join(corpora)})")
    tables = content.get("tables") or {"Benchmark": list(models)}
    for name, rows in tables.items():
        if other := [row for row in rows if row not in models]:
            raise ValueError(f"{path}: table {name}: {other[0]} is none of the models ({', '.join(models)})")
    options = content.get("options") or {}
    if other := sorted(set(options) - OPTIONS):
        raise ValueError(f"{path}: option {other[0]}: expected one of {', '.join(sorted(OPTIONS))}")
    return Benchmark(path.parent / content.get("output", "benchmark"), corpora, models, tables, options)


def locate(source: str, folder: Path) -> str:
    """A path relative to the yaml file's folder; what is not there stays as it is, and may be a Hub id."""
    return str(folder / source) if (folder / source).exists() else source


def run(benchmark: Benchmark, folder: Path) -> dict[tuple[str, str], Outcome]:
    """Evaluates every model on every corpus that it has clips of."""
    outcomes = {}
    needed = {model for rows in benchmark.tables.values() for model in rows}
    for model in (name for name in benchmark.models if name in needed):
        for corpus, source in benchmark.models[model].items():
            options: dict[str, Any] = dict(benchmark.options)
            options |= {name: locate(options[name], folder) for name in PATHS & options.keys()}
            options |= {name: locate(path, folder) for name, path in benchmark.corpora[corpus].items()}
            output = benchmark.output / "reports" / slug(model) / slug(corpus)
            try:
                cli.evaluate(fake=locate(source, folder), output=output, **options)
            except Exception as error:  # whatever it is, the other models go on
                is_told = isinstance(error, ValueError | OSError)  # in its sentence
                logger.error("%s on %s failed: %s", model, corpus, error, exc_info=not is_told)
                outcomes[model, corpus] = Outcome({}, " ".join(f"{error}".split()) or type(error).__name__)
                continue
            if shared_state().is_main_process:
                report = json.loads((output / "report.json").read_text(encoding="utf-8"))
                outcomes[model, corpus] = Outcome({row["metric"]: row for row in report["results"]})
    return outcomes


def slug(name: str) -> str:
    """A name as a folder: letters, digits, `-`, `_` and `.`."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"


def spread(row: dict[str, Any]) -> tuple[float | None, str]:
    """Standard deviation over seeds, else whatever the metric has."""
    if row["std_over_seeds"] is not None:
        return row["std_over_seeds"], f"{len(row['per_seed'])} seeds"
    return (row["spread"]["std"], row["spread"]["kind"]) if row["spread"] else (None, "")


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
                std, _ = spread(row)
                line.append((with_spread(row["value"], std), best.get((corpus, metric)) == row["value"]))
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
        f"{row['label']}: {spread(row)[1]}"
        for outcome in outcomes.values()
        for row in outcome.rows.values()
        if spread(row)[1]
    }
    note = f"Mean ± spread ({'; '.join(sorted(kinds))}). Best in bold. Protocol and warnings: see reports/."
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
        "spread",
        "spread_kind",
        "infinity",
        "num_real",
        "num_fake",
        "error",
    ]
    with written_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, "error"])
        writer.writeheader()
        for model, corpus in ((model, corpus) for model in rows for corpus in corpora if (model, corpus) in outcomes):
            outcome = outcomes[model, corpus]
            for metric, row in outcome.rows.items():
                std, kind = spread(row)
                line = {"model": model, "corpus": corpus, "metric": metric, "spread": std, "spread_kind": kind}
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
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        benchmark = read_benchmark(arguments.benchmark)
    except ValueError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1
    benchmark.output.mkdir(parents=True, exist_ok=True)
    outcomes = run(benchmark, arguments.benchmark.parent)
    if shared_state().is_main_process:
        for name, rows in benchmark.tables.items():
            write_table(name, rows, benchmark, outcomes)
            print((benchmark.output / f"{slug(name)}.md").read_text(encoding="utf-8"))
    return 0 if any(outcome.rows for outcome in outcomes.values()) or not shared_state().is_main_process else 1


if __name__ == "__main__":
    sys.exit(main())
