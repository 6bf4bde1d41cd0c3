import dataclasses

import pytest
from feature_folders import TEXT_LENGTH, WIDTH, three_shards

from pixart_jax.config import FeaturesConfig, TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training.data import check_features, open_dataset

MODEL = PixArtConfig(
    size="custom", depth=1, hidden_size=24, num_heads=2, text_dim=WIDTH, text_length=TEXT_LENGTH
)
CONFIG = TrainConfig(model=MODEL, features=FeaturesConfig(text_length=TEXT_LENGTH))


def test_features_must_match_the_config(tmp_path):
    dataset = open_dataset(str(three_shards(tmp_path / "features")))
    check_features(CONFIG, dataset)
    check_features(dataclasses.replace(CONFIG, model=DiTConfig()), dataset)
    for changes, words in (
        (dict(features=FeaturesConfig(codec="pixels")), "features.codec is pixels"),
        (dict(features=FeaturesConfig(latent_scale=0.13025)), r"set --config.features.latent_scale=0.18215"),
        (dict(model=dataclasses.replace(MODEL, in_channels=16)), "model.in_channels is 16, .* have 4"),
        (dict(model=dataclasses.replace(MODEL, text_dim=4096)), "model.text_dim is 4096, .* have 8"),
    ):
        with pytest.raises(UserError, match=words) as error:
            check_features(dataclasses.replace(CONFIG, **changes), dataset)
        assert "\n" not in str(error.value)
