"""Shards of feature records and their manifest: what `precompute` writes and the loader reads.

A folder of features:

    manifest.json                  counts, buckets, shards with bytes and sha256, and what they were made with
    null_text.npy                  float32 [text_length, width]: the text encoder's output for ""
    512x512-00000.arrayrecord      one bucket each, of bounded size, group_size:1, uncompressed
    refused.jsonl                  what was left out, and why

Work that was split with `--shard=i/n` leaves manifest-i-of-n.json in place of manifest.json; they are joined
when the folder is opened, and the result is the same as that of one run.

Axes: S text_length, D text width.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import io
import itertools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from pixart_jax.data.buckets import Bucket
from pixart_jax.data.records import (
    ArraySpec,
    FeatureBucket,
    Record,
    decode_record,
    encode_record,
)
from pixart_jax.errors import UserError
from pixart_jax.files import replacing, sha256_of_bytes, sha256_of_file, sha256_of_json, write_bytes

FORMAT = "pixart_jax features"
VERSION = 2
MANIFEST = "manifest.json"
NULL_TEXT_FILE = "null_text.npy"
WRITER_OPTIONS = "group_size:1,uncompressed"
# Without this every random read would fetch 16 MB ahead.
READER_OPTIONS = "readahead_buffer_size:0"
# Open files of one dataset; shards beyond are closed, least recently used first.
MAX_OPEN_SHARDS = 512

# ------------------------------------------------------------------------------------------------- writing


def shard_name(bucket: Bucket, index: int) -> str:
    """File name of a shard: 512x512-00000.arrayrecord."""
    return f"{bucket.name}-{index:05d}.arrayrecord"


def manifest_name(part: int, parts: int) -> str:
    """File name of the manifest of one part of the work."""
    return MANIFEST if parts == 1 else f"manifest-{part:05d}-of-{parts:05d}.json"


def write_shard(path: Path, records: Iterator[Record]) -> dict[str, Any]:
    """Writes one shard under a temporary name and renames it when it is whole.

    Args:
      path: its final name.
      records: of one bucket, in order.

    Returns:
      {"records", "bytes", "sha256"} for the manifest. With no records there is no file, and bytes is 0.
    """
    first = next(records, None)
    if first is None:
        path.unlink(missing_ok=True)
        return {"records": 0, "bytes": 0, "sha256": ""}
    with replacing(path, flush=True) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        count = 0
        try:
            for record in itertools.chain([first], records):
                writer.write(encode_record(record))
                count += 1
        finally:
            writer.close()
        return {"records": count, "bytes": temporary.stat().st_size, "sha256": sha256_of_file(temporary)}


def write_null_text(folder: Path, features: np.ndarray) -> dict[str, Any]:
    """Writes the text encoder's output for "".

    Args:
      features: float32 [S, D], all positions, past the end of "" too.

    Returns:
      {"file", "sha256"} for the manifest.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(features, np.float32))
    write_bytes(folder / NULL_TEXT_FILE, buffer.getvalue())
    return {"file": NULL_TEXT_FILE, "sha256": sha256_of_bytes(buffer.getvalue())}


def make_manifest(
    *,
    config: Mapping[str, Any],
    source: Mapping[str, Any],
    buckets: Sequence[FeatureBucket],
    shards: Sequence[Mapping[str, Any]],
    merged: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    text: Mapping[str, Any] | None = None,
    refused: Mapping[str, int] | None = None,
    cut_captions: int = 0,
    part: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Lays out a manifest.

    Args:
      config: the features config, as plain values.
      source: what the records were made from.
      buckets: of all parts of the work; their `count` is not used.
      shards: {"file", "bucket", "records", "bytes", "sha256"} each.
      merged: names of the buckets that images fell into, to the bucket they were written in.
      classes: names of the labels.
      text: {"width", "length" (S), "null_length", "file", "sha256"}; None for features without text.
      refused: reason to count.
      cut_captions: captions that were longer than S tokens.
      part: (i, n) of the work.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": dict(config),
        "source": dict(source),
        "buckets": [_bucket_entry(bucket) for bucket in buckets],
        "merged": dict(merged or {}),
        "classes": list(classes),
        "text": None if text is None else dict(text),
        "shards": sorted((dict(shard) for shard in shards), key=lambda shard: shard["file"]),
        "refused": dict(refused or {}),
        "cut_captions": cut_captions,
        "part": list(part),
    }


