"""Optimizers, learning-rate schedules and the moving average of the weights.

Most come from optax. `factored.py` has CAME and Adafactor, `muon.py` has Muon, and `moments.py` stores
moments in less memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from pixart_jax.config import OptimizerConfig
from pixart_jax.training.objectives import Objective, Params
from pixart_jax.training.optimizers.factored import adafactor, came, layouts
from pixart_jax.training.optimizers.moments import in_less_memory
from pixart_jax.training.optimizers.muon import matrices, muon
from pixart_jax.weights.power_averages import PowerAverage

__all__ = [
    "came",
    "learning_rate_schedule",
    "make_optimizer",
    "matrices",
    "update_averages",
    "update_ema",
    "update_power_average",
]


def learning_rate_schedule(
    config: OptimizerConfig, batch_size: int, steps: int | None = None
) -> optax.Schedule:
    """The learning rate of update i = 0, 1, …: linear warm-up, then `config.schedule`.

    With the peak r = learning_rate sqrt(batch_size / `sqrt_scaling_batch`), the floor f = `final_rate`, and
    the share u of the steps after the warm-up (of the last `decay_share` of all steps, for 'wsd') that are
    done:

        constant   r
        linear     r (1 - (1 - f) u)
        cosine     r (f + (1 - f) (1 + cos(pi u)) / 2)               (Loshchilov & Hutter, arXiv 1608.03983)
        wsd        r, then r (1 - (1 - f) u)   (warm-up, stable, decay: Hägele et al., arXiv 2405.18392)

    Args:
      config: config of the optimizer.
      batch_size: samples per update.
      steps: number of updates of the run, at which a schedule reaches its floor. 'constant' does not need it.
    """
    rate = config.learning_rate
    if config.sqrt_scaling_batch:
        rate *= math.sqrt(batch_size / config.sqrt_scaling_batch)
    warmup = config.warmup_steps
    if config.schedule == "constant":
        return optax.linear_schedule(0.0, rate, warmup) if warmup else optax.constant_schedule(rate)
    if steps is None:
        raise ValueError(f"the schedule '{config.schedule}' needs the number of steps")
    floor, decay = config.final_rate, config.decay_steps(steps)
    if config.schedule == "cosine":
        end = optax.cosine_decay_schedule(rate, decay, alpha=floor)
    else:
        end = optax.linear_schedule(rate, floor * rate, decay)
    start = optax.linear_schedule(0.0, rate, max(1, warmup))
    return optax.join_schedules([start, optax.constant_schedule(rate), end], [warmup, steps - decay])


def make_optimizer(
    config: OptimizerConfig,
    batch_size: int,
    objective: Objective | None = None,
    steps: int | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Makes the optimizer: clipping by global norm, followed by `config.name`.

    Weight decay is decoupled and multiplied by the learning rate, in every optimizer. It applies to all
    parameters, including biases and tables, as in the official code.

    Args:
      config: config of the optimizer.
      batch_size: samples per update, by which the learning rate may be scaled.
      objective: defines the trained parameters. Muon trains those in `matrices`; CAME and Adafactor treat
        each as `layouts` says, or without an objective as arrays of PyTorch. Others do not need it.
      steps: number of updates of the run, for schedules that decay.
      seed: seed of the run, for the stochastic rounding of moments.
      mesh: devices that share the work of Muon; None if each of them may do all of it.
    """
    rate = learning_rate_schedule(config, batch_size, steps)
    if config.name == "muon":
        optimizer = _muon(config, rate, objective, mesh)
    else:
        optimizer = _MAKERS[config.name](config, rate, objective)
    rates = _rates(objective)
    if config.moments != "float32" or rates:
        scale, state = _WITH_MOMENTS[config.name](config)
        if config.moments != "float32":
            scale = in_less_memory(scale, state, config.moments, seed)
        optimizer = optax.chain(
            scale,
            # Before the weight decay, which muP does not change.
            *([optax.stateless(lambda updates, _: _scaled(updates, rates))] if rates else []),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
    if not config.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _rates(objective: Objective | None) -> dict[tuple[str, ...], float]:
    """The learning rates that differ from those of the other parameters, as factors (`models/mup.py`)."""
    return {
        (network, *path): variable.get_metadata()["rate"]
        for network, state in (objective.abstract_networks() if objective else {}).items()
        for path, variable in nnx.to_flat_state(state)
        if "rate" in variable.get_metadata()
    }


def _scaled(updates: Params, rates: Mapping[tuple[str, ...], float]) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, update: update * rates.get(tuple(key.key for key in path), 1.0), updates
    )


def _adamw(config: OptimizerConfig, rate: optax.Schedule, objective: Objective | None):
    return optax.adamw(
        rate, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay
    )


