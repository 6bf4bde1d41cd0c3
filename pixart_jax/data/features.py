"""Shards of feature records and their manifest: what `precompute` writes and the loader reads.

A folder of features:

    manifest.json                  counts, buckets, shards with size and sha256; the config and the source
    null_text.npy                  float32 [text_length, width]: the text encoder's output for ""
    512x512-00000.arrayrecord      records of one bucket; limited in size, group_size:1, uncompressed
    refused.jsonl                  the samples that were skipped, and why
    cut.jsonl                      the captions that were truncated to S tokens
    cleaned.jsonl                  the captions from which cleaning removed words
    unknown.jsonl                  the captions with characters that the tokenizer does not know

If the work is split with `--shard=i/n`, each part writes manifest-i-of-n.json instead of manifest.json. They
are joined when the folder is opened; the result is the same as that of a single run.

Axes: S text_length, D text width.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import io
import itertools
import os
import re
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
from pixart_jax.errors import UserError, in_utf8, short, writing
from pixart_jax.files import replacing, sha256_of_bytes, sha256_of_file, sha256_of_json, write_bytes
from pixart_jax.readers import COUNT, OrNull, check_shape, read_array, read_json

FORMAT = "pixart_jax features"
VERSION = 2
MANIFEST = "manifest.json"
NULL_TEXT_FILE = "null_text.npy"
WRITER_OPTIONS = "group_size:1,uncompressed"
# Reads are random; by default ArrayRecord would read 16 MB ahead for each of them.
READER_OPTIONS = "readahead_buffer_size:0"
# Maximum number of open files per dataset. Beyond it, the least recently used shard is closed.
MAX_OPEN_SHARDS = 512
# Fields of the features config that version 0.1 did not have, with the values that correspond to what it did.
NEW_FIELDS = {"image_encoder": "", "token_size": 0}
# Fields of the config of the text encoder that version 0.1 did not have, with the values that correspond to
# what it did.
NEW_TEXT_ENCODER_FIELDS = {"weights_dtype": "auto", "scale": 1.0, "lower_case": True}

# ------------------------------------------------------------------------------------------------- writing


def shard_name(bucket: Bucket, index: int) -> str:
    """File name of a shard: 512x512-00000.arrayrecord."""
    return f"{bucket.name}-{index:05d}.arrayrecord"


def manifest_name(part: int, parts: int) -> str:
    """File name of the manifest of part `part` of `parts` (`--shard=part/parts`)."""
    return MANIFEST if parts == 1 else f"manifest-{part:05d}-of-{parts:05d}.json"


def write_shard(path: Path, records: Iterator[Record]) -> dict[str, Any]:
    """Writes one shard to a temporary file and renames it when it is complete.

    Args:
      path: the shard.
      records: its records in order, all of one bucket.

    Returns:
      {"records", "bytes", "sha256"} for the manifest. If there are no records, no file is written and all
      values are 0 or empty.

    Raises:
      OutputError: the shard cannot be written.
    """
    first = next(records, None)
    if first is None:
        path.unlink(missing_ok=True)
        return {"records": 0, "bytes": 0, "sha256": ""}
    with replacing(path, flush=True) as temporary:
        count = 0
        with writing(path, RuntimeError):
            writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        try:
            for record in itertools.chain([first], records):
                with writing(path, RuntimeError):
                    writer.write(encode_record(record))
                count += 1
        finally:
            with writing(path, RuntimeError):
                writer.close()
        return {"records": count, "bytes": temporary.stat().st_size, "sha256": sha256_of_file(temporary)}


def write_null_text(folder: Path, features: np.ndarray) -> dict[str, Any]:
    """Writes the text encoder's output for the null caption "".

    Args:
      folder: the feature folder.
      features: float32 [S, D], for all positions including padding.

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
    cleaned_captions: int = 0,
    unknown_captions: int = 0,
    part: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Returns a manifest, ready to be written as JSON.

    Args:
      config: the features config, as plain values.
      source: describes the images and captions that the records were made from.
      buckets: the buckets of all parts of the work; their `count` is ignored.
      shards: for each shard {"file", "bucket", "records", "bytes", "sha256"}.
      merged: maps the name of each image's nearest bucket to that of the bucket it was written in.
      classes: names of the labels.
      text: {"width", "length" (S), "null_length", "file", "sha256"}; None for features without text.
      refused: number of skipped samples by reason.
      cut_captions: number of captions that were truncated to S tokens.
      cleaned_captions: number of captions from which cleaning removed words.
      unknown_captions: number of captions with characters that the tokenizer does not know.
      part: (i, n) for part i of n.
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
        "cleaned_captions": cleaned_captions,
        "unknown_captions": unknown_captions,
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

