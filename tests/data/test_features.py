import concurrent.futures
import dataclasses
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from feature_folders import SQUARE, TEXT_LENGTH, WIDE, WIDTH, keys, make_record, write_folder

from pixart_jax.data import features
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.features import FeatureDataset, verify
from pixart_jax.data.loader import FeatureLoader
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
from pixart_jax.errors import UserError


def assert_same(one: Record, other: Record) -> None:
    for field in dataclasses.fields(Record):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "captions":
            assert len(a) == len(b)
            for x, y in zip(a, b):
                assert (x.name, np.float32(x.weight), x.text) == (y.name, np.float32(y.weight), y.text)
                assert x.features.dtype == y.features.dtype
                np.testing.assert_array_equal(x.features, y.features)
                np.testing.assert_array_equal(x.scale, y.scale)
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, field.name


@pytest.fixture
def folder(tmp_path):
    """10 square and 5 wide records, 7 to a shard: three shards."""
    square = [make_record(key, captions=2) for key in keys(10)]
    wide = [make_record(key, WIDE, captions=2) for key in keys(5, "wide")]
    return write_folder(tmp_path / "features", {SQUARE: square, WIDE: wide})


# --- Records


@pytest.mark.parametrize("text_dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("latent_dtype", ["float16", "float32", ml_dtypes.bfloat16])
def test_record_survives(text_dtype, latent_dtype):
    record = make_record("päth/图 1.jpg", captions=3, text_dtype=text_dtype)
    record = dataclasses.replace(
        record, mean=record.mean.astype(latent_dtype), std=record.std.astype(latent_dtype), label=-1
    )
    assert_same(record, decode_record(encode_record(record)))


def test_pixels_without_captions_or_with_one_channel():
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), np.uint8)
        record = Record("k", pixels, None, Bucket(8, 8, "1.0"), (8, 8), (8, 8), (0, 0), 7)
        assert_same(record, decode_record(encode_record(record)))


def test_no_truncation_or_extension_of_a_record_is_taken():
    data = encode_record(make_record("a", captions=2))
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
    # The sum overflows though no term does.
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
            "wrong shape: text of width 9, the manifest says 8",
        ),
    ],
)
def test_record_faults_are_named(change, words):
    record = make_record("a")
    bucket = FeatureBucket(SQUARE, (8, 8, 4), 1)
    assert record_fault(record, bucket, TEXT_LENGTH, WIDTH) is None
    assert words in record_fault(dataclasses.replace(record, **change(record)), bucket, TEXT_LENGTH, WIDTH)


# --- Shards


def test_shards_are_the_same_to_the_byte_and_appear_whole(tmp_path):
    records = [make_record(key) for key in keys(20)]
    entries = [features.write_shard(tmp_path / name, iter(records)) for name in ("a", "b")]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert entries[0] == entries[1]
    assert entries[0]["bytes"] == (tmp_path / "a").stat().st_size and entries[0]["records"] == 20

    def interrupted():
        yield records[0]
        assert not (tmp_path / "c").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features.write_shard(tmp_path / "c", interrupted())
    assert not (tmp_path / "c").exists()


def test_a_shard_without_records_is_no_file(tmp_path):
    assert features.write_shard(tmp_path / "a", iter([])) == {"records": 0, "bytes": 0, "sha256": ""}
    assert not list(tmp_path.iterdir())


# --- Datasets


def test_random_access(folder):
    dataset = FeatureDataset(folder)
    assert len(dataset) == 15
    assert [(entry.bucket.name, entry.count) for entry in dataset.buckets] == [("64x64", 10), ("48x80", 5)]
    assert dataset.buckets[1].latent_shape == (6, 10, 4)
    expected = [make_record(key, captions=2) for key in keys(10)]
    expected += [make_record(key, WIDE, captions=2) for key in keys(5, "wide")]
    for i in range(15):
        assert_same(dataset[i], expected[i])
    for record, position in zip(dataset.read(0, [9, 0, 3, 9]), [9, 0, 3, 9]):
        assert record.key == expected[position].key
    with pytest.raises(IndexError):
        dataset[15]
    assert dataset.where(0, 9) == ("64x64-00001.arrayrecord", 2)
    assert dataset.classes == tuple("0123456789")
    assert dataset.null_text().shape == (TEXT_LENGTH, WIDTH) and dataset.null_length == 1


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_OPEN_SHARDS", 3)
    names = keys(40)
    folder = write_folder(tmp_path / "f", {SQUARE: [make_record(key) for key in names]}, per_shard=2)
    dataset = FeatureDataset(folder)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, 40, 300).tolist()
        assert [record.key for record in pool.map(dataset.__getitem__, order)] == [names[i] for i in order]
    assert len(dataset._readers) <= 3


