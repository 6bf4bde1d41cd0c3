"""A distribution whose score is known: 0.3 N(-1.5, 0.2^2) + 0.7 N(1, 0.2^2), one value per image.

The tests and `benchmarks/samplers.py` measure the error of samplers on it.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.multistep import initial_noise
from pixart_jax.diffusion.schedule import linear_schedule, lookup, respace

SCHEDULE = linear_schedule()
WEIGHTS, CENTRES, WIDTH = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), 0.2
COUNT = 20_000
MIDPOINTS = (np.arange(COUNT) + 0.5) / COUNT


def cdf(x, alpha, sigma):
    """Distribution function of alpha x_0 + sigma eps."""
    spread = np.sqrt((alpha * WIDTH) ** 2 + sigma**2)
    erf = np.vectorize(math.erf)
    return 0.5 + 0.5 * (WEIGHTS * erf((x[:, None] - alpha * CENTRES) / (spread * math.sqrt(2)))).sum(axis=1)


def quantiles(alpha=1.0, sigma=0.0, probabilities=MIDPOINTS):
    """Inverse of `cdf`; with the default noise levels, the quantiles of the data."""
    grid = np.linspace(-5.0, 5.0, 20_001)
    return np.interp(probabilities, cdf(grid, alpha, sigma), grid)


def posterior(x, t):
    """Mean and variance of x_0 given x_t. The variance is exact, without approximating by a Gaussian."""
    alpha, sigma = (level[..., None] for level in traced_levels(t))
    spread = (alpha * WIDTH) ** 2 + sigma**2
    distance = x[..., None] - alpha * CENTRES
    responsibility = jax.nn.softmax(jnp.log(WEIGHTS) - distance**2 / (2 * spread), axis=-1)
    means = CENTRES + alpha * WIDTH**2 / spread * distance
    mean = (responsibility * means).sum(axis=-1)
    within = (WIDTH * sigma) ** 2 / spread
    return mean, (responsibility * ((means - mean[..., None]) ** 2 + within)).sum(axis=-1)


def exact_model(x, t):
    """The exact noise prediction, -sigma times the score."""
    alpha, sigma = traced_levels(t)
    return (x - alpha * posterior(x, t)[0]) / sigma


def exact_variance_model(spacing):
    """`exact_model` with the optimal variance of a step of the respaced process, as a network would learn it.

    beta~ + (weight of x_0 in the mean of the step)^2 Var(x_0 | x_t) (Bao et al. 2022, arXiv 2201.06503).
    """
    respaced = respace(SCHEDULE, spacing)
    low, high = respaced.posterior_log_variance_clipped, np.log(respaced.betas)

    def fn(x, t):
        step = jnp.searchsorted(jnp.asarray(respaced.timesteps), t.astype(jnp.int32))
        table = functools.partial(lookup, t=step, ndim=4)
        variance = table(respaced.posterior_variance)
        variance += table(respaced.posterior_mean_x0) ** 2 * posterior(x, t)[1]
        v = 2.0 * (jnp.log(variance) - table(low)) / (table(high) - table(low)) - 1.0
        return jnp.concatenate([exact_model(x, t), v], axis=-1)

    return fn


def consistency_model(x, t):
    """The noise prediction for which the LCM parameterization is the exact flow map from x_t to x_0."""
    alpha, sigma = traced_levels(t)
    # The value whose quantile in the data is the quantile of x at this noise level.
    spread = jnp.sqrt((alpha * WIDTH) ** 2 + sigma**2)
    below = WEIGHTS[0] * jax.scipy.special.ndtr((x - alpha * CENTRES[0]) / spread)
    below += WEIGHTS[1] * jax.scipy.special.ndtr((x - alpha * CENTRES[1]) / spread)
    clean = jnp.interp(below, MIDPOINTS, quantiles())
    scaled = 10.0 * t.reshape(-1, 1, 1, 1)
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / jnp.sqrt(scaled**2 + 0.25)
    return (x - alpha * (clean - c_skip * x) / c_out) / sigma


def traced_levels(t):
    """alpha and sigma at fractional t, [B, 1, 1, 1]."""
    table = jnp.asarray(0.5 * np.log(SCHEDULE.alphas_cumprod), jnp.float32)
    log_alpha = jnp.interp(t, jnp.arange(1000.0), table).reshape(-1, 1, 1, 1)
    return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2.0 * log_alpha))


def with_variance(fn, v=-1.0):
    """`fn` with a variance half; -1 means the variance beta~, which is optimal if x_0 is known exactly."""
    return lambda x, t: jnp.concatenate([fn(x, t), jnp.full_like(x, v)], axis=-1)


def draw(sampler, fn, steps, seed=7, **options):
    """`COUNT` sorted samples of a sampler."""
    keys = jax.random.split(jax.random.key(seed), COUNT)
    x_T = initial_noise(keys, (1, 1, 1))
    run = jax.jit(lambda x, keys: sampler(fn, x, SCHEDULE, steps=steps, keys=keys, **options))
    return np.sort(np.asarray(run(x_T, keys)).ravel())


def distance(samples):
    """Mean distance of sorted samples to the exact quantiles: their 1-Wasserstein distance to the data."""
    return float(np.abs(samples - quantiles()).mean())


def moments(samples):
    """Mean, share of the lower mode, and standard deviation within each mode."""
    lower = samples < -0.25
    return {
        "mean": float(samples.mean()),
        "share": float(lower.mean()),
        "lower_std": float(samples[lower].std()),
        "upper_std": float(samples[~lower].std()),
    }


def expected_moments():
    """Exact `moments`, and the standard error of each over `COUNT` independent samples."""
    mean = float(WEIGHTS @ CENTRES)
    variance = WIDTH**2 + WEIGHTS @ (CENTRES - mean) ** 2
    return {
        "mean": (mean, math.sqrt(variance / COUNT)),
        "share": (0.3, math.sqrt(0.3 * 0.7 / COUNT)),
        "lower_std": (WIDTH, WIDTH / math.sqrt(2 * 0.3 * COUNT)),
        "upper_std": (WIDTH, WIDTH / math.sqrt(2 * 0.7 * COUNT)),
    }
