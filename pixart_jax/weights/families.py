"""The two families of released weights, PixArt-alpha and PixArt-Sigma, and what their files do not state.

The networks have the same parameters. Sigma was trained with longer captions, which it gets as they are, and
with the latents of SDXL's VAE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from pixart_jax.hub import INDEX
from pixart_jax.readers import read_json
from pixart_jax.weights.files import COPY


@dataclasses.dataclass(frozen=True)
class Family:
    """What weights were trained with if their file does not say so.

    Attributes:
      name: as the papers write it.
      pipeline: class of the diffusers pipeline.
      text_length: tokens to which captions are truncated, in training and by the pipeline.
      latent_scale: scaling factor of the VAE.
      clean_caption, lower_case: how captions are prepared, see `data.captions.prepare_caption`.
      passes_sizes: side, in latent positions, of the networks that the pipeline passes size conditions to;
        None if it never does.
    """

    name: str
    pipeline: str
    text_length: int
    latent_scale: float
    clean_caption: bool
    lower_case: bool
    passes_sizes: int | None


ALPHA = Family("PixArt-alpha", "PixArtAlphaPipeline", 120, 0.18215, True, True, 128)
SIGMA = Family("PixArt-Sigma", "PixArtSigmaPipeline", 300, 0.13025, False, False, None)
FAMILIES = (ALPHA, SIGMA)
# For messages.
PIPELINES = " or ".join(family.pipeline for family in FAMILIES)


def family_of(text_length: int | None) -> Family:
    """The family of a network that gets captions of this many tokens; alpha if that is not known."""
    return SIGMA if text_length == SIGMA.text_length else ALPHA


def family_of_pipeline(folder: Path) -> Family | None:
    """The family of a pipeline folder; None if it is not that of a PixArt pipeline."""
    file = folder / INDEX
    kind = read_json(file, COPY).get("_class_name") if file.is_file() else None
    return next((family for family in FAMILIES if family.pipeline == kind), None)


def choose_family(null_caption: int | None, text_length: int | None, folders: Iterable[Path]) -> Family:
    """The family of weights of another project.

    They are Sigma's if their captions have 300 tokens, or if they belong to a `PixArtSigmaPipeline`. A null
    caption of another length in the file outweighs the pipeline folder.

    Args:
      null_caption: tokens of the null caption in the file; None if there is none.
      text_length: tokens of captions that the caller states; None if unknown.
      folders: pipeline folders that the weights are in or used with.
    """
    if SIGMA.text_length in (null_caption, text_length):
        return SIGMA
    return SIGMA if null_caption is None and SIGMA in map(family_of_pipeline, folders) else ALPHA
