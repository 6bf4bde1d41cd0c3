"""The diffusion objective: the loss that PixArt's stages and a full fine-tune minimize (PixArt-α §2.1).

Axes: B batch, h, w, C latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixart_jax.config import TrainConfig
from pixart_jax.denoiser import Conditions, Denoiser
from pixart_jax.denoiser import Params as NetworkParams
from pixart_jax.diffusion.objective import diffusion_loss
from pixart_jax.diffusion.schedule import add_noise
from pixart_jax.models.blocks import TokenRoute
from pixart_jax.training.objectives import NETWORK, Batch, Objective, Params, Stream, sample_keys, stream_key

# Timesteps of the validation loss: the middles of eight equal parts of 0..999 (as MLPerf's FLUX protocol).
VALIDATION_PARTS = 8
# Keeps the choice of tokens apart from the other random numbers of a sample.
_ROUTING_STREAM = 0x726F75


def make_objective(config: TrainConfig) -> Objective:
    """Trains the network of `config.model` to predict noise, and the variance where it is learned."""
    denoiser = Denoiser.of(config)

    def loss(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        draws = draw(config, batch, keys)
        conditions = denoiser.drop_conditions(params[NETWORK], denoiser.conditions(batch), draws.dropped)
        route = token_route(config, batch, keys)
        return loss_terms(denoiser, params[NETWORK], draws, conditions, route)

    def make_network(rngs: nnx.Rngs) -> nnx.Module:
        return config.model.make(rngs=rngs)

    untrained = {(NETWORK, name) for name in config.model.untrained}
    return Objective(
        networks={NETWORK: make_network},
        is_trained=lambda path: path not in untrained,
        loss=loss,
        validation=make_validation_step(denoiser),
        averages={"ema": config.optimizer.ema_decay},
    )


class Draws(NamedTuple):
    """A noised sample: what a loss compares the network's output with."""

    x0: jax.Array  # [B, h, w, C] clean latents in the scale of the network
    noise: jax.Array  # [B, h, w, C]
    timesteps: jax.Array  # [B] int32
    dropped: jax.Array  # [B] bool, whether the null condition replaces the sample's own


def draw(config: TrainConfig, batch: Batch, keys: jax.Array) -> Draws:
    """Draws clean latents from the VAE's posterior, noise, timesteps and dropped conditions.

        x_0 = scale (mean + std eps)

    Args:
      config: the stage.
      batch: latent_mean and latent_std [B, h, w, C] are read.
      keys: [B], one per sample.
    """
    shape = batch["latent_mean"].shape[1:]

    def one(key):
        posterior, noise, timestep, dropout = jax.random.split(key, 4)
        return (
            jax.random.normal(posterior, shape),
            jax.random.normal(noise, shape),
            jax.random.randint(timestep, (), 0, config.diffusion.num_timesteps),
            jax.random.uniform(dropout) < config.diffusion.condition_dropout,
        )

    posterior, noise, timesteps, dropped = jax.vmap(one)(keys)
    mean, std = (batch[name].astype(jnp.float32) for name in ("latent_mean", "latent_std"))
    return Draws(config.features.latent_scale * (mean + std * posterior), noise, timesteps, dropped)


def token_route(config: TrainConfig, batch: Batch, keys: jax.Array) -> TokenRoute | None:
    """The tokens of each sample that pass through all blocks; None when none skips blocks."""
    routing, model = config.routing, config.model
    if not routing.rate:
        return None
    height, width = (side // model.patch_size for side in batch["latent_mean"].shape[1:3])
    tokens = height * width
    kept = routing.kept(tokens)

    def one(key):
        return jax.random.permutation(jax.random.fold_in(key, _ROUTING_STREAM), tokens)[:kept]

    return TokenRoute(jax.vmap(one)(keys), routing.first_blocks, model.depth - routing.last_blocks)


def loss_terms(
    denoiser: Denoiser,
    params: NetworkParams,
    draws: Draws,
    conditions: Conditions,
    route: TokenRoute | None = None,
) -> dict[str, jax.Array]:
    """The diffusion loss of each sample [B] and its parts; see `diffusion.objective.diffusion_loss`."""
    config, schedule = denoiser.config, denoiser.schedule
    noised = add_noise(schedule, draws.x0, draws.noise, draws.timesteps)
    output = denoiser(params, noised, draws.timesteps, conditions, route=route)
    gamma = config.diffusion.min_snr_gamma
    return diffusion_loss(
        schedule,
        output,
        draws.x0,
        draws.noise,
        draws.timesteps,
        weighting="min_snr" if gamma else "uniform",
        gamma=gamma,
        learned_variance=config.model.learn_sigma,
    )


def validation_timesteps(config: TrainConfig) -> np.ndarray:
    """[8] int32: the middles of eight equal parts of the timesteps."""
    width = config.diffusion.num_timesteps // VALIDATION_PARTS
    return (np.arange(VALIDATION_PARTS) * width + width // 2).astype(np.int32)


def make_validation_step(denoiser: Denoiser) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """(params, batch) -> sums per part of the timesteps, with fixed noise and timesteps and no dropout.

    Record i is scored at part i mod 8 of the timesteps, with noise that is a function of i alone.
    `batch['weight']` [B] is 0 on padding rows.

    Returns:
      sums of the loss [8] and of the weights [8], so that batches add up.
    """
    timesteps = jnp.asarray(validation_timesteps(denoiser.config))

    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        # Not the run's seed: validation losses of different runs must be comparable.
        keys = sample_keys(stream_key(0, Stream.VALIDATION), batch["index"])
        part = (batch["index"] % VALIDATION_PARTS).astype(jnp.int32)
        draws = draw(denoiser.config, batch, keys)._replace(timesteps=timesteps[part])
        terms = loss_terms(denoiser, params[NETWORK], draws, denoiser.conditions(batch))
        member = jax.nn.one_hot(part, VALIDATION_PARTS) * batch["weight"].astype(jnp.float32)[:, None]
        return terms["loss"] @ member, member.sum(axis=0)

    return step
