"""The operators and layers of StyleGAN2 (Karras et al. 2020, https://arxiv.org/abs/1912.04958) in plain torch.

Everything is differentiable twice, which the R1 penalty needs. Pure functions first, then the layers with an equalised
learning rate, whose weights are drawn from N(0, 1) and scaled where they are used.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# The low-pass filter of every resampling in StyleGAN2, before it is scaled to sum 1.
BINOMIAL_TAPS = (1.0, 3.0, 3.0, 1.0)

# Slope of the leaky ReLU below 0, and the gain that restores the variance it takes.
LEAKY_SLOPE = 0.2
LEAKY_GAIN = math.sqrt(2)

# Filters up to this length are applied to both axes at once, longer ones to one axis after the other.
LONGEST_SQUARE_FILTER = 4


def normalize_second_moment(x: torch.Tensor) -> torch.Tensor:
    """Scales the rows of `(B, D)` to a mean square of 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
) -> torch.Tensor:
    """Bias, activation, gain and clamp, in this order.

    Args:
        x: `(B, C, ...)`.
        bias: `(C,)`, or None.
        activation: "linear", or "leaky_relu" of slope 0.2, which brings a gain of sqrt(2) of its own.
        gain: further factor.
        clamp: limit on the magnitude of the result, times `gain`; None for no limit.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: for an unknown activation.
    """
    if activation not in ("linear", "leaky_relu"):
        raise ValueError(f'activation="{activation}": expected "linear" or "leaky_relu".')
    if bias is not None:
        x = x + bias.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))
    total_gain = gain
    if activation == "leaky_relu":
        x = F.leaky_relu(x, LEAKY_SLOPE)
        total_gain = gain * LEAKY_GAIN
    if total_gain != 1:
        x = x * total_gain
    if clamp is not None:
        x = x.clamp(-clamp * gain, clamp * gain)
    return x


def fir_taps(taps: tuple[float, ...] = BINOMIAL_TAPS) -> torch.Tensor:
    """A low-pass filter `(K,)` of sum 1, for `upfirdn2d`."""
    tensor = torch.tensor(taps, dtype=torch.float32)
    return tensor / tensor.sum()


