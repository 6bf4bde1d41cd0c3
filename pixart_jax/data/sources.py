"""Where images and captions come from: seven kinds of source with one interface.

    source = open_source("auto", "photos/")
    for i in range(len(source)):
        try:
            example = source[i]          # key, captions, label; the image is not read yet
            pixels = example.decode()    # uint8 [H, W, 3]
        except Refused as refused:
            report.refuse(source.key(i), refused)

    kind        what                                             key of a sample
    folder      images, recursive, with .txt captions beside     path relative to the folder, with suffix
    json        one list of objects (the official InternData)    the object's path, relative to the image root
    jsonl       one object a line                                the same
    parquet     image bytes or paths, and caption columns        a column, or file/row
    webdataset  uncompressed tar shards                          tar/member
    tfds        a prepared TFDS dataset in ArrayRecord format    a feature, or name/version/split/row
    classes     one folder per class, for class labels           path relative to the folder, with suffix

Keys are unique within a source and stable between runs and machines. The order is fixed: by key for folder,
json, jsonl and classes; by file name and position for parquet, webdataset and tfds, which read fastest so.
Sources hold no open files that cannot be reopened: they can be pickled, and read from several threads.
"""

from __future__ import annotations

import bisect
import dataclasses
import glob
import importlib
import inspect
import itertools
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.captions import (
    Caption,
    captions_of,
    captions_of_record,
    check_fields,
    default_fields,
    field_weights,
)
from pixart_jax.data.images import Refused
from pixart_jax.errors import UserError, did_you_mean

CaptionFields = Mapping[str, float] | Sequence[str] | None


class FileSlice(NamedTuple):
    """Bytes inside a larger file: `size` bytes from `offset`."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Reads the bytes. Raises Refused when the file is gone or shorter."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except FileNotFoundError:
            raise Refused("missing_image", f"no file '{self.path}'") from None
        except OSError as error:
            raise Refused("unreadable", f"'{self.path}': {error.strerror or error}") from None
        if len(data) != self.size:
            raise Refused("unreadable", f"'{self.path}' ends inside the {self.size} bytes at {self.offset}")
        return data


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample, its image not decoded yet.

    Attributes:
      key: unique and stable name within the source.
      image: where the encoded image is: its bytes, its file, or a part of a file.
      captions: those with text, in the order of the source; empty only where captions are not required.
      label: class index, or None.
      height: of the upright image in pixels if the source says it, else None. A hint: the image decides.
      width: likewise.
    """

    key: str
    image: bytes | Path | FileSlice
    captions: tuple[Caption, ...] = ()
    label: int | None = None
    height: int | None = None
    width: int | None = None

    def read(self) -> bytes:
        """Returns the encoded image. Raises Refused."""
        return self.image.read() if isinstance(self.image, FileSlice) else images.read_bytes(self.image)

    def decode(self) -> np.ndarray:
        """Returns the upright image, uint8 [H, W, 3]. Raises Refused."""
        return images.decode_image(self.read())

    def size(self) -> tuple[int, int]:
        """Returns the upright (height, width) in pixels from the image's header. Raises Refused."""
        return images.read_size(self.image if isinstance(self.image, Path) else self.read())


