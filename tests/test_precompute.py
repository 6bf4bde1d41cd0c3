"""Tests precompute on crops of the sample photos of scikit-learn, with a tiny random T5 and VAE."""

import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import foreign
import jax
import numpy as np
import pytest
import xla_flags
from command_line import parse
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_sample_images
from source_files import (
    CROPS,
    bad_records,
    encode,
    open_every_kind,
    write_parquet,
    write_special_files,
    write_tar,
)

from pixart_jax import precompute as module
from pixart_jax.config import FeaturesConfig, TextEncoderConfig, TrainConfig, to_dict
from pixart_jax.data import buckets, planning
from pixart_jax.data.digits import DigitsSource
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.images import decode_image, resize_and_crop
from pixart_jax.data.loader import FeatureLoader
from pixart_jax.data.verification import verify
from pixart_jax.encoders import progress, samples
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.t5 import load_t5
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import OutputError, UserError
from pixart_jax.models.vae import VAE, VAEConfig
from pixart_jax.precompute import (
    Flags,
    Options,
    main,
    open_images,
    precompute,
    verify_command,
)
from pixart_jax.weights.tables import export_tensors
from pixart_jax.weights.vae import vae_table

TEXT = TextEncoderConfig(
    tokenizer="byt5",
    weights="random",
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=2,
    num_layers=1,
    dtype="float32",
    clean_caption=False,
)
CLEANED = dataclasses.replace(TEXT, clean_caption=True)
# As in `configs/digits.py`, with shorter captions.
DIGITS = FeaturesConfig(
    image_size=8,
    codec="pixels",
    vae="",
    latent_scale=1.0,
    text_length=40,
    text_dtype="float32",
    text_encoder=TEXT,
)
QUIET = dict(say=lambda *_: None)
shared_codec, shared_text_encoder = functools.cache(make_codec), functools.cache(TextEncoder)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A tiny VAE with random weights, in the layout of diffusers."""
    config = VAEConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    # Random numbers of numpy, because initializing the module would compile a program for every shape.
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    folder = tmp_path_factory.mktemp("vae")
    tensors = {key: np.ascontiguousarray(value) for key, value in export_tensors(vae_table(config), params)}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    names = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
    values = {name: getattr(config, name) for name in names}
    blocks = dict(
        _class_name="AutoencoderKL",
        act_fn="silu",
        block_out_channels=[4, 4, 4, 4],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        scaling_factor=0.18215,
    )
    (folder / "config.json").write_text(json.dumps(values | blocks))
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 crops of real photos in two shapes with captions, some of them equal; and three unusable images."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        photo = load_sample_images().images[i % 2]
        height, width = [(120, 120), (90, 150), (120, 122)][i % 3]
        top, left = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
        path = folder / f"{'temple' if i % 2 == 0 else 'flower'}/{i:02d}.{'png' if i % 5 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo[top : top + height, left : left + width]).save(path)
        subject = "a Chinese temple" if i % 2 == 0 else "a dahlia in bloom"
        path.with_suffix(".txt").write_text(subject if i % 4 < 2 else f"{subject}, crop number {i}")
    (folder / "broken.png").write_bytes((folder / "flower/01.png").read_bytes()[:2000])
    (folder / "broken.txt").write_text("half an image")
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "nothing.txt").write_text("no image")
    Image.new("RGB", (50, 50)).save(folder / "uncaptioned.png")
    return folder


@pytest.fixture(scope="session")
def photo_config(vae_folder):
    return FeaturesConfig(
        image_size=256, buckets="official", vae=str(vae_folder), text_length=32, text_encoder=TEXT
    )


@pytest.fixture(scope="session", autouse=True)
def shared(photo_config):
    """Shares the encoders among the runs in this process, to save the time for compiling them again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "make_codec", shared_codec)
        patch.setattr(samples, "TextEncoder", shared_text_encoder)
        yield


OPTIONS = Options(shard_mb=1, min_bucket=5, max_refused_share=0.2, workers=3, image_batch=8, text_batch=8)


@pytest.fixture(scope="session")
def made(tmp_path_factory, photos, photo_config):
    """The features of the photos, their manifest, and the lines that were printed."""
    out = tmp_path_factory.mktemp("made") / "features"
    printed = []
    manifest = precompute(
        open_images("auto", str(photos), photo_config, {}), photo_config, out, OPTIONS, printed.append
    )
    return out, manifest, printed


def contents(folder: Path, pattern: str = "*.arrayrecord") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- What is written


