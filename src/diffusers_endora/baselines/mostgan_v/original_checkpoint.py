"""The networks of the official MoStGAN-V to and from those of this package.

Those of StyleGAN-V with motion styles and differences of frames (https://github.com/xiaoqian-shen/MoStGAN-V,
`src/training/networks.py`); see `stylegan_v/original_checkpoint.py`, whose `official_tensors` writes both.
"""

from typing import Any

from ..stylegan_v.original_checkpoint import (
    Tensors,
    discriminator_config,
    generator_config,
    official_tensors,
    shape_of,
    with_tensors,
)
from .discriminator_mostgan_v import MoStGANVDiscriminator
from .generator_mostgan_v import MoStGANVGenerator

__all__ = ["convert_discriminator", "convert_generator", "official_tensors"]


def convert_generator(tensors: Tensors, settings: dict[str, Any]) -> MoStGANVGenerator:
    """A generator of this package from the official one's tensors.

    Args:
        tensors, settings: as for StyleGAN-V's.

    Raises:
        ValueError: names are missing or too many, shapes do not fit, or the network is of another kind.
    """
    hidden_dim, _ = shape_of(tensors, "synthesis.multimotionmap.0.weight")
    config = generator_config(tensors, settings)
    num_styles = max(hidden_dim // config["w_dim"], 1)
    style_dim = shape_of(tensors, "synthesis.multimotionmap.1.weight")[0] // num_styles
    generator = MoStGANVGenerator(**config, num_motion_styles=num_styles, motion_style_dim=style_dim)
    return with_tensors(generator, tensors)


def convert_discriminator(tensors: Tensors) -> MoStGANVDiscriminator:
    """A discriminator of this package from the official one's tensors.

    Raises:
        ValueError: see `convert_generator`.
    """
    style_dim = shape_of(tensors, "b4.fc.weight")[0]
    config = discriminator_config(tensors, copies_of_frames=2)
    return with_tensors(MoStGANVDiscriminator(**config, motion_style_dim=style_dim), tensors)