# What `read_manifest` accepts. The name of a file has no path, so that it stays in the folder.
SIDE = range(1, 2**20)
RATIO = re.compile(r"\d{1,4}(\.\d{1,4})?")
SHARD_FILE = re.compile(r"[^/\\\0]+\.arrayrecord")
TEXT_SHAPE = {
    "file": re.compile(r"[^/\\\0]+\.npy"),
    **{"sha256": str, "length": SIDE, "width": SIDE, "null_length": range(2**20)},
}
_MANIFEST_SHAPE = {
    "config": {"text_encoder?": OrNull({})},
    "source": {
        "masks?": bool,
        "flip?": bool,
        "crops?": range(1, 2**31),
        "crop_seed?": COUNT,
        "caption?": str,
    },
    "buckets": [
        {
            **{"height": SIDE, "width": SIDE, "ratio_key": RATIO, "latent_shape": (SIDE, SIDE, SIDE)},
            "extras?": {str: {"shape": [range(2**31)], "dtype": str}},
        }
    ],
    "merged": {str: str},
    "classes": [str],
    "text": OrNull(TEXT_SHAPE),
    "shards": [{"file": SHARD_FILE, "bucket": str, "records": COUNT, "bytes": COUNT, "sha256": str}],
    "refused": {str: COUNT},
    **{"cut_captions?": COUNT, "cleaned_captions?": COUNT, "unknown_captions?": COUNT},
    "part": (COUNT, range(1, 2**31)),
}


def bucket_of(entry: Mapping[str, Any], count: int = 0) -> FeatureBucket:
    """Returns the bucket that an entry of `manifest["buckets"]` describes."""
    extras = {
        name: ArraySpec(tuple(spec["shape"]), np.dtype(spec["dtype"]))
        for name, spec in entry["extras"].items()
    }
    bucket = Bucket(entry["height"], entry["width"], entry["ratio_key"])
    return FeatureBucket(bucket, tuple(entry["latent_shape"]), count, extras)


def read_manifest(folder: str | os.PathLike, hint: str = "") -> dict[str, Any]:
    """Reads the manifest of a feature folder, joins the parts of a split run, and converts it to `VERSION`.

    Args:
      folder: the folder that was given as `precompute --out`.
      hint: the command that makes the features, for the error message.

    Raises:
      UserError: the folder or its manifest does not exist, a part is missing, the format is unknown, or the
        name of the folder is not UTF-8.
    """
    folder = Path(folder)
    fix = f"make them with: {hint}" if hint else "make them with: python -m pixart_jax.precompute"
    if not folder.is_dir():
        raise UserError(f"feature folder '{folder}' does not exist; {fix}")
    in_utf8("the feature folder", folder, "rename it")  # ArrayRecord opens no other
    paths = (
        [folder / MANIFEST] if (folder / MANIFEST).is_file() else sorted(folder.glob("manifest-*-of-*.json"))
    )
    if not paths:
        raise UserError(f"feature folder '{folder}' has no {MANIFEST} (empty or unfinished); {fix}")
    parts = []
    for path in paths:
        manifest = read_json(path, f"give a folder that precompute has written, or {fix}")
        if manifest.get("format") != FORMAT or manifest.get("version") not in (1, VERSION):
            raise UserError(
                f"'{path}' is not a manifest of '{FORMAT}', version 1 to {VERSION}; give a folder that "
                f"precompute has written, or {fix}"
            )
        try:
            check_shape(manifest, _MANIFEST_SHAPE)
            for entry in manifest["buckets"]:
                entry.setdefault("extras", {})  # version 1 had no extra arrays
                bucket_of(entry)
            _check_names(manifest)
        except (ValueError, TypeError) as error:  # NumPy raises a TypeError for a dtype that it does not know
            raise UserError(f"'{path}' is a damaged manifest ({error}); restore it, or {fix}") from None
        parts.append(manifest)
    return join_manifests(parts, str(folder))


