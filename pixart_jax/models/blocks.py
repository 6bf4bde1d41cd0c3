"""The stack of equal blocks that every transformer here is.

Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.models.layers import REMAT_POLICIES, constrain


class TokenRoute(NamedTuple):
    """Tokens that pass through all blocks; the others jump from block `start` to block `stop`."""

    kept: jax.Array  # [B, K] int32, different positions in 0 .. N - 1
    start: int
    stop: int


class StackConfig(Protocol):
    """What a stack of blocks needs of a config."""

    depth: int
    remat: str
    scan_layers: bool


class Blocks(nnx.Module):
    """`depth` equal blocks with stacked parameters, run by `lax.scan` or unrolled.

    The parameters have the same tree and a leading 'layers' axis either way, so that checkpoints and weight
    tables do not know how the blocks are run.
    """

    def __init__(self, config: StackConfig, make_block: Callable[[nnx.Rngs], nnx.Module], *, rngs: nnx.Rngs):
        self.config = config

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> nnx.Module:
            return make_block(rngs)

        self.stacked = stack(rngs)

    def unstack(self) -> None:
        """Gives every block arrays of its own; the blocks then run unrolled, whatever `scan_layers` says.

        Out of a stack a compiled call copies the weights of every block, which costs a forward pass of XL/2
        for one image a fifth of its time on a CPU. The parameters then have another tree than checkpoints.
        """
        graph, stacked = nnx.split(self.stacked)
        leaves, structure = jax.tree.flatten(stacked)
        layers = zip(*map(jnp.unstack, leaves))
        self.stacked = nnx.List([nnx.merge(graph, structure.unflatten(layer)) for layer in layers])

    def __call__(self, x: jax.Array, *conditions: jax.Array, route: TokenRoute | None = None) -> jax.Array:
        """x [B, N, D] -> [B, N, D]; `conditions` go to every block alike."""
        if route is None:
            return self._run(x, 0, self.config.depth, conditions)
        x = self._run(x, 0, route.start, conditions)
        kept = jnp.take_along_axis(x, route.kept[:, :, None], axis=1)
        kept = self._run(constrain(kept, "batch", "tokens", None), route.start, route.stop, conditions)
        x = jax.vmap(lambda rows, positions, values: rows.at[positions].set(values))(x, route.kept, kept)
        x = constrain(x, "batch", "tokens", None)
        return self._run(x, route.stop, self.config.depth, conditions)

    def _run(self, x: jax.Array, start: int, stop: int, conditions: tuple[jax.Array, ...]) -> jax.Array:
        """Blocks `start` to `stop`."""
        separate = isinstance(self.stacked, nnx.List)
        scanned = self.config.scan_layers and not separate
        graph, stacked = nnx.split(self.stacked[0] if separate else self.stacked)

        def step(x: jax.Array, parameters: nnx.State, *conditions: jax.Array) -> jax.Array:
            x = nnx.merge(graph, parameters)(x, *conditions)
            return constrain(x, "batch", "tokens", None)

        if self.config.remat != "none":
            # Within scan the loop itself keeps the compiler from merging the two computations.
            step = jax.checkpoint(
                step,
                policy=REMAT_POLICIES[self.config.remat],
                prevent_cse=not scanned,
            )
        if separate:
            for block in self.stacked[start:stop]:
                x = step(x, nnx.state(block), *conditions)
            return x
        if scanned:
            if (start, stop) != (0, self.config.depth):
                stacked = jax.tree.map(lambda leaf: leaf[start:stop], stacked)
            x, _ = jax.lax.scan(lambda x, p: (step(x, p, *conditions), None), x, stacked)
            return x
        # Unstacked at once: the gradient is one stack then, not a sum of mostly zero arrays.
        leaves, structure = jax.tree.flatten(stacked)
        for layer in list(zip(*map(jnp.unstack, leaves)))[start:stop]:
            x = step(x, structure.unflatten(layer), *conditions)
        return x
