"""Scaled dot-product attention behind one function with an explicit implementation.

Axes: B batch, N query tokens, S key tokens, H heads, K head width.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError, did_you_mean

IMPLEMENTATIONS = ("xla", "cudnn", "splash")

# The splash kernel works on blocks of keys and queries; a TPU's vector registers are this wide.
SPLASH_LANES = 128
SPLASH_BLOCKS = (512, 384, 256, 128)

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def target_platform(platform: str) -> Iterator[None]:
    """Within this context programs are meant for `platform` ('tpu', 'gpu'), which need not be here."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def check_implementation(implementation: str, *, dtype: str, head_dim: int) -> None:
    """Raises a `UserError` that lists why `implementation` cannot run with this dtype and head width."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention '{implementation}' is unknown: choose one of {', '.join(IMPLEMENTATIONS)}."
            + did_you_mean(implementation, IMPLEMENTATIONS)
        )
    if implementation == "xla":
        return
    platform = _platform.get() or jax.default_backend()
    reasons = []
    if implementation == "splash":
        if platform != "tpu":
            reasons.append(f"the backend is {platform}, it needs a TPU")
    else:
        if platform != "gpu":
            reasons.append(f"the backend is {platform}, it needs a GPU")
        elif _platform.get() is None and float(jax.devices()[0].compute_capability) < 8:
            capability = jax.devices()[0].compute_capability
            reasons.append(f"the GPU has compute capability {capability}, it needs 8.0 (Ampere) or more")
        if dtype not in ("bfloat16", "float16"):
            reasons.append(f"the dtype is {dtype}, it needs bfloat16 or float16")
    if head_dim % 8 or head_dim > 128:
        reasons.append(f"the head width is {head_dim}, it needs a multiple of 8 up to 128")
    if reasons:
        raise UserError(
            f"attention '{implementation}' cannot run: {'; '.join(reasons)}. Use attention 'xla'."
        )


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
    # The gradient p (dp - sum(p dp)) needs the probabilities p alone. By default JAX differentiates the
    # exponential and the division one after the other and keeps what both need.
    with jax.softmax_custom_jvp(True):
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=key_lengths, implementation=implementation
        )


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
    query, key, value = (_pad_tokens(x.swapaxes(1, 2), axis=2) for x in (query, key, value))
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
    out = jax.vmap(kernel)(query, key, value, segments)
    return out[:, :, :tokens].swapaxes(1, 2).astype(query.dtype)


def _pad_tokens(x: jax.Array, axis: int) -> jax.Array:
    """Zeros up to the next multiple of 128 along `axis`."""
    missing = -x.shape[axis] % SPLASH_LANES
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _splash_kernel(heads: int, queries: int, keys: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block_q, block_kv = (
        next(block for block in SPLASH_BLOCKS if length % block == 0) for length in (queries, keys)
    )
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
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
