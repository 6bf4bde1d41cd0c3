"""Files and folders by name: walking them, patterns, and paths that stay below their root."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pixart_jax.data import images
from pixart_jax.data.images import Refused
from pixart_jax.errors import UserError


def walk(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (folder relative to the root, with "/"; file name) of all files not hidden, links followed."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(files):
            if not name.startswith("."):
                yield "" if relative == "." else relative, name


def image_names(root: Path) -> Iterator[str]:
    for folder, name in walk(root):
        if os.path.splitext(name)[1].lower() in images.SUFFIXES:
            yield f"{folder}/{name}" if folder else name


def printable(name: str) -> str:
    """Makes a file name that is not UTF-8 fit for JSON and for the record's key."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def path_below(path: str, root: Path) -> str:
    """Returns a path relative to the root, with "/", "." and ".." resolved.

    Raises:
      Refused: "outside_root". Judged by the names alone: links inside the root are the user's own.
    """
    relative = os.path.normpath(path)
    if os.path.isabs(path):
        relative = os.path.relpath(relative, root)
    if relative == ".." or relative.startswith(f"..{os.sep}") or os.path.isabs(relative) or "\0" in path:
        raise Refused("outside_root", f"'{path}' is not below '{root}'")
    return printable(relative.replace(os.sep, "/"))


def existing_folder(path: str | os.PathLike) -> Path:
    if not os.path.isdir(path):
        raise UserError(
            f"folder '{path}': does not exist or is no folder; give the one that holds the images"
        )
    return Path(path)


def existing_file(path: str | os.PathLike) -> Path:
    if not os.path.isfile(path):
        raise UserError(f"file '{path}': does not exist or is no file; give the list of images")
    return Path(path)


def files_of(path: str | os.PathLike, suffix: str) -> tuple[Path, list[Path]]:
    """Returns the files of a file name, folder or pattern, by name, and the folder they are relative to."""
    text = os.fspath(path)
    if os.path.isdir(text):
        names = [f"{folder}/{name}" if folder else name for folder, name in walk(Path(text))]
        base, files = Path(text), [Path(text, name) for name in sorted(names) if name.endswith(f".{suffix}")]
    else:
        expanded = expand_braces(text)
        files = [Path(name) for pattern in expanded for name in sorted(glob.glob(pattern, recursive=True))]
        if len(expanded) > 1:
            absent = [name for name in expanded if not glob.has_magic(name) and not os.path.isfile(name)]
            if absent:
                raise UserError(f"'{path}': file '{absent[0]}' is missing; restore it or narrow the braces")
        base = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    if not files:
        raise UserError(f"'{path}': no .{suffix} file there; give a file, a folder of them or a pattern")
    return base, files


def expand_braces(pattern: str) -> list[str]:
    """Expands one or more {000..123} of a pattern, keeping leading zeros, as WebDataset does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    return list(
        itertools.chain.from_iterable(
            expand_braces(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")
            for number in range(int(first), int(last) + 1)
        )
    )


def suffixes() -> str:
    return " ".join(sorted(images.SUFFIXES))
