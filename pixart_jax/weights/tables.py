"""Tables that map our parameters to the tensors of other formats, and import and export with such a table.

A `Table` has one `Entry` for every tensor of the other format: its name there, the parameter of ours that it
fills, which part of that parameter, and how its axes are laid out. Import and export use the same table.
Import is strict: unknown tensors, missing ones and wrong shapes are reported together in one error.

Nothing here reads or writes files. Tensors come from any mapping of names to numpy arrays and are read
parameter by parameter, so that a lazy mapping (`files.Tensors`) never has more than one parameter in memory.

In this file, "ours" is this project's array and "theirs" the tensor of the other format.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixart_jax.errors import UserError, short

# Number of tensors that a message names at most for each fault.
MOST_NAMES = 10

# The place of a parameter in the nested dict of a model, and the shape of an array.
Path = tuple[str | int, ...]
Shape = tuple[int, ...]


# --- Messages -----------------------------------------------------------------------------------------


def first_names(names: list[str]) -> str:
    """The first names of a list: all of them could fill the screen."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(short, names[:MOST_NAMES])) + more


def by(shape: Shape) -> str:
    """A shape for messages: 48x24."""
    return "x".join(map(str, shape)) or "scalar"


# --- Layouts ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """How the axes of a tensor differ between the two formats; the two functions are inverses."""

    # (their array, our shape) -> our array.
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    # Our array -> theirs.
    to_theirs: Callable[[np.ndarray], np.ndarray]
    # Also accept a 1x1 convolution [out, in, 1, 1] as a linear map [out, in].
    or_convolution: bool = False


# The same layout in both formats.
SAME = TensorLayout(lambda theirs, shape: theirs, lambda ours: ours)
# Theirs is a vector; ours has axes for heads or parts.
VECTOR = TensorLayout(lambda theirs, shape: theirs.reshape(shape), lambda ours: ours.reshape(-1))
# A convolution: theirs is [out, in, rows, columns], ours [rows, columns, in, out].
CONVOLUTION = TensorLayout(
    lambda theirs, shape: theirs.transpose(2, 3, 1, 0), lambda ours: ours.transpose(3, 2, 0, 1)
)


def dense(inputs: int = 1, *, or_convolution: bool = False) -> TensorLayout:
    """A linear map: theirs is [out, in]; ours has `inputs` input axes first, then the output axes."""
    return TensorLayout(
        lambda theirs, shape: theirs.T.reshape(shape),
        lambda ours: ours.reshape(math.prod(ours.shape[:inputs]), -1).T,
        or_convolution,
    )


# --- Tables -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the other format.

    Several entries may fill one parameter of ours: the layers of a stack, such as index (3,), or the parts of
    a fused projection, such as index (3, slice(None), 0) for the query of layer 3 in [L, D, 3, H, K].
    """

    # The parameter of ours that it fills.
    path: Path
    # Its name in the other format.
    key: str
    layout: TensorLayout = SAME
    # The part of the parameter that it fills; () for all of it.
    index: tuple[int | slice, ...] = ()
    # Other names for it. If a file has several of the names, their tensors must be equal.
    aliases: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, *self.aliases)

    @property
    def ours(self) -> str:
        """Our name, for messages: blocks.stacked.attn.qkv.kernel[3, :, 0]."""
        index = ", ".join(":" if isinstance(part, slice) else str(part) for part in self.index)
        return ".".join(map(str, self.path)) + (f"[{index}]" if index else "")


@dataclasses.dataclass(frozen=True)
class Table:
    """Another format of a model: entries that together fill every parameter exactly once."""

    # What the tensors are, for messages, such as 'a T5 encoder (HuggingFace)'.
    name: str
    entries: tuple[Entry, ...]
    # Shape of every parameter of ours.
    shapes: Mapping[Path, Shape]
    # Regular expressions for full names of tensors that a file may have and that are ignored.
    ignored: tuple[str, ...] = ()

    def __post_init__(self):
        filled = dict.fromkeys(self.shapes, 0)
        for entry in self.entries:
            if entry.path not in filled:
                raise ValueError(f"table {self.name}: {entry.ours} is not a parameter")
            filled[entry.path] += math.prod(self.part_shape(entry))
        holes = [path for path, count in filled.items() if count != math.prod(self.shapes[path])]
        keys = [key for entry in self.entries for key in entry.keys]
        if holes or len(keys) != len(set(keys)):
            raise ValueError(f"table {self.name}: {holes} not filled exactly once, or a key used twice")

    def by_path(self) -> Iterator[tuple[Path, list[Entry]]]:
        """Yields every parameter with the entries that fill it."""
        entries = {path: [] for path in self.shapes}
        for entry in self.entries:
            entries[entry.path].append(entry)
        yield from entries.items()

    def part_shape(self, entry: Entry) -> Shape:
        """Shape of the part that an entry fills, in our layout."""
        return _hollow(self.shapes[entry.path])[entry.index].shape

    def their_shape(self, entry: Entry) -> Shape:
        """Shape of an entry's tensor in the other format."""
        return entry.layout.to_theirs(_hollow(self.part_shape(entry))).shape


def _hollow(shape: Shape) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def parameter_shapes(model: nnx.Module) -> dict[Path, Shape]:
    """Path and shape of every parameter of a model, which may be abstract."""
    return {path: tuple(variable.shape) for path, variable in nnx.to_flat_state(nnx.state(model))}


# --- Import -----------------------------------------------------------------------------------------


