"""Loads the batches of a run from feature records.

`order.py` computes which records form the global batch of a step; threads read them ahead of time. Each
process reads only its own rows. The batch depends on the step and the seed alone, so the step is the only
state: a resumed run gets the same batches as an uninterrupted one, on any number of processes.

If a run continues with other data from step F on, batch F of the run is the first batch of the new data's
order. From there on, each of the new records is used once per epoch, as in a new run. The random numbers of a
sample depend on its position in the whole run, so that noise is not repeated.
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
# Arrays that every batch has, and arrays that a batch has if requested. All other names are extra arrays.
_ALWAYS = ("latent_mean", "latent_std", "index")
_OPTIONAL = ("text", "text_mask", "label", "image_size", "aspect_ratio")
# Extra arrays that records may lack, with the value that fills them: without a mask, the loss covers the
# whole image. A mask is uint8 [h, w], 255 where the loss has weight 1.
_FILLED = {"mask": 255}
# Fields of the features config that must be equal in all datasets of a run. Otherwise their latents or text
# features would not be compatible.
_MUST_AGREE = ("codec", "vae", "latent_scale", "text_encoder")


class Position(NamedTuple):
    """Index of a dataset, index of one of its buckets, and position of a record in that bucket."""

    dataset: int
    bucket: int
    record: int


class Dataset(Protocol):
    """Interface of a set of feature records, such as a feature folder (`FeatureDataset`).

    Attributes:
      path: name of the dataset in messages.
      config: the features config that the records were made with, as plain values.
      buckets: the buckets that have records.
      text_length, text_width: maximum number of tokens S and text width D; both are 0 without text.
      extras: names of the extra arrays that the records of all buckets have.
      fingerprint: hash of everything that determines the records and their positions.
    """

    path: Path
    config: Mapping[str, Any]
    buckets: Sequence[FeatureBucket]
    text_length: int
    text_width: int
    extras: Sequence[str]
    fingerprint: str

    def __len__(self) -> int:
        """Number of records in all buckets."""

    def read(self, bucket: int, positions: Sequence[int]) -> list[Record]:
        """Reads records of one bucket, in the given order. Several threads may call this at the same time.

        Args:
          bucket: index into `buckets`.
          positions: positions in the bucket.

        Raises:
          UserError: a record cannot be read.
        """

    def where(self, bucket: int, position: int) -> tuple[str, int]:
        """Returns the file that holds a record, and the record's row in it."""

    def refusal(self, file: str, row: int, fault: str, key: str | None = None) -> UserError:
        """Returns the error to raise for a record that cannot be used."""

    def null_text(self) -> np.ndarray:
        """Returns the text encoder's output for the null caption "", float32 [S, D], including padding.

        Raises:
          UserError: the dataset has no text, or it cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class FeatureBatch:
    """One process's rows of a global batch. All its images have the size of one bucket.

    Attributes:
      step: the step that the batch is for.
      bucket: the image size.
      arrays: arrays by name, with b rows, latents of shape [h, w, C], S text positions, and text width D.
        Every batch has:
        latent_mean, latent_std  float32 [b, h, w, C], unscaled; pixels are x / 127.5 - 1 with std 0
        index                    uint32 [b], position in the shuffled sequence: step * B + row in the global
                                 batch (for `validation_batches`, position in the dataset)
        weight                   float32 [b], weight of the sample in the loss: 0 for padding rows of
                                 `validation_batches`; in training only if the loader has `loss_weights`
        If requested, it also has:
        text                     bfloat16 or float32 [b, S, D], 0 after the end of the caption
        text_mask                bool [b, S], True for valid tokens
        label                    int32 [b], -1 for none
        image_size               float32 [b, 2], (height, width) of the original image in pixels
        aspect_ratio             float32 [b, 1], height / width
        mask                     uint8 [b, h, w], 255 where the loss has weight 1, and for records without it
        NAME                     [b, ...], another extra array, with the dtype in which it is stored
      keys: keys of the records.
      captions: the captions whose features are in `text`; "" without text.
    """

    step: int
    bucket: Bucket
    arrays: dict[str, np.ndarray]
    keys: list[str]
    captions: list[str]


class FeatureLoader:
    """Reads the batches of a training run.

    Attributes:
      buckets: the buckets of all datasets, by rising aspect ratio.
      fingerprint: hash of everything that determines the batch of a step.
      earlier_fingerprint: the hash that version 0.1 stored for the same data, which differs for images that
        are encoded during training.
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
        first_step: int = 0,
        aspect_ratio: str = "true",
        repeats: Sequence[int] | None = None,
        loss_weights: Sequence[float] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 4,
        prefetch: int = 4,
    ):
        """Prepares the order of the samples, without reading any record.

        Args:
          datasets: one or more datasets.
          weights: relative sampling weight of each dataset; None for its number of records.
          batch_size: samples per step, in total over all processes.
          seed: seed for the order of the records and for choosing one of several captions.
          arrays: names of the arrays that a batch must have in addition to latent_mean, latent_std and index;
            see `FeatureBatch`.
          text_length: S of the batches, at least the `text_length` of every dataset.
          first_step: the step whose batch is the first one of these datasets.
          aspect_ratio: 'true' (height / width of the bucket) or 'bucket' (the key in the official table).
          repeats: how often the records of each dataset are used per epoch, instead of `weights`.
          loss_weights: weight of the loss of each dataset's records; None for 1. If any of them is not 1,
            the batches have the array `weight`.
          process_index, process_count: this process and the number of processes. Process i reads the i-th of
            `process_count` equal parts of a batch.
          threads: number of batches that are read at the same time.
          prefetch: number of batches that are kept ready.

        Raises:
          UserError: the datasets do not match each other or the arguments, or do not have a requested array.
        """
        self.datasets = list(datasets)
        if not self.datasets:
            raise UserError("0 feature folders: give at least one.")
        weights = [float(len(dataset)) for dataset in self.datasets] if weights is None else list(weights)
        if repeats is not None and set(repeats) == {1}:
            repeats = None  # the default
        if loss_weights is not None and set(loss_weights) == {1.0}:
            loss_weights = None
        self._loss_weights = None if loss_weights is None else np.array(loss_weights, np.float32)
        _check_arguments(self.datasets, weights, batch_size, text_length, aspect_ratio, process_count)
        _check_arrays(self.datasets, arrays, text_length)
        self.batch_size, self.text_length = batch_size, text_length
        self._rows = range(
            batch_size * process_index // process_count, batch_size * (process_index + 1) // process_count
        )
        self._seed, self._threads, self._prefetch = seed, threads, prefetch
        self.first_step = first_step
        self._reader = _Reader(arrays, text_length, aspect_ratio, _text_dtype(self.datasets))

        found: dict[Bucket, FeatureBucket] = {}
        for dataset in self.datasets:
            for entry in dataset.buckets:
                one = found.setdefault(entry.bucket, entry)
                if one.latent_shape != entry.latent_shape:
                    raise UserError(
                        f"feature folder '{dataset.path}' has latents {list(entry.latent_shape)} for "
                        f"{entry.bucket.name}, another has {list(one.latent_shape)}; use one codec for both"
                    )
                for name in arrays:
                    if name not in _FILLED and one.extras.get(name) != entry.extras.get(name):
                        raise UserError(
                            f"feature folder '{dataset.path}' has '{name}' of {entry.bucket.name} as "
                            f"{_words(entry.extras[name])}, another as {_words(one.extras[name])}; use one "
                            "shape and dtype"
                        )
        self.buckets = sorted(found.values(), key=lambda entry: (entry.bucket.ratio, entry.bucket.name))
        # For each dataset: bucket -> its index in the dataset.
        self._own = [
            {entry.bucket: i for i, entry in enumerate(dataset.buckets)} for dataset in self.datasets
        ]
        counts = [
            [dataset.buckets[own[entry.bucket]].count if entry.bucket in own else 0 for entry in self.buckets]
            for dataset, own in zip(self.datasets, self._own)
        ]
        self.order = SampleOrder(counts, weights, batch_size, seed, repeats)
        shares = weights if repeats is None else {"repeats": list(repeats)}
        parts = [seed, batch_size, text_length, aspect_ratio, shares]
        own = [d.fingerprint for d in self.datasets]
        earlier = [getattr(d, "earlier_fingerprint", d.fingerprint) for d in self.datasets]
        self._hashed = [*parts, own], [*parts, earlier]
        self.fingerprint, self.earlier_fingerprint = self.fingerprints(first_step)

    def fingerprints(self, first_step: int) -> tuple[str, str]:
        """Returns `fingerprint` and `earlier_fingerprint` of the same data from another first step on."""
        # Version 0.1 did not have a first step.
        start = [first_step] if first_step else []
        ours, earlier = (sha256_of_json([*parts, *start]) for parts in self._hashed)
        return ours, earlier

    def __repr__(self) -> str:
        records = sum(map(len, self.datasets))
        return (
            f"FeatureLoader({records:,} records, {len(self.buckets)} buckets, batches of {self.batch_size})"
        )

    def positions(self, step: int, rows: range | None = None) -> list[Position]:
        """Computes which records form the global batch of a step, without reading them.

        Args:
          step: the step, from `first_step`.
          rows: rows of the global batch; None for all.

        Returns:
          a `Position` per row, with the index of the bucket in its own dataset.
        """
        if step < self.first_step:
            raise UserError(
                f"data.first_step is {self.first_step}, but the run is at step {step}: set "
                f"data.first_step={step} to use this data from now on."
            )
        rows = range(self.batch_size) if rows is None else rows
        bucket, datasets, records = self.order.batch(step - self.first_step, rows)
        own = [mine.get(self.buckets[bucket].bucket) for mine in self._own]
        return [Position(d, own[d], record) for d, record in zip(datasets.tolist(), records.tolist())]

    def load(self, step: int) -> FeatureBatch:
        """Reads this process's rows of the batch of a step.

        Raises:
          UserError: a record is damaged; the message is that of `verify`.
        """
        positions = self.positions(step, self._rows)
        batch = self._reader.read(
            self.datasets,
            positions,
            step=step,
            index=np.asarray(step * self.batch_size + np.arange(self._rows.start, self._rows.stop)),
            seed=self._seed,
        )
        if self._loss_weights is not None:
            batch.arrays["weight"] = self._loss_weights[[position.dataset for position in positions]]
        return batch

    def iterate(self, start_step: int = 0) -> Iterator[FeatureBatch]:
        """Yields the batches from `start_step` on, without end. Threads read them ahead of time."""
        steps = grain.MapDataset.range(start_step, start_step + 2**48).map(self._load_or_error)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
        for batch in steps.to_iter_dataset(options):
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _load_or_error(self, step: int) -> FeatureBatch | UserError:
        # Returned instead of raised, because Grain adds lines to the message of an exception.
        try:
            return self.load(step)
        except UserError as error:
            return error

    def state(self, step: int) -> dict[str, Any]:
        """Returns what a checkpoint after `step` updates stores about the data.

        The next batch of the run is `load(step)`.
        """
        return {
            "step": step,
            "seed": self._seed,
            "batch_size": self.batch_size,
            "fingerprint": self.fingerprint,
        }

    def shapes(self) -> list[dict[str, ArraySpec]]:
        """Returns the shapes and dtypes of a global batch of each bucket, for compiling ahead of time."""
        rows, width = self.batch_size, self._text_width
        weighted = self._loss_weights is not None
        weight = {"weight": ArraySpec((rows,), np.dtype(np.float32))} if weighted else {}
        return [self._reader.shapes(entry, rows, width) | weight for entry in self.buckets]

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
    """Yields batches of held-out records in the order of the dataset, each record once.

    The chosen records are spread evenly over the dataset, so that all larger buckets are represented. The
    last batch of a bucket is padded with copies of its last record. In the array `weight`, these have weight
    0 and all other rows have weight 1. `index` is the position in the dataset.

    Args:
      dataset: held-out features.
      batch_size: samples per batch, in total over all processes.
      num_samples: number of records to use, if there are that many; None for all.
      arrays, text_length, aspect_ratio, process_index, process_count: as in `FeatureLoader`.

    Raises:
      UserError: as in `FeatureLoader`, except that a single record is enough; or a record is damaged.
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
            f"weights are {list(weights)} for {len(datasets)} feature folders: give one weight per folder, "
            "none of them negative and not all 0."
        )
    if batch_size % process_count:
        raise UserError(
            f"batch size {batch_size} is not divisible by {process_count} processes: choose a multiple of "
            f"{process_count}."
        )
    records = sum(len(dataset) for dataset, weight in zip(datasets, weights) if weight)
    if records < (batch_size if minimum is None else minimum):
        raise UserError(
            f"feature folder '{datasets[0].path}'{' and others' if len(datasets) > 1 else ''}: {records} "
            f"records are too few for one batch of {batch_size}; lower data.batch_size or add images."
        )
    for dataset in datasets:
        ours, theirs = _common_fields(datasets[0]), _common_fields(dataset)
        for field in ours | theirs:
            if ours.get(field) != theirs.get(field):
                raise UserError(
                    f"feature folders '{datasets[0].path}' and '{dataset.path}' differ in {field} "
                    f"({ours.get(field)} and {theirs.get(field)}): make all features of a run with the same "
                    "value."
                )


def _common_fields(dataset: Dataset) -> dict[str, Any]:
    """The fields of the features config in which all datasets of a run must agree."""
    values = {field: dataset.config.get(field) for field in _MUST_AGREE}
    text = values.pop("text_encoder") or {}
    return values | {f"text_encoder.{name}": value for name, value in text.items()}


def _check_arrays(datasets: Sequence[Dataset], arrays: Sequence[str], text_length: int) -> None:
    """Checks that the datasets have the arrays that a batch must have."""
    if ("text" in arrays) != ("text_mask" in arrays):
        raise UserError(f"arrays are {', '.join(arrays)}: request both text and text_mask, or neither.")
    for dataset in datasets:
        for name in arrays:
            if name in _FILLED:
                for entry in dataset.buckets:
                    spec = entry.extras.get(name)
                    if spec not in (None, _filled_spec(entry)):
                        raise UserError(
                            f"feature folder '{dataset.path}' has '{name}' of {entry.bucket.name} as "
                            f"{_words(spec)}, and must have {_words(_filled_spec(entry))}: make the features "
                            "again."
                        )
            elif name not in (*_ALWAYS, *_OPTIONAL, *dataset.extras):
                raise UserError(
                    f"feature folder '{dataset.path}' has no array '{name}', which the model needs (extra "
                    f"arrays: {', '.join(dataset.extras) or 'none'}): use features that were made "
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
                f"to {dataset.text_length} tokens: set model.text_length (and features.text_length, if it is "
                f"given) to {dataset.text_length}."
            )
        if dataset.text_width != datasets[0].text_width:
            raise UserError(
                f"feature folder '{dataset.path}' has text features of width {dataset.text_width}, but "
                f"'{datasets[0].path}' of {datasets[0].text_width}: use one text encoder for both."
            )


def _filled_spec(bucket: FeatureBucket) -> ArraySpec:
    """Shape and dtype of the arrays in `_FILLED`."""
    return ArraySpec(bucket.latent_shape[:2], np.dtype(np.uint8))


def _words(spec: ArraySpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _text_dtype(datasets: Sequence[Dataset]) -> np.dtype:
    """float32 if any dataset stores float32, else bfloat16, which int8 features are converted to."""
    wide = any(dataset.config.get("text_dtype") == "float32" for dataset in datasets)
    return np.dtype(np.float32 if wide else ml_dtypes.bfloat16)


class _Reader:
    """Reads records and puts them into the arrays of a batch."""

    def __init__(self, arrays: Sequence[str], text_length: int, aspect_ratio: str, text_dtype: np.dtype):
        self._names = tuple(dict.fromkeys((*_ALWAYS, *arrays)))
        self._extras = [name for name in self._names if name not in (*_ALWAYS, *_OPTIONAL)]
        self._text = "text" in arrays
        self._text_length = text_length
        self._aspect_ratio = aspect_ratio
        self._text_dtype = text_dtype
        self._free: list[np.ndarray] = []  # memory of text arrays that are no longer in use

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
            **dict.fromkeys(_FILLED, _filled_spec(bucket)),
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
        keys, captions = [""] * len(positions), [""] * len(positions)
        for dataset, bucket in dict.fromkeys((p.dataset, p.bucket) for p in positions):
            rows = [i for i, p in enumerate(positions) if (p.dataset, p.bucket) == (dataset, bucket)]
            source = datasets[dataset]
            extras = [name for name in self._extras if name in source.buckets[bucket].extras]
            records = source.read(bucket, [positions[row].record for row in rows])
            for row, record in zip(rows, records):
                caption = _choose_caption(record, draws[row]) if self._text else None
                fault = record_fault(
                    record, source.buckets[bucket], source.text_length, source.text_width,
                    [] if caption is None else [caption], extras,
                )  # fmt: skip
                if self._text and caption is None:
                    fault = fault or "no caption"
                if fault:
                    raise source.refusal(*source.where(bucket, positions[row].record), fault, record.key)
                self._fill(arrays, row, record, caption)
                keys[row] = record.key
                captions[row] = "" if caption is None else record.captions[caption].text
        return FeatureBatch(step, entry.bucket, arrays, keys, captions)

    def _used_again(self, spec: ArraySpec) -> np.ndarray:
        """Returns an array whose memory is reused after the last view of it is deleted.

        New memory for a batch of text features (1 MB per row) would take as long as reading the features,
        because the kernel clears it.
        """
        size = math.prod(spec.shape) * spec.dtype.itemsize
        try:
            memory = self._free.pop()
            if memory.nbytes != size:  # of a batch with another number of rows
                memory = np.empty(size, np.uint8)
        except IndexError:
            memory = np.empty(size, np.uint8)
        # Pass a memoryview, so that the base of each view of `flat` is `flat` itself and not `memory`. Then
        # `flat` lives as long as any view of it, and its finalizer runs after the last view is deleted.
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
            if name in record.extras:
                _copy_bytes(arrays[name][row : row + 1], record.extras[name])
            else:
                arrays[name][row] = _FILLED[name]
        if caption is None:
            return
        chosen = record.captions[caption]
        arrays["text_mask"][row] = np.arange(self._text_length) < chosen.length
        # Zeros and bfloat16 values are written as integers, for the reason given in `_copy_bytes`.
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

    It copies bytes, because bfloat16 is not one of numpy's own dtypes: numpy copies such values one by one
    and holds the GIL, so that the other reader threads have to wait.
    """
    out.reshape(-1).view(np.uint8)[:] = values.reshape(-1).view(np.uint8)


def _choose_caption(record: Record, draw: float) -> int | None:
    """Chooses a caption with a probability proportional to its weight.

    Args:
      record: the record.
      draw: a random number in [0, 1).

    Returns:
      the index of the caption, or None if the record has none.
    """
    if len(record.captions) < 2:
        return 0 if record.captions else None
    ends = np.cumsum([caption.weight for caption in record.captions])
    return min(int(np.searchsorted(ends, draw * ends[-1], side="right")), len(ends) - 1)
