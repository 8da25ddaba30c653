"""VideoMAE and DINO features: exact preprocessing, the right tokens, nothing without weights."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("scipy")

from transformers import (
    Dinov2Config,
    Dinov2Model,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
)

from diffusers_endora.metrics.evaluation import load_extractors
from diffusers_endora.metrics.vit_features import DinoFeatures, VideoMAEFeatures

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def clips(num_clips: int = 2, num_frames: int = 4, height: int = 40, width: int = 56) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (num_clips, num_frames, height, width, 3), dtype=np.uint8)


def save_videomae(path, model_class, use_mean_pooling: bool):
    torch.manual_seed(0)
    config = VideoMAEConfig(
        **SMALL, image_size=224, patch_size=56, num_frames=4, tubelet_size=2, use_mean_pooling=use_mean_pooling
    )
    model = model_class(config).eval()
    model.save_pretrained(path)
    return model


def pixels_for_videomae(of: np.ndarray) -> torch.Tensor:
    """Reference: 224x224 bilinear at half-pixel centres, values in [0, 1]; `(B, F, 3, 224, 224)`."""
    frames = torch.from_numpy(of).flatten(0, 1).permute(0, 3, 1, 2).double() / 255
    return torch.nn.functional.interpolate(frames, (224, 224), mode="bilinear").unflatten(0, of.shape[:2]).float()


def test_videomae_features_are_what_the_classifier_sees(tmp_path):
    model = save_videomae(tmp_path, VideoMAEForVideoClassification, use_mean_pooling=True)
    features = VideoMAEFeatures(tmp_path)(clips())["features"]
    assert features.shape == (2, 1, 24)
    with torch.no_grad():
        logits = model(pixels_for_videomae(clips())).logits
        ours = model.classifier(torch.from_numpy(features[:, 0]))
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)


def test_videomae_without_a_classifier_gives_the_mean_token(tmp_path):
    model = save_videomae(tmp_path, VideoMAEModel, use_mean_pooling=False)
    features = VideoMAEFeatures(tmp_path)(clips())["features"][:, 0]
    with torch.no_grad():
        expected = model(pixels_for_videomae(clips())).last_hidden_state.mean(1)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)


def test_videomae_takes_its_own_number_of_frames(tmp_path):
    save_videomae(tmp_path, VideoMAEModel, use_mean_pooling=False)
    extractor = VideoMAEFeatures(tmp_path)
    with pytest.raises(ValueError, match="at least 4 frames"):
        extractor(clips(num_frames=3))
    with pytest.raises(ValueError, match="takes exactly 4"):
        extractor(clips(num_frames=5))


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_features_are_the_cls_token(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "dino":
        model = ViTModel(ViTConfig(**SMALL, image_size=224, patch_size=56), add_pooling_layer=False).eval()
    else:
        model = Dinov2Model(Dinov2Config(**SMALL, image_size=56 * 5, patch_size=56)).eval()  # positions interpolated
    model.save_pretrained(tmp_path)
    features = DinoFeatures(tmp_path)(clips())["features"]
    assert features.shape == (2, 4, 24)

    resized = [Image.fromarray(frame).resize((224, 224), Image.BICUBIC) for frame in clips().reshape(-1, 40, 56, 3)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(features.reshape(8, 24), expected.numpy(), atol=1e-5)


def test_dino_positions_of_another_size_are_interpolated(tmp_path):
    ViTModel(ViTConfig(**SMALL, image_size=112, patch_size=56), add_pooling_layer=False).save_pretrained(tmp_path)
    assert DinoFeatures(tmp_path)(clips())["features"].shape == (2, 4, 24)


def test_features_do_not_depend_on_the_batch(tmp_path):
    Dinov2Model(Dinov2Config(**SMALL, image_size=224, patch_size=56)).save_pretrained(tmp_path)
    extractor = DinoFeatures(tmp_path)
    together = extractor(clips(3))["features"]
    np.testing.assert_array_equal(together[2:], extractor(clips(3)[2:])["features"])


@pytest.mark.parametrize(("metric", "option"), [("cd_fvd", "--videomae_model"), ("fdd", "--dino_model")])
def test_no_weights_no_number(metric, option):
    with pytest.raises(ValueError, match=option):
        load_extractors([metric])


def test_other_models_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="does not load as a VideoMAE") as error:
        VideoMAEFeatures(tmp_path)
    assert "\n" not in str(error.value)
    ViTModel(ViTConfig(**SMALL, image_size=224, patch_size=56), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='model_type is "vit"'):
        VideoMAEFeatures(tmp_path)


def test_weights_that_lack_something_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    ViTModel(ViTConfig(**SMALL, image_size=224, patch_size=56), add_pooling_layer=False).save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    del state_dict["layernorm.weight"]
    save_file(state_dict, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack layernorm"):
        DinoFeatures(tmp_path)
