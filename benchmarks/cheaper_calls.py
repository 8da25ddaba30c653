"""What makes a network call cheaper, and what it costs in fidelity: precision, compilation, quantisation, OpenVINO.

    python benchmarks/cheaper_calls.py --model FOLDER --output_dir outputs/cheaper_calls
    python benchmarks/cheaper_calls.py --model FOLDER --output_dir outputs/cheaper_calls --real TEST_VIDEOS

Each variant runs in processes of its own, `--num_rounds` of them in turn, and is compared, round by round, with eager
float32: seconds of a call of the transformer, of decoding a clip, of a whole clip and of one of four that are made at
a time, and peak resident memory, of the clip alone, less what imports hold. "Drift" is the root mean square difference
of the latents of 8 clips, from the same noises, over their standard deviation. With `--real`, FVD of 256 clips a side
(`--num_clips`): the difference from eager float32, clips paired by their noise, with its 95 % interval. Compilation is
timed apart, as the first call; torch keeps its results, so that only the first round on a fresh machine has its full
price. Quantisation needs `pip install torchao`, OpenVINO `pip install openvino`; what does not run is listed with its
reason.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_endora import EndoraPipeline
from diffusers_endora.files import written_atomically
from diffusers_endora.metrics.clip_sources import clips_at_fixed_offsets, open_videos, whole_clips
from diffusers_endora.metrics.feature_store import FeatureStore
from diffusers_endora.metrics.frechet_distance import bootstrap_frechet_difference
from diffusers_endora.metrics.i3d import I3DFeatures
from diffusers_endora.metrics.preparation import Preparation
from diffusers_endora.metrics.sampling import clip_generator, sample_clips

REFERENCE = "float32"
MEASURED = ("call", "decode", "clip", "of_four", "peak")  # columns that are ratios


def in_bfloat16(pipeline: EndoraPipeline) -> None:
    pipeline.to(torch.bfloat16)


def with_compiled_blocks(pipeline: EndoraPipeline) -> None:
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)


def quantised(config_name: str) -> Callable[[EndoraPipeline], None]:
    def quantise(pipeline: EndoraPipeline) -> None:
        from torchao import quantization

        quantization.quantize_(pipeline.transformer, getattr(quantization, config_name)())

    return quantise


def by_openvino(precision: Any) -> Callable[[EndoraPipeline], None]:
    def replace(pipeline: EndoraPipeline) -> None:
        from diffusers_endora.openvino_backend import use_openvino

        use_openvino(pipeline, precision)

    return replace


int8_weights = quantised("Int8WeightOnlyConfig")
int8_all = quantised("Int8DynamicActivationInt8WeightConfig")

# name -> what is done to the pipeline, in order
VARIANTS: dict[str, list[Callable[[EndoraPipeline], None]]] = {
    REFERENCE: [],
    "bfloat16": [in_bfloat16],
    "compiled blocks": [with_compiled_blocks],
    "bfloat16, compiled blocks": [in_bfloat16, with_compiled_blocks],
    "int8 weights": [int8_weights],
    "int8 weights, compiled blocks": [int8_weights, with_compiled_blocks],
    "int8 weights and activations, compiled blocks": [int8_all, with_compiled_blocks],
    "int4 weights": [quantised("Int4WeightOnlyConfig")],
    "OpenVINO": [by_openvino("f32")],
    "OpenVINO, bfloat16": [by_openvino("bf16")],
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One variant, in this process."""
    imports = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    pipeline = EndoraPipeline.from_pretrained(args.model)
    for change in VARIANTS[args.variant]:
        change(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    transformer: Any = pipeline.transformer
    config = transformer.config
    latents = torch.randn(1, config.in_channels, config.num_frames, config.sample_size, config.sample_size)
    labels = None if config.num_classes is None else torch.tensor([0])
    model_input = latents.to(transformer.dtype)

    def call() -> Any:
        return transformer(model_input, torch.tensor([500]), class_labels=labels)

    def clips(seeds: range, output_type: str = "pt") -> Any:
        chosen = None if config.num_classes is None else [seed % config.num_classes for seed in seeds]
        generators = [clip_generator(0, seed) for seed in seeds]
        options = {"class_labels": chosen, "generator": generators, "output_type": output_type}
        return pipeline(batch_size=len(seeds), **options).frames

    first = median_seconds(call, 1)
    call()
    result: dict[str, Any] = {
        "first_call": first,
        "call": median_seconds(call, args.repeats),
        "decode": median_seconds(lambda: pipeline.decode_latents(latents), 3),
    }
    clips(range(1))
    result["clip"] = median_seconds(lambda: clips(range(1)), 3)
    result["peak"] = peak_bytes() - imports
    clips(range(4))
    result["of_four"] = median_seconds(lambda: clips(range(4)), 3) / 4
    drawn = torch.cat([clips(range(seed, seed + 1), "latent") for seed in range(8)])
    with written_atomically(args.output_dir / f"{args.variant}.npy") as temporary:
        np.save(temporary, drawn.float().numpy())
    if args.real:
        folder = args.output_dir / "samples" / args.variant.replace(" ", "_").replace(",", "")
        steps = pipeline.config.num_inference_steps
        sample_clips(pipeline, folder, args.num_clips, 0, steps, None, config.num_frames)
    return result


def fvd_differences(args: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """For each variant how much its FVD is above float32's, with the 95 % interval."""
    num_frames = EndoraPipeline.from_pretrained(args.model).transformer.config.num_frames
    store = FeatureStore(I3DFeatures(), args.output_dir / "features")
    # spread over all videos, which are sorted by class
    real = clips_at_fixed_offsets(open_videos(args.real), args.num_clips, num_frames, num_frames)
    if len(real) < args.num_clips:
        raise SystemExit(f"--real {args.real}: has {len(real)} clips; expected {args.num_clips}.")
    real_features = store(real, Preparation(None), "real clips")["features"]
    features = {}
    for name in names:
        folder = args.output_dir / "samples" / name.replace(" ", "_").replace(",", "")
        clips = whole_clips(open_videos(folder), num_frames)[: args.num_clips]
        features[name] = store(clips, Preparation(None), name)["features"]
    differences = {}
    for name in names:
        value, spread = bootstrap_frechet_difference(features[name], features[REFERENCE], real_features)
        differences[name] = f"{value:+.2f} ({spread.low:+.2f}, {spread.high:+.2f})"
    return differences


def report(args: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]], failures: dict[str, str]) -> str:
    """The table."""

    def ratios(name: str, key: str) -> str:
        over = [mine[key] / base[key] for mine, base in zip(rounds[name], rounds[REFERENCE], strict=True)]
        return f"{np.median(over):.2f} ({min(over):.2f}, {max(over):.2f})"

    names = list(rounds)
    reference = np.load(args.output_dir / f"{REFERENCE}.npy")
    differences = fvd_differences(args, names) if args.real else {}
    base = {key: np.median([row[key] for row in rounds[REFERENCE]]) for key in MEASURED}
    lines = [
        f"float32 eager: a call {base['call']:.3f} s, decoding {base['decode']:.2f} s, a clip {base['clip']:.2f} s, "
        f"one of four at a time {base['of_four']:.2f} s, peak {base['peak'] / 1e9:.2f} GB less imports. The others "
        f"over it, median (min, max) of {len(rounds[REFERENCE])} rounds:",
        "",
        "| variant | call | decoding | clip | one of four | peak memory | first call | drift | FVD minus float32's |",
        "|---" * 9 + "|",
    ]
    for name in names:
        latents = np.load(args.output_dir / f"{name}.npy")
        drift = np.sqrt(np.square(latents - reference).mean()) / reference.std()
        cells = [ratios(name, key) for key in MEASURED]
        first = max(row["first_call"] for row in rounds[name])
        lines.append(
            f"| {name} | {' | '.join(cells)} | {first:.1f} | {drift:.4f} | {differences.get(name, 'not measured')} |"
        )
    lines += [f"\n{name} does not run: {reason}" for name, reason in failures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="pipeline folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--num_rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7, help="calls that a median is of")
    parser.add_argument("--real", help="held-out videos, for the FVD")
    parser.add_argument("--num_clips", type=int, default=256)
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.variant is not None:
        print(json.dumps(measure(args)))
        return

    rounds: dict[str, list[dict[str, Any]]] = {REFERENCE: []} | {name: [] for name in args.variants}
    failures: dict[str, str] = {}
    for _ in range(args.num_rounds):
        for name in list(rounds):
            command = [sys.executable, *sys.argv, "--variant", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failures[name] = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                if name == REFERENCE:
                    raise SystemExit(f"{name}, which all are compared with, does not run: {failures[name]}")
                rounds.pop(name)
                print(f"{name} does not run: {failures[name]}", file=sys.stderr)
                continue
            rounds[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(name, rounds[name][-1], file=sys.stderr)
    text = report(args, rounds, failures)
    (args.output_dir / "cheaper_calls.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
