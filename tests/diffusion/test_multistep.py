import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.diffusion.multistep import (
    Grid,
    Inpaint,
    Update,
    draw_noise,
    first_step,
    initial_noise,
    linear_multistep,
    step_grid,
    uniform_grid,
)
from pixart_jax.diffusion.schedule import linear_schedule, respace
from pixart_jax.errors import UserError

SCHEDULE = linear_schedule()
KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(jax.random.key(1), (3, 2, 2, 4))
GRID = Grid(np.array([3.0, 2.0, 1.0]), np.array([0.25, 0.5, 0.8, 1.0]), np.array([0.9, 0.8, 0.6, 0.0]))


def model(x, t):
    return 0.3 * x + t[:, None, None, None]


def clean(x, i):
    return (x - GRID.sigma[i] * (0.3 * x + GRID.t[i])) / GRID.alpha[i]


def test_recurrence_matches_a_computation_by_hand():
    update = Update(
        np.array([0.5, 0.6, 0.7]), np.array([[1.0, 0.0], [2.0, -0.5], [0.3, 0.2]]), np.array([0.1, 0.2, 0.0])
    )
    x = np.asarray(X)
    m0 = clean(x, 0)
    x = 0.5 * x + m0 + 0.1 * draw_noise(KEYS, 0, x.shape[1:])
    m1 = clean(x, 1)
    x = 0.6 * x + 2.0 * m1 - 0.5 * m0 + 0.2 * draw_noise(KEYS, 1, x.shape[1:])
    m2 = clean(x, 2)
    x = 0.7 * x + 0.3 * m2 + 0.2 * m1
    result, trajectory = linear_multistep(model, X, GRID, update, keys=KEYS, return_x0=True)
    np.testing.assert_allclose(result, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trajectory, np.stack([m0, m1, m2]), rtol=1e-5, atol=1e-5)


def test_corrector_repeats_the_step_with_the_same_noise():
    predictor = Update(np.array([0.5, 0.6, 0.7]), np.array([[1.0], [2.0], [0.3]]), np.array([0.1, 0.2, 0.0]))
    corrector = Update(
        np.array([1.0, 0.4, 0.9]), np.array([[0, 0], [0.5, 0.6], [0.7, 0.8]]), np.array([0.0, 0.1, 0.2])
    )
    noise = [draw_noise(KEYS, step, X.shape[1:]) for step in (0, 1)]
    x0 = np.asarray(X)
    m0 = clean(x0, 0)
    m1 = clean(0.5 * x0 + m0 + 0.1 * noise[0], 1)
    x1 = 0.4 * x0 + 0.5 * m1 + 0.6 * m0 + 0.1 * noise[0]
    m2 = clean(0.6 * x1 + 2.0 * m1 + 0.2 * noise[1], 2)
    x2 = 0.9 * x1 + 0.7 * m2 + 0.8 * m1 + 0.2 * noise[1]
    result = linear_multistep(model, X, GRID, predictor, corrector, keys=KEYS)
    np.testing.assert_allclose(result, 0.7 * x2 + 0.3 * m2, rtol=1e-5, atol=1e-5)


def test_variance_half_is_ignored():
    update = Update(np.ones(3), np.ones((3, 1)), np.zeros(3))

    def doubled(x, t):
        return jnp.concatenate([model(x, t), 1e9 * x], axis=-1)

    np.testing.assert_array_equal(
        linear_multistep(model, X, GRID, update), linear_multistep(doubled, X, GRID, update)
    )


