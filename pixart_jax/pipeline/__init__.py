"""From prompts to images: the pipeline, and helpers for the command and the web page."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixart_jax.pipeline.loading import load_pipeline
    from pixart_jax.pipeline.pipeline import Embeddings, Pipeline

__all__ = ["Embeddings", "Pipeline", "load_pipeline"]


def __getattr__(name: str) -> Any:
    # Imported on first use, because some code needs `pipeline.requests` but not the text encoder and the
    # checkpoints.
    if name not in __all__:
        raise AttributeError(f"module 'pixart_jax.pipeline' has no attribute '{name}'")
    module = "loading" if name == "load_pipeline" else "pipeline"
    return getattr(importlib.import_module(f"pixart_jax.pipeline.{module}"), name)
