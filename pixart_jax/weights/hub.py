"""Folders of weights, local or on the HuggingFace hub."""

from __future__ import annotations

from pathlib import Path

from pixart_jax.errors import UserError


def local_folder(name: str, field: str) -> Path:
    """Returns a local folder of weights; a repository of the HuggingFace hub is downloaded once.

    Args:
      name: a folder, or a repository such as 'PixArt-alpha/PixArt-XL-2-512x512'.
      field: the config field that names it, for messages.

    Raises:
      UserError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    # An invalid name, no such repository, no network or no package: the fix is the same.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{field} is '{name}': no such folder, and it cannot be downloaded from HuggingFace ({reason}); "
            "give a folder in HuggingFace's layout."
        ) from None
