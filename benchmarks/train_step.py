"""Time of a training step: the official recipe against features that were computed once and fused updates.

    python benchmarks/train_step.py

Both train one Endora XL/2 by its joint loss with the official prior: one clip of 16 frames and 8 still images of
128x128, in float32. The official recipe (`train.py` of https://github.com/CUHK-AIM-Group/Endora) puts every frame
through the VAE and through DINO in every step, updates by PyTorch's default AdamW (for each tensor in turn on a CPU,
many at a time on a GPU), takes the gradient's norm and averages the weights tensor by tensor. Ours is
`Trainer.fit` itself, with `--cache_features`. Sides differ in nothing else: transformer, gradients, Adam's moments and
the moving average are the same tensors, clips, noise and timesteps those of the same place in the training. The
official side is spared what this package has no counterpart of: DDP, and decoding a whole file for each clip.

The two alternate in one process, and ratios are taken pair by pair, so that a drifting machine cancels out. Both read
their data in the training process, and the files of the cache have been written just before. VAE (of Stable
Diffusion's size) and DINO (ViT-S/8) have random weights. Before anything is trained, both losses are computed for the
same weights, and the script fails where they differ by more than 1e-4.

Memory: 18 GB with full depth. `--pairs N` measures N of the 14 (spatial, temporal) pairs of blocks and multiplies what
is proportional to the depth; what it prints is then an extrapolation, and says so.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import AutoencoderKL
from transformers import ViTConfig, ViTModel

from diffusers_endora.data.phantom import write_phantom_corpus
from diffusers_endora.models.autoencoder import load_vae, load_vae_config
from diffusers_endora.training.adapter import ATTENTION_PROJECTIONS, put_adapter_into
from diffusers_endora.training.arguments import add_model, new_parser, parse_arguments
from diffusers_endora.training.dino_prior import DinoPrior
from diffusers_endora.training.latents import encode_frames
from diffusers_endora.training.objective import make_scheduler
from diffusers_endora.training.presets import TRANSFORMERS
from diffusers_endora.training.setup import build_prior, build_transformer, load_clips, open_caches
from diffusers_endora.training.trainer import Trainer, resident_memory
from diffusers_endora.training.training_clips import TrainingClips
from diffusers_endora.training.training_model import Losses, TrainingModel

TrainerT = TypeVar("TrainerT", bound=Trainer)

LARGEST_DIFFERENCE = 1e-4  # of the losses, relative
PARTS = ("data", "VAE", "DINO", "forward and backward", "gradient norm", "update", "EMA")
PER_PAIR = ("forward and backward",)  # proportional to the number of pairs
PER_PARAMETER = ("gradient norm", "update", "EMA")

# Stable Diffusion's autoencoder and DINO ViT-S/8, and small ones to try the script with
VAES: dict[str, dict[str, Any]] = {
    "full": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    "small": {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8},
}
TEACHERS: dict[str, dict[str, int]] = {
    "full": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 224},
    "small": {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64},
}


# --- what both sides train with --------------------------------------------------------------------------------------


def write_inputs(folder: Path, resolution: int, networks: str) -> list[str]:
    """A rendered corpus and networks with random weights; returns the flags of a training with them.

    Args:
        networks: "full" or "small".
    """
    torch.manual_seed(0)
    write_phantom_corpus(folder / "corpus", 2, num_frames=16, height=resolution, width=resolution)
    vae = AutoencoderKL(
        **VAES[networks],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= 12  # the posterior is as narrow as a trained one's, and latents are not all noise
    mean, _ = encode_frames(vae, torch.rand(1, 3, resolution, resolution) * 2 - 1)
    vae.register_to_config(scaling_factor=1 / mean.std().item())
    vae.save_pretrained(folder / "vae")
    teacher = ViTConfig(**TEACHERS[networks], num_hidden_layers=12, patch_size=8, layer_norm_eps=1e-6)
    ViTModel(teacher, add_pooling_layer=False).save_pretrained(folder / "teacher")
    flags = {
        "train_data_dir": folder / "corpus",
        "pretrained_vae": folder / "vae",
        "dino_model": folder / "teacher",
        "cache_features": folder / "features",
        "output_dir": folder / "training",
        "resolution": resolution,
        "train_batch_size": 1,
        "dataloader_num_workers": 0,
        "cache_frames_gb": 0,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def make_trainer(kind: type[TrainerT], flags: list[str]) -> TrainerT:
    """The trainer that `examples/train_endora.py` makes of flags, its weights random where they begin at zero.

    `--rank N` among the flags: that of `examples/train_endora_lora.py`.
    """
    parser = new_parser("as examples/train_endora.py")
    add_model(parser)
    parser.add_argument("--rank", type=int)
    args = parse_arguments(parser, flags)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    scheduler = make_scheduler(args.prediction_type, args.zero_terminal_snr)
    vae_config = load_vae_config(args.pretrained_vae)
    dataset, _ = load_clips(args)
    torch.manual_seed(args.seed)
    transformer = build_transformer(args, vae_config, scheduler, None)
    for parameter in transformer.parameters():  # a new model predicts zero whatever it is shown
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    if args.rank is not None:
        args.lora_alpha, args.lora_dropout, args.lora_targets = args.rank, 0.0, ATTENTION_PROJECTIONS
        put_adapter_into(transformer, args)
    prior = build_prior(args, transformer)
    caches = open_caches(args, [dataset], vae_config, prior, accelerator)
    model = TrainingModel(transformer, scheduler, prior, args.prior_weight, args.num_still_images)
    return kind(args, accelerator, model, vae_config, dataset, caches[0])


class Laps:
    """Seconds of the parts of a step, which follow each other without a gap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def end(self, part: str) -> None:
        """What has passed since the last call was spent on this part; what the device has yet to do belongs to it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        """The parts so far; the next ones begin now."""
        taken, self.seconds = self.seconds, defaultdict(float)
        self.last = time.perf_counter()
        return taken

    def around(self, function: Callable[..., Any], before: str, part: str) -> Callable[..., Any]:
        """`function`, ending the part `before` it and then its own."""

        def timed(*args: Any) -> Any:
            self.end(before)
            result = function(*args)
            self.end(part)
            return result

        return timed


# --- the two sides ---------------------------------------------------------------------------------------------------


class CachedStep(Trainer):
    """The trainer as it is; each of its steps is followed by one of the official recipe."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert self.ema is not None
        self.laps = Laps(self.accelerator.device)
        self.optimizer.step = self.laps.around(self.optimizer.step, "gradient norm", "update")
        self.ema.step = self.laps.around(self.ema.step, "update", "EMA")  # type: ignore[method-assign]
        self.official = OfficialRecipe(self)
        self.rounds: list[tuple[dict[str, float], dict[str, float]]] = []  # official, ours

    def fit(self) -> None:
        self.laps.take()
        super().fit()

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        inputs = super().inputs(batch)
        self.laps.end("data")
        return inputs

    def _update(self, losses: Losses) -> None:
        self.laps.end("forward and backward")
        super()._update(losses)

    def _report(self, progress: Any) -> None:
        self.laps.end("EMA")  # and what little follows it
        ours = self.laps.take()
        self.official.step(self.step - 1)
        self.rounds.append((self.laps.take(), ours))


