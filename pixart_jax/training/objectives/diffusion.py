"""The diffusion objective, which PixArt's stages and full fine-tuning minimize (PixArt-α §2.1).

Axes: B batch, h, w, C latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import TrainConfig
from pixart_jax.denoiser import NETWORK, Conditions, Denoiser, make_network
from pixart_jax.denoiser import Params as NetworkParams
from pixart_jax.diffusion.objective import diffusion_loss
from pixart_jax.diffusion.schedule import add_noise, lookup
from pixart_jax.diffusion.timesteps import (
    UNIFORM_SHARE,
    change_weights,
    convergence_boundary,
    draw_timestep,
    timestep_probabilities,
)
from pixart_jax.models.adapters import dropout, is_adapter
from pixart_jax.models.blocks import TokenRoute
from pixart_jax.training.objectives import Batch, Objective, Params, Stream, sample_keys, stream_key
from pixart_jax.weights.power_averages import PowerAverage

# The validation loss uses the middle timesteps of eight equal parts of 0..999, as in MLPerf's FLUX protocol.
VALIDATION_PARTS = 8
# Name of the term "loss" of this objective where another one adds to it.
DIFFUSION_LOSS = "diffusion_loss"
# Folded into the key of a sample, so that these options do not change its other random numbers.
_ROUTING_STREAM = 0x726F75
_CANDIDATES_STREAM = 0x63616E
_OFFSET_STREAM = 0x6F6666
_PERTURBATION_STREAM = 0x706572
# Likewise for the dropout of adapters.
_DROPOUT_STREAM = 0x64726F


def make_objective(config: TrainConfig) -> Objective:
    """Trains the network of `config.model` to predict the noise and, if it is learned, the variance."""
    denoiser = Denoiser.of(config)

    def loss(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        drawn = draw_all(denoiser, params[NETWORK], batch, keys)
        output = predict(denoiser, params[NETWORK], drawn)
        terms = change_weighted(denoiser, loss_terms(denoiser, drawn, output), drawn.draws.timesteps)
        return importance_weighted(config, terms, drawn.draws.timesteps)

    untrained = {(NETWORK, name) for name in config.model.untrained}
    return Objective(
        networks={NETWORK: lambda rngs: make_network(config, rngs=rngs)},
        is_trained=is_adapter if config.adapter else lambda path: path not in untrained,
        loss=loss,
        validation=make_validation_step(denoiser),
        averages=averages(config),
        arrays=("mask",) if config.diffusion.unmasked_weight < 1 else (),
    )


def averages(config: TrainConfig) -> dict[str, float | PowerAverage]:
    """Returns the moving averages of a stage: 'ema', and those of `optimizer.power_ema`."""
    power = map(PowerAverage, config.optimizer.power_widths)
    return {"ema": config.optimizer.ema_decay, **{average.name: average for average in power}}


class Draws(NamedTuple):
    """The random variables of the loss, for each sample."""

    x0: jax.Array  # [B, h, w, C] clean latents, multiplied by the scaling factor
    noise: jax.Array  # [B, h, w, C] standard normal
    timesteps: jax.Array  # [B] int32
    dropped: jax.Array  # [B] bool, whether the null condition replaces that of the sample
    perturbation: jax.Array | None = None  # [B, h, w, C] added to the noise in the network's input only


class Drawn(NamedTuple):
    """What the network and the loss of a batch need, beside the parameters."""

    draws: Draws
    conditions: Conditions
    route: TokenRoute | None = None
    weights: jax.Array | None = None  # [B, h, w] of the latent positions
    dropout: jax.Array | None = None  # [B] keys of the dropout of adapters


def draw_all(denoiser: Denoiser, params: NetworkParams, batch: Batch, keys: jax.Array) -> Drawn:
    """Samples all random variables of a training batch; `keys` [B] are those of the samples."""
    config = denoiser.config
    draws = perturb(config, nearest_noise(config, draw(config, batch, keys), keys), keys)
    return Drawn(
        draws,
        denoiser.drop_conditions(params, denoiser.conditions(batch), draws.dropped),
        token_route(config, batch, keys),
        position_weights(config, batch),
        dropout_keys(config, keys),
    )


def draw(config: TrainConfig, batch: Batch, keys: jax.Array) -> Draws:
    """Samples clean latents from the posterior of the VAE, noise, timesteps and condition dropout.

        x_0 = scale (mean + std eps)

    Args:
      config: config of the stage.
      batch: `latent_mean` and `latent_std`, [B, h, w, C], are used.
      keys: [B] one key per sample.
    """
    shape = batch["latent_mean"].shape[1:]
    probabilities = None if config.diffusion.timestep_density == "uniform" else _probabilities(config)

    def one(key):
        posterior, noise, timestep, dropout = jax.random.split(key, 4)
        return (
            jax.random.normal(posterior, shape),
            jax.random.normal(noise, shape),
            jax.random.randint(timestep, (), 0, config.diffusion.num_timesteps)
            if probabilities is None
            else draw_timestep(timestep, probabilities),
            jax.random.uniform(dropout) < config.diffusion.condition_dropout,
        )

    posterior, noise, timesteps, dropped = jax.vmap(one)(keys)
    mean, std = (batch[name].astype(jnp.float32) for name in ("latent_mean", "latent_std"))
    return Draws(config.features.latent_scale * (mean + std * posterior), noise, timesteps, dropped)


def _probabilities(config: TrainConfig) -> np.ndarray:
    """Returns the probability with which each timestep is drawn, [T] float64."""
    diffusion = config.diffusion
    return timestep_probabilities(
        diffusion.timestep_density,
        diffusion.num_timesteps,
        mean=diffusion.timestep_mean,
        std=diffusion.timestep_std,
        slope=diffusion.timestep_slope,
        boundary=convergence_boundary(Denoiser.of(config).schedule, diffusion.timestep_convergence),
        suppression=diffusion.timestep_suppression,
        uniform_share=UNIFORM_SHARE if diffusion.importance_weights else 0.0,
    )


def nearest_noise(config: TrainConfig, draws: Draws, keys: jax.Array) -> Draws:
    """Replaces the noise of each sample by the nearest of `diffusion.noise_candidates` noises.

        eps = argmin_i ||x_0 - eps_i||,   eps_i ~ N(0, I),   i = 0, …, k - 1

    Immiscible diffusion by noise selection (Li et al. 2025, arXiv 2505.18521): every image is mixed with
    noises from its own part of the noise space. eps_0 is the noise in `draws`. The candidates are drawn one
    after the other, so that memory does not grow with their number.

    Args:
      config: config of the stage.
      draws: as from `draw`.
      keys: [B] one key per sample, the same as for `draw`.
    """
    count = config.diffusion.noise_candidates
    if count == 1:
        return draws

    def one(key: jax.Array, x0: jax.Array, noise: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, _CANDIDATES_STREAM)

        def nearer(index, best):
            candidate = jax.random.normal(jax.random.fold_in(key, index), noise.shape)
            distance = jnp.sum(jnp.square(x0 - candidate))
            return jax.tree.map(
                lambda new, old: jnp.where(distance < best[1], new, old), (candidate, distance), best
            )

        return jax.lax.fori_loop(1, count, nearer, (noise, jnp.sum(jnp.square(x0 - noise))))[0]

    return draws._replace(noise=jax.vmap(one)(keys, draws.x0, draws.noise))


def perturb(config: TrainConfig, draws: Draws, keys: jax.Array) -> Draws:
    """Adds the noise offset and the input perturbation, which only training uses.

        eps  <- eps + noise_offset o_c,   o_c ~ N(0, 1) for each sample and channel
        input = sqrt(abar_t) x_0 + sqrt(1 - abar_t) (eps + input_perturbation xi),   xi ~ N(0, I)

    The target is eps, with its offset and without the perturbation. Noise offset: crosslabs.org, "Diffusion
    with offset noise", 2023, and the official LoRA script of PixArt. Input perturbation: Ning et al. 2023,
    arXiv 2301.11706.

    Args:
      config: config of the stage.
      draws: as from `draw`.
      keys: [B] one key per sample, the same as for `draw`.
    """

    def normal(stream: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)

    offset, perturbation = config.diffusion.noise_offset, config.diffusion.input_perturbation
    shape = draws.noise.shape[1:]
    if offset:
        draws = draws._replace(noise=draws.noise + offset * normal(_OFFSET_STREAM, (1, 1, shape[-1])))
    if perturbation:
        draws = draws._replace(perturbation=perturbation * normal(_PERTURBATION_STREAM, shape))
    return draws


def change_weighted(
    denoiser: Denoiser, terms: dict[str, jax.Array], timesteps: jax.Array
) -> dict[str, jax.Array]:
    """Multiplies the noise error, "mse" or "huber", by `change_weights`, with `diffusion.change_weighting`.

    The variational bound, which trains the variance, keeps its weight, as with min-SNR weighting.
    """
    ceiling = denoiser.config.diffusion.change_weighting
    if not ceiling:
        return terms
    (name,) = terms.keys() - {"loss", "vb"}
    error = lookup(change_weights(denoiser.schedule, ceiling), timesteps, 1) * terms[name]
    return {**terms, "loss": error + terms["vb"], name: error}


def importance_weighted(
    config: TrainConfig, terms: dict[str, jax.Array], timesteps: jax.Array
) -> dict[str, jax.Array]:
    """Divides the terms [B] by T p(t), with `diffusion.importance_weights`.

    Their expectation is then that of uniform timesteps, whatever the density p.
    """
    if not config.diffusion.importance_weights:
        return terms
    weights = lookup(1.0 / (config.diffusion.num_timesteps * _probabilities(config)), timesteps, 1)
    return {name: weights * value for name, value in terms.items()}


def token_route(config: TrainConfig, batch: Batch, keys: jax.Array) -> TokenRoute | None:
    """Samples the tokens of each sample that pass through all blocks; returns None without token routing."""
    routing, model = config.token_routing, config.model
    if not routing.rate:
        return None
    height, width = (side // model.patch_size for side in batch["latent_mean"].shape[1:3])
    tokens = height * width
    kept = routing.kept(tokens)

    def one(key):
        return jax.random.permutation(jax.random.fold_in(key, _ROUTING_STREAM), tokens)[:kept]

    return TokenRoute(jax.vmap(one)(keys), routing.first_blocks, model.depth - routing.last_blocks)


def dropout_keys(config: TrainConfig, keys: jax.Array) -> jax.Array | None:
    """Returns the keys of the dropout of adapters, [B]; None without dropout."""
    if not (config.adapter and config.adapter.dropout):
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, _DROPOUT_STREAM))(keys)


def position_weights(config: TrainConfig, batch: Batch) -> jax.Array | None:
    """Computes the weights of the latent positions in the loss; returns None if no masks are used.

        w = max(mask, unmasked_weight)

    With `diffusion.normalize_masks`, w is divided by its mean over the positions of the sample.

    Args:
      config: config of the stage.
      batch: `mask`, uint8 [B, h, w] with 255 for 1, is used.

    Returns:
      [B, h, w] float32.
    """
    least = config.diffusion.unmasked_weight
    if least == 1:
        return None
    weights = jnp.maximum(batch["mask"].astype(jnp.float32) / 255, least)
    if config.diffusion.normalize_masks:
        mean = weights.mean(axis=(1, 2), keepdims=True)
        weights /= jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)  # the weights of a black mask may all be 0
    return weights


def predict(denoiser: Denoiser, params: NetworkParams, drawn: Drawn, **options: Any) -> Any:
    """Runs the network on the noised latents, with further arguments of the network in `options`."""
    draws = drawn.draws
    noise = draws.noise if draws.perturbation is None else draws.noise + draws.perturbation
    noised = add_noise(denoiser.schedule, draws.x0, noise, draws.timesteps)
    with dropout(drawn.dropout):
        return denoiser(params, noised, draws.timesteps, drawn.conditions, route=drawn.route, **options)


def loss_terms(denoiser: Denoiser, drawn: Drawn, output: jax.Array) -> dict[str, jax.Array]:
    """Computes the diffusion loss and its terms for each sample; see `diffusion.objective.diffusion_loss`."""
    config, draws = denoiser.config, drawn.draws
    gamma = config.diffusion.min_snr_gamma
    return diffusion_loss(
        denoiser.schedule,
        output,
        draws.x0,
        draws.noise,
        draws.timesteps,
        weighting="min_snr" if gamma else "uniform",
        gamma=gamma,
        learned_variance=config.model.learn_sigma,
        weights=drawn.weights,
        huber_c=config.diffusion.huber_c if config.diffusion.loss == "huber" else None,
    )


def validation_timesteps(config: TrainConfig) -> np.ndarray:
    """Returns the middle timesteps of eight equal parts of all timesteps, [8] int32."""
    width = config.diffusion.num_timesteps // VALIDATION_PARTS
    return (np.arange(VALIDATION_PARTS) * width + width // 2).astype(np.int32)


def make_validation_step(denoiser: Denoiser) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Makes a function (params, batch) -> (sums of the loss [8], sums of the weights [8]).

    Record i is evaluated at the timestep of part i mod 8, with noise that depends only on i, and without
    condition dropout. `batch['weight']`, [B], is 0 for padding rows. Masks weight the latent positions as in
    training. The function returns sums, one for each part of the timesteps, so that the results of several
    batches can be added.
    """
    timesteps = jnp.asarray(validation_timesteps(denoiser.config))

    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        # A fixed seed instead of the run's, so that validation losses of different runs are comparable.
        keys = sample_keys(stream_key(0, Stream.VALIDATION), batch["index"])
        part = (batch["index"] % VALIDATION_PARTS).astype(jnp.int32)
        draws = draw(denoiser.config, batch, keys)._replace(timesteps=timesteps[part])
        drawn = Drawn(draws, denoiser.conditions(batch), weights=position_weights(denoiser.config, batch))
        terms = loss_terms(denoiser, drawn, predict(denoiser, params[NETWORK], drawn))
        member = jax.nn.one_hot(part, VALIDATION_PARTS) * batch["weight"].astype(jnp.float32)[:, None]
        return terms["loss"] @ member, member.sum(axis=0)

    return step
