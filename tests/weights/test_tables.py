import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models.t5 import T5Config, T5Encoder
from pixart_jax.models.vae import VAE, VAEConfig
from pixart_jax.weights.tables import (
    CONVOLUTION,
    SAME,
    VECTOR,
    Entry,
    Table,
    dense,
    export_shapes,
    export_tensors,
    import_parameters,
    import_tensors,
    parameter_shapes,
    t5_table,
    vae_table,
)

T5 = T5Config(vocab_size=30, d_model=12, d_kv=3, d_ff=20, num_layers=2, num_heads=2)
VAE_TINY = VAEConfig(block_out_channels=(8, 12), norm_num_groups=2, layers_per_block=1)
TABLES = {
    "t5": lambda: t5_table(T5),
    "t5 v1.0": lambda: t5_table(T5Config(**{**T5.__dict__, "feed_forward_proj": "relu"})),
    "vae": lambda: vae_table(VAE_TINY),
}


def random_tensors(table, seed=0):
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in export_shapes(table).items()}


@pytest.fixture(params=TABLES)
def table(request):
    return TABLES[request.param]()


# --- A table by hand: stacked, fused, convolution, old names ------------------------------------------

HAND = Table(
    name="a hand-made model",
    entries=(
        *(
            Entry(("qkv", "kernel"), f"{layer}.to_{name}.weight", dense(), (layer, slice(None), part))
            for layer in range(2)
            for part, name in enumerate("qkv")
        ),
        *(Entry(("qkv", "bias"), f"{layer}.qkv.bias", VECTOR, (layer,)) for layer in range(2)),
        Entry(("out",), "out.weight", dense(inputs=2, or_convolution=True), aliases=("proj.weight",)),
        Entry(("patch", 0), "patch.weight", CONVOLUTION),
        Entry(("table",), "table"),
    ),
    shapes={
        ("qkv", "kernel"): (2, 5, 3, 2, 4),
        ("qkv", "bias"): (2, 3, 2, 4),
        ("out",): (2, 4, 5),
        ("patch", 0): (3, 3, 4, 5),
        ("table",): (6, 5),
    },
    ignored=(r"pos_embed", r"decoder\..+"),
)


def test_layouts_by_hand():
    tensors = random_tensors(HAND)
    assert {key: value.shape for key, value in tensors.items()}["0.to_q.weight"] == (8, 5)
    params = import_tensors(HAND, tensors)
    x = np.random.default_rng(1).standard_normal(5)
    for layer in range(2):
        for part, name in enumerate("qkv"):
            heads = np.einsum("d,dhk->hk", x, params["qkv"]["kernel"][layer, :, part])
            np.testing.assert_allclose(heads.ravel(), tensors[f"{layer}.to_{name}.weight"] @ x, rtol=1e-5)
        np.testing.assert_array_equal(params["qkv"]["bias"][layer].ravel(), tensors[f"{layer}.qkv.bias"])
    heads = np.random.default_rng(2).standard_normal((2, 4))
    expected = tensors["out.weight"] @ heads.ravel()
    np.testing.assert_allclose(np.einsum("hk,hkd->d", heads, params["out"]), expected, rtol=1e-5)
    np.testing.assert_array_equal(params["patch"][0][1, 2, 3, 4], tensors["patch.weight"][4, 3, 1, 2])
    np.testing.assert_array_equal(params["table"], tensors["table"])


def test_a_table_must_fill_every_parameter_once():
    entries, shapes = HAND.entries, HAND.shapes
    with pytest.raises(ValueError, match=r"qkv.*not filled"):
        Table("x", entries[1:], shapes)
    with pytest.raises(ValueError, match=r"table.*not filled"):
        Table("x", (*entries, Entry(("table",), "again")), shapes)
    with pytest.raises(ValueError, match=r"other\.kernel is no parameter"):
        Table("x", (*entries, Entry(("other", "kernel"), "other", SAME)), shapes)
    with pytest.raises(ValueError, match="key used twice"):
        Table("x", (*entries[:-1], Entry(("table",), "patch.weight")), shapes)


# --- Both directions --------------------------------------------------------------------------------


def test_import_and_export_undo_each_other_bit_for_bit(table):
    for each in (table, HAND):
        tensors = random_tensors(each)
        params = jax.tree.map(jnp.asarray, import_tensors(each, tensors))
        exported = dict(export_tensors(each, params))
        assert list(exported) == list(export_shapes(each))
        assert {key: value.shape for key, value in exported.items()} == export_shapes(each)
        for key, value in tensors.items():
            np.testing.assert_array_equal(exported[key], value)


