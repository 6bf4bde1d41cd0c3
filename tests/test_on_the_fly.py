"""Training on the fly gets the same batches as with precomputed features."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from source_files import crops, write_folder, write_special_files

from pixart_jax import on_the_fly
from pixart_jax.config import FeaturesConfig, TextEncoderConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.loader import FeatureLoader
from pixart_jax.data.planning import open_images
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError
from pixart_jax.on_the_fly import OnTheFlyDataset
from pixart_jax.precompute import Options, precompute

TEXT = TextEncoderConfig(
    tokenizer="byt5",
    weights="random",
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=2,
    num_layers=1,
    dtype="float32",
)
CONFIG = FeaturesConfig(
    image_size=256, buckets="official", codec="pixels", latent_scale=1.0, text_length=40, text_encoder=TEXT
)
OPEN = dict(min_bucket=2, max_refused_share=0.2, workers=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 images of two shapes, of which the wide ones have the same caption, and a damaged image."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 64, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image if i % 3 else image[:, :40]).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("a wide picture" if i % 3 else f"square number {i}")
    (folder / "12.png").write_bytes((folder / "11.png").read_bytes()[:-300])
    (folder / "12.txt").write_text("broken")
    return folder


@pytest.fixture(scope="module")
def opened(photos):
    printed = []
    return OnTheFlyDataset(str(photos), CONFIG, say=printed.append, **OPEN), printed


def test_batches_equal_those_of_precomputed_features(photos, opened, tmp_path):
    dataset, printed = opened
    assert "skipped: truncated or damaged image" in printed[0] and len(dataset) == 12
    options = Options(min_bucket=2, max_refused_share=0.2, workers=2)
    precompute(open_images("auto", str(photos), CONFIG, {}), CONFIG, tmp_path, options, say=lambda _: None)
    stored = FeatureDataset(tmp_path)
    assert [entry.bucket for entry in dataset.buckets] == [entry.bucket for entry in stored.buckets]
    assert len(dataset.buckets) == 2
    assert (dataset.text_length, dataset.text_width, dataset.extras) == (40, 16, stored.extras)
    np.testing.assert_allclose(dataset.null_text(), stored.null_text(), rtol=0, atol=1e-6)
    arrays = ("text", "text_mask", "label", "image_size", "aspect_ratio")
    loaders = [
        FeatureLoader([data], batch_size=4, seed=1, arrays=arrays, text_length=40, threads=2)
        for data in (dataset, stored)
    ]
    met = set()
    for _, one, other in zip(range(6), *(loader.iterate() for loader in loaders)):
        assert (one.keys, one.bucket) == (other.keys, other.bucket)
        for name, array in other.arrays.items():
            np.testing.assert_allclose(
                one.arrays[name].astype(np.float32), array.astype(np.float32), rtol=1e-2, atol=1e-2
            )
        met.add(one.bucket)
    assert len(met) == 2
    with pytest.raises(UserError, match="has no array 'control'"):
        FeatureLoader([dataset], batch_size=4, seed=1, arrays=("control",), text_length=40)


def test_masks_beside_the_images(tmp_path):
    """They are used only if asked for, and are those that precompute stores."""
    images, config = tmp_path / "images", dataclasses.replace(CONFIG, text=False)
    write_folder(images, {name: crops()[name] for name in ("a.png", "deep/c.JPEG")}, captions=False)
    quiet = dict(say=lambda _: None, **OPEN)
    assert OnTheFlyDataset(str(images), config, masks=True, **quiet).extras == ()  # there are none
    mask = np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)
    Image.fromarray(mask).save(images / "a-masklabel.png")
    assert len(OnTheFlyDataset(str(images), config, **quiet)) == 3  # an image like others
    dataset = OnTheFlyDataset(str(images), config, masks=True, **quiet)
    assert dataset.extras == ("mask",) and len(dataset) == 2
    source = open_images("folder", str(images), config, {}, masks=str(images))
    precompute(source, config, tmp_path / "out", Options(min_bucket=2, workers=2), say=lambda _: None)
    stored = FeatureDataset(tmp_path / "out")
    loaders = [
        FeatureLoader([data], batch_size=2, seed=0, arrays=("mask",), text_length=1)
        for data in (dataset, stored)
    ]
    for step in range(3):
        one, other = (loader.load(step) for loader in loaders)
        assert one.keys == other.keys
        np.testing.assert_array_equal(one.arrays["mask"], other.arrays["mask"])
    # Another mask is other data.
    before = dataset.fingerprint
    Image.fromarray(255 - mask).save(images / "a-masklabel.png")
    with pytest.raises(UserError, match="changed since the start of the run"):
        FeatureLoader([dataset], batch_size=2, seed=0, arrays=("mask",), text_length=1).load(0)
    assert OnTheFlyDataset(str(images), config, masks=True, **quiet).fingerprint != before


@pytest.mark.parametrize("max_texts", [2048, 2])
def test_captions_are_encoded_once_if_they_fit_in_memory(photos, monkeypatch, max_texts):
    calls = []
    encode_each = TextEncoder.encode_each

    def counted(self, captions):
        calls.extend(captions)
        return encode_each(self, captions)

    monkeypatch.setattr(TextEncoder, "encode_each", counted)
    monkeypatch.setattr(on_the_fly, "MAX_TEXTS", max_texts)
    dataset = OnTheFlyDataset(str(photos), CONFIG, say=lambda _: None, **OPEN)
    calls.clear()
    met = []
    for _ in range(2):
        for number, entry in enumerate(dataset.buckets):
            for position in range(entry.count):
                met += [
                    caption.text for record in dataset.read(number, [position]) for caption in record.captions
                ]
    assert set(met) == set(calls) == {"a wide picture", *(f"square number {i}" for i in (0, 3, 6, 9))}
    # If only two are kept, every caption is dropped before it is used again in the next epoch.
    assert len(calls) == (5 if max_texts > 5 else 10)


def test_fingerprint_depends_on_images_and_config(photos, opened):
    dataset, _ = opened
    quiet = dict(say=lambda _: None, **OPEN)
    assert OnTheFlyDataset(str(photos), CONFIG, **quiet).fingerprint == dataset.fingerprint
    other = OnTheFlyDataset(str(photos), dataclasses.replace(CONFIG, text_length=41), **quiet)
    assert other.fingerprint != dataset.fingerprint


def test_replaced_images_change_the_fingerprint(tmp_path):
    folder = write_folder(tmp_path, {name: crops()[name] for name in ("a.png", "a.jpg")})
    config = dataclasses.replace(CONFIG, text=False)
    open_again = lambda: OnTheFlyDataset(str(folder), config, say=lambda _: None)  # noqa: E731
    first = open_again()
    image = Image.open(folder / "a.png")
    Image.new("RGB", image.size, (3, 2, 1)).save(folder / "a.png")
    changed = open_again()
    assert changed.fingerprint != first.fingerprint
    # Runs of version 0.1, which compared only names, captions and sizes, can be resumed.
    assert changed.earlier_fingerprint == first.earlier_fingerprint != first.fingerprint
    loaders = [
        FeatureLoader([data], batch_size=1, seed=1, arrays=(), text_length=40) for data in (first, changed)
    ]
    assert loaders[0].fingerprint != loaders[1].fingerprint
    assert loaders[0].earlier_fingerprint == loaders[1].earlier_fingerprint
    with pytest.raises(UserError, match=r"sample 'a.png': the image has changed since the start"):
        for bucket, entry in enumerate(first.buckets):
            first.read(bucket, range(entry.count))


def test_captions_that_change_during_a_run_stop_it(tmp_path):
    folder = write_folder(tmp_path, {name: crops()[name] for name in ("a.png", "a.jpg")})
    dataset = OnTheFlyDataset(str(folder), CONFIG, say=lambda _: None)
    (folder / "a.jpg.txt").write_text("another")
    with pytest.raises(UserError, match=r"sample 'a.jpg': captions have changed since the start"):
        for bucket, entry in enumerate(dataset.buckets):
            dataset.read(bucket, range(entry.count))


def test_messages_name_no_flags_that_training_lacks(photos, tmp_path):
    write_folder(tmp_path / "classes/dog", {"a.png": crops()["a.png"]}, captions=False)
    (tmp_path / "list.json").write_text('[{"file": "a.png", "text": "a"}]')
    for path in (photos, tmp_path / "classes", tmp_path / "list.json", tmp_path / "missing"):
        with pytest.raises(UserError, match=r"^data.on_the_fly") as error:
            OnTheFlyDataset(str(path), CONFIG, say=lambda _: None)
        message = str(error.value)
        assert "precompute" in message and "\n" not in message
        for word in ("max_refused_share", "source=", "path_field", "--source", "text=False"):
            assert word not in message
    (tmp_path / "features").mkdir()
    (tmp_path / "features/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a folder of features, but with this option"):
        OnTheFlyDataset(str(tmp_path / "features"), CONFIG, say=lambda _: None)


def test_errors_of_unusable_images(photos, tmp_path):
    with pytest.raises(UserError, match=r"skipped 1 of 13 samples"):
        OnTheFlyDataset(str(photos), CONFIG, say=lambda _: None)
    folder = write_folder(tmp_path, {name: crops()[name] for name in ("a.png", "a.jpg")})
    config = dataclasses.replace(CONFIG, text=False)
    dataset = OnTheFlyDataset(str(folder), config, say=lambda _: None)
    with pytest.raises(UserError, match=r"features\.text is False"):
        dataset.null_text()
    (folder / "a.png").unlink()
    bucket, position = next(
        (bucket, position)
        for bucket, entry in enumerate(dataset.buckets)
        for position in range(entry.count)
        if dataset.where(bucket, position)[0] == "a.png"
    )
    with pytest.raises(UserError, match=r"sample 'a.png': missing_image") as error:
        dataset.read(bucket, [position])
    assert "\n" not in str(error.value)
    assert json.loads(json.dumps(dataset.config))["text"] is False


def test_captions_are_cleaned_and_sources_described(photos, tmp_path):
    image = (photos / "01.png").read_bytes()
    lines = []
    for i, caption in enumerate(["a photo of sks123 dog", "1234567", "a dog" + " in a park" * 30]):
        (tmp_path / f"{i}.png").write_bytes(image)
        lines.append({"path": f"{i}.png", "prompt": caption, "height": 64, "width": 40})
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = []
    options = {**OPEN, "max_refused_share": 0.5}
    dataset = OnTheFlyDataset(str(tmp_path / "list.jsonl"), CONFIG, say=printed.append, **options)
    assert [dataset.where(0, i)[0] for i in range(len(dataset))] == ["0.png", "2.png"]
    assert "skipped: caption that cleaning removes completely" in printed[0]
    text = "\n".join(printed)
    assert "1 captions lost words in cleaning, for example 'a photo of sks123 dog' lost 'sks123'" in text
    assert "1 captions were truncated to" in text
    assert "--max_crop" not in text
    assert "3 samples have another size than their list says" in text
    assert "bucket 192x320 (ratio 0.6): 2 records, 4.0% of an image cropped on average" in text


def test_special_files_are_skipped_before_training(tmp_path):
    write_special_files(tmp_path)
    for name in ("0.png", "1.png", "long.png", "nul.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a black square")
    (tmp_path / "long.txt").write_text("a black square " * 10_000)
    (tmp_path / "nul.txt").write_bytes("a black square".encode("utf-16-le"))
    config = FeaturesConfig(
        image_size=16, codec="pixels", latent_scale=1.0, text_length=40, text_encoder=TEXT
    )
    printed = []
    dataset = OnTheFlyDataset(str(tmp_path), config, max_refused_share=0.9, say=printed.append)
    assert len(dataset) == 2 and len(dataset.read(0, [0, 1])) == 2
    assert "skipped in total" in printed[0] and printed[0].split("skipped in total")[1].split()[0] == "8"
