"""From the samples of a source to feature records, which `precompute` stores and on-the-fly training uses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pixart_jax.config import FeaturesConfig
from pixart_jax.constants import IMAGE_BATCH, IMAGE_FEATURES, TEXT_BATCH
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.captions import CleanedCaption, without_emptied
from pixart_jax.data.images import CENTRE, Crop, Refused, resize_and_crop
from pixart_jax.data.masks import latent_mask
from pixart_jax.data.planning import decode_with_content, resampling
from pixart_jax.data.records import (
    ArraySpec,
    EncodedCaption,
    FeatureBucket,
    Record,
    encode_caption,
    record_fault,
)
from pixart_jax.encoders.image_features import ImageEncoder
from pixart_jax.encoders.images import Codec, make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError


class Sample(NamedTuple):
    """The parts of a sample that are kept until its record is made: everything but its image."""

    key: str
    label: int
    captions: tuple[Any, ...]
    # Original size, resized size and offset of the crop, in pixels.
    geometry: tuple[tuple[int, int], ...]
    # Hash of the image, as `planning.content_of` returns it.
    content: bytes
    # Those of its captions, also of the dropped ones, from which cleaning removes words.
    cleaned: tuple[CleanedCaption, ...] = ()
    # The mask, uint8 at latent resolution, row by row; empty if the source has no masks.
    mask: bytes = b""


class Encoded(NamedTuple):
    """The arrays to store for an image.

    Attributes:
      mean: mean of the posterior of the latents, or the pixels.
      std: standard deviation of the posterior, or None.
      image_features: bfloat16 [tokens, width], or None without an image encoder.
    """

    mean: np.ndarray
    std: np.ndarray | None
    image_features: np.ndarray | None = None


class Text(NamedTuple):
    """An encoded caption, its line for cut.jsonl if it was truncated, and its line for unknown.jsonl."""

    encoded: EncodedCaption
    cut: dict[str, Any] | None
    unknown: dict[str, Any] | None


class SampleEncoder:
    """Encodes the images and captions of a source.

    The encoders are loaded when they are first needed, so a run without new captions never loads the text
    encoder.

    Args:
      source: a source from `planning.open_images`.
      config: describes the features.
      min_size: images whose shorter side has fewer pixels are skipped.
      text_batch, image_batch: captions and images encoded at a time.
    """

    def __init__(
        self,
        source: Any,
        config: FeaturesConfig,
        *,
        min_size: int = 0,
        text_batch: int = TEXT_BATCH,
        image_batch: int = IMAGE_BATCH,
    ):
        self.source, self.config, self.channels = source, config, getattr(source, "channels", 3)
        self.masked = getattr(source, "masked", False)
        self._min_size, self._text_batch, self._image_batch = min_size, text_batch, image_batch

    @functools.cached_property
    def codec(self) -> Codec:
        return make_codec(self.config, self._image_batch)

    @functools.cached_property
    def image_encoder(self) -> ImageEncoder | None:
        if not self.config.image_encoder:
            return None
        return ImageEncoder(self.config.image_encoder, self.channels, self._image_batch)

    @property
    def image_width(self) -> int:
        """Width of the image features; 0 without an image encoder."""
        return self.image_encoder.width if self.image_encoder else 0

    @functools.cached_property
    def text(self) -> TextEncoder:
        return TextEncoder(self.config.text_encoder, self.config.text_length, self._text_batch)

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """(h, w, C) of the latents in a bucket."""
        return self.codec.latent_shape(bucket.height, bucket.width, self.channels)

    def feature_bucket(self, bucket: Bucket, count: int = 0) -> FeatureBucket:
        """Describes the records of a bucket, of which there are `count`."""
        extras = {}
        if self.masked:
            side = self.config.downsampling
            extras["mask"] = ArraySpec((bucket.height // side, bucket.width // side), np.dtype(np.uint8))
        if self.image_encoder:
            rows, columns = self._token_grid(bucket.height, bucket.width)
            shape = rows * columns, self.image_width
            extras[IMAGE_FEATURES] = ArraySpec(shape, np.dtype(self.image_encoder.dtype))
        return FeatureBucket(bucket, self.latent_shape(bucket), count, extras)

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        side = self.config.token_size
        if height % side or width % side:
            raise UserError(
                f"features.token_size is {side}, which does not divide the sides of images of {height}x"
                f"{width} px: choose a size that does, or leave features.image_encoder empty."
            )
        return height // side, width // side

    def read(self, bucket: Bucket, index: int) -> tuple[Sample, np.ndarray] | Refused:
        """Reads a sample: its pixels, resized and cropped to the bucket, or the reason to skip it."""
        try:
            example = self.source[index]
            captions, cleaned = (), ()
            if self.config.text:
                captions, cleaned = without_emptied(example.captions, self.config.text_encoder.clean_caption)
            pixels, mask, content = decode_with_content(example)
            size, view = pixels.shape[:2], getattr(example, "view", CENTRE)
            if self.channels == 3:
                crop = resize_and_crop(
                    pixels,
                    bucket.height,
                    bucket.width,
                    min_size=self._min_size,
                    view=view,
                    resampling=resampling(self.config),
                )
            elif size == (bucket.height, bucket.width):
                crop = Crop(pixels, size, size, (0, 0))
            else:
                raise UserError(
                    f"'{example.key}' is {size[0]}x{size[1]}: images of this source must be {bucket.name}."
                )
        except Refused as error:
            return error
        label = -1 if example.label is None else example.label
        geometry = (crop.original_size, crop.resized_size, crop.offset)
        kept = b""
        if self.masked:
            kept = latent_mask(mask, bucket, view, self.config.downsampling).tobytes()
        return Sample(example.key, label, captions, geometry, content, cleaned, kept), crop.pixels

    def encode_texts(
        self, captions: Sequence[str], encoded: Callable[[], None] = lambda: None
    ) -> dict[str, Text]:
        """Encodes distinct captions. Batches depend only on this list, so that results are repeatable.

        Args:
          captions: the captions.
          encoded: called once for each caption, when it is encoded.
        """
        dtype, found = self.config.text_dtype, {}
        self.text.cut.clear()
        self.text.unknown.clear()
        for i, valid in self.text.encode_each(captions):
            found[captions[i]] = encode_caption("", 1.0, captions[i], valid, dtype)
            encoded()
        cut, unknown = (
            {line.caption: dataclasses.asdict(line) for line in lines}
            for lines in (self.text.cut, self.text.unknown)
        )
        return {caption: Text(found[caption], cut.get(caption), unknown.get(caption)) for caption in captions}

    def encode_images(self, images: Sequence[np.ndarray]) -> Iterator[Encoded]:
        """Yields the arrays to store for each image; all images have the same size."""
        pixels = np.stack(images)
        mean, std = self.codec.encode(pixels)
        if std is not None:
            dtype = np.dtype(self.config.latent_dtype)
            mean, std = mean.astype(dtype), std.astype(dtype)
        features = None
        if self.image_encoder:
            features = self.image_encoder.encode(pixels, self._token_grid(*pixels.shape[1:3]))
        for i in range(len(images)):
            yield Encoded(mean[i], *(None if each is None else each[i] for each in (std, features)))

    def record(
        self,
        sample: Sample,
        stored: Encoded,
        bucket: Bucket,
        texts: Mapping[str, Text],
    ) -> Record:
        """Makes a record.

        Args:
          sample: from `read`.
          stored: the arrays of its image, from `encode_images`.
          bucket: its bucket.
          texts: encoded captions, at least those of the sample.

        Raises:
          UserError: an encoder returned NaN, or an array of the wrong shape.
        """
        captions = tuple(
            dataclasses.replace(texts[caption.text].encoded, name=caption.name, weight=caption.weight)
            for caption in sample.captions
        )
        expected = self.feature_bucket(bucket)
        extras = {}
        if self.masked:
            mask = expected.extras["mask"]
            extras["mask"] = np.frombuffer(sample.mask, mask.dtype).reshape(mask.shape)
        if stored.image_features is not None:
            extras[IMAGE_FEATURES] = stored.image_features
        record = Record(
            sample.key,
            stored.mean,
            stored.std,
            bucket,
            *sample.geometry,
            sample.label,
            captions,
            extras,
        )
        width = self.text.width if self.config.text else 0
        fault = record_fault(record, expected, self.config.text_length, width)
        if fault:
            raise UserError(f"'{record.key}' cannot be stored: {fault}; check the weights of the encoders.")
        return record
