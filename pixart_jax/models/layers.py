"""What PixArt and DiT are made of: embeddings, adaptive layer norm, attention, MLP.

Axes: B batch, N image tokens, S text tokens, D width, H heads, K head width, C channels.

Float32 islands, whatever the compute dtype: timesteps and sinusoids, the conditioning vectors, the adaLN
table add, layer-norm statistics, softmax. Parameters are float32.

Logical axes that parameters and activations name (`training/sharding.py` maps them to the mesh):
'layers', 'embed' (D), 'heads' (H), 'mlp' (4D), 'batch', 'tokens'.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pixart_jax.errors import UserError, at_least, one_of
from pixart_jax.models.attention import (
    PRODUCT,
    Choice,
    attention,
    check_name,
    choose_implementation,
    save_attention_residuals,
)
from pixart_jax.models.dtypes import COMPUTE_DTYPES
from pixart_jax.models.elementwise import add_bias

SIZES = {
    "XL/2": dict(depth=28, hidden_size=1152, num_heads=16, patch_size=2),
    "L/2": dict(depth=24, hidden_size=1024, num_heads=16, patch_size=2),
    "B/2": dict(depth=12, hidden_size=768, num_heads=12, patch_size=2),
    "S/2": dict(depth=12, hidden_size=384, num_heads=6, patch_size=2),
}

# What the backward pass keeps of a block; the rest is computed again.
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


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """What PixArt and DiT share. `size` names a published shape, 'custom' takes the four numbers below it.

    A subclass declares what the rest of the project needs to know of its network: `kind`, `untrained`,
    `conditions` and `make`.
    """

    # The name that configs and checkpoints store.
    kind: ClassVar[str]
    # Paths of the parameters that are kept with the weights but never trained.
    untrained: ClassVar[tuple[str, ...]] = ()

    # 'XL/2', 'L/2', 'B/2', 'S/2' or 'custom'.
    size: str = "XL/2"
    # Number of blocks; 0, here and below, for that of the size (of XL/2 if it is custom).
    depth: int = 0
    # Width D of the token stream.
    hidden_size: int = 0
    # Attention heads H; D / H is the head width.
    num_heads: int = 0
    # Side of a patch in latent pixels.
    patch_size: int = 0
    # Width of the MLP in units of D.
    mlp_ratio: float = 4.0
    # Channels of the latent.
    in_channels: int = 4
    # Predict the variance too: the output has twice the channels of the latent.
    learn_sigma: bool = True
    # Side, in tokens, of the square grid whose positions are 0 … base_size - 1 at position_scale 1.
    base_size: int = 16
    # Positions are divided by this ('lewei_scale' of PixArt-α, 'pe_interpolation' of PixArt-Σ).
    position_scale: float = 1.0
    # Compute dtype of the blocks: 'float32', 'bfloat16' or, for sampling alone, 'float16'.
    dtype: str = "float32"
    # What the backward pass computes again to save memory: 'none', 'dots' (all but the outputs of linear
    # layers and of attention), 'save_attention' (all but the outputs of attention), 'full' (everything).
    remat: str = "none"
    # Run the blocks by lax.scan (compiles once) or unrolled (10-20 % faster on a CPU).
    scan_layers: bool = True
    # 'auto' (the fastest that runs on the backend), 'xla', 'cudnn' (NVIDIA GPUs) or 'splash' (TPUs).
    attention: str = "auto"

    def __post_init__(self):
        one_of("model.size", self.size, (*SIZES, "custom"))
        for name, value in SIZES.get(self.size, SIZES["XL/2"]).items():
            given = getattr(self, name)
            if given == 0:
                object.__setattr__(self, name, value)
            elif given != value and self.size != "custom":
                raise UserError(
                    f"model.{name} is {given}, but the size {self.size} has {value}: leave it out, or set "
                    "model.size to 'custom'."
                )
        for name in ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "base_size"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} does not divide into model.num_heads "
                f"{self.num_heads}: choose a number of heads that divides the width."
            )
        if self.hidden_size % 4:
            raise UserError(
                f"model.hidden_size is {self.hidden_size}: the 2-D sine positions need a multiple of 4."
            )
        if self.position_scale <= 0:
            raise UserError(f"model.position_scale is {self.position_scale}: it must be above 0.")
        one_of("model.dtype", self.dtype, COMPUTE_DTYPES)
        one_of("model.remat", self.remat, REMAT_POLICIES)
        # Whether it can run is asked where a network is built: a config must open on any machine.
        check_name(self.attention)

    @property
    def conditions(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """What the network takes besides latents and timesteps, in the order of its arguments.

        Returns:
          for each array of a batch its name, the shape of one row and the dtype ('float' for features that
          come in the dtype they are stored in).
        """
        raise NotImplementedError

    def make(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """The network, with random initial weights."""
        raise NotImplementedError

    def attention_choice(self) -> Choice:
        """What `attention` stands for on this backend; raises a `UserError` if it or the dtype cannot run."""
        return choose_implementation(self.attention, dtype=self.dtype, head_dim=self.head_dim)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


# --- Activation sharding ----------------------------------------------------------------------------

_activation_sharding: contextvars.ContextVar[Callable[[tuple[str | None, ...]], jax.sharding.Sharding] | None]
_activation_sharding = contextvars.ContextVar("activation_sharding", default=None)


@contextlib.contextmanager
def activation_sharding(
    rule: Callable[[tuple[str | None, ...]], jax.sharding.Sharding] | None,
) -> Iterator[None]:
    """Within this context, traced models constrain their activations to `rule(logical axes)`; None for not.

    Without the constraints the TPU compiler reshards the token stream and an XL/2 step at 512 px needs
    eight times the memory.
    """
    token = _activation_sharding.set(rule)
    try:
        yield
    finally:
        _activation_sharding.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains `x` to the sharding of its logical axes; the identity outside `activation_sharding`."""
    rule = _activation_sharding.get()
    return x if rule is None else jax.lax.with_sharding_constraint(x, rule(axes))


