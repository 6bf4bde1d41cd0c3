"""The plan of `precompute`: the bucket of every image, and the records of every shard.

The plan depends only on the source and the config. Every process of a split run, and every restart after an
interruption, therefore makes the same plan without communication.
"""

from __future__ import annotations

import array
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 (gives numpy the name 'bfloat16')
import numpy as np

from pixart_jax.constants import VAE_DOWNSAMPLING
from pixart_jax.data import buckets as geometry
from pixart_jax.data import features, sources
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.digits import DigitsSource
from pixart_jax.data.images import Refused
from pixart_jax.data.shapes import ShapesSource
from pixart_jax.errors import UserError, one_of

if TYPE_CHECKING:  # the config imports the models; `data` must not
    from pixart_jax.config import FeaturesConfig

# Sources that need no files, and their options.
EMBEDDED = {
    "digits": (DigitsSource, ("split",)),
    "shapes": (ShapesSource, ("split", "density", "count", "seed")),
}
KINDS = ("auto", *EMBEDDED, *sources.KINDS)
# Captions that several shards need, such as those of classes, are encoded only once; at most this many.
MAX_COMMON = 2048
# A bucket with few images is merged into a neighbour only if no image loses more than this share of its area.
MAX_CROP = 0.1
# A bucket with this many images, or with those of a batch if that is fewer, is not merged.
MIN_BUCKET = 32
# Number of samples per task of a thread.
_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Shard:
    """The records of one shard.

    Attributes:
      bucket: the bucket of all records.
      file: name of the shard in the feature folder.
      indices: positions of the samples in the source.
    """

    bucket: Bucket
    file: str
    indices: np.ndarray


@dataclasses.dataclass(frozen=True)
class PrecomputePlan:
    """What `precompute` decides before it decodes any image.

    Attributes:
      buckets: the buckets that have images, by rising ratio.
      merged: maps the name of each image's nearest bucket to that of the bucket it is written in.
      crops: average and largest share of an image that is cropped away, by name of the bucket; empty with a
        single bucket.
      shards: all shards, including those that other processes write.
      refused: (key, reason, text) of samples that are skipped because they cannot be used.
      common: captions that more than one shard needs, most frequent first.
      fingerprint: hash of the keys, captions, labels and sizes of all samples.
      notes: lines for the user about files that are not read, sizes in a list that are wrong, and buckets.
    """

    buckets: tuple[Bucket, ...]
    merged: dict[str, str]
    crops: dict[str, tuple[float, float]]
    shards: tuple[Shard, ...]
    refused: tuple[tuple[str, str, str], ...]
    common: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...]

    def describe(self, bucket: Bucket, records: int) -> str:
        """Returns a line about a bucket: how many records it has, what is cropped, and what was merged."""
        cropped = ""
        if bucket.name in self.crops:
            mean, most = self.crops[bucket.name]
            cropped = f", {mean:.1%} of an image cropped on average, {most:.1%} at most"
        others = [name for name, to in self.merged.items() if to == bucket.name != name]
        note = f"  with {', '.join(others)}" if others else ""
        return f"bucket {bucket.name} (ratio {bucket.ratio_key}): {records:,} records{cropped}{note}"


def open_images(kind: str, path: str, config: FeaturesConfig, options: dict[str, Any]) -> Any:
    """Opens the source that `--images` and `--source` name.

    Args:
      kind: one of `KINDS`.
      path: a file, folder, pattern or name; or a name in `EMBEDDED`, for images that need no files.
      config: the features config, which decides whether captions are required.
      options: options of the source, by name.

    Returns:
      a source with the interface of `sources.Source`.

    Raises:
      UserError: the kind or an option is unknown, there are no samples, or captions are missing.
    """
    one_of("--source", kind, KINDS)
    if kind == "auto" and path in EMBEDDED and not Path(path).exists():
        kind = path
    if kind in EMBEDDED:
        source, known = EMBEDDED[kind]
        for name in options:
            one_of(f"option of source '{kind}'", name, known)
        return source(image_size=config.image_size, **options)
    if kind == "auto":
        kind = sources.detect_kind(path)
    if kind == "classes" and config.text and "captions" not in options:
        raise UserError(
            f"'{path}' has class folders without captions, but features.text is True: add captions (.txt or "
            ".caption files, or metadata.jsonl), take them from folder names such as '10_sks dog' with "
            "--source=kohya, or set --config.features.text=False to use only class labels."
        )
    return sources.open_source(kind, path, require_captions=config.text, **options)


