"""A folder of weights, here or on the HuggingFace hub."""

from __future__ import annotations

from pathlib import Path

from pixart_jax.errors import UserError


def local_folder(name: str, field: str) -> Path:
    """A local folder, or the copy of a HuggingFace repository that is fetched once."""
    if Path(name).is_dir():
        return Path(name)
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    # Not a name, no such repository, no network, no package: the user's remedy is the same.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{field} is '{name}': no such folder, and HuggingFace does not give it ({reason}); give a "
            "folder in HuggingFace's layout."
        ) from None
