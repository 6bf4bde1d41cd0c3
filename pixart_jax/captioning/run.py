"""Writes dense captions for the images of a source with an image-to-text model.

Much of PixArt's prompt following comes from training on captions that LLaVA wrote (paper, section 2.4). The
output has one line of JSON per image, in the order of the source:

    {"path": "a/b.jpg", "height": 480, "width": 640, "ratio": 0.75,
     "captions": [{"text": ..., "weight": 1.0, "name": "caption"}, {..., "name": "llava-hf/..."}],
     "sha256": ...}

with the original captions of the image first and the new one last. The run can be killed at any time. When it
is started again, it continues where it stopped. With the same batch size, the file is then byte for byte that
of an uninterrupted run, because images are always grouped into the same batches. Identical images are
captioned only once.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.captioning.model import Describe
from pixart_jax.data.captions import Caption
from pixart_jax.data.images import RefusalReport, Refused, decode_image
from pixart_jax.data.sources import Source
from pixart_jax.errors import OutputError, UserError, at_least, writing
from pixart_jax.files import LineFile, locked, sha256_of_bytes, write_json
from pixart_jax.readers import parse_json, read_json

# The prompt of the paper, and that of the official script for images that have a caption.
INSTRUCTION = "Describe this image and its style in a very detailed manner"
INSTRUCTION_WITH_ORIGINAL = (
    'Given the caption of this image "{caption}", describe this image and its style in a very detailed manner'
)


class _CaptionFile:
    """The output: one line per image, appended in order. Opening it removes an incomplete last line.

    The file and OUT.settings.json appear with the first lines, so that nothing is left if the model cannot be
    loaded.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.offsets: dict[str, int] = {}  # from the key of each line to the byte where the line begins
        self._settings, self._end = settings, 0
        self._settings_file = path.with_name(path.name + ".settings.json")
        self._file = LineFile(path) if path.exists() else None
        self.begun = self._file is not None and path.stat().st_size > 0
        if self.begun:
            self._check_settings(self._settings_file, settings)
            self._scan()

    def _check_settings(self, settings_file: Path, settings: dict[str, Any]) -> None:
        """Raises if the file was started with other settings: it must not mix models or instructions."""
        before = read_json(settings_file, "restore it, or give another --out")
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"'{self.path}' was started with {name}={before.get(name)!r}, now it is {value!r}: use "
                    "the same value, or give another --out."
                )

    def _scan(self) -> None:
        try:
            with open(self.path, "rb") as lines:
                self._read_keys(lines)
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be read ({error}): give another --out.") from error
        with writing(self.path):
            os.truncate(self.path, self._end)

    def _read_keys(self, lines: Iterable[bytes]) -> None:
        for number, line in enumerate(lines, 1):
            try:
                value = parse_json(line.decode(), lenient=True)
                key = value.get("path") if isinstance(value, dict) else None
            except ValueError:
                key = None
            if not line.endswith(b"\n"):
                break  # incomplete: the process was killed while writing it
            if not isinstance(key, str) or key in self.offsets:
                raise UserError(
                    f"'{self.path}' line {number} is not a caption, or repeats the key of an earlier line: "
                    "correct the file, or give another --out."
                )
            self.offsets[key] = self._end
            self._end += len(line)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends lines and waits until they are on disk."""
        lines = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records]
        if not self.begun:
            write_json(self._settings_file, self._settings)
            self._file = self._file or LineFile(self.path)
            self.begun = True
        self._file.append(b"".join(lines))
        self._file.sync()
        for record, line in zip(records, lines, strict=True):
            self.offsets[record["path"]] = self._end
            self._end += len(line)

    def read(self, key: str) -> dict[str, Any]:
        """Returns the record of a key that is in the file. May be called from any thread."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[key])
            return json.loads(file.readline())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# --------------------------------------------------------------------------------------------------
# The run


