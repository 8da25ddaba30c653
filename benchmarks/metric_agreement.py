"""How far each metric is from the implementation that it was checked against, on the same input.

    python benchmarks/metric_agreement.py [--i3d_golden FILE]

Features are random with fixed seeds; networks run with their real weights where there are any (I3D), else with seeded
ones. `--i3d_golden` is a safetensors file with `clip_uint8` and the `logits` of another implementation. The package
prdc is used where it is installed (`pip install --no-deps prdc`).
"""

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEForVideoClassification

from diffusers_endora.metrics.frechet_distance import Moments, frechet_distance
from diffusers_endora.metrics.i3d import I3DFeatures, kinetics_weights, load_i3d, preprocess
from diffusers_endora.metrics.inception import InceptionFeatures
from diffusers_endora.metrics.inception_score import inception_score
from diffusers_endora.metrics.kernel_distance import kernel_distance
from diffusers_endora.metrics.neighbourhood import precision_recall_density_coverage
from diffusers_endora.metrics.vit_features import DinoFeatures, VideoMAEFeatures

TESTS = Path(__file__).parents[1] / "tests" / "metrics"
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def show(name: str, reference: str, difference: str) -> None:
    print(f"| {name} | {reference} | {difference} |")


def largest(ours: np.ndarray, theirs: np.ndarray) -> str:
    return f"{np.abs(ours - theirs).max():.1e} of values up to {np.abs(theirs).max():.3g}"


def compare_i3d(golden_file: Path | None) -> None:
    if golden_file is None:
        show("I3D", "no golden file given", "-")
        return
    golden = load_file(golden_file)
    with torch.inference_mode():
        plain = load_i3d(kinetics_weights()).eval()(preprocess(torch.from_numpy(golden["clip_uint8"][None])))
    folded = I3DFeatures()(golden["clip_uint8"][None])["features"][:, 0]
    show("I3D logits, plain module", golden_file.name, largest(plain.numpy(), golden["logits"]))
    show("I3D logits, as used (folded)", golden_file.name, largest(folded, golden["logits"]))


def compare_inception() -> None:
    sys.path.insert(0, str(TESTS))
    from test_inception import images, seeded_weights

    golden = load_file(TESTS / "inception_golden.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(seeded_weights(json.loads((TESTS / "inception_state_dict.json").read_text())), path)
        found = InceptionFeatures(path)(images()[:, None])
    for name in ("features", "logits"):
        show(f"Inception {name}, seeded weights", "torch-fidelity 0.4.0", largest(found[name][:, 0], golden[name]))


def compare_transformers() -> None:
    """The classifier of `transformers` on our VideoMAE features, and its DINOv2 on pixels prepared by hand."""
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (2, 4, 40, 56, 3), dtype=np.uint8)
    torch.manual_seed(0)
    videomae = VideoMAEForVideoClassification(
        VideoMAEConfig(**SMALL, image_size=224, patch_size=56, num_frames=4, use_mean_pooling=True)
    )
    dino = Dinov2Model(Dinov2Config(**SMALL, image_size=224, patch_size=56))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        videomae.eval().save_pretrained(f"{folder}/videomae")
        dino.eval().save_pretrained(f"{folder}/dino")
        frames = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        pixels = torch.nn.functional.interpolate(frames, (224, 224), mode="bilinear").unflatten(0, (2, 4))
        features = torch.from_numpy(VideoMAEFeatures(f"{folder}/videomae")(clips)["features"][:, 0])
        ours = videomae.classifier(features).numpy()
        show(
            "VideoMAE, logits from our features",
            "transformers, random weights",
            largest(ours, videomae(pixels).logits.numpy()),
        )
        from PIL import Image

        resized = [np.asarray(Image.fromarray(frame).resize((224, 224), 3)) for frame in clips.reshape(-1, 40, 56, 3)]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = dino((pixels - mean[:, None, None]) / std[:, None, None]).last_hidden_state[:, 0].numpy()
        show(
            "DINOv2 [CLS]",
            "transformers, random weights",
            largest(DinoFeatures(f"{folder}/dino")(clips)["features"].reshape(8, -1), expected),
        )


def compare_frechet() -> None:
    for width, num_rows in ((64, 1000), (400, 4000)):
        rng = np.random.default_rng(width)
        x = rng.standard_normal((num_rows, width)) @ rng.standard_normal((width, width))
        y = rng.standard_normal((num_rows, width)) @ rng.standard_normal((width, width)) + 0.5
        first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        difference = x.mean(0) - y.mean(0)
        expected = difference @ difference + np.trace(first + second - 2 * sqrtm(first @ second).real)
        found = frechet_distance(Moments.of(x), Moments.of(y))
        show(f"Frechet distance, width {width}", "scipy.linalg.sqrtm", f"{abs(found / expected - 1):.1e} relative")


def compare_distances() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((500, 64)), rng.standard_normal((500, 64)) * 1.1 + 0.2
    kid = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=500)
    kid.update(torch.from_numpy(x), real=True)
    kid.update(torch.from_numpy(y), real=False)
    whole = float(kid.compute()[0])  # one subset of all
    ours = kernel_distance(x, y, num_subsets=2000, subset_size=250)
    error = ours.std / np.sqrt(ours.num_subsets)
    show(
        "KID, 2000 subsets of half the rows",
        "torchmetrics, all rows",
        f"{abs(ours.mean - whole) / error:.1f} standard errors ({ours.mean:.5f}, {whole:.5f})",
    )
    logits = 3 * rng.standard_normal((400, 50))
    score = InceptionScore(feature=torch.nn.Identity(), splits=1)
    score.update(torch.from_numpy(logits))
    found, expected = inception_score(logits, num_splits=1).mean, float(score.compute()[0])
    show("Inception score, 1 split", "torchmetrics", f"{abs(found / expected - 1):.1e} relative")
    try:
        from prdc import compute_prdc
    except ImportError:
        show("precision, recall, density, coverage", "prdc is not installed", "-")
        return
    manifold = precision_recall_density_coverage(x, y)
    with contextlib.redirect_stdout(None):
        few, many = (compute_prdc(x, y, nearest_k=k) for k in (3, 5))
    differences = [
        abs(getattr(manifold, name) - of[name])
        for of, names in ((few, ("precision", "recall")), (many, ("density", "coverage")))
        for name in names
    ]
    show("precision, recall (k = 3), density, coverage (k = 5)", "prdc 0.2", f"{max(differences):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--i3d_golden", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    print("| what | reference | difference |\n|---|---|---|")
    compare_i3d(args.i3d_golden)
    compare_inception()
    compare_transformers()
    compare_frechet()
    compare_distances()


if __name__ == "__main__":
    main()
