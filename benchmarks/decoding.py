"""Seconds and peak memory of decoding a clip, by frames at a time and by the kind of autoencoder.

    python benchmarks/decoding.py

A pipeline decodes 4 frames at a time (`decode_chunk_size`), by whatever VAE it is given. Compared are an AutoencoderKL
of Stable Diffusion's size, which is the reference with all 16 frames at a time, and an AutoencoderTiny of the size of
https://huggingface.co/madebyollin/taesd, which decodes the same latents. Weights are random: what is measured is the
work, not the picture. Each decodes 16 frames of 128x128 in float32, in processes of their own and in turn, so that a
peak is its own; memory is less what the process held with the VAE loaded.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler
from xl2_folder import SD_VAE

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel

VARIANTS = [("AutoencoderKL", 16), ("AutoencoderKL", 4), ("AutoencoderKL", 1)]
VARIANTS += [("AutoencoderTiny", 16), ("AutoencoderTiny", 4), ("AutoencoderTiny", 1)]
REFERENCE = VARIANTS[0]


@torch.no_grad()
def measure(kind: str, chunk_size: int) -> dict[str, float]:
    """One variant, in this process."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**SD_VAE) if kind == "AutoencoderKL" else AutoencoderTiny()
    transformer = EndoraTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8)
    pipeline = EndoraPipeline(vae.eval(), transformer, DDPMScheduler())
    latents = torch.randn(1, 4, 16, 16, 16)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        pipeline.decode_latents(latents, chunk_size)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds[1:]), "peak": peak - pages * resource.getpagesize()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--variant", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant is not None:
        print(json.dumps(measure(*VARIANTS[args.variant])))
        return
    if args.num_rounds < 1:
        parser.error(f"--num_rounds {args.num_rounds}: expected a positive integer.")
    rows: dict[tuple[str, int], list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.num_rounds):
        for number, variant in enumerate(VARIANTS):
            command = [sys.executable, __file__, "--variant", str(number)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[variant].append(json.loads(done.stdout.splitlines()[-1]))
    first = {key: statistics.median(row[key] for row in rows[REFERENCE]) for key in ("seconds", "peak")}
    print(
        f"AutoencoderKL, 16 frames at a time: {first['seconds']:.2f} s a clip, {first['peak'] / 1e9:.2f} GB. The "
        f"others over it, median (min, max) of {args.num_rounds} rounds:\n"
    )
    print("| autoencoder | frames at a time | seconds | memory |")
    print("|---" * 4 + "|")
    for (kind, chunk_size), of_variant in rows.items():
        cells = []
        for key in ("seconds", "peak"):
            over = [row[key] / base[key] for row, base in zip(of_variant, rows[REFERENCE], strict=True)]
            cells.append(f"{statistics.median(over):.3f} ({min(over):.3f}, {max(over):.3f})")
        print(f"| {kind} | {chunk_size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
