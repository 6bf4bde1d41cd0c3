"""Folders of images: with captions in text files next to the images, or with one folder per class."""

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
    """Images of a folder and its subfolders, each with its caption in a .txt file next to it.

    The caption of a/b.jpg is the content of a/b.jpg.txt or, if that does not exist, of a/b.txt, which may
    also be the caption of a/b.png. The file has one caption, in UTF-8. Names that begin with a dot are
    ignored. Symbolic links are followed.

    Args:
      path: the folder.
      require_captions: whether to skip images without a caption.
    """

    kind = "folder"

    def __init__(self, path: str | os.PathLike, *, require_captions: bool = True):
        self._root = existing_folder(path)
        self._names = sorted(image_names(self._root))
        self._require = require_captions
        if not self._names:
            raise UserError(f"folder '{path}': has no images; suffixes of images are {suffixes()}")

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
        self.classes = sorted(name for name in folders if not name.startswith("."))
        self._names = sorted(image_names(self._root))
        found = {name.split("/")[0] for name in self._names if "/" in name}
        empty = [name for name in self.classes if name not in found]
        if not self.classes:
            raise UserError(
                f"folder '{path}': has no class folders; put the images of each class in a folder"
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
        return Example(self.key(index), self._root / name, label=bisect.bisect_left(self.classes, class_name))
