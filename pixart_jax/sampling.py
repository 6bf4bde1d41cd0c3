"""Generates latents from conditions, with a network, guidance and a sampler.

All images are generated with `guided_noise` and `run_sampler`, by text-conditional and class-conditional
networks. `make_sampler` compiles them for one device; training, evaluation and benchmarks use it.
`pipeline/generation.py` compiles them for all devices, with all options of the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import TrainConfig
from pixart_jax.denoiser import Denoiser
from pixart_jax.diffusion.guidance import guide, uses_guidance
from pixart_jax.diffusion.multistep import Inpaint, initial_noise
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.diffusion.schedule import NoiseSchedule
from pixart_jax.errors import one_of
from pixart_jax.models.blocks import TokenRoute

Arrays = dict[str, Any]

# Folded into the key of an image, so that guidance does not change its other random numbers.
_ROUTING_STREAM = 0x726F75


def image_keys(seeds: np.ndarray) -> jax.Array:
    """Returns one PRNG key per image, so that an image depends on its own seed and not on the batch.

    Args:
      seeds: non-negative integers below 2^32, [B].

    Returns:
      keys, [B].
    """
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def guided_noise(
    denoiser: Denoiser,
    params: Arrays,
    conditions: Arrays,
    null_conditions: Arrays | None,
    scale: float | jax.Array,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    routed: jax.Array | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function (x [B, h, w, C], t [B]) -> predicted noise [B, h, w, C] with guidance; see `guide`.

    Args:
      denoiser: the network, with the conventions of its weights.
      params: parameters of the network.
      conditions: conditions of each sample, from `Denoiser.conditions`.
      null_conditions: conditions that guidance moves away from, with the same shapes; None for no guidance.
      scale: guidance scale.
      interval, rescale: as in `guide`.
      routed: PRNG keys of the images, [B], for guidance by routing (`route_tokens`), without null conditions;
        None for classifier-free guidance.
    """
    channels = denoiser.config.guidance.channels

    def weak(x: jax.Array, t: jax.Array, given: Arrays) -> jax.Array:
        return denoiser(params, x, t, given, route=route_tokens(denoiser.config, routed, t, x.shape[1:3]))

    return guide(
        lambda x, t, given: denoiser(params, x, t, given),
        conditions,
        null_conditions,
        1 if null_conditions is None and routed is None else scale,
        # `guidance.channels` 4 means all channels, also for codecs that do not have 4.
        guided_channels=None if channels == 4 else channels,
        interval=interval,
        rescale=rescale,
        weak_fn=None if routed is None else weak,
    )


def route_tokens(
    config: TrainConfig, keys: jax.Array, timesteps: jax.Array, latent: tuple[int, int]
) -> TokenRoute:
    """Draws the tokens that pass through all blocks in the weak prediction of guidance by routing.

        noise = routed + scale (dense - routed)

    This is Sparse Guidance (Krause et al. 2026, arXiv 2601.01608; the self-guidance of PRX): both predictions
    are conditional, and the weak one lets a share of the tokens skip the blocks in the middle, as in training
    with token routing (`TrainConfig.guidance_routing`). It replaces classifier-free guidance. As in the
    authors' code the tokens are drawn anew in every step, so that no part of an image is always the weak one.

    Args:
      config: config of the run that trained the weights.
      keys: PRNG keys of the images, [B]; the tokens depend on them and on the timestep only.
      timesteps: [B] on the 0..999 scale.
      latent: height and width of the latents.
    """
    routing, model = config.guidance_routing, config.model
    tokens = math.prod(model.grid(*latent))
    kept = routing.kept(tokens)

    def one(key: jax.Array, timestep: jax.Array) -> jax.Array:
        # Samplers also evaluate the network between two timesteps.
        number = jnp.round(256 * timestep).astype(jnp.uint32)
        key = jax.random.fold_in(jax.random.fold_in(key, _ROUTING_STREAM), number)
        return jax.random.permutation(key, tokens)[:kept]

    return TokenRoute(jax.vmap(one)(keys, timesteps), routing.first_blocks, model.depth - routing.last_blocks)


