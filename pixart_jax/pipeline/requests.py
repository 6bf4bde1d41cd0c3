"""What is to be drawn, one `Request` an image: read from text, file or JSONL, and drawn in batches."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixart_jax import __version__
from pixart_jax.errors import UserError, did_you_mean
from pixart_jax.files import replacing, sha256_of_file
from pixart_jax.pipeline import Embeddings, Pipeline
from pixart_jax.pipeline.drawing import seed_rows
from pixart_jax.pipeline.editing import default_strength
from pixart_jax.pipeline.sizes import Size

# Requests whose texts are encoded before any of them is drawn.
TEXT_BLOCK = 128

_NUMBER = (int, float)
# Types of the fields as JSON has them; None is always allowed where it is the default.
_TYPES: Mapping[str, Any] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "steps": int,
    "guidance_scale": _NUMBER,
    "guidance_interval": list,
    "guidance_rescale": _NUMBER,
    "sampler": str,
    "sampler_options": dict,
    "height": int,
    "width": int,
    "aspect_ratio": str,
    "binning": bool,
    "image": str,
    "mask": str,
    "strength": _NUMBER,
    "embeddings": list,
    "latents": list,
}
# Fields that differ between the images of one batch.
_OWN = ("prompt", "negative_prompt", "seed", "image", "mask", "embeddings", "latents")


@dataclasses.dataclass(frozen=True)
class Request:
    """One image. Fields are arguments of `Pipeline.__call__`; files are named by their paths."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance_scale: float | None = None
    guidance_interval: list[float] | None = None
    guidance_rescale: float = 0.0
    sampler: str = "dpm_solver"
    sampler_options: dict[str, Any] | None = None
    height: int | None = None
    width: int | None = None
    aspect_ratio: str | None = None
    binning: bool = True
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    # [file, row]: features as `save_embeddings` writes them, and starting noise, .npy [N, h, w, C].
    embeddings: list | None = None
    latents: list | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Request:
        """Checks names and types.

        Raises:
          UserError: an unknown field, one of the wrong type, or no prompt.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in _TYPES:
                raise UserError(f"{where}field '{name}' is unknown.{did_you_mean(name, _TYPES)}")
            if value is None and defaults[name] is None:
                continue
            if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and _TYPES[name] is not bool):
                raise UserError(f"{where}{name} is {value!r}: it has the wrong type.")
        if "prompt" not in values:
            raise UserError(f"{where}there is no prompt: give one in the field 'prompt'.")
        interval = values.get("guidance_interval")
        if interval is not None and (len(interval) != 2 or not all(isinstance(t, _NUMBER) for t in interval)):
            raise UserError(f"{where}guidance_interval is {interval}: give [low, high] timesteps.")
        return cls(**values)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files it reads."""
        rows = (row[0] for row in (self.embeddings, self.latents) if row is not None)
        return tuple(dict.fromkeys(path for path in (self.image, self.mask, *rows) if path is not None))


