"""Parquet files with captions, and with images or their paths."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.data.captions import captions_of_record, check_fields, default_fields, field_weights
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import (
    CaptionFields,
    Example,
    Source,
    check_field,
    check_image_index,
    class_label,
    decode_base64,
    import_package,
    integer,
    one_image,
    required,
)
from pixart_jax.data.sources.paths import choose_split, files_of, path_below, printable
from pixart_jax.errors import UserError

# Default names of the image column: the first one that exists.
IMAGE_FIELDS = ("image", "images", "img", "jpg", "png", "webp", "image_path", "file_name", "path")


class ParquetSource(Source):
    """Parquet files with captions and an image column.

    The image column has bytes, base64, paths, Hugging Face's {bytes, path}, or lists of these.

    Args:
      path: a file, a pattern, or a folder whose .parquet files are used, recursively.
      split: which of the splits to read, if the names of the files or their folders name several, such as
        train-00000-of-00002.parquet; "all" for all of them. Default: train, and files that name no split.
      image_field: name of the image column; default: the first of `IMAGE_FIELDS` that exists.
      image_index: which image to use if the column has a list of several, counted from 0.
      caption_fields: names of caption columns, or weights by name; default as for `JsonSource`. A value may
        be a list of captions.
      key_field: name of a column with unique keys; default: the path if the image column has paths, else
        file/row.
      label_field: name of an integer column with class labels.
      image_root: folder that image paths are relative to; default: the folder of the files.
      require_captions: whether to skip rows without a caption.
    """

    kind = "parquet"
    _GROUPS_HELD = 2  # number of decoded row groups in memory; rows are often read in order

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str | None = None,
        image_field: str | None = None,
        image_index: int | str | None = None,
        caption_fields: CaptionFields = None,
        key_field: str | None = None,
        label_field: str | None = None,
        image_root: str | os.PathLike | None = None,
        require_captions: bool = True,
    ):
        arrow, pq = import_package("pyarrow"), import_package("pyarrow.parquet")
        base, files = files_of(path, "parquet")
        self._root = Path(os.path.abspath(image_root if image_root is not None else base))
        names = [file.relative_to(base).as_posix() for file in files]
        self._names, self.notes = choose_split(names, split, path)
        self._files = [base / name for name in self._names]
        self._require, self._label_field = require_captions, label_field
        self._image_index = check_image_index(image_index)
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        self._columns: list[str] = []
        self._groups: list[
            tuple[int, int, int]
        ] = []  # (file, row group in the file, its first row in the file)
        starts = [0]  # first row of each group, counted over all files
        for number, file in enumerate(self._files):
            try:
                with pq.ParquetFile(file) as opened:
                    metadata, schema = opened.metadata, opened.schema_arrow
            except (arrow.ArrowException, OSError) as error:
                raise UserError(
                    f"'{file}': not a readable Parquet file ({error}); restore or remove it"
                ) from None
            if number == 0:
                if image_field is None:
                    image_field = next((name for name in IMAGE_FIELDS if name in schema.names), "image")
                self._image_field = image_field
                for option, name in (("image", image_field), ("key", key_field), ("label", label_field)):
                    if name is not None:
                        check_field(f"{option}_field", name, schema.names, file)
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
            raise UserError(f"'{path}': has no rows; it needs at least one")
        self._keys = self._read_keys(pq, key_field)
        self._duplicates = _later_duplicates(self._keys)
        self._held: dict[int, Any] = {}
        self._lock = threading.Lock()

    def _read_keys(self, pq: Any, key_field: str | None) -> list[str] | None:
        """Returns the keys in a column; None if the keys are made of file and row."""
        image_type = pq.read_schema(self._files[0]).field(self._image_field).type
        types = import_package("pyarrow.types")
        if key_field is None:
            if not (types.is_string(image_type) or types.is_large_string(image_type)):
                return None
            # Do not read a whole column of images in base64. The first value shows what the column has.
            with pq.ParquetFile(self._files[0]) as opened:
                batch = next(opened.iter_batches(100, columns=[self._image_field]), None)
            column = [] if batch is None else batch.column(0).cast("binary")
            if any(decode_base64(value.as_py()) for value in column if value.is_valid):
                return None
        keys = []
        for number, file in enumerate(self._files):
            column = pq.read_table(file, columns=[key_field or self._image_field]).column(0)
            for row, value in enumerate(column):
                try:
                    value = value.as_py()
                    key = "" if value is None else str(value)
                except Exception:  # as in `__getitem__`, which raises it again
                    key = ""
                if key and key_field is None:
                    try:
                        key = "" if decode_base64(key) else path_below(key, self._root)
                    except Refused:  # reported when `__getitem__` raises it again
                        key = ""
                keys.append(printable(key) or self._row_key(number, row))
        return keys

    def _row_key(self, file: int, row: int) -> str:
        return f"{printable(self._names[file])}/{row:08d}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the index of the row group that contains a row, and the position of the row in it."""
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
                arrow, pq = import_package("pyarrow"), import_package("pyarrow.parquet")
                try:
                    with pq.ParquetFile(self._files[file]) as opened:
                        table = opened.read_row_group(number, columns=self._columns)
                except (arrow.ArrowException, OSError) as error:
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
        table = self._group(group)
        try:
            record = table.slice(row, 1).to_pylist()[0]
        # For a value that Python cannot represent, Arrow raises many types of exception: UnicodeDecodeError,
        # OverflowError, ArrowInvalid and others.
        except Exception as error:
            raise Refused("bad_record", f"a column: {error or type(error).__name__}") from None
        captions = captions_of_record(record, self._fields)
        return Example(
            key,
            self._image(record[self._image_field]),
            required(captions, self._require, "no text in its caption columns"),
            label=class_label(record.get(self._label_field)) if self._label_field else None,
            height=integer(record.get("height"), least=1),
            width=integer(record.get("width"), least=1),
        )

    def _image(self, value: Any) -> bytes | Path:
        value = one_image(value, self._image_index, f"column '{self._image_field}'")
        if isinstance(value, dict):  # the image feature of Hugging Face datasets
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return decode_base64(value) or value
        if isinstance(value, str) and value:
            return decode_base64(value) or self._root / path_below(value, self._root)
        raise Refused("missing_image", f"column '{self._image_field}' has neither bytes nor a path")


def _later_duplicates(keys: list[str] | None) -> frozenset[int]:
    """Returns the positions of all keys that have occurred before in the list."""
    if keys is None or len(set(keys)) == len(keys):
        return frozenset()
    seen: set[str] = set()
    return frozenset(i for i, key in enumerate(keys) if key in seen or seen.add(key))
