"""Kernels in int8, with one scale for each output channel (weight-only quantization).

    s_o = max_i |W_io| / 127,    q = round(W / s),    x W ≈ (x q) s

Only the memory of the weights shrinks, to about half of bfloat16: the product is computed in the compute
dtype, and the scale is applied to its result. The kernels in the blocks are quantized, 97 % of XL/2. Biases,
tables and the layers outside of the blocks are not: they handle the timestep, the caption and the output.

qwix, the quantization library for Flax, does the same. It is not used, because it replaces the products of
whole modules: the scales would have to follow the layers that hold several matrices (`Linear.parts`), the
stacks of blocks and the sharding table, which a parameter of the layer does by itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.models.layers import Linear, metadata

LARGEST = 127


def quantize(kernel: jax.Array, inputs: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Rounds a kernel to int8, symmetrically.

    Args:
      kernel: any float dtype.
      inputs: its input axes; the other axes are output channels or index a stack of kernels.

    Returns:
      int8 of the same shape, and float32 scales without the input axes. A channel of zeros has the scale 1.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    # Division can round above 127 by one unit in the last place.
    rounded = jnp.clip(jnp.round(kernel / scale), -LARGEST, LARGEST).astype(jnp.int8)
    return rounded, jnp.squeeze(scale, inputs)


def quantize_layer(layer: Linear) -> None:
    """Quantizes the kernel of a linear layer, or of a stack of them, in place."""
    axes = layer.kernel.get_metadata().get("out_sharding")
    stack = layer.kernel.ndim - len(layer.in_features) - len(layer.out_features)
    inputs = tuple(range(stack, stack + len(layer.in_features)))
    rounded, scale = quantize(layer.kernel[...], inputs)
    kept = tuple(axis for index, axis in enumerate(axes) if index not in inputs)
    layer.kernel = nnx.Param(rounded, **metadata(axes))
    layer.kernel_scale = nnx.Param(scale, **metadata(kept))


def quantize_blocks(network: nnx.Module) -> None:
    """Quantizes the kernels of the linear layers in the stack of blocks of a network, in place."""
    for _, layer in nnx.iter_modules(network.blocks):
        if isinstance(layer, Linear):
            quantize_layer(layer)
