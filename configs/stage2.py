"""Stage 2, text-image alignment: PixArt-XL/2 at 256 px on densely captioned images (PixArt-α §2.2, Table 4).

It starts from the weights of stage 1, re-parameterized.

    python -m pixart_jax.precompute --config=configs/stage2.py --images=SAM.jsonl --out=data/sam-256
    python -m pixart_jax.train --config=configs/stage2.py --workdir=runs/stage2
"""

from ml_collections import ConfigDict

from pixart_jax.config import (
    DataConfig,
    DiffusionConfig,
    FeaturesConfig,
    GuidanceConfig,
    InitConfig,
    MeshConfig,
    OptimizerConfig,
    PixArtConfig,
    TrainConfig,
    to_config_dict,
)


def get_config() -> ConfigDict:
    return to_config_dict(
        TrainConfig(
            name="stage2",
            steps=150_000,  # Table 4
            model=PixArtConfig(
                size="XL/2",
                text_dim=4096,  # T5-XXL
                text_length=120,  # §3.1
                base_size=16,
                position_scale=1.0,  # official 256 px config
                dtype="bfloat16",
                remat="dots",
            ),
            features=FeaturesConfig(latent_scale=0.18215),
            data=DataConfig(
                train="data/sam-256",
                batch_size=11_392,  # Table 4: 178 x 64
            ),
            diffusion=DiffusionConfig(condition_dropout=0.1),  # official config: class_dropout_prob
            # A dropped caption keeps its mask, as in the official training code.
            guidance=GuidanceConfig(null_text="t5_empty", null_mask="caption", scale=4.5),
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
            init=InitConfig(method="reparameterize", path="runs/stage1"),
        )
    )
