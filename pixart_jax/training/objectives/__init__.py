"""Objectives: what a stage trains and with which loss. There is one file per objective.

An objective defines the networks, which of their parameters are trained, which arrays of a batch are needed
besides latents and conditions, the loss, and what happens after an update. `training/step.py` does the rest:
micro-batches, gradients, the optimizer, moving averages and skipped updates.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import nnx

if TYPE_CHECKING:
    from pixart_jax.config import TrainConfig
    from pixart_jax.training.state import TrainState
    from pixart_jax.weights.power_averages import PowerAverage

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]


class Objective(NamedTuple):
    """What a stage trains and with which loss.

    Parameters are nested dicts under the name of their network: {"network": {...}}.

    Attributes:
      networks: functions that make each network with random weights, by name. One of them is
        `denoiser.NETWORK`.
      is_trained: returns whether the optimizer changes the parameter at a path, such as
        ("network", "null_text").
      loss: (all parameters, batch, keys [B]) -> terms [B] by name. "loss" is minimized, all terms are logged.
        The key of a sample depends only on the seed of the run and on the position of the sample in the
        shuffled sequence, not on the device, process, row or micro-batch.
      validation: (all parameters, batch with `weight` [B]) -> sums of the loss and of the weights, each
        [parts], for equal parts of the timesteps.
      averages: decay of each moving average of the trained parameters, by name, or the width of a
        power-function average. By default 'ema' is used for validation, sampling and export.
      arrays: names of the arrays of a feature record that `loss` and `validation` need besides latents and
        conditions.
      training_arrays: those that only `loss` needs.
      watched: the term whose spikes are detected; it must be positive.
      start: (parameters of all networks, with the initial weights of `NETWORK`) -> parameters of step 0.
        For example, it can initialize one network from another.
      after_update: (state after the update, batch, keys [B]) -> state. Has no effect if the update is
        skipped.
    """

    networks: Mapping[str, Callable[[nnx.Rngs], nnx.Module]]
    is_trained: Callable[[tuple[str, ...]], bool]
    loss: Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]
    validation: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    averages: Mapping[str, float | PowerAverage]
    arrays: tuple[str, ...] = ()
    training_arrays: tuple[str, ...] = ()
    watched: str = "loss"
    start: Callable[[Params], Params] = lambda params: params
    after_update: Callable[[TrainState, Batch, jax.Array], TrainState] | None = None

    def abstract_networks(self) -> dict[str, nnx.State]:
        """Returns the abstract parameters of all networks with their metadata, without allocating arrays."""
        return {
            name: nnx.state(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
            for name, make in self.networks.items()
        }


def make_objective(config: TrainConfig) -> Objective:
    """Makes the objective `config.objective`, by calling `make_objective` of the module with that name."""
    module = importlib.import_module(f"pixart_jax.training.objectives.{config.objective}")
    return module.make_objective(config)


# --- Random streams: one for each purpose, so that no two purposes use the same random numbers.
#
# The key of a sampled image is `jax.random.key(seed)` itself (`sampling.image_keys`). A training run first
# folds the constant of a stream into its seed, so its keys differ from those of images with the same seed.


class Stream(enum.IntEnum):
    """The purpose of random numbers. Changing a value changes the bits of every run."""

    # Large values, so that they differ from the small numbers that samplers fold into the key of an image.
    INIT = 0x696E6974  # initial weights
    SAMPLES = 0x73616D70  # noise, timestep, condition dropout and token routing of a training sample
    AFTER_UPDATE = 0x75706474  # an objective's `after_update`
    VALIDATION = 0x76616C64  # noise of a validation record
    ROUNDING = 0x726F756E  # stochastic rounding of the optimizer's moments


def stream_key(seed: int | jax.Array, stream: Stream) -> jax.Array:
    """Returns the root key of a stream."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one key per sample, which depends only on the stream and on the index of the sample.

    Args:
      key: root key of a stream.
      index: [B] uint32, positions in the shuffled sequence of samples.

    Returns:
      [B] keys.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
