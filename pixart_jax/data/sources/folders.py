"""Folders of images: with captions in text files, in kohya's layout, or with one folder per class."""

from __future__ import annotations

import bisect
import collections
import math
import os
import re
from pathlib import Path

from pixart_jax.constants import MOST_REPEATS
from pixart_jax.data import images
from pixart_jax.data.captions import LONGEST_CAPTION, Caption, captions_of
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import Example, Source, required
from pixart_jax.data.sources.paths import (
    SPLITS,
    existing_folder,
    folders_of_splits,
    image_names,
    printable,
    suffixes,
    walk,
)
from pixart_jax.errors import UserError

# Suffixes of files with a caption, in the order in which they are looked for. They may be in upper case.
CAPTION_SUFFIXES = (".txt", ".caption")
# Kohya's name of a folder, such as "10_sks dog": how often its images are repeated, and their caption.
_REPEATS = re.compile(r"(\d+)_\s*(\S.*)")


class FolderSource(Source):
    """Images of a folder and its subfolders, each with its caption in a text file next to it.

    The caption of a/b.jpg is the content of a/b.jpg.txt or, if that does not exist, of a/b.txt, which may
    also be the caption of a/b.png; if neither exists, of a/b.jpg.caption or a/b.caption. The file has one
    caption, in UTF-8. Names that begin with a dot are ignored. Symbolic links are followed.

    Args:
      path: the folder.
      require_captions: whether to skip images without a caption.
    """

    kind = "folder"

    def __init__(self, path: str | os.PathLike, *, require_captions: bool = True):
        self._root = existing_folder(path)
        self._names, others = [], []
        for folder, name in walk(self._root):
            name = f"{folder}/{name}" if folder else name
            if os.path.splitext(name)[1].lower() in images.SUFFIXES:
                self._names.append(name)
            else:
                others.append(name)
        self._names.sort()
        self._require = require_captions
        if not self._names:
            raise UserError(f"folder '{path}': has no images; suffixes of images are {suffixes()}")
        if require_captions:
            self.notes = _notes(path, self._names, others)
        if splits := folders_of_splits(self._names):
            self.notes += (
                f"'{path}': the images of {' and '.join(splits)} are all read; to keep one of these folders "
                f"for validation, give only another, such as '{self._root / splits[0]}'",
            )

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Example:
        key, path = self.key(index), self._root / self._names[index]
        return Example(key, path, required(self._captions(path), self._require, _no_text(path)))

    def _captions(self, path: Path) -> tuple[Caption, ...]:
        """Reads the caption of an image; empty if there is no file."""
        files = (path.with_name(name) for name in _caption_names(path.name))
        file = next((file for file in files if os.path.lexists(file) and not file.is_dir()), None)
        # More bytes than the longest caption has, so that `captions_of` skips it with the right reason.
        return () if file is None else captions_of(images.read_bytes(file, 8 * LONGEST_CAPTION))


def _caption_names(image: str) -> list[str]:
    """Returns the names that the caption file of an image may have, in order."""
    stem = os.path.splitext(image)[0]
    cases = (str.lower, str.upper, lambda suffix: suffix[0] + suffix[1:].capitalize())
    return [start + case(suffix) for suffix in CAPTION_SUFFIXES for start in (image, stem) for case in cases]


def _no_text(image: Path) -> str:
    return "no text in " + " or ".join(f"'{image.stem}{suffix}'" for suffix in CAPTION_SUFFIXES)


def _notes(path: str | os.PathLike, names: list[str], others: list[str]) -> tuple[str, ...]:
    """Tells which files of a folder are not read, although they could be captions."""
    split = [os.path.splitext(name) for name in others]
    stems = [{stem for stem, end in split if end.lower() == suffix} for suffix in CAPTION_SUFFIXES]
    # For each image and each suffix, whether there is such a file.
    found = [[bool({name, os.path.splitext(name)[0]} & known) for known in stems] for name in names]
    several = [name for name, has in zip(names, found, strict=True) if sum(has) > 1]
    without = sum(not any(has) for has in found)
    notes = []
    if several:
        notes.append(
            f"'{path}': {len(several):,} images have {' and '.join(CAPTION_SUFFIXES)} files, for example "
            f"'{several[0]}'; only the {CAPTION_SUFFIXES[0]} files are read"
        )
    layout = {match[1] for match in (_REPEATS.fullmatch(name.partition("/")[0]) for name in names) if match}
    if (len(layout) > 1 or without) and all(_REPEATS.match(name) and "/" in name for name in names):
        notes.append(
            f"'{path}': its folders are named like those of kohya's scripts, '{names[0].split('/')[0]}'; "
            "source=kohya repeats images as the names say, and uses the names as missing captions"
        )
    kinds = collections.Counter(end.lower() or stem for stem, end in split)
    unread = [f"{count:,} {kind}" for kind, count in kinds.most_common() if kind not in CAPTION_SUFFIXES]
    if without and unread:
        notes.append(
            f"'{path}': {without:,} images have no caption file; other files, which are not read: "
            f"{', '.join(unread[:5])}"
        )
    return tuple(notes)


