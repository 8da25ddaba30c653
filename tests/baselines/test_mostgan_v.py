"""Tests of MoStGAN-V: what it adds to StyleGAN-V, and that the rest is still whole."""

import math

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_endora.baselines.mostgan_v.discriminator_mostgan_v import MoStGANVDiscriminator
from diffusers_endora.baselines.mostgan_v.generator_mostgan_v import (
    MoStGANVGenerator,
    MotionSynthesisBlock,
    MotionSynthesisLayer,
    motion_modulated_weights,
    rank_one_kernels,
)
from diffusers_endora.baselines.mostgan_v.pipeline_mostgan_v import MoStGANVPipeline
from diffusers_endora.baselines.stylegan_v.generator_stylegan_v import StyleGANVGenerator, SynthesisLayer
from diffusers_endora.baselines.stylegan_v.operators import conv2d_resample
from diffusers_endora.baselines.stylegan_v.pipeline_stylegan_v import StyleGANVPipeline

GENERATOR = {
    "resolution": 32,
    "num_frames": 4,
    "z_dim": 6,
    "w_dim": 8,
    "channel_base": 256,
    "channel_max": 12,
    "motion_z_dim": 5,
    "motion_code_dim": 7,
    "motion_kernel_size": 3,
    "num_frequencies": 4,
    "max_num_frames": 64,
}
STYLES = {"num_motion_styles": 3, "motion_style_dim": 9}
DISCRIMINATOR = {
    "resolution": 32,
    "num_frames_per_clip": 3,
    "channel_base": 256,
    "channel_max": 12,
    "max_num_frames": 64,
    "num_mapping_layers": 2,
    "motion_style_dim": 9,
}
TIMES = torch.tensor([[0.0, 3.5, 20.0], [1.0, 2.0, 31.25]])


def small_generator(**changes) -> MoStGANVGenerator:
    torch.manual_seed(0)
    return MoStGANVGenerator(**{**GENERATOR, **STYLES, **changes}).eval()


def small_discriminator(**changes) -> MoStGANVDiscriminator:
    torch.manual_seed(0)
    return MoStGANVDiscriminator(**{**DISCRIMINATOR, **changes}).eval()


@pytest.fixture
def known_to_diffusers(monkeypatch):
    for generator_class in (StyleGANVGenerator, MoStGANVGenerator):
        monkeypatch.setattr(diffusers, generator_class.__name__, generator_class, raising=False)


# Size


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        assert num_parameters(MoStGANVGenerator()) == 40_676_418
        assert num_parameters(MoStGANVDiscriminator(num_frames_per_clip=16)) == 63_296_000
        assert num_parameters(MoStGANVDiscriminator()) == 27_380_224


def test_generator_adds_the_motion_style_network_and_a_hypernetwork_for_each_layer():
    generator, base = small_generator(), StyleGANVGenerator(**GENERATOR)
    w_dim, motion_dim, channels = 8, 8, {16: 12, 32: 8}
    hidden = 3 * w_dim
    styles = (w_dim + motion_dim + 1) * hidden + (hidden + 1) * 3 * 9
    in_channels = [12, channels[16], channels[16], channels[32]]  # conv0 and conv1 of 16 and 32 pixels
    hypernets = sum((9 + 1) * (channels_in + 3 + 3) for channels_in in in_channels)
    assert num_parameters(generator) == num_parameters(base) + styles + hypernets


@pytest.mark.parametrize(
    ("resolution", "modulated"), [(16, [16]), (64, [16, 32, 64]), (128, [16, 32, 64, 128]), (256, [16, 32, 64, 128])]
)
def test_layers_from_16_to_128_pixels_have_motion_styles(resolution, modulated):
    with torch.device("meta"):
        generator = MoStGANVGenerator(**{**GENERATOR, "resolution": resolution})
    found = [4 * 2**i for i, block in enumerate(generator.blocks) if isinstance(block, MotionSynthesisBlock)]
    assert found == modulated


def test_resolution_64():
    sample = small_generator(resolution=64)(torch.randn(1, 6), TIMES[:1]).sample
    assert sample.shape == (1, 3, 3, 64, 64)
    assert sample.isfinite().all()


# Motion style attention