def _bucket_entry(entry: FeatureBucket) -> dict[str, Any]:
    return {
        "height": entry.bucket.height,
        "width": entry.bucket.width,
        "ratio_key": entry.bucket.ratio_key,
        "latent_shape": list(entry.latent_shape),
        "extras": {
            name: {"shape": list(spec.shape), "dtype": str(spec.dtype)} for name, spec in entry.extras.items()
        },
    }


# ------------------------------------------------------------------------------------------------- reading


def bucket_of(entry: Mapping[str, Any], count: int = 0) -> FeatureBucket:
    """The bucket of an entry in a manifest."""
    extras = {
        name: ArraySpec(tuple(spec["shape"]), np.dtype(spec["dtype"]))
        for name, spec in entry["extras"].items()
    }
    bucket = Bucket(entry["height"], entry["width"], entry["ratio_key"])
    return FeatureBucket(bucket, tuple(entry["latent_shape"]), count, extras)


def read_manifest(folder: str | os.PathLike, hint: str = "") -> dict[str, Any]:
    """Reads the manifest of a folder of features as one of `VERSION`, joining the parts of a split run.

    Args:
      folder: as given to `precompute --out`.
      hint: the command that makes the features, for the error message.

    Raises:
      UserError: no such folder, no manifest, a part that is missing, or another format.
    """
    folder = Path(folder)
    fix = f"make them with: {hint}" if hint else "make them with: python -m pixart_jax.precompute"
    if not folder.is_dir():
        raise UserError(f"feature folder '{folder}' does not exist; {fix}")
    paths = (
        [folder / MANIFEST] if (folder / MANIFEST).is_file() else sorted(folder.glob("manifest-*-of-*.json"))
    )
    if not paths:
        raise UserError(f"feature folder '{folder}' has no {MANIFEST} (absent or unfinished features); {fix}")
    parts = []
    for path in paths:
        try:
            manifest = json.loads(path.read_text())
            if manifest["format"] != FORMAT or manifest["version"] not in (1, VERSION):
                raise KeyError("format")
            for entry in manifest["buckets"]:
                entry.setdefault("extras", {})  # version 1 knows no extra arrays
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"'{path}' is not a manifest of '{FORMAT}', version 1 to {VERSION}; delete the folder and "
                f"{fix}"
            ) from None
        parts.append(manifest)
    return join_manifests(parts, str(folder))


def join_manifests(parts: Sequence[dict[str, Any]], folder: str = "") -> dict[str, Any]:
    """Joins the manifests of all parts into the one of an unsplit run.

    Raises:
      UserError: a part is missing, or two were made from different sources or with different configs.
    """
    total = parts[0]["part"][1]
    by_part = {manifest["part"][0]: manifest for manifest in parts}
    for manifest in parts:
        if manifest["part"][1] != total:
            raise UserError(
                f"feature folder '{folder}' holds parts of {total} and of {manifest['part'][1]}: delete the "
                "manifests of one splitting"
            )
    missing = [i for i in range(total) if i not in by_part]
    if missing:
        raise UserError(
            f"feature folder '{folder}' lacks part {missing[0]} of {total}; run precompute with "
            f"--shard={missing[0]}/{total}"
        )
    joined = dict(by_part[0])
    for manifest in parts:
        for field in ("config", "source", "buckets", "merged", "classes", "text"):
            if manifest[field] != joined[field]:
                raise UserError(
                    f"feature folder '{folder}': part {manifest['part'][0]} of {total} differs from part "
                    f"{parts[0]['part'][0]} in its {field}; make both from one source with one config."
                )
    joined["shards"] = sorted(
        itertools.chain.from_iterable(manifest["shards"] for manifest in parts),
        key=lambda shard: shard["file"],
    )
    joined["refused"] = dict(
        sum((collections.Counter(manifest["refused"]) for manifest in parts), collections.Counter())
    )
    joined["cut_captions"] = sum(manifest["cut_captions"] for manifest in parts)
    joined["part"] = [0, 1]
    return joined


