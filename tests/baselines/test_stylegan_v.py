"""StyleGAN-V's networks: official sizes, motion written out in numpy, and what makes its time continuous."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import correlate

from diffusers_endora.baselines.stylegan_v.discriminator_stylegan_v import StyleGANVDiscriminator
from diffusers_endora.baselines.stylegan_v.generator_stylegan_v import (
    MEAN_W_DECAY,
    AlignedTimeEncoder,
    MotionEncoder,
    StyleGANVGenerator,
)

GENERATOR = {
    "resolution": 16,
    "z_dim": 8,
    "w_dim": 12,
    "channel_base": 128,
    "channel_max": 16,
    "motion_z_dim": 6,
    "motion_code_dim": 7,
    "motion_z_distance": 4,
    "motion_kernel_size": 3,
    "num_frequencies": 5,
    "max_period": 64,
    "max_num_frames": 32,
}
DISCRIMINATOR = {"resolution": 16, "concat_resolution": 8, "channel_base": 128, "channel_max": 16}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def make_generator(**config) -> StyleGANVGenerator:
    """In double precision, so that equal things are equal to the last digits."""
    return StyleGANVGenerator(**{**GENERATOR, **config}).eval().double()


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def clip_times(num_frames: int, batch_size: int = 2) -> torch.Tensor:
    return torch.arange(num_frames).float().expand(batch_size, -1)


def test_official_numbers_of_parameters():
    """At 128 pixels and 16 frames: 31.86 million and 45.67 million."""
    with torch.device("meta"):
        generator, discriminator = StyleGANVGenerator(), StyleGANVDiscriminator(num_frames_per_clip=16)
        as_trained = StyleGANVDiscriminator(num_frames_per_clip=16, num_mapping_layers=2)
    assert num_parameters(generator) == 31_863_698
    assert num_parameters(discriminator) == 45_667_200
    assert num_parameters(as_trained) == 44_091_264


# --- motion ---------------------------------------------------------------------------------------------------------


def slow_motion_code(encoder: MotionEncoder, noise: np.ndarray, time: float) -> np.ndarray:
    """The motion code of a time, from the whole noise `(anchors, z_dim)`, as section 3.1 has it."""
    codes = noise
    for conv in encoder.convs:
        weight = conv.weight.detach().numpy() * conv.weight_gain  # (out, in, k)
        rows = [correlate(codes, kernel.T, mode="valid")[:, 0] for kernel in weight]
        codes = np.stack(rows, axis=1) + conv.bias.detach().numpy() * conv.lr_multiplier
        codes = np.where(codes < 0, 0.2 * codes, codes)
    index = math.floor(time / encoder.distance)
    left, right, share = codes[index], codes[index + 1], time / encoder.distance - index

    def linear(layer, code):
        return layer.weight.detach().numpy() @ code / math.sqrt(len(code))

    time_encoder = encoder.time_encoder
    periods = np.geomspace(time_encoder.max_period, time_encoder.min_period, time_encoder.num_frequencies)
    speeds = 2 * np.pi / periods * (np.tanh(linear(time_encoder.period_predictor, left)) + 1)
    phases = linear(time_encoder.phase_predictor, left) * time_encoder.max_period / periods

    def sinusoids(at):
        return np.concatenate([np.sin(speeds * at + phases), np.cos(speeds * at + phases)])

    before, after = (sinusoids((index + step) * encoder.distance) for step in (0, 1))
    anchors = [linear(time_encoder.anchor_predictor, code) for code in (left, right)]
    aligned = sinusoids(time) - (1 - share) * before - share * after
    return aligned + (1 - share) * anchors[0] + share * anchors[1]


def test_motion_codes_are_those_of_the_paper():
    """At any times, in any order, of clips that begin far apart: each from the noise around its own anchors."""
    generator = make_generator()
    encoder = generator.motion_encoder
    for conv in encoder.convs:  # as they are drawn, the biases are 0
        torch.nn.init.normal_(conv.bias, std=20.0)
    clips = [[0.0, 3.5, 4.0, 30.25], [101.5, 99.0, 8.0, 100.0], [101.5, 96.0, 101.0, 100.0]]
    times = torch.tensor(clips, dtype=torch.float64)
    noise = generator.draw_motion_noise(3, 101.5).double()
    codes = encoder(times, noise).detach()
    for clip in range(3):
        for frame in range(4):
            expected = slow_motion_code(encoder, noise[clip].numpy(), float(times[clip, frame]))
            np.testing.assert_allclose(codes[clip, frame].numpy(), expected, atol=1e-9)


def test_the_default_periods_are_from_16_to_1024_frames():
    frequencies = AlignedTimeEncoder(4, 256, 16, 1024).frequencies()
    assert math.isclose(frequencies[0], 2 * math.pi / 1024)
    assert math.isclose(frequencies[-1], 2 * math.pi / 16)
    assert torch.allclose(frequencies[1:] / frequencies[:-1], (frequencies[1] / frequencies[0]).expand(255))


def test_motion_is_continuous_across_anchors():
    """Though the sinusoids change their periods and phases there, which tears those of the two sides apart."""
    generator = make_generator()
    noise = generator.draw_motion_noise(1, 31).double()
    encoder, step = generator.motion_encoder, 1e-9
    for anchor in (4.0, 8.0, 20.0):
        times = torch.tensor([[anchor - step, anchor, anchor + step]], dtype=torch.float64)
        before, at, after = encoder(times, noise)[0]
        assert torch.allclose(before, at, atol=1e-6)
        assert torch.allclose(after, at, atol=1e-6)
    assert (encoder(torch.tensor([[4.0, 8.0]]).double(), noise).diff(dim=1).abs() > 1e-3).any()


def test_motion_noise_of_a_seed_does_not_depend_on_the_clip_up_to_max_num_frames():
    generator = make_generator()

    def draw(batch_size, last_time, seed=3):
        return generator.draw_motion_noise(batch_size, last_time, torch.Generator().manual_seed(seed))

    assert draw(2, 5).shape == (2, math.ceil(31 / 4) + 2 + 4, 6)
    assert torch.equal(draw(2, 5), draw(2, 31))
    assert draw(1, 41.0).shape == (1, math.ceil(41 / 4) + 2 + 4, 6)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert torch.equal(generator.draw_motion_noise(2, 5, generators), torch.cat([draw(1, 5), draw(1, 5, 4)]))


# --- generator ------------------------------------------------------------------------------------------------------


def test_a_frame_depends_on_its_own_time_alone():
    """Chunks, prefixes, other orders and other clips in the batch change nothing; other noise does."""
    generator = make_generator()
    z, noise = torch.randn(2, 8), generator.draw_motion_noise(2, 49)
    whole = generator(z, clip_times(50), motion_noise=noise).sample
    assert whole.shape == (2, 50, 3, 16, 16)
    chunks = [generator(z, times, motion_noise=noise).sample for times in clip_times(50).split(7, dim=1)]
    assert torch.allclose(torch.cat(chunks, dim=1), whole, atol=1e-10)
    shorter = noise[:, : generator.motion_encoder.num_anchors(9)]
    assert torch.allclose(generator(z, clip_times(10), motion_noise=shorter).sample, whole[:, :10], atol=1e-10)
    backwards = generator(z, clip_times(50).flip(1), motion_noise=noise).sample
    assert torch.allclose(backwards.flip(1), whole, atol=1e-10)
    alone = generator(z[1:], clip_times(50, 1), motion_noise=noise[1:]).sample
    assert torch.allclose(alone, whole[1:], atol=1e-10)
    assert (generator(z, clip_times(50), motion_noise=-noise).sample - whole).abs().amax() > 1e-3


def test_motion_noise_reaches_its_neighbourhood_only():
    generator = make_generator()
    z, noise = torch.randn(1, 8), generator.draw_motion_noise(1, 31)
    other = noise.clone()
    other[:, 8] += 1.0  # of the codes 4 to 8, which serve the times from 12 to 36
    times = torch.tensor([[0.0, 11.5, 12.5, 31.0]])
    frames, changed = (generator(z, times, motion_noise=each).sample[0] for each in (noise, other))
    assert torch.equal(frames[:2], changed[:2])
    assert (frames - changed).abs().flatten(1).amax(dim=1)[2:].min() > 0


def test_truncation():
    generator = make_generator()
    generator.mean_w.normal_()
    noise = generator.draw_motion_noise(2, 3)

    def clips(z, psi):
        return generator(z, clip_times(4), motion_noise=noise, truncation_psi=psi, return_dict=False)[0]

    z = torch.randn(2, 8)
    motion = generator.motion_encoder(clip_times(4).double(), noise.double())
    mean_clips = generator.synthesize(generator.mean_w.expand(8, -1), motion.flatten(0, 1)).unflatten(0, (2, 4))
    assert torch.allclose(clips(z, 0.0), mean_clips, atol=1e-10)
    assert torch.equal(clips(z, 1.0), generator(z, clip_times(4), motion_noise=noise).sample)
    assert (clips(z, 1.0) - clips(z, 0.5)).abs().max() > 1e-3
    w = generator.map_latents(z.double())
    assert torch.allclose(generator.map_latents(z.double(), None, 0.5), (w + generator.mean_w) / 2)


def test_the_mean_w_follows_in_training_alone():
    generator = make_generator()
    generator.mean_w.normal_()
    before, z = generator.mean_w.clone(), torch.randn(2, 8)
    generator(z, clip_times(1))
    assert torch.equal(generator.mean_w, before)
    w = generator.mapping(z.double())
    generator.train()(z, clip_times(1))
    assert torch.allclose(generator.mean_w, MEAN_W_DECAY * before + (1 - MEAN_W_DECAY) * w.mean(dim=0))
    assert not generator.mean_w.requires_grad


def test_classes_change_content_and_motion():
    generator = make_generator(num_classes=3)
    z, noise = torch.randn(1, 8).expand(3, -1), generator.draw_motion_noise(1, 3).expand(3, -1, -1)
    frames = generator(z, clip_times(2, 3), torch.tensor([0, 2, 2]), noise).sample
    assert torch.allclose(frames[1], frames[2], atol=1e-10)
    assert (frames[0] - frames[1]).abs().max() > 1e-3
    one_hot = torch.eye(3, dtype=torch.float64)
    codes = generator.motion_encoder(clip_times(2, 3).double(), noise.double(), one_hot)
    assert (codes[0] - codes[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_full_precision(dtype, tmp_path):
    """Far along in time too: the codes, whose angles grow with it, stay in full precision."""
    generator = make_generator().float()
    z, times = torch.randn(1, 8), 10_000 + clip_times(4, 1) / 4
    inputs = (z, times, None, generator.draw_motion_noise(1, 10_001))
    with torch.no_grad():
        expected = generator(*inputs).sample
        generator.save_pretrained(tmp_path)
        loaded = StyleGANVGenerator.from_pretrained(tmp_path, dtype=dtype)
        frames = loaded(*inputs).sample
    assert loaded.dtype == frames.dtype == loaded.const.dtype == dtype
    assert loaded.motion_encoder.convs[0].weight.dtype == loaded.mapping.layers[0].weight.dtype == torch.float32
    assert (frames.float() - expected).abs().mean() < 0.05 * expected.std()

    # wholly cast, the weights are rounded, which leads to another motion in the end; what they give is not
    with torch.no_grad():
        frames = generator.to(dtype)(*inputs).sample
        expected = generator.float()(*inputs).sample
    assert frames.dtype == dtype
    assert (frames.float() - expected).abs().mean() < 0.05 * expected.std()


def test_gradients_reach_every_parameter():
    """Those of logits every one, and those of the R1 penalty, the derivative of a derivative, every weight."""
    generator, discriminator = make_generator(num_classes=2), make_discriminator(num_classes=2)
    times, labels = torch.tensor([[0.0, 1.0, 3.0], [2.5, 4.5, 5.5]]), torch.tensor([0, 1])
    frames = generator(torch.randn(2, 8), times, labels).sample
    discriminator(frames, times, labels).sum().backward()
    for model in (generator, discriminator):
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().max() > 0, name

    discriminator.zero_grad()
    frames = frames.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(frames, times, labels).sum(), frames, create_graph=True)
    gradient.square().sum().backward()
    for name, parameter in discriminator.named_parameters():
        if not name.endswith("bias"):  # where all is piecewise linear, it does not change the slope
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("model_class", [StyleGANVGenerator, StyleGANVDiscriminator])
def test_save_and_load(model_class, tmp_path):
    config = GENERATOR if model_class is StyleGANVGenerator else DISCRIMINATOR
    model = model_class(**config, num_classes=2)
    for buffer in model.buffers():
        if buffer.shape == (12,):
            buffer.normal_()  # mean_w
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert dict(loaded.config)["num_classes"] == 2
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    times, labels = clip_times(3), torch.tensor([0, 1])
    if model_class is StyleGANVGenerator:
        inputs = (torch.randn(2, 8), times, labels, model.draw_motion_noise(2, 3), 0.5)
        assert torch.equal(loaded(*inputs).sample, model.eval()(*inputs).sample)
    else:
        frames = torch.randn(2, 3, 3, 16, 16)
        assert torch.equal(loaded(frames, times, labels), model(frames, times, labels))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resolution": 48}, "resolution=48: expected a power of 2 from 8"),
        ({"resolution": 4}, "resolution=4: expected a power of 2 from 8"),
        ({"num_frames": 0}, "num_frames=0: expected a positive integer"),
        ({"num_classes": 1.5}, "num_classes=1.5: expected a positive integer"),
        ({"channel_base": 8}, "channel_base=8: expected at least resolution=16"),
    ],
)
def test_generators_that_cannot_be_made(config, message):
    with pytest.raises(ValueError, match=message):
        StyleGANVGenerator(**{**GENERATOR, **config})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(2, 9)}, r"z has shape \(2, 9\): expected \(B, 8\)"),
        ({"times": torch.zeros(3, 4)}, r"times has shape \(3, 4\): expected \(2, F\)"),
        ({"times": torch.zeros(2, 0)}, r"times has shape \(2, 0\)"),
        ({"times": torch.tensor([[-0.5], [0.0]])}, "negative or not finite"),
        ({"times": torch.tensor([[0.5], [float("inf")]])}, "negative or not finite"),
        ({"motion_noise": torch.zeros(2, 5, 6)}, r"motion_noise has shape \(2, 5, 6\): expected \(2, 7 or more, 6\)"),
        ({"motion_noise": torch.zeros(1, 9, 6)}, r"motion_noise has shape \(1, 9, 6\)"),
        ({"class_labels": torch.zeros(2)}, "this model is unconditional"),
    ],
)
def test_inputs_that_do_not_fit_the_generator(changes, message):
    inputs = {"z": torch.zeros(2, 8), "times": torch.tensor([[0.0], [2.0]]), **changes}
    with pytest.raises(ValueError, match=message):
        make_generator()(**inputs)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "class_labels=None: expected labels from 0 to 1"),
        (torch.tensor([0, 2]), r"class_labels=\[0, 2\]: expected labels from 0 to 1"),
        (torch.tensor([0]), r"class_labels has shape \(1,\): expected \(2,\)"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    with pytest.raises(ValueError, match=message):
        make_generator(num_classes=2)(torch.zeros(2, 8), clip_times(1), labels)
    with pytest.raises(ValueError, match=message):
        make_discriminator(num_classes=2)(torch.zeros(2, 3, 3, 16, 16), clip_times(3), labels)


# --- discriminator --------------------------------------------------------------------------------------------------


def make_discriminator(**config) -> StyleGANVDiscriminator:
    return StyleGANVDiscriminator(**{**DISCRIMINATOR, **config}).double()


def test_the_discriminator_sees_time_differences_and_no_times():
    discriminator = make_discriminator()
    frames, times = torch.randn(4, 3, 3, 16, 16), torch.tensor([[0.0, 2.0, 7.0]]).expand(4, -1)
    logits = discriminator(frames, times)
    assert logits.shape == (4,)
    assert torch.allclose(discriminator(frames, times + 31.5), logits, atol=1e-10)
    for other in ([0.0, 3.0, 7.0], [0.0, 2.0, 7.25]):
        changed = discriminator(frames, torch.tensor([other]).expand(4, -1))
        assert (changed - logits).abs().min() > 1e-6
    assert (discriminator(frames.flip(1), times) - logits).abs().min() > 1e-6


def test_time_differences_are_embedded_and_in_sinusoids():
    encoder = make_discriminator(max_num_frames=20).time_encoder  # periods of 2 to 64 frames: 5 octaves
    encoded = encoder(torch.tensor([[1.5, 2.5, 8.25]], dtype=torch.float64)).detach()[0].view(2, 256 + 10)
    for row, difference in zip(encoded, (1.0, 5.75), strict=True):
        assert torch.equal(row[:256], encoder.embedding.weight[round(difference)])
        angles = np.pi * 2.0 ** np.arange(5) / 32 * difference
        np.testing.assert_allclose(row[256:].numpy(), np.concatenate([np.sin(angles), np.cos(angles)]))


def test_single_frames_have_no_differences():
    discriminator = make_discriminator(num_frames_per_clip=1)
    assert discriminator.mapping is None
    frames = torch.randn(2, 1, 3, 16, 16)
    assert torch.allclose(discriminator(frames, clip_times(1)), discriminator(frames, clip_times(1) + 5))
    by_class = make_discriminator(num_frames_per_clip=1, num_classes=2)
    logits = by_class(frames[:1].expand(2, -1, -1, -1, -1), clip_times(1), torch.tensor([0, 1]))
    assert (logits[0] - logits[1]).abs() > 1e-6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resolution": 8}, "resolution=8: expected a power of 2 larger than concat_resolution=8"),
        ({"resolution": 24}, "resolution=24: expected a power of 2"),
        ({"concat_resolution": 4}, "concat_resolution=4: expected a power of 2 from 8"),
        ({"num_frames_per_clip": 0}, "num_frames_per_clip=0: expected a positive integer"),
        ({"channel_base": 16}, "channel_base=16: expected at least 2 times resolution=16"),
    ],
)
def test_discriminators_that_cannot_be_made(config, message):
    with pytest.raises(ValueError, match=message):
        StyleGANVDiscriminator(**{**DISCRIMINATOR, **config})


@pytest.mark.parametrize(
    ("frames", "times", "message"),
    [
        (torch.zeros(2, 4, 3, 16, 16), clip_times(4), r"frames has shape \(2, 4, 3, 16, 16\): expected \(B, 3, 3, 16"),
        (torch.zeros(2, 3, 3, 16, 16), clip_times(2), r"times has shape \(2, 2\): expected \(2, 3\)"),
        (torch.zeros(2, 3, 3, 16, 16), -clip_times(3), "with steps from -1 to -1 frames: expected rising"),
        (torch.zeros(2, 3, 3, 16, 16), 2000 * clip_times(3), "steps up to 1023"),
        (torch.zeros(6, 3, 3, 16, 16), clip_times(3, 6), "batch of 6: expected at most 4 samples, or a multiple"),
    ],
)
def test_inputs_that_do_not_fit_the_discriminator(frames, times, message):
    with pytest.raises(ValueError, match=message):
        make_discriminator()(frames, times)
