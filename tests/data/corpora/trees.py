"""Raw folders as the owners of the corpora, and Endo-FM, publish them, with tiny videos inside.

Names, columns, delimiters, line endings and spellings are the owners'. Videos are drifting textures, each another one.
"""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from diffusers_endora.data.corpora import corpus_class
from diffusers_endora.data.corpora.corpus import CorpusFolder

LAYOUTS: dict[str, tuple[str, ...]] = {
    "colonoscopic": ("owners", "owners_flat", "endo_fm"),
    "kvasir_capsule": ("owners", "owners_and_folds", "endo_fm"),
    "cholectriplet": ("cholect45", "cholect50", "cholect50_list", "endo_fm"),
    "polypdiag": ("endo_fm", "owners"),
}

_SHORTEST = 6  # frames: the labels written here reach as far


def write_tree(corpus: str, layout: str, root: Path, num_frames: int = 20) -> Path:
    """Writes the raw folder of a corpus to `root`, which may exist, and returns it.

    `num_frames` is that of every video; `LAYOUTS` has the layouts of each corpus.
    """
    if layout not in LAYOUTS[corpus]:
        raise ValueError(f"{layout}: expected one of {', '.join(LAYOUTS[corpus])}")
    if num_frames < _SHORTEST:
        raise ValueError(f"num_frames={num_frames}: expected {_SHORTEST} or more")
    root.mkdir(parents=True, exist_ok=True)
    _WRITERS[corpus](root, layout, num_frames)
    return root


def read_tree(corpus: str, root: Path, config_name: str = "videos", **options: Any) -> CorpusFolder:
    """What the corpus' builder finds in a raw folder."""
    builder = corpus_class(corpus)
    config = next(config for config in builder.BUILDER_CONFIGS if config.name == config_name)
    return builder.read_folder(root, replace(config, **options))


# --- videos ----------------------------------------------------------------------------------------------------------


def pictures(seed: int, num_frames: int, height: int, width: int) -> np.ndarray:
    """A texture of its own for each seed that drifts by a pixel a frame, uint8 `(F, H, W, 3)`."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((width + num_frames, height), Image.Resampling.BICUBIC))
    return np.stack([texture[:, i : i + width] for i in range(num_frames)])


@cache
def video_bytes(
    seed: int, num_frames: int, height: int, width: int, fps: Fraction | int = 25, codec: str = "libx264"
) -> bytes:
    """The mp4 file of `pictures`."""
    buffer = io.BytesIO()
    options = {"preset": "ultrafast"} if codec == "libx264" else {}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures(seed, num_frames, height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@cache
def png_bytes(seed: int, num_frames: int, height: int, width: int) -> tuple[bytes, ...]:
    """The files of `pictures`; the last is black, as out-of-body frames are."""
    files = []
    for i, picture in enumerate(pictures(seed, num_frames, height, width)):
        buffer = io.BytesIO()
        Image.fromarray(picture * (i + 1 < num_frames)).save(buffer, "png", compress_level=1)
        files.append(buffer.getvalue())
    return tuple(files)


def write(path: Path, content: str | bytes) -> Path:
    """Writes a file as it is given, no line ending changed, and the folders on its way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _write_endo_fm(root: Path, num_frames: int, height: int, width: int, first_seed: int) -> None:
    """Five numbered clips as OpenCV's `mp4v` writes them: MPEG-4 Part 2, 30 fps whatever the source had."""
    for i in range(1, 6):
        content = video_bytes(first_seed + i, num_frames, height, width, 30, "mpeg4")
        write(root / f"{i:05d}.mp4", content)


# --- Colonoscopic ----------------------------------------------------------------------------------------------------

_LESIONS = ("hyperplasic_01", "hyperplasic_05", "serrated_03", "serrated_15", "adenoma_02", "adenoma_40")


def _write_colonoscopic(root: Path, layout: str, num_frames: int) -> None:
    if layout == "endo_fm":
        return _write_endo_fm(root, num_frames, 64, 84, 1000)
    for i, lesion in enumerate(_LESIONS):
        class_folder = lesion.split("_")[0]
        folder = root / class_folder / lesion
        if layout == "owners":
            folder = root / class_folder.capitalize() / lesion / "videos"
        for j, light in enumerate(("WL", "NBI")):
            write(folder / f"{light}.mp4", video_bytes(1100 + 2 * i + j, num_frames, 48, 64))
    return None


# --- Kvasir-Capsule --------------------------------------------------------------------------------------------------

LABELLED = ("04a78ef00c5245e0", "0531325b64674948", "0728084c8da942d9", "d4735e3a265e16ee", "bca26705313a4644")
UNLABELLED = ("055bbbec392b4f3a", "08d09e4d7aa140f7")

