"""Generates sample images during training, from held-out conditions and fixed noise."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from pixart_jax.config import TrainConfig
from pixart_jax.data.loader import Dataset
from pixart_jax.denoiser import Denoiser
from pixart_jax.encoders.images import make_codec
from pixart_jax.errors import UserError, report
from pixart_jax.files import replace_bytes
from pixart_jax.models.layers import activation_sharding
from pixart_jax.sampling import image_keys, make_sampler, picture_grid, sample_in_batches
from pixart_jax.training.data import held_out_batches


def make_sample_grid(
    config: TrainConfig, held_out: Dataset, workdir: epath.Path
) -> Callable[[dict[str, Any], int], np.ndarray]:
    """Makes a function (parameters of the network, step) -> grid of images [H, W, 3] uint8.

    The function also writes the grid to samples/STEP.png in the run directory.
    """
    codec = make_codec(config.features)
    denoiser = Denoiser.of(config.for_sampling())
    first = next(iter(held_out_batches(config, held_out))).arrays
    count = min(config.log.samples, len(first["index"]))
    conditions = {name: jnp.asarray(first[name][:count]) for name in config.model.conditions}
    height, width = first["latent_mean"].shape[1:3]
    sample = make_sampler(denoiser, height=height, width=width, steps=config.log.sample_steps)
    keys = image_keys(np.arange(count))
    folder = workdir / "samples"

    def generate(params: dict[str, Any], step: int) -> np.ndarray:
        with activation_sharding(None):  # only this process generates, on a single device
            latents = sample_in_batches(sample, params, keys, conditions, count)
            try:
                images = codec.decode(latents)
            except UserError as error:
                # A picture must not end the run.
                report(f"step {step}: the sample images are black, because {error}")
                sides = height * codec.downsampling, width * codec.downsampling
                images = np.zeros((count, *sides, 3), np.uint8)
        magnify = max(1, 64 // images.shape[1])
        grid = picture_grid(images, columns=max(1, round(count**0.5)), magnify=magnify)
        file = io.BytesIO()
        Image.fromarray(grid).save(file, format="PNG")
        replace_bytes(folder / f"{step:08d}.png", file.getvalue())
        return grid

    return generate
