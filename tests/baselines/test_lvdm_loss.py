"""LVDM's objectives against computations by hand."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from diffusers_endora.baselines.lvdm.autoencoder_lvdm import LVDMAutoencoder, LVDMLatentDistribution
from diffusers_endora.baselines.lvdm.lvdm_loss import (
    VGG16_STAGES,
    LVDMAutoencoderLoss,
    PerceptualDistance,
    VideoPatchDiscriminator,
    adaptive_weight,
    denoising_loss,
    draw_given_mask,
    hinge_discriminator_loss,
    latent_scale_and_shift,
    load_lpips,
    make_lvdm_scheduler,
)

CLIP, RECONSTRUCTION = torch.rand(2, 2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Recorder(nn.Module):
    """A denoiser that keeps what it is given and always predicts 0.5."""

    def forward(self, hidden_states, **arguments):
        self.inputs = {"hidden_states": hidden_states, **arguments}
        return SimpleNamespace(sample=torch.full_like(hidden_states, 0.5))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the noise schedule


def test_betas_are_the_squares_of_a_line_of_roots():
    roots = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64)
    torch.testing.assert_close(make_lvdm_scheduler().betas, roots.square().float())


def test_the_ddim_sampler_of_the_docstring_visits_the_official_timesteps():
    scheduler = DDIMScheduler.from_config(
        make_lvdm_scheduler().config, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(
        range(981, 0, -20)
    )  # `make_ddim_timesteps`: range(0, 1000, 20), plus 1
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert not scheduler.config.clip_sample


def test_latents_are_scaled_to_unit_variance():
    latents = 3 * normal(4, 4, 4, 8, 8) - 1.5
    scale, shift = latent_scale_and_shift(latents)
    scaled = scale * (latents + shift)
    assert scaled.mean().abs() < 1e-6
    assert (scaled.std() - 1).abs() < 1e-6
    with pytest.raises(ValueError, match=r"standard deviation of 0\.0"):
        latent_scale_and_shift(torch.ones(3))


# --- denoising


def test_denoising_loss_by_hand():
    latents, noise, timesteps = normal(2, 4, 3, 2, 2), normal(2, 4, 3, 2, 2, seed=1), torch.tensor([0, 700])
    unet, scheduler = Recorder(), make_lvdm_scheduler()
    loss = denoising_loss(unet, latents, timesteps, noise, scheduler, torch.tensor([1, 2]))
    kept = (1 - scheduler.betas).cumprod(0)[timesteps].view(2, 1, 1, 1, 1)
    torch.testing.assert_close(unet.inputs["hidden_states"], kept.sqrt() * latents + (1 - kept).sqrt() * noise)
    assert unet.inputs["class_labels"].tolist() == [1, 2]
    assert unet.inputs["timestep"] is timesteps
    error = (noise - 0.5).abs()
    torch.testing.assert_close(loss, torch.stack([error[0].mean(), error[1].mean()]))


def test_perturbed_frames_count_with_their_own_noise():
    latents, noise, given_noise = (normal(2, 4, 3, 2, 2, seed=seed) for seed in range(3))
    mask, levels = torch.tensor([[True, False, False], [False, False, False]]), torch.tensor([200, 3])
    unet, scheduler = Recorder(), make_lvdm_scheduler()
    loss = denoising_loss(
        unet,
        latents,
        torch.tensor([10, 700]),
        noise,
        scheduler,
        given_mask=mask,
        noise_levels=levels,
        given_noise=given_noise,
    )
    target = noise.clone()
    target[0, :, 0] = given_noise[0, :, 0]
    torch.testing.assert_close(loss, (target - 0.5).abs().flatten(1).mean(1))
    kept = (1 - scheduler.betas).cumprod(0)[200]
    expected = kept.sqrt() * latents[0] + (1 - kept).sqrt() * given_noise[0]
    torch.testing.assert_close(unet.inputs["given_latents"][0], expected)
    assert unet.inputs["noise_levels"] is levels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": torch.zeros(1, 4, 3, 2, 2)}, r"noise has shape \(1, 4, 3, 2, 2\): expected that of latents"),
        ({"timesteps": torch.tensor(3)}, r"expected one per sample, \(2,\)"),
        ({"scheduler": DDIMScheduler(prediction_type="sample")}, 'LVDM predicts "epsilon"'),
        ({"noise_levels": torch.tensor([1, 2])}, "expected all of them or none"),
        ({"given_noise": torch.zeros(2, 4, 3, 2, 2)}, "expected all of them or none"),
        ({"given_mask": torch.tensor([[True] * 3, [False] * 3])}, "expected all of them or none"),
        ({"unet": lambda *args, **kwargs: SimpleNamespace(sample=torch.zeros(2, 8, 3, 2, 2))}, "returned"),
    ],
)
def test_denoising_loss_refuses(changes, message):
    arguments = {
        "unet": Recorder(),
        "latents": torch.zeros(2, 4, 3, 2, 2),
        "timesteps": torch.tensor([1, 2]),
        "noise": torch.zeros(2, 4, 3, 2, 2),
        "scheduler": make_lvdm_scheduler(),
    }
    with pytest.raises(ValueError, match=message):
        denoising_loss(**(arguments | changes))


def test_masks_are_drawn_by_their_probabilities():
    generator = torch.Generator().manual_seed(0)
    mask = draw_given_mask(4000, 5, 0.5, 0.2, generator)
    assert not mask[:, 1:-1].any()
    assert not (mask[:, -1] & ~mask[:, 0]).any()
    assert abs(mask[:, -1].float().mean() - 0.2) < 0.03
    assert abs((mask[:, 0] & ~mask[:, -1]).float().mean() - 0.5) < 0.03
    assert draw_given_mask(9, 3, 1.0, 0.0).tolist() == [[True, False, False]] * 9
    assert draw_given_mask(9, 3, 0.0, 1.0).tolist() == [[True, False, True]] * 9
    assert not draw_given_mask(9, 3, 0.0, 0.0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 4, 0.6, 0.6), "add up to at most 1"),
        ((2, 4, -0.1, 0.6), "add up to at most 1"),
        ((2, 2, 0.0, 0.5), "num_frames=2: expected at least 3"),
        ((2, 1, 0.5, 0.0), "num_frames=1: expected at least 2"),
    ],
)
def test_masks_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_given_mask(*arguments)


# --- autoencoder


def moments(seed: int = 3) -> LVDMLatentDistribution:
    return LVDMLatentDistribution(normal(2, 8, 1, 2, 2, seed=seed))


def test_reconstruction_is_the_sum_of_a_frames_errors():
    loss = LVDMAutoencoderLoss()(CLIP, RECONSTRUCTION, moments(), step=0)
    error = (CLIP - RECONSTRUCTION).abs()
    torch.testing.assert_close(loss.total, error.sum() / 8)  # 2 clips of 4 frames
    torch.testing.assert_close(loss.pixel, error.mean())
    torch.testing.assert_close(loss.kl, moments().kl().mean())
    assert loss.perceptual == loss.adversarial == loss.adversarial_weight == 0


def test_perceptual_distance_is_added_to_every_value_of_its_frame():
    def distance(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return (real - fake)[:, 0, 0, 0] ** 2

    loss = LVDMAutoencoderLoss(distance, perceptual_weight=0.7)(CLIP, RECONSTRUCTION, moments(), step=0)
    expected, distances = 0.0, 0.0
    for clip in range(2):
        for frame in range(4):
            real, fake = CLIP[clip, :, frame], RECONSTRUCTION[clip, :, frame]
            distances += (real - fake)[0, 0, 0] ** 2 / 8
            expected += ((real - fake).abs() + 0.7 * (real - fake)[0, 0, 0] ** 2).sum() / 8
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.perceptual, distances)


def test_variance_and_kl_are_weighed():
    objective = LVDMAutoencoderLoss(kl_weight=0.1)
    objective.logvar.data.fill_(0.4)
    loss = objective(CLIP, RECONSTRUCTION, moments(), step=0)
    likelihood = ((CLIP - RECONSTRUCTION).abs() / torch.tensor(0.4).exp() + 0.4).sum() / 8
    torch.testing.assert_close(loss.total, likelihood + 0.1 * moments().kl().sum() / 2)
    loss.total.backward()
    assert objective.logvar.grad != 0
    assert [name for name, _ in objective.named_parameters()] == ["logvar"]


def test_a_perceptual_network_is_no_part_of_the_loss():
    objective = LVDMAutoencoderLoss(nn.Linear(1, 1))
    assert list(objective.state_dict()) == ["logvar"]


def test_adaptive_weight_is_a_ratio_of_gradients():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight((layer * torch.tensor([3.0, 4.0])).sum(), (layer**2).sum(), layer)
    assert weight == pytest.approx(5 / (20**0.5 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(layer.sum() * 1e9, layer.sum() * 1e-9, layer) == 1e4


def test_the_adversarial_term_comes_in_at_its_step():
    torch.manual_seed(0)
    autoencoder = LVDMAutoencoder(base_channels=4, norm_num_groups=4)
    discriminator = VideoPatchDiscriminator(base_channels=2, num_layers=2)
    objective = LVDMAutoencoderLoss(discriminator_weight=0.5, discriminator_start=3)
    latent_dist = autoencoder.encode(CLIP).latent_dist
    reconstruction = autoencoder.decode(latent_dist.mode()).sample
    arguments = (CLIP, reconstruction, latent_dist)
    before = objective(*arguments, 2, discriminator, autoencoder.last_layer)
    assert before.adversarial_weight == 0
    torch.testing.assert_close(before.total, objective(*arguments, 0).total)

    after = objective(*arguments, 3, discriminator, autoencoder.last_layer)
    adversarial = -discriminator(reconstruction).mean()
    gradients = [
        torch.autograd.grad(term, autoencoder.last_layer, retain_graph=True)[0].norm()
        for term in (before.total, adversarial)
    ]
    expected_weight = 0.5 * gradients[0] / (gradients[1] + 1e-4)
    torch.testing.assert_close(after.adversarial_weight, expected_weight)
    torch.testing.assert_close(after.adversarial, adversarial.detach())
    torch.testing.assert_close(after.total, before.total + expected_weight * adversarial)

    with torch.no_grad():  # a validation: nothing to weigh by
        validated = objective(*arguments, 3, discriminator, autoencoder.last_layer)
    torch.testing.assert_close(validated.total, before.total)
    torch.testing.assert_close(validated.adversarial, adversarial)


def test_hinge_loss_by_hand():
    loss = hinge_discriminator_loss(torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0]))
    assert loss == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1) / 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perceptual_weight": -1.0}, "perceptual_weight=-1.0: expected 0 or more"),
        ({"discriminator_start": -1}, "discriminator_start=-1: expected 0 or more"),
    ],
)
def test_autoencoder_loss_refuses_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        LVDMAutoencoderLoss(**arguments)


def test_autoencoder_loss_refuses_bad_inputs():
    objective = LVDMAutoencoderLoss()
    with pytest.raises(ValueError, match=r"expected .* twice"):
        objective(CLIP, RECONSTRUCTION[:1], moments(), 0)
    with pytest.raises(ValueError, match="last_layer=None with a discriminator"):
        objective(CLIP, RECONSTRUCTION, moments(), 0, VideoPatchDiscriminator(base_channels=2))


# --- discriminator


def test_discriminator_of_frames_is_the_one_of_images():
    """With one frame per convolution: taming-transformers' 2-D layers, frame by frame, with one norm for all."""
    torch.manual_seed(0)
    discriminator = VideoPatchDiscriminator(base_channels=2, num_layers=2, temporal_kernel_size=1)
    frames = CLIP.transpose(1, 2).flatten(0, 1)
    hidden_states = frames
    for layer in discriminator.layers:
        if isinstance(layer, nn.Conv3d):
            hidden_states = F.conv2d(hidden_states, layer.weight[:, :, 0], layer.bias, layer.stride[1:], padding=1)
        elif isinstance(layer, nn.BatchNorm3d):
            hidden_states = F.batch_norm(hidden_states, None, None, layer.weight, layer.bias, training=True)
        else:
            hidden_states = F.leaky_relu(hidden_states, 0.2)
    logits = discriminator(CLIP)
    torch.testing.assert_close(logits.transpose(1, 2).flatten(0, 1), hidden_states)


