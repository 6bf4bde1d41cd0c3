"""Checks that the bucket tables are the published ones, and how buckets are chosen and merged."""

import itertools
import random

import numpy as np
import pytest

from pixart_jax.data import buckets as B
from pixart_jax.errors import UserError

# The official table at 512, copied by hand: key -> (height, width).
OFFICIAL_512 = {
    "0.25": (256, 1024), "0.26": (256, 992), "0.27": (256, 960), "0.28": (256, 928),
    "0.32": (288, 896), "0.33": (288, 864), "0.35": (288, 832), "0.4": (320, 800),
    "0.42": (320, 768), "0.48": (352, 736), "0.5": (352, 704), "0.52": (352, 672),
    "0.57": (384, 672), "0.6": (384, 640), "0.68": (416, 608), "0.72": (416, 576),
    "0.78": (448, 576), "0.82": (448, 544), "0.88": (480, 544), "0.94": (480, 512),
    "1.0": (512, 512), "1.07": (512, 480), "1.13": (544, 480), "1.21": (544, 448),
    "1.29": (576, 448), "1.38": (576, 416), "1.46": (608, 416), "1.67": (640, 384),
    "1.75": (672, 384), "2.0": (704, 352), "2.09": (736, 352), "2.4": (768, 320),
    "2.5": (800, 320), "2.89": (832, 288), "3.0": (864, 288), "3.11": (896, 288),
    "3.62": (928, 256), "3.75": (960, 256), "3.88": (992, 256), "4.0": (1024, 256),
}  # fmt: skip

# The official table at 2880, copied by hand.
OFFICIAL_2880 = {
    "0.25": (1408, 5760), "0.26": (1408, 5568), "0.27": (1408, 5376), "0.28": (1408, 5184),
    "0.32": (1600, 4992), "0.33": (1600, 4800), "0.34": (1600, 4672), "0.4": (1792, 4480),
    "0.42": (1792, 4288), "0.47": (1920, 4096), "0.49": (1920, 3904), "0.51": (1920, 3776),
    "0.55": (2112, 3840), "0.59": (2112, 3584), "0.68": (2304, 3392), "0.72": (2304, 3200),
    "0.78": (2496, 3200), "0.83": (2496, 3008), "0.89": (2688, 3008), "0.93": (2688, 2880),
    "1.0": (2880, 2880), "1.07": (2880, 2688), "1.12": (3008, 2688), "1.21": (3008, 2496),
    "1.28": (3200, 2496), "1.39": (3200, 2304), "1.47": (3392, 2304), "1.7": (3584, 2112),
    "1.82": (3840, 2112), "2.03": (3904, 1920), "2.13": (4096, 1920), "2.39": (4288, 1792),
    "2.5": (4480, 1792), "2.92": (4672, 1600), "3.0": (4800, 1600), "3.12": (4992, 1600),
    "3.68": (5184, 1408), "3.82": (5376, 1408), "3.95": (5568, 1408), "4.0": (5760, 1408),
}  # fmt: skip


def test_the_table_of_2880_is_no_multiple_of_the_others():
    table = B.bucket_table(2880)
    assert {b.ratio_key: (b.height, b.width) for b in table} == OFFICIAL_2880
    assert [b.ratio_key for b in table] == list(OFFICIAL_2880)
    assert table == B.bucket_table(2880, "diffusers")
    assert all(b.height % 64 == b.width % 64 == 0 for b in table)
    # Five official keys are not the quotients of their sizes.
    assert sum(abs(b.ratio - b.height / b.width) > 0.005 for b in table) == 5
    assert B.nearest(100, 400, table).name == "1408x5760"
    # As the table in the docstring of the module says.
    assert (min(b.tokens for b in table), max(b.tokens for b in table)) == (28320, 180**2)


@pytest.mark.parametrize("size", B.SIZES)
def test_above_256_px_the_token_grids_are_even(size):
    """Compressing keys and values joins 2 x 2 tokens."""
    side = 2 * B.PIXELS_PER_TOKEN
    odd = sum(bool(b.height % side or b.width % side) for b in B.bucket_table(size))
    assert odd == (29 if size == 256 else 0)