def test_names_and_shapes_are_those_of_the_libraries():
    transformers, diffusers = pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    fields = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    shape = {name: getattr(T5, name) for name in fields}
    for proj in ("gated-gelu", "relu"):
        model = transformers.T5EncoderModel(transformers.T5Config(**shape, feed_forward_proj=proj))
        ours = export_shapes(t5_table(T5Config(**shape, feed_forward_proj=proj)))
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert {**ours, "encoder.embed_tokens.weight": ours["shared.weight"]} == theirs
    for changes in ({}, dict(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)):
        model = diffusers.AutoencoderKL(
            block_out_channels=(8, 12),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            layers_per_block=2,
            **changes,
        )
        config = VAEConfig.from_hf(json.loads(model.to_json_string()))
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert export_shapes(vae_table(config)) == theirs


def test_released_sizes_have_tables_without_making_the_models():
    # sd-vae-ft-ema has 83,653,863 parameters, the encoder of T5 v1.1 XXL 4,762,310,656.
    count = [
        sum(np.prod(shape) for shape in t.shapes.values())
        for t in (vae_table(VAEConfig()), t5_table(T5Config()))
    ]
    assert count == [83_653_863, 4_762_310_656]


def test_params_go_into_a_module():
    table = vae_table(VAE_TINY)
    params = import_tensors(table, random_tensors(table))
    vae = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: VAE(VAE_TINY, rngs=nnx.Rngs(0)))), params)
    kernel = vae.encoder.down_blocks[1].resnets[0].shortcut.kernel
    np.testing.assert_array_equal(
        kernel, params["encoder"]["down_blocks"][1]["resnets"][0]["shortcut"]["kernel"]
    )


def test_dtypes_of_files_and_of_parameters():
    tensors = random_tensors(HAND)
    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
    params = import_tensors(HAND, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["table"], half["table"].astype(np.float32))
    stored = import_tensors(HAND, tensors, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored["table"], half["table"])
    assert {value.dtype for _, value in export_tensors(HAND, stored)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        import_tensors(HAND, {key: value.astype(np.float16) for key, value in tensors.items()})["table"],
        tensors["table"].astype(np.float16).astype(np.float32),
    )


class Lazy(Mapping):
    """Tensors that are made when asked for, and a record of that."""

    def __init__(self, tensors):
        self.tensors, self.read = tensors, []
        self.shapes = {key: value.shape for key, value in tensors.items()}
        self.path = "weights.safetensors"

    def __getitem__(self, key):
        self.read.append(key)
        return self.tensors[key]

    def __contains__(self, key):
        return key in self.tensors

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_tensors_are_read_once_and_only_for_the_parameter_at_hand(table):
    lazy = Lazy(
        {"decoder.x": np.zeros(3), **random_tensors(table)}
        if "t5" in table.name.lower()
        else random_tensors(table)
    )
    entries = {}
    for entry in table.entries:
        entries.setdefault(entry.path, []).append(entry.key)
    for path, _ in import_parameters(table, lazy):
        assert sorted(lazy.read) == sorted(entries.pop(path))
        lazy.read.clear()
    assert not entries


def test_a_stack_is_filled_without_a_second_copy_of_it(monkeypatch):
    import tracemalloc

    table = t5_table(T5Config(vocab_size=8, d_model=256, d_kv=8, d_ff=1024, num_layers=8, num_heads=2))
    lazy = Lazy({key: np.broadcast_to(np.float32(1), shape) for key, shape in export_shapes(table).items()})
    largest = max(4 * np.prod(shape) for shape in table.shapes.values())
    tracemalloc.start()
    for _ in import_parameters(table, lazy):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The parameter at hand and the one before it, which the loop still names, and one layer's tensor.
    assert largest < peak < 2.5 * largest


# --- Refusals ---------------------------------------------------------------------------------------


def refused(table, tensors):
    with pytest.raises(UserError) as error:
        import_tensors(table, tensors)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_faults_of_a_file_are_one_error_with_both_names():
    tensors = random_tensors(HAND)
    tensors["strange"] = tensors.pop("table")
    tensors["stranger"] = np.zeros(2)
    tensors["1.to_k.weight"] = tensors["1.to_k.weight"].T
    del tensors["0.to_v.weight"]
    lazy = Lazy(tensors)
    message = refused(HAND, lazy)
    assert message == (
        "'weights.safetensors' does not fit a hand-made model: 2 unknown: strange, stranger; "
        "2 missing: 0.to_v.weight (ours: qkv.kernel[0, :, 2]), table (ours: table); "
        "1 of the wrong shape: 1.to_k.weight 5x8 for 8x5 (ours: qkv.kernel[1, :, 1])."
    )
    assert lazy.read == []