def test_discriminator_of_the_official_size():
    with torch.device("meta"):
        discriminator = VideoPatchDiscriminator(temporal_kernel_size=1)
        assert discriminator(torch.zeros(1, 3, 16, 128, 128)).shape == (1, 1, 16, 14, 14)
    # 4x4 convolutions 3 -> 64 -> 128 -> 256 -> 512 -> 1, biases at both ends, weight and bias of each norm
    pairs = 3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512
    norms_and_biases = 2 * (128 + 256 + 512) + 64 + 1
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 16 * pairs + norms_and_biases


def test_discriminator_sees_neighbouring_frames():
    torch.manual_seed(0)
    discriminator = VideoPatchDiscriminator(base_channels=2, num_layers=1).eval()
    changed = CLIP.clone()
    changed[:, :, 0] = 0
    moved = (discriminator(changed) - discriminator(CLIP)).abs().amax(dim=(0, 1, 3, 4))
    assert moved[3] > 0  # three convolutions of three frames reach three frames far
    alone = VideoPatchDiscriminator(base_channels=2, num_layers=1, temporal_kernel_size=1).eval()
    assert (alone(changed) - alone(CLIP)).abs().amax(dim=(0, 1, 3, 4))[1:].eq(0).all()


def test_discriminator_refuses():
    with pytest.raises(ValueError, match="temporal_kernel_size=2: expected an odd number"):
        VideoPatchDiscriminator(temporal_kernel_size=2)
    with pytest.raises(ValueError, match="num_layers=0: expected a positive integer"):
        VideoPatchDiscriminator(num_layers=0)
    discriminator = VideoPatchDiscriminator(base_channels=2)
    discriminator(torch.zeros(2, 3, 1, 24, 24))
    with pytest.raises(ValueError, match="of at least 24 pixels a side"):
        discriminator(torch.zeros(2, 3, 1, 16, 24))


