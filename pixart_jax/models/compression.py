"""Compression of the keys and values of self-attention (PixArt-Σ, arXiv 2403.04692 §3.2).

Axes: B batch, N image tokens, M tokens after compression, H heads, K head width, r compression factor.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.models.configs import BackboneConfig, check_grid
from pixart_jax.models.layers import LayerNorm, metadata


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
