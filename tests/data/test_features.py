import concurrent.futures
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from damage import damaged
from feature_folders import (
    SQUARE,
    TEXT_LENGTH,
    WIDE,
    WIDTH,
    assert_same,
    keys,
    make_record,
    three_shards,
    write_folder,
)
from full_disk import largest_file

from pixart_jax.data import features
from pixart_jax.data.features import FeatureDataset, without_new_fields
from pixart_jax.data.verification import verify
from pixart_jax.errors import OutputError, UserError


@pytest.fixture
def folder(tmp_path):
    return three_shards(tmp_path / "features")


def test_shards_are_reproducible_and_appear_only_when_complete(tmp_path):
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


def test_a_shard_without_records_writes_no_file(tmp_path):
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


def test_number_of_open_files_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_OPEN_SHARDS", 3)
    names = keys(40)
    folder = write_folder(tmp_path / "f", {SQUARE: [make_record(key) for key in names]}, per_shard=2)
    dataset = FeatureDataset(folder)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, 40, 300).tolist()
        assert [record.key for record in pool.map(dataset.__getitem__, order)] == [names[i] for i in order]
    opened = {file for file in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if str(folder) in file}
    assert 0 < len(opened) <= 3


def test_joined_parts_equal_a_single_run(tmp_path):
    records = {SQUARE: [make_record(key) for key in keys(40)], WIDE: [make_record("w", WIDE)]}
    whole = FeatureDataset(write_folder(tmp_path / "whole", records))
    for part in range(3):
        if part:
            with pytest.raises(
                UserError, match=f"has no part {part} of 3; run precompute with --shard={part}/3"
            ):
                FeatureDataset(tmp_path / "parts")
        write_folder(tmp_path / "parts", records, part=(part, 3))
    parts = FeatureDataset(tmp_path / "parts")
    assert parts.fingerprint == whole.fingerprint
    assert [parts[i].key for i in range(41)] == [whole[i].key for i in range(41)]
    assert verify(tmp_path / "parts") == []

    manifest = json.loads((tmp_path / "parts/manifest-00001-of-00003.json").read_text())
    # A part that was made by 0.1, which had no extra arrays, can be joined with new ones.
    for entry in manifest["buckets"]:
        assert entry.pop("extras") == {}
    old = json.dumps(manifest | {"version": 1})
    (tmp_path / "parts/manifest-00001-of-00003.json").write_text(old)
    assert FeatureDataset(tmp_path / "parts").fingerprint == whole.fingerprint
    manifest = json.loads(old)
    manifest["config"]["latent_scale"] = 0.13025
    (tmp_path / "parts/manifest-00001-of-00003.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="part 1 of 3 differs from part 0 in 'config'"):
        FeatureDataset(tmp_path / "parts")
    write_folder(tmp_path / "parts", records, part=(0, 4))
    with pytest.raises(UserError, match="holds parts of a split into"):
        FeatureDataset(tmp_path / "parts")


def test_fingerprint_depends_on_the_records(tmp_path, folder):
    first = FeatureDataset(folder).fingerprint
    assert first == FeatureDataset(folder).fingerprint
    square = [make_record(key, captions=2) for key in keys(10)]
    wide = [make_record(key, WIDE, captions=2) for key in keys(5, "wide")]
    same = write_folder(tmp_path / "same", {SQUARE: square, WIDE: wide})
    assert FeatureDataset(same).fingerprint == first
    square[4] = dataclasses.replace(square[4], label=3 - square[4].label)
    other = write_folder(tmp_path / "other", {SQUARE: square, WIDE: wide})
    assert FeatureDataset(other).fingerprint != first


def test_extra_arrays(tmp_path):
    control = np.arange(6, dtype=np.float16).reshape(3, 2)
    records = [dataclasses.replace(make_record(key), extras={"control": control}) for key in keys(3)]
    folder = write_folder(tmp_path / "f", {SQUARE: records})
    (entry,) = json.loads((folder / "manifest.json").read_text())["buckets"]
    assert entry["extras"] == {"control": {"shape": [3, 2], "dtype": "float16"}}
    dataset = FeatureDataset(folder)
    assert dataset.extras == ("control",)
    assert dataset.buckets[0].extras == {"control": ((3, 2), np.float16)}
    for i, record in enumerate(records):
        assert_same(dataset[i], record)
    # The fingerprint depends on the extra arrays in the manifest, because they determine the batches.
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["buckets"][0]["extras"]["control"]["dtype"] = "bfloat16"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert FeatureDataset(folder).fingerprint != dataset.fingerprint


# --- Faults


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_error_for_missing_features_names_the_command(tmp_path):
    with pytest.raises(UserError) as error:
        FeatureDataset(tmp_path / "none", hint="python -m pixart_jax.precompute --config=C")
    assert one_line(error) == (
        f"feature folder '{tmp_path / 'none'}' does not exist; make them with: "
        "python -m pixart_jax.precompute --config=C"
    )
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        FeatureDataset(tmp_path)
    (tmp_path / "a\udcff").mkdir()
    with pytest.raises(UserError, match="which is not UTF-8: rename it"):
        FeatureDataset(tmp_path / "a\udcff")
    for text in (
        "",
        "{",
        "[]",
        '{"format": "other", "version": 1}',
        '{"format": "pixart_jax features", "version": 9}',
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest.json' (is not a manifest of|cannot be read as JSON)"):
            FeatureDataset(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "truncated", "grown"])
def test_shards_of_the_wrong_size_are_reported(folder, fault):
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


def test_a_damaged_manifest(tmp_path):
    path = three_shards(tmp_path / "features")
    file = path / "manifest.json"
    written = json.loads(file.read_text())
    written["config"] = {"text_encoder": {}}
    count = 0
    for place, changed in damaged(written):
        file.write_text(json.dumps(changed))
        try:
            FeatureDataset(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error), place
            count += 1
    assert count > 300
    file.write_text(json.dumps({**written, "shards": written["shards"] * 2}))
    with pytest.raises(UserError, match=r"damaged manifest \(it names a shard twice\)"):
        FeatureDataset(path)
    for text in (b"[" * 100_000, b"\xff", b'{"version": ' + b"1" * 5000 + b"}"):
        file.write_bytes(text)
        with pytest.raises(UserError, match=r"manifest.json' cannot be read as JSON \(.*\): give a folder"):
            FeatureDataset(path)
    for encoder in (True, 5, "t5", ["t5"]):
        file.write_text(json.dumps({**written, "config": {"text_encoder": encoder}}))
        with pytest.raises(UserError, match=r"is a damaged manifest \(config\.text_encoder is "):
            FeatureDataset(path)
    for name in ("../../x.arrayrecord", "/etc/passwd", "..", ""):
        written["shards"][0]["file"] = name
        file.write_text(json.dumps(written))
        with pytest.raises(UserError, match=r"is a damaged manifest .*must be text of the form"):
            FeatureDataset(path)


def test_null_text_of_another_kind(tmp_path):
    path = three_shards(tmp_path / "features")
    data = FeatureDataset(path)
    np.save(path / "null_text.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"null_text.npy' cannot be read \(it holds Python objects"):
        data.null_text()


def test_a_shard_that_cannot_be_written_is_one_line(tmp_path):
    """ArrayRecord raises a `RuntimeError`."""
    path = tmp_path / features.shard_name(SQUARE, 0)
    records = [make_record(key, SQUARE) for key in keys(8)]
    features.write_shard(path, iter(records[:1]))
    old = path.read_bytes()
    with (
        largest_file(100),
        pytest.raises(OutputError, match=r"arrayrecord' cannot be written .File too large.: free space"),
    ):
        features.write_shard(path, iter(records))
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_new_fields_of_the_config_do_not_change_hashes_of_old_features():
    old = {"codec": "vae", "text_encoder": {"dtype": "bfloat16"}}
    new = {**old, "text_encoder": {"dtype": "bfloat16", "weights_dtype": "auto"}}
    assert without_new_fields(new) == without_new_fields(old) == old
    int8 = {**old, "text_encoder": {"dtype": "bfloat16", "weights_dtype": "int8"}}
    assert without_new_fields(int8) == int8
    assert without_new_fields({"text_encoder": None}) == {"text_encoder": None}
