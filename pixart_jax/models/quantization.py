"""Kernels in int8, with one scale for each output channel (weight-only quantization).

    s_o = max_i |W_io| / 127,    q = round(W / s),    x W ≈ (x q) s

Only the memory of the weights shrinks, to about half of bfloat16: the product is computed in the compute
dtype, and the scale is applied to its result. The kernels in the blocks are quantized: 97 % of XL/2, and, as
the output layers `wo` keep their dtype, 76 % of T5-XXL. Biases, tables, norms, embeddings and the layers
outside of the blocks are not quantized.

qwix, the quantization library for Flax, does the same. It is not used, because it replaces the products of
whole modules: the scales would have to follow the layers that hold several matrices (`Linear.parts`), the
stacks of blocks and the sharding table, which a parameter of the layer does by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixart_jax.models.layers import metadata

LARGEST = 127
# What the name of a kernel's scales adds to the name of the kernel.
SCALE = "_scale"
# T5's output layers of its feed-forward layers. Their inputs have a few very large channels, and transformers
# also leaves them out of its 8-bit models.
T5_KEPT = ("wo",)

Array = jax.Array | np.ndarray
Path = tuple[str | int, ...]


def quantize(kernel: Array, inputs: tuple[int, ...]) -> tuple[Array, Array]:
    """Rounds a kernel to int8, symmetrically.

    Args:
      kernel: any float dtype; an array of NumPy is quantized on the host.
      inputs: its input axes; the other axes are output channels or index a stack of kernels.

    Returns:
      int8 of the same shape, and float32 scales without the input axes. A channel of zeros has the scale 1.
    """
    xp = np if isinstance(kernel, np.ndarray) else jnp
    kernel = kernel.astype(xp.float32)
    largest = xp.max(xp.abs(kernel), axis=inputs, keepdims=True)
    # XLA replaces a division by a constant, NumPy does not. A product gives the same bits with both.
    scale = xp.where(largest > 0, largest * xp.float32(1 / LARGEST), xp.float32(1))
    # Division can round above 127 by one unit in the last place.
    rounded = xp.clip(xp.round(kernel / scale), -LARGEST, LARGEST).astype(xp.int8)
    return rounded, xp.squeeze(scale, inputs)


def kernels(network: nnx.Module, kept: tuple[str, ...] = ()) -> dict[Path, tuple[int, ...]]:
    """Returns the path and the input axes, as negative numbers, of every kernel to quantize.

    Args:
      network: a network without adapters, with its blocks stacked or not; may be abstract.
      kept: names of kernels to leave out.
    """
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(network.blocks, nnx.Param)):
        # Kernels are annotated with the axes of their matrices, except that of DiT's modulation. It handles
        # the condition, so it stays as it is.
        matrix = variable.get_metadata().get("matrix")
        if matrix is not None and path[-1] not in kept:
            found["blocks", *path] = matrix.inputs
    return found


def quantize_blocks(network: nnx.Module, kept: tuple[str, ...] = ()) -> None:
    """Quantizes the kernels in the blocks of a network in place, those that `kernels` returns."""
    modules = {("blocks", *path): module for path, module in nnx.iter_modules(network.blocks)}
    for (*path, name), inputs in kernels(network, kept).items():
        module = modules[tuple(path)]
        kernel = getattr(module, name)
        rounded, scale = quantize(kernel[...], inputs)
        axes = kernel.get_metadata()["out_sharding"]
        left = tuple(axis for index, axis in enumerate(axes, -len(axes)) if index not in inputs)
        setattr(module, name, nnx.Param(rounded, **metadata(axes)))
        setattr(module, name + SCALE, nnx.Param(scale, **metadata(left)))


def quantize_parameters(
    parameters: Iterable[tuple[Path, np.ndarray]], inputs: Mapping[Path, tuple[int, ...]]
) -> Iterator[tuple[Path, np.ndarray]]:
    """Quantizes parameters on the host, as `quantize_blocks` does, before they are put on a device.

    Args:
      parameters: path and array of every parameter; kernels are stacked along their first axis. They are
        quantized layer by layer, so that temporary arrays have the size of a layer.
      inputs: the kernels to quantize (`kernels`).

    Yields:
      path and array of every parameter and of every scale.
    """
    for path, parameter in parameters:
        if path not in inputs:
            yield path, parameter
            continue
        rounded, scales = np.empty(parameter.shape, np.int8), []
        for index, layer in enumerate(parameter):
            rounded[index], scale = quantize(np.asarray(layer), inputs[path])
            scales.append(scale)
        yield path, rounded
        yield (*path[:-1], f"{path[-1]}{SCALE}"), np.stack(scales)