def test_rank_one_kernels_are_outer_products():
    factors = torch.randn(2, 5, 4 + 3 + 3)
    kernels = rank_one_kernels(factors, kernel_size=3)
    for sample in range(2):
        for style in range(5):
            by_channel, by_row, by_column = factors[sample, style].split([4, 3, 3])
            for channel in range(4):
                expected = by_channel[channel] * torch.outer(by_row, by_column)
                torch.testing.assert_close(kernels[sample, style, channel], expected)


@pytest.mark.parametrize("up", [1, 2])
def test_layer_equals_a_loop_over_frames(up):
    torch.manual_seed(0)
    layer = MotionSynthesisLayer(4, 6, w_dim=8, motion_style_dim=9, up=up)
    layer.bias.data.normal_()
    x, w, motion_styles = torch.randn(3, 4, 8, 8), torch.randn(3, 8), torch.randn(3, 5, 9)
    output = layer(x, w, motion_styles)

    for frame in range(3):
        styled = layer.weight * layer.affine(w)[frame][None, :, None, None]  # the queries
        kernels = torch.stack(
            [
                torch.einsum("c,y,x->cyx", *(style @ layer.hypernet.weight.t() / 3 + 1).split([4, 3, 3]))
                for style in motion_styles[frame]
            ]
        )
        keys = kernels.flatten(1)[None]
        attended = F.scaled_dot_product_attention(styled.flatten(1)[None], keys, keys)[0].view_as(styled)
        attended = attended / attended.abs().max()
        filters = styled * (1 + torch.where(attended > 0, attended, 0.2 * attended))
        filters = torch.stack([kernel / kernel.norm() for kernel in filters])
        activations = conv2d_resample(x[frame : frame + 1], filters, layer.taps, up=up) + layer.bias[:, None, None]
        expected = torch.where(activations > 0, activations, 0.2 * activations) * math.sqrt(2)
        torch.testing.assert_close(output[frame : frame + 1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_kernels_of_zeros_or_ones_leave_the_layer_unmodulated(up, factor):
    torch.manual_seed(0)
    layer = MotionSynthesisLayer(4, 6, w_dim=8, motion_style_dim=9, up=up)
    plain = SynthesisLayer(4, 6, w_dim=8, up=up)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "hypernet" not in name})
    x, w, motion_styles = torch.randn(2, 4, 8, 8), torch.randn(2, 8), torch.randn(2, 5, 9)
    assert not torch.allclose(layer(x, w, motion_styles), plain(x, w), atol=1e-2)
    layer.hypernet.weight.data.zero_()
    layer.hypernet.bias.data.fill_(factor)
    torch.testing.assert_close(layer(x, w, motion_styles), plain(x, w), atol=1e-5, rtol=1e-4)


def test_generator_with_hypernetworks_of_ones_is_stylegan_v():
    generator, base = small_generator(), StyleGANVGenerator(**GENERATOR).eval()
    state = generator.state_dict()
    base.load_state_dict({name: state[name] for name in base.state_dict()})
    z, noise = torch.randn(2, 6), base.draw_motion_noise(2, 31.25)
    expected = base(z, TIMES, motion_noise=noise).sample
    assert not torch.allclose(generator(z, TIMES, motion_noise=noise).sample, expected, atol=1e-2)
    for module in generator.modules():
        if isinstance(module, MotionSynthesisLayer):
            module.hypernet.weight.data.zero_()
    torch.testing.assert_close(generator(z, TIMES, motion_noise=noise).sample, expected, atol=1e-4, rtol=1e-4)


def test_the_order_of_the_motion_styles_does_not_matter():
    torch.manual_seed(0)
    weight, styles, kernels = torch.randn(6, 4, 3, 3), torch.randn(2, 4), torch.randn(2, 5, 4, 3, 3)
    expected = motion_modulated_weights(weight, styles, kernels)
    torch.testing.assert_close(motion_modulated_weights(weight, styles, kernels[:, [3, 0, 4, 1, 2]]), expected)
    torch.testing.assert_close(expected.flatten(2).norm(dim=2), torch.ones(2, 6))


def test_motion_styles_follow_from_content_and_motion():
    generator = small_generator()
    w, motion_codes = torch.randn(2, 8), torch.randn(2, 8)
    styles = generator.motion_styles(w, motion_codes)
    first, second = generator.motion_style_mapping
    hidden = F.leaky_relu(torch.cat([w, motion_codes], dim=1) @ first.weight.t() / 4, 0.2) * math.sqrt(2)
    expected = hidden @ second.weight.t() / math.sqrt(24)
    torch.testing.assert_close(styles, expected.view(2, 3, 9))


