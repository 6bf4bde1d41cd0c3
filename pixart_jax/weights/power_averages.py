"""Power-function averages of the weights, and how one is combined from others (post-hoc EMA).

Karras et al. 2024, arXiv 2312.02696. A power-function average of the weights has a relative width sigma, the
standard deviation of its profile as a share of the training time. At time t its profile over the times s <= t
is

    p(s) ~ s^gamma,   sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))

Times are numbers of updates since the start of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Folder of a run directory that holds its stored averages (`weights/snapshots.py`).
SNAPSHOTS = "ema"
PREFIX = "power_ema_"


class PowerAverage(NamedTuple):
    """A power-function average of the trained parameters.

    Attributes:
      width: sigma, the relative width of its profile.
    """

    width: float

    @property
    def name(self) -> str:
        """Its name in the training state, in checkpoints and in snapshots."""
        return f"{PREFIX}{self.width:g}"

    @property
    def exponent(self) -> float:
        """gamma, the largest root of gamma^3 + 7 gamma^2 + (16 - w) gamma + (12 - w), w = 1 / sigma^2."""
        inverse = self.width**-2.0
        return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class Profile(NamedTuple):
    """The weights that an average gives to the states of a run, as a function of time."""

    step: int
    width: float

    @property
    def exponent(self) -> float:
        return PowerAverage(self.width).exponent


class Fit(NamedTuple):
    """A linear combination of stored averages.

    Attributes:
      weights: [averages] float64, with sum 1.
      error: relative L2 error of the combined profile.
    """

    weights: np.ndarray
    error: float


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """Returns the inner products of the profiles, [len(a), len(b)] float64 (arXiv 2312.02696, appendix C).

        <a, b> = (g_a + 1) (g_b + 1) (t_a / t_b)^e / ((g_a + g_b + 1) max(t_a, t_b))

    where e is g_b for t_a < t_b and -g_a otherwise.
    """
    t_a, t_b = (np.array([each.step for each in part], np.float64) for part in (a, b))
    g_a, g_b = (np.array([each.exponent for each in part], np.float64) for part in (a, b))
    t_a, g_a = t_a[:, None], g_a[:, None]
    exponent = np.where(t_a < t_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * (t_a / t_b) ** exponent / ((g_a + g_b + 1) * np.maximum(t_a, t_b))


def fit_profile(stored: Sequence[Profile], target: Profile) -> Fit:
    """Solves A x = b for the combination of the stored profiles that is nearest to the target.

    A_ij = <i, j> and b_i = <i, target>, see `inner_products`; x is then divided by its sum, as in the code of
    EDM2.

    Args:
      stored: profiles of the stored averages, all different.
      target: profile of the average that is wanted.
    """
    matrix, right = inner_products(stored, stored), inner_products(stored, [target])[:, 0]
    # Scaled to a diagonal of ones: late averages have far smaller inner products than early ones.
    scale = np.sqrt(np.diag(matrix))
    weights = np.linalg.solve(matrix / np.outer(scale, scale), right / scale) / scale
    weights = weights / weights.sum()
    length = inner_products([target], [target])[0, 0]
    distance = length - 2 * weights @ right + weights @ matrix @ weights
    return Fit(weights, float(np.sqrt(max(distance, 0.0) / length)))
