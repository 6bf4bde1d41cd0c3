"""Trains a LoRA for the released weights of PixArt-α or PixArt-Σ on your own captioned images.

    python -m pixart_jax.precompute --config=configs/lora.py:512 --images=photos --out=data/lora
    python -m pixart_jax.train --config=configs/lora.py:512 --workdir=runs/lora
    python -m pixart_jax.convert --input=runs/lora --output=my-lora --to=peft

The variants are those of configs/finetune.py: '256', '512' and '1024' for PixArt-α, 'sigma-256' to
'sigma-2048' for PixArt-Σ. Everything that is not listed here is as there. The network is frozen and stored in
bfloat16, or in int8 with --config.adapter.base_dtype=int8. docs/fine-tuning.md says which rank, learning rate
and number of steps to choose, and what fits on which GPU.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from pixart_jax.config import AdapterConfig, CheckpointConfig, LogConfig, from_file, to_config_dict

# Our choice: micro-batches of one image at 1024 px, two at 512 px and four at 256 px fit on a GPU of 8 GB.
# At 2048 px, one image takes 24 GB, of which most is for decoding sample images.
ACCUMULATION = {256: 1, 512: 2, 1024: 4, 2048: 4}


def get_config(variant: str = "512") -> ConfigDict:
    """Returns the config of a variant of configs/finetune.py, such as '512' or 'sigma-1024'."""
    base = from_file(f"{Path(__file__).with_name('finetune.py')}:{variant}")
    return to_config_dict(
        dataclasses.replace(
            base,
            name=f"lora-{variant}",
            steps=2_000,  # our choice: 8,000 samples, or 400 passes over 20 images
            adapter=AdapterConfig(
                kind="lora",
                rank=16,  # official docs of train_pixart_lora_hf.py
                alpha=0.0,  # that of the rank: scale 1. The official scripts leave peft's default, 8
                targets="attention+mlp",
                base_dtype="bfloat16",
            ),
            data=dataclasses.replace(base.data, train="data/lora", batch_size=4),
            optimizer=dataclasses.replace(
                base.optimizer,
                name="adamw",
                # Our choice, the usual rate for LoRA. The official scripts use 1e-6 to 1e-3 (DreamBooth).
                learning_rate=1e-4,
                sqrt_scaling_batch=0,
                warmup_steps=100,
                weight_decay=0.01,
                eps=1e-8,
                clip_norm=1.0,
                accumulation=ACCUMULATION[base.features.image_size],
                ema_decay=0.99,
                # Our choice: the state takes 1.33 GB of the device, or 0.74 GB with a base in int8.
                moments="bfloat16",
                ema_device="host",
                ema_every=10,
            ),
            checkpoint=CheckpointConfig(every=500, keep=2),
            log=LogConfig(every=20, validate_every=200, sample_every=500, samples=4),
        )
    )
