"""AutoencoderKL: the image autoencoder of Stable Diffusion 1.x and XL (arXiv 2112.10752 §3.1, App. G).

Axes: B batch, H, W rows and columns of images in pixels, h, w rows and columns of latents, C channels,
Z latent channels, N = h w tokens of the middle attention.

Whatever the compute dtype, these are computed in float32: group-norm statistics and the SiLU that follows,
attention logits and softmax, and the encoder's last two convolutions, whose output is stored as features. The
weights may be kept in bfloat16; they are cast where they are used.

Logical axes: 'embed' for the output channels of convolutions, and 'batch'. Small arrays are replicated.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from pixart_jax.errors import UserError, short
from pixart_jax.models.attention import attention
from pixart_jax.models.layers import constrain, linear, parameter
from pixart_jax.models.tiling import decode_in_tiles

GROUP_NORM_EPS = 1e-6

# Bounds of the log variance (DiagonalGaussianDistribution in the code of arXiv 2112.10752).
LOG_VARIANCE_RANGE = (-30.0, 20.0)

# Largest number of queries in the middle attention at one time. Computed at once, the N x N logits of one
# 1024 px image would take 1 GiB.
QUERY_CHUNK = 4096

# Fields of a diffusers config.json that have no effect here: a training size, and a request for float32.
_WITHOUT_EFFECT = ("sample_size", "force_upcast")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """An AutoencoderKL; the defaults are Stable Diffusion 1.x. Fields are named as in diffusers."""

    # Channels of the images that are encoded, and of those that are decoded.
    in_channels: int = 3
    out_channels: int = 3
    # Channels Z of the latents.
    latent_channels: int = 4
    # Channels of each level. Every level but the last halves height and width.
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    # Residual blocks in each level of the encoder; the decoder's levels have one more.
    layers_per_block: int = 2
    # Number of groups in the group norms.
    norm_num_groups: int = 32
    # A diffusion model sees (latents - shift_factor) * scaling_factor. This module applies neither of them.
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    # Self-attention at the lowest resolution.
    mid_block_add_attention: bool = True
    # 1x1 convolutions after the encoder and before the decoder.
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    # Compute dtype: 'float32' or 'bfloat16'. Not float16: SDXL's activations exceed its maximum, 65504.
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
            _check_whole(name, getattr(self, name))
        if not self.block_out_channels:
            raise UserError("VAE config: block_out_channels is empty: give at least one level.")
        for channels in self.block_out_channels:
            _check_whole("block_out_channels", channels)
            if channels % self.norm_num_groups:
                raise UserError(
                    f"VAE config: norm_num_groups {self.norm_num_groups} must divide every value of "
                    f"block_out_channels {self.block_out_channels}."
                )
        scale = self.scaling_factor
        if type(scale) not in (int, float) or not 0 < scale <= sys.float_info.max:
            raise UserError(
                f"VAE config: scaling_factor is {scale!r:.200}: it must be a finite number above 0."
            )
        shift = self.shift_factor
        if type(shift) not in (int, float) or not abs(shift) <= sys.float_info.max:
            raise UserError(f"VAE config: shift_factor is {shift!r:.200}: it must be a finite number.")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"VAE dtype is '{self.dtype}': choose 'float32' or 'bfloat16'.")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], *, dtype: str = "float32") -> VAEConfig:
        """Reads the config.json of a diffusers AutoencoderKL.

        Args:
          values: the parsed file. Fields that are missing have the defaults of diffusers.
          dtype: compute dtype.

        Raises:
          UserError: the file is of another class, or has a field or value that is not supported.
        """
        class_name = values.get("_class_name", "AutoencoderKL")
        if class_name != "AutoencoderKL":
            raise UserError(
                f"VAE config: _class_name is '{class_name}', but only AutoencoderKL is supported."
            )
        rest = {name: value for name, value in values.items() if not name.startswith("_")}
        for name in _WITHOUT_EFFECT:
            rest.pop(name, None)
        levels = rest.pop("block_out_channels", (64,))
        for name in ("block_out_channels", "down_block_types", "up_block_types"):
            if not isinstance(values.get(name, []), list | tuple):
                raise UserError(f"VAE config: {name} is {short(values[name])}: it must be a list.")
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            found = list(rest.pop(name, (kind,)))
            if found != [kind] * len(levels):
                raise UserError(
                    f"VAE config: {name} is {found}: it must be {kind} for each of the {len(levels)} "
                    "block_out_channels."
                )
        if rest.pop("act_fn", "silu") != "silu":
            raise UserError(f"VAE config: act_fn is '{values['act_fn']}', but only 'silu' is supported.")
        for name in ("latents_mean", "latents_std"):
            if rest.pop(name, None) is not None:
                raise UserError(
                    f"VAE config: {name} is set, but only one scaling_factor for all channels is supported."
                )
        known = {field.name for field in dataclasses.fields(cls)} - {"dtype"}
        unknown = sorted(set(rest) - known)
        if unknown:
            raise UserError(
                f"VAE config: {', '.join(unknown)} unknown; the known fields are {', '.join(sorted(known))}."
            )
        if rest.get("shift_factor") is None:
            rest["shift_factor"] = 0.0
        rest.setdefault("layers_per_block", 1)
        return cls(block_out_channels=tuple(levels), dtype=dtype, **rest)

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"VAE config: {name} is {value!r}: it must be a whole number of at least 1.")


# --- Layers -----------------------------------------------------------------------------------------


class Conv(nnx.Module):
    """A convolution of images [B, H, W, C] with a kernel [rows, columns, in, out] and zero padding.

    Initialized as in PyTorch: kernel and bias from U(-1, 1) / sqrt(fan_in).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        axis: str | None = "embed",
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Makes the kernel and the bias.

        Args:
          in_channels, out_channels: of the convolution.
          size: rows and columns of the kernel.
          stride: step between outputs along both axes.
          padding: zeros before and after both axes; None for half the kernel on either side, which keeps the
            size.
          axis: logical axis of the output channels.
          dtype: compute dtype.
          rngs: random numbers for the initialization.
        """
        shape = (size, size, in_channels, out_channels)
        bound = (size * size * in_channels) ** -0.5
        self.kernel = parameter(
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound), (None, None, None, axis)
        )
        self.bias = parameter(
            jax.random.uniform(rngs.params(), (out_channels,), minval=-bound, maxval=bound), (axis,)
        )
        self.stride = stride
        self.padding = (size // 2, size // 2) if padding is None else padding
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H', W', out] in the compute dtype."""
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=(self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + self.bias.astype(self.dtype)


def group_norm(x: jax.Array, groups: int) -> jax.Array:
    """Group norm (arXiv 1803.08494): (x - mean) / sqrt(variance + eps), in float32.

    Mean and variance are over the rows, the columns and the channels of a group.

    [B, h, w, C] -> [B, h, w, C] float32.
    """
    x = rearrange(x.astype(jnp.float32), "b h w (g c) -> b h w g c", g=groups)
    mean = x.mean(axis=(1, 2, 4), keepdims=True)
    variance = jnp.square(x - mean).mean(axis=(1, 2, 4), keepdims=True)
    return rearrange((x - mean) * jax.lax.rsqrt(variance + GROUP_NORM_EPS), "b h w g c -> b h w (g c)")


class GroupNorm(nnx.Module):
    """`group_norm`, times a scale and plus a bias for each channel."""

    def __init__(self, channels: int, groups: int):
        self.groups = groups
        self.scale = parameter(jnp.ones(channels), (None,))
        self.bias = parameter(jnp.zeros(channels), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, C] float32."""
        return group_norm(x, self.groups) * self.scale.astype(jnp.float32) + self.bias.astype(jnp.float32)


class ResnetBlock(nnx.Module):
    """shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))).

    The shortcut is a 1x1 convolution if the number of channels changes, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        common = dict(dtype=config.compute_dtype, rngs=rngs)
        self.norm1 = GroupNorm(in_channels, config.norm_num_groups)
        self.conv1 = Conv(in_channels, out_channels, **common)
        self.norm2 = GroupNorm(out_channels, config.norm_num_groups)
        self.conv2 = Conv(out_channels, out_channels, **common)
        self.shortcut = Conv(in_channels, out_channels, 1, **common) if in_channels != out_channels else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, h, w, out]."""
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return constrain(shortcut + hidden, "batch", None, None, None)


class MidAttention(nnx.Module):
    """x + proj(softmax(q k^T / sqrt(C)) v) with one head; q, k and v are linear in the group norm of x."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, config.norm_num_groups)
        for name in ("q", "k", "v", "proj"):
            layer = linear(channels, channels, (None, "embed"), dtype=config.compute_dtype, rngs=rngs)
            setattr(self, name, layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, C]."""
        height, width = x.shape[1:3]
        tokens = rearrange(self.norm(x), "b h w c -> b (h w) c")
        query, key, value = (layer(tokens)[:, :, None] for layer in (self.q, self.k, self.v))  # [B, N, 1, C]
        # XLA's attention on every device: the single head has all C channels, too wide for fused kernels.
        chunk = max(rows for rows in range(1, height + 1) if height % rows == 0 and _fits(rows * width, rows))
        if chunk == height:
            out = attention(query, key, value)
        else:
            queries = rearrange(query, "b (n q) k c -> n b q k c", q=chunk * width)
            out = jax.lax.map(lambda query: attention(query, key, value), queries)
            out = rearrange(out, "n b q k c -> b (n q) k c")
        return x + rearrange(self.proj(out[:, :, 0]), "b (h w) c -> b h w c", h=height)


def _fits(queries: int, rows: int) -> bool:
    # A single row is never split, however long it is.
    return queries <= QUERY_CHUNK or rows == 1


class MidBlock(nnx.Module):
    """At the lowest resolution: a residual block, attention (if the config has it), a residual block."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels = config.block_out_channels[-1]
        self.resnets = nnx.List([ResnetBlock(channels, channels, config, rngs=rngs) for _ in range(2)])
        self.attention = MidAttention(channels, config, rngs=rngs) if config.mid_block_add_attention else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, C]."""
        x = self.resnets[0](x)
        if self.attention is not None:
            x = self.attention(x)
        return self.resnets[1](x)


class DownBlock(nnx.Module):
    """Residual blocks, then, on every level but the last, a convolution of stride 2.

    That convolution pads one zero after the rows and columns and none before, because the released models
    were trained that way.
    """

    def __init__(
        self, in_channels: int, out_channels: int, downsample: bool, config: VAEConfig, *, rngs: nnx.Rngs
    ):
        sizes = [in_channels] + [out_channels] * config.layers_per_block
        pairs = itertools.pairwise(sizes)
        self.resnets = nnx.List([ResnetBlock(a, b, config, rngs=rngs) for a, b in pairs])
        common = dict(stride=2, padding=(0, 1), dtype=config.compute_dtype, rngs=rngs)
        self.downsample = Conv(out_channels, out_channels, **common) if downsample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, h / 2, w / 2, out]."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsample is None else self.downsample(x)


class UpBlock(nnx.Module):
    """Residual blocks, then, on every level but the last, nearest-neighbour upsampling and a convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, upsample: bool, config: VAEConfig, *, rngs: nnx.Rngs
    ):
        sizes = [in_channels] + [out_channels] * (config.layers_per_block + 1)
        pairs = itertools.pairwise(sizes)
        self.resnets = nnx.List([ResnetBlock(a, b, config, rngs=rngs) for a, b in pairs])
        common = dict(dtype=config.compute_dtype, rngs=rngs)
        self.upsample = Conv(out_channels, out_channels, **common) if upsample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, 2h, 2w, out]."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsample is None:
            return x
        return self.upsample(repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2))


