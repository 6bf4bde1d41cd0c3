"""A tiny pipeline without PyTorch: the tokens are bytes, the T5 is random, and the latents are pixels."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from pixart_jax.config import FeaturesConfig, TextEncoderConfig, TrainConfig
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.pipeline import Pipeline
from pixart_jax.weights.adapters import Adapter, Factors
from pixart_jax.weights.backbones import backbone_table

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


def make_adapter(seed: int = 0, config: PixArtConfig = MODEL, **changes) -> Adapter:
    """A random LoRA of rank 2 for every module of the network."""
    rng = np.random.default_rng(seed)
    modules = {}
    table = backbone_table("diffusers", config)
    for entry in table.entries:
        out, *inputs = table.their_shape(entry)
        if entry.path[-1] == "kernel":
            down, up = rng.normal(size=(2, *inputs)), rng.normal(size=(out, 2))
            modules[entry.key.removesuffix(".weight")] = Factors(
                down.astype(np.float32), up.astype(np.float32), 0.3, None
            )
    return Adapter(modules, **changes)
