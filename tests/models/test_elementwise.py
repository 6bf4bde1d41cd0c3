import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.models.elementwise import LAYER_NORM_EPS, add_bias, add_gated, gelu, modulate


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain_modulate(x, shift, scale):
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)
    return normed * (1 + scale) + shift


CASES = {
    "modulate": (modulate, plain_modulate, ((2, 5, 12), (2, 1, 12), (2, 1, 12))),
    "add_gated": (add_gated, lambda x, gate, y: x + gate * y, ((2, 5, 12), (2, 1, 12), (2, 5, 12))),
    "gelu": (gelu, lambda x: jax.nn.gelu(x, approximate=True), ((2, 5, 12),)),
    "add_bias": (add_bias, lambda x, bias: x + bias, ((2, 5, 3, 4), (3, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_match_automatic_differentiation(name):
    function, definition, shapes = CASES[name]
    arguments = [3 * normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    out, pullback = jax.vjp(function, *arguments)
    expected, plain_pullback = jax.vjp(definition, *arguments)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)
    cotangent = normal(*out.shape, seed=9)
    for found, gradient in zip(pullback(cotangent), plain_pullback(cotangent)):
        np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kept"), [("modulate", 1), ("add_gated", 1), ("gelu", 1), ("add_bias", 0)])
def test_the_backward_pass_saves_inputs_in_their_dtype(name, kept):
    """It saves at most one array of the size of the token stream."""
    function, _, shapes = CASES[name]
    arguments = [
        normal(*shape).astype(jnp.bfloat16 if shape == shapes[0] else jnp.float32) for shape in shapes
    ]
    _, pullback = jax.vjp(function, *arguments)
    size = np.prod(shapes[0])
    large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= size]
    assert len(large) == kept
    assert all(leaf.dtype == jnp.bfloat16 for leaf in large)


def test_modulate_normalizes_then_scales_and_shifts():
    x = jnp.asarray([[[1.0, 3.0]]])
    out = modulate(x, jnp.full((1, 1, 2), 10.0), jnp.full((1, 1, 2), 1.0))
    np.testing.assert_allclose(out, [[[8.0, 12.0]]], atol=1e-5)


def test_modulate_keeps_statistics_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(200, 1, size=(1, 1, 64)), jnp.bfloat16)
    out = modulate(x, jnp.zeros((1, 1, 64)), jnp.zeros((1, 1, 64)))
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / exact.std()
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.02)


@pytest.mark.parametrize("mean", [0.0, 30.0, -300.0])
def test_one_pass_statistics_are_accurate_enough(mean):
    """E[x^2] - E[x]^2 loses precision as (mean / deviation)^2, which is near 1 in a token stream."""
    x = np.random.default_rng(0).normal(mean, 1, size=(1, 4, 1152))
    out = modulate(jnp.asarray(x, jnp.float32), jnp.zeros((1, 1, 1152)), jnp.zeros((1, 1, 1152)))
    exact = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(out, exact, atol=3e-6 * (1 + mean**2 / 10))


def test_a_constant_token_gives_finite_values():
    x = jnp.full((1, 1, 8), 123.456, jnp.float32)
    out, pullback = jax.vjp(modulate, x, jnp.zeros((1, 1, 8)), jnp.zeros((1, 1, 8)))
    assert np.isfinite(out).all() and all(np.isfinite(g).all() for g in pullback(jnp.ones_like(out)))
