"""WebDataset shards."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.captions import Caption, captions_of, captions_of_record, field_weights
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import CaptionFields, Example, FileSlice, Source, integer, required
from pixart_jax.data.sources.lists import parse_line
from pixart_jax.data.sources.paths import files_of, printable
from pixart_jax.errors import UserError


class WebDatasetSource(Source):
    """WebDataset shards: tar files in which the members of a sample have the same name up to the first dot.

    The image is the member with an image suffix. The caption is the member "txt"; if there is none, captions
    are fields of the member "json", as in `JsonSource`. The label is the member "cls" or the field "label" of
    the json member. When the source is opened, the headers of all tar files are read; samples are then read
    by their offsets, in any order. If two members have the same name, the later one is used, as tar does.

    Args:
      path: a .tar file, a folder (searched recursively), or a pattern such as "shards/{000..099}.tar" or
        "shards/*.tar".
      image_field: suffix of the image member, for samples with several images; default: the first one in
        `images.SUFFIXES`.
      caption_fields: suffixes of text members or fields of the json member, or weights by these names.
      require_captions: whether to skip samples without a caption.
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
        base, self._files = files_of(path, "tar")
        self._names = [file.relative_to(base).as_posix() for file in self._files]
        self._require = require_captions
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        self._members = tuple(dict.fromkeys([*(self._fields or {"txt": 1.0}), "json", "cls"]))
        image_fields = [image_field] if image_field else [suffix[1:] for suffix in images.SUFFIXES]
        tars, keys, places = [], [], []
        for number, file in enumerate(self._files):
            for sample, members in _tar_samples(file).items():
                image = next((name for name in image_fields if name in members), None)
                # A sample without an image is kept, so that `__getitem__` can report it.
                tars.append(number)
                keys.append(f"{self._names[number]}/{sample}" + (f".{image}" if image else ""))
                places.append([members.get(name, (-1, 0)) for name in (image, *self._members)])
        if not keys:
            raise UserError(f"'{path}': the tar files have no samples")
        self._keys = keys
        self._tars = np.array(tars, np.int32)
        self._places = np.array(places, np.int64)  # [samples, image and self._members, (offset, size)]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return printable(self._keys[index])

    def __getitem__(self, index: int) -> Example:
        file = self._files[self._tars[index]]
        image, *members = (
            FileSlice(file, int(offset), int(size)) if offset >= 0 else None
            for offset, size in self._places[index]
        )
        if image is None:
            raise Refused("missing_image", "the sample has no member with an image suffix")
        found = {n: member.read() for n, member in zip(self._members, members, strict=True) if member}
        record = parse_line(found["json"]) if "json" in found else {}
        if not isinstance(record, dict):
            raise Refused("bad_record", "the json member is not an object")
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
            required(captions, self._require, "neither a text member nor a json caption"),
            label=integer(found.get("cls", record.get("label")), least=0),
            height=integer(record.get("height"), least=1),
            width=integer(record.get("width"), least=1),
        )


def _tar_samples(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Reads the headers of a tar file. Returns {name of sample: {suffix of member: (offset, size)}}."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                # `tarfile` would keep all headers, which take more memory than the index of a large shard.
                archive.members = []
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                name, dot, suffix = base.partition(".")
                if member.isfile() and name and dot:
                    sample = samples.setdefault(f"{folder}/{name}" if folder else name, {})
                    sample[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"'{file}': not a readable uncompressed tar file ({error}); unpack it with gunzip if it is "
            "compressed; restore or remove it if it is damaged"
        ) from None
    return samples
