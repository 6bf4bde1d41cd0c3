import dataclasses
import itertools
import random
import re
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from feature_folders import SQUARE, TEXT_LENGTH, WIDE, WIDTH, keys, make_record, write_folder

from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.loader import FeatureLoader, validation_batches
from pixart_jax.data.records import RESERVED, Record
from pixart_jax.errors import UserError

BATCH = 8
# All arrays that can be requested from records without extra arrays.
ARRAYS = ("text", "text_mask", "label", "image_size", "aspect_ratio")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two datasets with two buckets each and two captions per record; 40 + 13 and 21 + 11 records."""
    root = tmp_path_factory.mktemp("features")
    made = []
    for name, square, wide in (("one", 40, 13), ("two", 21, 11)):
        records = {
            SQUARE: [make_record(key, captions=2) for key in keys(square, f"{name}/square")],
            WIDE: [make_record(key, WIDE, captions=2) for key in keys(wide, f"{name}/wide")],
        }
        made.append(write_folder(root / name, records))
    return made


@pytest.fixture
def datasets(folders):
    return [FeatureDataset(path) for path in folders]


def make_loader(datasets, weights=(1.0, 3.0), **changes) -> FeatureLoader:
    options = dict(batch_size=BATCH, seed=5, arrays=ARRAYS, text_length=TEXT_LENGTH, threads=2, prefetch=2)
    return FeatureLoader(datasets, list(weights) if weights else None, **options | changes)


def assert_same(one, other) -> None:
    assert (one.step, one.bucket, one.keys) == (other.step, other.bucket, other.keys)
    assert one.arrays.keys() == other.arrays.keys()
    for name in one.arrays:
        np.testing.assert_array_equal(one.arrays[name], other.arrays[name])


def test_a_batch_is_a_function_of_seed_and_step(datasets, folders):
    loader = make_loader(datasets)
    forward = [batch for batch, _ in zip(loader.iterate(), range(20))]
    again = make_loader([FeatureDataset(path) for path in folders])
    for step in random.Random(0).sample(range(20), 20):
        assert_same(again.load(step), forward[step])
    assert [batch.step for batch in forward] == list(range(20))
    other = make_loader(datasets, seed=6)
    assert other.load(0).keys != forward[0].keys
    assert {batch.bucket for batch in forward} == {SQUARE, WIDE}


@pytest.mark.parametrize("threads", [1, 4])
def test_resuming_within_an_epoch_on_any_number_of_processes(datasets, threads):
    whole = [make_loader(datasets).load(step) for step in range(14)]
    for count, start in ((1, 5), (2, 9), (4, 3), (8, 0)):
        parts = [
            make_loader(datasets, process_index=i, process_count=count, threads=threads).iterate(start)
            for i in range(count)
        ]
        for step in range(start, start + 4):
            rows = [next(part) for part in parts]
            assert {batch.step for batch in rows} == {step}
            assert list(itertools.chain.from_iterable(batch.keys for batch in rows)) == whole[step].keys
            for name, array in whole[step].arrays.items():
                np.testing.assert_array_equal(np.concatenate([batch.arrays[name] for batch in rows]), array)


def test_arrays_hold_what_the_records_hold(datasets):
    loader = make_loader(datasets)
    records: dict[str, Record] = {
        record.key: record for data in datasets for record in map(data.__getitem__, range(len(data)))
    }
    drawn = Counter()
    for step in range(60):
        batch = loader.load(step)
        assert batch.arrays["index"].tolist() == list(range(step * BATCH, (step + 1) * BATCH))
        for row, key in enumerate(batch.keys):
            record = records[key]
            values = {name: array[row] for name, array in batch.arrays.items()}
            assert record.bucket == batch.bucket
            np.testing.assert_array_equal(values["latent_mean"], record.mean.astype(np.float32))
            np.testing.assert_array_equal(values["latent_std"], record.std.astype(np.float32))
            assert values["label"] == record.label
            assert tuple(values["image_size"]) == record.image_size
            length = values["text_mask"].sum()
            np.testing.assert_array_equal(values["text_mask"], np.arange(TEXT_LENGTH) < length)
            (caption,) = (
                c for c in record.captions
                if c.length == length and np.array_equal(c.features, values["text"][:length])
            )  # fmt: skip
            assert not values["text"][length:].any()
            assert batch.captions[row] == caption.text
            drawn[caption.name] += 1
    # The captions have weights 1 and 2.
    assert abs(drawn["kind1"] / drawn.total() - 2 / 3) < 0.07


def test_the_caption_of_a_sample_changes_between_epochs(tmp_path):
    folder = write_folder(tmp_path / "f", {SQUARE: [make_record(key, captions=4) for key in keys(8)]})
    loader = make_loader([FeatureDataset(folder)], None)
    lengths = [tuple(sorted(loader.load(step).arrays["text_mask"].sum(1))) for step in range(8)]
    assert len(set(lengths)) > 2
    # A caption of weight 0 is never chosen.
    records = [make_record(key, captions=2, weights=[0.0, 1.0]) for key in keys(8)]
    second = {record.key: record.captions[1].length for record in records}
    loader = make_loader([FeatureDataset(write_folder(tmp_path / "g", {SQUARE: records}))], None)
    for step in range(20):
        batch = loader.load(step)
        assert batch.arrays["text_mask"].sum(1).tolist() == [second[key] for key in batch.keys]


@pytest.mark.parametrize("mode, expected", [("bucket", {0.6, 1.0}), ("true", {48 / 80, 1.0})])
def test_aspect_ratio(tmp_path, mode, expected):
    # 48 / 80 is exactly 0.6; with a key of 0.61 the two modes give different values.
    odd = dataclasses.replace(WIDE, ratio_key="0.61")
    records = {
        SQUARE: [make_record(key) for key in keys(8)],
        odd: [make_record(key, odd) for key in keys(8, "w")],
    }
    loader = make_loader([FeatureDataset(write_folder(tmp_path / "f", records))], None, aspect_ratio=mode)
    seen = {float(ratio) for step in range(8) for ratio in loader.load(step).arrays["aspect_ratio"].ravel()}
    expected = {1.0, 0.61} if mode == "bucket" else expected
    assert seen == {float(np.float32(value)) for value in expected}


def test_pixels_and_classes(tmp_path):
    rng = np.random.default_rng(0)
    records = [
        make_record(key, captions=0, std=None, mean=rng.integers(0, 256, (8, 8, 1), np.uint8))
        for key in keys(8)
    ]
    records[0].mean[:2, 0, 0] = 0, 255
    folder = write_folder(tmp_path / "f", {SQUARE: records}, config={"codec": "pixels"}, text=False)
    batch = make_loader([FeatureDataset(folder)], None, arrays=("label",)).load(0)
    assert batch.arrays.keys() == {"latent_mean", "latent_std", "index", "label"}
    by_key = {record.key: record for record in records}
    for row, key in enumerate(batch.keys):
        np.testing.assert_allclose(
            batch.arrays["latent_mean"][row], by_key[key].mean / 127.5 - 1, rtol=0, atol=1e-6
        )
    assert batch.arrays["latent_mean"].min() == -1 and batch.arrays["latent_mean"].max() == 1
    assert not batch.arrays["latent_std"].any()


def with_extras(key, bucket=SQUARE, dtype=ml_dtypes.bfloat16, **changes):
    """A record with two extra arrays: a control latent of the size of its bucket, and a number."""
    record = make_record(key, bucket, **changes)
    control = (record.mean[..., :2] * 3).astype(dtype)
    return dataclasses.replace(record, extras={"control": control, "score": np.float32(record.label)[...]})


def test_extra_arrays_are_batched_as_they_are_stored(tmp_path):
    records = {
        SQUARE: [with_extras(key) for key in keys(8)],
        WIDE: [with_extras(key, WIDE) for key in keys(8, "w")],
    }
    dataset = FeatureDataset(write_folder(tmp_path / "f", records))
    assert dataset.extras == ("control", "score")
    loader = make_loader([dataset], None, arrays=("control", "label", "score"))
    by_key = {record.key: record for of_bucket in records.values() for record in of_bucket}
    shapes = {spec["control"].shape: spec for spec in loader.shapes()}
    for step in range(6):
        batch = loader.load(step)
        arrays = batch.arrays
        assert arrays.keys() == {"latent_mean", "latent_std", "index", "control", "label", "score"}
        spec = shapes[arrays["control"].shape]
        assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == spec
        assert arrays["control"].dtype == ml_dtypes.bfloat16 and arrays["score"].shape == (BATCH,)
        for row, key in enumerate(batch.keys):
            np.testing.assert_array_equal(arrays["control"][row], by_key[key].extras["control"])
            assert arrays["score"][row] == by_key[key].label
    assert set(shapes) == {(BATCH, 8, 8, 2), (BATCH, 6, 10, 2)}
    held_out = next(validation_batches(dataset, batch_size=4, arrays=("control",), text_length=1))
    assert held_out.arrays.keys() == {"latent_mean", "latent_std", "index", "weight", "control"}


def test_names_of_standard_arrays_are_reserved(datasets):
    batch = next(validation_batches(datasets[0], batch_size=4, arrays=ARRAYS, text_length=TEXT_LENGTH))
    assert set(batch.arrays) == set(RESERVED)


@pytest.mark.parametrize("name", ARRAYS[2:])
def test_a_batch_has_only_the_requested_arrays(datasets, name):
    whole, part = make_loader(datasets), make_loader(datasets, arrays=(name,))
    assert part.load(3).arrays.keys() == {"latent_mean", "latent_std", "index", name}
    for array, values in part.load(3).arrays.items():
        np.testing.assert_array_equal(values, whole.load(3).arrays[array])
    # Runs of 0.1, which read all arrays, can be resumed only if the fingerprint does not depend on them.
    assert part.fingerprint == whole.fingerprint


def test_arrays_that_a_dataset_does_not_have(tmp_path, datasets):
    path = write_folder(tmp_path / "f", {SQUARE: [with_extras(key) for key in keys(8)]})
    dataset = FeatureDataset(path)
    with pytest.raises(UserError) as error:
        make_loader([dataset], None, arrays=("contrl",))
    assert str(error.value) == (
        f"feature folder '{path}' has no array 'contrl', which the model needs (extra arrays: "
        "control, score): use features that were made with it. Did you mean 'control'?"
    )
    with pytest.raises(UserError, match=r"one' has no array 'control'.*extra arrays: none"):
        next(validation_batches(datasets[0], batch_size=4, arrays=("control",), text_length=TEXT_LENGTH))
    for alone in ("text", "text_mask"):
        with pytest.raises(UserError, match="request both text and text_mask, or neither"):
            make_loader([dataset], None, arrays=(alone, "label"))
    other = {SQUARE: [with_extras(key, dtype=np.float16) for key in keys(8, "other")]}
    other = FeatureDataset(write_folder(tmp_path / "g", other))
    make_loader([dataset, other], None)  # does not request the array
    with pytest.raises(
        UserError, match=r"g' has 'control' of 64x64 as float16 \[8, 8, 2\], another as bfloat"
    ):
        make_loader([dataset, other], None, arrays=("control",))


def test_an_extra_array_that_is_missing_in_some_buckets(tmp_path):
    records = {
        SQUARE: [with_extras(key) for key in keys(8)],
        WIDE: [make_record(key, WIDE) for key in keys(8, "w")],
    }
    dataset = FeatureDataset(write_folder(tmp_path / "f", records))
    assert dataset.extras == ()
    make_loader([dataset], None).load(0)
    with pytest.raises(UserError, match="has no array 'control'"):
        make_loader([dataset], None, arrays=("control",))


@pytest.mark.parametrize("stored, given", [("int8", ml_dtypes.bfloat16), ("float32", np.float32)])
def test_stored_text_dtypes(tmp_path, stored, given):
    records = [make_record(key, text_dtype=stored) for key in keys(8)]
    folder = write_folder(tmp_path / "f", {SQUARE: records}, config={"text_dtype": stored})
    batch = make_loader([FeatureDataset(folder)], None).load(0)
    assert batch.arrays["text"].dtype == given
    exact = {key: make_record(key, text_dtype="float32").captions[0].features for key in keys(8)}
    for row, key in enumerate(batch.keys):
        found = batch.arrays["text"][row, : len(exact[key])].astype(np.float32)
        np.testing.assert_allclose(found, exact[key], rtol=0, atol=0.03 if stored == "int8" else 0)


def test_a_longer_text_length_is_padded(datasets):
    batch = make_loader(datasets, text_length=TEXT_LENGTH + 5).load(0)
    assert batch.arrays["text"].shape == (BATCH, TEXT_LENGTH + 5, WIDTH)
    assert not batch.arrays["text_mask"][:, TEXT_LENGTH:].any()


def test_memory_of_texts_is_reused_only_after_the_last_reference_is_gone(datasets):
    loader = make_loader(datasets)
    text = loader.load(0).arrays["text"]
    place, rows = text.ctypes.data, text[2:]
    before = rows.copy()
    del text
    for step in range(1, 4):
        assert loader.load(step).arrays["text"].ctypes.data != place
    np.testing.assert_array_equal(rows, before)
    del rows
    assert loader.load(4).arrays["text"].ctypes.data == place


def test_shapes_are_those_of_the_batches(datasets):
    loader = make_loader(datasets)
    shapes = {spec["latent_mean"].shape: spec for spec in loader.shapes()}
    for step in range(12):
        arrays = loader.load(step).arrays
        spec = shapes[arrays["latent_mean"].shape]
        assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == spec
    assert len(shapes) == 2


def test_state_and_fingerprint(datasets, folders):
    loader = make_loader(datasets)
    assert loader.state(3) == {"step": 3, "seed": 5, "batch_size": BATCH, "fingerprint": loader.fingerprint}
    assert make_loader([FeatureDataset(path) for path in folders]).fingerprint == loader.fingerprint
    assert (
        make_loader(datasets, process_index=1, process_count=2, threads=1).fingerprint == loader.fingerprint
    )
    others = [
        make_loader(datasets, weights=(1.0, 2.0)),
        make_loader(datasets[:1], None),
        make_loader(datasets, seed=6),
        make_loader(datasets, batch_size=4),
        make_loader(datasets[::-1]),
    ]
    assert len({loader.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_repeats_are_part_of_the_fingerprint(datasets):
    default, once = make_loader(datasets, None), make_loader(datasets, None, repeats=[1, 1])
    assert once.fingerprint == default.fingerprint
    assert_same(once.load(7), default.load(7))
    # Weights of the same proportions make shorter epochs.
    weighted, twice = make_loader(datasets, [106.0, 32.0]), make_loader(datasets, None, repeats=[2, 1])
    assert len({loader.fingerprint for loader in (default, weighted, twice)}) == 3
    steps = 8 * (2 * 53 + 32) // BATCH
    counts = Counter(key for step in range(steps) for key in twice.load(step).keys)
    by_folder = Counter()
    for key, times in counts.items():
        by_folder[key.split("/")[0]] += times
    assert len(counts) == 85 and abs(by_folder["one"] / by_folder["two"] - 106 / 32) < 0.15


def test_loss_weights_become_the_weights_of_the_samples(datasets):
    plain = make_loader(datasets)
    assert_same(make_loader(datasets, loss_weights=[1.0, 1.0]).load(3), plain.load(3))
    loader = make_loader(datasets, loss_weights=[1.0, 0.25])
    # The order does not depend on them, so they may change when a run resumes.
    assert loader.fingerprint == plain.fingerprint
    seen = Counter()
    for step in range(6):
        batch, other = loader.load(step), plain.load(step)
        weight = batch.arrays.pop("weight")
        assert_same(batch, other)
        expected = [0.25 if key.startswith("two/") else 1.0 for key in batch.keys]
        assert weight.dtype == np.float32 and weight.tolist() == expected
        seen.update(expected)
    assert len(seen) == 2
    part = make_loader(datasets, loss_weights=[1.0, 0.25], process_index=1, process_count=2).load(5)
    assert part.arrays["weight"].tolist() == expected[BATCH // 2 :]
    assert loader.shapes()[0]["weight"] == ((BATCH,), np.float32)


def with_mask(key, bucket=SQUARE):
    record = make_record(key, bucket)
    mask = np.random.default_rng(len(key)).integers(0, 256, record.mean.shape[:2], np.uint8)
    return dataclasses.replace(record, extras={"mask": mask})


def test_records_without_a_mask_get_a_white_one(tmp_path, datasets):
    records = {SQUARE: [with_mask(key) for key in keys(8)]}
    masked = FeatureDataset(write_folder(tmp_path / "masked", records))
    loader = make_loader([masked, datasets[0]], None, arrays=("mask",))
    by_key = {record.key: record.extras["mask"] for record in records[SQUARE]}
    shapes = {spec["mask"].shape: spec for spec in loader.shapes()}
    met = Counter()
    for step in range(12):
        batch = loader.load(step)
        arrays = batch.arrays
        assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == shapes[
            arrays["mask"].shape
        ]
        for key, mask in zip(batch.keys, arrays["mask"]):
            np.testing.assert_array_equal(mask, by_key.get(key, np.full_like(mask, 255)))
            met[key in by_key] += 1
    assert len(met) == len(shapes) == 2
    held_out = next(validation_batches(datasets[0], batch_size=4, arrays=("mask",), text_length=1))
    assert (held_out.arrays["mask"] == 255).all()


def test_a_mask_of_another_shape_or_dtype_is_rejected(tmp_path):
    record = with_mask("a")
    for number, mask in enumerate((record.extras["mask"][:3], record.extras["mask"].astype(np.float32))):
        records = {SQUARE: [dataclasses.replace(make_record(k), extras={"mask": mask}) for k in keys(8)]}
        dataset = FeatureDataset(write_folder(tmp_path / str(number), records))
        with pytest.raises(UserError, match=r"has 'mask' of 64x64 as .*, and must have uint8 \[8, 8\]: make"):
            make_loader([dataset], None, arrays=("mask",))


def test_a_run_continues_with_other_data(datasets):
    """From step 5 on, the records are those of a new run with the new data, each once per epoch."""
    fresh, loader = make_loader(datasets, None), make_loader(datasets, None, first_step=5)
    assert loader.fingerprint != fresh.fingerprint != make_loader(datasets[:1], None).fingerprint
    for batch, step in zip(loader.iterate(5), range(20)):
        other = fresh.load(step)
        assert (batch.step, batch.bucket, batch.keys) == (step + 5, other.bucket, other.keys)
        # Noise depends on the index, which is not repeated.
        np.testing.assert_array_equal(batch.arrays["index"], other.arrays["index"] + 5 * BATCH)
    counts = Counter(key for step in range(5, 5 + 200) for key in loader.load(step).keys)
    assert len(counts) == 85 and max(counts.values()) - min(counts.values()) <= 2
    with pytest.raises(UserError, match=r"data.first_step is 5, but the run is at step 4"):
        next(loader.iterate(4))


# --- Input errors


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 100}, "85 records are too few for one batch of 100; lower data.batch_size"),
        ({"weights": (1.0, 0.0), "batch_size": 60}, "53 records are too few for one batch of 60"),
        ({"process_count": 3}, "batch size 8 is not divisible by 3 processes: choose a multiple of 3."),
        ({"weights": (1.0,)}, "weights are [1.0] for 2 feature folders"),
        ({"weights": (1.0, -1.0)}, "none of them negative"),
        ({"weights": (0.0, 0.0)}, "not all 0"),
        ({"weights": (float("nan"), 1.0)}, "not all 0"),
        ({"aspect_ratio": "h/w"}, "aspect_ratio is 'h/w': choose one of true, bucket."),
        ({"text_length": 11}, "set model.text_length (and features.text_length, if it is given) to 12"),
    ],
)
def test_invalid_arguments(datasets, changes, words):
    with pytest.raises(UserError) as error:
        make_loader(datasets, **changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_datasets_that_do_not_match(tmp_path, datasets):
    records = {SQUARE: [make_record(key) for key in keys(8)]}
    for field, value in (
        ("latent_scale", 0.13025),
        ("codec", "pixels"),
        ("text_encoder", {"tokenizer": "other"}),
    ):
        other = FeatureDataset(write_folder(tmp_path / field, records, config={field: value}))
        name = "text_encoder.tokenizer (byt5 and other)" if field == "text_encoder" else field
        with pytest.raises(UserError, match=re.escape(f"differ in {name}")):
            make_loader([datasets[0], other])
    bare = FeatureDataset(write_folder(tmp_path / "bare", records, text=False))
    with pytest.raises(UserError, match=r"has no text: run precompute with features\.text=True"):
        make_loader([bare], None)
    small = {SQUARE: [make_record(key, mean=np.zeros((4, 4, 4), np.float16)) for key in keys(8)]}
    with pytest.raises(UserError, match=r"has latents \[4, 4, 4\] for 64x64"):
        make_loader([datasets[0], FeatureDataset(write_folder(tmp_path / "small", small))])
    with pytest.raises(UserError, match="0 feature folders"):
        make_loader([], None)
    uncaptioned = {SQUARE: [make_record(key, captions=0) for key in keys(8)]}
    with pytest.raises(UserError, match=r"record \d \('image/00\d.jpg'\): no caption"):
        make_loader([FeatureDataset(write_folder(tmp_path / "uncaptioned", uncaptioned))], None).load(0)


def test_an_error_in_a_reader_thread_is_raised_by_the_iterator(tmp_path):
    folder = write_folder(tmp_path / "f", {SQUARE: [make_record(key) for key in keys(8)]})
    loader = make_loader([FeatureDataset(folder)], None)
    iterator = loader.iterate()
    next(iterator)
    shard = folder / "64x64-00000.arrayrecord"
    with open(shard, "r+b") as file:  # one byte, in place, while threads read
        file.seek(shard.read_bytes().index(b"image/003.jpg"))
        file.write(b"I")
    with pytest.raises(UserError, match=rf"shard '{shard}' record 3: damaged bytes"):
        for _ in range(20):
            next(iterator)


# --- Held-out batches


@pytest.mark.parametrize("count", [1, 2])
def test_validation_uses_every_record_once(datasets, count):
    options = dict(batch_size=6, arrays=ARRAYS, text_length=TEXT_LENGTH, process_count=count)
    parts = [list(validation_batches(datasets[0], process_index=i, **options)) for i in range(count)]
    seen = []
    for batches in zip(*parts, strict=True):
        rows = [key for batch in batches for key in batch.keys]
        weight = np.concatenate([batch.arrays["weight"] for batch in batches])
        assert len(rows) == 6 and len({batch.bucket for batch in batches}) == 1
        seen += [key for key, w in zip(rows, weight) if w]
        assert set(weight) <= {0.0, 1.0} and weight[0] == 1
        assert set(rows[int(weight.sum()) :]) <= {seen[-1]}
    assert seen == [datasets[0][i].key for i in range(len(datasets[0]))]
    again = list(validation_batches(datasets[0], process_index=0, **options))
    for one, other in zip(parts[0], again, strict=True):
        assert_same(one, other)


def test_validation_samples_are_spread_over_the_dataset(datasets):
    options = dict(arrays=(), text_length=TEXT_LENGTH)
    batches = list(validation_batches(datasets[0], batch_size=4, num_samples=11, **options))
    index = np.concatenate([batch.arrays["index"][batch.arrays["weight"] > 0] for batch in batches])
    assert index.tolist() == [i * 53 // 11 for i in range(11)]
    assert {batch.bucket for batch in batches} == {SQUARE, WIDE}
    batches = list(validation_batches(datasets[0], batch_size=64, num_samples=1000, **options))
    assert sum(batch.arrays["weight"].sum() for batch in batches) == 53


def test_a_shard_that_is_deleted_during_a_run(tmp_path):
    folder = write_folder(tmp_path / "one", {SQUARE: [make_record(key) for key in keys(40)]}, per_shard=20)
    opened, other = (make_loader([FeatureDataset(folder)], None, batch_size=40) for _ in range(2))
    before = opened.load(0)  # opens all shards, so that deleting one has no effect on this dataset
    shards = sorted(folder.glob("*.arrayrecord"))
    assert len(shards) == 2
    shards[1].unlink()
    assert sorted(opened.load(1).keys) == sorted(before.keys)
    with pytest.raises(UserError, match=shards[1].name):
        other.load(0)