def read_requests(
    source: str, defaults: Mapping[str, Any] | None = None, images_per_prompt: int = 1
) -> list[list[Request]]:
    """Reads prompts.

    Args:
      source: a prompt; or a file with one on each line, empty lines left out; or a .jsonl file, whose lines
        hold fields of `Request`, and 'images_per_prompt'. Files a line names are beside the JSONL file.
      defaults: fields of every request that does not have its own.
      images_per_prompt: requests made of each prompt, with seeds one apart.

    Returns:
      The requests of each prompt.

    Raises:
      UserError: no prompt, an unreadable file, or a line that is not right, with its number.
    """
    defaults, path = dict(defaults or {}), Path(source)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a file name, or with a NUL
        is_file = False
    if not is_file and path.suffix in (".txt", ".jsonl") and len(source.split()) == 1:
        raise UserError(f"prompts '{source}': there is no such file.")
    try:
        # Not splitlines(), which also breaks at characters that a prompt may hold.
        lines = (
            path.read_text(encoding="utf-8-sig").split("\n") if is_file else [" ".join(source.split("\n"))]
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts '{source}' cannot be read ({error}): give a text file in UTF-8.") from None
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        values, where, count = {"prompt": line.strip()}, "", images_per_prompt
        if is_file and path.suffix == ".jsonl":
            where = f"line {number} of '{source}': "
            values, count = _parse_line(line, where, path.parent, images_per_prompt)
        # A size of the line's own leaves none of the other kind.
        sides = ("height", "width") if "aspect_ratio" in values else ()
        ratio = ("aspect_ratio",) if {"height", "width"} & set(values) else ()
        kept = {name: value for name, value in defaults.items() if name not in (*sides, *ratio)}
        request = Request.from_dict({**kept, **values}, where)
        out.append([dataclasses.replace(request, seed=request.seed + k) for k in range(count)])
    if not out:
        raise UserError(f"prompts '{source}' hold no prompt: give a text, or a file with one on each line.")
    return out


def _parse_line(line: str, where: str, folder: Path, images: int) -> tuple[dict[str, Any], int]:
    """Fields of a line, and its number of images."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}no JSON ({error}).") from None
    if not isinstance(values, dict):
        raise UserError(f'{where}{line.strip()[:40]} is no JSON object: give {{"prompt": ...}}.')
    images = values.pop("images_per_prompt", images)
    if type(images) is not int or images < 1:
        raise UserError(f"{where}images_per_prompt is {images!r}: it must be a whole number of at least 1.")
    for name in ("image", "mask"):
        if isinstance(values.get(name), str):
            values[name] = str(folder / values[name])
    return values, images


def resolve(pipe: Pipeline, request: Request) -> tuple[Request, Size]:
    """The request with the values that are otherwise the weights' own, checked, and the size it is drawn at.

    Raises:
      UserError: a value that the pipeline cannot draw.
    """
    shared = _shared(request)
    scale, strength = shared.pop("guidance_scale"), shared.pop("strength")
    if strength is not None and request.image is None:
        raise UserError(f"strength is {strength}, and there is no image to start from: give one.")
    if request.mask is not None and request.image is None:
        raise UserError(f"mask '{request.mask}' comes without image: give the image it is for.")
    seed_rows(request.seed, 1, 1)
    if request.image is not None and strength is None:
        strength = default_strength(request.image, request.mask)
    size, settings = pipe.settings(**shared, strength=1.0 if strength is None else strength)
    sides = {"height": size.out_height, "width": size.out_width} if request.aspect_ratio is None else {}
    resolved = dataclasses.replace(
        request,
        strength=strength,
        guidance_scale=pipe.config.guidance.scale if scale is None else scale,
        sampler_options=json.loads(json.dumps(dict(settings.options))),
        **sides,
    )
    return resolved, size


def draw(
    pipe: Pipeline, requests: Sequence[Request], batch_size: int | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Draws requests, those of equal settings together.

    Args:
      pipe: draws.
      requests: in any order.
      batch_size: images a device draws at a time.

    Yields:
      (index into `requests`, uint8 [H, W, 3], latents [h, w, C]) as they are done.

    Raises:
      UserError: see `Pipeline.__call__`.
    """
    for start in range(0, len(requests), TEXT_BLOCK):
        block = range(start, min(start + TEXT_BLOCK, len(requests)))
        texts = [requests[i] for i in block if requests[i].embeddings is None]
        if texts:
            pipe.prepare([each.prompt for each in texts], [each.negative_prompt for each in texts])
        groups: dict[str, list[int]] = {}
        for i in block:
            # What each image has of its own must be there for all of a batch or for none.
            own = [getattr(requests[i], name) is not None for name in _OWN]
            groups.setdefault(json.dumps([_shared(requests[i]), own]), []).append(i)
        for group in groups.values():
            size = pipe.drawer.per_device(len(group), batch_size) * len(pipe.drawer.devices)
            for first in range(0, len(group), size):
                indices = group[first : first + size]
                batch = [requests[i] for i in indices]
                images, latents = pipe(
                    **_own(batch), **_shared(batch[0]), batch_size=batch_size, output="both"
                )
                yield from zip(indices, images, latents)


def _shared(request: Request) -> dict[str, Any]:
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    return {name: value for name, value in fields.items() if name not in _OWN}


def _own(batch: Sequence[Request]) -> dict[str, Any]:
    """Arguments of the pipeline for what differs between images."""
    out: dict[str, Any] = {"seed": [request.seed for request in batch]}
    for name in ("image", "mask"):
        if getattr(batch[0], name) is not None:
            out[name] = [getattr(request, name) for request in batch]
    if batch[0].latents is not None:
        out["latents"] = np.stack([_latents_row(*request.latents) for request in batch])
    if batch[0].embeddings is None:
        return out | {
            "prompts": [request.prompt for request in batch],
            "negative_prompt": [request.negative_prompt for request in batch],
        }
    rows = [_embedding_rows(*request.embeddings) for request in batch]
    out["embeddings"] = Embeddings(*(np.stack([row[name] for row in rows]) for name in ("text", "mask")))
    out["negative_embeddings"] = Embeddings(
        *(np.stack([row[f"negative_{name}"] for row in rows]) for name in ("text", "mask"))
    )
    return out


# --- Files


def save_embeddings(path: Path, pipe: Pipeline, requests: Sequence[Sequence[Request]]) -> None:
    """Writes .npz with the features of every prompt and of what it is guided away from.

    prompts [P], text [P, S, T], mask [P, S]; negative_prompts, negative_text, negative_mask likewise.
    """
    first = [images[0] for images in requests]
    prompts, negatives = [each.prompt for each in first], [each.negative_prompt for each in first]
    positive, negative = pipe.prepare(prompts, negatives)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            prompts=np.array(prompts),
            text=positive.text,
            mask=positive.mask,
            negative_prompts=np.array(negatives),
            negative_text=negative.text,
            negative_mask=negative.mask,
        )


