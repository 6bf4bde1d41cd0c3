"""Lists the files of a folder or a pattern, and checks that paths are inside a folder."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pixart_jax.data import images
from pixart_jax.data.images import Refused
from pixart_jax.errors import UserError, one_of

# Text of more characters is not a path.
LONGEST_PATH = 1024
# The splits of a data set, by the names that folders and files give them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(SPLITS)})(?=[-._ 0-9]|$)")


def walk(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (folder, file name) for all files below the root, except hidden ones.

    The folder is relative to the root, with "/" as the separator. Symbolic links are followed.
    """
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder would lead to an endless loop
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(files):
            if not name.startswith("."):
                yield "" if relative == "." else relative, name


def image_names(root: Path) -> Iterator[str]:
    """Yields the paths of all images below the root, relative to it."""
    for folder, name in walk(root):
        if os.path.splitext(name)[1].lower() in images.SUFFIXES:
            yield f"{folder}/{name}" if folder else name


def printable(name: str) -> str:
    """Escapes bytes of a file name that are not UTF-8, so that it can be stored in JSON and in records."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def path_below(path: str, root: Path) -> str:
    """Returns a path relative to the root, with "/" as the separator and without "." and "..".

    Only the path itself is checked. Symbolic links in the root may lead out of it, because the user made
    them.

    Args:
      path: relative to the root, or absolute.
      root: the folder.

    Raises:
      Refused: with reason "outside_root", if the path is not below the root; with reason "bad_record", if it
        is so long that it is something else.
    """
    if len(path) > LONGEST_PATH:
        raise Refused("bad_record", f"'{path}' is neither a path nor an image in base64")
    relative = os.path.normpath(path)
    if os.path.isabs(path):
        relative = os.path.relpath(relative, root)
    if relative == ".." or relative.startswith(f"..{os.sep}") or os.path.isabs(relative) or "\0" in path:
        raise Refused("outside_root", f"'{path}' is not below '{root}'")
    return printable(relative.replace(os.sep, "/"))


def existing_folder(path: str | os.PathLike) -> Path:
    """Returns `path`. Raises a `UserError` if it is not a folder."""
    if not os.path.isdir(path):
        raise UserError(f"folder '{path}': does not exist or is not a folder; give the folder of the images")
    return Path(path)


def existing_file(path: str | os.PathLike) -> Path:
    """Returns `path`. Raises a `UserError` if it is not a file."""
    if not os.path.isfile(path):
        raise UserError(f"file '{path}': does not exist or is not a file; give the list of images")
    return Path(path)


def files_of(path: str | os.PathLike, suffix: str) -> tuple[Path, list[Path]]:
    """Finds files by their suffix.

    Args:
      path: a file, a folder (searched recursively) or a pattern with wildcards or a range {000..123}.
      suffix: suffix of the files, in lower case and without the dot. In a folder, it may have any case.

    Returns:
      the folder that contains all files, and the files, sorted.

    Raises:
      UserError: there are no such files, or a file of a range {000..123} is missing.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        names = [f"{folder}/{name}" if folder else name for folder, name in walk(Path(text))]
        names = [name for name in sorted(names) if name.lower().endswith(f".{suffix}")]
        base, files = Path(text), [Path(text, name) for name in names]
    else:
        expanded = [text] if os.path.isfile(text) else expand_braces(text)
        found = [sorted(glob.glob(_without_magic(name), recursive=True)) for name in expanded]
        files = [Path(name) for names in found for name in names]
        absent = [name for name, names in zip(expanded, found, strict=True) if not names]
        if files and absent:
            raise UserError(f"'{path}': file '{absent[0]}' is missing; restore it or give a smaller range")
        base = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    if not files:
        raise UserError(f"'{path}': no .{suffix} file found; give a file, a folder or a pattern")
    for file in files:
        if not file.is_file():  # opening a FIFO would wait for another process
            raise UserError(f"'{file}': is not a file; remove it or give another pattern")
    return base, files


def _without_magic(pattern: str) -> str:
    """Escapes the wildcards in the part of a pattern that exists, such as the folder "real[1]"."""
    parts = Path(pattern).parts
    for number in range(len(parts), 0, -1):
        start = os.path.join(*parts[:number])
        if os.path.lexists(start):
            return os.path.join(glob.escape(start), *parts[number:])
    return pattern


def split_of(name: str) -> str:
    """Returns the split that a path belongs to, a value of `SPLITS`; "" if it names none.

    As in Hugging Face's `datasets`, the name of a split is that of a folder, or a part of the name of the
    file, such as train-00000-of-00002.parquet. A folder comes first.
    """
    *folders, file = name.lower().split("/")
    named = next((SPLITS[folder] for folder in folders if folder in SPLITS), None)
    found = _SPLIT_IN_NAME.search(os.path.splitext(file)[0])
    return named or (SPLITS[found[1]] if found else "")


def choose_split(
    names: Sequence[str], split: str | None, where: str | os.PathLike
) -> tuple[list[str], tuple[str, ...]]:
    """Chooses the files of a split.

    Args:
      names: paths of the files, relative to the folder that contains them all.
      split: a split, "all", or None for the files of "train" and those that name no split.
      where: the source, for messages.

    Returns:
      the paths of the files to read; and a line for the user if others are not read, else nothing.

    Raises:
      UserError: the split is unknown, or None although there is no training split.
    """
    own = {name: split_of(name) for name in names}
    splits = sorted({name for name in own.values() if name})
    if split is not None:
        one_of("split", split, [*splits, *SPLITS, "all"])
        wanted = {split if split == "all" else SPLITS[split]}
        if not wanted & {*splits, "all"}:
            raise UserError(
                f"split is '{split}': '{where}' has only {', '.join(splits) or 'files that name no split'}"
            )
    elif len(set(own.values())) == 1:
        wanted = {"all"}
    else:
        wanted = {"train", ""}
        if not wanted & set(own.values()):
            raise UserError(
                f"'{where}': has the splits {' and '.join(splits)}; choose one with split, or all"
            )
    chosen = [name for name in names if wanted & {own[name], "all"}]
    if len(chosen) == len(names):
        return chosen, ()
    left = sorted({own[name] for name in names} - wanted)
    note = (
        f"'{where}': {len(chosen)} of {len(names)} files are read, without those of the split "
        f"{', '.join(name or 'without a name' for name in left)}; set split to read others, or to all"
    )
    return chosen, (note,)


def folders_of_splits(names: Iterable[str]) -> list[str]:
    """Returns the folders whose names are those of splits, training first; [] if there is only one split.

    Args:
      names: paths of images, relative to the folder that contains them all.
    """
    splits: dict[str, str] = {}  # by folder
    for name in names:
        folders = name.split("/")[:-1]
        depth = next((depth for depth, folder in enumerate(folders, 1) if folder.lower() in SPLITS), 0)
        if depth:
            splits["/".join(folders[:depth])] = SPLITS[folders[depth - 1].lower()]
    if len(set(splits.values())) < 2:
        return []
    return sorted(splits, key=lambda folder: (splits[folder] != "train", folder))


def expand_braces(pattern: str) -> list[str]:
    """Expands all ranges {000..123} in a pattern as WebDataset does, with leading zeros."""
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
    """Returns the suffixes of images, for messages."""
    return " ".join(sorted(images.SUFFIXES))
