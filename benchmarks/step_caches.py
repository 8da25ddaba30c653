"""Whether reusing parts of earlier steps beats making fewer steps: diffusers' caches against the bare sampler.

    python benchmarks/step_caches.py --model FOLDER --output_dir outputs/step_caches --sampler "UniPC 2, shift 2"

Latents of 8 clips from the same noises, by one sampler at 4 to 50 steps, without a cache and with each; drift as in
`sampling_quality.py`, against a reference of 1000 steps. Cost is counted in floating-point operations and given in
whole calls of the network. A cache is worth having where it drifts less than the bare sampler at the same cost: the
last column is the cost at which the bare sampler drifts as much, interpolated, over the cache's own. MagCache is
calibrated on other noises first, for each number of steps. The output folder gets `step_caches.json`, from which a
killed run goes on, `.md` and `.png`.
"""

import argparse
import ast
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from sampling_quality import STOCHASTIC, latents_by, samplers, set_sampler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers_endora import EndoraPipeline
from diffusers_endora.files import written_atomically
from diffusers_endora.metrics.feature_extractors import hash_weights

BARE_STEPS = (4, 5, 6, 8, 10, 12, 15, 20, 25, 35, 50)
CACHED_STEPS = (10, 20, 50)


def configs(pipeline: EndoraPipeline, steps: int, mag_ratios: list[float]) -> Iterator[tuple[str, Any]]:
    """Name and configuration of each cache, mild to bold."""
    for threshold in (0.03, 0.1, 0.3):
        yield f"FirstBlockCache, threshold {threshold}", FirstBlockCacheConfig(threshold=threshold)
    for threshold in (0.03, 0.1, 0.3):
        settings = {"num_inference_steps": steps, "mag_ratios": mag_ratios, "retention_ratio": 0.1}
        yield f"MagCache, threshold {threshold}", MagCacheConfig(threshold=threshold, max_skip_steps=3, **settings)
    for interval in (2, 3):
        for order in (0, 1, 2):
            yield (
                f"TaylorSeer, every {interval}, order {order}",
                TaylorSeerCacheConfig(
                    cache_interval=interval,
                    disable_cache_before_step=order + 1,
                    max_order=order,
                    taylor_factors_dtype=torch.float32,
                ),
            )
    for skip in (2, 3):
        yield (
            f"PyramidAttentionBroadcast, every {skip}",
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip,
                temporal_attention_block_skip_range=skip,
                spatial_attention_timestep_skip_range=(0, 1000),
                temporal_attention_timestep_skip_range=(0, 1000),
                current_timestep_callback=lambda: pipeline.current_timestep,
            ),
        )


def count_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        result = run()
    return result, counter.get_total_flops()


def calibrate(pipeline: EndoraPipeline, steps: int) -> list[float]:
    """MagCache's ratios of a model and a sampler at a number of steps, which diffusers prints."""
    pipeline.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    labels = None if pipeline.transformer.config.num_classes is None else [0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        generator = torch.Generator().manual_seed(2**31)
        pipeline(class_labels=labels, generator=generator, num_inference_steps=steps, output_type="latent")
    pipeline.transformer.disable_cache()
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    return ast.literal_eval(line)


def write_report(output_dir: Path, results: dict[str, Any]) -> None:
    """The table and the plot."""
    bare = sorted(results["bare"].values(), key=lambda point: point["cost"])
    falling = [(point["drift"], point["cost"]) for point in bare]
    falling.sort()
    drifts, costs = np.log([drift for drift, _ in falling]), np.log([cost for _, cost in falling])
    lines = [
        "| cache | steps | cost, calls | drift | cost of the bare sampler for it, over its own |",
        "|---" * 5 + "|",
    ]
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    axis.plot([point["cost"] for point in bare], [point["drift"] for point in bare], "o-k", label="no cache")
    families: dict[str, list[tuple[float, float]]] = {}
    for key, point in results["cached"].items():
        name, _, steps = key.rpartition(":")
        gain = np.exp(np.interp(np.log(point["drift"]), drifts, costs)) / point["cost"]
        beyond = "" if falling[0][0] <= point["drift"] <= falling[-1][0] else " (beyond the bare sampler's range)"
        lines.append(f"| {name} | {steps} | {point['cost']:.1f} | {point['drift']:.3f} | {gain:.2f}{beyond} |")
        families.setdefault(name.split(",")[0], []).append((point["cost"], point["drift"]))
    for name, points in families.items():
        costs_of, drifts_of = zip(*points, strict=True)
        axis.scatter(costs_of, drifts_of, s=14, label=name)
    axis.set(xscale="log", yscale="log", xlabel="cost in network calls", ylabel="drift of latents")
    axis.set_xticks(BARE_STEPS, labels=map(str, BARE_STEPS))
    axis.xaxis.minorticks_off()
    axis.legend()
    figure.savefig(output_dir / "step_caches.png", dpi=150)
    plt.close(figure)
    text = (
        "\n".join(lines)
        + "\n\nWithout a cache: "
        + ", ".join(f"{point['drift']:.3f} at {steps}" for steps, point in results["bare"].items())
    )
    (output_dir / "step_caches.md").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="pipeline folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sampler", required=True, help="as sampling_quality.py names them")
    parser.add_argument("--num_noises", type=int, default=8)
    args = parser.parse_args()
    try:
        pipeline = EndoraPipeline.from_pretrained(args.model)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    known = set(samplers(pipeline.config.prediction_type == "flow_prediction"))
    known = {name for name in known if not any(part in name for part in (*STOCHASTIC, "Heun"))}
    if args.sampler not in known:
        parser.error(f'--sampler "{args.sampler}": expected one of {", ".join(sorted(known))}.')
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "step_caches.json"
    settings = {"transformer": hash_weights(pipeline.transformer), "sampler": args.sampler, "noises": args.num_noises}
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**settings, "bare": {}, "cached": {}}
    for name, value in settings.items():
        if results.get(name) != value:
            parser.error(f"--output_dir {args.output_dir}: holds results of {name} {results.get(name)}, not {value}.")
    own_scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)

    def save() -> None:
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1))

    save()  # before the reference, so that it is known whose that is

    def draw(steps: int) -> torch.Tensor:
        return latents_by(pipeline, args.num_noises, steps)[0]

    reference_path = args.output_dir / "reference.npy"
    if not reference_path.exists():
        set_sampler(pipeline, own_scheduler, "DPM-Solver++ 1")
        with written_atomically(reference_path) as temporary:
            np.save(temporary, draw(1000).numpy())
    reference = torch.from_numpy(np.load(reference_path))
    set_sampler(pipeline, own_scheduler, args.sampler)

    def measure(steps: int) -> dict[str, float]:
        latents, flops = count_flops(lambda: draw(steps))
        drift = (latents - reference).square().mean().sqrt() / reference.std()
        return {"cost": flops / one_call, "drift": drift.item()}

    one_call = count_flops(lambda: draw(10))[1] / 10
    for steps in tqdm(BARE_STEPS, desc="no cache"):
        if str(steps) not in results["bare"]:
            results["bare"][str(steps)] = measure(steps)
            save()
    for steps in CACHED_STEPS:
        for name, config in tqdm(list(configs(pipeline, steps, calibrate(pipeline, steps))), desc=f"{steps} steps"):
            if f"{name}:{steps}" not in results["cached"]:
                pipeline.transformer.enable_cache(config)
                results["cached"][f"{name}:{steps}"] = measure(steps)
                pipeline.transformer.disable_cache()
                save()
    write_report(args.output_dir, results)
    print((args.output_dir / "step_caches.md").read_text())


if __name__ == "__main__":
    main()
