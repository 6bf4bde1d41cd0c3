"""Trains a small vision transformer to name OpenMoji's pictures: the image encoder of the run `repa`.

    python benchmarks/accelerators/classifier.py --out=demo/accelerators/classifier

It takes the place of DINOv2. It learns from the training pictures alone, to tell concepts apart whatever the
skin tone, position, size and noise. It is a `ViTForImageClassification` of transformers for 64 pixels with
patches of 16, so that it has one vector for each token of the diffusion model.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from pixart_jax.data.openmoji import emojis, rasterize, split_of
from pixart_jax.evaluation.emoji import distort

SIDE, PATCH = 64, 16
WIDTH, DEPTH, HEADS = 192, 6, 4
STEPS, BATCH_SIZE, LEARNING_RATE = 3000, 64, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the encoder")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    arguments = parser.parse_args()
    if (arguments.out / "config.json").is_file():
        print(f"{arguments.out} is complete")
        return
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    named = [emoji for emoji in emojis() if emoji.concept and split_of(emoji) == "train"]
    concepts = sorted({emoji.concept for emoji in named})
    labels = np.array([concepts.index(emoji.concept) for emoji in named])
    images = np.stack([rasterize(emoji, SIDE) for emoji in named])
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            num_labels=len(concepts),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=arguments.steps, pct_start=0.1
    )

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        rows = rng.choice(len(named), BATCH_SIZE)
        pixels = np.stack([distort(images[row], rng) for row in rows])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(
            labels[rows]
        )

    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        pixels, wanted = batch()
        loss = model(pixel_values=pixels, labels=wanted).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == arguments.steps:
            seconds = time.perf_counter() - start
            print(
                f"classifier: step {step} of {arguments.steps}, loss {loss:.4f}, {seconds:.0f} s", flush=True
            )
    model.eval()
    found = 0
    with torch.no_grad():
        for _ in range(8):
            pixels, wanted = batch()
            found += int((model(pixel_values=pixels).logits.argmax(dim=-1) == wanted).sum())
    report = {
        "concepts": len(concepts),
        "steps": arguments.steps,
        "seconds": time.perf_counter() - start,
        # Of distorted copies that it was not trained on, of pictures that it was trained on.
        "accuracy": found / (8 * BATCH_SIZE),
    }
    print(json.dumps(report))
    partial = arguments.out.with_name(f"{arguments.out.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (partial / "preprocessor_config.json").write_text(json.dumps(preprocessing) + "\n")
    (partial / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
