"""How much faster a clip comes than by the official procedure: wall time and floating-point operations.

    python benchmarks/clip_speed.py

The official procedure is 250 calls of the same network in eager float32 by DDPM on the official timesteps (a model of
rectified flow as one of noise, see `sampling_quality.py`). Against it, in the same process and in turns: the model's
own preset, the preset by OpenVINO in float32 and bfloat16, and, where one is given, a student. Seconds are of
whole calls of the pipeline, decoding included; a ratio is of one turn, and median, least and largest are printed.
Operations are those of the transformer. Whether the clips are as good is the question of `sampling_quality.py`.
"""

import argparse
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sampling_quality import load_student, official
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_endora import EndoraPipeline, bundled_model
from diffusers_endora.openvino_backend import use_openvino

OFFICIAL_STEPS = 250


def by_openvino(pipeline: EndoraPipeline, precision: Literal["f32", "bf16"]) -> EndoraPipeline:
    use_openvino(pipeline, precision)
    return pipeline


def variants(model: str, student_folder: Path | None) -> dict[str, tuple[EndoraPipeline, int]]:
    """Pipeline and number of steps of each, the official procedure first."""
    pipeline = EndoraPipeline.from_pretrained(model)
    steps = pipeline.config.num_inference_steps
    found = {
        "official": (official(EndoraPipeline.from_pretrained(model)), OFFICIAL_STEPS),
        "preset": (pipeline, steps),
        "preset, OpenVINO": (by_openvino(EndoraPipeline.from_pretrained(model), "f32"), steps),
        "preset, OpenVINO, bfloat16": (by_openvino(EndoraPipeline.from_pretrained(model), "bf16"), steps),
    }
    if student_folder is not None:
        for name in ("student", "student, OpenVINO, bfloat16"):
            student, calls = load_student(model, student_folder)
            found[name] = (by_openvino(student, "bf16") if "OpenVINO" in name else student, calls)
    return found


def flops_of_a_call(pipeline: EndoraPipeline) -> int:
    transformer: Any = pipeline.transformer
    config = transformer.config
    latents = torch.randn(1, config.in_channels, config.num_frames, config.sample_size, config.sample_size)
    labels = None if config.num_classes is None else torch.tensor([0])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(latents, torch.tensor([500]), class_labels=labels)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="pipeline folder; default: the bundled model")
    parser.add_argument("--student", type=Path, help="folder of a student of this model, by distill_endora.py")
    parser.add_argument("--num_turns", type=int, default=5)
    args = parser.parse_args()
    if args.num_turns < 1:
        parser.error(f"--num_turns {args.num_turns}: expected a positive integer.")
    try:
        found = variants(args.model or bundled_model(), args.student)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    gflop = flops_of_a_call(found["preset"][0]) / 1e9

    def seconds(name: str, seed: int) -> float:
        pipeline, steps = found[name]
        pipeline.set_progress_bar_config(disable=True)
        labels = None if pipeline.transformer.config.num_classes is None else [0]
        generator = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        pipeline(class_labels=labels, num_inference_steps=steps, generator=generator)
        return time.perf_counter() - start

    for name in found:
        if name != "official":
            seconds(name, 0)  # warms up
    taken: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(args.num_turns):
        for name in found:
            taken[name].append(seconds(name, turn))
    print("| variant | calls | GFLOP | official's over its | seconds a clip | official's over its (min, max) |")
    print("|---|---|---|---|---|---|")
    for name, (_, steps) in found.items():
        ratios = np.divide(taken["official"], taken[name])
        calls = f"{steps} | {steps * gflop:.0f} | {OFFICIAL_STEPS / steps:.1f}"
        print(
            f"| {name} | {calls} | {np.median(taken[name]):.2f} | "
            f"{np.median(ratios):.1f} ({ratios.min():.1f}, {ratios.max():.1f}) |"
        )


if __name__ == "__main__":
    main()
