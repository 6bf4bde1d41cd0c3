"""PixArt-α in JAX: training, sampling, evaluation, and weights that travel to and from PyTorch.

    import pixart_jax

    model = pixart_jax.load_model("PixArt-XL-2-512x512.pth")
    out = model(latents, timesteps, text, text_mask)

    pipe = pixart_jax.load_pipeline("PixArt-XL-2-512x512")
    images = pipe(["a corgi reading"], seed=0, steps=20, guidance_scale=4.5, height=512, width=512)

The names below are the whole public API; commands are `python -m pixart_jax.NAME --help`.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixart_jax.config import GuidanceConfig, TrainConfig
    from pixart_jax.errors import UserError
    from pixart_jax.models.dit import DiT, DiTConfig
    from pixart_jax.models.pixart import PixArt, PixArtConfig
    from pixart_jax.pipeline import Pipeline, load_pipeline
    from pixart_jax.weights.loading import load_model

__version__ = "0.1.0"

# Simulated devices of a CPU share one pool of threads, each collective of each device blocks one of them, and
# XLA runs independent collectives of a program in any order: with one thread per device, some devices wait
# for the rest in one collective and the rest in another, for ever. The backend reads this when it starts.
_simulated = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
if _simulated and int(_simulated[1]) > 1:
    os.environ.setdefault("PJRT_NPROC", str(16 * int(_simulated[1])))

# Imported when first used: the models run on machines that lack what files and tokenizers need.
_HOMES = {
    "DiT": "models.dit",
    "DiTConfig": "models.dit",
    "GuidanceConfig": "config",
    "Pipeline": "pipeline",
    "PixArt": "models.pixart",
    "PixArtConfig": "models.pixart",
    "TrainConfig": "config",
    "UserError": "errors",
    "load_model": "loading",
    "load_pipeline": "pipeline",
}

__all__ = [
    "DiT",
    "DiTConfig",
    "GuidanceConfig",
    "Pipeline",
    "PixArt",
    "PixArtConfig",
    "TrainConfig",
    "UserError",
    "load_model",
    "load_pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pixart_jax' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"pixart_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
