"""PixArt with adaLN, the baseline for adaLN-single: every block has its own modulation layer.

Everything else is as in PixArt: cross-attention, text projection, last layer. The modulation layers are
initialized with zeros as in DiT (adaLN-Zero, arXiv 2212.09748 section 3.2).
"""

from __future__ import annotations

import jax
from flax import nnx

from pixart_jax.models.blocks import Blocks
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.elementwise import add_gated, gelu, modulate
from pixart_jax.models.layers import MLP, CrossAttention, SelfAttention, linear, split_modulation
from pixart_jax.models.pixart import PixArt


class AdaLNBlock(nnx.Module):
    """x += gate_1 SelfAttn(mod_1(LN x)); x += CrossAttn(x, text); x += gate_2 MLP(mod_2(LN x)).

    adaLN: the six shifts, scales and gates are W_i SiLU(t) + b_i, where each block has its own W_i [D, 6, D].
    """

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.modulation = linear(
            width,
            (6, width),
            ("embed", None, None),
            kernel_init=nnx.initializers.zeros,
            matrices=None,
            rngs=rngs,
        )
        self.attn = SelfAttention(config, rngs=rngs)
        self.cross_attn = CrossAttention(config, rngs=rngs)
        self.mlp = MLP(width, config.mlp_size, width, activation=gelu, dtype=config.compute_dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, active: jax.Array, text: jax.Array, text_lengths: jax.Array
    ) -> jax.Array:
        """x [B, N, D], active = SiLU(t) [B, D] float32, text [B, S, D], text_lengths [B] -> [B, N, D]."""
        table = self.modulation(active)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = split_modulation(table)
        x = add_gated(x, gate_1, self.attn(modulate(x, shift_1, scale_1)))
        x = x + self.cross_attn(x, text, text_lengths)
        return add_gated(x, gate_2, self.mlp(modulate(x, shift_2, scale_2)))


class AdaLNPixArt(PixArt):
    """PixArt without the shared `t_block`: each block computes its modulation from SiLU(t)."""

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        del self.t_block, self.blocks
        self.t_block = _pass_on
        self.blocks = Blocks(config, lambda rngs: AdaLNBlock(config, rngs=rngs), rngs=rngs)


def _pass_on(active: jax.Array) -> jax.Array:
    return active


class AdaLNConfig(PixArtConfig):
    """The config of an `AdaLNPixArt`."""

    def make(self, *, rngs: nnx.Rngs) -> AdaLNPixArt:
        return AdaLNPixArt(self, rngs=rngs)
