"""Generated images on disk: file names, PNG files that carry their settings, contact sheets."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_jax import __version__
from pixart_jax.errors import UserError
from pixart_jax.files import replacing, sha256_of_file
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import Request
from pixart_jax.sampling import picture_grid

# The key of the settings among a PNG's texts.
SETTINGS = "pixart_jax"

# Maximum length of the part of a file name that comes from the prompt.
_SLUG = 40

# Side of an image on a contact sheet, in pixels.
CELL = 256


def file_name(number: int, seed: int, prompt: str) -> str:
    """The prompt's number, the seed and some letters of the prompt: unique, and safe as a file name."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG].strip("-")
    return f"{number:05d}-{seed}{'-' if slug else ''}{slug}.png"


def make_record(
    pipe: Pipeline, request: Request, source: Mapping[str, Any], batch_size: int
) -> dict[str, Any]:
    """The record that a PNG stores, to generate the image again and to check that it is the same image.

    Args:
      pipe: the pipeline that generates the image.
      request: as `Pipeline.resolve` returns it.
      source: arguments of `load_pipeline`.
      batch_size: images in a device's batch; on accelerators the last bits depend on it.

    Returns:
      Plain values, as they are read back from JSON.
    """
    fields = dataclasses.asdict(request)
    given = {"prompt": request.prompt} | {name: value for name, value in fields.items() if value is not None}
    return {
        # Tuples become lists, so that the record equals the one that is read back.
        "request": json.loads(json.dumps(given)),
        "source": dict(source),
        "fingerprint": pipe.fingerprint,
        "files": {path: sha256_of(path) for path in request.files},
        "made_with": {
            "pixart_jax": __version__,
            "jax": jax.__version__,
            "device": pipe.generator.devices[0].device_kind,
            "dtype": pipe.model.config.dtype,
            "batch_size": batch_size,
        },
    }


def sha256_of(path: str) -> str:
    """The hash of a file that a request reads.

    Raises:
      UserError: there is no such file.
    """
    try:
        return _sha256(path, os.stat(path).st_mtime_ns)
    except OSError:
        raise UserError(f"'{path}' does not exist, but the request needs it.") from None


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
    info = PngInfo()
    info.add_text(SETTINGS, json.dumps(settings, ensure_ascii=False))
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_latents(path: Path, latents: np.ndarray) -> None:
    """Writes a .npy file atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, latents)


def read_png_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` stored in a PNG.

    Raises:
      UserError: not a PNG, or one without settings.
    """
    try:
        with Image.open(path) as image:
            # `image.text` would decode the pixels too.
            text = image.info.get(SETTINGS)
        settings = json.loads(text) if text is not None else None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): give a PNG that sample wrote.") from None
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' holds no settings: give a PNG that sample wrote.")
    return settings


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
    return picture_grid(cells, columns)