class DepthwiseFilter(torch.autograd.Function):
    """One fixed kernel applied to every channel with strides: `F.conv2d` without a gradient of the kernel.

    Its derivative is `TransposedDepthwiseFilter`, and the other way round. Left to torch, the second derivative would
    compute that of the kernel too, channel by channel, whether it is wanted or not.
    """

    @staticmethod
    def forward(ctx, x, kernel, stride, padding):
        ctx.save_for_backward(kernel)
        ctx.stride, ctx.padding, ctx.size = stride, padding, x.shape[2:]
        with torch.autocast(x.device.type, enabled=False):
            weight = kernel.expand(x.shape[1], 1, -1, -1)
            return F.conv2d(x, weight, stride=stride, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (kernel,) = ctx.saved_tensors
        return TransposedDepthwiseFilter.apply(grad, kernel, ctx.stride, ctx.padding, ctx.size), None, None, None


class TransposedDepthwiseFilter(torch.autograd.Function):
    """The transpose of `DepthwiseFilter`, to images of a given size: zeros between pixels, then the flipped kernel."""

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, size):
        ctx.save_for_backward(kernel)
        ctx.stride, ctx.padding = stride, padding
        # pixels at the end that no stride reaches
        rest = [
            size[axis] + 2 * padding[axis] - kernel.shape[axis] - (x.shape[2 + axis] - 1) * stride[axis]
            for axis in (0, 1)
        ]
        with torch.autocast(x.device.type, enabled=False):
            weight = kernel.expand(x.shape[1], 1, -1, -1)
            return F.conv_transpose2d(x, weight, None, stride, padding, rest, groups=x.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (kernel,) = ctx.saved_tensors
        return DepthwiseFilter.apply(grad, kernel, ctx.stride, ctx.padding), None, None, None, None


def upfirdn2d(
    x: torch.Tensor,
    taps: torch.Tensor,
    up: int = 1,
    down: int = 1,
    padding: int | tuple[int, int, int, int] = 0,
    gain: float = 1.0,
) -> torch.Tensor:
    """Upsamples, pads, filters and downsamples both axes of images.

    As `scipy.signal.upfirdn` along each axis, cropped: `up - 1` zeros after every pixel, then `padding`, then the
    convolution (the filter is flipped; its whole length lies within the padded image), then every `down`-th pixel.

    Args:
        x: `(B, C, H, W)`.
        taps: filter `(K,)` of both axes, through which no gradient flows; see `fir_taps`.
        up: upsampling factor of both axes.
        down: downsampling factor of both axes.
        padding: zeros around the upsampled image, for all sides or as (left, right, top, bottom); negative crops.
        gain: factor of the result; `up * up` keeps the brightness.

    Returns:
        `(B, C, H', W')` with `W' = (W * up + left + right - K) // down + 1`, and `H'` likewise.

    Raises:
        ValueError: for an image that, padded, is smaller than the filter.
    """
    left, right, top, bottom = (padding,) * 4 if isinstance(padding, int) else padding
    num_taps = taps.shape[0]
    height, width = x.shape[2] * up + top + bottom, x.shape[3] * up + left + right
    if height < num_taps or width < num_taps:
        raise ValueError(f"image of {height}x{width} pixels, padded: expected at least the {num_taps} of the filter.")

    # 1. The filter, flipped, as a depthwise kernel; for long filters one for each axis, with its strides (y, x)
    flipped = taps.to(x.dtype).flip(0)
    if num_taps <= LONGEST_SQUARE_FILTER:
        passes = [(torch.outer(flipped, flipped) * gain, (1, 1))]
    else:
        passes = [(flipped[None, :] * gain, (0, 1)), (flipped[:, None], (1, 0))]

    # 2. Along the axes of a pass: zeros in between and filter (a transposed convolution), or filter and stride
    if up > 1:  # that convolution begins num_taps - 1 pixels early and lacks the zeros behind the last pixel
        left, top = left - (num_taps - 1), top - (num_taps - 1)
        right, bottom = right - (num_taps - up), bottom - (num_taps - up)
    for kernel, (along_y, along_x) in passes:
        edges = (left * along_x, right * along_x, top * along_y, bottom * along_y)
        ups = (up if along_y else 1, up if along_x else 1)
        strides = (down if along_y else 1, down if along_x else 1)
        if up > 1:
            size = [(x.shape[2 + axis] - 1) * ups[axis] + kernel.shape[axis] for axis in (0, 1)]
            x = F.pad(TransposedDepthwiseFilter.apply(x, kernel.flip(0, 1), ups, (0, 0), size), edges)
            x = x[:, :, :: strides[0], :: strides[1]]
        else:
            is_even = edges[0] == edges[1] >= 0 and edges[2] == edges[3] >= 0  # which the convolution pads itself
            x = x if is_even else F.pad(x, edges)
            x = DepthwiseFilter.apply(x, kernel, strides, (edges[2], edges[0]) if is_even else (0, 0))
    return x


def upsample2d(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """`(B, C, H, W)` to `(B, C, 2 H, 2 W)` of the same brightness; the image stays centred."""
    num_taps = taps.shape[0]
    before, after = (num_taps + 1) // 2, (num_taps - 2) // 2
    return upfirdn2d(x, taps, up=2, padding=(before, after, before, after), gain=4.0)


def conv2d_resample(
    x: torch.Tensor,
    weight: torch.Tensor,
    taps: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
) -> torch.Tensor:
    """A convolution that keeps the size of the image, or doubles or halves it through the low-pass filter.

    Doubling is upsampling, filtering and convolution, here as a transposed convolution at the small size followed by
    the filter; halving is filtering, convolution and taking every second pixel, of which only those are computed.

    Args:
        x: `(B, C, H, W)`.
        weight: `(O, C / groups, k, k)` of odd k. As in the official networks it is correlated with the image, as
            `torch.nn.functional.conv2d` does it, except for `up=2`, which convolves (the kernel is flipped).
        taps: filter `(K,)`; needed with `up=2` or `down=2`.
        up: 1 or 2.
        down: 1 or 2; not together with `up=2`.
        groups: groups of channels.

    Returns:
        `(B, O, H * up / down, W * up / down)`.
    """
    half = weight.shape[2] // 2
    if up == 1 and down == 1:
        return F.conv2d(x, weight, padding=half, groups=groups)
    if taps is None or (up, down) not in ((2, 1), (1, 2)):
        raise ValueError(f"up={up}, down={down}: expected one of them to be 2, the other 1, and taps.")
    num_taps = taps.shape[0]
    if up == 2:
        transposed = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (C, O / groups, k, k)
        x = F.conv_transpose2d(x, transposed, stride=2, groups=groups)
        # what is left of the padding of the upsampled image, of which the convolution has used up k - 1 on each side
        before = (num_taps + 1) // 2 - half
        after = (num_taps - 2) // 2 - half + 1
        return upfirdn2d(x, taps, padding=(before, after, before, after), gain=4.0)
    before, after = (num_taps - 1) // 2, (num_taps - 2) // 2
    if half == 0:
        x = upfirdn2d(x, taps, down=2, padding=(before, after, before, after))
        return F.conv2d(x, weight, groups=groups)
    x = upfirdn2d(x, taps, padding=(before + half, after + half, before + half, after + half))
    return F.conv2d(x, weight, stride=2, groups=groups)


def per_sample_conv2d(
    x: torch.Tensor, weights: torch.Tensor, taps: torch.Tensor | None = None, up: int = 1
) -> torch.Tensor:
    """`conv2d_resample` with a weight for each sample: `(B, C, H, W)` and `(B, O, C, k, k)` to `(B, O, ...)`.

    One convolution with the batch as groups. Where the weights differ by factors of their input and output channels
    alone, `modulated_conv2d` computes the same with one weight for all samples and is faster.
    """
    batch_size = x.shape[0]
    x = conv2d_resample(x.flatten(0, 1)[None], weights.flatten(0, 1), taps, up=up, groups=batch_size)
    return x[0].unflatten(0, (batch_size, -1))


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    taps: torch.Tensor | None = None,
    up: int = 1,
    demodulate: bool = True,
) -> torch.Tensor:
    """Convolution with weights modulated and demodulated for each sample (StyleGAN2, section 2.2, equations 1 and 3).

    The factors of the weights are applied to the image instead: the input channels are scaled by the styles, the
    output channels by the demodulation. That saves the weights of each sample and runs as one plain convolution.

    Args:
        x: `(B, C, H, W)`.
        weight: `(O, C, k, k)`.
        styles: factors `(B, C)` of the input channels.
        taps: filter `(K,)`; needed with `up=2`.
        up: 1, or 2 to double the size; see `conv2d_resample`.
        demodulate: scale the weights of every sample and output channel to norm 1.

    Returns:
        `(B, O, H * up, W * up)` in the precision of `x`.
    """
    if not demodulate:
        scaled = x * styles.to(x.dtype)[:, :, None, None]
        return conv2d_resample(scaled, weight.to(x.dtype), taps, up=up)

    # 1. Both factors cancel in the demodulation; they keep half precision from overflowing
    weight = weight / math.sqrt(weight[0].numel())
    styles = styles / styles.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8)

    # 2. The norms of the modulated weights without the weights: sum over C of styles^2 times the kernel's square sum
    square_sums = weight.to(styles.dtype).square().sum(dim=(2, 3))  # (O, C)
    demodulation = (styles.square() @ square_sums.t() + 1e-8).rsqrt()  # (B, O)

    # 3. (B, O, H * up, W * up)
    x = conv2d_resample(x * styles.to(x.dtype)[:, :, None, None], weight.to(x.dtype), taps, up=up)
    return x * demodulation.to(x.dtype)[:, :, None, None]


