"""Batches of feature records, read ahead on threads; `order.py` says which records they are.

The global batch of a step is computed, not iterated to. A resumed run, on any number of hosts, therefore goes
on with the batches of the run it continues; each process reads its own rows of them. The only state is the
step.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import ml_dtypes
import numpy as np

from pixart_jax.data.buckets import Bucket
from pixart_jax.data.order import SampleOrder, uniform
from pixart_jax.data.records import ArraySpec, FeatureBucket, Record, record_fault
from pixart_jax.errors import UserError, did_you_mean, one_of
from pixart_jax.files import sha256_of_json

ASPECT_RATIOS = ("true", "bucket")
# Arrays that a batch always has, and those that it has if they are asked for; the others are extra arrays.
_ALWAYS = ("latent_mean", "latent_std", "index")
_OPTIONAL = ("text", "text_mask", "label", "image_size", "aspect_ratio")
# Features made with different values of these must not meet in one run.
_MUST_AGREE = ("codec", "vae", "latent_scale", "text_encoder")


class Position(NamedTuple):
    """Where a record is: which dataset, which of its buckets, which record of that."""

    dataset: int
    bucket: int
    record: int


class Dataset(Protocol):
    """What records are read from: a folder of features (`FeatureDataset`), or whatever else answers like one.

    Attributes:
      path: where it is, for messages.
      config: the features config that the records follow, as plain values.
      buckets: that hold records.
      text_length, text_width: S and D; 0 and 0 without text.
      extras: names of the extra arrays that the records have, in all buckets.
      fingerprint: hash of everything that decides what a position holds.
    """

    path: Path
    config: Mapping[str, Any]
    buckets: Sequence[FeatureBucket]
    text_length: int
    text_width: int
    extras: Sequence[str]
    fingerprint: str

    def __len__(self) -> int:
        """Records of all buckets."""

    def read(self, bucket: int, positions: Sequence[int]) -> list[Record]:
        """Reads records of one bucket, in the order asked. For any thread.

        Args:
          bucket: index into `buckets`.
          positions: in the bucket.

        Raises:
          UserError: a record cannot be read.
        """

    def where(self, bucket: int, position: int) -> tuple[str, int]:
        """The file that a record is in, and its row there."""

    def refusal(self, file: str, row: int, fault: str, key: str | None = None) -> UserError:
        """The error for a record that cannot be used."""

    def null_text(self) -> np.ndarray:
        """The text encoder's output for "", float32 [S, D] over all positions.

        Raises:
          UserError: there is no text, or it cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class FeatureBatch:
    """One process's rows of a global batch; all images have the size of one bucket.

    Attributes:
      step: of the batch.
      bucket: image size in pixels.
      arrays: by name, for b rows, latent h, w, C, S text positions and width D; always:
        latent_mean, latent_std  float32 [b, h, w, C], unscaled; pixels as x / 127.5 - 1 with std 0
        index                    uint32 [b], number of the draw in the run: step * B + row in the global batch
        weight                   float32 [b], 0 on padding rows (`validation_batches` only)
        and if asked for:
        text                     bfloat16 or float32 [b, S, D], 0 past the caption's end
        text_mask                bool [b, S], True for a token
        label                    int32 [b], -1 for none
        image_size               float32 [b, 2], (height, width) of the original in pixels
        aspect_ratio             float32 [b, 1], height / width
        NAME                     [b, ...], an extra array of the records, with the dtype it is stored in
      keys: of the records.
    """

    step: int
    bucket: Bucket
    arrays: dict[str, np.ndarray]
    keys: list[str]


