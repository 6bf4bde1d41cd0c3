import dataclasses

import jax
import numpy as np
import pytest
from stage_batches import CONFIG, MODEL, make_batch

from pixart_jax.config import (
    DiffusionConfig,
    DivergenceConfig,
    MeshConfig,
    RoutingConfig,
)
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import UserError
from pixart_jax.models.configs import NULL_TEXT
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.memory import is_on_host
from pixart_jax.training import sharding
from pixart_jax.training.objectives import Stream, make_objective, sample_keys, stream_key
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import abstract_state, new_state, start_state
from pixart_jax.training.step import jit_train_step, make_gradient, make_train_step, whole_step
from pixart_jax.weights.power_averages import PowerAverage


def test_training_in_float16_raises_with_the_reason():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype="float16"))
    with pytest.raises(UserError, match=r"'float16' is for sampling only: small gradients.*'bfloat16'"):
        make_train_step(config, make_objective(config), None)


def make_step(random_params, config, objective=None):
    """Returns the state of step 0 and the compiled step on one device."""
    objective = objective or make_objective(config)
    optimizer = make_optimizer(config.optimizer, config.data.batch_size, objective)
    params = {NETWORK: random_params(config.model)[1]}
    state = jax.jit(lambda tree: new_state(tree, objective, optimizer))(params)
    return state, jax.jit(make_train_step(config, objective, optimizer))


def train(random_params, config, mesh=None, steps=5):
    """Returns the losses of some steps and the state after them."""
    losses = []
    if mesh is None:
        state, step = make_step(random_params, config)
        for k in range(steps):
            state, metrics = step(state, make_batch(k))
            losses.append(float(metrics["loss"]))
        return losses, state
    strategy, mesh = mesh.strategy, sharding.make_mesh(mesh)
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, config.data.batch_size, objective)
    target, shardings = abstract_state(objective, optimizer, mesh, strategy)
    params = {NETWORK: random_params(config.model)[1]}
    with activation_sharding(sharding.activation_rule(mesh)):
        state = jax.jit(lambda tree: new_state(tree, objective, optimizer), out_shardings=shardings)(params)
        step = make_train_step(config, objective, optimizer, shardings)
        step = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=0)
        for k in range(steps):
            state, metrics = step(state, sharding.global_batch(mesh, make_batch(k)))
            losses.append(float(metrics["loss"]))
    assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding, state, target))
    return losses, state


@pytest.fixture(scope="module")
def single(random_params):
    return train(random_params, CONFIG)


def test_the_loss_decreases(single):
    losses, state = single
    assert losses[-1] < losses[0]
    assert int(state.step) == 5


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, fsdp=4),
        MeshConfig(data=2, fsdp=4, strategy="zero1"),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=2, fsdp=2, sequence=2),
    ],
    ids=lambda mesh: f"{mesh.data}x{mesh.fsdp}x{mesh.sequence}x{mesh.tensor}-{mesh.strategy}",
)
def test_every_mesh_gives_the_losses_of_one_device(random_params, single, mesh):
    losses, state = train(random_params, CONFIG, mesh)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    kernel = state.optimizer[1][0].mu[NETWORK]["blocks"]["stacked"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 24 // mesh.fsdp, 96 // mesh.tensor)


def test_accumulation_does_not_change_the_losses(random_params, single):
    optimizer = dataclasses.replace(CONFIG.optimizer, accumulation=4)
    losses, _ = train(random_params, dataclasses.replace(CONFIG, optimizer=optimizer))
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)


def test_the_terms_of_a_sample_are_multiplied_by_its_weight(random_params):
    """DreamBooth with prior weight 0.5: the mean over the batch of w_i L_i, also in micro-batches."""
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, accumulation=4))
    objective = make_objective(config)
    params = {NETWORK: random_params(config.model)[1]}
    trained = {NETWORK: {name: leaf for name, leaf in params[NETWORK].items() if name != NULL_TEXT}}
    frozen = {NETWORK: {NULL_TEXT: params[NETWORK][NULL_TEXT]}}
    gradient = jax.jit(make_gradient(config, objective))
    batch = make_batch()
    weight = np.where(np.arange(16) % 3, 1.0, 0.5).astype(np.float32)
    found, means = gradient(trained, frozen, batch | {"weight": weight})
    keys = sample_keys(stream_key(config.seed, Stream.SAMPLES), batch["index"])
    terms = jax.jit(objective.loss)(params, batch, keys)
    for name in terms:
        np.testing.assert_allclose(means[name], (weight * terms[name]).mean(), rtol=1e-5)
    # Gradients are linear in the weights: with weights w and 1.5 - w they add up to 1.5 times those without.
    rest, _ = gradient(trained, frozen, batch | {"weight": 1.5 - weight})
    whole, _ = gradient(trained, frozen, batch | {"weight": np.ones(16, np.float32)})
    for one, other, both in zip(*map(jax.tree.leaves, (found, rest, whole))):
        np.testing.assert_allclose(one + other, 1.5 * both, rtol=1e-3, atol=1e-5)


