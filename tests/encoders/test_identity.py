import dataclasses

import numpy as np

from pixart_jax.config import FeaturesConfig, TextEncoderConfig
from pixart_jax.encoders.identity import encoder_files


def test_a_changed_file_changes_the_hash(tmp_path):
    for name in ("vae", "t5", "tokenizers/tokenizer"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    weights = np.zeros(6 << 20, np.uint8)
    (tmp_path / "t5/model.safetensors").write_bytes(weights.tobytes())
    text = TextEncoderConfig(weights=f"{tmp_path}/t5", tokenizer=f"{tmp_path}/tokenizers")
    config = FeaturesConfig(vae=f"{tmp_path}/vae", text_encoder=text)
    first = encoder_files(config)
    assert list(first) == ["features.vae", "features.text_encoder.weights", "features.text_encoder.tokenizer"]
    (tmp_path / "vae/notes.md").write_text("not a part of the encoder")
    assert encoder_files(config) == first
    for path, field in (
        ("vae/config.json", "features.vae"),
        ("tokenizers/tokenizer/config.json", "features.text_encoder.tokenizer"),
    ):
        (tmp_path / path).write_text("{} ")
        changed = encoder_files(config)
        assert {name for name in first if changed[name] != first[name]} == {field}
        (tmp_path / path).write_text("{}")
    (tmp_path / "t5/model.safetensors").write_bytes((weights + 1).tobytes())
    assert encoder_files(config)["features.text_encoder.weights"] != first["features.text_encoder.weights"]
    # All formats that are read, also pickles.
    for path, field in (("t5", "features.text_encoder.weights"), ("vae", "features.vae")):
        before = encoder_files(config)
        (tmp_path / path / "pytorch_model.bin").write_bytes(b"weights")
        assert encoder_files(config)[field] != before[field]


def test_encoders_without_a_local_folder_are_left_out():
    assert encoder_files(FeaturesConfig()) == {}
    text = TextEncoderConfig(weights="random", tokenizer="byt5")
    assert encoder_files(FeaturesConfig(codec="pixels", vae="", text_encoder=text)) == {}
    assert encoder_files(dataclasses.replace(FeaturesConfig(), text=False)) == {}