def run_sampler(
    noise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: NoiseSchedule,
    noise: jax.Array,
    keys: jax.Array,
    *,
    sampler: str = "dpm_solver",
    steps: int = 20,
    options: Mapping[str, Any] | None = None,
    strength: float = 1.0,
    init: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Runs a sampler from noise to latents. Latents are scaled as the network expects them.

    Args:
      noise_fn: predicts the noise, as from `guided_noise`.
      schedule: the noise schedule.
      noise: standard normal noise, [B, h, w, C].
      keys: PRNG keys of the images, [B], for samplers that add noise.
      sampler: a name in `SAMPLERS`.
      steps: number of model evaluations.
      options: further arguments of the sampler.
      strength: share of the steps that is run if sampling starts from `init`, with noise added to it.
      init: clean latents [B, h, w, C] to start from (image to image) or to be inpainted; None for neither.
      mask: 1 where the image is regenerated and 0 where `init` is kept, [B, h, w, 1]; None for no inpainting.

    Returns:
      latents, [B, h, w, C].
    """
    inpaint = None if mask is None else Inpaint(mask, init, noise)
    if mask is not None and strength == 1:
        # At full strength, sampling starts from pure noise, so that the regenerated part does not depend on
        # the original.
        init = None
    return SAMPLERS[sampler](
        noise_fn,
        noise,
        schedule,
        steps=steps,
        keys=keys,
        init=init,
        strength=strength,
        inpaint=inpaint,
        **(options or {}),
    )


def make_sampler(
    denoiser: Denoiser,
    *,
    height: int,
    width: int,
    sampler: str = "dpm_solver",
    steps: int = 20,
    scale: float | None = None,
) -> Callable[[Arrays, jax.Array, Arrays], jax.Array]:
    """Returns a compiled function (params, keys [B], conditions) -> unscaled latents [B, height, width, C].

    The conditions are those of a training batch: text and text_mask (and image_size and aspect_ratio), or
    label. The null conditions are computed from the parameters.

    Args:
      denoiser: the network, with the conventions of its weights.
      height, width: size of the latents.
      sampler: a name in `diffusion.samplers.SAMPLERS`.
      steps: number of model evaluations.
      scale: guidance scale; 1 or less for no guidance, None for the scale stored with the weights.

    Raises:
      UserError: the sampler is unknown, or the scale is negative or not finite.
    """
    one_of("sampler", sampler, SAMPLERS)
    config = denoiser.config
    scale = config.guidance.scale if scale is None else scale
    guided = uses_guidance(scale)
    shape = (height, width, config.model.in_channels)

    @jax.jit
    def sample(params: Arrays, keys: jax.Array, conditions: Arrays) -> jax.Array:
        conditions = denoiser.conditions(conditions)
        null = denoiser.null_conditions(params, conditions) if guided else None
        noise_fn = guided_noise(denoiser, params, conditions, null, scale)
        noise = initial_noise(keys, shape)
        latents = run_sampler(noise_fn, denoiser.schedule, noise, keys, sampler=sampler, steps=steps)
        return latents / config.features.latent_scale

    return sample


def sample_in_batches(
    sample: Callable[[Arrays, jax.Array, Arrays], jax.Array],
    params: Arrays,
    keys: jax.Array,
    conditions: Arrays,
    batch_size: int,
) -> np.ndarray:
    """Runs `sample` for any number of images, in batches of equal size. The last batch is padded.

    All batches have the same size because then a single compiled program generates all images. An image thus
    does not depend on how many others are generated.

    Args:
      sample: a function of `make_sampler`.
      params: parameters of the network.
      keys: PRNG keys of the images, [n].
      conditions: conditions of the images, arrays [n, ...].
      batch_size: number of images per call.

    Returns:
      latents, float32 [n, height, width, C].
    """
    count = keys.shape[0]
    out = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        part = sample(params, keys[rows], {name: value[rows] for name, value in conditions.items()})
        out.append(np.asarray(part)[: count - start])
    return np.concatenate(out)


def picture_grid(images: np.ndarray, columns: int, *, magnify: int = 1, gap: int = 2) -> np.ndarray:
    """Arranges images in a grid on a white background, row by row.

    Args:
      images: uint8 [n, H, W, C], with C 1 or 3.
      columns: number of columns.
      magnify: factor by which each image is enlarged, without interpolation.
      gap: distance between images in pixels.

    Returns:
      the grid as an RGB image, uint8 [height, width, 3].
    """
    count, height, width, channels = images.shape
    images = images.repeat(magnify, axis=1).repeat(magnify, axis=2)
    if channels == 1:
        images = images.repeat(3, axis=3)
    height, width = height * magnify + gap, width * magnify + gap
    rows = -(-count // columns)
    grid = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * height, gap + index % columns * width
        grid[top : top + height - gap, left : left + width - gap] = image
    return grid
