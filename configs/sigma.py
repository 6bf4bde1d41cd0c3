"""PixArt-Σ (arXiv 2403.04692): PixArt-α at 256 px learns another VAE and longer captions, then larger images.

    vae-256 -> 256 -> 512 -> 1024 -> 2048        each stage starts from the run of the one before it
    1024 -> 1024-kv -> 2048-kv                   the same with compressed keys and values

    python -m pixart_jax.precompute --config=configs/sigma.py:256 --images=IMAGES.json --out=data/sigma-256 \\
        --caption_fields=prompt=0.5,sharegpt4v=0.5
    python -m pixart_jax.train --config=configs/sigma.py:vae-256 --workdir=runs/sigma-vae-256
    python -m pixart_jax.train --config=configs/sigma.py:256 --workdir=runs/sigma-256

`--caption_fields` stores both captions of an image, and each time the image is read one of them is drawn with
these weights: the official real_prompt_ratio 0.5. (The paper says 60 % long captions.) An image that has only
one of the two is trained with that one; the official code draws an empty caption for it.

Releases are read from folders of their names in the working directory, or else downloaded from the hub.
'vae-256' and '256' share their features, and '1024' and '2048' share theirs with their '-kv' variants. To
start from your own α, pass --config.init.path=runs/stage3-256.
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
    TextEncoderConfig,
    TrainConfig,
    to_config_dict,
)
from pixart_jax.errors import UserError
from pixart_jax.hub import release

# The release of PixArt-α at 256 px, and that of T5-XXL and of the VAE of SDXL.
ALPHA = release("PixArt-XL-2-256x256/transformer")
ENCODERS = release("pixart_sigma_sdxlvae_T5_diffusers")

# steps: the paper's training stages. batch_size: images per GPU in the official configs (64; 48; 12, with
# compression 16; 4 for 2048), times the largest number of GPUs that the authors state: 32 V100, 8 A100 for
# 2048 (issues 24 and 77 of their repository). warmup_steps: official configs.
STAGES = {
    "vae-256": dict(steps=8_000, batch_size=2_048, warmup_steps=1000, init=ALPHA),
    "256": dict(steps=80_000, batch_size=2_048, warmup_steps=1000, init="runs/sigma-vae-256"),
    "512": dict(steps=10_000, batch_size=1_536, warmup_steps=1000, init="runs/sigma-256"),
    "1024": dict(steps=5_000, batch_size=384, warmup_steps=1000, init="runs/sigma-512"),
    "1024-kv": dict(steps=5_000, batch_size=512, warmup_steps=500, init="runs/sigma-1024"),
    "2048": dict(steps=4_000, batch_size=32, warmup_steps=100, init="runs/sigma-1024"),
    "2048-kv": dict(steps=4_000, batch_size=32, warmup_steps=100, init="runs/sigma-1024-kv"),
}


def get_config(stage: str = "256") -> ConfigDict:
    """Returns the config of 'vae-256', '256', '512', '1024', '1024-kv', '2048' or '2048-kv'."""
    if stage not in STAGES:
        raise UserError(f"configs/sigma.py has no stage '{stage}': choose {', '.join(STAGES)}.")
    values = STAGES[stage]
    adapts_vae, compresses = stage.startswith("vae-"), stage.endswith("-kv")
    size = stage.removeprefix("vae-").removesuffix("-kv")
    pixels = int(size)
    return to_config_dict(
        TrainConfig(
            name=f"sigma-{stage}",
            steps=values["steps"],
            seed=43,  # official config
            model=PixArtConfig(
                size="XL/2",
                text_dim=4096,  # T5-XXL
                text_length=300,  # official config: model_max_length
                base_size=pixels // 16,  # VAE 8 x patch 2
                position_scale=pixels / 512,  # official configs: pe_interpolation 0.5, 1, 2, 4
                size_conditions=False,  # official config: micro_condition
                # Official config: kv_compress_config. The second half of the 28 blocks is 14 to 27.
                kv_compression="conv" if compresses else "none",
                kv_compression_factor=2,
                dtype="bfloat16",
                remat="dots",
            ),
            features=FeaturesConfig(
                buckets="official" if pixels > 256 else "single",  # official configs: multi_scale
                vae=f"{ENCODERS}/vae",
                latent_scale=0.13025,  # official config: scale_factor
                text_encoder=TextEncoderConfig(
                    tokenizer=ENCODERS,
                    weights=f"{ENCODERS}/text_encoder",
                    clean_caption=False,  # official train.py
                    lower_case=False,
                ),
            ),
            data=DataConfig(train=f"data/sigma-{size}", batch_size=values["batch_size"]),
            diffusion=DiffusionConfig(condition_dropout=0.1),  # official config: class_dropout_prob
            # A dropped caption keeps its mask, as in the official training code.
            guidance=GuidanceConfig(null_text="t5_empty", null_mask="caption", scale=4.5),
            # Official configs. CAME's eps are (1e-30, 1e-16), as there.
            optimizer=OptimizerConfig(
                name="came",
                learning_rate=2e-5,
                sqrt_scaling_batch=256,  # auto_lr: rule 'sqrt'
                beta1=0.9,
                beta2=0.999,
                beta3=0.9999,
                weight_decay=0.0,
                clip_norm=0.01,
                warmup_steps=values["warmup_steps"],
                ema_decay=0.0,  # the official code has no moving average: it is the weights themselves
            ),
            # If the batch size is not divisible by the number of devices, sharding the tokens of a large
            # image needs less memory and traffic than sharding the heads (docs/scaling.md).
            mesh=MeshConfig(data=-1, fsdp=-1, **{"sequence" if pixels >= 1024 else "tensor": -1}),
            init=InitConfig(
                method="weights" if adapts_vae else "resize", path=values["init"], new_vae=adapts_vae
            ),
        )
    )
