"""CLIP score: how well images match their captions.

    CLIP = max(100 · mean over pairs of cos(image features, text features), 0)

This is arXiv 2104.08718 with w = 1 instead of 2.5, as in torchmetrics. Model, tokenizer and image processor
come from transformers. The image processor is always the one that uses Pillow, because the one for tensors
resizes differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.evaluation.fid import import_torch
from pixart_jax.files import sha256_of_file


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

        weights = sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("pytorch_model*.bin"))
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


def clip_score(files: Sequence[Path], captions: Sequence[str], clip: Clip, *, batch_size: int = 32) -> float:
    """The CLIP score of images and their captions.

    Args:
      files: the images.
      captions: one for each image, in the same order.
      clip: the model.
      batch_size: images at a time.

    Raises:
      UserError: the numbers of images and captions differ, or an image cannot be read.
    """
    if len(files) != len(captions):
        raise UserError(f"{len(files)} images and {len(captions)} captions: give one caption for each image.")
    cosines = []
    for start in tqdm(range(0, len(files), batch_size), desc="CLIP", disable=None):
        part = files[start : start + batch_size]
        try:
            images = [Image.open(file) for file in part]
            cosines.append(clip.cosines(images, captions[start : start + batch_size]))
        except OSError as error:
            raise UserError(
                f"an image of the batch that starts with '{part[0]}' cannot be read: {error}."
            ) from error
    return max(100 * float(np.concatenate(cosines).mean()), 0.0)
