"""CLIP score: how well images match their captions.

    CLIP = max(100 · mean over pairs of cos(image features, text features), 0)

This is arXiv 2104.08718 with w = 1 instead of 2.5, as in torchmetrics. Model, tokenizer and image processor
come from transformers. The image processor is always the one that uses Pillow, because the one for tensors
resizes differently.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from pixart_jax.errors import UserError, system_reason
from pixart_jax.evaluation.fid import image_files, import_torch
from pixart_jax.evaluation.generation import Captions, read_plan
from pixart_jax.files import sha256_of_file
from pixart_jax.hub import local


class Clip:
    """A CLIP model.

    Attributes:
      digest: sha256 of the weights.
    """

    def __init__(self, path: str | Path):
        """Loads the model, on a GPU if PyTorch has one, with its tokenizer and image processor.

        Args:
          path: a folder in the format of transformers.

        Raises:
          UserError: PyTorch is not installed, or the folder does not hold a CLIP model.
        """
        self.torch = import_torch()
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        path = local(path)
        weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not weights:
            raise UserError(
                f"'{path}' does not hold a CLIP model (no .safetensors and no .bin file): give a folder in "
                "the format of transformers."
            )
        self.digest = "+".join(sha256_of_file(file) for file in weights)
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        try:
            self.model = CLIPModel.from_pretrained(path).to(self.device).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(path)
            self.processor = CLIPImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"'{path}' does not hold a CLIP model ({str(error).splitlines()[0]}): give a folder in the "
                "format of transformers."
            ) from error

    def cosines(self, images: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
        """cos(image features, text features) of each pair. Captions are truncated to CLIP's text length.

        Returns:
          [n] float64.
        """
        text = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt")
        with self.torch.inference_mode():
            out = self.model(**text.to(self.device), **pixels.to(self.device))
        return (out.image_embeds.double() * out.text_embeds.double()).sum(dim=-1).cpu().numpy()


def images_of_captions(folder: str | Path, captions: Captions, *, samples: int | None = None) -> list[Path]:
    """Finds the image of each caption.

    The images of a folder that `evaluate` generated belong to the captions in the order of its plan.
    Otherwise an image belongs to the caption that names it: by its path below the folder, by its file name,
    or by either without the suffix. Captions without names belong to the images in the order of the numbers
    in their names (2.png before 10.png).

    Args:
      folder: the images, also those in subfolders.
      captions: the captions.
      samples: use only the first so many captions. By default every image must have a caption.

    Returns:
      the file of each caption, in order.

    Raises:
      UserError: it is not certain which image belongs to which caption.
    """
    files, root = image_files(folder), Path(folder)
    count = min(samples or len(captions.texts), len(captions.texts))
    plan = read_plan(root.parent)
    planned = [root / image.file for image in plan]
    if plan and set(planned) == set(files):
        if [image.prompt for image in plan][:count] != captions.texts[:count]:
            raise UserError(
                f"'{root}' was generated from other captions: give the caption file it was generated from."
            )
        return planned[:count]
    if captions.names is None:
        files = _by_number(files, root)
        if len(files) not in (count, len(captions.texts)):
            raise UserError(
                f"{len(files)} images and {len(captions.texts)} captions: give one caption for each image, "
                "or name the image of each caption."
            )
        return files[:count]
    known: dict[str, set[Path]] = {}
    for file in files:
        path = file.relative_to(root)
        for name in {path.as_posix(), path.name, path.with_suffix("").as_posix(), path.stem}:
            known.setdefault(name, set()).add(file)
    found = [known.get(name, set()) for name in captions.names[:count]]
    for name, candidates in zip(captions.names, found):
        if len(candidates) != 1:
            raise UserError(
                f"the caption of '{name}' has {len(candidates)} images in '{folder}': it must have one."
            )
    chosen = [file for (file,) in found]
    if len(set(chosen)) < len(chosen) or (samples is None and len(chosen) < len(files)):
        raise UserError(
            f"'{folder}' has {len(files)} images, and the captions name {len(set(chosen))} of them in "
            f"{len(chosen)} entries: give one caption for each image."
        )
    return chosen


def _by_number(files: Sequence[Path], root: Path) -> list[Path]:
    """Orders files by the numbers in their names, and raises an error if other parts of the names differ."""

    def parts(file: Path) -> list[str]:
        return re.split(r"(\d+)", file.relative_to(root).as_posix())

    def key(file: Path) -> list[str | int]:
        # The parts at odd places are numbers.
        return [int(part) if place % 2 else part for place, part in enumerate(parts(file))]

    ordered = sorted(files, key=key)
    for first, second in itertools.pairwise(ordered):
        # The place of the first difference; the numbers 1 and 01 are the same.
        places = (place for place, (a, b) in enumerate(zip(key(first), key(second))) if a != b)
        if next(places, 0) % 2 == 0:
            raise UserError(
                f"captions without names cannot be matched to '{first.name}' and '{second.name}', whose "
                "order no number decides: give captions that name their images (.json, .jsonl, .csv or .tsv)."
            )
    return ordered


def clip_score(files: Sequence[Path], captions: Sequence[str], clip: Clip, *, batch_size: int = 32) -> float:
    """The CLIP score of images and their captions.

    Args:
      files: the images.
      captions: one for each image, in the same order.
      clip: the model.
      batch_size: images at a time.

    Raises:
      UserError: an image cannot be read.
    """
    cosines = []
    for start in tqdm(range(0, len(files), batch_size), desc="CLIP", disable=None):
        part = files[start : start + batch_size]
        try:
            images = [Image.open(file) for file in part]
            cosines.append(clip.cosines(images, captions[start : start + batch_size]))
        except OSError as error:
            raise UserError(
                f"an image of the batch that starts with '{part[0]}' cannot be read "
                f"({system_reason(error)}): replace or remove it."
            ) from error
    return max(100 * float(np.concatenate(cosines).mean()), 0.0)
