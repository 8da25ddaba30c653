"""LVDM's networks: sizes of the official ones, and every part against a formula or a loop written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from diffusers_endora.baselines.lvdm.autoencoder_lvdm import (
    LVDMAutoencoder,
    LVDMConv3d,
    LVDMConvTranspose3d,
    LVDMLatentDistribution,
)
from diffusers_endora.baselines.lvdm.unet_lvdm import (
    LVDMResBlock,
    LVDMSpatialAttention,
    LVDMTemporalAttention,
    LVDMUNet3DModel,
    frame_convolution,
)

TINY_UNET = {
    "model_channels": 8,
    "channel_multipliers": (1, 2),
    "layers_per_stage": 1,
    "attention_stages": (1,),
    "num_attention_heads": 2,
    "norm_num_groups": 4,
    "sample_size": 4,
}
TINY_AUTOENCODER = {"base_channels": 4, "norm_num_groups": 4}


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn anew, those that begin at zero among them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny_unet(**settings) -> LVDMUNet3DModel:
    return randomised(LVDMUNet3DModel(**(TINY_UNET | settings)))


def tiny_autoencoder(**settings) -> LVDMAutoencoder:
    return randomised(LVDMAutoencoder(**(TINY_AUTOENCODER | settings)))


# --- autoencoder


def test_parameter_counts_of_the_official_sizes():
    with torch.device("meta"):
        unet, autoencoder = LVDMUNet3DModel(), LVDMAutoencoder()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 548_904_580  # 548.9 M in Endora's Table 1
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 19_446_759


def test_autoencoder_divides_and_restores_the_sizes():
    autoencoder = tiny_autoencoder()
    clip = torch.rand(2, 3, 8, 16, 24) * 2 - 1
    latents = autoencoder.encode(clip).latent_dist.mode()
    assert latents.shape == (2, 4, 2, 2, 3)
    assert autoencoder.decode(latents).sample.shape == clip.shape


@pytest.mark.parametrize(("temporal_factor", "spatial_factor"), [(1, 2), (2, 4), (8, 8)])
def test_autoencoder_of_other_factors(temporal_factor, spatial_factor):
    autoencoder = tiny_autoencoder(temporal_factor=temporal_factor, spatial_factor=spatial_factor, latent_channels=3)
    clip = torch.rand(1, 3, 2 * temporal_factor, 2 * spatial_factor, spatial_factor)
    latents = autoencoder.encode(clip).latent_dist.mode()
    assert latents.shape == (1, 3, 2, 2, 1)
    assert autoencoder.decode(latents).sample.shape == clip.shape


def test_forward_encodes_and_decodes():
    autoencoder = tiny_autoencoder()
    clip = torch.rand(1, 3, 4, 8, 8)
    reconstruction = autoencoder(clip).sample
    (latent_dist,) = autoencoder.encode(clip, return_dict=False)
    torch.testing.assert_close(reconstruction, autoencoder.decode(latent_dist.mode()).sample)
    sampled = autoencoder(clip, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample
    latents = latent_dist.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, autoencoder.decode(latents, return_dict=False)[0])
    assert not torch.equal(sampled, reconstruction)


def test_last_layer_is_what_the_clip_comes_out_of():
    autoencoder = tiny_autoencoder()
    assert autoencoder.last_layer is autoencoder.decoder.conv_out.conv.weight
    assert autoencoder.last_layer.shape == (3, 8, 3, 3, 3)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_convolution_pads_by_repeating_and_more_at_the_front(stride):
    torch.manual_seed(0)
    convolution = LVDMConv3d(2, 3, 4, stride)
    clip = torch.randn(1, 2, 4, 6, 6)
    indices = []
    for size, step in zip(clip.shape[2:], stride, strict=True):
        before = math.ceil((4 - step) / 2)
        indices.append(torch.arange(-before, size + 4 - step - before).clamp(0, size - 1))
    padded = clip[:, :, indices[0]][:, :, :, indices[1]][..., indices[2]]
    expected = F.conv3d(padded, convolution.conv.weight, convolution.conv.bias, stride=stride)
    torch.testing.assert_close(convolution(clip), expected)
    assert convolution(clip).shape[2:] == tuple(
        size // step for size, step in zip(clip.shape[2:], stride, strict=True)
    )


def test_transposed_convolution_by_its_definition():
    """Along one axis: every input adds the kernel at twice its place; the ends of the result are cut."""
    convolution = LVDMConvTranspose3d(1, 1, 4, (1, 1, 2))
    torch.nn.init.zeros_(convolution.conv.weight)
    kernel = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # the first two axes take the place itself: the padding of 2 before and the 3 that are cut leave element 1
    convolution.conv.weight.data[0, 0, 1, 1] = kernel
    torch.nn.init.zeros_(convolution.conv.bias)
    row = torch.tensor([5.0, 7.0, 11.0])
    padded = torch.tensor([5.0, 5.0, 7.0, 11.0, 11.0])
    full = torch.zeros(2 * len(padded) + 2)
    for place, value in enumerate(padded):
        full[2 * place : 2 * place + 4] += value * kernel
    result = convolution(row.expand(1, 1, 2, 2, 3))
    assert result.shape == (1, 1, 2, 2, 6)
    torch.testing.assert_close(result[0, 0, 1, 1], full[3:-3])


def test_latent_distribution_sums_over_all_dimensions():
    torch.manual_seed(0)
    parameters = torch.randn(2, 8, 3, 2, 2)
    latent_dist, other = LVDMLatentDistribution(parameters), LVDMLatentDistribution(parameters.flip(0))
    normals = [Normal(each.mean, each.std) for each in (latent_dist, other)]
    standard = Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(latent_dist.kl(), kl_divergence(normals[0], standard).flatten(1).sum(1))
    torch.testing.assert_close(latent_dist.kl(other), kl_divergence(*normals).flatten(1).sum(1))


def test_autoencoder_checkpointing_gives_the_same_gradients():
    autoencoder = tiny_autoencoder()
    clip = torch.rand(1, 3, 4, 8, 8)

    def gradients() -> list[torch.Tensor]:
        autoencoder.zero_grad()
        autoencoder(clip).sample.square().sum().backward()
        return [parameter.grad.clone() for parameter in autoencoder.parameters() if parameter.grad is not None]

    plain = gradients()
    autoencoder.enable_gradient_checkpointing()
    assert autoencoder.encoder.gradient_checkpointing
    assert autoencoder.decoder.gradient_checkpointing
    for expected, found in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 16), r"clip has shape .*: expected \(batch, 3, frames, height, width\)"),
        ((1, 4, 8, 16, 16), "expected"),
        ((1, 3, 6, 16, 16), "frames 6 .* multiple of 4"),
        ((1, 3, 8, 12, 16), "height 12 .* multiple of 8"),
        ((1, 3, 8, 16, 0), "width 0 .* multiple of 8"),
    ],
)
def test_encode_refuses_other_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_autoencoder().encode(torch.zeros(shape))


def test_decode_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"latents has shape \(1, 3, 2, 2, 2\): expected \(batch, 4"):
        tiny_autoencoder().decode(torch.zeros(1, 3, 2, 2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_channels": 0}, "latent_channels=0: expected a positive integer"),
        ({"spatial_factor": 6}, "spatial_factor=6: expected a power of two from 2"),
        ({"temporal_factor": 3}, "temporal_factor=3: expected a power of two from 1"),
        ({"temporal_factor": 16}, "temporal_factor=16: expected at most spatial_factor=8"),
        ({"norm_num_groups": 3}, "norm_num_groups=3: expected a divisor"),
    ],
)
def test_autoencoder_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LVDMAutoencoder(**(TINY_AUTOENCODER | settings))


# --- parts of the UNet


def test_convolutions_see_single_frames():
    torch.manual_seed(0)
    convolution = frame_convolution(2, 3, stride=2)
    clip = torch.randn(2, 2, 3, 4, 4)
    by_frame = [
        F.conv2d(clip[:, :, frame], convolution.weight[:, :, 0], convolution.bias, stride=2, padding=1)
        for frame in range(3)
    ]
    torch.testing.assert_close(convolution(clip), torch.stack(by_frame, dim=2))


def test_residual_block_by_its_formula():
    block = randomised(LVDMResBlock(4, 8, 6, 2, 0.0))
    clip, emb = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 6)
    normed = F.group_norm(clip, 2, block.norm1.weight, block.norm1.bias, eps=1e-5)  # over all frames
    residual = F.conv3d(F.silu(normed), block.conv1.weight, block.conv1.bias, padding=(0, 1, 1))
    normed = F.group_norm(residual, 2, block.norm2.weight, block.norm2.bias, eps=1e-5)
    scale, shift = (emb @ block.modulation.weight.T + block.modulation.bias).view(2, 2, 8, 1, 1, 1).unbind(1)
    residual = F.conv3d(F.silu(normed * (1 + scale) + shift), block.conv2.weight, block.conv2.bias, padding=(0, 1, 1))
    shortcut = F.conv3d(clip, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(clip, emb), shortcut + residual)


def test_spatial_attention_by_a_loop_over_frames():
    attention = randomised(LVDMSpatialAttention(4, 2, 2))
    clip = torch.randn(2, 4, 3, 2, 3)
    expected = clip.clone()
    for sample in range(2):
        for frame in range(3):
            tokens = F.group_norm(clip[sample : sample + 1, :, frame], 2, attention.norm.weight, attention.norm.bias)
            qkv = attention.to_qkv(tokens[0].flatten(1).T).view(6, 3, 2, 2)  # (pixels, which, heads, width)
            attended = torch.empty(6, 2, 2)
            for head in range(2):
                query, key, value = qkv[:, :, head].unbind(1)
                attended[:, head] = (query @ key.T / math.sqrt(2)).softmax(dim=1) @ value
            expected[sample, :, frame] += attention.to_out(attended.flatten(1)).T.view(4, 2, 3)
    torch.testing.assert_close(attention(clip), expected)


@pytest.mark.parametrize("num_frames", [1, 3, 6])
def test_temporal_attention_by_its_formula(num_frames):
    """By loops; distances beyond 2 frames are clipped, and the term of the keys has the query of the other frame."""
    attention = randomised(LVDMTemporalAttention(4, 2, 2, 2))
    clip = torch.randn(1, 4, num_frames, 2, 1)
    expected = clip.clone()
    for row in range(2):
        tokens = F.group_norm(clip[:, :, :, row, 0], 2, attention.norm.weight, attention.norm.bias)
        qkv = attention.to_qkv(tokens[0].T).view(num_frames, 3, 2, 2)
        attended = torch.empty(num_frames, 2, 2)
        for head in range(2):
            query, key, value = qkv[:, :, head].unbind(1)
            for i in range(num_frames):
                logits, summed = torch.empty(num_frames), torch.zeros(2)
                for j in range(num_frames):
                    distance = max(-2, min(2, i - j))
                    logits[j] = query[i] @ key[j] / math.sqrt(2)
                    logits[j] += query[j] @ attention.relative_keys[distance + 2] / 2**0.25
                for j, weight in enumerate(logits.softmax(dim=0)):
                    distance = max(-2, min(2, j - i))
                    summed += weight * (value[j] + attention.relative_values[distance + 2])
                attended[i, head] = summed
        expected[0, :, :, row, 0] += attention.to_out(attended.flatten(1)).T
    torch.testing.assert_close(attention(clip), expected)


# --- UNet


def test_unet_keeps_the_shape_at_every_size():
    unet = tiny_unet()
    for shape in [(1, 4, 4, 4, 4), (2, 4, 1, 4, 6), (1, 4, 9, 2, 2)]:
        assert unet(torch.randn(shape), torch.tensor(5)).sample.shape == shape
    assert unet(torch.zeros(1, 4, 1, 4, 4), torch.tensor(5), return_dict=False)[0].shape == (1, 4, 1, 4, 4)


def test_unet_begins_with_no_output():
    torch.manual_seed(0)
    unet = LVDMUNet3DModel(**TINY_UNET)
    assert unet(torch.randn(1, 4, 2, 4, 4), torch.tensor(5)).sample.eq(0).all()


def test_the_frames_of_equal_pixels_differ_by_their_position_alone():
    """A still clip keeps its frames equal in all parts but temporal attention, which knows where a frame is."""
    unet = tiny_unet()
    frame = torch.randn(1, 4, 1, 4, 4)
    sample = unet(frame.expand(-1, -1, 3, -1, -1), torch.tensor(5)).sample
    assert (sample[:, :, 0] - sample[:, :, 1]).abs().max() > 1e-3
    for module in unet.modules():
        if isinstance(module, LVDMTemporalAttention):
            module.relative_keys.data.zero_()
            module.relative_values.data.zero_()
    sample = unet(frame.expand(-1, -1, 3, -1, -1), torch.tensor(5)).sample
    torch.testing.assert_close(sample[:, :, 0], sample[:, :, 1])


def test_samples_and_timesteps_do_not_mix():
    unet = tiny_unet(num_classes=3)
    latents, timesteps, labels = torch.randn(2, 4, 3, 4, 4), torch.tensor([3, 800]), torch.tensor([0, 3])
    both = unet(latents, timesteps, labels).sample
    for sample in range(2):
        part = slice(sample, sample + 1)
        alone = unet(latents[part], timesteps[sample], labels[part]).sample
        torch.testing.assert_close(both[part], alone, rtol=1e-4, atol=1e-4)
    other = unet(latents, timesteps.flip(0), labels).sample
    assert (other - both).abs().max() > 1e-2


def test_labels_and_the_null_class():
    unet = tiny_unet(num_classes=2)
    assert unet.null_class == 2
    assert tiny_unet(num_classes=2, class_dropout_prob=0.0).null_class is None
    assert tiny_unet().null_class is None
    latents, timestep = torch.randn(1, 4, 2, 4, 4), torch.tensor(5)
    samples = [unet(latents, timestep, torch.tensor([label])).sample for label in range(3)]
    assert all((samples[0] - other).abs().max() > 1e-3 for other in samples[1:])
    unet = tiny_unet(num_classes=2, class_dropout_prob=1.0).train()
    dropped = unet(latents, timestep, torch.tensor([0])).sample
    torch.testing.assert_close(dropped, unet.eval()(latents, timestep, torch.tensor([2])).sample)


def test_given_latents_take_the_place_of_noisy_ones():
    unet = tiny_unet(conditioning="mask", num_noise_levels=5)
    latents, given, timestep = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4), torch.tensor(5)
    mask = torch.tensor([[True, False, False], [True, False, True]])
    seen = []
    unet.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sample = unet(latents, timestep, given_latents=given, given_mask=mask).sample
    assert seen[0].shape == (2, 5, 3, 4, 4)
    for clip in range(2):
        for frame in range(3):
            source = given if mask[clip, frame] else latents
            assert torch.equal(seen[0][clip, :4, frame], source[clip, :, frame])
            assert seen[0][clip, 4, frame].eq(mask[clip, frame].float()).all()

    levels = unet(latents, timestep, given_latents=given, given_mask=mask, noise_levels=torch.tensor([1, 4])).sample
    assert (levels - sample).flatten(1).abs().amax(1).min() > 1e-3


def test_nothing_given_is_generated_from_nothing():
    unet = tiny_unet(conditioning="mask")
    latents, timestep = torch.randn(1, 4, 3, 4, 4), torch.tensor(5)
    nothing = {"given_latents": torch.randn_like(latents), "given_mask": torch.zeros(1, 3, dtype=torch.bool)}
    torch.testing.assert_close(unet(latents, timestep, **nothing).sample, unet(latents, timestep).sample)


def test_unet_checkpointing_gives_the_same_gradients():
    unet = tiny_unet()
    latents = torch.randn(1, 4, 2, 4, 4)

    def gradients() -> list[torch.Tensor]:
        unet.zero_grad()
        unet(latents, torch.tensor(5)).sample.square().sum().backward()
        return [parameter.grad.clone() for parameter in unet.parameters()]

    plain = gradients()
    unet.enable_gradient_checkpointing()
    assert all(stage.gradient_checkpointing for stage in [*unet.down_stages, unet.mid_stage, *unet.up_stages])
    for expected, found in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(found, expected)


def test_models_save_and_load(tmp_path):
    unet, autoencoder = tiny_unet(sample_size=(4, 8), num_classes=2), tiny_autoencoder()
    for model in (unet, autoencoder):
        model.save_pretrained(tmp_path / type(model).__name__)
    loaded = LVDMUNet3DModel.from_pretrained(tmp_path / "LVDMUNet3DModel")
    arguments = torch.randn(1, 4, 2, 4, 8), torch.tensor(5), torch.tensor([1])
    assert torch.equal(loaded(*arguments).sample, unet(*arguments).sample)
    loaded = LVDMAutoencoder.from_pretrained(tmp_path / "LVDMAutoencoder")
    clip = torch.rand(1, 3, 4, 8, 8)
    assert torch.equal(loaded.encode(clip).latent_dist.mode(), autoencoder.encode(clip).latent_dist.mode())


LATENTS, MASK = torch.zeros(2, 4, 3, 4, 4), torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        ({}, {"hidden_states": torch.zeros(2, 3, 3, 4, 4)}, r"shape \(2, 3, 3, 4, 4\): expected \(batch, 4"),
        ({}, {"hidden_states": torch.zeros(2, 4, 3, 3, 4)}, "height 3 and width 4: expected positive multiples of 2"),
        ({}, {"timestep": 5}, "timestep is 5: expected a tensor"),
        ({}, {"timestep": torch.zeros(3)}, r"timestep has shape \(3,\)"),
        ({}, {"class_labels": torch.tensor([0, 1])}, "unconditional"),
        ({"num_classes": 2}, {}, "class_labels=None: this model needs one label"),
        ({"num_classes": 2}, {"class_labels": torch.tensor([0.0, 1.0])}, "expected integers"),
        ({"num_classes": 2}, {"class_labels": torch.tensor([0])}, r"shape \(1,\): expected integers of shape \(2,\)"),
        ({"num_classes": 2}, {"class_labels": torch.tensor([0, 3])}, "expected labels from 0 to 2"),
        ({}, {"given_latents": LATENTS, "given_mask": MASK}, "completes nothing"),
        ({"conditioning": "mask"}, {"given_latents": LATENTS}, "expected both, or neither"),
        ({"conditioning": "mask"}, {"given_latents": LATENTS[:1], "given_mask": MASK}, "expected that of hidden"),
        ({"conditioning": "mask"}, {"given_latents": LATENTS, "given_mask": MASK.float()}, "expected booleans"),
        ({"conditioning": "mask"}, {"noise_levels": torch.tensor([0, 1])}, "num_noise_levels=0"),
        (
            {"conditioning": "mask", "num_noise_levels": 3},
            {"noise_levels": torch.tensor([0, 3])},
            "expected levels from 0 to 2",
        ),
        (
            {"conditioning": "mask", "num_noise_levels": 3},
            {"noise_levels": torch.tensor([0])},
            r"expected integers of shape \(2,\) from 0 to 2",
        ),
    ],
)
def test_unet_refuses_bad_inputs(settings, inputs, message):
    inputs = {"hidden_states": LATENTS, "timestep": torch.tensor(5)} | inputs
    with pytest.raises(ValueError, match=message):
        tiny_unet(**settings)(**inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 0}, "num_frames=0: expected a positive integer"),
        ({"max_distance": 0}, "max_distance=0: expected a positive integer"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"attention_stages": (2,)}, r"attention_stages=\(2,\): expected stages from 0 to 1"),
        ({"norm_num_groups": 3}, "a stage has 8 channels: expected an even multiple of norm_num_groups=3"),
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        ({"sample_size": 3}, "sample_size=3: expected one or two positive multiples of 2"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob=1.5: expected a probability"),
        ({"conditioning": "concat"}, 'conditioning="concat": expected None or "mask"'),
        ({"num_noise_levels": 5}, "num_noise_levels=5 with conditioning=None"),
    ],
)
def test_unet_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LVDMUNet3DModel(**(TINY_UNET | settings))
