"""CholecT45 and CholecT50: cholecystectomies with action triplets (Nwoye et al., Medical Image Analysis 78, 2022).

Frames at 1 fps as `%06d.png` from 000000. CholecT45 (CAMMA-public/cholect45) has `data/VID01/` and text labels,
CholecT50 (CAMMA-public/cholect50) `videos/VID01/` and json labels. Splits are those of `split_selector` in their
published loaders. Bounding boxes, which 5 of the 50 videos have, are not taken over.
"""

import re
from collections.abc import Iterable
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
    excerpt,
    other_files,
    processed_folder,
    read_json,
    read_number,
    read_table,
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

# By instrument and verb, the targets of the triplets 0 to 99 in the order of the owners' maps.txt
_TARGETS_OF = """
grasper dissect: cystic_plate gallbladder omentum
grasper grasp: cystic_artery cystic_duct cystic_pedicle cystic_plate gallbladder gut liver omentum peritoneum
grasper grasp: specimen_bag
grasper pack: gallbladder
grasper retract: cystic_duct cystic_pedicle cystic_plate gallbladder gut liver omentum peritoneum
bipolar coagulate: abdominal_wall_cavity blood_vessel cystic_artery cystic_duct cystic_pedicle cystic_plate gallbladder
bipolar coagulate: liver omentum peritoneum
bipolar dissect: adhesion cystic_artery cystic_duct cystic_plate gallbladder omentum
bipolar grasp: cystic_plate liver specimen_bag
bipolar retract: cystic_duct cystic_pedicle gallbladder liver omentum
hook coagulate: blood_vessel cystic_artery cystic_duct cystic_pedicle cystic_plate gallbladder liver omentum
hook cut: blood_vessel peritoneum
hook dissect: blood_vessel cystic_artery cystic_duct cystic_plate gallbladder omentum peritoneum
hook retract: gallbladder liver
scissors coagulate: omentum
scissors cut: adhesion blood_vessel cystic_artery cystic_duct cystic_plate liver omentum peritoneum
scissors dissect: cystic_plate gallbladder omentum
clipper clip: blood_vessel cystic_artery cystic_duct cystic_pedicle cystic_plate
irrigator aspirate: fluid
irrigator dissect: cystic_duct cystic_pedicle cystic_plate gallbladder omentum
irrigator irrigate: abdominal_wall_cavity cystic_pedicle liver
irrigator retract: gallbladder liver omentum
grasper null_verb: null_target
bipolar null_verb: null_target
hook null_verb: null_target
scissors null_verb: null_target
clipper null_verb: null_target
irrigator null_verb: null_target
"""
TRIPLETS = tuple(
    ",".join([*parts.split(), target])
    for parts, _, targets in (line.partition(": ") for line in _TARGETS_OF.strip().splitlines())
    for target in targets.split()
)

# Ids of instrument, verb and target of each triplet
_PARTS = tuple(
    (INSTRUMENTS.index(instrument), VERBS.index(verb), TARGETS.index(target))
    for instrument, verb, target in (triplet.split(",") for triplet in TRIPLETS)
)
_NAMES = {"triplet": TRIPLETS, "instrument": INSTRUMENTS, "verb": VERBS, "target": TARGETS, "phase": PHASES}

