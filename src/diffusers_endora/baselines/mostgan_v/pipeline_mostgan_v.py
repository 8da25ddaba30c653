"""Generation of clips with MoStGAN-V (https://arxiv.org/abs/2304.02777)."""

from ..stylegan_v.pipeline_stylegan_v import StyleGANVPipeline
from .generator_mostgan_v import MoStGANVGenerator


class MoStGANVPipeline(StyleGANVPipeline):
    """Generates clips in one pass, unconditionally or by class; called as `StyleGANVPipeline` is.

    Args:
        generator: the network; it says the size and the usual length of a clip.

    Raises:
        ValueError: for a generator of another class.

    Example:
        >>> import torch
        >>> from diffusers_endora import MoStGANVPipeline

        >>> pipe = MoStGANVPipeline.from_pretrained("path/to/a/mostgan-v/folder")
        >>> clip = pipe(generator=torch.Generator().manual_seed(0)).frames[0]
    """

    generator_class_name = "MoStGANVGenerator"
    generator: MoStGANVGenerator