def test_muon_trains_on_a_mesh(random_params):
    """The state has the sharding of the parameters, and the losses decrease as on one device."""
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, name="muon"))
    alone, _ = train(random_params, config, steps=3)
    losses, _ = train(random_params, config, MeshConfig(2, 2, 2), steps=3)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, alone, rtol=1e-4)


def test_token_routing_is_the_same_on_any_mesh(random_params, single):
    config = dataclasses.replace(CONFIG, routing=RoutingConfig(rate=0.5, first_blocks=1, last_blocks=0))
    routed, _ = train(random_params, config, steps=2)
    sharded, _ = train(random_params, config, MeshConfig(2, 2, 2), steps=2)
    np.testing.assert_allclose(sharded, routed, rtol=1e-5)
    assert abs(routed[0] - single[0][0]) > 1e-4
    # The last steps of a stage train without routing.
    finish, _ = train(random_params, config.without_routing(), steps=2)
    assert finish == single[0][:2]


def test_the_null_caption_is_never_trained(random_params, single):
    _, params = random_params(CONFIG.model)
    state = single[1]
    assert list(state.frozen[NETWORK]) == [NULL_TEXT]
    np.testing.assert_array_equal(state.weights()[NETWORK][NULL_TEXT], params[NULL_TEXT])
    for tree in (state.trained, state.ema["ema"], state.optimizer[1][0].mu):
        assert NULL_TEXT not in tree[NETWORK] and "blocks" in tree[NETWORK]


def test_random_numbers_depend_on_the_sample_and_not_on_its_row(random_params):
    """A permuted batch has the same loss."""
    state, step = make_step(random_params, CONFIG)
    batch = make_batch()
    order = np.random.default_rng(0).permutation(16)
    _, straight = step(state, batch)
    _, shuffled = step(state, {name: value[order] for name, value in batch.items()})
    np.testing.assert_allclose(shuffled["loss"], straight["loss"], rtol=1e-6)
    _, others = step(state, {**batch, "index": batch["index"] + 16})
    assert abs(float(others["loss"]) - float(straight["loss"])) > 1e-4


def test_a_dropped_caption_has_no_influence(random_params):
    """If every caption is dropped, the loss does not depend on the text."""
    config = dataclasses.replace(CONFIG, diffusion=DiffusionConfig(condition_dropout=0.999999))
    state, step = make_step(random_params, config)
    batch = make_batch()
    _, one = step(state, batch)
    _, other = step(state, {**batch, "text": batch["text"] + 1})
    np.testing.assert_array_equal(one["loss"], other["loss"])


def test_after_update_changes_the_new_state_unless_the_update_is_skipped(random_params):
    objective = make_objective(CONFIG)

    def double(state, batch, keys):
        assert keys.shape == batch["index"].shape
        return dataclasses.replace(state, trained=jax.tree.map(lambda leaf: 2 * leaf, state.trained))

    state, plain = make_step(random_params, CONFIG)
    _, doubled = make_step(random_params, CONFIG, objective._replace(after_update=double))
    after, _ = plain(state, make_batch())
    twice, _ = doubled(state, make_batch())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, 2 * a, rtol=1e-5, atol=1e-6), after.trained, twice.trained
    )
    broken = {**make_batch(), "latent_mean": np.full((16, 4, 4, 4), np.nan, np.float32)}
    kept, metrics = doubled(state, broken)
    assert metrics["refused"] and int(kept.step) == 1
    jax.tree.map(np.testing.assert_array_equal, kept.trained, state.trained)


