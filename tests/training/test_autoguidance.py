"""Guidance by a weaker model as a part of the target."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from safetensors.torch import save_file

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.training.autoguidance import Autoguidance, load_transformer_like
from diffusers_endora.training.diffusion_loss import diffusion_loss
from diffusers_endora.training.objective import make_scheduler
from diffusers_endora.training.training_model import TrainingModel


def make_transformer(seed, **changes):
    torch.manual_seed(seed)
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4, "num_frames": 2}
    transformer = EndoraTransformer3DModel(
        **settings | {"in_channels": 4, "out_channels": 4, "num_classes": 2} | changes
    )
    for parameter in transformer.parameters():  # the last layers are zeros at first
        torch.nn.init.normal_(parameter, std=0.1)
    return transformer.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 3, 4, 4, generator=generator) for _ in range(2))
    return {
        "latents": latents,
        "noise": noise,
        "timesteps": torch.tensor([200.0, 700.0]),
        "class_labels": torch.tensor([[0, 1], [2, 2]]),
        "num_still_images": 1,
    }


def test_a_model_that_predicts_what_guidance_gives_has_the_error_of_the_stronger(inputs):
    strong, weak = make_transformer(0), make_transformer(1)

    class Guided(torch.nn.Module):
        def forward(self, *args, **kwargs):
            output, weaker = strong(*args, **kwargs), weak(*args, **kwargs)
            output.sample = weaker.sample + 3 * (output.sample - weaker.sample)
            return output

    scheduler = make_scheduler("flow")
    with torch.no_grad():
        expected = diffusion_loss(strong, scheduler=scheduler, **inputs).mse
        guidance = Autoguidance(strong, weak, scale=3)
        found = diffusion_loss(Guided(), scheduler=scheduler, **inputs, guidance=guidance).mse
        unguided = diffusion_loss(Guided(), scheduler=scheduler, **inputs).mse
    torch.testing.assert_close(found, expected)
    assert (unguided - expected).abs().min() > 1e-3


def test_the_guides_stay_as_they_were_and_are_no_part_of_the_model(inputs):
    strong, weak = make_transformer(0), make_transformer(1)
    model = TrainingModel(strong, make_scheduler("flow"), num_still_images=1, guidance=Autoguidance(strong, weak, 2.0))
    assert len(list(model.parameters())) == len(list(strong.parameters()))
    before = [value.clone() for value in strong.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**{name: value for name, value in inputs.items() if name != "num_still_images"}).total.backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, strong.parameters(), strict=True))
    for first, kept in zip(before, model.guidance.strong.parameters(), strict=True):
        assert torch.equal(first, kept)
        assert kept.grad is None


def save_pipeline(folder, transformer, scheduler=None):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    EndoraPipeline(vae, transformer, scheduler or make_scheduler("flow")).save_pretrained(folder)


def test_loads_from_pipelines_and_checkpoints(tmp_path):
    own, other = make_transformer(0), make_transformer(1)
    save_pipeline(tmp_path / "pipeline", other)
    (tmp_path / "checkpoint-1").mkdir()
    save_file(other.state_dict(), tmp_path / "checkpoint-1" / "ema.safetensors")
    for name in ("pipeline", "checkpoint-1"):
        loaded = load_transformer_like(own, "flow_prediction", str(tmp_path / name))
        for key, value in other.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


def test_refuses_another_model_in_a_sentence(tmp_path):
    own, other = make_transformer(0), make_transformer(1, num_layers=2)
    save_pipeline(tmp_path / "pipeline", other)
    with pytest.raises(ValueError, match="its num_layers is 2, that of this training 1"):
        load_transformer_like(own, "flow_prediction", str(tmp_path / "pipeline"))
    save_pipeline(tmp_path / "noise", own, DDPMScheduler())
    with pytest.raises(ValueError, match="its prediction_type is epsilon, that of this training flow_prediction"):
        load_transformer_like(own, "flow_prediction", str(tmp_path / "noise"))
    (tmp_path / "checkpoint-1").mkdir()
    save_file(other.state_dict(), tmp_path / "checkpoint-1" / "ema.safetensors")
    for name in ("checkpoint-1", "nothing"):
        with pytest.raises(ValueError, match="no transformer like that of this training"):
            load_transformer_like(own, "flow_prediction", str(tmp_path / name))
