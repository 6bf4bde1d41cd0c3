"""Densities from which training draws its timesteps, and the weights of SpeeD.

A timestep t of T stands for u = (t + 1/2) / T in (0, 1); u near 1 is almost only noise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.schedule import NoiseSchedule
from pixart_jax.errors import one_of

DENSITIES = ("uniform", "logit_normal", "sigmoid", "speed")
# With importance weights, this share of the timesteps is drawn uniformly ("defensive importance sampling",
# Hesterberg 1995). Otherwise timesteps that are almost never drawn would have unlimited weights.
UNIFORM_SHARE = 0.01


def timestep_probabilities(
    density: str,
    num_timesteps: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    slope: float = 5.0,
    boundary: int = 0,
    suppression: float = 5.0,
    uniform_share: float = 0.0,
) -> np.ndarray:
    """Returns the probability of each timestep.

        uniform        p(u) = 1
        logit_normal   p(u) ~ exp(-(logit u - mean)^2 / (2 std^2)) / (u (1 - u))
                       (Esser et al. 2024, arXiv 2403.03206, equation 19)
        sigmoid        p(u) ~ 1 / (1 + exp(-slope (u - 1/2)))   (the distribution 'SIGMOID' of OneTrainer)
        speed          p(t) = k / (T + (k - 1) tau) for t < tau, 1 / (T + (k - 1) tau) for t >= tau
                       (SpeeD, asymmetric sampling: Wang et al. 2024, arXiv 2405.17403)

    Args:
      density: one of `DENSITIES`.
      num_timesteps: T.
      mean, std: parameters of 'logit_normal'; above 0, the mean favours noise.
      slope: parameter of 'sigmoid'; above 0 it favours noise.
      boundary: tau of 'speed', as from `convergence_boundary`.
      suppression: k of 'speed'.
      uniform_share: share of the draws that are uniform instead.

    Returns:
      [T] float64 with sum 1.

    Raises:
      UserError: if the density is unknown.
    """
    one_of("density", density, DENSITIES)
    u = (np.arange(num_timesteps) + 0.5) / num_timesteps
    if density == "uniform":
        log_density = np.zeros_like(u)
    elif density == "logit_normal":
        logit = np.log(u) - np.log1p(-u)
        log_density = -0.5 * np.square((logit - mean) / std) - np.log(u) - np.log1p(-u)
    elif density == "sigmoid":
        log_density = -np.logaddexp(0.0, -slope * (u - 0.5))
    else:
        log_density = np.where(np.arange(num_timesteps) < boundary, np.log(suppression), 0.0)
    values = np.exp(log_density - log_density.max())
    return (1 - uniform_share) * values / values.sum() + uniform_share / num_timesteps


def convergence_boundary(schedule: NoiseSchedule, share: float) -> int:
    """Returns tau, the first timestep of the convergence area of SpeeD, or T if there is none.

    SpeeD (arXiv 2405.17403) looks at the increments x_{t+1} - x_t of a sample, with noises drawn
    independently. Their variance is 2 - abar_t (2 - beta_{t+1}), which is at least 2 (1 - abar_t) and at most
    2. The convergence area is where this bound has come within 1 / r of the maximum, so with share =
    1 - 1 / r it starts at the first t with

        1 - abar_t >= share.

    For betas that grow linearly from beta_0 by D in T steps, abar_t is about exp(-beta_0 t - D t^2 / (2 T)):

        tau = sqrt((T beta_0 / D)^2 + 2 T log(r) / D) - T beta_0 / D

    With PixArt's schedule and share 0.985, tau is 643; the official code starts the area at 641, where the
    derivative of sqrt(1 - abar_t) falls below 1e-4.

    Args:
      schedule: noise schedule.
      share: of the maximum of the variance, in (0, 1).
    """
    return int(np.searchsorted(1.0 - schedule.alphas_cumprod, share))


def change_weights(schedule: NoiseSchedule, ceiling: float) -> np.ndarray:
    """Returns the weight of each timestep in the loss, by SpeeD's change-aware weighting.

        w_t = 1 - lambda + (2 lambda - 1) (g_t - min g) / (max g - min g),   g_t = abar_{t-1} - abar_t

    SpeeD (arXiv 2405.17403) weights the loss by the derivative of the variance of the increments (see
    `convergence_boundary`), here the differences of its bound, rescaled to [1 - lambda, lambda]. The official
    code uses the weights of P2 instead (Choi et al. 2022, arXiv 2204.00227).

    Args:
      schedule: noise schedule.
      ceiling: lambda in [1/2, 1].

    Returns:
      [T] float64.
    """
    change = schedule.alphas_cumprod_prev - schedule.alphas_cumprod
    span = change.max() - change.min()
    rescaled = (change - change.min()) / span if span else np.ones_like(change)
    return 1 - ceiling + (2 * ceiling - 1) * rescaled


def draw_timestep(key: jax.Array, probabilities: np.ndarray) -> jax.Array:
    """Draws a timestep by inverting the cumulative distribution.

    Args:
      key: a random key.
      probabilities: [T], as from `timestep_probabilities`.

    Returns:
      [] int32.
    """
    # The last bound is left out, because rounding could leave it below a random number just under 1.
    bounds = jnp.asarray(np.cumsum(probabilities)[:-1], jnp.float32)
    return jnp.searchsorted(bounds, jax.random.uniform(key), side="right").astype(jnp.int32)