def train_on_mesh(random_params, steps=7, sizes=(2, 2, 2), **changes):
    """Trains with two moving averages on a mesh, as the trainer does; returns the states after each step."""
    optimizer = dataclasses.replace(CONFIG.optimizer, ema_decay=0.5, **changes)
    # The third update is a spike, and is skipped.
    config = dataclasses.replace(CONFIG, optimizer=optimizer, divergence=DivergenceConfig(spike_warmup=2))
    objective = make_objective(config)._replace(
        averages={"ema": 0.5, "slow": 0.99, "power": PowerAverage(0.2)}
    )
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    optimizer = make_optimizer(config.optimizer, config.data.batch_size, objective)
    target, shardings = abstract_state(objective, optimizer, mesh, on_host=config.optimizer.on_host)
    states, refused = [], []
    with activation_sharding(sharding.activation_rule(mesh)):
        state = start_state({NETWORK: random_params(config.model)[1]}, objective, optimizer, shardings)
        program = jit_train_step(config, objective, optimizer, shardings)
        step = whole_step(program, config, objective, shardings)
        for k in range(steps):
            batch = make_batch(k)
            if k == 2:
                batch["latent_mean"] = batch["latent_mean"] * np.float32(np.nan)
            state, metrics = step(state, sharding.global_batch(mesh, batch), k)
            refused.append(bool(metrics["refused"]))
            states.append(jax.device_get(state))
            found = jax.tree.map(lambda leaf: leaf.sharding, state)
            assert jax.tree.all(jax.tree.map(lambda a, b: a == b, found, shardings))
    assert refused == [k == 2 for k in range(steps)]
    return states, state, target, shardings


def close(a, b):
    # Other programs round differently, and AdamW turns the rounding of small gradients into larger updates.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)


def test_averages_and_moments_in_host_memory(random_params):
    """They have the same values as on the devices, also if an update is skipped, and take no memory there."""
    expected = train_on_mesh(random_params, ema_every=2)[0]
    states, state, target, shardings = train_on_mesh(
        random_params, ema_every=2, ema_device="host", offload=True
    )
    for a, b in zip(states, expected):
        close(a, b)
    assert sharding.bytes_per_device(target.ema, shardings.ema) == 0
    assert sharding.bytes_per_device(target.optimizer, shardings.optimizer) <= 16  # the counters
    average = jax.tree.leaves(state.ema["slow"])[0]
    assert average.sharding.memory_kind == "pinned_host"
    weights = jax.tree.leaves(state.weights("slow"))
    assert not any(is_on_host(leaf.sharding) for leaf in weights)
    # Validation and sampling can compute with them.
    assert np.isfinite(jax.jit(lambda leaves: sum(map(jax.numpy.sum, leaves)))(weights))


def test_averages_of_every_third_step(random_params):
    """ema_every = 3 against the formula in float64: the decay of three steps, with its warm-up."""
    states = train_on_mesh(random_params, ema_every=3, ema_device="host", sizes=(8, 1, 1))[0]
    kernel = lambda tree: np.asarray(tree[NETWORK]["t_block"]["kernel"], np.float64)  # noqa: E731
    for name, limit in (("ema", 0.5), ("slow", 0.99)):
        average = kernel(random_kernel := {NETWORK: random_params(CONFIG.model)[1]})
        for k, state in enumerate(states):
            if k == 5:  # step 3, at which k = 2, was skipped, and with it the update of the average
                decay = np.prod([min(limit, (1 + j) / (10 + j)) for j in (3, 4, 5)])
                average = decay * average + (1 - decay) * kernel(state.trained)
            np.testing.assert_allclose(kernel(state.ema[name]), average, rtol=1e-5, atol=1e-7)
        assert np.any(average != kernel(random_kernel))
    left = (1 - 3 / 6) ** (PowerAverage(0.2).exponent + 1)  # of the initial weights, as step 3 was skipped
    average = left * kernel(random_kernel) + (1 - left) * kernel(states[5].trained)
    np.testing.assert_allclose(kernel(states[5].ema["power"]), average, rtol=1e-5, atol=1e-7)


def test_the_average_of_schedule_free_in_host_memory(random_params):
    """It is x of the states themselves: x = (y - (1 - beta1) z) / beta1, of every second step."""
    changes = dict(name="schedule_free", ema_every=2, ema_device="host", offload=True)
    states = train_on_mesh(random_params, steps=6, **changes)[0]
    beta1 = CONFIG.optimizer.beta1
    for before, state in zip(states[::2], states[1::2]):
        x = jax.tree.map(lambda y, z: (y - (1 - beta1) * z) / beta1, state.trained, state.optimizer[-1].z)
        close(state.ema["ema"], x)
        moved = jax.tree.map(lambda a, b: np.any(a != b), before.ema["ema"], state.ema["ema"])
        assert any(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, states[2].ema, states[1].ema)
