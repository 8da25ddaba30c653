"""Clips from a stream of rows: corpora that are read shard by shard, from disk or from the Hub, and never kept."""

import copy
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .clip_rows import choose_columns, label_of, open_source, stated_num_frames, undecoded, video_of
from .clips import ClipSampler, resize_and_crop_image
from .video_io import VideoError, VideoSource, read_frames, read_video_info

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 2**28  # a block is closed at this size, so that memory does not depend on the rows
_MAX_WORKERS = 1024  # that are counted apart
_BROKEN, _TOO_SHORT, _UNLABELLED, _LEFT_OVER = range(4)  # what is counted


class StreamingClipDataset(ClipSampler, IterableDataset[dict[str, torch.Tensor]]):
    """`ClipDataset` for a `datasets.IterableDataset`; items have no `frame_ids`. Made by `ClipDataset(stream)`.

    **Order.** Rows are read in blocks of `shuffle_buffer` rows, or of 256 MiB, and leave a block in random order; from
    the second epoch on, `datasets` shuffles the shards, too. Each row gives `clips_per_video` clips. Still images are
    random frames of the block. With `fixed_offsets` rows keep their order.

    **Data workers** share the shards, so there should be as many shards as workers (`IterableDataset.reshard` makes
    more). Which frames make a clip depends on the seed, the epoch and the video alone, not on workers or processes.

    **Processes.** After `split_among_processes` each process takes every `num_processes`-th row: other rows in each,
    equally many in all; rows left over at the end of a worker's shards are dropped, and counted. Every process reads
    all bytes and decodes its own part. Such a loader is not passed to `Accelerator.prepare`, which would share it out
    once more. (Without `split_among_processes`, `prepare` lets the main process read and decode for all.) With
    `fixed_offsets` processes have equally many videos, but short or broken ones give fewer clips.

    **Resuming.** `state_dict` says where the iteration is, at any moment, and after `load_state_dict` it goes on with
    the very next item, given the same number of workers. `StatefulDataLoader` calls both in its workers. (Do not call
    `shuffle` on the stream itself: `datasets` does not keep the content of its own buffer.)

    **Broken rows.** Another row of the block takes the place of one that cannot be read or is too short; each is
    logged, and counted once an epoch in `num_broken` or `num_too_short`.

    Args:
        source, split, num_frames, resolution, frame_interval, window, num_still_images, horizontal_flip, antialias,
            class_labels, video_column, label_column, fixed_offsets, seed: see `ClipDataset`.
        clips_per_video: clips that a row gives in an epoch.
        shuffle_buffer: rows in a block.

    Attributes:
        class_names: names of the labels, where the stream's features state them, else None.

    Raises:
        ValueError: an argument is not as described; while iterating, there is no usable row at all.
    """

    def __init__(
        self,
        source: Any,
        num_frames: int = 16,
        resolution: int | tuple[int, int] = 128,
        frame_interval: int | None = None,
        window: int = 48,
        num_still_images: int = 0,
        horizontal_flip: bool = True,
        antialias: bool = False,
        class_labels: bool = False,
        video_column: str | None = None,
        label_column: str | None = None,
        fixed_offsets: bool = False,
        clips_per_video: int = 1,
        shuffle_buffer: int = 100,
        seed: int = 0,
        split: str | None = None,
    ) -> None:
        super().__init__(
            num_frames,
            resolution,
            frame_interval,
            window,
            num_still_images,
            horizontal_flip,
            antialias,
            fixed_offsets,
            clips_per_video,
            seed,
        )
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer}: expected a positive integer")
        self.shuffle_buffer = shuffle_buffer
        stream = open_source(source, split, streaming=True)
        self._columns = choose_columns(stream.features, class_labels, video_column, label_column)
        self.class_names = self._columns.class_names
        self._stream = undecoded(stream, self._columns) if stream.features else stream
        self._process_index, self._num_processes = 0, 1
        self._position: dict[str, Any] | None = None  # where the running iteration is
        self._resume_at: dict[str, Any] | None = None
        # A place for each data worker, in shared memory, so that the training process sees the sums
        self._counts = torch.zeros(4, _MAX_WORKERS, dtype=torch.int64).share_memory_()

    # --- what the user calls -----------------------------------------------------------------------------------------

    def split_among_processes(self, num_processes: int, process_index: int) -> "StreamingClipDataset":
        """Leaves to this process its own rows; returns itself.

        Raises:
            ValueError: the index is not in `[0, num_processes)`.
        """
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index}: expected 0 to {num_processes - 1}")
        self._process_index, self._num_processes = process_index, num_processes
        return self

    @property
    def num_broken(self) -> int:
        """Rows so far that could not be read."""
        return int(self._counts[_BROKEN].sum())

    @property
    def num_too_short(self) -> int:
        """Rows so far whose video is shorter than a clip."""
        return int(self._counts[_TOO_SHORT].sum())

    @property
    def num_unlabelled(self) -> int:
        """Rows so far that were left out because they have no label."""
        return int(self._counts[_UNLABELLED].sum())

    @property
    def num_left_over(self) -> int:
        """Rows so far that were dropped because they could not be shared evenly among the processes."""
        return int(self._counts[_LEFT_OVER].sum())

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is, in what json can say."""
        position = self._resume_at or self._position or _start_of(int(self._epoch))
        return copy.deepcopy(position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next iteration go on where `state_dict` was taken."""
        self._resume_at = copy.deepcopy(state_dict)
        self.set_epoch(state_dict["epoch"])

    def set_epoch(self, epoch: int) -> None:
        """As `ClipDataset.set_epoch`; a state of another epoch, loaded before, is forgotten."""
        super().set_epoch(epoch)
        self._position = None
        if self._resume_at is not None and self._resume_at["epoch"] != epoch:
            self._resume_at = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        position = self._resume_at or _start_of(int(self._epoch))
        self._resume_at = None
        epoch, number, first, start = (position[name] for name in ("epoch", "block", "item", "stream"))
        stream = copy.deepcopy(self._stream)  # as a stream remembers for good where it was told to start
        stream.set_epoch(0 if self.fixed_offsets else epoch)  # datasets shuffles the shards by the epoch
        if start is not None:
            stream.load_state_dict(start)
        rows = self._eligible(stream)
        has_item = number > 0 or first > 0
        while block := self._next_block(rows):
            for index, item in enumerate(self._items(block, epoch, number, first), start=first + 1):
                self._position = {"epoch": epoch, "block": number, "item": index, "stream": start}
                has_item = True
                yield item
            number, first, start = number + 1, 0, copy.deepcopy(stream.state_dict())
        # Asked again, a data worker that has ended says so
        self._position = {"epoch": epoch, "block": number, "item": 0, "stream": start}
        if not has_item and get_worker_info() is None:  # a data worker may be without shards
            raise ValueError(
                f"the stream has no usable row: {self.num_broken} could not be read, {self.num_too_short} were too "
                f"short, {self.num_unlabelled} had no label, {self.num_left_over} were too few for all processes"
            )

    # --- rows --------------------------------------------------------------------------------------------------------

    def _eligible(self, stream: Any) -> Iterator["_Row"]:
        """The rows that have what is asked for, as far as they say so themselves."""
        for row in stream:
            value = row.get(self._columns.video)
            name = str((value.get("path") if isinstance(value, dict) else None) or "a row without a name")
            label = None if self._columns.label is None else label_of(row, self._columns.label, name)
            num_frames = stated_num_frames(row, self._columns)
            if self._columns.label is not None and label is None:
                self._count(_UNLABELLED)
            elif num_frames is not None and num_frames < self.shortest_video:
                self._count(_TOO_SHORT)
            else:
                try:
                    yield _Row(name, label, num_frames, video_of(row, self._columns.video))
                except VideoError as error:
                    yield _Row(name, label, num_frames, b"", str(error))

    def _next_block(self, rows: Iterator["_Row"]) -> list["_Row"]:
        """The next rows of this process; none at the end."""
        block: list[_Row] = []
        size = 0
        while len(block) < self.shuffle_buffer and size < _BLOCK_BYTES:
            for_all = list(islice(rows, self._num_processes))
            if len(for_all) < self._num_processes:
                self._count(_LEFT_OVER, len(for_all))
                break
            block.append(for_all[self._process_index])
            size += block[-1].num_bytes
        return block

    def _is_usable(self, row: "_Row") -> bool:
        """Opens a row's video if that was not done; a row that is no good is counted once."""
        if row.problem is None and row.num_frames is None:
            try:
                row.num_frames = read_video_info(row.source).num_frames
            except (ValueError, OSError) as error:
                self._report(row, error)
                return False
            if row.num_frames < self.shortest_video:
                row.problem = f"has {row.num_frames} frames, fewer than the {self.shortest_video} of a clip"
                row.is_reported = True
                self._count(_TOO_SHORT)
        if row.problem is not None and not row.is_reported:
            self._report(row, row.problem)
        return row.problem is None

    def _report(self, row: "_Row", problem: Exception | str) -> None:
        row.problem, row.is_reported = str(problem), True
        logger.warning("broken row, another takes its place: %s: %s", row.name, problem)
        self._count(_BROKEN)

    def _count(self, what: int, number: int = 1) -> None:
        worker = get_worker_info()
        self._counts[what, 0 if worker is None else worker.id % _MAX_WORKERS] += number

    # --- items -------------------------------------------------------------------------------------------------------

    def _items(self, block: list["_Row"], epoch: int, number: int, first: int) -> Iterator[dict[str, torch.Tensor]]:
        """The items of a block from item `first` on."""
        if self.fixed_offsets:
            yield from islice(self._fixed_items(block, epoch), first, None)
            return
        order = np.random.default_rng((self.seed, epoch, number)).permutation(len(block) * self.clips_per_video)
        for place in order[first:].tolist():
            i, clip = divmod(place, self.clips_per_video)
            for row in (block[i], *(block[j] for j in order // self.clips_per_video if j != i)):
                if not self._is_usable(row):
                    continue
                rng = np.random.default_rng((self.seed, epoch, row.key, clip))
                indices, is_flipped = self.draw_frames(row.num_frames, rng)
                try:
                    frames = read_frames(row.source, indices)
                except (ValueError, OSError) as error:
                    self._report(row, error)
                    continue
                pixels = self.resized(frames[:, :, ::-1] if is_flipped else frames)
                yield self._with_still_images(pixels, row, block, (self.seed, epoch, row.key, clip))
                break
            else:
                logger.warning("a block of %d rows has no usable row, and gives no clips", len(block))
                return

    def _fixed_items(self, block: list["_Row"], epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        for row in filter(self._is_usable, block):
            for clip in range(self.num_fixed_clips(row.num_frames)):
                pixels = self.resized(read_frames(row.source, self.fixed_frames(row.num_frames, clip)))
                yield self._with_still_images(pixels, row, block, (self.seed, epoch, row.key, clip))

    def _with_still_images(
        self, pixels: torch.Tensor, row: "_Row", block: list["_Row"], entropy: tuple[int, ...]
    ) -> dict[str, torch.Tensor]:
        """The item of a clip, with still images from the block."""
        images, labels = [pixels], [row.label]
        for slot in range(self.num_still_images):
            rng = np.random.default_rng((*entropy, 1 + slot))
            image, label = pixels[:1], row.label  # where no row of the block gives an image
            for i in rng.integers(len(block), size=len(block)).tolist():
                shown = block[i]
                if not self._is_usable(shown):
                    continue
                try:
                    frame = read_frames(shown.source, rng.integers(shown.num_frames, size=1))[0]
                except (ValueError, OSError) as error:
                    self._report(shown, error)
                    continue
                image, label = resize_and_crop_image(frame, self.height, self.width)[None], shown.label
                break
            images.append(image)
            labels.append(label)
        item = {"video": torch.cat(images)}
        if self._columns.label is not None:
            item["class_labels"] = torch.tensor(labels if self.num_still_images else row.label, dtype=torch.int64)
        return item


@dataclass(eq=False)
class _Row:
    """A row of a block.

    Attributes:
        num_frames: None where the row does not say and its video has not been opened.
        problem: why it cannot be used.
    """

    name: str
    label: int | None
    num_frames: Any
    source: VideoSource
    problem: str | None = None
    is_reported: bool = False

    @property
    def num_bytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else 0

    @cached_property
    def key(self) -> int:
        """Identifies the video: by its bytes, or by its path."""
        return zlib.crc32(self.source if isinstance(self.source, bytes) else os.fsencode(self.source))


def _start_of(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "block": 0, "item": 0, "stream": None}
