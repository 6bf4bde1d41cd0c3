"""Writes feature folders for the tests, without running encoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from pixart_jax.data import features
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.records import ArraySpec, FeatureBucket, Record, encode_caption
from pixart_jax.files import write_json

CONFIG = {
    "image_size": 64,
    "codec": "vae",
    "vae": "tiny",
    "latent_scale": 0.18215,
    "text_dtype": "bfloat16",
    "text_encoder": {"tokenizer": "byt5"},
}
SQUARE = Bucket(64, 64, "1.0")
WIDE = Bucket(48, 80, "0.6")
TEXT_LENGTH, WIDTH = 12, 8


def make_record(key: str, bucket: Bucket = SQUARE, captions: int = 1, **changes) -> Record:
    """A record of random values, with the key as the seed."""
    rng = np.random.default_rng(list(key.encode()))
    shape = (bucket.height // 8, bucket.width // 8, 4)
    dtype = changes.pop("text_dtype", "bfloat16")
    weights = changes.pop("weights", [1.0 + i for i in range(captions)])
    encoded = tuple(
        encode_caption(
            f"kind{i}",
            weights[i],
            f"caption {i} of {key}",
            rng.normal(size=(rng.integers(1, TEXT_LENGTH + 1), WIDTH)).astype(np.float32),
            dtype,
        )
        for i in range(captions)
    )
    values = dict(
        mean=rng.normal(size=shape).astype(changes.pop("latent_dtype", "float16")),
        std=rng.uniform(0.1, 1, size=shape).astype(np.float16),
        bucket=bucket,
        image_size=(int(rng.integers(50, 500)), int(rng.integers(50, 500))),
        resized_size=(bucket.height, bucket.width + 3),
        offset=(0, 1),
        label=int(rng.integers(10)),
        captions=encoded,
    )
    return Record(key, **{**values, **changes})


def write_folder(
    path: Path,
    records: dict[Bucket, list[Record]],
    *,
    per_shard: int = 7,
    config: dict | None = None,
    part: tuple[int, int] = (0, 1),
    text: bool = True,
) -> Path:
    """Writes a feature folder with `per_shard` records per shard; for part (i, n), shards i, i + n, ..."""
    path.mkdir(parents=True, exist_ok=True)
    shards = []
    for bucket, members in records.items():
        for index, start in enumerate(range(0, len(members), per_shard)):
            shards.append((bucket, index, members[start : start + per_shard]))
    entries = []
    for bucket, index, members in shards[part[0] :: part[1]]:
        file = features.shard_name(bucket, index)
        entry = features.write_shard(path / file, iter(members))
        entries.append({"file": file, "bucket": bucket.name, **entry})
    null = np.random.default_rng(0).normal(size=(TEXT_LENGTH, WIDTH)).astype(np.float32)
    note = features.write_null_text(path, null) | {"width": WIDTH, "length": TEXT_LENGTH, "null_length": 1}
    manifest = features.make_manifest(
        config=CONFIG | (config or {}),
        source={"kind": "test"},
        buckets=[
            FeatureBucket(bucket, members[0].mean.shape, extras=specs_of(members[0]))
            for bucket, members in records.items()
        ],
        shards=entries,
        text=note if text else None,
        classes=[str(digit) for digit in range(10)],
        part=part,
    )
    write_json(path / features.manifest_name(*part), manifest)
    return path


def specs_of(record: Record) -> dict[str, ArraySpec]:
    """The manifest's description of the extra arrays of a record."""
    return {name: ArraySpec(array.shape, array.dtype) for name, array in record.extras.items()}


def keys(count: int, prefix: str = "image") -> list[str]:
    return [f"{prefix}/{i:03d}.jpg" for i in range(count)]


def three_shards(path: Path) -> Path:
    """A folder of 10 square and 5 wide records in three shards, at most 7 records per shard."""
    square = [make_record(key, captions=2) for key in keys(10)]
    wide = [make_record(key, WIDE, captions=2) for key in keys(5, "wide")]
    return write_folder(path, {SQUARE: square, WIDE: wide})


def assert_same(one: Record, other: Record) -> None:
    """Asserts that two records are equal in every field, bit by bit."""
    for field in dataclasses.fields(Record):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "captions":
            assert len(a) == len(b)
            for x, y in zip(a, b):
                assert (x.name, np.float32(x.weight), x.text) == (y.name, np.float32(y.weight), y.text)
                assert x.features.dtype == y.features.dtype
                np.testing.assert_array_equal(x.features, y.features)
                np.testing.assert_array_equal(x.scale, y.scale)
        elif field.name == "extras":
            assert list(a) == list(b)
            for name in a:
                assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
                np.testing.assert_array_equal(a[name], b[name])
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, field.name
