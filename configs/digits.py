"""The three stages on scikit-learn's handwritten digits, which train in minutes on two CPU cores.

    python -m pixart_jax.precompute --config=configs/digits.py:stage1 --images=digits --out=demo/features/8px
    python -m pixart_jax.train --config=configs/digits.py:stage1 --workdir=demo/stage1

Then run the same commands for stage2 and stage3; `make demo` runs all of them. Stage 1 trains on 8x8 digits
conditioned on their class. Stage 2 starts from the weights of stage 1 and trains on the same digits with
captions. Stage 3 starts from the weights of stage 2 and trains on 16x16 digits.

`lora` adapts stage 3 to ten pictures of light paper; `make demo-lora` runs it (benchmarks/demo_lora.py).

`sigma-8px`, `sigma-16px` and `sigma` turn stage 2 into a PixArt-Sigma, as PixArt-Sigma §3.3 does with
PixArt-alpha; `make demo-sigma` runs them. The first adapts the network to other latents (in place of another
VAE, the pixels are scaled differently) and to longer captions, the second to 16x16 digits, and the last one
compresses keys and values.
"""

from ml_collections import ConfigDict

from pixart_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    DiTConfig,
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
from pixart_jax.errors import UserError, did_you_mean

SIGMA = ("sigma-8px", "sigma-16px", "sigma")
STAGES = ("stage1", "stage2", "stage3", "lora", *SIGMA)
# Steps and learning rate of each stage. With a rate above 1e-3 the caption projection of stage 2 saturates.
STEPS = {"stage1": 1200, "stage2": 2000, "stage3": 500, "lora": 400, **dict(zip(SIGMA, (800, 600, 400)))}
LEARNING_RATE = {"stage1": 3e-3, "stage2": 1e-3, "stage3": 1e-3, "lora": 3e-3, **dict.fromkeys(SIGMA, 1e-4)}
BATCH_SIZE = {"lora": 10}  # of the others: 32

# The width must be a multiple of 4 (2-D positions) and of 3 (size conditions). Unrolled blocks are a fifth
# faster on a CPU.
BACKBONE = dict(
    size="custom", depth=4, hidden_size=72, num_heads=4, patch_size=2, in_channels=1, scan_layers=False
)

# Captions are tokenized as bytes and encoded by a fixed T5 with random weights. Its features differ between
# captions, which is all that the model needs.
TEXT = TextEncoderConfig(
    tokenizer="byt5",
    tokenizer_subfolder="",
    weights="random",
    d_model=64,
    d_ff=128,
    d_kv=16,
    num_heads=4,
    num_layers=2,
    dtype="float32",
    clean_caption=False,
)
# The longest caption has 27 bytes, plus the end-of-sequence token. As PixArt-Sigma's, those of `SIGMA` may be
# longer.
TEXT_LENGTH = 28
SIGMA_TEXT_LENGTH = 40


def get_config(stage: str = "stage1") -> ConfigDict:
    """Returns the config of one of `STAGES`."""
    if stage not in STAGES:
        raise UserError(
            f"configs/digits.py has no '{stage}': choose {', '.join(STAGES)}.{did_you_mean(stage, STAGES)}"
        )
    sigma = stage in SIGMA
    large = stage not in ("stage1", "stage2", "sigma-8px")
    size = 16 if large else 8
    text = stage != "stage1"
    text_length = SIGMA_TEXT_LENGTH if sigma else TEXT_LENGTH
    # Stage 3 doubles the grid; this scale keeps the positions in the range that stage 2 trained on. The
    # scales of PixArt-Sigma are half of those of PixArt-alpha.
    position_scale = (2.0 if large else 1.0) / (2.0 if sigma else 1.0)
    if text:
        model = PixArtConfig(
            **BACKBONE,
            text_dim=TEXT.d_model,
            text_length=text_length,
            base_size=size // 2,
            position_scale=position_scale,
            size_conditions=large and not sigma,
            kv_compression="conv" if stage == "sigma" else "none",
        )
    else:
        model = DiTConfig(**BACKBONE, base_size=size // 2, num_classes=10)
    init = {
        "stage1": InitConfig(),
        "stage2": InitConfig(method="reparameterize", path="demo/stage1"),
        "stage3": InitConfig(method="resize", path="demo/stage2"),
        "lora": InitConfig(method="weights", path="demo/stage3"),
        "sigma-8px": InitConfig(method="resize", path="demo/stage2", new_vae=True),
        "sigma-16px": InitConfig(method="resize", path="demo/sigma-8px"),
        "sigma": InitConfig(method="resize", path="demo/sigma-16px"),
    }[stage]
    data = "sigma-16px" if stage == "sigma" else stage
    return to_config_dict(
        TrainConfig(
            name=stage,
            steps=STEPS[stage],
            seed=0,
            model=model,
            features=FeaturesConfig(
                codec="pixels",
                vae="",
                latent_scale=0.8 if sigma else 1.0,
                text=text,
                text_length=text_length,
                text_dtype="float32",
                text_encoder=TEXT,
            ),
            data=DataConfig(
                train=f"demo/features/{data}/train",
                validation="" if stage == "lora" else f"demo/features/{data}/test",
                batch_size=BATCH_SIZE.get(stage, 32),
                threads=1,
            ),
            # Min-SNR weighting gives more weight to the noisy timesteps, which determine the digit.
            diffusion=DiffusionConfig(condition_dropout=0.1, min_snr_gamma=1.0),
            # As in the paper's training, a dropped caption keeps its mask.
            guidance=GuidanceConfig(null_text="t5_empty", null_mask="caption", scale=4.0),
            # A small network trained from scratch can use at least fifty times the paper's learning rate, and
            # only needs outliers to be clipped.
            optimizer=OptimizerConfig(
                name="came" if sigma else "adamw",
                learning_rate=LEARNING_RATE[stage],
                warmup_steps=100,
                eps=1e-8,
                weight_decay=0.0 if sigma else 0.01,
                clip_norm=1.0,
                ema_decay=0.995,
            ),
            mesh=MeshConfig(),
            adapter=AdapterConfig(kind="lora", rank=4) if stage == "lora" else AdapterConfig(),
            init=init,
            checkpoint=CheckpointConfig(every=200, keep=2),
            log=LogConfig(every=50, validate_every=400, validation_samples=256, sample_every=800, samples=16),
        )
    )
