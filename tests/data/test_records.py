import dataclasses
import struct

import ml_dtypes
import numpy as np
import pytest
from feature_folders import SQUARE, TEXT_LENGTH, WIDE, WIDTH, assert_same, make_record

from pixart_jax.data.buckets import Bucket
from pixart_jax.data.records import (
    FeatureBucket,
    Record,
    all_finite,
    decode_record,
    encode_caption,
    encode_record,
    quantize,
    record_fault,
)


@pytest.mark.parametrize("text_dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("latent_dtype", ["float16", "float32", ml_dtypes.bfloat16])
def test_record_survives(text_dtype, latent_dtype):
    record = make_record("päth/图 1.jpg", captions=3, text_dtype=text_dtype)
    record = dataclasses.replace(
        record, mean=record.mean.astype(latent_dtype), std=record.std.astype(latent_dtype), label=-1
    )
    assert_same(record, decode_record(encode_record(record)))


EXTRAS = {
    "control": np.arange(24, dtype=np.float16).reshape(3, 4, 2),
    "tokens": np.ones((5, 7), ml_dtypes.bfloat16) / 3,
    "mask": np.array([[[[1, 0]]]], np.uint8),
    "weight of a loss": np.float32(0.25)[...],
    "q": np.array([-128, 127], np.int8),
    "empty": np.zeros((0, 3), np.float32),
    "ä" * 127: np.zeros(1, np.float32),
}


@pytest.mark.parametrize("captions", [0, 2])
def test_extra_arrays_survive(captions):
    record = dataclasses.replace(make_record("k", captions=captions), extras=EXTRAS)
    assert_same(record, decode_record(encode_record(record)))
    # Read in place, like the others.
    assert not decode_record(encode_record(record)).extras["control"].flags.owndata


@pytest.mark.parametrize(
    "name, array, words",
    [
        ("text", np.zeros(1, np.float32), "not be reserved"),
        ("", np.zeros(1, np.float32), "1 to 255 bytes"),
        ("ä" * 128, np.zeros(1, np.float32), "1 to 255 bytes"),
        ("a", np.zeros(1, np.float64), "is float64 of rank 1: it must be one of uint8, int8"),
        ("a", np.zeros((1, 1, 1, 1, 1), np.int8), "rank 0 to 4"),
    ],
)
def test_extra_arrays_that_cannot_be_stored(name, array, words):
    with pytest.raises(ValueError, match=words):
        encode_record(dataclasses.replace(make_record("k"), extras={name: array}))


def test_pixels_without_captions_or_with_one_channel():
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), np.uint8)
        record = Record("k", pixels, None, Bucket(8, 8, "1.0"), (8, 8), (8, 8), (0, 0), 7)
        assert_same(record, decode_record(encode_record(record)))


@pytest.mark.parametrize("extras", [{}, {"control": np.ones((2, 3), np.float16), "n": np.ones(5, np.int8)}])
def test_no_truncation_or_extension_of_a_record_is_taken(extras):
    data = encode_record(dataclasses.replace(make_record("a", captions=2), extras=extras))
    for size in range(len(data)):
        with pytest.raises(ValueError):
            decode_record(data[:size])
    with pytest.raises(ValueError, match="wrong length"):
        decode_record(data + b"\0")


def test_only_valid_tokens_are_stored():
    features = np.ones((20, 4096), np.float32)
    record = dataclasses.replace(
        make_record("a"), captions=(encode_caption("c", 1, "t", features, "bfloat16"),)
    )
    text = len(encode_record(record)) - len(encode_record(dataclasses.replace(record, captions=())))
    assert 20 * 4096 * 2 <= text < 20 * 4096 * 2 + 100


