"""The size an image is generated at, and the size it is resized to."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from PIL import Image

from pixart_jax.data.buckets import PIXELS_PER_TOKEN, SIZES, bucket_table, nearest
from pixart_jax.errors import UserError, at_least

# Pixels of the largest image that Pillow opens. `sample` opens its images again, to continue and for sheets.
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS

_RATIO = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


class Size(NamedTuple):
    """In pixels. The model generates height x width; the image is resized to out_height x out_width."""

    height: int
    width: int
    out_height: int
    out_width: int
    # Side of the tiles that the VAE decodes one after the other; 0 for the whole image at once.
    tile: int = 0


def choose_size(
    height: int | None,
    width: int | None,
    aspect_ratio: str | None = None,
    *,
    base: int,
    step: int,
    bins: str = "diffusers",
    binning: bool = True,
) -> Size:
    """Chooses the bucket with the nearest aspect ratio, as diffusers' `use_resolution_binning` does.

    Buckets exist for models of 256, 512, 1024, 2048 and 2880 px; other models generate any size.

    Args:
      height, width: requested size in pixels; None for the side of the square the model was trained at.
      aspect_ratio: 'WIDTH:HEIGHT', such as '16:9', instead of both; the image then keeps the size of its
        bucket.
      base: side of that square, in pixels.
      step: the model generates sides that are multiples of this.
      bins: as for `data.buckets.bucket_table`.
      binning: False generates height x width itself.

    Raises:
      UserError: a size together with an aspect ratio, a size below 1, an image of more than `MAX_PIXELS`, or
        a size that the model cannot generate.
    """
    buckets = bucket_table(base, bins) if base in SIZES and PIXELS_PER_TOKEN % step == 0 else None
    if aspect_ratio is not None:
        if height is not None or width is not None:
            raise UserError(
                f"aspect_ratio '{aspect_ratio}' is given together with height or width: give only one."
            )
        wide, high = _parse_ratio(aspect_ratio)
        if buckets:
            bucket = nearest(high, wide, buckets)
            return Size(bucket.height, bucket.width, bucket.height, bucket.width)
        # The same area as the square.
        sides = (base * math.sqrt(high / wide), base * math.sqrt(wide / high))
        height, width = (max(round(side / step), 1) * step for side in sides)
        return Size(height, width, height, width)
    height, width = (base if side is None else side for side in (height, width))
    for name, side in (("height", height), ("width", width)):
        at_least(name, side, 1)
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{width}x{height} px (width x height) are {height * width:,} pixels: an image may have at most "
            f"{MAX_PIXELS:,}, such as 13376x13376. Give smaller sides."
        )
    if buckets and binning:
        bucket = nearest(height, width, buckets)
        return Size(bucket.height, bucket.width, height, width)
    for name, side in (("height", height), ("width", width)):
        if side % step:
            below = max(side // step, 1) * step
            raise UserError(
                f"{name} is {side} px: it must be a multiple of {step}, such as {below} or {below + step}."
            )
    return Size(height, width, height, width)


def _parse_ratio(text: str) -> tuple[float, float]:
    match = _RATIO.fullmatch(text.strip())
    wide, high = (float(number) for number in match.groups()) if match else (0.0, 0.0)
    if not wide > 0 < high or not 0.01 < wide / high < 100:
        raise UserError(f"aspect_ratio '{text}': give WIDTH:HEIGHT, such as 16:9.")
    return wide, high
