"""What frozen networks make of the frames of a corpus, computed once and read in every epoch."""

import hashlib
import json
import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..data.clips import ClipDataset
from ..data.read_ahead import read_ahead
from ..data.video_io import VideoError
from ..files import file_hash, written_atomically
from .processes import raise_everywhere

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**26  # about as large is a shard
FRAMES_PER_SHARD = 1024  # at most
FRAMES_AT_A_TIME = 32  # decoded together
OPEN_SHARDS = 256  # kept open by a process

# By how much what is stored may differ from what was computed: root mean square, relative to that of the frames
TOLERANCE = {"float32": 0.0, "float16": 1e-3, "int8": 2e-2}


@dataclass(frozen=True)
class FrameFeatures:
    """A kind of features: what a network puts out for one frame.

    Attributes:
        name: of the kind, for people and the folder: "latents", "tokens".
        key: identifies the network with its weights, and what else the numbers depend on.
        shapes: of each output for one frame, by its name.
        dtype: how it is kept: "float16", "float32", or "int8" with one float16 scale for each vector along the last
            axis. Where it would differ by more than `TOLERANCE`, a shard is kept in the next wider one.
    """

    name: str
    key: str
    shapes: dict[str, tuple[int, ...]]
    dtype: Literal["float16", "float32", "int8"] = "float16"

    @property
    def bytes_per_frame(self) -> int:
        """What one form of a frame takes on disk."""
        size = {"float16": 2, "float32": 4, "int8": 1}[self.dtype]
        scales = sum(2 * int(np.prod(shape[:-1])) for shape in self.shapes.values()) if self.dtype == "int8" else 0
        return size * sum(int(np.prod(shape)) for shape in self.shapes.values()) + scales


@dataclass(frozen=True)
class Shard:
    """Some consecutive frames of one video, in all the forms that items show them in."""

    path: Path
    video: int
    frames: range


