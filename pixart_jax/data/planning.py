"""The plan of `precompute`: the bucket of every image, and the records of every shard.

The plan depends only on the source and the config, and after images were added also on the plan before that
(`job.py`). Every process of a split run, and every restart after an interruption, therefore makes the same
plan without communication.
"""

from __future__ import annotations

import array
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes  # noqa: F401 (gives numpy the name 'bfloat16')
import numpy as np
from PIL import Image

from pixart_jax.constants import VAE_DOWNSAMPLING
from pixart_jax.data import buckets as geometry
from pixart_jax.data import features, sources
from pixart_jax.data.augmentation import AugmentedSource
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.digits import DigitsSource
from pixart_jax.data.images import Refused, decode_image
from pixart_jax.data.masks import MaskedSource, decode_mask
from pixart_jax.data.openmoji import OpenMojiSource
from pixart_jax.data.shapes import ShapesSource
from pixart_jax.errors import UserError, one_of

if TYPE_CHECKING:  # the config imports the models; `data` must not
    from pixart_jax.config import FeaturesConfig

# Sources that need no files, and their options.
EMBEDDED = {
    "digits": (DigitsSource, ("split",)),
    "openmoji": (OpenMojiSource, ("split", "named", "one_in")),
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
class Survey:
    """What planning reads of all N samples of a source. No image is decoded.

    Attributes:
      sizes: (height, width) of the images in pixels, int32 [N, 2]; (1, 1) if there is only one bucket, and 0
        for samples that cannot be used.
      keys: hash of the key, uint64 [N].
      facts: hash of captions, label and size, uint64 [N].
      marks: hash of the state of the image file, uint64 [N]; see `mark_of`.
      num_captions: number of captions, uint16 [N].
      captions: hashes of all captions in the order of the source, uint64.
      refused: (key, reason, text) of the samples that cannot be used, by their position in the source.
      fingerprint: hash of the keys, captions, labels and sizes of all samples.
      notes: lines for the user about files that are not read, and sizes in a list that are wrong.
    """

    sizes: np.ndarray
    keys: np.ndarray
    facts: np.ndarray
    marks: np.ndarray
    num_captions: np.ndarray
    captions: np.ndarray
    refused: dict[int, tuple[str, str, str]]
    fingerprint: str
    notes: tuple[str, ...]

    @functools.cached_property
    def usable(self) -> np.ndarray:
        """Positions of the samples that can be used, so far as planning can tell."""
        return np.flatnonzero(self.sizes[:, 0] > 0)

    @functools.cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        order = self.usable[np.argsort(self.keys[self.usable], kind="stable")]
        return self.keys[order], order

    def part(self, members: np.ndarray) -> Survey:
        """Returns the survey of some of the samples, bool [N]; the positions are the same."""
        return dataclasses.replace(
            self,
            sizes=np.where(members[:, None], self.sizes, 0),
            refused={index: line for index, line in self.refused.items() if members[index]},
        )

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the positions of the usable samples with these hashes of keys; -1 where there is none."""
        known, order = self._sorted
        if not len(order):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[places] == keys, order[places], -1)


@dataclasses.dataclass(frozen=True)
class PrecomputePlan:
    """The shards of a set of samples.

    Attributes:
      buckets: the buckets that have images, by rising ratio.
      merged: maps the name of each image's nearest bucket to that of the bucket it is written in.
      shards: all shards, including those that other processes write.
      notes: lines for the user about buckets that are small and not merged.
    """

    buckets: tuple[Bucket, ...]
    merged: dict[str, str]
    shards: tuple[Shard, ...]
    notes: tuple[str, ...]


def open_images(
    kind: str,
    path: str,
    config: FeaturesConfig,
    options: dict[str, Any],
    *,
    masks: str | None = None,
    flip: bool = False,
    crops: int = 1,
    crop_seed: int = 0,
) -> Any:
    """Opens the source that `--images` and `--source` name.

    Args:
      kind: one of `KINDS`.
      path: a file, folder, pattern or name; or a name in `EMBEDDED`, for images that need no files.
      config: the features config, which decides whether captions are required.
      options: options of the source, by name.
      masks: folder of the masks; see `data.masks`.
      flip, crops, crop_seed: as for `augmentation.AugmentedSource`.

    Returns:
      a source with the interface of `sources.Source`.

    Raises:
      UserError: the kind or an option is unknown, there are no samples, or captions are missing; or masks or
        views do not fit the source.
    """
    source = _open_source(kind, path, config, options)
    wanted = {"--masks": masks, "--flip": flip, "--crops": crops > 1}
    if source.kind in EMBEDDED and (given := [name for name, value in wanted.items() if value]):
        raise UserError(
            f"{given[0]} needs images in files, and '{source.kind}' is a built-in data set: leave it out."
        )
    if masks:
        inside, around = Path(masks).resolve(), Path(path).resolve()
        if around.is_dir() and around in inside.parents:
            raise UserError(
                f"--masks '{masks}' is inside '{path}', so that its masks would be read as images: move the "
                "folder out of it."
            )
        source = MaskedSource(source, masks)
    return AugmentedSource(source, flip, crops, crop_seed) if flip or crops > 1 else source


def _open_source(kind: str, path: str, config: FeaturesConfig, options: dict[str, Any]) -> Any:
    one_of("--source", kind, KINDS)
    if "caption" in options and not config.text:
        raise UserError("--caption has no effect, because features.text is False: leave it out.")
    if kind == "auto" and path in EMBEDDED:
        if Path(path).exists():
            raise UserError(
                f"--images is '{path}', a path of this folder and the name of embedded data: give "
                f"./{path}, or --source={path} for the embedded data."
            )
        kind = path
    if kind in EMBEDDED:
        source, known = EMBEDDED[kind]
        for name in options:
            one_of(f"option of source '{kind}'", name, known)
        return source(image_size=config.image_size, **options)
    if kind == "auto":
        kind = sources.detect_kind(path, require_captions="caption" not in options)
    if kind == "classes" and config.text and not options.keys() & {"captions", "caption"}:
        lists = sources.lists_in(path)
        given = f" (perhaps they are in '{lists[0]}': give this list with --images)" if lists else ""
        raise UserError(
            f"'{path}' has class folders without captions{given}, but features.text is True: add captions "
            "(.txt or .caption files, or metadata.jsonl), take them from folder names such as '10_sks dog' "
            "with --source=kohya, give all images the same one with --caption, or set "
            "--config.features.text=False to use only class labels."
        )
    return sources.open_source(kind, path, require_captions=config.text, **options)


def survey(source: Any, config: FeaturesConfig, workers: int) -> Survey:
    """Reads the captions of all samples, and the state of their image files.

    With aspect-ratio buckets it also reads the size of every image from the header of its file. The size in a
    list is not used: it often is that of the stored image, before its EXIF rotation.

    Args:
      source: a source of `open_images`.
      config: the features config.
      workers: number of reader threads.
    """
    count = len(source)
    need_sizes = len(bucket_table(config)) > 1
    sizes = np.ones((count, 2), np.int32)
    keys, facts, marks = np.zeros((3, count), np.uint64)
    num_captions = np.zeros(count, np.uint16)
    wrong_sizes = []  # keys of samples whose size in the list is not that of the image
    digests = array.array("Q")
    fingerprint = hashlib.sha256()
    refused = {}

    def look(index: int) -> Any:
        try:
            example = source[index]
            mark = mark_of(example)  # before anything of the image is read
            size = (1, 1)
            if need_sizes:
                size = example.size()
            captions = [tuple(caption) for caption in example.captions] if config.text else []
            summary = repr((example.key, captions, example.label, size)).encode()
            wrong = need_sizes and (example.height or size[0], example.width or size[1]) != size
            own = [hash_of(text) for text, *_ in captions]
            return size, own, example.key, mark, summary, wrong
        except Refused as error:
            return error

    chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = ahead(pool, lambda chunk: [(index, look(index)) for index in chunk], chunks, 4 * workers)
        for index, found in itertools.chain.from_iterable(results):
            if isinstance(found, Refused):
                key = source.key(index)
                refused[index] = (key, found.reason, found.text)
                keys[index], sizes[index] = hash_of(key), 0
                fingerprint.update(repr((key, found.reason)).encode())
                continue
            sizes[index], own, key, marks[index], summary, wrong = found
            keys[index], num_captions[index], facts[index] = hash_of(key), len(own), hash_of(summary)
            wrong_sizes += [key] if wrong else []
            digests.extend(own)
            fingerprint.update(summary)

    captions = np.array(digests, np.uint64)
    # A source cannot check all kinds of keys, for example a feature of TFDS.
    usable = np.flatnonzero(sizes[:, 0] > 0)
    again = np.setdiff1d(usable, usable[np.unique(keys[usable], return_index=True)[1]])
    if len(again):
        captions = captions[~np.isin(np.repeat(np.arange(count), num_captions), again)]
        num_captions[again], sizes[again] = 0, 0
    for index in again.tolist():
        key = source.key(index)
        refused[index] = (key, "duplicate_key", f"another sample has the key '{key}' too")
    notes = list(getattr(source, "notes", ()))
    if wrong_sizes:
        notes.append(
            f"{len(wrong_sizes):,} samples have another size than their list says, for example "
            f"'{wrong_sizes[0]}' (the stored size of a photo with EXIF rotation?); that of the image is used"
        )
    return Survey(
        sizes, keys, facts, marks, num_captions, captions, refused, fingerprint.hexdigest(), tuple(notes)
    )


def make_plan(
    source_survey: Survey,
    config: FeaturesConfig,
    *,
    shard_mb: int,
    min_bucket: int,
    max_crop: float = MAX_CROP,
    channels: int = 3,
    masked: bool = False,
    image_width: int = 0,
    members: np.ndarray | None = None,
    existing: Mapping[Bucket, int] | None = None,
    first_shards: Mapping[Bucket, int] | None = None,
) -> PrecomputePlan:
    """Chooses the bucket of every image and the records of every shard.

    Args:
      source_survey: what `survey` found in the source.
      config: the features config.
      shard_mb: maximum size of a shard in MiB.
      min_bucket: number of images below which a bucket is merged into a neighbour.
      max_crop: largest share of an image, 0 to 1, that a merge may crop away; beyond it a bucket stays small.
      channels: number of channels of an image.
      masked: whether the records have masks.
      image_width: width of the image features in the records; 0 for none.
      members: positions of the samples to plan; default: all that can be used.
      existing: number of records that earlier shards have in each bucket. These buckets are never merged into
        others, and new images that are too few for a bucket of their own join them.
      first_shards: number of the first new shard of a bucket; default: 0.
    """
    table, members = bucket_table(config), source_survey.usable if members is None else members
    existing, first_shards = existing or {}, first_shards or {}
    nearest = np.zeros(len(members), np.int32)
    goes_to = {table[0]: table[0]}
    if len(table) > 1:
        nearest = geometry.nearest_indices(source_survey.sizes[members], table)
        counts = dict(zip(table, np.bincount(nearest, minlength=len(table)).tolist()))
        for bucket, records in existing.items():
            counts[bucket] = max(counts[bucket] + records, min_bucket)
        ratios = source_survey.sizes[members, 0] / source_survey.sizes[members, 1]
        allowed = geometry.merges_within(ratios, nearest, table, max_crop)
        goes_to = geometry.merge_small_buckets(counts, min_bucket, allowed)
    kept = geometry.kept_buckets(goes_to)
    to_kept = np.array([kept.index(goes_to[bucket]) if bucket in goes_to else -1 for bucket in table])

    captions = int(source_survey.num_captions[members].max(initial=0))
    arrays = captions, channels, masked, image_width
    shards, counts_of = [], {}
    for position, bucket in enumerate(kept):
        own = members[to_kept[nearest] == position]
        counts_of[bucket] = len(own) + existing.get(bucket, 0)
        step = max(1, (shard_mb << 20) // record_bytes(config, bucket, *arrays))
        for start in range(0, len(own), step):
            file = features.shard_name(bucket, first_shards.get(bucket, 0) + start // step)
            shards.append(Shard(bucket, file, own[start : start + step]))
    used = {table[i] for i in np.unique(nearest)}
    goes_to = {bucket: to for bucket, to in goes_to.items() if bucket in used}
    buckets = tuple(bucket for bucket in kept if bucket in goes_to.values())
    small = sum(counts_of[bucket] < min_bucket for bucket in buckets) if len(kept) > 1 else 0
    notes = [
        f"{small} buckets have fewer than {min_bucket} images and are not merged, because more than "
        f"{max_crop:.0%} of an image would be cropped away; their batches repeat images"
    ]
    return PrecomputePlan(
        buckets, geometry.mapping_by_name(goes_to), tuple(shards), tuple(notes) if small else ()
    )


def describe_bucket(
    bucket: Bucket, records: int, merged: Mapping[str, str], shards: Sequence[Shard], source_survey: Survey
) -> str:
    """Returns a line about a bucket: how many records it has, what is cropped, and what was merged.

    Args:
      bucket: the bucket.
      records: its number of records.
      merged: as in `PrecomputePlan`.
      shards: all shards; the images of those of this bucket are looked at.
      source_survey: what `survey` found in the source; if it has no sizes, nothing is said about cropping.
    """
    members = np.concatenate([shard.indices for shard in shards if shard.bucket == bucket])
    sizes = source_survey.sizes[members[members >= 0]]
    cropped = ""
    if (sizes > 1).any():
        lost = geometry.cropped_share(sizes[:, 0] / sizes[:, 1], bucket)
        cropped = f", {lost.mean():.1%} of an image cropped on average, {lost.max():.1%} at most"
    others = [name for name, to in merged.items() if to == bucket.name != name]
    note = f"  with {', '.join(others)}" if others else ""
    return f"bucket {bucket.name} (ratio {bucket.ratio_key}): {records:,} records{cropped}{note}"


def hash_of(data: str | bytes) -> int:
    """A 64-bit hash of a key, a caption or other data."""
    data = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def mark_of(example: Any) -> int:
    """A 64-bit hash of the state of an image file, which is found without reading the file.

    It covers the size of the file and the times at which its content and its inode last changed, and those of
    its mask. A different mark means that the content may have changed: copying a file changes the mark too.
    Only `content_of` is certain. 0 if there is no such file. For images that are in memory anyway, it is a
    hash of the content.
    """
    image = getattr(example, "image", None)
    if not isinstance(image, Path | sources.FileSlice):
        return int.from_bytes(content_of(example)[:8], "little")
    path, place = (image, ()) if isinstance(image, Path) else (image.path, (image.offset, image.size))
    try:
        state = (*_state(path), *place)
        if example.mask is not None:
            state += _state(example.mask)
    except OSError:
        return 0
    return hash_of(repr(state))


def _state(path: Path) -> tuple[int, ...]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def content_of(example: Any) -> bytes:
    """A 128-bit hash of the bytes of an image file and its mask; of the pixels, if a source has no files.

    Raises:
      Refused: a file cannot be read.
    """
    if isinstance(example, sources.Example):
        return _content(example.read(), example.read_mask())
    return _content(np.asarray(example.decode()).tobytes(), None)


def _content(image: bytes, mask: bytes | None) -> bytes:
    digest = hashlib.sha256(image).digest()
    if mask is not None:
        digest = hashlib.sha256(digest + hashlib.sha256(mask).digest()).digest()
    return digest[:16]


class Decoded(NamedTuple):
    """An image, uint8 [H, W, C]; its mask, uint8 [H, W], or None; and its `content_of`."""

    pixels: np.ndarray
    mask: np.ndarray | None
    content: bytes


def decode_with_content(example: Any) -> Decoded:
    """Decodes an image and its mask, and reads the files only once.

    Raises:
      Refused: the image or its mask cannot be used.
    """
    if not isinstance(example, sources.Example):
        return Decoded(example.decode(), None, content_of(example))
    data, mask = example.read(), example.read_mask()
    pixels = decode_image(data)
    decoded = None if mask is None else decode_mask(mask, pixels.shape[:2])
    return Decoded(pixels, decoded, _content(data, mask))


def bucket_table(config: FeaturesConfig) -> tuple[Bucket, ...]:
    """Returns the buckets that images are assigned to."""
    if config.buckets == "official":
        return geometry.bucket_table(config.image_size)
    if config.codec == "pixels":  # `Bucket.of` would require multiples of 16; the digits have 8 x 8 pixels
        return (Bucket(config.image_size, config.image_size, "1.0"),)
    return geometry.square_bucket(config.image_size)


def resampling(config: FeaturesConfig) -> Image.Resampling:
    """Returns the filter with which images are resized, that of the official training code."""
    lanczos = config.buckets == "official" and config.image_size in geometry.LANCZOS_SIZES
    return Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC


def record_bytes(
    config: FeaturesConfig,
    bucket: Bucket,
    captions: int,
    channels: int,
    masked: bool = False,
    image_width: int = 0,
) -> int:
    """Returns an upper bound on the size of a record in bytes. It limits the number of records per shard."""
    if config.codec == "pixels":
        positions = bucket.height * bucket.width
        latent = positions * channels
    else:
        positions = bucket.height * bucket.width // VAE_DOWNSAMPLING**2
        # Mean and standard deviation, 4 channels each.
        latent = positions * 2 * 4 * np.dtype(config.latent_dtype).itemsize
    width = config.text_encoder.d_model
    text = captions * config.text_length * width * np.dtype(config.text_dtype).itemsize if config.text else 0
    tokens = bucket.height * bucket.width // config.token_size**2 if image_width else 0
    return 1024 + latent + text + (positions if masked else 0) + 2 * tokens * image_width


def common_captions(source: Any, shards: Sequence[Shard], source_survey: Survey) -> tuple[str, ...]:
    """Finds the captions that several shards need, for example those of classes.

    Only hashes of captions are kept in memory, so the texts are read again from the source.

    Args:
      source: the source.
      shards: the shards.
      source_survey: what `survey` found in the source.

    Returns:
      the captions, most frequent first, at most `MAX_COMMON`.
    """
    shard_of = np.full(len(source), -1)
    for number, shard in enumerate(shards):
        shard_of[shard.indices] = number
    owners = np.repeat(np.arange(len(source)), source_survey.num_captions)
    digests = source_survey.captions
    digests, owners = digests[shard_of[owners] >= 0], owners[shard_of[owners] >= 0]
    pairs = np.stack([digests, shard_of[owners].astype(np.uint64)], axis=1)
    needed, times = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
    order = np.lexsort((needed, -times))[:MAX_COMMON]
    common = needed[order[times[order] > 1]]
    present, first = np.unique(digests, return_index=True)
    texts = []
    for digest in common:
        owner = owners[first[np.searchsorted(present, digest)]]
        # If the file has changed meanwhile, the caption is encoded again for each shard, which does no harm.
        with contextlib.suppress(Refused):
            texts += [c.text for c in source[int(owner)].captions if hash_of(c.text) == int(digest)][:1]
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
