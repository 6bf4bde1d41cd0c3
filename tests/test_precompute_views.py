"""Tests masks, mirror images and random crops in precompute, on images without captions and encoders."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from command_line import parse
from PIL import Image

from pixart_jax import precompute as module
from pixart_jax.config import FeaturesConfig
from pixart_jax.data import planning
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.images import View, resize_and_crop
from pixart_jax.data.verification import verify
from pixart_jax.errors import UserError
from pixart_jax.precompute import Flags, Options, open_images, precompute, verify_command

CONFIG = FeaturesConfig(image_size=16, codec="pixels", latent_scale=1.0, text=False)
NAMES = [f"{i:02d}" for i in range(8)]


@pytest.fixture
def images(tmp_path):
    """Wide images of noise, and masks of all but the last, whose left half is white."""
    rng = np.random.default_rng(0)
    halves = np.zeros((20, 60), np.uint8)
    halves[:, :30] = 255
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    for name in NAMES:
        pixels = rng.integers(0, 256, (20, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{name}.png")
        if name != NAMES[-1]:
            Image.fromarray(halves).save(tmp_path / f"masks/{name}.png")
    return tmp_path / "photos"


def encode(images, out, validation_share=0.0, part=(0, 1), **views):
    """Runs precompute; returns the records by key and the lines that were printed."""
    printed = []
    source = open_images("folder", str(images), CONFIG, {}, **views)
    options = Options(workers=2, validation_share=validation_share, part=part)
    precompute(source, CONFIG, out, options, printed.append)
    return (records(out) if part[1] == 1 else {}), "\n".join(printed)


def records(out):
    dataset = FeatureDataset(out)
    assert verify(out) == []
    return {record.key: record for record in map(dataset.__getitem__, range(len(dataset)))}


def test_every_view_is_a_record_with_its_mask(images, tmp_path):
    masks, out = str(tmp_path / "masks"), tmp_path / "out"
    found, printed = encode(images, out, masks=masks, flip=True, crops=3, crop_seed=4)
    assert len(found) == 8 * 6
    assert "1 of 8 images have no mask" in printed and "'07.png'; their loss covers" in printed
    assert "8 images have 48 samples: 3 random crops and mirror images" in printed
    lefts = set()
    for name, crop in itertools.product(NAMES, (1, 2, 3)):
        pixels = np.asarray(Image.open(images / f"{name}.png"))
        plain, flipped = (found[f"{name}.png#crop{crop}{end}"] for end in ("", "#flip"))
        assert plain.offset[0] == 0 and 0 <= plain.offset[1] <= 32 and plain.resized_size == (16, 48)
        left = plain.offset[1]
        lefts.add(left)
        expected = resize_and_crop(pixels, 16, 16, view=View((left + 0.5) / 33)).pixels
        np.testing.assert_array_equal(plain.mean, expected)
        np.testing.assert_array_equal(flipped.mean, expected[:, ::-1])
        assert flipped.offset == plain.offset
        mask = plain.extras["mask"]
        np.testing.assert_array_equal(flipped.extras["mask"], mask[:, ::-1])
        # The left half of 48 columns is white; the resize blurs up to two columns at its edge.
        columns = left + np.arange(16)
        white = columns < 24 if name != NAMES[-1] else np.ones(16, bool)
        sure = (abs(columns - 23.5) > 2) | (name == NAMES[-1])
        np.testing.assert_array_equal(mask[:, sure], np.tile(white[sure] * 255, (16, 1)))
    assert len(lefts) > 8
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["buckets"][0]["extras"] == {"mask": {"shape": [16, 16], "dtype": "uint8"}}
    assert FeatureDataset(out).extras == ("mask",)


def test_without_masks_and_views_nothing_changes(images, tmp_path):
    """The record of the centre crop has the same bytes beside its mirror image."""
    encode(images, tmp_path / "plain")
    encode(images, tmp_path / "views", flip=True, crops=1)
    plain, views = records(tmp_path / "plain"), records(tmp_path / "views")
    assert {key for key in views if "#" not in key} == plain.keys() and len(views) == 2 * len(plain)
    for key, record in plain.items():
        np.testing.assert_array_equal(views[key].mean, record.mean)
        assert not record.extras
    source = json.loads((tmp_path / "plain/job.json").read_text())["source"]
    assert not source.keys() & {"masks", "flip", "crops", "crop_seed"}
    shard = next((tmp_path / "plain").glob("*.arrayrecord")).read_bytes()
    assert b"PXJ1" in shard and b"PXJ2" not in shard


def test_views_of_held_out_images_are_held_out(images, tmp_path):
    out, views = tmp_path / "out", dict(flip=True, crops=2)

    def names(folder):
        keys = records(folder).keys()
        found = {key.partition("#")[0] for key in keys}
        assert len(keys) == 4 * len(found)
        return found

    encode(images, out, validation_share=0.01, **views)
    held_out = names(out / "validation")
    assert len(held_out) == 1 and names(out) == {f"{name}.png" for name in NAMES} - held_out
    # More images: those that were held out still are, with all their views.
    for name in (f"{i:03d}" for i in range(100, 160)):
        Image.new("RGB", (60, 20)).save(images / f"{name}.png")
    encode(images, out, validation_share=0.01, **views)
    assert held_out <= names(out / "validation") and not names(out) & names(out / "validation")
    assert len(names(out)) + len(names(out / "validation")) == 68


def test_new_copies_of_a_held_out_image_are_held_out(tmp_path):
    """If 1_dog is renamed to 3_dog, the copies #2 and #3 of a held-out image are not trained on."""
    survey = lambda source: planning.survey(source, CONFIG, 2)  # noqa: E731
    for folder, names in (("1_cat", "ab"), ("3_dog", "cde")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("RGB", (16, 16)).save(tmp_path / folder / f"{name}.png")
    source = open_images("kohya", str(tmp_path), CONFIG, {})
    keys = [source.key(i) for i in range(len(source))]
    earlier = np.array([planning.hash_of("3_dog/d.png")], np.uint64)
    held_out = module._held_out(survey(source), source, 1e-9, earlier)
    assert {key for key, out in zip(keys, held_out) if out} == {f"3_dog/d.png{n}" for n in ("", "#2", "#3")}


def test_the_work_continues_only_with_the_same_views_and_masks(images, tmp_path):
    masks, out = str(tmp_path / "masks"), tmp_path / "out"
    views = dict(masks=masks, flip=True, crops=2, crop_seed=3)
    before, _ = encode(images, out, **views)
    (shard,) = out.glob("*.arrayrecord")
    data = shard.read_bytes()
    shard.unlink()
    _, printed = encode(images, out, **views)
    assert shard.read_bytes() == data and "of which 0 are done" in printed
    assert "of which 1 are done" in encode(images, out, **views)[1]
    for changes, words in (
        (dict(flip=False), "flip=True, now False"),
        (dict(crops=1), "crops=2, now 1"),
        (dict(crop_seed=0), "crop_seed=3, now 0"),
        (dict(masks=None), "masks=True, now False"),
    ):
        with pytest.raises(UserError, match=f"was started with {words}: restore it"):
            encode(images, out, **views | changes)
    # The parts of a split run write the same shards.
    for part in (0, 1):
        encode(images, tmp_path / "split", part=(part, 2), **views)
    assert (tmp_path / "split" / shard.name).read_bytes() == data
    # Another mask is another sample.
    Image.new("L", (60, 20), 255).save(tmp_path / "masks/03.png")
    with pytest.raises(
        UserError, match=r"4 of 32 samples .*'03\.png#crop\d(#flip)?' has another image or mask"
    ):
        encode(images, out, **views)
    # A new image is encoded in all views.
    assert len(before) == 32


def test_verify_compares_masks_and_views(images, tmp_path, capsys):
    masks, out = str(tmp_path / "masks"), tmp_path / "out"
    encode(images, out, masks=masks, flip=True, crops=2)
    given = Flags(features=str(out), images=str(images), source="folder", masks=masks)
    assert verify_command(str(out), given) == 0
    assert "32 records compared with 32 samples" in capsys.readouterr().out
    Image.new("L", (60, 20), 255).save(tmp_path / "masks/03.png")
    Image.new("RGB", (60, 20)).save(images / "04.png")
    assert verify_command(str(out), given) == 2
    printed = capsys.readouterr().out
    assert printed.count("made from another image or mask") == 8 and ", 8 faults" in printed
    with pytest.raises(UserError, match="was made with masks: give --masks"):
        verify_command(str(out), dataclasses.replace(given, masks=None))


def test_masks_that_do_not_fit_are_skipped_and_listed(images, tmp_path):
    Image.new("L", (20, 20), 255).save(tmp_path / "masks/03.png")
    with pytest.raises(UserError, match=r"most often bad_mask .*'03\.png': its mask is 20x20") as error:
        encode(images, tmp_path / "out", masks=str(tmp_path / "masks"))
    assert "\n" not in str(error.value)


def test_what_masks_and_views_do_not_fit(images, tmp_path):
    for views, name in (
        (dict(flip=True), "--flip"),
        (dict(crops=2), "--crops"),
        (dict(masks="x"), "--masks"),
    ):
        with pytest.raises(UserError, match=f"{name} needs images in files, and 'digits' is a built-in"):
            open_images("digits", "digits", dataclasses.replace(CONFIG, image_size=8), {}, **views)
    (images / "masks").mkdir()
    with pytest.raises(UserError, match=r"is inside .* so that its masks would be read as images: move"):
        open_images("folder", str(images), CONFIG, {}, masks=str(images / "masks"))


def test_flags():
    given = parse(Flags, "--masks=m", "--flip", "--crops=3", "--crop_seed=5")
    assert (given.masks, given.flip, given.crops, given.crop_seed) == ("m", True, 3, 5)
    assert (Flags().masks, Flags().flip, Flags().crops) == (None, False, 1)
    with pytest.raises(UserError, match=r"--crops is 0: it must be in \[1, 10000\]"):
        parse(Flags, "--crops=0")
