"""Folders of images: with captions in text files beside them, or one folder a class."""

from __future__ import annotations

import bisect
import os

from pixart_jax.data import images
from pixart_jax.data.captions import captions_of
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import Example, Source, required
from pixart_jax.data.sources.paths import existing_folder, image_names, printable, suffixes
from pixart_jax.errors import UserError


class FolderSource(Source):
    """Images of a folder and its subfolders, each with its caption in a .txt file beside it.

    The caption of a/b.jpg is a/b.jpg.txt, or else a/b.txt (which a/b.png then shares). The whole file, in
    UTF-8, is one caption. Names that begin with a dot are left out; links are followed.

    Args:
      path: the folder.
      require_captions: refuse images without one; otherwise they come with no captions.
    """

    kind = "folder"

    def __init__(self, path: str | os.PathLike, *, require_captions: bool = True):
        self._root = existing_folder(path)
        self._names = sorted(image_names(self._root))
        self._require = require_captions
        if not self._names:
            raise UserError(f"folder '{path}': holds no image; suffixes read are {suffixes()}")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Example:
        key, path = self.key(index), self._root / self._names[index]
        for text_file in (path.with_name(path.name + ".txt"), path.with_suffix(".txt")):
            if text_file.is_file():
                captions = captions_of(images.read_bytes(text_file))
                break
        else:
            captions = ()
        return Example(key, path, required(captions, self._require, f"no text in '{path.stem}.txt'"))


class ClassFolderSource(Source):
    """ImageNet-style folders: each folder directly below the root is a class, its images at any depth.

    The label is the position of the folder's name among the sorted names; `classes` lists them.

    Args:
      path: the root folder.
      require_captions: must be False; here so that all kinds take it.
    """

    kind = "classes"

    def __init__(self, path: str | os.PathLike, *, require_captions: bool = False):
        if require_captions:
            raise UserError(f"source 'classes' of '{path}': has labels and no captions; use another source")
        self._root = existing_folder(path)
        folders = [entry.name for entry in os.scandir(self._root) if entry.is_dir()]
        self.classes = sorted(name for name in folders if not name.startswith("."))
        self._names = sorted(image_names(self._root))
        found = {name.split("/")[0] for name in self._names if "/" in name}
        empty = [name for name in self.classes if name not in found]
        if not self.classes:
            raise UserError(f"folder '{path}': holds no class folders; put images in one folder per class")
        # An empty folder would shift the labels of all after it without a trace.
        if empty:
            raise UserError(f"class folder '{self._root / empty[0]}': holds no image; fill or remove it")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        class_name, separator, _ = name.partition("/")
        if not separator:
            raise Refused("bad_record", f"'{name}' lies beside the class folders, in none of them")
        return Example(self.key(index), self._root / name, label=bisect.bisect_left(self.classes, class_name))
