"""Scaled dot-product attention with a choice of implementations: XLA, cuDNN and splash (TPU).

Axes: B batch, N query tokens, S key tokens, H heads, K head width.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from pixart_jax.errors import UserError, one_of
from pixart_jax.models.configs import ATTENTION_IMPLEMENTATIONS
from pixart_jax.models.dtypes import check_dtype, cuda_capability

# `checkpoint_name` labels that the rematerialization policies (`layers.REMAT_POLICIES`) refer to.
# PRODUCT labels the outputs of linear layers, among them query, key and value. RESIDUAL labels the other
# arrays that the backward pass of attention needs: the output and, for a fused kernel, the log-sum-exp of
# each row. With a policy that saves RESIDUAL, the backward pass does not run the forward kernel again.
PRODUCT = "product"
RESIDUAL = "attention"

# Width of a TPU's vector registers. The splash kernel needs token counts that are multiples of it.
SPLASH_LANES = 128
# Block sizes for queries and keys, in order of preference.
SPLASH_BLOCKS = (512, 384, 256, 128)
# Upper limit on the keys per block of the backward kernel. Larger blocks write less: the kernel stores one
# partial gradient of all queries per block of keys, and the partial gradients are summed afterwards.
SPLASH_MAX_KEYS = 1024
# With fewer keys than this (captions), 'auto' uses XLA on TPUs, which fuses the softmax with both products.
SPLASH_MIN_KEYS = 256

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def target_platform(platform: str) -> Iterator[None]:
    """Within this context, implementations are chosen for `platform` ('tpu', 'gpu'); `platform()` returns it.

    Used when a program is compiled ahead of time for devices that this machine does not have.
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def platform() -> str:
    """Returns the platform that programs are compiled for: 'cpu', 'gpu' or 'tpu'."""
    return _platform.get() or jax.default_backend()


def check_name(implementation: str) -> None:
    """Raises a `UserError` if `implementation` is not in `ATTENTION_IMPLEMENTATIONS`."""
    one_of("attention", implementation, ATTENTION_IMPLEMENTATIONS)


class Choice(NamedTuple):
    """The implementation that 'auto' or an explicit request resolved to, and the reason, which is logged."""

    implementation: str
    reason: str
    # With fewer keys than this, 'xla' is used instead.
    min_keys: int = 0

    @property
    def fused(self) -> bool:
        """Whether a fused kernel computes attention, rather than XLA."""
        return self.implementation != "xla"

    def of(self, keys: int) -> str:
        """Returns the implementation for a given number of keys."""
        return self.implementation if keys >= self.min_keys else "xla"

    def __str__(self) -> str:
        short = f"; xla for fewer than {self.min_keys} keys" if self.min_keys else ""
        return f"{self.implementation} ({self.reason}{short})"


def choose_implementation(implementation: str, *, dtype: str, head_dim: int) -> Choice:
    """Chooses the implementation for this backend, or for the platform set by `target_platform`.

    'auto' becomes 'cudnn' on NVIDIA GPUs and 'splash' on TPUs if the kernel supports the device, the dtype
    and the head width, and 'xla' otherwise.

    Args:
      implementation: one of `ATTENTION_IMPLEMENTATIONS`.
      dtype: compute dtype of the model.
      head_dim: head width K.

    Raises:
      UserError: if the name is unknown, if an explicit choice cannot run here (the message gives every
        reason), or if this backend does not support the dtype.
    """
    check_name(implementation)
    # The dtype is checked against the local devices, which say nothing about another target.
    if _platform.get() is None:
        check_dtype("model.dtype", dtype)
    target = platform()
    if implementation == "auto":
        kernel = {"gpu": "cudnn", "tpu": "splash"}.get(target)
        if kernel is None:
            return Choice("xla", f"auto: the backend is {target}")
        obstacles = _obstacles(kernel, target, dtype, head_dim)
        if obstacles:
            return Choice("xla", f"auto: '{kernel}' cannot run, {'; '.join(obstacles)}")
        reason = f"auto: the backend is {target}, the dtype {dtype}, the head width {head_dim}"
        return Choice(kernel, reason, SPLASH_MIN_KEYS if kernel == "splash" else 0)
    obstacles = _obstacles(implementation, target, dtype, head_dim)
    if obstacles:
        raise UserError(
            f"attention '{implementation}' cannot run: {'; '.join(obstacles)}. Use attention 'auto' or 'xla'."
        )
    return Choice(implementation, "as configured")


