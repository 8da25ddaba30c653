"""Which training recipe gets furthest in the same number of steps: the paper's against its rivals, by held-out FVD.

    python benchmarks/recipe_comparison.py --output_dir outputs/recipes

The demo preset learns rendered colons (64x64, 8 still images a clip, three classes) from cached latents, with the
paper's objective (noise prediction, uniform timesteps, no weighting) and, each a change of that alone, with the others
in `RECIPES`. All share the sequence of clips and noise, the number of steps, AdamW at the preset's constant rate, no
mirroring (instruments come from one side), the moving average with its warm-up (0.9999 from the start would be mostly
initial weights after so few steps), and no prior (no trained DINO comes with this package). Clips are sampled from the
moving average, by 20 steps of DPM-Solver++ (2M) for all alike, and compared with clips of videos that no training saw,
as the small autoencoder gives them back: its blur, which all share, would else be most of the distance. FVD with its
bootstrap over clips, after all steps and after half; `recipes.json` has the distance to the clips themselves, too.

What is there is not computed again, and belongs to one set of sizes; numbers are added to `recipes.json` and
`recipes.md` as they come.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from safetensors.torch import load_file
from tqdm.auto import tqdm

from diffusers_endora import ClipDataset, EndoraPipeline
from diffusers_endora.data.phantom import write_phantom_corpus
from diffusers_endora.data.video_io import read_frames, read_video_info
from diffusers_endora.files import written_atomically
from diffusers_endora.metrics.frechet_distance import bootstrap_frechet_distance, frechet_distance_of_features
from diffusers_endora.metrics.i3d import I3DFeatures
from diffusers_endora.models.autoencoder import load_vae

EXAMPLES = Path(__file__).parents[1] / "examples"
RESOLUTION = 64
NUM_FRAMES = 64  # of a video
RECIPES = {
    "paper's objective": [],
    "min-SNR": ["--loss_weighting", "min_snr"],
    "sigmoid": ["--loss_weighting", "sigmoid"],
    "logit-normal": ["--timestep_density", "logit_normal"],
    "v": ["--prediction_type", "v_prediction"],
    "v, min-SNR": ["--prediction_type", "v_prediction", "--loss_weighting", "min_snr"],
    "v, zero SNR": ["--prediction_type", "v_prediction", "--zero_terminal_snr"],
    "flow": ["--prediction_type", "flow"],
    "flow, logit-normal": ["--prediction_type", "flow", "--timestep_density", "logit_normal"],
}


def fit_vae(videos: list[Path], folder: Path, steps: int) -> None:
    """Fits a small `AutoencoderKL` (8x down, 4 channels) to the frames of the videos and saves it into `folder`."""
    torch.manual_seed(0)
    frames = np.concatenate([read_frames(video, range(read_video_info(video).num_frames)) for video in videos])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)  # uint8 (frames, 3, H, W)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=RESOLUTION,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    progress = tqdm(range(steps), desc="autoencoder")
    for _ in progress:
        batch = pixels[torch.randint(len(pixels), (12,))].float() / 127.5 - 1
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(reconstruction, batch) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(l1=f"{loss.item():.3f}")
    vae.eval()
    with torch.no_grad():
        sample = pixels[torch.randint(len(pixels), (256,))].float() / 127.5 - 1
        latents = torch.cat([vae.encode(chunk).latent_dist.sample() for chunk in sample.split(32)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())  # latents of unit variance, as the model expects
    vae.save_pretrained(folder)


def prepare(work: Path, args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Training videos, held-out videos (of other seeds) and an autoencoder fitted to the former."""
    train, held_out, vae = work / "train", work / "held_out", work / "vae"
    for folder, count, seed in ((train, args.num_videos, 0), (held_out, args.num_held_out, 100_000)):
        if not folder.exists():
            with written_atomically(folder) as temporary:
                write_phantom_corpus(temporary, count, NUM_FRAMES, RESOLUTION, RESOLUTION, seed)
    if not vae.exists():
        with written_atomically(vae) as temporary:
            fit_vae(sorted(train.rglob("*.mp4")), temporary, args.vae_steps)
    return train, held_out, vae


def train(recipe: str, seed: int, work: Path, videos: Path, vae: Path, args: argparse.Namespace) -> Path:
    """The folder of a finished training."""
    output_dir = work / "runs" / f"{re.sub('[^A-Za-z]+', '_', recipe)}-{seed}"
    options = {
        "train_data_dir": videos,
        "pretrained_vae": vae,
        "cache_features": work / "features",
        "output_dir": output_dir,
        "resolution": RESOLUTION,
        "preset": "demo",
        "train_batch_size": args.train_batch_size,
        "max_train_steps": args.steps,
        "checkpointing_steps": args.steps // 2,
        "validation_steps": args.steps,
        "logging_steps": 200,
        "validation_inference_steps": 20,
        "num_validation_clips": 3,
        "seed": seed,
        "dataloader_num_workers": 1,
        "resume_from_checkpoint": "latest",
    }
    command = [sys.executable, str(EXAMPLES / "train_endora.py"), "--prior", "none", "--ema_warmup"]
    command += ["--class_conditional", "--no-horizontal_flip", *RECIPES[recipe]]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    if not (output_dir / "training.json").exists():
        subprocess.run(command, check=True)
    return output_dir


