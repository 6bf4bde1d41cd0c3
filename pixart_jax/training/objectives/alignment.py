"""Representation alignment (REPA, arXiv 2410.06940): a second loss, on the tokens inside the network.

    loss   = L_diffusion + weight L_proj
    L_proj = - mean over tokens of cos(z, h(x))

z are the features that a frozen image encoder, such as DINOv2, computes from the clean image. `precompute`
stores them with each record, one vector per token. x are the tokens after block `alignment.block` and h is a
projector (`models/projector.py`). Gradients of L_proj therefore reach the blocks up to that one, the
embeddings and the projector. The projector is trained, averaged and saved like the network, but only the
network is sampled and exported.

Alignment helps most early in training. From step `alignment.stop_step` on, the objective of the run is
`diffusion` (HASTE, arXiv 2505.16792, also stops it; here at a fixed step).

Axes: B batch, N image tokens, K tokens that routing keeps, D width, E width of the image encoder.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.config import TrainConfig
from pixart_jax.constants import IMAGE_FEATURES
from pixart_jax.denoiser import NETWORK, Denoiser
from pixart_jax.models.blocks import TokenRoute
from pixart_jax.models.layers import constrain
from pixart_jax.models.projector import Projector
from pixart_jax.training.objectives import Batch, Objective, Params, diffusion

# Key of the projector among the networks of a run.
PROJECTOR = "projector"


def make_objective(config: TrainConfig) -> Objective:
    """Trains the network of `config.model` with both losses, and the projector beside it."""
    base = diffusion.make_objective(config)
    denoiser, alignment = Denoiser.of(config), config.alignment
    graph = nnx.graphdef(nnx.eval_shape(lambda: _make_projector(config, nnx.Rngs(0))))

    def loss(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        drawn = diffusion.draw_all(denoiser, params[NETWORK], batch, keys)
        output, tokens = diffusion.predict(denoiser, params[NETWORK], drawn, tap=alignment.block)
        timesteps = drawn.draws.timesteps
        terms = diffusion.loss_terms(denoiser, drawn, output)
        terms = diffusion.change_weighted(denoiser, terms, timesteps)
        target = targets(batch[IMAGE_FEATURES], drawn.route, alignment.block)
        term = projection_loss(nnx.merge(graph, params[PROJECTOR])(tokens), target)
        terms |= {
            diffusion.DIFFUSION_LOSS: terms["loss"],
            "alignment": term,
            "loss": terms["loss"] + alignment.weight * term,
        }
        return diffusion.importance_weighted(config, terms, timesteps)

    return base._replace(
        networks={**base.networks, PROJECTOR: lambda rngs: _make_projector(config, rngs)},
        loss=loss,
        training_arrays=(IMAGE_FEATURES,),
        # The sum may be negative, and changes when the alignment stops.
        watched=diffusion.DIFFUSION_LOSS,
    )


def _make_projector(config: TrainConfig, rngs: nnx.Rngs) -> Projector:
    model, alignment = config.model, config.alignment
    return Projector(
        model.hidden_size, alignment.width, alignment.target_width, dtype=model.compute_dtype, rngs=rngs
    )


def targets(features: jax.Array, route: TokenRoute | None, block: int) -> jax.Array:
    """Selects the features [B, N, E] of the tokens that block `block`, counted from 1, has processed.

    Within the blocks that token routing skips, these are the kept tokens: [B, K, E].
    """
    if route is not None and route.start < block <= route.stop:
        features = jnp.take_along_axis(features, route.kept[:, :, None], axis=1)
    return constrain(features, "batch", "tokens", None)


def projection_loss(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Computes L_proj of each sample, [B] float32, from two arrays [B, N, E]; see the top of this file."""
    return -jnp.mean(jnp.sum(_normalized(predicted) * _normalized(target), axis=-1), axis=-1)


def _normalized(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) in float32, as in PyTorch, with a finite gradient at 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
