"""Generates the images of many requests: in batches of equal settings, each text encoded once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pixart_jax.pipeline.array_files import read_embeddings_row, read_latents_row
from pixart_jax.pipeline.generation import Step
from pixart_jax.pipeline.pipeline import Embeddings, Pipeline
from pixart_jax.pipeline.requests import BATCH, IMAGE, PROGRAM, Request, names_of

# Number of requests whose texts are encoded before the first of them is generated.
TEXT_BLOCK = 128

_SHARED = (*names_of(BATCH), *names_of(PROGRAM))
_OWN = names_of(IMAGE)


def generate(
    pipe: Pipeline,
    requests: Sequence[Request],
    batch_size: int | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Generates the images of requests, those with equal settings together.

    Args:
      pipe: the pipeline.
      requests: in any order.
      batch_size, callback: see `Pipeline.__call__`. Each batch is one call.

    Yields:
      (index into `requests`, uint8 [H, W, 3], latents [h, w, C]) as images are finished.

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
            shared = [getattr(requests[i], name) for name in _SHARED]
            # A batch has an array, such as a mask, for all of its images or for none.
            own = [getattr(requests[i], name) is not None for name in _OWN]
            groups.setdefault(json.dumps([shared, own]), []).append(i)
        for group in groups.values():
            size = pipe.generator.per_device(len(group), batch_size) * len(pipe.generator.devices)
            for first in range(0, len(group), size):
                indices = group[first : first + size]
                arguments = _arguments([requests[i] for i in indices])
                images, latents = pipe(**arguments, batch_size=batch_size, output="both", callback=callback)
                yield from zip(indices, images, latents)


def _arguments(batch: Sequence[Request]) -> dict[str, Any]:
    """The arguments of `Pipeline.__call__` for requests that agree in all but the fields of scope IMAGE."""
    first = batch[0]
    arguments = {name: getattr(first, name) for name in _SHARED}
    for name in _OWN:
        if getattr(first, name) is not None:
            arguments[name] = [getattr(request, name) for request in batch]
    prompts, latents = arguments.pop("prompt"), arguments.pop("latents", None)
    if latents is not None:
        arguments["latents"] = np.stack([read_latents_row(*row) for row in latents])
    if "embeddings" not in arguments:
        return arguments | {"prompts": prompts}
    del arguments["negative_prompt"]
    rows = [read_embeddings_row(*row) for row in arguments["embeddings"]]
    for name, prefix in (("embeddings", ""), ("negative_embeddings", "negative_")):
        arguments[name] = Embeddings(
            *(np.stack([row[prefix + part] for row in rows]) for part in ("text", "mask"))
        )
    return arguments
