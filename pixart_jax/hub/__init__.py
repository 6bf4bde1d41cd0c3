"""Paths of the Hugging Face hub: hub:OWNER/NAME[@REVISION][/PATH], of a data set hub:datasets/OWNER/NAME….

    local("hub:PixArt-alpha/PixArt-XL-2-512x512")       # downloads what is needed, and returns the folder
    local("PixArt-XL-2-512x512")                        # any other path is returned as it is
    pinned("hub:PixArt-alpha/PixArt-XL-2-512x512")      # hub:…@COMMIT, which always names the same files

PATH is a folder or a file of the repository. `huggingface_hub` downloads, resumes and caches; this package
chooses the files, says what is downloaded, and explains what went wrong. What is stored in configs,
checkpoints and images are pinned paths, never folders of the cache (`name_of`).
"""

from pixart_jax.hub.downloads import (
    Snapshot,
    Wanted,
    cached,
    in_bytes,
    local,
    local_all,
    look_up,
    pinned,
    read_headers,
)
from pixart_jax.hub.messages import BUGS, explained
from pixart_jax.hub.paths import (
    PREFIX,
    RELEASES,
    RELEASES_OWNER,
    HubPath,
    check_paths,
    hub_parts,
    is_hub,
    name_of,
    names_one,
    release,
    without_weight,
)
from pixart_jax.hub.selection import INDEX, PARTS, is_weights, needed_files

__all__ = [
    "BUGS",
    "INDEX",
    "PARTS",
    "PREFIX",
    "RELEASES",
    "RELEASES_OWNER",
    "HubPath",
    "Snapshot",
    "Wanted",
    "cached",
    "check_paths",
    "explained",
    "hub_parts",
    "in_bytes",
    "is_hub",
    "is_weights",
    "local",
    "local_all",
    "look_up",
    "name_of",
    "names_one",
    "needed_files",
    "pinned",
    "read_headers",
    "release",
    "without_weight",
]
