from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pixart_jax.config import OptimizerConfig, TrainConfig
from pixart_jax.denoiser import NETWORK
from pixart_jax.models.configs import NULL_TEXT, DiTConfig, PixArtConfig
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import came, make_optimizer
from pixart_jax.training.optimizers.factored import adafactor, layouts
from pixart_jax.training.state import split
from pixart_jax.weights.backbones import export_backbone

GOLDENS = np.load(Path(__file__).parents[2] / "data" / "came.npz")
SHAPE = dict(size="custom", depth=2, hidden_size=24, num_heads=2)
MODELS = {
    "official": PixArtConfig(**SHAPE, text_dim=8, text_length=5, qk_norm=True, kv_compression="conv"),
    "dit": DiTConfig(**SHAPE, num_classes=3),
}


def train(optimizer, gradients, params):
    """Returns the parameters after an update with each of the stacked gradients."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), gradients))
    return run(params)[0][0]


@pytest.mark.parametrize("name", ["mat", "vec", "conv"])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
def test_came_matches_the_official_code(name, decay):
    """Three updates of came_pytorch 0.1.3; `conv` is a convolution [out, in, height, width]."""
    optimizer = came(float(GOLDENS["lr"]), weight_decay=float(GOLDENS["wd"]) if decay else 0.0)
    params = jnp.asarray(GOLDENS[f"{name}_p0"])
    state = optimizer.init(params)
    for step in (1, 2, 3):
        updates, state = optimizer.update(jnp.asarray(GOLDENS[f"{name}_g{step}"]), state, params)
        params = optax.apply_updates(params, updates)
        expected = GOLDENS[f"{'wd_' if decay else ''}{name}_p{step}"]
        np.testing.assert_allclose(params, expected, rtol=2e-5, atol=1e-6)
    if name != "vec":
        expected = GOLDENS[f"{name}_state_exp_avg_res_row"]
        np.testing.assert_allclose(np.squeeze(state[0].instability_row, -1), expected, rtol=1e-5)


def test_adafactor_matches_optax_on_a_matrix_and_a_vector():
    """optax multiplies the weight decay not by the learning rate, so here it is 0."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 5))), "b": jnp.asarray(rng.normal(size=7))}
    ours = adafactor(0.1)
    theirs = optax.adafactor(0.1, min_dim_size_to_factor=1, multiply_by_parameter_scale=False)
    gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(4, *p.shape))), params)
    params, expected = (train(optimizer, gradients, params) for optimizer in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


@pytest.mark.parametrize(("make", "kind"), [(came, "official"), (adafactor, "dit")])
def test_a_network_is_updated_as_its_official_weights(random_params, make, kind):
    """Stacked blocks, split heads and the flat patch kernel give the updates of PyTorch's separate arrays."""
    model = MODELS[kind]
    objective = make_objective(TrainConfig(model=model))
    ours = make(0.1, 0.01, layouts=layouts(objective))
    theirs = make(0.1, 0.01)

    def official(params):
        return {name: np.asarray(x) for name, x in export_backbone(kind, params, model)[1]}

    params = random_params(model)[1]
    null = {name: params.pop(name) for name in [NULL_TEXT] if name in params}
    expected = official(params | null)
    fixed = [name for name in expected if name == "pos_embed" or name.endswith("y_embedding")]
    expected = {name: x for name, x in expected.items() if name not in fixed}
    # The blocks have gradients of unequal size, which shows whether they are clipped together.
    scale = np.asarray([1.0, 30.0], np.float32)
    params = {NETWORK: params}
    state, reference = jax.jit(ours.init)(params), jax.jit(theirs.init)(expected)

    @partial(jax.jit, static_argnums=0)
    def step(optimizer, gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(3):
        gradient = {NETWORK: random_params(model, seed=seed + 1)[1]}
        gradient[NETWORK].pop(NULL_TEXT, None)
        stacked = gradient[NETWORK]["blocks"]["stacked"]
        gradient[NETWORK]["blocks"]["stacked"] = jax.tree.map(
            lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), stacked
        )
        converted = official(gradient[NETWORK] | null)
        params, state = step(ours, gradient, state, params)
        converted = {name: converted[name] for name in expected}
        expected, reference = step(theirs, converted, reference, expected)
    found = official(params[NETWORK] | null)
    assert len(expected) > 30
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-5, err_msg=name)


def test_factored_moments_are_small():
    """Except for CAME's momentum, the state has only vectors."""
    objective = make_objective(TrainConfig(model=PixArtConfig(size="S/2")))
    networks = {name: nnx.to_pure_dict(state) for name, state in objective.abstract_networks().items()}
    params, _ = split(networks, objective.is_trained)

    def bytes_of(name):
        optimizer = make_optimizer(OptimizerConfig(name=name, clip_norm=0.0), 1, objective)
        return sum(leaf.size * 4 for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))

    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    assert bytes_of("adafactor") < 0.02 * size
    assert size < bytes_of("came") < 1.03 * size
    assert 2 * size <= bytes_of("adamw") < 2.01 * size
