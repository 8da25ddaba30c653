"""Trains a small monocular depth model on rendered colons, whose depth is known.

    python examples/train_depth_model.py --output_dir outputs/phantom_depth

The model is transformers' GLPN (Kim et al. 2022, https://arxiv.org/abs/2201.07436) with few channels, trained from
nothing with the scale-invariant logarithmic loss (Eigen et al. 2014, https://arxiv.org/abs/1406.2283, eq. 4, with
lambda 0.5). It knows rendered colons and nothing else. Colons of the training split are rendered for training, those
of the test split for the numbers in `training.json`.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DPTImageProcessorPil, GLPNConfig, GLPNForDepthEstimation

from diffusers_endora.data.corpora.phantom import split_of_seed
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.downstream.reconstruction.monocular_depth import MonocularDepth
from diffusers_endora.downstream.reconstruction.reconstruct import mean_and_std
from diffusers_endora.downstream.reconstruction.scores import depth_scores
from diffusers_endora.files import replacing_entries, written_atomically

LEAST_STEPS = 20  # so that the rate can rise and fall
FARTHEST = 150  # mm: what the model's last sigmoid is scaled to
SECONDS_BETWEEN_FRAMES = 1.5  # of flight: frames of a colon that differ


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--frames", type=Path, help="npz file that keeps the rendered frames, or has them already")
    parser.add_argument("--num_colons", type=int, default=300, help="of the training split")
    parser.add_argument("--num_test_colons", type=int, default=30)
    parser.add_argument("--frames_per_colon", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="side of the square frames, a multiple of 32")
    parser.add_argument("--max_train_steps", type=int, default=1200)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("num_colons", "num_test_colons", "frames_per_colon", "max_train_steps", "train_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive integer.")
    if args.max_train_steps < LEAST_STEPS:
        parser.error(f"--max_train_steps {args.max_train_steps}: expected {LEAST_STEPS} or more.")
    if args.frames is not None and (args.frames.suffix != ".npz" or not args.frames.absolute().parent.is_dir()):
        parser.error(f"--frames {args.frames}: expected a name that ends in .npz, in a folder that is there.")
    if args.size < 32 or args.size % 32:
        parser.error(f"--size {args.size}: expected a multiple of 32 pixels.")
    return args


def render_split(split: str, num_colons: int, frames_per_colon: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames, uint8 `(N, H, W, 3)`, and their depth in mm, float32 `(N, H, W)`, of the first colons of a split."""
    seeds = itertools.islice((seed for seed in itertools.count() if split_of_seed(seed) == split), num_colons)
    clips = [
        render_phantom_clip(seed, frames_per_colon, size, size, fps=1 / SECONDS_BETWEEN_FRAMES)
        for seed in tqdm(seeds, desc=f"{split} colons", total=num_colons, mininterval=10)
    ]
    return np.concatenate([clip.frames for clip in clips]), np.concatenate([clip.depth for clip in clips])


def rendered(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The frames and depths of both splits, from `--frames` where it is there."""
    if args.frames is not None and args.frames.is_file():
        try:
            with np.load(args.frames) as file:
                arrays = dict(file)
            shapes = [arrays[f"{split}_frames"].shape for split in ("train", "test")]
        except (BadZipFile, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"--frames {args.frames}: holds no rendered frames ({error})") from error
        expected = [
            (count * args.frames_per_colon, args.size, args.size, 3)
            for count in (args.num_colons, args.num_test_colons)
        ]
        if shapes != expected:
            raise ValueError(f"--frames {args.frames}: holds frames {shapes}, and the flags ask for {expected}")
        return arrays
    arrays = {}
    for split, count in (("train", args.num_colons), ("test", args.num_test_colons)):
        arrays[f"{split}_frames"], arrays[f"{split}_depth"] = render_split(
            split, count, args.frames_per_colon, args.size
        )
    if args.frames is not None:
        with written_atomically(args.frames) as temporary:
            np.savez(temporary, **arrays)
    return arrays


def draw_batch(
    frames: torch.Tensor, depth: torch.Tensor, batch_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames `(B, 3, H, W)` in [-1, 1] with gains of their own and their depth, all turned and mirrored alike."""
    chosen = torch.randint(len(frames), (batch_size,), generator=generator)
    turns = int(torch.randint(4, (1,), generator=generator))
    is_flipped = torch.rand(1, generator=generator) < 0.5
    pixels, target = frames[chosen].permute(0, 3, 1, 2).float() / 255, depth[chosen]
    pixels, target = torch.rot90(pixels, turns, (-2, -1)), torch.rot90(target, turns, (-2, -1))
    if is_flipped:
        pixels, target = pixels.flip(-1), target.flip(-1)
    gains = 1 + 0.1 * torch.randn(batch_size, 3, 1, 1, generator=generator)
    return (pixels * gains).clamp(0, 1) * 2 - 1, target


def scale_invariant_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Root of the mean square less half of the squared mean of the logarithms' difference, per frame, averaged."""
    difference = predicted.clamp(min=1e-3).log() - target.log()
    return (difference.square().mean((1, 2)) - 0.5 * difference.mean((1, 2)).square()).clamp(min=1e-8).sqrt().mean()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    # 1. Frames and network
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        arrays = rendered(args)
        seconds_rendering = time.monotonic() - start
    except (ValueError, OSError) as error:
        sys.exit(f"train_depth_model.py: error: {error}")
    frames, depth = (torch.from_numpy(arrays[f"train_{name}"]) for name in ("frames", "depth"))
    model = GLPNForDepthEstimation(
        GLPNConfig(
            depths=[2, 2, 2, 2],
            hidden_sizes=[16, 32, 64, 128],
            num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=32,
            drop_path_rate=0.0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_depth=FARTHEST,
        )
    )

    # 2. Training
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.max_train_steps, pct_start=0.1
    )
    progress = tqdm(range(args.max_train_steps), desc="steps", mininterval=10)
    start = time.monotonic()
    for _ in progress:
        pixels, target = draw_batch(frames, depth, args.train_batch_size, generator)
        loss = scale_invariant_loss(model(pixels).predicted_depth, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    seconds = time.monotonic() - start

    # 3. Held-out colons
    processor = DPTImageProcessorPil(
        size={"height": args.size, "width": args.size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    estimator = MonocularDepth(model.eval(), processor, is_inverse=False)
    predicted = estimator.predict(arrays["test_frames"])
    scores = {
        alignment: [
            depth_scores(one, truth, alignment) for one, truth in zip(predicted, arrays["test_depth"], strict=True)
        ]
        for alignment in ("none", "median")
    }
    held_out = {
        f"{name}, alignment {alignment}": mean_and_std([score[name] for score in values])
        for alignment, values in scores.items()
        for name in values[0]
    }
    facts = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "num_train_frames": len(frames),
        "num_test_frames": len(predicted),
        "seconds": {"rendering": seconds_rendering, "training": seconds},
        "held_out": held_out,
    }
    with replacing_entries(args.output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"{args.output_dir}: {json.dumps(held_out, indent=2)}")


if __name__ == "__main__":
    main()
