"""Draws images for prompts.

    python -m pixart_jax.sample --checkpoint=runs/stage3-1024 --prompts="a corgi reading" --out=pictures
    python -m pixart_jax.sample --checkpoint=demo/stage3 --prompts=prompts.txt --images_per_prompt=4
    --out=pictures

Image k of a prompt has seed SEED + k. It depends on its prompt, its seed and the settings alone, not on the
batch or the file it is drawn with. Each PNG carries its settings.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.errors import UserError, run_command
from pixart_jax.pipeline import load_pipeline
from pixart_jax.sampling import picture_grid

# Longest part of a prompt in a file name.
_SLUG = 40


def read_prompts(text: str) -> list[str]:
    """One prompt a line if `text` is a file, else `text` itself; empty lines are left out.

    Raises:
      UserError: there is no prompt.
    """
    path = Path(text)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [text]
    except OSError:  # too long for a file name
        lines = [text]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts '{text}' holds no prompt: give a text, or a file with one on each line.")
    return prompts


def file_name(number: int, seed: int, prompt: str) -> str:
    """A name that cannot collide or leave the folder: number of the prompt, seed, a few plain letters."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG].strip("-")
    return f"{number:05d}-{seed}{'-' if slug else ''}{slug}.png"


def save_png(path: Path, pixels: np.ndarray, settings: Mapping[str, object]) -> None:
    """Writes uint8 [H, W, 1 or 3] with its settings as JSON in the PNG's text."""
    info = PngInfo()
    info.add_text("pixart_jax", json.dumps(settings, ensure_ascii=False))
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path, pnginfo=info)


def define_flags() -> dict[str, flags.FlagHolder]:
    """The flags of the command. Not at import: other commands have flags of the same names."""
    text, integer, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    return {
        "checkpoint": text("checkpoint", None, "Run directory, weights file or diffusers pipeline folder."),
        "weights": flags.DEFINE_enum("weights", None, ["ema", "raw"], "Which weights; default ema."),
        "pipeline": text("pipeline", None, "Pipeline folder to take text encoder and VAE from."),
        "prompts": text("prompts", None, "A prompt, or a file with one on each line."),
        "negative_prompt": text("negative_prompt", "", "What to guide away from."),
        "out": text("out", None, "Folder for the pictures."),
        "seed": integer("seed", 0, "Seed of the first image of every prompt."),
        "images_per_prompt": integer("images_per_prompt", 1, "Images drawn for each prompt."),
        "steps": integer("steps", 20, "Model evaluations for each image."),
        "guidance_scale": real("guidance_scale", None, "1 for none; default as stored with the weights."),
        "sampler": flags.DEFINE_enum("sampler", "dpm_solver", list(SAMPLERS), "How noise becomes an image."),
        "height": integer("height", None, "Pixels; default the size the model was trained at."),
        "width": integer("width", None, "Pixels; default the size the model was trained at."),
        "batch_size": integer("batch_size", 4, "Images drawn at a time."),
    }


def main(holders: Mapping[str, flags.FlagHolder], argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"argument '{argv[1]}' is not a flag: see --help.")
    given = {name: holder.value for name, holder in holders.items()}
    for name in ("checkpoint", "prompts", "out"):
        if not given[name]:
            raise UserError(f"--{name} is missing: see --help.")
    prompts = read_prompts(given["prompts"])
    pipe = load_pipeline(given["checkpoint"], weights=given["weights"], pipeline=given["pipeline"])
    settings = {
        name: given[name]
        for name in ("negative_prompt", "steps", "guidance_scale", "sampler", "height", "width")
    }
    images = pipe(
        prompts,
        seed=given["seed"],
        images_per_prompt=given["images_per_prompt"],
        batch_size=given["batch_size"],
        **settings,
    )
    folder = Path(given["out"])
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(images):
        number, k = divmod(index, given["images_per_prompt"])
        seed = given["seed"] + k
        path = folder / file_name(number, seed, prompts[number])
        save_png(path, pixels, {"prompt": prompts[number], "seed": seed, **settings})
    magnify = max(1, 64 // images.shape[1])
    grid = picture_grid(images, columns=max(given["images_per_prompt"], 1), magnify=magnify)
    Image.fromarray(grid).save(folder / "grid.png")
    print(f"{len(images)} images and grid.png in {folder}")


if __name__ == "__main__":
    run_command(functools.partial(main, define_flags()))
