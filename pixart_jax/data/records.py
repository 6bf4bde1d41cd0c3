"""The feature record: what the model is trained on for one image, and how it is stored as bytes.

A record holds the unscaled mean and standard deviation of the image's VAE posterior (or its uint8 pixels),
the text features of each of its captions, a class label, the sizes that the size conditions need, and any
extra arrays by name. Text features are stored for valid tokens only: all 120 x 4096 bfloat16 values would
take 983 kB per image, and a caption of 40 words fills less than half of them.

Layout: a fixed header, one header per caption and one per extra array; then the key, the names and the texts;
then the arrays, each aligned to 16 bytes so that it can be read without a copy. A record without extra arrays
starts with "PXJ1" and has the same bytes as in version 0.1. A record with extra arrays, which version 0.1
cannot read, starts with "PXJ2". There is no checksum in the record because ArrayRecord has one for every
record.

Axes: h, w latent (or pixel) rows and columns, C channels, L valid tokens, D text width.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from pixart_jax.data.buckets import Bucket

_MAGIC, _MAGIC_WITH_EXTRAS = b"PXJ1", b"PXJ2"
# A dtype is stored as its index in this tuple, so the order must not change.
_DTYPES = tuple(np.dtype(kind) for kind in (np.uint8, np.int8, np.float16, ml_dtypes.bfloat16, np.float32))
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

# Names of the standard arrays of a batch. An extra array must have another name.
RESERVED = (
    "latent_mean", "latent_std", "text", "text_mask", "label", "image_size", "aspect_ratio", "index",
    "weight",
)  # fmt: skip

# magic, latent dtype, number of extra arrays (always 0 in "PXJ1"), number of captions, bytes of the key,
# latent h w C, image h w, resized h w, crop top left, bucket h w, ratio key, label
_HEAD = struct.Struct("<4sBBHH3H6I2H8si")
# weight, L, D, dtype, bytes of the name, bytes of the text
_CAPTION = struct.Struct("<fIIBxHI")
# bytes of the name, dtype, rank, sizes of the axes (0 beyond the rank)
_EXTRA = struct.Struct("<BBBx4I")
_MAX_RANK = 4
_ALIGN = 16


class ArraySpec(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class EncodedCaption:
    """One caption of an image.

    Attributes:
      name: the field of the source that it comes from ("caption", "llava", ...).
      weight: relative probability of choosing this caption among those of the record.
      text: the caption as in the source, before cleaning.
      features: bfloat16, float32 or int8 [L, D], valid tokens only.
      scale: float32 [L] for int8 features, whose values are features * scale; None for other dtypes.
    """

    name: str
    weight: float
    text: str
    features: np.ndarray
    scale: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Number of valid tokens."""
        return self.features.shape[0]


@dataclasses.dataclass(frozen=True)
class Record:
    """One image with its captions.

    Attributes:
      key: unique name of the sample, usually its path in the source.
      mean: unscaled posterior mean, float16, bfloat16 or float32 [h, w, C]; or uint8 pixels [h, w, C].
      std: standard deviation of the posterior, with the shape and dtype of `mean`; None for pixels.
      bucket: the image size that the image was cropped to.
      image_size: (height, width) of the original image in pixels.
      resized_size: (height, width) after the resize and before the crop, in pixels.
      offset: (top, left) of the crop in the resized image, in pixels.
      label: class index, or -1 for none.
      captions: any number of captions.
      extras: other arrays by name, such as the latent of a control image; uint8, int8, float16, bfloat16 or
        float32, of rank 0 to 4.
    """

    key: str
    mean: np.ndarray
    std: np.ndarray | None
    bucket: Bucket
    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    label: int = -1
    captions: tuple[EncodedCaption, ...] = ()
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FeatureBucket:
    """Describes the records of one image size in a dataset.

    Attributes:
      bucket: the image size.
      latent_shape: (h, w, C) of mean and std.
      count: number of records.
      extras: the extra arrays that every record of the bucket has, by name.
    """

    bucket: Bucket
    latent_shape: tuple[int, int, int]
    count: int = 0
    extras: Mapping[str, ArraySpec] = dataclasses.field(default_factory=dict)


