"""Files that are written completely or not at all, sha256 of files, bytes and JSON, and tables in CSV.

For local files. Code that also supports cloud storage, such as run directories, uses `etils.epath` instead.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixart_jax.errors import UserError


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


def read_table(path: str | os.PathLike) -> tuple[list[str], list[tuple[int, dict[str | None, Any]]]]:
    """Reads a table in CSV, whose first line names the columns.

    The separator is a tab in a .tsv file. Otherwise it is a comma, or a semicolon if the first line has only
    those, as spreadsheets write it in some countries.

    Args:
      path: the file, in UTF-8.

    Returns:
      the names of the columns; and for each row the number of its first line, and its cells by column. A cell
      that is missing is None; cells that have no column are a list under the name None.

    Raises:
      UserError: the file cannot be read, or is not a table.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may have an image in base64
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        first = text.partition("\n")[0]
        comma = ";" if ";" in first and "," not in first else ","
        tab = os.fspath(path).lower().endswith(".tsv")
        table = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tab else comma)
        names = [name.strip() for name in next(table, [])]
        rows, line = [], table.line_num
        for cells in table:
            if cells:
                row = dict(itertools.zip_longest(names, cells[: len(names)]))
                rows.append((line + 1, row | ({None: cells[len(names) :]} if cells[len(names) :] else {})))
            line = table.line_num  # a row may have several lines; this is its last one
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"'{os.fspath(path)}' is not a table in CSV and UTF-8 ({error}): correct it."
        ) from None
    return names, rows
