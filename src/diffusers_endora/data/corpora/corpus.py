"""What the corpora have in common: from a raw folder to the rows of a `datasets` builder.

A corpus is one class. `read_folder` looks at a raw folder and says which videos it holds, where each belongs and what
is known of it; nothing is decoded. `write_rows` turns one video into rows. The builder (here) and `prepare` (beside)
are two ways to go through the videos.
"""

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
from datasets import Value, Video

from ...files import natural_order, walk_folders
from ..transcode import Quality, encode_frames
from ..video_io import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    VideoError,
    VideoInfo,
    iterate_frames,
    list_images,
    read_video_info,
)

logger = logging.getLogger(__name__)

Row = dict[str, Any]
ROWS_VERSION = 2  # raised when the same raw folder gives other rows, so that what datasets has cached is not used
MAX_VIDEO_BYTES = 100 * 2**20  # of a row: rows are held in memory whole, when written (thrice) and when read
SPLITS = ("train", "validation", "test", "unlabelled")
_KEPT_FIRST = ("test", "validation", "train", "unlabelled")  # of copies in two splits, so that what is tested on stays

_NUMBERED_VIDEO = re.compile(r"[0-9]{1,8}")
_MAX_FILES_NAMED = 10  # of a folder, that were not read; more are counted


class CorpusError(ValueError):
    """A raw folder is not what it should be: one sentence that says what was expected and what was found."""


@dataclass(frozen=True)
class SourceVideo:
    """A video of a raw folder, not opened yet.

    Attributes:
        video_id: unique within the corpus.
        path: a video file or a folder of frames.
        split: one of `SPLITS`.
        source: the path below the raw folder, with forward slashes.
        labels: values of the corpus' own columns, for the whole video.
        image_fps: frames per second of a folder of frames.
    """

    video_id: str
    path: Path
    split: str
    source: str
    labels: dict[str, Any] = field(default_factory=dict)
    image_fps: float = 25.0


@dataclass(frozen=True)
class Rejection:
    """Something of a raw folder that is left out, and why."""

    source: str
    reason: str


@dataclass
class CorpusFolder:
    """What `read_folder` found.

    Attributes:
        layout: which of the known layouts this is, in words.
        videos: in natural order of their sources.
        rejected: what is left out.
        notes: what a person should know, one sentence each.
    """

    layout: str
    videos: list[SourceVideo]
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, data_dir: Path) -> "CorpusFolder":
        """Itself, with every id once, no file in two splits, names that can be written, and at least one video.

        Raises:
            CorpusError: no video is left.
        """
        seen: dict[str, str] = {}
        kept = []
        for video in sorted(self.videos, key=lambda video: natural_order(video.source)):
            if not is_utf8(video.source):
                self.rejected.append(Rejection(video.source, "its name is not UTF-8; rename it"))
            elif video.video_id in seen:
                reason = f"the id {video.video_id} is taken by {seen[video.video_id]}"
                self.rejected.append(Rejection(video.source, reason))
            else:
                seen[video.video_id] = video.source
                kept.append(video)
        self.videos, copies = leave_out_copies(kept)
        self.rejected += copies
        self.rejected = [Rejection(printable(r.source), printable(r.reason)) for r in self.rejected]
        self.rejected.sort(key=lambda rejection: (natural_order(rejection.source), rejection.reason))
        if not self.videos:
            first = f", such as {self.rejected[0].source}: {self.rejected[0].reason}" if self.rejected else ""
            raise CorpusError(
                f"{data_dir}: no video of {self.layout} is usable ({len(self.rejected)} rejected{first})."
            )
        return self


