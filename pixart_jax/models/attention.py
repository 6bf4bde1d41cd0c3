"""Scaled dot-product attention behind one function with an explicit implementation.

Axes: B batch, N query tokens, S key tokens, H heads, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError, did_you_mean

IMPLEMENTATIONS = ("xla", "cudnn")


def check_implementation(implementation: str, *, dtype: str, head_dim: int) -> None:
    """Raises a `UserError` that lists why `implementation` cannot run with this dtype and head width."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention '{implementation}' is unknown: choose one of {', '.join(IMPLEMENTATIONS)}."
            + did_you_mean(implementation, IMPLEMENTATIONS)
        )
    if implementation != "cudnn":
        return
    reasons = []
    if jax.default_backend() != "gpu":
        reasons.append(f"the backend is {jax.default_backend()}, it needs a GPU")
    if dtype not in ("bfloat16", "float16"):
        reasons.append(f"the dtype is {dtype}, it needs bfloat16 or float16")
    if head_dim % 8 or head_dim > 128:
        reasons.append(f"the head width is {head_dim}, it needs a multiple of 8 up to 128")
    if reasons:
        raise UserError("attention 'cudnn' cannot run: " + "; ".join(reasons) + ". Use attention 'xla'.")


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
      implementation: 'xla' (any backend) or 'cudnn' (fused, NVIDIA GPUs, bfloat16 or float16).

    Returns:
      [B, N, H, K] in the dtype of `query`.
    """
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=key_lengths, implementation=implementation
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
