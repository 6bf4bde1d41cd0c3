"""The script that made the runs and features in this folder with pixart_jax 0.1, kept for reference.

    git checkout 2743b3f && PYTHONPATH=.:tests python make.py FOLDER old     # features, stage1, stage2
    git checkout 23ddf4b && PYTHONPATH=.:tests python make.py FOLDER new     # stage3

2743b3f is the last commit of 0.1. 23ddf4b is the last one before the training state changed; its configs have
`attention='auto'`. `expected.npz` has images and latents that the weights of stage 2 generated at that time.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import feature_folders
import numpy as np
from feature_folders import SQUARE, TEXT_LENGTH, WIDE, WIDTH, keys, make_record
from PIL import Image

from pixart_jax.config import (
    CheckpointConfig,
    DataConfig,
    DiTConfig,
    FeaturesConfig,
    GuidanceConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    PixArtConfig,
    TextEncoderConfig,
    TrainConfig,
    to_dict,
)
from pixart_jax.convert import convert
from pixart_jax.pipeline import load_pipeline
from pixart_jax.train import train

ROOT, AGE = Path(sys.argv[1]), sys.argv[2]
BACKBONE = dict(size="custom", depth=2, hidden_size=24, num_heads=2)
TEXT = TextEncoderConfig(
    tokenizer="byt5", tokenizer_subfolder="", weights="random", d_model=8, d_ff=8, d_kv=4, num_heads=2,
    num_layers=1, dtype="float32", clean_caption=False,
)  # fmt: skip
PIXELS = FeaturesConfig(
    image_size=16, codec="pixels", vae="", latent_scale=1.0, text_length=16, text_dtype="float32",
    text_encoder=TEXT,
)  # fmt: skip
LOG = LogConfig(every=1, validate_every=2, validation_samples=8, sample_every=0)


def config(name, folder, **changes):
    values = dict(
        name=name,
        steps=2,
        data=DataConfig(train=folder, validation=folder, batch_size=8, threads=1),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-8, clip_norm=1.0, ema_decay=0.9),
        checkpoint=CheckpointConfig(every=2, keep=1),
        log=LOG,
    )
    return TrainConfig(**{**values, **changes})


def run(stage):
    train(stage, stage.name)
    for path in Path(stage.name).iterdir():  # the tests need only the checkpoints
        if path.name != "checkpoints":
            subprocess.run(["rm", "-r", path], check=True)


def old():
    rng = np.random.default_rng(0)
    for i, colour in enumerate(("red", "green")):
        for k in range(8):
            path = Path(f"images/{colour}/{k}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 64, (16, 16, 3))
            pixels[..., i] += 160
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            path.with_suffix(".txt").write_text(f"{colour} {k}")
    text = TrainConfig(features=PIXELS)
    classes = TrainConfig(model=DiTConfig(), features=dataclasses.replace(PIXELS, text=False))
    for name, source, stage in (("pixels", "folder", text), ("classes", "classes", classes)):
        Path("config.py").write_text(
            "from pixart_jax.config import *\n"
            f"def get_config(): return to_config_dict(from_dict({to_dict(stage)!r}))\n"
        )
        command = [sys.executable, "-m", "pixart_jax.precompute", "--config=config.py", "--images=images"]
        subprocess.run([*command, f"--out=features/{name}", f"--source={source}"], check=True)
    square = [make_record(key, captions=2, text_dtype="int8") for key in keys(10)]
    wide = [make_record(key, WIDE, captions=2, text_dtype="int8") for key in keys(8, "wide")]
    feature_folders.write_folder(
        Path("features/buckets"), {SQUARE: square, WIDE: wide}, config={"text_dtype": "int8"}
    )
    run(
        config(
            "stage1",
            "features/classes",
            model=DiTConfig(**BACKBONE, in_channels=3, base_size=8, num_classes=2),
            features=dataclasses.replace(PIXELS, text=False),
        )
    )
    stage2 = config(
        "stage2",
        "features/pixels",
        model=PixArtConfig(**BACKBONE, in_channels=3, base_size=8, text_dim=8, text_length=16),
        features=PIXELS,
        init=InitConfig("reparameterize", "stage1"),
    )
    run(dataclasses.replace(stage2, optimizer=dataclasses.replace(stage2.optimizer, name="muon")))
    pipe = load_pipeline("stage2")
    images, latents = pipe(["red 1", "green 5"], seed=[3, 4], steps=4, output="both")
    np.savez("expected.npz", images=images, latents=latents)
    convert("stage2", "diffusers", "diffusers", say=print)


def new():
    run(
        config(
            "stage3",
            "features/buckets",
            model=PixArtConfig(
                **BACKBONE, base_size=4, text_dim=WIDTH, text_length=TEXT_LENGTH, size_conditions=True
            ),
            features=FeaturesConfig(image_size=64, text_length=TEXT_LENGTH, vae="tiny"),
            guidance=GuidanceConfig(null_text="token", null_mask="caption", aspect_ratio="bucket"),
        )
    )


ROOT.mkdir(parents=True, exist_ok=True)
os.chdir(ROOT)
{"old": old, "new": new}[AGE]()
print(json.dumps(sorted(str(p) for p in Path().iterdir())))
