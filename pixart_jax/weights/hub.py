"""Folders of weights, local or on the HuggingFace hub."""

from __future__ import annotations

import re
from pathlib import Path

from pixart_jax.errors import UserError

# Folders of a pipeline. A local path such as 'PixArt-XL-2-512x512/vae' looks like a name of the hub.
_PARTS = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
# The hub has the releases of PixArt under the name of their owner.
_OWNER = "PixArt-alpha"


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
    check_hub_name(name, field)
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


def check_hub_name(name: str, field: str) -> None:
    """Raises a `UserError`, before minutes of retries, if a name can only be that of a folder.

    A name of the hub is OWNER/NAME or NAME. It has no other slash, and NAME is not that of a folder of a
    pipeline. Releases of PixArt have an owner.
    """
    owner, slash, rest = name.rpartition("/")
    is_path = not re.fullmatch(r"[\w.-]+", owner) or rest in _PARTS if slash else _is_release(name)
    if is_path or name.startswith((".", "~")):
        raise UserError(
            f"{field} is '{name}', and there is no such folder: give its path{download_hint(name)}."
        )


def download_hint(path: str | Path) -> str:
    """How to download the release whose name is in a path, for messages; '' if there is none."""
    parts = Path(path).parts
    for index, name in enumerate(parts):
        if _is_release(name):
            folder = Path(*parts[: index + 1])
            return f", or download it with `hf download {_OWNER}/{name} --local-dir={folder}`"
    return ""


def _is_release(name: str) -> bool:
    return name.startswith(("PixArt-", "pixart_sigma_")) and name != _OWNER
