"""Muon: the momentum of a matrix, orthogonalized by a Newton-Schulz iteration that the devices share.

Axes: M matrices in a stack, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from pixart_jax.training import sharding
from pixart_jax.training.objectives import Objective


class Kernel(NamedTuple):
    """Which axes of a kernel form the rows and columns of a matrix; the others index matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    # Logical axes. Of those of a matrix, only the first input and the first output are sharded.
    logical: tuple[str | None, ...]


# By the path of a parameter; None if Muon does not train it.
Kernels = Mapping[tuple[str, ...], Kernel | None]

# Jordan et al. 2024: the odd polynomial 3.4445 x - 4.7750 x^3 + 2.0315 x^5, applied five times, takes every
# singular value between 0.01 and 1 close to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# Root mean square of an update, which is about that of AdamW.
RMS = 0.2


def muon(
    rate: optax.Schedule,
    momentum: float,
    weight_decay: float,
    kernels: Kernels,
    others: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices, and `others` for all other parameters.

        m <- momentum m + (1 - momentum) g
        u  = momentum m / (1 - momentum^(i+2)) + (1 - momentum) g / (1 - momentum^(i+1))     at i = 0, 1, …
        p <- p - rate (0.2 sqrt(max(R, C)) orthogonalize(u) + weight_decay p)

    The scale makes the root mean square of an update that of AdamW, about 0.2 (Moonshot, arXiv 2502.16982,
    section 2.2), so that learning rate and weight decay have the same meaning as in AdamW. Momentum,
    Nesterov's look-ahead and the corrections of their biases are those of `optax.contrib.muon`.

    Args:
      rate: learning rate of the matrices.
      momentum: decay of the momentum.
      weight_decay: decoupled weight decay of the matrices.
      kernels: as `matrices` returns them.
      others: optimizer of all other parameters.
      mesh: its devices share the matrices, see `_orthogonalized`. None: every device computes what the
        compiler makes of it, which may be all of them.
    """

    own = optax.chain(
        _scale_by_muon(momentum, kernels, mesh),
        optax.stateless(lambda updates, _: _with_kernels(_scaled, updates, kernels)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    # The state has the tree of `optax.contrib.muon`, which older checkpoints have: it has an optimizer of its
    # own for arrays that are no matrices, and gets none.
    nested = optax.partition(
        {"muon": own, "adam": others}, lambda params: jax.tree.map(lambda _: "muon", params)
    )
    return optax.partition(
        {"muon": nested, "adamw": others},
        lambda params: _with_kernels(lambda _, kernel: "muon" if kernel else "adamw", params, kernels),
    )


def matrices(objective: Objective) -> dict[tuple[str, ...], Kernel | None]:
    """Returns, for the path of each trained parameter, its matrices if Muon trains it, else None.

    Muon trains the kernels of linear layers inside the stack of blocks, which `layers.linear` marks.
    Embeddings and last layers are matrices too, but should not be trained with Muon (Jordan et al. 2024).
    """
    found: dict[tuple[str, ...], Kernel | None] = {}
    for network, state in objective.abstract_networks().items():
        for path, variable in nnx.to_flat_state(state):
            metadata, axes = variable.get_metadata(), len(variable.shape)
            matrix, logical = metadata.get("matrix"), metadata.get("out_sharding") or ()
            if not objective.is_trained((network, *path)):
                continue
            found[network, *path] = None
            if matrix and "layers" in logical:
                inputs, outputs = (tuple(axes + axis for axis in side) for side in matrix)
                found[network, *path] = Kernel(inputs, outputs, logical)
    return found


def _scale_by_muon(momentum: float, kernels: Kernels, mesh: Mesh | None) -> optax.GradientTransformation:
    def update(gradients, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        moments = optax.tree.update_moment(gradients, state.mu, momentum, 1)
        ahead = optax.tree.bias_correction(moments, momentum, optax.safe_increment(count))
        now = optax.tree.bias_correction(gradients, momentum, count)
        directions = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        updates = _with_kernels(
            lambda u, kernel: _orthogonalized(u, kernel, state.ns_coeffs, mesh), directions, kernels
        )
        return updates, optax.contrib.MuonState(count, moments, state.ns_coeffs)

    init = optax.contrib.scale_by_muon(COEFFICIENTS, STEPS).init
    return optax.GradientTransformation(init, update)


def _with_kernels(function: Callable[[Any, Kernel | None], Any], tree: Any, kernels: Kernels) -> Any:
    """Maps a function of a leaf and its entry in `kernels` over a tree of parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf, kernels[tuple(key.key for key in path)]), tree
    )


