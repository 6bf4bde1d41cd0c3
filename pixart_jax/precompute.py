"""Encodes images and captions into feature shards for training.

    python -m pixart_jax.precompute --config=configs/stage2.py --images=photos/ --out=features/photos
    python -m pixart_jax.precompute verify --features=features/photos

The work is planned before it starts: the source and the config alone decide which image belongs to which
bucket, and which records belong to which shard. A shard is encoded in batches of fixed composition and
written under a temporary name. The command can therefore be killed at any time and started again, or be split
over machines with --shard=I/N; the shards have the same bytes. If it is run again after images were added, it
encodes only these, into new shards.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from pixart_jax import config as configs
from pixart_jax.config import FeaturesConfig
from pixart_jax.constants import (
    IMAGE_BATCH,
    LARGEST_BATCH,
    LARGEST_SIDE,
    MOST_REPEATS,
    MOST_THREADS,
    TEXT_BATCH,
)
from pixart_jax.data import features
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.captions import CleanedCaption, cleaning_summary, parse_caption_fields
from pixart_jax.data.images import RefusalReport, Refused
from pixart_jax.data.job import JOB, NEW_OPTIONS, NULL_TEXT_NOTE, VALIDATION, WORK, Job, read_job, rows_read
from pixart_jax.data.order import uniform
from pixart_jax.data.planning import (
    KINDS,
    MAX_CROP,
    MIN_BUCKET,
    Shard,
    Survey,
    ahead,
    bucket_table,
    common_captions,
    content_of,
    describe_bucket,
    hash_of,
    open_images,
    survey,
)
from pixart_jax.data.records import all_finite
from pixart_jax.data.sources.options import parse_options, parse_part
from pixart_jax.data.verification import Compared, verify, verify_images
from pixart_jax.encoders.identity import encoder_files
from pixart_jax.encoders.progress import Progress
from pixart_jax.errors import EXIT_USAGE, UserError, in_utf8
from pixart_jax.files import locked, make_folder, sha256_of_file, write_json, write_text
from pixart_jax.flags import LARGEST_SEED, CommandFlags, check_fields, fetched, flag, run, values_for
from pixart_jax.readers import read_json

if TYPE_CHECKING:
    from pixart_jax.encoders.samples import SampleEncoder, Text

# Lists of captions in a feature folder, NAME.jsonl: truncated ones, those from which cleaning removed words,
# and those with characters that the tokenizer does not know.
LISTS = ("cut", "cleaned", "unknown")
# In `WORK`: hashes of the files of the encoders.
ENCODERS = "encoders.json"
# Flags that make several samples of an image; verify takes them from the manifest.
VIEW_OPTIONS = ("flip", "crops", "crop_seed")


@dataclasses.dataclass(frozen=True)
class Options:
    """How the work is done.

    `shard_mb`, `min_bucket`, `max_crop`, `min_size` and `validation_share` decide what the shards contain.
    The fields with a help text are flags of the command.
    """

    # (i, n): this process writes every n-th shard, starting from the i-th.
    part: tuple[int, int] = (0, 1)
    shard_mb: int = flag(1024, "Maximum size of a shard, in MiB.", minimum=1, maximum=2**20)
    min_bucket: int = flag(
        MIN_BUCKET,
        "Merge buckets that have fewer images than this into their neighbours; as a flag, the default is the "
        f"batch size of the config, at most {MIN_BUCKET}.",
        minimum=0,
    )
    max_crop: float = flag(
        MAX_CROP,
        "Do not merge buckets if that crops away more than this share (0 to 1) of an image.",
        minimum=0,
        maximum=1,
    )
    min_size: int = flag(
        0,
        "Skip images whose shorter side has fewer pixels than this; 0 skips none.",
        minimum=0,
        maximum=LARGEST_SIDE,
    )
    max_refused_share: float = flag(
        0.05, "Stop when more than this share of the samples (0 to 1) is skipped.", minimum=0, maximum=1
    )
    validation_share: float = flag(
        0.0,
        f"Hold out this share of the samples (0 to 1) for validation: their features go to OUT/{VALIDATION}.",
        minimum=0,
        below=1,
    )
    workers: int = flag(8, "Number of threads that read and decode images.", minimum=1, maximum=MOST_THREADS)
    text_batch: int = flag(
        TEXT_BATCH, "Number of captions to encode at a time.", minimum=1, maximum=LARGEST_BATCH
    )
    image_batch: int = flag(
        IMAGE_BATCH, "Number of images to encode at a time.", minimum=1, maximum=LARGEST_BATCH
    )

    def __post_init__(self):
        check_fields(self, "--")


def precompute(
    source: Any, config: FeaturesConfig, out: str | Path, options: Options = Options(), say: Any = print
) -> dict[str, Any]:
    """Computes the features of a source, resumes where an earlier run stopped, or adds what is new.

    Args:
      source: as `open_images` returns it.
      config: config of the features.
      out: folder for the features; created if it does not exist.
      options: how the work is done.
      say: called with each line of progress.

    Returns:
      The manifest of this part, without the held-out samples.

    Raises:
      UserError: the folder holds features of another config, samples that are encoded have changed, or too
        many samples are skipped, or all of those that are held out.
    """
    from pixart_jax.encoders.samples import SampleEncoder

    out = Path(out)
    in_utf8("the folder for the features", out, "choose another")  # ArrayRecord opens no other
    part, parts = options.part
    outs = [out, out / VALIDATION] if options.validation_share else [out]
    for folder in outs:
        make_folder(folder / WORK)
    taken = f"--out '{out}': another process is working on part {part} of {parts}"
    fix = "wait for it, or split the work with --shard=I/N."
    with locked(out / WORK / f"lock-{part}-of-{parts}", taken, fix, say):
        if _merging_of(out).get("max_crop") == NEW_OPTIONS["max_crop"]:
            options = dataclasses.replace(options, max_crop=NEW_OPTIONS["max_crop"])
        jobs = [Job(folder, configs.to_dict(config), _job_options(source, options)) for folder in outs]
        work = SampleEncoder(
            source,
            config,
            min_size=options.min_size,
            text_batch=options.text_batch,
            image_batch=options.image_batch,
        )
        work.image_encoder  # noqa: B018 (loads it, so that a fault is reported before the survey)
        found = survey(source, config, options.workers)
        for note in found.notes:
            say(note)
        samples = [found]
        if options.validation_share:
            held_out = _held_out(found, source, options.validation_share, jobs[1].keys)
            samples = [found.part(~held_out), found.part(held_out)]
        _judge(list(found.refused.values()), len(found.usable), options, out)
        folders: list[_Folder] = []
        for job, own, title in zip(jobs, samples, ("", f"{VALIDATION}: ")):
            # Held-out images get the sizes of the others.
            buckets = folders[0].job.buckets if folders else ()
            folders.append(_plan(job, own, work, options, buckets, lambda line, t=title: say(f"{t}{line}")))
        for folder in folders:
            _check_encoders(folder.job, config)
            folder.job.write()
            text = _write_null_text(work, folder.job.folder) if config.text else None
            if folder.todo:
                _encode_shards(folder, work, options)
            folder.manifest, folder.report = _manifest(folder, work, text, options)
        refused = [tuple(refusal) for folder in folders for refusal in folder.report.refused]
        _judge(refused, sum(folder.report.taken for folder in folders), options, out)
        for folder in folders:
            if parts == 1 and not folder.report.taken:
                skipped = folder.report.refused
                raise UserError(
                    f"'{folder.job.folder}' gets no records, because all of its {len(skipped):,} samples are "
                    f"skipped, for example '{min(skipped).key}': {min(skipped).text}; repair them."
                )
            write_json(folder.job.folder / features.manifest_name(part, parts), folder.manifest)
            _remove_old_manifests(folder.job.folder, folder.manifest)
    for folder in folders:
        _summary(folder)
    return folders[0].manifest


@dataclasses.dataclass
class _Folder:
    """The work on one feature folder.

    Attributes:
      job: what is planned and finished.
      survey: the samples of the source that belong in the folder.
      all_shards: the shards of all processes.
      shards: those of this process.
      todo: those of them that are not finished.
      common: captions that more than one of the unfinished shards need.
      say: prints a line about the folder.
      manifest, report, lists: set when all shards of this process are finished.
    """

    job: Job
    survey: Survey
    all_shards: tuple[Shard, ...]
    shards: list[Shard]
    todo: list[Shard]
    common: tuple[str, ...]
    say: Callable[[str], None]
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
    report: RefusalReport | None = None
    # The lines of each of `LISTS`.
    lists: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


def _job_options(source: Any, options: Options) -> dict[str, Any]:
    """The options that are part of a job: a folder can only be continued with the same ones."""
    out = {name: getattr(options, name) for name in ("shard_mb", "min_bucket", "max_crop", "min_size")}
    if options.validation_share:  # version 0.1 did not have it
        out["validation_share"] = options.validation_share
    return {"kind": source.kind, **out, **getattr(source, "job_options", {})}


def _held_out(found: Survey, source: Any, share: float, earlier: np.ndarray) -> np.ndarray:
    """Chooses the samples that are held out for validation.

    The choice depends only on the key of a sample's image, so that it stays the same when samples are added.
    If it would hold out none, the image with the smallest hash is held out.

    Args:
      found: all samples.
      source: their source.
      share: share of the images to hold out.
      earlier: hashes of the keys of samples that earlier runs have held out.

    Returns:
      bool [N].
    """
    keys = found.keys
    if hasattr(source, "image_key"):
        keys = np.array([hash_of(source.image_key(index)) for index in range(len(source))], np.uint64)
    draws = uniform(0, keys)
    held_out = (draws < share) | np.isin(found.keys, earlier)
    # All samples of an image, also those that are new.
    held_out = np.isin(keys, keys[held_out])
    if not held_out[found.usable].any() and len(np.unique(keys[found.usable])) > 1:
        held_out = draws == draws[found.usable].min()
    return held_out


def _merging_of(out: Path) -> dict[str, Any]:
    """The options that decide which buckets are merged, as the folder was begun with; empty if it is new."""
    if not os.path.isfile(out / JOB):  # False also for a path that no file can have
        return {}
    begun = read_job(out)["source"]
    return {"min_bucket": begun["min_bucket"], "max_crop": begun.get("max_crop", NEW_OPTIONS["max_crop"])}


def _begun(out: Path) -> dict[str, Any]:
    """The part of the config that a folder was begun with; empty if it is new."""
    return {"features": read_job(out)["config"]} if os.path.isfile(out / JOB) else {}


def _plan(
    job: Job,
    own: Survey,
    work: SampleEncoder,
    options: Options,
    buckets: Sequence[Bucket],
    say: Callable[[str], None],
) -> _Folder:
    """Plans the work on a folder, without writing anything."""
    any_bucket = bucket_table(work.config)[0]

    def contents(indices: Sequence[int]) -> list[bytes]:
        if indices:
            say(f"{len(indices):,} images look changed; reading them to compare their bytes")
        return _map(options.workers, lambda index: _content(work.source, index), indices)

    def usable(indices: Sequence[int]) -> list[bool]:
        say(f"trying {len(indices):,} samples again that were skipped")
        found = _map(options.workers, lambda index: work.read(any_bucket, index), indices)
        return [not isinstance(item, Refused) for item in found]

    part, parts = options.part
    job.plan(
        own,
        work.config,
        shard_mb=options.shard_mb,
        min_bucket=options.min_bucket,
        max_crop=options.max_crop,
        channels=work.channels,
        masked=work.masked,
        image_width=work.image_width,
        whole=parts == 1,
        contents=contents,
        usable=usable,
        buckets=buckets,
    )
    shards = job.shards(own)
    mine = list(shards[part::parts])
    todo = [shard for shard in mine if job.finished(shard.file) is None]
    for note in job.notes:
        say(note)
    if not shards:
        raise UserError(f"no sample is left for '{job.folder}': add images, or change --validation_share.")
    say(
        f"{len(own.usable) + len(own.refused):,} samples, {len(own.refused):,} skipped in planning, "
        f"{len(job.buckets)} buckets, {len(shards)} shards; part {part} of {parts} has {len(mine)}, of which "
        f"{len(mine) - len(todo)} are done"
    )
    unfinished = [shard for shard in shards if job.finished(shard.file) is None]
    common = common_captions(work.source, unfinished, own) if work.config.text and todo else ()
    return _Folder(job, own, shards, mine, todo, common, say)


def _check_encoders(job: Job, config: FeaturesConfig) -> None:
    """Raises a `UserError` if the files of an encoder have changed since the folder was started."""
    path, now = job.folder / WORK / ENCODERS, encoder_files(config)
    before = {}
    if job.started and path.is_file():
        before = read_json(path, f"restore it, or delete '{job.folder}'", {str: str})
    for field in now:
        if now[field] != before.get(field, now[field]):
            raise UserError(
                f"--out '{job.folder}' was started with other files in the folder of {field}: restore them, "
                "or give another folder for the features."
            )
    if before != before | now:
        write_json(path, before | now)


def _map(workers: int, function: Callable[[int], Any], indices: Sequence[int]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(ahead(pool, function, indices, 4 * workers))


def _content(source: Any, index: int) -> bytes:
    try:
        return content_of(source[index])
    except Refused:
        return b""


def _manifest(
    folder: _Folder, work: SampleEncoder, text: dict[str, Any] | None, options: Options
) -> tuple[dict[str, Any], RefusalReport]:
    """Makes the manifest of this part, and writes the lists of skipped samples and of captions."""
    job, part = folder.job, options.part[0]
    entries = []
    for shard in folder.shards:
        entry = job.finished(shard.file)
        if entry is None:
            raise UserError(
                f"shard '{job.folder / shard.file}' has disappeared during the run: run the command again."
            )
        entries.append({"file": shard.file, "bucket": shard.bucket.name, **entry})
    refused = job.refused([shard.file for shard in folder.shards], folder.survey)
    listed = {refusal[0] for refusal in refused}
    if part == 0:
        refused += [list(line) for line in folder.survey.refused.values() if line[0] not in listed]
    for name in LISTS:
        # Version 0.1 listed only truncated captions.
        lines = {line["caption"]: line for entry in entries for line in entry.pop(name, [])}
        folder.lists[name] = list(lines.values())
    for entry in entries:
        del entry["refused"]
    report = _report(refused, sum(entry["records"] for entry in entries))
    file = _refused_file(options)
    report.write(job.folder / file)
    for name, lines in folder.lists.items():
        text_of_lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(job.folder / file.replace("refused", name), text_of_lines)
    samples = sum(len(one.rows) for one in job.rounds)
    manifest = features.make_manifest(
        config=configs.to_dict(work.config),
        source={
            **_job_options(work.source, options),
            "records": samples,
            "fingerprint": job.fingerprint,
        },
        buckets=[work.feature_bucket(bucket) for bucket in job.buckets],
        shards=entries,
        merged=job.merged,
        classes=work.source.classes or (),
        text=text,
        refused=report.counts(),
        **{f"{name}_captions": len(lines) for name, lines in folder.lists.items()},
        part=options.part,
    )
    return manifest, report


def _remove_old_manifests(folder: Path, manifest: dict[str, Any]) -> None:
    """Removes the manifest of an earlier plan that would hide those of a split run."""
    path = folder / features.MANIFEST
    if manifest["part"][1] == 1 or not path.is_file():
        return
    if features.read_manifest(folder)["source"] != manifest["source"]:
        path.unlink()


def _write_null_text(work: SampleEncoder, out: Path) -> dict[str, Any]:
    """Writes null_text.npy, unless an earlier run did, and returns its entry in the manifest."""
    note = out / WORK / NULL_TEXT_NOTE
    if note.is_file() and (out / features.NULL_TEXT_FILE).is_file():
        entry = read_json(note, "delete it and run the command again", features.TEXT_SHAPE)
        if sha256_of_file(out / features.NULL_TEXT_FILE) == entry["sha256"]:
            return entry
    null, length = work.text.null_text()
    if not all_finite(null):
        raise UserError("the text encoder returns NaN for the empty caption: check its weights and dtype.")
    entry = features.write_null_text(out, null)
    entry |= {"width": null.shape[1], "length": null.shape[0], "null_length": length}
    write_json(note, entry)
    return entry


def _encode_shards(folder: _Folder, work: SampleEncoder, options: Options) -> None:
    """Encodes and writes one shard after the other. Images are read ahead, even those of the next shard."""
    todo, say = folder.todo, folder.say
    texts = work.encode_texts(folder.common) if folder.common else {}
    report = RefusalReport(options.max_refused_share)
    progress = Progress(sum(len(shard.indices) for shard in todo), work.config.text, say)
    items = ((shard.bucket, int(index)) for shard in todo for index in shard.indices)
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        ready = ahead(pool, lambda item: work.read(*item), items, 2 * options.image_batch + options.workers)
        try:
            for number, shard in enumerate(todo):
                start = time.monotonic()
                entry = _encode_shard(folder, shard, work, ready, texts, options.image_batch, progress)
                report.take(entry["records"])
                for key, *why in entry["refused"]:
                    report.refuse(key, Refused(*why))
                rate = len(shard.indices) / (time.monotonic() - start)
                last = number + 1 == len(todo)
                left = "" if last else progress.left()
                done = (
                    f"{shard.file}: {entry['records']:,} records, {rate:,.1f}/s, {number + 1} of {len(todo)}"
                )
                say(", ".join(filter(None, (done, left))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encode_shard(
    folder: _Folder,
    shard: Shard,
    work: SampleEncoder,
    ready: Iterator[Any],
    common: dict[str, Text],
    image_batch: int,
    progress: Progress,
) -> dict[str, Any]:
    """Writes a shard, then its entry, which marks it as finished, and returns the entry."""
    refused, samples, stored, contents = [], [], [], []
    for start in range(0, len(shard.indices), image_batch):
        images, batch = [], shard.indices[start : start + image_batch]
        for index in batch:
            item = next(ready)
            if isinstance(item, Refused):
                refused.append([work.source.key(int(index)), item.reason, item.text])
                contents.append(bytes(16))
            else:
                samples.append(item[0])
                images.append(item[1])
                contents.append(item[0].content)
        if images:
            stored += work.encode_images(images)
        progress.images(shard.file, start + len(batch), len(shard.indices), len(batch))

    begin = time.monotonic()
    wanted = dict.fromkeys(caption.text for sample in samples for caption in sample.captions)
    new = [text for text in wanted if text not in common]
    counter = itertools.count(1)
    texts = {text: common[text] for text in wanted if text in common} | (
        work.encode_texts(new, lambda: progress.captions(shard.file, next(counter), len(new))) if new else {}
    )
    progress.captioned(len(shard.indices), time.monotonic() - begin)
    records = (work.record(sample, each, shard.bucket, texts) for sample, each in zip(samples, stored))
    entry = features.write_shard(folder.job.folder / shard.file, records)
    cut = [texts[text].cut for text in wanted if texts[text].cut]
    cleaned = {line.caption: line._asdict() for sample in samples for line in sample.cleaned}
    unknown = [texts[text].unknown for text in wanted if texts[text].unknown]
    entry |= {"refused": refused, "cut": cut, "cleaned": list(cleaned.values()), "unknown": unknown}
    marks = folder.survey.marks[shard.indices]
    read = rows_read(folder.survey.keys[shard.indices], marks, contents)
    folder.job.finish(shard.file, entry, read)
    return entry


def _report(refused: Sequence[Sequence[str]], taken: int) -> RefusalReport:
    report = RefusalReport(max_refused_share=1.0, minimum=sys.maxsize)
    report.take(taken)
    for key, *why in refused:
        report.refuse(key, Refused(*why))
    return report


def _judge(refused: Sequence[Sequence[str]], taken: int, options: Options, out: Path) -> None:
    """Raises a `UserError` if too many samples are skipped, and then lists all of them in a file."""
    report = _report(refused, taken)
    report.max_refused_share = options.max_refused_share
    try:
        report.check()
    except UserError as error:
        path = out / _refused_file(options)
        report.write(path)
        raise UserError(f"{error}; '{path}' lists all of them") from None


def _refused_file(options: Options) -> str:
    part, parts = options.part
    return "refused.jsonl" if parts == 1 else f"refused-{part:05d}-of-{parts:05d}.jsonl"


def _summary(folder: _Folder) -> None:
    from pixart_jax.encoders.text import CutCaption, UnknownCaption, cut_summary, unknown_summary

    manifest, out, say = folder.manifest, folder.job.folder, folder.say
    say(folder.report.table())
    counts = collections.Counter()
    for shard in manifest["shards"]:
        counts[shard["bucket"]] += shard["records"]
    for bucket in folder.job.buckets:
        records = counts[bucket.name]
        say(describe_bucket(bucket, records, manifest["merged"], folder.all_shards, folder.survey))
    cut, cleaned, unknown = (folder.lists[name] for name in LISTS)
    if cut:
        say(cut_summary([CutCaption(**line) for line in cut], manifest["text"]["length"], "cut.jsonl"))
    if cleaned:
        say(cleaning_summary([CleanedCaption(**line) for line in cleaned], "cleaned.jsonl"))
    if unknown:
        say(unknown_summary([UnknownCaption(**line) for line in unknown], "unknown.jsonl"))
    size = sum(shard["bytes"] for shard in manifest["shards"])
    say(f"{sum(counts.values()):,} records, {size / 2**20:,.1f} MiB in {out}")


# ------------------------------------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Options, CommandFlags):
    config: ConfigDict | None = flag(
        None, "Stage to make features for, from configs/. train --help lists its fields."
    )
    images: str | None = flag(
        None,
        "Folder, file, pattern or TFDS name; 'digits', 'shapes' or 'openmoji' for the built-in data sets.",
        path="images",
    )
    out: str | None = flag(None, "Folder for the features; unfinished work in it is resumed.", path="output")
    source: str = flag("auto", f"Kind of source: {', '.join(KINDS)}.")
    split: str | None = flag(
        None,
        "Split: train, test or all (digits); train, test or novel (shapes); train, validation, compositions "
        "or all (openmoji); a TFDS split; or train, validation, test or all, if files or folders are named "
        "so (parquet, webdataset, imagefolder).",
    )
    captions: str | None = flag(
        None, "Take the captions from this file, written by the caption command.", path=True
    )
    caption: str | None = flag(
        None, "Caption of all images, such as 'a photo of sks dog', instead of captions of their own."
    )
    caption_fields: str = flag(
        "", "Fields that hold captions, as NAME[=WEIGHT],...; default: the usual names."
    )
    source_option: tuple[str, ...] = flag(
        (), "NAME=VALUE for the source, such as image_root=DIR or key_field=id.", path=True
    )
    masks: str | None = flag(
        None,
        "Folder of masks, white where the loss counts and black where it does not. The mask of a/b.jpg is "
        "a/b-masklabel.png if the folder has such names, else a/b.png; the suffix is that of any image.",
        path=True,
    )
    flip: bool = flag(False, "Also encode the mirror image of every crop (#flip in its key).")
    crops: int = flag(
        1,
        "Number of records of each image, with crops at random positions (#crop1, … in the key); 1 is the "
        "centre crop. An image of exactly the aspect ratio of its bucket is not cropped.",
        minimum=1,
        maximum=MOST_REPEATS,
    )
    crop_seed: int = flag(0, "Seed of the random crops.", minimum=0, maximum=LARGEST_SEED)
    shard: str | None = flag(None, "I/N: do part I of N parts of the work, counted from 0.")
    distributed: bool = flag(
        False, "Start jax.distributed and split the work over its processes (Slurm, TPU pod)."
    )
    features: str | None = flag(
        None, "verify: the folder to check. With --images also against the images.", path=True
    )


def verify_command(folder: str, given: Flags | None = None) -> int:
    """Prints every fault of a folder and of the held-out features in it; returns the exit status.

    Args:
      folder: the feature folder.
      given: the flags, if they name the images to compare the features with.
    """
    held_out = Path(folder) / VALIDATION
    faults = {each: verify(each) for each in [folder, *([str(held_out)] if held_out.is_dir() else [])]}
    for lines in faults.values():
        print(*lines, sep="\n", end="\n" if lines else "")
    if given is not None and given.images:
        for each, lines in faults.items():
            compared = _compare(each, given)
            # An image without features is a fault of both folders.
            new = [line for line in compared.faults if all(line not in known for known in faults.values())]
            print(*new, compared.summary, sep="\n")
            lines += new
    for each, lines in faults.items():
        shards = features.read_manifest(each)["shards"]
        records = sum(shard["records"] for shard in shards)
        print(f"{each}: {len(shards)} shards, {records:,} records, {len(lines)} faults")
    return EXIT_USAGE if any(faults.values()) else 0


def _compare(folder: str, given: Flags) -> Compared:
    """Compares a folder with the images that the flags name."""
    manifest = features.read_manifest(folder)
    config = configs.from_dict(manifest["config"], FeaturesConfig, "features.")
    made = {name: manifest["source"].get(name, NEW_OPTIONS[name]) for name in VIEW_OPTIONS}
    if manifest["source"].get("masks", False) != bool(given.masks):
        had = "with" if given.masks is None else "without"
        raise UserError(
            f"'{folder}' was made {had} masks: {'give' if had == 'with' else 'leave out'} --masks."
        )
    common = manifest["source"].get("caption")
    options = {**({"caption": common} if common else {}), **_source_options(given)}
    source = open_images(given.source, given.images, config, options, masks=given.masks, **made)
    return verify_images(folder, source, config, given.workers)


def _source_options(given: Flags) -> dict[str, Any]:
    """The options of the source that the flags give."""
    named: dict[str, Any] = dict(parse_options(given.source_option))
    names = ("split", "captions", "caption")
    named |= {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if given.caption_fields:
        named["caption_fields"] = parse_caption_fields(given.caption_fields)
    return named


def main(given: Flags) -> int:
    import jax

    from pixart_jax.training.settings import apply_settings

    if given.words:
        verify_mode = given.mode({"verify": verify_command})
        given.require("features", hint="give the folder to verify.")
        given = fetched(given)
        return verify_mode(given.features, given)
    given.require("config", "images", "out")
    if os.path.isdir(given.out) and os.path.isdir(given.images) and os.path.samefile(given.out, given.images):
        raise UserError(
            f"--out '{given.out}' is the folder of the images: give another folder for the features, such as "
            f"--out=features/{Path(given.images).resolve().name}."
        )
    stage = configs.from_config_dict(given.config)
    part = parse_part(given.shard) if given.shard else (0, 1)
    apply_settings()
    if given.distributed:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed: jax.distributed cannot start ({str(error).splitlines()[0]}). Start the "
                "command with srun or on a TPU pod, or split the work with --shard=I/N."
            ) from error
        part = (jax.process_index(), jax.process_count())
    given = fetched(given)
    stage = configs.with_pinned_paths(stage, _begun(Path(given.out)))
    config = stage.features
    # A bucket needs no more images than a batch has. A folder keeps the merges that it was begun with.
    merging = {"min_bucket": min(stage.data.batch_size, MIN_BUCKET)} | _merging_of(Path(given.out))
    merging = {name: value for name, value in merging.items() if name not in given.present}
    options = Options(**{**values_for(Options, given), **merging, "part": part})
    views = {name: getattr(given, name) for name in ("masks", *VIEW_OPTIONS)}
    source = open_images(given.source, given.images, config, _source_options(given), **views)
    precompute(source, config, given.out, options)
    return 0


if __name__ == "__main__":
    run(main, Flags)