def leave_out_copies(videos: list[SourceVideo]) -> tuple[list[SourceVideo], list[Rejection]]:
    """The videos without those whose very file is in another split, too: it stays in the first of `_KEPT_FIRST`.

    Read are only files of a size that files of two splits have. Folders of frames are not compared, and footage that
    was encoded anew is not found; `endora audit` looks at both.
    """
    by_size: dict[int, list[SourceVideo]] = {}
    for video in videos:
        try:
            status = video.path.stat()
        except OSError:  # said when it is opened
            continue
        if stat.S_ISREG(status.st_mode) and status.st_size:
            by_size.setdefault(status.st_size, []).append(video)
    rejected = {}
    for of_size in by_size.values():
        if len({video.split for video in of_size}) == 1:
            continue
        first_of: dict[str, SourceVideo] = {}
        for video in sorted(of_size, key=lambda video: _KEPT_FIRST.index(video.split)):
            try:
                with video.path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                continue
            first = first_of.setdefault(content, video)
            if first.split != video.split:
                reason = f"is the same file as {first.source}, which is in {first.split}"
                rejected[video.video_id] = Rejection(video.source, reason)
    left = [rejected[video.video_id] for video in videos if video.video_id in rejected]
    return [video for video in videos if video.video_id not in rejected], left


def check_positive_integers(**arguments: Any) -> None:
    """Raises a ValueError for an argument that is no positive integer."""
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a positive integer")


@dataclass
class CorpusConfig(datasets.BuilderConfig):
    """How rows are made from a corpus.

    Attributes:
        kind: `"videos"`: one row a video. `"clips"`: one row a window of `clip_length` frames, cut and encoded anew.
        clip_length: frames. Windows lie end to end and the last one takes the remainder, so that it has up to
            `2 * clip_length - 1`; a shorter video is one row. (The recipe of med-air/Endo-FM, with its 150 frames.)
        short_side: pixels of the shorter side, see `transcode_video`. None keeps size and, of videos, the very file.
        quality: of what is encoded, see `transcode_video`.
    """

    kind: str = "videos"
    clip_length: int = 150
    short_side: int | None = None
    quality: Quality = "visually_lossless"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("videos", "clips"):
            raise ValueError(f"kind={self.kind!r}: expected 'videos' or 'clips'")
        check_positive_integers(clip_length=self.clip_length)
        if self.short_side is not None:
            check_positive_integers(short_side=self.short_side)
        if self.quality not in ("visually_lossless", "lossless"):
            raise ValueError(f"quality={self.quality!r}: expected 'visually_lossless' or 'lossless'")

    def options(self) -> dict[str, Any]:
        """What decides the rows, without the fields that every builder has."""
        inherited = {f.name for f in fields(datasets.BuilderConfig)}
        return {name: value for name, value in asdict(self).items() if name not in inherited}


