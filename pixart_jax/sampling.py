"""From conditions to latents with the weights and conventions of one run.

The sampler, the guidance and the model meet here; `sample`, `train` (its grids) and the evaluation all draw
their pictures through `make_sampler`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.denoiser import Denoiser
from pixart_jax.diffusion.guidance import guide
from pixart_jax.diffusion.multistep import initial_noise
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.errors import one_of

Arrays = dict[str, Any]


def image_keys(seeds: np.ndarray) -> jax.Array:
    """One PRNG key per image, of the image's own seed alone.

    Args:
      seeds: [B] non-negative integers below 2^32.

    Returns:
      [B] keys.
    """
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def make_sampler(
    denoiser: Denoiser,
    *,
    height: int,
    width: int,
    sampler: str = "dpm_solver",
    steps: int = 20,
    scale: float | None = None,
) -> Callable[[Arrays, jax.Array, Arrays], jax.Array]:
    """Compiles (params, keys [B], conditions) -> unscaled latents [B, height, width, C].

    Args:
      denoiser: the network, with the conventions of its weights.
      height, width: of the latent.
      sampler: a name in `diffusion.samplers.SAMPLERS`.
      steps: model evaluations.
      scale: guidance scale; None for the one stored with the weights, 1 for none.

    The conditions are those of a training batch: text and text_mask (and image_size, aspect_ratio), or label.
    """
    one_of("sampler", sampler, SAMPLERS)
    config = denoiser.config
    scale = config.guidance.scale if scale is None else scale
    channels = config.model.in_channels
    # 4 means all, whatever the codec's number of channels.
    guided = None if config.guidance.channels == 4 else config.guidance.channels

    @jax.jit
    def sample(params: Arrays, keys: jax.Array, conditions: Arrays) -> jax.Array:
        conditional = denoiser.conditions(conditions)
        guided_noise = guide(
            lambda x, t, condition: denoiser(params, x, t, condition),
            conditional,
            denoiser.null_conditions(params, conditional),
            scale,
            guided_channels=guided,
        )
        noise = initial_noise(keys, (height, width, channels))
        latents = SAMPLERS[sampler](guided_noise, noise, denoiser.schedule, steps=steps, keys=keys)
        return latents / config.features.latent_scale

    return sample


def sample_in_batches(
    sample: Callable[[Arrays, jax.Array, Arrays], jax.Array],
    params: Arrays,
    keys: jax.Array,
    conditions: Arrays,
    batch_size: int,
) -> np.ndarray:
    """Runs `sample` on any number of images in batches of one size, the last one filled up.

    One size means one compiled program, so that an image does not depend on how many others were asked for.

    Args:
      keys: [n]; conditions: arrays [n, ...]; batch_size: images per call.

    Returns:
      [n, height, width, C] float32.
    """
    count = keys.shape[0]
    out = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        part = sample(params, keys[rows], {name: value[rows] for name, value in conditions.items()})
        out.append(np.asarray(part)[: count - start])
    return np.concatenate(out)


def picture_grid(images: np.ndarray, columns: int, *, magnify: int = 1, gap: int = 2) -> np.ndarray:
    """Tiles uint8 images [n, H, W, C] into one RGB picture, row by row, on white."""
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
