"""Stores the moments of an optimizer in bfloat16 or in 8 bits, for AdamW and Lion.

Moments are rounded stochastically, so that their expectation is exact. Rounding to nearest would stop a
second moment: with a decay of 0.999 an update changes it by a thousandth of its distance to g^2, which is
less than half a unit in the last place of bfloat16 (2^-9), and much less than a step of 8 bits. The random
numbers are a function of the seed of the run and the number of updates, so a resumed run has the same bits.

No library does this for optax: optax casts only the first moment, to nearest (`mu_dtype`). flashoptim-jax
0.1.0 has 8-bit states, but it is not an optax transformation (it changes the parameters itself), rounds to
nearest, and knows no sharding.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pixart_jax.training.objectives import Stream, stream_key

# Largest number of values that share a scale in 8 bits. It is 2048 in arXiv 2110.02861, and 256 in later
# versions of its code (bitsandbytes).
BLOCK = 256
# code = levels (|value| / scale)^(1/power): 8 bits cover 4 decades of the first moment and 9 of the second.
_SIGNED = 127, 2
_UNSIGNED = 255, 4


class StoredState(NamedTuple):
    """State of `in_less_memory`.

    Attributes:
      count: [] int32, number of updates.
      values: each moment by name: a tree of arrays with the shapes of the parameters.
      scales: with 8 bits, the scales of the blocks of each moment; otherwise empty.
    """

    count: jax.Array
    values: dict[str, Any]
    scales: dict[str, Any]


def in_less_memory(
    optimizer: optax.GradientTransformation, state: type, dtype: str, seed: int
) -> optax.GradientTransformation:
    """Wraps an optimizer so that its moments are stored in `dtype`. It computes in float32 as before.

    Args:
      optimizer: `optax.scale_by_adam` or `optax.scale_by_lion`.
      state: the class of its state: a NamedTuple of `count` and moments. `nu` is a second moment.
      dtype: 'bfloat16' or 'int8', which is block-wise: see `quantize`.
      seed: seed of the run.
    """
    names = [name for name in state._fields if name != "count"]

    def init(params):
        # All bits of a zero are 0 in every format.
        stored = {"mu": jnp.int8, "nu": jnp.uint8} if dtype == "int8" else dict.fromkeys(names, jnp.bfloat16)
        values = {
            name: jax.tree.map(lambda p, name=name: jnp.zeros(p.shape, stored[name]), params)
            for name in names
        }
        scales = {
            name: jax.tree.map(lambda p: jnp.zeros(_blocks(p.shape), jnp.float32), params)
            for name in names
            if dtype == "int8"
        }
        return StoredState(jnp.zeros((), jnp.int32), values, scales)

    def update(gradients, stored, params=None):
        if dtype == "int8":
            moments = {n: jax.tree.map(dequantize, stored.values[n], stored.scales[n]) for n in names}
        else:
            moments = jax.tree.map(lambda value: value.astype(jnp.float32), stored.values)
        out, new = optimizer.update(gradients, state(count=stored.count, **moments), params)
        values, scales = {}, {}
        key = jax.random.fold_in(stream_key(seed, Stream.ROUNDING), new.count)
        for index, name in enumerate(names):
            leaves, structure = jax.tree.flatten(getattr(new, name))
            keys = jax.random.split(jax.random.fold_in(key, index), len(leaves))
            if dtype == "int8":
                pairs = [quantize(leaf, k, signed=name != "nu") for leaf, k in zip(leaves, keys)]
                codes, parts = zip(*pairs)
                values[name], scales[name] = structure.unflatten(codes), structure.unflatten(parts)
            else:
                values[name] = structure.unflatten(map(round_to_bfloat16, leaves, keys))
        return out, StoredState(new.count, values, scales)

    return optax.GradientTransformation(init, update)


def round_to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two neighbours in bfloat16 at random, so that the expectation is x.

    A bfloat16 is the upper half of a float32. Random bits are added to the lower half, and the carry rounds
    up with the right probability.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (bits >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def quantize(x: jax.Array, key: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """Stores float32 in 8 bits, with a scale per block of at most 256 values.

        x ~ sign(code) scale (|code| / levels)^power

    with 127 levels and power 2 if `signed`, else 255 levels and power 4; `scale` is the largest |x| of the
    block. Small values get finer steps, as in the dynamic codes of bitsandbytes (arXiv 2110.02861), but by a
    formula. Rounding is stochastic, with expectation x. A positive second moment never becomes 0: it is at
    least scale / 255^4, so that an update is divided by no less than 1.5e-5 of the largest root in its block.

    A block is a box within the array instead of 256 consecutive values, so that codes have the shape and
    sharding of the parameter and blocks do not extend over several devices.

    Args:
      x: [...] float32.
      key: random key.
      signed: False if no value is negative.

    Returns:
      codes [...] int8 or uint8, and scales float32 with one value per block.
    """
    levels, power = _SIGNED if signed else _UNSIGNED
    magnitude = _split(jnp.abs(x))
    within = tuple(range(1, magnitude.ndim, 2))
    scale = jnp.max(magnitude, within, keepdims=True)
    share = magnitude / jnp.where(scale > 0, scale, 1)
    root = share
    for _ in range(power.bit_length() - 1):
        root = jnp.sqrt(root)
    low = jnp.floor(root * levels)
    below, above = ((code / levels) ** power for code in (low, low + 1))
    chance = (share - below) / (above - below)
    code = low + (jax.random.uniform(key, x.shape).reshape(share.shape) < chance)
    code = jnp.minimum(code, levels).reshape(x.shape)
    scale = jnp.squeeze(scale, within)
    if signed:
        return (jnp.sign(x) * code).astype(jnp.int8), scale
    return jnp.where(x > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8), scale


def dequantize(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """The inverse of `quantize`: codes [...] and scales -> [...] float32."""
    levels, power = _SIGNED if codes.dtype == jnp.int8 else _UNSIGNED
    share = _split(codes.astype(jnp.float32) / levels)
    values = jnp.sign(share) * jnp.abs(share) ** power
    return (values * jnp.expand_dims(scale, tuple(range(1, share.ndim, 2)))).reshape(codes.shape)


@functools.cache
def _box(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a block: at most `BLOCK` values, preferably along the last axes.

    Along each axis, blocks lie within the shards of 2, 4 or 8 devices; along axes that are large enough to be
    sharded further, of up to 64.
    """
    sizes, left = [], BLOCK
    for size in reversed(shape):
        shard = size // math.gcd(size, 64 if size >= 1024 else 8)
        sizes.append(max(n for n in range(1, min(shard, left) + 1) if shard % n == 0))
        left //= sizes[-1]
    return tuple(reversed(sizes))


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The number of blocks along each axis."""
    return tuple(size // part for size, part in zip(shape, _box(shape)))


def _split(x: jax.Array) -> jax.Array:
    """[n, m, ...] -> [blocks along n, size of a block, blocks along m, size of a block, ...]."""
    parts = zip(_blocks(x.shape), _box(x.shape))
    return x.reshape([size for pair in parts for size in pair])