# Generator


def test_gradients_reach_every_parameter_of_the_generator():
    generator = small_generator(num_classes=2)
    sample = generator(torch.randn(2, 6), TIMES, class_labels=torch.tensor([0, 1])).sample
    (sample * torch.randn_like(sample)).sum().backward()
    without = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in generator.parameters())


def test_frames_are_the_same_alone_and_together():
    generator = small_generator()
    z, noise = torch.randn(2, 6), generator.draw_motion_noise(2, 31.25)
    whole = generator(z, TIMES, motion_noise=noise).sample
    parts = [generator(z, times, motion_noise=noise).sample for times in TIMES.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_truncation_to_the_mean_leaves_no_content():
    generator = small_generator()
    generator.mean_w.normal_()
    noise = generator.draw_motion_noise(1, 31.25).expand(2, -1, -1)
    sample = generator(torch.randn(2, 6), TIMES[:1].expand(2, -1), motion_noise=noise, truncation_psi=0.0).sample
    torch.testing.assert_close(sample[0], sample[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(sample[0, 0], sample[0, 1], atol=1e-3)


def test_half_precision_is_close_to_full():
    generator = small_generator()
    z, noise = torch.randn(2, 6), generator.draw_motion_noise(2, 31.25)
    expected = generator(z, TIMES, motion_noise=noise).sample
    with torch.autocast("cpu", torch.bfloat16):
        automatic = generator(z, TIMES, motion_noise=noise).sample.float()
    half = generator.to(torch.bfloat16)(z, TIMES, motion_noise=noise).sample
    assert half.dtype == torch.bfloat16
    for sample in (automatic, half.float()):
        assert (sample - expected).square().mean() < 1e-3 * expected.square().mean()


def test_generator_round_trip(tmp_path):
    generator = small_generator(num_classes=2)
    generator.mean_w.normal_()
    generator.save_pretrained(tmp_path)
    loaded = MoStGANVGenerator.from_pretrained(tmp_path)
    assert {**loaded.config} == {**loaded.config, **GENERATOR, **STYLES, "num_classes": 2}
    z, noise, labels = torch.randn(2, 6), generator.draw_motion_noise(2, 31.25), torch.tensor([1, 0])
    arguments = {"class_labels": labels, "motion_noise": noise, "truncation_psi": 0.7}
    assert torch.equal(loaded(z, TIMES, **arguments).sample, generator(z, TIMES, **arguments).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 8}, "resolution=8: expected a power of 2 from 16"),
        ({"resolution": 48}, "resolution=48: expected a power of 2"),
        ({"num_motion_styles": 0}, "num_motion_styles=0: expected a positive integer"),
        ({"motion_style_dim": 2.5}, "motion_style_dim=2.5: expected a positive integer"),
        ({"w_dim": -1}, "w_dim=-1: expected a positive integer"),
    ],
)
def test_bad_generator(changes, message):
    with pytest.raises(ValueError, match=message):
        small_generator(**changes)


def test_bad_inputs_of_the_generator():
    generator = small_generator()
    with pytest.raises(ValueError, match=r"z has shape \(2, 5\): expected \(B, 6\)"):
        generator(torch.randn(2, 5), TIMES)
    with pytest.raises(ValueError, match="class_labels were given: this model is unconditional"):
        generator(torch.randn(2, 6), TIMES, class_labels=torch.tensor([0, 1]))


# Discriminator


def test_discriminator_sees_frames_then_their_cyclic_differences():
    discriminator = small_discriminator()
    seen = []
    discriminator.clip_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    clip = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    discriminator(clip, TIMES)
    pictures = [clip[:, 0], clip[:, 1], clip[:, 2]]
    pictures += [clip[:, 0] - clip[:, 1], clip[:, 1] - clip[:, 2], clip[:, 2] - clip[:, 0]]
    expected = []
    for picture in pictures:
        x = discriminator.from_rgb(picture)
        for block in discriminator.frame_blocks:
            x = block(x)
        expected.append(x)
    torch.testing.assert_close(seen[0], torch.cat(expected, dim=1))


