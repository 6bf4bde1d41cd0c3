"""The validation loss of a run: held-out records, fixed noise, a fixed grid of timesteps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from pixart_jax.config import TrainConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.loader import Dataset, FeatureBatch, validation_batches
from pixart_jax.errors import UserError
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training import distributed, sharding
from pixart_jax.training.step import make_validation_step


def conditions(model: PixArtConfig | DiTConfig) -> tuple[str, ...]:
    """Names of the arrays of a batch that a network takes as conditions."""
    if isinstance(model, DiTConfig):
        return ("label",)
    return ("text", "text_mask", *(("image_size", "aspect_ratio") if model.size_conditions else ()))


def open_dataset(path: str, config_file: str = "CONFIG") -> FeatureDataset:
    """Opens a folder of features; a missing one is told with the command that makes it."""
    hint = f"python -m pixart_jax.precompute --config={config_file} --images=IMAGES --out={path}"
    return FeatureDataset(path, hint=hint)


def check_features(config: TrainConfig, dataset: Dataset) -> None:
    """Features train a stage only if they are what its config says they are.

    Raises:
      UserError: another codec, scale, number of latent channels or width of text.
    """
    pairs = [
        (f"features.{name}", getattr(config.features, name), dataset.config.get(name))
        for name in ("codec", "latent_scale")
    ]
    if dataset.buckets:
        pairs.append(("model.in_channels", config.model.in_channels, dataset.buckets[0].latent_shape[-1]))
    if isinstance(config.model, PixArtConfig) and dataset.text_width:
        pairs.append(("model.text_dim", config.model.text_dim, dataset.text_width))
    for name, asked, found in pairs:
        if asked != found:
            raise UserError(
                f"{name} is {asked}, the features of '{dataset.path}' have {found}: set --config.{name}="
                f"{found}, or name features made for this stage."
            )


def make_validation(
    config: TrainConfig, graph: nnx.GraphDef, mesh: jax.sharding.Mesh, held_out: Dataset
) -> Callable[[dict[str, Any]], dict[str, float]]:
    """params -> validation losses over held-out records: in all, and per part of the timesteps.

    A part that no record falls into, as with fewer than eight, has no loss.
    """
    step = jax.jit(make_validation_step(config, graph), out_shardings=sharding.replicated(mesh))
    part, parts = distributed.batch_part(mesh, config.data.batch_size // config.optimizer.accumulation)
    batches = list(held_out_batches(config, held_out, part, parts))

    def validate(params: dict[str, Any]) -> dict[str, float]:
        sums = [step(params, sharding.global_batch(mesh, batch.arrays)) for batch in batches]
        loss, count = (np.sum(jax.device_get(part), axis=0) for part in zip(*sums))
        parts = {
            f"validation_loss_part_{part}": float(loss[part] / count[part]) for part in np.flatnonzero(count)
        }
        return {"validation_loss": float(loss.sum() / count.sum()), **parts}

    return validate


def held_out_batches(
    config: TrainConfig, held_out: Dataset, part: int = 0, parts: int = 1
) -> Iterator[FeatureBatch]:
    """Held-out batches in record order: one part of the rows of each, or all."""
    return validation_batches(
        held_out,
        batch_size=config.data.batch_size // config.optimizer.accumulation,
        num_samples=min(config.log.validation_samples, len(held_out)),
        arrays=conditions(config.model),
        text_length=config.features.text_length,
        aspect_ratio=config.guidance.aspect_ratio,
        process_index=part,
        process_count=parts,
    )