def test_eight_bits_keep_each_token_within_half_a_step():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 64)).astype(np.float32) * np.logspace(-4, 4, 30, dtype=np.float32)[:, None]
    values[3] = 0
    q, scale = quantize(values)
    assert q.dtype == np.int8 and scale.shape == (30,)
    assert (np.abs(q * scale[:, None] - values) <= scale[:, None] * 0.5001).all()
    assert np.abs(q).max(axis=1)[np.arange(30) != 3].min() == 127
    assert (q[3] == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_all_finite(dtype):
    values = np.array([[0, -1.5, 3e4], [1e-7, -0.0, -6e4]]).astype(dtype)
    assert all_finite(values)
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = values.copy()
        spoiled[1, 1] = bad
        assert not all_finite(spoiled)
    assert all_finite(np.zeros((0, 4), dtype)) and all_finite(np.array([3], np.int8))
    # All values are finite, but their sum overflows.
    assert all_finite(np.full(4, np.finfo(np.float32).max, np.float32))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: {"mean": r.mean[:4]}, "wrong shape: latent [4, 8, 4], its bucket has [8, 8, 4]"),
        (lambda r: {"bucket": WIDE}, "wrong bucket: 48x80, in a shard of 64x64"),
        (
            lambda r: {"captions": (dataclasses.replace(r.captions[0], weight=0.0),)},
            "caption weights sum to 0",
        ),
        (lambda r: {"captions": (dataclasses.replace(r.captions[0], weight=-1.0),)}, "has weight -1.0"),
        (
            lambda r: {"captions": (encode_caption("kind0", 1, "", np.zeros((0, WIDTH)), "float32"),)},
            "wrong length: caption 'kind0' has 0 tokens, not 1 to 12",
        ),
        (
            lambda r: {"captions": (encode_caption("kind0", 1, "", np.zeros((3, 9)), "float32"),)},
            "wrong shape: text width 9, but 8 in the manifest",
        ),
    ],
)
def test_record_faults_are_described(change, words):
    record = make_record("a")
    bucket = FeatureBucket(SQUARE, (8, 8, 4), 1)
    assert record_fault(record, bucket, TEXT_LENGTH, WIDTH) is None
    assert words in record_fault(dataclasses.replace(record, **change(record)), bucket, TEXT_LENGTH, WIDTH)


def test_header_layout_is_fixed():
    """Old features must stay readable: compares the bytes of a record with those that 0.1 wrote."""
    record = Record("k", np.array([[[7]]], np.uint8), None, Bucket(16, 32, "0.5"), (3, 4), (5, 6), (1, 2), 9)
    head = struct.pack("<4sBxHH3H6I2H8si", b"PXJ1", 0, 0, 1, 1, 1, 1, 3, 4, 5, 6, 1, 2, 16, 32, b"0.5", 9)
    data = head + b"k"
    assert encode_record(record) == data + bytes(-len(data) % 16) + b"\7"


def test_header_layout_with_extra_arrays_is_fixed():
    record = Record("k", np.array([[[7]]], np.uint8), None, Bucket(16, 32, "0.5"), (3, 4), (5, 6), (1, 2), 9)
    extras = {"é": np.array([[1, 2, 3]], np.float16), "m": np.array(5, np.int8)}
    record = dataclasses.replace(record, extras=extras)
    head = struct.pack("<4sBBHH3H6I2H8si", b"PXJ2", 0, 2, 0, 1, 1, 1, 1, 3, 4, 5, 6, 1, 2, 16, 32, b"0.5", 9)
    head += struct.pack("<BBBx4I", 2, 2, 2, 1, 3, 0, 0) + struct.pack("<BBBx4I", 1, 1, 0, 0, 0, 0, 0)
    data = head + "ké".encode() + b"m"
    data += bytes(-len(data) % 16) + b"\7"
    data += bytes(-len(data) % 16) + extras["é"].tobytes()
    data += bytes(-len(data) % 16) + b"\5"
    assert encode_record(record) == data


@pytest.mark.parametrize("dtype", ["float16", "float32", ml_dtypes.bfloat16])
def test_a_standard_deviation_is_not_negative(dtype):
    record = make_record("key")
    std = record.std.astype(dtype)
    bucket = FeatureBucket(record.bucket, record.mean.shape)

    def fault(values):
        return record_fault(dataclasses.replace(record, std=values), bucket, TEXT_LENGTH, WIDTH)

    assert fault(np.zeros_like(std)) is None
    assert fault(-np.zeros_like(std)) is None  # -0.0
    std[0, 0, 0] = -1e-3
    assert "a negative number in its latent std" in fault(std)


def test_the_scales_of_int8_features_are_above_0():
    record = make_record("key", text_dtype="int8")
    bucket = FeatureBucket(record.bucket, record.mean.shape)
    assert record_fault(record, bucket, TEXT_LENGTH, WIDTH) is None
    (caption, *_) = record.captions
    for value in (0, -1):
        scale = caption.scale.copy()
        scale[0] = value
        changed = dataclasses.replace(record, captions=(dataclasses.replace(caption, scale=scale),))
        assert "not above 0" in record_fault(changed, bucket, TEXT_LENGTH, WIDTH)
