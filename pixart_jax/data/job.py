"""What `precompute` has planned and read, kept in the feature folder so that the work can be continued.

    job.json               the config, the options, and the rounds of the work
    work/plan-HASH.npy     the samples of a round, in the order of their records
    work/SHARD.json        a finished shard: its entry in the manifest, skipped samples, truncated captions
    work/SHARD.npy         a finished shard: which image files were read for it
    work/encoders.json     hashes of the files of the encoders

A round is a set of samples that were planned together. The first round has all samples of the source. Samples
that are added later, or repaired, form another round with shards of its own, so that nothing is encoded twice
and the records that exist keep their positions.

A finished shard is bound to what was read for it: captions, labels, sizes, and the bytes of the images. The
samples of other shards can still change or disappear. As long as no shard of a round with any record has been
finished, the round is planned again; if no round of the folder has one, the config may change as well.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart_jax.data import features
from pixart_jax.data.buckets import Bucket
from pixart_jax.data.planning import PrecomputePlan, Shard, Survey, hash_of, make_plan
from pixart_jax.data.records import decode_record
from pixart_jax.errors import UserError
from pixart_jax.files import sha256_of_bytes, sha256_of_json, write_bytes, write_json
from pixart_jax.readers import COUNT, read_array, read_json

if TYPE_CHECKING:  # the config imports the models; `data` must not
    from pixart_jax.config import FeaturesConfig

JOB = "job.json"
WORK = "work"
# Folder of the held-out features, in the folder of the others.
VALIDATION = "validation"
# In `WORK`: the entry of null_text.npy in the manifest.
NULL_TEXT_NOTE = "null_text.json"

# A sample of a round: hashes as in `planning.Survey`, and the position of its shard in the round.
PLANNED = np.dtype([("key", "<u8"), ("facts", "<u8"), ("shard", "<u4")])
# A sample of a finished shard: hashes as in `planning.Survey`, and `planning.content_of` its image. The
# content is 0 if the sample was skipped, or if version 0.1, which did not record it, wrote the shard.
READ = np.dtype([("key", "<u8"), ("mark", "<u8"), ("content", "<u8", 2)])

# Options that version 0.1 did not have, with the values that correspond to what it did.
NEW_OPTIONS = {
    **{"validation_share": 0.0, "max_crop": 1.0},
    **{"masks": False, "flip": False, "crops": 1, "crop_seed": 0, "caption": None},
}
# A sample that was skipped for one of these reasons is tried again, even if its file looks unchanged.
PASSING = ("missing_image", "unreadable")


# What `read_job` accepts. Version 0.1 stored no rounds.
_JOB_SHAPE = {
    "config": {"text_encoder": dict},
    "source": {"min_bucket": COUNT, "max_crop?": float, "fingerprint?": str},
    "rounds?": [
        {
            **{"samples": COUNT, "sha256": re.compile("[0-9a-f]{64}"), "merged": {str: str}},
            "shards": [(features.SHARD_FILE, features.SIDE, features.SIDE, features.RATIO)],
        }
    ],
}
_LIST_SHAPE = [{"caption": str}]
_ENTRY_SHAPE = {
    **{"records": COUNT, "bytes": COUNT, "refused": [(str, str, str)]},
    **{"cut?": _LIST_SHAPE, "cleaned?": _LIST_SHAPE, "unknown?": _LIST_SHAPE},
}


def read_job(folder: Path) -> dict[str, Any]:
    """Reads job.json.

    Raises:
      UserError: it is missing or damaged.
    """
    # Lenient, because the values of the config are only compared.
    return read_json(folder / JOB, f"restore it, or delete '{folder}'", _JOB_SHAPE, lenient=True)


def read_rows(path: Path) -> np.ndarray:
    """What was read for a shard, `READ` [n], from its file.

    Raises:
      UserError: the file is missing or damaged.
    """
    return _rows(path, READ, "restore it, or delete the shard and run precompute")


def _rows(path: Path, dtype: np.dtype, fix: str) -> np.ndarray:
    rows = read_array(path, fix)
    if rows.dtype != dtype or rows.ndim != 1:
        raise UserError(f"'{path}' is {rows.dtype} {list(rows.shape)}, and must be {dtype} [n]: {fix}.")
    return rows


@dataclasses.dataclass
class Round:
    """Samples that were planned together.

    Attributes:
      shards: file name and bucket of every shard.
      merged: as in `planning.PrecomputePlan`.
      rows: the samples, `PLANNED` [n].
    """

    shards: tuple[tuple[str, Bucket], ...]
    merged: dict[str, str]
    rows: np.ndarray

    def entry(self) -> dict[str, Any]:
        """Describes the round in job.json."""
        shards = [[file, bucket.height, bucket.width, bucket.ratio_key] for file, bucket in self.shards]
        digest = sha256_of_bytes(self.rows.tobytes())
        return {"samples": len(self.rows), "sha256": digest, "merged": self.merged, "shards": shards}

    def samples(self) -> Iterator[tuple[str, Bucket, np.ndarray]]:
        """Yields the file name, the bucket and the samples, `PLANNED` [n], of every shard."""
        ends = np.searchsorted(self.rows["shard"], np.arange(len(self.shards)), side="right")
        for (file, bucket), rows in zip(self.shards, np.split(self.rows, ends[:-1])):
            yield file, bucket, rows

    @classmethod
    def of(cls, plan: PrecomputePlan, survey: Survey) -> Round:
        """Returns the round of a new plan."""
        rows = [
            _array(
                PLANNED,
                len(s.indices),
                key=survey.keys[s.indices],
                facts=survey.facts[s.indices],
                shard=number,
            )
            for number, s in enumerate(plan.shards)
        ]
        shards = tuple((shard.file, shard.bucket) for shard in plan.shards)
        return cls(shards, plan.merged, np.concatenate([np.empty(0, PLANNED), *rows]))


class Job:
    """The work on one feature folder.

    Attributes:
      folder: the feature folder.
      rounds: the rounds.
      notes: lines for the user about changes of the plan.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]):
        """Reads what earlier runs have left.

        Args:
          folder: the feature folder.
          config: the features config, as plain values.
          options: kind of source, and the options that decide what the shards contain.

        Raises:
          UserError: the folder has records that were made with another config or other options.
        """
        self.folder = folder
        self.notes: list[str] = []
        self._config, self._options = dict(config), dict(options)
        self.rounds: list[Round] = []
        self._entries: list[dict[str, Any]] = []
        self._version_1: str | None = None
        # Shards of plans that are replaced, until `write`.
        self._stale: list[str] = []
        stored = read_job(folder) if (folder / JOB).exists() else None
        files = [path.name.removesuffix(".json") for path in (folder / WORK).glob("*.arrayrecord.json")]
        self._written = {file for file in files if self._entry(file)["records"]}
        if stored is None or not self._written:
            self._stale = [*files, *(path.name for path in folder.glob("*.arrayrecord"))]
            return
        self._check(stored)
        if "rounds" not in stored:
            self._version_1 = stored["source"].get("fingerprint", "")
            return
        planned = [file for entry in stored["rounds"] for file, *_ in entry["shards"]]
        if len(set(planned)) != len(planned):  # encoding one of two shards would overwrite the other
            raise UserError(
                f"'{folder / JOB}' is damaged: it names a shard twice; restore it or delete '{folder}'."
            )
        for entry in stored["rounds"]:
            path, fix = folder / WORK / _plan_file(entry), f"restore it or delete '{folder}'"
            rows = np.array(_rows(path, PLANNED, fix))
            if (
                sha256_of_bytes(rows.tobytes()) != entry["sha256"]
                or len(rows) != entry["samples"]
                or (rows["shard"] >= len(entry["shards"])).any()
            ):
                raise UserError(f"'{path}' is damaged: it is not the plan that {JOB} names; {fix}.")
            shards = tuple((file, Bucket(*bucket)) for file, *bucket in entry["shards"])
            self.rounds.append(Round(shards, entry["merged"], rows))
        while self.rounds and not any(file in self._written for file, _ in self.rounds[-1].shards):
            self._stale += [file for file, _ in self.rounds.pop().shards]

    def _check(self, stored: Mapping[str, Any]) -> None:
        config, before = self._config, stored["config"]
        encoder = features.NEW_TEXT_ENCODER_FIELDS | before["text_encoder"]
        for title, now, then in (
            ("features", config, features.NEW_FIELDS | dict(before)),
            ("features.text_encoder", config["text_encoder"], encoder),
        ):
            for field in now:
                if now[field] != then.get(field) and not isinstance(now[field], dict):
                    raise UserError(
                        f"--out '{self.folder}' was started with {title}.{field}={then.get(field)}, now "
                        f"{now[field]}; restore it or give another folder."
                    )
        then_options = NEW_OPTIONS | stored["source"]
        for field, now in (NEW_OPTIONS | self._options).items():
            then = then_options.get(field)
            if now != then:
                raise UserError(
                    f"--out '{self.folder}' was started with {field}={then}, now {now}: restore it, or give "
                    "another folder."
                )

    @property
    def started(self) -> bool:
        """Whether the folder has a shard with records, or had one."""
        return bool(self._written)

    @property
    def keys(self) -> np.ndarray:
        """Hashes of the keys of all samples that are planned, uint64 [n]."""
        return np.concatenate([np.empty(0, np.uint64), *(one.rows["key"] for one in self.rounds)])

    # ------------------------------------------------------------------------------------ finished shards

    def _entry(self, file: str) -> dict[str, Any] | None:
        """The entry of a shard that was finished once, or None."""
        path = self.folder / WORK / f"{file}.json"
        if not path.exists():
            return None
        fix = f"restore it, or delete it and '{self.folder / file}', and run the command again"
        return read_json(path, fix, _ENTRY_SHAPE, lenient=True)

    def finished(self, file: str) -> dict[str, Any] | None:
        """The entry of a shard that is finished, or None.

        A shard that was deleted is not finished, nor is one without records of a round that is planned again.
        """
        entry = self._entry(file) if file not in self._stale else None
        try:
            size = (self.folder / file).stat().st_size
        except FileNotFoundError:
            size = 0
        return entry if entry and size == entry["bytes"] else None

    def _records(self, file: str) -> int:
        """Number of records of a shard; 0 if it is not finished."""
        return (self.finished(file) or {"records": 0})["records"]

    def finish(self, file: str, entry: Mapping[str, Any], read: np.ndarray) -> None:
        """Marks a shard as finished.

        Args:
          file: the shard.
          entry: its entry in the manifest, with the samples that were skipped and the truncated captions.
          read: what was read for it, `READ` [n].

        Raises:
          UserError: another process has planned the work again since this one has started.
        """
        stored = read_job(self.folder)
        if stored.get("rounds", [])[: len(self._entries)] != self._entries:
            raise UserError(
                f"--out '{self.folder}': another process found other images and has planned the work again; "
                "run the same command again."
            )
        _write_array(self.folder / WORK / f"{file}.npy", read)
        write_json(self.folder / WORK / f"{file}.json", entry)

    def read(self, file: str, count: int) -> np.ndarray:
        """What was read for a finished shard of `count` samples, `READ` [count].

        Raises:
          UserError: the file is missing or damaged.
        """
        path = self.folder / WORK / f"{file}.npy"
        fix = f"restore it, or delete '{self.folder / file}' and run the command again"
        rows = np.array(_rows(path, READ, fix))
        if len(rows) != count:
            raise UserError(f"'{path}' has {len(rows)} rows, and its shard {count} samples: {fix}.")
        return rows

    def skipped(self, file: str) -> dict[int, list[str]]:
        """[key, reason, text] of the samples that were skipped in a shard, by the hash of the key."""
        return {hash_of(line[0]): line for line in (self.finished(file) or {"refused": ()})["refused"]}

    # ----------------------------------------------------------------------------------------------- plan

    def plan(
        self,
        survey: Survey,
        config: FeaturesConfig,
        *,
        shard_mb: int,
        min_bucket: int,
        max_crop: float,
        channels: int,
        whole: bool,
        contents: Callable[[Sequence[int]], Sequence[bytes]],
        usable: Callable[[Sequence[int]], Sequence[bool]],
        buckets: Sequence[Bucket] = (),
        masked: bool = False,
        image_width: int = 0,
    ) -> None:
        """Compares the source with the earlier rounds, and adds a round for the samples that are new.

        Args:
          survey: what the source has now.
          config, shard_mb, min_bucket, max_crop, channels, masked, image_width: as for `planning.make_plan`.
          whole: whether this process does the whole work. If not, a round is only added when all shards of
            the earlier rounds are finished, so that all processes add the same.
          contents: returns `planning.content_of` each of some samples.
          usable: tries to decode some samples again that were skipped before.
          buckets: for held-out samples, the buckets of the others, which new samples join in any case.

        Raises:
          UserError: a sample of a finished shard has changed, or is gone.
        """
        sizes: dict[str, Any] = dict(shard_mb=shard_mb, min_bucket=min_bucket, max_crop=max_crop)
        sizes |= dict(channels=channels, masked=masked, image_width=image_width)
        if self._version_1 is not None:
            self._adopt(survey, config, sizes)
        self._check_finished(survey, contents)
        dropped = self._drop_from_unfinished(survey)
        files = [(file, bucket) for one in self.rounds for file, bucket in one.shards]
        ready = whole or all(self.finished(file) for file, _ in files)
        new = survey.usable[~np.isin(survey.keys[survey.usable], self.keys)]
        again = self._worth_another_try(survey) if ready else np.empty(0, np.int64)
        again = again[np.array(usable(again.tolist()), bool)] if len(again) else again
        new = np.sort(np.concatenate([new, again]))
        lines = [f"{dropped:,} samples of unfinished shards have changed or are gone"] if dropped else []
        if self.rounds and len(new):
            later = "" if ready else ", which a run after all parts are finished will encode"
            lines.append(f"{len(new):,} new samples{later}")
        self.notes = lines
        if len(new) and ready:
            first = {bucket: sum(b == bucket for _, b in files) for _, bucket in files}
            existing = dict.fromkeys((*first, *buckets), 0)
            for file, bucket in files:
                existing[bucket] += self._records(file)
            plan = make_plan(survey, config, **sizes, members=new, existing=existing, first_shards=first)
            self.rounds.append(Round.of(plan, survey))
            if not buckets:  # held-out samples form no batches of training
                self.notes += plan.notes

    def _adopt(self, survey: Survey, config: FeaturesConfig, sizes: Mapping[str, int]) -> None:
        """Makes the round of a folder that version 0.1 began, which stored only a hash of the samples."""
        plan = make_plan(survey, config, **sizes)
        files = {shard.file: len(shard.indices) for shard in plan.shards}
        for file in self._written:
            entry = self._entry(file)
            same = files.get(file) == entry["records"] + len(entry["refused"])
            if survey.fingerprint != self._version_1 or not same:
                raise UserError(
                    f"--out '{self.folder}' was started with other images, captions or sizes, by version "
                    "0.1, which did not record them: run the command once with the source as it was, and "
                    "then again with the new one, or give another folder."
                )
        self.rounds = [Round.of(plan, survey)]
        for shard in plan.shards:
            if self.finished(shard.file):
                own = shard.indices
                marks = _array(READ, len(own), key=survey.keys[own], mark=survey.marks[own])
                _write_array(self.folder / WORK / f"{shard.file}.npy", marks)

    def _check_finished(self, survey: Survey, contents: Callable[[Sequence[int]], Sequence[bytes]]) -> None:
        """Compares the samples of finished shards with the source. Updates the marks of equal files."""
        # Shard, position of the record in it, and what has changed.
        changed: list[tuple[str, int, str]] = []
        count = 0
        suspects: list[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        for file, rows in self._finished_rows():
            read, index = self.read(file, len(rows)), survey.find(rows["key"])
            taken = ~np.isin(rows["key"], np.array(list(self.skipped(file)), np.uint64))
            records = np.cumsum(taken) - 1
            count += int(taken.sum())
            here = taken & (index >= 0)
            same = here & (survey.facts[index] == rows["facts"])
            for what, found in (
                ("is gone or cannot be used", taken & ~here),
                ("has another caption, label or size", here & ~same),
            ):
                changed += [(file, record, what) for record in records[found].tolist()]
            other = np.flatnonzero(same & (survey.marks[index] != read["mark"]))
            if len(other):
                suspects.append((file, read, records, other, index[other]))
        found = iter(contents([int(i) for *_, index in suspects for i in index]))
        for file, read, records, other, index in suspects:
            for row, position in zip(other.tolist(), index.tolist()):
                content = np.frombuffer(next(found) or bytes(16), "<u8")
                if np.array_equal(content, read["content"][row]) and content.any():
                    read["mark"][row] = survey.marks[position]
                    continue
                what = "has another image" if read["content"][row].any() else "may have another image"
                what += " or mask" if self._options.get("masks") else ""
                changed.append((file, int(records[row]), what if content.any() else "cannot be read"))
            if not changed:
                _write_array(self.folder / WORK / f"{file}.npy", read)
        if changed:
            file, record, what = min(changed)
            key = self._key_of(file, record)
            shards = sorted({file for file, *_ in changed})
            raise UserError(
                f"--out '{self.folder}' was started with other images, captions or sizes: {len(changed):,} "
                f"of {count:,} samples that are encoded have changed since, for example '{key}' {what}; "
                "restore the source as it was, give another folder, or, to encode them again, delete their "
                f"shards ({len(shards):,}): {', '.join(shards[:3])}{', …' * (len(shards) > 3)}."
            )

    def _finished_rows(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the name and the samples of every finished shard."""
        for one in self.rounds:
            for file, _, rows in one.samples():
                if self.finished(file) is not None:
                    yield file, rows

    def _key_of(self, file: str, row: int) -> str:
        """The key of a record, which is stored in the shard."""
        return decode_record(features.open_reader(self.folder / file).read([row])[0]).key

    def _drop_from_unfinished(self, survey: Survey) -> int:
        """Removes samples that have changed or are gone from shards that are not finished."""
        dropped = 0
        for one in self.rounds:
            done = [self.finished(file) is not None for file, _ in one.shards]
            index = survey.find(one.rows["key"])
            same = (index >= 0) & (survey.facts[index] == one.rows["facts"])
            kept = same | np.array(done, bool)[one.rows["shard"]]
            dropped += int((~kept).sum())
            one.rows = one.rows[kept]
        return dropped

    def _worth_another_try(self, survey: Survey) -> np.ndarray:
        """Positions of samples that were skipped in a finished shard, but may be usable now."""
        found: dict[int, int] = {}  # hash of the key -> position; a later round replaces an earlier one
        for file, rows in self._finished_rows():
            read = self.read(file, len(rows))
            for key in rows["key"].tolist():
                found.pop(key, None)
            for key, (_, reason, _) in self.skipped(file).items():
                (index,) = survey.find(np.array([key], np.uint64)).tolist()
                row = np.flatnonzero(rows["key"] == key)
                if index < 0 or not len(row):
                    continue
                before, now = rows["facts"][row[0]], survey.facts[index]
                if reason in PASSING or before != now or read["mark"][row[0]] != survey.marks[index]:
                    found[key] = index
        return np.array(sorted(found.values()), np.int64)

    def write(self) -> None:
        """Writes job.json and the plans, so that other processes and later runs work on the same shards.

        Removes what belongs to a plan that has been replaced.
        """
        job = {
            "config": self._config,
            "source": self._options,
            "rounds": [one.entry() for one in self.rounds],
        }
        self._entries = job["rounds"]
        same = (self.folder / JOB).exists() and read_job(self.folder) == job
        work = self.folder / WORK
        if not self._written:
            (work / NULL_TEXT_NOTE).unlink(missing_ok=True)
        if not same:
            for file in self._stale:
                for path in (self.folder / file, *(work / f"{file}{end}" for end in (".json", ".npy"))):
                    path.unlink(missing_ok=True)
        # If the plan is the same, other processes may be working on it: their shards stay.
        self._stale = []
        if same:
            return
        for one, entry in zip(self.rounds, self._entries):
            _write_array(work / _plan_file(entry), one.rows)
        write_json(self.folder / JOB, job)
        plans = set(map(_plan_file, self._entries))
        for path in work.glob("plan-*.npy"):
            if path.name not in plans:
                path.unlink(missing_ok=True)

    def shards(self, survey: Survey) -> tuple[Shard, ...]:
        """All shards of all rounds. Positions are -1 for samples that are no longer in the source."""
        return tuple(
            Shard(bucket, file, survey.find(rows["key"]))
            for one in self.rounds
            for file, bucket, rows in one.samples()
        )

    def refused(self, files: Sequence[str], survey: Survey) -> list[list[str]]:
        """[key, reason, text] of the samples that are skipped in these shards, if they are still skipped.

        A sample that is gone, or that was encoded in a later round, is left out.
        """
        last: dict[int, tuple[str, list[str]]] = {}
        for one in self.rounds:
            done = [(file, rows) for file, _, rows in one.samples() if self.finished(file)]
            # A sample that a later round has again replaces the one that was skipped.
            again = np.concatenate([np.empty(0, np.uint64), *(rows["key"] for _, rows in done)])
            for key in again[np.isin(again, np.array(list(last), np.uint64))].tolist():
                del last[key]
            for file, _ in done:
                last |= {key: (file, line) for key, line in self.skipped(file).items()}
        now = {hash_of(line[0]): list(line) for line in survey.refused.values()}
        keys = np.array(list(last), np.uint64)
        present = keys[np.isin(keys, survey.keys)].tolist()
        return [now.get(key, last[key][1]) for key in present if last[key][0] in files]

    @property
    def fingerprint(self) -> str:
        """Hash of the samples of all rounds and of the shards that they belong to."""
        return sha256_of_json(self._entries)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets of all shards, by rising ratio."""
        found = {bucket for one in self.rounds for _, bucket in one.shards}
        return tuple(sorted(found, key=lambda bucket: (bucket.ratio, bucket.height, bucket.width)))

    @property
    def merged(self) -> dict[str, str]:
        """As in `planning.PrecomputePlan`, for all rounds."""
        return {name: to for one in self.rounds for name, to in one.merged.items()}


def _plan_file(entry: Mapping[str, Any]) -> str:
    """Name of the file with the samples of a round."""
    return f"plan-{entry['sha256'][:16]}.npy"


def _array(dtype: np.dtype, size: int, **columns: Any) -> np.ndarray:
    """A structured array of these columns; the others are 0."""
    out = np.zeros(size, dtype)
    for name, column in columns.items():
        out[name] = column
    return out


def rows_read(keys: np.ndarray, marks: np.ndarray, contents: Sequence[bytes]) -> np.ndarray:
    """Makes the `READ` array of a shard; `contents` has 16 zero bytes for skipped samples."""
    content = np.frombuffer(bytearray().join(contents), "<u8").reshape(-1, 2)
    return _array(READ, len(keys), key=keys, mark=marks, content=content)


def _write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())
