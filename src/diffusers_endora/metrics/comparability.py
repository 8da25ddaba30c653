"""What makes a number mean less than it seems to: sides that differ, too few clips, clips that are not independent."""

from collections.abc import Sequence

import numpy as np

from .clip_sources import LOSSLESS_CODECS, Clip, Video, num_overlapping
from .protocols import Protocol


def comparability_warnings(
    protocol: Protocol,
    resolution: tuple[int, int],
    real_clips: list[Clip],
    fake_clips: list[list[Clip]],
    fake_videos: list[list[Video]],
    train_videos: list[Video] | None,
    real_stride: str,
    fake_stride: str | None,
) -> list[str]:
    """What makes a number mean less than it seems to, in sentences."""
    found = []
    real_videos = list(dict.fromkeys(clip.video for clip in real_clips))
    if count := num_overlapping(real_clips):
        found.append(
            f"{count} of {len(real_clips)} real clips overlap others of the same video: they are not independent, and "
            "spreads over clips are too small."
        )
    if len(real_videos) == 1:
        found.append("All real clips are of one video: the numbers say nothing about others.")
    if len(real_clips) < protocol.num_clips and protocol.real_clips == "fixed offsets":
        found.append(f"The real videos give {len(real_clips)} clips; {protocol.num_clips} were asked for.")
    if smaller := [v for v in real_videos if v.height < resolution[0] or v.width < resolution[1]]:
        found.append(
            f"{len(smaller)} real videos are smaller than {resolution[1]}x{resolution[0]}, such as {smaller[0].name} "
            f"({smaller[0].width}x{smaller[0].height}), and were enlarged."
        )
    if train_videos is not None:
        train_hashes = {video.content_hash for video in train_videos}
        if seen := sum(video.content_hash in train_hashes for video in real_videos):
            found.append(f"{seen} of {len(real_videos)} real videos are training videos: they are not held out.")
    if not fake_clips:
        return found

    if train_videos is None:
        found.append("Whether the real videos are held out is not known; --train would tell.")
    clips, videos = fake_clips[0], fake_videos[0]
    if len(clips) < protocol.num_clips:
        found.append(f"There are {len(clips)} generated clips; {protocol.num_clips} were asked for.")
    if len(clips) != len(real_clips):
        found.append(f"The sides differ in N: {len(real_clips)} real and {len(clips)} generated clips.")
    if fake_stride is not None and real_stride not in (fake_stride, "as stored"):
        found.append(
            f"The sides differ in stride: real clips have {real_stride}, the model was trained at {fake_stride}."
        )
    if longer := sum(video.num_frames > protocol.num_frames for video in videos):
        found.append(
            f"The sides differ in number of frames: {longer} generated clips are longer than {protocol.num_frames} "
            "frames, of which the first were taken."
        )
    first = videos[0]
    if (first.height, first.width) != resolution:
        found.append(
            f"The sides differ in resolution: generated clips are {first.width}x{first.height}, compared at "
            f"{resolution[1]}x{resolution[0]}."
        )
    real_codecs = {video.codec for video in real_videos}
    fake_codecs = {video.codec for of_seed in fake_videos for video in of_seed}
    lossy = fake_codecs - LOSSLESS_CODECS
    if real_codecs != fake_codecs and (lossy or real_codecs - LOSSLESS_CODECS) and protocol.mp4_crf is None:
        found.append(
            f"The sides differ in codec: real videos are stored as {', '.join(sorted(real_codecs))}, generated ones "
            f"as {', '.join(sorted(fake_codecs))}."
        )
    if lossy and protocol.mp4_crf is None:
        found.append(f"Generated clips were stored with a lossy codec ({', '.join(sorted(lossy))}).")
    real_hashes = {video.content_hash for video in real_videos}
    if same := sum(video.content_hash in real_hashes for of_seed in fake_videos for video in of_seed):
        found.append(f"Identical inputs: {same} of the generated videos are files of the real side.")
    return found


def same_features_warnings(real: np.ndarray, fakes: Sequence[dict[str, np.ndarray]]) -> list[str]:
    """Clips of both sides with the same pixels, in whatever files."""
    rows = {features.tobytes() for features in real}
    same = sum(features.tobytes() in rows for fake in fakes for features in fake["features"])
    return [f"Identical inputs: {same} generated clips have the very features of a real clip."] if same else []
