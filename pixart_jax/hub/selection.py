"""Chooses the files of a repository to download."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from pixart_jax.errors import UserError, did_you_mean, listing
from pixart_jax.hub.paths import HubPath

# The file of a pipeline folder that names its class and its parts.
INDEX = "model_index.json"
# Folders of a pipeline that hold weights.
PARTS = ("transformer", "text_encoder", "vae")

# Weights in the order in which a folder's format is chosen. Those below .ckpt are never read here.
_FORMATS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_UNREAD = (
    *(".msgpack", ".h5", ".onnx", ".onnx_data", ".ot", ".gguf", ".tflite", ".pb", ".mlmodel", ".mlpackage"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".svg", ".mp4", ".webm", ".pdf", ".ipynb"),
)
# Names that libraries give to weights. Only these have variants, such as model.fp16.safetensors.
_KNOWN = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model|adapter_model|pytorch_lora_weights)"
    r"(?P<before>\.[A-Za-z]\w*)?(?:-\d{5}-of-\d{5})?(?P<after>\.[A-Za-z]\w*)??"
    r"(?P<format>\.safetensors|\.bin)(?:\.index(?P<last>\.[A-Za-z]\w*)?\.json)?"
)
# Files of trainers that are not weights, and the state of the optimizer in our checkpoints.
_STATE = re.compile(r"(?:optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args)[\w.-]*")
_OPTIMIZER = re.compile(r"(?:.*/)?checkpoints/\d+/optimizer/.*")
# Small files that are read together with a file beside them.
_BESIDE = ("adapter_config.json", "config.json", "README.md")


def needed_files(
    files: Mapping[str, int],
    place: HubPath,
    *,
    parts: Collection[str] | None = None,
    everything: bool = False,
) -> list[str]:
    """Chooses the files to download.

    In each folder, it prefers safetensors to other formats, and plain weights to variants such as fp16. It
    skips formats that this project does not read, pictures, and the states of trainers.

    Args:
      files: sizes of all files of the repository, by path.
      place: what is wanted of it.
      parts: the folders of a pipeline whose weights are needed; None for all, () for no weights at all.
      everything: whether to take all files, as of a data set.

    Raises:
      UserError: there is no such folder or file, or the folder has several files of weights with names that
        do not say which one to take.
    """
    path = place.path
    if path in files:
        return _with_neighbours(files, path)
    below = f"{path}/" if path else ""
    inside = [
        name
        for name in files
        if name.startswith(below) and not any(part.startswith(".") for part in name[len(below) :].split("/"))
    ]
    if not inside:
        raise _no_such_path(files, place)
    if everything or place.dataset:
        return inside
    folders = defaultdict(list)
    for name in inside:
        if _OPTIMIZER.fullmatch(name):
            continue
        folders[os.path.dirname(name)].append(os.path.basename(name))
    chosen = []
    for folder, names in folders.items():
        chosen += [f"{folder}/{name}" if folder else name for name in _of_folder(names, folder, place)]
    pipeline = f"{below}{INDEX}" in files

    def is_needed(name: str) -> bool:
        if not is_weights(os.path.basename(name)):
            return True
        first, slash, _ = name[len(below) :].partition("/")
        part = first if slash else ""
        if pipeline and not part:  # a single file beside the parts
            return False
        return parts is None or part in parts or (bool(parts) and part not in PARTS)

    return [name for name in chosen if is_needed(name)]


def _of_folder(names: Sequence[str], folder: str, place: HubPath) -> Iterator[str]:
    """The needed files of one folder."""
    weights = [name for name in names if is_weights(name)]
    others = [name for name in names if name not in weights]
    yield from (name for name in others if not name.lower().endswith(_UNREAD))
    known = {name: found for name in weights if (found := _KNOWN.fullmatch(name))}
    plain = [name for name, found in known.items() if not _variant(found)]
    variants = sorted({_variant(found) for found in known.values()} - {""})
    if plain or variants:
        if not plain and len(variants) > 1:
            each = listing(f"'{os.path.join(folder, name)}'" for name in known)
            raise UserError(
                f"'{place}' has weights only in several variants ({each}): give one of the files."
            )
        usable = plain or list(known)
        formats = {name: _FORMATS.index(known[name]["format"]) for name in usable}
        yield from (name for name in usable if formats[name] == min(formats.values()))
        return
    ranks = {name: _FORMATS.index(_format(name)) for name in weights if not _STATE.fullmatch(name)}
    best = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    shards = all(re.search(r"-\d{5}-of-\d{5}\.", name) for name in best)
    if len(best) > 1 and not shards and folder == place.path:
        each = listing(f"'{place}/{name}'" for name in best)
        raise UserError(f"'{place}' has several files of weights: give one of {each}.")
    yield from best


def _with_neighbours(files: Mapping[str, int], path: str) -> list[str]:
    """A file with the small files that are read beside it, and the shards that an index names."""
    folder, name = os.path.split(path)
    below = f"{folder}/" if folder else ""
    beside = [f"{below}{other}" for other in (*_BESIDE, f"{name}.md") if is_weights(name)]
    found = [path, *(other for other in beside if other in files and other != path)]
    index = _KNOWN.fullmatch(name)
    if index and ".index" in name:
        for other in files:
            shard = _KNOWN.fullmatch(other.removeprefix(below)) if other.startswith(below) else None
            if (
                shard
                and re.search(r"-\d{5}-of-\d{5}", other)
                and all(
                    part(shard) == part(index)
                    for part in (_variant, lambda each: each["stem"], lambda each: each["format"])
                )
            ):
                found.append(other)
    return found


def _format(name: str) -> str:
    found = _KNOWN.fullmatch(name)
    return found["format"] if found else os.path.splitext(name)[1].lower()


def is_weights(name: str) -> bool:
    """Whether a file has weights, by its name."""
    return _format(name) in _FORMATS


def _variant(found: re.Match) -> str:
    return found["before"] or found["after"] or found["last"] or ""


def _no_such_path(files: Iterable[str], place: HubPath) -> UserError:
    parent = place.path
    while parent and not any(name.startswith(f"{parent}/") for name in files):
        parent = os.path.dirname(parent)
    below = f"{parent}/" if parent else ""
    tops = {name[len(below) :].split("/")[0] for name in files if name.startswith(below)}
    known = sorted(name for name in tops if not name.startswith("."))
    wanted = place.path[len(below) :].split("/")[0]
    shown = listing(known[:20]) + (", …" if len(known) > 20 else "")
    where = f"folder '{parent}' of {place.repository}" if parent else place.repository
    return UserError(
        f"'{place}': there is no such folder or file; {where} has {shown or 'no files'}."
        f"{did_you_mean(wanted, known)}"
    )
