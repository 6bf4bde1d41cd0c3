"""The interface of sources and their samples, and helpers to check fields."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import importlib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.captions import MOST_CAPTIONS, Caption, captions_of
from pixart_jax.data.images import CENTRE, Refused, View
from pixart_jax.errors import UserError, did_you_mean, listing, short
from pixart_jax.flags import LARGEST, whole_number

# The longest key of a sample in bytes, and the largest label, that a feature record can store.
LONGEST_KEY = 2**16 - 1
LARGEST_LABEL = 2**31 - 1

CaptionFields = Mapping[str, float] | Sequence[str] | None


class FileSlice(NamedTuple):
    """A part of a file: `size` bytes from `offset` on."""

    path: Path
    offset: int
    size: int

    def read(self, limit: int = images.LARGEST_FILE) -> bytes:
        """Reads the bytes.

        Args:
          limit: largest `size` that is allowed.

        Raises:
          Refused: the file is missing, unreadable or too short, or the part is too large.
        """
        if self.size > limit:
            raise Refused(
                "too_large", f"'{self.path}' has {self.size:,} bytes at {self.offset}, over {limit:,}"
            )
        try:
            with self.open() as file:
                data = file.read()
        except OSError as error:
            raise Refused("unreadable", f"'{self.path}': {error.strerror or error}") from None
        if len(data) != self.size:
            raise Refused("unreadable", f"'{self.path}' ends inside the {self.size} bytes at {self.offset}")
        return data

    def open(self) -> BinaryIO:
        """Opens the part as a file, to read only some of its bytes, such as the header of an image.

        Raises:
          Refused: the file is missing or unreadable.
        """
        return io.BufferedReader(_Part(images.open_file(self.path), self.offset, self.size))


class _Part(io.RawIOBase):
    """`size` bytes of an open file, from `offset` on, as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        data = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample, whose image is not decoded yet.

    Attributes:
      key: unique name within the source.
      image: the encoded image: its bytes, its file, or a part of a file.
      captions: the captions that have text, in the order of the source; empty only if the source does not
        require captions.
      label: class index, or None.
      height: height in pixels according to the source, or None. It often is that of the stored image, before
        its EXIF rotation, so only `size` is used for planning.
      width: width, as `height`.
      mask: the file of its mask; None for none. See `data.masks`.
      view: what the sample shows of its image.

    Raises:
      Refused: the key or the number of captions is more than a feature record can store.
    """

    key: str
    image: bytes | Path | FileSlice
    captions: tuple[Caption, ...] = ()
    label: int | None = None
    height: int | None = None
    width: int | None = None
    mask: Path | None = None
    view: View = CENTRE

    def __post_init__(self):
        size = len(self.key.encode())
        if size > LONGEST_KEY or "\0" in self.key:
            why = "a NUL" if size <= LONGEST_KEY else f"{size:,} bytes, over {LONGEST_KEY:,}"
            raise Refused("bad_record", f"its name '{self.key}' has {why}")
        if len(self.captions) > MOST_CAPTIONS:
            raise Refused("bad_caption", f"{len(self.captions):,} captions, over {MOST_CAPTIONS:,}")

    def read(self) -> bytes:
        """Returns the encoded image. Raises `Refused` if it cannot be read."""
        return self.image.read() if isinstance(self.image, FileSlice) else images.read_bytes(self.image)

    def read_mask(self) -> bytes | None:
        """Returns the encoded mask; None if there is none. Raises `Refused` if it cannot be read."""
        return None if self.mask is None else images.read_bytes(self.mask)

    def decode(self) -> np.ndarray:
        """Returns the upright image, uint8 [H, W, 3]. Raises `Refused` if it cannot be used."""
        return images.decode_image(self.read())

    def size(self) -> tuple[int, int]:
        """Returns the upright (height, width) in pixels from the image's header; see `images.read_size`."""
        if isinstance(self.image, FileSlice):
            with self.image.open() as file:
                return images.read_size(file)
        return images.read_size(self.image)


class Source:
    """Random access to samples. Subclasses define `__len__`, `key` and `__getitem__`.

    Attributes:
      kind: the value of `--source` that opens it.
      classes: names of the labels; None if there are no labels.
      notes: lines that tell the user what was found but is not read.
      masked: whether its images have masks.
      job_options: masks, views and the common caption of its samples, for job.json. A feature folder is
        continued with the same.
    """

    kind = ""
    classes: list[str] | None = None
    notes: tuple[str, ...] = ()
    masked = False
    job_options: Mapping[str, Any] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, index: int) -> str:
        """Returns the key of a sample, even if `__getitem__` raises `Refused` for it."""
        raise NotImplementedError

    def image_key(self, index: int) -> str:
        """Returns the key of a sample's image, which is the same for samples that repeat an image."""
        return self.key(index)

    def __getitem__(self, index: int) -> Example:
        """Returns a sample.

        Raises:
          Refused: the sample cannot be used.
          IndexError: there are fewer samples.
        """
        raise NotImplementedError


