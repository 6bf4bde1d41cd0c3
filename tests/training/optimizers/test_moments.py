import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixart_jax.config import OptimizerConfig
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.optimizers.moments import dequantize, quantize, round_to_bfloat16


def test_stochastic_rounding_to_bfloat16():
    """The result is one of the two neighbours, and the mean is the value; bfloat16 numbers stay the same."""
    value = jnp.float32(1 + 1 / 512)  # a quarter of the way from 1 to 1 + 2^-7
    rounded = round_to_bfloat16(jnp.full(20_000, value), jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(rounded)) == {1.0, 1.0 + 2**-7}
    np.testing.assert_allclose(np.mean(rounded == 1.0), 0.75, atol=0.015)
    exact = jnp.asarray([0.0, -2.5, 3e-30, 1e30], jnp.bfloat16)
    np.testing.assert_array_equal(round_to_bfloat16(exact.astype(jnp.float32), jax.random.key(1)), exact)
    negative = round_to_bfloat16(jnp.full(20_000, -value), jax.random.key(0)).astype(jnp.float32)
    np.testing.assert_allclose(jnp.mean(negative), -value, rtol=1e-4)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_8_bits_have_the_expectation_and_the_zeros_of_the_values(signed):
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(8, 640)) * 10.0 ** rng.uniform(-3, 0, size=(8, 640))).astype(np.float32)
    values[0, :5] = 0
    values = values if signed else np.square(values)

    @jax.jit
    def stored(key):
        return dequantize(*quantize(jnp.asarray(values), key, signed=signed))

    draws = np.stack([stored(key) for key in jax.random.split(jax.random.key(0), 400)])
    # Two neighbouring codes differ by at most this; the mean of 400 draws has a twentieth of the error.
    levels, power = (127, 2) if signed else (255, 4)
    scale = np.abs(values).max()
    step = scale * ((np.abs(values / scale) ** (1 / power) + 1 / levels) ** power - np.abs(values / scale))
    assert np.all(np.abs(draws - values) <= 1.01 * step)
    assert np.mean(np.abs(draws.mean(0) - values) / step) < 0.03
    assert not draws[:, 0, :5].any()
    largest = np.unravel_index(np.abs(values).argmax(), values.shape)
    np.testing.assert_allclose(draws[(slice(None), *largest)], values[largest], rtol=1e-6)
    if not signed:
        assert np.all(draws[:, values > 0] > 0)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((28, 1152, 3, 16, 72), (28, 384, 1, 8, 8)),  # 3 x 3 x 2 x 9 values
        ((28, 4608, 1152), (28, 384, 64)),  # 12 x 18 values
        ((1000,), (8,)),
        ((7, 3), (1, 1)),
        ((), ()),
    ],
)
def test_a_block_has_at_most_256_values_and_lies_within_a_shard(shape, blocks):
    codes, scale = jax.eval_shape(
        lambda x: quantize(x, jax.random.key(0), signed=True), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    assert (codes.shape, codes.dtype, scale.shape) == (shape, jnp.int8, blocks)
    assert np.prod(shape) / np.prod(blocks) <= 256


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_second_moment_converges_where_rounding_to_nearest_stalls(moments):
    """Gradients drop to 0.7 of their size, so nu should drop to 0.49 of its value."""
    config = OptimizerConfig(moments=moments, beta2=0.999, warmup_steps=0, clip_norm=0.0, weight_decay=0.0)
    optimizer = make_optimizer(config, 1)
    # The largest value of a block, which is the scale of the others, is stored exactly and stays the same.
    gradient = jnp.tile(jnp.logspace(-1, 0, 8), (8, 8))  # blocks of 1 x 8
    varies = gradient < 1

    @jax.jit
    def run(state):
        def step(state, size):
            scaled = jnp.where(varies, size * gradient, gradient)
            return optimizer.update({"w": scaled}, state, {"w": gradient})[1], None

        return jax.lax.scan(step, state, jnp.r_[jnp.ones(3000), jnp.full(5000, 0.7)])[0]

    stored = run(optimizer.init({"w": gradient}))[0]
    nu = stored.values["nu"]["w"]
    nu = nu.astype(jnp.float32) if moments == "bfloat16" else dequantize(nu, stored.scales["nu"]["w"])
    np.testing.assert_allclose(jnp.mean(nu / jnp.square(gradient), where=varies), 0.49, rtol=0.03)

    def nearest(nu, size):
        return (0.999 * nu.astype(jnp.float32) + 0.001 * size**2).astype(jnp.bfloat16), None

    stalled, _ = jax.lax.scan(nearest, jnp.bfloat16(1.0), jnp.full(5000, 0.7))
    assert stalled > 0.6


def regression(config, steps=300):
    """Trains a small network with a wide range of gradients; returns the losses and the optimizer state."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(64, 24)) * np.logspace(-1.5, 0.3, 24), jnp.float32)
    targets = jnp.asarray(np.sin(inputs @ rng.normal(size=(24, 4))), jnp.float32)
    params = {
        "first": jnp.asarray(rng.normal(size=(24, 192)) * 0.3, jnp.float32),
        "bias": jnp.zeros(192),
        "last": jnp.asarray(rng.normal(size=(192, 4)) * 0.1, jnp.float32),
    }
    optimizer = make_optimizer(config, 1)

    def loss(params):
        hidden = jnp.tanh(inputs @ params["first"] + params["bias"])
        return jnp.mean(jnp.square(hidden @ params["last"] - targets))

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (params, state), losses = run((params, optimizer.init(params)))
    return np.asarray(losses), state


@pytest.mark.parametrize(
    ("name", "rate", "choices"),
    [("adamw", 3e-3, {"bfloat16": 0.51, "int8": 0.3}), ("lion", 1e-3, {"int8": 0.3})],
)
def test_training_with_small_moments_is_as_good(name, rate, choices):
    """300 updates give the same losses, with the given share of the memory."""
    config = dict(name=name, learning_rate=rate, beta2=0.99, warmup_steps=10, clip_norm=1.0)
    plain, state = regression(OptimizerConfig(**config))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert plain[-1] < 0.01 * plain[0]
    for moments, share in choices.items():
        losses, state = regression(OptimizerConfig(**config, moments=moments))
        np.testing.assert_allclose(losses[[50, 100, 200, -1]], plain[[50, 100, 200, -1]], rtol=0.15)
        assert not np.array_equal(losses, plain)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) < share * size


def test_rounding_depends_on_the_seed_and_the_step():
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)}
    config = OptimizerConfig(moments="bfloat16", clip_norm=0.0)

    def moment(seed, count):
        optimizer = make_optimizer(config, 1, seed=seed)
        first, *rest = optimizer.init(gradient)
        state = (first._replace(count=jnp.asarray(count)), *rest)
        return optimizer.update(gradient, state, gradient)[1][0].values["mu"]["w"]

    found = [moment(*case) for case in ((0, 5), (0, 5), (1, 5), (0, 6))]
    np.testing.assert_array_equal(found[0], found[1])
    assert all(np.any(found[0] != other) for other in found[2:])
    np.testing.assert_allclose(found[0].astype(jnp.float32), 0.1 * gradient["w"], rtol=2**-7)
