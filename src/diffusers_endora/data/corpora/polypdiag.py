"""PolypDiag: colonoscopy videos with and without polyp (Tian et al., MICCAI 2022).

The form that is in use is that of med-air/Endo-FM, also taken by CUHK-AIM-Group/Endora (`Downstream-Semi/data`): a
folder `videos` and `splits/{train,val}.txt` with lines `<file>,<label>`, 1 for abnormal. 173 videos to train (102
abnormal) and 80 to validate (60), which are the owners' test set. The layout of the owners' own archive is not
published; the names of the videos are paths in it with `-` for `/`, from which the tree read here is concluded:
`indexed/{train_set_abnormal,train_set_normal,test_set/abnormal_test,test_set/normal_test}/<video>`.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import ClassLabel

from ..clips import find_videos
from .corpus import (
    CorpusBuilder,
    CorpusConfig,
    CorpusError,
    CorpusFolder,
    Rejection,
    SourceVideo,
    check_folder,
    check_positive_integers,
    describe,
    excerpt,
    other_files,
    read_table,
    walk,
)

CLASSES = ("normal", "abnormal")

_SPLIT_FILES = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
_CLASS_FOLDER = re.compile(r"(?:train_set_|)(abnormal|normal)(?:_test|)")


@dataclass
class PolypDiagConfig(CorpusConfig):
    """`labelled_per_class`: keep the first so many training videos of each class, in the order of `train.txt`."""

    labelled_per_class: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labelled_per_class is not None:
            check_positive_integers(labelled_per_class=self.labelled_per_class)


class PolypDiag(CorpusBuilder):
    """Rows of PolypDiag; `train` and `validation` are those of the lists.

    `labelled_40` has of `train` the 40 videos that the official code takes as labelled, the first 20 of each class in
    `train.txt`. One that is missing is not replaced by the next, and a note says how many are there. With
    `kind="clips"` it has their clips. A split whose list is missing or empty is a note, too.
    """

    CORPUS = "polypdiag"
    TERMS = "CC BY 4.0 for the part from HyperKvasir; the terms of the part from LDPolypVideo are not stated"
    BUILDER_CONFIG_CLASS = PolypDiagConfig
    BUILDER_CONFIGS = [
        PolypDiagConfig(name="videos"),
        PolypDiagConfig(name="clips", kind="clips"),
        PolypDiagConfig(name="labelled_40", labelled_per_class=20),
    ]

    @classmethod
    def label_features(cls, config: Any) -> dict[str, Any]:
        return {"label": ClassLabel(names=list(CLASSES))}

    @classmethod
    def read_folder(cls, data_dir: Path | None, config: Any) -> CorpusFolder:
        data_dir = check_folder(data_dir, cls.CORPUS)
        has_lists = (data_dir / "splits").is_dir()
        if config.labelled_per_class is not None and not (data_dir / "splits" / "train.txt").is_file():
            raise CorpusError(
                f"{data_dir}: labelled_per_class needs splits/train.txt, whose order says which; found "
                f"{describe(data_dir / 'splits' if has_lists else data_dir)}."
            )
        if not has_lists:
            return cls._read_tree(data_dir).check(data_dir)
        found = cls._read_lists(data_dir, config.labelled_per_class).check(data_dir)
        found.notes += gaps(found, data_dir / "splits", config)
        return found

    @classmethod
    def _read_lists(cls, data_dir: Path, labelled_per_class: int | None) -> CorpusFolder:
        """The Endo-FM layout."""
        lists = {split: data_dir / "splits" / name for split, name in _SPLIT_FILES.items()}
        if not (lists["train"].is_file() or lists["validation"].is_file()):
            found = describe(data_dir / "splits")
            raise CorpusError(f"{data_dir}/splits: expected train.txt and val.txt; found {found}.")
        lists = {split: path for split, path in lists.items() if path.is_file()}
        folder = data_dir / "videos"
        files = {path.relative_to(folder).as_posix(): path for path in walk(folder) if path.is_file()}
        videos: list[SourceVideo] = []
        rejected: list[Rejection] = []
        listed: dict[str, str] = {}
        unlabelled = 0
        for split, path in lists.items():
            num_listed = dict.fromkeys(CLASSES, 0)
            lines = read_table(path, ",")
            for number, cells in lines:
                where = f"splits/{path.name}, line {number}"
                if len(cells) != 2 or cells[1] not in ("0", "1"):
                    reason = f"expected <file>,<0 or 1>; got {excerpt(','.join(cells))}"
                    rejected.append(Rejection(where, reason))
                    continue
                name, label = PurePosixPath(cells[0]), CLASSES[int(cells[1])]
                if name.as_posix() in listed:
                    rejected.append(Rejection(where, f"{excerpt(cells[0])} is listed in {listed[name.as_posix()]}"))
                    continue
                listed[name.as_posix()] = where
                num_listed[label] += 1
                if name.is_absolute() or ".." in name.parts:
                    rejected.append(Rejection(where, f"{excerpt(cells[0])} is outside videos/"))
                elif name.as_posix() not in files:
                    rejected.append(Rejection(where, f"there is no {excerpt(cells[0])} in videos/"))
                elif split == "train" and labelled_per_class is not None and num_listed[label] > labelled_per_class:
                    unlabelled += 1
                else:
                    source = f"videos/{name.as_posix()}"
                    video_id = name.with_suffix("").as_posix()
                    videos.append(SourceVideo(video_id, files[name.as_posix()], split, source, {"label": label}))
            if lines and not any(num_listed.values()):
                got = excerpt(",".join(lines[0][1]))
                raise CorpusError(f"{path}: expected lines of <file>,<0 or 1>; got {got}.")
        known = [*lists.values(), *(path for name, path in files.items() if name in listed)]
        rejected += other_files(data_dir, known, {"videos": "in none of the lists in splits/"})
        notes = [f"{unlabelled} training videos are not among the labelled ones"] if unlabelled else []
        return CorpusFolder("the Endo-FM layout (videos/ and splits/)", videos, rejected, notes)

    @classmethod
    def _read_tree(cls, data_dir: Path) -> CorpusFolder:
        """The owners' tree, as far as names tell."""
        videos, known = [], []
        for path in find_videos(data_dir)[0]:
            source = path.relative_to(data_dir).as_posix()
            folders = source.split("/")[:-1]
            labels = [m[1] for folder in folders if (m := _CLASS_FOLDER.fullmatch(folder))]
            is_train = any(folder.startswith("train_set") for folder in folders)
            if not labels or not (is_train or "test_set" in folders) or not path.exists():
                continue
            known.append(path)
            split = "train" if is_train else "validation"
            video_id = source.replace("/", "-").removesuffix(path.suffix if path.is_file() else "")
            videos.append(SourceVideo(video_id, path, split, source, {"label": labels[-1]}))
        if not videos:
            raise CorpusError(
                f"{data_dir}: expected videos/ with splits/train.txt and splits/val.txt, or the owners' tree "
                f"(indexed/train_set_abnormal/..., indexed/test_set/normal_test/...); found {describe(data_dir)}."
            )
        return CorpusFolder("the owners' tree", videos, other_files(data_dir, known))


def gaps(found: CorpusFolder, folder: Path, config: Any) -> list[str]:
    """Which of the two splits is empty, and why, and which class has too few videos that are taken as labelled."""
    notes = []
    for split in ("train", "validation"):
        path = folder / _SPLIT_FILES[split]
        if not any(video.split == split for video in found.videos):
            has_lines = path.is_file() and read_table(path, ",")
            reason = "names no usable video" if has_lines else "has no line" if path.is_file() else "is not there"
            notes.append(f"{split} is empty: splits/{path.name} {reason}")
    if (wanted := config.labelled_per_class) is not None:
        labels = [video.labels["label"] for video in found.videos if video.split == "train"]
        counts = [f"{labels.count(name)} {name}" for name in CLASSES]
        if any(labels.count(name) < wanted for name in CLASSES):
            notes.append(f"{config.name}: {' and '.join(counts)} of {wanted} each are there")
    return notes
