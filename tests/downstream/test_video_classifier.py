"""Classifiers of clips: shapes, files, and those of transformers."""

import json

import pytest
import torch
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
)

from diffusers_endora.downstream.semi_supervised.classifier import SmallVideoClassifier, load_classifier

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"image_size": 32, "patch_size": 16}


@pytest.fixture
def clips():
    return torch.rand(2, 4, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_small_classifier_is_saved_as_safetensors(tmp_path, clips):
    torch.manual_seed(0)
    classifier = SmallVideoClassifier(num_classes=3, channels=(8, 16), norm_groups=4).eval()
    assert classifier(clips).shape == (2, 3)
    classifier.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    torch.testing.assert_close(load_classifier(tmp_path, 4, 3)(clips), classifier(clips))
    assert load_classifier(tmp_path, 4)(clips).shape == (2, 2)  # the head for 3 classes is another
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: expected the config of a model, got \[1\]"):
        load_classifier(tmp_path, 4)


def test_small_classifier_sees_the_order_of_frames(clips):
    torch.manual_seed(0)
    classifier = SmallVideoClassifier(channels=(8, 16, 16), norm_groups=4).eval()
    shuffled = clips[:, [2, 0, 3, 1]]
    assert (classifier(shuffled) - classifier(clips)).abs().max() > 1e-4
    assert sum(p.numel() for p in SmallVideoClassifier().parameters()) == 174418


def test_videomae(tmp_path, clips):
    torch.manual_seed(0)
    network = VideoMAEForVideoClassification(VideoMAEConfig(**TINY, num_frames=4, tubelet_size=2, num_labels=7)).eval()
    network.save_pretrained(tmp_path)
    facts = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    classifier = load_classifier(tmp_path, 4).eval()
    assert classifier(clips).shape == (2, 2)  # the head for 7 classes is another
    small = clips[..., :32, :32]
    pixels = ((small + 1) / 2 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.1, 0.2, 0.3])[
        :, None, None
    ]
    torch.testing.assert_close(classifier(small), classifier.network(pixels).logits)
    encoded = classifier.network.videomae.state_dict()
    assert all(torch.equal(encoded[name], tensor) for name, tensor in network.videomae.state_dict().items())
    with pytest.raises(ValueError, match=r"takes clips of 4 frames; add --num_frames 4\."):
        load_classifier(tmp_path, 16)

    classifier.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    torch.testing.assert_close(load_classifier(tmp_path / "saved", 4).eval()(clips), classifier(clips))


def test_timesformer(tmp_path, clips):
    TimesformerForVideoClassification(TimesformerConfig(**TINY, num_frames=4)).save_pretrained(tmp_path)
    assert load_classifier(tmp_path, 4)(clips).shape == (2, 2)


def test_image_classifier_is_averaged_over_frames(tmp_path, clips):
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, num_labels=2)).save_pretrained(tmp_path)
    classifier = load_classifier(tmp_path, 4).eval()
    by_frame = [classifier(clips[:, i : i + 1]) for i in range(4)]
    torch.testing.assert_close(classifier(clips), torch.stack(by_frame).mean(0))


def test_what_is_no_classifier_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"does not load as a video or image classifier .*its model_type is 'gpt2'"):
        load_classifier(tmp_path, 4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match="'resnet' does not say its image_size"):
        load_classifier(tmp_path, 4)
    with pytest.raises(ValueError, match="does not load as a video or image classifier"):
        load_classifier(tmp_path / "nothing", 4)
