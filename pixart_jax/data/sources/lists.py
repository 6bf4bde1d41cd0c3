"""Lists of images in JSON, JSON lines or CSV, and captions that the caption command has written."""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.captions import Caption, captions_of_record, check_fields, field_weights
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import (
    CaptionFields,
    Example,
    FileSlice,
    Source,
    WrappedSource,
    check_image_index,
    class_label,
    decode_base64,
    integer,
    one_image,
    required,
)
from pixart_jax.data.sources.parquet import ParquetSource
from pixart_jax.data.sources.paths import (
    choose_split,
    existing_file,
    existing_folder,
    folders_of_splits,
    image_names,
    path_below,
    printable,
    walk,
)
from pixart_jax.errors import UserError, did_you_mean, listing, short
from pixart_jax.readers import parse_json, read_table

# Default names of the field with the path of the image: the first one that an object has.
PATH_FIELDS = ("path", "file_name", "image", "image_path", "filename")


class _ListSource(Source):
    """Base class of json, jsonl and csv: objects with a path, captions, and optionally a size and a label."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_root: str | os.PathLike | None = None,
        path_field: str | None = None,
        image_index: int | str | None = None,
        caption_fields: CaptionFields = None,
        require_captions: bool = True,
    ):
        self._file = existing_file(path)
        self._root = Path(os.path.abspath(image_root if image_root is not None else self._file.parent))
        if not self._root.is_dir():
            raise UserError(
                f"image root '{self._root}': is not a folder; set image_root to the folder of the paths"
            )
        self._path_fields = PATH_FIELDS if path_field is None else (path_field,)
        self._image_index = check_image_index(image_index)
        self._require = require_captions
        first_fields: dict[str, None] = {}
        entries = []
        for position, (line, record) in enumerate(self._records()):
            if position < 100 and isinstance(record, dict):
                first_fields.update(dict.fromkeys(filter(None, record)))
            try:
                image = self._image_of(record)
            except Refused:
                image = None  # reported when `__getitem__` raises it again
            key = image if isinstance(image, str) else printable(f"{self._file.name}:{line}")
            entries.append((key, position))
        if not entries:
            raise UserError(f"'{path}': the list is empty; it needs at least one object")
        if first_fields and not first_fields.keys() & set(self._path_fields):
            name = self._path_fields[0]
            raise UserError(
                f"'{path}': no object has the field '{name}' (fields: {listing(first_fields)}); "
                f"set path_field.{did_you_mean(name, first_fields)}"
            )
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        if first_fields:
            check_fields(self._fields, first_fields, require_captions, self._file)
        entries.sort()
        self._keys = [key for key, _ in entries]
        self._positions = np.array([position for _, position in entries], np.int64)

    def _records(self) -> Iterator[tuple[int, Any]]:
        """Yields (line or position, counted from 1; object) in the order of the file.

        The object is None if it cannot be parsed.
        """
        raise NotImplementedError

    def _record(self, position: int) -> Any:
        raise NotImplementedError

    def _image_of(self, record: Any) -> str | bytes:
        """Returns the path of the image of an object, relative to the image root, or its encoded image."""
        if not isinstance(record, dict):
            raise Refused("bad_record", "not a JSON object")
        name = next((name for name in self._path_fields if name in record), self._path_fields[0])
        value = one_image(record.get(name), self._image_index, f"field '{name}'")
        if not isinstance(value, str) or not value:
            raise Refused("bad_record", f"field '{name}' is '{short(value)}', must be a path")
        return decode_base64(value) or path_below(value, self._root)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def __getitem__(self, index: int) -> Example:
        key = self._keys[index]
        record = self._record(int(self._positions[index]))
        image = self._image_of(record)
        # If several objects have the same key, the first one in the file is used; sorting has put it first.
        if index % len(self._keys) > 0 and self._keys[index - 1] == key:
            raise Refused("duplicate_key", f"'{key}' is in the list more than once")
        captions = captions_of_record(record, self._fields)
        return Example(
            key,
            self._root / image if isinstance(image, str) else image,
            required(captions, self._require, "no text in its caption fields"),
            label=class_label(record.get("label")),
            height=integer(record.get("height"), least=1),
            width=integer(record.get("width"), least=1),
        )


class JsonSource(_ListSource):
    """A JSON file with one list of objects, the format of the official data sets.

    An object looks like {"path": "a/b.jpg", "height": 480, "width": 640, "ratio": 0.75, "prompt": "...",
    "sharegpt4v": "..."}; only the path and a caption are required. Several captions with weights are written
    as {"path": ..., "captions": [{"text": "...", "weight": 0.5, "name": "llava"}, ...]}; other captions of
    such an object are ignored by default. An integer "label" is a class. "ratio" is ignored, because it
    follows from the image. The list is kept in memory; use JSON lines for millions of images.

    Two other layouts are read as well: the captions of COCO, {"images": [{"id", "file_name"}], "annotations":
    [{"image_id", "caption"}]}, and an object whose names are the paths, {"a/b.jpg": "a caption"} or
    {"a/b.jpg": {"caption": "..."}}, as kohya's scripts write it.

    Args:
      path: the file.
      image_root: folder that the paths are relative to; default: the folder of the file. Samples whose path
        is outside are skipped.
      path_field: name of the field with the path, or with the image in base64; default: the first of
        `PATH_FIELDS` that an object has.
      image_index: which image to use if the field has a list of several, counted from 0.
      caption_fields: names of caption fields, or weights by name; default: "captions", or else "prompt" and
        "sharegpt4v", or else "caption" or "text".
      require_captions: whether to skip objects without a caption.
    """

    kind = "json"

    def _records(self) -> Iterator[tuple[int, Any]]:
        try:
            # Lenient, because one bad sample is skipped and does not end the run.
            self._list = parse_json(self._file.read_text("utf-8-sig"), lenient=True)
        except ValueError as error:
            raise UserError(
                f"'{self._file}': not JSON ({error}); for one object per line use jsonl"
            ) from None
        if isinstance(self._list, dict):
            self._list = self._list_of_object(self._list)
        if not isinstance(self._list, list):
            kind = type(self._list).__name__
            raise UserError(f"'{self._file}': contains a {kind}; it must contain one list of objects")
        return enumerate(self._list, 1)

    def _list_of_object(self, value: dict[str, Any]) -> Any:
        """Returns the list in an object with one of the layouts in the class docstring, or the object."""
        if {"images", "annotations"} <= value.keys():
            return self._coco(value["images"], value["annotations"])
        is_path = (os.path.splitext(name)[1].lower() in images.SUFFIXES for name in value)
        if value and all(is_path) and all(isinstance(entry, (str, dict)) for entry in value.values()):
            return [
                {**(entry if isinstance(entry, dict) else {"caption": entry}), "path": name}
                for name, entry in value.items()
            ]
        return value

    def _coco(self, pictures: Any, annotations: Any) -> list[Any]:
        """Joins the images and the captions of COCO. An image that is not an object becomes None."""
        for name, entries, field in (
            ("images", pictures, "file_name"),
            ("annotations", annotations, "caption"),
        ):
            if not isinstance(entries, list) or not any(isinstance(e, dict) and field in e for e in entries):
                raise UserError(
                    f"'{self._file}': has images and annotations as in COCO, but no field '{field}' in its "
                    f"{name}; give the file with the captions, such as captions_train2017.json"
                )
        captions: dict[Any, list[Any]] = {}
        for annotation in annotations:
            known = isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str))
            if known and "caption" in annotation:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        found, used = [], set()
        for picture in pictures:
            record = None
            if isinstance(picture, dict):
                own = picture.get("id") if isinstance(picture.get("id"), (int, str)) else None
                used.add(own)
                record = {**picture, "path": picture.get("file_name"), "captions": captions.get(own, [])}
            found.append(record)
        left = [str(identity) for identity in captions if identity not in used]
        unread = len(annotations) - sum(len(own) for identity, own in captions.items() if identity in used)
        if unread:
            example = f", for example image_id '{left[0]}'" if left else ""
            self.notes = (f"'{self._file}': {unread:,} captions have no image and are not read{example}",)
        return found

    def _record(self, position: int) -> Any:
        return self._list[position]


class JsonlSource(_ListSource):
    """JSON lines: one object per line, with the fields and options of `JsonSource`.

    Only the keys and the offsets of the lines are kept in memory; a line is read again with its sample. Empty
    lines are ignored. A line that cannot be parsed, such as a truncated last one, is reported as skipped,
    with its number in the file.
    """

    kind = "jsonl"

    def _records(self) -> Iterator[tuple[int, Any]]:
        places = []
        for line, place, record in json_lines(self._file):
            places.append(place)
            yield line, record
        self._places = np.array(places, np.int64).reshape(-1, 2)

    def _record(self, position: int) -> Any:
        return parse_line(FileSlice(self._file, *map(int, self._places[position])).read())


class CsvSource(_ListSource):
    """A table in CSV, or with tabs in a .tsv file, whose first line names the columns.

    The columns are the fields, and the options those, of `JsonSource`. The table is kept in memory.
    """

    kind = "csv"

    def _records(self) -> Iterator[tuple[int, Any]]:
        _, rows = read_table(self._file)
        self._list = [row for _, row in rows]
        return iter(rows)

    def _record(self, position: int) -> Any:
        return self._list[position]

    def _image_of(self, record: Any) -> str | bytes:
        if None in record:  # where `csv` puts cells that have no column
            raise Refused("bad_record", "more cells than the first line; put text that has commas in quotes")
        return super()._image_of(record)


class ImageFolderSource(Source):
    """A folder of images with one of the files in `METADATA`, the layout "imagefolder" of Hugging Face.

    The folder may have one such file, or one in each subfolder. Paths in it are relative to it. Fields and
    options are those of `JsonSource`: usually "file_name" and "text".

    Args:
      path: the folder.
      split: which of the splits to read, if there are several, such as train/ and test/; "all" for all of
        them. Default: train.
    """

    kind = "imagefolder"

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str | None = None,
        path_field: str | None = None,
        image_index: int | str | None = None,
        caption_fields: CaptionFields = None,
        require_captions: bool = True,
    ):
        root = existing_folder(path)
        every = metadata_files(root)
        if not every:
            raise UserError(f"folder '{path}': has no {' or '.join(METADATA)}; add it, or set another source")
        names, notes = choose_split(every, split, path)
        options = dict(
            path_field=path_field,
            image_index=image_index,
            caption_fields=caption_fields,
            require_captions=require_captions,
        )
        entries = []
        self._lists: list[Source] = []
        for number, name in enumerate(names):
            folder, _, base = name.rpartition("/")
            reader = METADATA[base](root / name, **options)
            self._lists.append(reader)
            prefix = printable(f"{folder}/") if folder else ""
            entries += [(prefix + reader.key(i), number, i) for i in range(len(reader))]
        entries.sort()
        self._entries = entries
        other = tuple(os.path.dirname(name) + "/" for name in every if name not in names)
        unlisted = [name for name in image_names(root) if not (name.startswith(other) or self._has(name))]
        splits = folders_of_splits(key for key, *_ in entries)
        if splits and split is None:
            notes += (
                f"'{path}': the images of {' and '.join(splits)} are all read; to keep one of these folders "
                "for validation, move its entries to a list in that folder",
            )
        if unlisted:
            notes += (
                f"'{path}': {len(unlisted):,} images are in no {' or '.join(METADATA)} and are not read, for "
                f"example '{unlisted[0]}'",
            )
        self.notes = notes

    def _has(self, key: str) -> bool:
        at = bisect.bisect_left(self._entries, (key,))
        return at < len(self._entries) and self._entries[at][0] == key

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, index: int) -> str:
        return self._entries[index][0]

    def __getitem__(self, index: int) -> Example:
        key, number, position = self._entries[index]
        if index % len(self) > 0 and self._entries[index - 1][0] == key:
            raise Refused("duplicate_key", f"'{key}' is in the lists more than once")
        return dataclasses.replace(self._lists[number][position], key=key)


def _parquet_list(path: Path, *, path_field: str | None, **options: Any) -> Source:
    return ParquetSource(path, image_field=path_field, **options)


# Names of the files that describe the images of their folder, and how to open them.
METADATA: Mapping[str, Callable[..., Source]] = {
    "metadata.jsonl": JsonlSource,
    "metadata.csv": CsvSource,
    "metadata.parquet": _parquet_list,
}


def metadata_files(root: Path) -> list[str]:
    """Returns the paths of all files in `METADATA` below the root, relative to it, sorted."""
    return sorted(f"{folder}/{name}" if folder else name for folder, name in walk(root) if name in METADATA)


class RecaptionedSource(WrappedSource):
    """A source whose captions are in a JSON-lines file that the caption command has written.

    Needed for images in archives, because a list cannot refer to them by a path. A line of the file is
    {"path": KEY, "captions": [...]}, with the key of a sample.

    Args:
      source: the images. Its own captions are ignored.
      captions: the file.
      caption_fields: as for `JsonSource`.
      require_captions: whether to skip samples that have no caption in the file.
    """

    def __init__(
        self,
        source: Source,
        captions: str | os.PathLike,
        *,
        caption_fields: CaptionFields = None,
        require_captions: bool = True,
    ):
        super().__init__(source)
        self._require = require_captions
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        self._file = existing_file(captions)
        self._lines: dict[str, tuple[int, int]] = {}
        for _, place, record in json_lines(self._file):
            if isinstance(record, dict) and isinstance(record.get("path"), str):
                self._lines.setdefault(record["path"], place)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        captions: tuple[Caption, ...] = ()
        if example.key in self._lines:
            line = FileSlice(self._file, *self._lines[example.key]).read()
            captions = captions_of_record(parse_line(line), self._fields)
        captions = required(captions, self._require, f"'{self._file}' has no caption for this key")
        return dataclasses.replace(example, captions=captions)


def parse_line(line: bytes) -> Any:
    """Returns the JSON value of a line, or None if it cannot be parsed."""
    try:
        return parse_json(line.decode("utf-8-sig"), lenient=True)
    except ValueError:
        return None


def json_lines(file: Path) -> Iterator[tuple[int, tuple[int, int], Any]]:
    """Yields (number, (offset, size), object) for each line of a file that is not empty.

    The number counts all lines, from 1. The object is None if the line cannot be parsed.
    """
    offset = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, (offset, len(line)), parse_line(line)
            offset += len(line)
