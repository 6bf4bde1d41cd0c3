"""Stage 3, high aesthetics: PixArt-XL/2 at 256, 512, then 1024 px (PixArt-α §2.2, Table 4).

The 256 px model starts from the weights of stage 2, the 512 px model from those of the 256 px model, and the
1024 px model from those of the 512 px model. The 512 and 1024 px models train on aspect-ratio buckets with
size conditions.

    python -m pixart_jax.precompute --config=configs/stage3.py:512 --images=IMAGES --out=data/aesthetic-512
    python -m pixart_jax.train --config=configs/stage3.py:512 --workdir=runs/stage3-512
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
from pixart_jax.errors import UserError

# Table 4: steps and total batch. Official configs: position scale ('lewei_scale').
SIZES = {
    "256": dict(steps=90_000, batch_size=11_392, position_scale=1.0, init="runs/stage2"),
    "512": dict(steps=100_000, batch_size=2_560, position_scale=1.0, init="runs/stage3-256"),
    "1024": dict(steps=16_000, batch_size=384, position_scale=2.0, init="runs/stage3-512"),
}


def get_config(size: str = "256") -> ConfigDict:
    """Returns the config for '256', '512' or '1024' pixels."""
    if size not in SIZES:
        raise UserError(f"configs/stage3.py has no size '{size}': choose {', '.join(SIZES)}.")
    values, pixels = SIZES[size], int(size)
    buckets = pixels > 256
    return to_config_dict(
        TrainConfig(
            name=f"stage3-{size}",
            steps=values["steps"],
            model=PixArtConfig(
                size="XL/2",
                text_dim=4096,  # T5-XXL
                text_length=120,  # §3.1
                base_size=pixels // 16,  # VAE 8 x patch 2
                position_scale=values["position_scale"],
                size_conditions=buckets,  # official 'PixArtMS' models
                dtype="bfloat16",
                remat="dots",
            ),
            features=FeaturesConfig(
                buckets="official" if buckets else "single",
                latent_scale=0.18215,
            ),
            data=DataConfig(train=f"data/aesthetic-{size}", batch_size=values["batch_size"]),
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
            # If the batch size is not divisible by the number of devices, sharding the tokens of a 1024 px
            # image needs less memory and traffic than sharding the heads (docs/scaling.md).
            mesh=MeshConfig(data=-1, fsdp=-1, **{"sequence" if pixels == 1024 else "tensor": -1}),
            init=InitConfig(method="resize", path=values["init"]),
        )
    )
