"""The plan of a precompute: which image goes to which bucket, and which records make which shard.

It follows from the source and the config alone, so that every process of a split run, and every run after an
interruption, makes the same one.
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

if TYPE_CHECKING:  # the config knows the models, which the data must not
    from pixart_jax.config import FeaturesConfig

# Sources that need no files, and their options.
EMBEDDED = {
    "digits": (DigitsSource, ("split",)),
    "shapes": (ShapesSource, ("split", "density", "count", "seed")),
}
KINDS = ("auto", *EMBEDDED, *sources.KINDS)
# Captions that more than one shard needs are encoded once, up to this many.
MAX_COMMON = 2048
# Samples that a thread looks at in one go.
_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Shard:
    """Records that are written together.

    Attributes:
      bucket: of all of them.
      file: name in the folder.
      indices: positions in the source.
    """

    bucket: Bucket
    file: str
    indices: np.ndarray


@dataclasses.dataclass(frozen=True)
class PrecomputePlan:
    """What follows from the source and the config before any image is decoded.

    Attributes:
      buckets: that hold images, by rising ratio.
      merged: bucket of an image to the bucket it is written in, by name.
      shards: all of them, whichever process writes them.
      refused: (key, reason, text) of samples that cannot be used.
      common: captions that are needed by more than one shard, most frequent first.
      fingerprint: hash of keys, captions, labels and sizes.
    """

    buckets: tuple[Bucket, ...]
    merged: dict[str, str]
    shards: tuple[Shard, ...]
    refused: tuple[tuple[str, str, str], ...]
    common: tuple[str, ...]
    fingerprint: str


def open_images(kind: str, path: str, config: FeaturesConfig, options: dict[str, Any]) -> Any:
    """Opens what --images names.

    Args:
      kind: one of `KINDS`.
      path: file, folder, pattern or name; a name in `EMBEDDED` for images that need no files.
      options: of the source, by name.

    Raises:
      UserError: unknown kind, nothing there, or a source that lacks what the config needs.
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
            f"'{path}' holds class folders without captions and features.text is True: add captions, or set "
            "--config.features.text=False for class labels alone."
        )
    return sources.open_source(kind, path, require_captions=config.text, **options)


def make_plan(
    source: Any,
    config: FeaturesConfig,
    *,
    shard_mb: int,
    min_bucket: int,
    workers: int,
    channels: int = 3,
) -> PrecomputePlan:
    """Decides the bucket of every image and the records of every shard.

    Reads captions, and the size of an image from its header where buckets need it and the source does not say
    it.

    Args:
      source: as `open_images` gives it.
      config: what the features are.
      shard_mb: upper bound of a shard, in MiB.
      min_bucket: buckets with fewer images are merged into their neighbour.
      workers: threads that read.
      channels: of the images.
    """
    count = len(source)
    table = bucket_table(config)
    need_sizes = len(table) > 1
    sizes = np.ones((count, 2), np.int32)
    num_captions = np.zeros(count, np.uint16)
    digests = array.array("Q")  # of all captions, one after the other
    whole = hashlib.sha256()
    refused = []

    def look(index: int) -> Any:
        try:
            example = source[index]
            size = (1, 1)
            if need_sizes:
                known = example.height and example.width
                size = (example.height, example.width) if known else example.size()
            captions = [tuple(caption) for caption in example.captions] if config.text else []
            words = repr((example.key, captions, example.label, size)).encode()
            return size, [_digest(text) for text, *_ in captions], words
        except Refused as error:
            return error

    chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        looked = ahead(pool, lambda chunk: [(index, look(index)) for index in chunk], chunks, 4 * workers)
        for index, found in itertools.chain.from_iterable(looked):
            if isinstance(found, Refused):
                key = source.key(index)
                refused.append((key, found.reason, found.text))
                sizes[index] = 0
                whole.update(repr((key, found.reason)).encode())
                continue
            sizes[index], own, words = found
            num_captions[index] = len(own)
            digests.extend(own)
            whole.update(words)

    usable = np.flatnonzero(sizes[:, 0] > 0)
    nearest = (
        geometry.nearest_indices(sizes[usable], table) if need_sizes else np.zeros(len(usable), np.int32)
    )
    counts = dict(zip(table, np.bincount(nearest, minlength=len(table)).tolist()))
    goes_to = geometry.merge_small_buckets(counts, min_bucket) if need_sizes else {table[0]: table[0]}
    kept = geometry.kept_buckets(goes_to)
    to_kept = np.array([kept.index(goes_to[bucket]) if bucket in goes_to else -1 for bucket in table])

    captions = int(num_captions.max(initial=0))
    shards = []
    for position, bucket in enumerate(kept):
        members = usable[to_kept[nearest] == position]
        step = max(1, (shard_mb << 20) // record_bytes(config, bucket, captions, channels))
        for start in range(0, len(members), step):
            file = features.shard_name(bucket, start // step)
            shards.append(Shard(bucket, file, members[start : start + step]))
    owners = np.repeat(np.arange(count), num_captions)
    common = _common_captions(source, shards, owners, np.array(digests, np.uint64))
    merged = geometry.mapping_by_name(goes_to)
    return PrecomputePlan(kept, merged, tuple(shards), tuple(refused), common, whole.hexdigest())


def bucket_table(config: FeaturesConfig) -> tuple[Bucket, ...]:
    """The buckets of a config."""
    if config.buckets == "official":
        return geometry.bucket_table(config.image_size)
    if config.codec == "pixels":  # of any size, the digits' 8 x 8 too
        return (Bucket(config.image_size, config.image_size, "1.0"),)
    return geometry.square_bucket(config.image_size)


def record_bytes(config: FeaturesConfig, bucket: Bucket, captions: int, channels: int) -> int:
    """Upper bound of the size of a record, from which shards are cut."""
    if config.codec == "pixels":
        latent = bucket.height * bucket.width * channels
    else:
        positions = bucket.height * bucket.width // VAE_DOWNSAMPLING**2
        # Mean and standard deviation of 4 channels.
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

    Args:
      source: to read their texts from.
      shards: of the plan.
      owners: [captions] position in the source of the sample that each caption belongs to.
      digests: [captions] their hashes.
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
    """`map` on a pool, in order, at most `ahead` items in advance of their use."""
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
