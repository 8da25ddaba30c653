"""Trains a small `AutoencoderKL` on the frames of videos, for `train_endora.py --pretrained_vae`.

    python examples/train_autoencoder.py --train_data_dir VIDEOS --validation_data_dir HELD_OUT --output_dir FIRST
    python examples/train_autoencoder.py --train_data_dir VIDEOS --validation_data_dir HELD_OUT --output_dir SECOND \
        --pretrained_vae FIRST --max_train_steps 2500 --learning_rate 0.01
    python examples/train_autoencoder.py --train_data_dir VIDEOS --validation_data_dir HELD_OUT --output_dir THIRD \
        --pretrained_vae SECOND --max_train_steps 2000 --learning_rate 0.01 --decoder_only

The first training minimises the absolute distance of pixels and the posterior's divergence. The second goes on from
its weights, without latent channels that it left unused (to a diffusion model they are noise), and adds the distance
of the latents decoded at half the resolution from the frames at half the resolution: such latents are easier for a
diffusion model (scale equivariance, Skorokhodov et al. 2025, https://arxiv.org/abs/2502.14831, section 4).

In the third the encoder stays as it is; a transformer can be trained on its latents meanwhile. The decoder learns to
bear noise on the latents: a diffusion model's are never quite right, and the decoder would make blocks of them
(noise-augmented decoding, Zheng et al. 2025, https://arxiv.org/abs/2510.11690). And it learns the texture, which the
distance of pixels blurs (see `texture_distance`).

Convolutions are trained by Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), which gets as far as
Adam in six tenths of the steps here; biases, norms and the last layer by Adam. Three in four batches are crops of half
the side, as many as cost what the whole frames of the fourth do. The learning rate rises, stays and falls to nothing;
a moving average of the weights was worse than the weights. A killed training goes on from its latest checkpoint.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL

from diffusers_endora.data.contact_sheet import save_contact_sheet
from diffusers_endora.data.frames import as_pixels, load_frames
from diffusers_endora.files import replacing_entries
from diffusers_endora.training.muon import Muon
from diffusers_endora.training.processes import on_cpu
from diffusers_endora.training.resumable_steps import resumable_steps, resume
from diffusers_endora.training.texture import texture_distance

UNUSED = 0.9  # of a channel's variance that is the posterior's own, from which on it tells nothing


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--validation_data_dir", help="held-out videos: their PSNR and a contact sheet are reported")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pretrained_vae", help="AutoencoderKL to go on from, instead of a new one")
    parser.add_argument("--resolution", type=int, default=128, help="side of the square frames, in pixels")
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[16, 32, 64, 96], help="of a new one")
    parser.add_argument("--latent_channels", type=int, default=16, help="of a new one")
    parser.add_argument("--kl_weight", type=float, default=4e-3, help="of the divergence in nats per pixel")
    parser.add_argument(
        "--equivariance_weight",
        type=float,
        help="of the distance at half resolution; 0.25 of a --pretrained_vae, else 0",
    )
    parser.add_argument("--decoder_only", action="store_true", help="the decoder alone, on noisy latents")
    parser.add_argument("--latent_noise", type=float, default=0.25, help="of --decoder_only, in latents' deviations")
    parser.add_argument("--texture_weight", type=float, default=0.02, help="of the textures' distance; --decoder_only")
    parser.add_argument("--train_batch_size", type=int, default=4, help="whole frames; of crops four times as many")
    parser.add_argument("--max_train_steps", type=int, default=11_000)
    parser.add_argument("--learning_rate", type=float, default=0.03, help="of Muon; Adam's is a thirtieth")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.equivariance_weight is None:
        args.equivariance_weight = 0.25 if args.pretrained_vae else 0.0
    for name in ("latent_channels", "train_batch_size", "max_train_steps", "checkpointing_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    if wrong := [width for width in args.block_out_channels if width < 8 or width % 8]:
        parser.error(f"--block_out_channels {wrong[0]}: expected multiples of 8.")
    multiple = 2 ** (len(args.block_out_channels) + 1)  # half of crops of half the side too
    if args.resolution < 32 or (args.resolution % multiple and not args.pretrained_vae):
        parser.error(f"--resolution {args.resolution}: expected a multiple of {multiple} pixels, 32 or more.")
    if args.decoder_only and not args.pretrained_vae:
        parser.error("--decoder_only needs --pretrained_vae.")
    return args


def draw_batch(frames: torch.Tensor, batch_size: int, is_whole: bool, generator: torch.Generator) -> torch.Tensor:
    """Frames, or four times as many crops of half their side, some mirrored, in [-1, 1]."""
    count = batch_size if is_whole else 4 * batch_size
    chosen = torch.randint(len(frames), (count,), generator=generator)
    side = frames.shape[-1] if is_whole else frames.shape[-1] // 2
    corners = torch.randint(frames.shape[-1] - side + 1, (count, 2), generator=generator).tolist()
    pixels = torch.stack(
        [frames[i, :, y : y + side, x : x + side] for i, (y, x) in zip(chosen.tolist(), corners, strict=True)]
    )
    is_flipped = torch.rand(count, generator=generator) < 0.5
    return as_pixels(torch.where(is_flipped[:, None, None, None], pixels.flip(-1), pixels))


def rate_at(step: int, max_train_steps: int) -> float:
    """The share of the learning rate: up in the first tenth, down to 0 in the last third."""
    return max(0.0, min(1.0, 10 * (step + 1) / max_train_steps, 3 * (max_train_steps - step) / max_train_steps))


def with_noise(latents: torch.Tensor, amount: float) -> torch.Tensor:
    """Latents with noise of a deviation of their own for each picture, half-normal: `amount` of the latents' own."""
    deviations = amount * latents.std() * torch.randn(len(latents), 1, 1, 1, device=latents.device).abs()
    return latents + deviations * torch.randn_like(latents)


