"""Computes which records form the batch of a step, as a function of (seed, step), in O(1) per record.

All records of a batch are of one bucket (one image size), so the order has two parts.

Bucket of a step. An epoch has N samples, m of them in a given bucket. Place the buckets next to each other on
a circle of length N, each as an arc of length m. Step k is at the point (c + k phi) N mod N, where phi is the
golden ratio minus 1 and c depends on the seed, and its bucket is the arc that contains this point. Multiples
of the golden ratio are spread very evenly over a circle, so within any range of steps a bucket gets its share
m / N of the batches, up to a few.

Records of a step. Every bucket has an endless sequence of records, which are reshuffled each time that all
have been used. The j-th batch of a bucket takes positions j B to (j + 1) B - 1 of this sequence, where B is
the batch size. No record is dropped at the end of an epoch: a batch may contain the last records of one
permutation and the first of the next. j is the number of earlier steps in the same bucket. It is computed
without enumerating these steps: it is a sum of floors, which `floor_sum` computes in O(log N).

With several datasets, the samples of an epoch are divided among them in proportion to their weights, or each
dataset has a whole number of samples per record. Each dataset has its own shuffled sequence per bucket and is
reshuffled when that sequence is used up.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

# Permutations up to this size are stored as a table; larger ones are computed per element.
_SMALL = 1 << 16
# Points on the circle per sample. Points are integers, so that the order is exact on every machine.
_UNIT = 1 << 20
_GOLDEN = (5**0.5 - 1) / 2
# Increment of the state of splitmix64.
_WEYL = 0x9E3779B97F4A7C15


class SampleOrder:
    """The order of the samples of a run. It stores a few numbers per bucket, however many records there are.

    Args:
      counts: number of records of each dataset in each bucket, [datasets][buckets].
      weights: relative sampling weight of each dataset.
      batch_size: global batch size B.
      seed: seed of the run.
      repeats: samples per record of each dataset in an epoch, instead of the weights. All 1 is the same as
        weights that are the numbers of records.
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int]],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        repeats: Sequence[int] | None = None,
    ):
        self._batch_size, self._seed = batch_size, seed
        self._counts = counts
        sizes = [sum(row) for row in counts]
        total, weight = sum(sizes), sum(weights)
        # Samples per epoch, [datasets][buckets]. If the weights are proportional to the numbers of records,
        # an epoch has each record once.
        self._draws = [
            [max(1, round(total * w / weight * n / size)) if n and w else 0 for n in row]
            for row, size, w in zip(counts, sizes, weights)
        ]
        if repeats is not None:
            self._draws = [[times * n for n in row] for row, times in zip(counts, repeats)]
        self._dataset_ends = [list(itertools.accumulate(column)) for column in zip(*self._draws)]
        self.draws = [ends[-1] for ends in self._dataset_ends]
        self._ends = [end * _UNIT for end in itertools.accumulate(self.draws)]
        self._stride = int(self._ends[-1] * _GOLDEN) | 1
        self._offset = _shuffle_seed(seed, "buckets", 0) * self._ends[-1] >> 32

    def batch(self, step: int, rows: range) -> tuple[int, np.ndarray, np.ndarray]:
        """Computes the records of some rows of the global batch of a step.

        Args:
          step: the step, from 0 without limit.
          rows: rows of the batch, b integers within 0 .. B - 1.

        Returns:
          the index of the bucket; for each row the index of its dataset, [b]; and for each row the position
          of its record in the bucket of that dataset, [b].
        """
        circle, stride, offset = self._ends[-1], self._stride, self._offset
        bucket = bisect.bisect_right(self._ends, (offset + step * stride) % circle)
        end = self._ends[bucket]
        start = end - self.draws[bucket] * _UNIT
        # Number of earlier steps whose point is between start and end. With x = (offset + i stride) / circle,
        # step i is in the arc [start, end) exactly if floor(x + 1 - start / circle) is larger by 1 than
        # floor(x + 1 - end / circle); both sums run over i < step.
        rank = floor_sum(step, circle, stride, offset + circle - start) - floor_sum(
            step, circle, stride, offset + circle - end
        )
        slots = rank * self._batch_size + np.arange(rows.start, rows.stop, dtype=np.int64)

        sources = [dataset for dataset, draws in enumerate(self._draws) if draws[bucket]]
        if len(sources) == 1:
            count = self._counts[sources[0]][bucket]
            records, _ = self._shuffle(slots, count, f"records {sources[0]} {bucket}")
            return bucket, np.full_like(records, sources[0]), records

        # The samples of an epoch in this bucket are shuffled, and each belongs to a dataset. The n-th sample
        # of a dataset takes the n-th record of the dataset's own shuffled sequence.
        ends = np.array(self._dataset_ends[bucket])
        places, passes = self._shuffle(slots, int(ends[-1]), f"draws {bucket}")
        datasets = np.searchsorted(ends, places, side="right")
        records = np.empty_like(slots)
        for dataset in np.unique(datasets):
            mine = datasets == dataset
            draws, count = self._draws[dataset][bucket], self._counts[dataset][bucket]
            order = passes[mine] * draws + places[mine] - (ends[dataset] - draws)
            records[mine], _ = self._shuffle(order, count, f"records {dataset} {bucket}")
        return bucket, datasets, records

    def _shuffle(self, slots: np.ndarray, size: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        """Evaluates an endless sequence of permutations of 0..size-1, one after the other.

        Args:
          slots: positions in the sequence, [b].
          size: the size of each permutation.
          purpose: name of the sequence; different names have independent permutations.

        Returns:
          the values at these positions, [b], and the number of the permutation that each is in, [b].
        """
        passes, places = np.divmod(slots, size)
        out = np.empty_like(places)
        for number in np.unique(passes):
            mine = passes == number
            out[mine] = permute(places[mine], size, _shuffle_seed(self._seed, purpose, int(number)))
        return out, passes


def permute(places: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Evaluates a pseudo-random permutation of 0..size-1.

    Small permutations are tables. Larger ones are computed without a table by a Feistel network of six rounds
    on the smallest even number of bits that can represent `size - 1`. It is applied again as long as the
    result is not below `size` (cycle walking), which makes it a permutation of 0..size-1.

    Args:
      places: integers [b] in 0 .. size - 1.
      size: size of the permutation, at most 2^62.
      seed: selects the permutation.

    Returns:
      the values of the permutation at `places`, integers [b].
    """
    if size <= _SMALL:
        return _small_permutation(size, seed)[places]
    half = ((size - 1).bit_length() + 1) // 2
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = mix(np.uint64(seed) + np.arange(1, 7, dtype=np.uint64) * np.uint64(_WEYL))
    values = np.asarray(places).astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> shift, values[walking] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        values[walking] = left << shift | right
        walking = walking[values[walking] >= size]
    return values.astype(np.int64)


@functools.lru_cache(maxsize=128)
def _small_permutation(size: int, seed: int) -> np.ndarray:
    """A permutation of 0..size-1, made by sorting hashes of the numbers."""
    return np.argsort(uniform(seed, np.arange(size)), kind="stable").astype(np.uint16)


@functools.lru_cache(maxsize=4096)
def _shuffle_seed(seed: int, purpose: str, number: int) -> int:
    """A 32-bit seed for permutation `number` of a sequence.

    It is a hash and not a sum, because with seed + number the second permutation of one run would be the
    first one of the run with the next seed.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()[:4], "little")


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Returns the sum of floor((a i + b) / m) for 0 <= i < n, in O(log m) steps; n, a, b >= 0, m > 0."""
    total = 0
    while True:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        if a * n + b < m:
            return total
        n, b = divmod(a * n + b, m)
        a, m = m, a


def mix(z: np.ndarray) -> np.ndarray:
    """Maps uint64 values one to one to pseudo-random ones (the finalizer of splitmix64)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, index: np.ndarray) -> np.ndarray:
    """Returns uniformly distributed pseudo-random numbers that are a function of (seed, index) (splitmix64).

    Args:
      seed: any integer.
      index: integers [b].

    Returns:
      float64 [b] in [0, 1).
    """
    start = mix(np.array([seed % 2**64], np.uint64))
    z = mix(start + np.asarray(index).astype(np.uint64) * np.uint64(_WEYL))
    return (z >> np.uint64(11)).astype(np.float64) / 2**53
