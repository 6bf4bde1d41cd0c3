"""Files that are written completely or not at all, locks, sha256 of files, bytes and JSON, and tables in CSV.

Functions that take an `epath.Path` also work in a bucket; the others are for local files.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import fcntl
import hashlib
import itertools
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_jax.errors import UserError, short

if TYPE_CHECKING:
    from etils import epath


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, temporary: Path | None = None, *, flush: bool = False
) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces `path` at the end of the block.

    If the block raises an exception, the temporary file is removed and `path` is not changed.

    Args:
      path: the file to write. Its folder is created if it does not exist.
      temporary: the temporary file, on the same file system; by default `path` with ".tmp" added. The default
        name is always the same. A later attempt thus overwrites the file that a killed process has left, but
        only one process may write `path` at a time. `write_bytes` does not have this limitation.
      flush: whether to wait until the data is on the disk before renaming the file, so that either the old or
        the new file exists after a power failure.
    """
    path = Path(path)
    if temporary is None:
        temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if flush:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file, flushes it to the disk and renames it into place.

    Several processes may write the same file at the same time; one of them wins.
    """
    path = Path(path)
    # Random and not the process id, because processes in containers on several machines can have the same id.
    with replacing(path, path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp"), flush=True) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8 with `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON with `write_bytes`. Keys are sorted, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def replace_text(path: epath.Path, text: str) -> None:
    """Replaces a file of a run directory, so that a kill leaves either the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def remove_partial(folder: epath.Path) -> None:
    """Removes what a killed run has left of `replace_text` in its folder; no run may be using it."""
    for partial in folder.glob(".*.partial"):
        if partial.is_file():
            partial.unlink()


def lines_until(path: epath.Path, step: int) -> list[str]:
    """Returns the lines up to `step` of a file of JSON lines with steps; [] if there is no file.

    A run that resumes at `step` repeats the later steps, so it removes their lines.
    """
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            pass  # the process was killed while it wrote this line
    return kept


@contextlib.contextmanager
def locked(
    path: str | os.PathLike, taken: str, fix: str, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Holds a lock within the block, so that two processes do not write the same output.

    The operating system holds the lock (`flock`) and releases it when the process ends in any way, so a lock
    file that a killed process has left does not lock anything. The file stays, because after removing it two
    processes could lock two files of the same name.

    Args:
      path: the lock file. It names the process that holds the lock, and its host. Its folder is created if it
        does not exist.
      taken: says that another process holds the lock, for the error message.
      fix: what to do then.
      say: called with one line if the file system has no locks.

    Raises:
      UserError: another process holds the lock.
      OSError: the lock file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            # NFS servers can keep the lock of a host that crashed.
            holder = " ".join(file.read().split()) or "it has not given its name yet"
            raise UserError(
                f"{taken} ({holder}): {fix} If that process no longer runs, remove '{path}'."
            ) from None
        except OSError as error:
            say(f"'{path}' cannot be locked ({error}): make sure that no other process writes to its folder.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
        file.flush()
        yield


def sha256_of_file(path: str | os.PathLike) -> str:
    """Hash of a file's bytes, in hexadecimal.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"'{os.fspath(path)}' cannot be read: {error}.") from error


def sha256_of_bytes(data: bytes) -> str:
    """Hash of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash of a value's JSON with sorted keys, in hexadecimal."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())


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
