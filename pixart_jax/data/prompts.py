"""Reads prompts: a text, or a file of prompts with fields of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.errors import UserError, did_you_mean, listing, short
from pixart_jax.readers import parse_json, read_table

# Suffixes of files of prompts that are not read line by line as text.
_LINES, _TABLES = (".jsonl", ".ndjson", ".jsonlines"), (".csv", ".tsv")
# Suffixes of files whose lines are not prompts.
_NO_PROMPTS = (
    *(".yaml", ".yml", ".toml", ".xml", ".html", ".htm", ".py", ".ipynb", ".ini", ".cfg"),
    *(".parquet", ".arrow", ".xlsx", ".xls", ".ods", ".docx", ".doc", ".odt", ".rtf", ".pdf"),
    *(".zip", ".gz", ".tar", ".npy", ".npz"),
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
)
# A text that ends in one of these is meant as the name of a file.
_SUFFIXES = (
    *(".json", *_LINES, *_TABLES, *_NO_PROMPTS),
    *(".txt", ".text", ".md", ".rst", ".log", ".lst", ".list", ".dat", ".bak"),
)


def read_prompts(source: str, kinds: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Reads the fields of prompts, without checking them.

    Args:
      source: a prompt, or a file of prompts. A text file has one prompt per line. A line of a .jsonl file, an
        element of the list in a .json file, or a row of a .csv or .tsv file has fields; the first row of a
        table names them. In JSON, a text is a prompt, too. Empty lines, and lines that begin with "#", are
        skipped; a row of a table that begins with a prompt such as "#1" needs quotes.
      kinds: the types of the fields, by which the cells of a table are read; others are text.

    Returns:
      for each prompt its place, to put before a message, and its fields.

    Raises:
      UserError: no prompt, a file that does not exist or cannot be read, or an invalid line, with its number.
    """
    path = Path(source)
    if _is_file(source):
        if path.suffix.lower() in _NO_PROMPTS:
            raise UserError(
                f"prompts '{source}': a {path.suffix} file is not read: give a .txt, .jsonl, .json, .csv or "
                ".tsv file."
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"prompts '{source}' cannot be read ({error}): give a text file in UTF-8."
            ) from None
        entries = _entries(path, text, kinds)
    else:
        entries = [("", {"prompt": " ".join(source.split("\n")).strip()})] if source.strip() else []
    if not entries:
        raise UserError(f"prompts '{source}' hold no prompt: give a text, or a file with one on each line.")
    return entries


def _is_file(source: str) -> bool:
    """Whether `source` names a file, and is not a prompt.

    Raises:
      UserError: it names a folder, or looks like the name of a file that does not exist.
    """
    try:
        if Path(source).exists() and source.strip():
            if not Path(source).is_dir():
                return True
            what = "this is a folder"
        else:
            words = source.split()
            like_a_path = (
                source.startswith(("./", "../", "~/"))
                or (len(words) == 1 and ("/" in source or "\\" in source))
                or source.rstrip().lower().endswith(("/", "\\", *_SUFFIXES))
                # An absolute path with spaces, unlike "/imagine a red fox".
                or (source.startswith("/") and "/" in words[0][1:])
            )
            if not like_a_path:
                return False
            what = "there is no such file"
    except (OSError, ValueError):  # too long for a file name, or with a NUL
        return False
    raise UserError(f"prompts '{source}': {what}. To use it as a prompt, put it into a text file.")


def _entries(path: Path, text: str, kinds: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The prompts in the text of a file: for each its place, to put before a message, and its fields."""
    kind = path.suffix.lower()
    if kind == ".json":
        values = _parse_json(text, f"'{path}': ")
        if not isinstance(values, list):
            raise UserError(
                f"'{path}' holds {short(text.strip())[:40]}: it must be a list of texts or of objects."
            )
        places = [(f"element {number} of '{path}': ", value) for number, value in enumerate(values, 1)]
        return [(where, _fields(value, where)) for where, value in places]
    if kind in _TABLES:
        return _rows(path, kinds)
    # splitlines() would also break lines at characters that a prompt may contain.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(f"line {number} of '{path}': ", line) for number, line in lines if line and line[0] != "#"]
    if kind in _LINES:
        return [(where, _fields(_parse_json(line, where), where)) for where, line in lines]
    return [(where, {"prompt": line}) for where, line in lines]


def _parse_json(text: str, where: str) -> Any:
    try:
        # Lenient, because the check of the fields names the one that is wrong.
        return parse_json(text, lenient=True)
    except ValueError as error:
        raise UserError(f"{where}not valid JSON ({error}): correct it.") from None


def _fields(value: Any, where: str) -> dict[str, Any]:
    """The fields of an entry in JSON."""
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise UserError(
            f'{where}{short(json.dumps(value))[:40]} is not a JSON object: give {{"prompt": ...}}.'
        )
    return value


def _rows(path: Path, kinds: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a table. An empty cell sets nothing."""
    names, rows = read_table(path, comments=True)
    if "prompt" not in names:
        raise UserError(
            f"'{path}' has no column 'prompt' (columns: {listing(names)}): name the columns in the first "
            f"line.{did_you_mean('prompt', names)}"
        )
    out = []
    for line, row in rows:
        where = f"line {line} of '{path}': "
        if None in row:
            raise UserError(f"{where}more cells than the first line: put text that has commas in quotes.")
        cells = {name: (cell or "").strip() for name, cell in row.items()}
        values = {name: _from_text(kinds.get(name, str), cell) for name, cell in cells.items() if cell}
        if values:
            out.append((where, values))
    return out


def _from_text(kind: Any, text: str) -> Any:
    """A cell as a value of JSON: numbers, true, false, lists and objects are written as in JSON."""
    if kind is str:
        return text
    try:
        return parse_json(text.lower() if kind is bool else text, lenient=True)
    except ValueError:
        return text  # of the wrong type, which the check of the fields reports
