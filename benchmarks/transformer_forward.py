"""Time of one Endora XL/2 forward against the bare matrix products it must contain, and its peak memory.

    python benchmarks/transformer_forward.py

The reference is every qkv, output and MLP product of the 28 blocks on 1024 tokens (16 frames of 8x8 patches), with
the model's own weights and nothing in between: no bias, normalisation, modulation, attention or activation. Forward
and reference alternate in one process, and the ratio is taken pair by pair, so that a drifting machine cancels out.
"""

import argparse
import gc
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_endora import EndoraTransformer3DModel


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matrix_products(model: EndoraTransformer3DModel, tokens: torch.Tensor, mlp_tokens: torch.Tensor) -> None:
    """The products of all blocks: (1024, 1152) by qkv, out, fc1; (1024, 4608) by fc2."""
    for block in [*model.transformer_blocks, *model.temporal_transformer_blocks]:
        attn = block.attn
        for projection in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], block.ff.net[0].proj):
            F.linear(tokens, projection.weight)
        F.linear(mlp_tokens, block.ff.net[2].weight)


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="pairs of (forward, reference) that are timed")
    parser.add_argument("--num_layers", type=int, default=14, help="block pairs; XL/2 has 14")
    args = parser.parse_args()

    torch.manual_seed(0)
    after_imports = resident_bytes()
    model = EndoraTransformer3DModel(num_layers=args.num_layers).eval()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    latents, timestep = torch.randn(1, 4, 16, 16, 16), torch.tensor([500])
    gc.collect()
    model(latents, timestep)
    peak = peak_resident_bytes() - after_imports

    tokens, mlp_tokens = torch.randn(1024, 1152), torch.randn(1024, 4608)
    matrix_products(model, tokens, mlp_tokens)
    forward_times, product_times, ratios = [], [], []
    for _ in range(args.repeats):
        forward_times.append(seconds(model, latents, timestep))
        product_times.append(seconds(matrix_products, model, tokens, mlp_tokens))
        ratios.append(forward_times[-1] / product_times[-1])
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {2 * args.num_layers} blocks, float32, batch 1")
    for name, values in (("forward", forward_times), ("matrix products", product_times)):
        print(f"{name:16s} {statistics.median(values):7.3f} s  (min {min(values):.3f}, max {max(values):.3f})")
    print(f"ratio            {statistics.median(ratios):7.3f}    (min {min(ratios):.3f}, max {max(ratios):.3f})")
    print(
        f"peak resident memory less imports: {peak / 2**20:.0f} MiB = {peak / weights:.3f} x the weights' "
        f"{weights / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
