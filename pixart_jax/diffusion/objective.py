"""The training loss and the learned reverse transition p(x_{t-1} | x_t).

Shapes: B batch, H W latent height and width, C latent channels. The network's output is [B, H, W, 2C], the
predicted noise followed by the variance value v, or only the noise, [B, H, W, C], without learned variance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.schedule import NoiseSchedule, add_noise, lookup, predict_x0
from pixart_jax.errors import UserError, one_of

WEIGHTINGS = ("uniform", "min_snr")


class Transition(NamedTuple):
    """The diagonal Gaussian p(x_{t-1} | x_t). All arrays are [B, H, W, C] float32."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    x0: jax.Array  # the clean latent that the mean was computed from


def p_mean_variance(
    schedule: NoiseSchedule, model_output: jax.Array, x_t: jax.Array, t: jax.Array
) -> Transition:
    """Computes the learned reverse transition, without clipping.

        mean = (sqrt(abar_{t-1}) beta_t x_0 + sqrt(1 - beta_t) (1 - abar_{t-1}) x_t) / (1 - abar_t)
        log variance = f log beta_t + (1 - f) log beta~_t,   f = (v + 1) / 2

    Ho et al. 2020 (arXiv 2006.11239) equation 7; Nichol & Dhariwal 2021 (arXiv 2102.09672) equation 15.

    Args:
        schedule: noise schedule, possibly respaced.
        model_output: [B, H, W, 2C] noise and variance value v. v should be in [-1, 1] but is not clipped.
        x_t: [B, H, W, C] noisy latents.
        t: [B] integer steps of `schedule`, that is, indices into its tables.

    Raises:
        UserError: if `model_output` has no variance half.
    """
    noise, v = _split(model_output, x_t.shape[-1], learned_variance=True)
    x0 = predict_x0(schedule, x_t, noise, t)
    fraction = (v + 1.0) / 2.0
    high = lookup(np.log(schedule.betas), t, x_t.ndim)
    low = lookup(schedule.posterior_log_variance_clipped, t, x_t.ndim)
    log_variance = fraction * high + (1.0 - fraction) * low
    return Transition(_posterior_mean(schedule, x0, x_t, t), jnp.exp(log_variance), log_variance, x0)


def diffusion_loss(
    schedule: NoiseSchedule,
    model_output: jax.Array,
    x0: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    *,
    weighting: str = "uniform",
    gamma: float = 5.0,
    learned_variance: bool = True,
    weights: jax.Array | None = None,
    huber_c: float | None = None,
) -> dict[str, jax.Array]:
    """Computes the loss of each sample, mse + vb, or huber + vb.

        mse = w_t mean d^2,   d = eps - eps_hat
        huber = w_t mean (sqrt(d^2 + c^2) - c)
        vb  = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per value, and -log2 p(x_0 | x_1) at t = 0

    This is L_hybrid of Nichol & Dhariwal 2021 (arXiv 2102.09672, section 3.1) with weight 1 for vb, as in
    PixArt-alpha and DiT. Gradients of vb are stopped at the predicted noise, so vb trains only the variance.
    The likelihood at t = 0 is that of 8-bit values in [-1, 1]. Latents are not 8-bit values, but released
    weights were trained with this term. Both terms are means over the values of a sample. With `weights`,
    each value is first multiplied by the weight of its position.

    Args:
        schedule: noise schedule.
        model_output: network output at `add_noise(schedule, x0, noise, t)`: [B, H, W, 2C], or [B, H, W, C]
            without `learned_variance`. Any float dtype; the loss is computed in float32.
        x0: [B, H, W, C] clean latents, multiplied by the VAE's `scaling_factor`.
        noise: [B, H, W, C] standard normal noise that was added.
        t: [B] integer steps, 0 .. T - 1, of an integer or float dtype.
        weighting: weight of the mse term.
            "uniform": w_t = 1.
            "min_snr": w_t = min(SNR_t, gamma) / SNR_t (Hang et al. 2023, arXiv 2303.09556, section 3.4).
        gamma: upper bound of the SNR for "min_snr".
        learned_variance: whether the output has a variance half. If not, vb is 0.
        weights: [B, H, W] float32, weights of the latent positions; None for 1.
        huber_c: c of the pseudo-Huber loss; None for the squared error. The loss is taken of each value and
            is not scaled, as in the LCM training of PixArt-alpha (c = 0.001) and, with another factor, in
            Khrapov et al. 2024 (arXiv 2403.16728). For small d it is d^2 / (2 c), for large d it is |d|.

    Returns:
        {"loss", "mse", "vb"}, each [B] float32, with "huber" in place of "mse" for the pseudo-Huber loss. The
        first term is weighted, as it enters the loss.

    Raises:
        UserError: if the weighting is unknown or the number of channels does not match `learned_variance`.
    """
    one_of("weighting", weighting, WEIGHTINGS)
    predicted, _ = _split(model_output, x0.shape[-1], learned_variance)
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    x_t = add_noise(schedule, x0, noise, t)
    error = jnp.square(noise - predicted)
    if huber_c is not None:
        # The same as sqrt(d^2 + c^2) - c, without the difference of nearly equal numbers for small d.
        error = error / (jnp.sqrt(error + huber_c**2) + huber_c)
    if weighting == "min_snr":
        snr = schedule.signal_noise_ratio
        error = lookup(np.minimum(snr, gamma) / snr, t, x0.ndim) * error

    term = _mean_per_sample(error, weights)
    vb = jnp.zeros_like(term)
    if learned_variance:
        vb = _variational_bound(schedule, model_output, x0, x_t, t, weights)
    return {"loss": term + vb, "mse" if huber_c is None else "huber": term, "vb": vb}


