"""Trains a small autoencoder on OpenMoji's pictures, for `make emoji`.

    python benchmarks/emoji_vae.py --out=demo/emoji/vae

It is an AutoencoderKL of diffusers with 1.7 M parameters. Like Stable Diffusion's, it divides height and
width by 8; its latents have 8 channels. It is trained on pictures of 64 pixels, and on crops of that size
from pictures of 96 pixels. Held-out pictures are left out. In the end the latents are normalized: each
channel gets mean 0 and standard deviation 1, by an affine map that is folded into the 1x1 convolutions around
the latents. So `features.latent_scale` is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from pixart_jax.data.openmoji import emojis, rasterize, split_of

SIDE, LARGE_SIDE = 64, 96
CHANNELS, LATENT_CHANNELS = (16, 32, 64, 96), 8
STEPS, BATCH_SIZE, LEARNING_RATE, KL_WEIGHT = 1600, 32, 4e-3, 1e-5
# Rows of a matrix from RGB to brightness and two colour differences. These vary less than the brightness, so
# that without more weight they are learned much later.
OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])


def pictures(split: str, side: int) -> torch.Tensor:
    """Returns the pictures of a split, uint8 [n, 3, side, side]."""
    images = [rasterize(emoji, side) for emoji in emojis() if split_of(emoji) == split]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def batch(small: torch.Tensor, large: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns a batch in [-1, 1]: one half small pictures, the other half crops of large ones."""
    rows = torch.randint(len(small), (BATCH_SIZE,), generator=generator)
    half = BATCH_SIZE // 2
    corners = torch.randint(large.shape[-1] - SIDE + 1, (half, 2), generator=generator).tolist()
    crops = [
        large[row, :, top : top + SIDE, left : left + SIDE]
        for row, (top, left) in zip(rows[half:].tolist(), corners)
    ]
    both = torch.cat([small[rows[:half]], torch.stack(crops)])
    return (both.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(image: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Mean of |d| + d^2 over brightness and colour differences."""
    difference = torch.einsum("dc,bchw->bdhw", OPPONENT, image - found)
    return difference.abs().mean() + difference.square().mean()


def normalize(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Gives the latents of images mean 0 and standard deviation 1 in each channel.

    Reconstructions stay the same.
    """
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        before, after = vae.quant_conv, vae.post_quant_conv
        # The encoder returns the mean and the logarithm of the variance.
        before.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
        before.bias[:LATENT_CHANNELS] = (before.bias[:LATENT_CHANNELS] - mean) / std
        before.bias[LATENT_CHANNELS:] -= 2 * std.log()
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight *= std[None, :, None, None]


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Returns the peak signal-to-noise ratio of reconstructions, in dB."""
    with torch.no_grad():
        found = torch.cat([vae(part).sample for part in images.split(64)])
    return float(10 * torch.log10(4 / (images - found).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the autoencoder")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    arguments = parser.parse_args()
    if (arguments.out / "config.json").is_file():
        print(f"{arguments.out} is complete")
        return
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    small, large = pictures("train", SIDE), pictures("train", LARGE_SIDE)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=arguments.steps, pct_start=0.05
    )
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        images = batch(small, large, generator)
        posterior = vae.encode(images).latent_dist
        found = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(images, found) + KL_WEIGHT * posterior.kl().mean() / images[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == arguments.steps:
            seconds = time.perf_counter() - start
            print(
                f"autoencoder: step {step} of {arguments.steps}, loss {loss:.4f}, {seconds:.0f} s", flush=True
            )
    vae.eval()
    normalize(vae, (small.float() / 127.5 - 1))
    report = {
        "steps": arguments.steps,
        "seconds": time.perf_counter() - start,
        "psnr_of_held_out_pictures": {
            side: psnr(vae, pictures("validation", side).float() / 127.5 - 1) for side in (SIDE, LARGE_SIDE)
        },
    }
    print(json.dumps(report))
    partial = arguments.out.with_name(f"{arguments.out.name}.partial-{os.getpid()}")
    vae.save_pretrained(partial)
    (partial / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