@dataclasses.dataclass
class _Item:
    """An image that is waiting for its line in the output."""

    index: int
    key: str
    instruction: str
    captions: tuple[Caption, ...]  # its original captions
    sha256: str  # of the image file
    size: tuple[int, int] | None  # (height, width); None, like `pixels`, if its line is already written
    pixels: np.ndarray | None

    @property
    def identity(self) -> bytes:
        """Equal for images with the same file and the same instruction, which get the same caption.

        The hash is short, because the hashes of all images are kept in memory.
        """
        return hashlib.blake2b(f"{self.sha256} {self.instruction}".encode(), digest_size=16).digest()


def caption_images(
    source: Source,
    describe: Describe,
    out: str | os.PathLike,
    report: RefusalReport,
    *,
    name: str,
    instruction: str = "",
    with_original: bool = False,
    batch_size: int = 16,
    shard: tuple[int, int] = (0, 1),
    settings: dict[str, Any] | None = None,
    workers: int = 4,
) -> int:
    """Captions the images of a source, or resumes an unfinished file.

    Args:
      source: the images.
      describe: the model, from `captioning.model.load_captioner`.
      out: the JSON-lines file. OUT.settings.json, OUT.refused.jsonl and OUT.lock are written next to it.
      report: collects the images that were skipped.
      name: name of the new caption in the records.
      instruction: instruction to the model; "" for that of the paper. "{caption}" is replaced by the original
        caption.
      with_original: give the model the first original caption of each image; images without one are skipped.
      batch_size: images per call of the model.
      shard: (i, n) captions every n-th image, starting with image i (counted from 0).
      settings: anything else that the captions depend on, such as the dtype of the model. A file can only be
        resumed with the same settings.
      workers: threads that read and decode images.

    Returns:
      the number of lines written by this call.

    Raises:
      UserError: arguments contradict each other, the file was started with other settings or is damaged,
        another process writes it, an image has changed since it was captioned, or too many were skipped.
      OutputError: a file cannot be written.
    """
    instruction = instruction or (INSTRUCTION_WITH_ORIGINAL if with_original else INSTRUCTION)
    if with_original != ("{caption}" in instruction):
        raise UserError(
            f"instruction is '{instruction}' and with_original is {with_original}: the instruction must "
            "contain {caption} if, and only if, with_original is True; change one of them."
        )
    for option, value in (("batch_size", batch_size), ("workers", workers)):
        at_least(option, value, 1)
    settings = {
        "name": name, "instruction": instruction, "with_original": with_original,
        "shard": f"{shard[0]}/{shard[1]}", **(settings or {}),
    }  # fmt: skip
    taken = f"--out '{out}': another process is writing captions to it"
    fix = "wait for it, or split the work with --shard=I/N and one --out for each part."
    refused = f"{os.fspath(out)}.refused.jsonl"
    with locked(f"{os.fspath(out)}.lock", taken, fix):
        file = _CaptionFile(Path(out), settings)
        if file.offsets:
            print(f"resuming {out}, which has {len(file.offsets):,} captions", flush=True)
        try:
            items = _read_items(source, file, report, instruction, with_original, shard, workers, batch_size)
            total = len(range(shard[0], len(source), shard[1]))
            written = _write_items(source, file, report, describe, items, name, batch_size, total)
        except OutputError:
            raise
        except BaseException:
            # Before the first lines, keep the report only if skipped samples may have stopped the run: their
            # share is not checked before there are `minimum` samples.
            if file.begun or len(report.refused) >= report.minimum:
                report.write(refused)
            raise
        finally:
            file.close()
        report.write(refused)
    report.check()
    return written


