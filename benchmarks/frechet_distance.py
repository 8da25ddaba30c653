"""Time of the Frechet distance between 2048-wide features, against `scipy.linalg.sqrtm` of the product.

    python benchmarks/frechet_distance.py

Both start from the same float64 means and covariances, of full rank and with a spectrum that falls like that of image
features (a power law). The two alternate, and the ratio is taken pair by pair.
"""

import argparse
import statistics
import time

import numpy as np
import scipy
import scipy.linalg
import torch

from diffusers_endora.metrics.frechet_distance import Moments, frechet_distance


def by_sqrtm(x: Moments, y: Moments) -> float:
    """The textbook form: the trace of the square root of a product that is not symmetric."""
    first, second = x.covariance(), y.covariance()
    root = scipy.linalg.sqrtm(first @ second)
    difference = x.mean - y.mean
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--num_rows", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of (reference, ours) that are timed")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    scale = np.arange(1, args.width + 1) ** -0.5
    mixing = rng.standard_normal((args.width, args.width)) / np.sqrt(args.width)
    x = Moments.of(rng.standard_normal((args.num_rows, args.width)) * scale)
    y = Moments.of(
        0.1 * scale + (rng.standard_normal((args.num_rows, args.width)) * scale) @ (np.eye(args.width) + mixing)
    )
    print(
        f"numpy {np.__version__}, scipy {scipy.__version__}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, width {args.width}, {args.num_rows} rows a side"
    )
    times: dict[str, list[float]] = {"sqrtm": [], "ours": []}
    for _ in range(args.repeats):
        start = time.perf_counter()
        expected = by_sqrtm(x, y)
        middle = time.perf_counter()
        value = frechet_distance(x, y)
        times["sqrtm"].append(middle - start)
        times["ours"].append(time.perf_counter() - middle)
    for name, values in times.items():
        print(f"{name:6s} {statistics.median(values):7.2f} s  (min {min(values):.2f}, max {max(values):.2f})")
    ratios = [slow / fast for slow, fast in zip(*times.values(), strict=True)]
    print(f"ratio  {statistics.median(ratios):7.1f}    (min {min(ratios):.1f}, max {max(ratios):.1f})")
    print(f"value  {value:.8g}, by sqrtm {expected:.8g}, relative difference {abs(value / expected - 1):.1e}")


if __name__ == "__main__":
    main()
