"""Time of the baselines' networks against straightforward ones, and the operations of a clip of each system.

    python benchmarks/baselines.py [--device cuda]

At the size of the papers, 128 pixels: a clip of 16 frames by the generators of StyleGAN-V and MoStGAN-V and by a call
of LVDM's UNet, and a whole training step of each: for the GANs the trainer's own, with generator, discriminator,
augmentation, R1 and moving average, on `--batch_size` clips; for the UNet loss, gradients and AdamW on one clip.

The reference is the same network with the same weights whose operators are written as the papers have them. For the
GANs every sample's weights are modulated and demodulated and applied in one convolution with the batch as groups
(StyleGAN2, section 2.2), zeros are put between pixels before a filter, and every pixel is filtered before some are
left out. For LVDM 2-D convolutions of the frames laid out as a batch, and softmax attention by matrix products. Both
sides alternate in one process, and ratios are taken pair by pair; before they are timed, their results are compared.

Operations are those of `torch.utils.flop_counter` (a multiplication and its addition are two) for one clip of 16
frames of 128x128: Endora XL/2 with its 250 calls and a VAE of Stable Diffusion's size, LVDM with 50 calls, the GANs
with one.
"""

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from xl2_folder import SD_VAE

from diffusers_endora import EndoraTransformer3DModel, LVDMAutoencoder, LVDMUNet3DModel
from diffusers_endora.baselines.gan_arguments import parse_gan_arguments
from diffusers_endora.baselines.gan_recipes import MOSTGAN_V, STYLEGAN_V, GANRecipe
from diffusers_endora.baselines.gan_trainer import GANTrainer, build_networks
from diffusers_endora.baselines.lvdm import unet_lvdm
from diffusers_endora.baselines.lvdm.lvdm_loss import denoising_loss, make_lvdm_scheduler
from diffusers_endora.baselines.stylegan_v import generator_stylegan_v, operators
from diffusers_endora.data.phantom import write_phantom_corpus
from diffusers_endora.training.setup import load_clips, make_accelerator

LARGEST_DIFFERENCE = 1e-3  # of results, relative to their spread
LVDM_CALLS = 50
ENDORA_CALLS = 250

# --- the straightforward operators -----------------------------------------------------------------------------------


def plain_upfirdn2d(
    x: torch.Tensor,
    taps: torch.Tensor,
    up: int = 1,
    down: int = 1,
    padding: int | tuple[int, int, int, int] = 0,
    gain: float = 1.0,
) -> torch.Tensor:
    batch_size, channels, height, width = x.shape
    stuffed = x.new_zeros(batch_size, channels, height, up, width, up)
    stuffed[:, :, :, 0, :, 0] = x
    x = F.pad(
        stuffed.view(batch_size, channels, height * up, width * up),
        (padding,) * 4 if isinstance(padding, int) else padding,
    )
    kernel = torch.outer(taps, taps).flip(0, 1).to(x.dtype) * gain
    x = F.conv2d(x, kernel.expand(channels, 1, -1, -1), groups=channels)
    return x[:, :, ::down, ::down]


