"""Test videos among the clips that are trained on: refused, as scores of such a test mean nothing."""

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from ...data.audit.examination import evenly
from ...data.audit.frame_hash import hash_frame, to_grey
from ...data.audit.near_duplicates import find_overlaps
from ...data.clips import ClipDataset
from ...data.video_io import read_frames, read_video_info

logger = logging.getLogger(__name__)

FRAMES = 64  # of a video that are looked at, or all; of longer ones every `SPACING`-th
SPACING = 4  # so that of a clip cut from another video half of the frames are near to one that was looked at
LEAST_SHARE = 0.5  # of the hashes of a video: with so many partners it is a copy, or cut from the other


@dataclass(frozen=True)
class Fingerprint:
    """What a video is recognised by.

    Attributes:
        name: how messages name it.
        digest: SHA-256 of size, number of frames and the decoded pixels of the frames that are looked at:
            the container does not matter.
        hashes: uint64 `(n, 4)`, perceptual hashes of these frames, which survive another encoding, size or brightness.
    """

    name: str
    digest: str
    hashes: np.ndarray


def fingerprints(dataset: ClipDataset, videos: list[int] | range) -> list[Fingerprint]:
    """Fingerprints of some videos of a dataset.

    Raises:
        VideoError: one cannot be decoded.
    """

    def fingerprint(video: int) -> Fingerprint:
        source = dataset.open_video(video)
        info = read_video_info(source)
        wanted = evenly(info.num_frames, max(FRAMES, info.num_frames // SPACING))
        digest = hashlib.sha256(f"{info.width} {info.height} {info.num_frames}".encode())
        hashes = []
        for first in range(0, len(wanted), FRAMES):  # so that memory does not grow with the video
            frames = read_frames(source, wanted[first : first + FRAMES])
            digest.update(frames.data)
            hashes += [value for frame in frames if (value := hash_frame(to_grey(frame))) is not None]
        stacked = np.stack(hashes) if hashes else np.zeros((0, 4), np.uint64)
        return Fingerprint(dataset.video_name(video), digest.hexdigest(), stacked)

    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(fingerprint, videos), total=len(videos), desc="comparing with test", unit="video"))


def refuse_leaks(trained_on: list[Fingerprint], tested: list[Fingerprint], what: str) -> None:
    """Refuses clips to train on that are test videos or share most of their footage with one, as `endora audit` finds.

    Pairs with fewer frames alike may be different views of one kind; how many there are is logged.

    Args:
        what: how the message names what is trained on.

    Raises:
        ValueError: there is such a clip; how many, and the first.
    """
    by_digest = {video.digest: video.name for video in tested}
    pairs = [(video.name, "is", by_digest[video.digest]) for video in trained_on if video.digest in by_digest]
    hashes = [video.hashes for video in (*trained_on, *tested)]
    sides = ["trained on"] * len(trained_on) + ["tested"] * len(tested)
    overlaps = find_overlaps(hashes, sides)
    for overlap in overlaps:
        if max(overlap.shares) >= LEAST_SHARE:
            names = trained_on[overlap.first].name, tested[overlap.second - len(trained_on)].name
            pairs.append((names[0], "shares footage with", names[1]))
    if pairs:
        name, kind, test = pairs[0]
        count = len({pair[0] for pair in pairs})
        raise ValueError(
            f"{what}: {count} of {len(trained_on)} clips {'are' if count > 1 else 'is'} in the test set ({name} "
            f"{kind} {test}); scores would mean nothing, remove them."
        )
    if overlaps:
        logger.warning("%s: of pairs of a clip and a test video, %d have a few frames alike", what, len(overlaps))
