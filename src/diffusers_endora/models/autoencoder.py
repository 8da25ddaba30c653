"""Loading the VAE that stands between pixels and latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny

KINDS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def load_vae(path_or_repo: str | Path) -> AutoencoderKL | AutoencoderTiny:
    """Loads an `AutoencoderKL` or `AutoencoderTiny`, whichever its `config.json` names, for inference.

    Args:
        path_or_repo: folder or Hub id of the autoencoder; the paper trains with "stabilityai/sd-vae-ft-mse" and
            samples with "stabilityai/sd-vae-ft-ema".

    Raises:
        ValueError: for a place without an autoencoder, one of another kind, or one that lacks weights.
    """
    with _said_in_one_sentence(path_or_repo):
        kind = _kind_of(AutoencoderKL.load_config(path_or_repo))
        vae, loading_info = kind.from_pretrained(path_or_repo, output_loading_info=True)
        if missing := sorted(loading_info["missing_keys"]):  # diffusers would leave them random
            raise ValueError(f"it lacks {len(missing)} weights: {', '.join(missing)}")
    if Path(path_or_repo).exists():
        vae.register_to_config(_name_or_path=None)  # a published folder is not to tell where it was made
    return vae.eval()


def _kind_of(config: dict[str, Any]) -> type[AutoencoderKL] | type[AutoencoderTiny]:
    class_name = config.get("_class_name")
    if class_name not in KINDS:
        raise ValueError(f"it is a {class_name}")
    return KINDS[class_name]


@contextmanager
def _said_in_one_sentence(path_or_repo: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f'The VAE "{path_or_repo}" does not load ({reason}): expected a folder or Hub id of an AutoencoderKL or '
            "AutoencoderTiny; the paper trains with stabilityai/sd-vae-ft-mse and samples with "
            "stabilityai/sd-vae-ft-ema."
        ) from error


def load_vae_config(path_or_repo: str | Path) -> Any:
    """The config of the VAE that `load_vae` loads, with its class's defaults, without reading any weights.

    Raises:
        ValueError: as `load_vae` does, but for weights.
    """
    with _said_in_one_sentence(path_or_repo):
        config = AutoencoderKL.load_config(path_or_repo)
        with init_empty_weights():
            return _kind_of(config).from_config(config).config


def is_certain(config: Any) -> bool:
    """Whether the VAE has one code for a frame, as `AutoencoderTiny` has, and no posterior."""
    return "encoder_block_out_channels" in config


def vae_scale_factor(config: Any) -> int:
    """Pixels on a side of what becomes one latent."""
    blocks = config.encoder_block_out_channels if is_certain(config) else config.block_out_channels
    return 2 ** (len(blocks) - 1)
