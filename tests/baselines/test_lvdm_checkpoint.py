"""Official LVDM checkpoints: every name and shape of their layout, and outputs of the official networks."""

import functools
import zlib

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_endora.baselines.lvdm.autoencoder_lvdm import LVDMAutoencoder
from diffusers_endora.baselines.lvdm.lvdm_loss import make_lvdm_scheduler
from diffusers_endora.baselines.lvdm.original_checkpoint import (
    ema_name,
    load_lvdm_autoencoder_checkpoint,
    load_lvdm_checkpoint,
    official_autoencoder_names,
    official_unet_names,
)
from diffusers_endora.baselines.lvdm.unet_lvdm import LVDMUNet3DModel

Shapes = dict[str, tuple[int, ...]]

TABLES = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]

# Mean, deviation and six values, evenly spread, of what the official classes return in the test below
GOLDEN_NOISE = [0.0027413, 0.21841, 0.27115, -0.19302, 0.044785, -0.22546, 0.27793, -0.29675]
GOLDEN_MOMENTS = [-0.0046427, 0.19761, -0.16462, -0.080695, 0.30353, 0.20997, -0.22077, 0.10472]
GOLDEN_CLIP = [0.029307, 1.63, 0.19573, -1.1277, 0.31052, -1.1931, -0.22245, 0.78449]


def linear(name: str, out: int, *into: int) -> Shapes:
    return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}


