"""SA-Solver: stochastic Adams predictor-corrector steps of the diffusion SDE."""

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

    With lambda = log(alpha / sigma), its step h and the clean latents m, the step to the next levels ' is

        x' = e^{-tau^2 h} (sigma' / sigma) x + sum_k c_k m_k + sigma' sqrt(1 - e^{-2 tau^2 h}) z
        c_k = (1 + tau^2) alpha' int_0^h e^{(1 + tau^2) (s - h)} l_k(s) ds

    where l_k are the Lagrange polynomials on the last points in lambda; the corrector adds the point arrived
    at and reuses z. tau = 0 solves the ODE. Orders rise over the first steps and fall over the last; the last
    step has tau = 0 and no corrector. A step of order 2 uses the few-step form of their appendix D.

    Args:
        fn: `(x [B, H, W, C], t [B] float32) -> [B, H, W, C or 2C]`, the noise first.
        x_T: [B, H, W, C] standard normal.
        schedule: noise levels.
        steps: N, model calls.
        keys: [B] one key per image; not needed at tau 0.
        tau: amount of noise, at least 0, inside `tau_interval`; 0 outside it.
        tau_interval: (low, high) continuous times in (0, 1], (t + 1) / T for step t.
        predictor_order: 1 to 4.
        corrector_order: 1 to 4, or 0 for no corrector.
        spacing: "time_uniform" (official PixArt-alpha) or "linspace" (diffusers).
        init: [B, H, W, C] clean latent to start from, noised by `x_T`.
        strength: in (0, 1], the part of the steps that is run from `init`.
        inpaint: region to keep.
        return_x0: also return the clean-latent prediction of every step, [N, B, H, W, C].

    Raises:
        UserError: an order, tau, spacing, strength or number of steps out of range, or missing keys.
    """
    if not 1 <= predictor_order <= 4 or not 0 <= corrector_order <= 4:
        raise UserError(
            f"predictor_order={predictor_order}, corrector_order={corrector_order}: "
            f"the predictor takes 1 to 4, the corrector 0 to 4."
        )
    if tau < 0:
        raise UserError(f"tau={tau} is negative: 0 is the deterministic solver.")
    grid = uniform_grid(schedule, steps, spacing, final_sigma_zero=False)
    first = first_step(steps, init, strength)
    grid = Grid(*(levels[first:] for levels in grid))

    # A step's tau is that of the time it arrives at; the last step adds no noise that nothing could remove.
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
    """Rows of coefficients: row i predicts point i + 1 or, with `correct`, corrects point i."""
    count, half_log_snr = len(grid.t), grid.half_log_snr
    update = Update(np.zeros(count), np.zeros((count, order)), np.zeros(count))
    if correct:
        update.x[0] = 1.0  # the starting point is exact
    for row in range(1 if correct else 0, count):
        target = row if correct else row + 1
        tau, alpha, sigma = taus[target - 1], grid.alpha[target], grid.sigma[target]
        h = half_log_snr[target] - half_log_snr[target - 1]
        # A corrector has one known point more than the predictor that it repeats.
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
        moments[1] = h**2 / 2.0  # appendix D: differs by O(h^3), better images in few steps
    # The weights integrate every polynomial up to this degree exactly.
    return rate * np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
