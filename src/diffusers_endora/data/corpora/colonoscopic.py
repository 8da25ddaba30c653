"""Colonoscopic: lesions seen in white light and narrow-band imaging (Mesejo et al., IEEE TMI 35(9), 2016).

76 lesions with two videos each: hyperplastic 21, serrated 15, adenoma 40 (openmedlab/Awesome-Medical-Dataset,
`resources/Colonoscopic.md`). Names on the owners' site, http://www.depeca.uah.es/colonoscopy_dataset/, are known from
download code (Guoxoug/SIRC, `utils/extract_frames.py`): `Hyperplasic/hyperplasic_01/videos/NBI.mp4`, spelt so; others
draw the tree in lower case and without `videos/`. Both are read. Frame rates are those of the files.
"""

import re
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Value

from .corpus import (
    CorpusBuilder,
    CorpusError,
    CorpusFolder,
    Rejection,
    SourceVideo,
    check_folder,
    describe,
    is_video,
    other_files,
    processed_folder,
    walk,
)

CLASSES = ("hyperplastic", "serrated", "adenoma")
LIGHTS = ("white_light", "nbi")

_LESION = re.compile(r"(hyperplast?ic|serrated|adenoma)_([0-9]{1,4})", re.IGNORECASE)
_LIGHT_OF_FILE = {"wl": "white_light", "nbi": "nbi"}


class Colonoscopic(CorpusBuilder):
    """Rows of Colonoscopic, from the owners' tree or the Endo-FM folder of 210 numbered clips.

    No split is published. Of each class every fifth lesion (number divisible by five) is `test`, both lights together.
    The Endo-FM clips come without class, light or lesion and are all `train`.
    """

    CORPUS = "colonoscopic"
    TERMS = "no licence or terms were found: download it yourself, do not redistribute it"

    @classmethod
    def label_features(cls, config: Any) -> dict[str, Any]:
        return {
            "label": ClassLabel(names=list(CLASSES)),
            "lesion": Value("string"),
            "light": ClassLabel(names=list(LIGHTS)),
        }

    @classmethod
    def read_folder(cls, data_dir: Path | None, config: Any) -> CorpusFolder:
        data_dir = check_folder(data_dir, cls.CORPUS)
        videos, rejected, known = [], [], []
        for path in filter(is_video, walk(data_dir)):
            below = path.relative_to(data_dir)
            lesion = next((m for part in reversed(below.parts[:-1]) if (m := _LESION.fullmatch(part))), None)
            light = _LIGHT_OF_FILE.get(path.stem.lower())
            if lesion is None:
                continue
            known.append(path)
            if light is None:
                rejected.append(Rejection(below.as_posix(), "expected WL.mp4 or NBI.mp4 in the folder of a lesion"))
                continue
            label = next(name for name in CLASSES if name.startswith(lesion[1].lower()[:5]))
            number = int(lesion[2])
            name = f"{label}_{number:02d}"
            labels = {"label": label, "lesion": name, "light": light}
            split = "test" if number % 5 == 0 else "train"
            videos.append(SourceVideo(f"{name}_{light}", path, split, below.as_posix(), labels))
        if videos:
            rejected += other_files(data_dir, known)
            return CorpusFolder("the owners' tree", videos, rejected).check(data_dir)
        processed = processed_folder(data_dir, {"label": None, "lesion": None, "light": None})
        if processed is None:
            raise CorpusError(
                f"{data_dir}: expected the owners' tree (Hyperplasic/hyperplasic_01/videos/WL.mp4, ...) or the "
                f"Endo-FM folder (00001.mp4, ...); found {describe(data_dir)}."
            )
        return processed.check(data_dir)
