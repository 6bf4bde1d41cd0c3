import concurrent.futures
import dataclasses
import itertools
import threading

import numpy as np
import pytest
from feature_folders import make_record
from PIL import Image
from source_files import encode, open_list, write_parquet, write_tar

from pixart_jax.config import FeaturesConfig, TextEncoderConfig
from pixart_jax.data import planning
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.digits import DigitsSource
from pixart_jax.data.records import Record, encode_caption, encode_record
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError

DIGITS = FeaturesConfig(
    image_size=8,
    codec="pixels",
    text_length=40,
    text_dtype="float32",
    text_encoder=TextEncoderConfig(tokenizer="byt5", d_model=16),
)


def test_common_captions_are_bounded(monkeypatch):
    monkeypatch.setattr(planning, "MAX_COMMON", 7)
    monkeypatch.setattr(planning, "record_bytes", lambda *_: (1 << 20) // 40)
    source = DigitsSource("test")
    found = planning.survey(source, DIGITS, workers=2)
    plan = planning.make_plan(found, DIGITS, shard_mb=1, min_bucket=1, channels=1)
    common = planning.common_captions(source, plan.shards, found)
    assert len(common) == 7 == len(set(common))
    assert [len(shard.indices) for shard in plan.shards] == [40] * 7 + [19]


def test_the_plan_does_not_depend_on_the_workers():
    source = DigitsSource("test")
    found = [planning.survey(source, DIGITS, workers=n) for n in (1, 8)]
    plans = [planning.make_plan(one, DIGITS, shard_mb=1, min_bucket=1, channels=1) for one in found]
    assert found[0].fingerprint == found[1].fingerprint
    commons = [planning.common_captions(source, plan.shards, one) for plan, one in zip(plans, found)]
    assert commons[0] == commons[1]
    for name in ("keys", "facts", "marks"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    for one, other in zip(plans[0].shards, plans[1].shards, strict=True):
        np.testing.assert_array_equal(one.indices, other.indices)


@pytest.mark.parametrize("codec, dtype", [("pixels", "float32"), ("vae", "bfloat16")])
def test_no_record_is_larger_than_planned(codec, dtype):
    bucket, text = Bucket(64, 96, "0.67"), np.zeros((40, 16), np.float32)
    config = FeaturesConfig(
        image_size=64, codec=codec, text_length=40, text_dtype=dtype, text_encoder=DIGITS.text_encoder
    )
    captions = tuple(encode_caption(f"kind{i}", 1.0, "a caption", text, dtype) for i in range(3))
    if codec == "pixels":
        pixels = np.zeros((64, 96, 3), np.uint8)
        record = Record("k", pixels, None, bucket, (64, 96), (64, 96), captions=captions)
    else:
        record = make_record("k", bucket, captions=0)
        record = Record("k", record.mean, record.std, bucket, (64, 96), (64, 96), captions=captions)
    planned = planning.record_bytes(config, bucket, 3, 3)
    assert planned - 1024 < len(encode_record(record)) <= planned


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "webdataset"])
def test_the_image_and_not_the_list_decides_on_the_bucket(tmp_path, kind, orientation):
    """Lists have the size of the stored image, before its EXIF rotation, as many programs report it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.zeros((300, 600, 3), np.uint8), "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(data)
    if kind == "jsonl":
        source = open_list(tmp_path, [{"path": "a.jpg", "prompt": "p", "height": 300, "width": 600}])
    elif kind == "parquet":
        table = {"image": [data], "text": ["p"], "height": [300], "width": [600]}
        source = open_source("auto", write_parquet(tmp_path / "t.parquet", table))
    else:
        members = [("a.jpg", data), ("a.json", b'{"caption": "p", "height": 300, "width": 600}')]
        source = open_source("auto", write_tar(tmp_path / "t.tar", members))
    config = dataclasses.replace(DIGITS, image_size=256, buckets="official")
    found = planning.survey(source, config, workers=1)
    plan = planning.make_plan(found, config, shard_mb=1, min_bucket=1)
    assert [bucket.name for bucket in plan.buckets] == ["176x352" if orientation == 1 else "352x176"]
    assert [note for note in found.notes if "has another size" in note or "have another size" in note] == [
        note for note in found.notes if orientation == 6
    ]
    assert len(found.notes) == (orientation == 6) and plan.notes == ()


def test_loss_per_bucket(tmp_path):
    sizes = [(400, 400)] * 3 + [(420, 400)] + [(400, 800)]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.png").write_bytes(encode(np.zeros((*size, 3), np.uint8), "PNG"))
    config = dataclasses.replace(DIGITS, image_size=256, buckets="official", text=False)
    source = open_source("folder", tmp_path, require_captions=False)
    found = planning.survey(source, config, workers=1)
    plan = planning.make_plan(found, config, shard_mb=1, min_bucket=4)
    lines = [planning.describe_bucket(bucket, 1, plan.merged, plan.shards, found) for bucket in plan.buckets]
    assert lines == [
        "bucket 176x352 (ratio 0.5): 1 records, 0.0% of an image cropped on average, 0.0% at most",
        "bucket 256x256 (ratio 1.0): 1 records, 1.2% of an image cropped on average, 4.8% at most  "
        "with 256x240",
    ]
    assert plan.notes == (
        "1 buckets have fewer than 4 images and are not merged, because more than 10% of an image would be "
        "cropped away; their batches repeat images",
    )
    everything = planning.make_plan(found, config, shard_mb=1, min_bucket=5, max_crop=1.0)
    assert len(everything.buckets) == 1 and everything.notes == ()


@pytest.mark.parametrize(
    "call, words",
    [
        (("photo", ".", {}), "--source is 'photo': choose one of auto, digits"),
        (("digits", "digits", {"image_root": "."}), "choose one of split."),
        (("auto", "no/such/folder", {}), "no such file or folder"),
    ],
)
def test_images_that_cannot_be_opened(call, words):
    kind, path, options = call
    with pytest.raises(UserError) as error:
        planning.open_images(kind, path, DIGITS, options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_with_the_name_of_embedded_data_is_ambiguous(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(UserError, match=r"give ./digits, or --source=digits for the embedded data"):
        planning.open_images("auto", "digits", DIGITS, {})
    assert len(planning.open_images("digits", "digits", DIGITS, {"split": "test"})) > 0


def test_work_is_done_in_order_and_not_far_ahead():
    started, lock = itertools.count(), threading.Lock()
    most = 0

    def work(item):
        nonlocal most
        with lock:
            most = max(most, next(started) + 1)
        return 2 * item

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for used, result in enumerate(planning.ahead(pool, work, range(50), 6)):
            assert result == 2 * used and most <= used + 6