def _scaled(update: jax.Array, kernel: Kernel) -> jax.Array:
    """0.2 sqrt(max(R, C)) times the update."""
    sides = (math.prod(update.shape[axis] for axis in side) for side in (kernel.inputs, kernel.outputs))
    return jnp.sqrt(float(max(sides))) * RMS * update


def _orthogonalized(x: jax.Array, kernel: Kernel, coefficients: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Newton-Schulz iteration on all matrices X in an array; the result has the same shape.

        X <- X / |X|,   then five times   A = X X^T,   X <- a X + (b A + c A A) X

    The parameters, and so their momenta, are sharded along rows or columns. Left to itself, the compiler
    splits the products that way, or has all devices compute the same. With a mesh, each device instead gets
    an equal share of the matrices as a whole: an all-to-all moves the shards there, and another one moves the
    results back. The number of matrices is padded with zeros to a multiple of the number of devices.

    Args:
      x: any number of axes.
      kernel: which of them form a matrix, and how they are sharded.
      coefficients: (a, b, c), [3].
      mesh: the devices; None leaves the sharding to the compiler.
    """
    if mesh is None or mesh.size == 1:
        return _from_stack(_newton_schulz(_to_stack(x, kernel), coefficients), x.shape, kernel)
    spec = sharding.spec(kernel.logical)
    fast = [axis for axis in sharding.fast_axes(mesh) if mesh.shape[axis] > 1]
    # The side of the matrices, 1 (rows) or 2 (columns), that each mesh axis shards.
    sides = {
        axis: side
        for side, dimensions in enumerate((kernel.inputs, kernel.outputs), 1)
        for axis in fast
        if axis in (spec[dimensions[0]] or ())
    }
    replicas = [axis for axis in fast if axis not in sides]

    def local(x: jax.Array, coefficients: jax.Array) -> jax.Array:
        stack = _to_stack(x, kernel)
        count = len(stack)
        stack = jnp.pad(stack, ((0, -count % math.prod(mesh.shape[axis] for axis in fast)), (0, 0), (0, 0)))
        for axis in replicas:
            share = len(stack) // mesh.shape[axis]
            stack = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(axis) * share, share)
        for axis, side in sides.items():
            stack = jax.lax.all_to_all(stack, axis, split_axis=0, concat_axis=side, tiled=True)
        stack = _newton_schulz(stack, coefficients)
        for axis, side in reversed(sides.items()):
            stack = jax.lax.all_to_all(stack, axis, split_axis=side, concat_axis=0, tiled=True)
        for axis in reversed(replicas):
            stack = jax.lax.all_gather(stack, axis, tiled=True)
        return _from_stack(stack[:count], x.shape, kernel)

    rule = jax.shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)
    return rule(x, coefficients)


def _to_stack(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Any number of axes -> [M, R, C]."""
    order = _order(x.ndim, kernel)
    sides = (math.prod(x.shape[axis] for axis in side) for side in (kernel.inputs, kernel.outputs))
    return x.transpose(order).reshape(-1, *sides)


def _from_stack(stack: jax.Array, shape: tuple[int, ...], kernel: Kernel) -> jax.Array:
    """The inverse of `_to_stack`."""
    order = _order(len(shape), kernel)
    return stack.reshape([shape[axis] for axis in order]).transpose(
        [order.index(i) for i in range(len(order))]
    )


def _order(axes: int, kernel: Kernel) -> list[int]:
    matrix = (*kernel.inputs, *kernel.outputs)
    return [axis for axis in range(axes) if axis not in matrix] + list(matrix)


def _newton_schulz(stack: jax.Array, coefficients: jax.Array) -> jax.Array:
    """[M, R, C] -> [M, R, C]."""
    a, b, c = (coefficients[i].astype(stack.dtype) for i in range(3))

    def one(x: jax.Array) -> jax.Array:
        x = x / (jnp.linalg.norm(x) + 1e-8)
        for _ in range(STEPS):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return x

    # The products have the size of the smaller side squared.
    tall = stack.shape[1] > stack.shape[2]
    out = jax.vmap(one)(stack.swapaxes(1, 2) if tall else stack)
    return out.swapaxes(1, 2) if tall else out
