"""Saves, loads and runs a full-size Endora XL/2 pipeline: seconds and peak resident memory of each part.

    python benchmarks/xl2_folder.py

The weights are random (674 M parameters in the transformer, 84 M in an SD-size VAE): what is measured is the
machinery, not the clip. Every part runs in a process of its own, so that its peak is its own; "less imports" subtracts
what the process holds after `import diffusers_endora`.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel

SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def save(folder: str) -> str:
    transformer = EndoraTransformer3DModel()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)  # zero at initialisation: nothing to decode
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    pipeline = EndoraPipeline(AutoencoderKL(**SD_VAE), transformer, scheduler)
    start = time.perf_counter()
    pipeline.save_pretrained(folder)
    return f"save      {time.perf_counter() - start:6.1f} s"


def load(folder: str) -> str:
    start = time.perf_counter()
    EndoraPipeline.from_pretrained(folder)
    return f"load      {time.perf_counter() - start:6.1f} s"


def generate(folder: str) -> str:
    pipeline = EndoraPipeline.from_pretrained(folder)
    start = time.perf_counter()
    frames = pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").frames
    assert frames.shape == (1, 16, 128, 128, 3)
    return f"generate  {time.perf_counter() - start:6.1f} s (2 steps, 16x128x128)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=["save", "load", "generate"], help="one part only, on --folder")
    parser.add_argument("--folder", help="where the 3 GB pipeline goes; a temporary folder by default")
    args = parser.parse_args()
    if args.part is not None:
        imports = resident_mib()
        line = {"save": save, "load": load, "generate": generate}[args.part](args.folder)
        print(f"{line}; peak {peak_mib():.0f} MiB, {peak_mib() - imports:.0f} MiB less imports", flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        for part in ("save", "load", "generate"):
            subprocess.run([sys.executable, __file__, "--part", part, "--folder", folder], check=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        print(f"weights on disk: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
