"""WebDataset shards."""

from __future__ import annotations

import collections
import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.captions import (
    LONGEST_CAPTION,
    Caption,
    captions_of,
    captions_of_record,
    field_weights,
)
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import (
    CaptionFields,
    Example,
    FileSlice,
    Source,
    class_label,
    integer,
    required,
)
from pixart_jax.data.sources.lists import parse_line
from pixart_jax.data.sources.paths import choose_split, files_of, printable
from pixart_jax.errors import UserError

# The largest json member, in bytes.
_LARGEST_JSON = 2**26


class WebDatasetSource(Source):
    """WebDataset shards: tar files in which the members of a sample have the same name up to the first dot.

    An image whose name has a second dot, such as photo.v0.jpg, is a sample of its own, photo.v0, if there is
    no image photo.jpg, or if it has its own caption (photo.v0.txt) or label. `image_field` turns this off.

    The image is the member with an image suffix. The caption is the member "txt"; if there is none, captions
    are fields of the member "json", as in `JsonSource`. The label is the member "cls" or the field "label" of
    the json member. When the source is opened, the headers of all tar files are read; samples are then read
    by their offsets, in any order. If two members have the same name, the later one is used, as tar does. A
    file may be several tar files, one after the other. `notes` counts the members that are not read.

    Args:
      path: a .tar file, a folder (searched recursively), or a pattern such as "shards/{000..099}.tar" or
        "shards/*.tar".
      split: which of the splits to read, if the names of the files or their folders name several, such as
        train-0000.tar; "all" for all of them. Default: train, and files that name no split.
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
        split: str | None = None,
        image_field: str | None = None,
        caption_fields: CaptionFields = None,
        require_captions: bool = True,
    ):
        base, files = files_of(path, "tar")
        names = [file.relative_to(base).as_posix() for file in files]
        self._names, notes = choose_split(names, split, path)
        self._files = [base / name for name in self._names]
        self._require = require_captions
        self._fields = None if caption_fields is None else field_weights(caption_fields)
        self._members = tuple(dict.fromkeys([*(self._fields or {"txt": 1.0}), "json", "cls"]))
        image_fields = [image_field] if image_field else [suffix[1:] for suffix in images.SUFFIXES]
        tars, keys, places = [], [], []
        self._without_image: dict[int, str] = {}  # the members of samples that have no image, for the message
        left: collections.Counter[str] = collections.Counter()  # members that are not read, by suffix
        for number, file in enumerate(self._files):
            found = _tar_samples(file, left)
            if image_field is None:
                found = _split_at_last_dot(found, self._members)
            for sample, members in found.items():
                image = next((name for name in image_fields if name in members), None)
                # A sample without an image is kept, so that `__getitem__` can report it.
                if image is None:
                    self._without_image[len(keys)] = ", ".join(members)
                tars.append(number)
                keys.append(f"{self._names[number]}/{sample}" + (f".{image}" if image else ""))
                read = (image, *self._members)
                places.append([members.get(name, (-1, 0)) for name in read])
                left.update(f".{name}" for name in members if image is not None and name not in read)
        if not keys:
            raise UserError(f"'{path}': the tar files have no samples")
        if left:
            counts = ", ".join(f"{count:,} {name}" for name, count in left.most_common(10))
            notes += (
                f"'{path}': members that are not read: {counts}; image_field and caption_fields name more",
            )
        self.notes = notes
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
            index = range(len(self))[index]
            raise Refused(
                "missing_image",
                f"no member of the sample has an image suffix (members: {self._without_image[index]}); set "
                "image_field to the suffix of its image",
            )
        # More bytes than the longest caption has, so that `captions_of` skips it with the right reason.
        found = {
            name: member.read(_LARGEST_JSON if name == "json" else 8 * LONGEST_CAPTION)
            for name, member in zip(self._members, members, strict=True)
            if member
        }
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
            label=class_label(found.get("cls", record.get("label"))),
            height=integer(record.get("height"), least=1),
            width=integer(record.get("width"), least=1),
        )


Members = dict[str, tuple[int, int]]  # (offset, size) by suffix


def _tar_samples(file: Path, left: collections.Counter[str]) -> dict[str, Members]:
    """Reads the headers of a file that is a tar file, or several, one after the other.

    Args:
      file: the file.
      left: counts the members that belong to no sample.

    Returns:
      the members of each sample, by its name.

    Raises:
      UserError: the file is not a tar file, or is damaged.
    """
    samples: dict[str, Members] = {}
    try:
        for member in _tar_members(file):
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            name, dot, suffix = base.partition(".")
            if member.isdir():
                continue
            if not member.isfile() or member.issparse():
                left["links and special files"] += 1
            elif not (name and dot):
                left["hidden" if dot else "without a suffix"] += 1
            else:
                sample = samples.setdefault(f"{folder}/{name}" if folder else name, {})
                left["replaced by a later member of the same name"] += suffix.lower() in sample
                sample[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"'{file}': not a readable uncompressed tar file ({error}); unpack it with gunzip if it is "
            "compressed; restore or remove it if it is damaged"
        ) from None
    # `Counter` keeps a key whose count is 0.
    for name in [name for name, count in left.items() if not count]:
        del left[name]
    return samples


def _tar_members(file: Path) -> Iterator[tarfile.TarInfo]:
    """Yields all members of a file of one or more tar files. `tarfile` ends at the first block of zeros."""
    with open(file, "rb") as stream:
        if not stream.read(1):
            raise tarfile.ReadError("0 bytes")
        start = 0
        while (start := _next_block(stream, start)) is not None:
            stream.seek(start)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    yield member
                    # `tarfile` would keep all headers: more memory than the index of a large shard takes.
                    archive.members = []
                # At a damaged header, `tarfile` ends without an exception.
                if archive.offset == start:
                    raise tarfile.ReadError(f"no header at byte {start:,}")
                start = archive.offset


def _next_block(stream: BinaryIO, start: int) -> int | None:
    """Returns the offset of the first block from `start` on that is not all zeros; None if there is none."""
    stream.seek(start)
    while block := stream.read(1 << 20):
        if zeros := len(block) - len(block.lstrip(b"\0")):
            if zeros < len(block):
                return start + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        else:
            return start
        start += len(block)
    return None


def _split_at_last_dot(samples: dict[str, Members], texts: Collection[str]) -> dict[str, Members]:
    """Makes samples of members whose suffix has a dot, as the docstring of the source says.

    Args:
      samples: the members of each sample, by its name up to the first dot.
      texts: suffixes of the members with captions and labels.
    """
    out: dict[str, Members] = {}
    for name, members in samples.items():
        # Members by what is between the first and the last dot, such as "v0"; "" if there is only one dot.
        parts: dict[str, Members] = {}
        for suffix, place in members.items():
            middle, _, last = suffix.rpartition(".")
            parts.setdefault(middle, {})[last] = place
        with_image = [
            middle for middle, part in parts.items() if any(f".{s}" in images.SUFFIXES for s in part)
        ]
        if "" in with_image:
            # A second view of the image, or a mask, has no caption of its own.
            own = [middle for middle in with_image if middle and not parts[middle].keys().isdisjoint(texts)]
        else:
            own = [middle for middle in parts if middle and with_image]
        rest = {suffix: place for suffix, place in members.items() if suffix.rpartition(".")[0] not in own}
        if rest:
            out[name] = rest
        out |= {f"{name}.{middle}": parts[middle] for middle in own}
    return out
