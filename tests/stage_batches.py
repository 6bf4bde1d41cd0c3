"""A tiny stage with text, and batches of noise in the format of the loader."""

import numpy as np

from pixart_jax.config import DataConfig, FeaturesConfig, GuidanceConfig, OptimizerConfig, TrainConfig
from pixart_jax.models.configs import PixArtConfig

MODEL = PixArtConfig(size="custom", depth=2, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
CONFIG = TrainConfig(
    model=MODEL,
    features=FeaturesConfig(latent_scale=0.5),
    data=DataConfig(batch_size=16),
    guidance=GuidanceConfig(null_text="t5_empty", null_mask="caption"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-8, clip_norm=1.0),
)


def make_batch(step=0, size=16):
    """Returns the batch of a step, which depends only on the step and the batch size."""
    rng = np.random.default_rng(step)
    return {
        "latent_mean": rng.normal(size=(size, 4, 4, 4)).astype(np.float32),
        "latent_std": np.full((size, 4, 4, 4), 0.1, np.float32),
        "text": rng.normal(size=(size, 5, 8)).astype(np.float32),
        "text_mask": np.arange(5) < rng.integers(1, 6, size=(size, 1)),
        "index": np.arange(step * size, (step + 1) * size, dtype=np.uint32),
    }