def held_out_features(
    work: Path, folder: Path, vae: Path, args: argparse.Namespace, network: I3DFeatures
) -> tuple[np.ndarray, np.ndarray]:
    """Features of held-out clips, `(clips, rows, 400)`, and of what the autoencoder makes of them."""
    if not (work / "reconstructed.npy").exists():
        per_video = -(-args.num_clips // args.num_held_out)
        options = {"fixed_offsets": True, "clips_per_video": per_video, "horizontal_flip": False}
        dataset = ClipDataset(folder, 16, RESOLUTION, **options)
        clips = torch.stack([dataset[i]["video"] for i in range(args.num_clips)])
        autoencoder = load_vae(vae)
        with torch.no_grad():
            chunks = [autoencoder.decode(autoencoder.encode(clip).latent_dist.mode()).sample for clip in clips]
        for name, pixels in (("real", clips), ("reconstructed", torch.stack(chunks))):
            frames = ((pixels.permute(0, 1, 3, 4, 2).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
            with written_atomically(work / f"{name}.npy") as temporary:
                np.save(temporary, features_of(network, frames))
    return np.load(work / "real.npy"), np.load(work / "reconstructed.npy")


def features_of(network: I3DFeatures, clips: np.ndarray) -> np.ndarray:
    """Of uint8 clips `(N, F, H, W, 3)`, `(N, rows, 400)`."""
    return np.concatenate([network(clips[i : i + 8])["features"] for i in range(0, len(clips), 8)])


def sampled_features(run: Path, step: int, seed: int, args: argparse.Namespace, network: I3DFeatures) -> np.ndarray:
    """Features of clips sampled from the moving average at a step."""
    pipeline = EndoraPipeline.from_pretrained(run)
    pipeline.transformer.load_state_dict(load_file(run / f"checkpoint-{step}" / "ema.safetensors"))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, final_sigmas_type="zero")
    pipeline.set_progress_bar_config(disable=True)
    features = []
    for first in range(0, args.num_clips, 16):
        numbers = range(first, min(first + 16, args.num_clips))
        frames = pipeline(
            class_labels=[number % 3 for number in numbers],
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(10_000 * seed + number) for number in numbers],
            output_type="np",
        ).frames
        features.append(features_of(network, (np.asarray(frames) * 255).round().astype(np.uint8)))
    return np.concatenate(features)


def fvd(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The distance and the standard deviation that the bootstrap over clips gives."""
    flat = (x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
    return {"fvd": frechet_distance_of_features(*flat), "bootstrap_std": bootstrap_frechet_distance(x, y).std}


def write_table(results: dict[str, dict[str, float]], args: argparse.Namespace, path: Path) -> None:
    """One line per recipe: mean over seeds, their standard deviation, the mean bootstrap deviation; then ratios
    to the paper's objective after all steps, seed by seed."""
    half = args.steps // 2
    lines = [
        f"| recipe | seeds | FVD after {half} steps | after {args.steps} | ratio to the paper's objective after "
        f"{args.steps}, seed by seed: after {half} | after {args.steps} |",
        "|---|---|---|---|---|---|",
    ]

    def of(recipe: str, step: int) -> dict[str, dict[str, float]]:
        """Results by seed."""
        keys = [key for key in results if key.startswith(f"{recipe}/") and key.endswith(f"/{step}")]
        return {key.split("/")[1]: results[key] for key in keys}

    paper = of("paper's objective", args.steps)
    for recipe in RECIPES:
        cells, ratios, seeds = [], [], 0
        for step in (half, args.steps):
            of_step = of(recipe, step)
            values = [value["fvd"] for value in of_step.values()]
            spread = f" ± {np.std(values, ddof=1):.0f}" if len(values) > 1 else ""
            bootstrap = f" (bootstrap {np.mean([v['bootstrap_std'] for v in of_step.values()]):.0f})" if values else ""
            cells.append(f"{np.mean(values):.0f}{spread}{bootstrap}" if values else "")
            seeds = max(seeds, len(values))
            ratios.append(", ".join(f"{of_step[s]['fvd'] / paper[s]['fvd']:.2f}" for s in of_step if s in paper))
        if seeds:
            lines.append(f"| {recipe} | {seeds} | {' | '.join(cells)} | {' | '.join(ratios)} |")
    lines.append(
        f"\nHalf of the held-out clips against the other half: {results['floor']['fvd']:.0f} (half as many clips). "
        f"The autoencoder alone, against the clips themselves: {results['reconstructed']['fvd']:.0f}."
    )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/recipes")
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--num_videos", type=int, default=96)
    parser.add_argument("--num_held_out", type=int, default=64)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--num_clips", type=int, default=256, help="a side")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    args = parser.parse_args()
    work = Path(args.output_dir)
    work.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "recipes", "seeds")}
    if (work / "settings.json").exists() and json.loads((work / "settings.json").read_text()) != settings:
        sys.exit(f"{work} has results of other sizes: expected those of its settings.json, or another --output_dir.")
    (work / "settings.json").write_text(json.dumps(settings, indent=1))
    videos, held_out, vae = prepare(work, args)
    network = I3DFeatures()
    real, reconstructed = held_out_features(work, held_out, vae, args, network)
    record = work / "recipes.json"
    results = json.loads(record.read_text()) if record.exists() else {}
    results["floor"] = fvd(reconstructed[::2], reconstructed[1::2])
    results["reconstructed"] = fvd(real, reconstructed)
    for seed in args.seeds:
        for recipe in args.recipes:
            keys = {step: f"{recipe}/{seed}/{step}" for step in (args.steps // 2, args.steps)}
            if all(key in results for key in keys.values()):
                continue
            run = train(recipe, seed, work, videos, vae, args)
            for step, key in keys.items():
                sampled = sampled_features(run, step, seed, args, network)
                results[key] = {**fvd(reconstructed, sampled), "fvd_of_real": fvd(real, sampled)["fvd"]}
                print(f"{key}: {results[key]['fvd']:.1f}")
            with written_atomically(record) as temporary:
                temporary.write_text(json.dumps(results, indent=1))
            write_table(results, args, work / "recipes.md")
    print((work / "recipes.md").read_text())


if __name__ == "__main__":
    main()
