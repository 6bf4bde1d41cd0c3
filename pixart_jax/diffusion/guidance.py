"""Classifier-free guidance as a transformation of a conditional model into a guided one.

Shapes: B batch, H W latent height and width, C latent channels.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError


def uses_guidance(scale: float) -> bool:
    """Whether a guidance scale has an effect: above 1. As in diffusers, 1 and less mean no guidance.

    Raises:
        UserError: if the scale is negative, NaN or infinite.
    """
    if not (isinstance(scale, numbers.Real) and 0 <= scale < math.inf):
        raise UserError(
            f"guidance_scale is {scale!s:.200}: it must be a finite number of at least 0 (up to 1: none)."
        )
    return scale > 1


def guide(
    model_fn: Callable[[jax.Array, jax.Array, Any], jax.Array],
    conditional: Any,
    unconditional: Any = None,
    scale: float | jax.Array = 4.5,
    *,
    guided_channels: int | None = None,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    weak_fn: Callable[[jax.Array, jax.Array, Any], jax.Array] | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """eps = eps_uncond + scale (eps_cond - eps_uncond) (Ho & Salimans 2022, arXiv 2207.12598, equation 6).

    Both predictions come from a single call on a doubled batch, unconditional samples first. Guidance applies
    to the noise only: if the model predicts a variance, that of the conditional prediction is returned.

    With `weak_fn`, a worse prediction for the same condition takes the place of the unconditional one, from a
    call of its own: eps = eps_weak + scale (eps_cond - eps_weak).

    Args:
        model_fn: `(x [B, H, W, C], t [B], condition) -> [B, H, W, C or 2C]`, noise first.
        conditional: pytree of arrays with leading axis B.
        unconditional: pytree of the same structure with leading axis B, or 1 to use it for every image. Not
            needed if `scale` is a number that is at most 1.
        scale: guidance scale; 1 or less means no guidance, as in diffusers. With a number, only the
            conditional prediction is then computed. With an array [] or [B], which may be traced, both
            predictions are always computed.
        guided_channels: number of leading latent channels that guidance applies to; the others keep the
            conditional prediction. None means all, as in diffusers and in PixArt-alpha's DPM-Solver and
            SA-Solver; PixArt-alpha's IDDPM uses 3.
        interval: (low, high) timesteps; guidance is applied where low <= t <= high (Kynkaanniemi et al.
            2024, arXiv 2404.07724). If no image of the batch is in the interval, only the conditional
            prediction is computed.
        rescale: in [0, 1]; 1 scales the guided noise of each image to the standard deviation of the
            conditional noise, 0 leaves it as is (Lin et al. 2023, arXiv 2305.08891, section 3.4).
        weak_fn: takes and returns what `model_fn` does; the unconditional input is then not used.

    Returns:
        The guided model, `(x [B, H, W, C], t [B]) -> [B, H, W, C or 2C]` float32.

    Raises:
        UserError: if the scale is a number that is negative or not finite, if the unconditional input is
            missing at a scale above 1 or does not match the conditional one, if the interval is empty, if
            rescale is outside [0, 1], or if fewer than 1 channel is guided.
    """
    if interval is not None and not interval[0] <= interval[1]:
        raise UserError(f"guidance interval {interval} is empty: give (low, high) with low <= high.")
    if not 0.0 <= rescale <= 1.0:
        raise UserError(f"guidance rescale {rescale} is outside [0, 1].")
    if guided_channels is not None and guided_channels < 1:
        raise UserError(f"guided_channels is {guided_channels}: it must be at least 1, or None for all.")

    def conditional_only(x, t):
        return model_fn(x, t, conditional).astype(jnp.float32)

    if isinstance(scale, (int, float, np.number)):
        if not uses_guidance(scale):
            return conditional_only
    else:
        # NaN stays NaN.
        scale = jnp.where(jnp.asarray(scale) <= 1, 1.0, scale)
    # Concatenate here and not in `guided`, so that a sampling loop does not copy the text features in every
    # step.
    pair = _join(unconditional, conditional) if weak_fn is None else None

    def guided(x, t):
        channels = x.shape[-1]
        if weak_fn is None:
            output = model_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), pair).astype(jnp.float32)
            unconditional_output, conditional_output = jnp.split(output, 2)
        else:
            unconditional_output = weak_fn(x, t, conditional).astype(jnp.float32)
            conditional_output = conditional_only(x, t)
        u, c = unconditional_output[..., :channels], conditional_output[..., :channels]
        per_image = (-1,) + (1,) * (x.ndim - 1)
        weight = scale
        if interval is not None:
            inside = (interval[0] <= t) & (t <= interval[1])
            weight = jnp.where(inside, scale, 1.0)
        if jnp.ndim(weight):
            weight = weight.reshape(per_image)
        noise = u + weight * (c - u)
        if guided_channels is not None:
            noise = jnp.where(jnp.arange(channels) < guided_channels, noise, c)
        if rescale:
            axes = tuple(range(1, x.ndim))
            ratio = jnp.std(c, axis=axes) / jnp.std(noise, axis=axes)
            noise = noise * (rescale * ratio + (1.0 - rescale)).reshape(per_image)
        return jnp.concatenate([noise, conditional_output[..., channels:]], axis=-1)

    if interval is None:
        return guided

    def guided_inside(x, t):
        inside = (interval[0] <= t) & (t <= interval[1])
        return jax.lax.cond(jnp.any(inside), guided, conditional_only, x, t)

    return guided_inside


def _join(unconditional, conditional):
    """Concatenates the leaves of both pytrees along axis 0, unconditional first."""
    if unconditional is None:
        raise UserError("guidance at a scale above 1 needs an unconditional input.")
    structures = jax.tree.structure(unconditional), jax.tree.structure(conditional)
    if structures[0] != structures[1]:
        raise UserError(
            f"the unconditional input has the structure {structures[0]}, the conditional one "
            f"{structures[1]}: both must have the same fields."
        )

    def join(u, c):
        if u.shape[1:] != c.shape[1:] or u.shape[0] not in (1, c.shape[0]):
            raise UserError(
                f"an unconditional input has the shape {u.shape}, the conditional one {c.shape}: "
                f"only axis 0 may differ, and it must then be 1."
            )
        return jnp.concatenate([jnp.broadcast_to(u, c.shape), c])

    return jax.tree.map(join, unconditional, conditional)
