"""Trains MoStGAN-V (Shen et al. 2023, https://arxiv.org/abs/2304.02777), a baseline of Endora's paper.

    accelerate launch examples/train_mostgan_v.py --train_data_dir VIDEOS --output_dir OUT

The defaults are the official configuration at 128 pixels: steps of 64 clips on each device, of each of which the
discriminator sees 3 frames; Adam at 0.0025, R1 of weight 10 in every 16th step, adaptive augmentation of real and
generated clips without rotation, and a moving average of the generator with a half-life of 312.5 steps. With `--preset
demo` it trains small networks at 64 pixels on a CPU. `--config` takes flags from a yaml file.

Corpora, checkpoints, validation and publication are those of train_endora.py, with the same flags. Every random number
is a function of the seed and the step, so that a training that was stopped goes on as if it had not been.
"""

import sys

from diffusers_endora.baselines.gan_arguments import parse_gan_arguments
from diffusers_endora.baselines.gan_recipes import MOSTGAN_V
from diffusers_endora.baselines.gan_trainer import train


def main() -> None:
    """Trains as the command line says; see the module's docstring."""
    args = parse_gan_arguments(MOSTGAN_V)
    if code := train(args, MOSTGAN_V):
        sys.exit(code)


if __name__ == "__main__":
    main()