def quantize(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes text features to 8 bits: q = round(127 x / max |x|), with one maximum per token.

    Args:
      features: float [L, D].

    Returns:
      q, int8 [L, D], and the scale, float32 [L], such that features ~ q * scale.
    """
    features = np.asarray(features, np.float32)
    scale = np.abs(features).max(axis=1, initial=0) / 127
    scale[scale == 0] = 1
    return np.rint(features / scale[:, None]).astype(np.int8), scale


def encode_caption(name: str, weight: float, text: str, features: np.ndarray, dtype: str) -> EncodedCaption:
    """Makes an `EncodedCaption` from the output of the text encoder.

    Args:
      name: as in `EncodedCaption`.
      weight: as in `EncodedCaption`.
      text: as in `EncodedCaption`.
      features: float32 [L, D], valid tokens only.
      dtype: how the features are stored: "int8", "bfloat16" or "float32".
    """
    if dtype == "int8":
        return EncodedCaption(name, weight, text, *quantize(features))
    return EncodedCaption(name, weight, text, np.asarray(features).astype(dtype))


def encode_record(record: Record) -> bytes:
    """Returns a record as bytes, in the layout that the module docstring describes.

    Raises:
      ValueError: the name of an extra array is reserved or too long, or its dtype or rank is not supported.
    """
    arrays = [record.mean] if record.std is None else [record.mean, record.std]
    strings = [record.key.encode()]
    heads = []
    for caption in record.captions:
        name, text = caption.name.encode(), caption.text.encode()
        code = _DTYPE_CODES[caption.features.dtype]
        heads.append(_CAPTION.pack(caption.weight, *caption.features.shape, code, len(name), len(text)))
        strings += [name, text]
        arrays += [caption.features] if caption.scale is None else [caption.scale, caption.features]
    for name, array in record.extras.items():
        heads.append(_extra_head(name, array))
        strings.append(name.encode())
        arrays.append(array)
    head = _HEAD.pack(
        _MAGIC_WITH_EXTRAS if record.extras else _MAGIC, _DTYPE_CODES[record.mean.dtype],
        len(record.extras), len(record.captions), len(strings[0]), *record.mean.shape,
        *record.image_size, *record.resized_size, *record.offset,
        record.bucket.height, record.bucket.width, record.bucket.ratio_key.encode(), record.label,
    )  # fmt: skip
    out = bytearray(b"".join([head, *heads, *strings]))
    for array in arrays:
        out += bytes(-len(out) % _ALIGN)
        out += np.ascontiguousarray(array).tobytes()
    return bytes(out)


def _extra_head(name: str, array: np.ndarray) -> bytes:
    size = len(name.encode())
    if name in RESERVED or not 0 < size < 256:
        raise ValueError(f"extra array '{name}': its name must have 1 to 255 bytes and not be reserved")
    if array.dtype not in _DTYPE_CODES or array.ndim > _MAX_RANK:
        raise ValueError(
            f"extra array '{name}' is {array.dtype} of rank {array.ndim}: it must be one of "
            f"{', '.join(map(str, _DTYPES))}, of rank 0 to {_MAX_RANK}"
        )
    sizes = array.shape + (0,) * (_MAX_RANK - array.ndim)
    return _EXTRA.pack(size, _DTYPE_CODES[array.dtype], array.ndim, *sizes)


def decode_record(data: bytes) -> Record:
    """Returns the record that `encode_record` wrote. Its arrays are read-only views of `data`.

    Raises:
      ValueError: `data` is not a record, or its length differs from what its headers imply.
    """
    if data[:4] not in (_MAGIC, _MAGIC_WITH_EXTRAS) or len(data) < _HEAD.size:
        raise ValueError("not a feature record")
    (
        _, code, num_extras, num_captions, key_bytes, h, w, channels, *sizes,
        bucket_height, bucket_width, ratio, label,
    ) = _HEAD.unpack_from(data)  # fmt: skip
    at = _HEAD.size
    if len(data) < at + num_captions * _CAPTION.size + num_extras * _EXTRA.size:
        raise ValueError("wrong length: the record ends within its headers")
    heads = [_CAPTION.unpack_from(data, at + i * _CAPTION.size) for i in range(num_captions)]
    at += num_captions * _CAPTION.size
    extra_heads = [_EXTRA.unpack_from(data, at + i * _EXTRA.size) for i in range(num_extras)]
    at += num_extras * _EXTRA.size

    def string(size: int) -> str:
        nonlocal at
        at += size
        return data[at - size : at].decode()

    def array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nonlocal at
        at += -at % _ALIGN
        count = math.prod(shape)
        if at + count * dtype.itemsize > len(data):
            raise ValueError(f"wrong length: {len(data)} bytes, but its headers imply more")
        values = np.frombuffer(data, dtype, count, at) if count else np.empty(0, dtype)
        at += count * dtype.itemsize
        return values.reshape(shape)

    key = string(key_bytes)
    texts = [(string(head[4]), string(head[5])) for head in heads]
    names = [string(head[0]) for head in extra_heads]
    latent = _DTYPES[code]
    mean = array((h, w, channels), latent)
    std = None if latent == np.uint8 else array((h, w, channels), latent)
    captions = []
    for (weight, tokens, width, text_code, *_), (name, text) in zip(heads, texts, strict=True):
        dtype = _DTYPES[text_code]
        scale = array((tokens,), np.dtype(np.float32)) if dtype == np.int8 else None
        captions.append(EncodedCaption(name, weight, text, array((tokens, width), dtype), scale))
    extras = {
        name: array(tuple(shape[:rank]), _DTYPES[extra_code])
        for name, (_, extra_code, rank, *shape) in zip(names, extra_heads, strict=True)
    }
    if at != len(data):
        raise ValueError(f"wrong length: {len(data)} bytes, but its headers imply {at}")
    bucket = Bucket(bucket_height, bucket_width, ratio.rstrip(b"\0").decode())
    return Record(
        key, mean, std, bucket, tuple(sizes[:2]), tuple(sizes[2:4]), tuple(sizes[4:]), label, tuple(captions),
        extras,
    )  # fmt: skip


def all_finite(values: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity; always True for integers.

    bfloat16 and float16 are compared as integers, because `np.isfinite` is slow for them: it converts every
    element.
    """
    if values.size == 0 or values.dtype.kind in "iu":
        return True
    if values.dtype == np.float32:
        # A finite sum proves that all terms are finite. Otherwise there is a bad value, or the sum has
        # overflowed; only then is the slower exact test needed.
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(values.sum()) or np.isfinite(values).all())
    # NaN and infinity have all exponent bits set, so that as integers they are above all finite numbers of
    # their sign. As int16, the maximum comes from the positive numbers; as uint16, from the negative ones.
    exponent = 0x7F80 if values.dtype == ml_dtypes.bfloat16 else 0x7C00
    return bool(values.view(np.int16).max() < exponent and values.view(np.uint16).max() < 0x8000 + exponent)


