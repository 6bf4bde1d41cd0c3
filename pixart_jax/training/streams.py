"""Random streams: one per purpose, so that no two purposes ever use the same random numbers."""

from __future__ import annotations

import enum

import jax


class Stream(enum.IntEnum):
    """What random numbers are for. The values are folded into the seed; changing one changes every run."""

    INIT = 0
    SAMPLES = 1
    VALIDATION = 0x76616C
    AFTER_UPDATE = 3


def stream_key(seed: int | jax.Array, stream: Stream) -> jax.Array:
    """The root key of a stream of a run."""
    key = jax.random.key(seed)
    return jax.random.fold_in(key, stream) if stream == Stream.VALIDATION else key


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample, a function of the stream and of the sample's index alone.

    Args:
      key: root of a stream.
      index: [B] uint32, positions in the shuffled sequence of samples.

    Returns:
      [B] keys.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