def _variational_bound(schedule, model_output, x0, x_t, t, weights):
    noise, v = _split(model_output, x0.shape[-1], learned_variance=True)
    detached = jnp.concatenate([jax.lax.stop_gradient(noise), v], axis=-1)
    p = p_mean_variance(schedule, detached, x_t, t)
    true_mean = _posterior_mean(schedule, x0, x_t, t)
    true_log_variance = lookup(schedule.posterior_log_variance_clipped, t, x0.ndim)
    log_ratio = p.log_variance - true_log_variance
    distance = jnp.square(true_mean - p.mean) * jnp.exp(-p.log_variance)
    kl = 0.5 * (log_ratio - 1.0 + jnp.exp(-log_ratio) + distance)
    nll = -_discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    nats = jnp.where(jnp.asarray(t) == 0, _mean_per_sample(nll, weights), _mean_per_sample(kl, weights))
    return nats / math.log(2.0)


def _posterior_mean(schedule, x0, x_t, t):
    x0_weight = lookup(schedule.posterior_mean_x0, t, x_t.ndim)
    return x0_weight * x0 + lookup(schedule.posterior_mean_xt, t, x_t.ndim) * x_t


def _discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log P of the bin x +- 1/255, where the outermost bins extend to infinity (arXiv 2006.11239, eq. 13)."""
    centred, inverse_scale = x - mean, jnp.exp(-log_scale)
    upper = _approximate_normal_cdf(inverse_scale * (centred + 1.0 / 255.0))
    lower = _approximate_normal_cdf(inverse_scale * (centred - 1.0 / 255.0))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _approximate_normal_cdf(x):
    # The tanh approximation instead of erf, as in the official code: released weights were trained with it.
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _mean_per_sample(x, weights=None):
    if weights is not None:
        x = weights[..., None] * x
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _split(model_output, channels, learned_variance):
    expected = 2 * channels if learned_variance else channels
    if model_output.shape[-1] != expected:
        raise UserError(
            f"the model output has {model_output.shape[-1]} channels, but latents with {channels} channels "
            f"and learned_variance={learned_variance} need {expected}: set learned_variance to fit the model."
        )
    model_output = model_output.astype(jnp.float32)
    return model_output[..., :channels], model_output[..., channels:]
