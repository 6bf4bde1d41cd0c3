"""Compression of the keys and values of self-attention (PixArt-Σ, arXiv 2403.04692 §3.2).

Axes: B batch, N image tokens, M tokens after compression, H heads, K head width, r compression factor.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models.layers import BackboneConfig, LayerNorm, metadata

# How r x r tokens become one, with the names in the official code.
OFFICIAL_MODES = {
    "conv": "conv",
    "nearest": "ave",
    "uniform": "uniform",
    "uniform_every": "uniform_every",
}
MODES = ("none", *OFFICIAL_MODES)


class CompressionConv(nnx.Module):
    """The parameters of a convolution of every channel on its own, with r x r filters and stride r.

    They start as the average of r x r tokens.
    """

    def __init__(self, heads: int, head_dim: int, factor: int):
        kernel = jnp.full((factor, factor, heads, head_dim), factor**-2.0)
        # `filters`: the first two axes are the last two of PyTorch's kernel, for optimizers that need them.
        self.kernel = nnx.Param(kernel, **metadata((None, None, "heads", None)), filters=True)
        self.bias = nnx.Param(jnp.zeros((heads, head_dim)), **metadata(("heads", None)), inputs=0)


class Compression(nnx.Module):
    """Reduces the number of keys and values of a block from N to N / r^2.

        'conv':           LN(conv(x)), where the convolution has r x r filters, one for each channel
        'nearest':        the token in the upper left corner of each r x r tokens
        'uniform':        the same, for grids whose sides r divides
        'uniform_every':  every r-th token of the sequence, N / r in all

    The same parameters serve keys and values. As in the official code, they exist in every mode, and all but
    'conv' leave them unused. If r does not divide a side of the grid, 'conv' and 'nearest' leave out its last
    rows or columns.
    """

    def __init__(self, mode: str, factor: int, heads: int, head_dim: int):
        self.mode, self.factor = mode, factor
        self.conv = CompressionConv(heads, head_dim, factor)
        self.norm = LayerNorm(heads, head_dim)

    @jax.named_scope("compress")
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Compresses keys or values.

        Args:
          x: [B, N, H, K].
          grid: rows and columns of the N tokens.

        Returns:
          [B, M, H, K] in the dtype of `x`.

        Raises:
          UserError: see `check_grid`.
        """
        batch, _, *channels = x.shape
        height, width = grid
        r = self.factor
        check_grid(self.mode, r, grid)
        if self.mode == "uniform_every":
            return x[:, ::r]
        rows, columns = height // r, width // r
        cells = x.reshape(batch, height, width, *channels)[:, : rows * r, : columns * r]
        cells = cells.reshape(batch, rows, r, columns, r, *channels)
        if self.mode != "conv":
            return cells[:, :, 0, :, 0].reshape(batch, rows * columns, *channels)
        # Products and sums of r x r tokens, not a convolution: XLA fuses them with the normalization.
        filters = self.conv.kernel[...][:, None]  # [r, 1, r, H, K]
        out = (cells.astype(jnp.float32) * filters).sum(axis=(2, 4)) + self.conv.bias[...]
        return self.norm(out.reshape(batch, rows * columns, *channels)).astype(x.dtype)


def check_grid(mode: str, factor: int, grid: tuple[int, int]) -> None:
    """Checks that the keys and values of an image can be compressed.

    Args:
      mode: one of `OFFICIAL_MODES`.
      factor: r.
      grid: rows and columns of the image tokens.

    Raises:
      UserError: no token would remain, or r does not divide the grid and the mode needs that.
    """
    height, width = grid
    what, counts, needed = f"a grid of {height}x{width} tokens", grid, mode == "uniform"
    if mode == "uniform_every":
        what, counts, needed = f"{height}x{width} = {height * width} tokens", (height * width,), True
    start = f"kv_compression '{mode}' cannot reduce {what} by {factor}"
    if min(counts) < factor:
        raise UserError(
            f"{start}, because none would remain: choose larger images or a smaller "
            "model.kv_compression_factor."
        )
    if needed and any(count % factor for count in counts):
        raise UserError(
            f"{start}: choose an image size that it divides, or the compression 'conv' or 'nearest'."
        )


def block_keys(config: BackboneConfig, grid: tuple[int, int]) -> list[int]:
    """Returns the number of keys of self-attention in each block.

    Args:
      config: config of the network.
      grid: rows and columns of the image tokens.
    """
    height, width = grid
    keys = [height * width] * config.depth
    for block in config.compressed_layers:
        r = config.kv_compression_factor
        every = config.kv_compression == "uniform_every"
        keys[block] = height * width // r if every else (height // r) * (width // r)
    return keys


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """Returns the numbers of the compressed blocks, ascending.

    Args:
      text: numbers and ranges, such as '14-27' or '0,2,14-27'; '' for the second half of the blocks.
      depth: number of blocks.

    Raises:
      UserError: `text` has another form, or names a block that does not exist.
    """
    if not text:
        return tuple(range(depth // 2, depth))
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < depth:
            raise UserError(
                f"model.kv_compression_layers is '{text:.80}': give numbers and ranges of the blocks 0 to "
                f"{depth - 1}, such as '{depth // 2}-{depth - 1}'."
            )
        layers |= set(range(first, last + 1))
    return tuple(sorted(layers))


def format_layers(layers: tuple[int, ...]) -> str:
    """The inverse of `parse_layers`: '0,2,14-27'."""
    parts = []
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
