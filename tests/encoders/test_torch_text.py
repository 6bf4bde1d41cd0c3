import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image
from tiny_text_encoders import KINDS, POSITIONS, WIDTH, save_encoder, torch

from pixart_jax.config import FeaturesConfig, TextEncoderConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.planning import open_images
from pixart_jax.encoders.identity import encoder_files
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.encoders.torch_text import TorchNetwork
from pixart_jax.errors import UserError
from pixart_jax.on_the_fly import OnTheFlyDataset
from pixart_jax.pipeline.loading import load_pipeline
from pixart_jax.pipeline.memory import plan_memory
from pixart_jax.pipeline.sizes import Size
from pixart_jax.precompute import Options, precompute
from pixart_jax.training import samples
from pixart_jax.training.data import Prompt, check_features
from pixart_jax.weights.checkpoints import write_weights

CAPTIONS = [
    "a red fox",
    "",
    "the green cat sleeps under the tree at night",
    "a dog",
    "one two three " * 8,
]
LENGTH = 18
# Tokens that the tokenizers add before and after a text.
ADDED = {"gemma": (1, 0), "gpt2": (0, 0), "umt5": (0, 1)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (folder, PyTorch model, tokenizer)."""
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: (folder / kind, *save_encoder(folder / kind, kind)) for kind in KINDS}


def config_of(folder, **changes):
    given = dict(tokenizer=str(folder), weights=str(folder), tokenizer_subfolder="", dtype="float32")
    return TextEncoderConfig(**{**given, "clean_caption": False, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers(folders, kind):
    """One caption alone, without padding, gives the reference."""
    folder, model, tokenizer = folders[kind]
    encoder = TextEncoder(config_of(folder), LENGTH, batch_size=4)
    assert encoder.width == WIDTH
    features, lengths = encoder.encode(CAPTIONS)
    first, last = ADDED.get(kind, (1, 1))
    for caption, row, length in zip(CAPTIONS, features, lengths):
        bare = tokenizer(caption, truncation=False, padding=False, add_special_tokens=False)["input_ids"]
        ids = tokenizer(caption, truncation=False, padding=False)["input_ids"]
        assert len(ids) == len(bare) + first + last
        if len(ids) > LENGTH:
            ids = [*ids[: LENGTH - last], *ids[len(ids) - last :]]
            assert encoder.cut[-1].tokens == 24 + first + last
            assert encoder.cut[-1].removed == tokenizer.decode(bare[LENGTH - first - last :])
        ids = ids or [tokenizer.eos_token_id]  # GPT-2 has no token for ""
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0].numpy()
        assert length == len(ids)
        np.testing.assert_allclose(row[:length], expected, rtol=0, atol=2e-6)
        assert not row[length:].any()
    assert np.abs(features[0, 1:3] - features[3, 1:3]).max() > 0.1
    assert len(encoder.cut) == 1 and not encoder.unknown
    null, length = encoder.null_text()
    assert null.shape == (LENGTH, WIDTH) and np.isfinite(null).all() and length == lengths[1]
    np.testing.assert_allclose(null[:length], features[1, :length], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["bert", "gemma"])
def test_features_do_not_depend_on_the_batch(folders, kind):
    encoder = TextEncoder(config_of(folders[kind][0]), LENGTH, batch_size=4)
    together, _ = encoder.encode(["a cat", "two dog", *CAPTIONS])
    again, _ = encoder.encode(["a cat", "two dog", *CAPTIONS])
    np.testing.assert_array_equal(together, again)
    for caption, row in zip(CAPTIONS, together[2:]):
        np.testing.assert_allclose(encoder.encode([caption])[0][0], row, rtol=0, atol=2e-6)


def test_features_can_be_scaled(folders):
    folder = folders["bert"][0]
    plain, scaled = (
        TextEncoder(config_of(folder, scale=scale), LENGTH, batch_size=4).encode(CAPTIONS)[0]
        for scale in (1.0, 8.0)
    )
    np.testing.assert_array_equal(scaled, 8 * plain)
    with pytest.raises(UserError, match=r"scale is 8, and 'random' is a T5, whose features are used as they"):
        TextEncoder(TextEncoderConfig(tokenizer="byt5", weights="random", scale=8.0), LENGTH)


def test_unknown_words(folders):
    for kind in ("bert", "clip", "gemma"):
        encoder = TextEncoder(config_of(folders[kind][0]), LENGTH, load=False)
        encoder.tokenize(["a red fox", "a 橘 a"])
        (line,) = encoder.unknown
        assert (line.caption, line.unknown, line.characters) == ("a 橘 a", 1, "橘")


def test_loading_and_memory(folders, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(folders["clip"][0], here)
    encoder = TextEncoder(config_of(here), LENGTH, batch_size=2, load=False)
    network = encoder.network
    # The vision part is not counted, and not kept. On a CPU, JAX's devices hold nothing.
    count = sum(parameter.numel() for parameter in folders["clip"][1].parameters())
    assert (network.host_bytes, network.bytes_per_device, network.encoding_bytes) == (4 * count, 0, 0)
    half = config_of(here, dtype="bfloat16")
    assert TextEncoder(half, LENGTH, load=False).network.host_bytes == 2 * count
    features, _ = encoder.encode(CAPTIONS)
    here.rename(tmp_path / "away")
    np.testing.assert_array_equal(encoder.encode(CAPTIONS)[0], features)
    encoder.release()
    with pytest.raises(UserError, match="no such folder"):
        encoder.encode(CAPTIONS)
    (tmp_path / "away").rename(here)
    rounded = TextEncoder(half, LENGTH).encode(CAPTIONS)[0]
    assert 1e-4 < np.abs(rounded - features).max() < 0.1


@pytest.mark.parametrize(
    "kind, limit", [("bert", POSITIONS), ("roberta", POSITIONS - 2), ("gpt2", POSITIONS)]
)
def test_the_limit_of_positions(folders, kind, limit):
    config = config_of(folders[kind][0])
    TextEncoder(config, limit, batch_size=1).encode(["a red fox " * 20])
    with pytest.raises(UserError, match=rf"features.text_length is {limit + 1}, .* at most {limit} tokens"):
        TextEncoder(config, limit + 1, load=False)


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_input_errors_are_one_line(folders, tmp_path, capfd):
    bert = tmp_path / "bert"
    shutil.copytree(folders["bert"][0], bert)

    def refused(length=LENGTH, **changes):
        with pytest.raises(UserError) as error:
            TextEncoder(config_of(bert, **changes), length)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "weights_dtype is 'int8', which only T5 knows" in refused(weights_dtype="int8")
    assert "features.text_length is 1, but tokenizer" in refused(1)
    assert "but the text encoder" in refused(tokenizer="byt5")
    edit(bert, model_type="no_such_model")
    assert "does not know model_type 'no_such_model'" in refused()
    edit(bert, model_type="vit")
    assert "cannot open as a text encoder" in refused()
    edit(bert, model_type="bert", hidden_size=40)
    assert "cannot open as a text encoder" in refused()
    # transformers would fill a layer that the file lacks with random values.
    edit(bert, hidden_size=WIDTH, num_hidden_layers=3)
    assert "its weights lack 16 tensors, for example encoder.layer.2." in refused()
    edit(bert, num_hidden_layers=2)
    (bert / "model.safetensors").write_bytes(b"")
    assert "cannot open as a text encoder" in refused()
    assert capfd.readouterr().err == ""


def test_pytorch_is_named_if_it_is_missing(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'pixart_jax\[torch\]'"):
        TorchNetwork(config_of(folders["bert"][0]), LENGTH, 1)


def test_code_in_the_folder_is_not_run(folders, tmp_path):
    folder, canary = tmp_path / "bert", tmp_path / "canary"
    shutil.copytree(folders["bert"][0], folder)
    own = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForTextEncoding"), "own.Own")
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')\nclass Own: pass\n")
    edit(folder, auto_map=own)
    features, _ = TextEncoder(config_of(folder), LENGTH).encode(CAPTIONS)
    np.testing.assert_array_equal(
        features, TextEncoder(config_of(folders["bert"][0]), LENGTH).encode(CAPTIONS)[0]
    )
    edit(folder, model_type="own")
    with pytest.raises(UserError, match="does not know model_type 'own'"):
        TextEncoder(config_of(folder), LENGTH)
    assert not canary.exists()


def test_from_images_to_images(folders, tmp_path, random_params, monkeypatch):
    """Features, training on the fly, `log.prompts` and sampling have the same encoder."""
    text_encoder = config_of(folders["bert"][0])
    features = FeaturesConfig(
        image_size=tiny.SIDE,
        codec="pixels",
        latent_scale=1.0,
        text_length=LENGTH,
        text_dtype="float32",
        text_encoder=text_encoder,
    )
    model = dataclasses.replace(tiny.MODEL, text_dim=WIDTH, text_length=LENGTH)
    config = dataclasses.replace(tiny.CONFIG, features=features, model=model)
    images = tmp_path / "images"
    images.mkdir()
    captions = ["a red fox", "the green cat sleeps", " ".join(["a dog"] * 20)]
    for index, caption in enumerate(captions):
        Image.new("RGB", (tiny.SIDE, tiny.SIDE), (80 * index, 9, 9)).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(caption)
    options = Options(workers=1)
    source = open_images("auto", str(images), features, {})
    precompute(source, features, tmp_path / "features", options, say=lambda _: None)
    dataset = FeatureDataset(tmp_path / "features")
    check_features(config, dataset)
    assert len((tmp_path / "features" / "cut.jsonl").read_text().splitlines()) == 1
    flying = OnTheFlyDataset(str(images), features, say=lambda _: None, workers=1)
    np.testing.assert_array_equal(flying.null_text(), dataset.null_text())

    params = random_params(model)[1]
    params["null_text"] = dataset.null_text()
    write_weights(tmp_path / "run", params, config)
    pipe = load_pipeline(tmp_path / "run")
    stored = {record.captions[0].text: record.captions[0] for record in map(dataset.__getitem__, range(3))}
    embeddings = pipe.encode(captions)
    for caption, text, mask in zip(captions, *embeddings):
        np.testing.assert_allclose(text[mask], stored[caption].features, rtol=0, atol=2e-6)
    generated = pipe(captions[:1], steps=2)
    assert generated.shape == (1, tiny.SIDE, tiny.SIDE, 3) and generated.std() > 1
    plan = plan_memory(pipe, Size(*[tiny.SIDE] * 4), 1)
    assert plan.text_encoder == plan.encoding == 0
    assert plan.host > pipe.text_encoder.network.host_bytes > 0
    assert set(encoder_files(features)) == {
        "features.text_encoder.weights",
        "features.text_encoder.tokenizer",
    }

    encoded = []
    monkeypatch.setattr(TorchNetwork, "release", lambda self: encoded.append(self))
    samples.make_sample_grid(config, None, [Prompt("a red fox", 0)], epath.Path(tmp_path))
    assert len(encoded) == 1
