"""Features of clips, computed once and kept: by all processes together, and never twice for the same content."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ..data.read_ahead import read_ahead
from ..files import written_atomically
from .clip_sources import Clip
from .distributed import shared_state
from .feature_extractors import FeatureExtractor
from .preparation import Preparation

logger = logging.getLogger(__name__)

CLIPS_PER_PART = 16  # what an interruption loses at most, per process
READ_AHEAD = 4  # clips decoded while the network works


class FeatureStore:
    """A folder of features, in parts of a few clips, found again by content, preparation and network.

    A part is a safetensors file with the features of its clips and, in its metadata, what identifies each. It appears
    when it is complete. Parts that cannot be read are computed again. Processes started together (`accelerate launch`,
    `torchrun`) share the work and all get everything.

    Args:
        extractor: the network.
        folder: where features are kept. By default a folder in the Hugging Face cache.
    """

    def __init__(self, extractor: FeatureExtractor, folder: str | os.PathLike[str] | None = None):
        self.extractor = extractor
        root = cached_assets_path("diffusers_endora", namespace="features") if folder is None else Path(folder)
        self.folder = root / extractor.key
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_computed = 0

    def __call__(self, clips: Sequence[Clip], preparation: Preparation, description: str) -> dict[str, np.ndarray]:
        """Features of clips, in their order.

        Args:
            description: names the clips in the progress bar.

        Returns:
            float32 `(num_clips, R, width)` for each output of the extractor.

        Raises:
            ValueError, VideoError: a clip cannot be read, or the network cannot take it.
        """
        state = shared_state()
        keys = [self._key(clip, preparation) for clip in clips]
        stored = self._stored()
        state.wait_for_everyone()  # before a process adds a part, so that all see the same clips missing
        missing = {key: clip for key, clip in zip(keys, clips, strict=True) if key not in stored}
        mine = list(missing.items())[state.process_index :: state.num_processes]
        hidden = not missing or not state.is_main_process
        with tqdm(total=len(mine), desc=description, unit="clip", disable=hidden) as progress:
            part: list[tuple[str, dict[str, np.ndarray]]] = []
            for batch in self._batches(self._prepared(mine, preparation)):
                features = self.extractor(np.stack([frames for _, frames in batch]))
                if part and part[0][1]["features"].shape != features["features"].shape[1:]:  # another number of frames
                    self._save(part)
                    part = []
                for i, (key, _) in enumerate(batch):
                    part.append((key, {name: of_batch[i] for name, of_batch in features.items()}))
                progress.update(len(batch))
                if len(part) >= CLIPS_PER_PART:
                    self._save(part)
                    part = []
            if part:
                self._save(part)
        state.wait_for_everyone()
        return self._gather(keys)

    def _prepared(
        self, clips: Sequence[tuple[str, Clip]], preparation: Preparation
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Key and prepared frames of each clip."""
        return read_ahead(lambda item: (item[0], preparation(item[1].read(), item[1].key)), clips, READ_AHEAD)

    def _batches(self, clips: Iterator[tuple[str, np.ndarray]]) -> Iterator[list[tuple[str, np.ndarray]]]:
        """Neighbours of one shape, as many as the network sees at once; features do not depend on it."""
        size = 1 if self.extractor.per_frame else self.extractor.units_per_forward
        for _, same in groupby(clips, key=lambda clip: clip[1].shape):
            while batch := list(islice(same, size)):
                yield batch

    def _key(self, clip: Clip, preparation: Preparation) -> str:
        return hashlib.sha256(f"{clip.key}\n{preparation}".encode()).hexdigest()[:32]

    def _stored(self) -> dict[str, tuple[Path, int]]:
        """Key -> part and row."""
        stored = {}
        for path in self.folder.glob("part-*.safetensors"):
            try:
                with safe_open(path, framework="numpy") as part:
                    keys = json.loads(part.metadata()["keys"])
                    complete = all(len(part.get_slice(name).get_shape()) == 3 for name in self.extractor.outputs)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s: cannot be read and is not used (%s)", path, error)
                continue
            if complete:
                stored.update({key: (path, row) for row, key in enumerate(keys)})
        return stored

    def _save(self, part: list[tuple[str, dict[str, np.ndarray]]]) -> None:
        """Writes the features of a few clips, `(R, width)` each; all have the same R."""
        keys = [key for key, _ in part]
        features = {name: np.stack([of_clip[name] for _, of_clip in part]) for name in self.extractor.outputs}
        mark = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:24]
        with written_atomically(self.folder / f"part-{mark}.safetensors") as temporary:
            save_file(features, temporary, metadata={"keys": json.dumps(keys), "network": self.extractor.key})
        self.num_computed += len(part)

    def _gather(self, keys: list[str]) -> dict[str, np.ndarray]:
        stored = self._stored()
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            path, row = stored[key]
            wanted.setdefault(path, []).append((position, row))
        gathered: dict[str, np.ndarray] = {}
        for path, places in wanted.items():
            with safe_open(path, framework="numpy") as part:
                for name in self.extractor.outputs:
                    features = part.get_tensor(name)
                    if name not in gathered:
                        gathered[name] = np.empty((len(keys), *features.shape[1:]), np.float32)
                    if features.shape[1:] != gathered[name].shape[1:]:
                        raise ValueError("clips of different numbers of frames cannot be compared")
                    for position, row in places:
                        gathered[name][position] = features[row]
        return gathered
