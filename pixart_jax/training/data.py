"""Opens the data of a run: folders of features, or images that are encoded during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from pixart_jax.config import TrainConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.loader import Dataset, FeatureBatch, FeatureLoader, validation_batches
from pixart_jax.errors import UserError
from pixart_jax.training import distributed
from pixart_jax.training.objectives import Objective


def open_training_data(
    config: TrainConfig, config_file: str, objective: Objective, mesh: jax.sharding.Mesh
) -> tuple[FeatureLoader, list[Dataset]]:
    """Opens all training folders and makes the loader for this process's share of the batches."""
    paths = [path for path in config.data.train.split(",") if path]
    if not paths:
        raise UserError("data.train is empty: set it to a folder made by `python -m pixart_jax.precompute`.")
    datasets = [open_data(path, config, config_file) for path in paths]
    weights = [float(weight) for weight in config.data.weights.split(",") if weight]
    if weights and len(weights) != len(datasets):
        raise UserError(
            f"data.weights has {len(weights)} values for {len(datasets)} folders: set one per folder."
        )
    part, parts = distributed.batch_part(mesh, config.data.batch_size)
    loader = FeatureLoader(
        datasets,
        weights or [float(len(dataset)) for dataset in datasets],
        batch_size=config.data.batch_size,
        seed=config.seed,
        arrays=(*config.model.conditions, *objective.arrays),
        text_length=config.features.text_length,
        aspect_ratio=config.guidance.aspect_ratio,
        process_index=part,
        process_count=parts,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )
    return loader, datasets


def open_data(path: str, config: TrainConfig, config_file: str) -> Dataset:
    """Opens features, or images that are encoded during training, and checks them against the config."""
    if config.data.on_the_fly:
        from pixart_jax.data.planning import MIN_BUCKET
        from pixart_jax.on_the_fly import OnTheFlyDataset  # imports the encoders

        say = print if jax.process_index() == 0 else lambda _: None
        dataset = OnTheFlyDataset(
            path, config.features, min_bucket=min(config.data.batch_size, MIN_BUCKET), say=say
        )
    else:
        dataset = open_dataset(path, config_file)
    check_features(config, dataset)
    return dataset


def open_dataset(path: str, config_file: str = "CONFIG") -> FeatureDataset:
    """Opens a folder of features. If it is missing, the error message gives the command that makes it."""
    hint = f"python -m pixart_jax.precompute --config={config_file} --images=IMAGES --out={path}"
    return FeatureDataset(path, hint=hint)


def check_features(config: TrainConfig, dataset: Dataset) -> None:
    """Checks that features match the config of a stage.

    Raises:
      UserError: if the codec, the latent scale, the number of latent channels or the text width differs.
    """
    pairs = [
        (f"features.{name}", getattr(config.features, name), dataset.config.get(name))
        for name in ("codec", "latent_scale")
    ]
    if dataset.buckets:
        pairs.append(("model.in_channels", config.model.in_channels, dataset.buckets[0].latent_shape[-1]))
    if "text" in config.model.conditions and dataset.text_width:
        pairs.append(("model.text_dim", config.model.text_dim, dataset.text_width))
    for name, expected, found in pairs:
        if expected != found:
            raise UserError(
                f"{name} is {expected}, but the features in '{dataset.path}' have {found}: set "
                f"--config.{name}={found}, or use features that were made for this stage."
            )


def check_continuation(
    config: TrainConfig, saved: TrainConfig, loader: FeatureLoader, loader_state: dict[str, Any]
) -> None:
    """Checks that the run that resumes from a checkpoint has the same seed, objective, batch size and data.

    Raises:
      UserError: if one of them differs.
    """
    for name, now, then in (
        ("seed", config.seed, saved.seed),
        ("objective", config.objective, saved.objective),
        ("data.batch_size", config.data.batch_size, saved.data.batch_size),
        ("data (fingerprint)", loader.fingerprint, loader_state["fingerprint"]),
    ):
        if now != then:
            raise UserError(
                f"{name} is {now}, the checkpoint has {then}: a run cannot be resumed with another value. "
                "Restore the value or use another --workdir."
            )


def held_out_batches(
    config: TrainConfig,
    held_out: Dataset,
    part: int = 0,
    parts: int = 1,
    arrays: Sequence[str] = (),
) -> Iterator[FeatureBatch]:
    """Returns the held-out batches in the order of the records.

    Args:
      config: config of the stage.
      held_out: held-out records.
      part, parts: which part of the rows of each batch to read, and the number of parts; by default all rows.
      arrays: names of extra arrays of the records to read, besides latents and conditions.
    """
    return validation_batches(
        held_out,
        batch_size=config.data.batch_size // config.optimizer.accumulation,
        num_samples=min(config.log.validation_samples, len(held_out)),
        arrays=(*config.model.conditions, *arrays),
        text_length=config.features.text_length,
        aspect_ratio=config.guidance.aspect_ratio,
        process_index=part,
        process_count=parts,
    )
