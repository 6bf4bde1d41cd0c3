import itertools
import random
from collections import Counter

import numpy as np
import pytest

from pixart_jax.data.loader import Position
from pixart_jax.data.order import SampleOrder, floor_sum, permute, uniform


def positions(order: SampleOrder, steps, batch_size: int) -> list[tuple[int, list[Position]]]:
    batches = [order.batch(step, range(batch_size)) for step in steps]
    return [
        (bucket, [Position(d, bucket, record) for d, record in zip(datasets.tolist(), records.tolist())])
        for bucket, datasets, records in batches
    ]


def test_floor_sum_against_the_sum():
    rng = random.Random(0)
    for _ in range(2000):
        n, m, a, b = (rng.randrange(40) for _ in range(4))
        assert floor_sum(n, m + 1, a, b) == sum((a * i + b) // (m + 1) for i in range(n))


def test_uniform_is_spread_and_uncorrelated():
    draws = uniform(3, np.arange(100_000))
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.002
    assert draws.min() >= 0 and draws.max() < 1
    for other in (uniform(4, np.arange(100_000)), uniform(3, np.arange(1, 100_001))):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.02


@pytest.mark.parametrize("batch_size", [1, 4, 8, 12, 53])
@pytest.mark.parametrize("counts", [[60], [53], [17, 40, 3], [5, 5, 5, 5], [1, 200, 30]])
def test_nothing_is_dropped_and_buckets_keep_their_share(counts, batch_size):
    order = SampleOrder([counts], [1.0], batch_size, seed=3)
    total = sum(counts)
    passes = 40
    steps = passes * total // batch_size
    seen, batches = Counter(), Counter()
    for bucket, rows in positions(order, range(steps), batch_size):
        assert len(rows) == batch_size and {place.bucket for place in rows} == {bucket}
        seen.update(rows)
        batches[bucket] += 1
    for bucket, count in enumerate(counts):
        times = [seen[Position(0, bucket, record)] for record in range(count)]
        # All records of a bucket are used about equally often. The counts may differ because the last batch
        # may have begun a new permutation, and because a batch can be larger than the bucket.
        assert max(times) - min(times) <= 2 + batch_size // count
        # Each bucket gets its share of the batches.
        assert abs(batches[bucket] - steps * count / total) <= 2, batches


@pytest.mark.parametrize("size", [53, 48])
def test_with_one_bucket_every_epoch_is_a_permutation(size):
    order = SampleOrder([[size]], [1.0], 8, seed=0)
    stream = [place.record for _, rows in positions(order, range(600), 8) for place in rows]
    for start in range(0, 10 * size, size):
        assert sorted(stream[start : start + size]) == list(range(size))


def test_the_order_is_different_for_each_epoch_and_seed():
    def first_pass(seed, number):
        order = SampleOrder([[48]], [1.0], 8, seed)
        return [
            place.record
            for _, rows in positions(order, range(6 * number, 6 * number + 6), 8)
            for place in rows
        ]

    orders = [first_pass(seed, number) for seed in range(4) for number in range(4)]
    assert len({tuple(one) for one in orders}) == 16
    # All epochs of all seeds have different orders, and neighbouring records do not stay together.
    pairs = Counter(pair for one in orders for pair in itertools.pairwise(one))
    assert max(pairs.values()) <= 4

    batches = [
        [
            SampleOrder([[16, 16, 16]], [1.0], 4, 0).batch(step, range(0))[0]
            for step in range(12 * n, 12 * n + 12)
        ]
        for n in range(4)
    ]
    assert len({tuple(one) for one in batches}) == 4


# Up to 65,536 a permutation is a table; above, it is computed with cycle walking.
@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097, 65536, 65537, 65539, 100_003, 1 << 17])
def test_permutations(size):
    seeds = range(50 if size < 10_000 else 5)
    seen = {tuple(permute(np.arange(size), size, seed).tolist()) for seed in seeds}
    assert all(sorted(one) == list(range(size)) for one in seen)
    assert len(seen) >= min(len(seeds), size)


def test_every_value_is_equally_likely_at_every_place():
    where = np.array([permute(np.arange(10), 10, seed) for seed in range(4000)])
    counts = np.array([np.bincount(where[:, place], minlength=10) for place in range(10)])
    assert np.abs(counts / 400 - 1).max() < 0.25