def test_records_hold_the_encoded_crops(made, photos, photo_config):
    out, _, _ = made
    assert verify(out) == []
    dataset = FeatureDataset(out)
    assert len(dataset) == 24
    codec, encoder = shared_codec(photo_config, 8), shared_text_encoder(TEXT, 32, OPTIONS.text_batch)
    table = buckets.bucket_table(256)
    names = set()
    for number, entry in enumerate(dataset.buckets):
        records = dataset.read(number, range(entry.count))
        crops = []
        for record in records:
            image = decode_image(photos / record.key)
            assert record.bucket == entry.bucket == buckets.nearest(*image.shape[:2], table)
            crop = resize_and_crop(image, record.bucket.height, record.bucket.width)
            geometry = (record.image_size, record.resized_size, record.offset)
            assert geometry == (image.shape[:2], crop.resized_size, crop.offset)
            crops.append(crop.pixels)
        # In reverse order, because a record must not depend on the batch in which it was encoded.
        means, stds = codec.encode(np.stack(crops[::-1]))
        for record, mean, std in zip(records, means[::-1], stds[::-1], strict=True):
            np.testing.assert_allclose(record.mean.astype(np.float32), mean, rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(record.std.astype(np.float32), std, rtol=2e-3, atol=1e-4)
            text = (photos / record.key).with_suffix(".txt").read_text()
            (caption,) = record.captions
            values, (length,) = encoder.encode([text])
            assert (caption.text, caption.length, caption.name) == (text, length, "caption")
            np.testing.assert_allclose(
                caption.features.astype(np.float32), values[0, :length], rtol=1e-2, atol=1e-2
            )
            names.add(record.key)
    assert len(names) == 24 and record.label == -1
    null, length = encoder.null_text()
    np.testing.assert_allclose(dataset.null_text(), null, rtol=0, atol=1e-5)
    assert dataset.null_length == length == 1


def test_manifest_and_report(made):
    out, manifest, printed = made
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["refused"] == {"broken": 1, "format": 1, "missing_caption": 1}
    lines = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["broken.png", "nothing.jpg", "uncaptioned.png"]
    assert sorted(shard["records"] for shard in manifest["shards"]) == [8, 16]
    text = "\n".join(printed)
    assert "skipped: truncated or damaged image" in text and "24 records" in text
    assert "bucket 256x256 (ratio 1.0): 16 records" in text


@pytest.mark.filterwarnings("ignore")
def test_all_kinds_of_source_give_the_same_records(tmp_path, photo_config):
    sample = load_sample_images().images
    files = {
        name: (encode(sample[photo][top : top + height, left : left + width], form), f"a crop named {name}")
        for name, photo, top, left, height, width, form in CROPS
    }
    # With so few images all buckets are merged into one, so that a single shape is compiled.
    options = dataclasses.replace(OPTIONS, min_bucket=32, max_crop=1.0)
    expected, kinds = None, set()
    for number, (kind, source, name_of) in enumerate(open_every_kind(tmp_path, files)):
        out = tmp_path / f"features-{number}"
        manifest = precompute(source, photo_config, out, options, **QUIET)
        assert len(manifest["buckets"]) == 1 and manifest["refused"] == {}
        dataset = FeatureDataset(out)
        records = {name_of(dataset[i].key): dataset[i] for i in range(len(dataset))}
        expected = expected or records
        assert records.keys() == expected.keys() == files.keys()
        for name, record in records.items():
            other = expected[name]
            np.testing.assert_allclose(record.mean, other.mean, rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(record.std, other.std, rtol=2e-3, atol=1e-4)
            for field in ("bucket", "image_size", "resized_size", "offset", "label"):
                assert getattr(record, field) == getattr(other, field)
            (caption,), (same,) = record.captions, other.captions
            assert caption.text == same.text == f"a crop named {name}"
            np.testing.assert_allclose(
                caption.features.astype(np.float32), same.features.astype(np.float32), rtol=1e-2, atol=1e-2
            )
        kinds.add(kind)
    assert kinds == {
        *("folder", "kohya", "imagefolder", "json", "jsonl", "csv", "parquet", "webdataset", "tfds")
    }


def test_captions_that_are_too_long_are_reported(tmp_path, photos, photo_config):
    config = dataclasses.replace(
        photo_config, codec="pixels", buckets="single", image_size=16, text_length=20
    )
    printed = []
    manifest = precompute(
        open_images("folder", str(photos), config, {}), config, tmp_path, OPTIONS, say=printed.append
    )
    cut = [json.loads(line) for line in (tmp_path / "cut.jsonl").read_text().splitlines()]
    assert manifest["cut_captions"] == len(cut) == 12
    long = next(line for line in cut if line["caption"] == "a Chinese temple, crop number 2")
    # 19 bytes and the end-of-sequence token are kept.
    assert long == {"caption": "a Chinese temple, crop number 2", "removed": "rop number 2", "tokens": 32}
    assert any("12 captions were truncated to 20 tokens" in line for line in printed)
    assert FeatureDataset(tmp_path)[0].mean.shape == (16, 16, 3)


def test_words_that_the_encoder_does_not_get_are_reported(tmp_path, photos, photo_config):
    config = dataclasses.replace(
        photo_config,
        codec="pixels",
        buckets="single",
        image_size=16,
        text_encoder=dataclasses.replace(TEXT, clean_caption=True, tokenizer=str(tmp_path / "tokenizer")),
    )
    foreign.save_tokenizer(tmp_path / "tokenizer")
    image = next(photos.glob("flower/*.png")).read_bytes()
    captions = [
        "a photo of sks123 dog",
        "一只橘猫",
        "a dog",
        ["https://example.org/a", "a 4x4 truck"],
        "a dog",
        "кошка",
    ]
    lines = [{"path": f"{i}.png", "prompt": caption} for i, caption in enumerate(captions)]
    for line in lines:
        (tmp_path / line["path"]).write_bytes(image)
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed, out = [], tmp_path / "features"
    source = open_images("auto", str(tmp_path / "list.jsonl"), config, {})
    manifest = precompute(source, config, out, OPTIONS, say=printed.append)
    assert manifest["refused"] == {"emptied_caption": 1}
    refused = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert refused[0]["key"] == "1.png" and "clean_caption=False keeps it" in refused[0]["text"]
    cleaned = [json.loads(line) for line in (out / "cleaned.jsonl").read_text().splitlines()]
    assert manifest["cleaned_captions"] == len(cleaned) == 3
    assert [(line["removed"], line["cleaned"]) for line in cleaned] == [
        ("sks123", "a photo of dog"),
        ("https example org a", ""),
        ("4x4", "a truck"),
    ]
    assert any("3 captions lost words in cleaning (all in cleaned.jsonl)" in line for line in printed)
    dataset = FeatureDataset(out)
    texts = {dataset[i].key: [caption.text for caption in dataset[i].captions] for i in range(len(dataset))}
    assert texts["3.png"] == ["a 4x4 truck"] and "1.png" not in texts and len(texts) == 5
    # The vocabulary is that of a few English sentences.
    unknown = [json.loads(line) for line in (out / "unknown.jsonl").read_text().splitlines()]
    assert manifest["unknown_captions"] == len(unknown) and unknown[-1]["caption"] == "кошка"
    assert any("tokenizer does not know (all in unknown.jsonl)" in line for line in printed)


def test_a_folder_of_version_0_1_keeps_its_buckets(tmp_path, photos, photo_config):
    """That version merged buckets whatever was cropped, and did not write how much was allowed."""
    config = dataclasses.replace(photo_config, codec="pixels", text=False)
    source = open_images("folder", str(photos), config, {})
    old = precompute(
        source, config, tmp_path, dataclasses.replace(OPTIONS, min_bucket=12, max_crop=1.0), **QUIET
    )
    job = json.loads((tmp_path / module.JOB).read_text())
    assert job["source"].pop("max_crop") == 1.0
    (tmp_path / module.JOB).write_text(json.dumps(job))
    again = precompute(source, config, tmp_path, dataclasses.replace(OPTIONS, min_bucket=12), **QUIET)
    assert len(old["buckets"]) == 1 and again["shards"] == old["shards"]
    with pytest.raises(UserError, match="was started with min_bucket=12, now 5"):
        precompute(source, config, tmp_path, OPTIONS, **QUIET)
    new = precompute(source, config, tmp_path / "new", dataclasses.replace(OPTIONS, min_bucket=12), **QUIET)
    assert len(new["buckets"]) == 2


def test_equal_captions_are_encoded_once(tmp_path, monkeypatch):
    """A caption is encoded once per shard, or only once if several shards need it."""
    calls = []
    encode_each = TextEncoder.encode_each

    def counted(self, captions):
        calls.extend(captions)
        return encode_each(self, captions)

    monkeypatch.setattr(TextEncoder, "encode_each", counted)
    source = DigitsSource("test")
    monkeypatch.setattr(planning, "record_bytes", lambda *_: (1 << 20) // 40)
    manifest = precompute(source, DIGITS, tmp_path, Options(shard_mb=1), **QUIET)
    assert len(manifest["shards"]) == 8
    different = {caption.text for i in range(len(source)) for caption in source[i].captions}
    assert sorted(calls) == sorted(different)
    dataset = FeatureDataset(tmp_path)
    for i in range(len(source)):
        assert [c.text for c in dataset[i].captions] == [c.text for c in source[i].captions]
        np.testing.assert_array_equal(dataset[i].mean, source[i].decode())
        assert dataset[i].label == source[i].label


def test_classes_without_text(tmp_path, photos):
    root = tmp_path / "classes"
    for path in photos.glob("*/*.*g"):
        target = root / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    config = dataclasses.replace(DIGITS, image_size=16, text=False)
    with pytest.raises(UserError, match=r"class folders without captions.*features\.text=False"):
        open_images("auto", str(root), dataclasses.replace(config, text=True), {})
    (root / "captions.jsonl").touch()
    with pytest.raises(UserError, match=r"perhaps they are in '.*captions.jsonl': give this list with"):
        open_images("auto", str(root), dataclasses.replace(config, text=True), {})
    precompute(open_images("auto", str(root), config, {}), config, tmp_path / "out", OPTIONS, **QUIET)
    dataset = FeatureDataset(tmp_path / "out")
    assert dataset.classes == ("flower", "temple") and dataset.text_length == 0
    assert all(dataset.classes[dataset[i].label] == dataset[i].key.split("/")[0] for i in range(24))
    assert not (tmp_path / "out/null_text.npy").exists()


def test_small_buckets_are_merged_and_printed(tmp_path, photos, photo_config):
    config = dataclasses.replace(photo_config, codec="pixels", text=False)
    options = dataclasses.replace(OPTIONS, min_bucket=12, max_crop=1.0)
    printed = []
    manifest = precompute(
        open_images("folder", str(photos), config, {}), config, tmp_path, options, printed.append
    )
    merged = {name: to for name, to in manifest["merged"].items() if name != to}
    assert merged and sum(shard["records"] for shard in manifest["shards"]) >= 24
    for name, target in merged.items():
        assert any(f"bucket {target}" in line and name in line for line in printed)
    dataset = FeatureDataset(tmp_path)
    assert {entry.bucket.name for entry in dataset.buckets} == set(manifest["merged"].values())


# --- The same bytes after restarts and with split work


def test_running_again_does_nothing(made, photos, photo_config, monkeypatch):
    out, manifest, _ = made
    before = contents(out, "*.*")
    monkeypatch.setattr(samples, "TextEncoder", lambda *_: pytest.fail("loads the text encoder without need"))
    again = precompute(
        open_images("auto", str(photos), photo_config, {}), photo_config, out, OPTIONS, **QUIET
    )
    assert again == manifest and contents(out, "*.*") == before


def test_a_missing_shard_is_written_again(made, photos, photo_config, tmp_path):
    out, _, _ = made
    before = contents(out)
    victim = out / next(iter(before))
    victim.unlink()
    precompute(open_images("auto", str(photos), photo_config, {}), photo_config, out, OPTIONS, **QUIET)
    assert contents(out) == before


def test_split_work_writes_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "record_bytes", lambda *_: (1 << 20) // 50)
    source = DigitsSource("test")
    precompute(source, DIGITS, tmp_path / "whole", Options(shard_mb=1), **QUIET)
    for part in (2, 0, 1):
        options = Options(shard_mb=1, part=(part, 3))
        precompute(source, DIGITS, tmp_path / "parts", options, **QUIET)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    whole, parts = FeatureDataset(tmp_path / "whole"), FeatureDataset(tmp_path / "parts")
    assert whole.fingerprint == parts.fingerprint and len(whole) == 299
    assert whole.buckets[0].bucket == buckets.Bucket(8, 8, "1.0")
    assert not list(tmp_path.rglob("*.tmp"))
    assert verify(tmp_path / "parts") == []


class Killed(BaseException):
    pass


def test_restart_after_a_stop_at_any_write(tmp_path, monkeypatch):
    """Stops at each rename and each flush, like a power failure; files that exist must be complete."""
    monkeypatch.setattr(planning, "record_bytes", lambda *_: (1 << 20) // 150)
    source, options = DigitsSource("test"), Options(shard_mb=1)
    precompute(source, DIGITS, tmp_path / "whole", options, **QUIET)
    expected = contents(tmp_path / "whole", "*.*")

    for name in ("replace", "fsync"):
        for stop in range(100):
            out = tmp_path / f"{name}-{stop}"
            with monkeypatch.context() as patch:
                patch.setattr(os, name, stopping_after(stop, getattr(os, name)))
                try:
                    precompute(source, DIGITS, out, options, **QUIET)
                    break
                except Killed:
                    pass
            for file, digest in contents(out).items():
                assert digest == expected[file]
            precompute(source, DIGITS, out, options, **QUIET)
            found = contents(out, "*.*")
            assert {file: found[file] for file in expected} == expected, (name, stop)
        assert stop >= 8


def stopping_after(calls, function):
    """Returns a function that calls `function` for a number of times, and then raises `Killed` instead."""
    left = [calls]

    def call(*arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return function(*arguments)

    return call


def test_records_of_the_shapes(tmp_path):
    config = dataclasses.replace(DIGITS, text_length=64)
    source = open_images("auto", "shapes", config, {"count": "9", "split": "test"})
    precompute(source, config, tmp_path, **QUIET)
    records = {record.key: record for record in map(FeatureDataset(tmp_path).__getitem__, range(9))}
    for i in range(9):
        example = source[i]
        record = records[example.key]
        np.testing.assert_array_equal(record.mean, example.decode())
        assert record.label == example.label
        assert [caption.name for caption in record.captions] == ["noun", "attributes", "full"]


CHILD = """
import sys
from tests_config import config
from pixart_jax.data import planning
from pixart_jax.data.digits import DigitsSource
from pixart_jax.precompute import Options, precompute
planning.record_bytes = lambda *_: (1 << 20) // 20
print('go', flush=True)
for out, part, parts in (job.split(',') for job in sys.argv[1:]):
    precompute(DigitsSource('test'), config, out, Options(shard_mb=1, part=(int(part), int(parts))))
"""


def test_restart_after_a_kill_at_a_random_time(tmp_path):
    """Kills processes of single and split runs. PIXART_KILLS sets how many (20 take some minutes)."""
    values = to_dict(DIGITS)
    (tmp_path / "tests_config.py").write_text(
        "from pixart_jax.config import FeaturesConfig, from_dict\n"
        f"config = from_dict({values!r}, FeaturesConfig)\n"
    )
    (tmp_path / "child.py").write_text(CHILD)
    root = Path(module.__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "XLA_FLAGS": xla_flags.ONE_DEVICE,
        "JAX_PLATFORMS": "cpu",
    }
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "cache")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(*jobs):
        arguments = [f"{tmp_path / out},{part},{parts}" for out, part, parts in jobs]
        command = [sys.executable, str(tmp_path / "child.py"), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)

    begin = time.monotonic()
    child = start(("whole", 0, 1))
    assert child.stdout.readline() == "go\n"
    assert child.wait(timeout=300) == 0
    duration = time.monotonic() - begin
    expected = contents(tmp_path / "whole", "*.*")
    shards = contents(tmp_path / "whole")
    assert len(shards) >= 15

    rng = random.Random(0)
    for kill in range(int(os.environ.get("PIXART_KILLS", "1"))):
        out, part, parts = ("killed", 0, 1) if kill % 2 == 0 else ("split", rng.randrange(3), 3)
        child = start((out, part, parts))
        assert child.stdout.readline() == "go\n"
        time.sleep(rng.uniform(0, 0.5 * duration / parts))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert contents(tmp_path / out).items() <= shards.items(), kill
        if kill % 8 == 6:  # start from nothing, so that early stages of the run are tested again
            for path in [*(tmp_path / "killed").rglob("*")][::-1]:
                path.rmdir() if path.is_dir() else path.unlink()
    child = start(("killed", 0, 1), *(("split", part, 3) for part in range(3)))
    assert child.communicate(timeout=300) and child.returncode == 0
    found = contents(tmp_path / "killed", "*.*")
    assert {name: found[name] for name in expected} == expected
    assert contents(tmp_path / "split") == shards
    for out in ("killed", "split"):
        assert verify(tmp_path / out) == []


# --- Images that change, are repaired, or are added

# For images of 16 x 16 pixels, without captions and encoders.
TINY = FeaturesConfig(image_size=16, codec="pixels", latent_scale=1.0, text=False)


def paint(folder, names, colour, text=None):
    """Writes images of one colour. They have the same size in bytes, whatever the colour."""
    for name in names:
        path = folder / f"{name}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(path)
        if text is not None:
            path.with_suffix(".txt").write_text(text)


def encode_folder(images, out, config=TINY, source_options=None, **options):
    """Runs precompute, and returns the colours of the records by key, and the lines that were printed."""
    printed = []
    source = open_images("auto", str(images), config, source_options or {})
    precompute(source, config, out, Options(**{"workers": 2} | options), printed.append)
    return colours(out), "\n".join(printed)


def colours(out):
    dataset = FeatureDataset(out)
    records = [dataset[i] for i in range(len(dataset))]
    assert verify(out) == [] and len({record.key for record in records}) == len(records)
    return {record.key: tuple(record.mean[0, 0].tolist()) for record in records}


@pytest.fixture
def dozen_per_shard(monkeypatch):
    monkeypatch.setattr(planning, "record_bytes", lambda *_: (1 << 20) // 12)


RED, BLUE = (200, 0, 0), (0, 0, 200)


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_replaced_images_stop_the_run(tmp_path, kind):
    """The new images have the names, the sizes and the time of change of the old ones."""

    def write(colour):
        paint(tmp_path / "images", "abcd", colour)
        files = {f"{name}.bmp": ((tmp_path / f"images/{name}.bmp").read_bytes(), "") for name in "abcd"}
        if kind == "webdataset":
            return write_tar(tmp_path / "a.tar", [(name, data) for name, (data, _) in files.items()])
        if kind == "parquet":
            table = {"image": [data for data, _ in files.values()]}
            return write_parquet(tmp_path / "a.parquet", table)
        return tmp_path / "images"

    images, out = write(RED), tmp_path / "out"
    before, _ = encode_folder(images, out)
    assert set(before.values()) == {RED} and len(before) == 4
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if out not in path.parents}
    write(BLUE)
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))
    with pytest.raises(UserError, match=r"4 of 4 samples .* has another image") as error:
        encode_folder(images, out)
    assert "'a" in one_line(error) or "/" in one_line(error)
    # The same bytes in new files are no change.
    write(RED)
    again, printed = encode_folder(images, out)
    assert again == before and ("reading them" in printed) == (kind != "parquet")
    assert "reading them" not in encode_folder(images, out)[1]


def test_an_interrupted_run_does_not_mix_old_and_new_images(tmp_path, dozen_per_shard):
    images, out = tmp_path / "images", tmp_path / "out"
    names = [f"{i:02d}" for i in range(20)]
    paint(images, names, RED)

    def stop(line):
        if "1 of 2" in line:
            raise Killed

    with pytest.raises(Killed):
        precompute(open_images("auto", str(images), TINY, {}), TINY, out, Options(shard_mb=1), stop)
    paint(images, names, BLUE)
    with pytest.raises(UserError, match=r"12 of 12 samples that are encoded .* '00.bmp' has another image"):
        encode_folder(images, out, shard_mb=1)
    paint(images, names[:12], RED)
    (images / "19.bmp").unlink()  # not encoded yet
    found, printed = encode_folder(images, out, shard_mb=1)
    assert "1 samples of unfinished shards have changed or are gone" in printed
    assert found == {f"{name}.bmp": RED if name < "12" else BLUE for name in names[:-1]}


def test_deleting_a_shard_encodes_its_changed_samples_again(tmp_path, dozen_per_shard):
    images, out = tmp_path / "images", tmp_path / "out"
    names = [f"{i:02d}" for i in range(20)]
    paint(images, names, RED)
    encode_folder(images, out, shard_mb=1)
    other = (out / "16x16-00000.arrayrecord").stat().st_mtime_ns
    paint(images, names[15:17], BLUE)
    (images / "18.bmp").unlink()
    with pytest.raises(UserError, match=r"delete their shards \(1\): 16x16-00001.arrayrecord"):
        encode_folder(images, out, shard_mb=1)
    (out / "16x16-00001.arrayrecord").unlink()
    found, _ = encode_folder(images, out, shard_mb=1)
    expected = {f"{name}.bmp": RED for name in names} | {"15.bmp": BLUE, "16.bmp": BLUE}
    del expected["18.bmp"]
    assert found == expected
    assert (out / "16x16-00000.arrayrecord").stat().st_mtime_ns == other


def test_gone_and_recaptioned_samples_stop_the_run(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    config = dataclasses.replace(TINY, text=True, text_length=40, text_dtype="float32", text_encoder=TEXT)
    paint(images, "abc", RED, text="a square")
    encode_folder(images, out, config)
    (images / "b.bmp").rename(tmp_path / "b.bmp")
    with pytest.raises(UserError, match=r"1 of 3 samples .* 'b.bmp' is gone or cannot be used"):
        encode_folder(images, out, config)
    (tmp_path / "b.bmp").rename(images / "b.bmp")
    (images / "c.txt").write_text("another")
    with pytest.raises(UserError, match=r"1 of 3 samples .* 'c.bmp' has another caption, label or size"):
        encode_folder(images, out, config)


def test_a_failed_run_continues_with_repaired_samples(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    config = dataclasses.replace(TINY, text=True, text_length=40, text_dtype="float32", text_encoder=TEXT)
    paint(images, "abcd", RED, text="a square")
    paint(images, "e", RED)
    with pytest.raises(UserError, match="skipped 1 of 5") as error:
        encode_folder(images, out, config)
    assert not (out / "job.json").exists() and f"'{out}/refused.jsonl' lists all of them" in one_line(error)
    assert json.loads((out / "refused.jsonl").read_text())["key"] == "e.bmp"
    (images / "e.txt").write_text("a square")
    assert len(encode_folder(images, out, config)[0]) == 5


def test_all_skipped_samples_are_listed(tmp_path):
    config = dataclasses.replace(TINY, text=True, text_length=40, text_dtype="float32", text_encoder=TEXT)
    paint(tmp_path / "images", "a", RED, text="a square")
    paint(tmp_path / "images", [f"{i:03d}" for i in range(250)], RED)
    with pytest.raises(UserError, match=r"skipped 250 of 251 samples \(99.6%\), max_refused_share is 0.05"):
        encode_folder(tmp_path / "images", tmp_path / "out", config)
    assert len((tmp_path / "out/refused.jsonl").read_text().splitlines()) == 250


@pytest.mark.parametrize("repair", ["write", "remove"])
def test_broken_images_are_tried_again(tmp_path, repair, dozen_per_shard):
    """They were skipped when their shard was encoded; the other records of the shard are kept."""
    images, out = tmp_path / "images", tmp_path / "out"
    names = [f"{i:02d}" for i in range(20)]
    paint(images, names, RED)
    whole = (images / "03.bmp").read_bytes()
    for name in ("03", "15"):
        (images / f"{name}.bmp").write_bytes(whole[:-200])
    for _ in range(2):
        with pytest.raises(UserError, match="skipped 2 of 20"):
            encode_folder(images, out, shard_mb=1)
    first = contents(out)
    for name in ("03", "15"):
        path = images / f"{name}.bmp"
        path.write_bytes(whole) if repair == "write" else path.unlink()
    found, printed = encode_folder(images, out, shard_mb=1)
    assert len(found) == (20 if repair == "write" else 18) and first.items() <= contents(out).items()
    assert ("2 new samples" in printed) == (repair == "write")
    assert (out / "refused.jsonl").read_text() == ""
    assert encode_folder(images, out, shard_mb=1)[0] == found


def test_a_shard_of_which_all_samples_are_skipped_is_tried_again(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    paint(images, "abcdef", RED)
    encode_folder(images, out, max_refused_share=0.5)
    whole = (images / "a.bmp").read_bytes()
    (images / "x.bmp").write_bytes(whole[:-200])
    for _ in range(3):
        found, printed = encode_folder(images, out, max_refused_share=0.5)
        assert len(found) == 6 and "16x16-00001.arrayrecord: 0 records" in printed
        assert json.loads((out / "refused.jsonl").read_text())["key"] == "x.bmp"
    (images / "x.bmp").write_bytes(whole)
    assert len(encode_folder(images, out)[0]) == 7


def test_a_list_with_a_missing_image_and_a_passing_error(tmp_path, monkeypatch):
    paint(tmp_path / "images", "abcde", RED)
    lines = [json.dumps({"path": f"images/{name}.bmp"}) + "\n" for name in "abcdef"]
    (tmp_path / "list.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"skipped 1 of 6.*missing_image"):
        encode_folder(tmp_path / "list.jsonl", out)
    paint(tmp_path / "images", "f", RED)
    opened = os.open
    with monkeypatch.context() as patch:

        def fails(path, *flags):
            if Path(path).name == "f.bmp":
                raise OSError(5, "Input/output error")
            return opened(path, *flags)

        patch.setattr(os, "open", fails)
        with pytest.raises(UserError, match=r"skipped 1 of 6.*Input/output error"):
            encode_folder(tmp_path / "list.jsonl", tmp_path / "other")
    assert len(encode_folder(tmp_path / "list.jsonl", out)[0]) == 6
    assert len(encode_folder(tmp_path / "list.jsonl", tmp_path / "other")[0]) == 6


def test_a_folder_without_records_can_be_started_with_another_config(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    wide = dataclasses.replace(TEXT, d_model=24)
    wrong = dataclasses.replace(TINY, text=True, text_length=40, text_encoder=wide)
    paint(images, "abcd", RED, text="a square")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.features, "write_shard", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            encode_folder(images, out, wrong)
    assert np.load(out / "null_text.npy").shape == (40, 24)
    right = dataclasses.replace(wrong, text_encoder=TEXT)
    assert len(encode_folder(images, out, right)[0]) == 4
    assert FeatureDataset(out).null_text().shape == (40, 16)
    with pytest.raises(UserError, match=r"was started with features.text_encoder.d_model=16, now 24"):
        encode_folder(images, out, wrong)


def test_changed_encoders_stop_the_run(tmp_path, vae_folder):
    """A folder with other weights has the same name in the config."""
    shutil.copytree(vae_folder, tmp_path / "vae")
    config = FeaturesConfig(image_size=16, vae=str(tmp_path / "vae"), text=False)
    paint(tmp_path / "images", "ab", RED)
    source = open_images("auto", str(tmp_path / "images"), config, {})
    for _ in range(2):
        precompute(source, config, tmp_path / "out", **QUIET)
    weights = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"with other files in the folder of features\.vae") as error:
        precompute(source, config, tmp_path / "out", **QUIET)
    one_line(error)


def test_added_images_go_into_new_shards(tmp_path, monkeypatch, dozen_per_shard):
    images, out = tmp_path / "images", tmp_path / "out"
    paint(images, [f"{i:02d}" for i in range(20)], RED)
    encode_folder(images, out, shard_mb=1)
    before, first = contents(out), FeatureDataset(out)
    order = [first[i].key for i in range(20)]
    # New names come before, between and after the old ones.
    paint(images, ["0", "05b", *(f"z{i}" for i in range(14))], BLUE)
    read = []
    original = samples.SampleEncoder.read
    monkeypatch.setattr(samples.SampleEncoder, "read", lambda *a: read.append(a[2]) or original(*a))
    found, printed = encode_folder(images, out, shard_mb=1)
    assert "16 new samples" in printed and len(read) == 16
    assert sorted(found.values()) == [BLUE] * 16 + [RED] * 20
    assert before.items() <= contents(out).items() and len(contents(out)) == 4
    grown = FeatureDataset(out)
    assert [grown[i].key for i in range(20)] == order and grown.fingerprint != first.fingerprint
    # Once more, and once more without any change.
    paint(images, ["zz"], BLUE)
    assert len(encode_folder(images, out, shard_mb=1)[0]) == 37
    assert "of which 5 are done" in encode_folder(images, out, shard_mb=1)[1]


def test_added_images_after_a_stop_at_any_write(tmp_path, monkeypatch, dozen_per_shard):
    """As for the first round: the shards are those of an uninterrupted run."""
    images = tmp_path / "images"
    paint(images, [f"{i:02d}" for i in range(14)], RED)
    encode_folder(images, tmp_path / "first", shard_mb=1, validation_share=0.1)
    paint(images, [f"{i:02d}b" for i in range(20)], BLUE)
    shutil.copytree(tmp_path / "first", tmp_path / "whole")
    encode_folder(images, tmp_path / "whole", shard_mb=1, validation_share=0.1)
    for stop in range(100):
        out = tmp_path / f"stop-{stop}"
        shutil.copytree(tmp_path / "first", out)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping_after(stop, os.replace))
            try:
                encode_folder(images, out, shard_mb=1, validation_share=0.1)
                break
            except Killed:
                pass
        encode_folder(images, out, shard_mb=1, validation_share=0.1)
        for folder in (".", "validation"):
            assert contents(out / folder, "*.*") == contents(tmp_path / "whole" / folder, "*.*"), stop
    assert stop >= 8


def test_added_images_in_split_work(tmp_path, dozen_per_shard):
    images, out = tmp_path / "images", tmp_path / "out"
    paint(images, [f"{i:02d}" for i in range(30)], RED)
    source = lambda: open_images("auto", str(images), TINY, {})  # noqa: E731
    parts = [Options(shard_mb=1, part=(part, 2)) for part in range(2)]
    precompute(source(), TINY, out, parts[0], **QUIET)
    paint(images, ["new"], BLUE)
    printed = []
    precompute(source(), TINY, out, parts[1], printed.append)
    assert any("1 new samples, which a run after all parts are finished will encode" in p for p in printed)
    assert len(colours(out)) == 30
    for part in parts:
        precompute(source(), TINY, out, part, **QUIET)
    assert len(colours(out)) == 31
    # A single run that has finished does not hide the parts of a later split run.
    paint(images, ["newer"], BLUE)
    assert len(encode_folder(images, out, shard_mb=1)[0]) == 32
    paint(images, ["newest"], BLUE)
    for part in parts:
        precompute(source(), TINY, out, part, **QUIET)
    assert len(colours(out)) == 33


def test_a_process_whose_plan_was_replaced_stops(tmp_path, dozen_per_shard):
    """Another part starts with other images before the first shard of this one is finished."""
    images, out = tmp_path / "images", tmp_path / "out"
    paint(images, [f"{i:02d}" for i in range(20)], RED)
    write_shard = module.features.write_shard

    def meanwhile(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.features, "write_shard", write_shard)
            paint(images, ["1b"], RED)
            source = open_images("auto", str(images), TINY, {})
            precompute(source, TINY, out, Options(shard_mb=1, part=(1, 2)), **QUIET)
        return write_shard(*arguments)

    source = open_images("auto", str(images), TINY, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.features, "write_shard", meanwhile)
        with pytest.raises(UserError, match="another process found other images"):
            precompute(source, TINY, out, Options(shard_mb=1, part=(0, 2)), **QUIET)
    source = open_images("auto", str(images), TINY, {})
    precompute(source, TINY, out, Options(shard_mb=1, part=(0, 2)), **QUIET)
    assert len(colours(out)) == 21


def test_new_images_join_the_buckets_that_exist(tmp_path):
    config = dataclasses.replace(TINY, image_size=256, buckets="official")
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    rng = np.random.default_rng(0)

    def add(prefix, size, number):
        for i in range(number):
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(images / f"{prefix}{i}.png")

    add("square", (32, 32), 4)
    encode_folder(images, out, config, min_bucket=4)
    add("nearly", (30, 32), 1)  # too few for a bucket of their own
    add("wide", (20, 40), 4)
    encode_folder(images, out, config, min_bucket=4)
    counts = {entry.bucket.name: entry.count for entry in FeatureDataset(out).buckets}
    assert counts == {"256x256": 5, "176x352": 4}
    assert json.loads((out / "manifest.json").read_text())["merged"]["240x256"] == "256x256"


def test_held_out_samples_stay_held_out(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    paint(images, [f"{i:03d}" for i in range(100)], RED)
    train, printed = encode_folder(images, out, validation_share=0.1)
    held_out = colours(out / "validation")
    assert not train.keys() & held_out.keys() and len(train) + len(held_out) == 100
    assert 4 <= len(held_out) <= 17 and f"{len(held_out)} records" in printed
    paint(images, [f"{i:03d}b" for i in range(100)], BLUE)
    grown, _ = encode_folder(images, out, validation_share=0.1)
    both = colours(out / "validation")
    assert train.items() <= grown.items() and held_out.items() <= both.items()
    assert len(grown) + len(both) == 200 and len(both) > len(held_out)
    # The choice does not depend on the images that were there first.
    alone, _ = encode_folder(images, tmp_path / "alone", validation_share=0.1)
    assert alone == grown
    with pytest.raises(UserError, match=r"was started with validation_share=0.1, now 0.2"):
        encode_folder(images, out, validation_share=0.2)


def test_held_out_images_use_the_buckets_of_the_others(tmp_path):
    config = dataclasses.replace(TINY, image_size=256, buckets="official")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        Image.new("RGB", (32, 32) if i % 2 else (40, 20), RED).save(images / f"{i:02d}.png")
    encode_folder(images, tmp_path / "out", config, min_bucket=8, validation_share=0.2)
    found = [FeatureDataset(path) for path in (tmp_path / "out", tmp_path / "out/validation")]
    assert [{entry.bucket.name for entry in one.buckets} for one in found] == [{"256x256", "176x352"}] * 2
    assert max(entry.count for entry in found[1].buckets) < 8


def test_copies_of_an_image_are_held_out_together(tmp_path):
    paint(tmp_path / "images/3_dog", [f"{i:02d}" for i in range(20)], RED)
    paint(tmp_path / "images/1_cat", [f"{i:02d}" for i in range(20)], BLUE)
    source = open_images("kohya", str(tmp_path / "images"), TINY, {})
    precompute(source, TINY, tmp_path / "out", Options(validation_share=0.3), **QUIET)
    train, held_out = (
        {key.partition("#")[0]: key for key in colours(folder)}
        for folder in (tmp_path / "out", tmp_path / "out/validation")
    )
    assert not train.keys() & held_out.keys() and len(train) + len(held_out) == 40
    assert any("#3" in key for key in held_out.values())


def test_a_small_set_has_a_held_out_sample(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    paint(images, "abcde", RED)
    train, _ = encode_folder(images, out, validation_share=0.01)
    held_out = colours(out / "validation")
    assert (len(train), len(held_out)) == (4, 1)
    # If that sample is broken, none is left.
    (broken,) = held_out
    whole = (images / broken).read_bytes()
    (images / broken).write_bytes(whole[:-200])
    options = dict(validation_share=0.01, max_refused_share=0.5)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"validation' gets no records.* all of its 1 .*'{broken}'"):
            encode_folder(images, tmp_path / "other", **options)
    (images / broken).write_bytes(whole)
    assert encode_folder(images, tmp_path / "other", **options)[0] == train
    paint(images, [f"{i:03d}" for i in range(300)], BLUE)
    grown, _ = encode_folder(images, out, validation_share=0.01)
    assert train.items() <= grown.items() and held_out.items() < colours(out / "validation").items()


def test_verify_reads_the_held_out_features(tmp_path, capsys):
    paint(tmp_path / "images", [f"{i:02d}" for i in range(20)], RED)
    encode_folder(tmp_path / "images", tmp_path / "out", validation_share=0.2)
    assert verify_command(str(tmp_path / "out")) == 0
    shard = next((tmp_path / "out/validation").glob("*.arrayrecord"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    capsys.readouterr()
    assert verify_command(str(tmp_path / "out")) == 2
    printed = capsys.readouterr().out
    assert f"shard '{shard}': sha256 differs" in printed
    lines = [line for line in printed.splitlines() if line.endswith("faults")]
    assert lines[0].startswith(f"{tmp_path / 'out'}: ") and lines[0].endswith(" 0 faults")
    assert lines[1].startswith(f"{tmp_path / 'out/validation'}: ") and " 0 faults" not in lines[1]


def test_images_are_compared_with_the_features(tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    config = dataclasses.replace(TINY, text=True, text_length=40, text_dtype="float32", text_encoder=TEXT)
    names = [f"{i:02d}" for i in range(20)]
    paint(images, names, RED, text="a square")
    encode_folder(images, out, config, validation_share=0.2)
    given = Flags(features=str(out), images=str(images))
    for folder in (out, out / "validation"):
        assert verify_command(str(folder), dataclasses.replace(given, features=str(folder))) == 0
    assert "records compared with 20 samples" in capsys.readouterr().out
    train = sorted(key.removesuffix(".bmp") for key in colours(out))
    paint(images, train[:1], BLUE)
    (images / f"{train[1]}.txt").write_text("another")
    (images / f"{train[2]}.bmp").unlink()
    paint(images, ["new"], RED, text="a square")
    assert verify_command(str(out), given) == 2
    printed = capsys.readouterr().out
    for name, fault in (
        (train[0], "made from another image"),
        (train[1], "made from other captions"),
        (train[2], "is not among the images, or cannot be used"),
    ):
        assert f"('{name}.bmp'): {fault}" in printed
    assert "'new.bmp': has no features" in printed and ", 4 faults" in printed
    held_out = min(key for key in colours(out / "validation"))
    paint(images, [held_out.removesuffix(".bmp")], BLUE)
    assert verify_command(str(out), given) == 2
    printed = capsys.readouterr().out
    assert f"('{held_out}'): made from another image" in printed and printed.count("'new.bmp'") == 1
    assert f"{out}: " in printed and f"{out / 'validation'}: " in printed and ", 1 faults" in printed
    # Version 0.1 did not record the bytes of the images.
    for path in (out / "work").glob("*.npy"):
        path.unlink()
    assert verify_command(str(out), given) == 2
    printed = capsys.readouterr().out
    assert f"('{train[0]}.bmp'): made from another image" in printed and ", 4 faults" in printed
    assert "without the bytes of the image" in printed


def test_progress_within_a_shard(tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 10.0 * next(clock))
    paint(tmp_path / "images", [f"{i:02d}" for i in range(40)], RED, text="a square")
    config = dataclasses.replace(TINY, text=True, text_length=40, text_dtype="float32", text_encoder=TEXT)
    _, printed = encode_folder(tmp_path / "images", tmp_path / "out", config, image_batch=4)
    lines = [line for line in printed.splitlines() if "images," in line]
    assert lines and all("of 40 images, " in line and "/s, about " in line for line in lines)
    assert all(line.endswith(" left without the captions") for line in lines)
    numbers = [int(line.split(": ")[1].split()[0]) for line in lines]
    assert numbers == sorted(numbers) and numbers[0] < 20


# --- Input errors


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_batch": -1}, "--image_batch is -1: it must be in \\[1, "),
        ({"text_batch": 0}, "--text_batch is 0: it must be in \\[1, "),
        ({"workers": 0}, "--workers is 0: it must be in \\[1, "),
        ({"shard_mb": 0}, "--shard_mb is 0: it must be in \\[1, "),
        ({"min_bucket": -1}, "--min_bucket is -1: it must be at least 0"),
        ({"min_size": -1}, "--min_size is -1: it must be in \\[0, "),
        ({"max_refused_share": float("nan")}, "--max_refused_share is nan: it must be a finite number"),
        ({"validation_share": float("nan")}, "--validation_share is nan: it must be a finite number"),
        ({"max_crop": float("nan")}, "--max_crop is nan: it must be a finite number"),
        ({"validation_share": 1.0}, r"--validation_share is 1.0: it must be in \[0, 1\)"),
    ],
)
def test_options_without_meaning(changes, words):
    with pytest.raises(UserError, match=words):
        Options(**changes)


def test_features_do_not_go_into_the_folder_of_the_images(tmp_path):
    with pytest.raises(UserError, match="is the folder of the images: give another folder"):
        main(Flags(config="unused", images=str(tmp_path), out=f"{tmp_path}/."))


@pytest.mark.parametrize("name", ["file", "file/features"])
def test_features_do_not_go_into_a_file(tmp_path, name):
    (tmp_path / "file").write_text("notes")
    assert module._merging_of(tmp_path / name) == {}
    paint(tmp_path / "images", "a", RED)
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\): a file is where a folder"):
        encode_folder(tmp_path / "images", tmp_path / name)


def test_a_folder_cannot_be_continued_with_another_source_or_config(made, photos, photo_config, tmp_path):
    out, _, _ = made
    for changes, words in (
        ({"image_size": 512}, "was started with features.image_size=256, now 512"),
        (
            {"text_encoder": dataclasses.replace(TEXT, seed=1)},
            "was started with features.text_encoder.seed=0, now 1",
        ),
    ):
        config = dataclasses.replace(photo_config, **changes)
        with pytest.raises(UserError) as error:
            precompute(open_images("folder", str(photos), config, {}), config, out, OPTIONS, **QUIET)
        assert words in one_line(error)
    with pytest.raises(UserError, match="was started with min_bucket=5, now 6"):
        options = dataclasses.replace(OPTIONS, min_bucket=6)
        precompute(open_images("folder", str(photos), photo_config, {}), photo_config, out, options, **QUIET)
    extra = photos / "flower/01.txt"
    before = extra.read_text()
    try:
        extra.write_text("another caption")
        with pytest.raises(UserError, match="was started with other images, captions or sizes"):
            precompute(
                open_images("folder", str(photos), photo_config, {}), photo_config, out, OPTIONS, **QUIET
            )
    finally:
        extra.write_text(before)


def test_no_bad_sample_ends_the_run(tmp_path):
    write_special_files(tmp_path)
    paint(tmp_path, ["good0", "good1"], "red")
    bad = bad_records({"prompt": "a red square", "path": "good0.bmp"})
    # The reason of equal keys would be that they are equal.
    for number, (record, _) in enumerate(bad):
        if record["path"] == "good0.bmp":
            record["path"] = f"bad{number}.bmp"
            shutil.copy(tmp_path / "good0.bmp", tmp_path / record["path"])
    good = [{"prompt": "a red square", "path": f"good{number}.bmp"} for number in (0, 1)]
    lines = [json.dumps(record) for record in [*good, *(record for record, _ in bad)]]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    config = dataclasses.replace(TINY, text=True, text_length=40, text_encoder=CLEANED)
    found, printed = encode_folder(tmp_path / "list.jsonl", tmp_path / "out", config, max_refused_share=1.0)
    assert found == dict.fromkeys(("good0.bmp", "good1.bmp"), (255, 0, 0))
    refused = [json.loads(line) for line in (tmp_path / "out/refused.jsonl").read_text().splitlines()]
    assert sorted(line["reason"] for line in refused) == sorted(reason for _, reason in bad)
    assert f"skipped in total {len(bad)}" in " ".join(printed.split())


def test_too_many_skipped_samples_stop_the_run(tmp_path, photos, photo_config):
    config = dataclasses.replace(photo_config, codec="pixels", buckets="single", image_size=16, text=False)
    for share, stops in ((0.06, True), (0.1, False)):
        options = dataclasses.replace(OPTIONS, max_refused_share=share)
        source = open_images("folder", str(photos), config, {})
        if stops:
            with pytest.raises(UserError) as error:
                precompute(source, config, tmp_path / "out", options, **QUIET)
            assert "skipped 2 of 27 samples" in one_line(error)
            assert not (tmp_path / "out/manifest.json").exists()
        else:
            precompute(source, config, tmp_path / "out", options, **QUIET)
    assert len(FeatureDataset(tmp_path / "out")) == 25


def test_two_processes_cannot_work_on_the_same_part(tmp_path):
    source, errors = DigitsSource("test"), []

    def meanwhile(line):
        if not errors:
            with pytest.raises(UserError, match="another process is working on part 0 of 1") as error:
                precompute(source, DIGITS, tmp_path, **QUIET)
            errors.append(error)

    precompute(source, DIGITS, tmp_path, say=meanwhile)
    assert errors
    # The folder is unlocked when the first run has ended.
    precompute(source, DIGITS, tmp_path, **QUIET)


@pytest.mark.parametrize(
    "broken, words",
    [
        # The final norm affects all features; the embedding of 'z' only the captions of zeros.
        ("final_norm", "returns NaN for the empty caption"),
        ("embed", r"'digits/\d+' cannot be stored: NaN or infinity in the text"),
    ],
)
def test_features_that_are_nan(tmp_path, monkeypatch, broken, words):
    """Weights with NaN raise an error when they are read, so this encoder gets them afterwards."""

    def load(config, vocab_size):
        t5, params = load_t5(config, vocab_size)
        if broken == "embed":
            params["embed"][ord("z") + 3] = np.nan  # ByT5 has three special tokens before the bytes
        else:
            params["final_norm"]["scale"][0] = np.nan
        return t5, params

    monkeypatch.setattr("pixart_jax.encoders.t5.load_t5", load)
    # These tests keep one encoder for each config; a seed of its own keeps the NaN out of the others.
    text_encoder = dataclasses.replace(TEXT, seed=1000 + len(broken))
    config = dataclasses.replace(DIGITS, text_encoder=text_encoder)
    with pytest.raises(UserError, match=words):
        precompute(DigitsSource("test"), config, tmp_path / "out", **QUIET)
    assert not list((tmp_path / "out").glob("*.arrayrecord"))


# --- The command


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pixart_jax.precompute", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(module.__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": xla_flags.ONE_DEVICE, "JAX_PLATFORMS": "cpu"} | environment,
    )


def test_the_command(tmp_path, capsys):
    """A config file, precompute, verify, and the first batch of training."""
    file = tmp_path / "config.py"
    file.write_text(
        "from pixart_jax.config import TrainConfig, from_dict, to_config_dict\n"
        f"VALUES = {to_dict(TrainConfig(features=DIGITS))!r}\n"
        "def get_config():\n    return to_config_dict(from_dict(VALUES))\n"
    )
    out = tmp_path / "features"
    arguments = [f"--config={file}", "--images=digits", f"--out={out}", "--split=test"]
    done = run(*arguments, "--config.features.text=True", "--config.features.text_length=44")
    assert done.returncode == 0, done.stderr
    assert "299 records" in done.stdout and "used  " in done.stdout
    loader = FeatureLoader(
        [FeatureDataset(out)], batch_size=16, seed=0, arrays=("text", "text_mask"), text_length=44
    )
    assert next(loader.iterate()).arrays["text"].shape == (16, 44, 16)

    assert verify_command(str(out)) == 0
    assert "1 shards, 299 records, 0 faults" in capsys.readouterr().out
    shard = out / "8x8-00000.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-1])
    checked = run("verify", f"--features={out}")
    assert checked.returncode == 2 and f"shard '{shard}': truncated" in checked.stdout

    again = run(*arguments)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert (
        again.stderr.strip()
        .splitlines()[-1]
        .startswith(f"error: --out '{out}' was started with features.text_length=44")
    )


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "--config, --images, --out are missing"),
        ({"images": "digits", "out": "x"}, "--config is missing"),
        ({"words": ("verify",)}, "--features is missing"),
        ({"words": ("check",)}, "mode 'check': choose one of verify"),
    ],
)
def test_invalid_flags(given, words):
    with pytest.raises(UserError, match=words):
        main(Flags(**given))


CAPTION = "a photo of sks dog"


@pytest.fixture
def dogs(tmp_path):
    """Images in subfolders, one of which has a caption of its own."""
    folder = tmp_path / "photos"
    (folder / "rex").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(folder / "rex" / f"{i}.png")
    (folder / "rex" / "1.txt").write_text("a cat")
    return folder


def features_of(record):
    """The bytes of the text features of a record with one caption."""
    (caption,) = record.captions
    return np.asarray(caption.features).tobytes()


def encode_dogs(dogs, out, flip=False, **options):
    config = dataclasses.replace(DIGITS, image_size=16)
    source = open_images("auto", str(dogs), config, options, flip=flip)
    precompute(source, config, out, Options(workers=1), **QUIET)
    dataset = FeatureDataset(out)
    return [dataset[i] for i in range(len(dataset))]


def test_one_caption_for_all_images(dogs, tmp_path, capsys):
    (dogs / "rex" / "1.txt").unlink()  # only images in a subfolder look like classes, but have a caption
    out = tmp_path / "out"
    records = encode_dogs(dogs, out, caption=CAPTION)
    assert {record.key for record in records} == {f"rex/{i}.png" for i in range(3)}
    for i in range(3):
        (dogs / "rex" / f"{i}.txt").write_text(CAPTION)
    in_files = encode_dogs(dogs, tmp_path / "in_files")
    for record, expected in zip(records, in_files):
        assert record.label == -1 and len(record.captions) == 1
        assert features_of(record) == features_of(expected)
    manifest, job = (json.loads((out / name).read_text())["source"] for name in ("manifest.json", "job.json"))
    assert manifest["caption"] == job["caption"] == CAPTION
    # The caption of the folder is used to compare the images with it.
    given = Flags(features=str(out), images=str(dogs))
    assert verify_command(str(out), given) == 0
    other = dataclasses.replace(given, caption="a cat")
    assert verify_command(str(out), other) == 2
    capsys.readouterr()
    for options, words in (({"caption": "a cat"}, "now a cat"), ({}, "now None")):
        with pytest.raises(UserError, match=f"was started with caption={CAPTION}, {words}: restore it"):
            encode_dogs(dogs, out, **options)


def test_one_caption_replaces_the_others_in_all_views(dogs, tmp_path):
    records = encode_dogs(dogs, tmp_path / "out", flip=True, caption=CAPTION)
    assert len(records) == 6 and len(set(map(features_of, records))) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--caption=",), "caption is '': give text"),
        (("--caption= \t",), "give text"),
        ((f"--caption={'x' * 10_001}",), "caption 'xxx.*give another text"),
        (("--caption=x", "--captions=c.jsonl"), "caption 'x' and captions both say which captions to use"),
        (("--caption=x", "--caption_fields=prompt"), "caption 'x' and caption_fields both say"),
        (("--caption=x", "--source=digits"), "option of source 'digits' is 'caption'"),
    ],
)
def test_captions_that_cannot_be_common(dogs, flags, words):
    given = parse(Flags, *flags)
    config = dataclasses.replace(DIGITS, image_size=16)
    with pytest.raises(UserError, match=words) as error:
        open_images(given.source, str(dogs), config, module._source_options(given))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--caption has no effect, because features\.text is False"):
        open_images("auto", str(dogs), dataclasses.replace(config, text=False), {"caption": "x"})


def test_options_are_flags():
    given = parse(Flags, "--shard_mb=3", "--image_batch=7")
    assert (given.shard_mb, given.image_batch, given.workers) == (3, 7, Options().workers)