def requests_of_embeddings(
    path: str, defaults: Mapping[str, Any] | None = None, images_per_prompt: int = 1
) -> list[list[Request]]:
    """As `read_requests`, from a file of `save_embeddings`.

    Raises:
      UserError: no such file, or one without the arrays.
    """
    arrays = _load(path)
    needed = ("prompts", "negative_prompts", "text", "mask", "negative_text", "negative_mask")
    missing = [name for name in needed if not isinstance(arrays, Mapping) or name not in arrays]
    if missing:
        raise UserError(
            f"embeddings '{path}' have no {', '.join(missing)}: make them with --save_embeddings."
        )
    out = []
    for row, (prompt, negative) in enumerate(zip(arrays["prompts"], arrays["negative_prompts"])):
        own = {"prompt": str(prompt), "negative_prompt": str(negative), "embeddings": [path, row]}
        request = Request.from_dict({**(defaults or {}), **own})
        out.append([dataclasses.replace(request, seed=request.seed + k) for k in range(images_per_prompt)])
    return out


def with_latents(requests: Sequence[Sequence[Request]], path: str) -> list[list[Request]]:
    """Gives every image its row of a .npy file [N, h, w, C] of starting noise.

    Raises:
      UserError: no such file, or another number of rows.
    """
    noise = _load(path)
    count = sum(map(len, requests))
    if isinstance(noise, Mapping) or noise.ndim != 4 or len(noise) != count:
        shape = "no array" if isinstance(noise, Mapping) else list(noise.shape)
        raise UserError(f"latents '{path}' are {shape}: give [{count}, h, w, C], a row for each image.")
    rows = itertools.count()
    return [[dataclasses.replace(each, latents=[path, next(rows)]) for each in images] for images in requests]


def _load(path: str) -> Any:
    try:
        return np.load(path, mmap_mode=None if path.endswith(".npz") else "r")
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): give a .npy or .npz file.") from None


def _latents_row(path: str, row: int) -> np.ndarray:
    return np.asarray(_load(path)[row], np.float32)


@functools.lru_cache(maxsize=1)
def _embedding_arrays(path: str) -> dict[str, np.ndarray]:
    arrays = _load(path)
    return {name: arrays[name] for name in ("text", "mask", "negative_text", "negative_mask")}


def _embedding_rows(path: str, row: int) -> dict[str, np.ndarray]:
    return {name: array[row] for name, array in _embedding_arrays(path).items()}


def sha256_of(path: str) -> str:
    """Of a file that a request reads.

    Raises:
      UserError: it is not there.
    """
    try:
        return _sha256(path, os.stat(path).st_mtime_ns)
    except OSError:
        raise UserError(f"'{path}' is not there, and the request reads it.") from None


@functools.lru_cache
def _sha256(path: str, mtime: int) -> str:
    """Once for all the images that read the file, as long as nobody writes to it."""
    return sha256_of_file(path)


def make_record(
    pipe: Pipeline, request: Request, source: Mapping[str, Any], batch_size: int
) -> dict[str, Any]:
    """What a PNG carries: enough to draw it again, and to know whether that is what was drawn.

    Args:
      pipe: that draws it.
      request: as `resolve` gives it.
      source: arguments of `load_pipeline`.
      batch_size: images a device draws at a time; on accelerators it decides the last bits.
    """
    fields = dataclasses.asdict(request)
    return {
        "request": {name: value for name, value in fields.items() if value is not None},
        "source": dict(source),
        "fingerprint": pipe.fingerprint,
        "files": {path: sha256_of(path) for path in request.files},
        "made_with": {
            "pixart_jax": __version__,
            "jax": jax.__version__,
            "device": pipe.drawer.devices[0].device_kind,
            "dtype": pipe.model.config.dtype,
            "batch_size": batch_size,
        },
    }
