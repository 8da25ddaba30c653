"""Kvasir-Capsule: capsule endoscopy (Smedsrud et al., Scientific Data 8:142, 2021, doi 10.1038/s41597-021-00920-z).

117 videos, 43 labelled and 74 not, with `metadata.csv` (osf.io/dv2ag; simula/kvasir-capsule has the README, the script
that wrote the csv and the official splits). Facts that are easily met: box-less rows have 12 fields under 13 columns,
one frame may have two findings, corners lie up to five pixels outside the 336x336 frames, and a class has up to four
spellings. Whether frame numbers count from 0 or 1 is not documented; they are given as they are. The files play at
about 30 fps what the capsule took at 2, so a second of them is not a second in the patient.
"""

import hashlib
import math
import os
import re
from pathlib import Path
from typing import Any

from datasets import ClassLabel, List, Value

from .corpus import (
    CorpusBuilder,
    CorpusError,
    CorpusFolder,
    Rejection,
    Row,
    SourceVideo,
    check_folder,
    describe,
    excerpt,
    is_video,
    other_files,
    processed_folder,
    read_number,
    read_table,
)

CLASSES = (
    "Ampulla of Vater",
    "Angiectasia",
    "Blood - fresh",
    "Blood - hematin",
    "Erosion",
    "Erythema",
    "Foreign body",
    "Ileocecal valve",
    "Lymphangiectasia",
    "Normal clean mucosa",
    "Polyp",
    "Pylorus",
    "Reduced mucosal view",
    "Ulcer",
)
CATEGORIES = ("Anatomy", "Luminal")
LANDMARKS = ("Ampulla of Vater", "Ileocecal valve", "Pylorus")  # of category Anatomy; the other classes are Luminal

# Spellings of the split files beside those of README, folders and metadata.csv, which differ in capitals only.
_OTHER_SPELLINGS = {
    "blood": "Blood - fresh",
    "erythematous": "Erythema",
    "ileo-cecal valve": "Ileocecal valve",
    "normal": "Normal clean mucosa",
    "foreign bodies": "Foreign body",
}
_SPELLINGS = {name.lower(): name for name in CLASSES} | _OTHER_SPELLINGS

_VIDEO_ID = re.compile(r"[0-9A-Za-z_-]{1,100}")  # the owners' have 16 hexadecimal digits
_COLUMNS = ["filename", "video_id", "frame_number", "finding_category", "finding_class"]
_COLUMNS += [f"{axis}{corner}" for corner in (1, 2, 3, 4) for axis in "xy"]
_MISTYPED_FOLDER = re.compile(r"(un|)label+ed[ _-]?videos?", re.IGNORECASE)
_FOLD_FILES = ("split_0.csv", "split_1.csv")