def plain_modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    taps: torch.Tensor | None = None,
    up: int = 1,
    demodulate: bool = True,
) -> torch.Tensor:
    weights = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        weights = weights * (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    return operators.per_sample_conv2d(x, weights, taps, up)


def plain_convolution(self: torch.nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """Of frames by themselves."""
    frames = x.transpose(1, 2).flatten(0, 1)
    padding, stride = self.padding[1:], self.stride[1:]
    frames = F.conv2d(frames, self.weight[:, :, 0], self.bias, stride, padding)
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1) @ value


@contextlib.contextmanager
def straightforward() -> Iterator[None]:
    """The baselines' networks compute as the reference does."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(operators, "upfirdn2d", plain_upfirdn2d))
        stack.enter_context(mock.patch.object(generator_stylegan_v, "modulated_conv2d", plain_modulated_conv2d))
        stack.enter_context(mock.patch.object(torch.nn.Conv3d, "forward", plain_convolution))
        stack.enter_context(mock.patch.object(unet_lvdm.F, "scaled_dot_product_attention", plain_attention))
        yield


# --- measuring -------------------------------------------------------------------------------------------------------


def finished(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(name: str, run: Callable[[], torch.Tensor], num_pairs: int) -> str:
    """A row of the table: seconds and ratio of `run` as it is and as the reference."""
    ours = run()
    with straightforward():
        theirs = run()
    difference = ((ours - theirs).abs().max() / theirs.std(correction=0).clamp_min(1e-12)).item()
    if not difference < LARGEST_DIFFERENCE:
        raise SystemExit(f"{name}: differs from the reference by {difference:.1e} of its spread.")
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for pair in range(num_pairs):
        for side in ("ours", "reference") if pair % 2 else ("reference", "ours"):
            with straightforward() if side == "reference" else contextlib.nullcontext():
                start = finished(ours.device)
                run()
                seconds[side].append(finished(ours.device) - start)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["reference"], strict=True)]
    mine, other = (statistics.median(seconds[side]) for side in ("ours", "reference"))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
    return f"| {name} | {mine:.3g} | {other:.3g} | {spread} | {difference:.0e} |"


def gan_rows(recipe: GANRecipe, folder: Path, device: torch.device, batch_size: int, num_pairs: int) -> Iterator[str]:
    flags = ["--train_data_dir", str(folder / "corpus"), "--output_dir", str(folder / recipe.name)]
    flags += ["--frame_interval", "1", "--train_batch_size", str(batch_size), "--dataloader_num_workers", "0"]
    flags += ["--no-allow_tf32"]  # so that both sides can be compared
    args = parse_gan_arguments(recipe, flags)
    AcceleratorState._reset_state(True)
    dataset, _ = load_clips(args)
    generator, discriminator = build_networks(args, recipe, dataset.num_classes)
    trainer = GANTrainer(args, make_accelerator(args), recipe, generator, discriminator, dataset)
    trainer.augment.probability.fill_(0.3)
    random = torch.Generator().manual_seed(0)
    z, times = torch.randn(1, args.code_dim, generator=random).to(device), torch.arange(16.0, device=device)[None]
    noise = generator.draw_motion_noise(1, 15, random, device)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return generator.eval()(z, times, None, noise).sample

    yield compare(f"{recipe.name}: generator, 16 frames", forward, num_pairs)

    batch = next(trainer._batches())
    initial = {
        name: [value.clone() for value in getattr(trainer, name).state_dict().values()]
        for name in ("generator", "discriminator")
    }

    def step() -> torch.Tensor:
        """The training's first, which has every update there is; returns what was measured."""
        for name, values in initial.items():
            for value, first in zip(getattr(trainer, name).state_dict().values(), values, strict=True):
                value.copy_(first)
            trainer.optimizers[name].state.clear()
        generator.train()
        trainer.step = 0
        measured = trainer.take_step([batch])
        return torch.tensor(
            [measured["generator_loss"], measured["discriminator_loss"], measured["discriminator_grad_norm"]]
        )

    yield compare(f"{recipe.name}: training step, {batch_size} clips of 3 frames", step, num_pairs)


def lvdm_rows(device: torch.device, num_pairs: int) -> Iterator[str]:
    torch.manual_seed(0)
    unet, scheduler = LVDMUNet3DModel().to(device), make_lvdm_scheduler()
    for parameter in unet.parameters():  # some begin at zero, which would hide differences
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    latents, noise = torch.randn(2, 1, 4, 4, 16, 16, device=device)
    timesteps = torch.tensor([500], device=device)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return unet(latents, timesteps).sample

    yield compare("LVDM: a call of the UNet", forward, num_pairs)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        denoising_loss(unet, latents, timesteps, noise, scheduler).mean().backward()
        optimizer.step()
        return unet.conv_in.weight.grad.clone()

    yield compare("LVDM: training step, 1 clip", step, num_pairs)


def flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def operations() -> Iterator[str]:
    """Rows of the second table: parameters and operations of a clip."""
    with torch.device("meta"):
        transformer, vae = EndoraTransformer3DModel(), AutoencoderKL(**SD_VAE)
        unet, autoencoder = LVDMUNet3DModel(), LVDMAutoencoder()
        generators = {recipe.name: recipe.generator().eval() for recipe in (STYLEGAN_V, MOSTGAN_V)}
        latents, small, t = torch.empty(1, 4, 16, 16, 16), torch.empty(1, 4, 4, 16, 16), torch.empty(1).long()
        counts = {
            "Endora XL/2": (
                transformer,
                ENDORA_CALLS,
                flops(lambda: transformer(latents, t)),
                flops(lambda: vae.decode(torch.empty(16, 4, 16, 16))),
            ),
            "LVDM": (unet, LVDM_CALLS, flops(lambda: unet(small, t)), flops(lambda: autoencoder.decode(small))),
        }
    for name, generator in generators.items():
        generator.to_empty(device="cpu")
        for tensor in (*generator.parameters(), *generator.buffers()):
            tensor.data.zero_()
        z, times = torch.zeros(1, generator.config.z_dim), torch.arange(16.0)[None]
        counts[name] = (generator, 1, flops(partial(generator, z, times)), 0)
    for name, (model, calls, one_call, decoding) in counts.items():
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        total = calls * one_call + decoding
        parts = f"{calls} x {one_call / 1e9:.0f} + {decoding / 1e9:.0f}"
        yield f"| {name} | {parameters:.1f} | {parts} | {total / 1e12:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_pairs", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="in float32, without TF32")
    parser.add_argument("--batch_size", type=int, default=4, help="clips of a GAN's training step")
    parser.add_argument(
        "--models", nargs="+", choices=["StyleGAN-V", "MoStGAN-V", "LVDM"], default=["StyleGAN-V", "MoStGAN-V", "LVDM"]
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    os.environ["ACCELERATE_USE_CPU"] = str(args.device == "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print("| | M parameters | GFLOP, calls and decoding | TFLOP a clip |\n|---|---|---|---|")
    for row in operations():
        print(row)
    print("\n| | seconds | reference | ours over reference (min, max) | difference |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_phantom_corpus(Path(folder) / "corpus", 2, num_frames=16, height=128, width=128)
        for recipe in (STYLEGAN_V, MOSTGAN_V):
            if recipe.name in args.models:
                for row in gan_rows(recipe, Path(folder), device, args.batch_size, args.num_pairs):
                    print(row, flush=True)
        if "LVDM" in args.models:
            for row in lvdm_rows(device, args.num_pairs):
                print(row, flush=True)


if __name__ == "__main__":
    main()
