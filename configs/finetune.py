"""Fine-tunes the released weights of PixArt-α or PixArt-Σ on your own captioned images.

    python -m pixart_jax.precompute --config=configs/finetune.py:512 --images=photos --out=data/finetune
    python -m pixart_jax.train --config=configs/finetune.py:512 --workdir=runs/finetune

'256', '512' and '1024' are PixArt-α, 'sigma-256' to 'sigma-2048' are PixArt-Σ, whose captions have up to 300
tokens. The released weights are read from a folder of their name in the working directory, such as
PixArt-XL-2-512x512, or else downloaded from the hub.

To start from other weights, pass --config.init.path=FILE_OR_FOLDER, in any format: an official .pth, a
diffusers folder, or a run. The state takes 9.8 GB in float32 (weights, moving average, two moments), with
PixArt-Σ's optimizer 7.3 GB, and the gradient 2.4 GB. They fit on one 24 GB GPU. docs/fine-tuning.md says what
to set on a smaller one; or shard them over several (--config.mesh.fsdp). 'sigma-2048' needs 40 GB.
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
from pixart_jax.hub import release

# Repositories of the releases. Some contain only a transformer; all sizes of a release have the same T5 and
# VAE.
RELEASE = {
    "256": "PixArt-XL-2-256x256/transformer",
    "512": "PixArt-XL-2-512x512",
    "1024": "PixArt-XL-2-1024-MS",
    "sigma-256": "PixArt-Sigma-XL-2-256x256/transformer",
    "sigma-512": "PixArt-Sigma-XL-2-512-MS/transformer",
    "sigma-1024": "PixArt-Sigma-XL-2-1024-MS",
    "sigma-2048": "PixArt-Sigma-XL-2-2K-MS/transformer",
}
ENCODERS = {
    **RELEASE,
    "256": RELEASE["512"],
    **dict.fromkeys(("sigma-256", "sigma-512", "sigma-2048"), "pixart_sigma_sdxlvae_T5_diffusers"),
}
# Our choice: numbers of micro-batches that leave some memory free on one 24 GB GPU (2048 px: 40 GB). Divide
# them by the number of devices.
ACCUMULATION = {256: 2, 512: 8, 1024: 32, 2048: 32}


def get_config(variant: str = "512") -> ConfigDict:
    """Returns the config of PixArt-α ('256', '512', '1024') or PixArt-Σ ('sigma-256' to 'sigma-2048')."""
    if variant not in RELEASE:
        raise UserError(f"configs/finetune.py has no variant '{variant}': choose {', '.join(RELEASE)}.")
    size = variant.removeprefix("sigma-")
    pixels, sigma, encoders = int(size), size != variant, release(ENCODERS[variant])
    # Trained on buckets: the released α of 1024 px, which alone has size conditions, and Σ from 512 px on.
    buckets = pixels > 256 if sigma else pixels == 1024
    # α: official configs, 'lewei_scale'; Σ: official configs, 'pe_interpolation'.
    position_scale = pixels / 512 if sigma else max(1.0, pixels / 512)
    return to_config_dict(
        TrainConfig(
            name=f"finetune-{variant}",
            steps=2_000,  # our choice: 64,000 samples, or 128 passes over 500 images
            model=PixArtConfig(
                size="XL/2",
                text_dim=4096,  # T5-XXL
                text_length=300 if sigma else 120,  # Σ: official configs; α: §3.1
                base_size=pixels // 16,  # VAE 8 x patch 2
                position_scale=position_scale,
                size_conditions=buckets and not sigma,
                dtype="bfloat16",
                remat="dots",
            ),
            features=FeaturesConfig(
                buckets="official" if buckets else "single",
                vae=f"{encoders}/vae",
                latent_scale=0.13025 if sigma else 0.18215,  # official configs: scale_factor
                text_encoder=TextEncoderConfig(
                    tokenizer=encoders,
                    weights=f"{encoders}/text_encoder",
                    # official train.py: Σ is trained on captions as they are
                    clean_caption=not sigma,
                    lower_case=not sigma,
                ),
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
                # Σ: the official configs, which start from the released weights, too. α: §3.1.
                name="came" if sigma else "adamw",
                weight_decay=0.0 if sigma else 0.03,
                # Official fine-tuning uses 2e-5 x sqrt(batch / 256), which is 7.1e-6 here (controlHed, and
                # those of Σ), and 5e-6 for a few images of one subject (dreambooth).
                learning_rate=2e-5,
                sqrt_scaling_batch=256,
                # α: dreambooth, controlHed. Σ: the shortest of the official ones. CAME needs one, because its
                # first updates are ten times as large as later ones.
                warmup_steps=100 if sigma else 0,
                eps=1e-10,  # official configs; CAME has its own
                clip_norm=0.01,  # official configs
                accumulation=ACCUMULATION[pixels],
                ema_decay=0.9999,  # official configs; the decay warms up, so short runs work too
            ),
            mesh=MeshConfig(data=1, fsdp=-1),
            init=InitConfig(method="weights", path=release(RELEASE[variant])),
            checkpoint=CheckpointConfig(every=500, keep=2),
            log=LogConfig(every=20, validate_every=200, sample_every=500, samples=4),
        )
    )
