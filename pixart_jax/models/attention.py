"""Scaled dot-product attention behind one function with an explicit implementation.

Axes: B batch, N query tokens, S key tokens, H heads, K head width.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from pixart_jax.errors import UserError, one_of
from pixart_jax.models.dtypes import check_dtype, cuda_capability

# What a config may ask for; 'auto' is one of the others, chosen by `choose_implementation`.
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

# Names that rematerialization policies know (`layers.REMAT_POLICIES`): outputs of linear layers, which
# include the inputs of attention; and what else attention's backward pass needs, its output and for a fused
# kernel the log-sum-exp of each row. A policy that saves the latter does not run the forward kernel again.
PRODUCT = "product"
RESIDUAL = "attention"

# The splash kernel works on blocks of keys and queries; a TPU's vector registers are this wide.
SPLASH_LANES = 128
SPLASH_BLOCKS = (512, 384, 256, 128)
# Most keys in a block of the backward kernel, which writes a partial gradient of the queries for each block.
SPLASH_MAX_KEYS = 1024
# On a TPU, 'auto' leaves fewer keys than this (captions) to XLA, which fuses the softmax with both products.
SPLASH_MIN_KEYS = 256

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def target_platform(platform: str) -> Iterator[None]:
    """Within this context programs are compiled for `platform` ('tpu', 'gpu'), which need not be here."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def check_name(implementation: str) -> None:
    """Raises a `UserError` for a name that no implementation has."""
    one_of("attention", implementation, IMPLEMENTATIONS)


class Choice(NamedTuple):
    """An implementation other than 'auto', and why it was chosen."""

    implementation: str
    reason: str
    # Below this many keys 'xla' is used instead.
    min_keys: int = 0

    @property
    def fused(self) -> bool:
        """Whether a kernel computes attention, not XLA."""
        return self.implementation != "xla"

    def of(self, keys: int) -> str:
        """The implementation for a number of keys."""
        return self.implementation if keys >= self.min_keys else "xla"

    def __str__(self) -> str:
        short = f"; xla for fewer than {self.min_keys} keys" if self.min_keys else ""
        return f"{self.implementation} ({self.reason}{short})"


def choose_implementation(implementation: str, *, dtype: str, head_dim: int) -> Choice:
    """The implementation that runs on this backend, or on the one of `target_platform`.

    'auto' is 'cudnn' on NVIDIA GPUs and 'splash' on TPUs where they can run, and 'xla' everywhere else.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      dtype: compute dtype of the model.
      head_dim: K.

    Raises:
      UserError: an unknown name, an explicit choice that cannot run here, with every reason, or a dtype that
        this backend does not have.
    """
    check_name(implementation)
    if _platform.get() is None:
        check_dtype("model.dtype", dtype)
    platform = _platform.get() or jax.default_backend()
    if implementation == "auto":
        kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
        if kernel is None:
            return Choice("xla", f"auto: the backend is {platform}")
        obstacles = _obstacles(kernel, platform, dtype, head_dim)
        if obstacles:
            return Choice("xla", f"auto: '{kernel}' cannot run, {'; '.join(obstacles)}")
        reason = f"auto: the backend is {platform}, the dtype {dtype}, the head width {head_dim}"
        return Choice(kernel, reason, SPLASH_MIN_KEYS if kernel == "splash" else 0)
    obstacles = _obstacles(implementation, platform, dtype, head_dim)
    if obstacles:
        raise UserError(
            f"attention '{implementation}' cannot run: {'; '.join(obstacles)}. Use attention 'auto' or 'xla'."
        )
    return Choice(implementation, "as configured")


def _obstacles(implementation: str, platform: str, dtype: str, head_dim: int) -> list[str]:
    """Why `implementation` cannot run; empty if it can."""
    if implementation == "xla":
        return []
    found = []
    if implementation == "splash":
        if platform != "tpu":
            found.append(f"the backend is {platform}, it needs a TPU")
        if dtype not in ("bfloat16", "float32"):
            found.append(f"the dtype is {dtype}, it needs bfloat16 or float32")
    else:
        if platform != "gpu":
            found.append(f"the backend is {platform}, it needs a GPU")
        elif _platform.get() is None:
            found += _gpu_obstacles()
        if dtype not in ("bfloat16", "float16"):
            found.append(f"the dtype is {dtype}, it needs bfloat16 or float16")
    if head_dim % 8 or head_dim > 128:
        found.append(f"the head width is {head_dim}, it needs a multiple of 8 up to 128")
    return found


