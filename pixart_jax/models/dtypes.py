"""Floating-point types for computation, and which of them the devices support."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError

# The lowest compute capability whose tensor cores support bfloat16 (Ampere). On older GPUs XLA fails to
# compile JAX's attention in bfloat16 ("Unsupported algorithm on the current device(s):
# ALG_DOT_BF16_BF16_F32").
BFLOAT16_CAPABILITY = 8.0


class DtypeChoice(NamedTuple):
    """A compute dtype, and why it was chosen."""

    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{self.dtype} ({self.reason})"


def cuda_capability() -> float | None:
    """Returns the compute capability of the NVIDIA GPUs of this backend, or None for other devices."""
    if jax.default_backend() != "gpu":
        return None
    # For AMD GPUs, JAX returns the name of an architecture (gfx942) instead of a number.
    capability = str(jax.devices()[0].compute_capability)
    return float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None


def default_dtype() -> DtypeChoice:
    """Returns the default compute dtype for sampling.

    It is float32 on CPUs, float16 on NVIDIA GPUs without bfloat16, and bfloat16 on all other devices.
    """
    obstacle = _bfloat16_obstacle()
    if obstacle:
        return DtypeChoice("float16", obstacle)
    platform = jax.default_backend()
    return DtypeChoice("float32" if platform == "cpu" else "bfloat16", f"the backend is {platform}")


def check_dtype(name: str, dtype: str) -> None:
    """Raises a `UserError` if the devices cannot compute in `dtype`; `name` is the setting it comes from."""
    obstacle = _bfloat16_obstacle()
    if dtype == "bfloat16" and obstacle:
        raise UserError(
            f"{name} is 'bfloat16', but {obstacle}: use 'float32', or 'float16' for what is not trained."
        )


def product_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the output dtype for a product of matrices in `dtype` that could overflow float16."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def _bfloat16_obstacle() -> str | None:
    """Returns the reason why the devices do not support bfloat16, or None if they do."""
    capability = cuda_capability()
    if capability is None or capability >= BFLOAT16_CAPABILITY:
        return None
    return f"the GPU has compute capability {capability}, bfloat16 needs {BFLOAT16_CAPABILITY} (Ampere)"
