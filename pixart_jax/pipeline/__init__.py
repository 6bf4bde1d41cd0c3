"""From prompts to images: the pipeline, and what the command and the web page need around it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixart_jax.pipeline.loading import load_pipeline
    from pixart_jax.pipeline.pipeline import Embeddings, Pipeline

__all__ = ["Embeddings", "Pipeline", "load_pipeline"]


def __getattr__(name: str) -> Any:
    # Imported when first used: `pipeline.requests` is needed where the text encoder and the checkpoints are
    # not.
    if name not in __all__:
        raise AttributeError(f"module 'pixart_jax.pipeline' has no attribute '{name}'")
    module = "loading" if name == "load_pipeline" else "pipeline"
    return getattr(importlib.import_module(f"pixart_jax.pipeline.{module}"), name)
