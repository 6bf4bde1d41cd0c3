"""Samplers, which generate latents from noise with a noise-prediction function.

Shapes: B batch, H W latent height and width, C latent channels, N steps.

All samplers have the signature
`sampler(fn, x_T, schedule, *, steps, keys, init, strength, inpaint, return_x0, **own)`:

    fn        `(x [B, H, W, C], t [B] float32) -> [B, H, W, C or 2C]`, predicted noise first. t is on the
              scale of training, 0 .. 999; some solvers use fractional values.
    x_T       [B, H, W, C] standard normal, for example `initial_noise(keys, (H, W, C))`.
    schedule  the `NoiseSchedule` that the network was trained with.
    steps     N, the number of model calls.
    keys      [B] one PRNG key per image, for samplers that add noise. Image k depends only on keys[k], so it
              is the same in any batch.
    init      [B, H, W, C] clean latent to start from, noised by `x_T` (image-to-image).
    strength  in (0, 1], the fraction of the steps that is run when sampling starts from `init`.
    inpaint   an `Inpaint`, the region to keep.
    return_x0 also return the clean-latent prediction of every step, [N, B, H, W, C].

They return [B, H, W, C] float32. They are pure functions with a single `lax.scan`. Wrap a call in `jax.jit`
to compile it once for many batches; all arguments except arrays are static.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.multistep import (
    Grid,
    Inpaint,
    NoiseFn,
    Update,
    draw_noise,
    evaluate,
    first_step,
    keep_known,
    linear_multistep,
    require_keys,
    start,
    step_grid,
    uniform_grid,
)
from pixart_jax.diffusion.objective import p_mean_variance
from pixart_jax.diffusion.sa_solver import sa_solver
from pixart_jax.diffusion.schedule import NoiseSchedule, respace
from pixart_jax.errors import UserError


def dpm_solver(
    fn: NoiseFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    *,
    steps: int = 20,
    keys: jax.Array | None = None,
    order: int = 2,
    spacing: str = "time_uniform",
    init: jax.Array | None = None,
    strength: float = 1.0,
    inpaint: Inpaint | None = None,
    return_x0: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Multistep DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, algorithm 2; order 3 as in their code).

    With lambda = log(alpha / sigma), its increment h in the step, the clean-latent predictions m, and ' for
    the next noise level, a step of order 2 is

        x' = (sigma' / sigma) x - alpha' (e^{-h} - 1) (m + (m - m_before) / (2 r)),   r = h_before / h

    The solver is deterministic. `keys` is unused; it is there for the common signature.

    Args:
        fn, x_T, schedule, keys, init, strength, inpaint, return_x0: see the module docstring.
        steps: N.
        order: 1, 2 or 3.
        spacing: "time_uniform" follows the official PixArt-alpha code: fractional timesteps 999, 949.05, ...
            that end at the noise level of timestep 0; the order decreases over the last steps if there are
            fewer than 10. "linspace" follows diffusers' `DPMSolverMultistepScheduler()`: integer timesteps
            999, 949, ... that end at sigma = 0 with a step of order 1; the order decreases over the last
            steps if there are fewer than 15.

    Raises:
        UserError: if the order, the spacing, the strength or the number of steps is out of range.
    """
    if order not in (1, 2, 3):
        raise UserError(f"order={order}: DPM-Solver++ has orders 1, 2 and 3.")
    full_grid = uniform_grid(schedule, steps, spacing, final_sigma_zero=True)
    first = first_step(steps, init, strength)
    grid = Grid(*(levels[first:] for levels in full_grid))
    count, half_log_snr = len(grid.t), grid.half_log_snr
    lower_final = steps < (10 if spacing == "time_uniform" else 15)

    weights = np.zeros((count, order))
    for row in range(count):
        used = min(order, row + 1, count - row if lower_final else order)
        if grid.sigma[row + 1] == 0.0:
            used = 1  # lambda is infinite there
        h = half_log_snr[row + 1] - half_log_snr[row]
        past_h = np.diff(half_log_snr[row + 1 - used : row + 1])[::-1]
        weights[row, :used] = grid.alpha[row + 1] * _dpm_weights(h, past_h)
    update = Update(grid.sigma[1:] / grid.sigma[:-1], weights, np.zeros(count))
    return linear_multistep(
        fn, x_T, grid, update, first=first, init=init, inpaint=inpaint, return_x0=return_x0
    )


