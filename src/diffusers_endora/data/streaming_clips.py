"""Clips from a stream of rows: corpora that are read shard by shard, from disk or from the Hub, and never kept."""

import copy
import logging
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .clip_rows import choose_columns, fetched, label_of, open_source, stated_num_frames, undecoded, video_of
from .clips import ClipSampler, resize_and_crop_image
from .video_io import VideoError, VideoSource, read_frames, read_video_info

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 2**28  # a block is closed at this size, so that memory does not depend on the rows
_MAX_WORKERS = 1024  # that are counted apart
_MAX_DRAWS = 8  # of a row that takes the place of others: parts of it may be damaged, too
_BROKEN, _TOO_SHORT, _UNLABELLED, _LEFT_OVER = range(4)  # what is counted


class StreamingClipDataset(ClipSampler, IterableDataset[dict[str, torch.Tensor]]):
    """`ClipDataset` for a `datasets.IterableDataset`; items have no `frame_ids`. Made by `ClipDataset(stream)`.

    **Order.** Rows are read in blocks of `shuffle_buffer` rows, or of 256 MiB, and leave a block in random order; from
    the second epoch on, `datasets` shuffles the shards, too. Each row gives `clips_per_video` clips. Still images are
    random frames of the block. With `fixed_offsets` rows keep their order.

    **Data workers** share the shards, so there should be as many shards as workers (`IterableDataset.reshard` makes
    more).

    **Processes.** After `split_among_processes` each process takes every `num_processes`-th row: other rows in each,
    and equally many items, whatever turns out to be broken. Rows left over at the end of a worker's shards are
    dropped, and counted. With `fixed_offsets`, where each clip matters, processes take turns clip by clip: none is
    dropped or given twice, so one process may have a clip more than another (of each worker). Every process reads all
    bytes and decodes its own part. Such a loader is not passed to `Accelerator.prepare`, which would share it out once
    more; that is an error. (Without `split_among_processes`, `prepare` lets the main process read and decode for all.)

    **Resuming.** `state_dict` says where the iteration is, at any moment, and after `load_state_dict` it goes on with
    the very next item, given the same seed, options, shards and numbers of workers and processes. `StatefulDataLoader`
    calls both in its workers. A stream on which `shuffle` was called, whose buffer `datasets` does not keep, or whose
    generator's arguments have no copy is read again from its beginning.

    **Broken rows.** Another row of the block takes the place of one that cannot be read or is too short, with another
    clip of its own; where a block has none, the first usable row of the stream, or of a data worker's shards; where
    these have none, it is an error with several processes, as they would no longer have equally many items. Each is
    logged, and counted once an epoch in `num_broken` or `num_too_short`. With `fixed_offsets` nothing takes their
    place, and damage that shows when frames are decoded is an error.

    Args:
        source, split, num_frames, resolution, frame_interval, window, num_still_images, horizontal_flip, antialias,
            class_labels, video_column, label_column, fixed_offsets, seed: see `ClipDataset`.
        clips_per_video: clips that a row gives in an epoch.
        shuffle_buffer: rows in a block.

    Attributes:
        class_names: names of the labels, where the stream's features state them, else None.

    Raises:
        ValueError: an argument is not as described; while iterating, there is no usable row (see above).
    """

    def __init__(
        self,
        source: Any,
        num_frames: int = 16,
        resolution: int | tuple[int, int] = 128,
        *,
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
        self._has_copy = _has_copy(self._stream)
        self._keeps_place = self._has_copy and not _shuffles(getattr(stream, "_ex_iterable", None))
        self._process_index, self._num_processes = 0, 1
        self._position: dict[str, Any] | None = None  # where the running iteration is
        self._resume_at: dict[str, Any] | None = None
        # A place for each data worker, in shared memory, so that the training process sees the sums
        self._counts = torch.zeros(4, _MAX_WORKERS, dtype=torch.int64).share_memory_()

    # --- what the user calls -----------------------------------------------------------------------------------------

    def split_among_processes(self, num_processes: int, process_index: int) -> "StreamingClipDataset":
        """Leaves to this process its own rows; returns itself.

        Raises:
            ValueError: the index is not in `[0, num_processes)`, or the stream is shared out already.
        """
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index}: expected 0 to {num_processes - 1}")
        if num_processes > 1 and getattr(self._stream, "_distributed", None) is not None:
            raise ValueError("split_among_processes: split_dataset_by_node has shared out the stream already")
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
        return copy.deepcopy(self._resume_at or self._position or self._start())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next iteration go on where `state_dict` was taken.

        Raises:
            ValueError: it is no such state, or one of another set-up, in which the next item is another.
        """
        start = self._start()
        if not isinstance(state_dict, dict) or state_dict.keys() != start.keys():
            raise ValueError(f"state_dict: expected a dict of {', '.join(start)}, as state_dict() gives")
        self._check_set_up(state_dict["set_up"], self._set_up())
        self._resume_at = copy.deepcopy(state_dict)
        self.set_epoch(state_dict["epoch"])

    def set_epoch(self, epoch: int) -> None:
        """As `ClipDataset.set_epoch`; a state of another epoch, loaded before, is forgotten."""
        super().set_epoch(epoch)
        self._position = None
        if self._resume_at is not None and self._resume_at["epoch"] != epoch:
            self._resume_at = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._check_shared_out_once()
        position = self._resume_at or self._start()
        self._resume_at = None
        # What a data worker is given must be a data worker's
        self._check_set_up(position["set_up"] | {"worker": position["worker"]}, self._set_up() | {"worker": _worker()})
        epoch, number, first, turn = (position[name] for name in ("epoch", "block", "item", "turn"))
        has_item = number > 0 or first > 0
        self._stand_in: _Row | None = None
        self._has_stand_in: bool | None = None  # None: not looked for
        stream = self._fresh_stream(epoch)
        skipped = 0
        if position["stream"] is not None:
            stream.load_state_dict(position["stream"])
        else:
            skipped = position["rows"]
        self._num_read = position["rows"]
        rows = self._eligible(islice(stream, skipped, None))
        while block := self._next_block(rows):
            places = self._places(block, epoch, number, turn)
            if first > len(places):
                raise ValueError(f"state_dict: says item {first} of a block that has {len(places)}; the rows differ")
            for index, place in enumerate(places[first:], start=first + 1):
                item = self._item(block, place, epoch, (number, index))
                if item is None:
                    logger.warning("a block of %d rows has no usable row, and gives no clips", len(block))
                    break
                self._position = position | {"item": index}
                has_item = True
                yield item
            if self.fixed_offsets:
                turn = (turn + self._num_clips(block)) % self._num_processes
            number, first = number + 1, 0
            where = {"stream": copy.deepcopy(stream.state_dict()) if self._keeps_place else None}
            position = position | {"block": number, "item": 0, "turn": turn, "rows": self._num_read} | where
        self._position = position  # asked again, a data worker that has ended says so
        if not has_item and get_worker_info() is None:  # a data worker may be without shards
            raise self._no_usable_row()

    # --- where the iteration is --------------------------------------------------------------------------------------

    def _start(self) -> dict[str, Any]:
        """The state at the beginning of the epoch.

        `item` of `block` is the next; `stream` is the state of the stream at the beginning of the block, up to which
        `rows` were read; `turn` is the process whose turn the block's first clip is, with `fixed_offsets`.
        """
        where = {"epoch": int(self._epoch), "block": 0, "item": 0, "turn": 0, "rows": 0, "stream": None}
        return {"set_up": self._set_up(), "worker": _worker(), **where}

    def _set_up(self) -> dict[str, Any]:
        """What else decides which item is the next."""
        names = ["seed", "shuffle_buffer", "clips_per_video", "fixed_offsets"]
        names += ["num_frames", "window", "frame_interval"]
        of_stream = {"num_shards": getattr(self._stream, "num_shards", None), "label_column": self._columns.label}
        return {name: getattr(self, name) for name in names} | {"num_processes": self._num_processes} | of_stream

    @staticmethod
    def _check_set_up(was: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in now.items():
            if was.get(name) != value:
                raise ValueError(f"state_dict: was taken with {name} {was.get(name)}, and it is {value} now")

    def __getstate__(self) -> dict[str, Any]:
        self._check_shared_out_once()  # on the way to a spawned data worker, which cannot see it
        return self.__dict__

    def _check_shared_out_once(self) -> None:
        accelerate_state = sys.modules.get("accelerate.state")
        if self._num_processes == 1 or accelerate_state is None:
            return
        active = getattr(accelerate_state.GradientState().active_dataloader, "dataset", None)
        if self in (active, getattr(active, "dataset", None)):
            raise ValueError(
                "split_among_processes has shared out the rows, and Accelerator.prepare does it once more; use one of "
                "the two"
            )

    def _fresh_stream(self, epoch: int) -> Any:
        """A copy at its beginning, as a stream remembers for good where it was told to start."""
        stream = copy.deepcopy(self._stream) if self._has_copy else copy.copy(self._stream)
        stream.set_epoch(0 if self.fixed_offsets else epoch)  # datasets shuffles the shards by the epoch
        return stream

    # --- rows --------------------------------------------------------------------------------------------------------

    def _eligible(self, stream: Iterable[dict[str, Any]], is_counted: bool = True) -> Iterator["_Row"]:
        """The rows that have what is asked for, as far as they say so themselves."""
        for row in stream:
            self._num_read += is_counted
            value = row.get(self._columns.video)
            name = str((value.get("path") if isinstance(value, dict) else None) or "a row without a name")
            label = None if self._columns.label is None else label_of(row, self._columns.label, name)
            num_frames = stated_num_frames(row, self._columns)
            if self._columns.label is not None and label is None:
                self._count(_UNLABELLED, int(is_counted))
            elif num_frames is not None and num_frames < self.shortest_video:
                self._count(_TOO_SHORT, int(is_counted))
            else:
                try:
                    yield _Row(name, label, num_frames, video_of(row, self._columns.video), is_reported=not is_counted)
                except VideoError as error:
                    yield _Row(name, label, num_frames, b"", str(error), not is_counted)

    def _next_block(self, rows: Iterator["_Row"]) -> list["_Row"]:
        """The next rows of this process, with `fixed_offsets` of all; none at the end."""
        block: list[_Row] = []
        size = 0
        while len(block) < self.shuffle_buffer and size < _BLOCK_BYTES:
            num_processes = 1 if self.fixed_offsets else self._num_processes
            for_all = list(islice(rows, num_processes))
            if len(for_all) < num_processes:
                self._count(_LEFT_OVER, len(for_all))
                break
            row = for_all[0 if self.fixed_offsets else self._process_index]
            row.fetch()
            block.append(row)
            size += row.num_bytes
        return block

    def _is_usable(self, row: "_Row") -> bool:
        """Opens a row's video if that was not done; a row that is no good is counted once."""
        if row.problem is None and row.num_frames is None:
            try:
                row.num_frames = read_video_info(row.source).num_frames
            except (ValueError, OSError) as error:
                row.problem = str(error)
                self._report(row, row.problem)
                return False
            if row.num_frames < self.shortest_video:
                row.problem = f"has {row.num_frames} frames, fewer than the {self.shortest_video} of a clip"
                self._count(_TOO_SHORT, int(not row.is_reported))
                row.is_reported = True
        if row.problem is not None and not row.is_reported:
            self._report(row, row.problem)
        return row.problem is None

    def _report(self, row: "_Row", problem: Exception | str) -> None:
        """Logs and counts a row once. Damage that shows when frames are decoded leaves its intact parts in use."""
        if not row.is_reported:
            row.is_reported = True
            what = "left out" if self.fixed_offsets else "another takes its place"
            logger.warning("broken row, %s: %s: %s", what, row.name, problem)
            self._count(_BROKEN)

    def _count(self, what: int, number: int = 1) -> None:
        self._counts[what, _worker()[0] % _MAX_WORKERS] += number

    def _no_usable_row(self) -> ValueError:
        return ValueError(
            f"the stream has no usable row: {self.num_broken} could not be read, {self.num_too_short} were too "
            f"short, {self.num_unlabelled} had no label, {self.num_left_over} were too few for all processes"
        )

    # --- items -------------------------------------------------------------------------------------------------------

    def _places(self, block: list["_Row"], epoch: int, number: int, turn: int) -> list[tuple[int, int]]:
        """The items of a block for this process: which row and which of its clips."""
        if self.fixed_offsets:
            everything = [(i, clip) for i, row in enumerate(block) for clip in range(self._num_clips([row]))]
            return everything[(self._process_index - turn) % self._num_processes :: self._num_processes]
        order = np.random.default_rng((self.seed, epoch, number)).permutation(len(block) * self.clips_per_video)
        return [divmod(place, self.clips_per_video) for place in order.tolist()]

    def _num_clips(self, block: list["_Row"]) -> int:
        """How many clips the rows give with `fixed_offsets`."""
        return sum(self.num_fixed_clips(row.num_frames) for row in block if self._is_usable(row))

    def _item(
        self, block: list["_Row"], place: tuple[int, int], epoch: int, at: tuple[int, int]
    ) -> dict[str, torch.Tensor] | None:
        """The item of a place, None where nothing can be read; `at` makes its random numbers its own."""
        i, clip = place
        own = block[i]
        if self.fixed_offsets:
            frames = read_frames(own.source, self.fixed_frames(own.num_frames, clip))
            return self._with_still_images(self.resized(frames), own, block, (self.seed, 0, own.key, clip))
        entropy = (self.seed, epoch, *at, own.key)
        for attempt, row in enumerate(self._candidates(block, i, epoch, entropy)):
            pixels = self._random_clip(row, np.random.default_rng((*entropy, 0, attempt)))
            if pixels is not None:
                return self._with_still_images(pixels, row, block, entropy)
        if self._num_processes > 1:  # the other processes would wait for this one forever
            raise self._no_usable_row()
        return None

    def _candidates(self, block: list["_Row"], i: int, epoch: int, entropy: tuple[int, ...]) -> Iterator["_Row"]:
        """A row of a block, the others in random order, and the first usable one of the stream."""
        yield block[i]
        others = np.random.default_rng((*entropy, 0)).permutation(len(block))
        yield from (block[j] for j in others.tolist() if j != i)
        if self._has_stand_in is None:
            self._stand_in = next(filter(self._is_usable, self._beginning(epoch)), None)
            self._has_stand_in = self._stand_in is not None
        if self._stand_in is not None:
            yield from [self._stand_in] * _MAX_DRAWS

    def _random_clip(self, row: "_Row", rng: np.random.Generator) -> torch.Tensor | None:
        """Pixels of a clip of a row; None, reported, where they cannot be read."""
        if not self._is_usable(row):
            return None
        indices, is_flipped = self.draw_frames(row.num_frames, rng)
        try:
            frames = read_frames(row.source, indices)
        except (ValueError, OSError) as error:
            self._report(row, error)
            return None
        return self.resized(frames[:, :, ::-1] if is_flipped else frames)

    def _beginning(self, epoch: int) -> Iterator["_Row"]:
        """The stream's rows once more, not counted."""
        for row in self._eligible(self._fresh_stream(epoch), is_counted=False):
            row.fetch()
            yield row

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

    def fetch(self) -> None:
        """Reads a source that is a URL."""
        try:
            self.source = fetched(self.source)
        except VideoError as error:
            self.problem = str(error)

    @cached_property
    def key(self) -> int:
        """Identifies the video: by its bytes, or by its path."""
        return zlib.crc32(self.source if isinstance(self.source, bytes) else os.fsencode(self.source))


def _worker() -> list[int]:
    """Number of this data worker and of all of them."""
    worker = get_worker_info()
    return [0, 0] if worker is None else [worker.id, worker.num_workers]


def _has_copy(stream: Any) -> bool:
    """Whether a stream can be copied with all that it reads, which a lock among a generator's arguments cannot."""
    try:
        copy.deepcopy(stream)
    except TypeError:
        return False
    return True


def _shuffles(examples: Any) -> bool:
    """Whether an iterable of `datasets`, or one that it reads, has a shuffle buffer, which its state does not keep."""
    if type(examples).__name__ == "BufferShuffledExamplesIterable":
        return True
    below = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return any(_shuffles(of_below) for of_below in below if of_below is not None)