def unet_shapes(
    channels: int, width: int, multipliers: tuple[int, ...], layers: int, factors: tuple[int, ...], frames: int,
    heads: int = 4, embedded: int = 0, completes: bool = False,
) -> Shapes:  # fmt: skip
    """Names and shapes in the order in which the official constructor makes them (`openaimodel3d.UNetModel`)."""
    shapes = linear("time_embed.0", 4 * width, width) | linear("time_embed.2", 4 * width, 4 * width)
    if embedded:
        shapes["label_emb.weight"] = (embedded, 4 * width)

    def residual(name: str, into: int, out: int) -> None:
        shapes.update(linear(f"{name}.in_layers.0", into) | linear(f"{name}.in_layers.2", out, into, 1, 3, 3))
        shapes.update(linear(f"{name}.emb_layers.1", 2 * out, 4 * width) | linear(f"{name}.out_layers.0", out))
        shapes.update(linear(f"{name}.out_layers.3", out, out, 1, 3, 3))
        if into != out:
            shapes.update(linear(f"{name}.skip_connection", out, into, 1, 1, 1))

    def attention(name: str, out: int) -> None:
        for axis in "st":
            shapes.update(linear(f"{name}.norm_{axis}", out) | linear(f"{name}.qkv_{axis}", 3 * out, out, 1))
            shapes.update(linear(f"{name}.proj_out_{axis}", out, out, 1))
        for of in "kv":
            shapes[f"{name}.relative_position_{of}.embeddings_table"] = (2 * frames + 1, out // heads)

    shapes.update(linear("input_blocks.0.0", width, channels + completes, 1, 3, 3))
    stack, out, factor, block = [width], width, 1, 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(layers):
            residual(f"input_blocks.{block}.0", out, multiplier * width)
            out = multiplier * width
            if factor in factors:
                attention(f"input_blocks.{block}.1", out)
            stack.append(out)
            block += 1
        if level != len(multipliers) - 1:
            shapes.update(linear(f"input_blocks.{block}.0.op", out, out, 1, 3, 3))
            stack.append(out)
            block, factor = block + 1, factor * 2
    residual("middle_block.0", out, out)
    attention("middle_block.1", out)
    residual("middle_block.2", out, out)
    block = 0
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for layer in range(layers + 1):
            residual(f"output_blocks.{block}.0", out + stack.pop(), multiplier * width)
            out, place = multiplier * width, 1
            if factor in factors:
                attention(f"output_blocks.{block}.1", out)
                place = 2
            if level > 0 and layer == layers:
                shapes.update(linear(f"output_blocks.{block}.{place}.conv", out, out, 1, 3, 3))
                factor //= 2
            block += 1
    return shapes | linear("out.0", out) | linear("out.2", channels, width, 1, 3, 3)


def autoencoder_shapes(width: int) -> Shapes:
    """Likewise of `autoencoder3d.AutoencoderKL` with 4 latent channels and factors 4, 8, 8."""
    shapes: Shapes = {}

    def convolution(name: str, out: int, into: int, size: int) -> None:
        shapes[f"{name}.weight"] = (out, into, size, size, size)  # `SamePadConv3d` registers its weight twice
        shapes.update(linear(f"{name}.conv", out, into, size, size, size))

    def residual(name: str, out: int) -> None:
        for number in (1, 2):
            shapes.update(linear(f"{name}.norm{number}", out))
            convolution(f"{name}.conv{number}", out, out, 3)

    convolution("encoder.conv_first", width, 3, 3)
    for block in range(3):
        convolution(f"encoder.conv_blocks.{block}.down", width * 2 ** (block + 1), width * 2**block, 4)
        residual(f"encoder.conv_blocks.{block}.res", width * 2 ** (block + 1))
    shapes.update(linear("encoder.final_block.0", 8 * width))
    convolution("encoder.final_block.2", 8, 8 * width, 3)
    for block, (into, out) in enumerate([(4, 8 * width), (8 * width, 4 * width), (4 * width, 2 * width)]):
        shapes[f"decoder.conv_blocks.{block}.up.convt.weight"] = (into, out, 4, 4, 4)
        shapes[f"decoder.conv_blocks.{block}.up.convt.bias"] = (out,)
        residual(f"decoder.conv_blocks.{block}.res1", out)
        residual(f"decoder.conv_blocks.{block}.res2", out)
    convolution("decoder.conv_out", 3, 2 * width, 3)
    convolution("quant_conv", 8, 8, 1)
    convolution("post_quant_conv", 4, 4, 1)
    return shapes


@functools.cache
def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that a name and a shape determine, equal for both names of a weight."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    start = zlib.crc32(name.replace(".conv.weight", ".weight").encode()) % 1000
    return (0.2 * torch.sin(1.7 * numbers + start)).float().reshape(shape)


def tiny_shapes(embedded: int = 0, completes: bool = False) -> Shapes:
    return unet_shapes(4, 32, (1, 2), 1, (2,), 3, embedded=embedded, completes=completes)


def checkpoint(unet: Shapes) -> dict[str, torch.Tensor]:
    """A denoiser's state dict in the official layout, whose moving average is -1 times the last weights."""
    tensors = {f"model.diffusion_model.{name}": values(name, shape) for name, shape in unet.items()}
    averages = {}
    for name, tensor in tensors.items():
        averages["model_ema." + name.removeprefix("model.").replace(".", "")] = -tensor
    tensors |= averages | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    tensors |= {name: torch.zeros(1000) for name in TABLES} | {"betas": make_lvdm_scheduler().betas}
    autoencoder = autoencoder_shapes(16)
    return tensors | {f"first_stage_model.{name}": values(name, shape) for name, shape in autoencoder.items()}


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return checkpoint(tiny_shapes())


def wave(*shape: int) -> torch.Tensor:
    return torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).float().reshape(shape)


# --- the layout


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {"frames": 4}),
        ({"num_classes": 7, "class_dropout_prob": 0.0}, {"frames": 4, "embedded": 7}),
        ({"num_frames": 5, "conditioning": "mask", "num_noise_levels": 251}, {"frames": 5, "embedded": 251}),
    ],
)
def test_names_and_shapes_of_the_official_unets(settings, arguments):
    with torch.device("meta"):
        unet = LVDMUNet3DModel(**settings)
    official = unet_shapes(4, 256, (1, 2, 3, 4), 3, (8, 4, 2), completes="conditioning" in settings, **arguments)
    names, ours = official_unet_names(unet), dict(unet.named_parameters())
    assert set(names) == set(official)
    assert sorted(names.values()) == sorted(ours)
    for name, shape in official.items():
        assert ours[names[name]].shape == (shape[:2] if name.endswith(("qkv_s.weight", "qkv_t.weight")) or
                                           ".proj_out_" in name else shape)  # fmt: skip
    assert len({ema_name(name) for name in names}) == len(names)
    assert ema_name("out.2.bias") == "model_ema.diffusion_modelout2bias"


