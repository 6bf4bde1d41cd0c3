import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.config import (
    DataConfig,
    DiffusionConfig,
    FeaturesConfig,
    GuidanceConfig,
    MeshConfig,
    OptimizerConfig,
    RoutingConfig,
    TrainConfig,
)
from pixart_jax.errors import UserError
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.pixart import NULL_TEXT, PixArtConfig
from pixart_jax.training import sharding
from pixart_jax.training import step as step_module
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import abstract_state, new_state
from pixart_jax.training.step import (
    condition_arguments,
    make_train_step,
    make_validation_step,
    without_routing,
)

MODEL = PixArtConfig(size="custom", depth=2, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
CONFIG = TrainConfig(
    model=MODEL,
    features=FeaturesConfig(latent_scale=0.5),
    data=DataConfig(batch_size=16),
    guidance=GuidanceConfig(null_text="t5_empty", null_mask="caption"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-8, clip_norm=1.0),
)


def make_batch(step=0, size=16):
    rng = np.random.default_rng(step)
    return {
        "latent_mean": rng.normal(size=(size, 4, 4, 4)).astype(np.float32),
        "latent_std": np.full((size, 4, 4, 4), 0.1, np.float32),
        "text": rng.normal(size=(size, 5, 8)).astype(np.float32),
        "text_mask": np.arange(5) < rng.integers(1, 6, size=(size, 1)),
        "label": rng.integers(0, 3, size).astype(np.int32),
        "image_size": np.full((size, 2), 32.0, np.float32),
        "aspect_ratio": np.ones((size, 1), np.float32),
        "index": np.arange(step * size, (step + 1) * size, dtype=np.uint32),
    }


def test_training_in_float16_raises_with_the_reason():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype="float16"))
    with pytest.raises(UserError, match=r"'float16' is for sampling: small gradients.*'bfloat16'"):
        make_train_step(config, None, None)


def train(random_params, config, mesh=None, steps=5):
    """Losses of some steps, and the state after them."""
    graph, params = random_params(config.model)
    optimizer = make_optimizer(config.optimizer, config.data.batch_size)
    losses = []
    if mesh is None:
        state = jax.jit(functools.partial(new_state, optimizer=optimizer))(params)
        step = jax.jit(make_train_step(config, graph, optimizer))
        for k in range(steps):
            state, metrics = step(state, make_batch(k))
            losses.append(float(metrics["loss"]))
        return losses, state
    strategy, mesh = mesh.strategy, sharding.make_mesh(mesh)
    target, shardings = abstract_state(config.model, optimizer, mesh, strategy)
    with activation_sharding(sharding.activation_rule(mesh)):
        state = jax.jit(functools.partial(new_state, optimizer=optimizer), out_shardings=shardings)(params)
        step = make_train_step(config, graph, optimizer, shardings)
        step = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=0)
        for k in range(steps):
            state, metrics = step(state, sharding.global_batch(mesh, make_batch(k)))
            losses.append(float(metrics["loss"]))
    assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding, state, target))
    return losses, state


@pytest.fixture(scope="module")
def single(random_params):
    return train(random_params, CONFIG)


def test_losses_fall(single):
    losses, state = single
    assert losses[-1] < losses[0]
    assert int(state.step) == 5


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
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
    kernel = state.opt_state[1][0].mu["blocks"]["stacked"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 24 // mesh.fsdp, 96 // mesh.tensor)


def test_accumulation_changes_nothing(random_params, single):
    optimizer = dataclasses.replace(CONFIG.optimizer, accumulation=4)
    losses, _ = train(random_params, dataclasses.replace(CONFIG, optimizer=optimizer))
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)


def test_muon_trains_on_a_mesh(random_params):
    """The state is laid out as the parameters are, and the losses fall as on one device."""
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, name="muon"))
    alone, _ = train(random_params, config, steps=3)
    losses, _ = train(random_params, config, MeshConfig(2, 2, 2), steps=3)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, alone, rtol=1e-4)


def test_tokens_jump_alike_on_any_mesh(random_params, single):
    config = dataclasses.replace(CONFIG, routing=RoutingConfig(rate=0.5, first_blocks=1, last_blocks=0))
    routed, _ = train(random_params, config, steps=2)
    sharded, _ = train(random_params, config, MeshConfig(2, 2, 2), steps=2)
    np.testing.assert_allclose(sharded, routed, rtol=1e-5)
    assert abs(routed[0] - single[0][0]) > 1e-4
    # The finish of a stage trains as if there were no routing.
    assert step_module._route(without_routing(config), jax.random.key(0), make_batch()) is None


