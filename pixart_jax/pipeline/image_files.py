"""Generated images on disk: file names, PNG files that carry their settings, contact sheets."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_jax import __version__
from pixart_jax.errors import UserError
from pixart_jax.files import replacing, sha256_of_file
from pixart_jax.hub import name_of
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import MOST_IMAGES, Request
from pixart_jax.readers import COUNT, OrNull, check_shape, open_regular, parse_json
from pixart_jax.sampling import picture_grid

# The key of the settings among a PNG's texts.
SETTINGS = "pixart_jax"

# Maximum size of the settings in a PNG, in bytes.
MOST_TEXT = 2**26
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What a path may be. Python raises an error of its own for one with a NUL.
_PATH = re.compile(r"[^\0]+")
# The shape of what `make_record` returns.
_RECORD_SHAPE = {
    "request": {
        **{"image?": OrNull(_PATH), "mask?": OrNull(_PATH)},
        **{"embeddings?": OrNull((_PATH, COUNT)), "latents?": OrNull((_PATH, COUNT))},
    },
    "source": {
        **{"checkpoint": _PATH, "weights?": OrNull(re.compile("ema|raw")), "pipeline?": OrNull(_PATH)},
        "adapter_alpha?": OrNull(float),
        "weights_dtype?": OrNull(re.compile("float32|int8")),
        "text_weights_dtype?": OrNull(re.compile("auto|int8")),
        **{"clean_caption?": OrNull(bool), "lower_case?": OrNull(bool)},
    },
    "adapters?": [{"path": _PATH, "sha256": str, "weight": float}],
    "fingerprint": str,
    "files": {str: str},
    "made_with": {"batch_size": range(1, MOST_IMAGES + 1), "watched?": bool},
}

# Maximum length of the part of a file name that comes from the prompt.
_SLUG = 40

# Side of an image on a contact sheet, and the gap between two, in pixels.
CELL, GAP = 256, 2
# Maximum height and width of an image in pixels, by format; the limits of other formats do not matter.
_LONGEST = {"JPEG": 65_500, "WEBP": 16_383}


def file_name(number: int, seed: int, prompt: str) -> str:
    """The prompt's number, the seed and some letters of the prompt: unique, and safe as a file name."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG].strip("-")
    return f"{number:05d}-{seed}{'-' if slug else ''}{slug}.png"


def make_record(
    pipe: Pipeline, request: Request, source: Mapping[str, Any], batch_size: int, *, watched: bool = False
) -> dict[str, Any]:
    """The record that a PNG stores, to generate the image again and to check that it is the same image.

    Args:
      pipe: the pipeline that generates the image.
      request: as `Pipeline.resolve` returns it.
      source: arguments of `load_pipeline`.
      batch_size: images in a device's batch; on accelerators the last bits depend on it.
      watched: whether a callback watches the steps, which takes another program; likewise.

    Returns:
      Plain values, as they are read back from JSON.
    """
    fields = {name: _named(value) for name, value in dataclasses.asdict(request).items()}
    given = {"prompt": request.prompt} | {name: value for name, value in fields.items() if value is not None}
    return {
        # Tuples become lists, so that the record equals the one that is read back.
        "request": json.loads(json.dumps(given)),
        "source": dict(source),
        "fingerprint": pipe.fingerprint,
        **({"adapters": pipe.adapters.record()} if pipe.adapters else {}),
        "files": {name_of(path): sha256_of(path) for path in request.files},
        "made_with": {
            "pixart_jax": __version__,
            "jax": jax.__version__,
            "device": pipe.generator.devices[0].device_kind,
            "dtype": pipe.model.config.dtype,
            "batch_size": batch_size,
            **({"watched": True} if watched else {}),
        },
    }


def _named(value: Any) -> Any:
    """A setting with the hub path in place of a path in the cache."""
    if isinstance(value, tuple | list):
        return tuple(map(_named, value))
    return name_of(value) if isinstance(value, str) else value


def sha256_of(path: str) -> str:
    """The hash of a file that a request reads.

    Raises:
      UserError: there is no such file, or it is a device or a pipe, which may have no end.
    """
    try:
        state = os.stat(path)
    except OSError:
        raise UserError(f"'{path}' does not exist, but the request needs it.") from None
    if not stat.S_ISREG(state.st_mode):
        raise UserError(f"'{path}' is not a regular file, but the request needs one.")
    return _sha256(path, state.st_mtime_ns)


@functools.lru_cache
def _sha256(path: str, mtime: int) -> str:
    """Computed once for all images that read the file, until the file changes."""
    return sha256_of_file(path)


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] atomically, in the format that the name ends in."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format=Image.registered_extensions()[path.suffix.lower()])