def _any_negative(values: np.ndarray) -> bool:
    """Whether an array of finite floating-point numbers has one below 0."""
    if values.size == 0:
        return False
    if values.dtype == np.float32:
        return bool(values.min() < 0)
    # 0x8000 is -0.0; as uint16, all other negative numbers are above it.
    return bool(values.view(np.uint16).max() > 0x8000)


def record_fault(
    record: Record,
    bucket: FeatureBucket,
    text_length: int,
    text_width: int,
    captions: Sequence[int] | None = None,
    extras: Iterable[str] | None = None,
) -> str | None:
    """Checks a record. `verify` and the loader both use this, so that they report the same message.

    Args:
      record: the record.
      bucket: the bucket of the shard that it was read from.
      text_length: maximum number of tokens of a caption.
      text_width: D of the dataset.
      captions: indices of the captions to check; None for all.
      extras: names of the extra arrays to check, which must be in `bucket.extras`; None for all.

    Returns:
      a description of the first error found, or None if the record is valid.
    """
    if record.mean.shape != bucket.latent_shape:
        return f"wrong shape: latent {list(record.mean.shape)}, its bucket has {list(bucket.latent_shape)}"
    if record.bucket != bucket.bucket:
        return f"wrong bucket: {record.bucket.name}, in a shard of {bucket.bucket.name}"
    for name, values in (("latent mean", record.mean), ("latent std", record.std)):
        if values is not None and not all_finite(values):
            return f"NaN or infinity in its {name}"
    if record.std is not None and _any_negative(record.std):
        return "a negative number in its latent std, which is a standard deviation"
    for name in bucket.extras if extras is None else extras:
        spec, values = bucket.extras[name], record.extras.get(name)
        if values is None:
            return f"no array '{name}', which the records of its bucket must have"
        if (values.shape, values.dtype) != spec:
            return (
                f"wrong shape: array '{name}' is {values.dtype} {list(values.shape)}, its bucket has "
                f"{spec.dtype} {list(spec.shape)}"
            )
        if not all_finite(values):
            return f"NaN or infinity in its array '{name}'"
    if extras is None and (unknown := record.extras.keys() - bucket.extras.keys()):
        return f"array '{min(unknown)}', which the records of its bucket do not have"
    chosen = record.captions if captions is None else [record.captions[i] for i in captions]
    for caption in chosen:
        if not 0 < caption.length <= text_length:
            return (
                f"wrong length: caption '{caption.name}' has {caption.length} tokens, not 1 to {text_length}"
            )
        if caption.features.shape[1] != text_width:
            return f"wrong shape: text width {caption.features.shape[1]}, but {text_width} in the manifest"
        if not (all_finite(caption.features) and (caption.scale is None or all_finite(caption.scale))):
            return f"NaN or infinity in the text of caption '{caption.name}'"
        if caption.scale is not None and caption.scale.min(initial=1) <= 0:
            return f"caption '{caption.name}' has scales of its int8 features that are not above 0"
        if not (caption.weight >= 0 and math.isfinite(caption.weight)):
            return f"caption '{caption.name}' has weight {caption.weight}, not a finite number of at least 0"
    if record.captions and not sum(caption.weight for caption in record.captions) > 0:
        return "caption weights sum to 0"
    return None