def test_computes_in_float32_for_any_input_dtype():
    update = Update(np.ones(3), np.ones((3, 1)), np.zeros(3))
    seen = []

    def fn(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return model(x, t).astype(jnp.bfloat16)

    low = X.astype(jnp.bfloat16)
    inpaint = Inpaint(jnp.ones((1, 2, 2, 1)), low, low)
    assert linear_multistep(fn, low, GRID, update, init=low, inpaint=inpaint).dtype == jnp.float32
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"), (3,))}


@pytest.mark.parametrize("keys", [None, KEYS[0], KEYS[:2]])
def test_noise_needs_a_key_per_image(keys):
    update = Update(np.ones(3), np.ones((3, 1)), np.ones(3))
    with pytest.raises(UserError, match="one key per image: 3"):
        linear_multistep(model, X, GRID, update, keys=keys)


def test_wrong_number_of_output_channels_raises():
    update = Update(np.ones(3), np.ones((3, 1)), np.zeros(3))
    with pytest.raises(UserError, match="3 channels for latents with 4"):
        linear_multistep(lambda x, t: x[..., :3], X, GRID, update)


def test_noise_depends_only_on_the_key_and_the_step():
    whole = draw_noise(KEYS, 5, (2, 2, 4))
    np.testing.assert_array_equal(draw_noise(KEYS[1:2], 5, (2, 2, 4))[0], whole[1])
    assert np.abs(draw_noise(KEYS, 6, (2, 2, 4)) - whole).min() > 0.0
    assert np.abs(initial_noise(KEYS, (2, 2, 4)) - draw_noise(KEYS, 0, (2, 2, 4))).min() > 0.0


def test_keys_that_would_mix_images_raise():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    with pytest.raises(UserError, match="rbg keys"):
        initial_noise(keys, (2, 2, 4))
    raw = jax.random.split(jax.random.PRNGKey(0), 3)
    np.testing.assert_array_equal(draw_noise(raw, 5, (2, 2, 4)), draw_noise(KEYS, 5, (2, 2, 4)))


def test_time_uniform_grid_is_fractional_and_ends_at_step_0():
    grid = uniform_grid(SCHEDULE, 20, "time_uniform", final_sigma_zero=True)
    np.testing.assert_allclose(grid.t[[0, 1, 2, -1]], [999.0, 949.05, 899.1, 49.95])
    np.testing.assert_allclose(grid.alpha[-1] ** 2, SCHEDULE.alphas_cumprod[0])
    np.testing.assert_allclose(grid.half_log_snr[0], -5.0588, atol=1e-4)


def test_linspace_grid_has_integer_timesteps_and_may_end_without_noise():
    grid = uniform_grid(SCHEDULE, 20, "linspace", final_sigma_zero=True)
    np.testing.assert_array_equal(grid.t[[0, 1, 2, -1]], [999, 949, 899, 50])
    assert (grid.alpha[-1], grid.sigma[-1], grid.half_log_snr[-1]) == (1.0, 0.0, np.inf)
    grid = uniform_grid(SCHEDULE, 20, "linspace", final_sigma_zero=False)
    np.testing.assert_allclose(grid.alpha[-1] ** 2, SCHEDULE.alphas_cumprod[0])


def test_grids_of_a_respaced_schedule_use_the_original_timesteps():
    respaced = respace(SCHEDULE, "ddim25")
    np.testing.assert_array_equal(step_grid(respaced, np.array([24, 0])).t, [960, 0])
    np.testing.assert_allclose(
        uniform_grid(respaced, 2, "time_uniform", final_sigma_zero=False).t, [960, 480]
    )


@pytest.mark.parametrize("steps, spacing", [(0, "linspace"), (1000, "linspace"), (20, "karras")])
def test_uniform_grid_rejects_invalid_arguments(steps, spacing):
    with pytest.raises(UserError, match=r"steps=|spacing"):
        uniform_grid(SCHEDULE, steps, spacing, final_sigma_zero=False)


def test_first_step_counts_as_diffusers_does():
    init = jnp.zeros(1)
    assert [first_step(20, init, s) for s in (1.0, 0.75, 0.5, 0.05)] == [0, 5, 10, 19]
    assert first_step(20, None, 1.0) == 0


@pytest.mark.parametrize("init, strength", [(0, 0.0), (0, 1.1), (0, 0.04), (None, 0.5)])
def test_first_step_rejects_invalid_arguments(init, strength):
    with pytest.raises(UserError, match="strength"):
        first_step(20, init, strength)
