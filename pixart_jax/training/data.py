"""Opens the data of a run: folders of features, or images that are encoded during training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
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
        first_step=config.data.first_step,
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
    """Opens a folder of features.

    Raises:
      UserError: it is missing, unfinished or damaged, or it holds images. The message gives the command that
        makes features.
    """
    command = f"python -m pixart_jax.precompute --config={config_file}"
    if _is_source(path):
        name = re.match(r"[\w-]*", Path(path).resolve().name)[0].rstrip("-") or "images"
        raise UserError(
            f"'{path}' holds images, but a run reads features: make them in another folder with `{command} "
            f"--images={path} --out=features/{name}` and give that folder, or encode the images during "
            "training with --config.data.on_the_fly=True."
        )
    return FeatureDataset(path, hint=f"{command} --images=IMAGES --out={path}")


def _is_source(path: str) -> bool:
    """Whether a path names images or a list of them, but no features, finished or not."""
    folder = Path(path)
    if not folder.is_dir():
        return folder.suffix in (".tar", ".parquet", ".json", ".jsonl", ".csv")
    if any(next(folder.glob(name), None) for name in ("*.arrayrecord", "job.json", "manifest-*-of-*.json")):
        return False
    from pixart_jax.data.sources import detect_kind  # not needed if the features can be opened

    try:
        detect_kind(path, require_captions=False)
    except UserError as error:
        return "has files of sources" in str(error)  # images of several kinds
    return True


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

    The data may differ if `data.first_step` is the step of the checkpoint.

    Raises:
      UserError: if one of them differs.
    """
    for name, now, then in (
        ("seed", config.seed, saved.seed),
        ("objective", config.objective, saved.objective),
        ("data.batch_size", config.data.batch_size, saved.data.batch_size),
    ):
        if now != then:
            raise UserError(
                f"{name} is {now}, the checkpoint has {then}: a run cannot be resumed with another value. "
                "Restore the value or use another --workdir."
            )
    check_same_data(config, saved, loader, loader_state)


def check_same_data(
    config: TrainConfig, saved: TrainConfig, loader: FeatureLoader, loader_state: dict[str, Any]
) -> None:
    """Checks that the data is that of the checkpoint, or that `data.first_step` says that it changes there.

    Raises:
      UserError: the data has changed. The message names the ways to go on.
    """
    step, before = loader_state["step"], loader_state["fingerprint"]
    if before in (loader.fingerprint, loader.earlier_fingerprint) or config.data.first_step == step:
        return
    changed = [
        f"data.{name} was {then!r}, now {now!r}"
        for name in ("train", "weights", "on_the_fly", "first_step")
        if (now := getattr(config.data, name)) != (then := getattr(saved.data, name))
    ]
    raise UserError(
        f"the training data has changed since the checkpoint of step {step} "
        f"({'; '.join(changed) or 'the records are others'}). Restore it; or continue this run with the new "
        f"data from step {step} on: --config.data.first_step={step}, also for later restarts; or start a new "
        "run from these weights: another --workdir, --config.init.method=weights and --config.init.path set "
        "to this run directory."
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
