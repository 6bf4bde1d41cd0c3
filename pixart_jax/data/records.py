"""The feature record: one image as the model sees it, and its bytes.

A record holds the unscaled mean and standard deviation of the image's VAE posterior (or its uint8 pixels),
the text features of each of its captions, a class label, the sizes that the size conditions need, and any
extra arrays by name. Of the text only valid tokens are stored: 120 x 4096 bfloat16 would be 983 kB an image,
of which a caption of 40 words fills less than half.

Layout: a fixed header, one header per caption, one per extra array; key, names and texts; then the arrays,
each aligned to 16 bytes and read in place. A record begins with "PXJ2" if it has extra arrays, which version
0.1 cannot read, and else with "PXJ1", as 0.1 wrote it, byte for byte. The bytes carry no checksum of their
own: ArrayRecord hashes every record.

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
# Order is the format: a dtype is stored as its index.
_DTYPES = tuple(np.dtype(kind) for kind in (np.uint8, np.int8, np.float16, ml_dtypes.bfloat16, np.float32))
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

# Names of the other arrays in a batch, which no extra array may have.
RESERVED = (
    "latent_mean", "latent_std", "text", "text_mask", "label", "image_size", "aspect_ratio", "index",
    "weight",
)  # fmt: skip

# magic, latent dtype, extra arrays (in "PXJ1" always 0), captions, key bytes, latent h w C, image h w,
# resized h w, crop top left, bucket h w, ratio key, label
_HEAD = struct.Struct("<4sBBHH3H6I2H8si")
# weight, tokens, width, dtype, name bytes, text bytes
_CAPTION = struct.Struct("<fIIBxHI")
# name bytes, dtype, rank, sizes of the axes (0 beyond the rank)
_EXTRA = struct.Struct("<BBBx4I")
_MAX_RANK = 4
_ALIGN = 16


class ArraySpec(NamedTuple):
    """Shape and dtype of an array that is not there yet."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class EncodedCaption:
    """One caption of an image.

    Attributes:
      name: where it comes from ("caption", "llava", ...).
      weight: how often it is drawn, relative to the record's other captions.
      text: as the source has it, before cleaning.
      features: bfloat16, float32 or int8 [L, D], valid tokens only.
      scale: float32 [L] for int8 features, which are features * scale; else None.
    """

    name: str
    weight: float
    text: str
    features: np.ndarray
    scale: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Valid tokens."""
        return self.features.shape[0]


@dataclasses.dataclass(frozen=True)
class Record:
    """One image with its captions.

    Attributes:
      key: stable name, the relative path in the source.
      mean: unscaled posterior mean, float16, bfloat16 or float32 [h, w, C]; or uint8 pixels [h, w, C].
      std: its standard deviation, as `mean`; None for pixels.
      bucket: the image size in pixels that the record was cropped to.
      image_size: (height, width) of the original image in pixels.
      resized_size: (height, width) after the resize and before the crop, in pixels.
      offset: (top, left) of the crop in the resized image, in pixels.
      label: class index, or -1.
      captions: any number.
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
    """The records of one image size in a dataset.

    Attributes:
      bucket: image size in pixels.
      latent_shape: (h, w, C) of mean and std.
      count: records.
      extras: the extra arrays that every record has, by name.
    """

    bucket: Bucket
    latent_shape: tuple[int, int, int]
    count: int = 0
    extras: Mapping[str, ArraySpec] = dataclasses.field(default_factory=dict)