def check_tensors(table: Table, tensors: Mapping[str, np.ndarray]) -> None:
    """Checks all names and shapes of a file against a table, before any tensor is read.

    Args:
      table: the format.
      tensors: by name. A mapping with an attribute `shapes` is not read.

    Raises:
      UserError: tensors are unknown, missing or of the wrong shape. Names the first ones of each kind, with
        both names.
    """
    shapes = getattr(tensors, "shapes", None) or {key: np.shape(tensors[key]) for key in tensors}
    known, missing, wrong = set(), [], []
    for entry in table.entries:
        found = [key for key in entry.keys if key in tensors]
        known.update(found)
        if not found:
            missing.append(f"{entry.key} (ours: {entry.ours})")
        expected = table.their_shape(entry)
        allowed = (expected, (*expected, 1, 1)) if entry.layout.or_convolution else (expected,)
        wrong += [
            f"{key} {by(shapes[key])} for {by(expected)} (ours: {entry.ours})"
            for key in found
            if tuple(shapes[key]) not in allowed
        ]
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in table.ignored) or r"(?!)")
    unknown = [key for key in tensors if key not in known and not ignored.fullmatch(key)]
    problems = [
        f"{len(names)} {what}: {first_names(names)}"
        for what, names in (("unknown", unknown), ("missing", missing), ("of the wrong shape", wrong))
        if names
    ]
    if problems:
        raise UserError(f"{_source(tensors)} does not fit {table.name}: {'; '.join(problems)}.")


def import_parameters(
    table: Table, tensors: Mapping[str, np.ndarray], dtype: Any = np.float32
) -> Iterator[tuple[Path, np.ndarray]]:
    """Imports parameter by parameter, so that each can be put on its device before the next one is read.

    Args:
      table: the format.
      tensors: by name, floating point of any width.
      dtype: of the imported parameters.

    Yields:
      path and array of every parameter.

    Raises:
      UserError: as `check_tensors`, before the first parameter; or a tensor is not floating point, has two
        names with different values, or has values that are not finite in `dtype`.
    """
    check_tensors(table, tensors)
    for path, entries in table.by_path():
        parameter = np.empty(table.shapes[path], dtype)
        for entry in entries:
            theirs = _read(entry, tensors).reshape(table.their_shape(entry))
            # Assigning to a part casts in place and copies one layer, not the whole stack. Values that
            # overflow raise an error below.
            with np.errstate(over="ignore", invalid="ignore"):
                parameter[entry.index] = entry.layout.to_ours(theirs, table.part_shape(entry))
            if not np.isfinite(parameter[entry.index]).all():
                raise _not_finite(entry, theirs, parameter.dtype, tensors)
        yield path, parameter


def _not_finite(entry: Entry, theirs: np.ndarray, dtype: np.dtype, tensors: Mapping[str, Any]) -> UserError:
    found = next(key for key in entry.keys if key in tensors)
    start = f"{_source(tensors)}: {found} (ours: {entry.ours})"
    count = int(np.count_nonzero(~np.isfinite(theirs)))
    if count:
        return UserError(
            f"{start} is NaN or infinite in {count} of {theirs.size} values: the weights are damaged, "
            "give another file or an earlier checkpoint."
        )
    largest = float(np.max(np.abs(theirs)))
    return UserError(f"{start} has the value {largest:.3g}, which {dtype} cannot store: use a wider dtype.")


def import_tensors(
    table: Table, tensors: Mapping[str, np.ndarray], dtype: Any = np.float32
) -> dict[str, Any]:
    """Imports all parameters, as the nested dict that `nnx.merge` takes. See `import_parameters`."""
    params: dict[str, Any] = {}
    for path, parameter in import_parameters(table, tensors, dtype):
        *parents, last = path
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = parameter
    return params


def _read(entry: Entry, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Reads the tensor of an entry under any of its names."""
    found = [key for key in entry.keys if key in tensors]
    value = tensors[found[0]]
    # np.floating does not know bfloat16.
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(
            f"{_source(tensors)}: {found[0]} (ours: {entry.ours}) is {value.dtype}, but weights must be "
            "floating point."
        )
    for alias in found[1:]:
        if not np.array_equal(value, tensors[alias].reshape(value.shape)):
            raise UserError(
                f"{_source(tensors)}: {found[0]} and {alias} are names of one tensor (ours: {entry.ours}) "
                "but have different values: remove one of them."
            )
    return value


def _source(tensors: Mapping[str, np.ndarray]) -> str:
    path = getattr(tensors, "path", None)
    return f"'{path}'" if path else "the file"


# --- Export -----------------------------------------------------------------------------------------


def export_shapes(table: Table) -> dict[str, Shape]:
    """Name and shape of every tensor of the other format, in the order of `export_tensors`."""
    return {entry.key: table.their_shape(entry) for _, group in table.by_path() for entry in group}


def export_tensors(table: Table, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Exports tensor by tensor.

    Args:
      table: the format.
      params: our parameters as a nested dict of arrays.

    Yields:
      name and float32 array, which may be a view of the parameter.

    Raises:
      UserError: before the first tensor, if parameters are unknown, missing or of the wrong shape.
    """
    flat = nnx.traversals.flatten_mapping(dict(params))
    problems = [f"{dotted(path)} unknown" for path in flat if path not in table.shapes]
    for path, shape in table.shapes.items():
        if path not in flat:
            problems.append(f"{dotted(path)} missing")
        elif tuple(flat[path].shape) != shape:
            problems.append(f"{dotted(path)} {by(flat[path].shape)} for {by(shape)}")
    if problems:
        raise UserError(f"the parameters do not fit {table.name}: {first_names(problems)}.")
    for path, entries in table.by_path():
        parameter = np.asarray(flat[path], np.float32)
        for entry in entries:
            yield entry.key, entry.layout.to_theirs(parameter[entry.index])


def dotted(path: Path) -> str:
    return ".".join(map(str, path))