class CorpusBuilder(datasets.GeneratorBasedBuilder):
    """Base of the corpora's builders; `data_dir` is the raw folder.

    Attributes:
        CORPUS: its name on the command line, also the name of its card.
        MAY_BE_PUBLISHED: whether the owners' terms allow to publish the videos.
        TERMS: the terms, in one sentence.
    """

    CORPUS: ClassVar[str]
    MAY_BE_PUBLISHED: ClassVar[bool] = False
    TERMS: ClassVar[str]
    BUILDER_CONFIG_CLASS = CorpusConfig
    BUILDER_CONFIGS = [CorpusConfig(name="videos"), CorpusConfig(name="clips", kind="clips")]
    DEFAULT_CONFIG_NAME = "videos"

    def __init__(self, *args: Any, data_dir: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        # A raw folder that has changed is another dataset: without this, datasets would go on with its cache.
        listing = "nothing"
        if data_dir is not None:
            check_name(Path(data_dir))
            listing = hash_of_listing(Path(data_dir))
            data_dir = str(Path(data_dir).absolute())
        kwargs.setdefault("hash", f"{ROWS_VERSION}-{listing}")
        super().__init__(*args, data_dir=data_dir, **kwargs)
        replace(self.config)  # datasets sets options on a finished config; this checks them

    # --- what a corpus says ------------------------------------------------------------------------------------------

    @classmethod
    def read_folder(cls, data_dir: Path | None, config: Any) -> CorpusFolder:
        """The videos of a raw folder.

        Raises:
            CorpusError: the folder has none of the known layouts, or files that cannot be understood.
        """
        raise NotImplementedError

    @classmethod
    def label_features(cls, config: Any) -> dict[str, Any]:
        """The corpus' own columns."""
        raise NotImplementedError

    @classmethod
    def labels_of_row(cls, labels: dict[str, Any], row: Row, folder: Path) -> dict[str, Any]:
        """The labels of a row's frames in its pixels: the columns of `label_features`, in their order.

        Args:
            labels: of the whole video.
            row: one of `write_rows`.
            folder: where `write_rows` wrote.
        """
        return labels

    @classmethod
    def misfits(cls, video: SourceVideo, num_frames: int) -> list[str]:
        """What of the labels does not fit the video's number of frames, one sentence each."""
        return []

    # --- rows --------------------------------------------------------------------------------------------------------

    @classmethod
    def write_rows(cls, video: SourceVideo, folder: Path, config: CorpusConfig) -> list[Row]:
        """Writes the files of a video's rows into `folder`; they are named in `file`, None being the video's own file.

        Returns:
            Rows of `file`, `start_frame`, `num_frames`, `fps`, `height`, `width`, and of the whole source
            `source_frames`, `source_height`, `source_width`. They go into json.

        Raises:
            VideoError: the video is unreadable, or too large for a row.
            OSError: `folder` cannot be written to.
        """
        try:
            info = read_video_info(video.path, video.image_fps)
        except FileNotFoundError as error:
            raise VideoError(f"{video.source}: is not there any more") from error
        if is_row_as_it_is(video, config):
            return [row_of_file(None, 0, info, info)]
        rows = []
        frames = iterate_frames(video.path, video.image_fps)
        parts = windows(info.num_frames, config.clip_length) if config.kind == "clips" else [(0, info.num_frames)]
        for i, (start, stop) in enumerate(parts):
            path = folder / f"{i}.mp4"
            num_frames = encode_frames(path, islice(frames, stop - start), config.short_side, config.quality)
            encoded = read_video_info(path)
            if not encoded.num_frames == num_frames == stop - start:
                raise VideoError(f"{video.source}: {encoded.num_frames} of {stop - start} frames could be encoded")
            rows.append(row_of_file(path.name, start, encoded, info))
        return rows

    @classmethod
    def complete_row(cls, video: SourceVideo, row: Row, folder: Path, embed: bool = True) -> tuple[str, Row]:
        """A row as `datasets` takes it, from one of `write_rows`, and its key.

        With `embed=False` a video's own file is only named, not read.
        """
        key = video.video_id if row["start_frame"] == 0 else f"{video.video_id}-{row['start_frame']:06d}"
        path = video.path if row["file"] is None else folder / row["file"]
        name = key.replace("/", "-") + (path.suffix.lower() or ".mp4")
        if embed or row["file"] is not None:
            source = {"path": name, "bytes": path.read_bytes()}
        else:
            source = {"path": str(path), "bytes": None}
        if source["bytes"] is not None and len(source["bytes"]) > MAX_VIDEO_BYTES:
            raise VideoError(
                f"{video.source}: has {len(source['bytes']) / 2**20:.0f} MiB, and a row at most "
                f"{MAX_VIDEO_BYTES / 2**20:.0f}; make it smaller (--transcode) or cut it (--config clips)"
            )
        return key, {
            "video": source,
            "video_id": video.video_id,
            **{column: row[column] for column in ("fps", "num_frames", "height", "width", "start_frame")},
            **cls.labels_of_row(video.labels, row, folder),
            "split": video.split,
            "source": video.source,
        }

    @classmethod
    def features(cls, config: CorpusConfig) -> datasets.Features:
        """The columns of a config."""
        return datasets.Features(
            {
                "video": Video(decode=False),
                "video_id": Value("string"),
                "fps": Value("float64"),
                "num_frames": Value("int64"),
                "height": Value("int64"),
                "width": Value("int64"),
                "start_frame": Value("int64"),
                **cls.label_features(config),
                "split": Value("string"),
                "source": Value("string"),
            }
        )

    # --- the builder of datasets -------------------------------------------------------------------------------------

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.features(self.config), license=self.TERMS)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        data_dir = None if self.config.data_dir is None else Path(self.config.data_dir)
        found = self.read_folder(data_dir, self.config)
        for rejection in found.rejected:
            logger.warning("%s: %s", rejection.source, rejection.reason)
        by_split = {split: [video for video in found.videos if video.split == split] for split in SPLITS}
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"videos": videos})
            for split, videos in by_split.items()
            if videos
        ]

    def _generate_examples(self, videos: list[SourceVideo]) -> Iterator[tuple[Any, Row]]:
        for video in videos:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                try:
                    rows = self.write_rows(video, folder, self.config)
                    for row in rows:
                        yield self.complete_row(video, row, folder, embed=False)
                except VideoError as error:
                    logger.warning("left out: %s: %s", video.source, error)
                    continue
                for misfit in self.misfits(video, rows[0]["source_frames"]):
                    logger.warning("%s: %s", video.source, misfit)


