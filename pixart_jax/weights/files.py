"""Reads safetensors and PyTorch files, and writes safetensors and .pth.

Reading is lazy: names and shapes are known once a file is open, and each tensor is read when it is accessed.
Writing is streamed and atomic: tensors are made one at a time and written under a temporary name, which is
changed to the final one when everything is on disk.

safetensors files do not need PyTorch. Pickles (.pth, .pt, .bin, .ckpt) are only read with
`torch.load(weights_only=True)`, which loads tensors and plain containers and never runs code from a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pixart_jax.errors import OutputError, UserError, one_of, writing
from pixart_jax.files import sha256_of_bytes, temporary
from pixart_jax.readers import parse_json, read_json

PICKLES = (".pth", ".pt", ".bin", ".ckpt")

# Names of weight files in HuggingFace folders. In a folder with several of them, the first suffix has
# priority, then the first stem. "{}" stands for the variant in a name, such as ".fp16", or for nothing.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SUFFIXES = (
    *("{}.safetensors.index.json", ".safetensors.index{}.json", "{}.safetensors"),
    *("{}.bin.index.json", ".bin.index{}.json", "{}.bin"),
)
_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.[\w-]+)?\.json")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}(\.[\w-]+)?\.(safetensors|bin)")
# Files of trainers that are not weights: optimizer.bin, scheduler.bin, training_args.bin and others.
_NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args).*")

# Keys of the two sets of weights in a PyTorch training checkpoint: those of PixArt's trainer, of DiT's and of
# DeepSpeed.
_GROUPS = {"ema": ("state_dict_ema", "ema"), "raw": ("state_dict", "model", "module")}
# What stands in place of a large file in a Git repository that was cloned without Git LFS.
_LFS_POINTER = b"version https://git-lfs"
# The group of a file that holds one set of tensors, without saying whether it is a moving average.
PLAIN = "plain"

# Formats of adapters that `adapter_export.WRITERS` can write.
ADAPTER_FORMATS = ("peft", "comfyui", "kohya")

# What to do if a file of a folder of weights is missing or damaged.
COPY = "copy the complete folder again"

# The model card of an export, and the line in it that marks a folder as an export.
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
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# Dtypes of PyTorch that NumPy lacks.
_TORCH_DTYPES = {
    "torch.bfloat16": ml_dtypes.bfloat16,
    "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch.float8_e5m2": ml_dtypes.float8_e5m2,
}


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is accessed.

    Attributes:
      path: the file or folder they come from, for messages.
      shapes: shape of every tensor, known without reading it.
      metadata: text that the file holds next to the tensors.
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
    """Opens a .safetensors file, a shard index, a PyTorch pickle, or a folder that holds one of them.

    Args:
      path: file or folder.
      which: 'ema' or 'raw', for a file that holds both; None for the moving average if there is one.

    Raises:
      UserError: there is no weight file, it is broken, or it holds more than tensors.
    """
    return pick_group(open_groups(path), which)


def open_groups(path: str | Path) -> dict[str, Tensors]:
    """All sets of weights in a file: 'ema' and 'raw' of a training checkpoint, else {'plain': …}."""
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    if not path.is_file():
        raise UserError(f"weights '{path}' do not exist: give a weight file or a folder that holds one.")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"'{path}' is a pointer of Git LFS, not the file itself: run 'git lfs pull' in its "
                "repository, or download the file."
            )
    if _INDEX.fullmatch(path.name):
        return {PLAIN: _open_index(path)}
    if path.suffix == ".safetensors":
        return {PLAIN: _open_safetensors(path)}
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise UserError(
        f"weights '{path}' end in '{path.suffix}': give a file that ends in .safetensors, "
        f"{', '.join(PICKLES)}, or a folder."
    )


def pick_group(groups: Mapping[str, Tensors], which: str | None) -> Tensors:
    """The requested group; None selects the first of 'ema', 'raw' and 'plain' that exists."""
    if which is not None:
        one_of("weights", which, ("ema", "raw"))
    if which in groups:
        return groups[which]
    tensors = next(groups[name] for name in ("ema", "raw", PLAIN) if name in groups)
    if which is not None and PLAIN not in groups:
        raise UserError(
            f"'{tensors.path}' holds {' and '.join(groups)} weights, not {which}: use "
            f"--weights={next(iter(groups))}."
        )
    return tensors


def find_weights(folder: Path) -> Path:
    """The weight file, or the index of its shards, in a HuggingFace folder.

    A folder that holds only one variant of the weights, such as fp16, is read too.
    """
    files = sorted(child.name for child in folder.iterdir() if child.is_file())
    known = [_known_name(name) for name in files]
    plain = [found for found in known if found and not found.variant]
    variants = sorted({found.variant for found in known if found})
    if plain or len(variants) == 1:
        return folder / min(plain or [found for found in known if found]).name
    if variants:
        names = ", ".join(found.name for found in known if found)
        raise UserError(f"folder '{folder}' has the weights in several variants: give one of {names}.")
    others = [
        name
        for name in files
        if Path(name).suffix in (".safetensors", *PICKLES) and not _NO_WEIGHTS.fullmatch(name)
    ]
    if others and all(map(_SHARD.fullmatch, others)):
        raise UserError(
            f"folder '{folder}' has the shards {', '.join(others)}, but not their index "
            "(….safetensors.index.json): copy the complete folder."
        )
    if len(others) == 1:
        return folder / others[0]
    inner = _folders_with_weights(folder)
    if others:
        advice = f"give one of {', '.join(others)}"
    elif inner:
        advice = f"give one of its folders, {', '.join(inner)}"
    else:
        advice = "give another folder"
    raise UserError(f"folder '{folder}' has no weights with a known name ({', '.join(_STEMS)}): {advice}.")


class _KnownName(NamedTuple):
    """A file name that HuggingFace gives to weights. The smallest one has priority."""

    suffix: int
    stem: int
    variant: str
    name: str


def _known_name(name: str) -> _KnownName | None:
    for at, suffix in enumerate(_SUFFIXES):
        before, after = map(re.escape, suffix.split("{}"))
        match = re.fullmatch(rf"({'|'.join(_STEMS)}){before}(\.[\w-]+)?{after}", name)
        if match and not _SHARD.fullmatch(name):
            return _KnownName(at, _STEMS.index(match[1]), match[2] or "", name)
    return None


def _folders_with_weights(folder: Path) -> list[str]:
    """Folders of models in the folder of a trainer, such as checkpoint-100/transformer_ema."""
    found = [*folder.glob("*/config.json"), *folder.glob("checkpoint-*/*/config.json")]
    return sorted(str(config.parent.relative_to(folder)) for config in found)


def _open_safetensors(path: Path) -> Tensors:
    try:
        # Opening the file checks its header and length. The tensors are read without the library, because its
        # numpy reader does not support bfloat16.
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"'{path}' is not a complete safetensors file ({error}): copy it again.") from error
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(_SAFETENSORS_DTYPES))
    if unknown:
        raise UserError(
            f"'{path}' holds {', '.join(unknown)} tensors: save them in F32, F16, BF16, F8_E4M3 or F8_E5M2."
        )

    def read(name: str) -> np.ndarray:
        entry = header[name]
        begin, end = entry["data_offsets"]
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        if begin == end:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=8 + length + begin, shape=shape)

    return Tensors(path, {name: tuple(entry["shape"]) for name, entry in header.items()}, read, metadata)


def _open_index(path: Path) -> Tensors:
    places = read_json(path, COPY, {"weight_map": {str: str}})["weight_map"]
    for name in set(places.values()):
        # A path could lead to files outside of the folder.
        if (
            name != os.path.basename(name)
            or "\\" in name
            or Path(name).suffix not in (".safetensors", *PICKLES)
        ):
            raise UserError(
                f"shard index '{path}' names the file '{name}': a shard must be the plain name of a "
                ".safetensors or .bin file in the same folder."
            )
    names = sorted(set(places.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise UserError(
            f"shard index '{path}' names {', '.join(missing)}, which the folder lacks: copy the complete "
            "folder."
        )
    shards = {name: open_tensors(path.parent / name) for name in names}
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
            f"'{path}' is a PyTorch file, and PyTorch is not installed: pip install torch, or give a "
            ".safetensors file."
        ) from error
    try:
        # Trainers store their arguments beside the weights. These classes hold plain values and run no code.
        with (
            torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]),
            warnings.catch_warnings(),
        ):
            # What torch warns of, such as the pickle protocol, is either read or an error.
            warnings.simplefilter("ignore")
            # Files from before PyTorch 1.6 are not zip archives and cannot be memory-mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        other = _unsupported_global(error)
        if other:
            raise UserError(
                f"'{path}' holds a {other}, and a PyTorch file must hold tensors and plain containers only, "
                "because other objects can run code. If you trust the file, load it with "
                "torch.load(…, weights_only=False) and save its state dict alone; or get it as .safetensors."
            ) from error
        raise UserError(
            f"'{path}' cannot be read ({_pickle_reason(error)}): a PyTorch file must be complete and hold "
            "tensors and plain containers only. Copy it again, or get it as .safetensors."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"'{path}' holds a {type(content).__name__}, not a dict of tensors: give a file of weights."
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
        some = ", ".join(str(name)[:40] for name in list(content)[:5]) + (", …" if len(content) > 5 else "")
        raise UserError(f"'{path}' holds no tensors{some and f', only {some}'}: give a file of weights.")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        try:
            dtype = _TORCH_DTYPES.get(str(tensor.dtype))
            if dtype is not None:
                bits = torch.int16 if tensor.itemsize == 2 else torch.uint8
                return tensor.contiguous().view(bits).numpy().view(dtype)
            return tensor.numpy()
        except (TypeError, RuntimeError) as error:
            raise UserError(
                f"'{path}': {name} is a {tensor.dtype} tensor ({tensor.layout}): save it in float32, "
                "float16, bfloat16 or float8."
            ) from error

    return Tensors(path, {name: tuple(value.shape) for name, value in tensors.items()}, read, metadata)


def _unsupported_global(error: Exception) -> str | None:
    """The class or function in a pickle that `weights_only` does not load; None if that is not the reason."""
    named = re.search(r"unsupported (?:global|class):?\s+(?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
    return named and named[1][:200]


def _pickle_reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    named = re.search(r"Unsupported operand \d+", text, re.IGNORECASE)
    return named.group() if named else re.split(r"\. |$", text or type(error).__name__)[0][:200]


# --- Writing ----------------------------------------------------------------------------------------


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes float32 tensors one by one, with only one of them in memory.

    Args:
      path: file to write.
      shapes: shape of every tensor by name.
      tensors: (name, float32 array) in the order of `shapes`.
      metadata: text for the header.
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
                raise ValueError(f"{name} {value.shape} is not the next tensor of the header")
            file.write(np.ascontiguousarray(value, "<f4").data)
        if next(expected, None) is not None:
            raise ValueError("fewer tensors than in the header")


def write_torch(
    path: Path, key: str, tensors: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]
) -> None:
    """Writes {key: {name: float32 tensor}, **metadata} with `torch.save`."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"writing '{path.name}' needs PyTorch: pip install torch, or choose an output that ends in "
            ".safetensors."
        ) from error
    state_dict = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in tensors}
    with path.open("wb") as file:
        try:
            torch.save({key: state_dict, **metadata}, file)
        except RuntimeError as error:  # of PyTorch's own code; the reason is an earlier exception, if any
            raise (
                error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error))
            ) from error


