import dataclasses
import gc
import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from pixart_jax.config import TextEncoderConfig
from pixart_jax.data.digits import WORDINGS, caption_for
from pixart_jax.encoders.t5 import load_t5, random_t5
from pixart_jax.encoders.text import TextEncoder, load_tokenizer
from pixart_jax.errors import UserError
from pixart_jax.models.t5 import T5Config, T5Encoder

TINY = dict(d_model=24, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
RANDOM = TextEncoderConfig(tokenizer="byt5", weights="random", clean_caption=False, dtype="float32", **TINY)
CAPTIONS = ["a handwritten seven", "", "the digit 7 written by hand", "x" * 30, "ein käse"]
LENGTH = 24


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(RANDOM, LENGTH, batch_size=8)


def test_the_batch_is_spread_over_all_local_devices(encoder):
    features = encoder.encode_each(["a"] * 8)
    next(features)
    # When the first caption is returned, the features of all eight captions exist, one row on each device.
    (array,) = (a for a in jax.live_arrays() if a.ndim == 3 and a.shape[::2] == (8, 24))
    assert len(array.sharding.device_set) == jax.local_device_count() == 8
    assert array.sharding.shard_shape(array.shape)[0] == 1
    small = TextEncoder(RANDOM, LENGTH, batch_size=3)
    np.testing.assert_allclose(small.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0], rtol=0, atol=1e-5)


def test_a_random_encoder_is_the_same_everywhere_and_distinguishes_digits():
    t5 = T5Config(vocab_size=384, dtype="float32", **TINY)
    one, other = random_t5(t5, 0), random_t5(t5, 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, random_t5(t5, 0)))
    # The first values of NumPy's legacy generator, which are the same in every version of NumPy.
    first = one["blocks"]["stacked"]["attn"]["k"].ravel()[:3] * 24**0.5
    np.testing.assert_allclose(first, [1.764052, 0.400157, 0.978738], rtol=1e-5)
    assert not np.array_equal(one["blocks"]["stacked"]["ff"]["wo"], other["blocks"]["stacked"]["ff"]["wo"])
    # The weights have the same scales as the initial weights of `T5Encoder`.
    key = jax.random.key(0, impl="rbg")  # compiles faster
    drawn = jax.jit(lambda: nnx.to_pure_dict(nnx.state(T5Encoder(t5, rngs=nnx.Rngs(params=key)))))()
    ratios = jax.tree.map(lambda a, b: float(np.std(a) / np.std(b)) if np.std(b) else 1.0, one, drawn)
    assert all(0.8 < ratio < 1.25 for ratio in jax.tree.leaves(ratios))

    captions = [caption_for(digit, w) for digit in range(10) for w in range(len(WORDINGS))]
    features, lengths = TextEncoder(RANDOM, 48).encode(captions)
    pooled = np.stack([row[:length].mean(0) for row, length in zip(features, lengths)])
    distance = np.linalg.norm(pooled[:, None] - pooled, axis=-1) + 1e9 * np.eye(len(pooled))
    assert distance.min() > 0.05 * np.linalg.norm(pooled, axis=1).mean()


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A tiny T5 encoder written by transformers, in several files."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=3, feed_forward_proj="gated-gelu"
    )
    model = transformers.T5EncoderModel(config).eval()
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, model


def test_released_weights_give_what_transformers_gives(t5_folder):
    torch = pytest.importorskip("torch")
    folder, model = t5_folder
    encoder = TextEncoder(TextEncoderConfig(**{**vars(RANDOM), "weights": str(folder)}), LENGTH)
    assert encoder.width == 32
    features, lengths = encoder.encode(CAPTIONS)
    tokens = load_tokenizer(RANDOM)(
        [*CAPTIONS, ""], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(tokens.input_ids, attention_mask=tokens.attention_mask)[0].numpy()
    np.testing.assert_array_equal(lengths, tokens.attention_mask.sum(1)[:-1])
    for row, length, reference in zip(features, lengths, expected):
        np.testing.assert_allclose(row[:length], reference[:length], rtol=0, atol=2e-5)
    null, length = encoder.null_text()
    np.testing.assert_allclose(null, expected[-1], rtol=0, atol=2e-5)
    assert length == 1


def test_a_tokenizer_of_another_model_raises(t5_folder, tmp_path):
    folder, _ = t5_folder
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 40}))
    with pytest.raises(UserError, match="does not fit a T5 encoder"):
        TextEncoder(TextEncoderConfig(**{**vars(RANDOM), "weights": str(tmp_path)}), LENGTH)
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(UserError):
        TextEncoder(TextEncoderConfig(**{**vars(RANDOM), "weights": str(tmp_path)}), LENGTH)