def test_a_key_too_many_too_few_or_transposed(table):
    tensors = random_tensors(table)
    key = (
        next(key for key, value in tensors.items() if value.ndim == 2 and len(set(value.shape)) == 2)
        if ("T5" in table.name)
        else "encoder.conv_in.weight"
    )
    assert f"1 unknown: {key}_2" in refused(table, {**tensors, f"{key}_2": tensors[key]})
    assert f"1 missing: {key} (ours: " in refused(table, {k: v for k, v in tensors.items() if k != key})
    wrong = refused(table, {**tensors, key: tensors[key].T})
    assert f"1 of the wrong shape: {key} " in wrong and "unknown" not in wrong


def test_another_model_is_refused_whole():
    tensors = random_tensors(t5_table(T5))
    message = refused(vae_table(VAE_TINY), tensors)
    assert (
        f"{len(tensors)} unknown" in message
        and "encoder.conv_in.weight (ours: encoder.conv_in.kernel)" in message
    )


def test_ignored_names_are_whole_names():
    tensors = random_tensors(HAND)
    import_tensors(HAND, {**tensors, "pos_embed": np.zeros(1), "decoder.block.0.weight": np.zeros(1)})
    assert "2 unknown: pos_embed_2, x.decoder.1" in refused(
        HAND, {**tensors, "pos_embed_2": np.zeros(1), "x.decoder.1": np.zeros(1)}
    )


def test_weights_must_be_floating_point():
    tensors = random_tensors(HAND)
    tensors["table"] = tensors["table"].astype(np.int8)
    assert "table (ours: table) is int8" in refused(HAND, tensors)


def test_export_refuses_other_parameters():
    params = import_tensors(HAND, random_tensors(HAND))
    params["more"] = {"kernel": np.zeros(2)}
    params["out"] = params["out"][:1]
    del params["table"]
    with pytest.raises(UserError) as error:
        next(export_tensors(HAND, params))
    assert str(error.value) == (
        "the parameters do not fit a hand-made model: "
        "more.kernel unknown, out 1x4x5 for 2x4x5, table missing."
    )


# --- Names of old and of whole files ----------------------------------------------------------------


def test_t5_embedding_under_either_name_and_both():
    table = t5_table(T5)
    tensors = random_tensors(table)
    expected = tensors["shared.weight"]
    both = {**tensors, "encoder.embed_tokens.weight": expected.copy()}
    other = {key: value for key, value in both.items() if key != "shared.weight"}
    for each in (both, other):
        np.testing.assert_array_equal(import_tensors(table, each)["embed"], expected)
    both["encoder.embed_tokens.weight"][0, 0] += 1
    assert "shared.weight and encoder.embed_tokens.weight name one tensor (ours: embed)" in refused(
        table, both
    )


def test_the_encoder_of_a_whole_t5():
    transformers = pytest.importorskip("transformers")
    fields = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
    config = transformers.T5Config(**{name: getattr(T5, name) for name in fields}, decoder_start_token_id=0)
    whole = transformers.T5ForConditionalGeneration(config)
    tensors = {key: value.numpy() for key, value in whole.state_dict().items()}
    assert {"lm_head.weight", "decoder.final_layer_norm.weight"} <= set(tensors)
    params = import_tensors(t5_table(T5), tensors)
    np.testing.assert_array_equal(
        params["blocks"]["stacked"]["attn"]["v"][1].reshape(12, 6).T,
        tensors["encoder.block.1.layer.0.SelfAttention.v.weight"],
    )


@pytest.mark.parametrize("convolution", [False, True])
def test_vae_attention_of_old_files(convolution):
    table = vae_table(VAE_TINY)
    tensors = random_tensors(table)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in tensors.items():
        for new, name in names.items():
            if f".{new}." in key:
                key = key.replace(f".{new}.", f".{name}.")
                value = value[:, :, None, None] if convolution and value.ndim == 2 else value
        old[key] = value
    assert len(set(old) - set(tensors)) == 16
    assert old["decoder.mid_block.attentions.0.query.weight"].ndim == (4 if convolution else 2)
    jax.tree.map(np.testing.assert_array_equal, import_tensors(table, old), import_tensors(table, tensors))
    # Other tensors are no 1x1 convolutions in disguise.
    bias = "decoder.mid_block.attentions.0.proj_attn.bias"
    assert f"{bias} 12x1x1 for 12" in refused(table, {**old, bias: old[bias][:, None, None]})


def test_parameter_shapes_name_all_parameters():
    shapes = parameter_shapes(lambda: T5Encoder(T5, rngs=nnx.Rngs(0)))
    assert len(shapes) == 12 and shapes[("blocks", "stacked", "attn", "q")] == (2, 12, 2, 3)
