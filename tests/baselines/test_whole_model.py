"""A folder without all weights is refused, and not loaded with some that were never set."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_endora import (
    LVDMAutoencoder,
    LVDMUNet3DModel,
    MoStGANVGenerator,
    StyleGANVDiscriminator,
    StyleGANVGenerator,
)

CODES = {"z_dim": 8, "w_dim": 8, "motion_z_dim": 8, "motion_code_dim": 8, "num_frequencies": 4, "channel_max": 8}
MODELS = {
    StyleGANVGenerator: {"resolution": 16, **CODES},
    MoStGANVGenerator: {"resolution": 16, "motion_style_dim": 4, **CODES},
    StyleGANVDiscriminator: {"resolution": 32, "channel_max": 8},
    LVDMAutoencoder: {"base_channels": 8, "norm_num_groups": 4},
    LVDMUNet3DModel: {
        "model_channels": 16,
        "channel_multipliers": (1,),
        "attention_stages": (0,),
        "norm_num_groups": 4,
    },
}


@pytest.mark.parametrize("model_class", MODELS)
def test_a_tensor_of_another_model_is_named(tmp_path, model_class):
    model_class(**MODELS[model_class]).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "other.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has tensors beside the parameters of {model_class.__name__}: other.weight"):
        model_class.from_pretrained(tmp_path)


def test_the_generator_of_another_method_is_refused(tmp_path):
    MoStGANVGenerator(**MODELS[MoStGANVGenerator]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has tensors beside the parameters of StyleGANVGenerator: blocks"):
        StyleGANVGenerator.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_missing_weight_is_named(tmp_path, model_class):
    model_class(**MODELS[model_class]).save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, model_class)
    assert not info["missing_keys"]
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 of the parameters of {model_class.__name__}: {name}"):
        model_class.from_pretrained(tmp_path)
