"""From nothing to a generated clip in minutes on a CPU, without any download: renders, fits, trains, generates.

    python examples/demo.py --output_dir outputs/demo

Every part is the real one, only small: the corpus is rendered (`diffusers_endora.data.phantom`), the VAE is fitted to
its frames here, and the teacher of the DINO prior is a ViT/8 with random, fixed-seed weights. That teacher shows that
the prior runs; it teaches nothing. A real one is `facebook/dino-vits8`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTModel

from diffusers_endora import EndoraPipeline
from diffusers_endora.data.contact_sheet import save_contact_sheet
from diffusers_endora.data.phantom import write_phantom_corpus
from diffusers_endora.data.provenance import hash_of_weights, synthetic_metadata
from diffusers_endora.data.video_io import read_frames, read_video_info, write_video
from diffusers_endora.hub import save_model_card

RESOLUTION = 64
TRAINER = Path(__file__).with_name("train_endora.py")


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


def save_untrained_teacher(folder: Path) -> None:
    """Saves a ViT/8 with random weights of a fixed seed: a stand-in for DINO that has seen nothing."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=12, num_attention_heads=3, intermediate_size=96, image_size=64, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/demo")
    parser.add_argument("--num_videos", type=int, default=3)
    parser.add_argument("--vae_steps", type=int, default=500)
    parser.add_argument("--train_steps", type=int, default=900)
    parser.add_argument("--num_inference_steps", type=int, default=100)
    args = parser.parse_args()
    output_dir = Path(args.output_dir)
    work = output_dir / "work"
    shutil.rmtree(work, ignore_errors=True)
    start = time.perf_counter()

    print("1/4 rendering a phantom corpus")
    videos = write_phantom_corpus(work / "corpus", args.num_videos, num_frames=32, height=RESOLUTION, width=RESOLUTION)
    print("2/4 fitting an autoencoder to its frames")
    fit_vae(videos, work / "vae", args.vae_steps)
    print("3/4 training the demo preset with the prior (teacher: an untrained, fixed-seed ViT/8)")
    save_untrained_teacher(work / "teacher")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    # on a CPU `accelerate launch` gives a process one thread unless told otherwise
    command += ["--num_cpu_threads_per_process", str(torch.get_num_threads()), str(TRAINER), "--preset", "demo"]
    options = {
        "train_data_dir": work / "corpus",
        "pretrained_vae": work / "vae",
        "dino_model": work / "teacher",
        "output_dir": work / "training",
        "resolution": RESOLUTION,
        "train_batch_size": 4,
        "num_still_images": 2,
        "max_train_steps": args.train_steps,
        "checkpointing_steps": args.train_steps,
        "validation_steps": args.train_steps,
        "cache_features": work / "features",
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "dataloader_num_workers": 1,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run([*command, "--class_conditional", "--no-horizontal_flip", "--ema_warmup"], check=True)

    print("4/4 generating a clip of each class with the saved pipeline")
    pipeline_dir = output_dir / "pipeline"
    shutil.rmtree(pipeline_dir, ignore_errors=True)
    EndoraPipeline.from_pretrained(work / "training").save_pretrained(pipeline_dir)
    training = json.loads((work / "training" / "training.json").read_text())
    class_names = sorted(path.name for path in (work / "corpus").iterdir())
    save_model_card(pipeline_dir, training["arguments"], training["results"], class_names)
    pipeline = EndoraPipeline.from_pretrained(pipeline_dir)
    num_classes = pipeline.transformer.config.num_classes
    frames = pipeline(
        class_labels=list(range(num_classes)),
        num_inference_steps=args.num_inference_steps,
        generator=[torch.Generator().manual_seed(label) for label in range(num_classes)],
        output_type="np",
    ).frames
    clips = (np.asarray(frames) * 255).round().astype(np.uint8)
    metadata = synthetic_metadata(str(pipeline_dir), hash_of_weights(pipeline_dir))
    write_video(output_dir / "clip.mp4", clips[0], fps=8, metadata=metadata)
    save_contact_sheet(output_dir / "contact_sheet.png", clips)

    print(f"Done in {(time.perf_counter() - start) / 60:.1f} minutes.")
    for name in ("clip.mp4", "contact_sheet.png", "pipeline"):
        print(f"  {output_dir / name}")


if __name__ == "__main__":
    main()
