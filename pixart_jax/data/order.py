"""Which records make the batch of a step: a function of (seed, step) alone, computed in O(1) per record.

A pass is as many draws as there are records, m of each bucket; all buckets, laid end to end, make a circle of
N draws. Step k stands on the circle at (c + k phi) N, phi the golden ratio and c a function of the seed, and
its batch is of the bucket it falls into: steps spread as evenly as they can, so that over any stretch a
bucket gets its share of the batches to within a few. How many steps fell into a bucket before is a sum of
floors, which has a fast formula. The j-th batch of a bucket takes records j B to (j + 1) B of that bucket's
own endless sequence, which is reshuffled every pass. Nothing is dropped at the end of a pass: a batch that
starts in one pass of its bucket ends in the next. With several datasets a pass draws from each in proportion
to its weight, and each is gone through, reshuffled, at its own pace.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

# Ranges up to this size are shuffled by a table.
_SMALL = 1 << 16
# Places on the circle for one draw.
_UNIT = 1 << 20
_GOLDEN = (5**0.5 - 1) / 2
# Step of splitmix64.
_WEYL = 0x9E3779B97F4A7C15


class SampleOrder:
    """The order of a run: step to bucket and records. Holds a few numbers per bucket, whatever the records.

    Args:
      counts: records of each dataset in each bucket, [datasets][buckets].
      weights: how often each dataset is drawn from, any scale.
      batch_size: B, global.
      seed: of the run.
    """

    def __init__(self, counts: Sequence[Sequence[int]], weights: Sequence[float], batch_size: int, seed: int):
        self._batch_size, self._seed = batch_size, seed
        self._counts = counts
        sizes = [sum(row) for row in counts]
        total, weight = sum(sizes), sum(weights)
        # Draws per pass, [datasets][buckets]. Weights in proportion to the records give each record once.
        self._draws = [
            [max(1, round(total * w / weight * n / size)) if n and w else 0 for n in row]
            for row, size, w in zip(counts, sizes, weights)
        ]
        self._dataset_ends = [list(itertools.accumulate(column)) for column in zip(*self._draws)]
        self.draws = [ends[-1] for ends in self._dataset_ends]
        self._ends = [end * _UNIT for end in itertools.accumulate(self.draws)]
        self._stride = int(self._ends[-1] * _GOLDEN) | 1
        self._offset = _shuffle_seed(seed, "buckets", 0) * self._ends[-1] >> 32

    def batch(self, step: int, rows: range) -> tuple[int, np.ndarray, np.ndarray]:
        """Says which records make rows of a step's global batch.

        Args:
          step: from 0, without end.
          rows: within 0 .. B - 1.

        Returns:
          the bucket, and for each row its dataset [b] and the position in that dataset's bucket [b].
        """
        circle, stride, offset = self._ends[-1], self._stride, self._offset
        bucket = bisect.bisect_right(self._ends, (offset + step * stride) % circle)
        end = self._ends[bucket]
        start = end - self.draws[bucket] * _UNIT
        # Steps before this one that fell between start and end.
        rank = floor_sum(step, circle, stride, offset + circle - start) - floor_sum(
            step, circle, stride, offset + circle - end
        )
        slots = rank * self._batch_size + np.arange(rows.start, rows.stop, dtype=np.int64)

        sources = [dataset for dataset, draws in enumerate(self._draws) if draws[bucket]]
        if len(sources) == 1:
            count = self._counts[sources[0]][bucket]
            records, _ = self._shuffle(slots, count, f"records {sources[0]} {bucket}")
            return bucket, np.full_like(records, sources[0]), records

        # Shuffled draws, each of which belongs to a dataset; the n-th draw from a dataset takes the n-th
        # of its own shuffled records.
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
        """What stands at places of an endless sequence of permutations of 0..size-1, and in which of them."""
        passes, places = np.divmod(slots, size)
        out = np.empty_like(places)
        for number in np.unique(passes):
            mine = passes == number
            out[mine] = permute(places[mine], size, _shuffle_seed(self._seed, purpose, int(number)))
        return out, passes


def permute(places: np.ndarray, size: int, seed: int) -> np.ndarray:
    """What stands at some places of a pseudo-random permutation of 0..size-1.

    Small ones are tables. Large ones are a Feistel network of six rounds on the least even number of bits
    that holds `size`, gone through until the result is below it (cycle walking): no memory, however large.

    Args:
      places: integers [b] in 0 .. size - 1.
      size: up to 2^62.
      seed: of the permutation.
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
    """A permutation of 0..size-1, by sorting hashes."""
    return np.argsort(uniform(seed, np.arange(size)), kind="stable").astype(np.uint16)


@functools.lru_cache(maxsize=4096)
def _shuffle_seed(seed: int, purpose: str, number: int) -> int:
    """32 bits for a permutation. Hashed: sums of seed and number would repeat one run's passes in another."""
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
    """Scrambles uint64 values, one to one (the finaliser of splitmix64)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, index: np.ndarray) -> np.ndarray:
    """Draws a number in [0, 1) for each index, a function of (seed, index) (splitmix64).

    Args:
      seed: any integer.
      index: integers [b].
    """
    start = mix(np.array([seed % 2**64], np.uint64))
    z = mix(start + np.asarray(index).astype(np.uint64) * np.uint64(_WEYL))
    return (z >> np.uint64(11)).astype(np.float64) / 2**53
