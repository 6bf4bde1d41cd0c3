"""Feature folders: manifests, records, the work that precompute continues."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzzing import fuzz
from hostile import damaged, json_files
from hypothesis import strategies as st
from PIL import Image

from pixart_jax.config import FeaturesConfig
from pixart_jax.data.loader import FeatureLoader, validation_batches
from pixart_jax.data.planning import open_images
from pixart_jax.precompute import Options, precompute
from pixart_jax.training.data import open_dataset

OLD = Path(__file__).parent.parent / "data" / "v0_1" / "features"
CONFIG = FeaturesConfig(image_size=16, codec="pixels", vae="", latent_scale=1.0, text=False)
MANIFEST = json.loads((OLD / "pixels" / "manifest.json").read_text())
NULL_TEXT = (OLD / "pixels" / "null_text.npy").read_bytes()
SHARD = (OLD / "pixels" / "16x16-00000.arrayrecord").read_bytes()


@fuzz(60, manifest=json_files(MANIFEST))
def test_manifest(sandbox, manifest):
    shutil.copytree(OLD / "pixels", sandbox.path / "features")
    sandbox.write("features/manifest.json", manifest)
    sandbox.read(read_everything, "features").check()
    sandbox.command("precompute", "verify", "--features=features").check()


@fuzz(25, null_text=damaged(NULL_TEXT), shard=st.none() | damaged(SHARD))
def test_arrays(sandbox, null_text, shard):
    shutil.copytree(OLD / "pixels", sandbox.path / "features")
    sandbox.write("features/null_text.npy", null_text)
    manifest = json.loads(json.dumps(MANIFEST))
    if shard is not None:
        sandbox.write("features/16x16-00000.arrayrecord", shard)
        manifest["shards"][0]["bytes"] = len(shard)
        sandbox.write("features/manifest.json", json.dumps(manifest))
    sandbox.read(read_everything, "features").check()
    sandbox.command("precompute", "verify", "--features=features").check()


def read_everything(folder):
    dataset = open_dataset(folder)
    for index in range(min(len(dataset), 3)):
        dataset[index]
    if dataset.text_length:
        dataset.null_text()
    FeatureLoader(
        [dataset],
        [1.0],
        batch_size=2,
        seed=0,
        arrays=("labels",),
        text_length=16,
        first_step=0,
        aspect_ratio="bucket",
        threads=1,
        prefetch=1,
    )
    batches = validation_batches(
        dataset,
        batch_size=2,
        num_samples=min(len(dataset), 4),
        arrays=("labels",),
        text_length=16,
        aspect_ratio="bucket",
    )
    next(iter(batches), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished feature folder of six images and the images."""
    root = tmp_path_factory.mktemp("job")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(6):
        pixels = rng.integers(0, 255, (16 + 4 * (number % 2), 16, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    continue_work(root / "images", root / "features")
    return root


def continue_work(images, out):
    options = Options(min_bucket=2, workers=1, max_refused_share=1.0)
    precompute(open_images("folder", str(images), CONFIG, {}), CONFIG, out, options)


@fuzz(50, "finished", data=st.data(), file=st.integers(0, 30), reset=st.booleans())
def test_work(sandbox, finished, data, file, reset):
    shutil.copytree(finished, sandbox.path, dirs_exist_ok=True)
    work = sandbox.path / "features"
    names = ["job.json", "manifest.json", *sorted(f"work/{path.name}" for path in (work / "work").iterdir())]
    names = [name for name in names if "lock" not in name]
    name = names[file % len(names)]
    old = (work / name).read_bytes()
    new = data.draw(json_files(json.loads(old)) if name.endswith(".json") else damaged(old), label=name)
    if reset:  # the shard has to be encoded again
        next(work.glob("*.arrayrecord")).unlink()
    (work / name).write_bytes(new)
    sandbox.read(continue_work, "images", "features").check(leaves=["features"])
