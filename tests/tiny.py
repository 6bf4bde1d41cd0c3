"""A tiny pipeline without PyTorch: the tokens are bytes, the T5 is random, and the latents are pixels."""

from __future__ import annotations

import jax
from flax import nnx

from pixart_jax.config import FeaturesConfig, TextEncoderConfig, TrainConfig
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.pipeline import Pipeline

# Side of its images in pixels.
SIDE = 32

TEXT = TextEncoderConfig(
    tokenizer="byt5",
    weights="random",
    d_model=16,
    d_ff=16,
    d_kv=8,
    num_heads=2,
    num_layers=1,
    dtype="float32",
)
MODEL = PixArtConfig(
    size="custom", depth=1, hidden_size=16, num_heads=2, in_channels=3, text_dim=16, text_length=32
)
CONFIG = TrainConfig(
    model=MODEL,
    features=FeaturesConfig(
        image_size=SIDE, codec="pixels", latent_scale=1.0, text_length=32, text_encoder=TEXT
    ),
)


def make_pipe(random_params, devices: int = 1, config: TrainConfig = CONFIG, **kwargs) -> Pipeline:
    """Makes the pipeline on some of the simulated devices; `random_params` is the fixture."""
    encoder = TextEncoder(TEXT, MODEL.text_length, batch_size=1, sharded=True, load=False)
    backbone = nnx.merge(*random_params(config.model))
    codec = make_codec(config.features)
    return Pipeline(backbone, config, encoder, codec, devices=jax.devices()[:devices], **kwargs)
