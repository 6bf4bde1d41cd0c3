"""Layers shared by PixArt and DiT: embeddings, attention, MLP, and the sharding of their activations.

Axes: B batch, N image tokens, S text tokens, D width, H heads, K head width, C channels.

Some computations run in float32 whatever the compute dtype: timesteps and sinusoids, conditioning vectors,
adding the adaLN table, layer-norm statistics, softmax. Parameters are float32.

Parameters and activations are annotated with logical axes, which `training/sharding.py` maps to mesh axes:
'layers', 'embed' (D), 'heads' (H), 'mlp' (4D), 'batch', 'tokens'.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pixart_jax.errors import UserError
from pixart_jax.models.attention import (
    PRODUCT,
    Choice,
    attention,
    save_attention_residuals,
)
from pixart_jax.models.configs import BackboneConfig
from pixart_jax.models.dtypes import product_dtype
from pixart_jax.models.elementwise import add_bias

# Rematerialization policies: which activations of a block are saved for the backward pass. The others are
# recomputed.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(PRODUCT), save_attention_residuals
    ),
    "save_attention": save_attention_residuals,
}

TIMESTEP_FEATURES = 256
MAX_PERIOD = 10_000.0


# --- Activation sharding ----------------------------------------------------------------------------

_activation_sharding: contextvars.ContextVar[Callable[[tuple[str | None, ...]], jax.sharding.Sharding] | None]
_activation_sharding = contextvars.ContextVar("activation_sharding", default=None)


@contextlib.contextmanager
def activation_sharding(
    rule: Callable[[tuple[str | None, ...]], jax.sharding.Sharding] | None,
) -> Iterator[None]:
    """Within this context, models constrain the sharding of their activations while they are traced.

    Without the constraints the TPU compiler reshards the token stream, and an XL/2 training step at 512 px
    needs eight times the memory.

    Args:
      rule: maps the logical axes of an activation to its sharding; None leaves activations unconstrained.
    """
    token = _activation_sharding.set(rule)
    try:
        yield
    finally:
        _activation_sharding.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains `x` to the sharding of its logical axes. Does nothing outside `activation_sharding`."""
    rule = _activation_sharding.get()
    return x if rule is None else jax.lax.with_sharding_constraint(x, rule(axes))


# --- Embeddings -------------------------------------------------------------------------------------


