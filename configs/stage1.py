"""Stage 1, pixel dependency: a class-conditional DiT-XL/2 on ImageNet at 256 px (PixArt-α §2.2, Table 4).

    python -m pixart_jax.precompute --config=configs/stage1.py --source=classes --images=IMAGENET/train \\
        --out=data/imagenet-256
    python -m pixart_jax.train --config=configs/stage1.py --workdir=runs/stage1
"""

from ml_collections import ConfigDict

from pixart_jax.config import (
    DataConfig,
    DiTConfig,
    FeaturesConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    to_config_dict,
)


def get_config() -> ConfigDict:
    return to_config_dict(
        TrainConfig(
            name="stage1",
            steps=300_000,  # Table 4
            model=DiTConfig(
                size="XL/2",  # §3.1: the backbone is DiT-XL/2
                num_classes=1000,
                base_size=16,  # 256 px / 8 (VAE) / 2 (patch)
                dtype="bfloat16",
                remat="dots",
            ),
            # sd-vae-ft-ema; latents are sampled from the posterior during training; scaling factor 0.18215
            # (official config).
            features=FeaturesConfig(latent_scale=0.18215, text=False),
            data=DataConfig(
                train="data/imagenet-256",
                batch_size=1024,  # Table 4: 128 x 8
            ),
            # Learning rate 2e-5: Table 4. Weight decay 0.03: §3.1. eps, clip, warm-up, EMA: official configs.
            optimizer=OptimizerConfig(
                learning_rate=2e-5,
                weight_decay=0.03,
                eps=1e-10,
                clip_norm=0.01,
                warmup_steps=1000,
                ema_decay=0.9999,
            ),
            mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
        )
    )
