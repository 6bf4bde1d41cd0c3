"""Text features of the captions of the shapes: one token per word, encoded by a fixed random T5.

A trained T5 has position biases of several units, and can therefore represent the order of words. Its initial
random biases have a scale of d^-0.5, which is too small for this; here they are sixteen times larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from flax import nnx

from pixart_jax.data.shapes import DENSITIES, SPLITS, all_scenes
from pixart_jax.encoders.t5 import random_t5
from pixart_jax.models.t5 import T5Config, T5Encoder

WIDTH = 128
POSITION_BIAS = 16.0
BATCH_SIZE = 256
END = 1


class Captions:
    """Text features of captions of the shapes, computed once.

    Args:
      texts: the captions; by default all captions of the data set.

    Attributes:
      width: T, width of the features.
      length: S, number of tokens of the longest caption, including the end token.
      null: [S, T], the features of "" at all positions.
    """

    width = WIDTH

    def __init__(self, texts: Iterable[str] | None = None):
        scenes = [scene for split in SPLITS for part in all_scenes(split) for scene in part]
        known = {scene.caption(density) for scene in scenes for density in DENSITIES}
        words = sorted({word for text in known for word in text.split()})
        self.length = max(len(text.split()) for text in known) + 1
        # Token 0 is padding, token 1 ends a caption.
        texts = sorted(known if texts is None else texts)
        ids = [[2 + words.index(word) for word in text.split()] + [END] for text in texts]
        self._row = {text: row for row, text in enumerate(texts)}
        config = T5Config(
            vocab_size=2 + len(words), d_model=WIDTH, d_ff=256, d_kv=16, num_heads=8, num_layers=2
        )
        params = random_t5(config, seed=0)
        params["position_bias"] = POSITION_BIAS * params["position_bias"]
        graph = nnx.graphdef(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))
        encode = jax.jit(lambda token_ids, mask: nnx.merge(graph, params)(token_ids, mask))
        self._features, self._mask = self._encode(encode, ids)
        # Computed at padding positions too, because a dropped caption keeps its mask.
        self.null = np.asarray(encode(*_padded([[END]], self.length)))[0]

    def _encode(self, encode: Callable, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        features, masks = [], []
        for start in range(0, len(ids), BATCH_SIZE):
            part = ids[start : start + BATCH_SIZE]
            token_ids, mask = _padded(part, self.length)
            values = np.asarray(encode(token_ids, mask)) * mask[..., None]
            features.append(values[: len(part)])
            masks.append(mask[: len(part)])
        return np.concatenate(features), np.concatenate(masks)

    def features(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns features [n, S, T] float32, which are 0 after the end of each caption, and masks [n, S]."""
        rows = [self._row[text] for text in texts]
        return self._features[rows], self._mask[rows]


def _padded(ids: Iterable[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids and mask [BATCH_SIZE, length]; unused rows contain only the end token."""
    token_ids = np.zeros((BATCH_SIZE, length), np.int32)
    mask = np.zeros((BATCH_SIZE, length), bool)
    token_ids[:, 0], mask[:, 0] = END, True
    for row, tokens in enumerate(ids):
        token_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return token_ids, mask
