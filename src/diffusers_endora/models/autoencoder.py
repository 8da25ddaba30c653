"""Loading the VAE that stands between pixels and latents."""

from pathlib import Path

from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel


def load_vae(path_or_repo: str | Path, **kwargs) -> AutoencoderKL | AutoencoderTiny:
    """Loads an `AutoencoderKL` or `AutoencoderTiny`, whichever its `config.json` names.

    Args:
        path_or_repo: folder or Hub id of the autoencoder; the paper trains with "stabilityai/sd-vae-ft-mse" and
            samples with "stabilityai/sd-vae-ft-ema".
        **kwargs: for `from_pretrained` of diffusers: `subfolder`, `revision`, `token`, `local_files_only`, ...

    Raises:
        ValueError: for a place without an autoencoder, or one of another kind.
    """
    try:
        vae = AutoModel.from_pretrained(path_or_repo, **kwargs)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f'The VAE "{path_or_repo}" does not load ({reason}): expected a folder or Hub id of an AutoencoderKL or '
            "AutoencoderTiny, such as the paper's stabilityai/sd-vae-ft-mse."
        ) from error
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
        raise ValueError(
            f'The VAE "{path_or_repo}" is a {type(vae).__name__}: expected an AutoencoderKL or AutoencoderTiny.'
        )
    return vae.eval()