class FeatureLoader:
    """Reads the batches of a training run.

    Attributes:
      buckets: of all datasets together.
      fingerprint: hash of everything but the step that decides a batch.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float] | None = None,
        *,
        batch_size: int,
        seed: int,
        arrays: Sequence[str],
        text_length: int,
        aspect_ratio: str = "true",
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 4,
        prefetch: int = 4,
    ):
        """Plans the run; reads no record.

        Args:
          datasets: one or more.
          weights: how often each is drawn from, any scale; None for in proportion to their records.
          batch_size: samples per step, over all processes.
          seed: of the order and of the choice among captions.
          arrays: names of the arrays that a batch must have besides latent_mean, latent_std and index; see
            `FeatureBatch`.
          text_length: S of the batches, at least the datasets'.
          aspect_ratio: 'true' (height / width of the bucket) or 'bucket' (the official table's key).
          process_index, process_count: which rows are read here.
          threads, prefetch: batches read at the same time, and kept ready.

        Raises:
          UserError: datasets that do not fit each other or the arguments, or lack an array.
        """
        self.datasets = list(datasets)
        if not self.datasets:
            raise UserError("0 feature folders: give at least one.")
        weights = [float(len(dataset)) for dataset in self.datasets] if weights is None else list(weights)
        _check_arguments(self.datasets, weights, batch_size, text_length, aspect_ratio, process_count)
        _check_arrays(self.datasets, arrays, text_length)
        self.batch_size, self.text_length = batch_size, text_length
        self._rows = range(
            batch_size * process_index // process_count, batch_size * (process_index + 1) // process_count
        )
        self._seed, self._threads, self._prefetch = seed, threads, prefetch
        self._reader = _Reader(arrays, text_length, aspect_ratio, _text_dtype(self.datasets))

        found: dict[Bucket, FeatureBucket] = {}
        for dataset in self.datasets:
            for entry in dataset.buckets:
                one = found.setdefault(entry.bucket, entry)
                if one.latent_shape != entry.latent_shape:
                    raise UserError(
                        f"feature folder '{dataset.path}' has latents {list(entry.latent_shape)} for "
                        f"{entry.bucket.name}, another has {list(one.latent_shape)}; make both with one codec"
                    )
                for name in arrays:
                    if one.extras.get(name) != entry.extras.get(name):
                        raise UserError(
                            f"feature folder '{dataset.path}' has '{name}' of {entry.bucket.name} as "
                            f"{_words(entry.extras[name])}, another as {_words(one.extras[name])}; make both "
                            "alike"
                        )
        self.buckets = sorted(found.values(), key=lambda entry: (entry.bucket.ratio, entry.bucket.name))
        # Index of each bucket in each dataset, None where it has none of that size.
        self._own = [
            {entry.bucket: i for i, entry in enumerate(dataset.buckets)} for dataset in self.datasets
        ]
        counts = [
            [dataset.buckets[own[entry.bucket]].count if entry.bucket in own else 0 for entry in self.buckets]
            for dataset, own in zip(self.datasets, self._own)
        ]
        self.order = SampleOrder(counts, weights, batch_size, seed)
        parts = [seed, batch_size, text_length, aspect_ratio, weights, [d.fingerprint for d in self.datasets]]
        self.fingerprint = sha256_of_json(parts)

    def __repr__(self) -> str:
        records = sum(map(len, self.datasets))
        return (
            f"FeatureLoader({records:,} records, {len(self.buckets)} buckets, batches of {self.batch_size})"
        )

    def positions(self, step: int, rows: range | None = None) -> list[Position]:
        """Which records make rows of the global batch of a step (all rows by default); reads nothing.

        A `Position` holds the index of the bucket in its dataset.
        """
        bucket, datasets, records = self.order.batch(step, range(self.batch_size) if rows is None else rows)
        own = [mine.get(self.buckets[bucket].bucket) for mine in self._own]
        return [Position(d, own[d], record) for d, record in zip(datasets.tolist(), records.tolist())]

    def load(self, step: int) -> FeatureBatch:
        """Reads this process's rows of the batch of a step.

        Raises:
          UserError: a damaged record, in the words of `verify`.
        """
        return self._reader.read(
            self.datasets,
            self.positions(step, self._rows),
            step=step,
            index=np.asarray(step * self.batch_size + np.arange(self._rows.start, self._rows.stop)),
            seed=self._seed,
        )

    def iterate(self, start_step: int = 0) -> Iterator[FeatureBatch]:
        """Yields the batches from a step on, without end, read ahead on threads."""
        steps = grain.MapDataset.range(start_step, start_step + 2**48).map(self._load_or_error)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
        for batch in steps.to_iter_dataset(options):
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _load_or_error(self, step: int) -> FeatureBatch | UserError:
        # Grain would add lines of its own to the message of an exception.
        try:
            return self.load(step)
        except UserError as error:
            return error

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` updates keeps: the next batch is that of `step`."""
        return {
            "step": step,
            "seed": self._seed,
            "batch_size": self.batch_size,
            "fingerprint": self.fingerprint,
        }

    def shapes(self) -> list[dict[str, ArraySpec]]:
        """The arrays of a global batch of each bucket, for compiling ahead."""
        return [self._reader.shapes(entry, self.batch_size, self._text_width) for entry in self.buckets]

    @property
    def _text_width(self) -> int:
        return self.datasets[0].text_width


def validation_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    num_samples: int | None = None,
    arrays: Sequence[str],
    text_length: int,
    aspect_ratio: str = "true",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[FeatureBatch]:
    """Yields held-out records in the order of the dataset, each once, with a `weight` in the arrays.

    The samples are spread evenly over the dataset, so that all buckets are met. A bucket's last batch is
    filled up with copies of its last record, of weight 0. `index` is the position in the dataset.

    Args:
      dataset: held-out features.
      batch_size: rows over all processes.
      num_samples: how many records; None (or more than there are) for all.
      arrays, text_length, aspect_ratio, process_index, process_count: as for `FeatureLoader`.

    Raises:
      UserError: as `FeatureLoader`, but for the size of the dataset; a damaged record.
    """
    _check_arguments([dataset], [1.0], batch_size, text_length, aspect_ratio, process_count, minimum=1)
    _check_arrays([dataset], arrays, text_length)
    reader = _Reader(arrays, text_length, aspect_ratio, _text_dtype([dataset]))
    total = len(dataset) if num_samples is None else min(num_samples, len(dataset))
    chosen = np.arange(total) * len(dataset) // total
    rows = slice(
        batch_size * process_index // process_count, batch_size * (process_index + 1) // process_count
    )
    step, first = 0, 0
    for bucket, entry in enumerate(dataset.buckets):
        indices = chosen[(chosen >= first) & (chosen < first + entry.count)]
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size].tolist()
            weight = np.zeros(batch_size, np.float32)
            weight[: len(part)] = 1
            part += part[-1:] * (batch_size - len(part))
            positions = [Position(0, bucket, index - first) for index in part[rows]]
            batch = reader.read([dataset], positions, step=step, index=np.array(part[rows]), seed=0)
            batch.arrays["weight"] = weight[rows]
            yield batch
            step += 1
        first += entry.count