def _dpm_weights(h: float, past_h: np.ndarray) -> np.ndarray:
    """Weights of m, m_before, ... in one step, divided by alpha'.

    `past_h` are the increments of lambda in the previous steps, newest first; their number is the order - 1.
    """
    phi_1 = np.expm1(-h)
    if len(past_h) == 0:
        return np.array([-phi_1])
    ratios = past_h / h
    if len(past_h) == 1:
        slope = np.array([1.0, -1.0]) / ratios[0]
        return np.array([-phi_1, 0.0]) - 0.5 * phi_1 * slope
    slopes = np.array([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]]) / ratios[:, None]
    curvature = (slopes[0] - slopes[1]) / ratios.sum()
    slope = slopes[0] + ratios[0] * curvature
    phi_2 = phi_1 / h + 1.0
    phi_3 = phi_2 / h - 0.5
    return np.array([-phi_1, 0.0, 0.0]) + phi_2 * slope - phi_3 * curvature


def ddim(
    fn: NoiseFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    *,
    steps: int = 50,
    keys: jax.Array | None = None,
    eta: float = 0.0,
    spacing: str = "leading",
    init: jax.Array | None = None,
    strength: float = 1.0,
    inpaint: Inpaint | None = None,
    return_x0: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """DDIM (Song et al. 2020, arXiv 2010.02502, equations 12 and 16); ' marks the next noise level.

        x' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z
        s  = eta (sigma' / sigma) sqrt(1 - alpha^2 / alpha'^2)

    Args:
        fn, x_T, schedule, keys, init, strength, inpaint, return_x0: see the module docstring. Keys are
            required if eta > 0.
        steps: N.
        eta: 0 is deterministic, 1 is ancestral sampling with the variance beta~.
        spacing: "leading" uses the timesteps 0, T // N, ... (diffusers; equal to "ddimN" of the official code
            if N divides T). "trailing" includes the last timestep (Lin et al. 2023, arXiv 2305.08891,
            section 3.3).

    Raises:
        UserError: if eta, the spacing, the strength or the number of steps is out of range, or if keys are
            missing.
    """
    total = schedule.num_steps
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps}: this schedule allows 1 to {total}.")
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta={eta} is outside [0, 1].")
    if spacing == "leading":
        index = np.arange(steps)[::-1] * (total // steps)
    elif spacing == "trailing":
        index = np.round(total - np.arange(steps) * (total / steps)).astype(np.int64) - 1
    else:
        raise UserError(f"spacing {spacing!r} is not 'leading' or 'trailing'.")
    first = first_step(steps, init, strength)
    grid = step_grid(schedule, index[first:])
    alpha, sigma, next_alpha, next_sigma = grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:]
    noise = eta * next_sigma / sigma * np.sqrt(1.0 - np.square(alpha / next_alpha))
    direction = np.sqrt(np.square(next_sigma) - np.square(noise)) / sigma
    # Substitute eps = (x - alpha x_0) / sigma to express the step in terms of x and x_0.
    update = Update(direction, (next_alpha - alpha * direction)[:, None], noise)
    return linear_multistep(
        fn, x_T, grid, update, first=first, keys=keys, init=init, inpaint=inpaint, return_x0=return_x0
    )


