"""Kvasir-Capsule: capsule endoscopy (Smedsrud et al., Scientific Data 8:142, 2021, doi 10.1038/s41597-021-00920-z).

117 videos, 43 labelled and 74 not, with `metadata.csv` (osf.io/dv2ag; simula/kvasir-capsule has the README, the script
that wrote the csv and the official splits). Facts that are easily met: box-less rows have 12 fields under 13 columns,
one frame may have two findings, corners lie up to five pixels outside the 336x336 frames, and a class has up to four
spellings. Whether frame numbers count from 0 or 1 is not documented; they are given as they are.
"""

import hashlib
from collections import Counter
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
    is_video,
    other_files,
    processed_folder,
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

# Spellings of the split files beside those of README, folders and metadata.csv, which differ in capitals only.
_OTHER_SPELLINGS = {
    "blood": "Blood - fresh",
    "erythematous": "Erythema",
    "ileo-cecal valve": "Ileocecal valve",
    "normal": "Normal clean mucosa",
    "foreign bodies": "Foreign body",
}
_SPELLINGS = {name.lower(): name for name in CLASSES} | _OTHER_SPELLINGS

_COLUMNS = ["filename", "video_id", "frame_number", "finding_category", "finding_class"]
_COLUMNS += [f"{axis}{corner}" for corner in (1, 2, 3, 4) for axis in "xy"]