class KohyaSource(FolderSource):
    """The training folder of kohya's scripts: subfolders named REPEATS_CAPTION, such as "10_sks dog".

    Captions are in files, as in `FolderSource`. The caption of an image without a file is that in the name of
    its folder. REPEATS says how often its images are used, compared with the images of the other folders: an
    image of "10_sks dog" has ten samples if there is a folder "1_dog", and only one if all folders begin with
    10. Images in other folders are not read.

    Args:
      path: the folder that has these subfolders.
      require_captions: ignored, as there always is a caption.
    """

    kind = "kohya"

    def __init__(self, path: str | os.PathLike, *, require_captions: bool = True):
        super().__init__(path, require_captions=require_captions)
        found = {name: _REPEATS.fullmatch(name.partition("/")[0]) for name in self._names if "/" in name}
        repeats = {name: int(match[1]) for name, match in found.items() if match and int(match[1])}
        if not repeats:
            raise UserError(
                f"folder '{path}': has no images in folders named like '10_sks dog' (REPEATS_CAPTION); "
                "rename them, or set source=folder"
            )
        left = [name for name in self._names if name not in repeats]
        self.notes = ()
        if left:
            self.notes = (
                f"'{path}': {len(left):,} images are not read, because their folder is not named like "
                f"'10_sks dog', for example '{left[0]}'",
            )
        common = math.gcd(*repeats.values())
        name, most = max(repeats.items(), key=lambda item: item[1])
        if most // common > MOST_REPEATS:
            raise UserError(
                f"folder '{path}': '{name.partition('/')[0]}' would repeat its images {most // common:,} "
                f"times, over {MOST_REPEATS:,}; rename it"
            )
        self._samples = [(name, copy) for name in repeats for copy in range(repeats[name] // common)]

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        name, copy = self._samples[index]
        return printable(name) + (f"#{copy + 1}" if copy else "")

    def image_key(self, index: int) -> str:
        return printable(self._samples[index][0])

    def __getitem__(self, index: int) -> Example:
        name, _ = self._samples[index]
        path = self._root / name
        folder = _REPEATS.fullmatch(name.partition("/")[0])[2]
        return Example(self.key(index), path, self._captions(path) or captions_of(folder, 1.0, "folder"))


class ClassFolderSource(Source):
    """Images with class labels in the layout of ImageNet: each folder directly below the root is a class.

    The images of a class may be in subfolders of its folder. `classes` has the names of the class folders,
    sorted; the label of an image is the position of its class.

    Args:
      path: the root folder.
      require_captions: must be False; it exists because all kinds of source have this argument.
    """

    kind = "classes"

    def __init__(self, path: str | os.PathLike, *, require_captions: bool = False):
        if require_captions:
            raise UserError(f"source 'classes' of '{path}': has labels but no captions; use another source")
        self._root = existing_folder(path)
        folders = [entry.name for entry in os.scandir(self._root) if entry.is_dir()]
        self._folders = sorted(name for name in folders if not name.startswith("."))
        self.classes = list(map(printable, self._folders))
        self._names = sorted(image_names(self._root))
        found = {name.split("/")[0] for name in self._names if "/" in name}
        empty = [name for name in self._folders if name not in found]
        if not self.classes:
            raise UserError(
                f"folder '{path}': has no class folders; put the images of each class in a folder"
            )
        splits = [name for name in self.classes if name.lower() in SPLITS]
        train = [name for name in splits if SPLITS[name.lower()] == "train"]
        if splits == self.classes or (train and len(splits) > 1):
            raise UserError(
                f"folder '{path}': {' and '.join(splits)} are names of splits, not of classes; give the "
                f"folder of a split, such as '{self._root / (train or splits)[0]}'"
            )
        # An empty folder, which is easily overlooked, would change the labels of all classes after it.
        if empty:
            raise UserError(f"class folder '{self._root / empty[0]}': has no images; add images or remove it")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        class_name, separator, _ = name.partition("/")
        if not separator:
            raise Refused("bad_record", f"'{name}' is not in a class folder")
        return Example(
            self.key(index), self._root / name, label=bisect.bisect_left(self._folders, class_name)
        )