def test_which_tokens_jump_belongs_to_the_sample():
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, depth=4),
        routing=RoutingConfig(rate=0.25, first_blocks=1, last_blocks=1),
    )
    batch = make_batch()
    route = step_module._route(config, jax.random.key(0), batch)
    assert (route.start, route.stop) == (1, 3)
    kept = np.asarray(route.kept)
    assert kept.shape == (16, 3) and all(len(set(row)) == 3 for row in kept.tolist()) and kept.max() < 4
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 1
    moved = step_module._route(config, jax.random.key(0), {**batch, "index": batch["index"][::-1]})
    np.testing.assert_array_equal(moved.kept, kept[::-1])


def test_the_null_caption_is_never_trained(random_params, single):
    _, params = random_params(CONFIG.model)
    for tree in (single[1].params, single[1].ema):
        np.testing.assert_array_equal(tree[NULL_TEXT], params[NULL_TEXT])
    assert NULL_TEXT not in single[1].opt_state[1][0].mu


def test_draws_belong_to_the_sample_not_to_its_row(random_params):
    """A batch in another order has the same loss."""
    graph, params = random_params(CONFIG.model)
    optimizer = make_optimizer(CONFIG.optimizer, 16)
    step = jax.jit(make_train_step(CONFIG, graph, optimizer))
    state = jax.jit(functools.partial(new_state, optimizer=optimizer))(params)
    batch = make_batch()
    order = np.random.default_rng(0).permutation(16)
    _, straight = step(state, batch)
    _, shuffled = step(state, {name: value[order] for name, value in batch.items()})
    np.testing.assert_allclose(shuffled["loss"], straight["loss"], rtol=1e-6)
    _, others = step(state, {**batch, "index": batch["index"] + 16})
    assert abs(float(others["loss"]) - float(straight["loss"])) > 1e-4


@pytest.mark.parametrize(
    ("null_text", "null_mask", "expected"),
    [
        ("t5_empty", "caption", [1, 1, 1, 0, 0]),
        ("t5_empty", "own", [1, 0, 0, 0, 0]),
        ("token", "own", [1, 1, 1, 1, 1]),
    ],
)
def test_a_dropped_caption_takes_the_mask_that_was_chosen(null_text, null_mask, expected):
    guidance = GuidanceConfig(null_text=null_text, null_mask=null_mask)
    config = dataclasses.replace(CONFIG, guidance=guidance)
    batch = {
        "text": jnp.ones((2, 5, 8)),
        "text_mask": jnp.asarray([[1, 1, 1, 0, 0]] * 2, bool),
    }
    params = {NULL_TEXT: jnp.full((5, 8), 7.0)}
    text, mask = condition_arguments(config, params, batch, jnp.asarray([False, True]))
    np.testing.assert_array_equal(text[:, 0, 0], [1, 7])
    np.testing.assert_array_equal(mask.astype(int), [[1, 1, 1, 0, 0], expected])


def test_a_dropped_class_is_the_last_label():
    config = dataclasses.replace(CONFIG, model=DiTConfig(num_classes=3))
    (labels,) = condition_arguments(config, {}, {"label": jnp.asarray([0, 1])}, jnp.asarray([False, True]))
    np.testing.assert_array_equal(labels, [0, 3])


def test_dropout_happens_at_its_rate(random_params):
    """With everything dropped, the text does not matter."""
    config = dataclasses.replace(CONFIG, diffusion=DiffusionConfig(condition_dropout=0.999999))
    graph, params = random_params(config.model)
    optimizer = make_optimizer(config.optimizer, 16)
    step = jax.jit(make_train_step(config, graph, optimizer))
    state = jax.jit(functools.partial(new_state, optimizer=optimizer))(params)
    batch = make_batch()
    _, one = step(state, batch)
    _, other = step(state, {**batch, "text": batch["text"] + 1})
    np.testing.assert_array_equal(one["loss"], other["loss"])


def test_validation_is_the_loss_at_a_fixed_grid(random_params):
    graph, params = random_params(CONFIG.model)
    step = jax.jit(make_validation_step(CONFIG, graph))
    batch = make_batch() | {"weight": np.r_[np.ones(15), 0].astype(np.float32)}
    loss, count = step(params, batch)
    np.testing.assert_array_equal(count, [2] * 7 + [1])
    again, _ = step(params, batch)
    np.testing.assert_array_equal(loss, again)
    # A padding row counts for nothing, whatever it holds.
    batch["latent_mean"][15] = 1e3
    np.testing.assert_allclose(step(params, batch)[0], loss, rtol=1e-6)


def test_latents_are_drawn_from_the_posterior_and_scaled():
    """x_0 = scale (mean + std eps), with noise of its own."""
    batch = make_batch()
    batch["latent_mean"][:] = 3.0
    posterior, noise, t, _ = step_module._draws(CONFIG, jax.random.key(0), batch)
    x0 = step_module._clean_latents(CONFIG, batch, posterior)
    assert abs(float(x0.mean()) - 1.5) < 0.01 and abs(float(x0.std()) - 0.05) < 0.005
    assert not np.allclose(posterior, noise)
    assert 0 <= int(t.min()) < int(t.max()) <= 999
