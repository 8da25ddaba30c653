"""Time of Muon's orthogonalisation on this CPU, against that of `torch.optim.Muon`.

    python benchmarks/muon_update.py

For matrices of the sizes that the demo's networks have. torch's multiplies in bfloat16, ours in float32; both sides
alternate, and ratios are taken pair by pair. The last column is how far ours and torch's, with torch's in float32 too,
lie apart, relative to their spread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch.optim._muon import DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

from diffusers_endora.training.muon import COEFFICIENTS, ITERATIONS, orthogonalized

SHAPES = [(192, 192), (192, 768), (768, 192), (64, 576), (128, 1152)]


def theirs(matrix: torch.Tensor) -> torch.Tensor:
    return _zeropower_via_newtonschulz(matrix, COEFFICIENTS, DEFAULT_NS_STEPS, EPS)


def seconds_of(function: Callable[[torch.Tensor], torch.Tensor], matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(5):
        function(matrix)
    return (time.perf_counter() - start) / 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_pairs", type=int, default=7)
    parser.add_argument("--num_threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    assert ITERATIONS == DEFAULT_NS_STEPS
    print("| matrix | ms | torch, ms | ours over torch's (min, max) | difference |\n|---|---|---|---|---|")
    for shape in SHAPES:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            exact = theirs(matrix)
        difference = ((orthogonalized(matrix) - exact).abs().max() / exact.std()).item()
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for pair in range(args.num_pairs):
            sides = [("ours", orthogonalized), ("theirs", theirs)]
            for name, function in sides if pair % 2 else reversed(sides):
                seconds[name].append(seconds_of(function, matrix))
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        mine, other = (1e3 * statistics.median(times) for times in seconds.values())
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"| {shape[0]} x {shape[1]} | {mine:.2f} | {other:.2f} | {spread} | {difference:.0e} |")


if __name__ == "__main__":
    main()