def minibatch_standard_deviation(x: torch.Tensor, group_size: int = 4) -> torch.Tensor:
    """Appends a channel with the standard deviation within a group of samples, averaged over channels and pixels.

    Karras et al. 2018, https://arxiv.org/abs/1710.10196, section 3. Samples `i`, `i + B / group_size`, ... of the
    batch make up a group.

    Args:
        x: `(B, C, H, W)`.
        group_size: samples of a group; a smaller batch is one group.

    Returns:
        `(B, C + 1, H, W)`.

    Raises:
        ValueError: for a batch that does not fall into groups.
    """
    batch_size, _, height, width = x.shape
    group_size = min(group_size, batch_size)
    if batch_size % group_size != 0:
        raise ValueError(f"batch of {batch_size}: expected at most {group_size} samples, or a multiple of that.")
    groups = x.unflatten(0, (group_size, -1))  # (group_size, groups, C, H, W)
    deviation = (groups.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (groups,)
    channel = deviation.repeat(group_size).view(-1, 1, 1, 1).expand(-1, 1, height, width)
    return torch.cat([x, channel], dim=1)


class EqualizedLinear(nn.Module):
    """A linear layer with an equalised learning rate (Karras et al. 2018, section 4.1).

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias.
        activation: "linear" or "leaky_relu"; see `bias_act`.
        lr_multiplier: of the learning rate: weights are stored at 1 / `lr_multiplier` of their scale.
        bias_init: initial bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ):
        super().__init__()
        self.activation = activation
        self.lr_multiplier = lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init)) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, in_features)` to `(B, out_features)`, in the precision of the input."""
        x = F.linear(x, self.weight.to(x.dtype) * self.weight_gain)
        bias = None if self.bias is None else self.bias.to(x.dtype) * self.lr_multiplier
        return bias_act(x, bias, self.activation)


class EqualizedConv1d(nn.Module):
    """A 1-D convolution without padding, with an equalised learning rate and a leaky ReLU without gain.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: length of the kernel.
        lr_multiplier: of the learning rate; see `EqualizedLinear`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, lr_multiplier: float = 1.0):
        super().__init__()
        self.lr_multiplier = lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size) / lr_multiplier)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = lr_multiplier / math.sqrt(in_channels * kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, in_channels, L)` to `(B, out_channels, L - kernel_size + 1)`, in the precision of the input."""
        weight, bias = self.weight.to(x.dtype) * self.weight_gain, self.bias.to(x.dtype) * self.lr_multiplier
        return F.leaky_relu(F.conv1d(x, weight, bias), LEAKY_SLOPE)


class EqualizedConv2d(nn.Module):
    """A 2-D convolution with an equalised learning rate, that keeps or halves the size of the image.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel, odd.
        bias: whether there is a bias.
        activation: "linear" or "leaky_relu"; see `bias_act`.
        down: 1, or 2 to halve the size through the filter [1, 3, 3, 1].
        clamp: limit on the magnitude of the output; None for no limit.
    """

    taps: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        down: int = 1,
        clamp: float | None = None,
    ):
        super().__init__()
        self.activation = activation
        self.down = down
        self.clamp = clamp
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.register_buffer("taps", fir_taps(), persistent=False)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        """`(B, in_channels, H, W)` to `(B, out_channels, H / down, W / down)`, in the precision of the input."""
        x = conv2d_resample(x, self.weight.to(x.dtype) * self.weight_gain, self.taps, down=self.down)
        return bias_act(x, self.bias, self.activation, gain, self.clamp)
