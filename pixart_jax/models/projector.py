"""The projector of representation alignment: an MLP on the tokens inside a network (REPA, arXiv 2410.06940).

Axes: B batch, N image tokens, D width of the network, P hidden width, E width of the image encoder.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.models.layers import constrain, linear


class Projector(nnx.Module):
    """Linear(D -> P) SiLU Linear(P -> P) SiLU Linear(P -> E), with Xavier kernels and zero biases."""

    def __init__(self, width: int, hidden: int, out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inner = dict(dtype=dtype, rngs=rngs)
        self.fc1 = linear(width, hidden, ("embed", "mlp"), **inner)
        self.fc2 = linear(hidden, hidden, ("mlp", "embed"), **inner)
        self.fc3 = linear(hidden, out, ("embed", None), **inner)

    @jax.named_scope("projector")
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, E] in the compute dtype."""
        hidden = jax.nn.silu(self.fc2(jax.nn.silu(self.fc1(tokens))))
        return self.fc3(constrain(hidden, "batch", "tokens", None))


def projector_products(width: int, hidden: int, out: int) -> int:
    """Returns the multiplications of the projector for one token."""
    return width * hidden + hidden**2 + hidden * out
