"""From prompts to images: the pipeline, and what the command and the page need around it."""

from pixart_jax.pipeline.pipeline import Embeddings, Pipeline, load_pipeline

__all__ = ["Embeddings", "Pipeline", "load_pipeline"]
