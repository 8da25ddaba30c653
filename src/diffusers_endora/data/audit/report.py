"""What an audit writes: audit.json for programs, audit.md for people, pictures of the corpus and of text in it."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..contact_sheet import save_contact_sheet
from .audit import MOSTLY, PICTURES_OF_TEXT, Audit
from .burned_in_text import LEAST_FRAMES
from .near_duplicates import CONFIRM, FIND, FRAMES, Overlap

LISTED = 50  # of a kind, in audit.md
_LISTED_IN_JSON = 10_000
_PARTLY = 0.25  # black or frozen: worth a line
_TEXT_COLOUR = (0, 255, 0)
_PICTURE = 480  # pixels, the side of a square


def write_report(audit: Audit, folder: Path) -> dict[str, Any]:
    """Writes the files of a report into a folder and returns the content of `audit.json`."""
    facts = collect_facts(audit)
    write_text(folder / "audit.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    sheet = [e.thumbnails for e in audit.examinations if len(e.thumbnails)]
    rows = [video.name for video, e in zip(audit.videos, audit.examinations, strict=True) if len(e.thumbnails)]
    if sheet:
        width = max(map(len, sheet))
        filled = [np.concatenate([t, np.zeros((width - len(t), *t.shape[1:]), np.uint8)]) for t in sheet]
        save_contact_sheet(folder / "contact_sheet.png", np.stack(filled))
    shown = [number for number, e in enumerate(audit.examinations) if e.picture is not None]
    if shown:
        save_contact_sheet(folder / "text_regions.png", pictures_of_text(audit, shown))
    text = markdown(facts, rows, [audit.videos[number].name for number in shown])
    write_text(folder / "audit.md", text)
    return facts


def write_text(path: Path, content: str) -> None:
    """Writes UTF-8; of reasons that quote a name in another encoding, the bytes are written out."""
    path.write_text(content, encoding="utf-8", errors="backslashreplace")


def collect_facts(audit: Audit) -> dict[str, Any]:
    """The content of `audit.json`."""
    videos: list[dict[str, Any]] = []
    for number, (video, e) in enumerate(zip(audit.videos, audit.examinations, strict=True)):
        videos.append(
            {
                "name": video.name,
                "split": video.split,
                "video_id": video.video_id,
                "width": e.info.width,
                "height": e.info.height,
                "fps": round(e.info.fps, 3),
                "num_frames": e.info.num_frames,
                "seconds": round(e.info.duration, 3),
                "codec": e.info.codec,
                "frames_looked_at": len(e.samples),
                "frames_with_hash": len(e.hashes),
                "brightness": round(e.brightness, 1),
                "black_share": round(e.black_share, 3),
                "frozen_share": None if e.frozen_share is None else round(e.frozen_share, 3),
                "is_black": audit.is_black(number),
                "is_frozen": audit.is_frozen(number),
                "text_regions": [list(box) for box in e.text] if e.text_was_looked_for else None,
                "damaged": e.damaged,
            }
        )
    identical = [
        {
            "videos": [{"name": audit.videos[n].name, "split": audit.split(n)} for n in group],
            "across_splits": audit.is_across(*group),
        }
        for group in audit.identical
    ]
    overlaps = [overlap_facts(audit, overlap) for overlap in audit.overlaps]
    identical.sort(key=lambda group: not group["across_splits"])
    overlaps.sort(key=lambda overlap: not overlap["across_splits"])
    return {
        "corpus": audit.listing.source,
        "num_leaks": audit.num_leaks,
        "splits": counts(videos, ["split"]),
        "formats": counts(videos, ["width", "height", "fps", "codec"]),
        "identical": identical[:_LISTED_IN_JSON],
        "overlapping": overlaps[:_LISTED_IN_JSON],
        "num_identical": {"across": sum(g["across_splits"] for g in identical), "all": len(identical)},
        "num_overlapping": {"across": sum(o["across_splits"] for o in overlaps), "all": len(overlaps)},
        "ids_in_several_splits": audit.shared_ids,
        "unreadable": [{"name": name, "reason": reason} for name, reason in audit.unreadable],
        "notes": audit.listing.notes,
        "settings": {
            "seconds_between_frames": audit.seconds_between,
            "bits_of_64": FIND,
            "bits_of_256": CONFIRM,
            "frames_with_partner": FRAMES,
            "share_of_black_or_frozen": MOSTLY,
        },
        "videos": videos,
    }


def counts(videos: list[dict[str, Any]], by: list[str]) -> list[dict[str, Any]]:
    """Videos, frames and seconds for each combination of columns, the most frequent first."""
    groups: dict[tuple[Any, ...], Counter[str]] = {}
    for video in videos:
        counter = groups.setdefault(tuple(video[column] for column in by), Counter())
        counter.update(videos=1, frames=video["num_frames"], seconds=video["seconds"])
    rows = [dict(zip(by, key, strict=True)) | dict(counter) for key, counter in groups.items()]
    for row in rows:
        row["seconds"] = round(row["seconds"], 3)
    return sorted(rows, key=lambda row: -row["videos"])


def overlap_facts(audit: Audit, overlap: Overlap) -> dict[str, Any]:
    """A pair of videos that share footage: who, how much of each, and when."""
    sides = []
    for number, span, share in (
        (overlap.first, overlap.span_first, overlap.shares[0]),
        (overlap.second, overlap.span_second, overlap.shares[1]),
    ):
        e = audit.examinations[number]
        start, stop = (round(float(e.hashed[position]) / e.info.fps, 2) for position in span)
        facts = {"name": audit.videos[number].name, "split": audit.split(number)}
        sides.append(facts | {"share": round(share, 3), "from_second": start, "to_second": stop})
    across = audit.is_across(overlap.first, overlap.second)
    return {"videos": sides, "is_mirrored": overlap.is_mirrored, "across_splits": across}


def pictures_of_text(audit: Audit, numbers: list[int]) -> np.ndarray:
    """A picture of each video with boxes around text, four in a row, `(rows, columns, 480, 480, 3)`."""
    tiles = []
    for number in numbers:
        e = audit.examinations[number]
        assert e.picture is not None
        height, width = e.picture.shape[:2]
        scale = _PICTURE / max(height, width)
        picture = Image.fromarray(e.picture).resize((max(1, round(width * scale)), max(1, round(height * scale))))
        draw = ImageDraw.Draw(picture)
        for box in e.text:
            draw.rectangle([side * e.picture_scale * scale for side in box], outline=_TEXT_COLOUR, width=2)
        tile = Image.new("RGB", (_PICTURE, _PICTURE))
        tile.paste(picture, ((_PICTURE - picture.width) // 2, (_PICTURE - picture.height) // 2))
        tiles.append(np.asarray(tile))
    columns = min(4, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.stack(tiles).reshape(-1, columns, *tiles[0].shape)


# --- words -----------------------------------------------------------------------------------------------------------


def markdown(facts: dict[str, Any], rows: list[str], shown: list[str]) -> str:
    """The content of `audit.md`; `rows` are on the contact sheet, `shown` on the picture of text."""
    videos = facts["videos"]
    sections = [f"# Audit of {facts['corpus']}\n\n" + "\n".join(f"- {line}" for line in summary(facts))]
    if facts["notes"]:
        sections.append("Notes\n\n" + "\n".join(f"- {note}" for note in facts["notes"]))
    split_rows = [[r["split"], r["videos"], r["frames"], f"{r['seconds'] / 60:.1f}"] for r in facts["splits"]]
    sections.append(section("Splits", table(["split", "videos", "frames", "minutes"], split_rows)))
    format_rows = [
        [f"{r['width']}x{r['height']}", f"{r['fps']:g}", r["codec"], r["videos"], r["frames"]]
        for r in facts["formats"]
    ]
    header = ["size", "frames per second", "codec", "videos", "frames"]
    sections.append(section("Sizes and rates", table(header, format_rows[:LISTED]) + more(format_rows)))

    for across, title in ((True, "The same footage in different splits"), (False, "The same footage in one split")):
        lines = [
            f"{video_id}: rows with this id are in {' and '.join(splits)}"
            for video_id, splits in facts["ids_in_several_splits"].items()
            if across
        ]
        for group in facts["identical"]:
            if group["across_splits"] == across:
                names = [f"{v['name']} ({v['split']})" for v in group["videos"]]
                extra = f" and {len(names) - 10} more" if len(names) > 10 else ""
                lines.append(f"identical: {'; '.join(names[:10])}{extra}")
        for pair in facts["overlapping"]:
            if pair["across_splits"] == across:
                sides = [
                    f"{v['name']} ({v['split']}, {v['from_second']:g} to {v['to_second']:g} s, {v['share']:.0%} of "
                    "its frames)"
                    for v in pair["videos"]
                ]
                lines.append(("mirrored: " if pair["is_mirrored"] else "alike: ") + "; ".join(sides))
        sections.append(section(title, items(lines)))

    lines = []
    for v in videos:
        states = []
        if v["is_black"] or v["black_share"] >= _PARTLY:
            states.append(f"{v['black_share']:.0%} of its frames are black")
        if not v["is_black"] and (v["frozen_share"] or 0) >= _PARTLY:
            states.append(f"{v['frozen_share']:.0%} of its frames repeat the one before")
        if states:
            word = "black" if v["is_black"] else "frozen" if v["is_frozen"] else "partly"
            lines.append(f"{word}: {v['name']}: {', '.join(states)}")
    sections.append(section("Black and frozen videos", items(sorted(lines, key=lambda line: line[:2] == "pa"))))

    lines = []
    for v in videos:
        if v["text_regions"]:
            boxes = ", ".join(
                f"{right - left}x{bottom - top} at ({left}, {top})" for left, top, right, bottom in v["text_regions"]
            )
            lines.append(f"{v['name']}: {boxes}")
    warning = (
        "It may name a patient or an examination: look at it, and cover it before the videos are shared. So may "
        "`contact_sheet.png` and `text_regions.png`, which show it.\n\n"
    )
    sections.append(section("Burned-in text", (warning if lines else "") + items(lines)))

    lines = [f"{entry['name']}: {entry['reason']}" for entry in facts["unreadable"]]
    lines += [
        f"{v['name']}: {len(v['damaged'])} of {len(v['damaged']) + v['frames_looked_at']} frames looked at are "
        f"damaged, such as: {v['damaged'][0]}"
        for v in videos
        if v["damaged"]
    ]
    sections.append(section("Unreadable, left out or damaged", items(lines)))
    sections.append(section("What was not checked", items(not_checked(facts), limit=None)))
    if rows:
        sections.append(section("Rows of contact_sheet.png", items(rows, limit=None)))
    if shown:
        limit = f", the first {PICTURES_OF_TEXT} videos with text" if len(shown) == PICTURES_OF_TEXT else ""
        sections.append(section(f"Pictures of text_regions.png{limit}", items(shown, limit=None)))
    return "\n\n".join(sections) + "\n"


def summary(facts: dict[str, Any]) -> list[str]:
    """The findings, a line each."""
    videos = facts["videos"]
    seconds = sum(v["seconds"] for v in videos)
    frames = sum(v["num_frames"] for v in videos)
    by_split = ", ".join(f"{row['split']} {row['videos']}" for row in facts["splits"])
    lines = [f"{number_of(len(videos), 'video')} ({by_split}), {frames} frames, {seconds / 60:.1f} minutes"]
    formats = [f"{r['width']}x{r['height']} at {r['fps']:g} fps ({r['videos']})" for r in facts["formats"][:3]]
    others = len(facts["formats"]) - len(formats)
    lines.append("sizes and rates: " + ", ".join(formats) + (f", {number_of(others, 'other')}" if others else ""))

    identical, pairs, ids = facts["num_identical"], facts["num_overlapping"], len(facts["ids_in_several_splits"])
    if facts["num_leaks"]:
        found = [
            (identical["across"], "group", " of identical videos"),
            (pairs["across"], "pair", " of videos that share footage"),
            (ids, "id", ""),
        ]
        what = ", ".join(number_of(number, noun) + rest for number, noun, rest in found if number)
        lines.append(f"LEAK: in more than one split: {what}")
    elif len(facts["splits"]) > 1:
        lines.append("no footage found in more than one split")
    found = [
        (identical["all"] - identical["across"], "group", " of identical videos"),
        (pairs["all"] - pairs["across"], "pair", " of videos that share footage"),
    ]
    if what := ", ".join(number_of(number, noun) + rest for number, noun, rest in found if number):
        lines.append(f"within a split: {what}")
    for word, number in (
        ("black", sum(v["is_black"] for v in videos)),
        ("frozen", sum(v["is_frozen"] for v in videos)),
    ):
        if number:
            lines.append(f"{word}: {number_of(number, 'video')}")
    if number := sum(bool(v["text_regions"]) for v in videos):
        lines.append(f"warning: burned-in text, which may identify a patient, in {number_of(number, 'video')}")
    if facts["unreadable"]:
        lines.append(f"unreadable or left out: {len(facts['unreadable'])}")
    if number := sum(bool(v["damaged"]) for v in videos):
        lines.append(f"damaged in part: {number_of(number, 'video')}")
    return lines


def number_of(number: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def not_checked(facts: dict[str, Any]) -> list[str]:
    """What the report does not vouch for."""
    videos = facts["videos"]
    seen, frames = sum(v["frames_looked_at"] for v in videos), sum(v["num_frames"] for v in videos)
    between = facts["settings"]["seconds_between_frames"]
    lines = [
        f"{frames - seen} of {frames} frames: 64 of each video or one in {between:g} s, whichever is more, were "
        "looked at. An excerpt that is much shorter than this interval can be missed.",
        "Footage that is turned, cropped by more than about 5 %, or otherwise made to look different; other footage "
        "of the same patient. Blank, black and defocused frames are not compared.",
    ]
    if unhashed := [v for v in videos if v["frames_with_hash"] == 0 and not v["is_black"]]:
        lines.append(
            f"{number_of(len(unhashed), 'video')} without one frame that can be compared, such as "
            f"{unhashed[0]['name']}."
        )
    if too_still := [v for v in videos if v["text_regions"] is None]:
        lines.append(
            f"Text in {number_of(len(too_still), 'video')} with fewer than {LEAST_FRAMES} different frames, such as "
            f"{too_still[0]['name']}."
        )
    lines.append("Text that moves, or is under about 8 pixels high or two letters long. Sound, subtitles, file names.")
    return lines


def section(title: str, content: str) -> str:
    """A heading with its content."""
    return f"## {title}\n\n{content}"


def table(header: list[str], rows: Iterable[list[Any]]) -> str:
    """A table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in row) + " |" for row in lines)


def cell(value: Any) -> str:
    """A value that does not end its cell."""
    return str(value).replace("|", "\\|")


def items(lines: list[str], limit: int | None = LISTED) -> str:
    """A list, of which the first `limit` are shown; or that there is nothing."""
    if not lines:
        return "None."
    return "\n".join("- " + line.replace("\n", " ") for line in lines[:limit]) + (more(lines) if limit else "")


def more(lines: list[Any]) -> str:
    """How many entries are not shown."""
    return f"\n\n... and {len(lines) - LISTED} more, in audit.json" if len(lines) > LISTED else ""
