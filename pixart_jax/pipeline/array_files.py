"""Text features and starting noise in files, and the requests that read them.

Axes: P prompts, N images, S text tokens, T text width, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.files import replacing
from pixart_jax.pipeline.generation import float_rows, text_rows
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import Request, with_consecutive_seeds
from pixart_jax.readers import read_array, read_arrays

# The arrays of a file of embeddings.
_EMBEDDINGS = ("prompts", "negative_prompts", "text", "mask", "negative_text", "negative_mask")
_FIX_LATENTS = "give a .npy file [images, h, w, C]"


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
    noise = read_array(path, _FIX_LATENTS)
    count = sum(map(len, requests))
    if noise.ndim != 4 or len(noise) != count:
        raise UserError(
            f"latents '{path}' are {list(noise.shape)}: give [{count}, h, w, C], one row for each image."
        )
    float_rows(f"latents '{path}'", noise, [request.prompt for images in requests for request in images])
    rows = itertools.count()
    return [[dataclasses.replace(each, latents=(path, next(rows))) for each in images] for images in requests]


def read_latents_row(path: str, row: int) -> np.ndarray:
    """Starting noise of one image, float32 [h, w, C].

    Raises:
      UserError: no such file or row, or values that are not finite real numbers.
    """
    noise = read_array(path, _FIX_LATENTS)
    if noise.ndim != 4:
        raise UserError(f"latents '{path}' are {list(noise.shape)}: give [images, h, w, C].")
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
        rows = f"the rows 0 to {count - 1}" if count else "no rows"
        raise UserError(f"'{path}' has no row {row}: it has {rows}.")


@functools.lru_cache(maxsize=1)
def _embedding_arrays(path: str) -> dict[str, Any]:
    """All arrays of a file of embeddings."""
    found = read_arrays(path, _EMBEDDINGS, "make it with --save_embeddings")
    for name in ("prompts", "negative_prompts"):
        found[name] = _texts(f"{name} of embeddings '{path}'", found[name])
    for prefix in ("", "negative_"):
        text, mask = f"{prefix}text", f"{prefix}mask"
        name = f"{text} of embeddings '{path}'"
        found[text], found[mask] = text_rows(name, found[text], found[mask], found["prompts"])
    counts = {name: len(array) for name, array in found.items()}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"embeddings '{path}' have different numbers of rows: {each}. Give one per prompt.")
    if not found["prompts"]:
        raise UserError(f"embeddings '{path}' have no rows: give one per prompt.")
    return found


def _texts(name: str, values: np.ndarray) -> list[str]:
    if values.dtype.kind != "U" or values.ndim != 1:
        raise UserError(f"{name} are {values.dtype} {list(values.shape)}: give text, [prompts].")
    try:
        return [str(value) for value in values]
    except (ValueError, SystemError):  # NumPy does not check the numbers of characters
        raise UserError(f"{name} have characters that are not Unicode: remove them.") from None
