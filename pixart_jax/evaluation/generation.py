"""Generates a planned set of images: in shards, resumable, with a record of every seed.

OUT/images/         the planned images and no others
OUT/pictures.jsonl  file, prompt and seed of each
OUT/settings.json   the settings that all of them were generated with
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from pixart_jax.data.captions import captions_of
from pixart_jax.data.images import Refused
from pixart_jax.errors import UserError, short, system_reason
from pixart_jax.files import replacing, write_json, write_text
from pixart_jax.flags import LARGEST_SEED
from pixart_jax.readers import OrNull, parse_json, read_json, read_json_lines

IMAGES, SETTINGS, PLAN = "images", "settings.json", "pictures.jsonl"
# What to do if one of these is damaged.
_FIX = "restore it, or give another --out"
# Quality of JPEG files, for benchmarks that read only JPEG.
JPEG_QUALITY = 95
# Batches in one call of the pipeline. An interruption loses at most the images of one call.
_BATCHES = 4
# Longest file name, in bytes, on common file systems.
LONGEST_NAME = 255
_CAPTION_FIELDS = ("caption", "prompt", "text")
_NAME_FIELDS = ("file_name", "file", "image", "filename", "path")


@dataclasses.dataclass(frozen=True)
class PlannedImage:
    """One image file to generate.

    Attributes:
      file: its path below images/, separated by '/'.
      prompt: the text.
      seed: seed of its first tile.
      tiles: 1, or 4 for a 2×2 grid of images with seeds `seed` … `seed + 3`, row by row.
    """

    file: str
    prompt: str
    seed: int
    tiles: int = 1


class Captions(NamedTuple):
    """The captions of a file, in order, and the names of their images if the file gives all of them."""

    texts: list[str]
    names: list[str] | None


def read_captions(path: str | Path) -> Captions:
    """Reads the captions of a file.

    Args:
      path: a .txt file with one caption per line; .tsv or .csv with a column 'caption', 'prompt' or 'text';
        .json or .jsonl with strings, or with objects that have such a field. A column or field 'file_name',
        'file', 'image', 'filename' or 'path' names the image; so does the key in a .json file that is one
        object.

    Raises:
      UserError: the file cannot be read, has no captions, or has an empty one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"caption file '{path}' cannot be read ({system_reason(error)}): give a file of UTF-8 text."
        ) from error
    names: list[str | None] | None = None
    suffix = path.suffix.lower()
    try:
        if suffix in (".tsv", ".csv"):
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
            table = csv.DictReader(io.StringIO(text), **dialect)
            items = []
            for item in table:
                if None in item:
                    raise ValueError(f"line {table.line_num} has more cells than the first line")
                items.append(item)
        elif suffix == ".json":
            items = parse_json(text, lenient=True)
            if isinstance(items, dict):
                names, items = list(items), list(items.values())
        elif suffix == ".jsonl":
            items = [parse_json(line, lenient=True) for line in text.split("\n") if line.strip()]
        else:
            items = [line for line in text.split("\n") if line.strip()]
        captions = [_caption(item).strip() for item in items]
        names = names or [_field(item, _NAME_FIELDS) for item in items]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"caption file '{path}' has an unexpected format: {error}.") from error
    if not captions or not all(captions):
        raise UserError(
            f"caption file '{path}' has {len(captions)} captions, {captions.count('')} of them empty."
        )
    if None in names and any(names):
        raise UserError(
            f"caption file '{path}': {names.count(None)} of {len(names)} captions do not name their image: "
            "name all images or none."
        )
    return Captions(captions, names if all(names) else None)


def _caption(item: Any) -> str:
    text = item if isinstance(item, str) else _field(item, _CAPTION_FIELDS)
    if text is None:
        raise ValueError(f"an entry has none of the fields {', '.join(_CAPTION_FIELDS)}")
    return text


def _field(item: Any, fields: Sequence[str]) -> str | None:
    """The value of the first of these fields that an object has."""
    found = None if isinstance(item, str) else next((item[name] for name in fields if item.get(name)), None)
    if not isinstance(found, str | None):
        raise ValueError(f"{found!r} is not text")
    return found


def check_planned(planned: Sequence[PlannedImage]) -> None:
    """Checks the images of a plan, before anything is written.

    Raises:
      UserError: there are none, two have the same file name, or the name, the prompt or a seed of one is not
        possible.
    """
    if not planned:
        raise UserError("there are no prompts: give a file that has at least one.")
    for image in planned:
        for part in image.file.split("/"):
            try:
                size = len(part.encode())
            except UnicodeEncodeError:
                size = 0
            if part in ("", ".", "..") or "\0" in part or not 0 < size <= LONGEST_NAME:
                raise UserError(
                    f"an image would be named '{short(image.file)}': a name must have 1 to {LONGEST_NAME} "
                    "bytes and no '/' or NUL, and be Unicode; change the prompt or the id."
                )
        try:
            captions_of(image.prompt)
        except Refused as refused:
            raise UserError(f"the prompt of image '{image.file}': {refused.text}; correct it.") from None
        last = image.seed + image.tiles - 1
        if last > LARGEST_SEED:
            raise UserError(
                f"the seed of image '{image.file}' would be {short(last)}, over {LARGEST_SEED}; "
                "give a smaller --seed."
            )
    for first, second in itertools.pairwise(sorted(image.file for image in planned)):
        if first == second:
            raise UserError(f"two images would be named '{first}': the prompts or ids must differ.")