_METADATA_HEADER = "filename;video_id;frame_number;finding_category;finding_class;x1;y1;x2;y2;x3;y3;x4;y4"
# video, frame, category, class in the spelling of metadata.csv, corners clockwise from the top left
_FINDINGS = (
    (0, 0, "Luminal", "Normal clean mucosa", ""),
    (0, 1, "Luminal", "Normal clean mucosa", ""),
    (0, 2, "Luminal", "Erosion", "138;3;311;3;311;73;138;73"),
    (1, 1, "Luminal", "Foreign Body", "210;187;341;187;341;341;210;341"),  # reaches beyond the 336 pixels
    (1, 3, "Luminal", "Foreign Body", "200;180;330;180;330;330;200;330"),
    (2, 0, "Anatomy", "Pylorus", ""),
    (2, 0, "Luminal", "Erosion", "10;20;40;20;40;60;10;60"),  # a second finding of the same frame
    (2, 4, "Luminal", "Reduced Mucosal View", ""),
    (3, 2, "Anatomy", "Ampulla of Vater", "100;110;150;110;150;170;100;170"),
    (3, 5, "Luminal", "Blood - fresh", "0;0;336;0;336;336;0;336"),
    (4, 4, "Luminal", "Erythema", ""),
)
_IMAGE_FOLDERS = {
    "ampulla_of_vater": "Ampulla of vater",
    "angiectasia": "Angiectasia",
    "blood_fresh": "Blood - fresh",
    "blood_hematin": "Blood - hematin",
    "erosion": "Erosion",
    "erythema": "Erythema",
    "foreign_body": "Foreign body",
    "ileocecal_valve": "Ileocecal valve",
    "lymphangiectasia": "Lymphangiectasia",
    "normal_clean_mucosa": "Normal clean mucosa",
    "polyp": "Polyp",
    "pylorus": "Pylorus",
    "reduced_mucosal_view": "Reduced mucosal view",
    "ulcer": "Ulcer",
}


def _write_kvasir_capsule(root: Path, layout: str, num_frames: int) -> None:
    if layout == "endo_fm":
        return _write_endo_fm(root, num_frames, 64, 64, 2000)
    for i, video_id in enumerate(LABELLED):
        write(root / "labelled_videos" / f"{video_id}.mp4", video_bytes(2100 + i, num_frames, 336, 336, 30))
    for i, video_id in enumerate(UNLABELLED):
        write(root / "unlabelled_videos" / f"{video_id}.mp4", video_bytes(2200 + i, num_frames, 336, 336, 30))
    write(root / "metadata.csv", kvasir_metadata())
    write(root / "metadata.json", json.dumps(_kvasir_json()))
    for name, folder in _IMAGE_FOLDERS.items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(folder)
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        write(root / "labelled_images" / f"{name}.tar.gz", buffer.getvalue())
    if layout == "owners_and_folds":
        # Two-fold: the first and the third video are in fold 0, the third and the others in fold 1
        folds = ((0, 2), (1, 2, 4))
        for i, videos in enumerate(folds):
            rows = [f"{LABELLED[video]}_{frame}.jpg,{label}" for video in videos for frame, label in _FOLD_ROWS]
            write(root / "official_splits" / f"split_{i}.csv", "\n".join(["filename,label", *rows]))
    return None


_FOLD_ROWS = ((2, "Erosion"), (3, "Normal"), (4, "Foreign Bodies"), (5, "Ileo-cecal valve"))


def kvasir_metadata() -> str:
    """`metadata.csv`, written as the owners' script does: seven semicolons after a class without a box."""
    lines = [_METADATA_HEADER]
    for video, frame, category, finding_class, corners in _FINDINGS:
        name = f"{LABELLED[video]}_{frame}.jpg;{LABELLED[video]};{frame}"
        lines.append(f"{name};{category};{finding_class}" + (f";{corners}" if corners else ";" * 7))
    return "\n".join(lines) + "\n"


def _kvasir_json() -> dict[str, object]:
    content: dict[str, object] = {}
    for i, video_id in enumerate(LABELLED):
        findings: dict[str, object] = {}
        for video, frame, _, finding_class, corners in _FINDINGS:
            if video == i and corners:
                values = [int(value) for value in corners.split(";")]
                shape = [{"x": x, "y": y} for x, y in zip(values[::2], values[1::2], strict=True)]
                frames = {str(frame): {"shape": shape}}
                findings[f"finding_{frame}"] = {"metadata": {"pillcam_subtype": finding_class}, "frames": frames}
        segment = {"seen": [[0, 1]], "metadata": {"pillcam_subtype": None, "segment_type": "Normal clean mucosa"}}
        content[video_id] = {"segments": {"segment_0": segment}, "findings": findings}
    return content


