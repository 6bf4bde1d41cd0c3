"""The training state: everything that a step changes and everything it keeps, as plain pytrees."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from pixart_jax.training import sharding
from pixart_jax.training.objectives import NETWORK, Objective

# Networks by name, each a nested dict of arrays.
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two updates.

    Attributes:
      step: [] int32, completed updates.
      trained: the parameters that the optimizer changes, float32: for each network a nested dict.
      frozen: the other parameters, likewise. They have no gradient, no moments and no average.
      ema: moving averages of `trained`, by name.
      optimizer: the state of the optimizer, for `trained` alone.
      loss_average: [] float32, the running average that loss spikes are compared with (`divergence.py`).
    """

    step: jax.Array
    trained: Params
    frozen: Params
    ema: dict[str, Params]
    optimizer: Any
    loss_average: jax.Array

    def weights(self, average: str | None = "ema") -> Params:
        """All parameters, the trained ones as they are (None) or as one of the averages has them."""
        return merge(self.trained if average is None else self.ema[average], self.frozen)


def split(params: Params, is_trained: Callable[[tuple[str, ...]], bool]) -> tuple[Params, Params]:
    """(trained, frozen) parts of `params`, by the path of each parameter."""
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        parts[not is_trained(path)][path] = leaf
    return tuple(map(traverse_util.unflatten_dict, parts))


def merge(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return traverse_util.unflatten_dict(
        traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
    )


def init_networks(objective: Objective, key: jax.Array) -> Params:
    """Random initial parameters of every network of an objective."""

    def init(name: str, make: Callable[[nnx.Rngs], nnx.Module]) -> dict[str, Any]:
        # The main network has the same weights whatever is trained beside it.
        own = key if name == NETWORK else jax.random.fold_in(key, zlib.crc32(name.encode()))
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(own))))

    return {name: init(name, make) for name, make in objective.networks.items()}


def new_state(params: Params, objective: Objective, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of step 0; the averages start from the weights."""
    trained, frozen = split(params, objective.is_trained)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        frozen=frozen,
        ema={name: jax.tree.map(jnp.copy, trained) for name in objective.averages},
        optimizer=optimizer.init(trained),
        loss_average=jnp.zeros((), jnp.float32),
    )


def abstract_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    strategy: str = "fsdp",
) -> tuple[TrainState, TrainState]:
    """The shapes and shardings of the whole state, before any of it exists.

    Args:
      objective: names the networks and what is trained of them.
      optimizer: its state follows the trained parameters.
      mesh: the devices.
      strategy: `MeshConfig.strategy`; 'zero1' replicates the parameters along `fsdp`.

    Returns:
      a `TrainState` of `jax.ShapeDtypeStruct` that carry their sharding, and one of the shardings.
    """
    networks = objective.abstract_networks()
    sharded, replicated = (
        split(
            {name: sharding.parameter_shardings(mesh, state, rules) for name, state in networks.items()},
            objective.is_trained,
        )
        for rules in (sharding.RULES, sharding.ZERO1_RULES)
    )
    params = {name: nnx.to_pure_dict(state) for name, state in networks.items()}
    shapes = jax.eval_shape(lambda tree: new_state(tree, objective, optimizer), params)
    whole = sharding.replicated(mesh)
    trained, frozen = replicated if strategy == "zero1" else sharded
    shardings = TrainState(
        step=whole,
        trained=trained,
        frozen=frozen,
        ema=dict.fromkeys(objective.averages, sharded[0]),
        optimizer=optax.tree_utils.tree_map_params(
            optimizer,
            # An optimizer that takes a part of the parameters masks the others.
            lambda leaf, target: leaf if isinstance(leaf, optax.MaskedNode) else target,
            shapes.optimizer,
            sharded[0],
            transform_non_params=lambda _: whole,
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        ),
        loss_average=whole,
    )
    targets = jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
        shapes,
        shardings,
    )
    return targets, shardings