def lcm(
    fn: NoiseFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    *,
    steps: int = 4,
    keys: jax.Array | None = None,
    spacing: str = "skipping",
    training_steps: int = 50,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
    init: jax.Array | None = None,
    strength: float = 1.0,
    inpaint: Inpaint | None = None,
    return_x0: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Multistep sampling of a latent consistency model (Luo et al. 2023, arXiv 2310.04378, algorithm 3).

        d  = c_skip x + c_out x_0,   c_skip = s^2 / (u^2 + s^2),   c_out = u / sqrt(u^2 + s^2)
        x' = alpha' d + sigma' z,    u = t * timestep_scaling,     s = sigma_data

    z is new noise in every step; the last step returns d.

    Args:
        fn, x_T, schedule, keys, init, strength, inpaint, return_x0: see the module docstring. `fn` must not
            apply guidance, which is already distilled into the model.
        steps: N.
        spacing: selects N of the timesteps of distillation. For N = 4, "skipping" selects 999, 759, 519, 279
            (official PixArt-alpha) and "linspace" 999, 759, 499, 259 (diffusers).
        training_steps: number of evenly spaced timesteps in distillation.
        sigma_data: standard deviation of the data.
        timestep_scaling: factor that makes c_skip close to 0 everywhere except at t = 0.

    Raises:
        UserError: if the spacing, the strength or the number of steps is out of range, or if keys are
            missing.
    """
    if not 1 <= steps <= training_steps <= schedule.num_steps:
        raise UserError(
            f"steps={steps}, training_steps={training_steps}: "
            f"they must satisfy 1 <= steps <= training_steps <= {schedule.num_steps}."
        )
    trained = np.arange(training_steps, 0, -1) * (schedule.num_steps // training_steps) - 1
    if spacing == "skipping":
        index = trained[:: training_steps // steps][:steps]
    elif spacing == "linspace":
        index = trained[np.arange(steps) * training_steps // steps]
    else:
        raise UserError(f"spacing {spacing!r} is not 'skipping' or 'linspace'.")
    first = first_step(steps, init, strength)
    grid = step_grid(schedule, index[first:])
    scaled = grid.t * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    next_alpha = grid.alpha[1:]
    update = Update(next_alpha * c_skip, (next_alpha * c_out)[:, None], grid.sigma[1:])
    return linear_multistep(
        fn, x_T, grid, update, first=first, keys=keys, init=init, inpaint=inpaint, return_x0=return_x0
    )


def iddpm(
    fn: NoiseFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    *,
    steps: int | str = 100,
    keys: jax.Array | None = None,
    init: jax.Array | None = None,
    strength: float = 1.0,
    inpaint: Inpaint | None = None,
    return_x0: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Ancestral sampling with learned variance on a respaced schedule.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), section 4.

        x_{t-1} = mean(x_t, t) + exp(log variance / 2) z,   z = 0 at t = 0

    x_0 is not clipped, because latents have no fixed range.

    Args:
        fn, x_T, schedule, keys, init, strength, inpaint, return_x0: see the module docstring. `fn` must
            return 2C channels.
        steps: N, or a spacing in the syntax of `respace`, such as "ddim25" or "10,15,20".

    Raises:
        UserError: if the spacing or the strength is out of range, if keys are missing, or if the model has no
            variance half.
    """
    require_keys(keys, x_T.shape[0])
    respaced = respace(schedule, steps)
    first = first_step(respaced.num_steps, init, strength)
    index = np.arange(respaced.num_steps)[::-1][first:]
    grid = step_grid(respaced, index)
    rows = {"t": grid.t, "alpha": grid.alpha[1:], "sigma": grid.sigma[1:], "noise": index > 0}
    rows = jax.tree.map(lambda row: jnp.asarray(row, jnp.float32), rows)
    rows["index"] = jnp.asarray(index)
    rows["step"] = first + jnp.arange(len(index))

    def step(x, row):
        output = evaluate(fn, x, row["t"])
        p = p_mean_variance(respaced, output, x, jnp.full(x.shape[0], row["index"]))
        noise = row["noise"] * draw_noise(keys, row["step"], x.shape[1:])
        x = p.mean + jnp.exp(0.5 * p.log_variance) * noise
        x = keep_known(x, inpaint, row["alpha"], row["sigma"])
        return x, p.x0 if return_x0 else None

    x = keep_known(start(x_T, init, grid.alpha[0], grid.sigma[0]), inpaint, grid.alpha[0], grid.sigma[0])
    x, trajectory = jax.lax.scan(step, x, rows)
    return (x, trajectory) if return_x0 else x


SAMPLERS = {
    "dpm_solver": dpm_solver,
    "ddim": ddim,
    "iddpm": iddpm,
    "sa_solver": sa_solver,
    "lcm": lcm,
}