# --- Embeddings -------------------------------------------------------------------------------------


def sinusoid(values: jax.Array, dim: int = TIMESTEP_FEATURES) -> jax.Array:
    """[cos(v w_i) | sin(v w_i)] with w_i = 10000^(-i / (dim/2)), in float32 (DiT, cosine first).

    Args:
      values: [...] timesteps on the 0..999 scale (fractions allowed) or sizes in pixels.
      dim: even number of features.

    Returns:
      [..., dim] float32.
    """
    half = dim // 2
    # float32 exponents, as PyTorch has them, under an exact exp: its last bit moves t = 999 by 6e-5 radians.
    exponents = -math.log(MAX_PERIOD) * np.arange(half, dtype=np.float32) / half
    frequencies = jnp.asarray(np.exp(exponents.astype(np.float64)), jnp.float32)
    angles = values.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(height: int, width: int, dim: int, base_size: int, position_scale: float) -> np.ndarray:
    """2-D sine-cosine positions (PixArt-α §2.3, DiT): the first half of the channels encodes the column x.

    x_j = j / (width / base_size) / position_scale, y likewise, so that both axes span
    [0, base_size / position_scale) whatever the aspect ratio. Each half is [sin(p w_k) | cos(p w_k)] with
    w_k = 10000^(-k / (dim/4)).

    Args:
      height, width: grid in tokens.
      dim: channels, a multiple of 4.
      base_size: tokens on a side of the training grid at position_scale 1.
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
    """[B, h w, p p C] -> [B, height, width, C], the inverse of `patchify` for a grid of latent pixels."""
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
    """A dense layer over one or several input and output axes."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *in_shape] -> [..., *out_shape]."""
        out = self._product(x, self.kernel[...]) + self.bias[...].astype(self.dtype)
        return checkpoint_name(out, PRODUCT)

    def heads(self, x: jax.Array, *, apart: bool) -> tuple[jax.Array, ...]:
        """Inputs of attention, such as (query, key, value).

        Args:
          x: [..., *in_shape], any float dtype.
          apart: compute each by a product of its own, for an attention kernel: slices of a single product
            would have to be copied before a kernel can read them. XLA reads slices, and then a single product
            is faster on a CPU.

        Returns:
          arrays [..., H, K] in the compute dtype, the last two axes of the output; one for each index of the
          axis before them.
        """
        kernel, bias = self.kernel[...], self.bias[...]
        single = len(self.out_features) == 2
        if not apart:
            out = self._product(x, kernel) + bias.astype(self.dtype)
            return (out,) if single else tuple(jnp.unstack(out, axis=-3))
        kernels = [kernel] if single else jnp.unstack(kernel, axis=len(self.in_features))
        biases = [bias] if single else jnp.unstack(bias)
        return tuple(add_bias(self._product(x, k), b) for k, b in zip(kernels, biases))

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        inputs = len(self.in_features)
        contracted = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jax.lax.dot_general(x, kernel, (contracted, ((), ())))


