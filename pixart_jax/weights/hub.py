"""Weights on the Hugging Face hub: which files of a repository are needed, and what the releases lack."""

from __future__ import annotations

import re
from pathlib import Path

from pixart_jax.errors import UserError, report
from pixart_jax.hub import (
    INDEX,
    PARTS,
    PREFIX,
    RELEASES_OWNER,
    HubPath,
    Snapshot,
    Wanted,
    in_bytes,
    is_hub,
    is_weights,
    local,
    local_all,
    look_up,
    needed_files,
    read_headers,
)

# The parts of a pipeline whose weights are read, as a network and besides it.
NETWORK, ENCODERS = ("transformer",), ("text_encoder", "vae")
# Pipelines with the text encoder and the VAE of releases that are only a transformer, or a file.
ALPHA_PIPELINE = f"{PREFIX}{RELEASES_OWNER}/PixArt-XL-2-512x512"
SIGMA_PIPELINE = f"{PREFIX}{RELEASES_OWNER}/pixart_sigma_sdxlvae_T5_diffusers"
# Folders of a pipeline. A local path such as 'PixArt-XL-2-512x512/vae' looks like a name of the hub.
_FOLDERS = (*PARTS, "tokenizer", "scheduler")


def local_folder(name: str, field: str) -> Path:
    """Returns a local folder of weights; one of the hub is downloaded once.

    Args:
      name: a folder, a path of the hub, or a repository such as 'PixArt-alpha/PixArt-XL-2-512x512'.
      field: the config field that names it, for messages.

    Raises:
      UserError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if is_hub(name):
        return local(name)
    check_hub_name(name, field)
    # A few old models have no owner.
    path = f"{PREFIX}{name}" if "/" in name else HubPath(name)
    try:
        return local(path)
    except UserError as error:
        raise UserError(f"{field} is '{name}': no such folder, and {error}") from None


def check_hub_name(name: str, field: str) -> None:
    """Raises a `UserError`, before minutes of retries, if a name can only be that of a folder.

    A name of the hub is OWNER/NAME or NAME. It has no other slash, and NAME is not that of a folder of a
    pipeline. Releases of PixArt have an owner.
    """
    owner, slash, rest = name.rpartition("/")
    is_path = not re.fullmatch(r"[\w.-]+", owner) or rest in _FOLDERS if slash else _is_release(name)
    if is_path or not re.fullmatch(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", name):
        raise UserError(
            f"{field} is '{name}', and there is no such folder: give its path{download_hint(name)}."
        )


def download_hint(path: str | Path) -> str:
    """The path of the hub for the release that a local path names, for messages; '' if there is none."""
    parts = Path(path).parts
    for index, name in enumerate(parts):
        if _is_release(name):
            return f", or '{PREFIX}{'/'.join((RELEASES_OWNER, *parts[index:]))}', which is downloaded"
    return ""


def _is_release(name: str) -> bool:
    return name.startswith(("PixArt-", "pixart_sigma_")) and name != RELEASES_OWNER


def network_folder(folder: Path) -> Path:
    """The folder of a network in a repository that has only a transformer; any other folder as it is."""
    inner = folder / "transformer"
    return inner if (inner / "config.json").is_file() and not (folder / INDEX).is_file() else folder


def local_network(path: str | Path) -> Path:
    """The path of the weights of a network. Of a pipeline on the hub, only its transformer is downloaded."""
    return network_folder(local(path, parts=NETWORK)) if is_hub(path) else Path(path)


def is_sigma_release(path: str | Path) -> bool:
    """Whether a path names a release of PixArt-Sigma on the hub. The files of a transformer do not say so."""
    text = str(path)
    return text.startswith(f"{PREFIX}{RELEASES_OWNER}/") and "sigma" in text.lower()


def pipeline_for(path: str | Path, pipeline: str | Path | None = None) -> str | Path | None:
    """The pipeline that provides the text encoder and the VAE of weights.

    Releases that are only a transformer, or a file, are used with those of another repository, which is
    printed.

    Args:
      path: the weights.
      pipeline: what the user gives; None for the default.

    Returns:
      A path, or None for the pipeline that the weights are a part of, and for all weights that are not
      releases on the hub.

    Raises:
      UserError: see `hub.local`.
    """
    if pipeline is not None or not is_hub(path):
        return pipeline
    place = HubPath.parse(path)
    if place.repository.partition("/")[0] != RELEASES_OWNER:
        return None
    below = f"{place.path}/" if place.path else ""
    files = look_up(path).files
    complete = all(
        any(name.startswith(f"{below}{part}/") for name in files) for part in (*ENCODERS, "tokenizer")
    )
    if complete and f"{below}{INDEX}" in files:
        return None
    found = SIGMA_PIPELINE if is_sigma_release(path) else ALPHA_PIPELINE
    report(f"'{path}' has no text encoder and VAE: those of {found} are used (--pipeline=… for others).")
    return found


def local_pipeline(
    path: str | Path, pipeline: str | Path | None, itemsizes: dict[str, float]
) -> tuple[Path, Path | None]:
    """Downloads what sampling needs, and says before how much that is and how much memory it takes.

    Args:
      path: the weights.
      pipeline: the pipeline that provides the text encoder and the VAE; None for `path` itself.
      itemsizes: bytes of a value in memory, of each of `PARTS`.

    Returns:
      Both as local paths.
    """
    wanted = [Wanted(path, NETWORK if pipeline is not None else None)]
    wanted += [Wanted(pipeline, ENCODERS)] if pipeline is not None else []
    _say_memory(wanted, itemsizes)
    found = local_all(wanted)
    if is_hub(path):
        found[0] = network_folder(found[0])
    return found[0], found[1] if pipeline is not None else None


def _say_memory(wanted: list[Wanted], itemsizes: dict[str, float]) -> None:
    """Says how much memory the weights take, if some of them have to be downloaded."""
    sizes: dict[str, float] = {}
    downloads = False
    for each in wanted:
        if not is_hub(each.path):
            continue
        snapshot = look_up(each.path)
        names = needed_files(snapshot.files, snapshot.place, parts=each.parts)
        downloads |= any(not (snapshot.folder / name).is_file() for name in names)
        below = f"{snapshot.place.path}/" if snapshot.place.path else ""
        for name in names:
            first = name.removeprefix(below).partition("/")[0]
            part = first if first in PARTS else NETWORK[0]
            if is_weights(name):
                sizes[part] = sizes.get(part, 0) + _values(snapshot, name) * itemsizes[part]
    if downloads and sizes:
        each = ", ".join(f"{part} {in_bytes(sizes[part])}" for part in PARTS if part in sizes)
        report(f"memory of the weights: {each}; the plan with everything else follows once they are loaded")


def _values(snapshot: Snapshot, name: str) -> float:
    """The number of values in a file of weights: exact for safetensors, otherwise as if in float32."""
    counts = read_headers(snapshot, [name]) if name.endswith(".safetensors") else {}
    return sum(counts.values()) or snapshot.files[name] / 4