def make_plan(
    source: Any,
    config: FeaturesConfig,
    *,
    shard_mb: int,
    min_bucket: int,
    max_crop: float = MAX_CROP,
    workers: int,
    channels: int = 3,
) -> PrecomputePlan:
    """Chooses the bucket of every image and the records of every shard.

    Reads all captions. With aspect-ratio buckets it also reads the size of every image from the header of its
    file. The size in a list is not used: it often is that of the stored image, before its EXIF rotation.

    Args:
      source: a source of `open_images`.
      config: the features config.
      shard_mb: maximum size of a shard in MiB.
      min_bucket: buckets with fewer images are merged into a neighbour,
      max_crop: unless more than this share of an image, 0 to 1, would be cropped away.
      workers: number of reader threads.
      channels: number of channels of an image.
    """
    count = len(source)
    table = bucket_table(config)
    need_sizes = len(table) > 1
    sizes = np.ones((count, 2), np.int32)
    num_captions = np.zeros(count, np.uint16)
    wrong_sizes = []  # keys of samples whose size in the list is not that of the image
    digests = array.array("Q")  # hashes of all captions, in the order of the source
    fingerprint = hashlib.sha256()
    refused = []

    def look(index: int) -> Any:
        try:
            example = source[index]
            size = (1, 1)
            if need_sizes:
                size = example.size()
            captions = [tuple(caption) for caption in example.captions] if config.text else []
            summary = repr((example.key, captions, example.label, size)).encode()
            wrong = need_sizes and (example.height or size[0], example.width or size[1]) != size
            return wrong, example.key, size, [_digest(text) for text, *_ in captions], summary
        except Refused as error:
            return error

    chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = ahead(pool, lambda chunk: [(index, look(index)) for index in chunk], chunks, 4 * workers)
        for index, found in itertools.chain.from_iterable(results):
            if isinstance(found, Refused):
                key = source.key(index)
                refused.append((key, found.reason, found.text))
                sizes[index] = 0
                fingerprint.update(repr((key, found.reason)).encode())
                continue
            wrong, key, sizes[index], own, summary = found
            if wrong:
                wrong_sizes.append(key)
            num_captions[index] = len(own)
            digests.extend(own)
            fingerprint.update(summary)

    usable = np.flatnonzero(sizes[:, 0] > 0)
    nearest = (
        geometry.nearest_indices(sizes[usable], table) if need_sizes else np.zeros(len(usable), np.int32)
    )
    counts = dict(zip(table, np.bincount(nearest, minlength=len(table)).tolist()))
    goes_to, ratios = {table[0]: table[0]}, sizes[usable, 0] / sizes[usable, 1]
    if need_sizes:
        allowed = geometry.merges_within(ratios, nearest, table, max_crop)
        goes_to = geometry.merge_small_buckets(counts, min_bucket, allowed)
    kept = geometry.kept_buckets(goes_to)
    to_kept = np.array([kept.index(goes_to[bucket]) if bucket in goes_to else -1 for bucket in table])

    captions = int(num_captions.max(initial=0))
    shards, crops, small = [], {}, []
    for position, bucket in enumerate(kept):
        inside = to_kept[nearest] == position
        members = usable[inside]
        if need_sizes:
            lost = geometry.cropped_share(ratios[inside], bucket)
            crops[bucket.name] = float(lost.mean()), float(lost.max())
            small += [bucket] * (len(members) < min_bucket)
        step = max(1, (shard_mb << 20) // record_bytes(config, bucket, captions, channels))
        for start in range(0, len(members), step):
            file = features.shard_name(bucket, start // step)
            shards.append(Shard(bucket, file, members[start : start + step]))
    owners = np.repeat(np.arange(count), num_captions)
    common = _common_captions(source, shards, owners, np.array(digests, np.uint64))
    notes = list(getattr(source, "notes", ()))
    if wrong_sizes:
        notes.append(
            f"{len(wrong_sizes):,} samples have another size than their list says, for example "
            f"'{wrong_sizes[0]}' (the stored size of a photo with EXIF rotation?); that of the image is used"
        )
    if small and len(kept) > 1:
        notes.append(
            f"{len(small)} buckets have fewer than {min_bucket} images and are not merged, because more than "
            f"{max_crop:.0%} of an image would be cropped away (--max_crop); their batches repeat images"
        )
    return PrecomputePlan(
        buckets=kept,
        merged=geometry.mapping_by_name(goes_to),
        crops=crops,
        shards=tuple(shards),
        refused=tuple(refused),
        common=common,
        fingerprint=fingerprint.hexdigest(),
        notes=tuple(notes),
    )


def bucket_table(config: FeaturesConfig) -> tuple[Bucket, ...]:
    """Returns the buckets that images are assigned to."""
    if config.buckets == "official":
        return geometry.bucket_table(config.image_size)
    if config.codec == "pixels":  # `Bucket.of` would require multiples of 16; the digits have 8 x 8 pixels
        return (Bucket(config.image_size, config.image_size, "1.0"),)
    return geometry.square_bucket(config.image_size)


def record_bytes(config: FeaturesConfig, bucket: Bucket, captions: int, channels: int) -> int:
    """Returns an upper bound on the size of a record in bytes. It limits the number of records per shard."""
    if config.codec == "pixels":
        latent = bucket.height * bucket.width * channels
    else:
        positions = bucket.height * bucket.width // VAE_DOWNSAMPLING**2
        # Mean and standard deviation, 4 channels each.
        latent = positions * 2 * 4 * np.dtype(config.latent_dtype).itemsize
    width = config.text_encoder.d_model
    text = captions * config.text_length * width * np.dtype(config.text_dtype).itemsize if config.text else 0
    return 1024 + latent + text


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _common_captions(
    source: Any, shards: Sequence[Shard], owners: np.ndarray, digests: np.ndarray
) -> tuple[str, ...]:
    """Finds the captions that several shards need, for example those of classes.

    Only hashes of captions are kept in memory, so the texts are read again from the source.

    Args:
      source: the source.
      shards: the shards of the plan.
      owners: position in the source of the sample that each caption belongs to, [captions].
      digests: hash of each caption, [captions].

    Returns:
      the captions, most frequent first, at most `MAX_COMMON`.
    """
    shard_of = np.full(len(source), -1)
    for number, shard in enumerate(shards):
        shard_of[shard.indices] = number
    pairs = np.stack([digests, shard_of[owners].astype(np.uint64)], axis=1)
    needed, times = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
    order = np.lexsort((needed, -times))[:MAX_COMMON]
    common = needed[order[times[order] > 1]]
    present, first = np.unique(digests, return_index=True)
    texts = []
    for digest in common:
        owner = owners[first[np.searchsorted(present, digest)]]
        texts += [c.text for c in source[int(owner)].captions if _digest(c.text) == int(digest)][:1]
    return tuple(texts)


def ahead(pool: Any, function: Callable[[Any], Any], items: Any, ahead: int) -> Iterator[Any]:
    """Like `pool.map`, but submits at most `ahead` items before their results are used."""
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
