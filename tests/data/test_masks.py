import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from pixart_jax.data.buckets import Bucket
from pixart_jax.data.images import CENTRE, Refused, View, resize_and_crop
from pixart_jax.data.masks import MaskedSource, decode_mask, labelled, latent_mask
from pixart_jax.data.planning import content_of, mark_of
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError


def save(path, size=(20, 30), value=0, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value).save(path)


def encode(array, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    for name in ("a.jpg", "a.png", "deep/b.jpg", "c.png"):
        save(tmp_path / "photos" / name, value=100)
    return tmp_path / "photos"


def masks_of(photos, masks, kind="folder"):
    source = MaskedSource(open_source(kind, photos, require_captions=False), masks)
    found = {}
    for i in range(len(source)):
        mask = source[i].mask
        found[source.key(i)] = mask and mask.relative_to(masks).as_posix()
    return found, source


def test_masks_have_the_keys_of_the_images(photos, tmp_path):
    masks = tmp_path / "masks"
    for name in ("a.jpg", "a.png", "deep/b.webp", "other.png"):
        save(masks / name)
    found, source = masks_of(photos, masks)
    assert found == {"a.jpg": "a.jpg", "a.png": "a.png", "deep/b.jpg": "deep/b.webp", "c.png": None}
    assert source.masked and source.job_options == {"masks": True}
    unmasked, lost = source.notes[-2:]
    assert unmasked.startswith("1 of 4 images have no mask in ") and "'c.png'; their loss covers" in unmasked
    assert lost.startswith("1 of 4 masks in ") and "are of no image, for example 'other.png'" in lost


def test_labelled_masks_may_be_beside_the_images(photos):
    for name in ("a-masklabel.png", "deep/b-masklabel.jpg", "d-masklabel.png"):
        save(photos / name)
    found, source = masks_of(photos, photos)
    # The masks are no samples; both images called "a" have the same one.
    assert found == {
        **{"a.jpg": "a-masklabel.png", "a.png": "a-masklabel.png"},
        **{"deep/b.jpg": "deep/b-masklabel.jpg", "c.png": None},
    }
    assert "1 of 3 masks" in source.notes[-1] and "'d-masklabel.png'" in source.notes[-1]
    assert sorted(labelled(photos)) == ["a-masklabel.png", "d-masklabel.png", "deep/b-masklabel.jpg"]
    assert list(labelled(photos / "c.png")) == []


def test_copies_of_an_image_have_its_mask(tmp_path):
    for name in ("2_dog/a.png", "1_cat/b.png"):
        save(tmp_path / "photos" / name)
    save(tmp_path / "masks/2_dog/a.png")
    found, _ = masks_of(tmp_path / "photos", tmp_path / "masks", "kohya")
    assert found == {"1_cat/b.png": None, "2_dog/a.png": "2_dog/a.png", "2_dog/a.png#2": "2_dog/a.png"}


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "none of its 0 images has the name of an image; the mask of 'a.jpg' would be 'a.png'"),
        (["x.png", "y.png"], "none of its 2 images, such as 'x.png', has the name of an image"),
        (["x-masklabel.png"], "the mask of 'a.jpg' would be 'a-masklabel.png'"),
        (None, "does not exist or is not a folder"),
    ],
)
def test_folders_without_masks(photos, tmp_path, names, words):
    masks = tmp_path / "masks"
    if names is not None:
        masks.mkdir()
    for name in names or ():
        save(masks / name)
    with pytest.raises(UserError, match=words) as error:
        masks_of(photos, masks)
    assert "\n" not in str(error.value)


def test_images_are_not_their_own_masks(photos):
    with pytest.raises(UserError, match=r"is the folder of the images; name the masks there NAME-masklabel"):
        masks_of(photos, photos)


def test_two_masks_of_one_image(photos, tmp_path):
    for name in ("c.jpg", "c.webp", "a.jpg"):
        save(tmp_path / "masks" / name)
    source = MaskedSource(open_source("folder", photos, require_captions=False), tmp_path / "masks")
    with pytest.raises(Refused, match=r"'c\.jpg' and 'c\.webp' could both be its mask") as error:
        source[[source.key(i) for i in range(len(source))].index("c.png")]
    assert error.value.reason == "bad_mask"


def test_another_mask_is_another_content(photos, tmp_path):
    example = open_source("folder", photos, require_captions=False)[0]
    save(tmp_path / "mask.png", value=0)
    masked = dataclasses.replace(example, mask=tmp_path / "mask.png")
    before = content_of(masked), mark_of(masked)
    assert before[0] != content_of(example) and before[1] != mark_of(example)
    save(tmp_path / "mask.png", value=255)
    assert content_of(masked) != before[0] and mark_of(masked) != before[1]


def test_masks_are_decoded_to_grey_of_the_size_of_the_image():
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    np.testing.assert_array_equal(decode_mask(encode(grey), (20, 30)), grey)
    colours = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_mask(encode(colours), (20, 30)), grey)
    bits = grey > 127
    np.testing.assert_array_equal(decode_mask(encode(bits), (20, 30)), bits * np.uint8(255))
    opaque = np.dstack([colours, np.full_like(grey, 255)])
    np.testing.assert_array_equal(decode_mask(encode(opaque), (20, 30)), grey)
    # A smaller mask is enlarged; its sides may be rounded.
    halves = np.zeros((20, 30), np.uint8)
    halves[:, 15:] = 255
    large = decode_mask(encode(halves), (401, 601))
    assert large.shape == (401, 601) and large[:, :280].max() == 0 and large[:, 320:].min() == 255


@pytest.mark.parametrize(
    "data, words",
    [
        (
            encode(np.zeros((20, 20), np.uint8)),
            "mask is 20x20 .h x w., the image 20x30; give",
        ),
        (encode(np.zeros((30, 20), np.uint8)), "mask is 30x20"),
        (encode(np.zeros((20, 30, 4), np.uint8)), "has transparent parts"),
        (b"", "its mask: 0 bytes"),
        (encode(np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8))[:300], "its mask: "),
    ],
)
def test_masks_that_cannot_be_used(data, words):
    with pytest.raises(Refused, match=words) as error:
        decode_mask(data, (20, 30))
    assert error.value.reason == "bad_mask"


@pytest.mark.parametrize("view", [CENTRE, View(0.9), View(None, True), View(0.1, True)])
def test_masks_are_cropped_as_the_images(view):
    """The mean over the pixels of a latent position, of the pixels that the image has there."""
    mask = np.random.default_rng(0).integers(0, 2, (40, 90), np.uint8) * 255
    bucket = Bucket(32, 48, "0.67")
    pixels = resize_and_crop(np.repeat(mask[..., None], 3, 2), 32, 48, view=view).pixels[..., 1]
    for side in (1, 8, 16):
        found = latent_mask(mask, bucket, view, side)
        expected = [
            [pixels[y : y + side, x : x + side].mean() for x in range(0, 48, side)]
            for y in range(0, 32, side)
        ]
        assert found.dtype == np.uint8
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.5)
    white = np.full_like(mask, 255)
    for whole in (None, white):
        found = latent_mask(whole, bucket, view, 8)
        assert found.shape == (4, 6) and (found == 255).all()
