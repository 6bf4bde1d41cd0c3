"""Datasets of TensorFlow Datasets (TFDS), read without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.data.captions import Caption, captions_of, check_fields, default_fields, field_weights
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import (
    CaptionFields,
    Example,
    Source,
    check_field,
    check_image_index,
    class_label,
    import_package,
    one_image,
    required,
)
from pixart_jax.data.sources.paths import printable
from pixart_jax.errors import UserError, did_you_mean


class TfdsSource(Source):
    """A dataset of TFDS that was prepared in ArrayRecord format.

    Args:
      path: name of the dataset, with or without config and version ("coco_captions", "imagenet2012:5.1.0"),
        or the folder of a prepared version, which contains dataset_info.json.
      split: a split or slice, such as "train" or "train[:90%]".
      data_dir: folder of the prepared datasets; default: that of TFDS.
      image_field: name of the image feature; a nested one is written as "a/b".
      image_index: which image to use if the feature is a sequence of several, counted from 0.
      caption_fields: names of text features, or weights by name; a feature may be a sequence
        ("captions/text"). Default: "prompt" and "sharegpt4v", or else "caption" or "text", or else
        "captions/text".
      label_field: name of the integer feature with the labels, whose names become `classes`.
      key_field: name of a feature with unique values (which is not checked); default:
        name/version/split/row.
      require_captions: whether to skip samples without a caption.
    """

    kind = "tfds"

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str = "train",
        data_dir: str | os.PathLike | None = None,
        image_field: str = "image",
        image_index: int | str | None = None,
        caption_fields: CaptionFields = None,
        label_field: str | None = None,
        key_field: str | None = None,
        require_captions: bool = True,
    ):
        tfds = import_package("tensorflow_datasets")
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
                    check_field(f"{option}_field", name, known, path)
            if fields is None and "captions/text" in known and not default_fields(known):
                fields = {"captions/text": 1.0}
            check_fields(fields, known, require_captions, path)
            decoders: Any = tfds.decode.SkipDecoding()  # `images.decode_image` decodes images of all sources
            for part in reversed(image_field.split("/")):
                decoders = {part: decoders}
            self._data = builder.as_data_source(split=split, decoders=decoders)
        except UserError:
            raise
        # TFDS raises many types of exception here, most of them with a message of several lines.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            builders = () if prepared else tfds.list_builders(with_community_datasets=False)
            raise UserError(
                f"tfds '{path}', split '{split}': {reason} The dataset must be prepared in ArrayRecord "
                f"format (tfds build --file_format=array_record).{did_you_mean(os.fspath(path), builders)}"
            ) from None
        if not len(self._data):
            raise UserError(f"tfds '{path}', split '{split}': has no samples; choose another split")
        self._fields = default_fields(known) if fields is None else fields
        self._name = f"{builder.info.full_name}/{split}"
        self._image_field, self._label_field, self._key_field = image_field, label_field, key_field
        self._require, self._image_index = require_captions, check_image_index(image_index)
        if label_field is not None:
            self.classes = list(getattr(_feature(features, label_field), "names", None) or []) or None

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        index = range(len(self))[index]
        try:
            return self._key(index, {} if self._key_field is None else self._record(index))
        except Refused:  # which `__getitem__` raises again
            return self._row_key(index)

    def _row_key(self, index: int) -> str:
        return f"{self._name}/{index:010d}"

    def _record(self, index: int) -> Any:
        try:
            return self._data[index]
        # For a damaged record, TFDS and ArrayRecord raise many types of exception.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refused("unreadable", f"record {index}: {reason}") from None

    def _key(self, index: int, record: Mapping[str, Any]) -> str:
        if self._key_field is None:
            return self._row_key(index)
        value = _feature(record, self._key_field)
        return printable(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        record = self._record(index)
        image = _feature(record, self._image_field)
        image = one_image(image, self._image_index, f"feature '{self._image_field}'")
        if not isinstance(image, bytes) or not image:
            raise Refused("missing_image", f"feature '{self._image_field}' has no encoded image")
        captions: tuple[Caption, ...] = ()
        for name, weight in self._fields.items():
            captions += captions_of(_feature(record, name), weight, name)
        label = None if self._label_field is None else _feature(record, self._label_field)
        return Example(
            self._key(index, record),
            image,
            required(captions, self._require, "no text in its caption features"),
            label=class_label(label),  # TFDS writes -1 where a split has no labels
        )


def _feature_names(features: Any, prefix: str = "") -> list[str]:
    """Returns the names of all features of a TFDS dataset; nested ones are written as "a/b"."""
    names = []
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # the elements of a Sequence
        if hasattr(inner, "items"):
            names += _feature_names(inner, f"{prefix}{name}/")
        else:
            names.append(prefix + name)
    return names


def _feature(record: Any, name: str) -> Any:
    """Returns the value of a feature in a record; `name` may be nested, as "a/b"."""
    for part in name.split("/"):
        record = [entry[part] for entry in record] if isinstance(record, list) else record[part]
    return record
