"""What storing text features in fewer bits does to the features, and to what the model makes of them.

    make demo
    python benchmarks/text_dtypes.py     # writes benchmarks/results/text_dtypes.json

Stage 2 of the digits on held-out scans and captions: relative root mean square errors against float32
features, beside what another caption changes. The encoder is random: it has none of the few large channels
that a released T5 has, so synthetic features with eight of them are measured too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pixart_jax.data.digits import caption_for, images_and_labels
from pixart_jax.data.records import quantize
from pixart_jax.diffusion import add_noise
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.training.checkpoints import read_weights
from pixart_jax.training.state import abstract_model
from pixart_jax.training.step import make_schedule, model_function

SAMPLES = 256
TIMESTEPS = (100, 900)
LARGE_CHANNELS, LARGE = 8, 30.0


def as_int8(features: np.ndarray) -> np.ndarray:
    """Through int8 and back, a scale a token."""
    values, scales = quantize(features.reshape(-1, features.shape[-1]))
    return (values.astype(np.float32) * scales[:, None]).reshape(features.shape)


def as_bfloat16(features: np.ndarray) -> np.ndarray:
    return features.astype(ml_dtypes.bfloat16).astype(np.float32)


STORED = {"bfloat16": as_bfloat16, "int8": as_int8}


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Relative root mean square."""
    return float(np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/stage2"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_dtypes.json"))
    arguments = parser.parse_args()

    params, config = read_weights(arguments.checkpoint)
    model = jax.jit(model_function(abstract_model(config.model)[0]))
    pixels, labels, _ = images_and_labels("test", config.features.image_size)
    labels = labels[:SAMPLES]
    clean = np.asarray(pixels[:SAMPLES], np.float32).reshape(len(labels), *pixels.shape[1:3], 1) / 127.5 - 1
    encoder = TextEncoder(config.features.text_encoder, config.features.text_length)
    rng = np.random.default_rng(0)
    wordings = rng.integers(3, size=len(labels))

    def encode(digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        text, lengths = encoder.encode([caption_for(d, w) for d, w in zip(digits, wordings)])
        mask = np.arange(text.shape[1]) < np.asarray(lengths)[:, None]
        return np.asarray(text, np.float32) * mask[..., None], mask

    text, mask = encode(labels)
    report = {"samples": len(labels), "features": {}, "model_output": {}}
    stored = {name: as_stored(text) * mask[..., None] for name, as_stored in STORED.items()}
    report["features"] = {name: error(values[mask], text[mask]) for name, values in stored.items()}
    schedule = make_schedule(config)
    noise = rng.standard_normal(clean.shape, np.float32)
    other, other_mask = encode((labels + 1) % 10)
    for timestep in TIMESTEPS:
        times = jnp.full(len(labels), timestep)
        noised = add_noise(schedule, jnp.asarray(clean), jnp.asarray(noise), times)
        exact = np.asarray(model(params, noised, times, text, mask))
        errors = {
            name: error(np.asarray(model(params, noised, times, values, mask)), exact)
            for name, values in stored.items()
        }
        errors["another caption"] = error(np.asarray(model(params, noised, times, other, other_mask)), exact)
        report["model_output"][f"t={timestep}"] = errors

    synthetic = rng.standard_normal((1024, 4096), np.float32)
    synthetic[:, :LARGE_CHANNELS] *= LARGE
    found = as_int8(synthetic)
    channels = [error(found[:, i], synthetic[:, i]) for i in range(synthetic.shape[1])]
    report["int8_with_large_channels"] = {
        "channels": LARGE_CHANNELS,
        "times_larger": LARGE,
        "error": error(found, synthetic),
        "median_channel": float(np.median(channels)),
    }
    text = json.dumps(report, indent=1)
    print(text)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
