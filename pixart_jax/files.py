"""Files that are written completely or not at all, locks, sha256 of files, bytes and JSON; readers of files.

Functions that take an `epath.Path` also work in a bucket; the others are for local files.

The readers of JSON, arrays and tables take files that may be damaged or written with bad intent. They take no
more memory than the file justifies, check what they find before they use it, and raise errors of one line.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pixart_jax.errors import UserError, short, writing

if TYPE_CHECKING:
    from etils import epath


# Temporary files and folders of this project are called .pixart-HOST-RANDOM.tmp, where HOST is a hash. The
# name does not depend on that of the output, which may be as long as the file system allows.
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
# Seconds after which another host's temporary file, whose lock may not be visible here, is surely a leftover.
_SURELY_LEFT = 24 * 60 * 60


@contextlib.contextmanager
def temporary(folder: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """Yields a new temporary file or folder in `folder`. If it still exists at the end, it is removed.

    The process holds a lock on it (`flock`). What a killed process has left has no lock, and is removed by
    the next process that makes a temporary file in the same folder.

    Args:
      folder: an existing folder.
      is_folder: whether to make a folder.

    Raises:
      OSError: it cannot be made.
    """
    remove_leftovers(folder.absolute())
    path, lock = _make_temporary(folder, is_folder)
    try:
        yield path
    finally:
        try:
            _remove(path, is_folder)
        finally:
            os.close(lock)


def _make_temporary(folder: Path, is_folder: bool) -> tuple[Path, int]:
    """Makes a temporary file or folder; returns its path and the file descriptor that holds its lock."""
    while True:
        path = folder / f".pixart-{_HOST}-{uuid.uuid4().hex[:16]}.tmp"
        if is_folder:
            path.mkdir()
            lock = os.open(path, os.O_RDONLY)
        else:
            lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        # On a file system without locks, leftovers cannot be recognized and stay.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            return path, lock
        # Another process took it for a leftover before it was locked.
        os.close(lock)


def _remove(path: Path, is_folder: bool) -> None:
    """Removes a temporary file or folder if that is possible.

    If it is not, for example because the file system has become read-only, an earlier exception has the
    reason, and the next process will remove it.
    """
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


@functools.cache  # once in each process
def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders of processes that no longer run."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".pixart-*.tmp"):
            # Gone, in use (`BlockingIOError`), not ours, or on a file system without locks.
            with contextlib.suppress(OSError):
                _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    state = os.lstat(path)
    here = path.name.startswith(f".pixart-{_HOST}-")
    if not here and time.time() - state.st_mtime < _SURELY_LEFT:
        return
    is_folder = stat.S_ISDIR(state.st_mode)
    lock = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path, is_folder)
    finally:
        os.close(lock)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, folder: Path | None = None, flush: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces `path` at the end of the block.

    If the block raises an exception, the temporary file is removed and `path` is not changed. Several
    processes may write the same file at the same time; one of them wins.

    Args:
      path: the file to write. Its folder is created if it does not exist. If it is a device or a pipe, it is
        yielded itself.
      folder: where the temporary file lies, on the same file system; by default beside `path`.
      flush: whether to wait until the data is on the disk before renaming the file, so that either the old or
        the new file exists after a power failure.

    Raises:
      OutputError: it cannot be written. If `path` is a folder or cannot be a file, this is found at once.
    """
    path = Path(path)
    with writing(path):
        if _is_special(path):
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(folder or path.parent) as new:
            yield new
            if flush:
                with open(new, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(new, path)


def _is_special(path: Path) -> bool:
    """Whether `path` is neither a file nor absent, but a device or a pipe.

    Raises:
      OSError: it is a folder, or has a name that no file can have.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    return not stat.S_ISREG(mode)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file, flushes it to the disk and renames it into place.

    Raises:
      OutputError: see `replacing`.
    """
    with replacing(path, flush=True) as new:
        new.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8 with `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON with `write_bytes`. Keys are sorted, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def make_folder(path: str | os.PathLike) -> Path:
    """Makes a folder for outputs, and those above it, unless it exists.

    Raises:
      OutputError: it cannot be made.
    """
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the bytes of a file, within `writing` the output that `target` belongs to.

    Raises:
      UserError: `source` cannot be read.
      OSError: `target` cannot be written.
    """
    with open(target, "wb") as new:
        try:
            file = open(source, "rb")  # noqa: SIM115 closed below
        except OSError as error:
            raise _unreadable(source, error) from error
        with file:
            while True:
                try:
                    data = file.read(1 << 20)
                except OSError as error:
                    raise _unreadable(source, error) from error
                if not data:
                    return
                new.write(data)


def list_folder(path: Path) -> list[Path]:
    """What is in a folder, by name.

    Raises:
      UserError: the folder cannot be read.
    """
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise _unreadable(path, error) from error


def replace_bytes(path: epath.Path, data: bytes) -> None:
    """Replaces a file of a run directory, so that a kill leaves either the old or the new one.

    Raises:
      OutputError: it cannot be written.
    """
    if is_bucket(path):
        with writing(path):
            path.write_bytes(data)  # an object appears when it is complete
        return
    with replacing(path) as new:
        new.write_bytes(data)


def replace_text(path: epath.Path, text: str) -> None:
    """Replaces a text file of a run directory with `replace_bytes`."""
    replace_bytes(path, text.encode())


def is_bucket(path: object) -> bool:
    """Whether a path is in a bucket and not on a file system."""
    return "://" in str(path)


class LineFile:
    """A local file that lines are appended to. Lines that cannot be written completely are removed again.

    Args:
      path: the file. It and its folder are created if they do not exist.

    Raises:
      OutputError: it cannot be written; so do the methods.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        with writing(path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer: what could not be written is not tried again when the file is closed.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 closed by `close`

    def append(self, data: bytes) -> None:
        """Appends bytes."""
        with writing(self._path):
            end = os.fstat(self._file.fileno()).st_size
            try:
                left = memoryview(data)
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    self._file.truncate(end)
                raise

    def sync(self) -> None:
        """Waits until what was appended is on disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self._path):
            self._file.close()


@contextlib.contextmanager
def locked(
    path: str | os.PathLike, taken: str, fix: str, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Holds a lock within the block, so that two processes do not write the same output.

    The operating system holds the lock (`flock`) and releases it when the process ends in any way, so a lock
    file that a killed process has left does not lock anything. The file stays at the end, unless it is new
    and the block raises an exception.

    Args:
      path: the lock file. It names the process that holds the lock, and its host. Its folder is created if it
        does not exist.
      taken: says that another process holds the lock, for the error message.
      fix: what to do then.
      say: called with one line if the file system has no locks.

    Raises:
      UserError: another process holds the lock.
      OutputError: the lock file cannot be written.
    """
    path = Path(path)
    while True:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 closed below
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                # NFS servers can keep the lock of a host that crashed.
                holder = " ".join(file.read().decode(errors="replace").split())
                raise UserError(
                    f"{taken} ({holder or 'it has not given its name yet'}): {fix} If that process no longer "
                    f"runs, remove '{path}'."
                ) from None
            except OSError as error:
                new = False
                say(
                    f"'{path}' cannot be locked ({error}): make sure that no other process writes to its "
                    "folder."
                )
            else:
                if not _is_same(file.fileno(), path):
                    continue  # a process that failed has just removed it
            try:
                with writing(path):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
                yield
            except BaseException:
                if new:
                    with contextlib.suppress(OSError):  # the exception has the reason
                        path.unlink()
                raise
            return


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sha256_of_file(path: str | os.PathLike) -> str:
    """Hash of a file's bytes, in hexadecimal.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, error: OSError) -> UserError:
    return UserError(f"'{os.fspath(path)}' cannot be read: {error}.")


def sha256_of_bytes(data: bytes) -> str:
    """Hash of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash of a value's JSON with sorted keys, in hexadecimal."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())


# --- JSON

# Bytes of a JSON file at most. The manifest of 10 million images takes a hundredth of it.
MOST_BYTES = 2**28
# Lists and objects within each other at most. Python's own limit depends on its version, and whatever walks
# the values later would have another one.
MOST_NESTING = 64


def parse_json(text: str | bytes, *, lenient: bool = False) -> Any:
    """Parses JSON that may be damaged or hostile.

    Args:
      text: text, or bytes in UTF-8, UTF-16 or UTF-32; with or without a byte order mark.
      lenient: whether to accept numbers that are not finite, whole numbers of up to 4,300 digits, and text
        that is not Unicode. For callers that check each value, and can say which one is wrong.

    Raises:
      ValueError: it is not JSON, has a name twice in an object, or is nested too deeply. The message is one
        line without the place of the text.
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
    path = Path(path) if isinstance(path, str) else path
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ValueError("it is not a regular file")
    return path.open("rb")


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
    lines = read_json_lines(path, "remove this line", {"step": int}, lenient=True)
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
            # JSON's true is no number, although Python's is.
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
        raise unreadable_array(path, error, fix) from error


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
        raise unreadable_array(path, error, fix) from error
    return arrays


def _member(archive: zipfile.ZipFile, name: str, count: int) -> np.ndarray:
    if count > 1:
        raise ValueError(f"it has {name} {count} times")
    entry = archive.getinfo(name)
    with archive.open(entry) as file:
        shape, order, dtype = _header_of(file, entry.file_size, name)
        return np.ndarray(shape, dtype, file.read(), order=order)


def unreadable_array(path: str | Path, error: Exception, fix: str) -> UserError:
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
