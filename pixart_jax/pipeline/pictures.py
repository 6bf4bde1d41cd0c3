"""Pictures on disk: names, PNG files with their settings inside, contact sheets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_jax.errors import UserError
from pixart_jax.files import replacing
from pixart_jax.sampling import picture_grid

# The key of the settings among a PNG's texts.
SETTINGS = "pixart_jax"

# Longest part of a prompt in a file name.
_SLUG = 40

# Side of a picture on a contact sheet, in pixels.
_CELL = 256


def file_name(number: int, seed: int, prompt: str) -> str:
    """A name that cannot collide or leave the folder: number of the prompt, seed, a few plain letters."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG].strip("-")
    return f"{number:05d}-{seed}{'-' if slug else ''}{slug}.png"


def save_png(path: Path, pixels: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Writes uint8 [H, W, 1 or 3] with its settings as JSON in the PNG's text; whole or not at all."""
    info = PngInfo()
    info.add_text(SETTINGS, json.dumps(settings, ensure_ascii=False))
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_latents(path: Path, latents: np.ndarray) -> None:
    """Writes .npy, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, latents)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a PNG.

    Raises:
      UserError: no PNG, or none of `save_png`.
    """
    try:
        with Image.open(path) as image:
            # Not `image.text`, which decodes the pixels too.
            text = image.info.get(SETTINGS)
        settings = json.loads(text) if text is not None else None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): give a PNG that sample wrote.") from None
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' holds no settings: give a PNG that sample wrote.")
    return settings


def contact_sheet(paths: Sequence[Path], columns: int) -> np.ndarray:
    """uint8 [H, W, 3]: pictures row by row, each fitted into a square.

    Args:
      paths: of the pictures.
      columns: pictures in a row.
    """
    cells = np.full((len(paths), _CELL, _CELL, 3), 255, np.uint8)
    for cell, path in zip(cells, paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = _CELL / max(image.size)
        # Small pictures keep their pixels.
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        width, height = (max(round(side * scale), 1) for side in image.size)
        top, left = (_CELL - height) // 2, (_CELL - width) // 2
        cell[top : top + height, left : left + width] = np.asarray(image.resize((width, height), method))
    return picture_grid(cells, columns)
