"""Decoding latents in overlapping tiles, for images whose activations would not fit in memory at once.

Axes: B batch, h, w rows and columns of latents, H, W of the image, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError


def decode_in_tiles(
    decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int, overlap: int
) -> jax.Array:
    """Decodes square tiles one at a time and blends them where they overlap.

    Tiles are spread evenly over each axis, and their weights fall linearly to 0 across the overlap. Near an
    inner edge of a tile, where it fades out, the convolutions of the decoder see zeros instead of the
    neighbouring tile. For latents that fit in one tile, the result is exactly `decode(latents)`.

    Args:
      decode: [B, h, w, C] to [B, s h, s w, C'] float32 for a whole number s, the same for all sizes.
      latents: [B, h, w, C].
      tile: side of a tile in latent positions.
      overlap: minimum overlap of neighbouring tiles in latent positions, below `tile`.

    Returns:
      [B, H, W, C'] float32.

    Raises:
      UserError: `overlap` is negative, or not below `tile`.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"tile is {tile} and overlap {overlap}: the overlap must be in [0, tile).")
    batch, height, width, channels = latents.shape
    if height <= tile and width <= tile:
        return decode(latents)
    tile_shape = (batch, min(tile, height), min(tile, width), channels)
    decoded = jax.eval_shape(decode, jax.ShapeDtypeStruct(tile_shape, latents.dtype))
    scale = decoded.shape[1] // tile_shape[1]
    tops, row_weights = _tiles_along(height, tile, overlap, scale)
    lefts, column_weights = _tiles_along(width, tile, overlap, scale)

    def add_tile(image: jax.Array, place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, column = place
        top, left = jnp.asarray(tops)[row], jnp.asarray(lefts)[column]
        piece = decode(jax.lax.dynamic_slice(latents, (0, top, left, 0), tile_shape))
        weights = jnp.asarray(row_weights)[row][:, None] * jnp.asarray(column_weights)[column]
        corner = (0, top * scale, left * scale, 0)
        current = jax.lax.dynamic_slice(image, corner, piece.shape)
        image = jax.lax.dynamic_update_slice(image, current + weights[:, :, None] * piece, corner)
        return image, None

    empty = jnp.zeros((batch, height * scale, width * scale, decoded.shape[3]))
    rows, columns = np.indices((len(tops), len(lefts))).reshape(2, -1)
    return jax.lax.scan(add_tile, empty, (jnp.asarray(rows), jnp.asarray(columns)))[0]


def _tiles_along(size: int, tile: int, overlap: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles start along one axis, and how their pixels are weighted.

    Args:
      size: length of the axis in latent positions.
      tile, overlap: as in `decode_in_tiles`.
      scale: pixels per latent position.

    Returns:
      starts [n] int32 in latent positions, weights [n, tile * scale] float32 that add up to 1 at every pixel.
    """
    tile = min(tile, size)
    count = 1 if tile == size else math.ceil((size - overlap) / (tile - overlap))
    starts = np.round(np.linspace(0, size - tile, count)).astype(np.int32)
    position = np.arange(tile * scale) + 0.5
    fade_in = np.minimum(position / max(overlap * scale, 1), 1)
    weights = np.ones((count, tile * scale))
    weights[1:] *= fade_in
    weights[:-1] *= fade_in[::-1]
    total = np.zeros(size * scale)
    for start, weight in zip(starts, weights):
        total[start * scale : (start + tile) * scale] += weight
    for start, weight in zip(starts, weights):
        weight /= total[start * scale : (start + tile) * scale]
    return starts, weights.astype(np.float32)