def _obstacles(implementation: str, platform: str, dtype: str, head_dim: int) -> list[str]:
    """Returns the reasons why `implementation` cannot run; empty if it can."""
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
        return [f"the GPU is a {jax.devices()[0].device_kind}, it needs an NVIDIA GPU"]
    if capability < 8:
        return [f"the GPU has compute capability {capability}, it needs 8.0 (Ampere) or more"]
    # XLA looks for the backward kernel under another key than it stored it (openxla/xla#46500), and the step
    # ends with IndexError. Seen with jaxlib 0.11.2.
    given = re.findall(r"--xla_gpu_deterministic_ops(?:=(\S+))?", os.environ.get("XLA_FLAGS", ""))
    if given and given[-1] in ("", "1", "true"):
        return [
            "XLA_FLAGS has --xla_gpu_deterministic_ops (compile.deterministic), which it does not support"
        ]
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
      key_lengths: [B] int32, at least 1. Keys at positions >= length are masked out. None keeps all keys.
      implementation: 'xla' (any backend), 'cudnn' (fused, NVIDIA GPUs, bfloat16 or float16; skips the keys
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
    # The softmax gradient p (dp - sum(p dp)) needs only the probabilities p. By default JAX differentiates
    # the exponential and the division separately and keeps the residuals of both.
    with jax.softmax_custom_jvp(True):
        out = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=key_lengths)
    return checkpoint_name(out, RESIDUAL)


def _float16_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None
) -> jax.Array:
    """The XLA implementation of `attention` for float16, which is used for sampling only.

    `jax.nn.dot_product_attention` requests a float16 product algorithm that only GPUs implement.
    """
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
    """The cuDNN implementation of `attention`.

    JAX supports its gradient only for even numbers of queries and keys, so odd numbers are padded by one.
    """
    tokens, keys = query.shape[1], key.shape[1]
    query, key, value = (_pad_tokens(x, axis=1, multiple=2) for x in (query, key, value))
    if key_lengths is None and key.shape[1] != keys:
        # Mask the padding that was just added.
        key_lengths = jnp.full((query.shape[0],), keys, jnp.int32)
    # The output needs no label: the kernel is one primitive, which `save_attention_residuals` recognizes.
    query, key, value = (checkpoint_name(x, PRODUCT) for x in (query, key, value))
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=key_lengths, implementation="cudnn"
    )[:, :tokens]


def save_attention_residuals(primitive: Primitive, *_: Any, **params: Any) -> bool:
    """A rematerialization policy that saves what the backward pass of attention needs (see `RESIDUAL`)."""
    if primitive.name == "name":
        return params["name"] == RESIDUAL
    # The cuDNN kernel, whose outputs are the attention output and the softmax statistics.
    return primitive.name.startswith("dot_product_attention_fwd")


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_lengths: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention` with JAX's splash kernel for TPUs, which never stores the logits, forward or backward.

    The kernel works on blocks of a multiple of 128 tokens, so queries and keys are padded to a multiple of
    128. Masking is by segment ids: padding and keys past a length get a different id from the queries.

    Args:
      query, key, value, key_lengths: as for `attention`.
      interpret: run the kernel in Pallas interpret mode, which works on any backend. Slow; for tests.
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
    """Pads `axis` with zeros up to the next multiple of `multiple`."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _splash_kernel(heads: int, queries: int, keys: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block_q, block_kv = (
        next(block for block in SPLASH_BLOCKS if length % block == 0) for length in (queries, keys)
    )
    block_kv_dkv = max(n for n in range(block_kv, SPLASH_MAX_KEYS + 1, block_kv) if keys % n == 0)
    # Put the tokens on the last axis, the lanes. A last axis of size 72, the head width of XL/2, would be
    # padded to 128 lanes in memory.
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
            # One backward kernel for all three gradients, so that the logits are recomputed only once.
            use_fused_bwd_kernel=True,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )


def compact_keys(keys: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves the keys that `mask` keeps to the front and preserves their order.

    Attention does not depend on the order of its keys, so any mask can be expressed as a length. All
    implementations support lengths, and the fused kernels do not compute on the padding.

    Args:
      keys: [B, S, D].
      mask: [B, S], non-zero for the keys to keep. Attention over no keys is undefined, so a row that is all
        zeros keeps its first key.

    Returns:
      keys [B, S, D] and lengths [B] int32.
    """
    kept = mask.astype(bool)
    order = jnp.argsort(~kept, axis=1, stable=True)
    lengths = jnp.maximum(kept.sum(axis=1, dtype=jnp.int32), 1)
    return jnp.take_along_axis(keys, order[:, :, None], axis=1), lengths
