"""Densities from which training draws its timesteps.

A timestep t of T stands for u = (t + 1/2) / T in (0, 1); u near 1 is almost only noise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import one_of

DENSITIES = ("uniform", "logit_normal", "sigmoid")
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
    uniform_share: float = 0.0,
) -> np.ndarray:
    """Returns the probability of each timestep.

        uniform        p(u) = 1
        logit_normal   p(u) ~ exp(-(logit u - mean)^2 / (2 std^2)) / (u (1 - u))
                       (Esser et al. 2024, arXiv 2403.03206, equation 19)
        sigmoid        p(u) ~ 1 / (1 + exp(-slope (u - 1/2)))   (the distribution 'SIGMOID' of OneTrainer)

    Args:
      density: one of `DENSITIES`.
      num_timesteps: T.
      mean, std: parameters of 'logit_normal'; above 0, the mean favours noise.
      slope: parameter of 'sigmoid'; above 0 it favours noise.
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
    else:
        log_density = -np.logaddexp(0.0, -slope * (u - 0.5))
    values = np.exp(log_density - log_density.max())
    return (1 - uniform_share) * values / values.sum() + uniform_share / num_timesteps


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
