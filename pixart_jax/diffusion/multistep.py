"""The sampling loop: a linear multistep method over a grid of noise levels, as a single scan.

Shapes: B batch, H W latent height and width, C latent channels, N steps, K predictions that a step uses.

All samplers except ancestral sampling (`iddpm`) follow the same recurrence and differ only in its
coefficients. With the clean-latent predictions m_i = (x_i - sigma_i eps(x_i, t_i)) / alpha_i,

    x_{i+1} = a_i x_i + sum_k c_ik m_{i-k} + s_i z_i,   z_i ~ N(0, I)

A corrector repeats step i - 1 with the same x_{i-1} and z_{i-1} once m_i is known. The coefficients depend
only on the schedule. They are computed with numpy in float64, cast to float32 and passed to the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.schedule import NoiseSchedule
from pixart_jax.errors import UserError

NoiseFn = Callable[[jax.Array, jax.Array], jax.Array]

# Folded into the key of an image to generate its initial noise. Sampling steps fold in 0, 1, ..., so this
# number must never be the number of a step.
_INITIAL_NOISE = 2**31 - 1


class Inpaint(NamedTuple):
    """The region to keep in inpainting (Lugmayr et al. 2022, arXiv 2201.09865, equation 8).

    After each step the kept region is replaced by the original latent, noised to the current noise level;
    after the last step, by the clean original.
    """

    mask: jax.Array  # [B or 1, H, W, 1], 1 where the image is sampled, 0 where it is kept
    latent: jax.Array  # [B, H, W, C] clean latent of the original image
    noise: jax.Array  # [B, H, W, C] standard normal, the same in every step


class Grid(NamedTuple):
    """Noise levels from the start to the end of sampling, numpy float64."""

    t: np.ndarray  # [N] timestep passed to the model, on the 0 .. 999 scale, possibly fractional
    alpha: np.ndarray  # [N + 1] signal level; the model is not evaluated at the last one
    sigma: np.ndarray  # [N + 1] noise level

    @property
    def half_log_snr(self) -> np.ndarray:
        """lambda = log(alpha / sigma), [N + 1]; infinite where sigma is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)


class Update(NamedTuple):
    """Coefficients of the recurrence for each step, numpy float64."""

    x: np.ndarray  # [N] a, weight of the current sample
    x0: np.ndarray  # [N, K] c, weights of the clean-latent predictions, newest first
    noise: np.ndarray  # [N] s, weight of fresh noise


