"""AdamW as PixArt-α is trained, Muon in its place, and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

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
    """Clip by the global norm, then AdamW with decay on every parameter (biases and tables too), or Muon.

    Muon (Jordan et al. 2024) steps along the orthogonalised momentum of a matrix, scaled to the root mean
    square of an AdamW step (arXiv 2502.16982, section 2.2), so that rate and decay mean the same in both.
    """
    rate = learning_rate_schedule(config, batch_size)
    optimizer = optax.adamw(
        rate, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay
    )
    if config.name == "muon":
        muon = optax.contrib.muon(
            rate,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrices,
        )
        optimizer = optax.partition({"muon": muon, "adamw": optimizer}, _labels)
    if not config.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


# Axes of the kernels in a block, after the axis of layers: what is summed over, and what comes out. Axes in
# neither, such as those of query, key and value in one array, are matrices of their own.
_MATRICES = {
    ("attn", "qkv"): ((1,), (3, 4)),
    ("attn", "proj"): ((1, 2), (3,)),
    ("cross_attn", "q"): ((1,), (2, 3)),
    ("cross_attn", "kv"): ((1,), (3, 4)),
    ("cross_attn", "proj"): ((1, 2), (3,)),
    ("mlp", "fc1"): ((1,), (2,)),
    ("mlp", "fc2"): ((1,), (2,)),
}


def matrices(params: dict[str, Any]) -> dict[str, Any]:
    """Which axes make a matrix of each parameter: attention and MLP of the blocks; None for all others."""

    def one(path, _):
        names = [key.key for key in path]
        if names[:2] != ["blocks", "stacked"] or names[-1] != "kernel":
            return None
        axes = _MATRICES.get(tuple(names[2:4]))
        return axes and optax.contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(one, params)


def _labels(params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda axes: "muon" if axes else "adamw", matrices(params), is_leaf=_is_axes)


def _is_axes(value: Any) -> bool:
    return value is None or isinstance(value, optax.contrib.MuonDimensionNumbers)


@jax.named_scope("ema")
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