def sinusoid(values: jax.Array, dim: int = TIMESTEP_FEATURES) -> jax.Array:
    """Sinusoidal features [cos(v w_i) | sin(v w_i)], w_i = 10000^(-i / (dim/2)), as in DiT (cosine first).

    Args:
      values: [...] timesteps on the 0..999 scale (fractions allowed) or sizes in pixels.
      dim: number of features, even.

    Returns:
      [..., dim] float32.
    """
    half = dim // 2
    # The exponents are float32, as in the PyTorch code, but exp is computed in float64 and rounded. An error
    # in the last bit of a frequency changes the angle at t = 999 by 6e-5 radians.
    exponents = -math.log(MAX_PERIOD) * np.arange(half, dtype=np.float32) / half
    frequencies = jnp.asarray(np.exp(exponents.astype(np.float64)), jnp.float32)
    angles = values.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(height: int, width: int, dim: int, base_size: int, position_scale: float) -> np.ndarray:
    """2-D sine-cosine position embeddings (DiT, PixArt-α §2.3).

    The first half of the channels encodes the column position x_j = j / (width / base_size) / position_scale,
    the second half the row position, defined likewise. Both axes thus span [0, base_size / position_scale)
    for any aspect ratio. Each half is [sin(p w_k) | cos(p w_k)] with w_k = 10000^(-k / (dim/4)).

    Args:
      height, width: size of the grid in tokens.
      dim: number of channels, a multiple of 4.
      base_size: side length of the training grid, in tokens, at position_scale 1.
      position_scale: divisor of all positions.

    Returns:
      [height * width, dim] float32, computed in float64.
    """

    def one_axis(positions: np.ndarray) -> np.ndarray:
        omega = MAX_PERIOD ** -(np.arange(dim // 4, dtype=np.float64) / (dim / 4))
        angles = positions.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    y = np.arange(height, dtype=np.float32) / (height / base_size) / position_scale
    x = np.arange(width, dtype=np.float32) / (width / base_size) / position_scale
    columns, rows = np.meshgrid(x, y)
    return np.concatenate([one_axis(columns), one_axis(rows)], axis=1).astype(np.float32)


def patchify(latents: jax.Array, patch_size: int) -> jax.Array:
    """[B, h p, w p, C] -> [B, h w, p p C]."""
    return rearrange(latents, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: jax.Array, height: int, width: int, patch_size: int) -> jax.Array:
    """[B, h w, p p C] -> [B, height, width, C], the inverse of `patchify`; sizes are in latent pixels."""
    return rearrange(
        tokens,
        "b (h w) (p q c) -> b (h p) (w q) c",
        h=height // patch_size,
        w=width // patch_size,
        p=patch_size,
        q=patch_size,
    )


XAVIER = nnx.initializers.xavier_uniform()


class Linear(nnx.LinearGeneral):
    """A dense layer over one or several input and output axes.

    Attributes:
      parts: number of layers that the kernel holds along its first output axis, such as 3 for query, key and
        value.
      adapter: a low-rank update that is computed beside the kernel, or None (`models/adapters.py`).
      kernel_scale: [*out_shape] float32, the scales of a kernel in int8 (`models/quantization.py`), or None.
    """

    parts: int = 1
    adapter: nnx.Module | None = None
    kernel_scale: nnx.Param | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *in_shape] -> [..., *out_shape]; for a layer with one part."""
        (out,) = self._products(x, separate=False)
        return checkpoint_name(out + self.bias[...].astype(self.dtype), PRODUCT)

    def heads(self, x: jax.Array, *, separate: bool) -> tuple[jax.Array, ...]:
        """Computes the inputs of attention, such as (query, key, value), as separate arrays.

        Args:
          x: [..., *in_shape], any float dtype.
          separate: compute each array by its own matrix product instead of slicing a single, larger product.
            A fused attention kernel cannot read slices, so they would have to be copied first. XLA can read
            them, and then the single product is faster on a CPU.

        Returns:
          An array [..., H, K] for each part, in the compute dtype.
        """
        bias = self.bias[...]
        if not separate and self.adapter is None and self.kernel_scale is None:
            out = self._product(x, self.kernel[...]) + bias.astype(self.dtype)
            return (out,) if self.parts == 1 else tuple(jnp.unstack(out, axis=-3))
        biases = [bias] if self.parts == 1 else jnp.unstack(bias)
        return tuple(add_bias(out, b) for out, b in zip(self._products(x, separate), biases))

    def float_kernel(self) -> jax.Array:
        """[..., *in_shape, *out_shape] float32: the kernel, dequantized if it is int8."""
        kernel = self.kernel[...].astype(jnp.float32)
        if self.kernel_scale is None:
            return kernel
        scale = self.kernel_scale[...]
        stack = scale.ndim - len(self.out_features)
        return kernel * jnp.expand_dims(scale, tuple(range(stack, stack + len(self.in_features))))

    def _products(self, x: jax.Array, separate: bool) -> list[jax.Array]:
        """Computes x W, with the update of the adapter, for each part."""
        kernel, inputs = self.kernel[...], len(self.in_features)
        if self.parts == 1:
            outs = [self._product(x, kernel)]
        elif separate:
            outs = [self._product(x, part) for part in jnp.unstack(kernel, axis=inputs)]
        else:
            outs = list(jnp.unstack(self._product(x, kernel), axis=-len(self.out_features)))
        if self.kernel_scale is not None:
            # The scale of an output channel is applied after the product, so the kernel stays int8 in memory.
            scale = self.kernel_scale[...]
            scales = [scale] if self.parts == 1 else jnp.unstack(scale)
            outs = [rescale(out, scale, self.dtype) for out, scale in zip(outs, scales)]
        if self.adapter is not None:
            outs = self.adapter(self, x, outs)
        return outs

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        inputs = len(self.in_features)
        contracted = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
        # A product with int8 is only scaled down afterwards, so it could overflow float16.
        dtype = None if self.kernel_scale is None else product_dtype(self.dtype)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jax.lax.dot_general(x, kernel, (contracted, ((), ())), preferred_element_type=dtype)


def rescale(product: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Applies the scales of a kernel in int8 to its product: (x q) s, multiplied in float32."""
    return (product.astype(jnp.float32) * scale).astype(dtype)


class Matrix(NamedTuple):
    """Which axes of a kernel form a matrix, as negative indices. The other axes index a stack of matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def linear(
    in_shape: int | tuple[int, ...],
    out_shape: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    kernel_init: Callable = XAVIER,
    bias_init: Callable = nnx.initializers.zeros,
    matrices: int | None = 1,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> Linear:
    """Makes a dense layer whose parameters are annotated for sharding and for matrix optimizers.

    The fan-in and fan-out of the initializer are those of the flattened kernel, as for the fused projections
    of the PyTorch code: Xavier initialization of a fused qkv projection has the bound sqrt(6 / (D + 3 D)).

    Args:
      in_shape, out_shape: sizes of the input and output axes; the kernel is [*in_shape, *out_shape].
      axes: logical axes of the kernel.
      kernel_init, bias_init: initializers.
      matrices: number of matrices that the kernel holds along the first axis of `out_shape`, such as 3 for
        query, key and value. The kernel's metadata records which axes form a matrix (`Matrix`), for
        optimizers that treat matrices differently, such as Muon. None: the kernel is not such a matrix.
      dtype: compute dtype. The parameters are float32.
      rngs: random generators for the initializers.
    """
    in_shape = (in_shape,) if isinstance(in_shape, int) else in_shape
    out_shape = (out_shape,) if isinstance(out_shape, int) else out_shape
    if len(axes) != len(in_shape) + len(out_shape):
        raise ValueError(f"{axes} does not name every axis of {in_shape + out_shape}")
    matrix = None
    if matrices is not None:
        stacked = 0 if matrices == 1 else 1
        outputs = tuple(range(stacked - len(out_shape), 0))
        inputs = tuple(range(-len(axes), -len(out_shape)))
        matrix = Matrix(inputs, outputs)
    layer = Linear(
        in_shape,
        out_shape,
        axis=tuple(range(-len(in_shape), 0)),
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        rngs=rngs,
        # The number of axes that are inputs, for optimizers that need the axes of PyTorch.
        kernel_metadata=metadata(axes) | {"matrix": matrix, "inputs": len(in_shape)},
        bias_metadata=metadata(axes[len(in_shape) :]) | {"inputs": 0},
    )
    if matrices is not None:
        layer.parts = matrices
    return layer


def parameter(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A trainable array that carries its logical axes."""
    return nnx.Param(value, **metadata(axes))


def metadata(axes: tuple[str | None, ...]) -> dict:
    """Returns the metadata of a parameter with these logical axes."""
    # By default Flax shards a parameter when it is created. Here `training/sharding.py` decides the sharding
    # of all parameters at once, so eager sharding is off.
    return {"out_sharding": axes, "eager_sharding": False}


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + 1e-5) scale + bias over all channels, that is, over heads and head width.

    PixArt-Σ normalizes queries and keys with it, and compressed keys and values.
    """

    EPS = 1e-5

    def __init__(self, heads: int, head_dim: int):
        axes = metadata(("heads", None)) | {"inputs": 0}
        self.scale = nnx.Param(jnp.ones((heads, head_dim)), **axes)
        self.bias = nnx.Param(jnp.zeros((heads, head_dim)), **axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H, K] -> [..., H, K] in the dtype of `x`, computed in float32."""
        x32 = x.astype(jnp.float32)
        mean = x32.mean(axis=(-2, -1), keepdims=True)
        variance = jnp.square(x32 - mean).mean(axis=(-2, -1), keepdims=True)
        normed = (x32 - mean) * jax.lax.rsqrt(variance + self.EPS)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class MLP(nnx.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(
        self,
        in_size: int,
        hidden_size: int,
        out_size: int,
        *,
        activation: Callable[[jax.Array], jax.Array],
        axes: tuple[str | None, str | None, str | None] = ("embed", "mlp", "embed"),
        kernel_init: Callable = XAVIER,
        last_init: Callable | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inner = dict(dtype=dtype, rngs=rngs)
        self.fc1 = linear(in_size, hidden_size, axes[:2], kernel_init=kernel_init, **inner)
        self.fc2 = linear(hidden_size, out_size, axes[1:], kernel_init=last_init or kernel_init, **inner)
        self.activation = activation

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


# Initializer of the layers for conditioning vectors. There is one such vector per image, not one per token,
# so these layers can run in float32 and replicate their activations at negligible cost.
CONDITION_INIT = nnx.initializers.normal(0.02)


def timestep_embedder(hidden_size: int, *, rngs: nnx.Rngs) -> MLP:
    """Linear(256 -> D) SiLU Linear(D -> D) on `sinusoid(t)`."""
    return MLP(
        TIMESTEP_FEATURES,
        hidden_size,
        hidden_size,
        activation=jax.nn.silu,
        axes=(None, "embed", None),
        kernel_init=CONDITION_INIT,
        rngs=rngs,
    )


class PatchEmbed(nnx.Module):
    """Linear projection of p x p patches plus fixed position embeddings.

    The projection is the convolution with kernel size and stride p of the official code.
    """

    def __init__(self, config: BackboneConfig, *, bias_init: Callable, rngs: nnx.Rngs):
        self.config = config
        inputs = config.patch_size**2 * config.in_channels
        self.proj = linear(
            inputs,
            config.hidden_size,
            (None, "embed"),
            bias_init=bias_init,
            dtype=config.compute_dtype,
            rngs=rngs,
        )
        self.proj.kernel.set_metadata(patch_size=config.patch_size)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """[B, height, width, C] -> [B, N, D]."""
        config = self.config
        _, height, width, channels = latents.shape
        if height % config.patch_size or width % config.patch_size or channels != config.in_channels:
            raise UserError(
                f"latents are {height}x{width}x{channels}: this model takes {config.in_channels} channels "
                f"and sides that the patch size {config.patch_size} divides."
            )
        positions = position_table(
            *config.grid(height, width),
            config.hidden_size,
            config.base_size,
            config.position_scale,
        )
        tokens = self.proj(patchify(latents, config.patch_size))
        return constrain(tokens + positions.astype(tokens.dtype), "batch", "tokens", None)


# --- Parts of a block -------------------------------------------------------------------------------


def split_modulation(table: jax.Array) -> tuple[jax.Array, ...]:
    """[B, k, D] -> k arrays [B, 1, D]: shift, scale and gate of attention, then those of the MLP."""
    return tuple(table[:, i : i + 1] for i in range(table.shape[1]))


@jax.named_scope("attend")
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None, choice: Choice
) -> jax.Array:
    """`attention`, where each device works on its shard of the batch, the queries and the heads."""
    rule = _activation_sharding.get()
    implementation = choice.of(key.shape[1])
    if rule is None or implementation == "xla":
        return attention(query, key, value, key_lengths=key_lengths, implementation=implementation)
    # The compiler cannot partition a custom kernel; without shard_map it would gather all inputs on every
    # device.
    queries, keys, rows = (
        rule(axes)
        for axes in (("batch", "tokens", "heads", None), ("batch", None, "heads", None), ("batch",))
    )
    arguments = (query, key, value) if key_lengths is None else (query, key, value, key_lengths)
    return jax.shard_map(
        lambda query, key, value, lengths=None: attention(
            query, key, value, key_lengths=lengths, implementation=implementation
        ),
        mesh=queries.mesh,
        in_specs=(queries.spec, keys.spec, keys.spec, rows.spec)[: len(arguments)],
        out_specs=queries.spec,
        check_vma=False,
    )(*arguments)


class SelfAttention(nnx.Module):
    """proj(attention(qkv(x))): multi-head attention over the image tokens.

    With `qk_norm`, queries and keys are normalized over all heads (PixArt-Σ).
    """

    q_norm: LayerNorm | None = None
    k_norm: LayerNorm | None = None

    def __init__(self, config: BackboneConfig, *, qk_norm: bool = False, rngs: nnx.Rngs):
        width, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        common = dict(dtype=config.compute_dtype, rngs=rngs)
        self.attention = config.attention_choice()
        self.qkv = linear(width, (3, heads, head_dim), ("embed", None, "heads", None), matrices=3, **common)
        self.proj = linear((heads, head_dim), width, ("heads", None, "embed"), **common)
        if qk_norm:
            self.q_norm = LayerNorm(heads, head_dim)
            self.k_norm = LayerNorm(heads, head_dim)

    @jax.named_scope("self_attention")
    def __call__(self, x: jax.Array, compress: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """[B, N, D] -> [B, N, D]; `compress` reduces the tokens of keys and values, [B, N, H, K]."""
        query, key, value = self.qkv.heads(x, separate=self.attention.fused)  # [B, N, H, K]
        # `attention` labels what it is given. Whatever is changed before needs a label of its own, so that
        # the backward pass does not compute the linear layer again.
        if self.q_norm is not None:
            query, key = checkpoint_name(query, PRODUCT), checkpoint_name(key, PRODUCT)
            query, key = self.q_norm(query), self.k_norm(key)
        query = constrain(query, "batch", "tokens", "heads", None)
        if compress is not None:
            # Each device compresses its own tokens, so that fewer have to be sent to the others.
            key, value = (
                constrain(checkpoint_name(y, PRODUCT), "batch", "tokens", "heads", None) for y in (key, value)
            )
            key, value = compress(key), compress(value)
        # Each device needs the keys and values of all tokens, even if the queries are sharded over tokens.
        key, value = (constrain(y, "batch", None, "heads", None) for y in (key, value))
        out = _attend(query, key, value, None, self.attention)
        return self.proj(out)


class CrossAttention(nnx.Module):
    """proj(attention(q(x), kv(text))): image tokens attend to the caption (PixArt-α §2.3).

    `proj` is initialized to zero, so the layer initially leaves the image tokens unchanged.
    """

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        width, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        common = dict(dtype=config.compute_dtype, rngs=rngs)
        self.attention = config.attention_choice()
        self.q = linear(width, (heads, head_dim), ("embed", "heads", None), **common)
        self.kv = linear(width, (2, heads, head_dim), ("embed", None, "heads", None), matrices=2, **common)
        self.proj = linear(
            (heads, head_dim),
            width,
            ("heads", None, "embed"),
            kernel_init=nnx.initializers.zeros,
            **common,
        )

    @jax.named_scope("cross_attention")
    def __call__(self, x: jax.Array, text: jax.Array, text_lengths: jax.Array) -> jax.Array:
        """x [B, N, D], text [B, S, D], text_lengths [B] -> [B, N, D]."""
        (query,) = self.q.heads(x, separate=self.attention.fused)
        query = constrain(query, "batch", "tokens", "heads", None)
        pair = self.kv.heads(text, separate=self.attention.fused)  # [B, S, H, K]
        key, value = (constrain(y, "batch", None, "heads", None) for y in pair)
        out = _attend(query, key, value, text_lengths, self.attention)
        return self.proj(out)
