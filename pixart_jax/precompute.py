"""Encodes images and captions into feature shards for training.

    python -m pixart_jax.precompute --config=configs/stage2.py --images=photos/ --out=features/photos
    python -m pixart_jax.precompute verify --features=features/photos

The work is planned before it starts: the source and the config alone decide which image belongs to which
bucket, and which records belong to which shard. A shard is encoded in batches of fixed composition and
written under a temporary name. The command can therefore be killed at any time and started again, or be split
over machines with --shard=I/N; the shards have the same bytes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pixart_jax import config as configs
from pixart_jax.config import FeaturesConfig
from pixart_jax.data import features
from pixart_jax.data.captions import CleanedCaption, cleaning_summary, parse_caption_fields
from pixart_jax.data.images import RefusalReport, Refused
from pixart_jax.data.planning import (
    KINDS,
    MAX_CROP,
    MIN_BUCKET,
    PrecomputePlan,
    Shard,
    ahead,
    make_plan,
    open_images,
)
from pixart_jax.data.records import FeatureBucket, all_finite
from pixart_jax.data.sources.options import parse_options, parse_part
from pixart_jax.data.verification import verify
from pixart_jax.encoders.images import IMAGE_BATCH
from pixart_jax.encoders.samples import SampleEncoder, Text
from pixart_jax.encoders.text import TEXT_BATCH
from pixart_jax.errors import EXIT_USAGE, UserError
from pixart_jax.files import sha256_of_file, write_json, write_text
from pixart_jax.flags import CommandFlags, flag, run, values_for
from pixart_jax.training.settings import apply_settings

JOB = "job.json"
WORK = "work"
CUT = "cut.jsonl"
CLEANED = "cleaned.jsonl"
# Version 0.1 merged buckets whatever was cropped.
_MAX_CROP_OF_0_1 = 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    """How the work is done.

    `shard_mb`, `min_bucket`, `max_crop` and `min_size` decide what the shards contain. The fields with a help
    text are flags of the command.
    """

    # (i, n): this process writes every n-th shard, starting from the i-th.
    part: tuple[int, int] = (0, 1)
    shard_mb: int = flag(1024, "Maximum size of a shard, in MiB.")
    min_bucket: int = flag(
        MIN_BUCKET,
        "Merge buckets that have fewer images than this into their neighbours; as a flag, the default is the "
        f"batch size of the config, at most {MIN_BUCKET}.",
    )
    max_crop: float = flag(
        MAX_CROP, "Do not merge buckets if that crops away more than this share (0 to 1) of an image."
    )
    min_size: int = flag(0, "Skip images whose shorter side has fewer pixels than this; 0 skips none.")
    max_refused_share: float = flag(
        0.05, "Stop when more than this share of the samples (0 to 1) is skipped."
    )
    workers: int = flag(8, "Number of threads that read and decode images.")
    text_batch: int = flag(TEXT_BATCH, "Number of captions to encode at a time.")
    image_batch: int = flag(IMAGE_BATCH, "Number of images to encode at a time.")


def precompute(
    source: Any, config: FeaturesConfig, out: str | Path, options: Options = Options(), say: Any = print
) -> dict[str, Any]:
    """Computes the features of a source, or resumes where an earlier run stopped.

    Args:
      source: as `open_images` returns it.
      config: config of the features.
      out: folder for the features; created if it does not exist.
      options: how the work is done.
      say: called with each line of progress.

    Returns:
      The manifest of this part.

    Raises:
      UserError: the folder holds features of another source or config, or too many samples are skipped.
    """
    out = Path(out)
    (out / WORK).mkdir(parents=True, exist_ok=True)
    part, parts = options.part
    with _only_process(out / WORK / f"lock-{part}-of-{parts}", options.part):
        channels = getattr(source, "channels", 3)
        if _merging_of(out).get("max_crop") == _MAX_CROP_OF_0_1:
            options = dataclasses.replace(options, max_crop=_MAX_CROP_OF_0_1)
        plan = make_plan(
            source,
            config,
            shard_mb=options.shard_mb,
            min_bucket=options.min_bucket,
            max_crop=options.max_crop,
            workers=options.workers,
            channels=channels,
        )
        job = {
            "config": configs.to_dict(config),
            "source": {
                "kind": source.kind,
                "records": len(source),
                "fingerprint": plan.fingerprint,
                "shard_mb": options.shard_mb,
                "min_bucket": options.min_bucket,
                "max_crop": options.max_crop,
                "min_size": options.min_size,
            },
        }
        _check_job(out, job)
        _judge(plan.refused, len(source) - len(plan.refused), options)
        mine = plan.shards[part::parts]
        todo = [shard for shard in mine if _finished(out, shard) is None]
        say(
            f"{len(source):,} samples, {len(plan.refused):,} skipped in planning, {len(plan.buckets)} "
            f"buckets, {len(plan.shards)} shards; part {part} of {parts} has {len(mine)}, of which "
            f"{len(mine) - len(todo)} are done"
        )
        for note in plan.notes:
            say(note)
        work = SampleEncoder(
            source,
            config,
            min_size=options.min_size,
            text_batch=options.text_batch,
            image_batch=options.image_batch,
        )
        text = _write_null_text(work, out) if config.text else None
        if todo:
            _encode_shards(work, todo, plan.common, options, out, say)

        entries = [
            {"file": shard.file, "bucket": shard.bucket.name, **_finished(out, shard)} for shard in mine
        ]
        refused = [refusal for entry in entries for refusal in entry.pop("refused")]
        cut = {line["caption"]: line for entry in entries for line in entry.pop("cut")}
        # Version 0.1 did not list them.
        cleaned = {line["caption"]: line for entry in entries for line in entry.pop("cleaned", [])}
        _judge(refused, sum(entry["records"] for entry in entries), options)
        report = _report(
            [*(plan.refused if part == 0 else ()), *refused], sum(entry["records"] for entry in entries)
        )
        suffix = "" if parts == 1 else f"-{part:05d}-of-{parts:05d}"
        report.write(out / f"refused{suffix}.jsonl")
        for name, lines in ((CUT, cut), (CLEANED, cleaned)):
            text_of_lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
            write_text(out / name.replace(".jsonl", f"{suffix}.jsonl"), text_of_lines)
        manifest = features.make_manifest(
            config=job["config"],
            source=job["source"],
            buckets=[FeatureBucket(b, work.latent_shape(b)) for b in plan.buckets],
            shards=entries,
            merged=plan.merged,
            classes=source.classes or (),
            text=text,
            refused=report.counts(),
            cut_captions=len(cut),
            cleaned_captions=len(cleaned),
            part=options.part,
        )
        write_json(out / features.manifest_name(part, parts), manifest)
    _summary(manifest, plan, report, list(cut.values()), list(cleaned.values()), out, say)
    return manifest


def _write_null_text(work: SampleEncoder, out: Path) -> dict[str, Any]:
    """Writes null_text.npy, unless an earlier run did, and returns its entry in the manifest."""
    note = out / WORK / "null_text.json"
    if note.is_file() and (out / features.NULL_TEXT_FILE).is_file():
        entry = json.loads(note.read_text())
        if sha256_of_file(out / features.NULL_TEXT_FILE) == entry["sha256"]:
            return entry
    null, length = work.text.null_text()
    if not all_finite(null):
        raise UserError("the text encoder returns NaN for the empty caption: check its weights and dtype.")
    entry = features.write_null_text(out, null)
    entry |= {"width": null.shape[1], "length": null.shape[0], "null_length": length}
    write_json(note, entry)
    return entry


def _encode_shards(
    work: SampleEncoder,
    todo: Sequence[Shard],
    common: Sequence[str],
    options: Options,
    out: Path,
    say: Any,
) -> None:
    """Encodes and writes one shard after the other. Images are read ahead, even those of the next shard."""
    texts = work.encode_texts(common) if common else {}
    report = RefusalReport(options.max_refused_share)
    items = ((shard.bucket, int(index)) for shard in todo for index in shard.indices)
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        ready = ahead(pool, lambda item: work.read(*item), items, 2 * options.image_batch + options.workers)
        try:
            for number, shard in enumerate(todo):
                start = time.monotonic()
                entry = _encode_shard(work, shard, ready, texts, options.image_batch, out)
                report.take(entry["records"])
                for key, *why in entry["refused"]:
                    report.refuse(key, Refused(*why))
                rate = len(shard.indices) / (time.monotonic() - start)
                say(f"{shard.file}: {entry['records']:,} records, {rate:,.1f}/s, {number + 1} of {len(todo)}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encode_shard(
    work: SampleEncoder,
    shard: Shard,
    ready: Iterator[Any],
    common: dict[str, Text],
    image_batch: int,
    out: Path,
) -> dict[str, Any]:
    """Writes a shard, then its entry, which marks it as done, and returns the entry."""
    refused, samples, stored = [], [], []
    for start in range(0, len(shard.indices), image_batch):
        images = []
        for index in shard.indices[start : start + image_batch]:
            item = next(ready)
            if isinstance(item, Refused):
                refused.append([work.source.key(int(index)), item.reason, item.text])
            else:
                samples.append(item[0])
                images.append(item[1])
        if images:
            stored += work.encode_images(images)

    wanted = dict.fromkeys(caption.text for sample in samples for caption in sample.captions)
    new = [text for text in wanted if text not in common]
    texts = {text: common[text] for text in wanted if text in common} | (
        work.encode_texts(new) if new else {}
    )
    records = (work.record(sample, pair, shard.bucket, texts) for sample, pair in zip(samples, stored))
    entry = features.write_shard(out / shard.file, records)
    cut = [texts[text].cut for text in wanted if texts[text].cut]
    cleaned = {line.caption: line._asdict() for sample in samples for line in sample.cleaned}
    entry |= {"refused": refused, "cut": cut, "cleaned": list(cleaned.values())}
    write_json(out / WORK / f"{shard.file}.json", entry)
    return entry


def _finished(out: Path, shard: Shard) -> dict[str, Any] | None:
    """The entry of a shard that is done, or None."""
    try:
        entry = json.loads((out / WORK / f"{shard.file}.json").read_text())
    except FileNotFoundError:
        return None
    try:
        size = (out / shard.file).stat().st_size
    except FileNotFoundError:
        size = 0
    return entry if size == entry["bytes"] else None


def _report(refused: Sequence[Sequence[str]], taken: int, max_refused_share: float = 1.0) -> RefusalReport:
    report = RefusalReport(max_refused_share)
    report.take(taken)
    for key, *why in refused:
        report.refuse(key, Refused(*why))
    return report


def _judge(refused: Sequence[Sequence[str]], taken: int, options: Options) -> None:
    """Raises a `UserError` if too many samples are skipped."""
    _report(refused, taken, options.max_refused_share).check()


def _check_job(out: Path, job: dict[str, Any]) -> None:
    """Raises a `UserError` if the folder holds features of another config or source."""
    path = out / JOB
    if not path.is_file():
        write_json(path, job)
        return
    before = json.loads(path.read_text())
    for title, now, then in (
        ("features", job["config"], before["config"]),
        ("features.text_encoder", job["config"]["text_encoder"], before["config"]["text_encoder"]),
    ):
        for field in now:
            if now[field] != then.get(field) and not isinstance(now[field], dict):
                raise UserError(
                    f"--out '{out}' was started with {title}.{field}={then.get(field)}, now {now[field]}; "
                    "restore it or give another folder."
                )
    for field, now in job["source"].items():
        then = before["source"].get(field, _MAX_CROP_OF_0_1 if field == "max_crop" else None)
        if now != then:
            what = (
                "other images, captions or sizes" if field == "fingerprint" else f"{field}={then}, now {now}"
            )
            raise UserError(
                f"--out '{out}' was started with {what}: restore the source as it was, or give another "
                "folder."
            )


def _merging_of(out: Path) -> dict[str, Any]:
    """The options that decide which buckets are merged, as the folder was begun with; empty if it is new."""
    try:
        begun = json.loads((out / JOB).read_text())["source"]
    except FileNotFoundError:
        return {}
    return {"min_bucket": begun["min_bucket"], "max_crop": begun.get("max_crop", _MAX_CROP_OF_0_1)}


@contextlib.contextmanager
def _only_process(path: Path, part: tuple[int, int]) -> Iterator[None]:
    """Holds a lock, so that two processes do not write the same shards."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out '{path.parent.parent}': another process is working on part {part[0]} of {part[1]}; "
                "wait for it, or split the work with --shard=I/N."
            ) from None
        except OSError:
            pass  # the file system has no locks
        yield


