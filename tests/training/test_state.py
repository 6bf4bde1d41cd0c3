import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from pixart_jax.config import MeshConfig, OptimizerConfig, TrainConfig, from_file
from pixart_jax.denoiser import NETWORK
from pixart_jax.models.configs import NULL_TEXT, PixArtConfig
from pixart_jax.training import sharding
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import abstract_state, init_networks, merge, new_state, split

MODEL = PixArtConfig(size="custom", depth=1, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
OBJECTIVE = make_objective(TrainConfig(model=MODEL))


def test_averages_start_from_the_weights_and_frozen_parameters_have_none(
    random_params,
):
    params = {NETWORK: random_params(MODEL)[1]}
    objective = OBJECTIVE._replace(averages={"ema": 0.99, "short": 0.5})
    state = new_state(params, objective, optax.adamw(1e-3))
    assert list(state.frozen[NETWORK]) == [NULL_TEXT] and NULL_TEXT not in state.trained[NETWORK]
    for name in ("ema", "short"):
        jax.tree.map(np.testing.assert_array_equal, state.ema[name], state.trained)
    assert jax.tree.structure(state.optimizer[0].mu) == jax.tree.structure(state.trained)
    for average in (None, "ema", "short"):
        jax.tree.map(np.testing.assert_array_equal, state.weights(average), params)


def test_merge_is_the_inverse_of_split():
    params = {"one": {"a": 1, "b": {"c": 2}}, "two": {"d": 3}}
    trained, frozen = split(params, lambda path: path[-1] in ("c", "d"))
    assert (trained, frozen) == ({"one": {"b": {"c": 2}}, "two": {"d": 3}}, {"one": {"a": 1}})
    assert merge(trained, frozen) == params


def test_initial_weights_do_not_depend_on_other_networks():
    make = OBJECTIVE.networks[NETWORK]
    key = jax.random.key(0)
    alone = jax.jit(lambda: init_networks(OBJECTIVE, key))()
    pair = jax.jit(lambda: init_networks(OBJECTIVE._replace(networks={"helper": make, NETWORK: make}), key))()
    jax.tree.map(np.testing.assert_array_equal, pair[NETWORK], alone[NETWORK])
    assert np.any(pair["helper"]["t_block"]["kernel"] != pair[NETWORK]["t_block"]["kernel"])


def test_moments_are_sharded_like_their_parameter():
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))
    target, shardings = abstract_state(OBJECTIVE, optax.adamw(1e-3), mesh)
    assert shardings.optimizer[0].nu == shardings.trained == shardings.ema["ema"]
    assert shardings.optimizer[0].count.spec == jax.sharding.PartitionSpec()
    kernel = target.optimizer[0].mu[NETWORK]["t_block"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (6, 6, 24)


def test_small_arrays_of_an_optimizer_are_replicated():
    """CAME's momentum is sharded, but not the averages over rows and columns; likewise 8-bit moments."""
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))

    def specs(choose, **changes):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=0.0, **changes), 1, OBJECTIVE)
        state = abstract_state(OBJECTIVE, optimizer, mesh)[1].optimizer
        return [tree[NETWORK]["blocks"]["stacked"]["mlp"]["fc1"]["kernel"].spec for tree in choose(state[0])]

    sharded, replicated = (
        jax.sharding.PartitionSpec(None, ("fsdp",), ("tensor",)),
        jax.sharding.PartitionSpec(),
    )
    assert specs(lambda state: state[:3], name="came") == [sharded, replicated, replicated]
    found = specs(lambda state: (state.values["nu"], state.scales["nu"]), moments="int8")
    assert found == [sharded, replicated]


@pytest.mark.parametrize(("base", "most"), [("bfloat16", 1.35e9), ("int8", 0.75e9)])
def test_the_state_of_a_lora_on_a_device(base, most):
    """The device memory of XL/2's state with rank 16; the moving average is in host memory."""
    config = from_file(f"{Path(__file__).parents[2] / 'configs/lora.py'}:512")
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, base_dtype=base))
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, config.data.batch_size, objective, config.steps)
    mesh = sharding.make_mesh(config.mesh, config, jax.devices()[:1])
    target, shardings = abstract_state(objective, optimizer, mesh, on_host=config.optimizer.on_host)
    held = {
        field.name: sharding.bytes_per_device(getattr(target, field.name), getattr(shardings, field.name))
        for field in dataclasses.fields(target)
    }
    assert held["ema"] == 0 and held["frozen"] > 0.6e9 and held["trained"] > 50e6
    assert sum(held.values()) <= most
