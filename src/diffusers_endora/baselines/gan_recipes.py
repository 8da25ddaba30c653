"""The two GANs that `gan_trainer` trains, and in what their trainings differ."""

from typing import NamedTuple

from diffusers import DiffusionPipeline, ModelMixin

from .mostgan_v.discriminator_mostgan_v import MoStGANVDiscriminator
from .mostgan_v.generator_mostgan_v import MoStGANVGenerator
from .mostgan_v.pipeline_mostgan_v import MoStGANVPipeline
from .stylegan_v.discriminator_stylegan_v import StyleGANVDiscriminator
from .stylegan_v.generator_stylegan_v import StyleGANVGenerator
from .stylegan_v.pipeline_stylegan_v import StyleGANVPipeline


class GANRecipe(NamedTuple):
    """What the training of a GAN takes that the flags do not say."""

    name: str
    script: str
    generator: type[ModelMixin]
    discriminator: type[ModelMixin]
    pipeline: type[DiffusionPipeline]
    r1_gamma: float | None  # None: by resolution and clips of a step
    rotates: bool  # whether augmentation turns clips
    demo_steps: int  # of `--preset demo`: half an hour of one core, at the pace of docs/baselines.md


STYLEGAN_V = GANRecipe(
    name="StyleGAN-V",
    script="train_stylegan_v.py",
    generator=StyleGANVGenerator,
    discriminator=StyleGANVDiscriminator,
    pipeline=StyleGANVPipeline,
    r1_gamma=None,
    rotates=True,
    demo_steps=3600,
)

MOSTGAN_V = GANRecipe(
    name="MoStGAN-V",
    script="train_mostgan_v.py",
    generator=MoStGANVGenerator,
    discriminator=MoStGANVDiscriminator,
    pipeline=MoStGANVPipeline,
    r1_gamma=10.0,  # `configs/model/stylegan-v.yaml` in https://github.com/xiaoqian-shen/MoStGAN-V
    rotates=False,  # `augpipe: bgc_noro` in its `configs/dataset/base.yaml`
    demo_steps=2200,
)