class Source:
    """Random access to samples. Subclasses define `__len__`, `key` and `__getitem__`.

    Attributes:
      kind: the value of `--source` that opens it.
      classes: names of the labels, None where there are none.
    """

    kind = ""
    classes: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, index: int) -> str:
        """Returns the key of a sample, also of one that `__getitem__` refuses."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Returns a sample. Raises Refused where it cannot be used, IndexError past the end."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Folders


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
        self._root = _existing_folder(path)
        self._names = sorted(_image_names(self._root))
        self._require = require_captions
        if not self._names:
            raise UserError(f"folder '{path}': holds no image; suffixes read are {_suffixes()}")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return _printable(self._names[index])

    def __getitem__(self, index: int) -> Example:
        key, path = self.key(index), self._root / self._names[index]
        for text_file in (path.with_name(path.name + ".txt"), path.with_suffix(".txt")):
            if text_file.is_file():
                captions = captions_of(images.read_bytes(text_file))
                break
        else:
            captions = ()
        return Example(key, path, _required(captions, self._require, f"no text in '{path.stem}.txt'"))


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
        self._root = _existing_folder(path)
        folders = [entry.name for entry in os.scandir(self._root) if entry.is_dir()]
        self.classes = sorted(name for name in folders if not name.startswith("."))
        self._names = sorted(_image_names(self._root))
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
        return _printable(self._names[index])

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        class_name, separator, _ = name.partition("/")
        if not separator:
            raise Refused("bad_record", f"'{name}' lies beside the class folders, in none of them")
        return Example(self.key(index), self._root / name, label=bisect.bisect_left(self.classes, class_name))


# --------------------------------------------------------------------------------------------------
# Lists


class _ListSource(Source):
    """What json and jsonl share: objects with a path, captions and perhaps a size and a label."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_root: str | os.PathLike | None = None,
        path_field: str = "path",
        caption_fields: CaptionFields = None,
        require_captions: bool = True,
    ):
        self._file = _existing_file(path)
        self._root = Path(os.path.abspath(image_root if image_root is not None else self._file.parent))
        if not self._root.is_dir():
            raise UserError(f"image root '{self._root}': is no folder; set image_root to where paths start")
        self._path_field = path_field
        self._require = require_captions
        first_fields: dict[str, None] = {}
        entries = []
        for position, record in enumerate(self._records()):
            if position < 100 and isinstance(record, dict):
                first_fields.update(dict.fromkeys(record))
            try:
                key = self._key_of(record)
            except Refused:
                key = f"{self._file.name}:{position + 1}"  # refused again, and then reported, by __getitem__
            entries.append((key, position))
        if not entries:
            raise UserError(f"'{path}': the list is empty; it needs at least one object")
        if first_fields and path_field not in first_fields:
            raise UserError(
                f"'{path}': no object has the field '{path_field}' (fields: {', '.join(first_fields)}); "
                f"set path_field.{did_you_mean(path_field, first_fields)}"
            )
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        if first_fields:
            check_fields(self._fields, first_fields, require_captions, self._file)
        entries.sort()
        self._keys = [key for key, _ in entries]
        self._positions = np.array([position for _, position in entries], np.int64)

    def _records(self) -> Iterator[Any]:
        """Yields the objects in file order, None for what does not parse."""
        raise NotImplementedError

    def _record(self, position: int) -> Any:
        raise NotImplementedError

    def _key_of(self, record: Any) -> str:
        if not isinstance(record, dict):
            raise Refused("bad_record", "not a JSON object")
        path = record.get(self._path_field)
        if not isinstance(path, str) or not path:
            raise Refused("bad_record", f"field '{self._path_field}' is {path!r}, must be a path")
        return _path_below(path, self._root)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def __getitem__(self, index: int) -> Example:
        key = self._keys[index]
        record = self._record(int(self._positions[index]))
        name = self._key_of(record)
        # Of equal keys the first in the file is taken: sorting put it first.
        if index % len(self._keys) > 0 and self._keys[index - 1] == key:
            raise Refused("duplicate_key", f"'{key}' is in the list more than once")
        captions = captions_of_record(record, self._fields)
        return Example(
            key,
            self._root / name,
            _required(captions, self._require, "no text in its caption fields"),
            label=_integer(record.get("label"), least=0),
            height=_integer(record.get("height"), least=1),
            width=_integer(record.get("width"), least=1),
        )


