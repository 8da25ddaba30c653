"""Loading the VAE that stands between pixels and latents."""

from pathlib import Path

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
    try:
        class_name = AutoencoderKL.load_config(path_or_repo).get("_class_name")
        if class_name not in KINDS:
            raise ValueError(f"it is a {class_name}")
        vae, loading_info = KINDS[class_name].from_pretrained(path_or_repo, output_loading_info=True)
        if missing := sorted(loading_info["missing_keys"]):  # diffusers would leave them random
            raise ValueError(f"it lacks {len(missing)} weights: {', '.join(missing)}")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f'The VAE "{path_or_repo}" does not load ({reason}): expected a folder or Hub id of an AutoencoderKL or '
            "AutoencoderTiny; the paper trains with stabilityai/sd-vae-ft-mse and samples with "
            "stabilityai/sd-vae-ft-ema."
        ) from error
    if Path(path_or_repo).exists():
        vae.register_to_config(_name_or_path=None)  # a published folder is not to tell where it was made
    return vae.eval()
