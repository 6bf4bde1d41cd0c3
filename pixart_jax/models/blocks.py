"""The stack of identical blocks that PixArt, DiT and T5 are made of.

Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.models.adapters import dropout_of_block, has_dropout
from pixart_jax.models.attention import platform
from pixart_jax.models.layers import REMAT_POLICIES, constrain

# The parameters of a block and, with dropout, its number.
Parameters = tuple[nnx.State, jax.Array | None]


class TokenRoute(NamedTuple):
    """Token routing (TREAD, arXiv 2501.04765): blocks `start` to `stop - 1` process only the kept tokens.

    The other tokens skip these blocks unchanged. All tokens pass through the remaining blocks.
    """

    kept: jax.Array  # [B, K] int32, distinct positions in 0 .. N - 1
    start: int
    stop: int


class StackConfig(Protocol):
    """The config fields that a stack of blocks reads."""

    depth: int
    remat: str
    scan_layers: bool | None


def is_scanned(config: StackConfig) -> bool:
    """Returns whether the blocks run with `lax.scan`.

    If the config does not say, they are unrolled on GPUs. There, a scanned training step spends 14 % of its
    time on moving activations and gradients into and out of stacked arrays (docs/performance.md, section 5).
    """
    return platform() != "gpu" if config.scan_layers is None else config.scan_layers


class Blocks(nnx.Module):
    """`depth` identical blocks with stacked parameters, run by `lax.scan` or unrolled.

    Either way each parameter is one array with a leading 'layers' axis, so the layout of checkpoints and
    weight tables does not depend on `scan_layers`.
    """

    def __init__(self, config: StackConfig, make_block: Callable[[nnx.Rngs], nnx.Module], *, rngs: nnx.Rngs):
        self.config = config

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> nnx.Module:
            return make_block(rngs)

        self.stacked = stack(rngs)

    def unstack(self) -> None:
        """Splits the stacked parameters into separate arrays per block; the blocks then always run unrolled.

        With stacked parameters a compiled call copies the weights of every block out of the stack. On a CPU
        this takes a fifth of the time of an XL/2 forward pass on one image. Afterwards the parameter tree
        differs from that of checkpoints.
        """
        graph, stacked = nnx.split(self.stacked)
        leaves, structure = jax.tree.flatten(stacked)
        layers = zip(*map(jnp.unstack, leaves))
        self.stacked = nnx.List([nnx.merge(graph, structure.unflatten(layer)) for layer in layers])

    def __call__(self, x: jax.Array, *conditions: jax.Array, route: TokenRoute | None = None) -> jax.Array:
        """x [B, N, D] -> [B, N, D]; every block receives the same `conditions`."""
        if route is None:
            return self._run(x, 0, self.config.depth, conditions)
        x = self._run(x, 0, route.start, conditions)
        kept = jnp.take_along_axis(x, route.kept[:, :, None], axis=1)
        kept = self._run(constrain(kept, "batch", "tokens", None), route.start, route.stop, conditions)
        x = jax.vmap(lambda rows, positions, values: rows.at[positions].set(values))(x, route.kept, kept)
        x = constrain(x, "batch", "tokens", None)
        return self._run(x, route.stop, self.config.depth, conditions)

    def _run(self, x: jax.Array, start: int, stop: int, conditions: tuple[jax.Array, ...]) -> jax.Array:
        """Runs blocks `start` to `stop - 1`."""
        separate = isinstance(self.stacked, nnx.List)
        scanned = is_scanned(self.config) and not separate
        graph, stacked = nnx.split(self.stacked[0] if separate else self.stacked)

        # The dropout of adapters needs the number of the block.
        number = jnp.arange(self.config.depth) if has_dropout() else None

        def step(x: jax.Array, parameters: Parameters, *conditions: jax.Array) -> jax.Array:
            state, index = parameters
            with dropout_of_block(index):
                x = nnx.merge(graph, state)(x, *conditions)
            return constrain(x, "batch", "tokens", None)

        stacked = stacked, number
        if not scanned and not separate:
            return self._run_unrolled(step, x, start, stop, stacked, conditions)
        # Inside scan the loop already prevents common-subexpression elimination (CSE) from merging the
        # recomputation with the forward pass.
        step = self._rematerialized(step, prevent_cse=separate)
        if separate:
            for index, block in enumerate(self.stacked[start:stop], start):
                x = step(x, (nnx.state(block), None if number is None else number[index]), *conditions)
            return x
        if (start, stop) != (0, self.config.depth):
            stacked = jax.tree.map(lambda leaf: leaf[start:stop], stacked)
        x, _ = jax.lax.scan(lambda x, p: (step(x, p, *conditions), None), x, stacked)
        return x

    def _run_unrolled(
        self,
        step: Callable,
        x: jax.Array,
        start: int,
        stop: int,
        stacked: Parameters,
        conditions: tuple[jax.Array, ...],
    ) -> jax.Array:
        leaves, structure = jax.tree.flatten(stacked)
        # Unstack once instead of indexing layer by layer. The gradient is then a single stack, whereas that
        # of indexing would be a sum of `depth` full-size arrays that are mostly zero.
        layers = list(zip(*map(jnp.unstack, leaves)))[start:stop]
        if self.config.remat == "none":
            for layer in layers:
                x = step(x, structure.unflatten(layer), *conditions)
            return x
        before = x
        for index, layer in enumerate(layers, start):

            def block(x, layer, leaves, *conditions, index=index):
                layer = map(functools.partial(_take, index), layer, leaves)
                return step(x, structure.unflatten(layer), *conditions)

            # XLA would otherwise copy the weights of all blocks out of the stack before the first one runs.
            # They wait for the input of the block before, so that FSDP can gather them while it runs.
            _, tied = jax.lax.optimization_barrier(jax.lax.stop_gradient((before, leaves)))
            before, x = x, self._rematerialized(block)(x, layer, tied, *conditions)
        return x

    def _rematerialized(self, step: Callable, prevent_cse: bool = True) -> Callable:
        if self.config.remat == "none":
            return step
        return jax.checkpoint(step, policy=REMAT_POLICIES[self.config.remat], prevent_cse=prevent_cse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(index: int, layer: jax.Array, stack: jax.Array) -> jax.Array:
    """Returns `stack[index]`, with the gradient of `layer`, which has the same values.

    Until the backward pass, a rematerialized block then keeps the stack, which is in memory anyway, instead
    of a copy of its weights. All copies of XL/2 would take 2.4 GB.
    """
    return stack[index]


_take.defvjp(lambda index, layer, stack: (stack[index], None), lambda index, _, gradient: (gradient, None))