def bytes_on_a_device():
    gc.collect()  # arrays of earlier tests may be garbage
    device = jax.local_devices()[0]
    held = (array for array in jax.live_arrays() if device in array.sharding.device_set)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in held)


def test_sharded_weights_give_the_same_bits_and_need_less_memory(t5_folder):
    folder, _ = t5_folder
    config = TextEncoderConfig(**{**vars(RANDOM), "weights": str(folder)})
    whole = TextEncoder(config, LENGTH, batch_size=8)
    before = bytes_on_a_device()
    sharded = TextEncoder(config, LENGTH, batch_size=8, sharded=True)
    assert bytes_on_a_device() - before == sharded.network.bytes_per_device
    for one, other in zip(whole.encode(CAPTIONS), sharded.encode(CAPTIONS)):
        np.testing.assert_array_equal(one, other)
    # Everything is sharded over the 8 devices, except the 32 x 4 position bias, which has no axis to shard.
    bias = 32 * 4 * 4
    assert sharded.network.bytes_per_device - bias == (whole.network.bytes_per_device - bias) / 8


def test_weights_are_read_when_first_needed_and_again_after_a_release(t5_folder, tmp_path):
    here, away = tmp_path / "t5", tmp_path / "away"
    shutil.copytree(t5_folder[0], here)
    config = TextEncoderConfig(**{**vars(RANDOM), "weights": str(here)})
    before = bytes_on_a_device()
    encoder = TextEncoder(config, LENGTH, batch_size=8, load=False)
    assert bytes_on_a_device() == before
    features, _ = encoder.encode(CAPTIONS)
    # Loaded weights are kept, so their folder is no longer needed.
    here.rename(away)
    np.testing.assert_array_equal(encoder.encode(CAPTIONS)[0], features)
    assert bytes_on_a_device() - before == encoder.network.bytes_per_device
    encoder.release()
    assert bytes_on_a_device() == before
    with pytest.raises(UserError, match="no such folder"):
        encoder.encode(CAPTIONS)
    away.rename(here)
    np.testing.assert_array_equal(encoder.encode(CAPTIONS)[0], features)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_in_int8(t5_folder, dtype):
    folder, _ = t5_folder
    exact = TextEncoderConfig(**{**vars(RANDOM), "weights": str(folder), "dtype": dtype})
    config = dataclasses.replace(exact, weights_dtype="int8")
    _, before = load_t5(exact, 384)
    _, after = load_t5(config, 384)
    before, after = map(nnx.traversals.flatten_mapping, (before, after))
    quantized = {path for path in after if after[path].dtype == np.int8}
    assert {path[-1] for path in quantized} == {"q", "k", "v", "o", "wi_0", "wi_1"}
    for path, value in before.items():
        if path not in quantized:  # wo, the embedding, norms and the position bias
            assert after[path].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(after[path], value)
    # d_model 32, 4 heads of 8, d_ff 48, 3 layers: an int8 is a byte, a scale has four.
    kernels, scales = 3 * (4 * 32 * 32 + 2 * 32 * 48), 3 * (4 * 32 + 2 * 48)
    rest = 384 * 32 + 32 * 4 + 32 + 3 * (2 * 32 + 48 * 32)
    size = kernels + 4 * scales + rest * np.dtype(dtype).itemsize
    assert sum(value.nbytes for value in after.values()) == size

    held = bytes_on_a_device()
    encoder = TextEncoder(config, LENGTH)
    assert bytes_on_a_device() - held == encoder.network.bytes_per_device == size
    # The largest parameter that is quantized is wi_0.
    assert encoder.network.bytes_of_largest == 3 * 32 * 48 * np.dtype(dtype).itemsize
    if dtype == "bfloat16":
        return
    features, expected = (one.null_text()[0] for one in (encoder, TextEncoder(exact, LENGTH)))
    assert 1e-4 < np.linalg.norm(features - expected) / np.linalg.norm(expected) < 0.02


def test_sharded_weights_in_int8_give_the_same_bits(t5_folder):
    config = TextEncoderConfig(**{**vars(RANDOM), "weights": str(t5_folder[0]), "weights_dtype": "int8"})
    whole = TextEncoder(config, LENGTH, batch_size=8)
    before = bytes_on_a_device()
    sharded = TextEncoder(config, LENGTH, batch_size=8, sharded=True)
    assert (
        bytes_on_a_device() - before
        == sharded.network.bytes_per_device
        < 0.3 * whole.network.bytes_per_device
    )
    np.testing.assert_array_equal(whole.null_text()[0], sharded.null_text()[0])
