"""The training step, a pure function: micro-batches, gradient, update, divergence guard, moving averages.

Which parameters are trained with which loss is defined by the objective (`training/objectives/`). All random
numbers of a sample are a function of (seed, index), where index is its position in the shuffled sequence of
samples. They do not depend on the device, process, row or micro-batch that processes the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from pixart_jax.config import TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.training.divergence import refuse
from pixart_jax.training.objectives import Batch, Objective, Params, Stream, sample_keys, stream_key
from pixart_jax.training.optimizers import update_averages
from pixart_jax.training.state import TrainState, merge


def check_trainable(config: TrainConfig) -> None:
    """Raises a `UserError` if the compute dtype is not supported for training."""
    if config.model.dtype == "float16":
        raise UserError(
            "model.dtype 'float16' is for sampling only: small gradients would underflow, because the loss "
            "is not scaled. Train in 'bfloat16', or in 'float32' on GPUs older than Ampere."
        )


def make_gradient(
    config: TrainConfig, objective: Objective, shardings: TrainState | None = None
) -> Callable[[Params, Params, Batch], tuple[Params, dict[str, jax.Array]]]:
    """Makes a function (trained, frozen, global batch) -> (gradient of the mean loss, mean loss terms).

    Gradient and means are over the whole batch. They do not depend on the number of micro-batches,
    `optimizer.accumulation`, up to rounding. If the batch has the array `weight`, [B], the terms of each
    sample are multiplied by its weight. The sum is then still divided by the number of samples.

    Args:
      config: config of the stage.
      objective: defines the loss.
      shardings: shardings of the state. The gradient then has the sharding of the optimizer's moments, even
        if the parameters are replicated (ZeRO-1), so that each device sums and updates only its shard.

    Raises:
      UserError: see `check_trainable`.
    """
    check_trainable(config)
    parts = config.optimizer.accumulation

    def loss(trained, frozen, batch):
        keys = sample_keys(stream_key(config.seed, Stream.SAMPLES), batch["index"])
        terms = objective.loss(merge(trained, frozen), batch, keys)
        if "weight" in batch:  # of `data.loss_weights`
            terms = {name: batch["weight"] * value for name, value in terms.items()}
        means = {name: jnp.mean(value) for name, value in terms.items()}
        return means["loss"], means

    def gradient(trained, frozen, batch):
        gradients, metrics = jax.grad(loss, has_aux=True)(trained, frozen, batch)
        if shardings is not None:
            # All averages have the sharding of the moments; take any of them.
            gradients = jax.lax.with_sharding_constraint(gradients, next(iter(shardings.ema.values())))
        return gradients, metrics

    def accumulated(trained, frozen, batch):
        if parts == 1:
            return gradient(trained, frozen, batch)
        # Row r goes to micro-batch r mod k, so that each micro-batch takes rows from all devices and no row
        # moves to another device.
        split = {name: rearrange(value, "(b k) ... -> k b ...", k=parts) for name, value in batch.items()}

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(trained, frozen, part)), None

        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, trained, frozen, jax.tree.map(lambda value: value[0], split)),
        )
        total, _ = jax.lax.scan(add, zero, split)
        return jax.tree.map(lambda value: value / parts, total)

    return accumulated


def make_train_step(
    config: TrainConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes a function (state, global batch) -> (state after one update, metrics as float32 scalars).

    Args:
      config: config of the stage.
      objective: defines loss, averages and `after_update`.
      optimizer: optimizer for the trained parameters.
      shardings: as for `make_gradient`; without them the compiler chooses the sharding of the gradient.
    """
    gradient = make_gradient(config, objective, shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        gradients, metrics = gradient(state.trained, state.frozen, batch)
        with jax.named_scope("update"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            ema = update_averages(
                config.optimizer, objective.averages, state.ema, trained, optimizer_state, state.step
            )
            norm = optax.tree.norm(gradients)
            refused, average = refuse(
                config.divergence, state.step, metrics["loss"], norm, state.loss_average
            )
            # The step counts even if the update is skipped, because its batch has been consumed.
            updated = TrainState(state.step + 1, trained, state.frozen, ema, optimizer_state, average)
            if objective.after_update is not None:
                keys = sample_keys(stream_key(config.seed, Stream.AFTER_UPDATE), batch["index"])
                updated = objective.after_update(updated, batch, keys)
            old = TrainState(
                updated.step, state.trained, state.frozen, state.ema, state.optimizer, updated.loss_average
            )
            # If the update is skipped, everything else stays unchanged.
            new = jax.tree.map(
                lambda old, new: old if old is new else jnp.where(refused, old, new), old, updated
            )
        metrics |= {"gradient_norm": norm, "refused": refused, "loss_average": average}
        return new, metrics

    return step
