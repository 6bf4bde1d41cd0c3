"""The interface of a network to training, sampling and evaluation: parameters, conditions, noise schedule.

All three call a network only through `Denoiser`, so that the null condition, its mask and the order of the
network's arguments are defined in one place.

Axes: B batch, S text tokens, T text width, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixart_jax.config import GuidanceConfig, TrainConfig
from pixart_jax.diffusion.schedule import NoiseSchedule, linear_schedule
from pixart_jax.models import adapters
from pixart_jax.models.adapters import attach
from pixart_jax.models.configs import NULL_TEXT, AdapterConfig, BackboneConfig

# Key of the network that is sampled, validated and exported. A training state may hold further networks.
NETWORK = "network"

Params = dict[str, Any]
# Arrays of one batch by name; the first axis of each is the batch.
Conditions = dict[str, jax.Array]


def abstract_model(config: BackboneConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the structure and the abstract parameters of a network, without allocating arrays."""
    return abstract_network(config, AdapterConfig())


def abstract_network(model: BackboneConfig, adapter: AdapterConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the structure and the abstract parameters of a network with adapters."""
    graph, leaves, tree = _abstract_network(model, adapter)
    return graph, jax.tree.unflatten(tree, leaves)


@functools.lru_cache(maxsize=16)
def _abstract_network(model: BackboneConfig, adapter: AdapterConfig) -> tuple[nnx.GraphDef, list[Any], Any]:
    # A state can be changed, so its leaves are kept, and every caller gets a state of its own.
    graph, state = nnx.split(nnx.eval_shape(lambda: _make(model, adapter, nnx.Rngs(0))))
    return graph, *jax.tree.flatten(state)


def make_network(config: TrainConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the network that a stage trains or samples, with the adapters of its config."""
    return _make(config.model, config.adapter, rngs)


def _make(model: BackboneConfig, adapter: AdapterConfig, rngs: nnx.Rngs) -> nnx.Module:
    network = model.make(rngs=rngs)
    attach(network, adapter, rngs=rngs)
    return network


def add_adapters(config: TrainConfig, params: Params, key: jax.Array) -> Params:
    """Returns the parameters of the network with adapters, from those of the network without.

    Args:
      config: config of the stage.
      params: float32 parameters in the tree of `config.model`.
      key: for the initial values of the adapters, which do not change the network.
    """
    graph, _ = abstract_model(config.model)

    @jax.jit
    def add(params: Params) -> Params:
        network = nnx.merge(graph, params)
        attach(network, config.adapter, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(network))

    return add(params)


def merge_adapters(config: TrainConfig, params: Params) -> tuple[Params, TrainConfig]:
    """Returns float32 parameters and config of the network without adapters that computes the same."""
    if not config.adapter:
        return params, config
    graph = Denoiser.of(config).graph

    @jax.jit
    def merged(params: Params) -> Params:
        network = nnx.merge(graph, params)
        adapters.merge(network)
        return nnx.to_pure_dict(nnx.state(network))

    return merged(params), dataclasses.replace(config, adapter=AdapterConfig())


def init_params(config: BackboneConfig, seed: int | jax.Array) -> Params:
    """Returns random initial parameters of a network as a nested dict of float32 arrays."""
    model = config.make(rngs=nnx.Rngs(jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.state(model))


def null_caption(
    guidance: GuidanceConfig, null_text: Any, mask: Any
) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]:
    """Returns the features of the null caption, and the masks to use with them.

    With `guidance.null_mask` 'caption', each sample keeps the mask of the caption that is replaced, as in
    training and sampling with the official code. With 'own', all samples use the mask of the null caption:
    one token if it is the T5 encoding of "", all tokens if it is a learned array.

    Args:
      guidance: guidance conventions of the weights.
      null_text: [L, T] with L >= S, features of the null caption.
      mask: [B, S] bool, valid tokens of the captions that are replaced.

    Returns:
      text [S, T], the same for every sample, and mask [B, S].
    """
    text = null_text[: mask.shape[1]]
    if guidance.null_mask == "caption":
        return text, mask
    length = 1 if guidance.null_text == "t5_empty" else mask.shape[1]
    return text, np.broadcast_to(np.arange(mask.shape[1]) < length, mask.shape)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network together with the noise schedule and the guidance conventions it was trained with.

    Attributes:
      config: config of the training stage: model, noise schedule, guidance conventions.
      graph: structure of the network, which `nnx.merge` combines with parameters.
    """

    config: TrainConfig
    graph: nnx.GraphDef

    @classmethod
    def of(cls, config: TrainConfig) -> Denoiser:
        """Makes the denoiser of a config. Its parameters have the same tree as in checkpoints."""
        return cls(config, abstract_network(config.model, config.adapter)[0])

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        diffusion = self.config.diffusion
        return linear_schedule(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end)

    def __call__(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        conditions: Mapping[str, jax.Array],
        **options: Any,
    ) -> jax.Array:
        """Runs the network.

        Args:
          params: parameters of the network.
          latents: [B, h, w, C] noised latents.
          timesteps: [B] on the 0..999 scale.
          conditions: arrays returned by `conditions`.
          options: further arguments of the network, such as `route`.

        Returns:
          [B, h, w, C or 2C] float32: noise, followed by the variance if the network learns it.
        """
        model = nnx.merge(self.graph, params)
        return model(
            latents, timesteps, *(conditions[name] for name in self.config.model.conditions), **options
        )

    def conditions(self, batch: Mapping[str, jax.Array]) -> Conditions:
        """Selects the arrays of a batch that the network is conditioned on."""
        conditions = {name: batch[name] for name in self.config.model.conditions}
        if "text_mask" in conditions:
            conditions["text_mask"] = conditions["text_mask"].astype(bool)
        return conditions

    def null_conditions(self, params: Params, conditions: Mapping[str, jax.Array]) -> Conditions:
        """Returns the unconditional counterpart of `conditions`, for classifier-free guidance.

        The null caption replaces the text and the label `num_classes` replaces the class. The other
        conditions are kept.
        """
        null = dict(conditions)
        if "label" in null:
            null["label"] = jnp.full_like(null["label"], self.config.model.num_classes)
        if "text" in null:
            text, null["text_mask"] = null_caption(self.config.guidance, params[NULL_TEXT], null["text_mask"])
            null["text"] = jnp.broadcast_to(text.astype(null["text"].dtype), null["text"].shape)
        return null

    def drop_conditions(
        self, params: Params, conditions: Mapping[str, jax.Array], dropped: jax.Array
    ) -> Conditions:
        """Replaces the conditions of the samples where `dropped` [B] is True by null conditions."""
        null = self.null_conditions(params, conditions)
        return {
            name: value
            if null[name] is value
            else jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null[name], value)
            for name, value in conditions.items()
        }
