import dataclasses
import json
from pathlib import Path

import foreign
import pytest
from safetensors.numpy import save_file

from pixart_jax.config import DiffusionConfig, FeaturesConfig, GuidanceConfig, InitConfig, TrainConfig
from pixart_jax.convert import convert
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.weights.cards import FACTS_KEY
from pixart_jax.weights.families import ALPHA, SIGMA, choose_family, family_of
from pixart_jax.weights.loading import read_any

SMALL = {**foreign.SIZES["small"], "sizes": False}


def of_pipeline(folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def test_the_family_follows_from_captions_or_the_pipeline(tmp_path):
    alpha, sigma, other = (
        of_pipeline(tmp_path / kind, f"{kind}Pipeline") for kind in ("PixArtAlpha", "PixArtSigma", "Flux")
    )
    for null_caption, text_length, folders, family in (
        (None, None, [], ALPHA),
        (120, None, [], ALPHA),
        (300, None, [], SIGMA),
        (300, None, [alpha], SIGMA),
        (None, 300, [alpha], SIGMA),
        (None, 77, [], ALPHA),
        (None, None, [alpha], ALPHA),
        (None, None, [other, tmp_path], ALPHA),
        (None, None, [sigma], SIGMA),
        (None, 77, [sigma], SIGMA),
        (None, None, [alpha, sigma], SIGMA),
        (120, None, [sigma], ALPHA),  # the file outweighs the folder
    ):
        assert choose_family(null_caption, text_length, folders) is family
    assert [family_of(length) for length in (120, 300, 77, None)] == [ALPHA, SIGMA, ALPHA, ALPHA]


def test_alpha_has_the_defaults_of_a_config():
    features = FeaturesConfig()
    encoder = features.text_encoder
    assert (ALPHA.text_length, ALPHA.latent_scale) == (PixArtConfig().text_length, features.latent_scale)
    assert (ALPHA.clean_caption, ALPHA.lower_case) == (encoder.clean_caption, encoder.lower_case)


def test_what_files_of_sigma_do_not_state(tmp_path):
    """An official file, and a transformer folder whose text length is given."""
    official = tmp_path / "o.safetensors"
    save_file(foreign.official_state_dict(**{**SMALL, "tokens": 300}), official)
    foreign.diffusers_model(**SMALL).save_pretrained(tmp_path / "d")
    note = "read as PixArt-Sigma, with what its files do not state: {}."
    for path, given, notes in (
        (official, {}, "latent_scale 0.13025, clean_caption False, lower_case False"),
        (official, dict(latent_scale=0.5), "clean_caption False, lower_case False"),
        (official, dict(latent_scale=0.5, clean_caption=True), ""),
        (official, dict(clean_caption=False, lower_case=True), "latent_scale 0.13025"),
        (
            tmp_path / "d",
            dict(text_length=300),
            "latent_scale 0.13025, clean_caption False, lower_case False",
        ),
    ):
        read = read_any(path, num_heads=4, **given)
        assert list(read.notes) == ([note.format(notes)] if notes else [])
        features, encoder = read.config.features, read.config.features.text_encoder
        assert read.config.model.text_length == 300
        assert features.latent_scale == given.get("latent_scale", 0.13025)
        assert encoder.clean_caption is given.get("clean_caption", False)
        assert encoder.lower_case is given.get("lower_case", False)
    read = read_any(tmp_path / "d")
    assert (read.notes, read.config.model.text_length) == ((), 120)
    assert read.config.features.latent_scale == 0.18215
    assert read.config.features.text_encoder.clean_caption and read.config.features.text_encoder.lower_case


def test_the_config_of_a_run_says_which_captions_it_has(tmp_path):
    foreign.diffusers_model(**SMALL).save_pretrained(tmp_path / "d")
    assumed = TrainConfig(
        model=PixArtConfig(size="custom", depth=2, hidden_size=48, num_heads=4, text_dim=24, text_length=300),
        features=FeaturesConfig(latent_scale=0.3),
    )
    read = read_any(tmp_path / "d", assumed=assumed)
    assert (read.config.model.text_length, read.config.features.latent_scale) == (300, 0.3)
    assert not read.config.features.text_encoder.clean_caption
    assert [*read.notes] == [
        "read as PixArt-Sigma, with what its files do not state: clean_caption False, lower_case False."
    ]
    # Weights that a run adapts to another VAE, or that are in a pipeline of alpha, are not Sigma's.
    adapting = dataclasses.replace(assumed, init=InitConfig("weights", "d", new_vae=True))
    (tmp_path / "p").mkdir()
    (tmp_path / "d").rename(of_pipeline(tmp_path / "p/alpha", "PixArtAlphaPipeline") / "transformer")
    for path, config in (("p/alpha", assumed), ("p/alpha/transformer", adapting)):
        read = read_any(tmp_path / path, assumed=config)
        assert read.notes == () and read.config.features.text_encoder.clean_caption
        assert (read.config.model.text_length, read.config.features.latent_scale) == (300, 0.3)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_exports_of_this_project_state_it_themselves(tmp_path, suffix):
    source = tmp_path / "o.safetensors"
    save_file(foreign.official_state_dict(**{**SMALL, "tokens": 300}), source)
    given = dict(num_heads=4, clean_caption=True, latent_scale=0.7, say=lambda line: None)
    convert(source, tmp_path / f"e{suffix}", "official", **given)
    read = read_any(tmp_path / f"e{suffix}")
    assert (read.notes, read.config.features.latent_scale) == ((), 0.7)
    encoder = read.config.features.text_encoder
    assert encoder.clean_caption and not encoder.lower_case
    # Version 0.1 converted uncleaned captions to lower case, and said nothing about it.
    facts = json.dumps({"num_heads": 4, "clean_caption": False})
    save_file(foreign.official_state_dict(**{**SMALL, "tokens": 300}), source, {FACTS_KEY: facts})
    old = read_any(source).config
    assert not old.features.text_encoder.clean_caption and old.features.text_encoder.lower_case
    assert (old.features.latent_scale, old.diffusion, old.guidance.null_text) == (
        FeaturesConfig().latent_scale,
        DiffusionConfig(),
        GuidanceConfig(null_text="token").null_text,
    )
