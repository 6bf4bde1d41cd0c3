"""Noise schedules: the forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) and its tables.

Shapes: B batch, T steps of the schedule, H W latent height and width, C latent channels.

A step `t` is an index into a schedule, from 0 (least noise) to T - 1. `schedule.timesteps[t]` is the timestep
that is passed to the network at that step. The two differ only in a respaced schedule.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Betas of a discrete diffusion process (Ho et al. 2020, arXiv 2006.11239, section 2).

    Tables are numpy float64, because a float32 cumulative product over 1000 steps loses precision. They are
    cast to float32 when they are combined with JAX arrays. Schedules with equal betas and timesteps compare
    equal and have the same hash, so a schedule can be a static argument of `jax.jit` or be closed over.

    Args:
        betas: [T] variance added by each step, each in (0, 1).
        timesteps: [T] timestep passed to the network at each step; 0 .. T - 1 by default.

    Raises:
        UserError: if a beta is outside (0, 1), if the numbers of timesteps and betas differ, or if, in finite
            precision, the first step adds no noise or the last one leaves no signal.
    """

    betas: np.ndarray
    timesteps: np.ndarray | None = None

    def __post_init__(self):
        betas = np.array(self.betas, np.float64)
        timesteps = np.arange(len(betas)) if self.timesteps is None else np.array(self.timesteps, np.int64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise UserError(f"betas must be a non-empty vector of values in (0, 1), not {betas}.")
        if timesteps.shape != betas.shape:
            raise UserError(f"{len(timesteps)} timesteps for {len(betas)} betas: give one per beta.")
        signal = np.cumprod(1.0 - betas)
        if signal[0] == 1 or signal[-1] < np.finfo(np.float32).tiny:
            fault = "the first step adds no noise" if signal[0] == 1 else "the last step leaves no signal"
            raise UserError(
                f"betas from {betas[0]:g} to {betas[-1]:g} in {len(betas)} steps: {fault} in finite "
                "precision. PixArt uses 0.0001 to 0.02 in 1000 steps."
            )
        for name, table in (("betas", betas), ("timesteps", timesteps)):
            table.setflags(write=False)  # because the hash is computed from the contents
            object.__setattr__(self, name, table)

    def _contents(self):
        return self.betas.tobytes(), self.timesteps.tobytes()

    def __eq__(self, other):
        return isinstance(other, NoiseSchedule) and self._contents() == other._contents()

    def __hash__(self):
        return hash(self._contents())

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t = prod_{s<=t} (1 - beta_s), [T]."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """abar_{t-1}, which is 1 for t = 0, [T]."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def signal_noise_ratio(self) -> np.ndarray:
        """abar_t / (1 - abar_t), [T]."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t), the variance of q(x_{t-1} | x_t, x_0), [T]."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log beta~_t, with beta~_0 = 0 replaced by beta~_1, as in the code of arXiv 2102.09672, [T]."""
        variance = self.posterior_variance.copy()
        variance[0] = variance[1] if self.num_steps > 1 else self.betas[0]
        return np.log(variance)

    @cached_property
    def posterior_mean_x0(self) -> np.ndarray:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0): sqrt(abar_{t-1}) beta_t / (1 - abar_t), [T]."""
        return np.sqrt(self.alphas_cumprod_prev) * self.betas / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_xt(self) -> np.ndarray:
        """Weight of x_t in the same mean: sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t), [T]."""
        return np.sqrt(1.0 - self.betas) * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    def marginal(self, t) -> tuple[np.ndarray, np.ndarray]:
        """Returns the signal and noise levels of q(x_t | x_0) at possibly fractional steps.

        log alpha is interpolated linearly between steps, as in DPM-Solver for discrete-time models
        (Lu et al. 2022, arXiv 2206.00927, appendix D).

        Args:
            t: steps in [0, T - 1], integers or fractions, any shape.

        Returns:
            alpha and sigma, float64, with alpha^2 + sigma^2 = 1.
        """
        log_alpha = np.interp(t, np.arange(self.num_steps), 0.5 * np.log(self.alphas_cumprod))
        return np.exp(log_alpha), np.sqrt(-np.expm1(2.0 * log_alpha))


def linear_schedule(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """beta_t linear from `beta_start` to `beta_end` (arXiv 2006.11239, section 4), as in PixArt-alpha.

    With the default values abar_999 is 4.04e-5, so the last step still contains a little signal.

    Args:
        num_steps: T.
        beta_start: variance of the first step.
        beta_end: variance of the last step.
    """
    return NoiseSchedule(np.linspace(beta_start, beta_end, num_steps, dtype=np.float64))


def lookup(table: np.ndarray, t: jax.Array, ndim: int) -> jax.Array:
    """Returns `table[t]` in float32 with shape [B, 1, ..., 1], which broadcasts against `ndim` axes.

    Args:
        table: [T].
        t: [B] integer steps in [0, T - 1], of an integer or float dtype. JAX clamps indices that are out of
            range.
        ndim: number of axes of the result.
    """
    values = jnp.asarray(table, jnp.float32)[jnp.asarray(t).astype(jnp.int32)]
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))


def add_noise(schedule: NoiseSchedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (arXiv 2006.11239, equation 4).

    Args:
        schedule: noise schedule.
        x0: [B, ...] clean latents.
        noise: [B, ...] standard normal.
        t: [B] steps.

    Returns:
        [B, ...] float32.
    """
    signal = lookup(np.sqrt(schedule.alphas_cumprod), t, x0.ndim)
    return signal * x0 + lookup(np.sqrt(1.0 - schedule.alphas_cumprod), t, x0.ndim) * noise


