"""Which sampler, and how few network calls: drift of the latents for all, FVD for those named.

    python benchmarks/sampling_quality.py --model FOLDER --output_dir outputs/sampling
    python benchmarks/sampling_quality.py --model FOLDER --output_dir outputs/sampling --real TEST_VIDEOS \
        --finalists "UniPC 2:8" "DPM-Solver++ 2M:10"

1. Drift: clips from the same noises, by each sampler at each number of steps, against 1000 steps of the first-order
solver: root mean square difference of the latents over their standard deviation. It ranks solvers of the ordinary
differential equation: all of them by 4 noises (`--num_screened`), the best eight by 16 (`--num_noises`). Samplers
that draw noise of their own end elsewhere, not worse; they are left to the FVD.
2. FVD of 256 clips a side (`--num_clips`), with the bootstrap's deviation, of the reference and the finalists; the
difference from the reference, clips paired by their noise, with its 95 % interval; and the distance between two sets
of as many real clips, the floor. A finalist is called equivalent where the upper end of its interval is at most a
tenth of the floor. The reference is the official sampler, 250 steps of DDPM, whatever the model predicts: a model of
rectified flow is turned into one of noise for it (see `NoiseOfFlow`). Samples are kept in the output folder.
`--student` is what `distill_endora.py` wrote, with its own number of steps.

`--backend openvino` computes the network by OpenVINO, which is faster on a CPU: that of all samplers and of the
reference alike, in float32 unless `--precision bf16`. What bfloat16 changes is then in both sides; `cheaper_calls.py`
measures it. Calls are counted, not computed. The output folder gets `sampling.json`, `sampling.md` and `sampling.png`,
the front of drift against calls.
"""

import argparse
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDPMScheduler
from tqdm.auto import tqdm

from diffusers_endora import EndoraPipeline
from diffusers_endora.files import written_atomically
from diffusers_endora.metrics.clip_sources import clips_at_fixed_offsets, open_videos, whole_clips
from diffusers_endora.metrics.feature_extractors import hash_weights
from diffusers_endora.metrics.feature_store import FeatureStore
from diffusers_endora.metrics.frechet_distance import (
    bootstrap_frechet_difference,
    bootstrap_frechet_distance,
    frechet_distance_of_features,
)
from diffusers_endora.metrics.i3d import I3DFeatures
from diffusers_endora.metrics.preparation import Preparation
from diffusers_endora.metrics.sampling import clip_generator, sample_clips
from diffusers_endora.openvino_backend import use_openvino

STEPS = (4, 5, 6, 8, 10, 15, 20)
NUM_RANKED = 8  # samplers that are measured on all noises
REFERENCE = "DDPM:250"
STUDENT = "student"
STOCHASTIC = ("DDPM", "SDE")  # parts of the names of samplers that draw noise


