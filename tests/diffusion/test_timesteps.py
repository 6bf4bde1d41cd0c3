import math

import jax
import numpy as np
import pytest

from pixart_jax.config import DiffusionConfig
from pixart_jax.diffusion.schedule import linear_schedule
from pixart_jax.diffusion.timesteps import (
    change_weights,
    convergence_boundary,
    draw_timestep,
    timestep_probabilities,
)
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


def test_speed_draws_the_timesteps_of_the_convergence_area_less_often():
    """P(t) = k / (T + tau (k - 1)) before tau, 1 / (T + tau (k - 1)) from it on."""
    found = timestep_probabilities("speed", 1000, boundary=700, suppression=5.0)
    np.testing.assert_allclose(found[:700], 5 / (1000 + 700 * 4), rtol=1e-12)
    np.testing.assert_allclose(found[700:], 1 / (1000 + 700 * 4), rtol=1e-12)
    for boundary in (0, 1000):  # no timestep is drawn more often than others
        np.testing.assert_allclose(timestep_probabilities("speed", 1000, boundary=boundary), 1e-3)


@pytest.mark.parametrize("share", [0.5, 0.985, 0.999])
def test_the_convergence_area_starts_where_the_variance_has_almost_its_maximum(share):
    """The closed form for betas that grow linearly, and the variance of x_{t+1} - x_t of a sample itself."""
    schedule, steps, first, span = linear_schedule(), 1000, 1e-4, 0.02 - 1e-4
    ratio = steps * first / span
    closed = math.sqrt(ratio**2 + 2 * steps * math.log(1 / (1 - share)) / span) - ratio
    found = convergence_boundary(schedule, share)
    assert abs(found - closed) < 4  # log abar_t is not exactly the sum of the betas
    left = schedule.alphas_cumprod
    variance = (1 - left[:-1]) + (1 - left[1:])
    assert abs(int(np.argmax(variance >= 2 * share)) - found) <= 1
    assert convergence_boundary(schedule, 1 - 1e-9) == steps  # no timestep


def test_the_default_convergence_area_is_about_that_of_the_official_code():
    schedule = linear_schedule()
    derivative = np.gradient(np.sqrt(1 - schedule.alphas_cumprod))
    assert int(np.argmax(derivative < 1e-4)) == 641
    assert convergence_boundary(schedule, DiffusionConfig().timestep_convergence) == 643


def test_change_weights_follow_the_derivative_of_the_variance():
    """In units of T, 2 - 2 exp(-(b u + D u^2 / 2)) has the derivative 2 (b + D u) exp(...)."""
    found = change_weights(linear_schedule(), 0.6)
    np.testing.assert_allclose([found.min(), found.max()], [0.4, 0.6], rtol=1e-12)
    u = (np.arange(1000) + 0.5) / 1000
    derivative = 2 * (0.1 + 19.9 * u) * np.exp(-(0.1 * u + 19.9 * u**2 / 2))
    expected = np.interp(derivative, [derivative.min(), derivative.max()], [0.4, 0.6])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(change_weights(linear_schedule(), 0.5), 0.5)
    np.testing.assert_allclose(change_weights(linear_schedule(1, 0.5, 0.5), 0.7), 0.7)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "sigmoid", "speed"])
def test_draws_have_the_probabilities(density):
    probabilities = timestep_probabilities(density, 8, mean=-0.5, boundary=3)
    keys = jax.random.split(jax.random.key(0), 40_000)
    draws = jax.jit(jax.vmap(lambda key: draw_timestep(key, probabilities)))(keys)
    assert draws.dtype == np.int32
    np.testing.assert_allclose(np.bincount(draws, minlength=8) / 40_000, probabilities, atol=0.01)


def test_an_unknown_density_is_named():
    with pytest.raises(
        UserError, match="density is 'cosine': choose one of uniform, logit_normal, sigmoid, speed"
    ):
        timestep_probabilities("cosine", 10)
    assert draw_timestep(jax.random.key(0), timestep_probabilities("uniform", 1)) == 0