class Encoder(nnx.Module):
    """Maps images to 2 Z channels, from which the 1x1 convolution makes mean and log variance."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        levels = config.block_out_channels
        self.conv_in = Conv(config.in_channels, levels[0], dtype=config.compute_dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock(levels[max(i - 1, 0)], channels, i + 1 < len(levels), config, rngs=rngs)
                for i, channels in enumerate(levels)
            ]
        )
        self.mid_block = MidBlock(config, rngs=rngs)
        self.norm_out = GroupNorm(levels[-1], config.norm_num_groups)
        self.conv_out = Conv(levels[-1], 2 * config.latent_channels, axis=None, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, h, w, 2Z] float32."""
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Maps latents, after their 1x1 convolution, to images."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        levels = config.block_out_channels[::-1]
        common = dict(dtype=config.compute_dtype, rngs=rngs)
        self.conv_in = Conv(config.latent_channels, levels[0], **common)
        self.mid_block = MidBlock(config, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpBlock(levels[max(i - 1, 0)], channels, i + 1 < len(levels), config, rngs=rngs)
                for i, channels in enumerate(levels)
            ]
        )
        self.norm_out = GroupNorm(levels[-1], config.norm_num_groups)
        self.conv_out = Conv(levels[-1], config.out_channels, axis=None, **common)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """[B, h, w, Z] -> [B, H, W, 3]."""
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


