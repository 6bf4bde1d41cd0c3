import dataclasses

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from source_files import CROPS, crops, write_folder
from tiny_image_encoders import save_image_encoder

from pixart_jax.config import FeaturesConfig
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.digits import DigitsSource
from pixart_jax.data.images import Refused, resize_and_crop
from pixart_jax.data.planning import open_images, record_bytes
from pixart_jax.data.records import decode_record, encode_record, record_fault
from pixart_jax.data.sources import open_source
from pixart_jax.encoders.image_features import ImageEncoder
from pixart_jax.encoders.samples import SampleEncoder
from pixart_jax.errors import UserError

PIXELS = FeaturesConfig(image_size=32, codec="pixels", latent_scale=1.0, text=False)
SQUARE = Bucket.of(32, 32)


def test_a_sample_becomes_a_record(tmp_path):
    source = open_source("folder", write_folder(tmp_path, crops()))
    encoder = SampleEncoder(source, PIXELS)
    sample, pixels = encoder.read(SQUARE, 0)
    example = source[0]
    crop = resize_and_crop(example.decode(), 32, 32)
    np.testing.assert_array_equal(pixels, crop.pixels)
    (stored,) = encoder.encode_images([pixels])
    record = encoder.record(sample, stored, SQUARE, {})
    assert (record.key, record.label, record.captions, record.std) == (example.key, -1, (), None)
    assert (record.image_size, record.resized_size, record.offset) == (
        crop.original_size,
        crop.resized_size,
        crop.offset,
    )
    with pytest.raises(UserError, match=r"cannot be stored: wrong shape: latent \[16, 32, 3\]"):
        encoder.record(sample, stored._replace(mean=stored.mean[:16]), SQUARE, {})


@pytest.mark.parametrize(
    ("size", "buckets", "resampling"),
    [
        (512, "official", Image.Resampling.BICUBIC),
        (1024, "official", Image.Resampling.BICUBIC),
        (2048, "official", Image.Resampling.LANCZOS),
        (2880, "official", Image.Resampling.LANCZOS),
        (2048, "single", Image.Resampling.BICUBIC),
    ],
)
def test_images_are_resized_with_the_filter_of_the_official_code(tmp_path, size, buckets, resampling):
    source = open_source("folder", write_folder(tmp_path, crops()))
    config = dataclasses.replace(PIXELS, image_size=size, buckets=buckets)
    _, pixels = SampleEncoder(source, config).read(SQUARE, 0)
    found = {
        each: np.array_equal(pixels, resize_and_crop(source[0].decode(), 32, 32, resampling=each).pixels)
        for each in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    }
    assert [each for each, equal in found.items() if equal] == [resampling]


def test_what_cannot_be_used_is_returned_with_its_reason(tmp_path):
    source = open_source("folder", write_folder(tmp_path, crops()), require_captions=False)
    encoder = SampleEncoder(source, PIXELS, min_size=30)
    small = {name for name, _, _, _, height, width, _ in CROPS if min(height, width) < 30}
    found = {source.key(i): encoder.read(SQUARE, i) for i in range(len(source))}
    assert {key for key, item in found.items() if isinstance(item, Refused)} == small


def test_images_with_one_channel_must_have_the_size_of_the_bucket():
    encoder = SampleEncoder(DigitsSource("test"), dataclasses.replace(PIXELS, image_size=8))
    sample, pixels = encoder.read(Bucket(8, 8, "1.0"), 3)
    assert pixels.shape == (8, 8, 1) and sample.geometry == ((8, 8), (8, 8), (0, 0))
    with pytest.raises(UserError, match="is 8x8: images of this source must be 16x16"):
        encoder.read(Bucket.of(16, 16), 3)


def test_masks_and_mirror_images_become_records(tmp_path):
    images = write_folder(tmp_path / "images", crops())
    (tmp_path / "masks").mkdir()
    with Image.open(images / "a.png") as image:
        halves = np.zeros(image.size[::-1], np.uint8)
    halves[:, halves.shape[1] // 2 :] = 255
    Image.fromarray(halves).save(tmp_path / "masks/a.png")
    source = open_images("folder", str(images), PIXELS, {}, masks=str(tmp_path / "masks"), flip=True)
    encoder = SampleEncoder(source, PIXELS)
    keys = {source.key(i): i for i in range(len(source))}

    def record(key):
        sample, pixels = encoder.read(SQUARE, keys[key])
        (stored,) = encoder.encode_images([pixels])
        return encoder.record(sample, stored, SQUARE, {})

    plain, flipped, unmasked = record("a.png"), record("a.png#flip"), record("deep/c.JPEG")
    mask = plain.extras["mask"]
    assert mask.shape == (32, 32) and mask[:, 20:].min() == 255 and mask[:, :12].max() == 0
    np.testing.assert_array_equal(flipped.mean, plain.mean[:, ::-1])
    np.testing.assert_array_equal(flipped.extras["mask"], mask[:, ::-1])
    assert (unmasked.extras["mask"] == 255).all()
    assert encoder.feature_bucket(SQUARE).extras == {"mask": ((32, 32), np.uint8)}
    # With a VAE, a mask has the size of the latents.
    latent = SampleEncoder(source, dataclasses.replace(PIXELS, codec="vae"))
    (sample, _), side = latent.read(SQUARE, keys["a.png"]), 32 // 8
    found = np.frombuffer(sample.mask, np.uint8).reshape(side, side)
    np.testing.assert_allclose(found, np.repeat([[0, 0, 255, 255]], side, 0), rtol=0, atol=1)


def test_image_features_are_those_of_the_crop_that_is_stored(tmp_path):
    """For each view of an image, in a bucket that is not square; other sizes raise."""
    save_image_encoder(tmp_path / "vit", "vit")
    config = dataclasses.replace(PIXELS, image_encoder=str(tmp_path / "vit"), token_size=16)
    source = open_images("folder", str(write_folder(tmp_path / "images", crops())), PIXELS, {}, flip=True)
    encoder, wide = SampleEncoder(source, config, image_batch=2), Bucket.of(32, 64)
    alone = ImageEncoder(str(tmp_path / "vit"), 3, 2)
    keys = {source.key(i): i for i in range(len(source))}
    found = []
    for key in ("a.png", "a.png#flip"):
        sample, pixels = encoder.read(wide, keys[key])
        (stored,) = encoder.encode_images([pixels])
        record = encoder.record(sample, stored, wide, {})
        assert record_fault(record, encoder.feature_bucket(wide), 0, 0) is None
        found.append(record.extras["image_features"])
        np.testing.assert_array_equal(found[-1], alone.encode(pixels[None], (2, 4))[0])
        assert decode_record(encode_record(record)).extras["image_features"].dtype == ml_dtypes.bfloat16
    assert found[0].shape == (8, 16) and not np.array_equal(*found)
    assert record_bytes(config, wide, 0, 3, False, 16) >= len(encode_record(record))
    with pytest.raises(UserError, match="token_size is 16, which does not divide the sides"):
        encoder.feature_bucket(Bucket(40, 64, "0.6"))
