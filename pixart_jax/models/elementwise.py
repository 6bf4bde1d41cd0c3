"""Elementwise operations of a block, with hand-written gradients that save memory and memory traffic.

On accelerators these operations are limited by memory bandwidth. Automatic differentiation would save float32
arrays for the backward pass and read them several times. The gradients here save only the inputs, in the
compute dtype.

Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

LAYER_NORM_EPS = 1e-6


@jax.custom_vjp
def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LN(x) (1 + scale) + shift, where LN has no affine parameters.

    Args:
      x: [B, N, D].
      shift, scale: [B, 1, D] float32.

    Returns:
      [B, N, D] in the dtype of `x`, computed in float32.
    """
    return _modulate_forward(x, shift, scale)[0]


@jax.named_scope("modulate")
def _modulate_forward(x: jax.Array, shift: jax.Array, scale: jax.Array):
    x32 = x.astype(jnp.float32)
    # E[x^2] - E[x]^2 needs both sums at once, so XLA reads x a single time. Rounding can make the difference
    # slightly negative.
    mean = x32.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.square(x32).mean(axis=-1, keepdims=True) - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(variance + LAYER_NORM_EPS)
    out = (x32 - mean) * inverse * (1 + scale) + shift
    return out.astype(x.dtype), (x, mean, inverse, scale)


@jax.named_scope("modulate")
def _modulate_backward(residuals, cotangent: jax.Array):
    """dx = (dn - mean(dn) - n mean(dn n)) / sigma with n = LN(x), dn = (1 + scale) dy.

    The residuals are x in its own dtype and two numbers per token. Automatic differentiation would save
    several float32 arrays [B, N, D] and compute an additional sum over the channels, of a term that is
    always zero.
    """
    x, mean, inverse, scale = residuals
    cotangent = cotangent.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    d_normed = cotangent * (1 + scale)
    along = (d_normed * normed).mean(axis=-1, keepdims=True)
    dx = (d_normed - d_normed.mean(axis=-1, keepdims=True) - normed * along) * inverse
    d_shift = cotangent.sum(axis=1, keepdims=True)
    d_scale = (cotangent * normed).sum(axis=1, keepdims=True)
    return dx.astype(x.dtype), d_shift, d_scale


modulate.defvjp(_modulate_forward, _modulate_backward)


@jax.custom_vjp
def add_gated(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """x + gate y, with the product in float32. The backward pass saves y in its own dtype.

    Args:
      x, y: [B, N, D].
      gate: [B, 1, D] float32.

    Returns:
      [B, N, D] in the dtype of `x`.
    """
    return x + (gate * y).astype(x.dtype)


def _add_gated_backward(residuals, cotangent: jax.Array):
    gate, y = residuals
    cotangent32 = cotangent.astype(jnp.float32)
    d_gate = (cotangent32 * y).sum(axis=1, keepdims=True)
    return cotangent, d_gate, (cotangent32 * gate).astype(y.dtype)


add_gated.defvjp(lambda x, gate, y: (add_gated(x, gate, y), (gate, y)), _add_gated_backward)


_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU with the tanh approximation, as in PixArt and DiT. The backward pass saves only x."""
    return _tanh_gelu(x)


gelu.defvjp(
    lambda x: (gelu(x), x),
    lambda x, cotangent: jax.vjp(_tanh_gelu, x)[1](cotangent),
)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias, where the gradient of the bias is computed in float32 as a product with a matrix of ones.

    Used for query, key and value. Their gradients come from an attention kernel into which the compiler
    cannot fuse the sum over tokens, and by the TPU compiler's estimate a separate reduction takes longer than
    this product.

    Args:
      x: [..., *shape].
      bias: [*shape] float32.

    Returns:
      [..., *shape] in the dtype of `x`.
    """
    return x + bias.astype(x.dtype)


def _add_bias_backward(shape: tuple[int, ...], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = cotangent.shape[: cotangent.ndim - len(shape)]
    every = tuple(range(len(rows)))
    # The barrier keeps the compiler from rewriting the product as a reduction. One row of ones would suffice,
    # but with fewer than eight rows the compiler would not use the matrix unit.
    ones = jax.lax.optimization_barrier(jnp.ones((8, *rows), cotangent.dtype))
    dimensions = ((tuple(axis + 1 for axis in every), every), ((), ()))
    return cotangent, jax.lax.dot_general(ones, cotangent, dimensions, preferred_element_type=jnp.float32)[0]


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias.shape), _add_bias_backward)
