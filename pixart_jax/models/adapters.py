"""Low-rank adapters: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353).

An adapter changes the kernel W [in, out] of a linear layer without training it:

    LoRA, rsLoRA   W' = W + s A B,  A [in, r], B [r, out],  s = alpha / r, or alpha / sqrt(r) with rsLoRA
    DoRA           W' = m (W + s A B) / ||W + s A B||, with the norm of each column (output channel)

B starts at zero and m at ||W||, so the network does not change at first. As in peft, the norm of DoRA has no
gradient. The layer computes x W + s (x A) B, beside its kernel: no gradient of the kernel exists, and the
kernel may be stored in bfloat16 or int8.

A layer that holds several matrices, such as query, key and value, has A and B for each of them, like the
separate layers of diffusers. Layers are therefore named as in diffusers' `PixArtTransformer2DModel`, without
the number of the block: an adapter is trained in all blocks or in none.

Axes: r rank, P adapted parts of a layer; the others as in `layers.py`.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pixart_jax.models.attention import PRODUCT
from pixart_jax.models.configs import AdapterConfig, adapter_targets
from pixart_jax.models.layers import Linear, Matrix, metadata
from pixart_jax.models.quantization import quantize_blocks

# Name of the adapter in its layer, and so in the paths of its parameters.
ADAPTER = "adapter"


class LowRank(nnx.Module):
    """The adapter of a linear layer, or of a stack of them.

    Args:
      layer: the layer, with its trained kernel.
      config: kind, rank, scale and dropout.
      parts: which parts of the layer are adapted.
      salt: a number of the layer, so that each layer has its own dropout.
      rngs: random generators for A.

    Attributes:
      down: A, [*in_shape, P, r].
      up: B, [r, P, *out_shape of a part].
      magnitude: m, [P, *out_shape of a part], or None without DoRA.
      parts: which parts of the layer are adapted.
    """

    def __init__(
        self, layer: Linear, config: AdapterConfig, parts: tuple[int, ...], salt: int, rngs: nnx.Rngs
    ):
        self.parts, self.scale, self.dropout, self.salt = parts, config.scale, config.dropout, salt
        self.inputs = len(layer.in_features)
        kernel = layer.float_kernel()
        depth = kernel.ndim - self.inputs - len(layer.out_features)  # 1 in a stack of blocks, otherwise 0
        axes = layer.kernel.get_metadata()["out_sharding"]
        stack_axes, in_axes = axes[:depth], axes[depth : depth + self.inputs]
        out_axes = axes[depth + self.inputs + (layer.parts > 1) :]
        outputs = layer.out_features[layer.parts > 1 :]
        stack, count, rank = kernel.shape[:depth], len(parts), config.rank
        # peft's default, U(-1/sqrt(in), 1/sqrt(in)).
        bound = math.prod(layer.in_features) ** -0.5
        down = jax.random.uniform(
            rngs.params(), (*stack, *layer.in_features, count, rank), minval=-bound, maxval=bound
        )
        inputs, behind = self.inputs, len(outputs)
        self.down = nnx.Param(
            down,
            **metadata((*stack_axes, *in_axes, None, None)),
            matrix=Matrix(tuple(range(-2 - inputs, -2)), (-1,)),
            inputs=inputs,
        )
        self.up = nnx.Param(
            jnp.zeros((*stack, rank, count, *outputs)),
            **metadata((*stack_axes, None, None, *out_axes)),
            matrix=Matrix((-2 - behind,), tuple(range(-behind, 0))),
            inputs=1,
        )
        self.magnitude = nnx.data(None)
        if config.kind == "dora":
            norms = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(depth, depth + inputs))))
            if layer.parts > 1:
                norms = jnp.take(norms, jnp.asarray(parts), axis=depth)
            else:
                norms = jnp.expand_dims(norms, depth)
            self.magnitude = nnx.Param(norms, **metadata((*stack_axes, None, *out_axes)), inputs=0)

    def __call__(self, layer: Linear, x: jax.Array, outs: list[jax.Array]) -> list[jax.Array]:
        """Adds the update to the products of a layer.

        Args:
          layer: the layer that this adapter belongs to.
          x: [..., *in_shape], its input.
          outs: [..., *out_shape of a part] for each part: x W.

        Returns:
          x W' for each part.
        """
        down, up = self.down[...], self.up[...]
        dtype = layer.dtype
        x = self._dropped(x.astype(dtype))
        contracted = tuple(range(x.ndim - self.inputs, x.ndim)), tuple(range(self.inputs))
        hidden = jax.lax.dot_general(x, down.astype(dtype), (contracted, ((), ())))  # [..., P, r]
        hidden = checkpoint_name(hidden, PRODUCT)
        outs = list(outs)
        for index, part in enumerate(self.parts):
            update = jnp.tensordot(hidden[..., index, :], up[:, index].astype(dtype), 1)
            out = outs[part] + (self.scale * update).astype(outs[part].dtype)
            if self.magnitude is not None:
                out = out * self._rescaling(layer, index).astype(out.dtype)
            outs[part] = out
        return outs

    def _rescaling(self, layer: Linear, index: int) -> jax.Array:
        """m / ||W + s A B||, [*out_shape of a part] float32."""
        kernel = layer.float_kernel()
        if layer.parts > 1:
            kernel = jnp.take(kernel, self.parts[index], axis=self.inputs)
        changed = kernel + self._update(self.down[...], self.up[...], index)
        return self.magnitude[...][index] / jax.lax.stop_gradient(self._norms(changed))

    def _update(self, down: jax.Array, up: jax.Array, index: int) -> jax.Array:
        """s A B of one part, [*in_shape, *out_shape of a part]."""
        return self.scale * jnp.tensordot(down[..., index, :], up[:, index], 1)

    def _norms(self, kernel: jax.Array) -> jax.Array:
        norms = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(self.inputs))))
        # A channel of zeros has the magnitude 0, and stays zero.
        return jnp.where(norms > 0, norms, 1.0)

    def merged(self, layer: Linear) -> jax.Array:
        """Returns W', [..., *in_shape, *out_shape] float32, of a layer or of a stack of them."""

        def one(kernel, down, up, magnitude):
            parts = list(jnp.unstack(kernel, axis=self.inputs)) if layer.parts > 1 else [kernel]
            for index, part in enumerate(self.parts):
                changed = parts[part] + self._update(down, up, index)
                if magnitude is not None:
                    changed = changed * (magnitude[index] / self._norms(changed))
                parts[part] = changed
            return jnp.stack(parts, axis=self.inputs) if layer.parts > 1 else parts[0]

        kernel = layer.float_kernel()
        magnitude = None if self.magnitude is None else self.magnitude[...]
        if kernel.ndim > self.inputs + len(layer.out_features):
            one = jax.vmap(one)
        return one(kernel, self.down[...], self.up[...], magnitude)

    def _dropped(self, x: jax.Array) -> jax.Array:
        keys = _dropout_keys.get()
        if keys is None or not self.dropout:
            return x

        def one(key, row):
            return jax.random.bernoulli(jax.random.fold_in(key, self.salt), 1 - self.dropout, row.shape)

        return jnp.where(jax.vmap(one)(keys, x), x / (1 - self.dropout), 0).astype(x.dtype)