def samplers(is_flow: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> class and settings of each candidate."""
    solvers: dict[str, tuple[str, dict[str, Any]]] = {
        "DPM-Solver++ 1": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        "DPM-Solver++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "UniPC 2": ("UniPCMultistepScheduler", {"solver_order": 2}),
        "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
        "DEIS 2": ("DEISMultistepScheduler", {"solver_order": 2}),
        "DEIS 3": ("DEISMultistepScheduler", {"solver_order": 3}),
    }
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    if is_flow:
        found["Euler"] = ("FlowMatchEulerDiscreteScheduler", {})
        found["Heun"] = ("FlowMatchHeunDiscreteScheduler", {})
        solvers = {name: solver for name, solver in solvers.items() if "DEIS" not in name}  # ends in noise with flow
        for name, (scheduler, settings) in solvers.items():
            for shift in (0.5, 1.0, 2.0, 3.0, 5.0):
                suffix = "" if shift == 1 else f", shift {shift:g}"
                found[name + suffix] = (scheduler, {**settings, "flow_shift": shift})
        return found
    for spacing in ("linspace", "leading", "trailing"):
        suffix = "" if spacing == "linspace" else f", {spacing}"
        found["DDPM" + suffix] = ("DDPMScheduler", {"timestep_spacing": spacing})
        found["DDIM" + suffix] = ("DDIMScheduler", {"timestep_spacing": spacing})
        found["Euler" + suffix] = ("EulerDiscreteScheduler", {"timestep_spacing": spacing})
        found["Heun" + suffix] = ("HeunDiscreteScheduler", {"timestep_spacing": spacing})
        for name, (scheduler, settings) in solvers.items():
            found[name + suffix] = (scheduler, {**settings, "timestep_spacing": spacing})
    found["DDPM, fixed variance"] = ("DDPMScheduler", {"variance_type": "fixed_small"})
    for schedule in ("use_karras_sigmas", "use_lu_lambdas"):
        name = f"DPM-Solver++ 2M, {schedule.split('_')[1]}"
        found[name] = ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace", schedule: True})
    found["UniPC 2, karras"] = ("UniPCMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": True})
    return found


def set_sampler(pipeline: EndoraPipeline, own_scheduler: Any, name: str) -> None:
    scheduler, settings = samplers(pipeline.config.prediction_type == "flow_prediction")[name]
    if "Multistep" in scheduler:
        settings = {"final_sigmas_type": "zero", **settings}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(own_scheduler.config, **settings)


class NoiseOfFlow(torch.nn.Module):
    """A transformer of rectified flow as one that predicts noise, for samplers of noise.

    `x_t = a x + s noise` of the betas is, over `a + s`, the point `(1 - u) x + u noise` of flow at `u = s / (a + s)`;
    there `noise = point + (1 - u) velocity`.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer, self.config, self.null_class = transformer, transformer.config, transformer.null_class
        self.dtype, self.device = transformer.dtype, transformer.device
        self.alphas_cumprod = DDPMScheduler().alphas_cumprod

    def cache_context(self, name: str) -> Any:
        return nullcontext()

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        alphas = self.alphas_cumprod[timestep].reshape(-1, 1, 1, 1, 1)
        a, s = alphas.sqrt(), (1 - alphas).sqrt()
        u = s / (a + s)
        point = hidden_states / (a + s)
        velocity = self.transformer(point, 1000 * u.flatten(), **kwargs)[0]
        return (point + (1 - u) * velocity,)


def official(pipeline: EndoraPipeline) -> EndoraPipeline:
    """The pipeline with the official sampler: DDPM on the timesteps of the official code."""
    is_flow = pipeline.config.prediction_type == "flow_prediction"
    settings: dict[str, Any] = {"clip_sample": False, "timestep_spacing": "linspace"}
    if not is_flow:
        learns_variance = pipeline.transformer.config.out_channels == 2 * pipeline.transformer.config.in_channels
        variance = "learned_range" if learns_variance else "fixed_small"
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type=variance, **settings)
        return EndoraPipeline(pipeline.vae, pipeline.transformer, scheduler)
    scheduler = DDPMScheduler(variance_type="fixed_small", **settings)
    of_noise: Any = NoiseOfFlow(pipeline.transformer)
    return EndoraPipeline(pipeline.vae, of_noise, scheduler)


def load_student(model: str, folder: Path) -> tuple[EndoraPipeline, int]:
    """The pipeline with the adapter of `distill_endora.py` fused and its scheduler, and its number of calls."""
    pipeline = EndoraPipeline.from_pretrained(model)
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipeline, json.loads((folder / "calls.json").read_text())["calls"]