def peak_signal_to_noise_ratio(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """In dB, of each picture: `(B, 3, H, W)` in [-1, 1] -> `(B,)`; what is out of range is cut off first."""
    error = (reconstruction.clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4
    return -10 * error.log10()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, frames: torch.Tensor) -> torch.Tensor:
    """What the autoencoder makes of uint8 frames, in [-1, 1], from the mode of the posterior."""
    chunks = (as_pixels(chunk).to(vae.device) for chunk in frames.split(16))
    return torch.cat([vae.decode(vae.encode(chunk).latent_dist.mode()).sample.cpu() for chunk in chunks])


@torch.no_grad()
def spread_of_latents(vae: AutoencoderKL, frames: torch.Tensor) -> float:
    """Standard deviation of sampled latents."""
    torch.manual_seed(0)
    chunks = (as_pixels(chunk).to(vae.device) for chunk in frames.split(16))
    return torch.cat([vae.encode(chunk).latent_dist.sample() for chunk in chunks]).std().item()


def new_autoencoder(args: argparse.Namespace) -> AutoencoderKL:
    depth = len(args.block_out_channels)
    return AutoencoderKL(
        block_out_channels=tuple(args.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        norm_num_groups=8,
        latent_channels=args.latent_channels,
        sample_size=args.resolution,
    )


def load_pretrained(name: str, resolution: int) -> AutoencoderKL:
    """An autoencoder to go on from.

    Raises:
        ValueError: frames of `resolution` do not suit it, or it is of an unusual make.
        OSError: there is none.
    """
    vae = AutoencoderKL.from_pretrained(name)
    multiple = 2 ** (len(vae.config.block_out_channels) + 1)
    if resolution % multiple:
        raise ValueError(f"--resolution {resolution}: expected a multiple of {multiple} pixels for {name}")
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError(f"--pretrained_vae {name}: expected one with quant_conv and post_quant_conv")
    return vae


@torch.no_grad()
def without_unused_channels(vae: AutoencoderKL, frames: torch.Tensor) -> AutoencoderKL:
    """The same autoencoder without the latent channels whose posterior hardly depends on uint8 frames `(N, 3, H, W)`.

    What the dropped channels had on average, and the two 1x1 convolutions, go into their neighbours; but for the
    border, reconstructions stay the same.

    Raises:
        ValueError: it uses none.
    """
    posteriors = [vae.encode(as_pixels(chunk)).latent_dist for chunk in frames.split(16)]
    means = torch.cat([posterior.mean for posterior in posteriors])
    noise = torch.cat([posterior.var for posterior in posteriors]).mean((0, 2, 3))
    kept = (noise / (noise + means.var((0, 2, 3))) < UNUSED).nonzero().flatten()
    channels, before = len(kept), vae.config.latent_channels
    if channels == before:
        return vae
    if channels == 0:
        raise ValueError("none of the latent channels tells anything of the frames: expected a trained autoencoder")
    old, identity = vae.state_dict(), torch.eye(2 * channels)[:, :, None, None]
    rows = old["quant_conv.weight"][torch.cat([kept, kept + before]), :, 0, 0]
    columns, average = old["post_quant_conv.weight"][:, :, 0, 0], means.mean((0, 2, 3))
    average[kept] = 0
    constant = old["post_quant_conv.bias"] + columns @ average
    new = AutoencoderKL.from_config({**vae.config, "latent_channels": channels})
    changed = {
        "encoder.conv_out.weight": torch.tensordot(rows, old["encoder.conv_out.weight"], 1),
        "encoder.conv_out.bias": rows @ old["encoder.conv_out.bias"]
        + old["quant_conv.bias"][torch.cat([kept, kept + before])],
        "quant_conv.weight": identity,
        "quant_conv.bias": torch.zeros(2 * channels),
        "post_quant_conv.weight": identity[:channels, :channels],
        "post_quant_conv.bias": torch.zeros(channels),
        "decoder.conv_in.weight": torch.einsum("ochw,ci->oihw", old["decoder.conv_in.weight"], columns[:, kept]),
        "decoder.conv_in.bias": old["decoder.conv_in.bias"]
        + torch.einsum("ochw,c->o", old["decoder.conv_in.weight"], constant),
    }
    new.load_state_dict({**old, **changed})
    return new


def save(
    vae: AutoencoderKL,
    frames: torch.Tensor,
    held_out: torch.Tensor | None,
    output_dir: Path,
    arguments: dict[str, Any],
) -> None:
    """Writes the autoencoder, scaled for latents of unit variance, and what it does to held-out frames."""
    vae.register_to_config(scaling_factor=1 / spread_of_latents(vae, frames[:: max(1, len(frames) // 512)]))
    facts: dict[str, Any] = {"arguments": arguments}
    with replacing_entries(output_dir) as folder:
        vae.save_pretrained(folder)
        if held_out is not None:
            reconstruction = reconstruct(vae, held_out)
            psnr = peak_signal_to_noise_ratio(reconstruction, as_pixels(held_out))
            facts["held_out_psnr_db"] = {"mean": psnr.mean().item(), "worst": psnr.min().item()}
            print(facts["held_out_psnr_db"])
            pictures = [held_out[:10], ((reconstruction[:10].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)]
            save_contact_sheet(
                folder / "reconstruction.png", np.stack([rows.permute(0, 2, 3, 1).numpy() for rows in pictures])
            )
        (folder / "training.json").write_text(json.dumps(facts, indent=2))


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        sys.exit(f"train_autoencoder.py: error: {accelerator.num_processes} processes; it is made for one.")
    set_seed(args.seed)

    # 1. Frames and networks
    try:
        frames, _ = load_frames(args.train_data_dir, args.resolution)
        held_out = load_frames(args.validation_data_dir, args.resolution)[0] if args.validation_data_dir else None
        vae = load_pretrained(args.pretrained_vae, args.resolution) if args.pretrained_vae else new_autoencoder(args)
        if args.pretrained_vae and not args.decoder_only:
            vae = without_unused_channels(vae, frames[:: max(1, len(frames) // 512)])
            accelerator.print(f"{args.pretrained_vae}: {vae.config.latent_channels} latent channels are used.")
    except (ValueError, OSError) as error:
        sys.exit(f"train_autoencoder.py: error: {error}")
    if held_out is not None:
        held_out = held_out[:: max(1, len(held_out) // 256)]
    vae.encoder.requires_grad_(not args.decoder_only)
    vae.quant_conv.requires_grad_(not args.decoder_only)
    vae = accelerator.prepare(vae)
    trained = {name: weight for name, weight in vae.named_parameters() if weight.requires_grad}
    kernels = [w for name, w in trained.items() if w.ndim > 1 and name != "decoder.conv_out.weight"]
    others = [w for name, w in trained.items() if w.ndim == 1 or name == "decoder.conv_out.weight"]
    matrices = [torch.nn.Parameter(weight.data.flatten(1)) for weight in kernels]  # the same memory, as Muon takes it
    optimizers = {
        "muon": Muon(matrices, lr=args.learning_rate),
        "adam": torch.optim.AdamW(others, lr=args.learning_rate / 30, betas=(0.9, 0.99), weight_decay=0),
    }
    optimizers = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    schedules = [
        accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(of, lambda step: rate_at(step, args.max_train_steps)))
        for of in optimizers.values()
    ]
    arguments = {name: value for name, value in vars(args).items() if name != "output_dir"}
    try:
        done = resume(accelerator, args.output_dir, arguments)
    except ValueError as error:
        sys.exit(f"train_autoencoder.py: error: {error}")

    # 2. The training
    logged: dict[str, list[float]] = defaultdict(list)
    for step in resumable_steps(
        accelerator, args.output_dir, done, args.max_train_steps, args.checkpointing_steps, arguments
    ):
        generator = torch.Generator().manual_seed(args.seed * 2**32 + step)
        torch.manual_seed(args.seed * 2**32 + step)  # of the posterior's samples
        pixels = draw_batch(frames, args.train_batch_size, step % 4 == 3, generator).to(accelerator.device)
        with accelerator.autocast():
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.sample()
            if args.decoder_only:
                latents = with_noise(latents, args.latent_noise)
            reconstruction = vae.decode(latents).sample
            terms = {"l1": F.l1_loss(reconstruction, pixels)}
            if not args.decoder_only:
                terms["kl"] = args.kl_weight * posterior.kl().mean() / pixels[0, 0].numel()
                if args.equivariance_weight:
                    half = F.avg_pool2d(latents, 2), F.avg_pool2d(pixels, 2)
                    terms["half"] = args.equivariance_weight * F.l1_loss(vae.decode(half[0]).sample, half[1])
        if args.decoder_only and args.texture_weight:
            window = math.gcd(pixels.shape[-1], 32)
            terms["texture"] = args.texture_weight * texture_distance(reconstruction, pixels, generator, window)
        accelerator.backward(torch.stack(list(terms.values())).sum())
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        for kernel, matrix in zip(kernels, matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        optimizers["muon"].step()
        optimizers["adam"].step()
        for schedule in schedules:
            schedule.step()
        vae.zero_grad()

        for name, term in terms.items():
            logged[name].append(term.item())
        if (step + 1) % 100 == 0 or step + 1 == args.max_train_steps:
            accelerator.print(
                f"step {step + 1}: " + ", ".join(f"{name} {sum(of) / len(of):.4f}" for name, of in logged.items())
            )
            logged.clear()
        if (step + 1) % args.checkpointing_steps == 0 and step + 1 < args.max_train_steps:
            save(accelerator.unwrap_model(vae), frames, held_out, args.output_dir, arguments)

    # 3. The result
    save(accelerator.unwrap_model(vae), frames, held_out, args.output_dir, arguments)
    print(f"Autoencoder: {args.output_dir}")


if __name__ == "__main__":
    main()