class OfficialRecipe:
    """The official loop's step, on a trainer's model, Adam moments and moving average."""

    def __init__(self, trainer: CachedStep) -> None:
        self.trainer, self.laps = trainer, trainer.laps
        self.device = trainer.accelerator.device
        clips = trainer.clips
        self.clips = TrainingClips(clips.dataset, clips.latent_shape, clips.seed, clips.stop)
        self.vae = load_vae(trainer.args.pretrained_vae).requires_grad_(False).to(self.device)
        self.teacher = DinoPrior.from_pretrained(trainer.args.dino_model).to(self.device)
        self.parameters = list(trainer.unwrapped.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0)

    def inputs(self, position: int) -> dict[str, Any]:
        """The arguments of the model's forward, made of pixels."""
        trainer = self.trainer
        batch = {name: value[None].to(self.device) for name, value in self.clips[position].items()}
        self.laps.end("data")
        mean, log_variance = encode_frames(self.vae, batch["video"][0])
        batch |= {"latent_mean": mean[None], "latent_log_variance": log_variance[None]}  # type: ignore[index]
        self.laps.end("VAE")
        tokens = self.teacher.extract(batch["video"])
        self.laps.end("DINO")
        inputs = Trainer.inputs(trainer, batch | {"tokens": torch.stack(tokens, 2)})  # samples latents and timesteps
        self.laps.end("data")
        return inputs

    def step(self, position: int) -> None:
        if not self.optimizer.state:
            self.share_moments()
        inputs = self.inputs(position)

        loss = self.trainer.model(**inputs).total
        loss.backward()
        self.laps.end("forward and backward")

        norms = [torch.norm(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        torch.norm(torch.stack(norms))
        self.laps.end("gradient norm")

        self.optimizer.step()
        self.optimizer.zero_grad()
        self.laps.end("update")

        ema = self.trainer.ema
        assert ema is not None
        with torch.no_grad():
            for average, parameter in zip(ema.average, self.trainer.averaged(), strict=True):
                average.mul_(ema.decay).add_(parameter.data, alpha=1 - ema.decay)
        loss.item()  # for its log
        self.laps.end("EMA")

    def share_moments(self) -> None:
        """Gives the optimiser the moments of the trainer's, which has taken a step; each counts its own steps."""
        state = self.trainer.optimizer.state
        for parameter in self.parameters:
            moments = {name: state[parameter][name] for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}


@torch.no_grad()
def difference_of_losses(trainer: CachedStep, num_clips: int) -> float:
    """Prints by how much the losses of the two sides differ; returns the largest difference over the total."""
    weight = trainer.unwrapped.prior_weight
    differences = []
    for position in range(num_clips):
        batch = {name: value[None].to(trainer.accelerator.device) for name, value in trainer.clips[position].items()}
        ours = trainer.model(**trainer.inputs(batch))
        official = trainer.model(**trainer.official.inputs(position))
        diffusion, diffusion_of_ours = ((losses.mse + losses.vb).mean().item() for losses in (official, ours))
        prior, prior_of_ours = official.prior.item(), ours.prior.item()
        of_diffusion, of_prior = abs(diffusion_of_ours - diffusion), abs(prior_of_ours - prior)
        both = of_diffusion + weight * of_prior  # so that they cannot cancel
        differences.append((of_diffusion / diffusion, of_prior / prior, both / official.total.item()))
    worst = [max(column) for column in zip(*differences, strict=True)]
    print(
        f"losses by features of the cache and by fresh ones, largest relative difference of {num_clips} clips: "
        f"mse + vb {worst[0]:.1e}, prior {worst[1]:.1e}, both over the total {worst[2]:.1e} (the last clip's: "
        f"mse + vb {diffusion:.4f}, prior {prior:.4f})",
        flush=True,
    )
    return worst[2]


# --- results ---------------------------------------------------------------------------------------------------------


def num_parameters(preset: str, trainer: Trainer) -> int:
    """Of the model at the preset's full depth."""
    config = {**trainer.config, "num_layers": TRANSFORMERS[preset]["num_layers"]}
    with init_empty_weights():
        transformer = type(trainer.unwrapped.transformer).from_config(config)
    prior = trainer.unwrapped.prior
    assert prior is not None
    return sum(value.numel() for module in (transformer, prior) for value in module.parameters())


def print_results(trainer: CachedStep, preset: str) -> None:
    depth, pairs = TRANSFORMERS[preset]["num_layers"], trainer.config.num_layers
    measured = sum(value.numel() for value in trainer.unwrapped.parameters())
    full = num_parameters(preset, trainer)
    factors = dict.fromkeys(PARTS, 1.0)
    factors |= dict.fromkeys(PER_PAIR, depth / pairs) | dict.fromkeys(PER_PARAMETER, full / measured)
    rounds = [
        [{part: factors[part] * side.get(part, 0.0) for part in PARTS} for side in both] for both in trainer.rounds[1:]
    ]
    device = trainer.accelerator.device
    args = trainer.args
    extrapolated = f"EXTRAPOLATED from {pairs} to {depth} pairs: " if pairs != depth else ""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, on {device.type}; {preset}, {2 * depth} "
        f"blocks, {full / 1e6:.1f} M trained parameters, float32; 1 clip of {args.num_frames} frames and "
        f"{args.num_still_images} still images of {args.resolution}x{args.resolution}"
        f"{', gradient checkpointing on both sides' if args.gradient_checkpointing else ''}"
    )
    print(
        f"official update: AdamW's {'loop over tensors' if device.type == 'cpu' else 'foreach'}, EMA by "
        "mul_().add_() for each tensor; ours: fused AdamW, EMA by one foreach lerp"
    )
    print(f"{extrapolated}seconds, median (min to max) of {len(rounds)} pairs")
    print(f"{'':22s} {'official recipe':>24s} {'ours':>24s}")
    for part in PARTS:
        cells = [spread([both[side][part] for both in rounds]) for side in (0, 1)]
        mark = " *" if extrapolated and factors[part] != 1 else ""
        print(f"{part + mark:22s} {cells[0]:>24s} {cells[1]:>24s}")
    steps = [[sum(side.values()) for side in both] for both in rounds]
    print(f"{'step':22s} {spread([step[0] for step in steps]):>24s} {spread([step[1] for step in steps]):>24s}")
    if extrapolated:
        print("* measured times multiplied: by pairs, or by parameters")
    print(f"{extrapolated}ratio, pair by pair {spread([official / ours for official, ours in steps])}")
    print(f"peak resident memory {resident_memory() / 1e9:.1f} GB", end="")
    print(f", of the GPU {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else "")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=list(TRANSFORMERS), default="xl-2", help="demo: with small VAE and DINO")
    parser.add_argument("--pairs", type=int, help="pairs of blocks that are measured; by default all of the preset's")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of (ours, official), after one to warm up")
    parser.add_argument("--compared_clips", type=int, default=3, help="clips that both losses are computed of")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on both sides")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        flags = write_inputs(Path(temporary), args.resolution, "small" if args.preset == "demo" else "full")
        flags += ["--preset", args.preset, "--max_train_steps", str(1 + args.rounds)]
        flags += ["--num_layers", str(args.pairs)] * (args.pairs is not None)
        flags += ["--gradient_checkpointing"] * args.gradient_checkpointing
        trainer = make_trainer(CachedStep, flags)
        difference = difference_of_losses(trainer, args.compared_clips)
        if not difference < LARGEST_DIFFERENCE:
            sys.exit(f"the losses differ by {difference:.1e} of the total: expected less than {LARGEST_DIFFERENCE:g}.")
        trainer.fit()
        print_results(trainer, args.preset)


if __name__ == "__main__":
    main()