def _check_arguments(
    datasets: Sequence[Dataset],
    weights: Sequence[float],
    batch_size: int,
    text_length: int,
    aspect_ratio: str,
    process_count: int,
    minimum: int | None = None,
) -> None:
    one_of("aspect_ratio", aspect_ratio, ASPECT_RATIOS)
    if len(weights) != len(datasets) or min(weights) < 0 or not sum(weights) > 0:
        raise UserError(
            f"weights are {list(weights)} for {len(datasets)} feature folders: give one each, none negative, "
            "not all 0."
        )
    if batch_size % process_count:
        raise UserError(
            f"batch size {batch_size} does not divide among {process_count} processes: choose a multiple of "
            f"{process_count}."
        )
    records = sum(len(dataset) for dataset, weight in zip(datasets, weights) if weight)
    if records < (batch_size if minimum is None else minimum):
        raise UserError(
            f"feature folder '{datasets[0].path}'{' and others' if len(datasets) > 1 else ''}: {records} "
            f"records do not fill one batch of {batch_size}; lower data.batch_size or add images."
        )
    for dataset in datasets:
        for field in _MUST_AGREE:
            ours, theirs = datasets[0].config.get(field), dataset.config.get(field)
            if ours != theirs:
                raise UserError(
                    f"feature folders '{datasets[0].path}' and '{dataset.path}' differ in {field} ({ours} "
                    f"and {theirs}): a run mixes only features made alike."
                )