class JsonSource(_ListSource):
    """A JSON file with one list of objects, as the official data sets.

    An object: {"path": "a/b.jpg", "height": 480, "width": 640, "ratio": 0.75, "prompt": "...",
    "sharegpt4v": "..."}, of which only the path and a caption are needed. Several captions with weights:
    {"path": ..., "captions": [{"text": "...", "weight": 0.5, "name": "llava"}, ...]}; where an object has
    this field, it is used alone. An integer "label" is a class. `ratio` is not read: it follows from the
    image. The list is held in memory; for millions of images use JSON lines.

    Args:
      path: the file.
      image_root: folder the paths are relative to; default the file's own. A path that leaves it is refused.
      path_field: name of the path.
      caption_fields: names of captions, or name to weight; default "captions", or else "prompt" and
        "sharegpt4v", or else "caption" or "text".
      require_captions: refuse objects without a caption.
    """

    kind = "json"

    def _records(self) -> Iterator[Any]:
        try:
            self._list = json.loads(self._file.read_text("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"'{self._file}': no JSON ({error}); for one object a line use jsonl") from None
        if not isinstance(self._list, list):
            kind = type(self._list).__name__
            raise UserError(f"'{self._file}': holds a {kind}; it must hold one list of objects")
        return iter(self._list)

    def _record(self, position: int) -> Any:
        return self._list[position]


class JsonlSource(_ListSource):
    """JSON lines: one object a line, with the fields and options of `JsonSource`.

    Only keys and line offsets are held in memory; a line is read when its sample is. Empty lines are skipped,
    a line that does not parse (a torn last one, say) is refused.
    """

    kind = "jsonl"

    def _records(self) -> Iterator[Any]:
        places = []
        for place, record in _json_lines(self._file):
            places.append(place)
            yield record
        self._places = np.array(places, np.int64).reshape(-1, 2)

    def _record(self, position: int) -> Any:
        return _parse_line(FileSlice(self._file, *map(int, self._places[position])).read())


class ParquetSource(Source):
    """Parquet files with an image column (bytes, or Hugging Face's {bytes, path}, or paths) and captions.

    Args:
      path: a file, or a folder whose .parquet files are taken, recursively.
      image_field: the image column.
      caption_fields: caption columns, or column to weight; default as for `JsonSource`. A column may hold
        lists of captions.
      key_field: column of unique keys; default the path where the image column holds paths, else file/row.
      label_field: integer column of class labels.
      image_root: folder that image paths are relative to; default that of the files.
      require_captions: refuse rows without a caption.
    """

    kind = "parquet"
    _GROUPS_HELD = 2  # decoded row groups kept for the neighbours of a row

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_field: str = "image",
        caption_fields: CaptionFields = None,
        key_field: str | None = None,
        label_field: str | None = None,
        image_root: str | os.PathLike | None = None,
        require_captions: bool = True,
    ):
        arrow, pq = _import("pyarrow"), _import("pyarrow.parquet")
        base, self._files = _files_of(path, "parquet")
        self._root = Path(os.path.abspath(image_root if image_root is not None else base))
        self._names = [file.relative_to(base).as_posix() for file in self._files]
        self._require, self._image_field, self._label_field = require_captions, image_field, label_field
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        self._columns: list[str] = []
        self._groups: list[tuple[int, int, int]] = []  # (file, row group in it, row in it where it begins)
        starts = [0]  # row of the source at which each group begins
        for number, file in enumerate(self._files):
            try:
                with pq.ParquetFile(file) as opened:
                    metadata, schema = opened.metadata, opened.schema_arrow
            except (arrow.ArrowInvalid, OSError) as error:
                raise UserError(f"'{file}': no readable Parquet ({error}); restore or remove it") from None
            if number == 0:
                for option, name in (("image", image_field), ("key", key_field), ("label", label_field)):
                    if name is not None:
                        _check_field(f"{option}_field", name, schema.names, file)
                check_fields(self._fields, schema.names, require_captions, file)
                read = ["captions", *default_fields(schema.names)] if self._fields is None else self._fields
                read = {image_field, key_field, label_field, "height", "width", *read}
                self._columns = [name for name in schema.names if name in read]
            absent = [name for name in self._columns if name not in schema.names]
            if absent:
                raise UserError(
                    f"'{file}': has no column '{absent[0]}', which '{self._names[0]}' has; add it"
                )
            first = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group, first))
                first += metadata.row_group(group).num_rows
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        self._starts = np.array(starts, np.int64)
        if not len(self):
            raise UserError(f"'{path}': holds no rows; it needs at least one")
        self._keys = self._read_keys(pq, key_field)
        self._duplicates = _later_duplicates(self._keys)
        self._held: dict[int, Any] = {}
        self._lock = threading.Lock()

    def _read_keys(self, pq: Any, key_field: str | None) -> list[str] | None:
        """Returns the keys that a column gives, or None where they follow from file and row."""
        image_type = pq.read_schema(self._files[0]).field(self._image_field).type
        types = _import("pyarrow.types")
        if key_field is None and not (types.is_string(image_type) or types.is_large_string(image_type)):
            return None
        keys = []
        for number, file in enumerate(self._files):
            column = pq.read_table(file, columns=[key_field or self._image_field]).column(0).to_pylist()
            for row, value in enumerate(column):
                key = "" if value is None else str(value)
                if key and key_field is None:
                    try:
                        key = _path_below(key, self._root)
                    except Refused:  # again, and then reported, by __getitem__
                        key = ""
                keys.append(_printable(key) or self._row_key(number, row))
        return keys

    def _row_key(self, file: int, row: int) -> str:
        return f"{self._names[file]}/{row:08d}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the row group of a row and the row's place in it."""
        index = range(len(self))[index]
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, index - int(self._starts[group])

    def key(self, index: int) -> str:
        index = range(len(self))[index]
        if self._keys is not None:
            return self._keys[index]
        group, row = self._locate(index)
        file, _, first = self._groups[group]
        return self._row_key(file, first + row)

    def _group(self, group: int) -> Any:
        with self._lock:
            if group not in self._held:
                file, number, _ = self._groups[group]
                arrow, pq = _import("pyarrow"), _import("pyarrow.parquet")
                try:
                    with pq.ParquetFile(self._files[file]) as opened:
                        table = opened.read_row_group(number, columns=self._columns)
                except (arrow.ArrowInvalid, OSError) as error:
                    text = f"'{self._files[file]}', row group {number}: {error}"
                    raise Refused("unreadable", text) from None
                if len(self._held) >= self._GROUPS_HELD:
                    del self._held[next(iter(self._held))]
                self._held[group] = table
            return self._held[group]

    def __getitem__(self, index: int) -> Example:
        key = self.key(index)
        if range(len(self))[index] in self._duplicates:
            raise Refused("duplicate_key", f"'{key}' is in the table more than once")
        group, row = self._locate(index)
        record = self._group(group).slice(row, 1).to_pylist()[0]
        captions = captions_of_record(record, self._fields)
        return Example(
            key,
            self._image(record[self._image_field]),
            _required(captions, self._require, "no text in its caption columns"),
            label=_integer(record.get(self._label_field), least=0) if self._label_field else None,
            height=_integer(record.get("height"), least=1),
            width=_integer(record.get("width"), least=1),
        )

    def _image(self, value: Any) -> bytes | Path:
        if isinstance(value, dict):  # the image feature of Hugging Face datasets
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str) and value:
            return self._root / _path_below(value, self._root)
        raise Refused("missing_image", f"column '{self._image_field}' holds neither bytes nor a path")