def test_names_and_shapes_of_the_official_autoencoder():
    with torch.device("meta"):
        autoencoder = LVDMAutoencoder()
    names, ours, shapes = (
        official_autoencoder_names(autoencoder),
        dict(autoencoder.named_parameters()),
        autoencoder_shapes(32),
    )
    assert set(names) == set(shapes)
    assert set(names.values()) == set(ours)
    assert all(ours[names[name]].shape == shape for name, shape in shapes.items())


# --- reading


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_file_is_read_into_the_models(official, tmp_path, use_ema):
    torch.save({"state_dict": official, "epoch": 3, "global_step": 9}, tmp_path / "last.ckpt")
    read = load_lvdm_checkpoint(tmp_path / "last.ckpt", use_ema=use_ema, sample_size=8)
    assert dict(read.unet.config) | {
        "in_channels": 4, "model_channels": 32, "channel_multipliers": (1, 2), "layers_per_stage": 1,
        "attention_stages": (1,), "num_frames": 3, "sample_size": 8, "num_classes": None, "conditioning": None,
    } == dict(read.unet.config)  # fmt: skip
    sign = -1 if use_ema else 1
    assert torch.equal(read.unet.conv_in.weight, sign * values("input_blocks.0.0.weight", (32, 4, 1, 3, 3)))
    query = read.unet.mid_stage.layers[0].attention.temporal.to_qkv
    assert torch.equal(query.weight, sign * values("middle_block.1.qkv_t.weight", (192, 64)))
    assert read.autoencoder.config.base_channels == 16
    assert read.autoencoder.config.spatial_factor == 8
    assert read.scheduler.config.beta_schedule == "scaled_linear"
    assert not read.unet.training
    assert not read.autoencoder.training


