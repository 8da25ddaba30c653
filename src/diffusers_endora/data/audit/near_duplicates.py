"""Which videos show the same footage: pairs with frames whose hashes are alike.

The first 64 bits of every hash are compared with those of every hash of the other videos, which takes about a
nanosecond a pair and needs no index; pairs within `FIND` are confirmed with all 256 bits. Hashes of endoscopic
pictures are too much alike for an index by parts to leave much out.

Measured by `benchmarks/audit_detection.py`: of 94,830 pairs of different scenes none is within the thresholds (the
nearest differ in 81 bits); copies encoded anew, resized, brightened or darkened are found all, cropped by 5 % nearly
all, by 10 % about half.
"""

import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from .frame_hash import MIRROR

FIND = 10  # of 64 bits
CONFIRM = 64  # of 256 bits
FRAMES = 2  # of each of two videos that must have a partner in the other; one, where it has only one

_QUERIES, _OTHERS = 64, 4096  # hashes compared at a time: what a core's cache holds


@dataclass(frozen=True)
class Overlap:
    """Two videos that share footage.

    Attributes:
        first, second: numbers of the videos, `first < second`.
        partners: how many different hashes of each have a partner in the other.
        hashes: how many different hashes each has.
        span_first, span_second: positions, among the hashes of each, of the first and the last that has a partner.
        is_mirrored: the one is the other seen in a mirror.
    """

    first: int
    second: int
    partners: tuple[int, int]
    hashes: tuple[int, int]
    span_first: tuple[int, int]
    span_second: tuple[int, int]
    is_mirrored: bool

    @property
    def shares(self) -> tuple[float, float]:
        """Of the hashes of each, those with a partner."""
        return self.partners[0] / self.hashes[0], self.partners[1] / self.hashes[1]


def find_overlaps(
    hashes: Sequence[np.ndarray], groups: Sequence[Hashable], num_threads: int | None = None
) -> list[Overlap]:
    """All pairs of videos of different groups that share footage, in the order of the videos.

    Args:
        hashes: of each video uint64 `(n, 4)`, see `hash_frame`; n may be 0.
        groups: a name for each video; those of one name are not compared.
        num_threads: None: one per core.
    """
    # A still scene has one hash many times: it counts, and is compared, once.
    distinct, positions = [], []
    for each in hashes:
        _, first = np.unique(each, axis=0, return_index=True)
        positions.append(np.sort(first))
        distinct.append(each[positions[-1]])
    counts = np.array([len(each) for each in distinct], np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    everything = np.concatenate([np.zeros((0, MIRROR.size), np.uint64), *distinct])
    owners = np.repeat(np.arange(len(distinct)), counts)
    names: dict[Hashable, int] = {}
    group = np.array([names.setdefault(name, len(names)) for name in groups], np.int64)
    quick = np.ascontiguousarray(everything[:, 0])

    def overlaps_of(video: int) -> list[Overlap]:
        best: dict[int, Overlap] = {}
        for is_mirrored in (False, True):
            queries = distinct[video] ^ MIRROR if is_mirrored else distinct[video]
            own, other = _alike(queries, everything, quick, int(starts[video + 1]))
            different = group[owners[other]] != group[video]
            own, other = own[different], other[different]
            for second in np.unique(owners[other]).tolist():
                of_second = owners[other] == second
                partners = np.unique(own[of_second]), np.unique(other[of_second]) - starts[second]
                needed = min(FRAMES, int(counts[video]), int(counts[second]))
                if min(map(len, partners)) < needed:
                    continue
                spans = [positions[v][p[[0, -1]]].tolist() for v, p in zip((video, second), partners, strict=True)]
                overlap = Overlap(
                    first=video,
                    second=second,
                    partners=(len(partners[0]), len(partners[1])),
                    hashes=(int(counts[video]), int(counts[second])),
                    span_first=tuple(spans[0]),
                    span_second=tuple(spans[1]),
                    is_mirrored=is_mirrored,
                )
                if second not in best or sum(best[second].partners) < sum(overlap.partners):
                    best[second] = overlap
        return [best[second] for second in sorted(best)]

    with ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0))) as pool:
        try:
            found = pool.map(overlaps_of, range(len(distinct)))
            progress = tqdm(found, total=len(distinct), desc="comparing", unit="video")
            return [overlap for overlaps in progress for overlap in overlaps]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _alike(
    queries: np.ndarray, everything: np.ndarray, quick: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in `queries` and in `everything`, from `start` on, of hashes that are alike."""
    differing = np.empty((_QUERIES, _OTHERS), np.uint64)  # into the same memory each time: new memory costs more
    distances = np.empty((_QUERIES, _OTHERS), np.uint8)
    own, other = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for i in range(0, len(queries), _QUERIES):
        some = queries[i : i + _QUERIES]
        for j in range(start, len(quick), _OTHERS):
            others = quick[j : j + _OTHERS]
            part = np.s_[: len(some), : len(others)]
            np.bitwise_xor(some[:, :1], others[None], out=differing[part])
            np.bitwise_count(differing[part], out=distances[part])
            near = np.flatnonzero(distances[part] <= FIND)  # twelve times as fast as nonzero in two dimensions
            if len(near):
                rows, columns = np.divmod(near, len(others))
                bits = np.bitwise_count(some[rows] ^ everything[columns + j]).sum(axis=1)
                rows, columns = rows[bits <= CONFIRM], columns[bits <= CONFIRM]
                own.append(rows + i)
                other.append(columns + j)
    return np.concatenate(own), np.concatenate(other)