def test_gradients_reach_every_parameter_of_the_discriminator_also_through_those_of_the_frames():
    discriminator = small_discriminator(num_classes=2)
    clip = (torch.rand(2, 3, 3, 32, 32) * 2 - 1).requires_grad_()
    logits = discriminator(clip, TIMES, class_labels=torch.tensor([0, 1]))
    assert logits.shape == (2,)
    (gradient,) = torch.autograd.grad(logits.sum(), clip, create_graph=True)
    (gradient.square().sum() + logits.sum()).backward()
    without = [name for name, p in discriminator.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in discriminator.parameters())


def test_discriminator_round_trip(tmp_path):
    discriminator = small_discriminator()
    discriminator.save_pretrained(tmp_path)
    loaded = MoStGANVDiscriminator.from_pretrained(tmp_path)
    clip = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded(clip, TIMES), discriminator(clip, TIMES))


def test_bad_discriminator_and_inputs():
    with pytest.raises(ValueError, match="num_frames_per_clip=1: expected 2 or more"):
        small_discriminator(num_frames_per_clip=1)
    with pytest.raises(ValueError, match="motion_style_dim=0: expected a positive integer"):
        small_discriminator(motion_style_dim=0)
    with pytest.raises(ValueError, match=r"frames has shape \(2, 2, 3, 32, 32\): expected \(B, 3, 3, 32, 32\)"):
        small_discriminator()(torch.zeros(2, 2, 3, 32, 32), TIMES[:, :2])


# Pipeline


def test_a_clip_depends_on_its_own_generator_alone():
    pipe = MoStGANVPipeline(generator=small_generator())
    together = pipe(
        batch_size=3, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 5)], output_type="pt"
    ).frames
    alone = pipe(generator=torch.Generator().manual_seed(6), output_type="pt").frames
    assert together.shape == (3, 4, 3, 32, 32)
    assert 0 <= together.min() <= together.max() <= 1
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[0], together[2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_long_clips_in_chunks_equal_one_call():
    generator = small_generator()
    pipe = MoStGANVPipeline(generator=generator)
    times = torch.arange(70) / 4
    frames = pipe(times=times, generator=torch.Generator().manual_seed(0), output_type="pt").frames
    seeded = torch.Generator().manual_seed(0)
    z = torch.randn(1, 6, generator=seeded)
    noise = generator.draw_motion_noise(1, float(times.max()), seeded)
    with torch.no_grad():
        expected = generator(z, times[None], motion_noise=noise).sample
    torch.testing.assert_close(frames, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_pipeline_round_trip(tmp_path, known_to_diffusers):
    pipe = MoStGANVPipeline(generator=small_generator(num_classes=3))
    pipe.save_pretrained(tmp_path)
    loaded = MoStGANVPipeline.from_pretrained(tmp_path)
    assert type(loaded.generator) is MoStGANVGenerator
    frames = [
        p(class_labels=[2, 0], generator=torch.Generator().manual_seed(0), output_type="np").frames
        for p in (pipe, loaded)
    ]
    assert frames[0].shape == (2, 4, 32, 32, 3)
    assert np.array_equal(frames[0], frames[1])


def test_pipelines_refuse_each_others_folders_and_generators(tmp_path, known_to_diffusers):
    MoStGANVPipeline(generator=small_generator()).save_pretrained(tmp_path / "mostgan-v")
    StyleGANVPipeline(generator=StyleGANVGenerator(**GENERATOR)).save_pretrained(tmp_path / "stylegan-v")
    with pytest.raises(ValueError, match=r"StyleGANVPipeline.* MoStGANVPipeline"):
        MoStGANVPipeline.from_pretrained(tmp_path / "stylegan-v")
    with pytest.raises(ValueError, match=r"MoStGANVPipeline.* StyleGANVPipeline"):
        StyleGANVPipeline.from_pretrained(tmp_path / "mostgan-v")
    with pytest.raises(ValueError, match="generator is a StyleGANVGenerator: expected a MoStGANVGenerator"):
        MoStGANVPipeline(generator=StyleGANVGenerator(**GENERATOR))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a positive integer"),
        ({"num_frames": 0}, "num_frames=0: expected a positive integer"),
        ({"height": 64}, "height=64: expected 32"),
        ({"times": [-1.0]}, "expected numbers of frames from 0"),
        ({"class_labels": 1}, "this model is unconditional"),
        ({"output_type": "latent"}, 'output_type="latent": expected'),
    ],
)
def test_bad_inputs_of_the_pipeline(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoStGANVPipeline(generator=small_generator())(**arguments)
