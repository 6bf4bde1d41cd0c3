"""Text features and starting noise in files, and the requests that read them.

Axes: P prompts, N images, S text tokens, T text width, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.files import replacing
from pixart_jax.pipeline.generation import float_rows, text_rows
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import Request, with_consecutive_seeds


def save_embeddings(path: Path, pipe: Pipeline, requests: Sequence[Sequence[Request]]) -> None:
    """Writes a .npz file with the features of each prompt and of its negative prompt.

    Its arrays are prompts [P], text [P, S, T] and mask [P, S], and negative_prompts, negative_text and
    negative_mask likewise.
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
    """Like `read_requests`, but from a file that `save_embeddings` wrote.

    Raises:
      UserError: no such file, a file without these arrays, arrays that do not fit together, or features that
        are not finite.
    """
    arrays = _embedding_arrays(path)
    out = []
    for row, (prompt, negative) in enumerate(zip(arrays["prompts"], arrays["negative_prompts"])):
        own = {"prompt": str(prompt), "negative_prompt": str(negative), "embeddings": [path, row]}
        out.append(with_consecutive_seeds(Request.from_dict({**(defaults or {}), **own}), images_per_prompt))
    return out


def with_latents(requests: Sequence[Sequence[Request]], path: str) -> list[list[Request]]:
    """Gives each image its row of a .npy file of starting noise, [N, h, w, C].

    Raises:
      UserError: no such file, a file with another number of rows, or with values that are not finite real
        numbers.
    """
    noise = _load(path)
    count = sum(map(len, requests))
    if isinstance(noise, Mapping) or noise.ndim != 4 or len(noise) != count:
        shape = "not a single array" if isinstance(noise, Mapping) else list(noise.shape)
        raise UserError(f"latents '{path}' are {shape}: give [{count}, h, w, C], one row for each image.")
    float_rows(f"latents '{path}'", noise, [request.prompt for images in requests for request in images])
    rows = itertools.count()
    return [[dataclasses.replace(each, latents=(path, next(rows))) for each in images] for images in requests]


def read_latents_row(path: str, row: int) -> np.ndarray:
    """Starting noise of one image, float32 [h, w, C].

    Raises:
      UserError: no such file or row, or values that are not finite real numbers.
    """
    noise = _load(path)
    if isinstance(noise, Mapping) or noise.ndim != 4:
        raise UserError(f"latents '{path}' are not a single array [images, h, w, C]: give such a .npy file.")
    _check_row(path, row, len(noise))
    return float_rows(f"latents '{path}', from row {row},", noise[row : row + 1])[0]


def read_embeddings_row(path: str, row: int) -> dict[str, np.ndarray]:
    """Features of one prompt: text and negative_text [S, T], mask and negative_mask [S].

    Raises:
      UserError: no such file or row, a file without these arrays, or features that are not finite.
    """
    arrays = _embedding_arrays(path)
    _check_row(path, row, len(arrays["text"]))
    return {name: arrays[name][row] for name in ("text", "mask", "negative_text", "negative_mask")}


def _check_row(path: str, row: int, count: int) -> None:
    if not 0 <= row < count:
        raise UserError(f"'{path}' has no row {row}: it has the rows 0 to {count - 1}.")


@functools.lru_cache(maxsize=1)
def _embedding_arrays(path: str) -> dict[str, np.ndarray]:
    """All arrays of a file of embeddings."""
    arrays = _load(path)
    needed = ("prompts", "negative_prompts", "text", "mask", "negative_text", "negative_mask")
    missing = [name for name in needed if not isinstance(arrays, Mapping) or name not in arrays]
    if missing:
        raise UserError(
            f"embeddings '{path}' have no {', '.join(missing)}: make them with --save_embeddings."
        )
    try:
        found = {name: arrays[name] for name in needed}
    except ValueError as error:
        raise UserError(f"'{path}' cannot be read ({error}): make it with --save_embeddings.") from None
    prompts = [str(prompt) for prompt in np.atleast_1d(found["prompts"])]
    for prefix in ("", "negative_"):
        text, mask = f"{prefix}text", f"{prefix}mask"
        name = f"{text} of embeddings '{path}'"
        found[text], found[mask] = text_rows(name, found[text], found[mask], prompts)
    counts = {name: np.atleast_1d(array).shape[0] for name, array in found.items()}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"embeddings '{path}' have different numbers of rows: {each}. Give one per prompt.")
    return found


def _load(path: str) -> Any:
    try:
        return np.load(path, mmap_mode=None if path.endswith(".npz") else "r")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' cannot be read ({error}): give a .npy or .npz file.") from None