def generate_images(
    pipe: Callable[..., np.ndarray],
    planned: Sequence[PlannedImage],
    out: Path,
    settings: Mapping[str, Any],
    *,
    arguments: Mapping[str, Any],
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 4,
    files: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Generates the planned images that do not exist yet.

    Args:
      pipe: (prompts, seed, images_per_prompt, batch_size, **arguments) -> uint8 [N, H, W, C], such as a
        `pixart_jax.pipeline.Pipeline`.
      planned: the images of all shards; all with the same number of tiles.
      out: the folder described at the top of this file.
      settings: stored in `out`; must equal the settings of images that are already there.
      arguments: further arguments of `pipe`.
      shard: (i, n) generates every n-th image, starting with image i (counted from 0).
      batch_size: images per device at a time.
      files: texts of files beside the images, by their path.

    Returns:
      how many images were generated.

    Raises:
      UserError: an image cannot be generated (see `check_planned`), or the folder has other settings.
    """
    import jax

    check_planned(planned)
    _agree(out / SETTINGS, dict(settings))
    plan = "".join(json.dumps(dataclasses.asdict(image), ensure_ascii=False) + "\n" for image in planned)
    write_text(out / PLAN, plan)
    for file, text in files.items():
        write_text(out / IMAGES / file, text)
    pending = [image for image in planned[shard[0] :: shard[1]] if not (out / IMAGES / image.file).exists()]
    tiles = planned[0].tiles
    size = max(_BATCHES * batch_size * len(jax.local_devices()) // tiles, 1)
    with tqdm(total=len(pending), desc="images", disable=None) as bar:
        for start in range(0, len(pending), size):
            part = pending[start : start + size]
            images = pipe(
                [image.prompt for image in part],
                seed=[image.seed for image in part],
                images_per_prompt=tiles,
                batch_size=batch_size,
                **arguments,
            )
            for number, image in enumerate(part):
                _save(out, image, images[number * tiles : (number + 1) * tiles])
            bar.update(len(part))
    return len(pending)


def check_complete(planned: Sequence[PlannedImage], out: Path) -> None:
    """Checks that OUT/images holds all planned images and no others.

    Raises:
      UserError: an image is missing, or a benchmark would mistake another file for one of its images.
    """
    root = out / IMAGES
    files = {image.file for image in planned}
    missing = sorted(file for file in files if not (root / file).is_file())
    if missing:
        raise UserError(
            f"'{root}' lacks {len(missing)} of {len(files)} images, such as '{missing[0]}': run all shards."
        )
    for folder in sorted({(root / file).parent for file in files}):
        for path in sorted(folder.iterdir()):
            name = path.relative_to(root).as_posix()
            if path.suffix in (".png", ".jpg") and name not in files:
                raise UserError(
                    f"'{path}' does not belong to this benchmark, which would read it: move it away."
                )


def read_run_settings(out: Path) -> dict[str, Any]:
    """The settings that the images of a folder were generated with; {} if `evaluate` did not make them."""
    path, text = out / SETTINGS, OrNull(str)
    # The other settings are only compared and shown.
    shape = {"model?": text, "weights?": text, "benchmark?": str, "captions?": text, "sampler?": text}
    return read_json(path, _FIX, shape, lenient=True) if path.is_file() else {}


def read_plan(out: Path) -> list[PlannedImage]:
    """The images that `generate_images` planned for a folder; [] if `evaluate` did not make the folder."""
    path = out / PLAN
    shape = {"file": str, "prompt": str, "seed": int, "tiles": range(1, 2**16)}
    lines = read_json_lines(path, _FIX, shape)
    return [PlannedImage(**{name: line[name] for name in shape}) for _, line in lines]


def _agree(path: Path, settings: dict[str, Any]) -> None:
    """Stores the settings, or compares them with the stored ones."""
    stored = read_run_settings(path.parent)
    if stored:
        differing = [
            f"{name} {stored.get(name)!r}, now {settings.get(name)!r}"
            for name in {**settings, **stored}
            if stored.get(name) != settings.get(name)
        ]
        if differing:
            raise UserError(
                f"'{path.parent}' was generated with {'; '.join(differing)}: give the same settings or "
                "another --out."
            )
        return
    write_json(path, settings)


def _save(out: Path, planned: PlannedImage, images: np.ndarray) -> None:
    if images.shape[3] == 1:
        images = images.repeat(3, axis=3)
    if planned.tiles == 4:
        if images.shape[1] != images.shape[2]:
            raise UserError(
                f"images are {images.shape[2]}x{images.shape[1]}: the benchmark cuts grids into squares; "
                "give --height and --width the same value."
            )
        pixels = np.concatenate([np.concatenate(list(row), axis=1) for row in (images[:2], images[2:])])
    else:
        (pixels,) = images
    path = out / IMAGES / planned.file
    options = {"format": "JPEG", "quality": JPEG_QUALITY} if path.suffix == ".jpg" else {"format": "PNG"}
    # The temporary file is not in the folder of the image, because a benchmark lists that folder.
    with replacing(path, folder=out) as temporary:
        Image.fromarray(pixels).save(temporary, **options)
