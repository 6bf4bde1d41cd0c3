"""Aspect-ratio buckets: the official tables, the nearest bucket of an image, and merging of small buckets.

A bucket is one image size (height x width, in pixels) together with the key of its aspect ratio, which is
height / width rounded to two decimals, as the official tables write it ("0.57", "1.0"); five official keys
of the table of 2880 differ from that, by up to 0.09. The official training code uses the key, not the exact
quotient, to find the nearest bucket and as the aspect-ratio condition of the model. Both are available:
`Bucket.ratio` is the key as a number, `Bucket.height / Bucket.width` is exact.

    size    sides are multiples of    image tokens (16 x 16 pixels each)
     256             16                     231 ..   256
     512             32                     924 ..  1024
    1024             64                    3696 ..  4096
    2048            128                   14784 .. 16384
    2880             64                   28320 .. 32400

PixArt-alpha has 256, 512 and 1024; PixArt-Sigma adds 2048 and 2880. The first four tables are the same up to
a factor. That of 2880 has other aspect ratios. Above 256 px, the token grids of all buckets have even sides,
as the compression of keys and values requires.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixart_jax.constants import VAE_DOWNSAMPLING
from pixart_jax.errors import UserError, one_of

# (height, width) of the landscape buckets and the square at 512, by rising height / width.
_LANDSCAPE_512 = (
    (256, 1024), (256, 992), (256, 960), (256, 928),
    (288, 896), (288, 864), (288, 832),
    (320, 800), (320, 768),
    (352, 736), (352, 704), (352, 672),
    (384, 672), (384, 640),
    (416, 608), (416, 576),
    (448, 576), (448, 544),
    (480, 544), (480, 512),
    (512, 512),
)  # fmt: skip
_LANDSCAPE_2880 = (
    (1408, 5760), (1408, 5568), (1408, 5376), (1408, 5184),
    (1600, 4992), (1600, 4800), (1600, 4672),
    (1792, 4480), (1792, 4288),
    (1920, 4096), (1920, 3904), (1920, 3776),
    (2112, 3840), (2112, 3584),
    (2304, 3392), (2304, 3200),
    (2496, 3200), (2496, 3008),
    (2688, 3008), (2688, 2880),
    (2880, 2880),
)  # fmt: skip
# The official keys that are not the rounded height / width; all are of 2880.
_OTHER_KEYS = {
    (1408, 5760): "0.25", (1408, 5568): "0.26", (1408, 5376): "0.27", (1408, 5184): "0.28",
    (5760, 1408): "4.0",
}  # fmt: skip
# The portrait buckets are the transposes, except for the one at this place: the official tables have neither
# (672, 352) nor (3776, 1920).
_NO_TRANSPOSE = 11

SIZES = (256, 512, 1024, 2048, 2880)
# Sizes whose images the official code of PixArt-Sigma resizes with a Lanczos filter, the others with a
# bicubic one (InternalData_ms.py).
LANCZOS_SIZES = (2048, 2880)
BINS = ("official", "diffusers")
# Keys that are missing in diffusers' PixArtAlphaPipeline at 256, 512 and 1024. Its 2048 table has all 40, and
# it has no table for 2880.
_NOT_IN_DIFFUSERS = frozenset(["0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"])

# Side of an image token in pixels; a token is a patch of 2 x 2 latent positions.
PIXELS_PER_TOKEN = 2 * VAE_DOWNSAMPLING


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One image size.

    Attributes:
      height: height in pixels.
      width: width in pixels.
      ratio_key: key of the aspect ratio, written as in the official tables.
    """

    height: int
    width: int
    ratio_key: str

    @classmethod
    def of(cls, height: int, width: int) -> Bucket:
        """Returns the bucket of an image size in pixels.

        Raises:
          UserError: a side is not a positive multiple of 16.
        """
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % PIXELS_PER_TOKEN:
                lower = max(1, side // PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN
                raise UserError(
                    f"bucket {name} {side}: sides must be positive multiples of {PIXELS_PER_TOKEN} pixels; "
                    f"use {lower} or {lower + PIXELS_PER_TOKEN}"
                )
        return cls(height, width, str(round(height / width, 2)))

    @property
    def ratio(self) -> float:
        """The key as a number, which is the aspect-ratio condition in the official training code."""
        return float(self.ratio_key)

    @property
    def tokens(self) -> int:
        """Number of image tokens of the transformer."""
        return (self.height // PIXELS_PER_TOKEN) * (self.width // PIXELS_PER_TOKEN)

    @property
    def name(self) -> str:
        """The name used in manifests and file names: HEIGHTxWIDTH."""
        return f"{self.height}x{self.width}"


@functools.cache
def bucket_table(size: int, bins: str = "official") -> tuple[Bucket, ...]:
    """Returns the buckets of a training size, by rising height / width.

    Args:
      size: side of the square bucket in pixels: 256, 512, 1024, 2048 or 2880.
      bins: "official" for all 40 buckets, "diffusers" for those of its pipelines (33; all 40 from 2048 on).

    Raises:
      UserError: unknown size or bins.
    """
    if size not in SIZES:
        raise UserError(
            f"bucket size {size}: aspect-ratio buckets exist for {', '.join(map(str, SIZES))}; "
            "train other sizes with the single square bucket"
        )
    one_of("bins", bins, BINS)
    landscape = _LANDSCAPE_2880
    if size != 2880:
        landscape = [(h * size // 512, w * size // 512) for h, w in _LANDSCAPE_512]
    portrait = [(w, h) for i, (h, w) in enumerate(landscape[:-1]) if i != _NO_TRANSPOSE]
    table = [Bucket.of(h, w) for h, w in (*landscape, *reversed(portrait))]
    table = [
        dataclasses.replace(each, ratio_key=_OTHER_KEYS.get((each.height, each.width), each.ratio_key))
        for each in table
    ]
    if bins == "diffusers" and size < 2048:
        table = [bucket for bucket in table if bucket.ratio_key not in _NOT_IN_DIFFUSERS]
    return tuple(table)


def square_bucket(size: int) -> tuple[Bucket, ...]:
    """Returns the only bucket of training on a single size: a square to which every image is centre-cropped.

    Args:
      size: side in pixels, a multiple of 16.

    Raises:
      UserError: the size is not a positive multiple of 16.
    """
    return (Bucket.of(size, size),)


def nearest(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """Returns the bucket whose key is nearest to height / width.

    The distance is linear in height / width, as in the official code and in diffusers, and therefore not
    symmetric: the nearest key of 300x1000 (height x width) is 0.28; that of 1000x300 is 3.11 and not 3.62,
    the transpose of 0.28. If two keys are equally near, the smaller one is chosen.

    Args:
      height: height of the image in pixels.
      width: width of the image in pixels.
      buckets: the buckets to choose from, in any order.

    Raises:
      UserError: a side is not positive, or there are no buckets.
    """
    return buckets[int(nearest_indices(np.array([[height, width]]), buckets)[0])]


def nearest_indices(sizes: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """`nearest` for many images at once.

    Args:
      sizes: integers [N, 2], (height, width) in pixels.
      buckets: the buckets to choose from, in any order.

    Returns:
      int32 [N], indices into `buckets`.

    Raises:
      UserError: a side is not positive, or there are no buckets.
    """
    sizes = np.asarray(sizes).reshape(-1, 2)
    if not buckets:
        raise UserError("0 buckets: give at least one")
    if len(sizes) and sizes.min() <= 0:
        height, width = sizes[sizes.min(axis=1) <= 0][0]
        raise UserError(f"image size {height}x{width} (h x w): both sides must be positive")
    # `argmin` returns the first of equal distances: sorted by key, that is the smaller key.
    order = np.argsort([bucket.ratio for bucket in buckets], kind="stable")
    keys = np.array([buckets[i].ratio for i in order])
    found = np.empty(len(sizes), np.int32)
    block = 1 << 16  # limits the memory of the [block, buckets] matrix to 20 MB for 40 buckets
    for start in range(0, len(sizes), block):
        ratios = sizes[start : start + block, 0] / sizes[start : start + block, 1]
        found[start : start + block] = order[np.abs(ratios[:, None] - keys).argmin(axis=1)]
    return found


def cropped_share(ratios: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Returns the share of each image that is cropped away in a bucket, 0 to 1.

    An image of aspect ratio r (height / width) that is resized to just cover a bucket of aspect ratio b
    loses 1 - min(r / b, b / r) of its area.

    Args:
      ratios: height / width of the images, [N].
      bucket: the bucket.
    """
    relative = np.asarray(ratios) * bucket.width / bucket.height
    return 1 - np.minimum(relative, 1 / relative)


def merges_within(
    ratios: np.ndarray, nearest: np.ndarray, buckets: Sequence[Bucket], max_crop: float
) -> Callable[[Bucket, Bucket], bool]:
    """Returns a condition for `merge_small_buckets`: no merge crops away more than `max_crop` of an image.

    An image that loses more than that in its nearest bucket must not lose more in another one.

    Args:
      ratios: height / width of the images, [N].
      nearest: index of the nearest bucket of each image, [N].
      buckets: the buckets.
      max_crop: the largest share, 0 to 1.

    Raises:
      UserError: `max_crop` is out of range.
    """
    if not 0 <= max_crop <= 1:
        raise UserError(f"max_crop is {max_crop}: it must be a share of an image, 0 to 1.")
    extremes = {}
    for index, bucket in enumerate(buckets):
        own = ratios[nearest == index]
        # The loss grows with the distance between the ratios, so the extreme images decide.
        extremes[bucket] = np.array([own.min(), own.max()]) if len(own) else np.array([])

    def allowed(bucket: Bucket, target: Bucket) -> bool:
        limit = np.maximum(max_crop, cropped_share(extremes[bucket], bucket))
        return bool((cropped_share(extremes[bucket], target) <= limit).all())

    return allowed


def merge_small_buckets(
    counts: Mapping[Bucket, int],
    minimum: int,
    allowed: Callable[[Bucket, Bucket], bool] = lambda bucket, target: True,
) -> dict[Bucket, Bucket]:
    """Merges buckets that have too few images into their neighbours.

    As long as there is more than one bucket and one of them has fewer than `minimum` images, the bucket with
    the fewest images (in a tie, the smaller key) is merged into the allowed bucket with the nearest key (in a
    tie, the one with more images, then the smaller key). A bucket that may not be merged is kept, however
    few images it has. Empty buckets are ignored. The result does not depend on the order of the counts. If
    all merges are allowed and there are fewer than `minimum` images altogether, a single bucket remains.

    Args:
      counts: number of images of each bucket.
      minimum: number of images that a bucket should have, such as the batch size.
      allowed: whether the images of a bucket (the first argument) may be moved to another one.

    Returns:
      for every bucket that has images, by rising key, the bucket that its images are moved to. A bucket that
      is kept is mapped to itself.
    """
    left = {bucket: count for bucket, count in counts.items() if count > 0}
    goes_to = {bucket: bucket for bucket in sorted(left, key=_by_ratio)}
    stuck: set[Bucket] = set()
    while small_ones := [b for b, images in left.items() if images < minimum and b not in stuck]:
        small = min(small_ones, key=lambda bucket: (left[bucket], *_by_ratio(bucket)))
        merged = [bucket for bucket, to in goes_to.items() if to == small]
        targets = [b for b in left if b != small and all(allowed(bucket, b) for bucket in merged)]
        if not targets:
            # Later merges only remove targets, and give it more images that have to be allowed.
            stuck.add(small)
            continue
        images = left.pop(small)
        target = min(targets, key=lambda b: (abs(b.ratio - small.ratio), -left[b], *_by_ratio(b)))
        left[target] += images
        goes_to = {bucket: target if to == small else to for bucket, to in goes_to.items()}
    return goes_to


def mapping_by_name(mapping: Mapping[Bucket, Bucket]) -> dict[str, str]:
    """Converts the result of `merge_small_buckets` to bucket names, for the manifest."""
    return {bucket.name: target.name for bucket, target in mapping.items()}


def kept_buckets(mapping: Mapping[Bucket, Bucket]) -> tuple[Bucket, ...]:
    """Returns the buckets that remain after `merge_small_buckets`, by rising key."""
    return tuple(sorted(set(mapping.values()), key=_by_ratio))


def _by_ratio(bucket: Bucket) -> tuple[float, int, int]:
    return bucket.ratio, bucket.height, bucket.width
