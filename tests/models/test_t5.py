import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models import dtypes
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from pixart_jax.weights.t5 import t5_table
from pixart_jax.weights.tables import import_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# The number of heads times the head width differs from the model width, which T5 allows.
TINY = dict(
    vocab_size=99, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
)


def torch_encoder(**changes):
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**{**TINY, **changes})).eval()
    with torch.no_grad():
        # Initial norm scales are all one and the initial position bias is small: make both matter.
        for name, value in model.named_parameters():
            if "layer_norm" in name:
                value.add_(0.3 * torch.randn_like(value))
            if "relative_attention_bias" in name:
                value.mul_(5)
    return model


def ours(model, dtype="float32", stored=np.float32, **changes):
    """Makes the JAX encoder with the weights of the PyTorch model, from its config.json."""
    config = T5Config.from_hf(json.loads(model.config.to_json_string()), dtype=dtype)
    config = dataclasses.replace(config, **changes)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    graph = nnx.graphdef(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, import_tensors(t5_table(config), tensors, stored))


def batch(length, rows=3, seed=0):
    """Token ids and a mask: one full row, one row with a single token, and rows of random length."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, TINY["vocab_size"], (rows, length)).astype(np.int32)
    lengths = np.array([length, 1, *rng.integers(1, length + 1, rows - 2)])
    return ids, (np.arange(length) < lengths[:, None]).astype(np.int32)


def torch_features(model, ids, mask):
    with torch.no_grad():
        out = model(torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long))
    return out.last_hidden_state.float().numpy()


@pytest.fixture(scope="module")
def pair():
    model = torch_encoder()
    return model, ours(model)


@pytest.mark.parametrize("length", [1, 2, 7, 40, 120, 300])
def test_features_match_transformers(pair, length):
    model, encoder = pair
    ids, mask = batch(length)
    features = jax.jit(lambda i, m: encoder(i, m))(ids, mask)
    assert features.dtype == jnp.float32 and features.shape == (3, length, 24)
    expected, valid = torch_features(model, ids, mask), mask.astype(bool)
    assert np.abs(expected[valid]).max() > 0.5
    np.testing.assert_allclose(features[valid], expected[valid], atol=2e-5, rtol=0)


def test_features_of_other_architecture_settings_match_transformers():
    changes = dict(
        feed_forward_proj="relu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-3,
        num_layers=1,
    )
    model = torch_encoder(**changes)
    ids, mask = batch(33)
    features = ours(model)(ids, mask)
    np.testing.assert_allclose(
        features[mask > 0], torch_features(model, ids, mask)[mask > 0], atol=2e-5, rtol=0
    )


def test_features_of_mt5_match_transformers():
    """mT5 has the layers of T5 v1.1, which a config file need not say, and an embedding of its own."""
    torch.manual_seed(0)
    shape = {name: value for name, value in TINY.items() if name != "feed_forward_proj"}
    model = transformers.MT5EncoderModel(transformers.MT5Config(**shape)).eval()
    values = json.loads(model.config.to_json_string())
    assert values["model_type"] == "mt5"
    assert T5Config.from_hf({"model_type": "mt5", **shape}).feed_forward_proj == "gated-gelu"
    ids, mask = batch(33)
    np.testing.assert_allclose(
        ours(model)(ids, mask)[mask > 0], torch_features(model, ids, mask)[mask > 0], atol=2e-5, rtol=0
    )


def test_scanned_and_unrolled_blocks_agree(pair):
    model, encoder = pair
    ids, mask = batch(16)
    np.testing.assert_allclose(
        ours(model, scan_layers=False)(ids, mask), encoder(ids, mask), atol=1e-5, rtol=0
    )


def test_masked_tokens_have_no_influence(pair):
    ids, mask = batch(20)
    mask[0, [3, 8]] = 0  # padding in the middle, not only at the end
    changed = np.where(mask > 0, ids, (ids + 7) % 99).astype(np.int32)
    assert (changed != ids).any()
    features, other = pair[1](ids, mask), pair[1](changed, mask)
    np.testing.assert_array_equal(features[mask > 0], other[mask > 0])
    assert np.abs(features - other).max() > 0.1


def test_padding_does_not_change_features(pair):
    ids, _ = batch(10, rows=2)
    alone = pair[1](ids, np.ones_like(ids))
    padded = pair[1](np.pad(ids, ((0, 0), (0, 30))), np.pad(np.ones_like(ids), ((0, 0), (0, 30))))
    np.testing.assert_allclose(padded[:, :10], alone, atol=1e-5)


def test_a_row_without_tokens_is_finite_and_an_unknown_token_gives_nan(pair):
    ids, mask = batch(6)
    mask[1] = 0
    assert np.isfinite(pair[1](ids, mask)).all()
    ids[2, 0] = TINY["vocab_size"]
    features = np.asarray(pair[1](ids, mask))
    assert np.isnan(features[2]).any() and np.isfinite(features[:2]).all()


@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 20), (32, 300), (6, 5)])
def test_buckets_match_transformers(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, buckets, distance).numpy()
    np.testing.assert_array_equal(relative_buckets(300, buckets, distance), expected)


def test_buckets_match_a_computation_by_hand():
    # 16 buckets per direction: 0..7 are exact distances, then 8 + floor(8 log(d / 8) / log(16)).
    row = relative_buckets(300, 32, 128)[0]
    assert row[0] == 0 and row[7] == 16 + 7 and row[8] == 16 + 8
    assert row[11] == 16 + 8 and row[12] == 16 + 9 and row[127] == row[299] == 31
    np.testing.assert_array_equal(relative_buckets(300, 32, 128)[1:, 0], row[1:] - 16)


def test_bfloat16_is_close_and_works_from_bfloat16_weights(pair):
    model, encoder = pair
    ids, mask = batch(40)
    exact = encoder(ids, mask)[mask > 0]
    for stored in (np.float32, ml_dtypes.bfloat16):
        half = ours(model, dtype="bfloat16", stored=stored)
        assert half.embed.dtype == stored
        features = half(ids, mask)
        assert features.dtype == jnp.float32
        error = jnp.linalg.norm(features[mask > 0] - exact) / jnp.linalg.norm(exact)
        assert 1e-4 < error < 2e-2


def test_bfloat16_keeps_the_residual_stream_in_float32():
    # The embeddings are a thousand times larger than the outputs of blocks, as in late layers of deep models.
    # bfloat16 would round the sum to 3 digits. The matrix products have 3 digits too, but contribute little.
    model = torch_encoder()
    with torch.no_grad():
        model.shared.weight.mul_(1000)
    ids, mask = batch(20)
    exact = torch_features(model, ids, mask)[mask > 0]
    features = ours(model, dtype="bfloat16")(ids, mask)[mask > 0]
    assert np.linalg.norm(features - exact) / np.linalg.norm(exact) < 1e-4


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_float16_is_close(pair, stored):
    model, encoder = pair
    ids, mask = batch(40)
    exact = encoder(ids, mask)[mask > 0]
    half = ours(model, dtype="float16", stored=stored)
    assert half.embed.dtype == stored
    features = jax.jit(lambda i, m: half(i, m))(ids, mask)
    assert features.dtype == jnp.float32
    error = jnp.abs(features[mask > 0] - exact).max() / jnp.abs(exact).max()
    assert 1e-5 < error < 3e-3


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
@pytest.mark.parametrize("layers", [("wi", "wi_0", "wi_1"), ("wo",), ("v",), ("o",)], ids="-".join)
def test_float16_handles_products_beyond_its_range(layers, feed_forward):
    """The feed-forward layers of T5 v1.1 XXL produce such values. The residual stream must be correct."""
    model = torch_encoder(feed_forward_proj=feed_forward)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.split(".")[-2] in layers:
                value.mul_((1e4 if "wi" in layers else 6e4) / value.abs().max())
    ids, mask = batch(20)
    exact = torch_features(model, ids, mask)[mask > 0]
    features = ours(model, dtype="float16", stored=np.float16)(ids, mask)[mask > 0]
    assert np.isfinite(features).all()
    assert np.abs(features - exact).max() / np.abs(exact).max() < 5e-3


def test_initial_weights_have_the_scale_of_transformers():
    config = T5Config(**{**TINY, "d_model": 64, "d_ff": 128, "vocab_size": 500})
    params = nnx.to_pure_dict(nnx.state(T5Encoder(config, rngs=nnx.Rngs(0))))
    table = t5_table(config)
    torch.manual_seed(0)
    fresh = transformers.T5EncoderModel(
        transformers.T5Config(**{**TINY, "d_model": 64, "d_ff": 128, "vocab_size": 500})
    )
    theirs = import_tensors(table, {name: value.numpy() for name, value in fresh.state_dict().items()})
    compared = jax.tree.map(lambda a, b: (float(jnp.std(a)), float(np.std(b))), params, theirs)
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(compared, is_leaf=lambda x: isinstance(x, tuple)):
        assert a == pytest.approx(b, rel=0.15), path
    layers = params["blocks"]["stacked"]["attn"]["q"]
    assert np.abs(layers[0] - layers[1]).max() > 0.01


def test_features_of_random_weights_are_normalized_and_depend_on_the_seed():
    config = T5Config(**TINY)
    ids, mask = batch(12)
    one, two = (T5Encoder(config, rngs=nnx.Rngs(seed))(ids, mask) for seed in (0, 1))
    np.testing.assert_allclose(jnp.square(one).mean(axis=-1), 1.0, atol=1e-3)
    assert np.abs(one - two).max() > 0.5


def test_parameters_and_activations_have_logical_axes():
    encoder = nnx.eval_shape(lambda: T5Encoder(T5Config(**TINY), rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(encoder)):
        axes = variable.get_metadata()["out_sharding"]
        assert len(axes) == len(variable.shape), path
        assert (axes[0] == "layers") == (path[0] == "blocks"), path
    seen = set()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def rule(axes):
        seen.add(axes)
        return device

    ids, mask = batch(4)
    with activation_sharding(rule):
        jax.jit(lambda i, m: T5Encoder(T5Config(**TINY), rngs=nnx.Rngs(0))(i, m)).lower(ids, mask)
    assert seen == {
        ("batch", "tokens", None),
        ("batch", "tokens", "heads", None),
        ("batch", "tokens", "mlp"),
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "umt5"}, "'umt5'"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({"feed_forward_proj": "gated_gelu"}, "Did you mean 'gated-gelu'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"d_kv": "64"}, "d_kv is '64'"),
        ({"num_heads": True}, "num_heads is True"),
        ({"relative_attention_num_buckets": 2}, "at least 4 buckets"),
        ({"relative_attention_max_distance": 8}, "the distance must exceed"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None"),
    ],
)
def test_from_hf_rejects_unsupported_configs_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        T5Config.from_hf({"model_type": "t5", **TINY, **changes})
    assert "\n" not in str(error.value)


def test_from_hf_names_missing_fields_and_has_defaults_for_old_files():
    with pytest.raises(UserError, match="d_ff, num_heads missing"):
        T5Config.from_hf(
            {"model_type": "t5", **{k: v for k, v in TINY.items() if k not in ("d_ff", "num_heads")}}
        )
    old = T5Config.from_hf({"model_type": "t5", **TINY})
    assert (old.relative_attention_num_buckets, old.relative_attention_max_distance) == (32, 128)


def test_from_hf_reads_the_xxl_config():
    hf = transformers.T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    assert T5Config.from_hf(json.loads(hf.to_json_string())) == T5Config()


@pytest.mark.parametrize(
    "ids, mask, message",
    [
        (np.zeros((2, 3), np.int32), np.ones((2, 4)), "mask"),
        (np.zeros(3, np.int32), np.ones(3), "token_ids"),
        (np.zeros((2, 3)), np.ones((2, 3)), "integers"),
    ],
)
def test_encoder_rejects_wrong_shapes(pair, ids, mask, message):
    with pytest.raises(UserError, match=message):
        pair[1](ids, mask)


def test_an_unknown_dtype_raises():
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        T5Config(dtype="int8")


def test_bfloat16_on_an_older_gpu_raises(monkeypatch):
    monkeypatch.setattr(dtypes, "cuda_capability", lambda: 7.5)
    with pytest.raises(UserError, match=r"the text encoder's dtype is 'bfloat16', but the GPU.*7\.5"):
        T5Encoder(T5Config(**TINY, dtype="bfloat16"), rngs=nnx.Rngs(0))
