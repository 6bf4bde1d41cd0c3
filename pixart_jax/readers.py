"""Readers of JSON, arrays and tables that may be damaged or written with bad intent.

They take no more memory than the file justifies, check what they find before they use it, and raise errors of
one line. Functions that take an `epath.Path` also work in a bucket; the others are for local files.
"""

from __future__ import annotations

import collections
import csv
import itertools
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pixart_jax.errors import UserError, short
from pixart_jax.files import is_bucket

if TYPE_CHECKING:
    from etils import epath

# --- JSON

# Maximum size of a JSON file, in bytes. The manifest of 10 million images takes a hundredth of it.
MOST_BYTES = 2**28
# Maximum nesting of lists and objects. Python's own limit depends on its version, and whatever walks the
# values later would have another one.
MOST_NESTING = 64


def parse_json(text: str | bytes, *, lenient: bool = False) -> Any:
    """Parses JSON that may be damaged or hostile.

    Args:
      text: text, or bytes in UTF-8, UTF-16 or UTF-32; with or without a byte order mark.
      lenient: whether to accept numbers that are not finite, whole numbers of up to 4,300 digits, and text
        that is not Unicode. For callers that check each value, and can say which one is wrong.

    Raises:
      ValueError: it is not JSON, has a name twice in an object, or is nested too deeply. The message is one
        line that does not name the file.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    text = text.removeprefix("\ufeff")
    numbers = {} if lenient else {"parse_int": _whole, "parse_float": _finite, "parse_constant": _constant}
    try:
        value = json.loads(text, object_pairs_hook=_object, **numbers)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # of Python, which advises to call one of its functions
            raise ValueError("it has a whole number of more than 4,300 digits") from None
        raise
    if text.count("[") + text.count("{") > MOST_NESTING:
        _check_nesting(value)
    if not lenient and "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half of a surrogate pair, which is not Unicode") from None
    return value


_TOO_DEEP = f"lists and objects are nested more than {MOST_NESTING} deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Programs differ in which of two values of the same name they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        (double, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has the name {short(double, quote=True)} twice in an object")
    return found


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**64:
        raise ValueError(f"the number {short(text)} has more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _constant(text)


def _constant(text: str) -> float:
    raise ValueError(f"the number {short(text)} is not finite")


def _check_nesting(value: Any) -> None:
    """Raises a ValueError for values that are nested too deeply, without recursion."""
    level = [value]
    for _ in range(MOST_NESTING):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [each for part in inner for each in part if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def read_json(
    path: str | epath.Path | Path, fix: str, shape: Any = None, *, lenient: bool = False
) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: the file.
      fix: what to do if it is missing or damaged, the end of the message.
      shape: what the object must have, as for `check_shape`.
      lenient: as for `parse_json`.

    Raises:
      UserError: there is no such file, or it cannot be read, is too large or not such an object.
    """
    try:
        value = parse_json(read_bytes(path), lenient=lenient)
        check_shape(value, dict if shape is None else shape)
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing: {fix}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON ({error}): {fix}.") from error
    return value