# --------------------------------------------------------------------------------------------------
# Archives and data sets


class WebDatasetSource(Source):
    """WebDataset shards: tar files in which the members of one sample share their name up to the first dot.

    The image is the member with an image suffix. Captions are the member "txt", else the fields of the
    member "json" as in `JsonSource`; the label is the member "cls" or the json field "label". The headers of
    each tar are read once, when the source is opened; samples are then read by offset, in any order. Of two
    members of one name the later counts, as for tar.

    Args:
      path: a .tar file, a folder of them (recursive), or a pattern: "shards/{000..099}.tar", "shards/*.tar".
      image_field: suffix of the image member, for samples with several; default the first of the known ones.
      caption_fields: suffixes of text members, or fields of the json member, or either to weight.
      require_captions: refuse samples without a caption.
    """

    kind = "webdataset"

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_field: str | None = None,
        caption_fields: CaptionFields = None,
        require_captions: bool = True,
    ):
        base, self._files = _files_of(path, "tar")
        self._names = [file.relative_to(base).as_posix() for file in self._files]
        self._require = require_captions
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        self._members = tuple(dict.fromkeys([*(self._fields or {"txt": 1.0}), "json", "cls"]))
        image_fields = [image_field] if image_field else [suffix[1:] for suffix in images.SUFFIXES]
        tars, keys, places = [], [], []
        for number, file in enumerate(self._files):
            for sample, members in _tar_samples(file).items():
                image = next((name for name in image_fields if name in members), None)
                # Without an image the sample is kept, to be refused and reported.
                tars.append(number)
                keys.append(f"{self._names[number]}/{sample}" + (f".{image}" if image else ""))
                places.append([members.get(name, (-1, 0)) for name in (image, *self._members)])
        if not keys:
            raise UserError(f"'{path}': the tar files hold no samples")
        self._keys = keys
        self._tars = np.array(tars, np.int32)
        self._places = np.array(places, np.int64)  # [samples, image and self._members, (offset, size)]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return _printable(self._keys[index])

    def __getitem__(self, index: int) -> Example:
        file = self._files[self._tars[index]]
        image, *members = (
            FileSlice(file, int(offset), int(size)) if offset >= 0 else None
            for offset, size in self._places[index]
        )
        if image is None:
            raise Refused("missing_image", "the sample has no member with an image suffix")
        found = {n: member.read() for n, member in zip(self._members, members, strict=True) if member}
        record = _parse_line(found["json"]) if "json" in found else {}
        if not isinstance(record, dict):
            raise Refused("bad_record", "the json member holds no object")
        captions: tuple[Caption, ...] = ()
        for name, weight in (self._fields or {"txt": 1.0}).items():
            if name in found:
                captions += captions_of(found[name], weight, name)
            elif self._fields is not None:
                captions += captions_of_record(record, {name: weight})
        if self._fields is None and not captions:
            captions = captions_of_record(record, None)
        return Example(
            self.key(index),
            image,
            _required(captions, self._require, "neither a text member nor a json caption"),
            label=_integer(found.get("cls", record.get("label")), least=0),
            height=_integer(record.get("height"), least=1),
            width=_integer(record.get("width"), least=1),
        )