def test_outputs_are_those_of_the_official_networks(official):
    """Numbers that the official classes return for the same weights and inputs, in float32 on a CPU."""
    read = load_lvdm_checkpoint(official, use_ema=False)
    with torch.no_grad():
        noise = read.unet(wave(2, 4, 5, 4, 4), torch.tensor([3, 700])).sample
        moments = read.autoencoder.encode(wave(1, 3, 8, 8, 16)).latent_dist.parameters
        clip = read.autoencoder.decode(wave(1, 4, 2, 1, 2)).sample
    for tensor, numbers in [(noise, GOLDEN_NOISE), (moments, GOLDEN_MOMENTS), (clip, GOLDEN_CLIP)]:
        found = torch.tensor([tensor.mean(), tensor.std(), *tensor.flatten()[:: tensor.numel() // 6][:6]])
        torch.testing.assert_close(found, torch.tensor(numbers), rtol=1e-3, atol=1e-3 * abs(numbers[1]))


def test_a_model_that_completes_frames_is_recognised():
    tensors = checkpoint(tiny_shapes(embedded=6, completes=True))
    read = load_lvdm_checkpoint(tensors, use_ema=False)
    assert read.unet.config.conditioning == "mask"
    assert read.unet.config.num_noise_levels == 6
    assert read.unet.config.num_classes is None
    assert torch.equal(read.unet.noise_level_embedder.weight, values("label_emb.weight", (6, 128)))


def test_a_model_with_classes_is_recognised():
    read = load_lvdm_checkpoint(checkpoint(tiny_shapes(embedded=6)), use_ema=False)
    assert read.unet.config.num_classes == 6
    assert read.unet.null_class is None
    assert read.unet(torch.zeros(1, 4, 1, 4, 4), torch.tensor(1), torch.tensor([5])).sample.shape == (1, 4, 1, 4, 4)


def test_other_betas_make_another_scheduler(official):
    betas = torch.linspace(1e-4, 2e-2, 1000)
    scheduler = load_lvdm_checkpoint(official | {"betas": betas}).scheduler
    torch.testing.assert_close(scheduler.betas, betas)
    assert isinstance(scheduler, DDPMScheduler)
    assert not scheduler.config.clip_sample


def test_an_autoencoder_of_its_own(tmp_path):
    tensors = {name: values(name, shape) for name, shape in autoencoder_shapes(16).items()}
    tensors |= {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4)}
    torch.save({"state_dict": tensors}, tmp_path / "ae.ckpt")
    autoencoder = load_lvdm_autoencoder_checkpoint(tmp_path / "ae.ckpt")
    assert torch.equal(autoencoder.last_layer, tensors["decoder.conv_out.weight"])
    assert autoencoder.encode(torch.zeros(1, 3, 4, 8, 8)).latent_dist.mode().shape == (1, 4, 1, 1, 1)


def test_half_precision_becomes_float32(official):
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in official.items()}
    unet = load_lvdm_checkpoint(halved | {"betas": official["betas"]}).unet
    assert unet.dtype == torch.float32
    assert torch.equal(unet.conv_out.bias, -values("out.2.bias", (4,)).half().float())


# --- refusing


UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{UNET}out.0.bias"), "lacks model.diffusion_model.out.0.bias; expected"),
        (lambda tensors: tensors.pop("posterior_variance"), "lacks posterior_variance"),
        (
            lambda tensors: tensors.update({"cond_stage_model.x": torch.zeros(1)}),
            "has the unknown cond_stage_model.x; expected the names of the official LVDM code",
        ),
        (
            lambda tensors: tensors.update({f"{UNET}out.2.bias": torch.zeros(5)}),
            r"model.diffusion_model.out.2.bias has shape \(5,\): expected \(4,\)",
        ),
        (
            lambda tensors: tensors.update({f"{UNET}out.2.bias": torch.full((4,), torch.nan)}),
            "out.2.bias has values that are not finite",
        ),
        (
            lambda tensors: tensors.update({"first_stage_model.decoder.conv_out.weight": torch.zeros(3, 32, 3, 3, 3)}),
            "decoder.conv_out.weight differs from the other name",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("first_stage_model.enc")],
            "lacks first_stage_model.encoder.conv_first.conv.weight; expected",
        ),
        (lambda tensors: tensors.pop(f"{UNET}input_blocks.0.0.weight"), "lacks model.diffusion_model.input_blocks"),
        (lambda tensors: tensors.update({"note": "text"}), r"holds other things than tensors \(note\)"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(official, change, message):
    tensors = dict(official)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load_lvdm_checkpoint({"state_dict": tensors}, use_ema=False)


def test_the_first_of_many_names_are_listed(official):
    tensors = {name: tensor for name, tensor in official.items() if "output_blocks.0" not in name}
    with pytest.raises(ValueError, match=r"lacks model.diffusion_model.output_blocks.0\S*, .* and \d+ more; expected"):
        load_lvdm_checkpoint(tensors, use_ema=False)


def test_a_checkpoint_without_average_needs_to_be_told(official):
    tensors = {name: tensor for name, tensor in official.items() if not name.startswith("model_ema.")}
    with pytest.raises(ValueError, match=r"has no moving average .* pass use_ema=False"):
        load_lvdm_checkpoint(tensors)
    assert load_lvdm_checkpoint(tensors, use_ema=False).unet.config.model_channels == 32


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_lvdm_checkpoint(tmp_path / "absent.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="expected"):
        load_lvdm_checkpoint(tmp_path / "list.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="expected the checkpoint of an official denoiser"):
        load_lvdm_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="expected the checkpoint of an official 3-D autoencoder"):
        load_lvdm_autoencoder_checkpoint(tmp_path / "other.ckpt")
    torch.save(
        {"state_dict": {"weight": torch.zeros(1)}, "callbacks": {"x": make_lvdm_scheduler()}}, tmp_path / "code.ckpt"
    )
    with pytest.raises(ValueError, match="refused, because it holds"):
        load_lvdm_checkpoint(tmp_path / "code.ckpt")
