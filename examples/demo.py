"""A clip of each class, a contact sheet and a walk through latent space, from the model that comes with the package.

    python examples/demo.py --output_dir outputs/demo

Nothing is downloaded and nothing trained: the model was, by `examples/phantom_model.sh`, on rendered colons.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_endora import EndoraPipeline, bundled_model
from diffusers_endora.data.contact_sheet import save_contact_sheet
from diffusers_endora.data.phantom import CLASSES
from diffusers_endora.data.provenance import hash_of_weights, synthetic_metadata
from diffusers_endora.data.video_io import write_video


def slerp(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """Between two noises along the great circle, on which points have the length of noise; `share` 0 is `a`, 1 `b`."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def noise_of(pipeline: EndoraPipeline, seed: int) -> torch.Tensor:
    """What a clip of the training's size begins as, `(1, C, F, h, w)`."""
    config = pipeline.transformer.config
    shape = (1, config.in_channels, config.num_frames, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--walk_steps", type=int, default=24, help="clips on a closed walk through three noises")
    args = parser.parse_args()
    if args.walk_steps < 1:
        parser.error(f"--walk_steps {args.walk_steps}: expected a positive integer.")
    start = time.perf_counter()
    pipeline = EndoraPipeline.from_pretrained(bundled_model())
    pipeline.set_progress_bar_config(desc="clips")
    metadata = synthetic_metadata("diffusers-endora, bundled model", hash_of_weights(bundled_model()))
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # 1. A clip of each class
    labels = list(range(pipeline.transformer.config.num_classes))
    generators = [torch.Generator().manual_seed(args.seed + label) for label in labels]
    frames = pipeline(class_labels=labels, generator=generators, output_type="np").frames
    clips = (np.asarray(frames) * 255).round().astype(np.uint8)
    for name, clip in zip(sorted(CLASSES), clips, strict=True):
        write_video(args.output_dir / f"{name}.mp4", clip, fps=8, metadata=metadata)
    save_contact_sheet(args.output_dir / "contact_sheet.png", clips)

    # 2. A walk: the middle frames of clips whose noises lie on a closed way
    stations = [noise_of(pipeline, args.seed + 100 + i) for i in range(3)]
    pictures = []
    pipeline.set_progress_bar_config(disable=True)
    for step in tqdm(range(args.walk_steps), desc="walk"):
        leg, share = divmod(step * len(stations) / args.walk_steps, 1)
        noise = slerp(stations[int(leg)], stations[(int(leg) + 1) % len(stations)], share)
        latents = pipeline(latents=noise, class_labels=[sorted(CLASSES).index("polyp")], output_type="latent").frames
        middle = latents.shape[2] // 2
        frame = pipeline.decode_latents(latents[:, :, middle : middle + 1])
        picture = pipeline.video_processor.postprocess_video(frame, output_type="np")[0]
        pictures.append((picture[0] * 255).round().astype(np.uint8))
    write_video(args.output_dir / "walk.mp4", np.stack(pictures), fps=8, metadata=metadata)
    print(f"Done in {time.perf_counter() - start:.0f} seconds.")
    for path in sorted(args.output_dir.iterdir()):
        print(f"  {path}")


if __name__ == "__main__":
    main()
