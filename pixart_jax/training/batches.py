"""Shapes and dtypes of the training batches that the loader produces."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pixart_jax.config import TrainConfig
from pixart_jax.constants import IMAGE_FEATURES


def batch_shapes(
    config: TrainConfig, height: int, width: int, rows: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of the arrays of a global batch.

    A batch holds latents, the index of each sample, the conditions that the model config declares, and the
    mask, the image features and the weight of each sample if the loss has them. Text features have the dtype
    in which they are stored, except that int8 features are dequantized to bfloat16.

    Args:
      config: config of the stage.
      height, width: size of the latents.
      rows: number of samples; by default the batch size of the stage.
    """
    stored = jnp.float32 if config.features.text_dtype == "float32" else jnp.bfloat16
    latent = ((height, width, config.model.in_channels), "float32")
    row = {"latent_mean": latent, "latent_std": latent, "index": ((), "uint32"), **config.model.conditions}
    if config.diffusion.unmasked_weight < 1:
        row["mask"] = ((height, width), "uint8")
    if config.objective == "alignment":
        rows_of_tokens, columns = config.model.grid(height, width)
        row[IMAGE_FEATURES] = ((rows_of_tokens * columns, config.alignment.target_width), "bfloat16")
    if set(config.data.folder_numbers("loss_weights")) - {1.0}:
        row["weight"] = ((), "float32")
    for name in ("text", "text_mask"):
        if name in row:
            # The loader pads captions to the length of the features, which may be less than the model's.
            (_, *rest), dtype = row[name]
            row[name] = ((config.features.text_length, *rest), dtype)
    return {
        name: jax.ShapeDtypeStruct(
            (rows or config.data.batch_size, *shape), stored if dtype == "float" else jnp.dtype(dtype)
        )
        for name, (shape, dtype) in row.items()
    }
