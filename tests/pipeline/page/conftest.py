"""Fixtures of the tests of the web page."""

import importlib.util

import jax
import pytest
import tiny
from flax import nnx
from web_page import Visitor, needs, open_browser

from pixart_jax.config import FeaturesConfig, TextEncoderConfig, TrainConfig
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.pipeline import Pipeline
from pixart_jax.pipeline.page import server


@pytest.fixture(scope="module")
def pipe(random_params):
    text = TextEncoderConfig(
        tokenizer="byt5", weights="random", d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1
    )
    model = PixArtConfig(
        size="custom", depth=1, hidden_size=16, num_heads=2, in_channels=3, text_dim=16, text_length=32
    )
    features = FeaturesConfig(image_size=32, codec="pixels", latent_scale=1.0, text_encoder=text)
    config = TrainConfig(model=model, features=features)
    encoder = TextEncoder(text, 32, batch_size=1)
    backbone = nnx.merge(*random_params(model))
    return Pipeline(backbone, config, encoder, make_codec(features), devices=jax.devices()[:1])


@pytest.fixture
def gradio():
    needs(importlib.util.find_spec("gradio"), "the extra 'app'")


@pytest.fixture
def browser(tmp_path):
    driver = open_browser(tmp_path / "profile")
    yield driver
    driver.quit()


@pytest.fixture
def served(pipe, gradio, tmp_path):
    with server.serve(pipe, {"checkpoint": "tiny"}, out=str(tmp_path / "out"), port=0, block=False) as page:
        yield Visitor(page)


@pytest.fixture
def adapted(pipe):
    """The pipeline with two adapters."""
    adapters = [
        (tiny.make_adapter(k, pipe.model.config, name=f"loras/{name}"), weight)
        for k, (name, weight) in enumerate([("ink.safetensors", 0.5), ("moss", 3.0)])
    ]
    devices = jax.devices()[:1]
    return Pipeline(
        pipe.model, pipe.config, pipe.text_encoder, pipe.codec, devices=devices, adapters=adapters
    )