def _check_arrays(datasets: Sequence[Dataset], arrays: Sequence[str], text_length: int) -> None:
    """Whether the datasets have the arrays that a batch must have."""
    if ("text" in arrays) != ("text_mask" in arrays):
        raise UserError(f"arrays are {', '.join(arrays)}: text and text_mask go together, name both.")
    for dataset in datasets:
        for name in arrays:
            if name not in (*_ALWAYS, *_OPTIONAL, *dataset.extras):
                raise UserError(
                    f"feature folder '{dataset.path}' has no array '{name}', which the model needs (extra "
                    f"arrays it has: {', '.join(dataset.extras) or 'none'}): name features that were made "
                    f"with it.{did_you_mean(name, (*_OPTIONAL, *dataset.extras))}"
                )
        if "text" not in arrays:
            continue
        if not dataset.text_length:
            raise UserError(
                f"feature folder '{dataset.path}' has no text: run precompute with features.text=True."
            )
        if dataset.text_length > text_length:
            raise UserError(
                f"features.text_length is {text_length}, feature folder '{dataset.path}' has captions of up "
                f"to {dataset.text_length} tokens: set features.text_length={dataset.text_length}."
            )
        if dataset.text_width != datasets[0].text_width:
            raise UserError(
                f"feature folder '{dataset.path}' has text of width {dataset.text_width}, "
                f"'{datasets[0].path}' of {datasets[0].text_width}: use one text encoder."
            )


