import tracemalloc
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models.t5 import T5Config, T5Encoder
from pixart_jax.models.vae import VAEConfig
from pixart_jax.weights.t5 import t5_table
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
)
from pixart_jax.weights.vae import vae_table

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


# --- A handwritten table: stacked, fused, convolution, old names --------------------------------------

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
    with pytest.raises(ValueError, match=r"other\.kernel is not a parameter"):
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
    """A mapping that records which tensors are read."""

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


def test_a_stack_is_filled_without_a_second_copy_of_it():
    table = t5_table(T5Config(vocab_size=8, d_model=256, d_kv=8, d_ff=1024, num_layers=8, num_heads=2))
    lazy = Lazy({key: np.broadcast_to(np.float32(1), shape) for key, shape in export_shapes(table).items()})
    largest = max(4 * np.prod(shape) for shape in table.shapes.values())
    tracemalloc.start()
    for _ in import_parameters(table, lazy):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Memory holds the current parameter, the previous one (the loop variable still refers to it), and one
    # layer's tensor.
    assert largest < peak < 2.5 * largest


# --- Input errors -----------------------------------------------------------------------------------


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


def test_tensors_of_another_model_are_counted():
    tensors = random_tensors(t5_table(T5))
    message = refused(vae_table(VAE_TINY), tensors)
    assert (
        f"{len(tensors)} unknown" in message
        and "decoder.conv_in.weight (ours: decoder.conv_in.kernel)" in message
        and " and 114 more" in message
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value):
    tensors = random_tensors(HAND)
    tensors["1.to_k.weight"][2, 1] = value
    ours = r"qkv\.kernel\[1, :, 1\]"
    with pytest.raises(
        UserError, match=rf"1\.to_k\.weight \(ours: {ours}\) is NaN or infinite in 1 of 40 values"
    ):
        import_tensors(HAND, tensors)


def test_values_that_overflow_the_dtype_of_the_parameters_are_named():
    tensors = random_tensors(HAND)
    tensors["table"][0, 0] = -1e5
    import_tensors(HAND, tensors, jnp.bfloat16)
    with pytest.raises(UserError, match=r"table \(ours: table\) has the value 1e\+05, which float16 cannot"):
        import_tensors(HAND, tensors, np.float16)


def test_export_raises_for_other_parameters():
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


def test_parameter_shapes_name_all_parameters():
    shapes = parameter_shapes(nnx.eval_shape(lambda: T5Encoder(T5, rngs=nnx.Rngs(0))))
    assert len(shapes) == 12 and shapes[("blocks", "stacked", "attn", "q")] == (2, 12, 2, 3)
