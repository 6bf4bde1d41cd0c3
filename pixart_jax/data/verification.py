"""Checks that the features in a folder are complete and undamaged, and that they belong to given images."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pixart_jax.data.features import (
    bucket_of,
    damage,
    duplicate_words,
    fault_words,
    open_reader,
    read_manifest,
    size_faults,
)
from pixart_jax.data.images import CENTRE, Refused, resize_and_crop
from pixart_jax.data.job import VALIDATION, WORK, read_rows
from pixart_jax.data.planning import ahead, content_of, hash_of, resampling, survey
from pixart_jax.data.records import FeatureBucket, Record, all_finite, decode_record, record_fault
from pixart_jax.errors import UserError
from pixart_jax.files import sha256_of_file
from pixart_jax.readers import read_array, read_json_lines

if TYPE_CHECKING:  # the config imports the models; `data` must not
    from pixart_jax.config import FeaturesConfig


def verify(path: str | os.PathLike) -> list[str]:
    """Reads all bytes of a feature folder and checks them.

    Shards must exist and match the manifest in size, sha256 and number of records. Records must be readable,
    with unique keys, the right shapes and lengths, and no NaN or infinity.

    Args:
      path: the feature folder.

    Returns:
      one line per error, which names the file and the record; an empty list if there are none.

    Raises:
      UserError: the folder has no valid manifest.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    text = manifest["text"] or {"length": 0, "width": 0}
    buckets = {entry.bucket.name: entry for entry in map(bucket_of, manifest["buckets"])}
    faults = list(size_faults(folder, manifest))
    if manifest["text"] is not None:
        null = folder / text["file"]
        if not null.is_file():
            faults.append(f"'{null}': missing")
        elif sha256_of_file(null) != text["sha256"]:
            faults.append(f"'{null}': sha256 differs from the manifest's")
        elif not all_finite(read_array(null, "run precompute again")):
            faults.append(f"'{null}': NaN or infinity")
    # Hashes of 16 bytes instead of the keys, so that 10 million of them fit in 2 GB.
    seen: dict[bytes, tuple[str, int]] = {}
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not shard["records"] or not file.is_file():
            continue
        if sha256_of_file(file) != shard["sha256"]:
            faults.append(f"shard '{file}': sha256 differs from the manifest's")
        faults += _shard_faults(file, shard, buckets[shard["bucket"]], text["length"], text["width"], seen)
    return faults


def _shard_faults(
    file: Path,
    shard: Mapping[str, Any],
    bucket: FeatureBucket,
    text_length: int,
    text_width: int,
    seen: dict[bytes, tuple[str, int]],
) -> Iterator[str]:
    try:
        reader = open_reader(file)
        count = reader.num_records()
    except RuntimeError as error:
        yield f"shard '{file}': {damage(error)}"
        return
    if count != shard["records"]:
        yield f"shard '{file}': {count} records, but {shard['records']} in the manifest"
    for row in range(count):
        try:
            record = decode_record(reader.read([row])[0])
        except (RuntimeError, IndexError) as error:
            yield fault_words(file, row, damage(error))
            reader = open_reader(file)  # the state of a reader after an error is unknown
            continue
        except ValueError as error:
            yield fault_words(file, row, str(error))
            continue
        fault = record_fault(record, bucket, text_length, text_width)
        if fault:
            yield fault_words(file, row, fault, record.key)
        digest = hashlib.sha256(record.key.encode()).digest()[:16]
        if digest in seen:
            other, other_row = seen[digest]
            yield fault_words(file, row, duplicate_words(file.with_name(other), other_row), record.key)
        else:
            seen[digest] = (file.name, row)


class Compared(NamedTuple):
    """The result of `verify_images`: one line per difference, and a line that says what was compared."""

    faults: list[str]
    summary: str


