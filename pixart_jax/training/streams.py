"""Random streams: one per purpose, so that no two purposes use the same random numbers.

The key of an image that is sampled is `jax.random.key(seed)` itself (`sampling.image_keys`). A run folds the
constant of a stream into its seed first, so its keys differ from those of images with the same seed.
"""

from __future__ import annotations

import enum

import jax


class Stream(enum.IntEnum):
    """The purpose of random numbers. Changing a value changes the bits of every run."""

    # Large values, so that they do not meet the small numbers that samplers fold into the key of an image.
    INIT = 0x696E6974  # initial weights
    SAMPLES = 0x73616D70  # noise, timestep, dropped condition and routed tokens of a training sample
    AFTER_UPDATE = 0x75706474  # an objective's `after_update`
    VALIDATION = 0x76616C64  # noise of a validation record


def stream_key(seed: int | jax.Array, stream: Stream) -> jax.Array:
    """The root key of a stream."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample, a function of the stream and of the sample's index alone.

    Args:
      key: root of a stream.
      index: [B] uint32, positions in the shuffled sequence of samples.

    Returns:
      [B] keys.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
