"""Opens the data of a run: folders of features, or images that are encoded during training."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pixart_jax.config import TrainConfig, from_dict
from pixart_jax.constants import IMAGE_FEATURES
from pixart_jax.data.features import NEW_TEXT_ENCODER_FIELDS, FeatureDataset
from pixart_jax.data.loader import Dataset, FeatureBatch, FeatureLoader, validation_batches
from pixart_jax.errors import UserError, in_utf8, short
from pixart_jax.flags import LARGEST_SEED
from pixart_jax.hub import local
from pixart_jax.training import distributed
from pixart_jax.training.objectives import Objective
from pixart_jax.training.resuming import changes_on_resume


def open_training_data(
    config: TrainConfig, config_file: str, objective: Objective, mesh: jax.sharding.Mesh
) -> tuple[FeatureLoader, list[Dataset]]:
    """Opens all training folders and makes the loader for this process's share of the batches."""
    paths = [path for path in config.data.train.split(",") if path]
    if not paths:
        raise UserError("data.train is empty: set it to a folder made by `python -m pixart_jax.precompute`.")
    datasets = [open_data(path, config, config_file, objective.training_arrays) for path in paths]
    numbers = {name: config.data.folder_numbers(name) for name in ("weights", "repeats", "loss_weights")}
    for name, values in numbers.items():
        if values and len(values) != len(datasets):
            raise UserError(
                f"data.{name} has {len(values)} values for {len(datasets)} folders: set one per folder."
            )
    if "mask" in objective.arrays and not any("mask" in dataset.extras for dataset in datasets):
        how = "precompute them with --masks"
        if config.data.on_the_fly:
            how = "put NAME-masklabel.png beside the images"
        raise UserError(
            f"diffusion.unmasked_weight is {config.diffusion.unmasked_weight}, but '{config.data.train}' has "
            f"no masks: {how}, or set --config.diffusion.unmasked_weight=1."
        )
    if IMAGE_FEATURES in objective.training_arrays:
        encoders = {dataset.config["image_encoder"]: dataset.path for dataset in datasets}
        if len(encoders) > 1:
            each = " and ".join(f"'{encoder}' in '{path}'" for encoder, path in list(encoders.items())[:2])
            raise UserError(
                f"the feature folders of data.train differ in features.image_encoder ({each}): make all of "
                "them with the same value."
            )
    part, parts = distributed.batch_part(mesh, config.data.batch_size)
    loader = FeatureLoader(
        datasets,
        numbers["weights"] or None,
        repeats=[int(number) for number in numbers["repeats"]] or None,
        loss_weights=numbers["loss_weights"] or None,
        batch_size=config.data.batch_size,
        seed=config.seed,
        arrays=(*config.model.conditions, *objective.arrays, *objective.training_arrays),
        text_length=config.features.text_length,
        first_step=config.data.first_step,
        aspect_ratio=config.guidance.aspect_ratio,
        process_index=part,
        process_count=parts,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )
    return loader, datasets


def open_data(
    path: str, config: TrainConfig, config_file: str, training_arrays: Sequence[str] = ()
) -> Dataset:
    """Opens features, or images that are encoded during training, and checks them against the config.

    `training_arrays` are those that only training needs, see `Objective`.
    """
    say = print if jax.process_index() == 0 else lambda _: None
    path = str(local(path, everything=True, with_folder=config.data.on_the_fly))
    if config.data.on_the_fly:
        from pixart_jax.data.planning import MIN_BUCKET
        from pixart_jax.on_the_fly import OnTheFlyDataset  # imports the encoders

        features = config.features
        if IMAGE_FEATURES not in training_arrays:
            features = dataclasses.replace(features, image_encoder="", token_size=0)
        dataset = OnTheFlyDataset(
            path,
            features,
            masks=config.diffusion.unmasked_weight < 1,
            min_bucket=min(config.data.batch_size, MIN_BUCKET),
            say=say,
        )
    else:
        dataset = open_dataset(path, config_file)
    check_features(config, dataset)
    if IMAGE_FEATURES in training_arrays:
        check_image_features(config, dataset, config_file)
    size = dataset.config.get("image_size", config.features.image_size)
    if size != config.features.image_size:
        say(
            f"'{path}' has features of {size} px, but features.image_size is {config.features.image_size}: "
            f"the run trains on images of {size} px"
        )
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
            f"--images={shlex.quote(path)} --out=features/{name}` and give that folder, or encode the images "
            "during training with --config.data.on_the_fly=True."
        )
    return FeatureDataset(path, hint=f"{command} --images=IMAGES --out={path}")


