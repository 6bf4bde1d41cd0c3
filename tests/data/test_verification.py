import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from feature_folders import (
    SQUARE,
    TEXT_LENGTH,
    WIDTH,
    assert_same,
    keys,
    make_record,
    three_shards,
    write_folder,
)

from pixart_jax.data import features
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.loader import FeatureLoader
from pixart_jax.data.records import (
    Record,
    decode_record,
)
from pixart_jax.data.verification import verify
from pixart_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return three_shards(tmp_path / "features")


def load_all(folder) -> UserError | None:
    """Opens and reads a folder as training does; returns the error that this raises, or None."""
    try:
        dataset = FeatureDataset(folder)
        loader = FeatureLoader(
            [dataset],
            batch_size=5,
            seed=0,
            arrays=("text", "text_mask", *dataset.extras),
            text_length=TEXT_LENGTH,
        )
        for step in range(12):  # several epochs, so that both captions of every record are used
            loader.load(step)
    except UserError as error:
        return error
    return None


def rewrite(folder, shard: int, change) -> None:
    """Changes the records of a shard and updates its hash and size in the manifest, so that they match."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["shards"][shard]
    reader = features.open_reader(folder / entry["file"])
    records = [decode_record(data) for data in reader.read(range(entry["records"]))]
    entry |= features.write_shard(folder / entry["file"], iter(change(records)))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def spoil(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[array.size // 2] = value
    return array


def with_caption(record: Record, **changes) -> Record:
    """The record with only its first caption, changed."""
    return dataclasses.replace(record, captions=(dataclasses.replace(record.captions[0], **changes),))


FAULTS = {
    "NaN or infinity in its latent mean": lambda r: dataclasses.replace(r, mean=spoil(r.mean, np.nan)),
    "NaN or infinity in its latent std": lambda r: dataclasses.replace(r, std=spoil(r.std, np.inf)),
    "a negative number in its latent std, which is a standard deviation": lambda r: dataclasses.replace(
        r, std=spoil(r.std, -0.5)
    ),
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


def test_verify_finds_no_faults_in_valid_features(folder):
    assert verify(folder) == []
    assert load_all(folder) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_and_loader_report_the_same_fault(folder, fault):
    rewrite(folder, 1, lambda records: [FAULTS[fault](r) if i == 4 else r for i, r in enumerate(records)])
    manifest = json.loads((folder / "manifest.json").read_text())
    file, key = manifest["shards"][1]["file"], keys(10)[4]
    expected = f"shard '{folder / file}' record 4 ('{key}'): {fault}"
    assert verify(folder) == [expected]
    assert str(load_all(folder)).startswith(expected)


EXTRA_FAULTS = {
    "no array 'control', which the records of its bucket must have": lambda control: {},
    "wrong shape: array 'control' is float16 [2, 3], its bucket has float16 [3, 2]": lambda control: {
        "control": control.T
    },
    "wrong shape: array 'control' is float32 [3, 2], its bucket has float16 [3, 2]": lambda control: {
        "control": control.astype(np.float32)
    },
    "NaN or infinity in its array 'control'": lambda control: {"control": spoil(control, np.inf)},
}


@pytest.mark.parametrize("fault", EXTRA_FAULTS)
def test_verify_and_loader_report_the_same_fault_of_an_extra_array(tmp_path, fault):
    control = np.arange(6, dtype=np.float16).reshape(3, 2)
    records = [dataclasses.replace(make_record(key), extras={"control": control}) for key in keys(10)]
    folder = write_folder(tmp_path / "f", {SQUARE: records})
    assert verify(folder) == [] and load_all(folder) is None
    spoiled = EXTRA_FAULTS[fault](control)
    rewrite(folder, 1, lambda records: [dataclasses.replace(records[0], extras=spoiled), *records[1:]])
    expected = f"shard '{folder}/64x64-00001.arrayrecord' record 0 ('{keys(10)[7]}'): {fault}"
    assert verify(folder) == [expected]
    assert str(load_all(folder)).startswith(expected)


def test_an_extra_array_that_the_manifest_does_not_name(folder):
    extras = {"control": np.zeros(3, np.uint8)}
    rewrite(folder, 1, lambda records: [dataclasses.replace(records[0], extras=extras), *records[1:]])
    (fault,) = verify(folder)
    assert fault.endswith("array 'control', which the records of its bucket do not have")
    assert load_all(folder) is None  # the array is not in the manifest, so no batch can ask for it


def test_a_duplicate_key_names_both_records(folder):
    rewrite(folder, 2, lambda records: [dataclasses.replace(r, key=keys(10)[1]) if i == 2 else r
                                        for i, r in enumerate(records)])  # fmt: skip
    (fault,) = verify(folder)
    assert fault == (
        f"shard '{folder}/64x64-00001.arrayrecord' record 2 ('image/001.jpg'): duplicate key, also in shard "
        f"'{folder}/64x64-00000.arrayrecord' record 1"
    )
    assert str(load_all(folder)).startswith(fault)


def test_verify_reports_a_wrong_record_count(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["records"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert any("7 records, but 8 in the manifest" in fault for fault in verify(folder))


def test_flipped_bytes_are_found(folder):
    """`verify` finds every one; the loader finds those that change a record, with the same message."""
    shard = folder / "48x80-00000.arrayrecord"
    data = shard.read_bytes()
    # Most of a small file is padding before its footer, so half of the offsets are chosen within the records.
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
    with pytest.raises(UserError, match=r"has shape \[3, 3\], but \[12, 8\] in the manifest"):
        FeatureDataset(folder).null_text()
    null.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        FeatureDataset(folder).null_text()
    null.unlink()
    assert verify(folder) == [f"'{null}': missing"]
    bare = write_folder(folder.parent / "bare", {SQUARE: [make_record("a", captions=0)]}, text=False)
    with pytest.raises(UserError, match="made without text"):
        FeatureDataset(bare).null_text()
