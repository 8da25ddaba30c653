"""Puts the model that comes with the package together: half precision, the sampler's preset, at most 20 MB.

    python examples/bundle_model.py --model TRAINING --student STUDENT \
        --output_dir src/diffusers_endora/bundled/phantom

`--model` is the output of `train_endora.py` for rectified flow, `--student`, if there is one, that of
`distill_endora.py`. The model card, `README.md`, is written by hand, beside what this writes, and stays as it is.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import diffusers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_endora import EndoraPipeline
from diffusers_endora.files import replacing_entries
from diffusers_endora.metrics.feature_extractors import hash_weights

MOST_BYTES = 20_000_000
SCHEDULERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
ADAPTER = "pytorch_lora_weights.safetensors"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the trained pipeline")
    parser.add_argument("--student", type=Path, help="folder of the adapter for fewer calls")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default=SCHEDULERS[0])
    parser.add_argument("--solver_order", type=int, default=2)
    parser.add_argument("--flow_shift", type=float, default=2.0)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    args = parser.parse_args()
    if args.num_inference_steps < 1:
        parser.error(f"--num_inference_steps {args.num_inference_steps}: expected a positive integer.")
    if not args.flow_shift > 0:
        parser.error(f"--flow_shift {args.flow_shift}: expected a positive number.")
    return args


def add_student(student: Path, folder: Path, of_teacher: str) -> None:
    """The adapter in half precision, its scheduler, and `calls.json`, which says for how many calls it is."""
    if json.loads((student / "training.json").read_text())["arguments"]["teacher"] != of_teacher:
        raise ValueError(f"--student {student}: is of another model than --model")
    shutil.copytree(student / "scheduler", folder / "scheduler")
    shutil.copyfile(student / "calls.json", folder / "calls.json")
    with safe_open(student / ADAPTER, "pt") as file:
        half = {name: file.get_tensor(name).half() for name in file.keys()}  # noqa: SIM118
        save_file(half, folder / ADAPTER, file.metadata())


def main() -> None:
    args = parse_args()
    try:
        if args.student is None and (args.output_dir / "student").exists():
            raise ValueError(f"{args.output_dir}: holds the student of an earlier model; remove it, or give --student")
        pipeline = EndoraPipeline.from_pretrained(args.model)
        if pipeline.config.prediction_type != "flow_prediction":
            raise ValueError(f"--model {args.model}: predicts no flow; expected a model of rectified flow")
        scheduler = getattr(diffusers, args.scheduler)(
            num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
            solver_order=args.solver_order,
            flow_shift=args.flow_shift,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
        )
        bundle = EndoraPipeline(
            pipeline.vae, pipeline.transformer, scheduler, num_inference_steps=args.num_inference_steps
        )
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with replacing_entries(args.output_dir) as folder:
            of_teacher = hash_weights(bundle.transformer)
            bundle.vae.half()
            bundle.transformer.half()
            bundle.save_pretrained(folder)
            (folder / "pipeline.py").unlink()  # the package's own code, for those who have no package
            if args.student is not None:
                add_student(args.student, folder / "student", of_teacher)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if size > MOST_BYTES:
                raise ValueError(f"{size / 1e6:.1f} MB: expected at most {MOST_BYTES / 1e6:.0f}")
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"bundle_model.py: error: {error}")
    print(f"{args.output_dir}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
