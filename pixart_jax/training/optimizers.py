"""AdamW as PixArt-α is trained, and the moving average of the weights."""

from __future__ import annotations

import math

import jax
import optax

from pixart_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, batch_size: int) -> optax.Schedule:
    """Linear warm-up to a constant rate; with sqrt scaling, rate * sqrt(batch / reference batch)."""
    rate = config.learning_rate
    if config.sqrt_scaling_batch:
        rate *= math.sqrt(batch_size / config.sqrt_scaling_batch)
    if not config.warmup_steps:
        return optax.constant_schedule(rate)
    return optax.linear_schedule(0.0, rate, config.warmup_steps)


def make_optimizer(config: OptimizerConfig, batch_size: int) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW with decay on every parameter (biases and tables too)."""
    adamw = optax.adamw(
        learning_rate_schedule(config, batch_size),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def update_ema(ema: dict, params: dict, decay: float, step: jax.Array) -> dict:
    """ema += (1 - d) (params - ema), d = min(decay, (1 + step) / (10 + step)), in float32.

    The average starts from the initial weights; the rising decay lets it forget them.

    Args:
      ema, params: trees of equal structure.
      decay: the final decay.
      step: updates completed before this one.
    """
    step = step.astype("float32")
    decay = jax.numpy.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), ema, params)
