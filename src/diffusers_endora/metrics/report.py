"""The report of an evaluation: json for machines, markdown and pictures for people."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..data.contact_sheet import save_contact_sheet
from ..files import written_atomically

PICTURES = {
    "real_clips.png": "Real clips, as the networks saw them",
    "fake_clips.png": "Generated clips, as the networks saw them",
    "fvd_against_n.png": "FVD against the number of clips, with the extrapolation to infinitely many",
    "ladder.png": "The reference ladder",
    "closest_pairs.png": "Generated clips (upper rows) above their nearest training clips (lower rows)",
}

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # told apart by the colour-blind (Okabe and Ito)


def write_report(
    report: dict[str, Any],
    output_dir: str | os.PathLike[str],
    real_clips: np.ndarray | None = None,
    fake_clips: np.ndarray | None = None,
    closest_pairs: np.ndarray | None = None,
) -> Path:
    """Writes `report.json`, `report.md` and the pictures that there is something for; earlier ones are replaced.

    Args:
        report: what `evaluate` returns.
        real_clips, fake_clips: uint8 `(n, F, H, W, 3)`, a row of the sheet each.
        closest_pairs: uint8 `(n, 2, F, H, W, 3)`, a generated clip and its nearest training clip.

    Returns:
        The path of `report.md`.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*PICTURES, "report.json", "report.md"):
        for stale in folder.glob(f".{Path(name).stem}-*"):  # of a process that was killed
            stale.unlink()
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    if real_clips is not None:
        save_contact_sheet(folder / "real_clips.png", real_clips)
    if fake_clips is not None:
        save_contact_sheet(folder / "fake_clips.png", fake_clips)
    if closest_pairs is not None:
        save_contact_sheet(folder / "closest_pairs.png", closest_pairs.reshape(-1, *closest_pairs.shape[2:]))
    extrapolated = next(
        (row for row in report["results"] if row["metric"] == "fvd" and row["infinity"]["values"]), None
    )
    if extrapolated is not None:
        plot_against_n(extrapolated, folder / "fvd_against_n.png")
    if report["ladder"] is not None:
        plot_ladder(report["ladder"], folder / "ladder.png")
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    with written_atomically(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with written_atomically(folder / "report.md") as temporary:
        temporary.write_text(markdown(report, pictures), encoding="utf-8")
    return folder / "report.md"


# --- text ------------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, four or two for a spread; powers of ten only for the very small."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}" if decimals <= 7 else f"{value:.{digits - 1}g}"


def with_spread(value: float, *stds: float | None) -> str:
    """`value ± std / std`, the smallest spread above 0 with two digits, the rest with as many decimals."""
    known = [std for std in stds if std is not None]
    if not any(known):
        return number(value) + (" ± 0" if known else "")
    decimals = max(0, 1 - math.floor(math.log10(min(filter(None, known)))))
    if decimals > 7:
        return f"{value:.3g} ± " + " / ".join(f"{std:.2g}" for std in known)
    return f"{value:.{decimals}f} ± " + " / ".join(f"{std:.{decimals}f}" for std in known)


def markdown(report: dict[str, Any], pictures: list[str]) -> str:
    """The report as a page; `pictures` are names of files beside it."""
    parts = [f"# Evaluation by {report['protocol']['name']}"]
    if report["results"]:
        parts.append(results_table(report["results"]))
        if notes := [
            f"{row['label']} at N → ∞: {row['infinity']['reason']}"
            for row in report["results"]
            if row["infinity"] and row["infinity"]["reason"]
        ]:
            parts.append("\n".join(notes))
    if report["warnings"]:
        parts.append("**Warnings**\n\n" + "\n".join(f"- {warning}" for warning in report["warnings"]))
    if report["ladder"] is not None:
        parts.append(ladder_section(report["ladder"]))
    if report["memorisation"] is not None:
        parts.append(memorisation_section(report["memorisation"]))
    parts.append(method_section(report))
    parts += [f"**{PICTURES[name]}**\n\n![{PICTURES[name]}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def results_table(results: list[dict[str, Any]]) -> str:
    """A row per number: value, spread, 95 % interval, extrapolation, N."""
    lines = [
        "| | value | spread | 95 % | N → ∞ | real / generated | network |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        spreads = []
        if row["std_over_seeds"] is not None:
            spreads.append(f"± {number(row['std_over_seeds'], 2)} ({len(row['per_seed'])} seeds)")
        interval = "-"
        if row["spread"] is not None:
            spreads.append(f"± {number(row['spread']['std'], 2)} ({row['spread']['kind']})")
            if "low" in row["spread"]:
                interval = f"{number(row['spread']['low'])} to {number(row['spread']['high'])}"
        infinity = "-"
        if row["infinity"] and row["infinity"]["value"] is not None:
            infinity = f"{number(row['infinity']['value'])} ± {number(row['infinity']['standard_error'], 2)}"
        arrow = "↓" if row["better"] == "lower" else "↑"
        lines.append(
            f"| {row['label']} {arrow} | **{number(row['value'])}** | {'; '.join(spreads) or '-'} | {interval} | "
            f"{infinity} | {row['num_real']} / {row['num_fake']} | {row['network']} |"
        )
    return "\n".join(lines)


def ladder_section(ladder: dict[str, Any]) -> str:
    """What the distance is worth on this corpus."""
    floor = ladder["rungs"][0]["value"]
    lines = [
        "## Reference ladder",
        "",
        f"FVD ({ladder['network']}) of {ladder['num_clips']} clips against {ladder['num_clips']} others. Reference: "
        f"{ladder['reference']}. Held-out and corrupted: {ladder['held_out']}. Other corpus: {ladder['other']}.",
        "",
        "| | FVD | 95 % | times the floor |",
        "|---|---|---|---|",
    ]
    for rung in ladder["rungs"]:
        bold = "**" if rung["name"] == "generated clips" else ""
        ratio = number(rung["value"] / floor) if floor else "-"
        fewer = "" if rung["num_clips"] == ladder["num_clips"] else f" ({rung['num_clips']} clips only)"
        lines.append(
            f"| {bold}{rung['name']}{fewer}{bold} | {bold}{number(rung['value'])}{bold} | {number(rung['low'])} to "
            f"{number(rung['high'])} | {ratio} |"
        )
    lines.append("")
    if ladder["is_ordered"]:
        lines.append(
            "The order is as it must be: all above the floor, and noise above the other corruptions of the same clips."
        )
    else:
        lines.append("The order is **not** as it must be: " + " ".join(ladder["violations"]))
    return "\n".join(lines)


def memorisation_section(audit: dict[str, Any]) -> str:
    """What was asked, what came out."""
    percent = 100 * audit["fraction"]
    verdict = (
        "That is more than held-out clips do: the model may give back training clips."
        if audit["fraction_low"] > audit["expected"]
        else "That is no more than held-out clips do."
    )
    lines = [
        "## Memorisation",
        "",
        f"Of {audit['num_generated']} generated clips, {percent:.1f} % (95 %: {100 * audit['fraction_low']:.1f} to "
        f"{100 * audit['fraction_high']:.1f} %) lie nearer to their nearest of {audit['num_train']} training clips "
        f"(mirrored ones included, {audit['network']} features) than percentile {audit['percentile']:g} of the same "
        f"distance for {audit['num_held_out']} held-out real clips; {100 * audit['expected']:g} % are expected. "
        f"{verdict}",
        "",
        "| distance | generated | training |",
        "|---|---|---|",
    ]
    lines += [
        f"| {number(pair['distance'])} | {pair['generated']} | {pair['training']} |" for pair in audit["closest"]
    ]
    return "\n".join(lines)


def method_section(report: dict[str, Any]) -> str:
    """Everything that somebody needs to get the same numbers."""
    protocol = report["protocol"]
    changes = ", ".join(f"{name} = {value}" for name, value in protocol["changes"].items())
    lines = [
        "## How it was measured",
        "",
        f"Protocol {protocol['name']}" + (f", changed: {changes}" if changes else "") + f"; seed {protocol['seed']}.",
        "",
        *(f"- {step}" for step in protocol["steps"]),
        "",
        "| | real | generated |",
        "|---|---|---|",
    ]
    real, fake = report["real"], report["fake"] or {}
    facts = {
        "source": "source",
        "num_clips": "clips",
        "num_sets": "sets (seeds)",
        "sampling": "sampled by",
        "num_videos": "videos",
        "num_frames": "frames a clip",
        "stride": "stride",
        "resolution": "compared at (height, width)",
        "source_resolution": "stored at",
        "codec": "stored as",
        "num_overlapping": "overlapping clips",
        "num_too_short": "videos left out, too short",
    }
    for fact, label in facts.items():
        cells = []
        for of_side in (real, fake):
            value = of_side.get(fact)
            value = "-" if value is None else value
            cells.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    lines += ["", "| network | weights | SHA-256 of the weights | preprocessing |", "|---|---|---|---|"]
    for name, network in report["networks"].items():
        lines.append(
            f"| {name} | {network['weights']} | `{network['weights_hash'][:16]}` | {network['preprocessing']} |"
        )
    lines += ["", ", ".join(f"{name} {version}" for name, version in report["package"].items())]
    return "\n".join(lines)


# --- plots -----------------------------------------------------------------------------------------------------------


def plot_against_n(row: dict[str, Any], path: Path) -> None:
    """Distances of subsets against 1/N, the line through them and where it meets 1/N = 0."""
    infinity = row["infinity"]
    figure, axes = new_figure(4.8, 3.2)
    inverse = 1 / np.array(infinity["sizes"])
    slope, intercept = np.polyfit(inverse, infinity["values"], 1)
    line = np.array([0, inverse.max()])
    axes.plot(line, intercept + slope * line, color=GREY, linewidth=1, zorder=1)
    axes.scatter(inverse, infinity["values"], s=14, color=BLUE, zorder=2, label="subsets")
    axes.errorbar([0], [infinity["value"]], [infinity["standard_error"]], fmt="o", color=ORANGE, capsize=3, zorder=3)
    axes.annotate(
        f"{number(infinity['value'])} ± {number(infinity['standard_error'], 2)}",
        (0, infinity["value"]),
        xytext=(8, -4),
        textcoords="offset points",
        color=ORANGE,
        va="top",
    )
    sizes = [infinity["sizes"][i] for i in (0, 2, 6, -1)]
    axes.set_xticks([0] + [1 / size for size in sizes], ["∞", *map(str, sizes)])
    axes.set_xlabel("clips a side, N (spaced as 1/N)")
    axes.set_ylabel(row["label"])
    save_figure(figure, path)


def plot_ladder(ladder: dict[str, Any], path: Path) -> None:
    """A bar per rung with its 95 % interval."""
    rungs = ladder["rungs"]
    figure, axes = new_figure(5.6, 0.5 + 0.36 * len(rungs))
    values = np.array([rung["value"] for rung in rungs])
    low = np.array([rung["low"] for rung in rungs])
    errors = np.stack([values - low, np.array([rung["high"] for rung in rungs]) - values])
    colours = [
        ORANGE if rung["name"] == "generated clips" else GREY if i == 0 else BLUE for i, rung in enumerate(rungs)
    ]
    axes.barh(range(len(rungs)), values, xerr=errors, color=colours, height=0.62, error_kw={"capsize": 2, "lw": 1})
    for i, rung in enumerate(rungs):
        axes.annotate(number(rung["value"]), (rung["high"], i), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rungs)), [rung["name"] for rung in rungs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(rung["high"] for rung in rungs))
    axes.set_xlabel(f"FVD, {ladder['num_clips']} clips a side")
    save_figure(figure, path)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches and its axes, without global state.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('plots need matplotlib: pip install "diffusers-endora[metrics]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG whole or not at all."""
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
