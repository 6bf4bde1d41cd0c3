"""Classifier-free guidance as a function from a conditional model to a guided one.

Shapes: B batch, H W latent height and width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError


def guide(
    model_fn: Callable[[jax.Array, jax.Array, Any], jax.Array],
    conditional: Any,
    unconditional: Any = None,
    scale: float | jax.Array = 4.5,
    *,
    guided_channels: int | None = None,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """eps = eps_uncond + scale (eps_cond - eps_uncond) (Ho & Salimans 2022, arXiv 2207.12598, equation 6).

    The two predictions come from one call on a doubled batch, unconditional half first. A variance half of
    the output is never extrapolated: it stays the conditional one.

    Args:
        model_fn: `(x [B, H, W, C], t [B], condition) -> [B, H, W, C or 2C]`, noise first.
        conditional: pytree of arrays with leading axis B.
        unconditional: pytree of the same structure, leading axis B, or 1 to be used for every image. Not
            needed at scale 1.
        scale: guidance scale. The number 1 is the conditional prediction, computed without the unconditional
            half; a scalar array, which may be traced, always computes both.
        guided_channels: how many leading latent channels are guided; the rest stay conditional. None guides
            all, as diffusers and PixArt-alpha's DPM-Solver and SA-Solver do; 3 is what its IDDPM does.
        interval: (low, high) timesteps; guidance acts where low <= t <= high (Kynkaanniemi et al. 2024,
            arXiv 2404.07724). A step with no image inside it runs the conditional half alone.
        rescale: in [0, 1], how far the standard deviation of each image's guided noise is brought back to
            that of the conditional one (Lin et al. 2023, arXiv 2305.08891, section 3.4).

    Returns:
        `(x [B, H, W, C], t [B]) -> [B, H, W, C or 2C]` float32.

    Raises:
        UserError: no unconditional input at a scale other than 1, inputs that do not pair up, an empty
            interval, a rescale outside [0, 1] or fewer than 1 guided channel.
    """
    if interval is not None and not interval[0] <= interval[1]:
        raise UserError(f"guidance interval {interval} is empty: give (low, high) with low <= high.")
    if not 0.0 <= rescale <= 1.0:
        raise UserError(f"guidance rescale {rescale} is outside [0, 1].")
    if guided_channels is not None and guided_channels < 1:
        raise UserError(f"guided_channels {guided_channels} guides nothing: use scale 1, or None for all.")

    def conditional_only(x, t):
        return model_fn(x, t, conditional).astype(jnp.float32)

    if isinstance(scale, (int, float)) and scale == 1:
        return conditional_only
    # Joined here rather than per call, so that a sampling loop does not copy the text features at every step.
    pair = _join(unconditional, conditional)

    def guided(x, t):
        channels = x.shape[-1]
        output = model_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), pair).astype(jnp.float32)
        unconditional_output, conditional_output = jnp.split(output, 2)
        u, c = unconditional_output[..., :channels], conditional_output[..., :channels]
        per_image = (-1,) + (1,) * (x.ndim - 1)
        weight = scale
        if interval is not None:
            inside = (interval[0] <= t) & (t <= interval[1])
            weight = jnp.where(inside, scale, 1.0).reshape(per_image)
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
    """The pytree of both, unconditional first, along axis 0."""
    if unconditional is None:
        raise UserError("guidance at a scale other than 1 needs an unconditional input.")
    structures = jax.tree.structure(unconditional), jax.tree.structure(conditional)
    if structures[0] != structures[1]:
        raise UserError(
            f"the unconditional input is {structures[0]} but the conditional one {structures[1]}: "
            f"give both the same fields."
        )

    def join(u, c):
        if u.shape[1:] != c.shape[1:] or u.shape[0] not in (1, c.shape[0]):
            raise UserError(
                f"an unconditional input of shape {u.shape} does not fit the conditional {c.shape}: "
                f"only axis 0 may differ, and then must be 1."
            )
        return jnp.concatenate([jnp.broadcast_to(u, c.shape), c])

    return jax.tree.map(join, unconditional, conditional)
