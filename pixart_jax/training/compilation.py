"""Ahead-of-time compilation of the training step for all buckets, and the persistent compilation cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from pixart_jax.training import sharding


def keep_compiled(folder: str) -> None:
    """Stores all programs compiled from now on in `folder`, so that later runs can load them."""
    jax.config.update("jax_compilation_cache_dir", folder)
    # Cache small programs too, because a run starts with dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX initializes the cache when it compiles the first program. If that has happened, it must do so again.
    compilation_cache.reset_cache()


def compile_ahead(
    step: Any, state: Any, batches: Sequence[Mapping[str, Any]], mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """Compiles a step for several batch shapes in parallel.

    Args:
      step: jitted function (state, batch) -> ....
      state: the state of later calls, or its shapes and shardings.
      batches: for each bucket, the arrays of a global batch or their shapes and dtypes, by name.
      mesh: mesh over which batches are sharded.

    Returns:
      A function like `step` that calls the compiled program for the latent shape of the batch.
    """
    rows = sharding.batch_sharding(mesh)
    lowered = {}
    for batch in batches:
        arrays = {n: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=rows) for n, spec in batch.items()}
        lowered[batch["latent_mean"].shape] = step.lower(state, arrays)
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values())))
    return lambda state, batch: compiled[batch["latent_mean"].shape](state, batch)
