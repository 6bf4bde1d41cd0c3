"""Draws a planned set of pictures: in shards, resumable, each with its seed on record.

OUT/images/         the pictures, and nothing that is no part of the plan
OUT/pictures.jsonl  file, prompt and seed of each
OUT/settings.json   what all of them were drawn with
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.files import replacing, write_json, write_text

IMAGES, SETTINGS, PLAN = "images", "settings.json", "pictures.jsonl"
# Quality of JPEG files, where a benchmark reads no other.
JPEG_QUALITY = 95
# Batches of one call of the pipeline: what an interruption can lose.
_BATCHES = 4
_CAPTION_FIELDS = ("caption", "prompt")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One file to draw.

    Attributes:
      file: its path below images/, with '/'.
      prompt: the text.
      seed: of its first image.
      tiles: images in it; 4 are a 2×2 grid, row by row, of seeds seed … seed + 3.
    """

    file: str
    prompt: str
    seed: int
    tiles: int = 1


def read_captions(path: str | Path) -> list[str]:
    """The captions of a file, in its order.

    Args:
      path: .txt with one a line; .tsv or .csv with a column 'caption' or 'prompt'; .json or .jsonl of texts,
        or of objects with such a field.

    Raises:
      UserError: no such file, no captions in it, or an empty one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"caption file '{path}' cannot be read: {error}.") from error
    try:
        if path.suffix in (".tsv", ".csv"):
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            items = list(csv.DictReader(io.StringIO(text), **dialect))
        elif path.suffix == ".json":
            items = json.loads(text)
            items = list(items.values()) if isinstance(items, dict) else items
        elif path.suffix == ".jsonl":
            items = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            items = [line for line in text.split("\n") if line.strip()]
        captions = [_caption(item).strip() for item in items]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"caption file '{path}' is not as expected: {error}.") from error
    if not captions or not all(captions):
        raise UserError(
            f"caption file '{path}' has {len(captions)} captions, {captions.count('')} of them empty."
        )
    return captions


def read_shard(text: str) -> tuple[int, int]:
    """Reads "I/N", counted from 0.

    Raises:
      UserError: not of this form, or not 0 <= I < N.
    """
    index, separator, count = text.partition("/")
    if not (separator and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"shard '{text}': must be I/N with 0 <= I < N, such as 0/4.")
    return int(index), int(count)


def _caption(item: Any) -> str:
    if isinstance(item, str):
        return item
    for field in _CAPTION_FIELDS:
        if field in item:
            return item[field]
    raise ValueError(f"an entry has neither of {', '.join(_CAPTION_FIELDS)}")


def draw(
    pipe: Callable[..., np.ndarray],
    pictures: Sequence[Picture],
    out: Path,
    settings: Mapping[str, Any],
    *,
    arguments: Mapping[str, Any],
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 4,
) -> int:
    """Draws the pictures that are not there yet.

    Args:
      pipe: (prompts, seed, images_per_prompt, batch_size, **arguments) -> uint8 [N, H, W, C], as
        `pixart_jax.pipeline.Pipeline`.
      pictures: all of them, whatever the shard, of one number of tiles.
      out: the folder described above.
      settings: stored in it. They must be those of what is there already.
      arguments: further ones of `pipe`.
      shard: (i, n) draws every n-th picture, beginning with the i-th, counted from 0.
      batch_size: images a device draws at a time.

    Returns:
      how many pictures were drawn.

    Raises:
      UserError: two pictures of one name, or settings that are not those of the folder.
    """
    files = [picture.file for picture in pictures]
    for first, second in itertools.pairwise(sorted(files)):
        if first == second:
            raise UserError(f"two pictures would be named '{first}': the prompts or ids must differ.")
    _agree(out / SETTINGS, dict(settings))
    plan = "".join(json.dumps(dataclasses.asdict(picture), ensure_ascii=False) + "\n" for picture in pictures)
    write_text(out / PLAN, plan)
    pending = [
        picture for picture in pictures[shard[0] :: shard[1]] if not (out / IMAGES / picture.file).exists()
    ]
    tiles = pictures[0].tiles
    size = max(_BATCHES * batch_size * len(jax.local_devices()) // tiles, 1)
    with tqdm(total=len(pending), desc="pictures", disable=None) as bar:
        for start in range(0, len(pending), size):
            part = pending[start : start + size]
            images = pipe(
                [picture.prompt for picture in part],
                seed=[picture.seed for picture in part],
                images_per_prompt=tiles,
                batch_size=batch_size,
                **arguments,
            )
            for number, picture in enumerate(part):
                _save(out, picture, images[number * tiles : (number + 1) * tiles], shard)
            bar.update(len(part))
    return len(pending)


def check(pictures: Sequence[Picture], out: Path) -> None:
    """Makes sure that OUT/images holds the pictures of the plan and no other.

    Raises:
      UserError: names what is missing, or what a benchmark would take for a picture.
    """
    root = out / IMAGES
    planned = {picture.file for picture in pictures}
    missing = sorted(file for file in planned if not (root / file).is_file())
    if missing:
        raise UserError(
            f"'{root}' lacks {len(missing)} of {len(planned)} pictures, such as '{missing[0]}': run all "
            "shards."
        )
    for folder in sorted({(root / file).parent for file in planned}):
        for path in sorted(folder.iterdir()):
            name = path.relative_to(root).as_posix()
            if path.suffix in (".png", ".jpg") and name not in planned:
                raise UserError(
                    f"'{path}' is no picture of this benchmark, which would read it: move it away."
                )


def read_settings(out: Path) -> dict[str, Any]:
    """What the pictures of a folder were drawn with; empty for pictures of others."""
    path = out / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _agree(path: Path, settings: dict[str, Any]) -> None:
    """Stores the settings, or compares them with the stored ones."""
    stored = read_settings(path.parent)
    if stored:
        differing = [
            f"{name} {stored.get(name)!r}, now {settings.get(name)!r}"
            for name in {**stored, **settings}
            if stored.get(name) != settings.get(name)
        ]
        if differing:
            raise UserError(
                f"'{path.parent}' was drawn with {'; '.join(differing)}: give the same settings or another "
                "--out."
            )
        return
    write_json(path, settings)


def _save(out: Path, picture: Picture, images: np.ndarray, shard: tuple[int, int]) -> None:
    if images.shape[3] == 1:
        images = images.repeat(3, axis=3)
    if picture.tiles == 4:
        if images.shape[1] != images.shape[2]:
            raise UserError(
                f"images are {images.shape[2]}x{images.shape[1]}: grids are cut into squares, draw squares."
            )
        pixels = np.concatenate([np.concatenate(list(row), axis=1) for row in (images[:2], images[2:])])
    else:
        (pixels,) = images
    path = out / IMAGES / picture.file
    options = {"quality": JPEG_QUALITY} if path.suffix == ".jpg" else {}
    # The temporary file is not beside its place, because a benchmark lists that folder.
    with replacing(path, out / f".shard{shard[0]}{path.suffix}") as temporary:
        Image.fromarray(pixels).save(temporary, **options)