def is_row_as_it_is(video: SourceVideo, config: CorpusConfig) -> bool:
    """Whether a row has the video's own file, so that nothing is encoded."""
    return config.kind == "videos" and config.short_side is None and video.path.is_file()


def row_of_file(file: str | None, start_frame: int, info: VideoInfo, source: VideoInfo) -> Row:
    """A row of `write_rows`: `info` is of its own file, `source` of the whole video."""
    facts = {name: getattr(info, name) for name in ("num_frames", "fps", "height", "width")}
    whole = {"source_frames": source.num_frames, "source_height": source.height, "source_width": source.width}
    return {"file": file, "start_frame": start_frame, **facts, **whole}


def windows(num_frames: int, clip_length: int) -> list[tuple[int, int]]:
    """Windows `[start, stop)` end to end; the last one takes the remainder."""
    starts = range(0, max(1, num_frames // clip_length) * clip_length, clip_length)
    return [(start, num_frames if start == starts[-1] else start + clip_length) for start in starts]


# --- raw folders -----------------------------------------------------------------------------------------------------


def check_folder(data_dir: Path | None, corpus: str) -> Path:
    """The raw folder.

    Raises:
        CorpusError: there is none.
    """
    if data_dir is None:
        raise CorpusError(f"{corpus} needs the folder of the videos: --data_dir, or data_dir=.")
    if not data_dir.is_dir():
        found = "but it is a file" if data_dir.exists() else "but there is no such folder"
        raise CorpusError(f"{printable(str(data_dir))}: expected the folder of {corpus}, {found}.")
    check_name(data_dir)
    return data_dir


def check_name(data_dir: Path) -> None:
    """Raises a CorpusError for a folder whose name cannot be written to a table."""
    if not is_utf8(str(data_dir)):
        raise CorpusError(f"{printable(str(data_dir))}: its name is not UTF-8; rename it or give a link to it.")


def processed_folder(data_dir: Path, labels: dict[str, Any]) -> CorpusFolder | None:
    """A folder in the layout of Endo-FM, which has neither labels nor patients; None where it is another layout.

    Recognised by videos named by a number (`00001.mp4`) that lie directly in the folder; other files are left out.
    """
    paths = [path for path in data_dir.iterdir() if is_video(path) and _NUMBERED_VIDEO.fullmatch(path.stem)]
    if not paths:
        return None
    videos = [SourceVideo(path.stem, path, "train", path.name, dict(labels)) for path in paths]
    note = "clips without labels or patients: all of them are one split, as clips of one video cannot be told apart"
    return CorpusFolder("the Endo-FM layout (numbered mp4 files)", videos, other_files(data_dir, paths), [note])


def other_files(data_dir: Path, known: list[Path], reasons: dict[str, str] | None = None) -> list[Rejection]:
    """Files of a raw folder that were not read; hidden ones and system folders are not counted.

    Many of one folder are one rejection that says how many.

    Args:
        known: files that were read, and folders whose images were.
        reasons: why those below a top-level folder, by its name, are not read.
    """
    real = cache(os.path.realpath)  # of a folder, which was perhaps read by a link
    read = {(real(path.parent), path.name) for path in known}
    folders_of_frames = {real(path) for path in known if path.is_dir()}
    by_folder: dict[Path, list[Path]] = {}
    for path in walk(data_dir):
        is_frame = real(path.parent) in folders_of_frames and path.suffix.lower() in IMAGE_EXTENSIONS
        if (real(path.parent), path.name) not in read and not is_frame:
            by_folder.setdefault(path.parent, []).append(path)
    rejected = []
    for folder, paths in by_folder.items():
        below = folder.relative_to(data_dir)
        reason = (reasons or {}).get(below.parts[0] if below.parts else "", "no part of the layout; not read")
        if len(paths) > _MAX_FILES_NAMED:
            rejected.append(Rejection(f"{below.as_posix()}/", f"{len(paths)} files: {reason}"))
            continue
        for path in paths:
            why = reason if path.exists() else "a link to nothing"
            rejected.append(Rejection(path.relative_to(data_dir).as_posix(), why))
    return rejected


def walk(data_dir: Path) -> list[Path]:
    """Files below a folder in natural order, see `walk_folders`."""
    found = [folder / name for folder, files in walk_folders(data_dir) for name in files]
    return sorted(found, key=lambda path: natural_order(path.relative_to(data_dir).as_posix()))


def describe(data_dir: Path) -> str:
    """What a folder holds, for messages: its first few entries."""
    names = sorted((p.name + "/" if p.is_dir() else p.name for p in data_dir.iterdir()), key=natural_order)
    names = [printable(name) for name in names if not name.startswith(".")]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark; all line endings are one.

    Raises:
        CorpusError: it is something else, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}).") from error


