"""Features, runs, images and weights that version 0.1 wrote can still be used (`tests/data/v0_1`)."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import parse
from feature_folders import SQUARE, WIDE, keys, make_record, write_folder
from PIL import Image
from safetensors.numpy import load_file

from pixart_jax import sample
from pixart_jax.config import FeaturesConfig, from_dict
from pixart_jax.convert import convert
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.planning import open_images
from pixart_jax.data.verification import verify
from pixart_jax.errors import UserError
from pixart_jax.pipeline import load_pipeline
from pixart_jax.pipeline.image_files import read_png_settings, save_png
from pixart_jax.pipeline.requests import Settings
from pixart_jax.precompute import precompute
from pixart_jax.train import train
from pixart_jax.weights.checkpoints import read_weights
from pixart_jax.weights.loading import read_any

SAVED = Path(__file__).parent / "data/v0_1"
BUCKETS = SAVED / "features/buckets"
STAGES = ("stage1", "stage2", "stage3")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Makes a copy of the folder the working directory, because its configs have relative paths."""
    shutil.copytree(SAVED, tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")


@pytest.mark.parametrize("name", ["classes", "pixels", "buckets"])
def test_features_open(name):
    dataset = FeatureDataset(SAVED / "features" / name)
    assert len(dataset) == (18 if name == "buckets" else 16)
    records = [dataset[i] for i in range(len(dataset))]
    assert len({record.key for record in records}) == len(dataset)
    captions = {"classes": 0, "pixels": 1, "buckets": 2}[name]
    assert all(len(record.captions) == captions for record in records)
    if name == "classes":
        assert dataset.classes == ("green", "red") and {r.label for r in records} == {0, 1}


def test_new_features_have_the_same_fingerprint(tmp_path):
    """0.1 compares the fingerprint, which depends on the bytes of the shards, when it resumes a run."""
    square = [make_record(key, captions=2, text_dtype="int8") for key in keys(10)]
    wide = [make_record(key, WIDE, captions=2, text_dtype="int8") for key in keys(8, "wide")]
    path = write_folder(tmp_path / "f", {SQUARE: square, WIDE: wide}, config={"text_dtype": "int8"})
    versions = [json.loads((root / "manifest.json").read_text())["version"] for root in (BUCKETS, path)]
    assert versions == [1, 2]
    assert FeatureDataset(path).fingerprint == FeatureDataset(BUCKETS).fingerprint


@pytest.mark.parametrize("lost", [["manifest.json"], ["manifest.json", "16x16-00000.arrayrecord"]])
def test_an_unfinished_precompute_is_continued(saved, lost):
    rng = np.random.default_rng(0)
    for i, colour in enumerate(("red", "green")):  # the images of `make.py`
        for k in range(8):
            path = Path(f"images/{colour}/{k}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 64, (16, 16, 3))
            pixels[..., i] += 160
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    folder = Path("features/classes")
    before = FeatureDataset(folder).fingerprint
    for name in lost:
        (folder / name).unlink()
    config = from_dict(json.loads((folder / "job.json").read_text())["config"], FeaturesConfig)
    precompute(open_images("classes", "images", config, {}), config, folder, say=lambda line: None)
    assert FeatureDataset(folder).fingerprint == before and verify(folder) == []


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_runs_resume(saved, stage):
    """Stage 1 uses AdamW, as stage 3 does, and stage 2 uses Muon."""
    config = dataclasses.replace(read_weights(stage)[1], steps=4)
    state = train(config, stage)
    assert int(state.step) == 4
    lines = [json.loads(line) for line in Path(stage, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert all(np.isfinite(line["loss"]) and not line["refused"] for line in lines)
    assert sorted(path.name for path in Path(stage, "checkpoints").iterdir()) == ["4"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("which", ["ema", "raw"])
def test_weights_open(stage, which):
    read = read_any(SAVED / stage, which)
    assert read.config.name == stage and read.source == "checkpoint"
    assert read.manifest["step"] == 2


def test_weights_generate_the_same_images():
    expected = np.load(SAVED / "expected.npz")
    pipe = load_pipeline(SAVED / "stage2")
    images, latents = pipe(["red 1", "green 5"], seed=[3, 4], steps=4, output="both")
    scale = np.abs(expected["latents"]).max()  # large, because the network is hardly trained
    np.testing.assert_allclose(latents / scale, expected["latents"] / scale, atol=1e-5)
    assert np.abs(images.astype(int) - expected["images"]).max() <= 1


@pytest.mark.parametrize("name", ["00000-3-red-1", "00000-0-green-5"])
def test_images_are_generated_again(saved, name):
    sample.main(
        parse(sample.Flags, f"--from_image=samples/{name}.png", "--open_recorded_paths", "--out=again")
    )
    (old, settings), (new, same) = (
        (np.asarray(Image.open(path)).astype(int), read_png_settings(path))
        for path in (f"samples/{name}.png", f"again/{name}.png")
    )
    assert np.abs(new - old).max() <= 1
    for part in ("files", "source", "fingerprint"):
        assert same[part] == settings[part]
    # Settings that version 0.1 did not have are at their defaults.
    new_settings = same["request"].keys() - settings["request"].keys()
    defaults = {name: getattr(Settings(), name) for name in new_settings}
    assert same["request"] == settings["request"] | defaults


def test_existing_images_are_kept(saved, capsys):
    """This also holds if the version that wrote them did not have all of today's settings."""
    path = Path("samples/00000-0-green-5.png")
    settings = read_png_settings(path)
    del settings["request"]["binning"]
    save_png(path, np.asarray(Image.open(path)), settings)
    before = path.read_bytes()
    flags = ["--checkpoint=stage2", "--prompts=green 5", "--steps=3", "--aspect_ratio=1:1", "--out=samples"]
    sample.main(parse(sample.Flags, *flags))
    assert "0 images generated in samples, 1 existed already" in capsys.readouterr().out
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="different binning: give another --out"):
        sample.main(parse(sample.Flags, *flags, "--nobinning"))


def test_weights_convert_to_the_same_file(tmp_path):
    convert(SAVED / "stage2", tmp_path / "out", "diffusers", say=lambda line: None)
    name = "diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(tmp_path / "out" / name), load_file(SAVED / "diffusers" / name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
