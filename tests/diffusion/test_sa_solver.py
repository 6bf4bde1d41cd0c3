from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.diffusion.guidance import guide
from pixart_jax.diffusion.multistep import draw_noise, uniform_grid
from pixart_jax.diffusion.sa_solver import _adams_weights, _updates, sa_solver
from pixart_jax.diffusion.samplers import dpm_solver
from pixart_jax.diffusion.schedule import linear_schedule
from pixart_jax.errors import UserError

GOLDENS = np.load(Path(__file__).parents[1] / "data" / "diffusion.npz")
SCHEDULE = linear_schedule()
X_T = np.moveaxis(GOLDENS["dpm_xT"], 1, -1)


def model(x, t, shift=0.0):
    """The analytic model of the goldens; `shift` [B] takes the place of the text."""
    t, shift = t.reshape(-1, 1, 1, 1), jnp.reshape(shift, (-1, 1, 1, 1))
    return 0.9 * jnp.sin(1.3 * x + 2.0 * t / 1000.0) + 0.1 * x + shift


def assert_close(actual, expected, tolerance=1e-4):
    """Checks equality within `tolerance` of the largest magnitude; solutions grow to a few hundred."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * np.abs(expected).max()


def quadrature(nodes, h, tau):
    """(1 + tau^2) int_0^h e^{(1 + tau^2)(s - h)} l_k(s) ds by Gauss-Legendre quadrature."""
    points, weights = np.polynomial.legendre.leggauss(40)
    s = 0.5 * h * (points + 1.0)
    rate = 1.0 + tau**2
    values = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        lagrange = np.prod([(s - other) / (node - other) for other in others], axis=0) if len(others) else 1.0
        values.append(rate * 0.5 * h * np.sum(weights * np.exp(rate * (s - h)) * lagrange))
    return np.array(values)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("nodes", [[0.0], [0.0, -0.3, -0.7], [0.4, 0.0, -0.3], [0.4, 0.0, -0.3, -0.7]])
def test_weights_are_the_integrals_of_the_paper(nodes, tau):
    weights = _adams_weights(np.array(nodes), 0.4, tau)
    np.testing.assert_allclose(weights, quadrature(nodes, 0.4, tau), rtol=1e-9)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("nodes", [[0.0, -0.3], [0.4, 0.0]])
def test_order_2_has_the_few_step_term_of_appendix_d(nodes, tau):
    h, rate = 0.4, 1.0 + tau**2
    extra = h**2 / 2.0 - (rate * h - 1.0 + np.exp(-rate * h)) / rate**2
    extra *= rate / (nodes[0] - nodes[1])
    expected = quadrature(nodes, h, tau) + np.array([extra, -extra])
    np.testing.assert_allclose(_adams_weights(np.array(nodes), h, tau), expected, rtol=1e-9)


def test_a_constant_prediction_preserves_the_marginals():
    # If m = x_0 at every point, mean and variance must be those of q(x_t | x_0) for any tau.
    grid = uniform_grid(SCHEDULE, 10, "time_uniform", final_sigma_zero=False)
    taus = np.full(10, 0.8)
    for correct in (False, True):
        update = _updates(grid, taus, 3, correct)
        for row in range(1, 10):
            source = row - 1 if correct else row
            mean = update.x[row] * grid.alpha[source] + update.x0[row].sum()
            variance = (update.x[row] * grid.sigma[source]) ** 2 + update.noise[row] ** 2
            np.testing.assert_allclose(mean, grid.alpha[source + 1], rtol=1e-9)
            np.testing.assert_allclose(variance, grid.sigma[source + 1] ** 2, rtol=1e-9)


def test_order_increases_at_the_start_and_decreases_at_the_end():
    grid = uniform_grid(SCHEDULE, 6, "time_uniform", final_sigma_zero=False)
    predictor, corrector = (_updates(grid, np.zeros(6), 3, correct) for correct in (False, True))
    np.testing.assert_array_equal((predictor.x0 != 0).sum(axis=1), [1, 2, 3, 3, 2, 1])
    np.testing.assert_array_equal((corrector.x0 != 0).sum(axis=1), [0, 2, 3, 3, 3, 3])


def test_tau_0_matches_the_official_code():
    fn = guide(model, GOLDENS["dpm_cond"], GOLDENS["dpm_uncond"], 4.5)
    expected = np.moveaxis(GOLDENS["sa_tau0_steps25"], 1, -1)
    assert_close(sa_solver(fn, X_T, SCHEDULE, steps=25, tau=0.0), expected)


@pytest.mark.parametrize(
    "steps, tau, predictor_order, corrector_order",
    [(20, 0.0, 2, 2), (6, 0.0, 3, 4), (20, 0.0, 3, 4), (6, 0.7, 1, 1), (10, 0.7, 2, 2), (10, 0.7, 3, 3)],
)
def test_solver_matches_diffusers(monkeypatch, steps, tau, predictor_order, corrector_order):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_sasolver

    keys = jax.random.split(jax.random.key(0), 2)
    noises = (draw_noise(keys, step, X_T.shape[1:]) for step in range(steps))
    monkeypatch.setattr(
        scheduling_sasolver, "randn_tensor", lambda *_, **__: torch.tensor(np.asarray(next(noises))).double()
    )
    # diffusers evaluates tau at the start of a step, we at its end. Here tau is constant up to the last step.
    last = round(999 / steps)
    scheduler = diffusers.SASolverScheduler(
        predictor_order=predictor_order,
        corrector_order=corrector_order,
        tau_func=lambda t: tau if t > last else 0.0,
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[-1] == last
    # In float32 its coefficients of order 4 suffer from cancellation, so run it in float64.
    scheduler.sigmas = scheduler.sigmas.double()
    x = torch.tensor(X_T).double()
    for t in scheduler.timesteps:
        output = 0.9 * torch.sin(1.3 * x + 2.0 * t / 1000.0) + 0.1 * x
        x = scheduler.step(output, t, x).prev_sample
    with jax.disable_jit(tau > 0.0):  # faster here than compiling the noise
        ours = sa_solver(
            model,
            X_T,
            SCHEDULE,
            steps=steps,
            keys=keys,
            tau=tau,
            tau_interval=(0.0, 1.0),
            predictor_order=predictor_order,
            corrector_order=corrector_order,
            spacing="linspace",
        )
    assert_close(ours, x)


def test_first_order_without_a_corrector_is_dpm_solver():
    ours = sa_solver(model, X_T, SCHEDULE, steps=12, tau=0.0, predictor_order=1, corrector_order=0)
    assert_close(ours, dpm_solver(model, X_T, SCHEDULE, steps=12, order=1), 1e-5)


def test_tau_acts_only_inside_its_interval():
    still, outside = (
        sa_solver(model, X_T, SCHEDULE, steps=8, tau=tau, tau_interval=interval)
        for tau, interval in [(0.0, (0.2, 0.8)), (1.0, (0.0, 0.001))]  # the latter holds only the last step
    )
    np.testing.assert_array_equal(outside, still)
    with jax.disable_jit():
        inside = sa_solver(model, X_T, SCHEDULE, steps=8, keys=jax.random.split(jax.random.key(0), 2))
    assert np.abs(inside - still).max() > 0.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"predictor_order": 0}, "predictor"),
        ({"corrector_order": 5}, "corrector"),
        ({"tau": -1.0}, "tau"),
        ({}, "one key per image"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(UserError, match=message):
        sa_solver(model, X_T, SCHEDULE, steps=5, **options)