def quantize(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stores text features in 8 bits: q = round(127 x / max |x|), per token.

    Args:
      features: float [L, D].

    Returns:
      int8 [L, D] and the float32 scale [L], with features ~ q * scale.
    """
    features = np.asarray(features, np.float32)
    scale = np.abs(features).max(axis=1, initial=0) / 127
    scale[scale == 0] = 1
    return np.rint(features / scale[:, None]).astype(np.int8), scale


def encode_caption(name: str, weight: float, text: str, features: np.ndarray, dtype: str) -> EncodedCaption:
    """Makes a caption from the encoder's output.

    Args:
      features: float32 [L, D], valid tokens.
      dtype: "int8", "bfloat16" or "float32".
    """
    if dtype == "int8":
        return EncodedCaption(name, weight, text, *quantize(features))
    return EncodedCaption(name, weight, text, np.asarray(features).astype(dtype))


def encode_record(record: Record) -> bytes:
    """Writes a record in the layout that the head of this module describes.

    Raises:
      ValueError: an extra array has a reserved or too long name, or a dtype or rank that is not stored.
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
    """Reads what `encode_record` wrote; the arrays are read-only views of `data`.

    Raises:
      ValueError: not a record, or its bytes do not match the lengths in its headers.
    """
    if data[:4] not in (_MAGIC, _MAGIC_WITH_EXTRAS) or len(data) < _HEAD.size:
        raise ValueError("not a feature record")
    (
        _, code, num_extras, num_captions, key_bytes, h, w, channels, *sizes,
        bucket_height, bucket_width, ratio, label,
    ) = _HEAD.unpack_from(data)  # fmt: skip
    at = _HEAD.size
    if len(data) < at + num_captions * _CAPTION.size + num_extras * _EXTRA.size:
        raise ValueError("wrong length: the record ends in its headers")
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
            raise ValueError(f"wrong length: {len(data)} bytes, the headers promise more")
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
        raise ValueError(f"wrong length: {len(data)} bytes, the headers promise {at}")
    bucket = Bucket(bucket_height, bucket_width, ratio.rstrip(b"\0").decode())
    return Record(
        key, mean, std, bucket, tuple(sizes[:2]), tuple(sizes[2:4]), tuple(sizes[4:]), label, tuple(captions),
        extras,
    )  # fmt: skip


def all_finite(values: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity; integers always pass.

    bfloat16 and float16 are looked at as bits: numpy's own test converts every element, at a high cost.
    """
    if values.size == 0 or values.dtype.kind in "iu":
        return True
    if values.dtype == np.float32:
        # A sum is not finite if any term is not; only then, or on overflow, is the exact test needed.
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(values.sum()) or np.isfinite(values).all())
    # As signed bits the largest value is a positive number's, as unsigned a negative one's; NaN and infinity,
    # with their full exponents, lie above all others of their sign.
    exponent = 0x7F80 if values.dtype == ml_dtypes.bfloat16 else 0x7C00
    return bool(values.view(np.int16).max() < exponent and values.view(np.uint16).max() < 0x8000 + exponent)


def record_fault(
    record: Record,
    bucket: FeatureBucket,
    text_length: int,
    text_width: int,
    captions: Sequence[int] | None = None,
    extras: Iterable[str] | None = None,
) -> str | None:
    """Says what is wrong with a record, in the words that `verify` and the loader share.

    Args:
      record: as read.
      bucket: the bucket of the shard it was read from.
      text_length: most tokens a caption may have.
      text_width: D of the dataset.
      captions: which captions to look at; None for all.
      extras: which extra arrays to look at, names in `bucket.extras`; None for all.

    Returns:
      One clause, or None for a sound record.
    """
    if record.mean.shape != bucket.latent_shape:
        return f"wrong shape: latent {list(record.mean.shape)}, its bucket has {list(bucket.latent_shape)}"
    if record.bucket != bucket.bucket:
        return f"wrong bucket: {record.bucket.name}, in a shard of {bucket.bucket.name}"
    for name, values in (("latent mean", record.mean), ("latent std", record.std)):
        if values is not None and not all_finite(values):
            return f"NaN or infinity in its {name}"
    for name in bucket.extras if extras is None else extras:
        spec, values = bucket.extras[name], record.extras.get(name)
        if values is None:
            return f"no array '{name}', which its bucket has"
        if (values.shape, values.dtype) != spec:
            return (
                f"wrong shape: array '{name}' is {values.dtype} {list(values.shape)}, its bucket has "
                f"{spec.dtype} {list(spec.shape)}"
            )
        if not all_finite(values):
            return f"NaN or infinity in its array '{name}'"
    if extras is None and (unknown := record.extras.keys() - bucket.extras.keys()):
        return f"array '{min(unknown)}', which its bucket does not have"
    chosen = record.captions if captions is None else [record.captions[i] for i in captions]
    for caption in chosen:
        if not 0 < caption.length <= text_length:
            return (
                f"wrong length: caption '{caption.name}' has {caption.length} tokens, not 1 to {text_length}"
            )
        if caption.features.shape[1] != text_width:
            return f"wrong shape: text of width {caption.features.shape[1]}, the manifest says {text_width}"
        if not (all_finite(caption.features) and (caption.scale is None or all_finite(caption.scale))):
            return f"NaN or infinity in the text of caption '{caption.name}'"
        if not (caption.weight >= 0 and math.isfinite(caption.weight)):
            return f"caption '{caption.name}' has weight {caption.weight}"
    if record.captions and not sum(caption.weight for caption in record.captions) > 0:
        return "caption weights sum to 0"
    return None
