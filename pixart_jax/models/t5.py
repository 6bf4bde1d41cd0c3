"""The encoder of T5 v1.1 (arXiv 1910.10683; v1.1: gated GELU, arXiv 2002.05202), PixArt's text encoder.

Axes: B batch, S tokens, D width, H heads, K head width, F width of the feed-forward layer.

Whatever the compute dtype, these are computed in float32: the residual stream, which grows so large that
bfloat16 would round away what a block adds; RMS norms; attention logits and softmax. The weights may be kept
in bfloat16 or float16; they are cast where they are used.

With float16, the matrix products that follow a norm return float32, and everything up to the next norm is
float32, because values in the feed-forward layers can exceed 65504, the largest float16. (transformers keeps
the weights `wo` in float32 for the same reason.)

The kernels of the blocks, except `wo`, may be int8 (`models/quantization.py`); each then has its scales in a
parameter named `q_scale`, `wi_0_scale`, ….

Logical axes: those of `layers.py`, and 'vocab'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixart_jax.errors import UserError, did_you_mean, one_of
from pixart_jax.models.blocks import Blocks
from pixart_jax.models.configs import COMPUTE_DTYPES
from pixart_jax.models.dtypes import check_dtype, product_dtype
from pixart_jax.models.elementwise import gelu
from pixart_jax.models.layers import Matrix, constrain, metadata, parameter, rescale
from pixart_jax.models.quantization import SCALE, T5_KEPT, quantize_blocks

# HuggingFace's names of the feed-forward layers of T5 v1.1 and T5 v1.0.
FEED_FORWARD = ("gated-gelu", "relu")
# HuggingFace's names of the encoders that `T5Encoder` implements, with the feed-forward layers of files that
# do not state them. mT5 (arXiv 2010.11934) has the layers of T5 v1.1 and a multilingual vocabulary; ByT5 is a
# 't5'. UMT5 is not among them: each of its blocks has its own position bias.
MODEL_TYPES = {"t5": "relu", "mt5": "gated-gelu"}

_POSITIVE = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """A T5 encoder; the defaults are T5 v1.1 XXL. Fields are named as in HuggingFace's config.json."""

    # Rows of the embedding table.
    vocab_size: int = 32128
    # Width D of the token stream and of the features.
    d_model: int = 4096
    # Width K of a head; H K may differ from D.
    d_kv: int = 64
    # Width F of the feed-forward layer.
    d_ff: int = 10240
    # Number of blocks.
    num_layers: int = 24
    # Attention heads H.
    num_heads: int = 64
    # Number of buckets for relative positions. All distances of at least max_distance share the last bucket.
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    # The epsilon of the RMS norms.
    layer_norm_epsilon: float = 1e-6
    # 'gated-gelu' (v1.1) or 'relu' (v1.0).
    feed_forward_proj: str = "gated-gelu"
    # Compute dtype of the matrix products: 'float32', 'bfloat16' or 'float16'.
    dtype: str = "float32"
    # Run the blocks with lax.scan (a block is compiled once) or unrolled.
    scan_layers: bool = True

    def __post_init__(self):
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"T5 config: {name} is {value!r}: it must be a whole number of at least 1.")
        exact = self.relative_attention_num_buckets // 4
        if exact < 1 or self.relative_attention_max_distance <= exact:
            raise UserError(
                f"T5 config: relative_attention_num_buckets is {self.relative_attention_num_buckets}, "
                f"relative_attention_max_distance is {self.relative_attention_max_distance}: there must be "
                "at least 4 buckets, and the distance must exceed a quarter of their number."
            )
        if not isinstance(self.layer_norm_epsilon, (int, float)) or self.layer_norm_epsilon < 0:
            raise UserError(
                f"T5 config: layer_norm_epsilon is {self.layer_norm_epsilon!r}: it must be at least 0."
            )
        if self.feed_forward_proj not in FEED_FORWARD:
            raise UserError(
                f"T5 config: feed_forward_proj is '{self.feed_forward_proj}': choose 'gated-gelu' (T5 v1.1) "
                f"or 'relu' (T5 v1.0).{did_you_mean(str(self.feed_forward_proj), FEED_FORWARD)}"
            )
        one_of("T5 dtype", self.dtype, COMPUTE_DTYPES)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], *, dtype: str = "float32") -> T5Config:
        """Reads the config.json of a HuggingFace T5 or mT5.

        Args:
          values: the parsed file of a T5EncoderModel or of a complete T5 with its decoder.
          dtype: compute dtype.

        Raises:
          UserError: the file is not a T5 config, a required field is missing, or a value is not supported.
        """
        kind = values.get("model_type")
        if kind not in MODEL_TYPES:
            raise UserError(f"text encoder config: model_type is {kind!r}, but it must be 't5' or 'mt5'.")
        if values.get("is_decoder", False):
            raise UserError("text encoder config: is_decoder is true, but only T5 encoders are supported.")
        needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        missing = [name for name in needed if name not in values]
        if missing:
            raise UserError(
                f"text encoder config: {', '.join(missing)} missing: give the complete config.json of a T5."
            )
        # Older files lack these fields; transformers then uses these values.
        known = {
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": MODEL_TYPES[kind],
        }
        known = {name: values.get(name, default) for name, default in known.items()}
        return cls(**{name: values[name] for name in needed}, **known, dtype=dtype)

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def remat(self) -> str:
        # The encoder is not trained: there is no backward pass to save memory for.
        return "none"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every (query, key) pair, for bidirectional attention (arXiv 1910.10683, section 2.1).

    With n = num_buckets / 2, e = n / 2 and d = |key - query|, the bucket is d where d < e, else
    e + floor(log(d / e) / log(max_distance / e) (n - e)), at most n - 1; plus n for keys after the query.

    Args:
      length: number of tokens S.
      num_buckets: number of buckets, both directions together.
      max_distance: all distances of at least this share the last bucket of their direction.

    Returns:
      [S, S] int32, queries in rows.
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # In float32, as T5 was trained: where the scaled logarithm is near a whole number, rounding decides.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scaled = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (arXiv 1910.07467)."""

    def __init__(self, config: T5Config):
        self.epsilon = config.layer_norm_epsilon
        self.scale = parameter(jnp.ones(config.d_model), ("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] float32."""
        x = x.astype(jnp.float32)
        square = jnp.square(x).mean(axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(square + self.epsilon) * self.scale.astype(jnp.float32)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan: int, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter initialized from N(0, 1 / fan)."""
    return parameter(jax.random.normal(rngs.params(), shape) * fan**-0.5, axes)


def _kernel(
    rngs: nnx.Rngs, shape: tuple[int, ...], fan: int, axes: tuple[str | None, ...], inputs: int = 1
) -> nnx.Param:
    """The kernel of a linear layer with `inputs` input axes, initialized from N(0, 1 / fan)."""
    rank = len(shape)
    matrix = Matrix(tuple(range(-rank, inputs - rank)), tuple(range(inputs - rank, 0)))
    return nnx.Param(jax.random.normal(rngs.params(), shape) * fan**-0.5, **metadata(axes), matrix=matrix)


def _rescaled(product: jax.Array, layer: nnx.Module, name: str) -> jax.Array:
    """The product with the kernel `name` of a layer, rescaled if the kernel is int8."""
    scale = getattr(layer, name + SCALE, None)
    return product if scale is None else rescale(product, scale[...], product.dtype)


class T5Attention(nnx.Module):
    """softmax(q k^T + position bias) v, then the output projection. No biases, and no factor 1 / sqrt(K).

    The factor is part of the initialization of the queries: N(0, 1 / (D K)) instead of N(0, 1 / D).
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        width, heads, head_dim = config.d_model, config.num_heads, config.d_kv
        self.dtype = config.compute_dtype
        inner = (width, heads, head_dim)
        self.q = _kernel(rngs, inner, width * head_dim, ("embed", "heads", None))
        self.k = _kernel(rngs, inner, width, ("embed", "heads", None))
        self.v = _kernel(rngs, inner, width, ("embed", "heads", None))
        self.o = _kernel(rngs, (heads, head_dim, width), heads * head_dim, ("heads", None, "embed"), inputs=2)

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """x [B, S, D], bias [H, S, S] float32, mask [B, S] bool -> [B, S, D]."""

        def project(name: str) -> jax.Array:
            heads = jnp.einsum(
                "bsd,dhk->bshk",
                x,
                getattr(self, name).astype(self.dtype),
                preferred_element_type=product_dtype(self.dtype),
            )
            return constrain(_rescaled(heads, self, name), "batch", "tokens", "heads", None)

        # XLA's attention on every device: splash has no position bias, and captions are short. Inside, logits
        # and softmax are float32, and masked logits become the most negative number.
        out = jax.nn.dot_product_attention(
            project("q"),
            project("k"),
            project("v"),
            bias=bias[None],
            mask=mask[:, None, None, :],
            scale=1.0,
            implementation="xla",
        )
        return _rescaled(jnp.einsum("bshk,hkd->bsd", out, self.o.astype(out.dtype)), self, "o")


class T5FeedForward(nnx.Module):
    """wo(gelu(wi_0 x) * (wi_1 x)) in T5 v1.1, wo(relu(wi x)) in v1.0. No biases."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        width, hidden = config.d_model, config.d_ff
        self.dtype = config.compute_dtype
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, _kernel(rngs, (width, hidden), width, ("embed", "mlp")))
        self.wo = _kernel(rngs, (hidden, width), hidden, ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, D]."""

        def project(name: str) -> jax.Array:
            kernel = getattr(self, name).astype(self.dtype)
            out = jnp.matmul(x, kernel, preferred_element_type=product_dtype(self.dtype))
            return constrain(_rescaled(out, self, name), "batch", "tokens", "mlp")

        hidden = gelu(project("wi_0")) * project("wi_1") if self.gated else jax.nn.relu(project("wi"))
        return _rescaled(hidden @ self.wo.astype(hidden.dtype), self, "wo")


class T5Block(nnx.Module):
    """x += Attention(RMS x); x += FeedForward(RMS x)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.dtype = config.compute_dtype
        self.attn_norm = RMSNorm(config)
        self.attn = T5Attention(config, rngs=rngs)
        self.ff_norm = RMSNorm(config)
        self.ff = T5FeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """x [B, S, D] float32, bias [H, S, S] float32, mask [B, S] bool -> [B, S, D] float32."""
        x = x + self.attn(self.attn_norm(x).astype(self.dtype), bias, mask)
        return x + self.ff(self.ff_norm(x).astype(self.dtype))


class T5Encoder(nnx.Module):
    """T5 encoder: token ids to text features.

    The position bias, one number per head and bucket(key - query), is one table that all blocks share.
    Parameters are initialized as in transformers, so that random weights give features of the usual scale.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        check_dtype("the text encoder's dtype", config.dtype)
        self.config = config
        self.embed = _normal(rngs, (config.vocab_size, config.d_model), 1, ("vocab", "embed"))
        self.position_bias = _normal(
            rngs,
            (config.relative_attention_num_buckets, config.num_heads),
            config.d_model,
            (None, "heads"),
        )
        self.blocks = Blocks(config, lambda rngs: T5Block(config, rngs=rngs), rngs=rngs)
        self.final_norm = RMSNorm(config)

    def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes token ids; no dropout.

        Args:
          token_ids: [B, S] int in 0 .. vocab_size - 1. A row with any other value has NaN features.
          mask: [B, S], non-zero for tokens, 0 for padding. Features of padding are computed too but have no
            meaning and do not influence tokens. A row that is all padding has finite features.

        Returns:
          [B, S, D] float32.

        Raises:
          UserError: the shapes differ or are not [B, S], or the token ids are not integers.
        """
        config = self.config
        if token_ids.ndim != 2 or mask.shape != token_ids.shape:
            raise UserError(
                f"token_ids are {token_ids.shape} and the mask is {mask.shape}: both must be [B, S]."
            )
        if not jnp.issubdtype(token_ids.dtype, jnp.integer):
            raise UserError(f"token_ids are {token_ids.dtype}: they must be integers.")
        buckets = relative_buckets(
            token_ids.shape[1],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        bias = self.position_bias[...][buckets].transpose(2, 0, 1).astype(jnp.float32)  # [H, S, S]
        x = jnp.take(self.embed[...], token_ids, axis=0, mode="fill").astype(jnp.float32)
        x = constrain(x, "batch", "tokens", None)
        x = self.blocks(x, bias, mask.astype(bool))
        return self.final_norm(x)


def abstract_t5(config: T5Config, weights_dtype: str) -> T5Encoder:
    """Returns the encoder with abstract parameters, in the dtypes in which they are kept.

    Args:
      config: shape and compute dtype.
      weights_dtype: 'auto' (the compute dtype) or 'int8' (the kernels of the blocks).
    """

    def make() -> T5Encoder:
        encoder = T5Encoder(config, rngs=nnx.Rngs(0))
        if weights_dtype == "int8":
            quantize_blocks(encoder, T5_KEPT)
        for path, variable in nnx.iter_graph(encoder):
            if isinstance(variable, nnx.Param) and not (
                variable.dtype == jnp.int8 or str(path[-1]).endswith(SCALE)
            ):
                variable.set_value(variable[...].astype(config.compute_dtype))
        return encoder

    return nnx.eval_shape(make)
