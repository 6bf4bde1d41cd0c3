"""PixArt-α and PixArt-Σ, diffusion transformers conditioned on text through cross-attention.

arXiv 2310.00426 §2.3, and 2403.04692 §3.2 for what Σ adds: normalized queries and keys, compressed keys and
values.

Axes: B batch, N image tokens, S text tokens, D width, T text width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models.attention import compact_keys
from pixart_jax.models.blocks import Blocks, TokenRoute
from pixart_jax.models.compression import Compression
from pixart_jax.models.configs import (
    NULL_TEXT,
    BackboneConfig,
    PixArtConfig,
)
from pixart_jax.models.elementwise import add_gated, gelu, modulate
from pixart_jax.models.layers import (
    CONDITION_INIT,
    MLP,
    TIMESTEP_FEATURES,
    CrossAttention,
    PatchEmbed,
    SelfAttention,
    constrain,
    linear,
    parameter,
    sinusoid,
    split_modulation,
    timestep_embedder,
    unpatchify,
)
from pixart_jax.models.mup import parametrize, read_out


def _table_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """N(0, 1) / sqrt(D), where D is the size of the last axis."""
    return jax.random.normal(key, shape, dtype) / jnp.sqrt(shape[-1])


def _patch_bias_init(fan_in: int):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for convolutions, which PixArt keeps."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class PixArtBlock(nnx.Module):
    """x += gate_1 SelfAttn(mod_1(LN x)); x += CrossAttn(x, text); x += gate_2 MLP(mod_2(LN x)).

    adaLN-single (§2.3): the two shifts, scales and gates are the sum of a function of the timestep, which all
    blocks share, and the block's own `scale_shift_table`. The cross-attention has neither norm nor gate.
    """

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.scale_shift_table = parameter(_table_init(rngs.params(), (6, width)), (None, "embed"))
        self.attn = SelfAttention(config, qk_norm=config.qk_norm, rngs=rngs)
        self.cross_attn = CrossAttention(config, rngs=rngs)
        self.mlp = MLP(width, config.mlp_size, width, activation=gelu, dtype=config.compute_dtype, rngs=rngs)

    @jax.named_scope("block")
    def __call__(
        self,
        x: jax.Array,
        modulation: jax.Array,
        text: jax.Array,
        text_lengths: jax.Array,
        compress: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """x [B, N, D], modulation [B, 6, D] float32, text [B, S, D], text_lengths [B] -> [B, N, D].

        `compress` reduces the tokens of the keys and values of self-attention.
        """
        table = self.scale_shift_table + modulation
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = split_modulation(table)
        x = add_gated(x, gate_1, self.attn(modulate(x, shift_1, scale_1), compress))
        x = x + self.cross_attn(x, text, text_lengths)
        return add_gated(x, gate_2, self.mlp(modulate(x, shift_2, scale_2)))


class FinalLayer(nnx.Module):
    """Linear(LN(x) (1 + scale) + shift) with [shift, scale] = scale_shift_table + t.

    As in the official code, t is the timestep embedding itself, not the output of `t_block`.
    """

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.scale_shift_table = parameter(_table_init(rngs.params(), (2, width)), (None, "embed"))
        self.linear = linear(
            width,
            config.patch_size**2 * config.out_channels,
            ("embed", None),
            kernel_init=nnx.initializers.zeros,
            dtype=config.compute_dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """x [B, N, D], t [B, D] float32 -> [B, N, p p C]."""
        shift, scale = split_modulation(self.scale_shift_table + t[:, None])
        return self.linear(read_out(modulate(x, shift, scale), self.config))


def has_null_caption(params: Mapping[str, Any]) -> bool:
    """False for a PixArt from a format or file without a null caption, which is then zero."""
    return NULL_TEXT not in params or bool(np.any(np.asarray(params[NULL_TEXT])))


class PixArt(nnx.Module):
    """Predicts noise and variance from a noised latent, a timestep and a caption.

    The initialization is that of the official code: N(0, 0.02) for the timestep, size and caption embedders;
    zero for the output projections of cross-attention and for the last layer, so that the initial output is
    zero; Xavier for the other linear layers (fused projections as a single matrix).
    """

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        fan_in = config.patch_size**2 * config.in_channels
        self.patch_embed = PatchEmbed(config, bias_init=_patch_bias_init(fan_in), rngs=rngs)
        self.t_embedder = timestep_embedder(width, rngs=rngs)
        self.t_block = linear(width, (6, width), ("embed", None, None), kernel_init=CONDITION_INIT, rngs=rngs)
        self.text_proj = MLP(
            config.text_dim,
            width,
            width,
            activation=gelu,
            axes=(None, "embed", None),
            kernel_init=CONDITION_INIT,
            dtype=config.compute_dtype,
            rngs=rngs,
        )
        if config.size_conditions:
            third = width // 3
            for name in ("size_embedder", "ratio_embedder"):
                embedder = MLP(
                    TIMESTEP_FEATURES,
                    third,
                    third,
                    activation=jax.nn.silu,
                    axes=(None, None, None),
                    kernel_init=CONDITION_INIT,
                    rngs=rngs,
                )
                setattr(self, name, embedder)
        self.blocks = Blocks(
            config,
            lambda rngs: PixArtBlock(config, rngs=rngs),
            make_compression=lambda: Compression(
                config.kv_compression, config.kv_compression_factor, config.num_heads, config.head_dim
            ),
            compressed=config.compressed_layers,
            rngs=rngs,
        )
        self.final_layer = FinalLayer(config, rngs=rngs)
        self.null_text = parameter(
            _table_init(rngs.params(), (config.text_length, config.text_dim)),
            (None, None),
        )
        parametrize(self, config)

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        image_size: jax.Array | None = None,
        aspect_ratio: jax.Array | None = None,
        *,
        route: TokenRoute | None = None,
        tap: int | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Predicts noise and variance.

        Args:
          latents: [B, height, width, C]; the patch size must divide height and width.
          timesteps: [B] on the 0..999 scale, integers or fractions.
          text: [B, S, T] text features; S may differ from `config.text_length`.
          text_mask: [B, S], non-zero for valid tokens.
          image_size: [B, 2] original height and width in pixels; required with size conditions.
          aspect_ratio: [B, 1] height / width; required with size conditions.
          route: tokens that skip blocks during training; None if all tokens pass through all blocks.
          tap: a block, counted from 1, whose tokens are returned too; None for none.

        Returns:
          [B, height, width, 2C] float32: noise in the first C channels, variance in the last C. Without
          learned variance, [B, height, width, C]. With `tap`, also the tokens after that block, see `Blocks`.

        Raises:
          UserError: if a shape does not fit this model, if required size conditions are missing, or if size
            conditions are passed to a model without them.
        """
        config = self.config
        self._check(text, text_mask, image_size, aspect_ratio)
        height, width = latents.shape[1:3]
        dtype = config.compute_dtype

        x = self.patch_embed(latents.astype(dtype))  # [B, N, D]
        t = self.t_embedder(sinusoid(timesteps))  # [B, D] float32
        if config.size_conditions:
            t = t + self._size_embedding(image_size, aspect_ratio)
        modulation = self.t_block(jax.nn.silu(t))  # [B, 6, D] float32
        # Project before compacting: the projection acts on each token separately, and compacting then moves D
        # instead of T channels (1152 instead of 4096 for XL/2).
        text, text_lengths = compact_keys(self.text_proj(text.astype(dtype)), text_mask)
        text = constrain(text, "batch", None, None)  # [B, S, D]
        grid = config.grid(height, width)
        x = self.blocks(x, modulation, text, text_lengths, route=route, grid=grid, tap=tap)
        x, tapped = x if tap else (x, None)
        x = self.final_layer(x, t)
        output = unpatchify(x, height, width, config.patch_size).astype(jnp.float32)
        return (output, tapped) if tap else output

    def _size_embedding(self, image_size: jax.Array, aspect_ratio: jax.Array) -> jax.Array:
        """Concatenates embeddings of height, width and aspect ratio, D/3 each -> [B, D].

        The sinusoids take the sizes in pixels, without scaling.
        """
        sizes = self.size_embedder(sinusoid(image_size))  # [B, 2, D/3]
        ratio = self.ratio_embedder(sinusoid(aspect_ratio))  # [B, 1, D/3]
        return jnp.concatenate([sizes, ratio], axis=1).reshape(image_size.shape[0], -1)

    def _check(self, text, text_mask, image_size, aspect_ratio) -> None:
        config = self.config
        if text.ndim != 3 or text.shape[2] != config.text_dim or text_mask.shape != text.shape[:2]:
            raise UserError(
                f"text has the shape {text.shape} and text_mask {text_mask.shape}: pass text features "
                f"[B, S, {config.text_dim}] and a mask [B, S]."
            )
        given = [
            name for name, v in (("image_size", image_size), ("aspect_ratio", aspect_ratio)) if v is not None
        ]
        if config.size_conditions and len(given) < 2:
            raise UserError(
                "this model has size conditions: pass image_size [B, 2] (height, width in pixels) and "
                "aspect_ratio [B, 1]."
            )
        if given and not config.size_conditions:
            raise UserError(f"this model has no size conditions: do not pass {' and '.join(given)}.")
