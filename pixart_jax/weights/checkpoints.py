"""Reading and writing the weights of checkpoints, and the layout that a checkpoint has on disk.

A run directory holds `checkpoints/STEP/ITEM`. STEP is the number of completed updates. Items:

    trained    the parameters that the optimizer changes, {"network": {...}, and other networks}
    frozen     the other parameters, likewise; absent if there are none
    ema        a moving average of `trained`; other averages have items of their own name
    optimizer  the optimizer's state, the step and the running average of the loss
    loader     position of the data loader
    metadata   format, config, versions, git revision, checksums of every array

Each item can be read alone: a sampler reads `ema` and `frozen`. An item that exists but cannot be read, or
whose arrays are not those that were saved, raises an error; nothing falls back to a fresh start.

Checkpoints of version 0.1 (format 1) have `params` in place of `trained`; there, `params` and `ema` hold all
parameters of the network, without its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx, traverse_util
from jax.sharding import SingleDeviceSharding

from pixart_jax.config import TrainConfig, from_dict, to_dict
from pixart_jax.denoiser import NETWORK, abstract_network, merge_adapters
from pixart_jax.errors import EXIT_STORAGE, RunStopped, UserError, in_utf8, one_of, writing
from pixart_jax.files import is_bucket, sha256_of_json, temporary
from pixart_jax.hub import is_hub, local
from pixart_jax.models.memory import on_device
from pixart_jax.models.mup import multiplier, with_readout
from pixart_jax.readers import (
    COUNT,
    OrNull,
    check_regular,
    check_shape,
    open_regular,
    parse_json,
    read_bytes,
)
from pixart_jax.versions import git_revision, package_versions

FOLDER = "checkpoints"
FORMAT = 2
# Size of the arrays that `read_back` reads at a time; an array that is larger is read alone.
READ_BACK_BYTES = 2**28
# Fields of the config that name files or folders, or something on the HuggingFace hub.
PATHS = (
    "features.vae",
    "features.image_encoder",
    "features.text_encoder.tokenizer",
    "features.text_encoder.weights",
    "data.train",
    "data.validation",
    "compile.cache",
    "init.path",
    "init.adapter",
)
# Values of these fields that have a meaning of their own, even if there is a file of that name.
KEYWORDS = ("random", "byt5", "digits", "shapes")


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a run directory, a step of it, or a checkpoint that `convert` wrote."""
    return (path / FOLDER).is_dir() or (path / "metadata").is_dir()


def read_weights(path: str | Path, which: str = "ema") -> tuple[dict[str, Any], TrainConfig]:
    """Reads the weights of a run directory (newest step) or of one checkpoint.

    Args:
      path: `RUN`, `RUN/checkpoints/STEP` or a folder of `write_weights`.
      which: 'ema' (moving average) or 'raw' (the weights that are trained).

    Returns:
      nested dict of float32 arrays on the first device, and the config. Adapters are merged into the network.

    Raises:
      UserError: there is no checkpoint; it cannot be read; its folder was renamed; or an array has values
        that are not finite.
    """
    params, config = read_network(path, which)
    return merge_adapters(config, params)