def _read_items(
    source: Source,
    file: _CaptionFile,
    report: RefusalReport,
    instruction: str,
    with_original: bool,
    shard: tuple[int, int],
    workers: int,
    ahead: int,
) -> Iterator[_Item]:
    """Yields the images of the shard in order. Threads read and decode up to `ahead` images in advance."""

    def read(index: int) -> _Item:
        key = source.key(index)
        example = source[index]
        prompt = instruction
        if with_original:
            if not example.captions:
                raise Refused("missing_caption", "it has no original caption to give to the model")
            prompt = instruction.replace("{caption}", example.captions[0].text)
        data = example.read()
        sha256 = sha256_of_bytes(data)
        if key in file.offsets:
            if file.read(key)["sha256"] != sha256:
                raise UserError(
                    f"image '{key}' has changed since it was captioned: delete its line in '{file.path}', or "
                    "give another --out."
                )
            return _Item(index, key, prompt, example.captions, sha256, None, None)
        pixels = decode_image(data)
        return _Item(index, key, prompt, example.captions, sha256, pixels.shape[:2], pixels)

    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[tuple[int, Future[_Item]]] = collections.deque()
        indices = iter(range(shard[0], len(source), shard[1]))
        while True:
            while len(waiting) < ahead and (index := next(indices, None)) is not None:
                waiting.append((index, pool.submit(read, index)))
            if not waiting:
                return
            index, future = waiting.popleft()
            try:
                yield future.result()
            except Refused as refused:
                report.refuse(source.key(index), refused)


def _write_items(
    source: Source,
    file: _CaptionFile,
    report: RefusalReport,
    describe: Describe,
    items: Iterator[_Item],
    name: str,
    batch_size: int,
    total: int,
) -> int:
    """Captions items in batches of distinct images, writes their lines in order and returns their number.

    Identical images get the caption of their first occurrence, the "leader".
    """
    first_key: dict[bytes, str] = {}  # from identity to the key of the leader, whose line has the caption
    pending: list[_Item] = []  # items since the last flush, in order
    leaders: list[_Item] = []  # the leaders among them
    written, started, reported = 0, time.monotonic(), time.monotonic()

    def flush() -> int:
        missing = [item for item in pending if item.key not in file.offsets]
        texts = {}
        # If an interruption left a batch half written, the model gets the complete batch again, because in a
        # smaller batch its sums may be rounded differently. Lines that are written are kept.
        if any(leader.key not in file.offsets for leader in leaders):
            texts = _describe(source, describe, leaders)
        for leader in leaders:
            first_key[leader.identity] = leader.key
        records = []
        for item in missing:
            identity = item.identity
            if identity not in texts or first_key[identity] in file.offsets:
                texts[identity] = file.read(first_key[identity])["captions"][-1]["text"]
            records.append(_record(item, texts[identity], name))
        file.append(records)
        report.take(len(pending))
        pending.clear()
        leaders.clear()
        return len(records)

    for item in items:
        pending.append(item)
        if item.identity not in first_key and all(item.identity != leader.identity for leader in leaders):
            leaders.append(item)
        else:
            item.pixels = None
        # The second bound limits memory when many images in a row are identical.
        if len(leaders) == batch_size or len(pending) == 64 * batch_size:
            written += flush()
            if time.monotonic() - reported > 10:
                reported = time.monotonic()
                rate = written / (reported - started)
                print(f"{len(file.offsets):,} of {total:,} captioned, {rate:.2f} per second", flush=True)
    return written + flush()


def _describe(source: Source, describe: Describe, leaders: list[_Item]) -> dict[bytes, str]:
    """Runs the model on a batch; returns the caption of each identity."""
    pixels = [source[leader.index].decode() if leader.pixels is None else leader.pixels for leader in leaders]
    texts = describe(pixels, [leader.instruction for leader in leaders])
    return {leader.identity: text for leader, text in zip(leaders, texts, strict=True)}


def _record(item: _Item, text: str, name: str) -> dict[str, Any]:
    height, width = item.size
    return {
        "path": item.key,
        "height": height,
        "width": width,
        "ratio": round(height / width, 4),
        "captions": [caption._asdict() for caption in (*item.captions, Caption(text, 1.0, name))],
        "sha256": item.sha256,
    }
