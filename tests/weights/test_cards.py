import dataclasses
import json

import pytest

from pixart_jax.config import FeaturesConfig, GuidanceConfig, InitConfig, TrainConfig, from_dict, to_dict
from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.weights.cards import LICENCES, card, facts, published, read_licence, without_folders

CONFIG = TrainConfig(
    model=PixArtConfig(size_conditions=True, text_length=300),
    guidance=GuidanceConfig(null_text="t5_empty", scale=3.5),
    features=FeaturesConfig(image_size=512, latent_scale=0.13025),
)


@pytest.mark.parametrize("licence", LICENCES)
def test_a_card_states_its_licence_and_is_read_back(tmp_path, licence):
    text = card(CONFIG, licence, "source.pth", (), {})
    assert text.startswith(f"---\nlicense: {licence}\n") and LICENCES[licence] in text
    (tmp_path / "README.md").write_text(text)
    assert read_licence(tmp_path) == licence


def test_what_is_no_card_of_ours_has_no_licence(tmp_path):
    assert read_licence(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Somebody's model")
    assert read_licence(tmp_path) is None
    (tmp_path / "README.md").write_text(card(CONFIG, "other", "x", (), {}).replace("other", "my-own"))
    assert read_licence(tmp_path) is None


def test_a_card_describes_the_weights():
    manifest = {"step": 7, "config": {"name": "stage3"}, "versions": {"jax": "0"}}
    text = card(CONFIG, "other", "runs/stage3", ("first note", "second note"), manifest)
    for words in (
        "# PixArt-Σ weights",
        "tags: [pixart, text-to-image, pixart_jax]",
        "| made from | runs/stage3 |",
        "| size | XL/2: 28 blocks, width 1152, 16 heads |",
        "| trained at | 512 px |",
        "| latents | 4 channels, scaled by 0.13025 |",
        "| size conditions | yes |",
        "| text | 300 tokens of 4096 |",
        "null text 't5_empty'",
        "scale 3.5 |",
        "- first note\n- second note\n",
    ):
        assert words in text
    blocks = [json.loads(block.partition("```")[0]) for block in text.split("```json")[1:]]
    assert from_dict({"model": blocks[0]["model"]}).model == CONFIG.model and blocks[1] == manifest
    alpha = TrainConfig(model=PixArtConfig(text_length=120))
    assert "# PixArt-α weights" in card(alpha, "other", "x.pth", (), {})
    # If weights were only converted, the config in the manifest is not the one that they were trained with.
    converted = card(CONFIG, "other", "x.pth", (), {**manifest, "step": 0})
    assert '"stage3"' not in converted and '"versions"' in converted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/PixArt-XL-2-512x512", "PixArt-XL-2-512x512"),
        ("/home/me/PixArt-XL-2-512x512/vae/", "PixArt-XL-2-512x512/vae"),
        ("~/secret/data", "data"),
        ("C:\\\\Users\\\\me\\\\data", "data"),
        ("/home/a/x,data/y,/home/b/z", "x,data/y,z"),
        ("/home/me/prompts.txt|a red/blue fox", "prompts.txt|a red/blue fox"),
        ("PixArt-alpha/PixArt-XL-2-512x512", "PixArt-alpha/PixArt-XL-2-512x512"),
        ("gs://bucket/data", "gs://bucket/data"),
        ("/", ""),
    ],
)
def test_absolute_paths_lose_their_folders(text, shown):
    assert without_folders(text) == shown


def test_a_card_has_neither_checksums_nor_paths_nor_defaults():
    config = to_dict(dataclasses.replace(CONFIG, steps=7, init=InitConfig("weights", "/home/me/base")))
    manifest = {"step": 7, "config": config, "working_directory": "../..", "loader": {"fingerprint": "f"}}
    manifest |= {"checksums": {"ema": {f"['{i}']": i for i in range(300)}}, "sha256": "0" * 64}
    manifest["adapters"] = [{"name": "/home/me/a.safetensors", "weight": 0.5}]
    text = card(CONFIG, "other", "run", (), manifest)
    assert "/home" not in text and "checksums" not in text and "fingerprint" not in text
    shown = json.loads(text.split("## Training manifest\n\n```json")[1].partition("```")[0])
    assert shown["adapters"] == [{"name": "a.safetensors", "weight": 0.5}]
    assert shown["config"]["init"] == {"method": "weights", "path": "base"} and shown["config"]["steps"] == 7
    assert from_dict(shown["config"]) == dataclasses.replace(
        CONFIG, steps=7, init=InitConfig("weights", "base")
    )
    assert published(manifest)["config"]["optimizer"] == config["optimizer"]  # complete in the header


def test_the_card_of_a_dit_has_no_text():
    text = card(TrainConfig(model=DiTConfig()), "cc-by-nc-4.0", "DiT-XL-2.pt", (), {})
    assert "# DiT weights" in text and "tags: [dit, class-conditional, pixart_jax]" in text
    assert "| text |" not in text and "null text" not in text


def test_facts_are_what_an_official_file_does_not_contain():
    values = json.loads(facts(CONFIG, "openrail++"))
    assert from_dict(values.pop("guidance"), GuidanceConfig, "guidance.") == CONFIG.guidance
    schedule = {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    assert values.pop("diffusion") == schedule
    assert values.pop("clean_caption") is values.pop("lower_case") is True
    assert values == {"num_heads": 16, "latent_scale": 0.13025, "licence": "openrail++"}
