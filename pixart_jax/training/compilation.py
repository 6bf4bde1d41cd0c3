"""Compiling the step of every bucket before training starts, and keeping compiled programs on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from pixart_jax.training import sharding


def keep_compiled(folder: str) -> None:
    """Keeps every program compiled from now on in a folder, where the next run finds it."""
    jax.config.update("jax_compilation_cache_dir", folder)
    # Small programs too: a run starts with dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Whatever was compiled before has settled that there is no folder.
    compilation_cache.reset_cache()


def compile_ahead(
    step: Any, state: Any, batches: Sequence[Mapping[str, Any]], mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """Compiles a step for each shape of batch, all at the same time.

    Args:
      step: (state, batch) -> ..., jitted.
      state: as it will be given, or its shapes with their shardings.
      batches: per bucket, name to something with the shape and dtype of the global batch's array.
      mesh: that batches are spread over.

    Returns:
      the step; a call goes to the program of the batch's latent shape.
    """
    rows = sharding.batch_sharding(mesh)
    lowered = {}
    for batch in batches:
        arrays = {n: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=rows) for n, spec in batch.items()}
        lowered[batch["latent_mean"].shape] = step.lower(state, arrays)
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values())))
    return lambda state, batch: compiled[batch["latent_mean"].shape](state, batch)