def _lion(config: OptimizerConfig, rate: optax.Schedule, objective: Objective | None):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an average of momentum and gradient."""
    return optax.lion(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)


def _came(config: OptimizerConfig, rate: optax.Schedule, objective: Objective | None):
    return came(
        rate,
        config.weight_decay,
        b1=config.beta1,
        b2=config.beta2,
        b3=config.beta3,
        layouts=objective and layouts(objective),
    )


def _adafactor(config: OptimizerConfig, rate: optax.Schedule, objective: Objective | None):
    return adafactor(rate, config.weight_decay, layouts=objective and layouts(objective))


def _muon(config: OptimizerConfig, rate: optax.Schedule, objective: Objective, mesh: Mesh | None):
    """Muon for the matrices of the blocks, AdamW for all other parameters."""
    ratio = config.muon_learning_rate / config.learning_rate
    return muon(
        (lambda step: ratio * rate(step)) if ratio else rate,
        config.momentum,
        config.weight_decay,
        matrices(objective),
        _adamw(config, rate, objective),
        mesh,
    )


def _prodigy(config: OptimizerConfig, rate: optax.Schedule, objective: Objective | None):
    """Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101): AdamW that estimates its learning rate.

    The learning rate of the config multiplies the estimate, so it should be 1.
    """
    prodigy = optax.contrib.prodigy(
        rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        # As its authors recommend with a warm-up, whose small rates would spoil the estimate.
        safeguard_warmup=config.warmup_steps > 0,
    )
    # optax keeps the initial parameters themselves in the state. It needs a copy, as both are donated.
    return optax.GradientTransformation(
        lambda params: prodigy.init(jax.tree.map(jnp.copy, params)), prodigy.update
    )


def _schedule_free(config: OptimizerConfig, rate: optax.Schedule, objective: Objective | None):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682).

    The gradient is taken at y = (1 - beta1) z + beta1 x, where z is what AdamW without momentum updates and x
    is the average of z. The trained parameters are y; `update_averages` computes x.
    """
    adamw = optax.adamw(rate, b1=0.0, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
    return optax.contrib.schedule_free(adamw, rate, b1=config.beta1)


_MAKERS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "came": _came,
    "lion": _lion,
    "prodigy": _prodigy,
    "schedule_free": _schedule_free,
}
# The part of an optimizer that has the moments, and the class of its state.
_WITH_MOMENTS = {
    "adamw": lambda config: (
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.ScaleByAdamState,
    ),
    "lion": lambda config: (optax.scale_by_lion(config.beta1, config.beta2), optax.ScaleByLionState),
}


@jax.named_scope("ema")
def update_ema(ema: dict, params: dict, decay: float, step: jax.Array, every: int = 1) -> dict:
    """ema += (1 - d) (params - ema), with d the product of d_j over the last `every` steps, in float32.

        d_j = min(decay, (1 + j) / (10 + j)),  j = step - every + 1, …, step

    The average starts from the initial weights. The decay increases from 0.1 to `decay`, so that the initial
    weights are soon forgotten. With `every` = k, d is what the weight of the old average would be after k
    updates with d_j; the weights of the k - 1 steps between are not used.

    Args:
      ema, params: trees of the same structure.
      decay: final decay.
      step: [] number of updates of the parameters before this one.
      every: number of updates of the parameters per update of the average.
    """
    steps = step.astype("float32") - jnp.arange(every, dtype="float32")
    decay = jnp.prod(jnp.minimum(decay, (1.0 + steps) / (10.0 + steps)))
    return jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), ema, params)


@jax.named_scope("ema")
def update_power_average(
    average: dict, params: dict, kind: PowerAverage, step: jax.Array, every: int = 1
) -> dict:
    """average += (1 - b) (params - average) with b = (1 - k / t)^(gamma + 1), in float32.

    Karras et al. 2024 (arXiv 2312.02696, section 3.1), with t updates done and k = `every` since the last
    update of the average. At t = k, b is 0, so the initial weights have no part in the average.

    Args:
      average, params: trees of the same structure.
      kind: has the exponent gamma.
      step: [] number of updates of the parameters before this one, t - 1.
      every: number of updates of the parameters per update of the average.
    """
    # 1 - b itself would lose most of its digits, because it is about 1e-5 in long runs.
    share = -jnp.expm1((kind.exponent + 1.0) * jnp.log1p(-every / (step.astype("float32") + 1.0)))
    return jax.tree.map(lambda old, value: old + share * (value - old), average, params)


def update_averages(
    config: OptimizerConfig,
    decays: Mapping[str, float | PowerAverage],
    averages: dict[str, Params],
    trained: Params,
    optimizer_state: Any,
    step: jax.Array,
) -> dict[str, Params]:
    """Updates all moving averages that are given; see `update_ema` and `update_power_average`.

    With `config.ema_every` = k, they change only in every k-th step.

    With 'schedule_free', the average 'ema', which is validated, sampled and exported, is instead the average
    x that the optimizer itself defines, x = (y - (1 - beta1) z) / beta1.

    Args:
      config: config of the optimizer.
      decays: decay of each average, by name, or its width.
      averages: the averages before the update, by name; all that `decays` has, or some of them.
      trained: parameters after the update.
      optimizer_state: state of the optimizer after the update.
      step: [] number of updates before this one.
    """
    every = config.ema_every
    new = {}
    for name, old in averages.items():
        power = isinstance(decays[name], PowerAverage)
        new[name] = (update_power_average if power else update_ema)(old, trained, decays[name], step, every)
    if config.name == "schedule_free" and "ema" in new:
        state = next(part for part in _parts(optimizer_state) if hasattr(part, "weight_sum"))
        new["ema"] = optax.contrib.schedule_free_eval_params(state, trained)
    if every == 1:
        return new
    due = (step + 1) % every == 0
    return jax.tree.map(lambda old, new: jnp.where(due, new, old), averages, new)


def _parts(state: Any) -> tuple[Any, ...]:
    """The states in a chain of optax transformations."""
    return (state,) if hasattr(state, "_fields") else state
