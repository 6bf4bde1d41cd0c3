"""Checks that the features in a folder are complete and undamaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
from pixart_jax.data.records import FeatureBucket, all_finite, decode_record, record_fault
from pixart_jax.files import sha256_of_file


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
        elif not all_finite(np.load(null, allow_pickle=False)):
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