class TfdsSource(Source):
    """A dataset of TensorFlow Datasets, prepared in ArrayRecord format, read without TensorFlow.

    Args:
      path: its name, with or without config and version ("coco_captions", "imagenet2012:5.1.0"), or the
        folder of a prepared version (the one with dataset_info.json).
      split: split or slice, such as "train" or "train[:90%]".
      data_dir: where prepared datasets lie; default that of TFDS.
      image_field: the image feature; a nested one is written "a/b".
      caption_fields: text features, or feature to weight; one may hold a sequence ("captions/text"). Default
        "prompt" and "sharegpt4v", or else "caption" or "text", or else "captions/text".
      label_field: the integer feature of labels; `classes` then lists its names.
      key_field: a feature whose values are unique (not checked); default name/version/split/row.
      require_captions: refuse samples without a caption.
    """

    kind = "tfds"

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str = "train",
        data_dir: str | os.PathLike | None = None,
        image_field: str = "image",
        caption_fields: CaptionFields = None,
        label_field: str | None = None,
        key_field: str | None = None,
        require_captions: bool = True,
    ):
        tfds = _import("tensorflow_datasets")
        prepared = (Path(path) / "dataset_info.json").is_file()
        fields = None if caption_fields is None else field_weights(caption_fields)
        try:
            if prepared:
                builder = tfds.builder_from_directory(os.fspath(path))
            else:
                builder = tfds.builder(os.fspath(path), data_dir=data_dir, file_format="array_record")
            features = builder.info.features
            known = _feature_names(features)
            for option, name in (("image", image_field), ("label", label_field), ("key", key_field)):
                if name is not None:
                    _check_field(f"{option}_field", name, known, path)
            if fields is None and "captions/text" in known and not default_fields(known):
                fields = {"captions/text": 1.0}
            check_fields(fields, known, require_captions, path)
            decoders: Any = tfds.decode.SkipDecoding()  # the project decodes every image itself, and alike
            for part in reversed(image_field.split("/")):
                decoders = {part: decoders}
            self._data = builder.as_data_source(split=split, decoders=decoders)
        except UserError:
            raise
        # TFDS raises many types here, most of them with the remedy in a text of several lines.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            builders = () if prepared else tfds.list_builders(with_community_datasets=False)
            raise UserError(
                f"tfds '{path}', split '{split}': {reason} It must be there in random access format "
                f"(tfds build --file_format=array_record).{did_you_mean(os.fspath(path), builders)}"
            ) from None
        if not len(self._data):
            raise UserError(f"tfds '{path}', split '{split}': holds no samples; name another split")
        self._fields = default_fields(known) if fields is None else fields
        self._name = f"{builder.info.full_name}/{split}"
        self._image_field, self._label_field, self._key_field = image_field, label_field, key_field
        self._require = require_captions
        if label_field is not None:
            self.classes = list(getattr(_feature(features, label_field), "names", None) or []) or None

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        index = range(len(self))[index]
        return self._key(index, {} if self._key_field is None else self._data[index])

    def _key(self, index: int, record: Mapping[str, Any]) -> str:
        if self._key_field is None:
            return f"{self._name}/{index:010d}"
        value = _feature(record, self._key_field)
        return _printable(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        record = self._data[index]
        image = _feature(record, self._image_field)
        if not isinstance(image, bytes) or not image:
            raise Refused("missing_image", f"feature '{self._image_field}' holds no encoded image")
        captions: tuple[Caption, ...] = ()
        for name, weight in self._fields.items():
            captions += captions_of(_feature(record, name), weight, name)
        label = None if self._label_field is None else _feature(record, self._label_field)
        return Example(
            self._key(index, record),
            image,
            _required(captions, self._require, "no text in its caption features"),
            label=_integer(label, least=0),  # TFDS writes -1 where a split has no labels
        )


class RecaptionedSource(Source):
    """A source whose captions come from a JSON-lines file of the caption command, by key.

    For archives, whose samples a list of paths cannot name. A line: {"path": KEY, "captions": [...]}.

    Args:
      source: the images. Its own captions are not read.
      captions: the file.
      caption_fields: as for `JsonSource`.
      require_captions: refuse samples that the file does not have.
    """

    def __init__(
        self,
        source: Source,
        captions: str | os.PathLike,
        *,
        caption_fields: CaptionFields = None,
        require_captions: bool = True,
    ):
        self.kind, self.classes = source.kind, source.classes
        self._source, self._require = source, require_captions
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        self._file = _existing_file(captions)
        self._lines: dict[str, tuple[int, int]] = {}
        for place, record in _json_lines(self._file):
            if isinstance(record, dict) and isinstance(record.get("path"), str):
                self._lines.setdefault(record["path"], place)

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        captions: tuple[Caption, ...] = ()
        if example.key in self._lines:
            line = FileSlice(self._file, *self._lines[example.key]).read()
            captions = captions_of_record(_parse_line(line), self._fields)
        captions = _required(captions, self._require, f"'{self._file}' has none for this key")
        return dataclasses.replace(example, captions=captions)


# --------------------------------------------------------------------------------------------------
# Opening


SOURCES: dict[str, type[Source]] = {
    source.kind: source
    for source in (
        FolderSource, JsonSource, JsonlSource, ParquetSource, WebDatasetSource, TfdsSource, ClassFolderSource,
    )
}  # fmt: skip
KINDS = tuple(SOURCES)


def open_source(
    kind: str, path: str | os.PathLike, *, captions: str | os.PathLike | None = None, **options: Any
) -> Source:
    """Opens a source.

    Args:
      kind: one of `KINDS`, or "auto" to tell by the suffix or the content of the folder.
      path: file, folder, pattern (webdataset) or name (tfds).
      captions: a file of the caption command, whose captions are taken instead of the source's own.
      **options: those of the class of that kind, by name.

    Raises:
      UserError: unknown kind or option, nothing there, or a kind that cannot be told.
    """
    if captions is not None:
        names = ("caption_fields", "require_captions")
        own = {name: options.pop(name) for name in names if name in options}
        return RecaptionedSource(open_source(kind, path, **options, require_captions=False), captions, **own)
    if kind == "auto":
        kind = detect_kind(path, options.get("require_captions", True))
    if kind not in SOURCES:
        close = did_you_mean(kind, KINDS)
        raise UserError(f"source '{kind}': must be auto or one of {', '.join(KINDS)}.{close}")
    known = [name for name in inspect.signature(SOURCES[kind]).parameters if name != "path"]
    for name in options:
        if name not in known:
            raise UserError(
                f"option '{name}' of source '{kind}': must be one of {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
    return SOURCES[kind](path, **options)


def detect_kind(path: str | os.PathLike, require_captions: bool = True) -> str:
    """Tells the kind of a source by its suffix, or for a folder by what lies in it.

    A folder with tar or Parquet files is of that kind; one of images is "classes" where all lie in subfolders
    and no .txt file lies beside any (and captions are required), else "folder". This looks through the whole
    folder: with millions of files, name the kind.

    Raises:
      UserError: nothing there, or the content speaks for more than one kind.
    """
    path = Path(path)
    by_suffix = {".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".tar": "webdataset"}
    if not path.is_dir() and path.suffix in by_suffix:
        return by_suffix[path.suffix]
    if not path.exists():
        raise UserError(f"'{path}': no such file or folder; for a dataset of TFDS say source=tfds")
    if path.is_file():
        raise UserError(f"'{path}': its suffix tells no kind of source; say source={'|'.join(KINDS)}")
    if (path / "dataset_info.json").is_file() and (path / "features.json").is_file():
        return "tfds"
    found = set()
    deep = shallow = texts = False
    for folder, name in _walk(path):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in (".tar", ".parquet"):
            found.add(by_suffix[suffix])
        elif suffix in images.SUFFIXES:
            found.add("folder")
            deep, shallow = deep or bool(folder), shallow or not folder
        texts = texts or suffix == ".txt"
    if len(found) > 1:
        kinds = " and ".join(sorted(found))
        raise UserError(f"folder '{path}': holds what fits {kinds}; say which with source=")
    if not found:
        raise UserError(f"folder '{path}': holds no images, tar or Parquet files; images are {_suffixes()}")
    if found == {"folder"} and deep and not shallow and not texts and require_captions:
        return "classes"
    return found.pop()


# --------------------------------------------------------------------------------------------------
# Fields of a record


def _required(captions: tuple[Caption, ...], require: bool, where: str) -> tuple[Caption, ...]:
    if require and not captions:
        raise Refused("missing_caption", where)
    return captions


def _check_field(option: str, name: str, known: Iterable[str], where: str | os.PathLike) -> None:
    known = list(known)
    if name not in known:
        close = did_you_mean(name, known)
        raise UserError(f"{option} '{name}': '{where}' has only {', '.join(known)}; set {option}.{close}")


def _integer(value: Any, least: int) -> int | None:
    """Returns an integer from `least` up, or None for anything else."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number >= least and not isinstance(value, bool) else None


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None


def _json_lines(file: Path) -> Iterator[tuple[tuple[int, int], Any]]:
    """Yields ((offset, size), object) of the lines of a file, None for one that does not parse."""
    offset = 0
    with open(file, "rb") as lines:
        for line in lines:
            if line.strip():
                yield (offset, len(line)), _parse_line(line)
            offset += len(line)


def _feature_names(features: Any, prefix: str = "") -> list[str]:
    """Lists the features of a TFDS dataset, nested ones as "a/b"."""
    names = []
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # what a Sequence holds
        if hasattr(inner, "items"):
            names += _feature_names(inner, f"{prefix}{name}/")
        else:
            names.append(prefix + name)
    return names


def _feature(record: Any, name: str) -> Any:
    for part in name.split("/"):
        record = [entry[part] for entry in record] if isinstance(record, list) else record[part]
    return record


# --------------------------------------------------------------------------------------------------
# Paths and archives


def _walk(root: Path) -> Iterator[tuple[str, str]]:
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


def _image_names(root: Path) -> Iterator[str]:
    for folder, name in _walk(root):
        if os.path.splitext(name)[1].lower() in images.SUFFIXES:
            yield f"{folder}/{name}" if folder else name


def _printable(name: str) -> str:
    """Makes a file name that is not UTF-8 fit for JSON and for the record's key."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _path_below(path: str, root: Path) -> str:
    """Returns a path relative to the root, with "/", "." and ".." resolved.

    Raises:
      Refused: "outside_root". Judged by the names alone: links inside the root are the user's own.
    """
    relative = os.path.normpath(path)
    if os.path.isabs(path):
        relative = os.path.relpath(relative, root)
    if relative == ".." or relative.startswith(f"..{os.sep}") or os.path.isabs(relative) or "\0" in path:
        raise Refused("outside_root", f"'{path}' is not below '{root}'")
    return _printable(relative.replace(os.sep, "/"))


def _existing_folder(path: str | os.PathLike) -> Path:
    if not os.path.isdir(path):
        raise UserError(
            f"folder '{path}': does not exist or is no folder; give the one that holds the images"
        )
    return Path(path)


def _existing_file(path: str | os.PathLike) -> Path:
    if not os.path.isfile(path):
        raise UserError(f"file '{path}': does not exist or is no file; give the list of images")
    return Path(path)


def _files_of(path: str | os.PathLike, suffix: str) -> tuple[Path, list[Path]]:
    """Returns the files of a file name, folder or pattern, by name, and the folder they are relative to."""
    text = os.fspath(path)
    if os.path.isdir(text):
        names = [f"{folder}/{name}" if folder else name for folder, name in _walk(Path(text))]
        base, files = Path(text), [Path(text, name) for name in sorted(names) if name.endswith(f".{suffix}")]
    else:
        expanded = _expand_braces(text)
        files = [Path(name) for pattern in expanded for name in sorted(glob.glob(pattern, recursive=True))]
        if len(expanded) > 1:
            absent = [name for name in expanded if not glob.has_magic(name) and not os.path.isfile(name)]
            if absent:
                raise UserError(f"'{path}': file '{absent[0]}' is missing; restore it or narrow the braces")
        base = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    if not files:
        raise UserError(f"'{path}': no .{suffix} file there; give a file, a folder of them or a pattern")
    return base, files


def _expand_braces(pattern: str) -> list[str]:
    """Expands one or more {000..123} of a pattern, keeping leading zeros, as WebDataset does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    return list(
        itertools.chain.from_iterable(
            _expand_braces(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")
            for number in range(int(first), int(last) + 1)
        )
    )


def _tar_samples(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Reads the headers of a tar: sample name to member suffix to (offset, size)."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                # `tarfile` keeps every header it read, which for large shards is more than the index itself.
                archive.members = []
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                name, dot, suffix = base.partition(".")
                if member.isfile() and name and dot:
                    sample = samples.setdefault(f"{folder}/{name}" if folder else name, {})
                    sample[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"'{file}': no readable uncompressed tar ({error}); unpack a compressed one with gunzip, restore "
            "or remove a damaged one"
        ) from None
    return samples


def _later_duplicates(keys: list[str] | None) -> frozenset[int]:
    """Returns the positions of keys that occur earlier in the list."""
    if keys is None or len(set(keys)) == len(keys):
        return frozenset()
    seen: set[str] = set()
    return frozenset(i for i, key in enumerate(keys) if key in seen or seen.add(key))


def _suffixes() -> str:
    return " ".join(sorted(images.SUFFIXES))


def _import(name: str) -> Any:
    """Imports an optional package of a source kind when it is first needed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = (error.name or name).split(".")[0]
        raise UserError(
            f"this source needs the package '{package}', which is not installed; pip install {package}"
        ) from None
