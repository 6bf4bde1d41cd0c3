"""Measures the error of text features stored in fewer bits, and its effect on the output of the model.

    make demo
    python benchmarks/text_dtypes.py     # writes benchmarks/results/text_dtypes.json

Uses stage 2 of the digits on held-out scans and captions. Errors are relative root mean square errors
compared with float32 features; the effect of a different caption is given for comparison. The encoder is
random and does not have the few large channels of a released T5, so synthetic features with eight such
channels are measured as well.
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
from pixart_jax.denoiser import Denoiser
from pixart_jax.diffusion.schedule import add_noise
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.weights.checkpoints import read_weights

SAMPLES = 256
TIMESTEPS = (100, 900)
LARGE_CHANNELS, LARGE = 8, 30.0


def as_int8(features: np.ndarray) -> np.ndarray:
    """Converts to int8 and back, with one scale per token."""
    values, scales = quantize(features.reshape(-1, features.shape[-1]))
    return (values.astype(np.float32) * scales[:, None]).reshape(features.shape)


def as_bfloat16(features: np.ndarray) -> np.ndarray:
    return features.astype(ml_dtypes.bfloat16).astype(np.float32)


STORED = {"bfloat16": as_bfloat16, "int8": as_int8}


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Returns the relative root mean square error."""
    return float(np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/stage2"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_dtypes.json"))
    arguments = parser.parse_args()

    params, config = read_weights(arguments.checkpoint)
    denoiser = Denoiser.of(config)

    @jax.jit
    def model(params, latents, timesteps, text, mask):
        return denoiser(params, latents, timesteps, {"text": text, "text_mask": mask})

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
    schedule = denoiser.schedule
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