def read_network(path: str | Path, which: str = "ema") -> tuple[dict[str, Any], TrainConfig]:
    """Reads the weights as the run stores them: `read_weights` without merging adapters.

    The weights of a run with muP become those of a plain network, and the config that of such a network.
    """
    one_of("weights", which, ("ema", "raw"))
    folder = checkpoint_folder(path)
    metadata = read_metadata(folder)
    if folder.parent.name == FOLDER and folder.name != str(metadata["step"]):
        raise UserError(
            f"checkpoint {folder} contains step {metadata['step']}: its folder was renamed. Give it the name "
            f"{metadata['step']} again, or move it out of '{FOLDER}' and give its own path."
        )
    config = from_dict(metadata["config"])
    # The weights open on any backend, whatever kernel and dtype the run computed with.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    shape = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    named = metadata.get("format", 1) >= 2
    item = which if which == "ema" else "trained" if named else "params"
    if not (folder / item).exists():
        other = "raw" if which == "ema" else "ema"
        raise UserError(f"checkpoint {folder} holds no '{which}' weights: use --weights={other}.")
    items = [item, "frozen"] if (folder / "frozen").exists() else [item]
    # Use a device of this process, so that a checkpoint of a TPU pod also opens on a laptop.
    device = SingleDeviceSharding(jax.local_devices()[0])
    saved = {name: saved_arrays(folder, name) for name in items}
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        nnx.to_pure_dict(abstract_network(shape.model, shape.adapter)[1]),
    )
    prefix = (NETWORK,) if named else ()
    check_shapes(folder, wanted, *(_below(saved[name], prefix) for name in items))
    flat = traverse_util.flatten_dict(wanted)
    weights = {}
    for name in items:
        target = {(*prefix, *at): leaf for at, leaf in flat.items() if (*prefix, *at) in saved[name]}
        if target:
            tree = read_item(folder / name, traverse_util.unflatten_dict(target))
            check_sums(folder / name, tree, metadata["checksums"].get(name, {}), complete=False)
            if array := not_finite(tree):
                raise UserError(
                    f"checkpoint {folder / name}: array {array} has values that are NaN or infinite: use an "
                    "earlier checkpoint."
                )
            weights |= _below(traverse_util.flatten_dict(tree), prefix)
    params = with_readout(traverse_util.unflatten_dict(weights), 1 / multiplier(config.model))
    model = dataclasses.replace(config.model, mup_base_width=0)
    return params, dataclasses.replace(config, model=model)


def _below(flat: Mapping[tuple[str, ...], Any], prefix: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
    """The arrays whose path starts with `prefix`, by the rest of their path."""
    length = len(prefix)
    return {path[length:]: value for path, value in flat.items() if path[:length] == prefix}


def read_item(path: epath.Path, target: Any, partial: bool = True) -> Any:
    """Reads the arrays of `target` from an item, which may hold other arrays too.

    If not `partial`, the item has the structure of `target`, where `...` stands for arrays that are not read.
    """
    import orbax.checkpoint as ocp  # only checkpoints need it

    try:
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(
                path,
                ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=partial,
                ),
            )
    except Exception as error:
        raise unreadable(path, error) from error