# --- The autoencoder --------------------------------------------------------------------------------


class VAE(nnx.Module):
    """AutoencoderKL: the posterior q(z | x) = N(mean(x), std(x)^2) and its decoder.

    Latents in this class are unscaled: callers apply the scaling factor.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = (
            Conv(2 * latent, 2 * latent, 1, axis=None, dtype=jnp.float32, rngs=rngs)
            if config.use_quant_conv
            else None
        )
        self.post_quant_conv = (
            Conv(latent, latent, 1, axis=None, dtype=config.compute_dtype, rngs=rngs)
            if config.use_post_quant_conv
            else None
        )

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The posterior of images: std = exp(log variance / 2), with the log variance clipped to [-30, 20].

        Args:
          images: [B, H, W, 3] in [-1, 1]; `config.downsampling` must divide H and W.

        Returns:
          mean and standard deviation, [B, h, w, Z] float32, unscaled.

        Raises:
          UserError: the images have another shape.
        """
        config = self.config
        if images.ndim != 4 or images.shape[3] != config.in_channels:
            raise UserError(f"images are {images.shape}: this VAE takes [B, H, W, {config.in_channels}].")
        if images.shape[1] % config.downsampling or images.shape[2] % config.downsampling:
            raise UserError(
                f"images are {images.shape[1]}x{images.shape[2]}: height and width must be multiples of "
                f"{config.downsampling}, the downsampling factor of this VAE."
            )
        moments = self.encoder(constrain(images, "batch", None, None, None))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes latents to images.

        Args:
          latents: [B, h, w, Z], unscaled.

        Returns:
          [B, H, W, 3] float32, roughly in [-1, 1] but not clipped.

        Raises:
          UserError: the latents have another shape.
        """
        self._check_latents(latents)
        x = constrain(latents, "batch", None, None, None)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        return self.decoder(x).astype(jnp.float32)

    def decode_tiled(self, latents: jax.Array, tile: int = 64, overlap: int = 16) -> jax.Array:
        """`decode` in overlapping square tiles, which takes the memory of one tile plus the image.

        The result differs from `decode`, except if the latents fit in one tile: a tile has its own group-norm
        statistics, and its middle attention does not see the other tiles, so that tones can drift between
        tiles; larger tiles drift less. See `tiling.decode_in_tiles`.

        Args:
          latents: [B, h, w, Z], unscaled.
          tile: side of a tile in latent positions.
          overlap: minimum overlap of neighbouring tiles in latent positions, below `tile`.

        Returns:
          [B, H, W, 3] float32, as from `decode`.

        Raises:
          UserError: the latents have another shape, or the overlap is not below `tile`.
        """
        self._check_latents(latents)
        return decode_in_tiles(self.decode, latents, tile, overlap)

    def _check_latents(self, latents: jax.Array) -> None:
        if latents.ndim != 4 or latents.shape[3] != self.config.latent_channels:
            raise UserError(
                f"latents are {latents.shape}: this VAE takes [B, h, w, {self.config.latent_channels}]."
            )


@functools.lru_cache(maxsize=4)
def abstract_vae(config: VAEConfig) -> VAE:
    """Returns the VAE with abstract parameters, which must not be changed. Building it takes a second."""
    return nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
