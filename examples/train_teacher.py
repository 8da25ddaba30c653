"""Trains a small ViT by self-distillation on the frames of videos: a teacher for the prior, made at home.

    python examples/train_teacher.py --train_data_dir VIDEOS --validation_data_dir HELD_OUT --output_dir OUT

The result is a `transformers` ViT/8 that `--dino_model OUT` takes. It is no substitute for DINO's own weights where
those can be had (`facebook/dino-vits8`): it is small and has seen nothing but these videos. Where the videos lie in a
folder per class, the accuracy of its nearest neighbours on held-out frames stands beside that of an untrained ViT and
of the bare pixels. A killed training goes on from its latest checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import ViTConfig, ViTModel

from diffusers_endora.data.frames import as_pixels, load_frames
from diffusers_endora.files import replacing_entries
from diffusers_endora.training.processes import on_cpu
from diffusers_endora.training.resumable_steps import resumable_steps, resume
from diffusers_endora.training.self_distillation import (
    SelfDistillation,
    hidden_patches,
    nearest_neighbour_accuracy,
    random_views,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--validation_data_dir", help="held-out videos, in the same folders of classes")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=128, help="side of the square frames, in pixels")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--num_heads", type=int, default=3)
    parser.add_argument("--hidden_share", type=float, default=0.6, help="of a picture's patches")
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--teacher_momentum", type=float, default=0.99, help="at the start")
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("width", "num_layers", "num_heads", "train_batch_size", "max_train_steps", "checkpointing_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    if args.resolution < 32 or args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: expected a multiple of 8 pixels, 32 or more.")
    if args.train_batch_size < 2:
        parser.error("--train_batch_size 1: expected 2 or more, as pictures are told from each other.")
    if not 1 <= round(args.hidden_share * num_patches(args.resolution)) < num_patches(args.resolution):
        parser.error(
            f"--hidden_share {args.hidden_share}: expected a share of {num_patches(args.resolution)} patches."
        )
    if args.width % args.num_heads:
        parser.error(f"--width {args.width}: expected a multiple of --num_heads {args.num_heads}.")
    return args


Frames = tuple[torch.Tensor, torch.Tensor]  # uint8 (N, 3, H, W) and their classes (N,)


def side_of_parts(resolution: int) -> int:
    """Pixels on a side of the parts of frames that are learned from: three quarters, in whole patches."""
    return 3 * resolution // 4 // 8 * 8


def num_patches(resolution: int) -> int:
    return (side_of_parts(resolution) // 8) ** 2


def accuracy(vit: ViTModel | None, known: Frames, asked: Frames) -> float:
    """Of nearest neighbours by the mean of tokens; without a network by pixels, at 16x16."""

    @torch.no_grad()
    def features(frames: torch.Tensor) -> torch.Tensor:
        pixels = (as_pixels(chunk) for chunk in frames.split(64))
        if vit is None:
            return torch.cat([F.adaptive_avg_pool2d(chunk, 16).flatten(1) for chunk in pixels])
        return torch.cat(
            [vit(chunk, interpolate_pos_encoding=True).last_hidden_state[:, 1:].mean(1) for chunk in pixels]
        )

    return nearest_neighbour_accuracy(features(known[0]), known[1], features(asked[0]), asked[1])


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        sys.exit(f"train_teacher.py: error: {accelerator.num_processes} processes; it is made for one.")
    set_seed(args.seed)

    # 1. Frames and networks
    try:
        frames, classes = load_frames(args.train_data_dir, args.resolution)
        held_out = load_frames(args.validation_data_dir, args.resolution) if args.validation_data_dir else None
    except (ValueError, OSError) as error:
        sys.exit(f"train_teacher.py: error: {error}")
    config = ViTConfig(
        hidden_size=args.width,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        intermediate_size=4 * args.width,
        image_size=args.resolution,
        patch_size=8,
        attn_implementation="eager",  # on so few tokens faster than fused attention, backward in bfloat16 above all
    )
    untrained = ViTModel(config, add_pooling_layer=False).eval()
    model = SelfDistillation(ViTModel(config, add_pooling_layer=False, use_mask_token=True))
    model.teacher.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.04)
    rise = 0.1 if args.max_train_steps > 10 else 0.0  # OneCycleLR cannot rise within one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.max_train_steps, pct_start=rise, cycle_momentum=False
    )
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    arguments = {name: value for name, value in vars(args).items() if name != "output_dir"}
    try:
        done = resume(accelerator, args.output_dir, arguments)
    except ValueError as error:
        sys.exit(f"train_teacher.py: error: {error}")

    # 2. Self-distillation, on a part of each frame
    side = side_of_parts(args.resolution)
    for step in resumable_steps(
        accelerator, args.output_dir, done, args.max_train_steps, args.checkpointing_steps, arguments
    ):
        generator = torch.Generator().manual_seed(args.seed * 2**32 + step)
        chosen = torch.randint(len(frames), (args.train_batch_size,), generator=generator)
        pixels = as_pixels(frames[chosen])
        views = random_views(pixels, side, (0.4, 1.0), generator).to(accelerator.device)
        is_hidden = hidden_patches(len(views), side // 8, args.hidden_share, generator).to(accelerator.device)
        with accelerator.autocast():
            loss = model(views, is_hidden)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        accelerator.unwrap_model(model).update_teacher(step / args.max_train_steps, args.teacher_momentum)
        if step % 50 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")

    # 3. The teacher, and how well it tells classes apart
    vit = accelerator.unwrap_model(model).teacher.eval().cpu()
    facts: dict[str, Any] = {"arguments": arguments}
    if held_out is not None and any(classes):
        names = sorted({*classes, *held_out[1]})
        known, asked = (
            (
                some[:: -(-len(some) // most)],
                torch.tensor([names.index(name) for name in of])[:: -(-len(some) // most)],
            )
            for (some, of), most in (((frames, classes), 1024), (held_out, 512))  # spread over all
        )
        networks = {"teacher": vit, "untrained": untrained, "pixels": None}
        facts["nearest_neighbour_accuracy"] = {name: accuracy(net, known, asked) for name, net in networks.items()}
        print(facts["nearest_neighbour_accuracy"])
    with replacing_entries(args.output_dir) as folder:
        vit.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(facts, indent=2))
    print(f"Teacher: {args.output_dir}")


if __name__ == "__main__":
    main()
