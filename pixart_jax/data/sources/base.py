"""The interface of sources and their samples, and helpers to check fields."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.captions import Caption
from pixart_jax.data.images import Refused
from pixart_jax.errors import UserError, did_you_mean

CaptionFields = Mapping[str, float] | Sequence[str] | None


class FileSlice(NamedTuple):
    """A part of a file: `size` bytes from `offset` on."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Reads the bytes.

        Raises:
          Refused: the file is missing, unreadable or too short.
        """
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
    """One sample, whose image is not decoded yet.

    Attributes:
      key: unique name within the source.
      image: the encoded image: its bytes, its file, or a part of a file.
      captions: the captions that have text, in the order of the source; empty only if the source does not
        require captions.
      label: class index, or None.
      height: height of the upright image in pixels according to the source, or None. It is used for planning
        and may differ from that of the decoded image.
      width: width, as `height`.
    """

    key: str
    image: bytes | Path | FileSlice
    captions: tuple[Caption, ...] = ()
    label: int | None = None
    height: int | None = None
    width: int | None = None

    def read(self) -> bytes:
        """Returns the encoded image. Raises `Refused` if it cannot be read."""
        return self.image.read() if isinstance(self.image, FileSlice) else images.read_bytes(self.image)

    def decode(self) -> np.ndarray:
        """Returns the upright image, uint8 [H, W, 3]. Raises `Refused` if it cannot be used."""
        return images.decode_image(self.read())

    def size(self) -> tuple[int, int]:
        """Returns the upright (height, width) in pixels from the image's header; see `images.read_size`."""
        return images.read_size(self.image if isinstance(self.image, Path) else self.read())


class Source:
    """Random access to samples. Subclasses define `__len__`, `key` and `__getitem__`.

    Attributes:
      kind: the value of `--source` that opens it.
      classes: names of the labels; None if there are no labels.
    """

    kind = ""
    classes: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, index: int) -> str:
        """Returns the key of a sample, even if `__getitem__` raises `Refused` for it."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Returns a sample.

        Raises:
          Refused: the sample cannot be used.
          IndexError: there are fewer samples.
        """
        raise NotImplementedError


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
        raise UserError(f"{option} '{name}': '{where}' has only {', '.join(known)}; set {option}.{close}")


def integer(value: Any, least: int) -> int | None:
    """Converts a value to an integer; None if that is not possible or it is less than `least`."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number >= least and not isinstance(value, bool) else None


def import_package(name: str) -> Any:
    """Imports a package that only some kinds of source need. Raises a `UserError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = (error.name or name).split(".")[0]
        raise UserError(
            f"this source needs the package '{package}', which is not installed; pip install {package}"
        ) from None
