"""One optimizer update, and one validation pass, as pure functions.

Every random draw of a sample is a function of (seed, index), index being its position in the shuffled
sequence of samples: never of the device, the process, the row or the micro-batch it lands in.

Batch, global: latent_mean, latent_std [B, h, w, C]; text [B, S, T], text_mask [B, S], image_size [B, 2],
aspect_ratio [B, 1] (PixArt); label [B] (DiT); index [B] uint32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx

from pixart_jax.config import GuidanceConfig, RoutingConfig, TrainConfig
from pixart_jax.diffusion.objective import diffusion_loss
from pixart_jax.diffusion.schedule import NoiseSchedule, add_noise, linear_schedule
from pixart_jax.errors import UserError
from pixart_jax.models.blocks import TokenRoute
from pixart_jax.models.pixart import NULL_TEXT, PixArtConfig
from pixart_jax.training.divergence import refuse
from pixart_jax.training.optimizers import update_ema
from pixart_jax.training.state import TrainState, split_frozen

Batch = dict[str, jax.Array]

# Timesteps of the validation loss: the middles of eight equal parts of 0..999 (as MLPerf's FLUX protocol).
VALIDATION_PARTS = 8
# Keeps the draws of validation apart from those of training.
_VALIDATION_STREAM = 0x76616C
# Keeps the choice of tokens apart from the other draws of a sample.
_ROUTING_STREAM = 0x726F75


def make_schedule(config: TrainConfig) -> NoiseSchedule:
    diffusion = config.diffusion
    return linear_schedule(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end)


def null_mask(guidance: GuidanceConfig, mask: jax.Array) -> jax.Array:
    """The mask under which the null caption stands in for captions with `mask` [B, S].

    'caption': the caption's mask, as the official code trains and samples. 'own': the null caption's; T5
    makes a single token of "", and a null token has its whole length.
    """
    if guidance.null_mask == "caption":
        return mask
    length = 1 if guidance.null_text == "t5_empty" else mask.shape[1]
    return jnp.broadcast_to(jnp.arange(mask.shape[1]) < length, mask.shape)


def condition_arguments(
    config: TrainConfig, params: dict[str, Any], batch: Batch, dropped: jax.Array
) -> tuple[jax.Array, ...]:
    """What the model takes besides latents and timesteps, with the null condition where `dropped` [B]."""
    model = config.model
    if not isinstance(model, PixArtConfig):
        return (jnp.where(dropped, model.num_classes, batch["label"]),)
    text, mask = batch["text"], batch["text_mask"].astype(bool)
    null = params[NULL_TEXT][: text.shape[1]].astype(text.dtype)
    text = jnp.where(dropped[:, None, None], null, text)
    mask = jnp.where(dropped[:, None], null_mask(config.guidance, mask), mask)
    sizes = (batch["image_size"], batch["aspect_ratio"]) if model.size_conditions else ()
    return (text, mask, *sizes)


def check_trainable(config: TrainConfig) -> None:
    """Raises a `UserError` for a compute dtype that this trainer does not train in."""
    if config.model.dtype == "float16":
        raise UserError(
            "model.dtype 'float16' is for sampling: small gradients become zero in it, and this trainer does "
            "not scale the loss. Train in 'bfloat16', or in 'float32' on GPUs older than Ampere."
        )


def _draws(config: TrainConfig, stream: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """Posterior noise, diffusion noise [B, h, w, C], timestep [B] and dropout [B] of each sample."""
    shape = batch["latent_mean"].shape[1:]

    def one(index):
        posterior, noise, timestep, dropout = jax.random.split(jax.random.fold_in(stream, index), 4)
        return (
            jax.random.normal(posterior, shape),
            jax.random.normal(noise, shape),
            jax.random.randint(timestep, (), 0, config.diffusion.num_timesteps),
            jax.random.uniform(dropout) < config.diffusion.condition_dropout,
        )

    return jax.vmap(one)(batch["index"])


def kept_tokens(tokens: int, routing: RoutingConfig) -> int:
    """Of so many tokens, those that pass through all blocks."""
    return max(1, round(tokens * (1 - routing.rate)))


def _route(config: TrainConfig, stream: jax.Array, batch: Batch) -> TokenRoute | None:
    """The tokens of each sample that pass through all blocks; None when none jumps."""
    routing, model = config.routing, config.model
    if not routing.rate:
        return None
    height, width = (side // model.patch_size for side in batch["latent_mean"].shape[1:3])
    tokens = height * width
    kept = kept_tokens(tokens, routing)

    def one(index):
        key = jax.random.fold_in(jax.random.fold_in(stream, index), _ROUTING_STREAM)
        return jax.random.permutation(key, tokens)[:kept]

    stop = model.depth - routing.last_blocks
    return TokenRoute(jax.vmap(one)(batch["index"]), routing.first_blocks, stop)


def without_routing(config: TrainConfig) -> TrainConfig:
    """The stage as its last `routing.finish` steps train it."""
    return dataclasses.replace(config, routing=dataclasses.replace(config.routing, rate=0.0))


def _clean_latents(config: TrainConfig, batch: Batch, noise: jax.Array) -> jax.Array:
    """x_0 = scale (mean + std eps): a draw from the VAE's posterior."""
    mean = batch["latent_mean"].astype(jnp.float32)
    return config.features.latent_scale * (mean + batch["latent_std"].astype(jnp.float32) * noise)