def _gpu_obstacles() -> list[str]:
    capability = cuda_capability()
    if capability is None:
        return [f"the GPU is a {jax.devices()[0].device_kind}, it needs one of NVIDIA"]
    if capability < 8:
        return [f"the GPU has compute capability {capability}, it needs 8.0 (Ampere) or more"]
    return []


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_lengths: jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, with logits and softmax in float32.

    Args:
      query: [B, N, H, K].
      key, value: [B, S, H, K].
      key_lengths: [B] int32, at least 1: keys at position >= length take no part. None: all keys do.
      implementation: 'xla' (any backend), 'cudnn' (fused, NVIDIA GPUs, bfloat16 or float16; computes nothing
        past a length) or 'splash' (fused, TPUs).

    Returns:
      [B, N, H, K] in the dtype of `query`.
    """
    if implementation == "splash":
        return splash_attention(query, key, value, key_lengths)
    if implementation not in ("xla", "cudnn"):
        raise ValueError(f"attention '{implementation}' is not resolved: see choose_implementation")
    if implementation == "cudnn":
        return _cudnn_attention(query, key, value, key_lengths)
    if query.dtype == jnp.float16:
        return _float16_attention(query, key, value, key_lengths)
    query, key, value = (checkpoint_name(x, PRODUCT) for x in (query, key, value))
    # The gradient p (dp - sum(p dp)) needs the probabilities p alone. By default JAX differentiates the
    # exponential and the division one after the other and keeps what both need.
    with jax.softmax_custom_jvp(True):
        out = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=key_lengths)
    return checkpoint_name(out, RESIDUAL)


def _float16_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None
) -> jax.Array:
    """`attention` by XLA, for sampling. JAX's own asks for a kind of float16 product that only GPUs have."""
    logits = jnp.einsum("bnhk,bshk->bhns", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if key_lengths is not None:
        valid = jnp.arange(key.shape[1]) < key_lengths[:, None, None, None]
        logits = jnp.where(valid, logits, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.einsum("bhns,bshk->bnhk", probabilities, value)


def _cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None
) -> jax.Array:
    """`attention` by cuDNN. JAX differentiates it for even numbers of queries and of keys only."""
    tokens, keys = query.shape[1], key.shape[1]
    query, key, value = (_pad_tokens(x, axis=1, multiple=2) for x in (query, key, value))
    if key_lengths is None and key.shape[1] != keys:
        key_lengths = jnp.full((query.shape[0],), keys, jnp.int32)
    # Its residuals are the outputs of one primitive, which `save_attention_residuals` knows.
    query, key, value = (checkpoint_name(x, PRODUCT) for x in (query, key, value))
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=key_lengths, implementation="cudnn"
    )[:, :tokens]


def save_attention_residuals(primitive: Primitive, *_: Any, **params: Any) -> bool:
    """The part of a rematerialization policy that keeps what attention's backward pass needs (`RESIDUAL`)."""
    if primitive.name == "name":
        return params["name"] == RESIDUAL
    # Output and softmax statistics of the cuDNN kernel.
    return primitive.name.startswith("dot_product_attention_fwd")


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_lengths: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention` by the TPU kernel that ships with JAX: no logits in memory, forward or backward.

    Its blocks are multiples of 128 tokens, so that queries and keys are padded to one; padding and keys past
    a length carry another segment id than the queries.

    Args:
      query, key, value, key_lengths: as `attention`.
      interpret: run the kernel's program step by step on any backend. Slow; for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    batch, tokens, heads, _ = query.shape
    keys = key.shape[1]
    query, key, value = (
        _pad_tokens(x.swapaxes(1, 2), axis=2, multiple=SPLASH_LANES) for x in (query, key, value)
    )
    if key_lengths is None and key.shape[2] != keys:
        key_lengths = jnp.full((batch,), keys, jnp.int32)
    segments = None
    if key_lengths is not None:
        segments = SegmentIds(
            q=jnp.ones((batch, query.shape[2]), jnp.int32),
            kv=(jnp.arange(key.shape[2]) < key_lengths[:, None]).astype(jnp.int32),
        )
    kernel = _splash_kernel(heads, query.shape[2], key.shape[2], interpret)
    # The kernel does not scale its logits.
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    query, key, value = (checkpoint_name(x, PRODUCT) for x in (query, key, value))
    out = jax.vmap(kernel)(query, key, value, segments)
    return out[:, :, :tokens].swapaxes(1, 2).astype(query.dtype)


def _pad_tokens(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros up to the next multiple along `axis`."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _splash_kernel(heads: int, queries: int, keys: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block_q, block_kv = (
        next(block for block in SPLASH_BLOCKS if length % block == 0) for length in (queries, keys)
    )
    block_kv_dkv = max(n for n in range(block_kv, SPLASH_MAX_KEYS + 1, block_kv) if keys % n == 0)
    # Tokens along the lanes: an array whose last axis is the head width 72 takes 128 lanes of memory.
    layout = splash.QKVLayout.SEQ_MINOR
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv_dkv,
            block_kv_dkv_compute=block_kv_dkv,
            # One backward kernel: the logits are computed once for all three gradients.
            use_fused_bwd_kernel=True,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )


def compact_keys(keys: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves the keys that `mask` keeps to the front, in their order.

    Attention does not depend on the order of its keys, so that any mask becomes a length, which every
    implementation can use without computing on padding.

    Args:
      keys: [B, S, D].
      mask: [B, S], non-zero where a key takes part. A row without any would have no defined attention;
        it keeps its first key, so that the result stays finite.

    Returns:
      keys [B, S, D] and lengths [B] int32.
    """
    kept = mask.astype(bool)
    order = jnp.argsort(~kept, axis=1, stable=True)
    lengths = jnp.maximum(kept.sum(axis=1, dtype=jnp.int32), 1)
    return jnp.take_along_axis(keys, order[:, :, None], axis=1), lengths
