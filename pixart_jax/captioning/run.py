"""Dense captions for the images of a source, by an image-to-text model of transformers.

PixArt owes much of its prompt following to captions written by LLaVA (paper, section 2.4). The result is one
line of JSON an image, in the order of the source:

    {"path": "a/b.jpg", "height": 480, "width": 640, "ratio": 0.75,
     "captions": [{"text": ..., "weight": 1.0, "name": "caption"}, {..., "name": "llava-hf/..."}],
     "sha256": ...}

with the captions the image had and then the new one. The run can be killed at any time and started again: it
goes on where it stopped, and the file comes out byte for byte as without the kill, as long as the batch size
is the same, since images are always put into the same batches. Images with equal bytes are captioned once.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.captioning.model import Describe
from pixart_jax.data.captions import Caption
from pixart_jax.data.images import RefusalReport, Refused, decode_image
from pixart_jax.data.sources import Source
from pixart_jax.errors import UserError, at_least
from pixart_jax.files import sha256_of_bytes, write_json

# The paper's prompt, and the official script's for images that have a caption.
INSTRUCTION = "Describe this image and its style in a very detailed manner"
INSTRUCTION_WITH_ORIGINAL = (
    'Given the caption of this image "{caption}", describe this image and its style in a very detailed manner'
)


class _CaptionFile:
    """The output: one line an image, appended in order. Opening it cuts off a torn last line."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.offsets: dict[str, int] = {}  # key of each line to where the line begins
        beside = path.with_name(path.name + ".settings.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._check_settings(beside, settings)
        else:
            write_json(beside, settings)
        self._file = open(path, "a+b")  # noqa: SIM115 closed by `close`
        self._scan()

    def _check_settings(self, beside: Path, settings: dict[str, Any]) -> None:
        """A file holds the captions of one model and one instruction."""
        try:
            before = json.loads(beside.read_text("utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"'{self.path}': exists, and '{beside.name}', which says how it was made, cannot be read; "
                "write to another --out"
            ) from None
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"'{self.path}': was begun with {name}={before.get(name)!r}, now it is {value!r}; "
                    "use the same, or write to another --out"
                )

    def _scan(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            try:
                key = json.loads(line)["path"]
            except (ValueError, TypeError, KeyError):
                key = None
            if not line.endswith(b"\n"):
                break  # torn by a kill
            if not isinstance(key, str) or key in self.offsets:
                raise UserError(
                    f"'{self.path}' line {number}: no caption line, or a key for the second time; mend it or "
                    "write to another --out"
                )
            self.offsets[key] = end
            end += len(line)
        self._file.truncate(end)
        self._end = end

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes lines to disk."""
        lines = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records]
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        for record, line in zip(records, lines, strict=True):
            self.offsets[record["path"]] = self._end
            self._end += len(line)

    def read(self, key: str) -> dict[str, Any]:
        """Returns the record of a key that is there. For any thread."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[key])
            return json.loads(file.readline())

    def close(self) -> None:
        self._file.close()


# --------------------------------------------------------------------------------------------------
# The run


@dataclasses.dataclass
class _Item:
    """One image on its way to its line."""

    index: int
    key: str
    instruction: str
    captions: tuple[Caption, ...]  # those it has
    sha256: str  # of the encoded image
    size: tuple[int, int] | None  # (height, width); None, as the pixels, for one that has its line
    pixels: np.ndarray | None

    @property
    def identity(self) -> bytes:
        """Equal for images that get equal captions: same bytes, same instruction. Short, as all are held."""
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
    """Captions the images of a source, or goes on with a file that is there.

    Args:
      source: the images.
      describe: the model, see `captioning.model.load_captioner`.
      out: the JSON-lines file. Beside it come OUT.settings.json and OUT.refused.jsonl.
      report: takes what could not be captioned.
      name: of the new caption in the records.
      instruction: what is asked of the model; "" for the paper's. "{caption}" stands for the original.
      with_original: give the model the first caption that the image has; images without one are then refused.
      batch_size: images the model sees at once.
      shard: (i, n) captions every n-th image, beginning with the i-th, counted from 0.
      settings: what the captions depend on beyond the above, such as the model's precision; a file is
        continued with the same only.
      workers: threads that read and decode images.

    Returns:
      The number of lines written by this call.

    Raises:
      UserError: the file was begun otherwise or is damaged; contradictory arguments; too much was refused.
    """
    instruction = instruction or (INSTRUCTION_WITH_ORIGINAL if with_original else INSTRUCTION)
    if with_original != ("{caption}" in instruction):
        raise UserError(
            f"instruction '{instruction}': must hold {{caption}} exactly when the original caption is given "
            f"(with_original={with_original}); change one of the two"
        )
    for option, value in (("batch_size", batch_size), ("workers", workers)):
        at_least(option, value, 1)
    settings = {
        "name": name, "instruction": instruction, "with_original": with_original,
        "shard": f"{shard[0]}/{shard[1]}", **(settings or {}),
    }  # fmt: skip
    file = _CaptionFile(Path(out), settings)
    if file.offsets:
        print(f"{out} has {len(file.offsets):,} captions, going on", flush=True)
    try:
        items = _read_items(source, file, report, instruction, with_original, shard, workers, batch_size)
        total = len(range(shard[0], len(source), shard[1]))
        written = _write_items(source, file, report, describe, items, name, batch_size, total)
    finally:
        file.close()
        report.write(f"{os.fspath(out)}.refused.jsonl")
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
    """Yields the images of the shard in order, read and decoded `ahead` of their use."""

    def read(index: int) -> _Item:
        key = source.key(index)
        example = source[index]
        asked = instruction
        if with_original:
            if not example.captions:
                raise Refused("missing_caption", "there is no original caption to give to the model")
            asked = instruction.replace("{caption}", example.captions[0].text)
        if key in file.offsets:
            return _Item(index, key, asked, example.captions, file.read(key)["sha256"], None, None)
        data = example.read()
        pixels, sha256 = decode_image(data), sha256_of_bytes(data)
        return _Item(index, key, asked, example.captions, sha256, pixels.shape[:2], pixels)

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
    """Captions items in batches of distinct images, writes their lines in order, and returns how many."""
    first_key: dict[bytes, str] = {}  # identity to the key whose line holds its caption
    pending: list[_Item] = []
    leaders: list[_Item] = []  # the distinct new ones among them
    written, started, told = 0, time.monotonic(), time.monotonic()

    def flush() -> int:
        missing = [item for item in pending if item.key not in file.offsets]
        texts = {}
        # A batch that a kill left half written is captioned whole again: in another batch the sums may round
        # otherwise. What is written stays.
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
        # The second bound keeps a run of equal images from piling up.
        if len(leaders) == batch_size or len(pending) == 64 * batch_size:
            written += flush()
            if time.monotonic() - told > 10:
                told = time.monotonic()
                rate = written / (told - started)
                print(f"{len(file.offsets):,} of {total:,} captioned, {rate:.2f} a second", flush=True)
    return written + flush()


def _describe(source: Source, describe: Describe, leaders: list[_Item]) -> dict[bytes, str]:
    """Runs the model on a batch, and returns identity to caption."""
    batch = []
    for leader in leaders:
        try:
            pixels = source[leader.index].decode() if leader.pixels is None else leader.pixels
        except Refused:  # written by an earlier run, damaged since: its line stays, the batch goes without it
            continue
        batch.append((leader, pixels))
    texts = describe([pixels for _, pixels in batch], [leader.instruction for leader, _ in batch])
    return {leader.identity: text for (leader, _), text in zip(batch, texts, strict=True)}


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