class KvasirCapsule(CorpusBuilder):
    """Rows of Kvasir-Capsule, from the owners' tree or the Endo-FM folder of 1000 numbered clips.

    The official two folds share 7 videos, so they cannot be taken as they are. Where `official_splits/` lies in the
    raw folder, videos of `split_0.csv` are `train` and those of `split_1.csv` alone `test`; else, and for labelled
    videos in neither, `test` is where the SHA-256 of the id is divisible by five. Unlabelled videos are `unlabelled`.
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
    def labels_of_row(cls, labels: dict[str, Any], row: Row) -> dict[str, Any]:
        """Findings of the row's frames, counted from its first; boxes in its pixels, clipped to the frame.

        `label` is the class of all findings where they agree, else null.
        """
        scale_x, scale_y = row["width"] / row["source_width"], row["height"] / row["source_height"]
        limits = (row["width"], row["height"]) * 2
        findings = []
        for finding in labels["findings"]:
            frame = finding["frame"] - row["start_frame"]
            if 0 <= frame < row["num_frames"]:
                box = finding["box"]
                if box is not None:
                    scaled = (value * scale for value, scale in zip(box, (scale_x, scale_y) * 2, strict=True))
                    box = [min(max(value, 0.0), limit) for value, limit in zip(scaled, limits, strict=True)]
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
        processed = processed_folder(data_dir, {"findings": []})
        if processed is not None:
            return processed.check(data_dir)
        folders = {name: data_dir / f"{name}_videos" for name in ("labelled", "unlabelled")}
        if not any(folder.is_dir() for folder in folders.values()):
            raise CorpusError(
                f"{data_dir}: expected the owners' tree (labelled_videos/, unlabelled_videos/, metadata.csv) or the "
                f"Endo-FM folder (00001.mp4, ...); found {describe(data_dir)}."
            )
        paths = {name: sorted(filter(is_video, folder.glob("*"))) for name, folder in folders.items()}

        rejected: list[Rejection] = []
        findings: dict[str, list[dict[str, Any]]] = {}
        known = [path for found in paths.values() for path in found]
        if paths["labelled"]:
            table = data_dir / "metadata.csv"
            if not table.is_file():
                raise CorpusError(f"{data_dir}: has labelled_videos/ but not their metadata.csv; put it there.")
            findings, rejected = read_metadata(table)
            known += [table, data_dir / "metadata.json"]
        there = {path.stem for path in paths["labelled"]}
        for video_id, of_video in findings.items():
            if video_id not in there:
                reason = f"its {len(of_video)} findings in metadata.csv have no video in labelled_videos/"
                rejected.append(Rejection(f"labelled_videos/{video_id}.mp4", reason))

        folds, notes = read_official_folds(data_dir / "official_splits")
        known += list((data_dir / "official_splits").glob("split_*.csv"))
        videos = []
        for name, found in paths.items():
            for path in found:
                split = folds.get(path.stem, split_of(path.stem)) if name == "labelled" else name
                labels = {"findings": findings.get(path.stem, []) if name == "labelled" else []}
                source = path.relative_to(data_dir).as_posix()
                videos.append(SourceVideo(path.stem, path, split, source, labels))
        without = sum(not findings.get(path.stem) for path in paths["labelled"])
        if without:
            notes.append(f"{without} of {len(paths['labelled'])} labelled videos have no finding in metadata.csv")
        for rejection in other_files(data_dir, known):
            if rejection.source.startswith("labelled_images/"):  # stills of the same videos
                rejection = Rejection(rejection.source, "a still of a labelled video; videos are what is read")
            rejected.append(rejection)
        return CorpusFolder("the owners' tree", videos, rejected, notes).check(data_dir)


def split_of(video_id: str) -> str:
    """`test` where the SHA-256 of the id, as a number, is divisible by five, else `train`."""
    return "test" if int(hashlib.sha256(video_id.encode()).hexdigest(), 16) % 5 == 0 else "train"


def read_metadata(path: Path) -> tuple[dict[str, list[dict[str, Any]]], list[Rejection]]:
    """The findings of `metadata.csv` by video, frames ascending, and the rows that cannot be understood.

    Raises:
        CorpusError: the header lacks a column.
    """
    table = read_table(path, ";")
    if not table or [name.lower() for name in table[0]] != _COLUMNS:
        got = ";".join(table[0])[:120] if table else "nothing"
        raise CorpusError(f"{path}: expected the header {';'.join(_COLUMNS)}; got {got}.")
    findings: dict[str, list[dict[str, Any]]] = {}
    rejected: list[Rejection] = []
    for number, cells in enumerate(table[1:], start=2):
        try:
            video_id, finding = parse_finding(cells)
        except ValueError as error:
            rejected.append(Rejection(f"{path.name}, row {number}", str(error)))
            continue
        of_video = findings.setdefault(video_id, [])
        if finding in of_video[-4:]:
            rejected.append(Rejection(f"{path.name}, row {number}", "says the same as an earlier row"))
        else:
            of_video.append(finding)
    for of_video in findings.values():
        of_video.sort(key=lambda finding: (finding["frame"], finding["finding_class"]))
    return findings, rejected


def parse_finding(cells: list[str]) -> tuple[str, dict[str, Any]]:
    """The video and the finding of a row; a ValueError says what is wrong with it."""
    if len(cells) not in (12, 13):
        raise ValueError(f"has {len(cells)} fields; expected 13, or 12 without a box")
    _, video_id, frame, category, finding_class = cells[:5]
    corners = [cell for cell in cells[5:] if cell]
    if not video_id or not frame.isdecimal():
        raise ValueError(f"expected an id and a frame number; got {video_id!r} and {frame!r}")
    if finding_class.lower() not in _SPELLINGS:
        raise ValueError(f"{finding_class!r} is no finding class")
    if category not in CATEGORIES:
        raise ValueError(f"{category!r} is no finding category; expected {' or '.join(CATEGORIES)}")
    box = None
    if corners:
        try:
            xs, ys = [float(x) for x in corners[::2]], [float(y) for y in corners[1::2]]
        except ValueError:
            xs = ys = []
        if len(corners) != 8 or len(xs) != 4 or max(xs) <= min(xs) or max(ys) <= min(ys):
            raise ValueError(f"expected no box or four corners of one; got {';'.join(cells[5:])}")
        box = [min(xs), min(ys), max(xs), max(ys)]
    name = _SPELLINGS[finding_class.lower()]
    return video_id, {"frame": int(frame), "category": category, "finding_class": name, "box": box}


def read_official_folds(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Split by video from `split_0.csv` (train) and `split_1.csv` (test), and notes; nothing where they are not.

    Raises:
        CorpusError: a file is in the form from before January 2021, or in none.
    """
    files = [folder / "split_0.csv", folder / "split_1.csv"]
    if not all(file.is_file() for file in files):
        return {}, []
    of_fold: list[Counter[str]] = []
    for file in files:
        table = read_table(file, ",")
        if not table or table[0] != ["filename", "label"]:
            raise CorpusError(
                f"{file}: expected the header filename,label; files from before January 2021 have none and cannot be "
                "used, take the present ones from simula/kvasir-capsule."
            )
        of_fold.append(Counter(row[0].rpartition("_")[0] for row in table[1:]))
    shared = sorted(of_fold[0].keys() & of_fold[1].keys())
    notes = (
        [f"{len(shared)} videos are in both official folds and stay in train: {', '.join(shared)}"] if shared else []
    )
    return dict.fromkeys(of_fold[1], "test") | dict.fromkeys(of_fold[0], "train"), notes