class Matrix(NamedTuple):
    """Axes of a kernel, counted from the last one, that make a matrix; every other axis indexes matrices."""

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
    """A dense layer whose kernel [*in_shape, *out_shape] carries the logical `axes`.

    The kernel also carries which of its axes make a matrix (`Matrix`); optimizers for matrices read it. A
    kernel may hold several `matrices` along the first axis of `out_shape`, such as 3 for query, key and
    value. None: the kernel is not to be treated as a matrix.

    Fans are those of the flattened matrix, as PyTorch stores fused projections: Xavier on a fused qkv
    has the bound sqrt(6 / (D + 3 D)).
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
    return Linear(
        in_shape,
        out_shape,
        axis=tuple(range(-len(in_shape), 0)),
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        rngs=rngs,
        kernel_metadata=_metadata(axes) | {"matrix": matrix},
        bias_metadata=_metadata(axes[len(in_shape) :]),
    )


def parameter(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A trainable array that carries its logical axes."""
    return nnx.Param(value, **_metadata(axes))


def _metadata(axes: tuple[str | None, ...]) -> dict:
    # Flax would shard at creation; here the trainer decides, once, where every array goes.
    return {"out_sharding": axes, "eager_sharding": False}


class MLP(nnx.Module):
    """fc2(act(fc1(x)))."""

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


# Conditioning vectors are B rows, not B N: their layers run in float32 at no cost worth saving, and
# stay whole on every device.
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
    """Linear map of p x p patches plus fixed positions: the convolution of stride p of the paper's code."""

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
            height // config.patch_size,
            width // config.patch_size,
            config.hidden_size,
            config.base_size,
            config.position_scale,
        )
        tokens = self.proj(patchify(latents, config.patch_size))
        return constrain(tokens + positions.astype(tokens.dtype), "batch", "tokens", None)


# --- Parts of a block -------------------------------------------------------------------------------


def split_modulation(table: jax.Array) -> tuple[jax.Array, ...]:
    """[B, k, D] -> k arrays [B, 1, D]: shift, scale, gate of attention, then of the MLP."""
    return tuple(table[:, i : i + 1] for i in range(table.shape[1]))


@jax.named_scope("attend")
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None, choice: Choice
) -> jax.Array:
    """`attention` on the part of batch, queries and heads that each device has."""
    rule = _activation_sharding.get()
    implementation = choice.of(key.shape[1])
    if rule is None or implementation == "xla":
        return attention(query, key, value, key_lengths=key_lengths, implementation=implementation)
    # The compiler cannot look into a kernel: left to itself it would gather everything on every device.
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
    """proj(attention(qkv(x))): multi-head attention over the image tokens."""

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        width, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        common = dict(dtype=config.compute_dtype, rngs=rngs)
        self.attention = config.attention_choice()
        self.qkv = linear(width, (3, heads, head_dim), ("embed", None, "heads", None), matrices=3, **common)
        self.proj = linear((heads, head_dim), width, ("heads", None, "embed"), **common)

    @jax.named_scope("self_attention")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        query, key, value = self.qkv.heads(x, apart=self.attention.fused)  # [B, N, H, K]
        query = constrain(query, "batch", "tokens", "heads", None)
        # Every device needs the keys and values of all tokens, also when it has a part of the queries.
        key, value = (constrain(y, "batch", None, "heads", None) for y in (key, value))
        out = _attend(query, key, value, None, self.attention)
        return self.proj(out)


class CrossAttention(nnx.Module):
    """proj(attention(q(x), kv(text))): image tokens read the caption. `proj` starts at zero (§2.3)."""

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
        (query,) = self.q.heads(x, apart=self.attention.fused)
        query = constrain(query, "batch", "tokens", "heads", None)
        pair = self.kv.heads(text, apart=self.attention.fused)  # [B, S, H, K]
        key, value = (constrain(y, "batch", None, "heads", None) for y in pair)
        out = _attend(query, key, value, text_lengths, self.attention)
        return self.proj(out)
