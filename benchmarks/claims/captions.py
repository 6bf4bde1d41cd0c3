"""The captions of the shapes as text features: fixed random vectors, in the place of T5.

Token i, word w of a caption has the feature 64 (e_w + p_i) / |e_w + p_i| with e_w, p_i from N(0, I): it tells
the word and its place, as a trained T5's features do, and has the norm of T5-XXL's, sqrt(4096).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pixart_jax.data.shapes import DENSITIES, SPLITS, all_scenes
from pixart_jax.encoders import T5_XXL_WIDTH

WIDTH = 64
# Stands after the last word; alone, and at every place, it is the null caption.
END = "</s>"


class Captions:
    """Text features of every caption of the shapes, computed once.

    Attributes:
      width: T, of the features.
      length: S, tokens of the longest caption and its end.
      null: [S, T], the features of "" at all places, the padding's too: a dropped caption keeps its mask.
    """

    width = WIDTH

    def __init__(self):
        scenes = [scene for split in SPLITS for part in all_scenes(split) for scene in part]
        texts = sorted({scene.caption(density) for scene in scenes for density in DENSITIES})
        tokens = [[*text.split(), END] for text in texts]
        words = sorted({word for caption in tokens for word in caption})
        self.length = max(map(len, tokens))
        rng = np.random.RandomState(0)  # a stream that numpy has frozen
        words = dict(zip(words, rng.normal(size=(len(words), WIDTH))))
        places = rng.normal(size=(self.length, WIDTH))

        def features(caption: list[str]) -> np.ndarray:
            vectors = np.stack([words[word] for word in caption]) + places[: len(caption)]
            vectors *= T5_XXL_WIDTH**0.5 / np.linalg.norm(vectors, axis=1, keepdims=True)
            return np.pad(vectors, ((0, self.length - len(caption)), (0, 0))).astype(np.float32)

        self._row = {text: row for row, text in enumerate(texts)}
        self._features = np.stack([features(caption) for caption in tokens])
        self._lengths = np.array([len(caption) for caption in tokens])
        self.null = features([END] * self.length)

    def features(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions [n] -> features [n, S, T] float32, 0 past each end, and mask [n, S]."""
        rows = [self._row[text] for text in texts]
        return self._features[rows], np.arange(self.length) < self._lengths[rows][:, None]
