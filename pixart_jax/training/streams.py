"""Random streams of a run, one for each purpose."""

from __future__ import annotations

import enum

import jax


class Stream(enum.IntEnum):
    """Purposes of random numbers. Changing a value changes the results of every run."""

    INIT = 0
    SAMPLES = 1
    VALIDATION = 0x76616C
    AFTER_UPDATE = 3


def stream_key(seed: int | jax.Array, stream: Stream) -> jax.Array:
    """Returns the root key of a stream of a run."""
    key = jax.random.key(seed)
    return jax.random.fold_in(key, stream) if stream == Stream.VALIDATION else key


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one key per sample, which depends only on the stream and on the index of the sample.

    Args:
      key: root key of a stream.
      index: [B] uint32, positions in the shuffled sequence of samples.

    Returns:
      [B] keys.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