def check_output(path: str | Path, *, overwrite: bool = False) -> None:
    """Checks that `path` may be written.

    Raises:
      UserError: it exists and `overwrite` is False, or it is a folder that is not an export of this project.
      OutputError: no file can have this name.
    """
    path = Path(path).absolute()
    with writing(path):
        exists, is_full = path.exists(), path.is_dir() and any(path.iterdir())
    if exists and not overwrite:
        raise UserError(f"output '{path}' exists: choose another, or add --overwrite.")
    if is_full and not _is_export(path):
        # Otherwise --overwrite could delete a run directory or a home directory.
        raise UserError(
            f"output '{path}' is a folder that is not an export of this project; --overwrite does not delete "
            "it: choose another."
        )


@contextlib.contextmanager
def all_or_nothing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder whose contents are moved into the parent folder of `path` on success.

    The caller writes `path.name` into the temporary folder, and any files that belong next to `path`. If the
    caller raises an exception, nothing is left, and what is there already is not changed.

    Raises:
      UserError: see `check_output`.
      OutputError: the caller, or this function, gets an `OSError`.
    """
    path = Path(path).absolute()
    with writing(path):
        _restore(path)
        check_output(path, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the parent folder, so that the last step is a rename within one file system.
        with temporary(path.parent, is_folder=True) as folder:
            try:
                yield folder
            except OutputError as error:  # of a file in the temporary folder
                raise OutputError(path, error.__cause__ or error) from error
            besides = [child for child in folder.iterdir() if child.name != path.name]
            before = {child: _read_if_there(path.parent / child.name) for child in besides}
            try:
                for child in besides:
                    child.replace(path.parent / child.name)
                # `path` itself is moved last: if it exists, the export is complete.
                _replace(folder / path.name, path)
            except OSError:
                for child, data in before.items():
                    (path.parent / child.name).unlink(missing_ok=True)
                    if data is not None:
                        (path.parent / child.name).write_bytes(data)
                raise


def _read_if_there(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _is_export(folder: Path) -> bool:
    card = folder / CARD
    return card.is_file() and CARD_MARK in card.read_text(encoding="utf-8", errors="replace")


def _replace(source: Path, target: Path) -> None:
    """Renames `source` to `target`. An existing folder is set aside first and deleted at the end."""
    if not target.is_dir():
        source.replace(target)
        return
    old = _set_aside(target)
    target.rename(old)
    try:
        source.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _set_aside(target: Path) -> Path:
    """The path of a folder while it is replaced. `remove_leftovers` does not remove a folder of this name."""
    return target.with_name(f".pixart-{sha256_of_bytes(os.fsencode(target.name))[:16]}.old")


def _restore(target: Path) -> None:
    """Brings the folder back that a killed process had set aside, or removes it if it has been replaced."""
    old = _set_aside(target)
    if not old.is_dir():
        return
    if target.exists():
        shutil.rmtree(old)
    else:
        old.rename(target)