def _summary(
    manifest: dict[str, Any],
    plan: PrecomputePlan,
    report: RefusalReport,
    cut: list[Any],
    cleaned: list[Any],
    out: Path,
    say: Any,
) -> None:
    say(report.table())
    counts = collections.Counter()
    for shard in manifest["shards"]:
        counts[shard["bucket"]] += shard["records"]
    for bucket in plan.buckets:
        say(plan.describe(bucket, counts[bucket.name]))
    if cut:
        first = cut[0]
        say(
            f"{len(cut):,} captions were truncated to {manifest['text']['length']} tokens (all in {CUT}), "
            f"for example one of {first['tokens']} tokens, which lost {first['removed'][:80]!r}"
        )
    if cleaned:
        say(cleaning_summary([CleanedCaption(**line) for line in cleaned], CLEANED))
    size = sum(shard["bytes"] for shard in manifest["shards"])
    say(f"{sum(counts.values()):,} records, {size / 2**20:,.1f} MiB in {out}")


# ------------------------------------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Options, CommandFlags):
    config: ConfigDict | None = flag(None, "Stage to make features for, from configs/.")
    images: str | None = flag(
        None, "Folder, file, pattern or TFDS name; 'digits' or 'shapes' for the built-in data sets."
    )
    out: str | None = flag(None, "Folder for the features; unfinished work in it is resumed.")
    source: str = flag("auto", f"Kind of source: {', '.join(KINDS)}.")
    split: str | None = flag(
        None,
        "Split: train, test or all (digits); train, test or novel (shapes); a TFDS split; or train, "
        "validation, test or all, if files or folders are named so (parquet, webdataset, imagefolder).",
    )
    captions: str | None = flag(None, "Take the captions from this file, written by the caption command.")
    caption_fields: str = flag(
        "", "Fields that hold captions, as NAME[=WEIGHT],...; default: the usual names."
    )
    source_option: tuple[str, ...] = flag(
        (), "NAME=VALUE for the source, such as image_root=DIR or key_field=id."
    )
    shard: str | None = flag(None, "I/N: do part I of N parts of the work, counted from 0.")
    distributed: bool = flag(
        False, "Start jax.distributed and split the work over its processes (Slurm, TPU pod)."
    )
    features: str | None = flag(None, "verify: the folder to check.")