class WrappedSource(Source):
    """The samples of another source, of which a subclass changes something.

    Args:
      source: the other source.
    """

    def __init__(self, source: Source):
        self._source = source
        self.kind, self.classes, self.notes = source.kind, source.classes, source.notes
        self.masked, self.job_options = source.masked, source.job_options

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def image_key(self, index: int) -> str:
        return self._source.image_key(index)


class CaptionedSource(WrappedSource):
    """A source all of whose samples have the same caption.

    Args:
      source: the images. Its own captions are ignored.
      caption: the caption.

    Raises:
      UserError: the caption has no visible text, or cannot be a caption.
    """

    def __init__(self, source: Source, caption: str):
        try:
            self._captions = captions_of(caption)
        except Refused as refused:
            raise UserError(f"caption '{short(caption)}': {refused.text}; give another text.") from None
        if not self._captions:
            raise UserError(f"caption is '{caption}': give text, such as 'a photo of sks dog'.")
        super().__init__(source)
        self.job_options = {**source.job_options, "caption": caption}

    def __getitem__(self, index: int) -> Example:
        return dataclasses.replace(self._source[index], captions=self._captions)


def required(captions: tuple[Caption, ...], require: bool, where: str) -> tuple[Caption, ...]:
    """Returns `captions`. Raises `Refused`, with the text `where`, if there are none but `require` is set."""
    if require and not captions:
        raise Refused("missing_caption", where)
    return captions


def check_field(option: str, name: str, known: Iterable[str], where: str | os.PathLike) -> None:
    """Raises a `UserError` unless `name`, the value of `option`, is one of the fields in `known`."""
    known = list(known)
    if name not in known:
        close = did_you_mean(name, known)
        raise UserError(f"{option} '{name}': '{where}' has only {listing(known)}; set {option}.{close}")


def integer(value: Any, least: int) -> int | None:
    """Converts a value to an integer; None if that is not possible or it is less than `least`."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number >= least and not isinstance(value, bool) else None


def class_label(value: Any) -> int | None:
    """Converts a label of a source to a class index.

    Args:
      value: any value of a field: a number, or a number as text or bytes.

    Returns:
      the index; None if there is none (as -1 and NaN say too), or if the value is not a number, such as the
      name of a class.

    Raises:
      Refused: it is another number, which cannot be a class index.
    """
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        return None
    if math.isnan(number) or number == -1:
        return None
    if not 0 <= number <= LARGEST_LABEL or number != int(number):
        raise Refused(
            "bad_record", f"label is {short(value)}: it must be a whole number from 0 to {LARGEST_LABEL}"
        )
    return int(number)


def check_image_index(value: int | str | None) -> int | None:
    """Checks the option `image_index`, which is text if it comes from a command line.

    Raises:
      UserError: it is not a whole number of at least 0.
    """
    index = None if value is None else whole_number(value, 0, LARGEST[int])
    if index is None and value is not None:
        raise UserError(f"image_index is '{value}': it must be a whole number, 0 for the first image.")
    return index


def one_image(value: Any, index: int | None, where: str) -> Any:
    """Returns the image of a field, which may have a list of images.

    Args:
      value: an image in any form, or a list of them.
      index: position of the image to use; None if there may be only one.
      where: name of the field, for the message.

    Raises:
      Refused: the list does not have that image, or has several and `index` is None.
    """
    if not isinstance(value, (list, tuple, np.ndarray)):
        return value
    if index is None and len(value) > 1:
        raise Refused(
            "bad_record",
            f"{where} has {len(value)} images; choose one with --source_option=image_index=0, 1, …",
        )
    if (index or 0) >= len(value):
        raise Refused("missing_image", f"{where} has {len(value)} images, image_index is {index or 0}")
    return value[index or 0]


def decode_base64(value: str | bytes) -> bytes | None:
    """Returns the image that is in base64 in a value, with or without "data:image/png;base64," before it.

    Args:
      value: text, or text as bytes.

    Returns:
      the encoded image; None if the value is anything else, such as a path or the image itself.
    """
    text = value.encode("ascii", "replace") if isinstance(value, str) else value
    text = text.lstrip()
    if text[:5].lower() == b"data:":
        text = text.partition(b",")[2]
    # Enough for a signature. The text may be broken into lines.
    if not images.is_image(_decoded(b"".join(text[:128].split())[:64])):
        return None
    return _decoded(b"".join(text.split()))


def _decoded(text: bytes) -> bytes:
    """Decodes base64, also that with "-_" in place of "+/"; b"" if it is something else."""
    try:
        text = text.translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        # A group of four characters is three bytes. The padding may be missing.
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return b""


def import_package(name: str) -> Any:
    """Imports a package that only some kinds of source need. Raises a `UserError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = (error.name or name).split(".")[0]
        raise UserError(
            f"this source needs the package '{package}', which is not installed; pip install {package}"
        ) from None
