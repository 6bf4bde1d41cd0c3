"""The training state: everything that a step changes, as plain pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from pixart_jax.models.dit import DiT, DiTConfig
from pixart_jax.models.pixart import NULL_TEXT, PixArt, PixArtConfig
from pixart_jax.training import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step [] int32 counts completed updates; params and ema are nested dicts of float32 arrays.

    loss_average [] float32 is the running average that a loss spike is told by (`divergence.py`).
    """

    step: jax.Array
    params: dict[str, Any]
    ema: dict[str, Any]
    opt_state: Any
    loss_average: jax.Array


def make_model(config: PixArtConfig | DiTConfig, *, rngs: nnx.Rngs) -> PixArt | DiT:
    """The model that a config describes."""
    return (PixArt if isinstance(config, PixArtConfig) else DiT)(config, rngs=rngs)


def abstract_model(config: PixArtConfig | DiTConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and abstract parameters of a model; costs no memory."""
    return nnx.split(nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0))))


def init_params(config: PixArtConfig | DiTConfig, seed: int | jax.Array) -> dict[str, Any]:
    """Random initial parameters as a nested dict."""
    model = make_model(config, rngs=nnx.Rngs(jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.state(model))


def split_frozen(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, kept as they are): the null caption travels with the weights but is never trained."""
    frozen = {name: value for name, value in params.items() if name == NULL_TEXT}
    return {name: value for name, value in params.items() if name not in frozen}, frozen


def new_state(params: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state of step 0; the moving average starts from the weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(split_frozen(params)[0]),
        loss_average=jnp.zeros((), jnp.float32),
    )


def abstract_state(
    config: PixArtConfig | DiTConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the whole state, before any of it exists.

    Returns:
      a `TrainState` of `jax.ShapeDtypeStruct` that carry their sharding, and one of the shardings.
    """
    _, abstract = abstract_model(config)
    param_shardings = sharding.parameter_shardings(mesh, abstract)
    shapes = jax.eval_shape(lambda: new_state(init_params(config, 0), optimizer))
    whole = sharding.replicated(mesh)
    shardings = TrainState(
        step=whole,
        params=param_shardings,
        ema=param_shardings,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, target: target,
            shapes.opt_state,
            split_frozen(param_shardings)[0],
            transform_non_params=lambda _: whole,
        ),
        loss_average=whole,
    )
    targets = jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
        shapes,
        shardings,
    )
    return targets, shardings