def test_parts_join_to_the_whole(tmp_path):
    records = {SQUARE: [make_record(key) for key in keys(40)], WIDE: [make_record("w", WIDE)]}
    whole = FeatureDataset(write_folder(tmp_path / "whole", records))
    for part in range(3):
        if part:
            with pytest.raises(
                UserError, match=f"lacks part {part} of 3; run precompute with --shard={part}/3"
            ):
                FeatureDataset(tmp_path / "parts")
        write_folder(tmp_path / "parts", records, part=(part, 3))
    parts = FeatureDataset(tmp_path / "parts")
    assert parts.fingerprint == whole.fingerprint
    assert [parts[i].key for i in range(41)] == [whole[i].key for i in range(41)]
    assert verify(tmp_path / "parts") == []

    manifest = json.loads((tmp_path / "parts/manifest-00001-of-00003.json").read_text())
    manifest["config"]["latent_scale"] = 0.13025
    (tmp_path / "parts/manifest-00001-of-00003.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="part 1 of 3 differs from part 0 in its config"):
        FeatureDataset(tmp_path / "parts")
    write_folder(tmp_path / "parts", records, part=(0, 4))
    with pytest.raises(UserError, match="holds parts of"):
        FeatureDataset(tmp_path / "parts")


def test_fingerprint_tells_features_apart(tmp_path, folder):
    first = FeatureDataset(folder).fingerprint
    assert first == FeatureDataset(folder).fingerprint
    square = [make_record(key, captions=2) for key in keys(10)]
    wide = [make_record(key, WIDE, captions=2) for key in keys(5, "wide")]
    same = write_folder(tmp_path / "same", {SQUARE: square, WIDE: wide})
    assert FeatureDataset(same).fingerprint == first
    square[4] = dataclasses.replace(square[4], label=3 - square[4].label)
    other = write_folder(tmp_path / "other", {SQUARE: square, WIDE: wide})
    assert FeatureDataset(other).fingerprint != first


# --- Faults


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_absent_features_name_the_command(tmp_path):
    with pytest.raises(UserError) as error:
        FeatureDataset(tmp_path / "none", hint="python -m pixart_jax.precompute --config=C")
    assert one_line(error) == (
        f"feature folder '{tmp_path / 'none'}' does not exist; make them with: "
        "python -m pixart_jax.precompute --config=C"
    )
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        FeatureDataset(tmp_path)
    for text in (
        "",
        "{",
        "[]",
        '{"format": "other", "version": 1}',
        '{"format": "pixart_jax features", "version": 9}',
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="is not a manifest of"):
            FeatureDataset(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "truncated", "grown"])
def test_shards_that_are_not_what_was_written(folder, fault):
    shard = folder / "64x64-00001.arrayrecord"
    data = shard.read_bytes()
    if fault == "missing":
        shard.unlink()
    else:
        shard.write_bytes(data[:-1] if fault == "truncated" else data + b"\0")
    with pytest.raises(UserError) as error:
        FeatureDataset(folder)
    assert one_line(error).startswith(f"shard '{shard}': {fault}")
    assert verify(folder)[0] in one_line(error)


def load_all(folder) -> UserError | None:
    """Opens and reads a folder as training does; what stops it, or None."""
    try:
        dataset = FeatureDataset(folder)
        loader = FeatureLoader([dataset], batch_size=5, seed=0, text_length=TEXT_LENGTH)
        for step in range(12):  # several passes: both captions of every record are met
            loader.load(step)
    except UserError as error:
        return error
    return None


