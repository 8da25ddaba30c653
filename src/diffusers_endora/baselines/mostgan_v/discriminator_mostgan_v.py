"""The discriminator of MoStGAN-V (Shen et al. 2023, https://arxiv.org/abs/2304.02777, section 3).

That of StyleGAN-V (`discriminator_stylegan_v.py`), which sees the differences of the frames as well.
"""

import torch
from diffusers.configuration_utils import register_to_config

from ..stylegan_v.discriminator_stylegan_v import DiscriminatorEpilogue, StyleGANVDiscriminator
from ..stylegan_v.generator_stylegan_v import require_positive_integers


class MoStGANVDiscriminator(StyleGANVDiscriminator):
    """The discriminator of MoStGAN-V. Called as `StyleGANVDiscriminator` is.

    Each frame of a clip less the next one, and the last less the first, passes the first residual blocks as a frame
    does; where the frames are concatenated, the features of these motion differences follow those of the frames.
    The last hidden layer is as wide as a motion style, as in the official network, where it could attend to them;
    its configuration leaves that attention out.

    Args:
        resolution: height and width of the frames, a power of 2 larger than `concat_resolution`.
        num_frames_per_clip: frames of a clip, 2 or more; the official training shows 3.
        channel_base: see `StyleGANVGenerator`.
        channel_max: likewise.
        num_classes: number of class labels; None for an unconditional model.
        concat_resolution: where the frames are concatenated, a power of 2 from 8.
        num_mapping_layers: see `StyleGANVDiscriminator`.
        max_num_frames: successive frames are less than this far apart.
        motion_style_dim: width of the last hidden layer.

    Raises:
        ValueError: for sizes that are not positive integers, a clip of one frame, and resolutions that do not fit.
    """

    # Images whose features are concatenated for every frame of a clip: the frame and its difference from the next.
    images_per_frame = 2

    @register_to_config
    def __init__(
        self,
        resolution: int = 128,
        num_frames_per_clip: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_classes: int | None = None,
        concat_resolution: int = 16,
        num_mapping_layers: int = 8,
        max_num_frames: int = 1024,
        motion_style_dim: int = 128,
    ):
        require_positive_integers(self.config, ["num_frames_per_clip", "motion_style_dim"])
        if num_frames_per_clip < 2:
            raise ValueError(f"num_frames_per_clip={num_frames_per_clip}: expected 2 or more, which have differences.")
        super().__init__(
            resolution=resolution,
            num_frames_per_clip=num_frames_per_clip,
            channel_base=channel_base,
            channel_max=channel_max,
            num_classes=num_classes,
            concat_resolution=concat_resolution,
            num_mapping_layers=num_mapping_layers,
            max_num_frames=max_num_frames,
        )

    def build_epilogue(self, in_channels: int, condition_dim: int) -> DiscriminatorEpilogue:
        """The last layers, whose hidden one is as wide as a motion style."""
        return DiscriminatorEpilogue(in_channels, condition_dim, hidden_dim=self.config.motion_style_dim)

    def clip_features(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames `(B, F, 3, H, W)`, and their differences with them, to features of the clips `(B, C, 4, 4)`."""
        differences = frames - frames.roll(-1, dims=1)
        return super().clip_features(torch.cat([frames, differences], dim=1))