def read_bytes(path: str | epath.Path | Path) -> bytes:
    """The content of a file of at most `MOST_BYTES`.

    Raises:
      OSError: it cannot be read.
      ValueError: it is larger, or not a file but something that could block forever.
    """
    with open_regular(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return data


def open_regular(path: str | epath.Path | Path) -> IO[bytes]:
    """Opens a file to read it. Opening a pipe or a device, which could block forever, raises a ValueError."""
    # The `is_file` of epath is also true of pipes and devices.
    path = path if is_bucket(path) else Path(path)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ValueError("it is not a regular file")
    return path.open("rb")


def check_regular(folder: epath.Path, *, recursive: bool = True) -> None:
    """Raises a ValueError if a folder holds a pipe or a device, which could block a library forever.

    Args:
      folder: the folder; one in a bucket holds neither.
      recursive: whether to look into the folders in it too.
    """
    for where, folders, names in () if is_bucket(folder) else os.walk(folder):
        for name in names:
            path = Path(where, name)
            if path.exists() and not path.is_file():
                raise ValueError(f"{path.relative_to(folder)} is not a regular file")
        if not recursive:
            folders.clear()


def read_json_lines(
    path: str | epath.Path | Path, fix: str, shape: Any = None, *, lenient: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Reads a file of JSON objects, one in a line; [] if there is no file.

    A damaged last line without an end is left out: the process was killed while it wrote it.

    Args: as for `read_json`.

    Returns:
      the text of every line, without its end, and its object.

    Raises:
      UserError: as `read_json`, with the number of the line.
    """
    try:
        text = read_bytes(path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): {fix}.") from error
    found = []
    *lines, last = text.split(b"\n")
    for number, line in enumerate([*lines, last], 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line.decode(), lenient=lenient)
            check_shape(value, dict if shape is None else shape)
        except ValueError as error:
            if number > len(lines):
                break
            raise UserError(f"'{path}' line {number} cannot be read as JSON ({error}): {fix}.") from error
        found.append((line.decode(), value))
    return found


def lines_until(path: epath.Path, step: int) -> list[str]:
    """Returns the lines up to `step` of a file of JSON lines with steps; [] if there is no file.

    A run that resumes at `step` repeats the later steps, so it removes their lines.

    Raises:
      UserError: a line is damaged.
    """
    # Lenient, because a metric may be NaN.
    fix = "remove this line, or this file if it is not a text file"
    lines = read_json_lines(path, fix, {"step": int}, lenient=True)
    return [f"{line}\n" for line, value in lines if value["step"] <= step]


class OrNull(NamedTuple):
    """For `check_shape`: null, or a value of a shape."""

    shape: Any


# For `check_shape`: whole numbers that count something.
COUNT = range(2**63)

_WORDS = {
    **{str: "text", bool: "true or false", int: "a whole number", float: "a finite number"},
    **{list: "a list", dict: "a JSON object, {...}"},
}


def check_shape(value: Any, shape: Any, name: str = "it") -> None:
    """Checks the types in a value that was read from JSON.

    Args:
      value: the value.
      shape: a type, where `float` is any finite number; a `range` of whole numbers; a compiled pattern for
        text; `[shape]` for a list of any length; `(shape, …)` for a list of that length; `{str: shape}` for
        an object of any names; `{"name": shape, "other?": shape}` for an object with these names, of which
        some may be missing; or `OrNull`.
      name: what the value is, for messages.

    Raises:
      ValueError: it has another shape. The message names the place.
    """
    prefix = "" if name == "it" else name
    match shape:
        case OrNull():
            fits, rule = True, ""
            if value is not None:
                check_shape(value, shape.shape, name)
        case range():
            fits = type(value) is int and value in shape
            rule = f"a whole number from {shape.start} to {shape.stop - 1}"
        case re.Pattern():
            fits = isinstance(value, str) and bool(shape.fullmatch(value))
            rule = f"text of the form {shape.pattern}"
        case list() | tuple():
            fits, rule = isinstance(value, list), _WORDS[list]
            if isinstance(shape, tuple):
                fits, rule = fits and len(value) == len(shape), f"a list of {len(shape)} values"
            inner = shape if isinstance(shape, tuple) else itertools.repeat(shape[0])
            for place, (each, kind) in enumerate(zip(value, inner) if fits else ()):
                check_shape(each, kind, f"{prefix}[{place}]")
        case dict():
            fits, rule = isinstance(value, dict), _WORDS[dict]
            if fits:
                _check_fields(value, shape, f"{prefix}." if prefix else "")
        case _:
            accepted = (int, float) if shape is float else shape
            # In JSON, true is not a number; in Python, it is.
            fits = isinstance(value, accepted) and (shape is bool or not isinstance(value, bool))
            if shape is float:
                fits = fits and abs(value) <= sys.float_info.max
            rule = _WORDS[shape]
    if not fits:
        raise ValueError(f"{name} is {short(json.dumps(value))}, and must be {rule}")


def _check_fields(value: Mapping[str, Any], shape: Mapping[Any, Any], prefix: str) -> None:
    for field, inner in shape.items():
        if field is str:
            for key, each in value.items():
                check_shape(each, inner, f"{prefix}{short(key)}")
        elif field.removesuffix("?") in value:
            check_shape(value[field.removesuffix("?")], inner, prefix + field.removesuffix("?"))
        elif not field.endswith("?"):
            raise ValueError(f"it has no {prefix}{field}")


# --- Arrays


def read_array(path: str | Path, fix: str) -> np.ndarray:
    """Maps a .npy file into memory, so that only what is used is read.

    Raises:
      UserError: there is no such file, it holds Python objects, or it has another size than its header
        states.
    """
    try:
        with open_regular(path) as file:
            shape, order, dtype = _header_of(file, os.fstat(file.fileno()).st_size)
            if not math.prod(shape):
                return np.empty(shape, dtype)
            return np.memmap(file, dtype, mode="r", offset=file.tell(), shape=shape, order=order)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, fix) from error


def read_arrays(path: str | Path, names: Sequence[str], fix: str) -> dict[str, np.ndarray]:
    """Reads arrays of a .npz file. Others in it are not read, and nothing is unpacked to the disk.

    Args:
      path: the file.
      names: of the arrays; those that end in "?" may be missing.
      fix: what to do if it is damaged, the end of the message.

    Raises:
      UserError: as `read_array`, or an array is missing.
    """
    try:
        arrays = {}
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            have = collections.Counter(archive.namelist())
            missing = [name for name in names if not name.endswith("?") and f"{name}.npy" not in have]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            for name in (name.removesuffix("?") for name in names):
                if f"{name}.npy" in have:
                    arrays[name] = _member(archive, f"{name}.npy", have[f"{name}.npy"])
    except Exception as error:  # zipfile and its decompressors raise a dozen classes
        raise _unreadable(path, error, fix) from error
    return arrays


def _member(archive: zipfile.ZipFile, name: str, count: int) -> np.ndarray:
    if count > 1:
        raise ValueError(f"it has {name} {count} times")
    entry = archive.getinfo(name)
    with archive.open(entry) as file:
        shape, order, dtype = _header_of(file, entry.file_size, name)
        return np.ndarray(shape, dtype, file.read(), order=order)


def _unreadable(path: str | Path, error: Exception, fix: str) -> UserError:
    """The error for a file of arrays that cannot be read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"'{path}' cannot be read ({short(text)}): {fix}.")


def _header_of(file: IO[bytes], size: int, name: str = "it") -> tuple[tuple[int, ...], str, np.dtype]:
    """Reads the header of a .npy file and compares it with the size of the file.

    Args:
      file: at its start; afterwards at the first byte of the array.
      size: of the file, in bytes.
      name: what the file is, for messages.

    Returns:
      shape, order ("C" or "F") and dtype of the array.

    Raises:
      ValueError: it is not such a file, holds Python objects, or has another size than its header states.
    """
    start = file.read(8)
    readers = {b"\x01": np.lib.format.read_array_header_1_0, b"\x02": np.lib.format.read_array_header_2_0}
    if not start.startswith(b"\x93NUMPY") or start[6:7] not in readers:
        raise ValueError(f"{name} is not an array of NumPy, .npy")
    try:
        shape, fortran, dtype = readers[start[6:7]](file)
    except Exception as error:  # NumPy evaluates a literal of Python, which can fail in any way
        raise ValueError(f"{name} has a damaged header") from error
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which can run code")
    if any(side < 0 for side in shape) or len(shape) > 32:
        raise ValueError(f"{name} has the shape {list(shape)}")
    stated, have = math.prod(shape) * dtype.itemsize, size - file.tell()
    if stated != have:
        raise ValueError(f"{name} holds {have:,} bytes, and {stated:,} according to its header")
    return tuple(shape), "F" if fortran else "C", dtype


# --- Tables


def read_table(
    path: str | os.PathLike, *, comments: bool = False
) -> tuple[list[str], list[tuple[int, dict[str | None, Any]]]]:
    """Reads a table in CSV, whose first line names the columns.

    The separator is a tab in a .tsv file. Otherwise it is a comma, or a semicolon if the first line has only
    those, as spreadsheets write it in some countries.

    Args:
      path: the file, in UTF-8.
      comments: whether to skip rows that begin with "#". A row that begins with a quote does not.

    Returns:
      the names of the columns; and for each row the number of its first line, and its cells by column. A cell
      that is missing is None; cells that have no column are a list under the name None.

    Raises:
      UserError: the file cannot be read, is not a table, or has two columns of the same name.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may have an image in base64
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(file)
        skipped = [comments and line.lstrip().startswith("#") for line in lines]
        first = next((line for line, skip in zip(lines, skipped) if line.strip() and not skip), "")
        comma = ";" if ";" in first and "," not in first else ","
        tab = os.fspath(path).lower().endswith(".tsv")
        # Strict: a quote that is never closed would make one cell of all that follows.
        table = csv.reader(lines, delimiter="\t" if tab else comma, strict=True)
        found, line = [], 0
        for cells in table:
            if cells and not skipped[line]:
                found.append((line + 1, cells))
            line = table.line_num  # a row may have several lines; this is its last one
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"'{os.fspath(path)}' is not a table in CSV and UTF-8 ({error}): correct it."
        ) from None
    names = [name.strip() for name in found[0][1]] if found else []
    double = next((name for name, count in collections.Counter(names).items() if name and count > 1), "")
    if double:
        raise UserError(f"'{os.fspath(path)}' has several columns '{short(double)}': give each its own name.")
    rows = []
    for line, cells in found[1:]:
        row: dict[str | None, Any] = dict(itertools.zip_longest(names, cells[: len(names)]))
        rows.append((line, row | ({None: cells[len(names) :]} if cells[len(names) :] else {})))
    return names, rows