def verify_images(path: str | os.PathLike, source: Any, config: FeaturesConfig, workers: int = 8) -> Compared:
    """Compares every record of a feature folder with the image and the captions that it was made from.

    The bytes of every image are compared with the hash that `precompute` stored in the folder "work". If that
    is missing (version 0.1 did not store it), the size of the decoded image is compared instead, and with
    `features.codec` "pixels" the pixels.

    Args:
      path: the feature folder.
      source: the images, from `planning.open_images`.
      config: the config that the features were made with.
      workers: number of threads that read images.

    Raises:
      UserError: the folder has no valid manifest, or a shard is damaged.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    found = survey(source, config, workers)
    faults, counts = [], {True: 0, False: 0}
    seen = np.zeros(len(source), bool)

    def compare(item: tuple[int, Record, bytes | None]) -> tuple[int, str, bool, str | None]:
        index, record, content = item
        fault = _difference(source, index, record, content, config)
        return index, record.key, content is not None, fault

    def items(shard: Mapping[str, Any]) -> Iterator[tuple[int, Record, bytes | None]]:
        contents = _contents(folder / WORK / f"{shard['file']}.npy")
        file = folder / shard["file"]
        try:
            reader = open_reader(file)
            records = (decode_record(reader.read([row])[0]) for row in range(shard["records"]))
            for record in records:
                key = hash_of(record.key)
                (index,) = found.find(np.array([key], np.uint64)).tolist()
                yield index, record, contents.get(key)
        except (RuntimeError, IndexError, ValueError) as error:
            raise UserError(f"shard '{file}': {damage(error)}; delete the shard and run precompute") from None

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for shard in manifest["shards"]:
            if not shard["records"]:
                continue
            for row, (index, key, known, fault) in enumerate(ahead(pool, compare, items(shard), 4 * workers)):
                counts[known] += 1
                seen[index] |= index >= 0
                if fault:
                    faults.append(fault_words(folder / shard["file"], row, fault, key))
    elsewhere = np.array(sorted(_other_keys(folder)), np.uint64)
    for index in found.usable[~seen[found.usable] & ~np.isin(found.keys[found.usable], elsewhere)]:
        faults.append(f"'{source.key(int(index))}': has no features; run precompute again")
    unknown = (
        f", {counts[False]:,} without the bytes of the image, which version 0.1 did not record"
        if counts[False]
        else ""
    )
    summary = f"{counts[True] + counts[False]:,} records compared with {len(source):,} samples{unknown}"
    return Compared(faults, summary)


def _difference(
    source: Any, index: int, record: Record, content: bytes | None, config: FeaturesConfig
) -> str | None:
    """Describes how a record differs from its sample, or returns None."""
    if index < 0:
        return "is not among the images, or cannot be used"
    try:
        example = source[index]
        if config.text:
            now = [(caption.text, caption.weight, caption.name) for caption in example.captions]
            if now != [(caption.text, caption.weight, caption.name) for caption in record.captions]:
                return "made from other captions"
        if record.label != (-1 if example.label is None else example.label):
            return f"label {record.label}, but the image has {example.label}"
        if content is not None:
            what = "made from another image" + (" or mask" if getattr(source, "masked", False) else "")
            return None if content_of(example) == content else what
        pixels = example.decode()
    except Refused as error:
        return f"the image cannot be used: {error.reason}: {error.text}"
    if pixels.shape[:2] != record.image_size:
        return f"made from an image of {record.image_size}, but the image has {pixels.shape[:2]} (h, w)"
    if record.std is not None:
        return None
    if pixels.shape[-1] == 3:
        view = getattr(example, "view", CENTRE)
        height, width = record.bucket.height, record.bucket.width
        pixels = resize_and_crop(pixels, height, width, view=view, resampling=resampling(config)).pixels
    return None if np.array_equal(pixels, record.mean) else "made from another image"


def _contents(path: Path) -> dict[int, bytes]:
    """`planning.content_of` the images of a shard, by the hash of the key; empty if it is not known."""
    if not path.exists():
        return {}
    read = read_rows(path)
    known = read[read["content"].any(axis=1)]
    return {key: content.tobytes() for key, content in zip(known["key"].tolist(), known["content"])}


def _other_keys(folder: Path) -> Iterator[int]:
    """Hashes of the keys of samples that are skipped, or that are in the other part of a held-out split."""
    for path in folder.glob("refused*.jsonl"):
        lines = read_json_lines(path, "run precompute again", {"key": str}, lenient=True)
        yield from (hash_of(line["key"]) for _, line in lines)
    other = folder.parent if folder.name == VALIDATION else folder / VALIDATION
    for path in (other / WORK).glob("*.arrayrecord.npy"):
        yield from read_rows(path)["key"].tolist()
