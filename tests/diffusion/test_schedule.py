from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.diffusion.schedule import (
    NoiseSchedule,
    add_noise,
    linear_schedule,
    lookup,
    predict_x0,
    respace,
)
from pixart_jax.errors import UserError

GOLDENS = np.load(Path(__file__).parents[1] / "data" / "diffusion.npz")


def test_alphas_cumprod_match_the_official_code():
    np.testing.assert_array_equal(linear_schedule().alphas_cumprod, GOLDENS["alphas_cumprod"])


def test_tables_of_two_steps_match_a_computation_by_hand():
    schedule = NoiseSchedule(np.array([0.2, 0.5]))
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.8, 0.4])
    np.testing.assert_allclose(schedule.alphas_cumprod_prev, [1.0, 0.8])
    np.testing.assert_allclose(schedule.signal_noise_ratio, [4.0, 2.0 / 3.0])
    np.testing.assert_allclose(schedule.posterior_variance, [0.0, 0.5 * 0.2 / 0.6])
    np.testing.assert_allclose(schedule.posterior_log_variance_clipped, np.log([1.0 / 6.0, 1.0 / 6.0]))
    np.testing.assert_allclose(schedule.posterior_mean_x0, [1.0, np.sqrt(0.8) * 0.5 / 0.6])
    np.testing.assert_allclose(schedule.posterior_mean_xt, [0.0, np.sqrt(0.5) * 0.2 / 0.6])


def test_posterior_follows_from_bayes_rule():
    # q(x_{t-1} | x_t, x_0) is the product of two Gaussians in x_{t-1}; its precision and mean are sums.
    schedule, t = linear_schedule(), 400
    beta, before = schedule.betas[t], schedule.alphas_cumprod_prev[t]
    variance = 1.0 / ((1.0 - beta) / beta + 1.0 / (1.0 - before))
    np.testing.assert_allclose(schedule.posterior_variance[t], variance, rtol=1e-12)
    x0_weight, xt_weight = np.sqrt(before) / (1.0 - before), np.sqrt(1.0 - beta) / beta
    np.testing.assert_allclose(schedule.posterior_mean_x0[t], x0_weight * variance, rtol=1e-12)
    np.testing.assert_allclose(schedule.posterior_mean_xt[t], xt_weight * variance, rtol=1e-12)


def test_posterior_log_variance_of_step_0_is_that_of_step_1():
    np.testing.assert_allclose(linear_schedule().posterior_log_variance_clipped[:2], -9.8167, atol=1e-4)


def test_marginal_is_the_table_at_integer_steps_and_geometric_in_between():
    schedule = linear_schedule()
    alpha, sigma = schedule.marginal(np.array([0.0, 500.0, 999.0]))
    np.testing.assert_allclose(alpha**2, schedule.alphas_cumprod[[0, 500, 999]], rtol=1e-12)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-12)
    before, middle, after = schedule.marginal([500, 500.5, 501])[0]
    np.testing.assert_allclose(middle, np.sqrt(before * after), rtol=1e-12)


def test_add_noise_matches_the_official_code():
    x_t = add_noise(linear_schedule(), GOLDENS["plain_x0"], GOLDENS["plain_noise"], GOLDENS["plain_t"])
    assert x_t.dtype == jnp.float32
    np.testing.assert_allclose(x_t, GOLDENS["plain_xt"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_predict_x0_inverts_add_noise(dtype):
    schedule, x0, noise = linear_schedule(), GOLDENS["plain_x0"], GOLDENS["plain_noise"]
    t = GOLDENS["plain_t"].astype(dtype)
    x_t = add_noise(schedule, x0, noise, t)
    # At t = 999 x_0 is divided by alpha = 0.0064, and so is the rounding error.
    np.testing.assert_allclose(predict_x0(schedule, x_t, noise, t), x0, atol=2e-4)


def test_lookup_broadcasts_over_any_rank():
    assert lookup(np.arange(5.0), jnp.array([1, 4]), 4).shape == (2, 1, 1, 1)
    assert lookup(np.arange(5.0), jnp.array(3), 0) == 3.0


@pytest.mark.parametrize("spacing", ["100", "250", "ddim25", "10,15,20"])
def test_respace_keeps_the_same_steps_as_the_official_code(spacing):
    kept = respace(linear_schedule(), spacing).timesteps
    np.testing.assert_array_equal(kept, GOLDENS["respace_" + spacing.replace(",", "_")])


def test_respace_keeps_the_marginals_and_composes():
    whole = linear_schedule()
    half = respace(whole, 500)
    quarter = respace(half, "ddim250")
    np.testing.assert_allclose(quarter.alphas_cumprod, whole.alphas_cumprod[quarter.timesteps], rtol=1e-9)
    np.testing.assert_array_equal(quarter.timesteps, half.timesteps[::2])


def test_respace_to_every_step_changes_nothing():
    whole = linear_schedule()
    same = respace(whole, 1000)
    np.testing.assert_allclose(same.betas, whole.betas, rtol=1e-9)
    assert respace(whole, 1).timesteps.tolist() == [0]


@pytest.mark.parametrize("spacing", ["", "ddim", "many", "0", "ddim999", "ddim10,20", "600,10", 1001])
def test_respace_rejects_an_invalid_spacing(spacing):
    with pytest.raises(UserError, match="spacing"):
        respace(linear_schedule(), spacing)


@pytest.mark.parametrize(
    "betas", [[0.0, 0.1], [0.5, 1.0], [], [[0.1]], [1e-20, 0.02], np.linspace(0.5, 0.99, 1000)]
)
def test_schedule_rejects_invalid_betas(betas):
    with pytest.raises(UserError, match="betas"):
        NoiseSchedule(np.array(betas))


def test_schedule_rejects_a_wrong_number_of_timesteps():
    with pytest.raises(UserError, match="3 timesteps for 2 betas"):
        NoiseSchedule(np.array([0.1, 0.2]), np.arange(3))


def test_equal_schedules_share_one_compilation():
    traces = []

    def noisy(schedule, x):
        traces.append(1)
        return add_noise(schedule, x, x, jnp.array([3]))

    compiled = jax.jit(noisy, static_argnums=0)
    compiled(linear_schedule(), jnp.ones((1, 2)))
    compiled(linear_schedule(), jnp.ones((1, 2)))
    assert len(traces) == 1
    compiled(linear_schedule(beta_end=0.03), jnp.ones((1, 2)))
    assert len(traces) == 2
    assert linear_schedule() != respace(linear_schedule(), "ddim500")


def test_tables_cannot_be_changed():
    with pytest.raises(ValueError):
        linear_schedule().betas[0] = 0.5
