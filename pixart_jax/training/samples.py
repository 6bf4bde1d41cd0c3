"""Generates the sample images of a training run, with fixed noise.

They show the prompts in `log.prompts`, or else captions of held-out records. `samples/` in the run directory
has for each grid:

    STEP.png       the grid
    STEP.txt       which caption each image shows
    initial/       the images of step 0 one by one, if they are compared (`TrainConfig.compares_samples`)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image

from pixart_jax.config import TrainConfig
from pixart_jax.constants import TEXT_BATCH
from pixart_jax.data.loader import Dataset
from pixart_jax.denoiser import Denoiser
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.text import TextEncoder, cut_summary, unknown_summary
from pixart_jax.errors import UserError, report
from pixart_jax.files import replace_bytes, replace_text
from pixart_jax.models.layers import activation_sharding
from pixart_jax.sampling import image_keys, make_sampler, picture_grid, sample_in_batches
from pixart_jax.training.data import Prompt, held_out_batches


class _Wanted(NamedTuple):
    """The images to generate: their captions for readers, seeds, conditions [n, ...] and size of latents."""

    captions: list[str]
    seeds: np.ndarray
    conditions: Mapping[str, np.ndarray]
    height: int
    width: int


def make_sample_grid(
    config: TrainConfig,
    held_out: Dataset | None,
    prompts: Sequence[Prompt],
    workdir: epath.Path,
    say: Callable[[str], None] = print,
) -> Callable[[dict[str, Any], int], np.ndarray]:
    """Makes a function (parameters of the network, step) -> grid of images [H, W, 3] uint8.

    The function also writes the grid to samples/STEP.png in the run directory, and its captions to STEP.txt.
    If `config.compares_samples`, each image has the one that the function generated at step 0 on its left.

    Args:
      config: config of the stage.
      held_out: held-out records; not needed if there are prompts.
      prompts: the prompts, which are encoded at once. The text encoder then leaves the devices.
      workdir: run directory.
      say: is called with a line for prompts that the tokenizer cuts or does not know.

    Raises:
      UserError: the text encoder or the codec cannot be opened, or the encoder is not that of the network.
    """
    # One image at a time, because the training state takes most of the memory.
    codec = make_codec(config.features, batch_size=1)
    denoiser = Denoiser.of(config.for_sampling())
    wanted = _of_prompts(config, prompts, say) if prompts else _of_records(config, held_out)
    config.model.check_size(wanted.height, wanted.width)
    count = len(wanted.captions)
    at_a_time = min(count, config.log.samples, config.data.batch_size // config.optimizer.accumulation)
    sample = make_sampler(denoiser, height=wanted.height, width=wanted.width, steps=config.log.sample_steps)
    keys = image_keys(wanted.seeds)
    compared = config.compares_samples
    columns = max(1, round((count / 2 if compared else count) ** 0.5))
    listed = "".join(
        f"row {index // columns + 1}, column {index % columns + 1}: {' '.join(caption.split())}\n"
        for index, caption in enumerate(wanted.captions)
    )
    folder = workdir / "samples"

    def generate(params: dict[str, Any], step: int) -> np.ndarray:
        with activation_sharding(None):  # only this process generates, on a single device
            latents = sample_in_batches(sample, params, keys, wanted.conditions, at_a_time)
            try:
                images = codec.decode(latents)
            except UserError as error:
                # A picture must not end the run.
                report(f"step {step}: the sample images are black, because {error}")
                sides = wanted.height * codec.downsampling, wanted.width * codec.downsampling
                images = np.zeros((count, *sides, 3), np.uint8)
        about = ""
        if compared and step == 0:
            _write_initial(folder / "initial", images, listed)
        elif compared:
            try:
                images = np.concatenate([_read_initial(folder / "initial", images, listed), images], axis=2)
                about = f"each with the image of step 0 on its left and that of step {step} on its right\n"
            except (OSError, ValueError, SyntaxError) as error:  # the last from a damaged PNG
                report(f"step {step}: the sample images are not compared with those of step 0: {error}")
        magnify = max(1, 64 // images.shape[1])
        grid = picture_grid(images, columns=columns, magnify=magnify)
        replace_text(folder / f"{step:08d}.txt", about + listed)
        replace_bytes(folder / f"{step:08d}.png", _png(grid))
        return grid

    return generate


def _of_records(config: TrainConfig, held_out: Dataset) -> _Wanted:
    """The captions of the first held-out records."""
    batch = next(iter(held_out_batches(config, held_out)))
    count = min(config.log.samples, len(batch.keys))
    conditions = {name: batch.arrays[name][:count] for name in config.model.conditions}
    captions = batch.captions
    if "label" in conditions:
        captions = [f"class {label}" for label in conditions["label"]]
    captions = [f"{caption} ({key})" for caption, key in zip(captions[:count], batch.keys)]
    return _Wanted(captions, np.arange(count), conditions, *batch.arrays["latent_mean"].shape[1:3])


def _of_prompts(config: TrainConfig, prompts: Sequence[Prompt], say: Callable[[str], None]) -> _Wanted:
    """The prompts, as square images of `features.image_size`."""
    features, count = config.features, len(prompts)
    encoder = TextEncoder(
        features.text_encoder,
        features.text_length,
        min(count, TEXT_BATCH),
        sharded=len(jax.local_devices()) > 1,
        load=False,
    )
    if encoder.width != config.model.text_dim:
        raise UserError(
            f"log.prompts: the text encoder '{features.text_encoder.weights}' has features of width "
            f"{encoder.width}, and model.text_dim is {config.model.text_dim}: set "
            "features.text_encoder.weights to the encoder of the training features."
        )
    text, lengths = encoder.encode([prompt.text for prompt in prompts])
    encoder.release()
    if encoder.cut:
        say(f"log.prompts: {cut_summary(encoder.cut, features.text_length)}")
    if encoder.unknown:
        say(f"log.prompts: {unknown_summary(encoder.unknown)}")
    side = features.latent_side
    arrays = {
        "text": text,
        "text_mask": np.arange(features.text_length) < lengths[:, None],
        "image_size": np.full((count, 2), side * features.downsampling, np.float32),
        "aspect_ratio": np.ones((count, 1), np.float32),
    }
    return _Wanted(
        [f"{prompt.text} (seed {prompt.seed})" for prompt in prompts],
        np.array([prompt.seed for prompt in prompts]),
        {name: arrays[name] for name in config.model.conditions},
        side,
        side,
    )


def _write_initial(folder: epath.Path, images: np.ndarray, listed: str) -> None:
    """Writes the images of step 0. Their captions are written last, so that they are there only with all."""
    for index, image in enumerate(images):
        replace_bytes(folder / f"{index:04d}.png", _png(image))
    replace_text(folder / "captions.txt", listed)


def _read_initial(folder: epath.Path, images: np.ndarray, listed: str) -> np.ndarray:
    """Reads the images of step 0, which have the captions and the shape of `images`.

    Raises:
      OSError: there are none, or they cannot be read.
      ValueError: they are others.
    """
    if (folder / "captions.txt").read_text() != listed:
        raise ValueError(f"those in '{folder}' have other captions")
    paths = [folder / f"{index:04d}.png" for index in range(len(images))]
    found = [np.asarray(Image.open(io.BytesIO(path.read_bytes()))) for path in paths]
    return np.stack(found).reshape(images.shape)


def _png(image: np.ndarray) -> bytes:
    """An image, uint8 [H, W, 1 or 3], as a PNG."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")
    return file.getvalue()
