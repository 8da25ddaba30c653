"""CholecT45 and CholecT50: cholecystectomies with action triplets (Nwoye et al., Medical Image Analysis 78, 2022).

Frames at 1 fps as `%06d.png` from 000000. CholecT45 (CAMMA-public/cholect45) has `data/VID01/` and text labels,
CholecT50 (CAMMA-public/cholect50) `videos/VID01/` and json labels. Splits are those of `split_selector` in their
published loaders. Bounding boxes, which 5 of the 50 videos have, are not taken over.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, List

from ..video_io import list_images
from .corpus import (
    CorpusBuilder,
    CorpusConfig,
    CorpusError,
    CorpusFolder,
    Rejection,
    Row,
    SourceVideo,
    check_folder,
    describe,
    other_files,
    processed_folder,
    read_json,
    read_table,
    read_text,
)

INSTRUMENTS = ("grasper", "bipolar", "hook", "scissors", "clipper", "irrigator")
VERBS = (
    "grasp",
    "retract",
    "dissect",
    "coagulate",
    "clip",
    "cut",
    "aspirate",
    "irrigate",
    "pack",
    "null_verb",
)
TARGETS = (
    "gallbladder",
    "cystic_plate",
    "cystic_duct",
    "cystic_artery",
    "cystic_pedicle",
    "blood_vessel",
    "fluid",
    "abdominal_wall_cavity",
    "liver",
    "adhesion",
    "omentum",
    "peritoneum",
    "gut",
    "specimen_bag",
    "null_target",
)
PHASES = (
    "preparation",
    "carlot-triangle-dissection",  # spelt so by the owners
    "clipping-and-cutting",
    "gallbladder-dissection",
    "gallbladder-packaging",
    "cleaning-and-coagulation",
    "gallbladder-extraction",
)
NUM_TRIPLETS = 100

# column -> folder of text labels, number of classes, position of the id in a json annotation
_COLUMNS = {
    "triplets": ("triplet", NUM_TRIPLETS, 0),
    "instruments": ("instrument", len(INSTRUMENTS), 1),
    "verbs": ("verb", len(VERBS), 7),
    "targets": ("target", len(TARGETS), 8),
}
_PHASE_POSITION = 14
_ANNOTATION_LENGTH = 15

# The cross-validation, test videos by fold; the last of each is in CholecT50 alone.
_FOLDS = (
    (79, 2, 51, 6, 25, 14, 66, 23, 50, 111),
    (80, 32, 5, 15, 40, 47, 26, 48, 70, 96),
    (31, 57, 36, 18, 52, 68, 10, 8, 73, 103),
    (42, 29, 60, 27, 65, 75, 22, 49, 12, 110),
    (78, 43, 62, 35, 74, 1, 56, 4, 13, 92),
)
_ONLY_IN_T50 = (92, 96, 103, 110, 111)
_CHALLENGE_VALIDATION = (5, 18, 36, 65, 74)
_PAPER_VALIDATION, _PAPER_TEST = (8, 12, 29, 50, 78), (6, 51, 10, 73, 14, 74, 32, 80, 42, 111)
PROTOCOLS = ("cholect50", "cholect50-challenge", "cholect50-crossval", "cholect45-crossval")

_VIDEO_FOLDER = re.compile(r"VID(\d{2,})")


@dataclass
class CholecTripletConfig(CorpusConfig):
    """Which of the published splits.

    Attributes:
        split_protocol: one of `PROTOCOLS`; None is cholect50 (the Rendezvous paper's) for a CholecT50 folder and
            cholect45-crossval for a CholecT45 folder.
        fold: test fold of a cross-validation, 1 to 5.
    """

    split_protocol: str | None = None
    fold: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_protocol not in (None, *PROTOCOLS):
            raise ValueError(f"split_protocol={self.split_protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        if self.fold not in range(1, 6):
            raise ValueError(f"fold={self.fold!r}: expected 1 to 5")


class CholecTriplet(CorpusBuilder):
    """Rows of CholecT45 or CholecT50, from the owners' tree or the Endo-FM folder of 580 numbered clips.

    Labels are lists with an entry per frame: the ids present in it, or null where a frame has no label. CholecT45 has
    no phases. The Endo-FM clips show the 1 fps frames at 30 fps, a 30-fold time lapse, and have no labels.
    """

    CORPUS = "cholectriplet"
    TERMS = "CC BY-NC-SA 4.0, handed out on a signed request form only"
    BUILDER_CONFIG_CLASS = CholecTripletConfig
    BUILDER_CONFIGS = [CholecTripletConfig(name="videos"), CholecTripletConfig(name="clips", kind="clips")]

    @classmethod
    def label_features(cls, config: Any) -> dict[str, Any]:
        names = read_triplet_names(Path(config.data_dir)) if config.data_dir else None
        triplet = ClassLabel(names=names) if names else ClassLabel(num_classes=NUM_TRIPLETS)
        return {
            "triplets": List(List(triplet)),
            "instruments": List(List(ClassLabel(names=list(INSTRUMENTS)))),
            "verbs": List(List(ClassLabel(names=list(VERBS)))),
            "targets": List(List(ClassLabel(names=list(TARGETS)))),
            "phases": List(ClassLabel(names=list(PHASES))),
        }

    @classmethod
    def labels_of_row(cls, labels: dict[str, Any], row: Row) -> dict[str, Any]:
        stop = row["start_frame"] + row["num_frames"]
        return {column: None if ids is None else ids[row["start_frame"] : stop] for column, ids in labels.items()}

    @classmethod
    def read_folder(cls, data_dir: Path | None, config: Any) -> CorpusFolder:
        data_dir = check_folder(data_dir, cls.CORPUS)
        nothing = dict.fromkeys((*_COLUMNS, "phases"))
        processed = processed_folder(data_dir, nothing)
        if processed is not None:
            return processed.check(data_dir)
        is_t50 = (data_dir / "videos").is_dir() and (data_dir / "labels").is_dir()
        if not is_t50 and not ((data_dir / "data").is_dir() and (data_dir / "triplet").is_dir()):
            raise CorpusError(
                f"{data_dir}: expected CholecT45 (data/VID01/, triplet/VID01.txt, ...), CholecT50 (videos/VID01/, "
                f"labels/VID01.json) or the Endo-FM folder (00001.mp4, ...); found {describe(data_dir)}."
            )
        protocol = config.split_protocol or ("cholect50" if is_t50 else "cholect45-crossval")
        splits = published_splits(protocol, config.fold)
        root = data_dir / ("videos" if is_t50 else "data")
        videos, rejected, known = [], [], []
        for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
            source = folder.relative_to(data_dir).as_posix()
            known.append(folder)
            match = _VIDEO_FOLDER.fullmatch(folder.name)
            if match is None:
                rejected.append(Rejection(source, "its name is not VID and a number"))
                continue
            split = next((name for name, ids in splits.items() if int(match[1]) in ids), None)
            if split is None:
                rejected.append(Rejection(source, f"video {int(match[1])} is in no part of {protocol}"))
                continue
            frames, misnamed = frame_numbers(folder)
            rejected += [Rejection(f"{source}/{name}", "its name is not a frame number") for name in misnamed]
            if misnamed or not frames:
                rejected.append(Rejection(source, "expected frames named 000000.png, 000001.png, ..."))
                continue
            files = label_files(data_dir, folder.name, is_t50)
            known += files
            missing = [file for file in files if not file.is_file()]
            if missing:
                rejected.append(Rejection(source, f"has no labels: {missing[0].relative_to(data_dir)} is not there"))
                continue
            labels, problems = read_json_labels(files[0]) if is_t50 else read_text_labels(files)
            by_frame = set(labels["triplets"])
            extra, unlabelled = sorted(by_frame.difference(frames)), [i for i in frames if i not in by_frame]
            if extra:
                problems.append(f"{len(extra)} labelled frames have no image, such as {extra[0]:06d}.png; not used")
            if unlabelled:
                problems.append(f"{len(unlabelled)} frames have no label, such as {unlabelled[0]:06d}.png; null")
            rejected += [Rejection(source, problem) for problem in problems]
            per_frame = {
                column: None if of_column is None else [of_column.get(i) for i in frames]
                for column, of_column in labels.items()
            }
            videos.append(SourceVideo(folder.name, folder, split, source, per_frame, image_fps=1.0))
        known += [data_dir / name for name in ("LICENSE", "README.md", "label_mapping.txt")]
        known += list((data_dir / "dict").glob("*.txt"))
        rejected += other_files(data_dir, known)
        layout = "CholecT50" if is_t50 else "CholecT45"
        notes = [f"splits: {protocol}" + (f", fold {config.fold}" if "crossval" in protocol else "")]
        return CorpusFolder(layout, videos, rejected, notes).check(data_dir)


def published_splits(protocol: str, fold: int = 1) -> dict[str, tuple[int, ...]]:
    """The ids of the videos in `train`, `validation` and `test`.

    In a cross-validation the validation videos are the last five of the other folds, in order, as in the published
    code. (The published figure, `files/cv.png` of cholect50, has the first five of the next fold.)
    """
    everything = [video for videos in _FOLDS for video in videos]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    if protocol == "cholect50":
        validation, test = _PAPER_VALIDATION, _PAPER_TEST
    elif protocol == "cholect50-challenge":
        validation, test = _CHALLENGE_VALIDATION, _ONLY_IN_T50
    else:
        if protocol == "cholect45-crossval":
            everything = [video for video in everything if video not in _ONLY_IN_T50]
        test = tuple(video for video in everything if video in _FOLDS[fold - 1])
        validation = tuple(video for video in everything if video not in test)[-5:]
    train = tuple(video for video in everything if video not in validation + test)
    return {"train": train, "validation": validation, "test": test}


def frame_numbers(folder: Path) -> tuple[list[int], list[str]]:
    """The numbers of a folder's frames, ascending, and the images that are not named by one."""
    paths = list_images(folder)
    return [int(p.stem) for p in paths if p.stem.isdecimal()], [p.name for p in paths if not p.stem.isdecimal()]


def label_files(data_dir: Path, video: str, is_t50: bool) -> list[Path]:
    """The files with the labels of a video: one json, or text files in the order of `_COLUMNS`."""
    if is_t50:
        return [data_dir / "labels" / f"{video}.json"]
    return [data_dir / folder / f"{video}.txt" for folder, _, _ in _COLUMNS.values()]


def read_text_labels(files: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """Column -> frame -> ids, from comma-separated rows of a frame number and a 0 or 1 per class; and what is wrong.

    Raises:
        CorpusError: a file has other columns.
    """
    labels: dict[str, Any] = {"phases": None}
    problems = []
    for (column, (_, num_classes, _)), file in zip(_COLUMNS.items(), files, strict=True):
        of_column: dict[int, list[int]] = {}
        for number, cells in enumerate(read_table(file, ","), start=1):
            is_frame = cells[0].isdecimal()
            if len(cells) != 1 + num_classes or not is_frame or not set(cells[1:]) <= {"0", "1"}:
                raise CorpusError(
                    f"{file}, line {number}: expected a frame number and {num_classes} times 0 or 1; got {len(cells)} "
                    f"fields, {','.join(cells)[:40]!r}."
                )
            if int(cells[0]) in of_column:
                problems.append(f"{file.parent.name}/{file.name}, line {number}: frame {cells[0]} again; not used")
                continue
            of_column[int(cells[0])] = [i for i, cell in enumerate(cells[1:]) if cell == "1"]
        labels[column] = of_column
    for column, of_column in labels.items():
        if of_column is not None and of_column.keys() != labels["triplets"].keys():
            difference = len(of_column.keys() ^ labels["triplets"].keys())
            problems.append(f"{column} and triplets differ in {difference} of their frames")
    return labels, problems


def read_json_labels(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Column -> frame -> ids, and the phase of each frame, from the json of CholecT50; and what is wrong.

    Raises:
        CorpusError: the file has another structure.
    """
    content = read_json(file)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, dict):
        raise CorpusError(f"{file}: expected an object 'annotations' from frame numbers to lists.")
    labels: dict[str, Any] = {column: {} for column in _COLUMNS} | {"phases": {}}
    for frame, instances in annotations.items():
        is_list = isinstance(instances, list) and all(
            isinstance(row, list)
            and len(row) == _ANNOTATION_LENGTH
            and all(isinstance(x, int | float) and not isinstance(x, bool) for x in row)
            for row in instances
        )
        if not frame.isdecimal() or not is_list:
            raise CorpusError(f"{file}, frame {frame}: expected a list of rows of {_ANNOTATION_LENGTH} numbers.")
        for column, (_, num_classes, position) in _COLUMNS.items():
            ids = sorted({int(row[position]) for row in instances} - {-1})  # -1: absent
            if ids and not 0 <= ids[0] <= ids[-1] < num_classes:
                raise CorpusError(f"{file}, frame {frame}: {column} {ids}: expected ids from 0 to {num_classes - 1}.")
            labels[column][int(frame)] = ids
        phases = {int(row[_PHASE_POSITION]) for row in instances} - {-1}
        if len(phases) > 1 or any(not 0 <= phase < len(PHASES) for phase in phases):
            raise CorpusError(
                f"{file}, frame {frame}: phases {sorted(phases)}: expected one of 0 to {len(PHASES) - 1}."
            )
        labels["phases"][int(frame)] = phases.pop() if phases else None
    return labels, []


def read_triplet_names(data_dir: Path) -> list[str] | None:
    """The names of the 100 triplets, from the raw folder's own files; None where it has none."""
    names: dict[int, str] = {}
    if (data_dir / "dict" / "triplet.txt").is_file():
        for line in read_text(data_dir / "dict" / "triplet.txt").splitlines():
            number, _, name = line.partition(":")
            if number.strip().isdecimal():  # null_instrument has -1
                names[int(number)] = name.strip()
    else:
        files = sorted((data_dir / "labels").glob("VID*.json"))
        content = read_json(files[0]) if files else None
        categories = content.get("categories") if isinstance(content, dict) else None
        # Documented as a list, met as an object.
        for part in categories if isinstance(categories, list) else [categories]:
            triplets = part.get("triplet") if isinstance(part, dict) else None
            if isinstance(triplets, dict):
                names = {int(number): str(name) for number, name in triplets.items() if str(number).isdecimal()}
    if sorted(names) != list(range(NUM_TRIPLETS)) or len(set(names.values())) != NUM_TRIPLETS:
        return None
    return [names[i] for i in range(NUM_TRIPLETS)]
