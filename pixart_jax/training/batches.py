"""The arrays of a training batch, as the loader produces them for a stage."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pixart_jax.config import TrainConfig


def batch_shapes(
    config: TrainConfig, height: int, width: int, rows: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch.

    Besides latents and index there are the conditions that the model config declares. Text features have the
    dtype they are stored in; int8 ones are read as bfloat16.

    Args:
      config: the stage.
      height, width: of the latents.
      rows: samples; by default the batch size of the stage.
    """
    stored = jnp.float32 if config.features.text_dtype == "float32" else jnp.bfloat16
    latent = ((height, width, config.model.in_channels), "float32")
    row = {"latent_mean": latent, "latent_std": latent, "index": ((), "uint32"), **config.model.conditions}
    return {
        name: jax.ShapeDtypeStruct(
            (rows or config.data.batch_size, *shape), stored if dtype == "float" else jnp.dtype(dtype)
        )
        for name, (shape, dtype) in row.items()
    }
