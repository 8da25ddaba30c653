"""Distils a pipeline of rectified flow to few steps: a LoRA adapter that goes straight where the model goes in curves.

    python examples/distill_endora.py --pretrained_model FOLDER --output_dir OUT --num_steps 3

The way from noise to clip is cut in `--num_steps` segments (as in PeRFlow, Yan et al. 2024,
https://arxiv.org/abs/2405.07510). The model's own solutions, `--calls_per_segment` calls each, are recorded once; the
adapter learns the one velocity that leads from the beginning of a segment to its end: progressive distillation
(Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) in one go. No data is needed. To sample:

    pipe = EndoraPipeline.from_pretrained(FOLDER)
    pipe.load_lora_weights(OUT)
    pipe.scheduler = DPMSolverMultistepScheduler.from_pretrained(OUT, subfolder="scheduler")
    pipe(num_inference_steps=3)

Without guidance: what a guided model does is not recorded. Trajectories and checkpoints are kept, and a killed run
goes on from them.
"""

import argparse
import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed

from diffusers_endora.files import replacing_entries
from diffusers_endora.metrics.feature_extractors import hash_weights
from diffusers_endora.training.adapter import ATTENTION_PROJECTIONS, load_base, put_adapter_into, save_adapter
from diffusers_endora.training.processes import on_cpu
from diffusers_endora.training.resumable_steps import resumable_steps, resume
from diffusers_endora.training.training_model import use_plain_attention
from diffusers_endora.training.trajectories import flow_solver, record_trajectories, straight_velocity


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pretrained_model", required=True, help="folder or Hub id of the pipeline to distil")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=3, help="of the student")
    parser.add_argument("--num_trajectories", type=int, default=4096)
    parser.add_argument("--calls_per_segment", type=int, default=4)
    parser.add_argument("--flow_shift", type=float, default=1.0, help="above 1 the noisy segments are shorter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--lora_targets",
        default=f"{ATTENTION_PROJECTIONS},ff.net.0.proj,ff.net.2",
        help="modules that are adapted: ends of their names, divided by commas, or a regular expression of the names",
    )
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("num_steps", "num_trajectories", "calls_per_segment", "rank", "train_batch_size", "max_train_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    if args.checkpointing_steps < 1:
        parser.error(f"--checkpointing_steps {args.checkpointing_steps}: expected a positive integer.")
    if not args.flow_shift > 0:
        parser.error(f"--flow_shift {args.flow_shift}: expected a positive number.")
    try:
        re.compile(args.lora_targets)
    except re.error as error:
        parser.error(f"--lora_targets {args.lora_targets}: is no regular expression ({error}).")
    if importlib.util.find_spec("peft") is None:
        parser.error('needs the package peft: pip install "diffusers-endora[lora]".')
    args.lora_alpha, args.lora_dropout = args.rank, 0.0
    return args


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        sys.exit(f"distill_endora.py: error: {accelerator.num_processes} processes; it is made for one.")
    set_seed(args.seed)

    # 1. The teacher's ways
    try:
        _, pipeline = load_base(args.pretrained_model)
        put_adapter_into(copy.deepcopy(pipeline.transformer), args)  # what is wrong with it shows before the work
        pipeline.to(accelerator.device)
        states, labels, sigmas = record_trajectories(
            pipeline,
            args.output_dir / "trajectories",
            args.num_trajectories,
            args.num_steps,
            args.calls_per_segment,
            args.flow_shift,
        )
        transformer = pipeline.transformer
        of_teacher = hash_weights(transformer)
        put_adapter_into(transformer, args)
    except (ValueError, OSError) as error:
        sys.exit(f"distill_endora.py: error: {error}")
    is_conditional = transformer.config.num_classes is not None
    scheduler = flow_solver(pipeline, 1, args.flow_shift)
    scheduler.set_timesteps(args.num_steps)

    # 2. The student
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0)
    rise = 0.05 if args.max_train_steps > 20 else 0.0  # OneCycleLR cannot rise within one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.max_train_steps, pct_start=rise, cycle_momentum=False
    )
    if accelerator.device.type == "cpu" and args.mixed_precision == "bf16":
        use_plain_attention(transformer)
    model, optimizer, schedule = accelerator.prepare(transformer, optimizer, schedule)
    arguments = {name: value for name, value in vars(args).items() if name != "output_dir"}
    arguments["teacher"] = of_teacher
    try:
        done = resume(accelerator, args.output_dir, arguments)
    except ValueError as error:
        sys.exit(f"distill_endora.py: error: {error}")

    # 3. From the beginning of a segment straight to its end
    losses = []
    for step in resumable_steps(
        accelerator, args.output_dir, done, args.max_train_steps, args.checkpointing_steps, arguments
    ):
        generator = torch.Generator().manual_seed(args.seed * 2**32 + step)
        chosen = torch.randint(len(states), (args.train_batch_size,), generator=generator)
        segments = torch.randint(args.num_steps, (args.train_batch_size,), generator=generator)
        target = straight_velocity(states[chosen], sigmas, segments).to(accelerator.device)
        begin = states[chosen, segments].float().to(accelerator.device)
        timesteps = scheduler.timesteps[segments].to(accelerator.device)
        classes = labels[chosen].to(accelerator.device) if is_conditional else None
        with accelerator.autocast():
            predicted = model(begin, timesteps, class_labels=classes).sample
        loss = F.mse_loss(predicted.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            accelerator.print(f"step {step + 1}: squared error of the velocity {sum(losses) / len(losses):.4f}")
            losses.clear()

    # 4. The adapter and its scheduler
    student: Any = accelerator.unwrap_model(model)
    with replacing_entries(args.output_dir) as folder:
        save_adapter(folder, student, student.state_dict())
        scheduler.save_pretrained(folder / "scheduler")
        (folder / "calls.json").write_text(json.dumps({"calls": args.num_steps}) + "\n")
        (folder / "training.json").write_text(json.dumps({"arguments": arguments}, indent=2))
    print(f"Adapter: {args.output_dir}")


if __name__ == "__main__":
    main()