def attach(network: nnx.Module, config: AdapterConfig, *, rngs: nnx.Rngs) -> None:
    """Adds adapters to a network and stores its own weights in `config.base_dtype`, in place.

    Does nothing if `config.kind` is 'none'.

    Args:
      network: a `PixArt` whose parameters are float32.
      config: kind, rank, scale and layers of the adapters.
      rngs: random generators for A.
    """
    if not config:
        return
    layers = {
        ".".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(network)
        if isinstance(layer, Linear)
    }
    if config.base_dtype != "float32":
        _store(network, config.base_dtype)
    # In the order of the table, so that the random numbers do not depend on the order of the graph.
    for name, parts in adapter_targets(config).items():
        if name in layers:  # size embedders are optional
            layers[name].adapter = LowRank(layers[name], config, parts, zlib.crc32(name.encode()), rngs)


def _store(network: nnx.Module, dtype: str) -> None:
    """Stores the weights of a network in bfloat16 or, in its blocks, in int8."""
    if dtype == "int8":
        quantize_blocks(network)
    kept = ("kernel_scale", *network.config.untrained)
    for path, variable in nnx.iter_graph(network):
        if isinstance(variable, nnx.Param) and variable.dtype == jnp.float32 and path[-1] not in kept:
            variable.set_value(variable[...].astype(jnp.bfloat16))


def merge(network: nnx.Module) -> None:
    """Turns a network with adapters into the plain float32 network that computes the same, in place."""
    for _, layer in list(nnx.iter_modules(network)):
        if isinstance(layer, Linear) and (layer.adapter is not None or layer.kernel_scale is not None):
            kernel = layer.float_kernel() if layer.adapter is None else layer.adapter.merged(layer)
            layer.kernel = nnx.Param(kernel, **layer.kernel.get_metadata())
            for name in {ADAPTER, "kernel_scale"} & vars(layer).keys():
                delattr(layer, name)
    for _, variable in nnx.iter_graph(network):
        if isinstance(variable, nnx.Param):
            variable.set_value(variable[...].astype(jnp.float32))


def is_adapter(path: tuple[Any, ...]) -> bool:
    """Returns whether the parameter at a path belongs to an adapter."""
    return ADAPTER in path


# --- Dropout ------------------------------------------------------------------------------------------

_dropout_keys: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("dropout_keys", default=None)


@contextlib.contextmanager
def dropout(keys: jax.Array | None) -> Iterator[None]:
    """Within this context, adapters drop some of their inputs while they are traced.

    Args:
      keys: [B] one key per sample; None for no dropout.
    """
    token = _dropout_keys.set(keys)
    try:
        yield
    finally:
        _dropout_keys.reset(token)


def dropout_of_block(index: jax.Array | None) -> contextlib.AbstractContextManager:
    """The context for one block of a stack, whose keys depend on its `index`; nothing without dropout."""
    keys = _dropout_keys.get()
    if keys is None or index is None:
        return contextlib.nullcontext()
    return dropout(jax.vmap(lambda key: jax.random.fold_in(key, index))(keys))


def has_dropout() -> bool:
    """Returns whether a `dropout` context is active."""
    return _dropout_keys.get() is not None