def _words(spec: ArraySpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _text_dtype(datasets: Sequence[Dataset]) -> np.dtype:
    """float32 if any dataset holds that; int8 comes out as bfloat16."""
    wide = any(dataset.config.get("text_dtype") == "float32" for dataset in datasets)
    return np.dtype(np.float32 if wide else ml_dtypes.bfloat16)


class _Reader:
    """Makes arrays of records."""

    def __init__(self, arrays: Sequence[str], text_length: int, aspect_ratio: str, text_dtype: np.dtype):
        self._names = tuple(dict.fromkeys((*_ALWAYS, *arrays)))
        self._extras = [name for name in self._names if name not in (*_ALWAYS, *_OPTIONAL)]
        self._text = "text" in arrays
        self._text_length = text_length
        self._aspect_ratio = aspect_ratio
        self._text_dtype = text_dtype
        self._free: list[np.ndarray] = []  # memory of texts that nobody holds any more

    def shapes(self, bucket: FeatureBucket, rows: int, text_width: int) -> dict[str, ArraySpec]:
        float32 = np.dtype(np.float32)
        specs = {
            "latent_mean": ArraySpec(bucket.latent_shape, float32),
            "latent_std": ArraySpec(bucket.latent_shape, float32),
            "index": ArraySpec((), np.dtype(np.uint32)),
            "text": ArraySpec((self._text_length, text_width), self._text_dtype),
            "text_mask": ArraySpec((self._text_length,), np.dtype(bool)),
            "label": ArraySpec((), np.dtype(np.int32)),
            "image_size": ArraySpec((2,), float32),
            "aspect_ratio": ArraySpec((1,), float32),
            **bucket.extras,
        }
        return {name: ArraySpec((rows, *specs[name].shape), specs[name].dtype) for name in self._names}

    def read(
        self,
        datasets: Sequence[Dataset],
        positions: Sequence[Position],
        *,
        step: int,
        index: np.ndarray,
        seed: int,
    ) -> FeatureBatch:
        first = positions[0]
        entry = datasets[first.dataset].buckets[first.bucket]
        shapes = self.shapes(entry, len(positions), datasets[first.dataset].text_width)
        arrays = {
            name: self._used_again(spec) if name == "text" else np.empty(spec.shape, spec.dtype)
            for name, spec in shapes.items()
        }
        arrays["index"][:] = index.astype(np.uint32)  # wraps after 2^32 samples
        if "aspect_ratio" in arrays:
            size = entry.bucket
            arrays["aspect_ratio"][:] = (
                size.ratio if self._aspect_ratio == "bucket" else size.height / size.width
            )
        draws = uniform(seed, index)
        keys = [""] * len(positions)
        for dataset, bucket in dict.fromkeys((p.dataset, p.bucket) for p in positions):
            rows = [i for i, p in enumerate(positions) if (p.dataset, p.bucket) == (dataset, bucket)]
            source = datasets[dataset]
            records = source.read(bucket, [positions[row].record for row in rows])
            for row, record in zip(rows, records):
                caption = _choose_caption(record, draws[row]) if self._text else None
                fault = record_fault(
                    record, source.buckets[bucket], source.text_length, source.text_width,
                    [] if caption is None else [caption], self._extras,
                )  # fmt: skip
                if self._text and caption is None:
                    fault = fault or "no caption"
                if fault:
                    raise source.refusal(*source.where(bucket, positions[row].record), fault, record.key)
                self._fill(arrays, row, record, caption)
                keys[row] = record.key
        return FeatureBatch(step, entry.bucket, arrays, keys)

    def _used_again(self, spec: ArraySpec) -> np.ndarray:
        """An array whose memory is taken back when the last view of it is gone.

        Fresh memory for a batch of texts (1 MB a row) costs as much as reading them: the kernel clears it.
        """
        size = math.prod(spec.shape) * spec.dtype.itemsize
        try:
            memory = self._free.pop()
            if memory.nbytes != size:  # the last rows of a validation set
                memory = np.empty(size, np.uint8)
        except IndexError:
            memory = np.empty(size, np.uint8)
        # Made from a memoryview, not from the array: every view of `flat` then holds `flat`, the last to go.
        flat = np.frombuffer(memoryview(memory), spec.dtype)
        weakref.finalize(flat, self._free.append, memory).atexit = False
        return flat.reshape(spec.shape)

    def _fill(self, arrays: dict[str, np.ndarray], row: int, record: Record, caption: int | None) -> None:
        if record.std is None:
            np.divide(record.mean, np.float32(127.5), out=arrays["latent_mean"][row])
            arrays["latent_mean"][row] -= 1
            arrays["latent_std"][row] = 0
        else:
            arrays["latent_mean"][row] = record.mean
            arrays["latent_std"][row] = record.std
        if "label" in arrays:
            arrays["label"][row] = record.label
        if "image_size" in arrays:
            arrays["image_size"][row] = record.image_size
        for name in self._extras:
            _copy_bytes(arrays[name][row : row + 1], record.extras[name])
        if caption is None:
            return
        chosen = record.captions[caption]
        arrays["text_mask"][row] = np.arange(self._text_length) < chosen.length
        # As bytes and integers: see `_copy_bytes`.
        arrays["text"][row, chosen.length :].view(np.uint8)[:] = 0
        out, features = arrays["text"][row, : chosen.length], chosen.features
        if chosen.scale is not None:
            out[:] = features * chosen.scale[:, None]
        elif features.dtype == out.dtype == ml_dtypes.bfloat16:
            out.view(np.uint16)[:] = features.view(np.uint16)
        else:
            out[:] = features


def _copy_bytes(out: np.ndarray, values: np.ndarray) -> None:
    """Copies an array of the same dtype and size.

    As bytes, because numpy copies numbers that it does not know (bfloat16) one by one, holding the lock that
    other threads wait for.
    """
    out.reshape(-1).view(np.uint8)[:] = values.reshape(-1).view(np.uint8)


def _choose_caption(record: Record, draw: float) -> int | None:
    """Draws a caption by weight, from a number in [0, 1)."""
    if len(record.captions) < 2:
        return 0 if record.captions else None
    ends = np.cumsum([caption.weight for caption in record.captions])
    return min(int(np.searchsorted(ends, draw * ends[-1], side="right")), len(ends) - 1)
