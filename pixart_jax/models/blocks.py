"""The stack of identical blocks that PixArt, DiT and T5 are made of.

Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.models.adapters import dropout_of_block, has_dropout
from pixart_jax.models.attention import platform
from pixart_jax.models.layers import REMAT_POLICIES, constrain

# The parameters of a block, with dropout its number, and the parameters of its compression, if it has one.
Parameters = tuple[nnx.State, jax.Array | None, nnx.State | None]


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

    Some blocks may also compress their keys and values. The parameters for that are a stack of their own, and
    blocks with and without compression are scanned in separate runs.
    """

    compression: nnx.Module | nnx.List | None = None

    def __init__(
        self,
        config: StackConfig,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        *,
        make_compression: Callable[[], nnx.Module] | None = None,
        compressed: tuple[int, ...] = (),
        rngs: nnx.Rngs,
    ):
        """Makes the blocks.

        Args:
          config: their number, and how they run.
          make_block: makes one block.
          make_compression: makes the module that reduces the keys and values of one block.
          compressed: the numbers of the blocks that have such a module, ascending.
          rngs: random generators.
        """
        self.config, self.compressed = config, compressed

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> nnx.Module:
            return make_block(rngs)

        self.stacked = stack(rngs)
        if compressed:
            make = nnx.vmap(
                make_compression,
                in_axes=(),
                axis_size=len(compressed),
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )
            self.compression = make()

    def unstack(self) -> None:
        """Splits the stacked parameters into separate arrays per block; the blocks then always run unrolled.

        With stacked parameters a compiled call copies the weights of every block out of the stack. On a CPU
        this takes a fifth of the time of an XL/2 forward pass on one image. Afterwards the parameter tree
        differs from that of checkpoints.
        """
        self.stacked = _modules(self.stacked)
        if self.compressed:
            self.compression = _modules(self.compression)

    def __call__(
        self,
        x: jax.Array,
        *conditions: jax.Array,
        route: TokenRoute | None = None,
        grid: tuple[int, int] | None = None,
        tap: int | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x [B, N, D] -> [B, N, D]; every block receives the same `conditions`.

        `grid` is the number of rows and columns of the tokens, which compression needs. With `tap`, also
        returns the tokens after block `tap`, counted from 1: [B, N, D], or [B, K, D] if that block processes
        only the kept tokens.
        """
        run = functools.partial(self._run, conditions=conditions, tap=tap)
        if route is None:
            x, tapped = run(x, 0, self.config.depth, grid=grid)
            return x if tap is None else (x, tapped)
        x, first = run(x, 0, route.start, grid=grid)
        kept = jnp.take_along_axis(x, route.kept[:, :, None], axis=1)
        kept = constrain(kept, "batch", "tokens", None)
        kept, middle = run(kept, route.start, route.stop, grid=None)
        x = jax.vmap(lambda rows, positions, values: rows.at[positions].set(values))(x, route.kept, kept)
        x = constrain(x, "batch", "tokens", None)
        x, last = run(x, route.stop, self.config.depth, grid=grid)
        if tap is None:
            return x
        return x, next(tapped for tapped in (first, middle, last) if tapped is not None)

    def _run(
        self,
        x: jax.Array,
        start: int,
        stop: int,
        *,
        conditions: tuple[jax.Array, ...],
        grid: tuple[int, int] | None,
        tap: int | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs blocks `start` to `stop - 1`; also returns the tokens after block `tap` if it is of these."""
        if grid is None and set(self.compressed) & set(range(start, stop)):
            raise ValueError("tokens that do not form a grid cannot be compressed")
        separate = isinstance(self.stacked, nnx.List)
        graph, stacked = nnx.split(self.stacked[0] if separate else self.stacked)
        compression_graph, compression = None, None
        if self.compressed:
            of_one = self.compression[0] if separate else self.compression
            compression_graph, compression = nnx.split(of_one)

        # The dropout of adapters needs the number of the block.
        number = jnp.arange(self.config.depth) if has_dropout() else None

        def step(x: jax.Array, parameters: Parameters, *conditions: jax.Array) -> jax.Array:
            state, index, compression = parameters
            options = {}
            if compression is not None:
                module = nnx.merge(compression_graph, compression)
                options["compress"] = functools.partial(module, grid=grid)
            with dropout_of_block(index):
                x = nnx.merge(graph, state)(x, *conditions, **options)
            return constrain(x, "batch", "tokens", None)

        tapped = None
        if separate:
            step = self._rematerialized(step)
            compressions = dict(zip(self.compressed, map(nnx.state, self.compression or ())))
            for index, block in enumerate(self.stacked[start:stop], start):
                own = None if number is None else number[index]
                x = step(x, (nnx.state(block), own, compressions.get(index)), *conditions)
                tapped = x if index + 1 == tap else tapped
            return x, tapped
        stacked = stacked, number
        if not is_scanned(self.config):
            return self._run_unrolled(step, x, start, stop, stacked, compression, conditions, tap)
        # Inside scan the loop already prevents common-subexpression elimination (CSE) from merging the
        # recomputation with the forward pass.
        step = self._rematerialized(step, prevent_cse=False)
        for first, last in self._equal_runs(start, stop, tap):
            of_run = None
            if first in self.compressed:
                position = self.compressed.index(first)
                of_run = _slice(compression, position, position + last - first)
            parameters = *_slice(stacked, first, last), of_run
            x, _ = jax.lax.scan(lambda x, p: (step(x, p, *conditions), None), x, parameters)
            tapped = x if last == tap else tapped
        return x, tapped

    def _equal_runs(self, start: int, stop: int, tap: int | None) -> Iterator[tuple[int, int]]:
        """Splits blocks `start` to `stop - 1` into runs (first, last + 1) that all compress, or none does.

        A run ends after block `tap`, counted from 1.
        """

        def kind(index: int) -> tuple[bool, bool]:
            return index in self.compressed, tap is not None and index < tap

        for _, run in itertools.groupby(range(start, stop), kind):
            indices = list(run)
            yield indices[0], indices[-1] + 1

    def _run_unrolled(
        self,
        step: Callable,
        x: jax.Array,
        start: int,
        stop: int,
        stacked: tuple[nnx.State, jax.Array | None],
        compression: nnx.State | None,
        conditions: tuple[jax.Array, ...],
        tap: int | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        # Unstack once instead of indexing layer by layer. The gradient is then a single stack, whereas that
        # of indexing would be a sum of `depth` full-size arrays that are mostly zero.
        layers = _unstack(stacked)[start:stop]
        compressions = dict(zip(self.compressed, _unstack(compression)))
        tapped = None
        if self.config.remat == "none":
            for index, layer in enumerate(layers, start):
                x = step(x, (*layer, compressions.get(index)), *conditions)
                tapped = x if index + 1 == tap else tapped
            return x, tapped
        before = x
        for index, layer in enumerate(layers, start):

            def block(x, layer, compression, stacked, *conditions, index=index):
                layer = jax.tree.map(functools.partial(_take, index), layer, stacked)
                return step(x, (*layer, compression), *conditions)

            # XLA would otherwise copy the weights of all blocks out of the stack before the first one runs.
            # They wait for the input of the block before, so that FSDP can gather them while it runs.
            _, tied = jax.lax.optimization_barrier(jax.lax.stop_gradient((before, stacked)))
            block = self._rematerialized(block)
            before, x = x, block(x, layer, compressions.get(index), tied, *conditions)
            tapped = x if index + 1 == tap else tapped
        return x, tapped

    def _rematerialized(self, step: Callable, prevent_cse: bool = True) -> Callable:
        if self.config.remat == "none":
            return step
        return jax.checkpoint(step, policy=REMAT_POLICIES[self.config.remat], prevent_cse=prevent_cse)


def _modules(stacked: nnx.Module) -> nnx.List:
    """Returns the modules of a stack, each with arrays of its own."""
    graph, state = nnx.split(stacked)
    return nnx.List([nnx.merge(graph, layer) for layer in _unstack(state)])


def _unstack(stacked: Any) -> list[Any]:
    """Splits every array along its first axis: returns one tree for each of its elements."""
    leaves, structure = jax.tree.flatten(stacked)
    return [structure.unflatten(layer) for layer in zip(*map(jnp.unstack, leaves))]


def _slice(stacked: Any, start: int, stop: int) -> Any:
    """Returns elements `start` to `stop - 1` of every array."""
    return jax.tree.map(lambda leaf: leaf if stop - start == len(leaf) else leaf[start:stop], stacked)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(index: int, layer: jax.Array, stack: jax.Array) -> jax.Array:
    """Returns `stack[index]`, with the gradient of `layer`, which has the same values.

    Until the backward pass, a rematerialized block then keeps the stack, which is in memory anyway, instead
    of a copy of its weights. All copies of XL/2 would take 2.4 GB.
    """
    return stack[index]


_take.defvjp(lambda index, layer, stack: (stack[index], None), lambda index, _, gradient: (gradient, None))
