import dataclasses

import numpy as np
import pytest
from foreign import save_tokenizer

from pixart_jax.config import TextEncoderConfig
from pixart_jax.data.digits import WORDINGS, caption_for
from pixart_jax.encoders.text import (
    TextEncoder,
    UnknownCaption,
    unknown_summary,
)
from pixart_jax.errors import UserError

TINY = dict(d_model=24, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
RANDOM = TextEncoderConfig(tokenizer="byt5", weights="random", clean_caption=False, dtype="float32", **TINY)
CAPTIONS = ["a handwritten seven", "", "the digit 7 written by hand", "x" * 30, "ein käse"]
LENGTH = 24


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(RANDOM, LENGTH, batch_size=8)


def test_lengths_padding_and_cuts(encoder):
    encoder.cut.clear()
    features, lengths = encoder.encode(CAPTIONS)
    # A token per byte and the end token; 'ä' has two bytes.
    assert lengths.tolist() == [20, 1, LENGTH, LENGTH, 10]
    assert features.shape == (5, LENGTH, 24) and features.dtype == np.float32
    for row, length in zip(features, lengths):
        assert np.abs(row[:length]).min(axis=0).max() > 0 and not row[length:].any()
    cut = {line.caption: line for line in encoder.cut}
    assert set(cut) == {"the digit 7 written by hand", "x" * 30}
    assert cut["x" * 30].tokens == 31 and cut["x" * 30].removed == "x" * 7
    assert cut["the digit 7 written by hand"].removed == "hand"


def test_unknown_characters_are_listed(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    config = dataclasses.replace(RANDOM, tokenizer=str(tmp_path / "tokenizer"))
    known = TextEncoder(config, LENGTH, load=False)
    known.tokenize(["a corgi", "кошка", "a red 🐱", "一只橘猫"])
    assert {line.caption for line in known.unknown} == {"кошка", "a red 🐱", "一只橘猫"}
    cat = known.unknown[1]
    assert cat.unknown == 1 and cat.tokens > 3
    line = unknown_summary(known.unknown, "unknown.jsonl")
    assert line.startswith(
        "3 captions have characters that the tokenizer does not know (all in unknown.jsonl)"
    )
    assert "for example 'кошка'" in line
    assert [line.characters for line in known.unknown] == ["коша", "🐱", "一只橘猫"]
    assert "(all in unknown.jsonl): коша🐱一只橘猫; for example" in line
    older = [UnknownCaption("кошка", 5, 6)]
    assert "does not know; for example" in unknown_summary(older)


def test_bytes_are_never_unknown(encoder):
    encoder.tokenize(["кошка 🐱"])
    assert encoder.unknown == []


def test_a_cut_caption_keeps_its_end_token(encoder):
    ids = encoder.tokenize(["x" * 30, "x" * 23, "x" * 22])
    assert [len(row) for row in ids] == [24, 24, 23]
    assert all(row[-1] == 1 and 1 not in row[:-1] for row in ids)
    assert ids[0] == ids[1]


def test_features_do_not_depend_on_the_batch(encoder):
    alone = {caption: encoder.encode([caption])[0][0] for caption in CAPTIONS}
    many = [f"caption {i}" for i in range(30)] + CAPTIONS
    features, _ = encoder.encode(many)
    for caption, row in zip(many[30:], features[30:]):
        np.testing.assert_allclose(row, alone[caption], rtol=0, atol=1e-5)
    again, _ = encoder.encode(many)
    np.testing.assert_array_equal(again, features)


def test_null_text_has_all_positions_and_its_own_mask(encoder):
    null, length = encoder.null_text()
    assert null.shape == (LENGTH, 24) and length == 1
    np.testing.assert_allclose(null[:1], encoder.encode([""])[0][0, :1], rtol=0, atol=1e-5)
    assert np.abs(null[1:]).min(axis=0).max() > 0


def test_encode_each_gives_every_caption_once(encoder):
    captions = [caption_for(digit, w) for w in range(len(WORDINGS)) for digit in range(10)]
    found = dict(encoder.encode_each(captions))
    assert sorted(found) == list(range(len(captions)))
    features, lengths = encoder.encode(captions)
    for i, values in found.items():
        np.testing.assert_array_equal(values, features[i, : lengths[i]])
    assert list(encoder.encode_each([])) == []


def test_cleaning_is_diffusers_or_off():
    captions = ["A RED   Fox https://example.com (tm)", "a red fox"]
    clean = TextEncoder(TextEncoderConfig(**{**vars(RANDOM), "clean_caption": True}), LENGTH)
    rows = clean.tokenize(captions)
    assert bytes(i - 3 for i in rows[0][:-1]).startswith(b"a red fox") and rows[0] != rows[1]
    rows = TextEncoder(RANDOM, LENGTH).tokenize(["  A Fox "])
    assert bytes(i - 3 for i in rows[0][:-1]) == b"a fox"
    rows = TextEncoder(dataclasses.replace(RANDOM, lower_case=False), LENGTH).tokenize(["  A Fox "])
    assert bytes(i - 3 for i in rows[0][:-1]) == b"A Fox"


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"tokenizer": "no/such-tokenizer"},
            "tokenizer 'no/such-tokenizer' (subfolder 'tokenizer') cannot be opened",
        ),
        ({"weights": ""}, "features.text_encoder.weights is empty"),
        ({"weights": "no/such-model"}, "features.text_encoder.weights is 'no/such-model': no such folder"),
    ],
)
def test_what_is_not_there_is_one_line(changes, words):
    with pytest.raises(UserError) as error:
        TextEncoder(TextEncoderConfig(**{**vars(RANDOM), **changes}), LENGTH)
    assert words in str(error.value) and "\n" not in str(error.value)