def _loss_terms(
    config, schedule, apply, params, batch, noise, x0, t, dropped, route=None
) -> dict[str, jax.Array]:
    conditions = condition_arguments(config, params, batch, dropped)
    output = apply(params, add_noise(schedule, x0, noise, t), t, *conditions, route=route)
    gamma = config.diffusion.min_snr_gamma
    return diffusion_loss(
        schedule,
        output,
        x0,
        noise,
        t,
        weighting="min_snr" if gamma else "uniform",
        gamma=gamma,
        learned_variance=config.model.learn_sigma,
    )


def model_function(graph: nnx.GraphDef) -> Callable[..., jax.Array]:
    """(params, *model arguments) -> model output."""
    return lambda params, *arguments, **options: nnx.merge(graph, params)(*arguments, **options)


def make_gradient(
    config: TrainConfig, graph: nnx.GraphDef, shardings: TrainState | None = None
) -> Callable[[dict[str, Any], dict[str, Any], Batch], tuple[dict[str, Any], dict[str, jax.Array]]]:
    """(trained, frozen, global batch) -> (gradient of the mean loss over the whole batch, loss terms).

    The gradient is the same when it is computed in `optimizer.accumulation` parts.

    Args:
      config: the stage.
      graph: structure of the model.
      shardings: of the state. The gradient is then laid out as the optimizer's moments are, also where the
        parameters are whole (ZeRO-1), so that each device sums and updates its share alone.

    Raises:
      UserError: see `check_trainable`.
    """
    check_trainable(config)
    schedule = make_schedule(config)
    apply = model_function(graph)
    parts = config.optimizer.accumulation

    def loss(trained, frozen, batch):
        stream = jax.random.key(config.seed)
        posterior, noise, t, dropped = _draws(config, stream, batch)
        x0 = _clean_latents(config, batch, posterior)
        route = _route(config, stream, batch)
        params = {**trained, **frozen}
        terms = _loss_terms(config, schedule, apply, params, batch, noise, x0, t, dropped, route)
        means = {name: jnp.mean(value) for name, value in terms.items()}
        return means["loss"], means

    def gradient(trained, frozen, batch):
        gradients, metrics = jax.grad(loss, has_aux=True)(trained, frozen, batch)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, split_frozen(shardings.ema)[0])
        return gradients, metrics

    def accumulated(trained, frozen, batch):
        if parts == 1:
            return gradient(trained, frozen, batch)
        # Every device keeps its own rows: part k takes each device's k-th share.
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
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, global batch) -> (state after one update, metrics as float32 scalars).

    `shardings` as `make_gradient`; without them the compiler lays out the gradient.
    """
    gradient = make_gradient(config, graph, shardings)

    def step(state: TrainState, batch: Batch):
        trained, frozen = split_frozen(state.params)
        gradients, metrics = gradient(trained, frozen, batch)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
            params = {**optax.apply_updates(trained, updates), **frozen}
            ema = update_ema(state.ema, params, config.optimizer.ema_decay, state.step)
            norm = optax.tree.norm(gradients)
            refused, average = refuse(
                config.divergence, state.step, metrics["loss"], norm, state.loss_average
            )
            # A refused update leaves everything as it was; the step counts, for its batch is used up.
            params, ema, opt_state = jax.tree.map(
                lambda old, new: jnp.where(refused, old, new),
                (state.params, state.ema, state.opt_state),
                (params, ema, opt_state),
            )
        metrics |= {"gradient_norm": norm, "refused": refused, "loss_average": average}
        return TrainState(state.step + 1, params, ema, opt_state, average), metrics

    return step


def validation_timesteps(config: TrainConfig) -> np.ndarray:
    """[8] int32: the middles of eight equal parts of the timesteps."""
    width = config.diffusion.num_timesteps // VALIDATION_PARTS
    return (np.arange(VALIDATION_PARTS) * width + width // 2).astype(np.int32)


def make_validation_step(
    config: TrainConfig, graph: nnx.GraphDef
) -> Callable[[dict[str, Any], Batch], tuple[jax.Array, jax.Array]]:
    """(params, batch) -> per-timestep sums: fixed noise and a fixed grid of timesteps, no dropout.

    Record i is scored at part i mod 8 of the timesteps, with noise that is a function of i alone.
    `batch['weight']` [B] is 0 on padding rows.

    Returns:
      sums of the loss [8] and of the weights [8], so that batches add up.
    """
    schedule = make_schedule(config)
    apply = model_function(graph)
    timesteps = jnp.asarray(validation_timesteps(config))

    def step(params, batch):
        stream = jax.random.fold_in(jax.random.key(0), _VALIDATION_STREAM)
        posterior, noise, _, _ = _draws(config, stream, batch)
        part = (batch["index"] % VALIDATION_PARTS).astype(jnp.int32)
        t = timesteps[part]
        x0 = _clean_latents(config, batch, posterior)
        dropped = jnp.zeros(part.shape, bool)
        terms = _loss_terms(config, schedule, apply, params, batch, noise, x0, t, dropped)
        weight = batch["weight"].astype(jnp.float32)
        member = jax.nn.one_hot(part, VALIDATION_PARTS) * weight[:, None]
        return terms["loss"] @ member, member.sum(axis=0)

    return step
