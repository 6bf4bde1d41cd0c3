"""From conditions to latents: where network, guidance and sampler meet.

All images are sampled by `guided_noise` and `run_sampler`, with networks for text and for classes alike.
`make_sampler` compiles them for one device, for training, evaluation and benchmarks. `pipeline/generation.py`
compiles them for all devices, with everything that a user may ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.denoiser import Denoiser
from pixart_jax.diffusion.guidance import guide
from pixart_jax.diffusion.multistep import Inpaint, initial_noise
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.diffusion.schedule import NoiseSchedule
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


def guided_noise(
    denoiser: Denoiser,
    params: Arrays,
    conditions: Arrays,
    null_conditions: Arrays | None,
    scale: float | jax.Array,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(x [B, h, w, C], t [B]) -> guided noise, under the conventions of the weights; see `guidance.guide`.

    Args:
      denoiser: the network.
      params: of the network.
      conditions: of each sample, as `Denoiser.conditions`.
      null_conditions: what guidance leads away from, of the same shapes; None for no guidance.
      scale: guidance scale.
      interval, rescale: as for `guide`.
    """
    channels = denoiser.config.guidance.channels
    return guide(
        lambda x, t, given: denoiser(params, x, t, given),
        conditions,
        null_conditions,
        1 if null_conditions is None else scale,
        # 4 means all, whatever the number of channels of the codec.
        guided_channels=None if channels == 4 else channels,
        interval=interval,
        rescale=rescale,
    )


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
    """From noise to latents, in the scale of the network. Every image that is sampled comes from here.

    Args:
      noise_fn: as `guided_noise` returns it.
      schedule: noise schedule.
      noise: [B, h, w, C] standard normal.
      keys: [B] of the images, for samplers that draw more noise.
      sampler: a name in `SAMPLERS`.
      steps: model evaluations.
      options: further arguments of the sampler.
      strength: share of the steps that is run from `init`.
      init: [B, h, w, C] clean latents to start from (image to image), or that `mask` belongs to.
      mask: [B, h, w, 1], 1 where the image is regenerated (inpainting).
    """
    inpaint = None if mask is None else Inpaint(mask, init, noise)
    if mask is not None and strength == 1:
        # At full strength nothing of the original may show through where it is regenerated.
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
    """A compiled function (params, keys [B], conditions) -> unscaled latents [B, height, width, C].

    Args:
      denoiser: the network, with the conventions of its weights.
      height, width: of the latent.
      sampler: a name in `diffusion.samplers.SAMPLERS`.
      steps: model evaluations.
      scale: guidance scale; None for the one stored with the weights, 1 for none.

    The conditions are those of a training batch: text and text_mask (and image_size, aspect_ratio), or label.
    The null conditions are those of the parameters.
    """
    one_of("sampler", sampler, SAMPLERS)
    config = denoiser.config
    scale = config.guidance.scale if scale is None else scale
    shape = (height, width, config.model.in_channels)

    @jax.jit
    def sample(params: Arrays, keys: jax.Array, conditions: Arrays) -> jax.Array:
        conditions = denoiser.conditions(conditions)
        null = None if scale == 1 else denoiser.null_conditions(params, conditions)
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
