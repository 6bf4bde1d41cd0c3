import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.t5 import T5Config
from pixart_jax.weights.t5 import t5_table
from pixart_jax.weights.tables import export_shapes, import_tensors

T5 = T5Config(vocab_size=30, d_model=12, d_kv=3, d_ff=20, num_layers=2, num_heads=2)


def test_names_and_shapes_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    fields = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    shape = {name: getattr(T5, name) for name in fields}
    for proj in ("gated-gelu", "relu"):
        model = transformers.T5EncoderModel(transformers.T5Config(**shape, feed_forward_proj=proj))
        ours = export_shapes(t5_table(T5Config(**shape, feed_forward_proj=proj)))
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert {**ours, "encoder.embed_tokens.weight": ours["shared.weight"]} == theirs


def test_the_released_size_has_a_table_without_making_the_model():
    shapes = t5_table(T5Config()).shapes
    # The encoder of T5 v1.1 XXL.
    assert sum(np.prod(shape) for shape in shapes.values()) == 4_762_310_656


def test_t5_embedding_under_either_name_and_both():
    table = t5_table(T5)
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal(shape) for key, shape in export_shapes(table).items()}
    expected = tensors["shared.weight"]
    both = {**tensors, "encoder.embed_tokens.weight": expected.copy()}
    other = {key: value for key, value in both.items() if key != "shared.weight"}
    for each in (both, other):
        np.testing.assert_array_equal(import_tensors(table, each, np.float64)["embed"], expected)
    both["encoder.embed_tokens.weight"][0, 0] += 1
    words = r"shared\.weight and encoder\.embed_tokens\.weight are names of one tensor \(ours: embed\)"
    with pytest.raises(UserError, match=words):
        import_tensors(table, both)


def test_the_encoder_of_a_complete_t5():
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
