"""The networks of the official StyleGAN-V to and from those of this package.

The names are those of the official code (https://github.com/universome/stylegan-v, `src/training/networks.py`,
`layers.py` and `motion.py`). Tensors have the same layout on both sides, so that only names change. What the official
networks keep as buffers and these compute, filters and frequencies, is compared on the way in and written on the way
out.
"""

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .discriminator_stylegan_v import (
    DIFFERENCE_EMBEDDING_DIM,
    LAST_RESOLUTION,
    StyleGANVDiscriminator,
)
from .generator_stylegan_v import FIRST_RESOLUTION, StyleGANVGenerator
from .operators import fir_taps

Tensors = dict[str, torch.Tensor]
Network = TypeVar("Network", StyleGANVGenerator, StyleGANVDiscriminator)

NAMES_LISTED = 4  # of those that are missing or too many, in an error

# Beginnings of names here -> in the official code; `blocks.3.` and the like are those of a resolution
GENERATOR_NAMES = {
    "mean_w": "mapping.w_avg",
    "const": "synthesis.b4.input.input.const",
    "mapping.layers.": "mapping.fc",
    "mapping.embed.": "mapping.embed.",
    "motion_encoder.convs.": "synthesis.motion_encoder.conv.",
    "motion_encoder.time_encoder.period_predictor.": "synthesis.motion_encoder.time_encoder.periods_predictor.",
    "motion_encoder.time_encoder.phase_predictor.": "synthesis.motion_encoder.time_encoder.phase_predictor.",
    "motion_encoder.time_encoder.anchor_predictor.": "synthesis.motion_encoder.time_encoder.aligners_predictor.",
    "motion_style_mapping.": "synthesis.multimotionmap.",  # of MoStGAN-V
}
DISCRIMINATOR_NAMES = {
    "mapping.layers.": "mapping.fc",
    "mapping.embed.": "mapping.embed.",
    "time_encoder.embedding.": "time_encoder.const_embed.",
    "epilogue.conv.": "b4.conv.",
    "epilogue.hidden.": "b4.fc.",
    "epilogue.out.": "b4.out.",
}


def convert_generator(tensors: Tensors, settings: dict[str, Any]) -> StyleGANVGenerator:
    """A generator of this package from the official one's tensors, such as `G_ema` of a network pickle.

    Args:
        tensors: parameters and buffers by their official names.
        settings: `arguments` and `cfg` of the official network, see `NetworkPickle`; only what shapes do not tell is
            taken from it, and may be missing.

    Raises:
        ValueError: names are missing or too many, shapes do not fit, or the network is of another kind.
    """
    return with_tensors(StyleGANVGenerator(**generator_config(tensors, settings)), tensors)


def convert_discriminator(tensors: Tensors) -> StyleGANVDiscriminator:
    """A discriminator of this package from the official one's tensors.

    Raises:
        ValueError: see `convert_generator`.
    """
    return with_tensors(StyleGANVDiscriminator(**discriminator_config(tensors)), tensors)


def official_tensors(network: StyleGANVGenerator | StyleGANVDiscriminator) -> Tensors:
    """The tensors of a network, or of one of MoStGAN-V, by their official names: what `convert_*` takes."""
    own = network.state_dict()
    return {official: own[name] for name, official in official_names(network).items()} | computed_buffers(network)


# --- names -----------------------------------------------------------------------------------------------------------


def official_names(network: StyleGANVGenerator | StyleGANVDiscriminator) -> dict[str, str]:
    """Name here -> official name, of all that is saved of a network."""
    is_generator = isinstance(network, StyleGANVGenerator)
    rename = generator_name if is_generator else discriminator_namer(network)
    return {name: rename(name) for name in network.state_dict()}


def generator_name(name: str) -> str:
    """`blocks.1.to_rgb.bias` to `synthesis.b8.torgb.bias`, ..."""
    if found := re.match(r"blocks\.(\d+)\.", name):
        rest = name[found.end() :].replace("to_rgb.", "torgb.")
        return f"synthesis.b{FIRST_RESOLUTION * 2 ** int(found[1])}.{rest}"
    return renamed(name, GENERATOR_NAMES)