def latents_by(pipeline: EndoraPipeline, num_clips: int, num_inference_steps: int) -> tuple[torch.Tensor, int]:
    """Latents from noises of their own seeds, classes in turn, and the network calls that each took."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = pipeline.transformer.register_forward_pre_hook(count)
    num_classes = pipeline.transformer.config.num_classes
    pipeline.set_progress_bar_config(disable=True)
    try:
        output: Any = pipeline(
            batch_size=num_clips,
            class_labels=None if num_classes is None else [i % num_classes for i in range(num_clips)],
            generator=[clip_generator(0, i) for i in range(num_clips)],
            num_inference_steps=num_inference_steps,
            output_type="latent",
        )
    finally:
        hook.remove()
    return output.frames, calls


def measure_drift(pipeline: EndoraPipeline, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fills `results["screening"]` and `results["drift"]`: sampler -> steps -> calls and drift."""
    own_scheduler = pipeline.scheduler
    reference_path = args.output_dir / "reference.npy"
    if not reference_path.exists():
        set_sampler(pipeline, own_scheduler, "DPM-Solver++ 1")
        latents, _ = latents_by(pipeline, args.num_noises, 1000)
        with written_atomically(reference_path) as temporary:
            np.save(temporary, latents.numpy())
    reference = torch.from_numpy(np.load(reference_path))
    candidates = [
        name
        for name in samplers(pipeline.config.prediction_type == "flow_prediction")
        if not any(part in name for part in STOCHASTIC)
    ]

    def measure(table: str, names: list[str], num_noises: int) -> None:
        for name, steps in tqdm([(name, steps) for name in names for steps in STEPS], desc=table):
            if str(steps) in results[table].setdefault(name, {}):
                continue
            set_sampler(pipeline, own_scheduler, name)
            try:
                latents, calls = latents_by(pipeline, num_noises, steps)
            except ValueError as error:
                entry: dict[str, Any] = {"error": str(error)}
            else:
                expected = reference[:num_noises]
                drift = (latents - expected).square().mean().sqrt() / expected.std()
                entry = {"calls": calls, "drift": drift.item()}
            results[table][name][str(steps)] = entry
            save(args, results)

    def best_up_to_ten_calls(name: str) -> float:
        entries = results["screening"][name].values()
        return min((entry["drift"] for entry in entries if entry.get("calls", 99) <= 10), default=np.inf)

    measure("screening", candidates, args.num_screened)
    measure("drift", sorted(candidates, key=best_up_to_ten_calls)[:NUM_RANKED], args.num_noises)
    pipeline.scheduler = own_scheduler


