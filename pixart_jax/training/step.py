"""One optimizer update as a pure function: micro-batches, gradient, divergence guard, moving averages.

What is trained and by which loss is up to the objective (`training/objectives/`). Every random number of a
sample is a function of (seed, index), index being its position in the shuffled sequence of samples: never of
the device, the process, the row or the micro-batch it lands in.
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
from pixart_jax.training.optimizers import update_ema
from pixart_jax.training.state import TrainState, merge


def check_trainable(config: TrainConfig) -> None:
    """Raises a `UserError` for a compute dtype that this trainer does not train in."""
    if config.model.dtype == "float16":
        raise UserError(
            "model.dtype 'float16' is for sampling: small gradients become zero in it, and this trainer does "
            "not scale the loss. Train in 'bfloat16', or in 'float32' on GPUs older than Ampere."
        )


def make_gradient(
    config: TrainConfig, objective: Objective, shardings: TrainState | None = None
) -> Callable[[Params, Params, Batch], tuple[Params, dict[str, jax.Array]]]:
    """(trained, frozen, global batch) -> (gradient of the mean loss over the whole batch, loss terms).

    The gradient is the same when it is computed in `optimizer.accumulation` micro-batches.

    Args:
      config: the stage.
      objective: its loss.
      shardings: of the state. The gradient is then laid out as the optimizer's moments are, even where the
        parameters are replicated (ZeRO-1), so that each device sums and updates only its share.

    Raises:
      UserError: see `check_trainable`.
    """
    check_trainable(config)
    parts = config.optimizer.accumulation

    def loss(trained, frozen, batch):
        keys = sample_keys(stream_key(config.seed, Stream.SAMPLES), batch["index"])
        terms = objective.loss(merge(trained, frozen), batch, keys)
        means = {name: jnp.mean(value) for name, value in terms.items()}
        return means["loss"], means

    def gradient(trained, frozen, batch):
        gradients, metrics = jax.grad(loss, has_aux=True)(trained, frozen, batch)
        if shardings is not None:
            # The averages are laid out as the moments are.
            gradients = jax.lax.with_sharding_constraint(gradients, next(iter(shardings.ema.values())))
        return gradients, metrics

    def accumulated(trained, frozen, batch):
        if parts == 1:
            return gradient(trained, frozen, batch)
        # Every device keeps its own rows: micro-batch k takes each device's k-th share.
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
    """(state, global batch) -> (state after one update, metrics as float32 scalars).

    `shardings` as for `make_gradient`; without them the compiler lays out the gradient.
    """
    gradient = make_gradient(config, objective, shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        gradients, metrics = gradient(state.trained, state.frozen, batch)
        with jax.named_scope("update"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            ema = {
                name: update_ema(state.ema[name], trained, decay, state.step)
                for name, decay in objective.averages.items()
            }
            norm = optax.tree.norm(gradients)
            refused, average = refuse(
                config.divergence, state.step, metrics["loss"], norm, state.loss_average
            )
            # The step counts even if its update is refused, for its batch is used up.
            updated = TrainState(state.step + 1, trained, state.frozen, ema, optimizer_state, average)
            if objective.after_update is not None:
                keys = sample_keys(stream_key(config.seed, Stream.AFTER_UPDATE), batch["index"])
                updated = objective.after_update(updated, batch, keys)
            old = TrainState(
                updated.step, state.trained, state.frozen, state.ema, state.optimizer, updated.loss_average
            )
            # A refused update leaves everything else as it was.
            new = jax.tree.map(
                lambda old, new: old if old is new else jnp.where(refused, old, new), old, updated
            )
        metrics |= {"gradient_norm": norm, "refused": refused, "loss_average": average}
        return new, metrics

    return step