# column -> folder of text labels, number of classes, position of the id in a json annotation
_COLUMNS = {
    "triplets": ("triplet", len(TRIPLETS), 0),
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

_VIDEO_FOLDER = re.compile(r"VID([0-9]{2,9})")


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
        if not isinstance(self.fold, int) or isinstance(self.fold, bool) or not 1 <= self.fold <= 5:
            raise ValueError(f"fold={self.fold!r}: expected 1 to 5")


class CholecTriplet(CorpusBuilder):
    """Rows of CholecT45 or CholecT50, from the owners' tree or the Endo-FM folder of 580 numbered clips.

    Labels are lists with an entry per frame: the ids present in it, or null where a frame has no label. CholecT45 has
    no phases. The Endo-FM clips show the 1 fps frames at 30 fps, a 30-fold time lapse, have no labels and are all
    `train`.

    Labels under other names than those here leave their video out (json) or are an error (`dict/`). Labels that
    contradict each other are kept as they are and counted among what is rejected.
    """

    CORPUS = "cholectriplet"
    TERMS = "CC BY-NC-SA 4.0, handed out on a signed request form only"
    BUILDER_CONFIG_CLASS = CholecTripletConfig
    BUILDER_CONFIGS = [CholecTripletConfig(name="videos"), CholecTripletConfig(name="clips", kind="clips")]

    @classmethod
    def label_features(cls, config: Any) -> dict[str, Any]:
        return {
            "triplets": List(List(ClassLabel(names=list(TRIPLETS)))),
            "instruments": List(List(ClassLabel(names=list(INSTRUMENTS)))),
            "verbs": List(List(ClassLabel(names=list(VERBS)))),
            "targets": List(List(ClassLabel(names=list(TARGETS)))),
            "phases": List(ClassLabel(names=list(PHASES))),
        }

    @classmethod
    def labels_of_row(cls, labels: dict[str, Any], row: Row, folder: Path) -> dict[str, Any]:
        stop = row["start_frame"] + row["num_frames"]
        return {column: None if ids is None else ids[row["start_frame"] : stop] for column, ids in labels.items()}

    @classmethod
    def read_folder(cls, data_dir: Path | None, config: Any) -> CorpusFolder:
        data_dir = check_folder(data_dir, cls.CORPUS)
        is_t50 = (data_dir / "videos").is_dir() and (data_dir / "labels").is_dir()
        if not is_t50 and not ((data_dir / "data").is_dir() and (data_dir / "triplet").is_dir()):
            processed = processed_folder(data_dir, dict.fromkeys((*_COLUMNS, "phases")))
            if processed is None:
                raise CorpusError(
                    f"{data_dir}: expected CholecT45 (data/VID01/, triplet/VID01.txt, ...), CholecT50 (videos/VID01/, "
                    f"labels/VID01.json) or the Endo-FM folder (00001.mp4, ...); found {describe(data_dir)}."
                )
            return processed.check(data_dir)
        mapping = data_dir / ("label_mapping.txt" if is_t50 else "dict/maps.txt")
        if mapping.is_file():
            check_mapping(mapping)
        dictionaries = {} if is_t50 else {kind: data_dir / "dict" / f"{kind}.txt" for kind, _, _ in _COLUMNS.values()}
        for kind, file in dictionaries.items():
            if file.is_file():
                check_names(file, ((kind, cells[0], cells[-1]) for _, cells in read_table(file, ":")))
        protocol = config.split_protocol or ("cholect50" if is_t50 else "cholect45-crossval")
        splits = published_splits(protocol, config.fold)
        root = data_dir / ("videos" if is_t50 else "data")
        videos, rejected = [], []
        known = [mapping, *dictionaries.values(), *(data_dir / name for name in ("LICENSE", "README.md"))]
        for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
            source = folder.relative_to(data_dir).as_posix()
            files = label_files(data_dir, folder.name, is_t50)
            known += [folder, *files]
            try:
                match = _VIDEO_FOLDER.fullmatch(folder.name)
                if match is None:
                    raise ValueError("its name is not VID and a number")
                number = int(match[1])
                split = next((name for name, ids in splits.items() if number in ids), None)
                if split is None:
                    raise ValueError(f"video {number} is in no part of {protocol}")
                frames = frame_numbers(folder)
                missing = [file for file in files if not file.is_file()]
                if missing:
                    raise ValueError(f"has no labels: {missing[0].relative_to(data_dir)} is not there")
                if is_t50:
                    labels, problems = read_json_labels(files[0], number, len(frames))
                else:
                    labels, problems = read_text_labels(files)
            except ValueError as error:
                rejected.append(Rejection(source, str(error).replace(f"{data_dir}/", "")))
                continue
            per_frame = {
                column: None if of_column is None else [of_column.get(i) for i in frames]
                for column, of_column in labels.items()
            }
            videos.append(SourceVideo(f"VID{number:02d}", folder, split, source, per_frame, image_fps=1.0))
            gaps = frames[-1] + 1 - frames[0] - len(frames)
            if gaps:
                problems.append(f"{gaps} frames are missing between its first and its last")
            extra = sorted(labels["triplets"].keys() - set(frames))
            if extra:
                problems.append(f"{len(extra)} labelled frames have no image, such as {extra[0]:06d}.png; not used")
            unlabelled = [i for i in frames if i not in labels["triplets"]]
            if unlabelled:
                problems.append(f"{len(unlabelled)} frames have no label, such as {unlabelled[0]:06d}.png; null")
            rejected += [Rejection(source, problem) for problem in problems]
        of_any = [path for pattern in label_files(data_dir, "*", is_t50) for path in pattern.parent.glob(pattern.name)]
        orphans = [path for path in of_any if _VIDEO_FOLDER.fullmatch(path.stem) and path not in known]
        known += orphans
        for path in orphans:
            reason = f"has no video: {root.name}/{path.stem}/ is not there"
            rejected.append(Rejection(path.relative_to(data_dir).as_posix(), reason))
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


def frame_numbers(folder: Path) -> list[int]:
    """The numbers of a folder's frames, ascending; a ValueError says which image is none."""
    frames: dict[int, str] = {}
    for path in list_images(folder):
        number = read_number(path.stem)
        if number is None:
            raise ValueError(f"{excerpt(path.name)} is no frame such as 000000.png; remove it")
        if number in frames:
            raise ValueError(f"{frames[number]} and {path.name} are the same frame; remove one")
        frames[number] = path.name
    if not frames:
        raise ValueError("expected frames named 000000.png, 000001.png, ...; found none")
    return list(frames)


def label_files(data_dir: Path, video: str, is_t50: bool) -> list[Path]:
    """The files with the labels of a video: one json, or text files in the order of `_COLUMNS`."""
    if is_t50:
        return [data_dir / "labels" / f"{video}.json"]
    return [data_dir / folder / f"{video}.txt" for folder, _, _ in _COLUMNS.values()]


def check_mapping(file: Path) -> None:
    """Compares `maps.txt` or `label_mapping.txt`, lines of the ids of triplet, instrument, verb, target, IV and IT.

    Raises:
        CorpusError: a line is not as published, so that labels would get wrong names.
    """
    expected = [[triplet, i, v, t, 10 * i + v, 15 * i + t] for triplet, (i, v, t) in enumerate(_PARTS)]
    for number, cells in read_table(file, ","):
        ids_read = [read_number(cell) for cell in cells]
        if number == 1 and ids_read[0] is None:  # a header
            continue
        if ids_read not in expected:
            got = excerpt(",".join(cells))
            raise CorpusError(f"{file}, line {number}: expected a line of the published mapping; got {got}.")


def names_of_categories(categories: Any) -> list[tuple[Any, Any, Any]]:
    """Kind, id and name of the `categories` of a json.

    An object by kind, as met by others; a list of such objects, as documented; or a list of ids with their names.
    """
    entries = categories if isinstance(categories, list) else [categories]
    found = []
    for entry in (entry for entry in entries if isinstance(entry, dict)):
        found.append((entry.get("supercategory"), entry.get("id"), entry.get("name")))
        by_kind = [(kind, named) for kind, named in entry.items() if isinstance(named, dict)]
        found += [(kind, i, name) for kind, named in by_kind for i, name in named.items()]
    return found


def check_names(file: Path, named: Iterable[tuple[Any, Any, Any]]) -> None:
    """Compares kind, id and name as a file has them with those here, spelling aside; other entries say nothing.

    Raises:
        CorpusError: an id has another name, so that labels would get wrong ones.
    """
    for kind, number, name in named:
        names = _NAMES.get(str(kind), ())
        i = read_number(str(number))
        if i is None or i >= len(names) or not isinstance(name, str) or name.strip().lower() == "null_instrument":
            continue
        if spelling(name) != spelling(names[i]):
            got = f"names {kind} {i} {excerpt(name)}"
            raise CorpusError(f"{file}: {got}, which is {names[i]} here; labels would be wrong.")


def spelling(name: str) -> str:
    """A name without what spellings differ in: case, what parts the words, and the owners' carlot for Calot."""
    return re.sub(r"[\W_]+", "_", name.strip().lower()).replace("carlot", "calot")


def read_text_labels(files: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """Column -> frame -> ids, from comma-separated rows of a frame number and a 0 or 1 per class; and what is wrong.

    Raises:
        ValueError: a file has other columns, or a frame twice.
    """
    labels: dict[str, Any] = {}
    for (column, (_, num_classes, _)), file in zip(_COLUMNS.items(), files, strict=True):
        of_column: dict[int, list[int]] = {}
        for number, cells in read_table(file, ","):
            frame = read_number(cells[0])
            if frame is None or len(cells) != 1 + num_classes or not set(cells[1:]) <= {"0", "1"}:
                raise ValueError(
                    f"{file}, line {number}: expected a frame number and {num_classes} times 0 or 1; got {len(cells)} "
                    f"fields, {excerpt(','.join(cells))}"
                )
            if frame in of_column:
                raise ValueError(f"{file}, line {number}: frame {frame} is there already")
            of_column[frame] = [i for i, cell in enumerate(cells[1:]) if cell == "1"]
        labels[column] = of_column
    differing = {column: len(labels[column].keys() ^ labels["triplets"].keys()) for column in labels}
    problems = [f"{column} and triplets differ in {n} of their frames" for column, n in differing.items() if n]
    contrary = [
        frame
        for frame, triplets in labels["triplets"].items()
        for part, column in enumerate(("instruments", "verbs", "targets"))
        if frame in labels[column] and set(labels[column][frame]) != {_PARTS[i][part] for i in triplets}
    ]
    if contrary:
        problems.append(
            f"{len(set(contrary))} frames have other instruments, verbs or targets than their triplets, such as "
            f"{contrary[0]:06d}.png; kept as they are"
        )
    return labels | {"phases": None}, problems


def read_json_labels(file: Path, video: int, num_images: int) -> tuple[dict[str, Any], list[str]]:
    """Column -> frame -> ids, and the phase of each frame, from the json of CholecT50; and what is wrong.

    `video` and `num_images` are what its header is compared with.

    Raises:
        ValueError: the file has another structure, ids that there are not, or other names for them.
    """
    content = read_json(file)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, dict):
        raise ValueError(f"{file}: expected an object 'annotations' from frame numbers to lists")
    check_names(file, names_of_categories(content.get("categories")))
    labels: dict[str, Any] = {column: {} for column in (*_COLUMNS, "phases")}
    several, contrary = [], []
    for name, instances in annotations.items():
        frame, where = read_number(name), f"{file}, frame {excerpt(name)}"
        if frame is None or frame in labels["phases"]:
            raise ValueError(f"{where}: expected the number of a frame, each once")
        if not isinstance(instances, list) or not all(
            isinstance(instance, list) and len(instance) == _ANNOTATION_LENGTH for instance in instances
        ):
            raise ValueError(f"{where}: expected a list of rows of {_ANNOTATION_LENGTH} numbers")
        for column, (_, num_classes, position) in _COLUMNS.items():
            labels[column][frame] = ids_at(position, instances, num_classes, f"{where}, {column}")
        phases = ids_at(_PHASE_POSITION, instances, len(PHASES), f"{where}, phase")
        labels["phases"][frame] = phases[0] if len(phases) == 1 else None
        if len(phases) > 1:
            several.append(frame)
        contrary += [frame for instance in instances if contradicts_itself(instance)]
    problems = []
    if several:
        problems.append(f"{len(several)} frames are in several phases, such as {several[0]:06d}.png; null")
    if contrary:
        problems.append(
            f"{len(contrary)} instances name a triplet and other parts than its own, such as in "
            f"{contrary[0]:06d}.png; kept as they are"
        )
    stated = read_number(str(content.get("num_frames")))
    if stated is not None and not stated == len(annotations) == num_images:
        problems.append(
            f"its json says {stated} frames and has {len(annotations)} annotated ones; there are {num_images} images"
        )
    number = read_number(str(content.get("video")).removeprefix("VID"))
    if number is not None and number != video:
        problems.append(f"its json is of video {number}")
    return labels, problems


def contradicts_itself(instance: list[Any]) -> bool:
    """Whether an instance has a triplet and another instrument, verb or target than the triplet's; -1 says nothing."""
    triplet, *parts = (int(instance[position]) for _, _, position in _COLUMNS.values())
    return triplet >= 0 and any(part not in (-1, own) for part, own in zip(parts, _PARTS[triplet], strict=True))


def ids_at(position: int, instances: list[list[Any]], num_classes: int, where: str) -> list[int]:
    """The class ids at a position of a frame's instances, ascending, each once; -1 says that there is none.

    Raises:
        ValueError: a value is no id.
    """
    ids = set()
    for instance in instances:
        value = instance[position]
        if value == -1:
            continue
        if isinstance(value, bool) or value not in range(num_classes):
            raise ValueError(f"{where}: expected -1 to {num_classes - 1}; got {excerpt(str(value))}")
        ids.add(int(value))
    return sorted(ids)
