"""Peak memory of training Endora XL/2, by configuration: does it fit 24 GB?

    python benchmarks/train_memory.py

Each configuration trains some steps by `Trainer`, as `examples/train_endora.py` does, in a process of its own: one
clip of 16 frames and 8 still images of 128x128 a step, the joint loss with the official prior (LoRA without, as is its
default), features from the cache (made before, by another process), moving average. "Peak" is the resident memory of
the process, on a GPU also what torch has allocated there; "less imports" subtracts what the process holds once
everything is imported. Weights, gradients, Adam's two moments and the moving average are counted from the tensors;
what the peak has beyond them and imports are activations, and memory that was freed and is kept for the next step.
Fails where a configuration does not run, or needs more than --limit_gb. 1 GB is 10^9 bytes.

--save writes a checkpoint after the steps, too (11 GB on disk for XL/2), and the peak is that of both.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from train_step import make_trainer, write_inputs

from diffusers_endora.training.presets import TRANSFORMERS
from diffusers_endora.training.trainer import Trainer, resident_memory

# Name and flags of `examples/train_endora.py`; with --rank what `examples/train_endora_lora.py` trains
CONFIGURATIONS: dict[str, list[str]] = {
    "float32": [],
    "gradient checkpointing": ["--gradient_checkpointing"],
    "bf16": ["--mixed_precision", "bf16"],
    "gradient checkpointing, bf16": ["--gradient_checkpointing", "--mixed_precision", "bf16"],
    "LoRA of rank 16": ["--rank", "16", "--prior", "none"],
    "LoRA of rank 16, gradient checkpointing": ["--rank", "16", "--prior", "none", "--gradient_checkpointing"],
}
ON_GPU: dict[str, list[str]] = {
    "gradient checkpointing, bf16, EMA on the host": [*CONFIGURATIONS["gradient checkpointing, bf16"], "--offload_ema"]
}
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class StepsAlone(Trainer):
    """Without reports, validation and checkpoints."""

    def _report(self, progress: Any) -> None:
        pass


def train_and_tell(flags: list[str], save: bool) -> None:
    """One configuration in this process; prints its bytes as a line of json."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    imports = pages * resource.getpagesize()
    trainer = make_trainer(StepsAlone, flags)
    trainer.fit()
    if save and trainer.save() is None:
        sys.exit("the checkpoint could not be written")
    trained = [value for value in trainer.unwrapped.parameters() if value.requires_grad]
    assert trainer.ema is not None
    bytes_of = {
        "weights": num_bytes(list(trainer.unwrapped.parameters())),
        "gradients": num_bytes(trained),
        "Adam": sum(num_bytes([trainer.optimizer.state[value][name] for value in trained]) for name in MOMENTS),
        "EMA": num_bytes(trainer.ema.average),
    }
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    told = {"imports": imports, "peak": resident_memory(), "gpu": gpu, "bytes": bytes_of}
    print(json.dumps({**told, "device": str(trainer.accelerator.device)}))


def num_bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_own_process(*arguments: str) -> str | None:
    """What this script prints last with these arguments; None, and the end of its messages, where it fails."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror" in line]
        reason = "killed, perhaps for its memory" if done.returncode < 0 else errors[-1] if errors else done.stderr
        print(f"failed with code {done.returncode}: {reason}", flush=True)
        return None
    return done.stdout.splitlines()[-1]


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=list(TRANSFORMERS), default="xl-2", help="demo: with small VAE and DINO")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write a checkpoint, too")
    parser.add_argument("--limit_gb", type=float, default=24.0)
    parser.add_argument("--configurations", nargs="+", choices=[*CONFIGURATIONS, *ON_GPU], help="by default all")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        call = json.loads(args.only)
        if "flags" in call:
            train_and_tell(call["flags"], args.save)
        else:  # the cache is filled where a trainer is made
            flags = write_inputs(Path(call["folder"]), args.resolution, "small" if args.preset == "demo" else "full")
            make_trainer(StepsAlone, [*flags, "--preset", "demo", "--max_train_steps", "1"])
            print(json.dumps(flags))
        return

    # The processes are started by a small one: Linux counts the memory of the starting one into theirs
    configurations = CONFIGURATIONS | (ON_GPU if torch.cuda.is_available() else {})
    chosen = args.configurations or list(configurations)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.preset}, {args.steps} steps of 1 clip "
        f"of 16 frames and 8 still images of {args.resolution}x{args.resolution}"
        f"{', and a checkpoint' if args.save else ''}"
    )
    fits = True
    columns = ("peak", "less imports", "weights", "gradients", "Adam", "EMA", "their share")
    with tempfile.TemporaryDirectory() as temporary:
        same = ["--preset", args.preset, "--resolution", str(args.resolution)]
        prepared = in_own_process("--only", json.dumps({"folder": temporary}), *same)
        if prepared is None:
            sys.exit(1)
        flags = [*json.loads(prepared), "--preset", args.preset, "--max_train_steps", str(args.steps)]
        print(f"{'GB':46s}" + "".join(f"{column:>14s}" for column in columns))
        for name in chosen:
            call = json.dumps({"flags": [*flags, *configurations[name]]})
            print(f"{name:46s}", end="", flush=True)
            line = in_own_process("--only", call, *["--save"] * args.save)
            if line is None:
                fits = False
                continue
            told = json.loads(line)
            less_imports = told["peak"] - told["imports"]
            on_gpu = told["gpu"] is not None
            counted = sum(
                value
                for part, value in told["bytes"].items()
                if not (on_gpu and part == "EMA" and "--offload_ema" in configurations[name])
            )
            share = counted / (told["gpu"] if on_gpu else less_imports)
            cells = [told["peak"], less_imports, *told["bytes"].values()]
            row = "".join(f"{gigabytes(cell):>14s}" for cell in cells) + f"{100 * share:>12.0f} %"
            print(row + (f"; {gigabytes(told['gpu'])} on the GPU" if on_gpu else ""), flush=True)
            fits &= max(told["peak"], told["gpu"] or 0) <= args.limit_gb * 1e9
    print(f"{'all of them fit' if fits else 'NOT all of them fit'} {args.limit_gb:g} GB")
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
