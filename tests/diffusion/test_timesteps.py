import math

import jax
import numpy as np
import pytest

from pixart_jax.diffusion.timesteps import draw_timestep, timestep_probabilities
from pixart_jax.errors import UserError


def test_logit_normal_is_the_density_of_a_sigmoid_of_a_normal():
    """Compares sums over tenths of the timesteps with the normal distribution function."""
    found = timestep_probabilities("logit_normal", 1000, mean=0.5, std=0.8).reshape(10, 100).sum(axis=1)

    def below(u):
        if u in (0, 1):
            return u
        return 0.5 * (1 + math.erf((math.log(u / (1 - u)) - 0.5) / 0.8 / math.sqrt(2)))

    expected = [below((k + 1) / 10) - below(k / 10) for k in range(10)]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_sigmoid_has_the_density_of_its_formula():
    found = timestep_probabilities("sigmoid", 100, slope=4.0)
    u = (np.arange(100) + 0.5) / 100
    expected = 1 / (1 + np.exp(-4 * (u - 0.5)))
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)
    assert found[99] > found[0]
    np.testing.assert_allclose(timestep_probabilities("sigmoid", 100, slope=-4.0), found[::-1], rtol=1e-12)


def test_a_share_of_the_draws_is_uniform():
    found = timestep_probabilities("logit_normal", 50, std=0.1, uniform_share=0.01)
    assert found.min() >= 0.01 / 50
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(timestep_probabilities("uniform", 50), 1 / 50)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "sigmoid"])
def test_draws_have_the_probabilities(density):
    probabilities = timestep_probabilities(density, 8, mean=-0.5)
    keys = jax.random.split(jax.random.key(0), 40_000)
    draws = jax.jit(jax.vmap(lambda key: draw_timestep(key, probabilities)))(keys)
    assert draws.dtype == np.int32
    np.testing.assert_allclose(np.bincount(draws, minlength=8) / 40_000, probabilities, atol=0.01)


def test_an_unknown_density_is_named():
    with pytest.raises(UserError, match="density is 'cosine': choose one of uniform, logit_normal, sigmoid"):
        timestep_probabilities("cosine", 10)
    assert draw_timestep(jax.random.key(0), timestep_probabilities("uniform", 1)) == 0
