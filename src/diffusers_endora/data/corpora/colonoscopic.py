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

from ..clips import find_videos
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
)

CLASSES = ("hyperplastic", "serrated", "adenoma")
LIGHTS = ("white_light", "nbi")

_LESION = re.compile(r"(hyperplas(?:t)?ic|serrated|adenoma)_(\d+)", re.IGNORECASE)
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
        processed = processed_folder(data_dir, {"label": None, "lesion": None, "light": None})
        if processed is not None:
            return processed.check(data_dir)
        videos, rejected, known = [], [], []
        for path in find_videos(data_dir)[0]:
            if not is_video(path):
                continue
            source = path.relative_to(data_dir).as_posix()
            lesion = next((m for p in path.parents if (m := _LESION.fullmatch(p.name))), None)
            light = _LIGHT_OF_FILE.get(path.stem.lower())
            known.append(path)
            if lesion is None:
                rejected.append(Rejection(source, "no folder on its way is a lesion such as hyperplasic_01"))
            elif light is None:
                rejected.append(Rejection(source, "expected WL.mp4 or NBI.mp4"))
            else:
                label = next(name for name in CLASSES if name.startswith(lesion[1].lower()[:5]))
                number = int(lesion[2])
                name = f"{label}_{number:02d}"
                split = "test" if number % 5 == 0 else "train"
                labels = {"label": label, "lesion": name, "light": light}
                videos.append(SourceVideo(f"{name}_{light}", path, split, source, labels))
        if not videos:
            raise CorpusError(
                f"{data_dir}: expected the owners' tree (Hyperplasic/hyperplasic_01/videos/WL.mp4, ...) or the "
                f"Endo-FM folder (00001.mp4, ...); found {describe(data_dir)}."
            )
        rejected += other_files(data_dir, known)
        return CorpusFolder("the owners' tree", videos, rejected).check(data_dir)