def predict_x0(schedule: NoiseSchedule, x_t: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_0 = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps, which inverts `add_noise` for given noise.

    Args:
        schedule: noise schedule.
        x_t: [B, ...] noisy latents.
        noise: [B, ...] noise, usually predicted by the network.
        t: [B] steps.

    Returns:
        [B, ...] float32.
    """
    scale = lookup(np.sqrt(1.0 / schedule.alphas_cumprod), t, x_t.ndim)
    return scale * x_t - lookup(np.sqrt(1.0 / schedule.alphas_cumprod - 1.0), t, x_t.ndim) * noise


def respace(schedule: NoiseSchedule, spacing: int | str) -> NoiseSchedule:
    """Returns a shorter schedule with the same marginals: beta'_k = 1 - abar_{s_k} / abar_{s_{k-1}}.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), section 4; spacings are written as in their code.

    Args:
        schedule: schedule to shorten.
        spacing: which steps to keep.
            250 or "250": 250 evenly spaced steps, including the first and the last.
            "10,15,20": 10, 15 and 20 steps from three sections of equal length.
            "ddim25": 25 steps with a constant integer stride from step 0 (Song et al. 2020,
                arXiv 2010.02502).

    Returns:
        The new schedule; its `timesteps` are the kept steps.

    Raises:
        UserError: if the spacing cannot be parsed, asks for more steps than there are, or has no integer
            stride.
    """
    kept = _kept_steps(schedule.num_steps, str(spacing))
    kept_alphas_cumprod = schedule.alphas_cumprod[kept]
    betas = 1.0 - kept_alphas_cumprod / np.append(1.0, kept_alphas_cumprod[:-1])
    return NoiseSchedule(betas, schedule.timesteps[kept])


def _kept_steps(total: int, spacing: str) -> np.ndarray:
    strided = spacing.startswith("ddim")
    try:
        counts = [int(count) for count in spacing.removeprefix("ddim").split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or (strided and len(counts) > 1):
        raise UserError(f"spacing {spacing!r} is not a number of steps, 'ddim25' or a list like '10,15,20'.")
    if strided:
        for stride in range(1, total + 1):
            if len(range(0, total, stride)) == counts[0]:
                return np.arange(0, total, stride)
        raise UserError(f"spacing {spacing!r}: no integer stride selects {counts[0]} of {total} steps.")

    kept, start = [], 0
    for section, count in enumerate(counts):
        size = total // len(counts) + (section < total % len(counts))
        if size < count:
            raise UserError(f"spacing {spacing!r} keeps {count} of a section of {size} steps: ask for fewer.")
        # A running sum, as in the reference code. Rounding i * stride instead would move some steps by one.
        position, stride = 0.0, (size - 1) / (count - 1) if count > 1 else 1.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return np.array(kept)