# --- CholecT45 and CholecT50 -----------------------------------------------------------------------------------------

T45_VIDEOS = (2, 79, 4, 13, 31, 80)  # fold 1 of the cross-validation: two of test, validation and train each
T50_VIDEOS = (1, 15, 8, 12, 6, 111, 65)  # two of train, validation and test in the paper; the challenge has others

_INSTRUMENTS = ["grasper", "bipolar", "hook", "scissors", "clipper", "irrigator"]
_VERBS = ["grasp", "retract", "dissect", "coagulate", "clip", "cut", "aspirate", "irrigate", "pack", "null_verb"]
_TARGETS = ["gallbladder", "cystic_plate", "cystic_duct", "cystic_artery", "cystic_pedicle", "blood_vessel", "fluid"]
_TARGETS += [
    "abdominal_wall_cavity",
    "liver",
    "adhesion",
    "omentum",
    "peritoneum",
    "gut",
    "specimen_bag",
    "null_target",
]
_PHASES = ["preparation", "carlot-triangle-dissection", "clipping-and-cutting", "gallbladder-dissection"]
_PHASES += ["gallbladder-packaging", "cleaning-and-coagulation", "gallbladder-extraction"]

# instrument, verb and target of the triplets 0 to 99, as in the owners' maps.txt
_MAPS = """
0,2,1 0,2,0 0,2,10 0,0,3 0,0,2 0,0,4 0,0,1 0,0,0 0,0,12 0,0,8 0,0,10 0,0,11 0,0,13 0,8,0 0,1,2 0,1,4 0,1,1
0,1,0 0,1,12 0,1,8 0,1,10 0,1,11 1,3,7 1,3,5 1,3,3 1,3,2 1,3,4 1,3,1 1,3,0 1,3,8 1,3,10 1,3,11 1,2,9 1,2,3
1,2,2 1,2,1 1,2,0 1,2,10 1,0,1 1,0,8 1,0,13 1,1,2 1,1,4 1,1,0 1,1,8 1,1,10 2,3,5 2,3,3 2,3,2 2,3,4 2,3,1
2,3,0 2,3,8 2,3,10 2,5,5 2,5,11 2,2,5 2,2,3 2,2,2 2,2,1 2,2,0 2,2,10 2,2,11 2,1,0 2,1,8 3,3,10 3,5,9 3,5,5
3,5,3 3,5,2 3,5,1 3,5,8 3,5,10 3,5,11 3,2,1 3,2,0 3,2,10 4,4,5 4,4,3 4,4,2 4,4,4 4,4,1 5,6,6 5,2,2 5,2,4
5,2,1 5,2,0 5,2,10 5,7,7 5,7,4 5,7,8 5,1,0 5,1,8 5,1,10 0,9,14 1,9,14 2,9,14 3,9,14 4,9,14 5,9,14
"""
TRIPLET_PARTS = [tuple(map(int, parts.split(","))) for parts in _MAPS.split()]
TRIPLETS = [f"{_INSTRUMENTS[i]},{_VERBS[v]},{_TARGETS[t]}" for i, v, t in TRIPLET_PARTS]

_NAMES = {"triplet": TRIPLETS, "instrument": _INSTRUMENTS, "verb": _VERBS, "target": _TARGETS}


def triplets_of_frame(frame: int) -> tuple[int, ...]:
    """Which triplets the trees say a frame shows: of five frames in a row one shows nothing and one shows two."""
    return ((17,), (17, 60), (), (4,), (99,))[frame % 5]


def _write_cholectriplet(root: Path, layout: str, num_frames: int) -> None:
    if layout == "endo_fm":
        return _write_endo_fm(root, num_frames, 64, 112, 3000)
    is_t45 = layout == "cholect45"
    for number in T45_VIDEOS if is_t45 else T50_VIDEOS:
        video = f"VID{number:02d}"
        folder = root / ("data" if is_t45 else "videos") / video
        for i, content in enumerate(png_bytes(3100 + number, num_frames, 36, 64)):
            write(folder / f"{i:06d}.png", content)
        if is_t45:
            for kind, names in _NAMES.items():
                write(root / kind / f"{video}.txt", text_labels(kind, len(names), num_frames))
        else:
            content = json_labels(number, num_frames, as_list=layout == "cholect50_list")
            write(root / "labels" / f"{video}.json", json.dumps(content))
    maps = "".join(f"{ivt},{i},{v},{t},{10 * i + v},{15 * i + t}\n" for ivt, (i, v, t) in enumerate(TRIPLET_PARTS))
    if is_t45:
        for kind, names in _NAMES.items():
            lines = [f"{i}:{name}\n" for i, name in enumerate(names)]
            write(root / "dict" / f"{kind}.txt", "".join(lines) + "-1:null_instrument\n" * (kind == "instrument"))
        write(root / "dict" / "maps.txt", "# IVT, I, V, T, IV, IT\n" + maps)
    else:
        write(root / "label_mapping.txt", "# IVT, I, V, T, IV, IT\n" + maps)
    write(root / "LICENSE", "CC BY-NC-SA 4.0\n")
    write(root / "README.md", "# The cholecystectomy action triplet dataset\n")
    return None


