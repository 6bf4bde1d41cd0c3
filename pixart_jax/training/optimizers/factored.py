"""Adafactor and CAME: the second moment of a matrix is stored as the averages of its rows and columns.

Both were written for PyTorch, where a weight is [out, in] and every block has weights of its own. Here a
kernel is [in..., out...] and the blocks are stacked along a layer axis. `Layout` names the axes of an array
that correspond to those of PyTorch, so that an update is that of the PyTorch code, without moving any array.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pixart_jax.training.objectives import Objective

Path = tuple[str, ...]


class Layout(NamedTuple):
    """How an array corresponds to one array of PyTorch for each layer.

    Attributes:
      shape: shape to which the array is reshaped; the axes below are those of this shape.
      last: axes that form the last axis in PyTorch, such as the inputs of a linear layer.
      before: axes that form the axis before the last one in PyTorch, such as the outputs of a linear layer.
        `last` and `before` are empty if the array is a vector in PyTorch; then it is not factored.
      whole: axes of the array of a single layer, that is, all but the layer axis.
    """

    shape: tuple[int, ...]
    last: tuple[int, ...]
    before: tuple[int, ...]
    whole: tuple[int, ...]

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], layers: int = 0) -> Layout:
        """The layout of an array that has the axes of PyTorch, after `layers` (0 or 1) layer axes."""
        whole = tuple(range(layers, len(shape)))
        return cls(shape, whole[-1:], whole[-2:-1], whole) if len(whole) > 1 else cls(shape, (), (), whole)


def layouts(objective: Objective) -> dict[Path, Layout]:
    """Returns the layout of each trained parameter by its path.

    `layers.linear` records how many axes of a kernel are inputs. All others are outputs, which PyTorch
    flattens: a fused qkv kernel [D, 3, H, K] is a matrix [3 H K, D], and its bias [3, H, K] is a vector. The
    projection of patches [p p C, D] is a convolution in PyTorch, [D, C, p, p], so that each p x p filter is a
    matrix.
    """
    return {
        (network, *path): _layout(variable.shape, variable.get_metadata())
        for network, state in objective.abstract_networks().items()
        for path, variable in nnx.to_flat_state(state)
        if objective.is_trained((network, *path))
    }


def _layout(shape: tuple[int, ...], metadata: Mapping[str, Any]) -> Layout:
    layers = int("layers" in (metadata.get("out_sharding") or ()))
    whole = tuple(range(layers, len(shape)))
    if (patch := metadata.get("patch_size")) is not None:
        patches, width = shape
        shape = (patch, patch, patches // patch**2, width)
        return Layout(shape, last=(1,), before=(0,), whole=(0, 1, 2, 3))
    if metadata.get("filters"):  # one filter for each channel, [r, r, …]; PyTorch has [D, 1, r, r]
        return Layout(shape, last=(layers + 1,), before=(layers,), whole=whole)
    inputs = metadata.get("inputs")
    if inputs is None:  # a table, with the axes of PyTorch
        return Layout.of_shape(shape, layers)
    if inputs == 0:  # a bias
        return Layout(shape, (), (), whole)
    return Layout(shape, whole[:inputs], whole[inputs:], whole)


class CameState(NamedTuple):
    """State of CAME, trees with the structure of the parameters.

    Of an array that is not factored, `row` is the second moment; `column` and the last two are scalar zeros.
    """

    momentum: Any
    row: Any
    column: Any
    instability_row: Any
    instability_column: Any


class AdafactorState(NamedTuple):
    """State of Adafactor: the number of updates, and trees as in `CameState`."""

    count: jax.Array
    row: Any
    column: Any


def came(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip: float = 1.0,
    layouts: Mapping[Path, Layout] | None = None,
) -> optax.GradientTransformation:
    """CAME (Luo et al. 2023, arXiv 2307.02047), the optimizer of PixArt-Σ.

    With A(R, C) = rsqrt(R / mean R) rsqrt(C), the inverse root of the factored second moment:

        R, C  <- averages of g^2 + eps_1 over the last axis and the one before, decayed by b2
        u      = A(R, C) g,   then u <- u / max(1, RMS(u) / clip)
        m     <- b1 m + (1 - b1) u
        R', C' <- the same averages of (u - m)^2 + eps_2, decayed by b3
        p     <- p - learning_rate (A(R', C') m + weight_decay p)

    Vectors have u = g rsqrt(V) with the full second moment V, and the update m. As in the official code
    there is no bias correction, so the first updates of a matrix are about 11 times the learning rate: warm
    up.

    Args:
      learning_rate: rate or schedule.
      weight_decay: decoupled weight decay.
      b1, b2, b3: decays of the momentum, the second moment and the instability.
      eps: eps_1 and eps_2.
      clip: upper bound of the root mean square of u.
      layouts: layout of each parameter, by path. None: all arrays have the axes of PyTorch.
    """
    return optax.chain(
        _scale_by_came(b1, b2, b3, eps, clip, layouts),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    *,
    eps: float = 1e-30,
    clip: float = 1.0,
    layouts: Mapping[Path, Layout] | None = None,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) with an external learning rate and no momentum.

        R, C <- averages of g^2 + eps, decayed by 1 - t^-0.8 at update t = 1, 2, …
        u     = A(R, C) g  (see `came`),   then u <- u / max(1, RMS(u) / clip)
        p    <- p - learning_rate (u + weight_decay p)

    `optax.adafactor` factors the two largest axes of an array, which in a kernel [layers, D, 3, H, K] are not
    those of the matrix, and multiplies the weight decay not by the learning rate.

    Args:
      learning_rate, weight_decay, eps, clip, layouts: as for `came`.
    """
    return optax.chain(
        _scale_by_adafactor(eps, clip, layouts),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_came(b1, b2, b3, eps, clip, layouts) -> optax.GradientTransformation:
    def init(params):
        axes = _layout_tree(params, layouts)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return CameState(zeros, *_zeros(params, axes), *_zeros(params, axes, vectors=False))

    def one(gradient, at, momentum, row, column, instability_row, instability_column):
        shape = gradient.shape
        gradient, momentum = (x.astype(jnp.float32).reshape(at.shape) for x in (gradient, momentum))
        row, column = _average(jnp.square(gradient) + eps[0], row, column, b2, at)
        update = _clip(gradient * _inverse_root(row, column, at), clip, at)
        momentum = b1 * momentum + (1 - b1) * update
        out = momentum
        if at.last:
            instability = jnp.square(update - momentum) + eps[1]
            pair = _average(instability, instability_row, instability_column, b3, at)
            instability_row, instability_column = pair
            out = momentum * _inverse_root(*pair, at)
        momentum = momentum.reshape(shape)
        return out.reshape(shape), momentum, row, column, instability_row, instability_column

    def update(gradients, state, params=None):
        del params
        axes = _layout_tree(gradients, layouts)
        out, *state = _unzip(6, gradients, jax.tree.map(one, gradients, axes, *state))
        return out, CameState(*state)

    return optax.GradientTransformation(init, update)


def _scale_by_adafactor(eps, clip, layouts) -> optax.GradientTransformation:
    def init(params):
        axes = _layout_tree(params, layouts)
        return AdafactorState(jnp.zeros((), jnp.int32), *_zeros(params, axes))

    def update(gradients, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        decay = 1.0 - count.astype(jnp.float32) ** -0.8

        def one(gradient, at, row, column):
            shape, gradient = gradient.shape, gradient.astype(jnp.float32).reshape(at.shape)
            row, column = _average(jnp.square(gradient) + eps, row, column, decay, at)
            return _clip(gradient * _inverse_root(row, column, at), clip, at).reshape(shape), row, column

        axes = _layout_tree(gradients, layouts)
        results = jax.tree.map(one, gradients, axes, state.row, state.column)
        out, row, column = _unzip(3, gradients, results)
        return out, AdafactorState(count, row, column)

    return optax.GradientTransformation(init, update)


# --- One array ---


def _average(values, row, column, decay, at: Layout):
    """Decayed averages of `values` over the last axis and the one before; of a vector, of `values` itself."""
    if not at.last:
        return decay * row + (1 - decay) * values, column
    return tuple(
        decay * old + (1 - decay) * jnp.mean(values, axes, keepdims=True)
        for old, axes in ((row, at.last), (column, at.before))
    )


def _inverse_root(row, column, at: Layout):
    """rsqrt of the factored second moment, R C / mean R."""
    if not at.last:
        return jax.lax.rsqrt(row)
    return jax.lax.rsqrt(row / jnp.mean(row, at.before, keepdims=True)) * jax.lax.rsqrt(column)


def _clip(update, limit: float, at: Layout):
    """Divides the array of each layer by max(1, RMS / limit)."""
    rms = jnp.sqrt(jnp.mean(jnp.square(update), at.whole, keepdims=True))
    return update / jnp.maximum(1.0, rms / limit)


# --- Trees ---


def _layout_tree(tree: Any, layouts: Mapping[Path, Layout] | None) -> Any:
    def find(path, leaf):
        if layouts is None:
            return Layout.of_shape(leaf.shape)
        return layouts[tuple(key.key for key in path)]

    return jax.tree_util.tree_map_with_path(find, tree)


def _zeros(params: Any, axes: Any, vectors: bool = True) -> tuple[Any, Any]:
    """Returns trees of zeros for R and C. If an array is not factored, R is V, or 0 if not `vectors`."""

    def row(_, at: Layout) -> jax.Array:
        return jnp.zeros(_without(at.shape, at.last) if at.last or vectors else (), jnp.float32)

    def column(_, at: Layout) -> jax.Array:
        return jnp.zeros(_without(at.shape, at.before) if at.last else (), jnp.float32)

    return jax.tree.map(row, params, axes), jax.tree.map(column, params, axes)


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _unzip(count: int, like: Any, results: Any) -> list[Any]:
    """Turns a tree of tuples, with the structure of `like`, into `count` trees."""
    return [jax.tree.map(lambda _, result, k=k: result[k], like, results) for k in range(count)]