class KvasirCapsule(CorpusBuilder):
    """Rows of Kvasir-Capsule, from the owners' tree or the Endo-FM folder of 1000 numbered clips.

    `findings` are those of the row's frames; `frame` counts from the row's first, `box` is `[x1, y1, x2, y2]` in
    pixels of the row, or null. `label` is their class where all agree, else null.

    The official two folds share 7 videos, so they cannot be taken as they are. Where `official_splits/` lies in the
    raw folder, videos of `split_0.csv` are `train` and those of `split_1.csv` alone `test`; else, and for labelled
    videos in neither, `test` is where the SHA-256 of the id is divisible by five. Unlabelled videos are `unlabelled`.
    The Endo-FM clips come without findings or videos of origin and are all `train`.

    Either kind of videos may be there alone; labelled videos that are missing beside their metadata.csv or stills are
    an error. A row of metadata.csv whose filename or category contradicts the rest of it is left out.
    """

    CORPUS = "kvasir_capsule"
    MAY_BE_PUBLISHED = True
    TERMS = "CC BY 4.0; the owners ask for written permission for competitions and commercial use"

    @classmethod
    def label_features(cls, config: Any) -> dict[str, Any]:
        finding = {
            "frame": Value("int64"),
            "category": ClassLabel(names=list(CATEGORIES)),
            "finding_class": ClassLabel(names=list(CLASSES)),
            "box": List(Value("float32")),
        }
        return {"label": ClassLabel(names=list(CLASSES)), "findings": List(finding)}

    @classmethod
    def labels_of_row(cls, labels: dict[str, Any], row: Row, folder: Path) -> dict[str, Any]:
        scale_x, scale_y = row["width"] / row["source_width"], row["height"] / row["source_height"]
        findings = []
        for finding in labels["findings"]:
            frame = finding["frame"] - row["start_frame"]
            if 0 <= frame < row["num_frames"]:
                box = finding["box"]
                if box is not None:
                    x1, x2 = (min(max(x * scale_x, 0.0), float(row["width"])) for x in box[::2])
                    y1, y2 = (min(max(y * scale_y, 0.0), float(row["height"])) for y in box[1::2])
                    box = [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None  # wholly outside
                findings.append(finding | {"frame": frame, "box": box})
        classes = {finding["finding_class"] for finding in findings}
        return {"label": classes.pop() if len(classes) == 1 else None, "findings": findings}

    @classmethod
    def misfits(cls, video: SourceVideo, num_frames: int) -> list[str]:
        beyond = [finding["frame"] for finding in video.labels["findings"] if finding["frame"] >= num_frames]
        if not beyond:
            return []
        return [f"{len(beyond)} of its findings lie beyond its {num_frames} frames, at {max(beyond)} at the latest"]

    @classmethod
    def read_folder(cls, data_dir: Path | None, config: Any) -> CorpusFolder:
        data_dir = check_folder(data_dir, cls.CORPUS)
        folders = {name: data_dir / f"{name}_videos" for name in ("labelled", "unlabelled")}
        for name in sorted(path.name for path in data_dir.iterdir() if path.is_dir()):
            mistyped = _MISTYPED_FOLDER.fullmatch(name)
            if mistyped and not (right := folders[f"{mistyped[1].lower()}labelled"]).is_dir():
                raise CorpusError(f"{data_dir}: expected the name {right.name}/ for {name}/; rename it.")
        if not any(folder.is_dir() for folder in folders.values()):
            processed = processed_folder(data_dir, {"findings": []})
            if processed is None:
                raise CorpusError(
                    f"{data_dir}: expected the owners' tree (labelled_videos/, unlabelled_videos/, metadata.csv) or "
                    f"the Endo-FM folder (00001.mp4, ...); found {describe(data_dir)}."
                )
            return processed.check(data_dir)

        # 1. Findings
        paths = {name: sorted(filter(is_video, folder.glob("*"))) for name, folder in folders.items()}
        known = [path for found in paths.values() for path in found]
        rejected: list[Rejection] = []
        findings: dict[str, list[dict[str, Any]]] = {}
        if paths["labelled"]:
            table = data_dir / "metadata.csv"
            if not table.is_file():
                raise CorpusError(f"{data_dir}: has labelled_videos/ but not their metadata.csv; put it there.")
            findings, rejected = read_metadata(table)
            known.append(table)
        for name in ("metadata.csv", "labelled_images"):
            if not paths["labelled"] and (data_dir / name).exists():
                raise CorpusError(
                    f"{data_dir}: has {name} but no video in labelled_videos/; put them there, or move {name} away to "
                    "have the unlabelled videos alone."
                )
        known.append(data_dir / "metadata.json")  # says the same as the table
        there = {path.stem for path in paths["labelled"]}
        for video_id, of_video in findings.items():
            if video_id not in there:
                reason = f"its {len(of_video)} findings in metadata.csv have no video in labelled_videos/"
                rejected.append(Rejection(f"labelled_videos/{video_id}.mp4", reason))

        # 2. Splits
        folds, of_folds, notes = read_official_folds(data_dir / "official_splits")
        rejected += of_folds
        known += [data_dir / "official_splits" / name for name in _FOLD_FILES]
        videos = []
        for name, found in paths.items():
            for path in found:
                split = folds.get(path.stem, split_of(path.stem)) if name == "labelled" else name
                labels = {"findings": findings.get(path.stem, []) if name == "labelled" else []}
                source = path.relative_to(data_dir).as_posix()
                videos.append(SourceVideo(path.stem, path, split, source, labels))

        # 3. What a person should know
        for name, other in (("labelled", "unlabelled"), ("unlabelled", "labelled")):
            if not paths[name]:
                notes.append(f"no video in {name}_videos/: {other} videos alone")
        without = sum(not findings.get(path.stem) for path in paths["labelled"])
        if without:
            notes.append(f"{without} of {len(paths['labelled'])} labelled videos have no finding in metadata.csv")
        rejected += other_files(data_dir, known, {"labelled_images": "stills of the labelled videos; not read"})
        return CorpusFolder("the owners' tree", videos, rejected, notes).check(data_dir)


def split_of(video_id: str) -> str:
    """`test` where the SHA-256 of the id, as a number, is divisible by five, else `train`."""
    return "test" if int(hashlib.sha256(os.fsencode(video_id)).hexdigest(), 16) % 5 == 0 else "train"


def read_metadata(path: Path) -> tuple[dict[str, list[dict[str, Any]]], list[Rejection]]:
    """The findings of `metadata.csv` by video, frames ascending, and the rows that cannot be understood.

    Raises:
        CorpusError: the header is another one.
    """
    table = read_table(path, ";")
    header = [name.lower() for name in table[0][1]] if table else []
    if header != _COLUMNS:
        got = excerpt(";".join(header)) if table else "an empty file"
        raise CorpusError(f"{path}: expected the header {';'.join(_COLUMNS)}; got {got}.")
    findings: dict[str, list[dict[str, Any]]] = {}
    rejected: list[Rejection] = []
    seen: set[tuple[Any, ...]] = set()
    for number, cells in table[1:]:
        try:
            video_id, finding = parse_finding(cells)
            facts = (video_id, finding["frame"], finding["finding_class"], tuple(finding["box"] or ()))
            if facts in seen:
                raise ValueError("says the same as an earlier row")
        except ValueError as error:
            rejected.append(Rejection(f"{path.name}, row {number}", str(error)))
            continue
        seen.add(facts)
        findings.setdefault(video_id, []).append(finding)
    for of_video in findings.values():
        of_video.sort(key=lambda finding: (finding["frame"], finding["finding_class"], finding["box"] or []))
    return findings, rejected


def parse_finding(cells: list[str]) -> tuple[str, dict[str, Any]]:
    """The video and the finding of a row; a ValueError says what is wrong with it."""
    if len(cells) not in (12, 13):
        raise ValueError(f"has {len(cells)} fields; expected 13, or 12 without a box")
    filename, video_id, number, category, finding_class = cells[:5]
    frame = read_number(number)
    if not _VIDEO_ID.fullmatch(video_id) or frame is None:
        raise ValueError(f"expected an id and a frame number; got {excerpt(video_id)} and {excerpt(number)}")
    if finding_class.lower() not in _SPELLINGS:
        raise ValueError(f"{excerpt(finding_class)} is no finding class")
    if category.capitalize() not in CATEGORIES:
        raise ValueError(f"{excerpt(category)} is no finding category; expected {' or '.join(CATEGORIES)}")
    name = _SPELLINGS[finding_class.lower()]
    if (category.capitalize() == "Anatomy") != (name in LANDMARKS):
        expected = "Anatomy" if name in LANDMARKS else "Luminal"
        raise ValueError(f"{name} is of category {expected}; got {excerpt(category)}")
    image = re.fullmatch(r"(.+)_([0-9]+)(?:\.\w+)?", filename)
    if not image or image[1] != video_id or read_number(image[2]) != frame:
        raise ValueError(f"expected the filename '{video_id}_{frame}.jpg'; got {excerpt(filename)}")
    finding = {"frame": frame, "category": category.capitalize(), "finding_class": name}
    return video_id, finding | {"box": parse_box(cells[5:]) if any(cells[5:]) else None}


def parse_box(cells: list[str]) -> list[float]:
    """`[x1, y1, x2, y2]` around four corners; a ValueError says what is wrong with them."""
    try:
        xs, ys = [[float(cell) for cell in cells[axis::2]] for axis in (0, 1)]
    except ValueError:
        xs = ys = []
    box = [min(xs), min(ys), max(xs), max(ys)] if len(xs) == len(ys) == 4 else []
    if not box or not all(map(math.isfinite, xs + ys)) or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"expected no box or four corners of one; got {excerpt(';'.join(cells))}")
    return box