def _check_names(manifest: Mapping[str, Any]) -> None:
    """Raises a ValueError if shards and buckets of a manifest do not belong together."""
    names = {bucket_of(entry).bucket.name for entry in manifest["buckets"]}
    for shard in manifest["shards"]:
        if shard["bucket"] not in names:
            raise ValueError(f"shard {shard['file']} has the unknown bucket {short(shard['bucket'])}")
    files = {shard["file"] for shard in manifest["shards"]}
    if len(files) != len(manifest["shards"]):
        raise ValueError("it names a shard twice")
    part, parts = manifest["part"]
    if not part < parts:
        raise ValueError(f"part is {part} of {parts}")


def join_manifests(parts: Sequence[dict[str, Any]], folder: str = "") -> dict[str, Any]:
    """Joins the manifests of all parts into the manifest that a single run would have written.

    Args:
      parts: the manifests, in any order.
      folder: the feature folder, for messages.

    Raises:
      UserError: a part is missing, or two parts were made from different sources or with different configs.
    """
    total = parts[0]["part"][1]
    by_part = {manifest["part"][0]: manifest for manifest in parts}
    for manifest in parts:
        if manifest["part"][1] != total:
            raise UserError(
                f"feature folder '{folder}' holds parts of a split into {total} and of another split into "
                f"{manifest['part'][1]}: delete the manifests of one split"
            )
    missing = [i for i in range(total) if i not in by_part]
    if missing:
        raise UserError(
            f"feature folder '{folder}' has no part {missing[0]} of {total}; run precompute with "
            f"--shard={missing[0]}/{total}"
        )
    joined = dict(by_part[0])
    for manifest in parts:
        for field in ("config", "source", "buckets", "merged", "classes", "text"):
            if manifest[field] != joined[field]:
                raise UserError(
                    f"feature folder '{folder}': part {manifest['part'][0]} of {total} differs from part "
                    f"{parts[0]['part'][0]} in '{field}'; make both from the same source and config."
                )
    joined["shards"] = sorted(
        itertools.chain.from_iterable(manifest["shards"] for manifest in parts),
        key=lambda shard: shard["file"],
    )
    joined["refused"] = dict(
        sum((collections.Counter(manifest["refused"]) for manifest in parts), collections.Counter())
    )
    for count in ("cut_captions", "cleaned_captions", "unknown_captions"):
        joined[count] = sum(manifest.get(count, 0) for manifest in parts)
    joined["part"] = [0, 1]
    return joined