def read_table(path: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not empty: number, from 1, and cells without surrounding space.

    None of the corpora quotes cells, so a quotation mark is a character like any other, and a stray one harms no
    other line.

    Raises:
        CorpusError: as `read_text`.
    """
    lines = read_text(path).split("\n")
    table = ((number, [cell.strip() for cell in line.split(delimiter)]) for number, line in enumerate(lines, start=1))
    return [(number, cells) for number, cells in table if any(cells)]


def read_json(path: Path) -> Any:
    """A json file in which no object has a key twice.

    Raises:
        CorpusError: it is none, or as `read_text`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
            raise ValueError(f"{excerpt(twice)} is there twice")
        return content

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise CorpusError(f"{path}: expected json (nested too deeply).") from error
    except ValueError as error:  # also integers of thousands of digits
        raise CorpusError(f"{path}: expected json ({error}).") from error


def read_number(text: str) -> int | None:
    """A frame number, or None where the text is none; beyond 18 digits there is no frame."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def excerpt(text: str) -> str:
    """Text from a file as messages quote it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def is_video(path: Path) -> bool:
    """A visible file with the extension of a video."""
    return path.suffix.lower() in VIDEO_EXTENSIONS and not path.name.startswith(".") and path.is_file()


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written; others have surrogates in place of their bytes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """A name that any terminal and file takes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def hash_of_listing(data_dir: Path) -> str:
    """A hash of the names, sizes and times of all files below a folder."""
    digest = hashlib.sha256()
    if data_dir.is_dir():
        for path in walk(data_dir):
            try:
                status = path.stat()
            except OSError:  # a link to nowhere
                continue
            entry = f"{printable(path.relative_to(data_dir).as_posix())}|{status.st_size}|{status.st_mtime_ns}\n"
            digest.update(entry.encode())
    return digest.hexdigest()[:16]


def stamp(video: SourceVideo) -> list[int]:
    """Size and time of a video's file; of a folder of frames their number, sum and latest."""
    if not video.path.is_dir():
        status = video.path.stat()
        return [status.st_size, status.st_mtime_ns]
    found = [path.stat() for path in list_images(video.path)]
    return [len(found), sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)]


def changed_config(config: CorpusConfig, changes: dict[str, Any]) -> CorpusConfig:
    """A config with other options.

    Raises:
        ValueError: an option that this corpus does not have.
    """
    known = config.options()
    for name in changes:
        if name not in known:
            raise ValueError(f"{name}: is no option here; expected one of {', '.join(known)}")
    return replace(config, **changes)