def save_png(path: Path, pixels: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Writes uint8 [H, W, 1 or 3] atomically, with the settings as JSON in a text of the PNG."""
    with replacing(path) as temporary:
        temporary.write_bytes(png_bytes(pixels, settings))


def png_bytes(pixels: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    """The file that `save_png` writes."""
    info = PngInfo()
    # A path may have bytes that are not UTF-8.
    text = json.dumps(settings, ensure_ascii=False).encode(errors="backslashreplace").decode()
    info.add_text(SETTINGS, text)
    image, file = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_latents(path: Path, latents: np.ndarray) -> None:
    """Writes a .npy file atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, latents)


def read_png_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` stored in a PNG. The pixels are not decoded.

    Raises:
      UserError: not a PNG, or one without settings.
    """
    try:
        with open_regular(path) as file:
            found = list(_settings_texts(file))
        if len(found) > 1:
            raise ValueError(f"it has settings {len(found)} times")
        settings = parse_json(found[0]) if found else None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): give a PNG that sample wrote.") from None
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' holds no settings: give a PNG that sample wrote.")
    return settings


def read_record(path: str | Path) -> dict[str, Any]:
    """The record that `make_record` made of an image, from its PNG. Its request can be of an older version.

    Raises:
      UserError: as `read_png_settings`, or the settings are not such a record.
    """
    record = read_png_settings(path)
    try:
        check_shape(record, _RECORD_SHAPE)
    except ValueError as error:
        raise UserError(
            f"the settings in '{path}' are not those of an image ({error}): give a PNG that sample wrote."
        ) from None
    return record


def _settings_texts(file: BinaryIO) -> Iterator[bytes]:
    """Yields the texts of the key `SETTINGS` in a PNG, UTF-8. Only those before the pixels count."""
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        raise ValueError("it is not a PNG")
    while True:
        size, kind = int.from_bytes(file.read(4)), file.read(4)
        if kind in (b"IDAT", b"IEND"):
            return
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(size + 4, os.SEEK_CUR)
            if kind == b"":
                raise ValueError("the PNG is cut off")
            continue
        if size > MOST_TEXT:
            raise ValueError(f"a text of the PNG has more than {MOST_TEXT:,} bytes")
        content, check = file.read(size), file.read(4)
        if zlib.crc32(kind + content) != int.from_bytes(check) or len(check) < 4:
            raise ValueError("a text of the PNG is damaged")
        key, _, rest = content.partition(b"\0")
        if key == SETTINGS.encode():
            yield _text(kind, rest)


def _text(kind: bytes, content: bytes) -> bytes:
    """The text of a chunk of a PNG, as UTF-8. `content` is what follows the key."""
    packed = kind == b"zTXt"
    if packed:
        content = content[1:]  # the method; there is only one
    if kind == b"iTXt":
        packed, content = content[:1] == b"\1", content[2:]
        # Before the text are the language and the key in that language.
        content = content.partition(b"\0")[2].partition(b"\0")[2]
    if packed:
        try:
            content = zlib.decompressobj().decompress(content, MOST_TEXT + 1)
        except zlib.error as error:
            raise ValueError(f"a text of the PNG is damaged: {error}") from None
    if len(content) > MOST_TEXT:
        raise ValueError(f"a text of the PNG has more than {MOST_TEXT:,} bytes")
    return content if kind == b"iTXt" else content.decode("latin-1").encode()


def check_contact_sheet(path: str | Path, count: int, columns: int) -> None:
    """Raises a `UserError` if a contact sheet of `count` images is too large for the format of its file."""
    longest = _LONGEST.get(Image.registered_extensions()[Path(path).suffix.lower()])
    sides = [cells * (CELL + GAP) + GAP for cells in (columns, math.ceil(count / columns))]
    if longest and max(sides) > longest:
        raise UserError(
            f"the contact sheet '{path}' of {count:,} images would have {sides[0]:,} x {sides[1]:,} pixels, "
            f"and a file of this format has at most {longest:,} in a row or column: give a name that ends in "
            ".png."
        )


def contact_sheet(paths: Sequence[Path], columns: int) -> np.ndarray:
    """Images side by side, row by row, each fitted into a square.

    Args:
      paths: paths of the images.
      columns: images in a row.

    Returns:
      uint8 [H, W, 3].
    """
    cells = np.full((len(paths), CELL, CELL, 3), 255, np.uint8)
    for cell, path in zip(cells, paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = CELL / max(image.size)
        # Small images are enlarged without smoothing.
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        width, height = (max(round(side * scale), 1) for side in image.size)
        top, left = (CELL - height) // 2, (CELL - width) // 2
        cell[top : top + height, left : left + width] = np.asarray(image.resize((width, height), method))
    return picture_grid(cells, columns, gap=GAP)
