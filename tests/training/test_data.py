import dataclasses
import re
import types

import pytest
from feature_folders import TEXT_LENGTH, WIDTH, three_shards
from source_files import crops, write_folder, write_tar

from pixart_jax.config import DataConfig, FeaturesConfig, TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training.data import check_continuation, check_features, open_dataset

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


@pytest.mark.parametrize("kind", ["folder", "manifest", "tar", "json", "pattern"])
def test_images_in_place_of_features(tmp_path, kind):
    """The message suggests another folder, not to write features into that of the images."""
    if kind in ("folder", "manifest"):
        path = write_folder(tmp_path / "photos", crops())
        if kind == "manifest":  # somebody else's
            (path / "manifest.json").write_text("[]")
    elif kind == "tar":
        path = tmp_path / "photos"
        path.mkdir()
        write_tar(path / "1.tar", [("a.png", crops()["a.png"][0])])
    else:
        path = tmp_path / ("photos.json" if kind == "json" else "photos-{000..123}.tar")
    with pytest.raises(UserError, match="holds images, but a run reads features") as error:
        open_dataset(str(path), "configs/stage2.py")
    message = str(error.value)
    out = re.search(r"--out=(\S+)`", message)[1]
    assert out == "features/photos" and f"--images={path}" in message and "\n" not in message
    assert "--config.data.on_the_fly=True" in message


@pytest.mark.parametrize("files", [[], ["job.json"], ["manifest.json"]])
def test_unfinished_features_are_not_images(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match=r"--images=IMAGES --out=") as error:
        open_dataset(str(tmp_path))
    assert "delete" not in str(error.value)


def test_changed_data_needs_a_decision():
    loader = types.SimpleNamespace(fingerprint="new", earlier_fingerprint="first version")
    state = {"step": 30, "fingerprint": "old"}
    saved = dataclasses.replace(CONFIG, data=DataConfig(train="a"))
    config = dataclasses.replace(CONFIG, data=DataConfig(train="a,b"))
    with pytest.raises(UserError, match="changed since the checkpoint of step 30") as error:
        check_continuation(config, saved, loader, state)
    message = str(error.value)
    for words in (
        "data.train was 'a', now 'a,b'",
        "--config.data.first_step=30",
        "--config.init.method=weights",
        "--config.init.path",
    ):
        assert words in message
    for fingerprint in ("new", "first version"):
        check_continuation(config, saved, loader, {"step": 30, "fingerprint": fingerprint})
    decided = dataclasses.replace(config, data=DataConfig(train="a,b", first_step=30))
    check_continuation(decided, saved, loader, state)
    with pytest.raises(UserError, match=r"data.first_step was 0, now 30"):
        check_continuation(decided, saved, loader, state | {"step": 40})
    with pytest.raises(UserError, match="seed is 1"):
        check_continuation(dataclasses.replace(decided, seed=1), saved, loader, state)
