"""Do generated digits show the digits in their prompts? A cheap check of the demo's three stages.

A support vector classifier is trained on the same scans as the stages. Its accuracy on held-out scans is an
upper bound for generated digits.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from pixart_jax.config import TrainConfig
from pixart_jax.data.digits import WORDINGS, caption_for, images_and_labels
from pixart_jax.denoiser import Denoiser
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.sampling import image_keys, make_sampler, picture_grid, sample_in_batches

if TYPE_CHECKING:
    from sklearn.svm import SVC

# Images in one call of the sampler.
BATCH_SIZE = 100


@dataclasses.dataclass(frozen=True)
class Reader:
    """A classifier for digit images of one size, with its accuracy on held-out scans."""

    classifier: SVC
    accuracy: float

    def read(self, images: np.ndarray) -> np.ndarray:
        """Classifies images: [n, H, W, 1] uint8 -> [n] digits."""
        return self.classifier.predict(images.reshape(len(images), -1) / 255.0)


def train_reader(image_size: int) -> Reader:
    """Fits the classifier on the training scans at `image_size` (8 or 16)."""
    from sklearn.svm import SVC  # only this needs it, and importing it takes seconds

    train_images, train_labels, _ = images_and_labels("train", image_size)
    test_images, test_labels, _ = images_and_labels("test", image_size)
    classifier = SVC(C=10.0, gamma="scale").fit(
        train_images.reshape(len(train_images), -1) / 255.0, train_labels
    )
    reader = Reader(classifier, accuracy=0.0)
    return dataclasses.replace(reader, accuracy=float(np.mean(reader.read(test_images) == test_labels)))


def generate_digits(
    params: dict, config: TrainConfig, count: int, *, seed: int = 0, steps: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """Generates digits 0, 1, …, 9, 0, …, from classes or from captions in all wordings.

    Args:
      params: weights of a stage of the demo.
      config: its config.
      count: number of images.
      seed: seed of the first image; image i has seed + i.
      steps: sampling steps.

    Returns:
      images [count, H, W, 1] uint8, and the requested digits [count].
    """
    digits = np.arange(count) % 10
    size = config.features.image_size
    if "text" in config.model.conditions:
        encoder = TextEncoder(config.features.text_encoder, config.features.text_length)
        wordings = np.arange(count) // 10 % len(WORDINGS)
        text, lengths = encoder.encode([caption_for(d, w) for d, w in zip(digits, wordings)])
        conditions = {
            "text": jnp.asarray(text),
            "text_mask": jnp.asarray(np.arange(text.shape[1]) < np.asarray(lengths)[:, None]),
            "image_size": jnp.full((count, 2), float(size)),
            "aspect_ratio": jnp.ones((count, 1)),
        }
    else:
        conditions = {"label": jnp.asarray(digits, jnp.int32)}
    sample = make_sampler(Denoiser.of(config.for_sampling()), height=size, width=size, steps=steps)
    keys = image_keys(seed + np.arange(count))
    latents = sample_in_batches(sample, params, keys, conditions, BATCH_SIZE)
    return make_codec(config.features).decode(latents), digits


def measure(
    params: dict, config: TrainConfig, count: int, *, seed: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the share of generated digits that are read as requested, in a row, and a grid of them.

    Args: as for `generate_digits`.
    """
    size = config.features.image_size
    reader = train_reader(size)
    images, requested = generate_digits(params, config, count, seed=seed)
    row = {
        "stage": config.name,
        "pixels": size,
        "samples": len(images),
        "agreement": float(np.mean(reader.read(images) == requested)),
        "reader_on_held_out_scans": reader.accuracy,
    }
    # One row per digit, with ten images of it.
    by_digit = np.concatenate([images[requested == digit][:10] for digit in range(10)])
    return row, picture_grid(by_digit, columns=10, magnify=48 // size)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `measure` as a Markdown table."""
    lines = [
        "| stage | pixels | samples | read as requested | the same reader on held-out real scans |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['stage']} | {row['pixels']} | {row['samples']} | {row['agreement']:.1%} | "
        f"{row['reader_on_held_out_scans']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)