class FeatureDataset:
    """Random access to the records of a feature folder. Only the manifest is kept in memory.

    Attributes:
      path: the folder.
      manifest: the manifest; that of a split run is joined.
      config: the features config that the features were made with, as plain values.
      buckets: the buckets that have records, in the order of the manifest.
      text_length, text_width: S and D; both are 0 for features without text.
      null_length: number of valid tokens of the null caption "" (the rest is padding, as in diffusers).
      extras: names of the extra arrays that the records of all buckets have.
      classes: names of the labels.
      fingerprint: hash of everything that determines the records and their positions.
    """

    def __init__(self, path: str | os.PathLike, hint: str = ""):
        """Reads the manifest, and checks that all shards exist and have the size given there.

        Args:
          path: the folder that was given as `precompute --out`.
          hint: the command that makes the features, for the error message.

        Raises:
          UserError: as in `read_manifest`, or a shard is missing or has another size.
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
        """Reads the record at a position in the dataset, with all its arrays."""
        bucket, position = self.locate(index)
        return self.read(bucket, [position])[0]

    def locate(self, index: int) -> tuple[int, int]:
        """Converts a position in the dataset to (index of the bucket, position in the bucket)."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        bucket = bisect.bisect_right(self._starts, index) - 1
        return bucket, index - self._starts[bucket]

    def where(self, bucket: int, position: int) -> tuple[str, int]:
        """Returns the file name of the shard that holds a record, and the record's row in it."""
        shard = bisect.bisect_right(self._ends[bucket], position)
        return self._files[bucket][shard], position - (self._ends[bucket][shard - 1] if shard else 0)

    def read(self, bucket: int, positions: Sequence[int]) -> list[Record]:
        """Reads records of one bucket, in the given order.

        Args:
          bucket: index into `buckets`.
          positions: positions in the bucket.

        Raises:
          UserError: a record is damaged, or has the same key as a record read earlier. The message names the
            file and the record.
        """
        return [self._read_unique(bucket, position) for position in positions]

    def null_text(self) -> np.ndarray:
        """Returns the text encoder's output for the null caption "", float32 [S, D], including padding.

        Its first `null_length` positions are valid tokens.

        Raises:
          UserError: the features have no text, or the file is missing or damaged.
        """
        text = self.manifest["text"]
        if text is None:
            raise UserError(f"feature folder '{self.path}' was made without text (features.text is False)")
        path = self.path / text["file"]
        fix = "run the same precompute command again, which writes the file again"
        features = np.array(read_array(path, fix))
        if features.shape != (text["length"], text["width"]):
            raise UserError(
                f"'{path}' has shape {list(features.shape)}, but {[text['length'], text['width']]} in the "
                f"manifest: {fix}."
            )
        if sha256_of_file(path) != text["sha256"]:
            raise UserError(f"'{path}' is damaged: its sha256 differs from the manifest's; {fix}.")
        return features

    def refusal(self, file: str, row: int, fault: str, key: str | None = None) -> UserError:
        """Returns the error to raise for a record that cannot be used.

        Args:
          file: name of the shard.
          row: row of the record in the shard.
          fault: what is wrong with it.
          key: key of the record, if it could be read.
        """
        return UserError(
            f"{fault_words(self.path / file, row, fault, key)}; delete the shard and run precompute"
        )

    def _read_unique(self, bucket: int, position: int) -> Record:
        record = self._read_row(*self.where(bucket, position))
        here = self._starts[bucket] + position
        with self._lock:
            owner = self._keys.owner(record.key, here)
        if owner != here:
            # As in `verify`, the duplicate is the record that is later in the order of the files, whichever
            # of the two was read first.
            places = (self.where(*self.locate(index)) for index in (owner, here))
            (file, row), later = sorted(places)
            raise self.refusal(*later, duplicate_words(self.path / file, row), record.key)
        return record

    def _read_row(self, file: str, row: int) -> Record:
        # Records are read one at a time. For a list, ArrayRecord starts its own threads, which takes three
        # times as long.
        try:
            return decode_record(self._reader(file).read([row])[0])
        except (RuntimeError, IndexError, ValueError):
            pass
        # Try again with a new reader. If another thread gets an error from a shared reader at the same time,
        # the reader can return garbage to this thread, although the record is not damaged.
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
    """The keys of the records read so far, to find duplicates.

    A hash table with open addressing that stores 64-bit hashes of the keys, in 18 bytes per record of the
    dataset. A `dict` of 10 million keys would take more than 1 GB.
    """

    def __init__(self, count: int):
        self._slots = count + count // 2 + 1
        # Memory from `np.zeros` is allocated by the kernel page by page, when it is first written.
        self._hashes = np.zeros(self._slots, np.uint64)
        self._owners = np.zeros(self._slots, np.uint32)

    def owner(self, key: str, position: int) -> int:
        """Returns the first position that was given for this key: `position` itself if the key is new."""
        # A hash of 0 marks a free slot.
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
    """Describes an error that ArrayRecord raised, without details of its implementation."""
    clause = str(error).split(";")[0].split(", chunk at")[0]
    return f"damaged bytes ({clause or type(error).__name__})"


def fault_words(path: Path, row: int, fault: str, key: str | None = None) -> str:
    """The message about a bad record, the same in `verify` and the loader."""
    return f"shard '{path}' record {row}{f' ({key!r})' if key is not None else ''}: {fault}"


def duplicate_words(path: Path, row: int) -> str:
    """Describes a record that has the same key as the earlier record `row` of the shard `path`."""
    return f"duplicate key, also in shard '{path}' record {row}"


def without_new_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of features as version 0.1 would have written it, for hashes that it stored.

    Fields that it did not have are left out if they have the values that correspond to what it did.
    """

    def without(values: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in new or value != new[name]}

    config, encoder = without(config, NEW_FIELDS), config.get("text_encoder")
    return {**config, "text_encoder": without(encoder, NEW_TEXT_ENCODER_FIELDS)} if encoder else config


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """Hash of everything that determines the records and their positions."""
    fields = {name: manifest[name] for name in ("config", "buckets", "classes", "text", "shards")}
    fields["config"] = without_new_fields(manifest["config"])
    # Version 0.1, which had no extra arrays, stored this hash in its checkpoints. Features without extra
    # arrays must keep the same hash, so an empty entry is left out.
    fields["buckets"] = [
        {name: value for name, value in entry.items() if name != "extras" or value}
        for entry in manifest["buckets"]
    ]
    return sha256_of_json(fields)


def size_faults(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yields a message for each shard that is missing or has another size than in the manifest."""
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
            yield f"shard '{path}': {state}, {size} bytes, but {shard['bytes']} in the manifest"