def measure_fvd(pipeline: EndoraPipeline, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fills `results["fvd"]`: sampler:steps -> distance from the real clips, and difference from the reference."""
    store = FeatureStore(I3DFeatures(), args.output_dir / "features")
    num_frames, own_scheduler = pipeline.transformer.config.num_frames, pipeline.scheduler
    # spread over all videos, which are sorted by class
    real = clips_at_fixed_offsets(open_videos(args.real), 2 * args.num_clips, num_frames, num_frames)
    if len(real) < 2 * args.num_clips:
        raise SystemExit(
            f"--real {args.real}: has {len(real)} clips; expected {2 * args.num_clips}, twice --num_clips."
        )
    of_real = hashlib.sha256("".join(clip.key for clip in real).encode()).hexdigest()
    if results["real"] not in (None, of_real):
        raise SystemExit(f"--output_dir {args.output_dir}: holds distances from other real clips.")
    results["real"] = of_real
    real_features = store(real, Preparation(None), "real clips")["features"]
    halves = real_features[::2], real_features[1::2]
    flat_halves = [half.reshape(-1, half.shape[-1]) for half in halves]
    results["floor"] = frechet_distance_of_features(flat_halves[0], flat_halves[1])

    features = {}
    finalists = [REFERENCE, *args.finalists]
    if args.student is not None:
        student, calls = load_student(args.model, args.student)
        if args.backend == "openvino":
            use_openvino(student, args.precision)
        finalists.append(f"{STUDENT}:{calls}")
    for finalist in finalists:
        name, _, steps = finalist.rpartition(":")
        folder = args.output_dir / "samples" / finalist.replace(" ", "_").replace(":", "_")
        sampled = pipeline
        if finalist == REFERENCE:
            sampled = official(pipeline)
        elif name == STUDENT:
            sampled = student
        else:
            set_sampler(pipeline, own_scheduler, name)
        sample_clips(sampled, folder, args.num_clips, 0, int(steps), None, num_frames, args.batch_size)
        clips = whole_clips(open_videos(folder), num_frames)[: args.num_clips]
        features[finalist] = store(clips, Preparation(None), finalist)["features"]
        flat = features[finalist].reshape(-1, features[finalist].shape[-1])
        spread = bootstrap_frechet_distance(features[finalist], halves[0])
        difference, of_difference = bootstrap_frechet_difference(features[finalist], features[REFERENCE], halves[0])
        results["fvd"][finalist] = {
            "value": frechet_distance_of_features(flat, flat_halves[0]),
            "std": spread.std,
            "difference": difference,
            "difference_low": of_difference.low,
            "difference_high": of_difference.high,
            "is_equivalent": of_difference.high <= results["floor"] / 10,
        }
        save(args, results)
    pipeline.scheduler = own_scheduler


def save(args: argparse.Namespace, results: dict[str, Any]) -> None:
    with written_atomically(args.output_dir / "sampling.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    lines = []
    for table, num_noises in (("drift", args.num_noises), ("screening", args.num_screened)):
        lines += [f"| drift of {num_noises} clips | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |"]
        lines += ["|---" * (1 + len(STEPS)) + "|"]
        for name, row in sorted(results[table].items(), key=lambda item: item[1].get("10", {}).get("drift", np.inf)):
            cells = [f"{row[str(n)]['drift']:.3f}" if "drift" in row.get(str(n), {}) else "" for n in STEPS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    if results["fvd"]:
        lines += ["", "| sampler:steps | FVD | minus the reference's (95 %) | equivalent |", "|---|---|---|---|"]
        for name, row in results["fvd"].items():
            interval = f"{row['difference']:+.1f} ({row['difference_low']:+.1f}, {row['difference_high']:+.1f})"
            verdict = "yes" if row["is_equivalent"] else "no"
            lines.append(f"| {name} | {row['value']:.1f} ± {row['std']:.1f} | {interval} | {verdict} |")
        lines += ["", f"Floor (real against real): {results['floor']:.1f}; {args.num_clips} clips a side."]
    with written_atomically(args.output_dir / "sampling.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def plot(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Drift against calls; those that nothing beats at fewer calls are joined and named."""
    points = [
        (entry["calls"], entry["drift"], name)
        for name, row in {**results["screening"], **results["drift"]}.items()
        for entry in row.values()
        if "drift" in entry
    ]
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    axis.scatter([calls for calls, _, _ in points], [drift for _, drift, _ in points], s=8, color="lightgrey")
    front: list[tuple[int, float, str]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    axis.plot([calls for calls, _, _ in front], [drift for _, drift, _ in front], "o-")
    for calls, drift, name in front:
        axis.annotate(name, (calls, drift), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel="network calls", ylabel="drift of latents / their standard deviation")
    ticks = [*STEPS, 30, 40]  # Heun makes two calls a step
    axis.set_xticks(ticks, labels=map(str, ticks))
    axis.xaxis.minorticks_off()
    figure.savefig(args.output_dir / "sampling.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="pipeline folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_noises", type=int, default=16)
    parser.add_argument("--num_screened", type=int, default=4, help="of the noises, by all samplers")
    parser.add_argument("--real", help="held-out videos, for the FVD")
    parser.add_argument("--finalists", nargs="*", default=[], help="such as DPM-Solver++ 2M:10")
    parser.add_argument("--student", type=Path, help="folder of a student of this model, for the FVD")
    parser.add_argument("--num_clips", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--backend", choices=["torch", "openvino"], default="torch")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32", help="of OpenVINO")
    args = parser.parse_args()
    if args.real is None and (args.finalists or args.student is not None):
        parser.error("--finalists and --student are for the FVD, which needs --real.")
    try:
        pipeline = EndoraPipeline.from_pretrained(args.model)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    known = samplers(pipeline.config.prediction_type == "flow_prediction")
    for finalist in args.finalists:
        name, _, steps = finalist.rpartition(":")
        if name not in known or not steps.isdigit():
            parser.error(f'--finalists "{finalist}": expected NAME:STEPS with a name of {", ".join(known)}.')
    if args.backend == "torch" and args.precision != "f32":
        parser.error(f"--precision {args.precision} needs --backend openvino.")
    if not 1 <= args.num_screened <= args.num_noises:
        parser.error(f"--num_screened {args.num_screened}: expected 1 to --num_noises {args.num_noises}.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "sampling.json"
    settings = {"transformer": hash_weights(pipeline.transformer), "num_noises": args.num_noises}
    settings |= {"num_screened": args.num_screened, "num_clips": args.num_clips}
    settings |= {"backend": args.backend, "precision": args.precision}
    results = {"screening": {}, "drift": {}, "fvd": {}, "floor": None, "real": None, **settings}
    if path.exists():
        results = json.loads(path.read_text())
    for name, value in settings.items():
        if results.get(name) != value:
            parser.error(f"--output_dir {args.output_dir}: holds results of {name} {results.get(name)}, not {value}.")
    save(args, results)
    if args.backend == "openvino":
        use_openvino(pipeline, args.precision)
    measure_drift(pipeline, args, results)
    plot(args, results)
    if args.real:
        measure_fvd(pipeline, args, results)
    save(args, results)
    print((args.output_dir / "sampling.md").read_text())


if __name__ == "__main__":
    main()