def discriminator_namer(network: StyleGANVDiscriminator) -> Callable[[str], str]:
    """`clip_blocks.0.skip.weight` to `b16.skip.weight`, ...: at which resolutions the blocks are, the network says."""
    config = network.config
    first = {"frame_blocks": config.resolution, "clip_blocks": config.concat_resolution}

    def name_of(name: str) -> str:
        if found := re.match(r"(\w+_blocks)\.(\d+)\.", name):
            return f"b{first[found[1]] // 2 ** int(found[2])}.{name[found.end() :]}"
        return renamed(name, {**DISCRIMINATOR_NAMES, "from_rgb.": f"b{config.resolution}.fromrgb."})

    return name_of


def renamed(name: str, names: dict[str, str]) -> str:
    """A name with another beginning."""
    beginning = next(beginning for beginning in names if name.startswith(beginning))
    return names[beginning] + name.removeprefix(beginning)


def computed_buffers(network: StyleGANVGenerator | StyleGANVDiscriminator) -> Tensors:
    """What the official network keeps as buffers and this one computes, by official name."""
    square = torch.outer(fir_taps(), fir_taps())
    names = official_names(network).values()
    if isinstance(network, StyleGANVGenerator):
        filtered = {name.rpartition(".")[0] for name in names if re.fullmatch(r"synthesis\.b\d+\.conv\d\.bias", name)}
        filtered |= {name.rpartition(".")[0] for name in filtered}  # the blocks, for their images
        encoder = network.motion_encoder.time_encoder
        frequencies = encoder.frequencies().float()[None]
        of_time = {
            "freqs": frequencies,
            "phase_scales": encoder.max_period / (2 * math.pi / frequencies),
        }
        buffers = {f"synthesis.motion_encoder.time_encoder.{name}": value for name, value in of_time.items()}
    else:
        filtered = {
            name.rpartition(".")[0] for name in names if re.search(r"^b\d+\.(fromrgb|conv\d?|skip)\.weight$", name)
        }
        filtered |= {name.partition(".")[0] for name in filtered if "skip" in name}  # the blocks
        buffers = {}
        if network.time_encoder is not None:
            count = network.time_encoder.num_frequencies
            octaves = 2.0 ** torch.arange(count)
            buffers["time_encoder.time_encoder.fourier_coefs"] = (octaves * math.pi / 2**count)[None]
    return buffers | {f"{name}.resample_filter": square for name in filtered}


def with_tensors(network: Network, tensors: Tensors) -> Network:
    """The network with official tensors.

    Raises:
        ValueError: names are missing or too many, a shape does not fit, or a buffer is not what is computed here.
    """
    kind = type(network).__name__
    names: dict[str, str] = official_names(network)
    buffers: Tensors = computed_buffers(network)
    missing = sorted({*names.values(), *buffers} - set(tensors))
    unexpected = sorted(set(tensors) - {*names.values(), *buffers})
    if missing or unexpected:
        parts = [f"lacks {listed(missing)}"] if missing else []
        parts += [f"has {listed(unexpected)}, which a {kind} does not"] if unexpected else []
        raise ValueError(f"the network {' and '.join(parts)}; is it one of another model, or of other settings?")
    own = network.state_dict()
    for name, official in names.items():
        if tensors[official].shape != own[name].shape:
            raise ValueError(
                f"{official} has shape {tuple(tensors[official].shape)}; a {kind} of this size has "
                f"{tuple(own[name].shape)}."
            )
    for official, expected in buffers.items():
        found = tensors[official]
        if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-6):
            raise ValueError(f"{official} is not that of the official settings, which a {kind} computes.")
    network.load_state_dict({name: tensors[official] for name, official in names.items()})
    return network.eval()


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return ", ".join(names[:NAMES_LISTED]) + more


# --- configurations --------------------------------------------------------------------------------------------------


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    """Raises a ValueError where there is no such tensor."""
    if name not in tensors:
        raise ValueError(f"the network lacks {name}; is it one of another model, or of other settings?")
    return tuple(tensors[name].shape)


def resolutions_in(tensors: Tensors, pattern: str) -> list[int]:
    """The resolutions of the blocks, largest first: what the group of `pattern` finds.

    Raises:
        ValueError: there are none.
    """
    found = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    if not found:
        raise ValueError("the network has no blocks of resolutions; is it one of another model?")
    return sorted(found, reverse=True)


def num_mapping_layers(tensors: Tensors) -> int:
    return sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in tensors)


