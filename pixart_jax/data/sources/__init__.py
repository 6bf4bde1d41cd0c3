"""Sources of images and captions: ten kinds with one interface.

    source = open_source("auto", "photos/")
    for i in range(len(source)):
        try:
            example = source[i]          # key, captions, label; the image is not read yet
            pixels = example.decode()    # uint8 [H, W, 3]
        except Refused as refused:
            report.refuse(source.key(i), refused)

    kind        what                                             key of a sample
    folder      images with captions in text files, recursive    path relative to the folder, with suffix
    kohya       folders named "10_sks dog": repeats, caption     path relative to the folder, with suffix
    imagefolder Hugging Face's folder with metadata.jsonl or so  path relative to the folder, with suffix
    json        one list of objects (InternData, COCO)           the object's path, relative to the image root
    jsonl       one object per line                              the object's path, relative to the image root
    csv         a table whose first line names the columns       the row's path, relative to the image root
    parquet     image bytes or paths, and caption columns        a column, or file/row
    webdataset  uncompressed tar shards                          tar/member
    tfds        a prepared TFDS dataset in ArrayRecord format    a feature, or name/version/split/row
    classes     one folder per class, for class labels           path relative to the folder, with suffix

Keys are unique within a source and do not depend on the run or the machine. The order is fixed: folder, json,
jsonl and classes are sorted by key; parquet, webdataset and tfds by file name and position, the order in
which they are read fastest. Sources can be pickled, and several threads can read from them.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from pixart_jax.data import images
from pixart_jax.data.sources.base import CaptionedSource, Example, FileSlice, Source
from pixart_jax.data.sources.folders import (
    CAPTION_SUFFIXES,
    ClassFolderSource,
    FolderSource,
    KohyaSource,
)
from pixart_jax.data.sources.lists import (
    METADATA,
    CsvSource,
    ImageFolderSource,
    JsonlSource,
    JsonSource,
    RecaptionedSource,
)
from pixart_jax.data.sources.parquet import ParquetSource
from pixart_jax.data.sources.paths import suffixes, walk
from pixart_jax.data.sources.tfds import TfdsSource
from pixart_jax.data.sources.webdataset import WebDatasetSource
from pixart_jax.errors import UserError, one_of, short

__all__ = ["KINDS", "SOURCES", "Example", "FileSlice", "Source", "detect_kind", "open_source"]

SOURCES: dict[str, type[Source]] = {
    source.kind: source
    for source in (
        FolderSource, KohyaSource, ImageFolderSource, JsonSource, JsonlSource, CsvSource, ParquetSource,
        WebDatasetSource, TfdsSource, ClassFolderSource,
    )
}  # fmt: skip
KINDS = tuple(SOURCES)


def open_source(
    kind: str,
    path: str | os.PathLike,
    *,
    captions: str | os.PathLike | None = None,
    caption: str | None = None,
    **options: Any,
) -> Source:
    """Opens a source.

    Args:
      kind: one of `KINDS`, or "auto" for `detect_kind`.
      path: a file, a folder, a pattern (webdataset) or a name (tfds).
      captions: a file written by the caption command. Its captions replace those of the source.
      caption: the caption of all images. It replaces the captions of the source.
      **options: arguments of the class of that kind.

    Raises:
      UserError: the kind or an option is unknown, there are no samples, "auto" cannot detect the kind, or
        both `caption` and other captions are given.
    """
    if caption is not None:
        other = "captions" if captions is not None else "caption_fields"
        if captions is not None or options.get("caption_fields") is not None:
            raise UserError(
                f"caption '{short(caption)}' and {other} both say which captions to use: leave one of "
                "them out."
            )
        options["require_captions"] = False
        return CaptionedSource(open_source(kind, path, **options), caption)
    if captions is not None:
        names = ("caption_fields", "require_captions")
        own = {name: options.pop(name) for name in names if name in options}
        return RecaptionedSource(open_source(kind, path, **options, require_captions=False), captions, **own)
    if kind == "auto":
        kind = detect_kind(path, options.get("require_captions", True))
    one_of("source", kind, ("auto", *KINDS))
    known = [name for name in inspect.signature(SOURCES[kind]).parameters if name != "path"]
    for name in options:
        one_of(f"option of source '{kind}'", name, known)
    return SOURCES[kind](path, **options)


def detect_kind(path: str | os.PathLike, require_captions: bool = True) -> str:
    """Detects the kind of a source from the suffix of a file or the content of a folder.

    A folder with tar or Parquet files is "webdataset" or "parquet", one of images with one of the files in
    `METADATA` is "imagefolder". Another folder of images is "classes" if captions are required, all images
    are in subfolders and there is no .txt or .caption file; otherwise it is "folder".
    All files of a folder are listed, which is slow for millions of files; pass their kind instead.

    Args:
      path: a file or a folder.
      require_captions: whether captions are required.

    Raises:
      UserError: the path does not exist, or its content matches no kind or several kinds.
    """
    path = Path(path)
    by_suffix = {
        ".json": "json",
        ".jsonl": "jsonl",
        ".csv": "csv",
        ".tsv": "csv",
        ".parquet": "parquet",
        ".tar": "webdataset",
    }
    if not path.is_dir() and path.suffix.lower() in by_suffix:
        return by_suffix[path.suffix.lower()]
    if not path.exists():
        raise UserError(f"'{path}': no such file or folder; for a dataset of TFDS set source=tfds")
    if path.is_file():
        raise UserError(f"'{path}': its suffix is not that of a source; set source={'|'.join(KINDS)}")
    if (path / "dataset_info.json").is_file() and (path / "features.json").is_file():
        return "tfds"
    found, lists = set(), set()
    deep = shallow = texts = False
    for folder, name in walk(path):
        suffix = os.path.splitext(name)[1].lower()
        if name in METADATA:
            lists.add(name)
        elif suffix in (".tar", ".parquet"):
            found.add(by_suffix[suffix])
        elif suffix in images.SUFFIXES:
            found.add("folder")
            deep, shallow = deep or bool(folder), shallow or not folder
        texts = texts or suffix in CAPTION_SUFFIXES
    if "metadata.parquet" in lists and "folder" not in found:
        found.add("parquet")
    if len(found) > 1:
        kinds = " and ".join(sorted(found))
        raise UserError(f"folder '{path}': has files of sources {kinds}; set source= to one of them")
    if not found:
        raise UserError(
            f"folder '{path}': has no images, tar or Parquet files; suffixes of images are {suffixes()}"
        )
    if found == {"folder"} and lists:
        if texts and require_captions and _has_caption_files(path):
            raise UserError(
                f"folder '{path}': has captions in {' and '.join(CAPTION_SUFFIXES)} files and in "
                f"{' or '.join(METADATA)}; set source=folder or source=imagefolder"
            )
        return "imagefolder"
    if found == {"folder"} and deep and not shallow and not texts and require_captions:
        return "classes"
    return found.pop()


def lists_in(path: str | os.PathLike) -> list[Path]:
    """Returns the files of a folder that may be lists of images, such as captions.jsonl."""
    suffixes_of_lists = (".json", ".jsonl", ".csv", ".tsv")
    files = (Path(path, folder, name) for folder, name in walk(Path(path)))
    return [file for file in files if file.suffix.lower() in suffixes_of_lists]


def _has_caption_files(path: Path) -> bool:
    """Whether an image of a folder has its caption in a file next to it, unlike a README.txt."""
    stems: dict[bool, set[str]] = {True: set(), False: set()}
    for folder, name in walk(path):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (*CAPTION_SUFFIXES, *images.SUFFIXES):
            stems[suffix.lower() in CAPTION_SUFFIXES].add(f"{folder}/{stem}")
    return not stems[True].isdisjoint(stems[False])
