"""Lists of images in JSON or JSON lines, and sources with captions that the caption command has written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.data.captions import Caption, captions_of_record, check_fields, field_weights
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import CaptionFields, Example, FileSlice, Source, integer, required
from pixart_jax.data.sources.paths import existing_file, path_below
from pixart_jax.errors import UserError, did_you_mean


class _ListSource(Source):
    """Base class of json and jsonl: objects with a path, captions, and optionally a size and a label."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_root: str | os.PathLike | None = None,
        path_field: str = "path",
        caption_fields: CaptionFields = None,
        require_captions: bool = True,
    ):
        self._file = existing_file(path)
        self._root = Path(os.path.abspath(image_root if image_root is not None else self._file.parent))
        if not self._root.is_dir():
            raise UserError(
                f"image root '{self._root}': is not a folder; set image_root to the folder of the paths"
            )
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
                key = f"{self._file.name}:{position + 1}"  # reported when `__getitem__` raises it again
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
        """Yields the objects in the order of the file; None for lines that cannot be parsed."""
        raise NotImplementedError

    def _record(self, position: int) -> Any:
        raise NotImplementedError

    def _key_of(self, record: Any) -> str:
        if not isinstance(record, dict):
            raise Refused("bad_record", "not a JSON object")
        path = record.get(self._path_field)
        if not isinstance(path, str) or not path:
            raise Refused("bad_record", f"field '{self._path_field}' is {path!r}, must be a path")
        return path_below(path, self._root)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def __getitem__(self, index: int) -> Example:
        key = self._keys[index]
        record = self._record(int(self._positions[index]))
        name = self._key_of(record)
        # If several objects have the same key, the first one in the file is used; sorting has put it first.
        if index % len(self._keys) > 0 and self._keys[index - 1] == key:
            raise Refused("duplicate_key", f"'{key}' is in the list more than once")
        captions = captions_of_record(record, self._fields)
        return Example(
            key,
            self._root / name,
            required(captions, self._require, "no text in its caption fields"),
            label=integer(record.get("label"), least=0),
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

    Args:
      path: the file.
      image_root: folder that the paths are relative to; default: the folder of the file. Samples whose path
        is outside are skipped.
      path_field: name of the field with the path.
      caption_fields: names of caption fields, or weights by name; default: "captions", or else "prompt" and
        "sharegpt4v", or else "caption" or "text".
      require_captions: whether to skip objects without a caption.
    """

    kind = "json"

    def _records(self) -> Iterator[Any]:
        try:
            self._list = json.loads(self._file.read_text("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"'{self._file}': not JSON ({error}); for one object per line use jsonl"
            ) from None
        if not isinstance(self._list, list):
            kind = type(self._list).__name__
            raise UserError(f"'{self._file}': contains a {kind}; it must contain one list of objects")
        return iter(self._list)

    def _record(self, position: int) -> Any:
        return self._list[position]


class JsonlSource(_ListSource):
    """JSON lines: one object per line, with the fields and options of `JsonSource`.

    Only the keys and the offsets of the lines are kept in memory; a line is read again with its sample. Empty
    lines are ignored. A line that cannot be parsed, such as a truncated last one, is reported as skipped.
    """

    kind = "jsonl"

    def _records(self) -> Iterator[Any]:
        places = []
        for place, record in json_lines(self._file):
            places.append(place)
            yield record
        self._places = np.array(places, np.int64).reshape(-1, 2)

    def _record(self, position: int) -> Any:
        return parse_line(FileSlice(self._file, *map(int, self._places[position])).read())


class RecaptionedSource(Source):
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
        self.kind, self.classes = source.kind, source.classes
        self._source, self._require = source, require_captions
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        self._file = existing_file(captions)
        self._lines: dict[str, tuple[int, int]] = {}
        for place, record in json_lines(self._file):
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
            captions = captions_of_record(parse_line(line), self._fields)
        captions = required(captions, self._require, f"'{self._file}' has no caption for this key")
        return dataclasses.replace(example, captions=captions)


def parse_line(line: bytes) -> Any:
    """Returns the JSON value of a line, or None if it cannot be parsed."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None


def json_lines(file: Path) -> Iterator[tuple[tuple[int, int], Any]]:
    """Yields ((offset, size), object) for each line of a file; the object is None if it cannot be parsed."""
    offset = 0
    with open(file, "rb") as lines:
        for line in lines:
            if line.strip():
                yield (offset, len(line)), parse_line(line)
            offset += len(line)