def verify_command(folder: str) -> int:
    """Prints every fault of a folder and returns the exit status, 0 for none."""
    faults = verify(folder)
    for fault in faults:
        print(fault)
    manifest = features.read_manifest(folder)
    records = sum(shard["records"] for shard in manifest["shards"])
    print(f"{folder}: {len(manifest['shards'])} shards, {records:,} records, {len(faults)} faults")
    return EXIT_USAGE if faults else 0


def main(given: Flags) -> int:
    if given.words:
        verify_mode = given.mode({"verify": verify_command})
        given.require("features", hint="give the folder to verify.")
        return verify_mode(given.features)
    given.require("config", "images", "out")
    stage = configs.from_config_dict(given.config)
    config = stage.features
    named: dict[str, Any] = dict(parse_options(given.source_option))
    named |= {
        name: getattr(given, name) for name in ("split", "captions") if getattr(given, name) is not None
    }
    if given.caption_fields:
        named["caption_fields"] = parse_caption_fields(given.caption_fields)
    part = parse_part(given.shard) if given.shard else (0, 1)
    apply_settings()
    if given.distributed:
        jax.distributed.initialize()
        part = (jax.process_index(), jax.process_count())
    # A bucket needs no more images than a batch has. A folder keeps the merges that it was begun with.
    merging = {"min_bucket": min(stage.data.batch_size, MIN_BUCKET)} | _merging_of(Path(given.out))
    merging = {name: value for name, value in merging.items() if name not in given.present}
    options = Options(**{**values_for(Options, given), **merging, "part": part})
    source = open_images(given.source, given.images, config, named)
    precompute(source, config, given.out, options)
    return 0


if __name__ == "__main__":
    run(main, Flags)
