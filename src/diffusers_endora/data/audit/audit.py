"""The audit of a corpus, from its videos to a folder with the report."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from ...files import written_atomically
from ..video_io import VideoError, VideoSource, forget_videos, source_name
from .examination import Examination, evenly, examine
from .listing import ListedVideo, Listing, open_videos, printable
from .near_duplicates import Overlap, find_overlaps

MOSTLY = 0.9  # of a video's frames black, or not changing: the video is called black, or frozen
ROWS_ON_CONTACT_SHEET = 16
FRAMES_ON_CONTACT_SHEET = 8
PICTURES_OF_TEXT = 16
_FORGET_EVERY = 64  # videos


@dataclass
class Audit:
    """What was found. Videos are numbered by their place in `videos`.

    Attributes:
        listing: the corpus.
        seconds_between: see `examine`.
        videos: those that can be read, in the order of the listing.
        examinations: of each of them.
        unreadable: (name, reason) of the others, and of what could not be listed.
        identical: groups of numbers with the same size, number of frames and pixels in all frames looked at. Black
            videos are not compared.
        overlaps: pairs with the same footage otherwise. Of identical videos the first stands for all.
    """

    listing: Listing
    seconds_between: float
    videos: list[ListedVideo] = field(default_factory=list)
    examinations: list[Examination] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    identical: list[list[int]] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)

    def split(self, number: int) -> str:
        """The split of a video."""
        return self.videos[number].split

    def is_across(self, *numbers: int) -> bool:
        """Whether videos are in different splits."""
        return len({self.split(number) for number in numbers}) > 1

    @property
    def shared_ids(self) -> dict[str, list[str]]:
        """Ids that rows of several splits state, with these splits."""
        splits: dict[str, set[str]] = {}
        for video in self.videos:
            if video.video_id is not None:
                splits.setdefault(video.video_id, set()).add(video.split)
        return {video_id: sorted(of_id) for video_id, of_id in splits.items() if len(of_id) > 1}

    @property
    def num_leaks(self) -> int:
        """Groups, pairs and ids that are in more than one split."""
        across = [group for group in self.identical if self.is_across(*group)]
        pairs = [overlap for overlap in self.overlaps if self.is_across(overlap.first, overlap.second)]
        return len(across) + len(pairs) + len(self.shared_ids)

    def is_black(self, number: int) -> bool:
        """Whether nearly all frames are."""
        return self.examinations[number].black_share >= MOSTLY

    def is_frozen(self, number: int) -> bool:
        """Whether it shows something, and nearly no frame differs from the one before."""
        share = self.examinations[number].frozen_share
        return share is not None and share >= MOSTLY and not self.is_black(number)


def audit_corpus(
    listing: Listing, output: Path, seconds_between: float = 1.0, num_proc: int | None = None
) -> tuple[Audit, dict]:
    """Looks at every video of a corpus, compares them, and writes the folder `output`, which appears complete.

    Returns:
        The audit, and the content of `audit.json`.

    Raises:
        ValueError: `output` holds something, or no video can be read.
        OSError: `output` cannot be written.
    """
    from .report import write_report

    check_output(output, listing)
    audit = Audit(listing, seconds_between, unreadable=list(listing.unreadable))
    examine_all(audit, num_proc)
    if not audit.videos:
        first = f", such as {': '.join(audit.unreadable[0])}" if audit.unreadable else ""
        raise ValueError(f"{listing.source}: none of its {len(audit.unreadable)} videos can be read{first}.")
    compare(audit, num_proc)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(output) as temporary:
        temporary.mkdir()
        facts = write_report(audit, temporary)
    return audit, facts


def check_output(output: Path, listing: Listing) -> None:
    """Looks, before the work, whether there can be a report.

    Raises:
        ValueError: `output` is a file or holds something, or lies in the corpus, of which it would become a part.
        PermissionError: it cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file; expected a name for the report's folder.")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output {output}: is not empty; choose another folder, or remove it.")
    if listing.folder.resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"--output {output}: lies in the corpus; choose a place outside {listing.folder}.")
    existing = next(path for path in output.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(f"--output {output}: cannot be made in {existing}.")


def examine_all(audit: Audit, num_proc: int | None) -> None:
    """Looks at the videos, as many at a time as there are cores; what is kept of each does not grow with its length.

    Threads suffice: decoding and the arithmetic of arrays release Python's lock.
    """
    videos = audit.listing.videos
    num_threads = num_proc or len(os.sched_getaffinity(0))
    on_sheet = set(evenly(len(videos), ROWS_ON_CONTACT_SHEET)) if videos else set()
    waiting: deque[tuple[ListedVideo, Future[Examination]]] = deque()
    num_pictures = 0

    def look(video: ListedVideo, source: VideoSource | VideoError, on_sheet: bool) -> Examination:
        if isinstance(source, VideoError):
            raise source
        try:
            num_thumbnails = FRAMES_ON_CONTACT_SHEET if on_sheet else 0
            return examine(source, video.image_fps, audit.seconds_between, num_thumbnails)
        except (ValueError, OSError, MemoryError) as error:  # whatever is wrong with it, the others are looked at
            reason = " ".join(str(error).split()).removeprefix(f"{source_name(source)}: ")
            raise VideoError(reason) from error

    def take_first() -> None:
        nonlocal num_pictures
        video, future = waiting.popleft()
        try:
            examination = future.result()
        except VideoError as error:
            audit.unreadable.append((video.name, printable(str(error))))
        else:
            num_pictures += examination.picture is not None
            if num_pictures > PICTURES_OF_TEXT:
                examination.picture = None
            audit.videos.append(video)
            audit.examinations.append(examination)
        progress.update()
        if progress.n % _FORGET_EVERY == 0:
            forget_videos()  # the times of their frames, which add up

    with (
        tqdm(total=len(videos), desc="looking", unit="video") as progress,
        ThreadPoolExecutor(num_threads) as pool,
    ):
        try:
            for number, (video, source) in enumerate(open_videos(videos)):
                waiting.append((video, pool.submit(look, video, source, number in on_sheet)))
                if len(waiting) > 2 * num_threads:  # of shards, so many videos are in memory
                    take_first()
            while waiting:
                take_first()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def compare(audit: Audit, num_proc: int | None) -> None:
    """Finds identical videos, then, of one of each kind, those that share footage."""
    by_digest: dict[str, list[int]] = {}
    for number, examination in enumerate(audit.examinations):
        if not audit.is_black(number):
            by_digest.setdefault(examination.digest, []).append(number)
    audit.identical = [group for group in by_digest.values() if len(group) > 1]
    chosen = [group[0] for group in by_digest.values()]
    # rows of one id in one split are parts of one video, which may look alike
    groups = [
        (audit.split(number), video.video_id) if (video := audit.videos[number]).video_id is not None else number
        for number in chosen
    ]
    found = find_overlaps([audit.examinations[number].hashes for number in chosen], groups, num_proc)
    audit.overlaps = [
        Overlap(chosen[o.first], chosen[o.second], o.partners, o.hashes, o.span_first, o.span_second, o.is_mirrored)
        for o in found
    ]