class FeatureCache:
    """A folder with the features of all frames of a corpus that its items can show, in each form that they do.

    The folder `<name>-<key>` holds shards: safetensors files named after the content of a video, which of its frames
    they hold, and how these were cropped. A shard carries the SHA-256 of its numbers. Forms of the same pixels (frames
    and still images, where the video has the training's size) are computed and kept once. What is missing, damaged or
    of other content is computed, nothing else, and a computation that is killed goes on where it was. Corpora that
    share videos share shards. `index.json` lists the shards and remembers the hashes of video files, so that an
    unchanged file is not read again.

    The processes of a training (`accelerate launch`, `torchrun`) share the work; all of them call the same methods.

    Args:
        folder: of all caches.
        dataset: the corpus. Its frame ids are what `read` takes.
        features: what is kept.
        state: the processes, an `accelerate.PartialState` or `Accelerator`.

    Attributes:
        damaged: ids of frames that could not be decoded, known once the cache is filled.

    Raises:
        OSError: the folder cannot be made or its videos cannot be read.
    """

    def __init__(self, folder: str | Path, dataset: ClipDataset, features: FrameFeatures, state: Any) -> None:
        self.dataset = dataset
        self.features = features
        self.state = state
        crop = f"{dataset.height}x{dataset.width} antialias={dataset.antialias} forms={dataset.frame_variants}"
        key = hashlib.sha256(f"{features.key}\n{features.dtype}\n{sorted(features.shapes.items())}".encode())
        self.folder = Path(folder) / f"{features.name}-{key.hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.variants = dataset.frame_variants
        self._rows_of_variant = {variant: place for place, variant in enumerate(self.variants)}
        self._first_frame = np.cumsum([0, *dataset.num_frames_of_videos])
        self.frames_per_shard = max(
            1, min(FRAMES_PER_SHARD, SHARD_BYTES // (features.bytes_per_frame * len(self.variants)))
        )
        self.damaged: frozenset[int] = frozenset()
        self._open: OrderedDict[Path, tuple[dict[str, torch.Tensor], list[int]]] = OrderedDict()

        self._hashes = self._hash_videos()
        self.shards: list[Shard] = []
        self._first_shard = [0]
        for video, num_frames in enumerate(dataset.num_frames_of_videos):
            for start in range(0, num_frames, self.frames_per_shard):
                frames = range(start, min(start + self.frames_per_shard, num_frames))
                mark = f"{self._hashes[video][1]} {frames.start} {len(frames)} {crop}"
                name = hashlib.sha256(mark.encode()).hexdigest()[:40]
                self.shards.append(Shard(self.folder / name[:2] / f"{name}.safetensors", video, frames))
            self._first_shard.append(len(self.shards))

    @property
    def num_bytes(self) -> int:
        """What the whole cache takes on disk, at most."""
        return self.bytes_of(self.shards)

    def bytes_of(self, shards: Iterable[Shard]) -> int:
        """What shards take on disk, at most."""
        return sum(len(shard.frames) for shard in shards) * len(self.variants) * self.features.bytes_per_frame

    def missing(self) -> list[Shard]:
        """The shards to compute: those that are not there, cannot be read, or whose numbers have another hash.

        Reads the whole cache; the processes share the reading.
        """
        mine = self.shards[self.state.process_index :: self.state.num_processes]
        with ThreadPoolExecutor(max_workers=4) as threads:
            intact = threads.map(_is_intact, [shard.path for shard in mine])
            wrong = [shard for shard, is_intact in zip(mine, intact, strict=True) if not is_intact]
        wrong_paths = set(self._gathered([shard.path for shard in wrong]))
        return list({shard.path: shard for shard in self.shards if shard.path in wrong_paths}.values())

    def fill(self, missing: list[Shard], compute: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
        """Computes shards, which the processes share, and writes the index.

        Args:
            missing: what `missing` returned.
            compute: pixels `(n, 3, H, W)` in [-1, 1], on the CPU, to the outputs `(n, *shape)`, on any device.

        Raises:
            OSError: the disk is full or refuses, in every process; what is finished stays.
        """
        if self.state.is_main_process:
            for leftover in self.folder.glob("*/.*.safetensors"):  # of a process that was killed a day ago
                if leftover.stat().st_mtime < time.time() - 86400:
                    leftover.unlink()
        failure = None
        try:
            mine = missing[self.state.process_index :: self.state.num_processes]
            hidden = not missing or not self.state.is_main_process
            with tqdm(
                total=sum(len(shard.frames) for shard in mine), desc=self.features.name, unit="frame", disable=hidden
            ) as progress:
                for shard in mine:
                    self._write(shard, compute, progress)
        except (OSError, SafetensorError) as error:
            failure = f"{self.folder}: {error}; what is finished stays, and the same command goes on from there."
        raise_everywhere(self.state, failure)
        if self.state.is_main_process:
            self._write_index()
        self._find_damaged()

    def read(self, frame_ids: list[int]) -> dict[str, torch.Tensor]:
        """Features of frames, `(len(frame_ids), *shape)` for each output, float16 or float32.

        Args:
            frame_ids: as the items of the dataset have them.
        """
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in self.features.shapes}
        for frame_id in frame_ids:
            frame, variant = divmod(frame_id, 3)
            video = int(np.searchsorted(self._first_frame, frame, side="right")) - 1
            place = frame - int(self._first_frame[video])
            shard = self.shards[self._first_shard[video] + place // self.frames_per_shard]
            tensors, forms = self._opened(shard)
            form, row = forms[self._rows_of_variant[variant]], place - shard.frames.start
            for name in rows:
                value = tensors[name][form, row]
                if name + SCALE in tensors:
                    value = value.half() * tensors[name + SCALE][form, row]
                rows[name].append(value)
        return {name: torch.stack([value.to(_widest(values)) for value in values]) for name, values in rows.items()}

    def __getstate__(self) -> dict[str, Any]:  # for data workers
        return {**self.__dict__, "_open": OrderedDict(), "state": None}

    # --- shards ------------------------------------------------------------------------------------------------------

    def _write(self, shard: Shard, compute: Callable[[torch.Tensor], dict[str, torch.Tensor]], progress: tqdm) -> None:
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self.features.shapes}
        damaged: list[int] = []
        patterns: set[tuple[int, ...]] = set()
        chunks = [shard.frames[i : i + FRAMES_AT_A_TIME] for i in range(0, len(shard.frames), FRAMES_AT_A_TIME)]
        for pixels, broken in read_ahead(partial(self._pixels, shard.video), chunks, count=2):
            first_alike = [next(j for j, other in enumerate(pixels) if torch.equal(form, other)) for form in pixels]
            distinct = sorted(set(first_alike))
            forms = [distinct.index(j) for j in first_alike]
            patterns.add(tuple(forms))
            outputs = compute(pixels[distinct].flatten(0, 1))
            for name, shape in self.features.shapes.items():
                values = outputs[name].float().cpu()
                if values.shape[1:] != shape:
                    raise ValueError(f"{name} of a frame has shape {tuple(values.shape[1:])}: expected {shape}.")
                parts[name].append(values.unflatten(0, (len(distinct), pixels.shape[1]))[forms])
            damaged += broken
            progress.update(pixels.shape[1])
        if len(patterns) > 1:  # alike in some chunks alone
            distinct = forms = list(range(len(self.variants)))
        stored: dict[str, torch.Tensor] = {}
        for name, chunks_of_name in parts.items():
            stored |= compressed(name, torch.cat(chunks_of_name, dim=1)[distinct], self.features.dtype)
            if (kept := str(stored[name].dtype).removeprefix("torch.")) != self.features.dtype:
                logger.warning("%s: %s are kept as %s for exactness", shard.path.name, name, kept)
        marks = {"damaged": json.dumps(damaged), "forms": json.dumps(forms)}
        shard.path.parent.mkdir(exist_ok=True)
        with written_atomically(shard.path) as temporary:
            save_file(stored, temporary, metadata={**marks, "sha256": _digest(stored, marks)})

    def _pixels(self, video: int, frames: range) -> tuple[torch.Tensor, list[int]]:
        """Frames in all forms `(forms, n, 3, H, W)`, and which of them are damaged (zeros)."""
        try:
            return self.dataset.read_variants(video, frames), []
        except VideoError:
            size = (len(self.variants), len(frames), 3, self.dataset.height, self.dataset.width)
            pixels, damaged = torch.zeros(size), []
            for place, frame in enumerate(frames):
                try:
                    pixels[:, place] = self.dataset.read_variants(video, range(frame, frame + 1))[:, 0]
                except VideoError as error:
                    damaged.append(frame)
                    logger.warning("no %s: %s", self.features.name, error)
            return pixels, damaged

    def _opened(self, shard: Shard) -> tuple[dict[str, torch.Tensor], list[int]]:
        """The tensors of a shard, mapped and not read, and where in them each form is."""
        if shard.path not in self._open:
            with safe_open(shard.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self._open[shard.path] = tensors, json.loads(file.metadata()["forms"])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard.path)
        return self._open[shard.path]

    def _find_damaged(self) -> None:
        damaged = set()
        for shard in self.shards:
            with safe_open(shard.path, framework="pt") as file:
                frames = json.loads(file.metadata()["damaged"])
            first = int(self._first_frame[shard.video])
            damaged |= {3 * (first + frame) + variant for frame in frames for variant in self.variants}
        self.damaged = frozenset(damaged)

    # --- index and hashes --------------------------------------------------------------------------------------------

    def _hash_videos(self) -> dict[int, tuple[Any, str]]:
        """Stamps and SHA-256 of each video; of files that the index knows, unchanged, without reading them."""
        known = self._index()
        mine: dict[int, tuple[Any, str]] = {}
        failure = None
        try:
            for i in range(self.state.process_index, self.dataset.num_videos, self.state.num_processes):
                stamps = self.dataset.video_stamps(i)
                entry = known.get(self.dataset.video_name(i))
                if entry is not None and stamps and entry["files"] == [list(stamp) for stamp in stamps]:
                    mine[i] = (stamps, entry["sha256"])
                else:
                    mine[i] = (stamps, self.dataset.video_hash(i))
        except (OSError, ValueError) as error:
            failure = str(error)
        raise_everywhere(self.state, failure)
        return {i: hashed for part in self._gathered([mine]) for i, hashed in part.items()}

    def _index(self) -> dict[str, Any]:
        """`index.json`'s videos, by name: SHA-256, stamps, and the shards with frames of it."""
        if not (self.folder / INDEX).is_file():
            return {}
        try:
            videos = json.loads((self.folder / INDEX).read_text())["videos"]
            return {
                name: {field: video[field] for field in ("sha256", "files", "shards")}
                for name, video in videos.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is made anew: it cannot be read (%s)", self.folder / INDEX, error)
            return {}

    def _write_index(self) -> None:
        videos = self._index()  # of other corpora, too, and of other forms of a frame
        for i, (stamps, digest) in self._hashes.items():
            name = self.dataset.video_name(i)
            shards = {
                shard.path.relative_to(self.folder).as_posix()
                for shard in self.shards[self._first_shard[i] : self._first_shard[i + 1]]
            }
            if name in videos and videos[name]["sha256"] == digest:
                shards |= set(videos[name]["shards"])
            videos[name] = {"sha256": digest, "files": stamps, "shards": sorted(shards)}
        index = {
            "features": self.features.name,
            "key": self.features.key,
            "dtype": self.features.dtype,
            "outputs": {name: list(shape) for name, shape in self.features.shapes.items()},
            "videos": videos,
        }
        with written_atomically(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=1))

    def _gathered(self, values: list[Any]) -> list[Any]:
        """The values of all processes."""
        return gather_object(values) if self.state.num_processes > 1 else values


def network_digest(path_or_repo: str | Path) -> str:
    """SHA-256 over the config and the weights of a network of diffusers or transformers, without loading it.

    Args:
        path_or_repo: a folder, or a Hub id, which is downloaded where it is not yet.

    Raises:
        OSError: it has no weights, or cannot be downloaded.
    """
    for pattern in ("*.safetensors", "*.bin"):
        folder = Path(path_or_repo)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(path_or_repo), allow_patterns=["config.json", pattern]))
        if weights := sorted(folder.glob(pattern)):
            config = json.loads((folder / "config.json").read_text())
            # not where it was loaded from, nor which version of a library wrote it
            facts = {name: value for name, value in config.items() if name[:1] != "_" and "version" not in name}
            digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
            for path in weights:
                digest.update(f"{path.name} {file_hash(path)}".encode())
            return digest.hexdigest()
    raise OSError(f"{path_or_repo}: expected weights beside its config.json, found neither safetensors nor bin.")


