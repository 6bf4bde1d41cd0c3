"""The training state as plain pytrees: trained and frozen parameters, moving averages, optimizer state."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from pixart_jax.denoiser import NETWORK
from pixart_jax.models.memory import host_sharding, on_device
from pixart_jax.training import distributed, sharding
from pixart_jax.training.objectives import Objective, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two updates.

    Attributes:
      step: [] int32, number of completed updates.
      trained: parameters that the optimizer changes, float32: a nested dict for each network, by its name.
      frozen: all other parameters, in the same form. They have no gradients, moments or averages.
      ema: moving averages of `trained`, by name. Like `optimizer`, they may be in host memory
        (`models/memory.py`).
      optimizer: state of the optimizer, for `trained` only.
      loss_average: [] float32, running average of the loss, for detecting loss spikes (`divergence.py`).
    """

    step: jax.Array
    trained: Params
    frozen: Params
    ema: dict[str, Params]
    optimizer: Any
    loss_average: jax.Array

    def weights(self, average: str | None = "ema") -> Params:
        """Returns all parameters, on the devices, which get a copy of an average that is in host memory.

        The moving average `average` replaces the trained parameters; None keeps them.
        """
        return merge(self.trained if average is None else on_device(self.ema[average]), self.frozen)


def split(params: Params, is_trained: Callable[[tuple[str, ...]], bool]) -> tuple[Params, Params]:
    """Splits `params` into (trained, frozen), by the path of each parameter."""
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        parts[not is_trained(path)][path] = leaf
    return tuple(map(traverse_util.unflatten_dict, parts))


def merge(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return traverse_util.unflatten_dict(
        traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
    )


def init_networks(objective: Objective, key: jax.Array, given: Params | None = None) -> Params:
    """Returns random initial parameters of the networks of an objective, except for those in `given`."""

    def init(name: str, make: Callable[[nnx.Rngs], nnx.Module]) -> dict[str, Any]:
        # The main network uses the key itself, so its weights do not depend on what is trained beside it.
        own = key if name == NETWORK else jax.random.fold_in(key, zlib.crc32(name.encode()))
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(own))))

    given = given or {}
    return {name: given.get(name) or init(name, make) for name, make in objective.networks.items()}


def new_state(params: Params, objective: Objective, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of step 0. The moving averages start as copies of the trained parameters."""
    trained, frozen = split(params, objective.is_trained)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        frozen=frozen,
        ema={name: jax.tree.map(jnp.copy, trained) for name in objective.averages},
        optimizer=optimizer.init(trained),
        loss_average=jnp.zeros((), jnp.float32),
    )


def start_state(
    params: Params, objective: Objective, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """Returns `new_state` on the devices of all processes, which must pass identical parameters."""
    make = jax.jit(lambda tree: new_state(tree, objective, optimizer), out_shardings=shardings)
    return make(distributed.place(params, shardings.weights(None)))


def abstract_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    strategy: str = "fsdp",
    on_host: Collection[str] = (),
) -> tuple[TrainState, TrainState]:
    """Returns the shapes and shardings of the training state without allocating it.

    Args:
      objective: defines the networks and which of their parameters are trained.
      optimizer: its moments have the sharding of their parameters. Arrays of another shape, such as factored
        moments and the scales of 8-bit moments, are small and are replicated.
      mesh: device mesh.
      strategy: `MeshConfig.strategy`; 'zero1' replicates the parameters along `fsdp`.
      on_host: `OptimizerConfig.on_host`, fields whose arrays are in host memory.

    Returns:
      A `TrainState` of `jax.ShapeDtypeStruct` with shardings, and a `TrainState` of the shardings alone.
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
    on_every_device = sharding.replicated(mesh)
    trained, frozen = replicated if strategy == "zero1" else sharded

    def of_moment(leaf, target, param):
        # An optimizer that trains only some parameters (optax.partition) masks the others.
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return target if leaf.shape == param.shape else on_every_device

    shardings = TrainState(
        step=on_every_device,
        trained=trained,
        frozen=frozen,
        ema=dict.fromkeys(objective.averages, sharded[0]),
        optimizer=optax.tree_utils.tree_map_params(
            optimizer,
            of_moment,
            shapes.optimizer,
            sharded[0],
            shapes.trained,
            transform_non_params=lambda _: on_every_device,
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        ),
        loss_average=on_every_device,
    )
    for field in on_host:
        # Scalars, such as counters, stay on the device.
        placed = jax.tree.map(
            lambda leaf, target: host_sharding(target) if leaf.ndim else target,
            getattr(shapes, field),
            getattr(shardings, field),
        )
        shardings = dataclasses.replace(shardings, **{field: placed})
    targets = jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
        shapes,
        shardings,
    )
    return targets, shardings
