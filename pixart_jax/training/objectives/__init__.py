"""What a stage trains, and by which loss: one file per objective.

An objective fills the blanks of the training step: which networks there are, which of their parameters are
trained, which arrays a batch needs besides latents and conditions, the loss, and what follows an update.
`training/step.py` does the rest: micro-batches, gradient, optimizer, moving averages, refused updates.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import nnx

from pixart_jax.denoiser import NETWORK

__all__ = [
    "NETWORK",
    "Batch",
    "Objective",
    "Params",
    "Stream",
    "make_objective",
    "sample_keys",
    "stream_key",
]

if TYPE_CHECKING:
    from pixart_jax.config import TrainConfig
    from pixart_jax.training.state import TrainState

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]


class Objective(NamedTuple):
    """What a stage trains.

    Parameters are nested dicts under the name of their network: {"network": {...}}.

    Attributes:
      networks: makes each network with random weights, by name; one of them is `NETWORK`.
      is_trained: whether the optimizer changes the parameter of a path, such as ("network", "null_text").
      loss: (all parameters, batch, keys [B]) -> terms [B] by name, of which "loss" is minimized and the
        others are logged. The key of a sample is a function of the run's seed and of the sample's position in
        the shuffled sequence: never of the device, process, row or micro-batch it lands in.
      validation: (all parameters, batch with `weight` [B]) -> sums of the loss and of the weights, each
        [parts], over equal parts of the timesteps.
      averages: the decay of each moving average of the trained parameters, by name. 'ema' is validated,
        sampled from and exported by default.
      arrays: names of the arrays of a feature record that the loss needs besides latents and conditions.
      start: (parameters of all networks, with the starting weights of `NETWORK`) -> those of step 0. For
        networks that start from another one.
      after_update: (state after the update, batch, keys [B]) -> state. Not called after a refused update.
    """

    networks: Mapping[str, Callable[[nnx.Rngs], nnx.Module]]
    is_trained: Callable[[tuple[str, ...]], bool]
    loss: Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]
    validation: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    averages: Mapping[str, float]
    arrays: tuple[str, ...] = ()
    start: Callable[[Params], Params] = lambda params: params
    after_update: Callable[[TrainState, Batch, jax.Array], TrainState] | None = None

    def abstract_networks(self) -> dict[str, nnx.State]:
        """The abstract parameters of every network, with their metadata; allocates no arrays."""
        return {
            name: nnx.state(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
            for name, make in self.networks.items()
        }


def make_objective(config: TrainConfig) -> Objective:
    """The objective that `config.objective` names: a module of this package with a function of this name."""
    module = importlib.import_module(f"pixart_jax.training.objectives.{config.objective}")
    return module.make_objective(config)


# --- Random streams: one per purpose, so that no two purposes use the same random numbers.
#
# The key of a sampled image is `jax.random.key(seed)` itself (`sampling.image_keys`). A run folds the
# constant of a stream into its seed first, so its keys differ from those of images with the same seed.


class Stream(enum.IntEnum):
    """The purpose of random numbers. Changing a value changes the bits of every run."""

    # Large values, so that they do not meet the small numbers that samplers fold into the key of an image.
    INIT = 0x696E6974  # initial weights
    SAMPLES = 0x73616D70  # noise, timestep, dropped condition and routed tokens of a training sample
    AFTER_UPDATE = 0x75706474  # an objective's `after_update`
    VALIDATION = 0x76616C64  # noise of a validation record


def stream_key(seed: int | jax.Array, stream: Stream) -> jax.Array:
    """The root key of a stream."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample, a function of the stream and of the sample's index alone.

    Args:
      key: root of a stream.
      index: [B] uint32, positions in the shuffled sequence of samples.

    Returns:
      [B] keys.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