def text_labels(kind: str, num_classes: int, num_frames: int) -> str:
    """A file of CholecT45: the frame and, of each class, whether it is there."""
    lines = []
    for frame in range(num_frames):
        shown = triplets_of_frame(frame)
        if kind != "triplet":
            part = ("instrument", "verb", "target").index(kind)
            shown = tuple(TRIPLET_PARTS[triplet][part] for triplet in shown)
        lines.append(",".join(map(str, [frame, *(int(i in shown) for i in range(num_classes))])) + "\n")
    return "".join(lines)


def json_labels(video: int, num_frames: int, as_list: bool = False) -> dict[str, object]:
    """A file of CholecT50; video 1 has instrument boxes, and what shows nothing is `[]` or a row of -1 in turn."""
    box = [0.4375, 0.25, 0.25, 0.5] if video == 1 else [-1, -1, -1, -1]
    nothing: list[float] = [-1] * 15
    annotations = {}
    for frame in range(num_frames):
        phase = min(frame // 4, 6)
        rows = [
            [i, TRIPLET_PARTS[i][0], 1, *box, TRIPLET_PARTS[i][1], TRIPLET_PARTS[i][2], -1, -1, -1, -1, -1, phase]
            for i in triplets_of_frame(frame)
        ]
        annotations[str(frame)] = rows or ([] if frame % 2 else [[*nothing[:14], phase]])
    named = {kind: {str(i): name for i, name in enumerate(names)} for kind, names in (_NAMES | _PHASE_NAMES).items()}
    categories: object = named
    if as_list:
        categories = [
            {"id": i, "name": name, "supercategory": kind} for kind in named for i, name in named[kind].items()
        ]
    return {
        "video": video,
        "fps": 1,
        "num_frames": num_frames,
        "categories": categories,
        "annotations": annotations,
        "info": {"description": "CholecT50", "version": "1.0"},
        "licenses": [{"id": 1, "name": "CC BY-NC-SA 4.0"}],
    }


_PHASE_NAMES = {"phase": _PHASES}

# --- PolypDiag -------------------------------------------------------------------------------------------------------

# path in the owners' archive, label
_POLYPDIAG_TRAIN = (
    ("indexed/train_set_abnormal/38_outp", 1),
    ("indexed/train_set_normal/33143cb2-a5ef-4bab-b25e-148a8076e5dd", 0),
    ("indexed/train_set_abnormal/7_12_outp", 1),
    ("indexed/train_set_normal/0_14", 0),
    ("indexed/train_set_abnormal/104_outp", 1),
    ("indexed/train_set_normal/64440803-f2d2-4c0f-9a5b-4f0c0b3a1c6e", 0),
)
_POLYPDIAG_VALIDATION = (
    ("indexed/test_set/abnormal_test/Images/2", 1),
    ("indexed/test_set/abnormal_test/Images/14", 1),
    ("indexed/test_set/normal_test/0_3", 0),
    ("indexed/test_set/normal_test/96a7d9b2-0d5b-4d0e-8f2e-1d2f5b6c7a80", 0),
)


def _write_polypdiag(root: Path, layout: str, num_frames: int) -> None:
    lists = {"train": _POLYPDIAG_TRAIN, "val": _POLYPDIAG_VALIDATION}
    seed = 4000
    for split, videos in lists.items():
        lines = []
        for path, label in videos:
            seed += 1
            content = video_bytes(seed, num_frames, 48, 64, 30, "mpeg4" if layout == "endo_fm" else "libx264")
            name = f"{path.replace('/', '-')}-0-{num_frames}.mp4"
            lines.append(f"{name},{label}\n")
            write(root / "videos" / name if layout == "endo_fm" else root / f"{path}.mp4", content)
        if layout == "endo_fm":
            write(root / "splits" / f"{split}.txt", "".join(lines))


_WRITERS: dict[str, Callable[[Path, str, int], None]] = {
    "colonoscopic": _write_colonoscopic,
    "kvasir_capsule": _write_kvasir_capsule,
    "cholectriplet": _write_cholectriplet,
    "polypdiag": _write_polypdiag,
}
