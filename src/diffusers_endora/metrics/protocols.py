"""Named protocols: which clips are compared, and what happens to their pixels."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from .clip_sources import Clip, Video, clips_at_fixed_offsets, one_clip_per_video, whole_clips
from .preparation import Preparation


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a number beside the clips themselves and the networks.

    Attributes:
        name: as a report prints it.
        steps: what is done, in sentences.
        real_clips: `"fixed offsets"`: spread evenly over all videos, no chance in it; `"one per video"`: at a random
            offset, consecutive frames.
        num_clips: clips a side, or as many as there are.
        num_clips_of_frames: generated clips whose frames the networks for images see (FID, KID, inception score).
        all_real_frames: those networks see every frame of the real videos instead of the frames of the real clips.
        num_frames: frames of a clip.
        frame_interval: stride of real clips; None: `num_frames` spread evenly over `window` frames.
        window: see `frame_interval`.
        resolution: height and width of both sides; None: that of the generated clips.
        resize: see `Preparation`.
        mp4_crf: generated clips go through H.264 of this quality, unless they come as H.264.
        jpeg_quality: frames of both sides go through JPEG of this quality.
        ddof: covariances divide by N - ddof.
        num_seeds: sets of samples that are drawn from a model.
        seed: of what is random: offsets, resampling.
    """

    name: str
    steps: tuple[str, ...]
    real_clips: Literal["fixed offsets", "one per video"]
    num_clips: int = 2048
    num_clips_of_frames: int = 2048
    all_real_frames: bool = False
    num_frames: int = 16
    frame_interval: int | None = None
    window: int = 48
    resolution: tuple[int, int] | None = None
    resize: Literal["antialiased", "lanczos"] = "antialiased"
    mp4_crf: int | None = None
    jpeg_quality: int | None = None
    ddof: int = 1
    num_seeds: int = 1
    seed: int = 0

    @property
    def span(self) -> int:
        """Frames from a real clip's first to its last, both included."""
        return self.window if self.frame_interval is None else (self.num_frames - 1) * self.frame_interval + 1

    @property
    def stride(self) -> str:
        """Of real clips, as a report prints it."""
        if self.frame_interval is not None:
            return str(self.frame_interval)
        average = (self.window - 1) / max(1, self.num_frames - 1)
        return f"{average:.2f} ({self.num_frames} frames of {self.window})"

    def changed(self, **changes: Any) -> "Protocol":
        """A copy with other numbers.

        Raises:
            ValueError: a number is out of its range.
        """
        protocol = replace(self, **changes)
        if protocol.num_clips < 2:
            raise ValueError(f"num_clips={protocol.num_clips}: expected 2 or more; a spread needs several clips")
        for field in ("num_frames", "num_seeds", "window"):
            if getattr(protocol, field) < 1:
                raise ValueError(f"{field}={getattr(protocol, field)}: expected a positive integer")
        if protocol.frame_interval is not None and protocol.frame_interval < 1:
            raise ValueError(f"frame_interval={protocol.frame_interval}: expected a positive integer")
        if protocol.frame_interval is None and protocol.window < protocol.num_frames:
            raise ValueError(f"window={protocol.window}: expected at least num_frames={protocol.num_frames}")
        if protocol.resolution is not None and min(protocol.resolution) < 1:
            raise ValueError(f"resolution={protocol.resolution}: expected positive integers")
        if protocol.seed < 0:
            raise ValueError(f"seed={protocol.seed}: expected an integer from 0 up")
        return protocol

    def changes(self) -> dict[str, Any]:
        """Fields that differ from the protocol of this name."""
        original = PROTOCOLS[self.name]
        return {
            field: value
            for field, value in vars(self).items()
            if value != getattr(original, field) and field not in ("steps", "seed")
        }

    def takes_whole(self, videos: list[Video]) -> bool:
        """Whether a corpus is of clips already: all have `num_frames` frames, and no stride was asked for."""
        return (
            self.real_clips == "fixed offsets"
            and self.frame_interval is None
            and all(video.num_frames == self.num_frames for video in videos)
        )

    def select_real(self, videos: list[Video]) -> list[Clip]:
        """The real clips of a corpus; videos that are too short for one give none."""
        if self.takes_whole(videos):
            return clips_at_fixed_offsets(videos, self.num_clips, self.num_frames, self.num_frames)
        if self.real_clips == "one per video":
            return one_clip_per_video(videos, self.num_frames, self.seed)[: self.num_clips]
        return clips_at_fixed_offsets(videos, self.num_clips, self.num_frames, self.span)

    def select_fake(self, videos: list[Video], num_clips: int) -> list[Clip]:
        """The first generated clips."""
        return whole_clips(videos, self.num_frames)[:num_clips]

    def preparation(self, resolution: tuple[int, int] | None, is_fake: bool, codec: str) -> Preparation:
        """What is done to the clips of one side, stored with `codec`."""
        through_mp4 = is_fake and codec != "h264"
        return Preparation(
            resolution=resolution,
            resize=self.resize,
            mp4_crf=self.mp4_crf if through_mp4 else None,
            jpeg_quality=self.jpeg_quality,
        )


STRICT = Protocol(
    name="endora-strict",
    steps=(
        "Real clips lie at fixed offsets, spread evenly over all videos, without overlap as long as there is room.",
        "Real clips have the stride of the training clips: 16 frames spread over a window of 48, unless changed. "
        "Videos that all have 16 frames are clips already and are taken whole.",
        "Real clips are resized (bilinear, antialiased) until they cover the resolution of the generated clips, and "
        "the centre is cropped; generated clips are not touched. No codec comes between either side and the network.",
        "Covariances are unbiased (divided by N - 1).",
    ),
    real_clips="fixed offsets",
    num_seeds=3,
)

LEGACY = Protocol(
    name="endora-legacy",
    steps=(
        "As the official evaluation: one real clip per video, 16 consecutive frames from a random offset, whatever "
        "the stride of the training clips.",
        "Generated clips go through mp4 (H.264, 8 frames per second, CRF 5, which is quality 9 of imageio); real ones "
        "do not.",
        "Both sides are resized with Pillow's Lanczos filter until they cover 128x128, the centre is cropped, and "
        "every frame goes through JPEG of quality 75.",
        "FVD compares 2048 generated clips with the real ones; the networks for images see every frame of the real "
        "videos and 3125 x 16 = 50,000 generated frames.",
        "Covariances divide by N.",
        "Not imitated: sampling in half precision.",
    ),
    real_clips="one per video",
    num_clips_of_frames=3125,
    all_real_frames=True,
    frame_interval=1,
    resolution=(128, 128),
    resize="lanczos",
    mp4_crf=5,
    jpeg_quality=75,
    ddof=0,
)

PROTOCOLS = {protocol.name: protocol for protocol in (STRICT, LEGACY)}