def write_weights(path: str | Path, params: dict[str, Any], config: TrainConfig) -> None:
    """Writes weights, without optimizer state, as a checkpoint of step 0. Writing is atomic.

    Args:
      path: a folder that does not exist yet.
      params: nested dict of arrays in the tree of `config.model`.
      config: config to store with the weights.

    Raises:
      UserError: the folder exists, or has a name that Orbax cannot write to.
      RunStopped: the checkpoint cannot be written, or what was written cannot be read.
    """
    import orbax.checkpoint as ocp

    path = absolute(path)
    check_new(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a bucket, Orbax marks a checkpoint that is complete.
        local = contextlib.nullcontext(path) if is_bucket(path) else temporary(path.parent, is_folder=True)
        with local as new:
            folder, items = epath.Path(new) / FOLDER / "0", {"ema": {NETWORK: params}}
            metadata = ocp.args.JsonSave(make_metadata(path / FOLDER / "0", config, 0, items))
            saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            with writing(path, Exception), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                writer.save(folder, ocp.args.Composite(**saved, metadata=metadata))
            try:
                read_back(folder, items)
            except UserError as error:
                raise RunStopped(
                    f"the weights written to {path} cannot be read back ({reason(error.__cause__)}): choose "
                    "another output.",
                    EXIT_STORAGE,
                ) from error
            if new != path:
                os.rename(new, path)


def read_back(folder: epath.Path, items: dict[str, Any]) -> None:
    """Reads a new checkpoint and compares it with the arrays it was made from.

    Args:
      folder: the folder of one checkpoint.
      items: the arrays of each item. They are read a part at a time, with their shardings, so that this takes
        little memory.

    Raises:
      UserError: the checkpoint cannot be read, or holds something else.
    """
    saved = read_metadata(folder)["checksums"]
    for name, item in items.items():
        leaves, tree = jax.tree.flatten(item)
        start = 0
        while start < len(leaves):
            end, size = start, 0
            while end < len(leaves) and (end == start or size + leaves[end].nbytes <= READ_BACK_BYTES):
                end, size = end + 1, size + leaves[end].nbytes
            wanted = [
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
                if start <= index < end
                else ...
                for index, leaf in enumerate(leaves)
            ]
            part = read_item(folder / name, tree.unflatten(wanted), partial=False)
            part = jax.tree.map(lambda leaf: None if leaf is ... else leaf, part)
            check_sums(folder / name, part, saved[name], complete=False)
            start = end


# --- Folders


def checkpoint_folder(path: str | Path) -> epath.Path:
    """The folder of one checkpoint in or at `path`; the newest step of a run directory."""
    path = absolute(local(path) if is_hub(path) else path)
    if (path / "metadata").exists():
        return path
    root = path / FOLDER
    steps = finished_steps(root)
    if not steps:
        raise UserError(f"'{path}' holds no checkpoint: give a run directory with {FOLDER}/STEP in it.")
    return root / str(max(steps))


def finished_steps(root: epath.Path) -> list[int]:
    """The steps in a folder of checkpoints, without those that are still being written."""
    import orbax.checkpoint as ocp

    if not root.exists():
        return []
    return sorted(metadata.step for metadata in ocp.path.step.standard_name_format().find_all(root))


def absolute(path: str | Path) -> epath.Path:
    """The path in the form that Orbax takes. `epath` would mangle the absolute path of a bucket.

    Raises:
      UserError: it has bytes that are not UTF-8.
    """
    path = epath.Path(path)
    path = path if "://" in str(path) else path.absolute()
    in_utf8("the path of a checkpoint", path, "rename the folder")
    return path


def check_new(path: str | Path) -> None:
    """Raises a `UserError` if `write_weights` cannot write to `path`: it exists, or has a wrong name."""
    path = absolute(path)
    check_name(path)
    with writing(path):
        if path.exists():
            raise UserError(f"output {path} exists: remove it or choose another.")


def check_name(path: str | Path) -> None:
    """Raises a `UserError` if checkpoints cannot be written to a folder of this name.

    When Orbax merges the files of all processes, it uses the path of the folder as a pattern. In a folder
    such as `real[1]` it then finds no files, and the checkpoint has no arrays.
    """
    found = sorted(set(str(absolute(path))) & set("*?[\\"))
    if found:
        raise UserError(
            f"checkpoints cannot be written to '{absolute(path)}', because Orbax reads {' '.join(found)} as "
            "part of a pattern: choose a path without * ? [ \\"
        )


# --- Metadata

_METADATA_SHAPE = {
    "sha256": str,
    "format?": range(1, FORMAT + 1),
    "step": COUNT,
    "config": dict,
    "working_directory?": str,
    "checksums": {str: {str: range(2**32)}},
    "loader?": OrNull(dict),
}


def make_metadata(
    folder: epath.Path,
    config: TrainConfig,
    step: int,
    items: dict[str, Any],
    loader_state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest: how the checkpoint was made, and the checksums that show whether it is unchanged."""
    here, bucket = os.getcwd(), "://" in str(folder)
    metadata = {
        "format": FORMAT,
        "step": step,
        "config": to_dict(config),
        # What relative paths in the config are relative to; itself relative to the folder of the checkpoint,
        # so that a run can be moved together with the files that it uses.
        "working_directory": here if bucket else os.path.relpath(here, os.path.realpath(folder)),
        "versions": package_versions(),
        "git_revision": git_revision(),
        "checksums": {name: checksums(item) for name, item in items.items()},
        "loader": loader_state,
    }
    return {**metadata, "sha256": sha256_of_json(metadata)}


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """The manifest of one checkpoint's folder. Relative paths in its config are made absolute.

    Raises:
      UserError: it cannot be read, or is not what was written.
    """
    file = folder / "metadata" / "metadata"
    try:
        check_regular(folder)
        metadata = parse_json(read_bytes(file), lenient=True)
        check_shape(metadata, _METADATA_SHAPE)
        if metadata.pop("sha256") != sha256_of_json(metadata):
            raise ValueError("its content does not have the hash it was written with")
        if "working_directory" in metadata:  # version 0.1 did not store it
            base = os.path.normpath(os.path.join(os.path.realpath(folder), metadata["working_directory"]))
            for name in PATHS:
                *sections, field = name.split(".")
                values = functools.reduce(dict.__getitem__, sections, metadata["config"])
                if field in values:  # older checkpoints do not have all of them
                    values[field] = ",".join(_existing(base, path) for path in values[field].split(","))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(file, error) from error
    return metadata


def _existing(base: str, path: str) -> str:
    """Returns the absolute path of what exists at `path` relative to `base`, otherwise `path` itself."""
    found = os.path.join(base, path)
    return found if path and path not in KEYWORDS and os.path.exists(found) else path


def read_config(folder: epath.Path) -> TrainConfig:
    """The config stored in one checkpoint's folder."""
    return from_dict(read_metadata(folder)["config"])


# --- Arrays


def checksums(tree: Any) -> dict[str, int]:
    """One number per array, by key path: sum over i of (2 i + 1) bits_i, modulo 2^32.

    Sums of integers do not depend on their order, so the numbers are the same on any mesh and process count.
    The factors are odd, so every change of a single element changes the sum. Orbax itself does not detect a
    flipped byte.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = jax.device_get(_sums([on_device(leaf) for _, leaf in leaves]))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums)}


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    def one(array: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(array.shape, jnp.uint32)
        for axis in range(array.ndim):
            stride = math.prod(array.shape[axis + 1 :]) % 2**32
            place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return [one(array) for array in arrays]


def check_sums(folder: epath.Path, tree: Any, saved: dict[str, int], complete: bool = True) -> None:
    """Raises a `UserError` if an array differs from what was saved or, if `complete`, is missing."""
    found = checksums(tree)
    names = found.keys() | saved.keys() if complete else found.keys()
    damaged = sorted(name for name in names if found.get(name) != saved.get(name))
    if damaged:
        error = ValueError(f"array {damaged[0]} differs from what was saved")
        raise unreadable(folder, error) from error


def not_finite(tree: Any) -> str | None:
    """Returns the name of the first array with values that are NaN or infinite, or None."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    for (path, _), finite in zip(leaves, jax.device_get(_finite([on_device(leaf) for _, leaf in leaves]))):
        if not finite:
            return ".".join(str(key.key) for key in path)
    return None


@jax.jit
def _finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(array).all() for array in arrays]


def saved_arrays(folder: epath.Path, item: str) -> dict[tuple[str, ...], Any]:
    """Shapes and dtypes of the arrays of an item, by path, without reading the arrays.

    Raises:
      UserError: the list cannot be read.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as reader:
            found = reader.metadata(folder / item).item_metadata
        if found is None:
            # Orbax does not say why. If a file cannot be opened (permissions, for example), opening it does.
            for depth in ("*", "*/*", "*/*/*"):
                for file in (folder / item).glob(depth):
                    if not file.is_dir():
                        open_regular(file).close()
            raise ValueError("the list of its arrays is missing or damaged")
        return {
            tuple(str(key.key) for key in path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(found.tree)[0]
        }
    except Exception as error:
        raise unreadable(folder / item, error) from error


def check_shapes(folder: epath.Path, target: dict[str, Any], *saved: Mapping[tuple[str, ...], Any]) -> None:
    """Raises a `UserError` that lists the arrays whose shapes differ, before any array is read."""
    have = {".".join(path): tuple(leaf.shape) for part in saved for path, leaf in part.items()}
    wanted = {".".join(path): tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(target).items()}
    differences = [
        f"{name} is {have.get(name, 'absent')}, the config needs {wanted.get(name, 'none')}"
        for name in sorted(have.keys() | wanted.keys())
        if have.get(name) != wanted.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"checkpoint {folder} is of another model: {'; '.join(differences[:3])}{more}. Use the config it "
            "was made with, or another --workdir."
        )


# Parts of the errors of Python, TensorStore and XLA that say nothing about the files themselves.
_NOT_DAMAGED = (
    *("PermissionError", "Permission denied", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("MemoryError", "RESOURCE_EXHAUSTED", "Too many open files"),
    *("TimeoutError", "DEADLINE_EXCEEDED", "ConnectionError", "UNAVAILABLE"),
)


def unreadable(path: Any, error: Exception) -> UserError:
    """The error for a checkpoint that exists but cannot be read."""
    while error.__cause__ is not None:  # Orbax's own message has neither the file nor what is wrong with it
        error = error.__cause__
    if any(word in f"{type(error).__name__} {error}" for word in _NOT_DAMAGED):
        return UserError(
            f"checkpoint {path} exists but cannot be read ({reason(error)}). Its files may be intact: fix "
            "the cause, then run the same command again."
        )
    return UserError(
        f"checkpoint {path} exists but cannot be read ({reason(error)}): remove that step to continue "
        "from the one before it."
    )


def reason(error: Exception) -> str:
    """The first line of an exception."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
