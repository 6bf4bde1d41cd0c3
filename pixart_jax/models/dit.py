"""DiT, the class-conditional diffusion transformer with adaLN-Zero (arXiv 2212.09748): stage 1 of PixArt-α.

Axes: B batch, N image tokens, D width, C latent channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.models.blocks import Blocks, TokenRoute
from pixart_jax.models.configs import DiTConfig
from pixart_jax.models.elementwise import add_gated, gelu, modulate
from pixart_jax.models.layers import (
    MLP,
    PatchEmbed,
    SelfAttention,
    linear,
    parameter,
    sinusoid,
    split_modulation,
    timestep_embedder,
    unpatchify,
)
from pixart_jax.models.mup import parametrize, read_out


def _modulation(width: int, parts: int, *, rngs: nnx.Rngs) -> nnx.LinearGeneral:
    """The adaLN-Zero projection of the condition, initialized to zero so that every block is the identity.

    Muon does not apply to it (`matrices=None`), because its input is one vector per image instead of one per
    token; AdamW trains it.
    """
    return linear(
        width,
        (parts, width),
        ("embed", None, None),
        kernel_init=nnx.initializers.zeros,
        matrices=None,
        rngs=rngs,
    )


class DiTBlock(nnx.Module):
    """x += gate_1 SelfAttn(mod_1(LN x)); x += gate_2 MLP(mod_2(LN x)) (§3.2).

    The two shifts, scales and gates are the six outputs of Linear(SiLU(c)) for the condition c.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.modulation = _modulation(width, 6, rngs=rngs)
        self.attn = SelfAttention(config, rngs=rngs)
        self.mlp = MLP(width, config.mlp_size, width, activation=gelu, dtype=config.compute_dtype, rngs=rngs)

    @jax.named_scope("block")
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """x [B, N, D], condition [B, D] float32, already through SiLU -> [B, N, D]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = split_modulation(self.modulation(condition))
        x = add_gated(x, gate_1, self.attn(modulate(x, shift_1, scale_1)))
        return add_gated(x, gate_2, self.mlp(modulate(x, shift_2, scale_2)))


class DiTFinalLayer(nnx.Module):
    """Linear(LN(x) (1 + scale) + shift), [shift, scale] = Linear(SiLU(c))."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.modulation = _modulation(config.hidden_size, 2, rngs=rngs)
        self.linear = linear(
            config.hidden_size,
            config.patch_size**2 * config.out_channels,
            ("embed", None),
            kernel_init=nnx.initializers.zeros,
            dtype=config.compute_dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """x [B, N, D], condition [B, D] float32, already through SiLU -> [B, N, p p C]."""
        shift, scale = split_modulation(self.modulation(condition))
        return self.linear(read_out(modulate(x, shift, scale), self.config))


class DiT(nnx.Module):
    """Predicts noise and variance from a noised latent, a timestep and a class."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.patch_embed = PatchEmbed(config, bias_init=nnx.initializers.zeros, rngs=rngs)
        self.t_embedder = timestep_embedder(width, rngs=rngs)
        self.label_table = parameter(
            nnx.initializers.normal(0.02)(rngs.params(), (config.num_classes + 1, width)),
            (None, "embed"),
        )
        self.blocks = Blocks(config, lambda rngs: DiTBlock(config, rngs=rngs), rngs=rngs)
        self.final_layer = DiTFinalLayer(config, rngs=rngs)
        parametrize(self, config)

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        labels: jax.Array,
        *,
        route: TokenRoute | None = None,
        tap: int | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Predicts noise and variance.

        Args:
          latents: [B, height, width, C]; the patch size must divide height and width.
          timesteps: [B] on the 0..999 scale, integers or fractions.
          labels: [B] int, 0 .. num_classes - 1, or num_classes for "no class".
          route: tokens that skip blocks during training; None if all tokens pass through all blocks.
          tap: a block, counted from 1, whose tokens are returned too; None for none.

        Returns:
          [B, height, width, 2C] float32: noise in the first C channels, variance in the last C. Without
          learned variance, [B, height, width, C]. With `tap`, also the tokens after that block, see `Blocks`.
        """
        config = self.config
        height, width = latents.shape[1:3]
        x = self.patch_embed(latents.astype(config.compute_dtype))  # [B, N, D]
        t = self.t_embedder(sinusoid(timesteps))  # [B, D] float32
        condition = jax.nn.silu(t + self.label_table[...][labels])
        x = self.blocks(x, condition, route=route, tap=tap)
        x, tapped = x if tap else (x, None)
        x = self.final_layer(x, condition)
        output = unpatchify(x, height, width, config.patch_size).astype(jnp.float32)
        return (output, tapped) if tap else output