@pytest.mark.parametrize("size", B.SIZES[:-1])
def test_official_table(size):
    table = B.bucket_table(size)
    assert [b.ratio_key for b in table] == list(OFFICIAL_512)
    for bucket in table:
        height, width = OFFICIAL_512[bucket.ratio_key]
        assert (bucket.height, bucket.width) == (height * size // 512, width * size // 512)
        assert bucket.height % (size // 16) == bucket.width % (size // 16) == 0
        assert abs(bucket.ratio - bucket.height / bucket.width) <= 0.005
    scale = (size // 256) ** 2
    assert (min(b.tokens for b in table), max(b.tokens for b in table)) == (231 * scale, 256 * scale)


@pytest.mark.parametrize("size", B.SIZES[:-1])
def test_tables_of_diffusers(size):
    alpha = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    sigma = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma")
    theirs = getattr(sigma if size == 2048 else alpha, f"ASPECT_RATIO_{size}_BIN")
    ours = {b.ratio_key: [b.height, b.width] for b in B.bucket_table(size, "diffusers")}
    assert ours == theirs and list(ours) == list(theirs)
    assert len(ours) == (40 if size == 2048 else 33)


def test_nearest_is_that_of_diffusers():
    processor = pytest.importorskip("diffusers.image_processor").PixArtImageProcessor
    table = {b.ratio_key: [b.height, b.width] for b in B.bucket_table(1024)}
    rng = random.Random(0)
    sizes = [(rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(300)]
    for height, width in sizes:
        bucket = B.nearest(height, width, B.bucket_table(1024))
        assert (bucket.height, bucket.width) == processor.classify_height_width_bin(height, width, table)
    indices = B.nearest_indices(np.array(sizes), B.bucket_table(1024))
    assert [B.bucket_table(1024)[i] for i in indices] == [
        B.nearest(h, w, B.bucket_table(1024)) for h, w in sizes
    ]


def test_nearest_is_linear_and_not_symmetric():
    table = B.bucket_table(512)
    assert B.nearest(300, 1000, table).ratio_key == "0.28"
    assert B.nearest(1000, 300, table).ratio_key == "3.11"
    assert B.nearest(1, 100, table).ratio_key == "0.25"
    assert B.nearest(100, 1, table).ratio_key == "4.0"
    # 1.25 is exactly between the keys 1.21 and 1.29 in decimals, but not in floating point. The result must
    # be that of the official code, which uses floats.
    assert B.nearest(5, 4, table) == min(table, key=lambda b: (abs(b.ratio - 1.25), b.ratio))


def test_of_equally_near_keys_the_smaller_is_chosen():
    low, high = B.Bucket(16, 32, "0.5"), B.Bucket(24, 16, "1.5")
    assert B.nearest(10, 10, [low, high]) == B.nearest(10, 10, [high, low]) == low


def test_more_images_than_one_block_of_the_search():
    sizes = np.random.default_rng(0).integers(1, 2000, (70_000, 2))
    table = B.bucket_table(512)
    keys = np.array([b.ratio for b in table])
    expected = np.abs((sizes[:, 0] / sizes[:, 1])[:, None] - keys).argmin(1)
    np.testing.assert_array_equal(B.nearest_indices(sizes, table), expected)


def test_single_size():
    assert B.square_bucket(512) == (B.Bucket(512, 512, "1.0"),)
    assert B.nearest(100, 900, B.square_bucket(48)).name == "48x48"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: B.bucket_table(640), "640.*256, 512, 1024, 2048, 2880"),
        (lambda: B.bucket_table(512, "difusers"), "Did you mean 'diffusers'"),
        (lambda: B.nearest(0, 10, B.bucket_table(512)), "0x10.*positive"),
        (lambda: B.nearest(10, 10, []), "0 buckets"),
        (lambda: B.square_bucket(250), "250.*multiples of 16.*use 240 or 256"),
    ],
)
def test_input_errors_are_one_line(call, words):
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def bucket(key):
    return next(b for b in B.bucket_table(512) if b.ratio_key == key)


def test_merge_by_hand():
    counts = {bucket("0.94"): 3, bucket("1.0"): 100, bucket("1.07"): 7, bucket("4.0"): 2, bucket("0.25"): 0}
    # 4.0 (2 images) is merged into 1.07, the nearest key, which then has 9; 0.94 (3) and 1.07 (9) into 1.0.
    assert B.merge_small_buckets(counts, 10) == {
        bucket(key): bucket("1.0") for key in ("0.94", "1.0", "1.07", "4.0")
    }
    # With a minimum of 9, the merged 1.07 is large enough and is kept.
    merged = B.merge_small_buckets(counts, 9)
    assert {a.ratio_key: b.ratio_key for a, b in merged.items()} == {
        "0.94": "1.0", "1.0": "1.0", "1.07": "1.07", "4.0": "1.07",
    }  # fmt: skip
    assert B.kept_buckets(merged) == (bucket("1.0"), bucket("1.07"))
    assert list(merged) == sorted(merged, key=lambda b: b.ratio)
    assert B.mapping_by_name(merged) == {
        "480x512": "512x512", "512x512": "512x512", "512x480": "512x480", "1024x256": "512x480",
    }  # fmt: skip


def test_merge_ties_and_order():
    # Both neighbours of 1.0 are equally near. It is merged into the one with more images; if they have
    # equally many, into the one with the smaller key.
    low, mid, high = (B.Bucket(16, 16, key) for key in ("0.5", "1.0", "1.5"))
    assert B.merge_small_buckets({low: 5, mid: 1, high: 9}, 5)[mid] == high
    assert B.merge_small_buckets({low: 9, mid: 1, high: 9}, 5)[mid] == low
    counts = dict(
        zip(B.bucket_table(512), np.random.default_rng(1).integers(0, 30, 40).tolist(), strict=True)
    )
    results = []
    for seed in range(5):
        items = list(counts.items())
        random.Random(seed).shuffle(items)
        results.append(B.merge_small_buckets(dict(items), 40))
    assert all(list(a.items()) == list(b.items()) for a, b in itertools.pairwise(results))
    totals = {}
    for source, target in results[0].items():
        totals[target] = totals.get(target, 0) + counts[source]
        assert results[0][target] == target
    assert min(totals.values()) >= 40 and sum(totals.values()) == sum(counts.values())


def test_merge_of_too_few_images_leaves_one_bucket():
    merged = B.merge_small_buckets({bucket("0.5"): 2, bucket("2.0"): 3}, 100)
    assert set(merged.values()) == {bucket("2.0")}
    assert B.merge_small_buckets({bucket("0.5"): 0}, 100) == {}


def test_share_of_an_image_that_is_cropped():
    square, wide = B.Bucket(512, 512, "1.0"), B.Bucket(256, 1024, "0.25")
    np.testing.assert_allclose(B.cropped_share(np.array([1.0, 0.5, 2.0, 0.8]), square), [0, 0.5, 0.5, 0.2])
    np.testing.assert_allclose(B.cropped_share(np.array([1.0, 0.25, 0.2]), wide), [0.75, 0, 0.2])


def test_no_merge_crops_more_than_stated():
    # 152 photos of the usual shapes, and some others.
    rng = np.random.default_rng(0)
    shapes = rng.choice([4 / 3, 3 / 4, 3 / 2, 2 / 3, 1, 16 / 9, 9 / 16], 152) * rng.uniform(0.9, 1.1, 152)
    ratios = np.concatenate([shapes, [0.1, 8.0]])
    table = B.bucket_table(1024)
    nearest = B.nearest_indices(np.stack([10_000 * ratios, np.full(154, 10_000)], 1), table)
    counts = dict(zip(table, np.bincount(nearest, minlength=40).tolist(), strict=True))

    def lost(goes_to):
        return np.array([B.cropped_share(r, goes_to[table[i]]) for r, i in zip(ratios, nearest, strict=True)])

    own = lost({bucket: bucket for bucket in table})
    free = B.merge_small_buckets(counts, 32)
    limited = {
        limit: B.merge_small_buckets(counts, 32, B.merges_within(ratios, nearest, table, limit))
        for limit in (0, 0.1, 0.3)
    }
    for limit, goes_to in limited.items():
        # A panorama loses more than the limit anyway, and keeps its bucket.
        assert (lost(goes_to) <= np.maximum(own, limit) + 1e-12).all()
    assert lost(limited[0.1])[:152].max() <= 0.1 < 0.3 < lost(free)[:152].max()
    assert lost(limited[0.1]).mean() < 0.5 * lost(free).mean()
    assert len(B.kept_buckets(free)) < len(B.kept_buckets(limited[0.3])) < len(B.kept_buckets(limited[0.1]))
    # A bucket that has as many images as a batch is not merged.
    goes_to = B.merge_small_buckets(counts, 12, B.merges_within(ratios, nearest, table, 0.1))
    enough = [bucket for bucket, count in counts.items() if count >= 12]
    assert enough and all(goes_to[bucket] == bucket for bucket in enough)
    with pytest.raises(UserError, match=r"max_crop is 1.5: it must be a share"):
        B.merges_within(ratios, nearest, table, 1.5)
