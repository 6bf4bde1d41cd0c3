"""Fine-tunes the released PixArt-XL/2 weights on your own captioned images, at 256, 512 or 1024 px.

    hf download PixArt-alpha/PixArt-XL-2-512x512 --local-dir=PixArt-XL-2-512x512
    python -m pixart_jax.precompute --config=configs/finetune.py:512 --images=photos --out=data/finetune
    python -m pixart_jax.train --config=configs/finetune.py:512 --workdir=runs/finetune

To start from other weights, pass --config.init.path=FILE_OR_FOLDER, in any format: an official .pth, a
diffusers folder, or a run. The state takes 9.8 GB in float32 (weights, moving average, two moments) and the
gradient 2.4 GB. They fit on one 24 GB GPU. docs/fine-tuning.md says what to set on a smaller one; or shard
them over several (--config.mesh.fsdp).
"""

from ml_collections import ConfigDict

from pixart_jax.config import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    FeaturesConfig,
    GuidanceConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    PixArtConfig,
    TextEncoderConfig,
    TrainConfig,
    to_config_dict,
)
from pixart_jax.errors import UserError

# Folders of the release. The 256 px folder contains only a transformer; all sizes have the same T5 and VAE.
RELEASE = {
    "256": "PixArt-XL-2-256x256/transformer",
    "512": "PixArt-XL-2-512x512",
    "1024": "PixArt-XL-2-1024-MS",
}
ENCODERS = {"256": RELEASE["512"], "512": RELEASE["512"], "1024": RELEASE["1024"]}
# Our choice: numbers of micro-batches that leave some memory free on one 24 GB GPU. Divide them by the number
# of devices.
ACCUMULATION = {"256": 2, "512": 8, "1024": 32}


def get_config(size: str = "512") -> ConfigDict:
    """Returns the config for '256', '512' or '1024' pixels."""
    if size not in RELEASE:
        raise UserError(f"configs/finetune.py has no size '{size}': choose {', '.join(RELEASE)}.")
    pixels, encoders = int(size), ENCODERS[size]
    # Only the released 1024 px model has size conditions and was trained on buckets.
    buckets = pixels == 1024
    return to_config_dict(
        TrainConfig(
            name=f"finetune-{size}",
            steps=2_000,  # our choice: 64,000 samples, or 128 passes over 500 images
            model=PixArtConfig(
                size="XL/2",
                text_dim=4096,  # T5-XXL
                text_length=120,  # §3.1
                base_size=pixels // 16,  # VAE 8 x patch 2
                position_scale=2.0 if buckets else 1.0,  # official configs: 'lewei_scale'
                size_conditions=buckets,
                dtype="bfloat16",
                remat="dots",
            ),
            features=FeaturesConfig(
                buckets="official" if buckets else "single",
                vae=f"{encoders}/vae",
                latent_scale=0.18215,  # official config: scale_factor
                text_encoder=TextEncoderConfig(tokenizer=encoders, weights=f"{encoders}/text_encoder"),
            ),
            data=DataConfig(
                train="data/finetune",
                # Our choice, close to the official fine-tuning at 512 px (controlHed: 12 x 4 micro-batches).
                batch_size=32,
            ),
            diffusion=DiffusionConfig(condition_dropout=0.1),  # official config: class_dropout_prob
            # The conventions of diffusers, so that the exported result generates the same images there.
            guidance=GuidanceConfig(null_text="t5_empty", null_mask="own", aspect_ratio="true", scale=4.5),
            optimizer=OptimizerConfig(
                # Official fine-tuning uses 2e-5 x sqrt(batch / 256), which is 7.1e-6 here (controlHed), and
                # 5e-6 for a few images of one subject (dreambooth).
                learning_rate=2e-5,
                sqrt_scaling_batch=256,
                warmup_steps=0,  # dreambooth, controlHed
                weight_decay=0.03,  # §3.1
                eps=1e-10,  # official configs
                clip_norm=0.01,  # official configs
                accumulation=ACCUMULATION[size],
                ema_decay=0.9999,  # official configs; the decay warms up, so short runs work too
            ),
            mesh=MeshConfig(data=1, fsdp=-1),
            init=InitConfig(method="weights", path=RELEASE[size]),
            checkpoint=CheckpointConfig(every=500, keep=2),
            log=LogConfig(every=20, validate_every=200, sample_every=500, samples=4),
        )
    )
