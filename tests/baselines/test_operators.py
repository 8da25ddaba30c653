"""StyleGAN2's operators against slow ones of numpy and scipy, and their first and second derivatives."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d, correlate2d
from torch.autograd import gradcheck, gradgradcheck

from diffusers_endora.baselines.stylegan_v.operators import (
    EqualizedConv1d,
    EqualizedConv2d,
    EqualizedLinear,
    bias_act,
    conv2d_resample,
    fir_taps,
    minibatch_standard_deviation,
    modulated_conv2d,
    normalize_second_moment,
    per_sample_conv2d,
    upfirdn2d,
    upsample2d,
)

LOPSIDED_TAPS = (0.5, -1.0, 2.0, 3.0)
LONG_TAPS = (0.1, -0.3, 0.5, 2.0, 1.5, -0.7, 0.2)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def padded(image: np.ndarray, left: int, right: int, top: int, bottom: int) -> np.ndarray:
    """Zeros around a numpy image; negative numbers crop."""
    image = np.pad(image, ((max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))))
    return image[max(-top, 0) : image.shape[0] - max(-bottom, 0), max(-left, 0) : image.shape[1] - max(-right, 0)]


def slow_upfirdn(image: np.ndarray, taps, up: int, down: int, padding, gain: float) -> np.ndarray:
    stuffed = np.zeros((image.shape[0] * up, image.shape[1] * up))
    stuffed[::up, ::up] = image
    filtered = convolve2d(padded(stuffed, *padding), np.outer(taps, taps), mode="valid")
    return gain * filtered[::down, ::down]


def slow_conv(image: np.ndarray, weight: np.ndarray, taps: np.ndarray, up: int, down: int) -> np.ndarray:
    """`(C, H, W)` and `(O, C, k, k)`: filter at the large size, then convolution of every pixel, then steps."""
    half = weight.shape[2] // 2
    if up == 2:
        sides = (2 + half, 1 + half) * 2
        image = np.stack([slow_upfirdn(channel, taps, 2, 1, sides, 4.0) for channel in image])
        weight = weight[:, :, ::-1, ::-1]
    elif down == 2:
        image = np.stack([slow_upfirdn(channel, taps, 1, 1, (1 + half,) * 4, 1.0) for channel in image])
    else:
        image = np.stack([padded(channel, half, half, half, half) for channel in image])
    channels = range(weight.shape[1])
    rows = [sum(correlate2d(image[c], kernel[c], mode="valid") for c in channels) for kernel in weight]
    return np.stack(rows)[:, ::down, ::down]


@pytest.mark.parametrize("taps", [LOPSIDED_TAPS, LONG_TAPS])
@pytest.mark.parametrize(
    ("up", "down", "padding"),
    [
        (1, 1, (3, 3, 3, 3)),
        (2, 1, (4, 1, 0, 3)),
        (1, 2, (2, 1, 0, 5)),
        (3, 2, (1, 2, 3, 0)),
        (1, 2, (-1, 2, 3, -1)),
        (2, 2, (-2, -1, 1, 1)),
    ],
)
def test_upfirdn2d_is_zero_stuffing_padding_convolution_and_steps(taps, up, down, padding):
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    y = upfirdn2d(x, torch.tensor(taps, dtype=torch.float64), up, down, padding, gain=1.5)
    expected = [[slow_upfirdn(channel.numpy(), taps, up, down, padding, 1.5) for channel in image] for image in x]
    np.testing.assert_allclose(y.numpy(), np.array(expected), atol=1e-12)


def test_an_image_smaller_than_the_filter_is_refused():
    with pytest.raises(ValueError, match="3x2 pixels, padded: expected at least the 4"):
        upfirdn2d(torch.zeros(1, 1, 1, 2), fir_taps(), padding=(0, 0, 1, 1))


def halved(x, taps):
    return upfirdn2d(x, taps, down=2, padding=1)


@pytest.mark.parametrize("resample", [upsample2d, halved])
def test_resampling_keeps_brightness_and_centre(resample):
    """A constant stays itself away from the border, and a mirrored image gives the mirrored result."""
    y = resample(torch.ones(1, 2, 12, 8), fir_taps())
    assert torch.allclose(y[:, :, 2:-2, 2:-2], torch.ones(()))
    x = torch.randn(1, 2, 12, 8)
    assert torch.allclose(resample(x.flip(2, 3), fir_taps()), resample(x, fir_taps()).flip(2, 3), atol=1e-6)


def test_upsample2d_weighs_the_nearest_pixels_by_three_quarters_and_one():
    row = upsample2d(torch.tensor([1.0, 5.0, 9.0]).expand(1, 1, 3, 3), fir_taps())[0, 0, 2]
    assert torch.allclose(row, torch.tensor([0.75, 2.0, 4.0, 6.0, 8.0, 6.75]))


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_conv2d_resample_is_filter_and_convolution(kernel_size, up, down):
    x = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    weight = torch.randn(3, 2, kernel_size, kernel_size, dtype=torch.float64)
    taps = fir_taps().double()
    y = conv2d_resample(x, weight, taps, up, down)
    expected = slow_conv(x[0].numpy(), weight.numpy(), taps.numpy(), up, down)
    np.testing.assert_allclose(y[0].numpy(), expected, atol=1e-12)


def test_conv2d_resample_refuses_other_factors():
    x, weight = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3)
    with pytest.raises(ValueError, match="up=2, down=2"):
        conv2d_resample(x, weight, fir_taps(), up=2, down=2)
    with pytest.raises(ValueError, match="and taps"):
        conv2d_resample(x, weight, up=2)


@pytest.mark.parametrize("up", [1, 2])
def test_per_sample_conv2d_is_a_convolution_for_each_sample(up):
    x, weights = torch.randn(3, 4, 6, 6), torch.randn(3, 5, 4, 3, 3)
    expected = [conv2d_resample(x[i : i + 1], weights[i], fir_taps(), up) for i in range(3)]
    assert torch.allclose(per_sample_conv2d(x, weights, fir_taps(), up), torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_modulated_conv2d_is_a_convolution_with_modulated_weights(up, demodulate):
    x, weight, styles = torch.randn(3, 4, 6, 6), torch.randn(5, 4, 3, 3), torch.randn(3, 4)
    weights = weight * styles[:, None, :, None, None]
    if demodulate:
        weights = weights / (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    y = modulated_conv2d(x, weight, styles, fir_taps(), up, demodulate)
    assert torch.allclose(y, per_sample_conv2d(x, weights, fir_taps(), up), atol=1e-5)


def test_modulated_conv2d_does_not_overflow_half_precision():
    """Sums and squares are far beyond 65504 unless the factors that demodulation cancels are taken out first."""
    x = torch.full((1, 64, 4, 4), 250.0)
    weight, styles = 40 * torch.randn(2, 64, 3, 3), 300 * torch.rand(1, 64)
    y = modulated_conv2d(x.half(), weight.half(), styles)
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), modulated_conv2d(x, weight, styles), rtol=0.01, atol=1.0)


def test_bias_act():
    x, bias = torch.tensor([[-2.0, 1.0], [3.0, -300.0]]), torch.tensor([1.0, 0.0])
    assert torch.equal(bias_act(x, bias, gain=2.0), torch.tensor([[-2.0, 2.0], [8.0, -600.0]]))
    expected = torch.tensor([[-0.2, 1.0], [4.0, -60.0]]) * 2**0.5
    assert torch.allclose(bias_act(x, bias, "leaky_relu"), expected)
    assert torch.allclose(bias_act(x, bias, "leaky_relu", 0.5, clamp=5.0), (expected / 2).clamp(-2.5, 2.5))
    with pytest.raises(ValueError, match='activation="relu": expected "linear"'):
        bias_act(x, activation="relu")


def test_minibatch_standard_deviation():
    x = torch.randn(8, 3, 2, 5)
    y = minibatch_standard_deviation(x)
    assert torch.equal(y[:, :3], x)
    for sample in range(8):  # 0, 2, 4, 6 are one group, 1, 3, 5, 7 the other
        deviation = x[sample % 2 :: 2].numpy().std(axis=0).mean()
        np.testing.assert_allclose(y[sample, 3].numpy(), deviation, rtol=1e-5)
    assert minibatch_standard_deviation(x[:3]).shape == (3, 4, 2, 5)
    with pytest.raises(ValueError, match="batch of 6: expected at most 4 samples, or a multiple"):
        minibatch_standard_deviation(x[:6])


def test_normalize_second_moment():
    assert torch.allclose(normalize_second_moment(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 4.0]]) / 12.5**0.5)


def test_equalized_layers_scale_weights_at_use():
    linear = EqualizedLinear(6, 5, lr_multiplier=0.01, bias_init=2.0)
    x = torch.randn(4, 6)
    assert 50 < float(linear.weight.detach().std()) < 150  # stored at 1 / lr_multiplier
    assert torch.allclose(linear(x), x @ linear.weight.t() * 0.01 / 6**0.5 + 0.02, atol=1e-5)

    conv = EqualizedConv1d(2, 3, 5, lr_multiplier=0.01)
    weight = (conv.weight * 0.01 / 10**0.5).detach()
    expected = torch.nn.functional.leaky_relu(torch.conv1d(torch.ones(1, 2, 7), weight), 0.2)
    assert torch.allclose(conv(torch.ones(1, 2, 7)), expected, atol=1e-6)

    conv = EqualizedConv2d(2, 3, 3, activation="leaky_relu", down=2, clamp=0.5)
    x = torch.randn(1, 2, 8, 8)
    plain = conv2d_resample(x, conv.weight / 18**0.5, fir_taps(), down=2)
    assert torch.allclose(conv(x, gain=0.5), bias_act(plain, None, "leaky_relu", 0.5, 0.5), atol=1e-6)


DERIVED = {
    "upfirdn2d, short filter": lambda x: upfirdn2d(x, torch.tensor(LOPSIDED_TAPS), padding=(1, 2, 0, 3)),
    "upfirdn2d, long filter": lambda x: upfirdn2d(x, torch.tensor(LONG_TAPS), up=2, down=2, padding=(3, 2, 4, 1)),
    "upsample2d": lambda x: upsample2d(x, fir_taps()),
    "downsampling of odd sides": lambda x: upfirdn2d(x, fir_taps(), down=2, padding=1),
    "leaky_relu": lambda x: bias_act(x, x[0, :, 0, 0], "leaky_relu", 0.7, 3.0),
    "minibatch_standard_deviation": minibatch_standard_deviation,
}


@pytest.mark.parametrize("name", DERIVED)
def test_derivatives(name):
    x = double(2, 2, 5, 4)
    assert gradcheck(DERIVED[name], x)
    assert gradgradcheck(DERIVED[name], x)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_derivatives_of_the_convolution_with_resampling(up, down):
    inputs = (double(1, 2, 4, 4), double(2, 2, 3, 3))
    taps = fir_taps().double()
    assert gradcheck(lambda x, weight: conv2d_resample(x, weight, taps, up, down), inputs)
    assert gradgradcheck(lambda x, weight: conv2d_resample(x, weight, taps, up, down), inputs)


@pytest.mark.parametrize(("up", "demodulate"), [(1, True), (2, True), (1, False)])
def test_derivatives_of_the_modulated_convolution(up, demodulate):
    inputs = (double(2, 2, 3, 3), double(2, 2, 3, 3), double(2, 2))
    taps = fir_taps().double()

    def convolve(x, weight, styles):
        return modulated_conv2d(x, weight, styles, taps, up, demodulate)

    # without the epsilon of the demodulation its result would not depend on the factor that is taken out of the styles
    tolerance = {"atol": 1e-5, "rtol": 1e-3}
    assert gradcheck(convolve, inputs, **tolerance)
    assert gradgradcheck(convolve, inputs, **tolerance)


def test_filters_keep_their_precision_under_autocast():
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    conv = EqualizedConv2d(2, 3, 3, down=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        filtered = upsample2d(x, fir_taps())
    assert filtered.dtype == torch.float32
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()
    assert conv.weight.grad.abs().max() > 0
