"""The training step, a pure function: micro-batches, gradient, update, divergence guard, moving averages.

Which parameters are trained with which loss is defined by the objective (`training/objectives/`). All random
numbers of a sample are a function of (seed, index), where index is its position in the shuffled sequence of
samples. They do not depend on the device, process, row or micro-batch that processes the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from pixart_jax.config import TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.models.memory import device_shardings, on_device
from pixart_jax.training import sharding
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
            moments = device_shardings(next(iter(shardings.ema.values())))
            gradients = jax.lax.with_sharding_constraint(gradients, moments)
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
      shardings: as for `make_gradient`; without them the compiler chooses the sharding of the gradient. An
        optimizer state in host memory is on the devices only during the update.
    """
    gradient = make_gradient(config, objective, shardings)
    offload = shardings is not None and config.optimizer.offload

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        gradients, metrics = gradient(state.trained, state.frozen, batch)
        if offload:
            fetched = jax.device_put(state.optimizer, device_shardings(shardings.optimizer))
            state = dataclasses.replace(state, optimizer=fetched)
        with jax.named_scope("update"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            ema = update_averages(
                config.optimizer, objective.averages, state.ema, trained, optimizer_state, state.step
            )
            norm = optax.tree.norm(gradients)
            refused, average = refuse(
                config.divergence, state.step, metrics[objective.watched], norm, state.loss_average
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


def jit_train_step(
    config: TrainConfig, objective: Objective, optimizer: optax.GradientTransformation, shardings: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `make_train_step` for states that `device_part` returns, and donates them."""
    out = device_part(config, shardings)
    return jax.jit(
        make_train_step(config, objective, optimizer, shardings),
        donate_argnums=0,
        out_shardings=(out, sharding.replicated(shardings.step.mesh)),
    )


def device_part(config: TrainConfig, state: TrainState) -> TrainState:
    """Returns the part of a state that a step computes on the devices: no averages in host memory."""
    return dataclasses.replace(state, ema={}) if "ema" in config.optimizer.on_host else state


def whole_step(
    program: Callable, config: TrainConfig, objective: Objective, shardings: TrainState
) -> Callable[[TrainState, Batch, int], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes a function like `program` for whole states, whose averages may be in host memory.

    After every `optimizer.ema_every` steps, the averages are copied to the devices one by one, updated there
    as `make_train_step` does, and copied back. This waits until the step is done: the devices then hold
    neither activations nor the gradient, which takes as much memory as an average.

    Args:
      program: result of `jit_train_step`, or `compilation.compile_ahead` of it.
      config: config of the stage.
      objective: defines the decays.
      shardings: shardings of the whole state.

    Returns:
      A function (state, global batch, number of updates before this one) -> (state after it, metrics).
    """
    if "ema" not in config.optimizer.on_host:
        return lambda state, batch, step: program(state, batch)

    def follow(name, average, state, refused):
        optimizer_state = jax.device_put(state.optimizer, device_shardings(shardings.optimizer))
        new = update_averages(
            config.optimizer,
            objective.averages,
            {name: average},
            state.trained,
            optimizer_state,
            state.step - 1,
        )[name]
        return jax.tree.map(lambda old, new: jnp.where(refused, old, new), average, new)

    on_devices = device_shardings(next(iter(shardings.ema.values())))
    follow = jax.jit(follow, static_argnums=0, donate_argnums=1, out_shardings=on_devices)

    def update(state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict[str, jax.Array]]:
        averages = state.ema
        state, metrics = program(device_part(config, state), batch)
        if (step + 1) % config.optimizer.ema_every == 0:
            jax.block_until_ready(state)
            new = {}
            for name, average in averages.items():
                average = follow(name, on_device(average), state, metrics["refused"])
                new[name] = jax.block_until_ready(jax.device_put(average, shardings.ema[name]))
            averages = new
        return dataclasses.replace(state, ema=averages), metrics

    return update