def _is_source(path: str) -> bool:
    """Whether a path names images or a list of them, but no features, finished or not."""
    folder = Path(path)
    if not folder.is_dir():
        suffixes = (".tar", ".parquet", ".json", ".jsonl", ".csv", ".tsv")
        return folder.is_file() or folder.suffix.lower() in suffixes
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
      UserError: if the codec, the latent scale, the number of latent channels, the text width or the cleaning
        of captions differs, or if the model cannot compress the keys and values of a bucket.
    """
    pairs = [
        (f"features.{name}", getattr(config.features, name), dataset.config.get(name))
        for name in ("codec", "latent_scale")
    ]
    if dataset.buckets:
        pairs.append(("model.in_channels", config.model.in_channels, dataset.buckets[0].latent_shape[-1]))
    if "text" in config.model.conditions and dataset.text_width:
        pairs.append(("model.text_dim", config.model.text_dim, dataset.text_width))
        # Prompts of the run are cleaned as its config says.
        encoder, of_features = config.features.text_encoder, dataset.config["text_encoder"]
        scale = of_features.get("scale", NEW_TEXT_ENCODER_FIELDS["scale"])
        pairs.append(("features.text_encoder.scale", encoder.scale, scale))
        clean = encoder.clean_caption
        pairs.append(("features.text_encoder.clean_caption", clean, of_features.get("clean_caption", clean)))
        if not clean:
            # Features of version 0.1 do not say so.
            kept = of_features.get("lower_case", NEW_TEXT_ENCODER_FIELDS["lower_case"])
            pairs.append(("features.text_encoder.lower_case", encoder.lower_case, kept))
    for name, expected, found in pairs:
        if expected != found:
            raise UserError(
                f"{name} is {expected}, but the features in '{dataset.path}' have {found}: set "
                f"--config.{name}={found}, or use features that were made for this stage."
            )
    # Without this check, the run would end when the first batch of such a bucket arrives.
    for bucket in dataset.buckets:
        try:
            config.model.check_size(*bucket.latent_shape[:2])
        except UserError as error:
            raise UserError(f"'{dataset.path}' has images of {bucket.bucket.name} px, but {error}") from error


def check_image_features(config: TrainConfig, dataset: Dataset, config_file: str) -> None:
    """Checks that records have features of the image encoder for each token of the network.

    Raises:
      UserError: they have none, or others.
    """
    if IMAGE_FEATURES not in dataset.extras:
        raise UserError(
            f"objective is 'alignment', but the features in '{dataset.path}' have no '{IMAGE_FEATURES}': "
            f"make them in another folder with `python -m pixart_jax.precompute --config={config_file} "
            "--config.features.image_encoder=FOLDER`, or set --config.objective=diffusion."
        )
    for bucket in dataset.buckets:
        tokens, width = bucket.extras[IMAGE_FEATURES].shape
        if width != config.alignment.target_width:
            raise UserError(
                f"alignment.target_width is {config.alignment.target_width}, but the image features in "
                f"'{dataset.path}' have {width}: set --config.alignment.target_width={width}, or use "
                "features that were made for this stage."
            )
        rows, columns = config.model.grid(*bucket.latent_shape[:2])
        if tokens != rows * columns:
            raise UserError(
                f"'{dataset.path}' has image features for {tokens} tokens of images of {bucket.bucket.name} "
                f"px, and the model has {rows * columns}: make them again with the config of this stage."
            )


def open_held_out(config: TrainConfig, config_file: str, say: Callable[[str], None]) -> Dataset | None:
    """Opens the held-out data. Without any, returns None and prints what the run will lack."""
    if config.data.validation:
        from pixart_jax.training.objectives.diffusion import VALIDATION_PARTS  # `train` loads objectives late

        dataset = open_data(config.data.validation, config, config_file)
        if not len(dataset):
            raise UserError(
                f"data.validation '{config.data.validation}' has no records: set it to other features."
            )
        few = ""
        if len(dataset) < VALIDATION_PARTS:
            few = (
                f"; with fewer than {VALIDATION_PARTS}, the validation loss leaves out the largest timesteps"
            )
        say(f"{len(dataset):,} held-out records{few}")
        return dataset
    held_out = "held-out images"
    if not config.data.on_the_fly:
        held_out = (
            "a folder of held-out features, which precompute makes from other images, or from a part of the "
            "same images with --validation_share=0.05"
        )
    lacks, them, prompts = "no validation loss", "one", ""
    if config.log.sample_every and not config.log.prompts:
        lacks, them = "no validation loss and no sample images", "them"
        if "text" in config.model.conditions:
            prompts = "; for sample images alone, --config.log.prompts='A PROMPT' is enough"
    say(
        f"data.validation is empty: this run has {lacks}. To get {them}, set --config.data.validation to "
        f"{held_out}{prompts}"
    )
    return None


# All text features are in memory while the run trains: about 5 MB for each prompt with T5-XXL.
MOST_PROMPTS = 256


class Prompt(NamedTuple):
    """A prompt of `log.prompts`, and the seed of its noise."""

    text: str
    seed: int


def open_prompts(config: TrainConfig) -> list[Prompt]:
    """Reads `log.prompts`; an empty list if there are none, or no sample images.

    Raises:
      UserError: a file cannot be read, an entry is invalid, or there are too many prompts.
    """
    if not (config.log.prompts and config.log.sample_every):
        return []
    from pixart_jax.data.prompts import read_prompts  # few runs need it

    prompts = []
    try:
        for source in filter(str.strip, re.split(r"[|\n]", config.log.prompts)):
            for where, fields in read_prompts(os.path.expanduser(source.strip()), {"seed": int}):
                prompts.append(_prompt(where, fields))
    except UserError as error:
        raise UserError(f"log.prompts: {error}") from None
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise UserError(
            f"log.prompts has {len(prompts)} prompts: give 1 to {MOST_PROMPTS}, or leave it empty."
        )
    return prompts


def _prompt(where: str, fields: Mapping[str, Any]) -> Prompt:
    unknown = next((name for name in fields if name not in ("prompt", "seed")), None)
    text, seed = fields.get("prompt"), fields.get("seed", 0)
    if unknown:
        raise UserError(
            f"{where}field '{unknown}' has no effect on sample images, which differ only in 'prompt' and "
            "'seed': remove it."
        )
    if not isinstance(text, str):
        raise UserError(f"{where}prompt is {short(text, quote=True)}: it must be text.")
    in_utf8(f"{where}prompt", text, "remove the characters that are not Unicode")
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise UserError(
            f"{where}seed is {short(seed, quote=True)}: it must be a whole number from 0 to {LARGEST_SEED}."
        )
    return Prompt(text, seed)


def check_continuation(
    config: TrainConfig,
    metadata: Mapping[str, Any],
    loader: FeatureLoader,
    say: Callable[[str], None] = print,
) -> None:
    """Checks, before a checkpoint is read, that the run that resumes from it is the same run.

    Args:
      config: config of the run.
      metadata: metadata of the checkpoint.
      loader: loader of the run.
      say: is called with a line for each field that changed and may change.

    The data may differ if `data.first_step` is the step of the checkpoint.

    Raises:
      UserError: a field of the config changed that makes another run, or the data changed.
    """
    step, saved = metadata["step"], from_dict(metadata["config"])
    reported, rejected = changes_on_resume(config, saved, step)
    if rejected:
        more = f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
        raise UserError(
            f"the checkpoint of step {step} is of another model or another run: "
            f"{'; '.join(rejected[:5])}{more}. Restore these values, or use another --workdir."
        )
    # Seed and batch size, which are part of the fingerprint, are equal here.
    before = metadata["loader"]["fingerprint"]
    if before not in (loader.fingerprint, loader.earlier_fingerprint) and config.data.first_step != step:
        first_step = saved.data.first_step
        if before in loader.fingerprints(first_step):
            raise UserError(
                f"data.first_step is {config.data.first_step}, and the checkpoint of step {step} has "
                f"{first_step} with the same data: set --config.data.first_step={first_step}."
            )
        changed = [
            f"data.{name} was {then!r}, now {now!r}"
            for name in ("train", "weights", "repeats", "on_the_fly", "first_step")
            if (now := getattr(config.data, name)) != (then := getattr(saved.data, name))
            and not (name == "train" and _same_paths(now, then))
        ]
        raise UserError(
            f"the training data has changed since the checkpoint of step {step} "
            f"({'; '.join(changed) or 'the records are others'}). Restore it; or continue this run with the "
            f"new data from step {step} on: --config.data.first_step={step}, also for later restarts; or "
            "start a new run from these weights: another --workdir, --config.init.method=weights and "
            "--config.init.path set to this run directory."
        )
    for line in reported:
        say(f"config: {line}")


def _same_paths(first: str, second: str) -> bool:
    """Whether two lists of paths name the same files. Those of a checkpoint are absolute."""
    return [os.path.abspath(path) for path in first.split(",")] == [
        os.path.abspath(path) for path in second.split(",")
    ]


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