# --- LPIPS


@pytest.fixture(scope="module")
def lpips_weights() -> dict[str, torch.Tensor]:
    """Weights of the layout, drawn small enough that all stages keep a signal."""
    weights = {"classifier.0.weight": torch.zeros(1)}
    for stage, convolutions in enumerate(VGG16_STAGES):
        for index, (into, out) in convolutions.items():
            weights[f"features.{index}.weight"] = normal(out, into, 3, 3, seed=index) * (2 / (9 * into)) ** 0.5
            weights[f"features.{index}.bias"] = 0.1 * normal(out, seed=index + 1)
        weights[f"lin{stage}.model.1.weight"] = normal(1, out, 1, 1, seed=stage).abs()
    return weights


@pytest.fixture(scope="module")
def distance(lpips_weights, tmp_path_factory) -> PerceptualDistance:
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(lpips_weights, path)
    return load_lpips(path)


def test_lpips_by_its_formula(lpips_weights, distance):
    assert not distance.training
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    first, second = normal(2, 3, 16, 20).clamp(-1, 1), normal(2, 3, 16, 20, seed=1).clamp(-1, 1)

    # VGG16's `features` in a row: 64, 64, pool, 128, 128, pool, 3 x 256, pool, 3 x 512, pool, 3 x 512; images as LPIPS
    # takes them are those of ImageNet's preprocessing, up to its rounding
    def of_stages(images: torch.Tensor) -> list[torch.Tensor]:
        mean, std = (
            torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
            torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
        )
        hidden_states, stages = ((images + 1) / 2 - mean) / std, []
        for index in range(30):
            if index in (4, 9, 16, 23):
                stages.append(hidden_states)
                hidden_states = F.max_pool2d(hidden_states, 2)
            elif f"features.{index}.weight" in lpips_weights:
                weight, bias = (lpips_weights[f"features.{index}.{kind}"] for kind in ("weight", "bias"))
                hidden_states = F.relu(F.conv2d(hidden_states, weight, bias, padding=1))
        return [*stages, hidden_states]

    expected = torch.zeros(2)
    for stage, (one, other) in enumerate(zip(of_stages(first), of_stages(second), strict=True)):
        difference = F.normalize(one, dim=1) - F.normalize(other, dim=1)
        weighed = lpips_weights[f"lin{stage}.model.1.weight"][0] * difference.square()
        expected += weighed.sum(1).mean(dim=(1, 2))
    torch.testing.assert_close(distance(first, second), expected, rtol=1e-2, atol=1e-4)
    assert distance(first, first).abs().max() < 1e-6


def test_lpips_leads_to_the_other_frame(distance):
    """A step down its gradient, which reaches the pixels through frozen weights, brings frames nearer."""
    first, second = normal(1, 3, 16, 16).clamp(-1, 1), normal(1, 3, 16, 16, seed=1).clamp(-1, 1).requires_grad_()
    before = distance(first, second)
    (gradient,) = torch.autograd.grad(before.sum(), second)
    assert distance(first, second - 0.1 * gradient / gradient.abs().max()) < before


def test_lpips_refuses(distance, tmp_path):
    path = tmp_path / "lpips.safetensors"
    with pytest.raises(FileNotFoundError):
        load_lpips(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
        load_lpips(path)
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"lacks features.0.bias, features.2.weight, .*, lin4.model.1.weight, or has"):
        load_lpips(path)
    with pytest.raises(ValueError, match="at least 16 pixels a side"):
        distance(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
