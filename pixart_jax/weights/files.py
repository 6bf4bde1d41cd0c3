"""Files of tensors: safetensors and PyTorch pickles in, safetensors and .pth out.

Reading is lazy: a file is opened, its names and shapes are known, and each tensor is read when it is asked
for. Writing is streamed and all-or-nothing: tensors are made one at a time, under a temporary name that
becomes the asked one when everything is on disk.

safetensors files need no PyTorch. A pickle (.pth, .pt, .bin, .ckpt) is read by
`torch.load(weights_only=True)` alone, which makes tensors and plain containers and never runs what a file
brings along.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pixart_jax.errors import UserError, one_of

PICKLES = (".pth", ".pt", ".bin", ".ckpt")

# Names that weight files of HuggingFace folders have, in the order they are looked for.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_NAMES = tuple(
    f"{stem}{suffix}"
    for suffix in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")
    for stem in _STEMS
)

# Groups of weights in a training checkpoint of PyTorch: of PixArt's trainer, and of DiT's.
_GROUPS = {"ema": ("state_dict_ema", "ema"), "raw": ("state_dict", "model")}
# The group of a file that holds the tensors themselves, without saying which they are.
PLAIN = "plain"

# The model card of an export, and the line by which an export is known.
CARD = "README.md"
CARD_MARK = "<!-- written by pixart_jax.convert -->"

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is asked for.

    Attributes:
      path: the file or folder they come from, for messages.
      shapes: of every tensor, known without reading it.
      metadata: text that the file carries beside the tensors.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = path
        self.shapes = dict(shapes)
        self.metadata = dict(metadata or {})
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


# --- Reading ----------------------------------------------------------------------------------------


def open_tensors(path: str | Path, which: str | None = None) -> Tensors:
    """Opens a .safetensors file, a shard index, a PyTorch pickle, or the folder that holds one of them.

    Args:
      path: file or folder.
      which: 'ema' or 'raw' of a file that holds both; None takes the moving average where there is one.

    Raises:
      UserError: there is nothing to read, it is broken, or it is no file of tensors alone.
    """
    return pick_group(open_groups(path), which)


def open_groups(path: str | Path) -> dict[str, Tensors]:
    """Every set of weights in a file: 'ema' and 'raw' of a training checkpoint, else {'plain': …}."""
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    if not path.is_file():
        raise UserError(f"weights '{path}' do not exist: give a weight file or a folder that holds one.")
    if path.name.endswith(".index.json"):
        return {PLAIN: _open_index(path)}
    if path.suffix == ".safetensors":
        return {PLAIN: _open_safetensors(path)}
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise UserError(
        f"weights '{path}' have the ending '{path.suffix}': give .safetensors, {', '.join(PICKLES)} or a "
        "folder."
    )


def pick_group(groups: Mapping[str, Tensors], which: str | None) -> Tensors:
    """The group asked for; None takes 'ema' before 'raw' before 'plain'."""
    if which is not None:
        one_of("weights", which, ("ema", "raw"))
    if which in groups:
        return groups[which]
    tensors = next(groups[name] for name in ("ema", "raw", PLAIN) if name in groups)
    if which is not None and PLAIN not in groups:
        raise UserError(
            f"'{tensors.path}' holds {' and '.join(groups)} weights, not {which}: take "
            f"--weights={next(iter(groups))}."
        )
    return tensors


def find_weights(folder: Path) -> Path:
    """The weight file, or the index of its shards, in a HuggingFace folder."""
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(child for child in folder.iterdir() if child.suffix in (".safetensors", *PICKLES))
    if len(others) == 1:
        return others[0]
    found = f"it holds {', '.join(child.name for child in others)}, name one" if others else "it holds none"
    raise UserError(f"folder '{folder}' has no weights by a known name ({', '.join(_STEMS)}): {found}.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing: copy the folder whole.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON ({error}): copy it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"'{path}' is not a JSON object: copy it again.")
    return value


def _open_safetensors(path: Path) -> Tensors:
    try:
        # Opening checks the header against the length of the file; tensors are read past it, because the
        # numpy reader of the library has no bfloat16.
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"'{path}' is not a whole safetensors file ({error}): copy it again.") from error
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(_SAFETENSORS_DTYPES))
    if unknown:
        raise UserError(f"'{path}' holds {', '.join(unknown)} tensors: save it in F32, F16 or BF16.")

    def read(name: str) -> np.ndarray:
        entry = header[name]
        begin, end = entry["data_offsets"]
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        if begin == end:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=8 + length + begin, shape=shape)

    return Tensors(path, {name: tuple(entry["shape"]) for name, entry in header.items()}, read, metadata)


def _open_index(path: Path) -> Tensors:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"shard index '{path}' has no 'weight_map' of file names: copy it again.")
    for name in set(places.values()):
        # Anything but a plain name could reach files that are none of this model's.
        if (
            name != os.path.basename(name)
            or "\\" in name
            or Path(name).suffix not in (".safetensors", *PICKLES)
        ):
            raise UserError(
                f"shard index '{path}' names the file '{name}': a shard must be a plain name of a "
                ".safetensors or .bin file in the same folder."
            )
    shards = {name: open_tensors(path.parent / name) for name in sorted(set(places.values()))}
    stray = [f"{name} is not in {place}" for name, place in places.items() if name not in shards[place]]
    stray += [
        f"{name} in {place} is not in the index"
        for place, shard in shards.items()
        for name in shard
        if places.get(name) != place
    ]
    if stray:
        raise UserError(
            f"shard index '{path}' and its shards differ: {'; '.join(sorted(stray))}. Copy them again."
        )
    shapes = {name: shards[place].shapes[name] for name, place in places.items()}
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return Tensors(path, shapes, lambda name: shards[places[name]][name], metadata)


def _open_pickle(path: Path) -> dict[str, Tensors]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"'{path}' is a PyTorch file and PyTorch is not here: pip install torch, or give a .safetensors "
            "file."
        ) from error
    try:
        # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise UserError(
            f"'{path}' is not read ({_pickle_reason(error)}): a PyTorch file may hold tensors and plain "
            "containers only, and must be whole. Copy it again, or get it as .safetensors."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"'{path}' holds a {type(content).__name__}: give a file that holds a dict of tensors."
        )
    metadata = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, str)
    }
    groups = {}
    for group, keys in _GROUPS.items():
        for key in keys:
            if isinstance(content.get(key), dict):
                groups[group] = _torch_tensors(path, content[key], metadata)
    return groups or {PLAIN: _torch_tensors(path, content, metadata)}


def _torch_tensors(path: Path, content: Mapping[str, Any], metadata: Mapping[str, str]) -> Tensors:
    import torch

    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise UserError(
            f"'{path}' holds no tensors but {', '.join(map(str, content))}: give a file of weights."
        )

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        try:
            if tensor.dtype == torch.bfloat16:
                return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()
        except (TypeError, RuntimeError) as error:
            raise UserError(
                f"'{path}': {name} is a {tensor.dtype} tensor ({tensor.layout}): save it in float32, float16 "
                "or bfloat16."
            ) from error

    return Tensors(path, {name: tuple(value.shape) for name, value in tensors.items()}, read, metadata)


def _pickle_reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    named = re.search(r"(unsupported global:? GLOBAL [\w.]+|Unsupported operand \d+)", text, re.IGNORECASE)
    return named.group(1) if named else re.split(r"\. |$", text or type(error).__name__)[0][:200]


# --- Writing ----------------------------------------------------------------------------------------


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes float32 tensors one after the other; only one of them is in memory at a time.

    Args:
      path: file to write.
      shapes: of every tensor.
      tensors: (name, float32 array) in the order of `shapes`.
      metadata: text to carry in the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(shapes.items())
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, value in tensors:
            if (name, value.shape) != next(expected):
                raise ValueError(f"{name} {value.shape} is not the tensor that the header announces here")
            file.write(np.ascontiguousarray(value, "<f4").data)
        if next(expected, None) is not None:
            raise ValueError("fewer tensors than the header announces")


def write_torch(
    path: Path, key: str, tensors: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]
) -> None:
    """Writes {key: {name: float32 tensor}, **metadata} as PyTorch does."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"writing '{path.name}' needs PyTorch: pip install torch, or choose a name that ends in "
            ".safetensors."
        ) from error
    state_dict = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in tensors}
    torch.save({key: state_dict, **metadata}, path)


