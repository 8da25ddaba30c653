"""PolypDiag: colonoscopy videos with and without polyp (Tian et al., MICCAI 2022).

The form that is in use is that of med-air/Endo-FM, also taken by CUHK-AIM-Group/Endora (`Downstream-Semi/data`): a
folder `videos` and `splits/{train,val}.txt` with lines `<file>,<label>`, 1 for abnormal. 173 videos to train (102
abnormal) and 80 to validate (60), which are the owners' test set. The layout of the owners' own archive is not
published; the names of the videos are paths in it with `-` for `/`, from which the tree read here is concluded:
`indexed/{train_set_abnormal,train_set_normal,test_set/abnormal_test,test_set/normal_test}/<video>`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
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
    describe,
    is_video,
    other_files,
    read_table,
)

CLASSES = ("normal", "abnormal")

_SPLIT_FILES = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
_CLASS_FOLDER = re.compile(r"(?:train_set_|)(abnormal|normal)(?:_test|)")


@dataclass
class PolypDiagConfig(CorpusConfig):
    """`labelled_per_class`: keep the first so many training videos of each class, in the order of `train.txt`."""

    labelled_per_class: int | None = None


class PolypDiag(CorpusBuilder):
    """Rows of PolypDiag; `labelled_40` has the 40 training videos that the official code takes as labelled."""

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
        if (data_dir / "splits").is_dir():
            found = cls._read_lists(data_dir)
        else:
            found = cls._read_tree(data_dir)
        if config.labelled_per_class is not None:
            counts = dict.fromkeys(CLASSES, 0)
            kept = []
            for video in found.videos:
                if video.split == "train":
                    counts[video.labels["label"]] += 1
                    if counts[video.labels["label"]] > config.labelled_per_class:
                        continue
                kept.append(video)
            found.notes.append(f"{len(found.videos) - len(kept)} training videos are not among the labelled ones")
            found.videos = kept
        return found.check(data_dir)

    @classmethod
    def _read_lists(cls, data_dir: Path) -> CorpusFolder:
        """The Endo-FM layout."""
        videos: list[SourceVideo] = []
        rejected: list[Rejection] = []
        listed: dict[str, str] = {}
        lists = {split: data_dir / "splits" / name for split, name in _SPLIT_FILES.items()}
        if not lists["train"].is_file():
            found = describe(data_dir / "splits")
            raise CorpusError(f"{data_dir}/splits: expected train.txt and val.txt; found {found}.")
        known = [path for path in lists.values() if path.is_file()]
        for split, path in lists.items():
            if not path.is_file():
                continue
            for number, cells in enumerate(read_table(path, ","), start=1):
                where = f"splits/{path.name}, line {number}"
                if len(cells) != 2 or cells[1] not in ("0", "1"):
                    raise CorpusError(f"{data_dir}/{where}: expected <file>,<0 or 1>; got {','.join(cells)[:80]!r}.")
                name, label = cells[0], CLASSES[int(cells[1])]
                file = data_dir / "videos" / name
                if not file.resolve().is_relative_to((data_dir / "videos").resolve()) and not file.is_symlink():
                    rejected.append(Rejection(name, f"{where}: names a file outside videos/"))
                elif name in listed:
                    rejected.append(Rejection(name, f"{where}: is listed already in {listed[name]}"))
                elif not file.is_file():
                    rejected.append(Rejection(name, f"{where}: there is no such file in videos/"))
                else:
                    videos.append(SourceVideo(Path(name).stem, file, split, f"videos/{name}", {"label": label}))
                    known.append(file)
                listed.setdefault(name, where)
        for rejection in other_files(data_dir, known):
            is_unlisted = is_video(data_dir / rejection.source)
            reason = "is in none of the lists in splits/" if is_unlisted else rejection.reason
            rejected.append(Rejection(rejection.source, reason))
        return CorpusFolder("the Endo-FM layout (videos/ and splits/)", videos, rejected)

    @classmethod
    def _read_tree(cls, data_dir: Path) -> CorpusFolder:
        """The owners' tree, as far as names tell."""
        videos, rejected, known = [], [], []
        for path in find_videos(data_dir)[0]:
            source = path.relative_to(data_dir).as_posix()
            parts = Path(source).parts[:-1]
            labels = [m[1] for part in parts if (m := _CLASS_FOLDER.fullmatch(part))]
            is_train = any(part.startswith("train_set") for part in parts)
            known.append(path)
            if not labels or not (is_train or "test_set" in parts):
                rejected.append(Rejection(source, "no folder on its way says both the set and normal or abnormal"))
                continue
            split = "train" if is_train else "validation"
            video_id = source.replace("/", "-").removesuffix(path.suffix if path.is_file() else "")
            videos.append(SourceVideo(video_id, path, split, source, {"label": labels[-1]}))
        if not videos:
            raise CorpusError(
                f"{data_dir}: expected videos/ with splits/train.txt and splits/val.txt, or the owners' tree "
                f"(indexed/train_set_abnormal/..., indexed/test_set/normal_test/...); found {describe(data_dir)}."
            )
        return CorpusFolder("the owners' tree", videos, rejected + other_files(data_dir, known))