def read_official_folds(folder: Path) -> tuple[dict[str, str], list[Rejection], list[str]]:
    """Split by video from `split_0.csv` (train) and `split_1.csv` (test), rows without meaning, and notes.

    Nothing where one of the files is missing.

    Raises:
        CorpusError: a file is in the form from before January 2021, or in none.
    """
    files = [folder / name for name in _FOLD_FILES]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        return {}, [], [f"official_splits has no {missing[0]}, so it is not used"] if len(missing) == 1 else []
    rejected = []
    of_fold: list[dict[str, None]] = []
    for file in files:
        table = read_table(file, ",")
        if not table or table[0][1] != ["filename", "label"]:
            raise CorpusError(
                f"{file}: expected the header filename,label; files from before January 2021 have none and cannot be "
                "used, take the present ones from simula/kvasir-capsule."
            )
        videos: dict[str, None] = {}
        for number, cells in table[1:]:
            match = re.fullmatch(r"(.+)_[0-9]+\.\w+", cells[0])
            if len(cells) == 2 and match and cells[1].lower() in _SPELLINGS:
                videos[match[1]] = None
            else:
                got = excerpt(",".join(cells))
                reason = f"expected <video>_<frame>.jpg and a finding class; got {got}"
                rejected.append(Rejection(f"official_splits/{file.name}, row {number}", reason))
        of_fold.append(videos)
    shared = sorted(of_fold[0].keys() & of_fold[1].keys())
    notes = [f"videos in both official folds, {len(shared)}, stay in train: {', '.join(shared)}"] if shared else []
    return dict.fromkeys(of_fold[1], "test") | dict.fromkeys(of_fold[0], "train"), rejected, notes