def check_output(path: str | Path, *, overwrite: bool = False) -> None:
    """Whether `path` may be written.

    Raises:
      UserError: it exists and is not to be overwritten, or is a folder that no export of this project made.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise UserError(f"output '{path}' exists: choose another, or add --overwrite.")
    if path.is_dir() and any(path.iterdir()) and not _is_export(path):
        # --overwrite on a run directory or a home directory would remove what no export can bring back.
        raise UserError(
            f"output '{path}' is a folder with no export in it, which --overwrite leaves alone: choose "
            "another."
        )


@contextlib.contextmanager
def all_or_nothing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder to write into; on success what is in it comes to lie in the folder of `path`.

    The caller writes `path.name` into it, and whatever belongs beside it. On failure nothing is left.

    Raises:
      UserError: see `check_output`.
    """
    path = Path(path).absolute()
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder)
        # `path` itself last: when it is there, all of it is.
        written = sorted(Path(folder).iterdir(), key=lambda child: child.name == path.name)
        for child in written:
            _replace(child, path.parent / child.name)


def _is_export(folder: Path) -> bool:
    card = folder / CARD
    return card.is_file() and CARD_MARK in card.read_text(encoding="utf-8", errors="replace")


def _replace(source: Path, target: Path) -> None:
    """Renames `source` to `target`; what was there is removed last."""
    if not target.is_dir():
        source.replace(target)
        return
    old = target.with_name(f"{source.parent.name}.old")
    target.rename(old)
    try:
        source.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