class FeatureDataset:
    """Random access to a folder of features. Nothing is loaded but the manifest.

    Attributes:
      path: the folder.
      manifest: joined.
      config: the features config it was made with, as plain values.
      buckets: `FeatureBucket`s that hold records, in the order of the manifest.
      text_length, text_width: S and D; 0 and 0 without text.
      null_length: valid tokens of the null caption "" (its last ones are padding, as in diffusers).
      extras: names of the extra arrays that the records have, in all buckets.
      classes: names of the labels.
      fingerprint: hash of everything that decides what a position holds.
    """

    def __init__(self, path: str | os.PathLike, hint: str = ""):
        """Opens a folder and checks that its shards are there and have their size.

        Args:
          path: as given to `precompute --out`.
          hint: the command that makes the features, for the error message.

        Raises:
          UserError: as `read_manifest`; or a shard that is missing, truncated or grown.
        """
        self.path = Path(path)
        self.manifest = read_manifest(path, hint)
        self.config = self.manifest["config"]
        self.classes = tuple(self.manifest["classes"])
        text = self.manifest["text"] or {}
        self.text_length, self.text_width = text.get("length", 0), text.get("width", 0)
        self.null_length = text.get("null_length", 0)
        self.fingerprint = fingerprint_of(self.manifest)

        shards = collections.defaultdict(list)
        for shard in self.manifest["shards"]:
            if shard["records"]:
                shards[shard["bucket"]].append(shard)
        self.buckets: list[FeatureBucket] = []
        self._files: list[list[str]] = []
        self._ends: list[list[int]] = []
        for entry in self.manifest["buckets"]:
            found = shards[bucket_of(entry).bucket.name]
            if not found:
                continue
            ends = list(itertools.accumulate(shard["records"] for shard in found))
            self.buckets.append(bucket_of(entry, ends[-1]))
            self._files.append([shard["file"] for shard in found])
            self._ends.append(ends)
        named = [entry.extras.keys() for entry in self.buckets]
        self.extras = tuple(name for name in (named[0] if named else ()) if all(name in own for own in named))
        self._starts = [0, *itertools.accumulate(bucket.count for bucket in self.buckets)]
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._keys = _Keys(len(self))
        for fault in size_faults(self.path, self.manifest):
            raise UserError(f"{fault}; restore the file, or delete it and run precompute again")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        """Reads the record at a position of the whole dataset, all arrays included."""
        bucket, position = self.locate(index)
        return self.read(bucket, [position])[0]

    def locate(self, index: int) -> tuple[int, int]:
        """Turns a position in the dataset into (bucket index, position in the bucket)."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        bucket = bisect.bisect_right(self._starts, index) - 1
        return bucket, index - self._starts[bucket]

    def where(self, bucket: int, position: int) -> tuple[str, int]:
        """File name of the shard, and row in it, of a record."""
        shard = bisect.bisect_right(self._ends[bucket], position)
        return self._files[bucket][shard], position - (self._ends[bucket][shard - 1] if shard else 0)

    def read(self, bucket: int, positions: Sequence[int]) -> list[Record]:
        """Reads records of one bucket, in the order asked.

        Args:
          bucket: index into `buckets`.
          positions: in the bucket.

        Raises:
          UserError: damaged bytes, or the key of another record read before; names file and record.
        """
        return [self._read_unique(bucket, position) for position in positions]

    def null_text(self) -> np.ndarray:
        """The text encoder's output for "", float32 [S, D] over all positions; `null_length` are its tokens.

        Raises:
          UserError: features without text, or the file is missing or damaged.
        """
        text = self.manifest["text"]
        if text is None:
            raise UserError(f"feature folder '{self.path}' was made without text (features.text is False)")
        path = self.path / text["file"]
        try:
            features = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"'{path}' cannot be read ({error}); run precompute again") from None
        if features.shape != (text["length"], text["width"]):
            raise UserError(
                f"'{path}' has shape {list(features.shape)}, the manifest says "
                f"{[text['length'], text['width']]}; run precompute again"
            )
        return features

    def refusal(self, file: str, row: int, fault: str, key: str | None = None) -> UserError:
        """The error for a record that cannot be used."""
        return UserError(
            f"{fault_words(self.path / file, row, fault, key)}; delete the shard and run precompute"
        )

    def _read_unique(self, bucket: int, position: int) -> Record:
        record = self._read_row(*self.where(bucket, position))
        here = self._starts[bucket] + position
        with self._lock:
            owner = self._keys.owner(record.key, here)
        if owner != here:
            # As `verify` says it: the later one, in the order of the files, is the duplicate.
            places = (self.where(*self.locate(index)) for index in (owner, here))
            (file, row), later = sorted(places)
            raise self.refusal(*later, duplicate_words(self.path / file, row), record.key)
        return record

    def _read_row(self, file: str, row: int) -> Record:
        # One by one: asked for many records, ArrayRecord starts threads of its own, at three times the cost.
        try:
            return decode_record(self._reader(file).read([row])[0])
        except (RuntimeError, IndexError, ValueError):
            pass
        # Once more with a reader of its own: one in which another thread meets an error at the same time
        # gives this thread anything.
        with self._lock:
            self._readers.pop(file, None)
        return self._read_alone(file, row)

    def _read_alone(self, file: str, row: int) -> Record:
        try:
            return decode_record(open_reader(self.path / file).read([row])[0])
        except (RuntimeError, IndexError) as error:
            raise self.refusal(file, row, damage(error)) from None
        except ValueError as error:
            raise self.refusal(file, row, str(error)) from None

    def _reader(self, file: str) -> Any:
        with self._lock:
            reader = self._readers.pop(file, None)
            if reader is None:
                reader = open_reader(self.path / file)
                while len(self._readers) >= MAX_OPEN_SHARDS:
                    self._readers.popitem(last=False)
            self._readers[file] = reader
            return reader


class _Keys:
    """Which record read so far has a key: a table of 64-bit hashes, 18 bytes a record of the dataset.

    A `dict` of 10 million keys would take more than 1 GB.
    """

    def __init__(self, count: int):
        self._slots = count + count // 2 + 1
        # The kernel gives a page when it is first written: what is never read costs nothing.
        self._hashes = np.zeros(self._slots, np.uint64)
        self._owners = np.zeros(self._slots, np.uint32)

    def owner(self, key: str, position: int) -> int:
        """The position that came first with this key: the given one, if none did."""
        # 0 marks a free slot.
        digest = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") or 1
        slot = digest % self._slots
        while self._hashes[slot] != digest:
            if not self._hashes[slot]:
                self._hashes[slot], self._owners[slot] = digest, position
            else:
                slot = (slot + 1) % self._slots
        return int(self._owners[slot])


def open_reader(path: Path) -> Any:
    """Opens a shard for random access."""
    return array_record_module.ArrayRecordReader(str(path), READER_OPTIONS)


def damage(error: Exception) -> str:
    """The words for bytes that ArrayRecord does not take."""
    clause = str(error).split(";")[0].split(", chunk at")[0]
    return f"damaged bytes ({clause or type(error).__name__})"


def fault_words(path: Path, row: int, fault: str, key: str | None = None) -> str:
    """How a bad record is named everywhere."""
    return f"shard '{path}' record {row}{f' ({key!r})' if key is not None else ''}: {fault}"


def duplicate_words(path: Path, row: int) -> str:
    """The fault of a record whose key an earlier one has."""
    return f"duplicate key, also in shard '{path}' record {row}"


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """Hash of what decides which record a position holds, and what is in it."""
    fields = {name: manifest[name] for name in ("config", "buckets", "classes", "text", "shards")}
    # Without extra arrays it is the hash that 0.1 computed, which its checkpoints hold.
    fields["buckets"] = [
        {name: value for name, value in entry.items() if name != "extras" or value}
        for entry in manifest["buckets"]
    ]
    return sha256_of_json(fields)


def size_faults(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Says which shards are missing or have another size than the manifest's; reads no shard."""
    for shard in manifest["shards"]:
        if not shard["records"]:
            continue
        path = folder / shard["file"]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            yield f"shard '{path}': missing"
            continue
        if size != shard["bytes"]:
            state = "truncated" if size < shard["bytes"] else "grown"
            yield f"shard '{path}': {state}, {size} bytes, the manifest says {shard['bytes']}"