def rewrite(folder, shard: int, change) -> None:
    """Replaces the records of a shard, the manifest's hash and size too: what only reading can find."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["shards"][shard]
    reader = features._open_reader(folder / entry["file"])
    records = [decode_record(data) for data in reader.read(range(entry["records"]))]
    entry |= features.write_shard(folder / entry["file"], iter(change(records)))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def spoil(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[array.size // 2] = value
    return array


def with_caption(record: Record, **changes) -> Record:
    """The record with its first caption changed, and without the others."""
    return dataclasses.replace(record, captions=(dataclasses.replace(record.captions[0], **changes),))


FAULTS = {
    "NaN or infinity in its latent mean": lambda r: dataclasses.replace(r, mean=spoil(r.mean, np.nan)),
    "NaN or infinity in its latent std": lambda r: dataclasses.replace(r, std=spoil(r.std, np.inf)),
    "NaN or infinity in the text of caption 'kind0'": lambda r: with_caption(
        r, features=spoil(r.captions[0].features, np.nan)
    ),
    "wrong length: caption 'kind0' has 13 tokens, not 1 to 12": lambda r: with_caption(
        r, features=np.zeros((TEXT_LENGTH + 1, WIDTH), ml_dtypes.bfloat16)
    ),
    "wrong shape: latent [8, 8, 3], its bucket has [8, 8, 4]": lambda r: dataclasses.replace(
        r, mean=r.mean[..., :3], std=r.std[..., :3]
    ),
}


def test_a_sound_folder_has_no_faults(folder):
    assert verify(folder) == []
    assert load_all(folder) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named_by_verify_and_loader_alike(folder, fault):
    rewrite(folder, 1, lambda records: [FAULTS[fault](r) if i == 4 else r for i, r in enumerate(records)])
    manifest = json.loads((folder / "manifest.json").read_text())
    file, key = manifest["shards"][1]["file"], keys(10)[4]
    expected = f"shard '{folder / file}' record 4 ('{key}'): {fault}"
    assert verify(folder) == [expected]
    assert str(load_all(folder)).startswith(expected)


def test_a_duplicate_key_names_both_records(folder):
    rewrite(folder, 2, lambda records: [dataclasses.replace(r, key=keys(10)[1]) if i == 2 else r
                                        for i, r in enumerate(records)])  # fmt: skip
    (fault,) = verify(folder)
    assert fault == (
        f"shard '{folder}/64x64-00001.arrayrecord' record 2 ('image/001.jpg'): duplicate key, also in shard "
        f"'{folder}/64x64-00000.arrayrecord' record 1"
    )


def test_a_lost_record_is_a_wrong_count(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["records"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert any("7 records, the manifest says 8" in fault for fault in verify(folder))


def test_every_flipped_byte_is_found(folder):
    """verify finds all; the loader all that could change what is trained on, in the same words."""
    shard = folder / "48x80-00000.arrayrecord"
    data = shard.read_bytes()
    # Most of a small file is padding before its footer: half of the offsets lie in the records.
    ends = [data.rindex(b"wide/004.jpg") + 500, len(data)]
    offsets = np.random.default_rng(0).integers(0, np.repeat(ends, 20)).tolist()
    offsets += [data.index(b"wide/002.jpg"), 0, 100, len(data) - 1]
    sound = [FeatureDataset(folder)[10 + i] for i in range(5)]
    named = 0
    for offset in offsets:
        shard.write_bytes(data[:offset] + bytes([data[offset] ^ 0x20]) + data[offset + 1 :])
        faults = verify(folder)
        assert f"shard '{shard}': sha256 differs from the manifest's" in faults, offset
        try:
            records = [FeatureDataset(folder)[10 + i] for i in range(5)]
        except UserError as error:
            assert any(fault in str(error) for fault in faults), (offset, error, faults)
            named += f"shard '{shard}' record" in str(error)
        else:
            for one, other in zip(records, sound):
                assert_same(one, other)
    assert named > 10
    shard.write_bytes(data[:-4000])
    assert "truncated" in str(load_all(folder))


def test_faults_of_the_null_text(folder):
    null = folder / "null_text.npy"
    data = null.read_bytes()
    null.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert verify(folder) == [f"'{null}': sha256 differs from the manifest's"]
    np.save(null, np.zeros((3, 3), np.float32))
    with pytest.raises(UserError, match=r"has shape \[3, 3\], the manifest says \[12, 8\]"):
        FeatureDataset(folder).null_text()
    null.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        FeatureDataset(folder).null_text()
    null.unlink()
    assert verify(folder) == [f"'{null}': missing"]
    bare = write_folder(folder.parent / "bare", {SQUARE: [make_record("a", captions=0)]}, text=False)
    with pytest.raises(UserError, match="made without text"):
        FeatureDataset(bare).null_text()


def test_header_layout_is_fixed():
    """Features outlive the code that wrote them: the bytes of a known record."""
    record = Record("k", np.array([[[7]]], np.uint8), None, Bucket(16, 32, "0.5"), (3, 4), (5, 6), (1, 2), 9)
    head = struct.pack("<4sBxHH3H6I2H8si", b"PXJ1", 0, 0, 1, 1, 1, 1, 3, 4, 5, 6, 1, 2, 16, 32, b"0.5", 9)
    data = head + b"k"
    assert encode_record(record) == data + bytes(-len(data) % 16) + b"\7"
