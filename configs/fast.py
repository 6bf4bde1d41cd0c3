"""PixArt-α with 23 % of the paper's FLOPs: four stages with training accelerators (docs/cost.md).

    launch/recipe.sh --recipe=fast

Stage 1 trains on ImageNet, stage 256 on captioned images, stages 512 and 1024 on aesthetic images. Each
starts from the weights of the one before it. There is no stage for aesthetic images at 256 px. The first two
stages need the features of an image encoder, beside those of the VAE and T5:

    python -m pixart_jax.precompute --config=configs/fast.py:256 --images=SAM.jsonl --out=data/fast-256

The weights are those of a plain PixArt-α. Values without a comment are those of the paper's stages, in
configs/stage1.py to stage3.py.
"""

from typing import Any

from ml_collections import ConfigDict

from pixart_jax.config import (
    AlignmentConfig,
    DataConfig,
    DiffusionConfig,
    DiTConfig,
    FeaturesConfig,
    GuidanceConfig,
    InitConfig,
    MeshConfig,
    OptimizerConfig,
    PixArtConfig,
    RoutingConfig,
    TrainConfig,
    to_config_dict,
)
from pixart_jax.errors import UserError, did_you_mean

STAGES: dict[str, dict[str, Any]] = {
    # 102M images: with as many, SiT-XL/2 trained with REPA reaches the FID that it has without REPA after
    # 17.5 times as many (400,000 steps of 256; arXiv 2410.06940).
    "stage1": dict(steps=100_000, batch_size=1024),
    # As many images as MicroDiT's masked stage at 256 px (250,000 steps of 2,048; arXiv 2407.15811).
    "256": dict(
        steps=250_000, batch_size=2048, init=InitConfig(method="reparameterize", path="runs/fast-stage1")
    ),
    # As many images as PRX at 512 px (100,000 steps of 1,024; Photoroom, "PRX part 3", 2026). MicroDiT: 113M.
    "512": dict(steps=50_000, batch_size=2048, init=InitConfig(method="resize", path="runs/fast-256")),
    # Steps and batch of PRX at 1024 px.
    "1024": dict(
        steps=20_000,
        batch_size=512,
        position_scale=2.0,
        init=InitConfig(method="resize", path="runs/fast-512"),
    ),
}


def get_config(stage: str = "stage1") -> ConfigDict:
    """Returns the config of one of `STAGES`."""
    if stage not in STAGES:
        raise UserError(
            f"configs/fast.py has no '{stage}': choose {', '.join(STAGES)}.{did_you_mean(stage, STAGES)}"
        )
    values, text = STAGES[stage], stage != "stage1"
    pixels = int(stage) if text else 256
    backbone = dict(size="XL/2", base_size=pixels // 16, dtype="bfloat16", remat="dots")
    buckets = pixels > 256
    # REPA helps most at first. PRX trains at 1024 px without it.
    aligned = pixels == 256
    return to_config_dict(
        TrainConfig(
            name=f"fast-{stage}",
            steps=values["steps"],
            model=PixArtConfig(
                **backbone,
                text_dim=4096,
                text_length=120,
                position_scale=values.get("position_scale", 1.0),
                size_conditions=buckets,
            )
            if text
            else DiTConfig(**backbone, num_classes=1000),
            objective="alignment" if aligned else "diffusion",
            # Block 8, weight 0.5, features of DINOv2-B: the values of REPA's XL/2. FID 18.20 -> 16.6 with
            # DINOv2 and 14.64 with DINOv3 (block 7, "PRX part 2"). Without it from 80 % of a stage on,
            # because it may hold the network back later (arXiv 2505.16792).
            alignment=AlignmentConfig(
                block=8, weight=0.5, target_width=768, stop_step=values["steps"] * 4 // 5
            )
            if aligned
            else AlignmentConfig(),
            features=FeaturesConfig(
                text=text,
                buckets="official" if buckets else "single",
                image_encoder="hub:facebook/dinov2-base" if aligned else "",
            ),
            data=DataConfig(
                train="data/fast-imagenet" if stage == "stage1" else f"data/fast-{stage}",
                batch_size=values["batch_size"],
            ),
            diffusion=DiffusionConfig(
                # At 64 px on OpenMoji: 1.5 times fewer FLOPs to the same share of right pictures
                # (docs/cost.md). Low noise levels are trained less, so the later stages draw all equally.
                timestep_density="logit_normal" if pixels == 256 else "uniform",
            ),
            guidance=GuidanceConfig(null_text="t5_empty", null_mask="caption", scale=4.5)
            if text
            else GuidanceConfig(),
            # Half of the tokens skip the blocks from the second to the last but one, from 1,024 tokens (512
            # px) on; at 256 px it harms (FID 18.20 -> 21.61, at 1,024 tokens 17.42 -> 14.10, "PRX part 2").
            # The last tenth runs on all tokens, as in MicroDiT (5,000 of 55,000 steps).
            routing=RoutingConfig(rate=-1, finish=values["steps"] // 10) if buckets else RoutingConfig(),
            # Muon: FID 18.20 -> 15.55 at a learning rate of 1e-4 ("PRX part 2").
            optimizer=OptimizerConfig(
                name="muon",
                learning_rate=1e-4,
                weight_decay=0.03,
                eps=1e-10,
                clip_norm=0.01,
                warmup_steps=1000,
                ema_decay=0.9999,
            ),
            mesh=MeshConfig(data=-1, fsdp=-1, **{"sequence" if pixels == 1024 else "tensor": -1}),
            init=values.get("init", InitConfig()),
        )
    )