@pytest.mark.parametrize("size", [5000, 65539, 100_003])
def test_neighbours_do_not_stay_together(size):
    long = permute(np.arange(size), size, 1)
    assert (np.abs(np.diff(long)) <= 1).mean() < 0.01
    assert abs(np.corrcoef(long[1:], long[:-1])[0, 1]) < 0.05
    # Values are distributed evenly: each tenth of the places has about a tenth of each tenth of the values.
    tenths = np.bincount(np.arange(size) * 10 // size * 10 + long * 10 // size, minlength=100)
    assert np.abs(tenths / size * 100 - 1).max() < 0.5


def test_a_permutation_of_ten_billion():
    size = 10**10
    places = np.arange(0, size, 99_999_989)
    values = permute(places, size, 3)
    assert len(set(values.tolist())) == len(places) and values.min() >= 0 and values.max() < size
    assert abs(values.mean() / size - 0.5) < 0.1


def test_datasets_are_mixed_by_weight():
    counts = [[400, 100], [50, 0], [0, 30]]
    order = SampleOrder(counts, [2.0, 1.0, 1.0], 8, seed=0)
    seen = Counter(place for _, rows in positions(order, range(3000), 8) for place in rows)
    by_dataset = Counter()
    for place, times in seen.items():
        by_dataset[place.dataset] += times
    total = sum(by_dataset.values())
    assert [round(by_dataset[d] / total, 2) for d in range(3)] == [0.5, 0.25, 0.25]
    for dataset, row in enumerate(counts):
        for bucket, count in enumerate(row):
            times = [seen[Position(dataset, bucket, record)] for record in range(count)]
            assert not count or max(times) - min(times) <= 0.1 * max(times) + 2
    # A dataset of weight 0 is never used.
    order = SampleOrder(counts, [1.0, 0.0, 1.0], 8, seed=0)
    assert {p.dataset for _, rows in positions(order, range(300), 8) for p in rows} == {0, 2}


def test_the_order_never_changes():
    """A run may be resumed with a later version, which must give the same order: small and large buckets."""
    order = SampleOrder([[9, 4], [3, 5]], [1.0, 1.0], 4, seed=7)
    found = [
        (bucket, [(p.dataset, p.record) for p in rows]) for bucket, rows in positions(order, range(3), 4)
    ]
    assert found == EXPECTED_SMALL
    order = SampleOrder([[1_000_000, 200_000]], [1.0], 4, seed=7)
    found = [
        (bucket, [p.record for p in rows]) for bucket, rows in positions(order, [0, 1, 299_999, 300_000], 4)
    ]
    assert found == EXPECTED_LARGE


EXPECTED_SMALL = [
    (1, [(1, 0), (1, 2), (1, 1), (1, 4)]),
    (0, [(1, 1), (0, 5), (1, 1), (0, 1)]),
    (1, [(1, 3), (0, 3), (0, 2), (1, 4)]),
]
EXPECTED_LARGE = [
    (0, [169068, 628635, 316134, 493445]),
    (0, [1614, 907320, 165132, 131037]),
    (0, [16226, 328748, 751599, 943637]),
    (1, [160840, 69411, 176068, 133736]),
]


def test_the_order_of_ten_million_records():
    """Checks some batches of an epoch; `benchmarks/loader.py --plan` computes all of them."""
    counts = [[400_000 - 7500 * i for i in range(40)]]
    order = SampleOrder(counts, [1.0], 256, seed=0)
    seen = set()
    for step in range(0, 39_000, 39):
        bucket, _, records = order.batch(step, range(256))
        seen.update((bucket << 32 | records).tolist())
    assert len(seen) == 1000 * 256


def test_repeats_are_samples_per_record():
    """An epoch has every record of a dataset that many times."""
    order = SampleOrder([[4], [10]], [1.0, 1.0], 8, seed=0, repeats=[3, 1])
    stream = [place for _, rows in positions(order, range(110), 8) for place in rows]
    for start in range(0, 40 * 22, 22):
        counts = Counter(stream[start : start + 22])
        assert counts == {Position(0, 0, i): 3 for i in range(4)} | {Position(1, 0, i): 1 for i in range(10)}
    # Buckets get batches in proportion to the repeated records.
    order = SampleOrder([[50, 0], [0, 50]], [1.0, 1.0], 10, seed=0, repeats=[3, 1])
    buckets = Counter(bucket for bucket, _ in positions(order, range(400), 10))
    assert abs(buckets[0] - 300) <= 2
    # All 1 is the default.
    counts = [[9, 4], [3, 5]]
    default = SampleOrder(counts, [13.0, 8.0], 4, seed=7)
    once = SampleOrder(counts, [1.0, 1.0], 4, seed=7, repeats=[1, 1])
    assert positions(once, range(50), 4) == positions(default, range(50), 4)