INDEX = "index.json"
SCALE = ".scale"


def compressed(name: str, values: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Tensors to keep float32 values by: in `dtype`, or the next wider one that meets its `TOLERANCE`.

    Returns:
        `{name: values}`, for int8 with `{name.scale: ...}`, of the shape of the values but for a last axis of 1.
    """
    if dtype == "int8":
        scale = (values.abs().amax(-1, keepdim=True) / 127).half().clamp(min=torch.finfo(torch.float16).tiny)
        quantised = (values / scale.float()).round().clamp(-127, 127).to(torch.int8)
        if _is_near(quantised * scale.float(), values, TOLERANCE["int8"]):
            return {name: quantised, name + SCALE: scale}
    if dtype in ("int8", "float16") and _is_near(values.half().float(), values, TOLERANCE["float16"]):
        return {name: values.half()}
    return {name: values}


def _is_near(stored: torch.Tensor, values: torch.Tensor, tolerance: float) -> bool:
    """Whether the difference is small in every frame; infinities are not."""
    axes = tuple(range(2, values.ndim))
    error = (stored - values).square().mean(axes).sqrt()
    return bool((error <= tolerance * values.square().mean(axes).sqrt()).all())


def _widest(values: list[torch.Tensor]) -> torch.dtype:
    return torch.float32 if any(value.dtype == torch.float32 for value in values) else torch.float16


def _digest(tensors: dict[str, torch.Tensor], marks: dict[str, str]) -> str:
    digest = hashlib.sha256(f"{marks['damaged']} {marks['forms']}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_intact(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        logger.warning("%s is computed again: it cannot be read (%s)", path, error)
        return False
    if "sha256" in metadata and "forms" not in metadata:
        logger.warning("%s is computed again: it is of an earlier version of this package", path)
        return False
    if not {"damaged", "sha256"} <= set(metadata) or metadata["sha256"] != _digest(tensors, metadata):
        logger.warning("%s is computed again: its hash is another", path)
        return False
    return True


def check_space(folder: str | Path, num_bytes: int) -> None:
    """Raises a ValueError where a disk has no room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{folder}: the features of this corpus need {readable_size(num_bytes)} more, of which "
            f"{readable_size(free)} are free. Use another disk, fewer forms of a frame (--no-horizontal_flip, "
            "--num_still_images 0), int8, or keep one kind alone (--no-cache_dino)."
        )


def readable_size(num_bytes: int) -> str:
    """A number of bytes for people: "142.0 GB"."""
    size, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
