"""How the cost of a clip grows with its frames and its pixels: floating-point operations and seconds, against a line.

    python benchmarks/cost_scaling.py --output cost_scaling.png

One call of the transformer and the decoding of the clip, each at 8 to 64 frames of the training's size, and at 64x64
to 256x256 with the training's frames. Operations are counted by `torch.utils.flop_counter` (a multiplication and an
addition are two). "Over linear" is the cost of a frame, or of a pixel, over that of the smallest: 1 is linear. What is
over 1 in the operations is attention, whose cost per token grows with the tokens that it sees: those of a frame in
spatial blocks, a place's in all frames in temporal ones. Sizes take turns, and seconds are the median of the turns.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_endora import EndoraPipeline, bundled_model

FRAMES, SIDES = (8, 16, 32, 64), (64, 128, 192, 256)


def count_flops(run: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        run()
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="pipeline folder; default: the bundled model")
    parser.add_argument("--output", type=Path, default=Path("cost_scaling.png"))
    parser.add_argument("--num_turns", type=int, default=5)
    args = parser.parse_args()
    if args.num_turns < 1:
        parser.error(f"--num_turns {args.num_turns}: expected a positive integer.")
    try:
        pipeline = EndoraPipeline.from_pretrained(args.model or bundled_model())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    transformer, factor = pipeline.transformer, pipeline.vae_scale_factor
    num_frames, side = transformer.config.num_frames, transformer.config.sample_size * factor
    labels = None if transformer.config.num_classes is None else torch.tensor([0])

    # 1. What is run
    sizes = {("frames", count): (count, side) for count in FRAMES}
    sizes |= {("side", pixels): (num_frames, pixels) for pixels in SIDES}
    runs: dict[tuple[str, str, int], Callable[[], object]] = {}
    for size, (frames, pixels) in sizes.items():
        latents = torch.randn(1, transformer.config.in_channels, frames, pixels // factor, pixels // factor)

        def call(latents=latents):
            return transformer(latents, torch.tensor([500]), class_labels=labels)

        def decode(latents=latents):
            return pipeline.decode_latents(latents)

        runs |= {("transformer", *size): call, ("decoder", *size): decode}
    flops = {name: count_flops(run) for name, run in runs.items()}

    # 2. Seconds, in turns
    seconds: dict[tuple[str, str, int], list[float]] = {name: [] for name in runs}
    for turn in range(args.num_turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)

    # 3. The table and the plot
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    print("| part | frames | side | GFLOP | over linear | seconds (median, min, max) | over linear |")
    print("|---|---|---|---|---|---|---|")
    for axis, varied, values, quantity in (
        (axes[0], "frames", FRAMES, np.array(FRAMES)),
        (axes[1], "side", SIDES, np.array(SIDES) ** 2),
    ):
        for part in ("transformer", "decoder"):
            keys = [(part, varied, value) for value in values]
            medians = np.array([np.median(seconds[key]) for key in keys])
            counted = np.array([flops[key] for key in keys])
            for key, amount, median, count in zip(keys, quantity, medians, counted, strict=True):
                frames, pixels = sizes[key[1], key[2]]
                print(
                    f"| {part} | {frames} | {pixels} | {count / 1e9:.1f} "
                    f"| {count / amount / (counted[0] / quantity[0]):.2f} "
                    f"| {median:.3f} ({min(seconds[key]):.3f}, {max(seconds[key]):.3f}) "
                    f"| {median / amount / (medians[0] / quantity[0]):.2f} |"
                )
            (line,) = axis.plot(quantity, medians, "o-", label=part)
            axis.plot(quantity, medians[0] / quantity[0] * quantity, ":", color=line.get_color())
        axis.set_xlabel("frames" if varied == "frames" else "pixels of a frame")
        axis.set_ylabel("seconds (dotted: linear)")
        axis.legend()
    figure.savefig(args.output, dpi=150)
    print(args.output)


if __name__ == "__main__":
    main()
