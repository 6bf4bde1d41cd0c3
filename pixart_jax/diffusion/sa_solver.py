"""SA-Solver: a stochastic Adams predictor-corrector method for the diffusion SDE."""

from __future__ import annotations

import jax
import numpy as np

from pixart_jax.diffusion.multistep import (
    Grid,
    Inpaint,
    NoiseFn,
    Update,
    first_step,
    linear_multistep,
    uniform_grid,
)
from pixart_jax.diffusion.schedule import NoiseSchedule
from pixart_jax.errors import UserError


def sa_solver(
    fn: NoiseFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    *,
    steps: int = 25,
    keys: jax.Array | None = None,
    tau: float = 1.0,
    tau_interval: tuple[float, float] = (0.2, 0.8),
    predictor_order: int = 2,
    corrector_order: int = 2,
    spacing: str = "time_uniform",
    init: jax.Array | None = None,
    strength: float = 1.0,
    inpaint: Inpaint | None = None,
    return_x0: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """SA-Solver (Xue et al. 2023, arXiv 2309.05019, algorithm 1), data prediction, PEC mode, N model calls.

    With lambda = log(alpha / sigma), its increment h in the step, the clean-latent predictions m, and ' for
    the next noise level,

        x' = e^{-tau^2 h} (sigma' / sigma) x + sum_k c_k m_k + sigma' sqrt(1 - e^{-2 tau^2 h}) z
        c_k = (1 + tau^2) alpha' int_0^h e^{(1 + tau^2) (s - h)} l_k(s) ds

    where l_k are the Lagrange polynomials on the previous points in lambda. The corrector also uses the new
    point, with the same z. tau = 0 solves the ODE. The order increases over the first steps and decreases
    over the last ones; the last step has tau = 0 and no corrector. Steps of order 2 use the few-step form of
    the paper's appendix D.

    Args:
        fn: `(x [B, H, W, C], t [B] float32) -> [B, H, W, C or 2C]`, noise first.
        x_T: [B, H, W, C] standard normal.
        schedule: noise schedule of the model.
        steps: N, the number of model calls.
        keys: [B] one key per image; not needed if tau is 0.
        tau: amount of noise inside `tau_interval`, at least 0. Outside the interval tau is 0.
        tau_interval: (low, high) in continuous time, which is (t + 1) / T in (0, 1] for timestep t.
        predictor_order: 1 to 4.
        corrector_order: 1 to 4, or 0 for no corrector.
        spacing: "time_uniform" (official PixArt-alpha) or "linspace" (diffusers).
        init: [B, H, W, C] clean latent to start from, noised by `x_T`.
        strength: in (0, 1], the fraction of the steps that is run when sampling starts from `init`.
        inpaint: region to keep.
        return_x0: also return the clean-latent prediction of every step, [N, B, H, W, C].

    Raises:
        UserError: if an order, tau, the spacing, the strength or the number of steps is out of range, or if
            keys are missing.
    """
    if not 1 <= predictor_order <= 4 or not 0 <= corrector_order <= 4:
        raise UserError(
            f"predictor_order={predictor_order}, corrector_order={corrector_order}: "
            f"the predictor must have an order of 1 to 4, the corrector of 0 to 4."
        )
    if tau < 0:
        raise UserError(f"tau={tau} is negative: it must be at least 0; 0 is the deterministic solver.")
    grid = uniform_grid(schedule, steps, spacing, final_sigma_zero=False)
    first = first_step(steps, init, strength)
    grid = Grid(*(levels[first:] for levels in grid))

    # tau is evaluated at the end of each step. The last step has tau = 0, because no later step could remove
    # the noise it adds.
    arrival = (grid.t[1:] + 1.0) / (schedule.timesteps[-1] + 1.0)
    taus = np.append(np.where((tau_interval[0] <= arrival) & (arrival <= tau_interval[1]), tau, 0.0), 0.0)
    predictor = _updates(grid, taus, predictor_order, correct=False)
    corrector = _updates(grid, taus, corrector_order, correct=True) if corrector_order else None
    return linear_multistep(
        fn,
        x_T,
        grid,
        predictor,
        corrector,
        first=first,
        keys=keys,
        init=init,
        inpaint=inpaint,
        return_x0=return_x0,
    )


def _updates(grid: Grid, taus: np.ndarray, order: int, correct: bool) -> Update:
    """Computes the coefficients. Row i predicts point i + 1 or, with `correct`, corrects point i."""
    count, half_log_snr = len(grid.t), grid.half_log_snr
    update = Update(np.zeros(count), np.zeros((count, order)), np.zeros(count))
    if correct:
        update.x[0] = 1.0  # the starting point is exact
    for row in range(1 if correct else 0, count):
        target = row if correct else row + 1
        tau, alpha, sigma = taus[target - 1], grid.alpha[target], grid.sigma[target]
        h = half_log_snr[target] - half_log_snr[target - 1]
        # The corrector knows one point more than the predictor of the same step.
        used = min(order, target + correct, count - target + 1 + correct)
        nodes = half_log_snr[row + 1 - used : row + 1][::-1] - half_log_snr[target - 1]
        update.x[row] = np.exp(-(tau**2) * h) * sigma / grid.sigma[target - 1]
        update.x0[row, :used] = alpha * _adams_weights(nodes, h, tau)
        update.noise[row] = sigma * np.sqrt(-np.expm1(-2.0 * tau**2 * h))
    return update


def _adams_weights(nodes: np.ndarray, h: float, tau: float) -> np.ndarray:
    """(1 + tau^2) int_0^h e^{(1 + tau^2)(s - h)} l_k(s) ds for the Lagrange polynomials l_k on `nodes`."""
    rate = 1.0 + tau**2
    moments = [-np.expm1(-rate * h) / rate]  # of s^0, s^1, ... by partial integration
    for power in range(1, len(nodes)):
        moments.append((h**power - power * moments[-1]) / rate)
    if len(nodes) == 2:
        moments[1] = h**2 / 2.0  # appendix D: differs by O(h^3), gives better images with few steps
    # Solve for the weights that integrate all polynomials up to this degree exactly.
    return rate * np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