def draw_noise(keys: jax.Array, step: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Generates standard normal noise. The noise of image k depends only on `keys[k]` and `step`.

    Args:
        keys: [B] one key per image.
        step: number folded into each key.
        shape: shape of one image, such as (H, W, C).

    Returns:
        [B, *shape] float32.

    Raises:
        UserError: if the keys are of an "rbg" implementation. Under vmap it would generate the noise of the
            whole batch from the first key.
    """
    implementation = str(jax.random.key_impl(keys))
    if "rbg" in implementation:
        raise UserError(
            f"with {implementation} keys an image would depend on its batch: use impl='threefry2x32'."
        )
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Generates x_T of each image from the same keys that are passed to the sampler.

    Args:
        keys: [B] one key per image.
        shape: shape of one image, such as (H, W, C).

    Returns:
        `[B, *shape]` float32, independent of all noise that a sampler generates from the same keys.
    """
    return draw_noise(keys, _INITIAL_NOISE, shape)


def uniform_grid(schedule: NoiseSchedule, steps: int, spacing: str, final_sigma_zero: bool) -> Grid:
    """A grid of evenly spaced timesteps from T - 1 to 0.

    Args:
        schedule: noise schedule of the model.
        steps: N.
        spacing: "time_uniform", fractional timesteps that end at the noise level of timestep 0 (official
            PixArt-alpha), or "linspace", the same rounded to integers (diffusers).
        final_sigma_zero: with "linspace", end at sigma = 0 instead of the noise level of timestep 0.

    Raises:
        UserError: if the spacing is unknown or the number of steps is out of range.
    """
    last = schedule.num_steps - 1
    if not 1 <= steps <= last:
        raise UserError(f"steps={steps}: this schedule allows 1 to {last}.")
    index = np.linspace(last, 0, steps + 1)
    if spacing == "linspace":
        index = index.round()
    elif spacing != "time_uniform":
        raise UserError(f"spacing {spacing!r} is not 'time_uniform' or 'linspace'.")
    alpha, sigma = schedule.marginal(index)
    if spacing == "linspace" and final_sigma_zero:
        alpha[-1], sigma[-1] = 1.0, 0.0
    return Grid(np.interp(index[:-1], np.arange(last + 1), schedule.timesteps), alpha, sigma)


def step_grid(schedule: NoiseSchedule, index: np.ndarray) -> Grid:
    """A grid of given steps of the schedule, followed by sigma = 0.

    Args:
        schedule: noise schedule of the model.
        index: [N] steps of the schedule, in decreasing order.
    """
    alpha, sigma = schedule.marginal(index)
    return Grid(schedule.timesteps[index].astype(np.float64), np.append(alpha, 1.0), np.append(sigma, 0.0))


def first_step(steps: int, init: jax.Array | None, strength: float) -> int:
    """Returns the number of initial steps that sampling from `init` at `strength` skips, as in diffusers.

    Raises:
        UserError: if the strength is outside (0, 1], leaves no step, or is below 1 without `init`.
    """
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength {strength} is outside (0, 1].")
    if init is None and strength != 1.0:
        raise UserError(f"strength {strength} needs an initial image: pass its latent as init.")
    kept = int(steps * strength)
    if kept < 1:
        raise UserError(f"strength {strength} leaves none of {steps} steps: it must be at least 1/{steps}.")
    return steps - kept


def start(x_T: jax.Array, init: jax.Array | None, alpha: float, sigma: float) -> jax.Array:
    """Returns x at the first noise level: `x_T`, or alpha init + sigma x_T (SDEdit, arXiv 2108.01073)."""
    x_T = x_T.astype(jnp.float32)
    return x_T if init is None else alpha * init.astype(jnp.float32) + sigma * x_T


def keep_known(x: jax.Array, inpaint: Inpaint | None, alpha, sigma) -> jax.Array:
    """Replaces the kept region of `inpaint` in `x` by the original at the noise level (alpha, sigma)."""
    if inpaint is None:
        return x
    return jnp.where(inpaint.mask > 0.5, x, alpha * inpaint.latent + sigma * inpaint.noise)


def evaluate(fn: NoiseFn, x: jax.Array, t: jax.Array) -> jax.Array:
    """Calls `fn` with the same timestep for the whole batch and checks the number of output channels."""
    output = fn(x, jnp.full(x.shape[0], t, jnp.float32)).astype(jnp.float32)
    channels = x.shape[-1]
    if output.shape[-1] not in (channels, 2 * channels):
        raise UserError(
            f"the model returned {output.shape[-1]} channels for latents with {channels}: "
            f"it must return {channels} (noise) or {2 * channels} (noise and variance)."
        )
    return output


def require_keys(keys: jax.Array | None, batch: int) -> None:
    """Raises a `UserError` unless there is one key per image."""
    if keys is None or keys.shape[:1] != (batch,):
        got = "none" if keys is None else f"shape {keys.shape}"
        raise UserError(f"this sampler adds noise and needs one key per image: {batch}, not {got}.")


def linear_multistep(
    fn: NoiseFn,
    x_T: jax.Array,
    grid: Grid,
    predictor: Update,
    corrector: Update | None = None,
    *,
    first: int = 0,
    keys: jax.Array | None = None,
    init: jax.Array | None = None,
    inpaint: Inpaint | None = None,
    return_x0: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Runs the recurrence of this module with one model call per step.

    Args:
        fn: `(x [B, H, W, C], t [B] float32) -> [B, H, W, C or 2C]`, noise first; a variance half is ignored.
        x_T: [B, H, W, C] standard normal.
        grid: N steps, without the `first` steps that are skipped when sampling starts from `init`.
        predictor: coefficients of the step from i to i + 1.
        corrector: coefficients of the step from i - 1 to i once m_i is known. Row 0 must leave x unchanged.
        first: number of skipped steps. The noise of a step is keyed by its number in the full grid, so it is
            the same with and without `init`.
        keys: [B] one key per image. Required if any noise weight is non-zero.
        init: [B, H, W, C] clean latent to start from.
        inpaint: region to keep.
        return_x0: also return the clean-latent prediction of every step.

    Returns:
        [B, H, W, C] float32; with `return_x0` also [N, B, H, W, C].

    Raises:
        UserError: if noise is needed and there is not one key per image, or if the model returns a wrong
            number of channels.
    """
    stochastic = bool(np.any(predictor.noise))
    if stochastic:
        require_keys(keys, x_T.shape[0])
    history_length = max(update.x0.shape[1] for update in (predictor, corrector) if update is not None)
    rows = {
        "t": grid.t,
        "alpha": grid.alpha[:-1],
        "sigma": grid.sigma[:-1],
        "next_alpha": grid.alpha[1:],
        "next_sigma": grid.sigma[1:],
        "predictor": predictor,
        "corrector": corrector,
    }
    rows = jax.tree.map(lambda row: jnp.asarray(row, jnp.float32), rows)
    rows["step"] = first + jnp.arange(len(grid.t))

    def apply(update, x, history, noise):
        # `history` has the length of the longer method; the shorter one ignores the oldest predictions.
        x = update.x * x + sum(weight * x0 for weight, x0 in zip(update.x0, history, strict=False))
        return x if noise is None else x + update.noise * noise

    def step(carry, row):
        x, base, noise, history = carry
        output = evaluate(fn, x, row["t"])[..., : x.shape[-1]]
        x0 = (x - row["sigma"] * output) / row["alpha"]
        history = (x0, *history[:-1])
        if corrector is not None:
            x = keep_known(apply(row["corrector"], base, history, noise), inpaint, row["alpha"], row["sigma"])
        if stochastic:
            noise = draw_noise(keys, row["step"], x.shape[1:])
        predicted = apply(row["predictor"], x, history, noise)
        predicted = keep_known(predicted, inpaint, row["next_alpha"], row["next_sigma"])
        base = x if corrector is not None else None
        return (predicted, base, noise, history), x0 if return_x0 else None

    x = keep_known(start(x_T, init, grid.alpha[0], grid.sigma[0]), inpaint, grid.alpha[0], grid.sigma[0])
    carry = (
        x,
        x if corrector is not None else None,
        jnp.zeros_like(x) if stochastic else None,
        (jnp.zeros_like(x),) * history_length,
    )
    (x, *_), trajectory = jax.lax.scan(step, carry, rows)
    if inpaint is not None:
        # The grid may end at a noise level above 0, but the kept region is returned without noise.
        x = keep_known(x, inpaint, 1.0, 0.0)
    return (x, trajectory) if return_x0 else x