def generator_config(tensors: Tensors, settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `StyleGANVGenerator` that official tensors are of.

    Raises:
        ValueError: a tensor is missing that says it, or the settings are none of the model's.
    """
    cfg = settings.get("cfg") or {}
    resolution = resolutions_in(tensors, r"synthesis\.b(\d+)\.conv1\.weight$")[0]
    layers = max(num_mapping_layers(tensors), 1)
    w_dim, mapped_dim = shape_of(tensors, f"mapping.fc{layers - 1}.weight")[0], shape_of(tensors, "mapping.fc0.weight")
    num_classes = shape_of(tensors, "mapping.embed.weight")[1] if "mapping.embed.weight" in tensors else None
    encoder = "synthesis.motion_encoder"
    motion_z_dim, _, kernel_size = shape_of(tensors, f"{encoder}.conv.0.weight")
    frequencies = shape_of(tensors, f"{encoder}.time_encoder.freqs")[1]
    freqs = tensors[f"{encoder}.time_encoder.freqs"][0].double()
    min_period, max_period = (round(2 * math.pi / float(freqs[place])) for place in (-1, 0))
    distance = (cfg.get("motion") or {}).get("motion_z_distance")
    distance = distance if isinstance(distance, int) else min_period  # which the official configuration makes equal
    if distance != min_period:
        raise ValueError(
            f"motion codes {distance} frames apart and a shortest period of {min_period} frames; expected them equal, "
            "as in the official configuration."
        )
    max_num_frames = (cfg.get("sampling") or {}).get("max_num_frames")
    return {
        "resolution": resolution,
        "z_dim": mapped_dim[1] - (w_dim if num_classes else 0),
        "w_dim": w_dim,
        "num_mapping_layers": layers,
        "channel_base": shape_of(tensors, f"synthesis.b{resolution}.conv1.weight")[0] * resolution,
        "channel_max": shape_of(tensors, "synthesis.b4.conv1.weight")[0],
        "num_classes": num_classes,
        "motion_z_dim": motion_z_dim,
        "motion_code_dim": shape_of(tensors, f"{encoder}.conv.1.weight")[0],
        "motion_z_distance": distance,
        "motion_kernel_size": kernel_size,
        "num_frequencies": frequencies,
        "max_period": max_period,
        **({"max_num_frames": max_num_frames} if isinstance(max_num_frames, int) else {}),
    }


def discriminator_config(tensors: Tensors, copies_of_frames: int = 1) -> dict[str, Any]:
    """The arguments of `StyleGANVDiscriminator` that official tensors are of.

    Args:
        copies_of_frames: how many features of each frame are concatenated; 2 with MoStGAN-V's differences.

    Raises:
        ValueError: a tensor is missing that says it.
    """
    resolutions = resolutions_in(tensors, r"b(\d+)\.conv1\.weight$")
    for concat_resolution in resolutions[1:]:
        in_channels = shape_of(tensors, f"b{concat_resolution}.conv0.weight")[1]
        frame_channels = shape_of(tensors, f"b{2 * concat_resolution}.conv1.weight")[0]
        if in_channels != frame_channels:
            break
    else:
        raise ValueError("the discriminator concatenates the frames at no resolution; is it one of another model?")
    num_frames = in_channels // (frame_channels * copies_of_frames)
    max_num_frames = shape_of(tensors, "time_encoder.const_embed.weight")[0]
    difference_dim = DIFFERENCE_EMBEDDING_DIM + 2 * math.ceil(math.log2(max_num_frames))
    num_classes = shape_of(tensors, "mapping.embed.weight")[1] - (num_frames - 1) * difference_dim
    if num_frames < 2 or num_classes < 0:
        raise ValueError("the discriminator does not take the frames and times of this model; is it one of another?")
    resolution = resolutions[0]
    return {
        "resolution": resolution,
        "num_frames_per_clip": num_frames,
        "channel_base": shape_of(tensors, f"b{resolution}.conv0.weight")[0] * resolution,
        "channel_max": shape_of(tensors, f"b{LAST_RESOLUTION}.conv.weight")[0],
        "num_classes": num_classes or None,
        "concat_resolution": concat_resolution,
        "num_mapping_layers": num_mapping_layers(tensors),
        "max_num_frames": max_num_frames,
    }
