"""What all sources share: the sample, the interface, and the fields of a record."""

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


def required(captions: tuple[Caption, ...], require: bool, where: str) -> tuple[Caption, ...]:
    if require and not captions:
        raise Refused("missing_caption", where)
    return captions


def check_field(option: str, name: str, known: Iterable[str], where: str | os.PathLike) -> None:
    known = list(known)
    if name not in known:
        close = did_you_mean(name, known)
        raise UserError(f"{option} '{name}': '{where}' has only {', '.join(known)}; set {option}.{close}")


def integer(value: Any, least: int) -> int | None:
    """Returns an integer from `least` up, or None for anything else."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number >= least and not isinstance(value, bool) else None


def import_package(name: str) -> Any:
    """Imports an optional package of a source kind when it is first needed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = (error.name or name).split(".")[0]
        raise UserError(
            f"this source needs the package '{package}', which is not installed; pip install {package}"
        ) from None
