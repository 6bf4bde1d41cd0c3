import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.config import FeaturesConfig, GuidanceConfig, TrainConfig
from pixart_jax.denoiser import Denoiser, init_params
from pixart_jax.models.configs import NULL_TEXT, DiTConfig, PixArtConfig

SHAPE = dict(size="custom", depth=1, hidden_size=24, num_heads=2)
MODEL = PixArtConfig(**SHAPE, text_dim=8, text_length=5)
DIT = DiTConfig(**SHAPE)


def test_initial_weights_depend_only_on_the_seed():
    first, again, other = (jax.jit(lambda seed=seed: init_params(MODEL, seed))() for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first["t_block"]["kernel"] != other["t_block"]["kernel"])


@pytest.mark.parametrize(
    ("null_text", "null_mask", "expected"),
    [
        ("t5_empty", "caption", [1, 1, 1, 0, 0]),
        ("t5_empty", "own", [1, 0, 0, 0, 0]),
        ("token", "own", [1, 1, 1, 1, 1]),
    ],
)
def test_a_dropped_caption_uses_the_configured_mask(null_text, null_mask, expected):
    guidance = GuidanceConfig(null_text=null_text, null_mask=null_mask)
    config = TrainConfig(model=MODEL, guidance=guidance)
    batch = {
        "text": jnp.ones((2, 5, 8)),
        "text_mask": jnp.asarray([[1, 1, 1, 0, 0]] * 2, bool),
    }
    params = {NULL_TEXT: jnp.full((5, 8), 7.0)}
    denoiser = Denoiser.of(config)
    found = denoiser.drop_conditions(params, denoiser.conditions(batch), jnp.asarray([False, True]))
    np.testing.assert_array_equal(found["text"][:, 0, 0], [1, 7])
    np.testing.assert_array_equal(found["text_mask"].astype(int), [[1, 1, 1, 0, 0], expected])


def test_a_dropped_class_becomes_the_last_label():
    config = TrainConfig(model=dataclasses.replace(DIT, num_classes=3), features=FeaturesConfig(text=False))
    found = Denoiser.of(config).drop_conditions(
        {}, {"label": jnp.asarray([0, 1])}, jnp.asarray([False, True])
    )
    np.testing.assert_array_equal(found["label"], [0, 3])


def test_size_conditions_are_the_same_with_and_without_a_caption(random_params):
    """Guidance changes only the caption."""
    config = TrainConfig(model=dataclasses.replace(MODEL, size_conditions=True))
    batch = {
        "text": jnp.ones((2, 5, 8)),
        "text_mask": jnp.ones((2, 5)),
        "image_size": jnp.asarray([[30.0, 40.0]] * 2),
        "aspect_ratio": jnp.full((2, 1), 0.75),
        "label": jnp.zeros(2, jnp.int32),
    }
    denoiser = Denoiser.of(config)
    conditions = denoiser.conditions(batch)
    assert list(conditions) == ["text", "text_mask", "image_size", "aspect_ratio"]
    null = denoiser.null_conditions(random_params(config.model)[1], conditions)
    for name in ("image_size", "aspect_ratio"):
        np.testing.assert_array_equal(null[name], conditions[name])
    assert not np.array_equal(null["text"], conditions["text"])
