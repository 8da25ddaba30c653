"""The FID Inception against torch-fidelity's: names, shapes, and numbers with the same seeded weights.

`inception_golden.safetensors` holds what torch-fidelity 0.4.0 puts out (outputs "2048" and "logits_unbiased") for
`images` and the weights of `seeded_weights`; `inception_state_dict.json` its names and shapes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from diffusers_endora.metrics.inception import FIDInception, InceptionFeatures, resize_as_tensorflow1

HERE = Path(__file__).parent


def seeded_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights that keep activations of about one size, the same everywhere."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        rng = np.random.default_rng(i)
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shape, np.int64)
        elif name.endswith(("bn.weight", "running_var")):
            values = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif len(shape) == 1:
            values = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        else:
            values = (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
        weights[name] = torch.from_numpy(values)
    return weights


def images() -> np.ndarray:
    """uint8 `(2, 100, 140, 3)`, smooth and noisy."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 100 * 140 * 3).reshape(100, 140, 3)
    return np.stack([ramp, ramp[::-1]]).astype(np.uint8) + rng.integers(0, 50, (2, 100, 140, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    return json.loads((HERE / "inception_state_dict.json").read_text())


@pytest.fixture(scope="module")
def weights_file(shapes, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(seeded_weights(shapes), path)
    return path


def test_names_and_shapes_are_those_of_torch_fidelity(shapes):
    ours = {name: list(tensor.shape) for name, tensor in FIDInception().state_dict().items()}
    assert ours == shapes


def test_numbers_are_those_of_torch_fidelity(weights_file):
    golden = load_file(HERE / "inception_golden.safetensors")
    result = InceptionFeatures(weights_file)(images()[:, None])
    for name in ("features", "logits"):
        expected = golden[name]
        np.testing.assert_allclose(result[name][:, 0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_pth_and_safetensors_are_the_same_and_batches_change_no_bit(weights_file, shapes, tmp_path):
    torch.save(seeded_weights(shapes), tmp_path / "weights.pth")
    clip = images()[None].repeat(5, axis=1)  # 10 frames: a full batch and a part of one
    whole = InceptionFeatures(tmp_path / "weights.pth")(clip)
    extractor = InceptionFeatures(weights_file)
    assert extractor.weights_hash == InceptionFeatures(tmp_path / "weights.pth").weights_hash
    assert whole["features"].shape == (1, 10, 2048)
    assert whole["logits"].shape == (1, 10, 1008)
    for i in (0, 9):
        single = extractor(clip[:, i : i + 1])
        np.testing.assert_array_equal(single["features"][0, 0], whole["features"][0, i])
        np.testing.assert_array_equal(single["logits"][0, 0], whole["logits"][0, i])


def test_resize_samples_at_multiples_of_the_ratio():
    row = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 1, 2, 6)
    got = resize_as_tensorflow1(row, 4)[0, 0, 0]
    torch.testing.assert_close(got, torch.tensor([0.0, 1.5, 3.0, 4.5]))
    up = resize_as_tensorflow1(row[..., :2], 4)[0, 0, 0]  # the last position lies past the last pixel
    torch.testing.assert_close(up, torch.tensor([0.0, 0.5, 1.0, 1.0]))


class Stand(torch.nn.Module):
    """Has the signature of NVIDIA's inception-2015-12-05.pt."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, img, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False):
        mean = img.float().mean(dim=(1, 2, 3))[:, None] * self.weight
        if return_features:
            return mean.expand(-1, 2048)
        assert no_output_bias
        return torch.softmax(mean * torch.linspace(0, 0.1, 1008), dim=1)


def test_torchscript_gets_pixels_from_0_to_255(tmp_path):
    torch.jit.script(Stand()).save(str(tmp_path / "inception-2015-12-05.pt"))
    result = InceptionFeatures(tmp_path / "inception-2015-12-05.pt")(images()[None])
    mean = images().mean(axis=(1, 2, 3))
    np.testing.assert_allclose(result["features"][0, :, 5], mean, rtol=1e-4)
    difference = result["logits"][0, :, -1] - result["logits"][0, :, 0]
    np.testing.assert_allclose(difference, 0.1 * mean, rtol=1e-3)


def test_bad_weights(tmp_path):
    with pytest.raises(ValueError, match=r"FID, KID and the inception score need --inception_weights: torch-fidelity"):
        InceptionFeatures()
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"other.safetensors: does not hold the weights of the FID Inception \(Missing"
    ):
        InceptionFeatures(tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(ValueError, match=r"text.pth: does not hold the weights of the FID Inception"):
        InceptionFeatures(tmp_path / "text.pth")
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(ValueError, match=r"text.pt: is neither a .safetensors file nor TorchScript"):
        InceptionFeatures(tmp_path / "text.pt")
