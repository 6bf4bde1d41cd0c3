"""From captions to text features, by a tokenizer and a T5 encoder.

The encoder runs on all local devices, the batch spread over them; its weights can be spread too.

Axes: n captions, S text_length, D text width, L valid tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from pixart_jax.config import TextEncoderConfig
from pixart_jax.data.captions import prepare_caption
from pixart_jax.encoders.batches import local_sharding, round_up
from pixart_jax.errors import UserError
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.t5 import T5Config, T5Encoder
from pixart_jax.weights.files import open_tensors, read_json
from pixart_jax.weights.hub import local_folder
from pixart_jax.weights.t5 import t5_table
from pixart_jax.weights.tables import import_tensors

# Lengths are padded to multiples of this: few programs are compiled, and little is computed for nothing.
LENGTH_STEP = 16
# Captions encoded at a time, where the caller does not say.
TEXT_BATCH = 64
# Width of the features that PixArt was trained with.
T5_XXL_WIDTH = 4096


@dataclasses.dataclass(frozen=True)
class CutCaption:
    """A caption that was longer than S tokens.

    Attributes:
      caption: as it was given.
      removed: the text of the tokens that were cut off.
      tokens: its length before the cut.
    """

    caption: str
    removed: str
    tokens: int


class TextEncoder:
    """Tokenizer and T5 encoder.

    Attributes:
      text_length: S.
      width: D.
      t5: shape of the encoder.
      bytes_per_device: of the weights while they are loaded.
      rows_per_device: captions a device encodes at a time.
      cut: `CutCaption`s so far, one for each caption that was encoded.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        text_length: int,
        batch_size: int = TEXT_BATCH,
        *,
        sharded: bool = False,
        load: bool = True,
    ):
        """Loads the tokenizer and the weights.

        Args:
          config: who encodes.
          text_length: S, the most tokens of a caption, its end token included.
          batch_size: captions at a time, rounded up to a multiple of the local devices.
          sharded: spread the weights over the local devices, each layer gathered when it runs: T5-XXL's
            9.5 GB then fit eight devices of 16 GB beside everything else. False holds them whole on each,
            which is faster where many captions are encoded.
          load: False leaves the weights for `load`, or the first caption.

        Raises:
          UserError: a tokenizer or weights that are not there, or do not fit each other.
        """
        self.text_length = text_length
        self._clean = config.clean_caption
        self._tokenizer = load_tokenizer(config)
        t5 = t5_config(config, len(self._tokenizer))
        if t5.vocab_size < len(self._tokenizer):
            raise UserError(
                f"tokenizer '{config.tokenizer}' has {len(self._tokenizer)} tokens, the text encoder "
                f"'{config.weights}' only {t5.vocab_size}: give the tokenizer that belongs to it."
            )
        self.width = t5.d_model
        self.cut: list[CutCaption] = []
        self._rows, _ = local_sharding()
        self._batch_size = round_up(batch_size, self._rows.mesh.size)
        self.rows_per_device = self._batch_size // self._rows.mesh.size
        self.t5, self._config, self._params = t5, config, None
        graph, abstract = nnx.split(nnx.eval_shape(lambda: T5Encoder(t5, rngs=nnx.Rngs(0))))
        self._shardings = _text_shardings(self._rows.mesh, abstract, sharded)
        self.bytes_per_device = sum(
            math.prod(sharding.shard_shape(leaf.shape)) * t5.compute_dtype.itemsize
            for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(self._shardings))
        )

        @functools.partial(
            jax.jit, in_shardings=(self._shardings, self._rows, self._rows), out_shardings=self._rows
        )
        def encode(params: Any, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
            # Captions stay where they are: weights are gathered, and no sum is split over devices.
            with activation_sharding(self._of_activations):
                return nnx.merge(graph, params)(token_ids, mask)

        self._encode = encode
        if load:
            self.load()

    def load(self) -> None:
        """Reads the weights onto the devices, where they are not there yet.

        Raises:
          UserError: weights that are not there, or do not fit.
        """
        if self._params is None:
            self._params = jax.device_put(load_t5(self._config, len(self._tokenizer))[1], self._shardings)

    def release(self) -> None:
        """Frees the memory of the weights; the next caption loads them again."""
        self._params = None

    def _of_activations(self, axes: tuple[str | None, ...]) -> NamedSharding:
        spread = ("rows" if axis == "batch" else None for axis in axes)
        return NamedSharding(self._rows.mesh, PartitionSpec(*spread))

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Cleans captions and turns them into at most S token ids, the end token kept; counts cuts.

        Args:
          captions: any texts.

        Returns:
          For each caption the ids of its valid tokens, at least the end token.
        """
        if not captions:
            return []
        texts = [prepare_caption(caption, self._clean) for caption in captions]
        whole = self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        out = []
        for caption, ids in zip(captions, whole):
            if len(ids) > self.text_length:
                removed = self._tokenizer.decode(ids[self.text_length - 1 : -1])
                self.cut.append(CutCaption(caption, removed, len(ids)))
                ids = [*ids[: self.text_length - 1], ids[-1]]
            out.append(ids)
        return out

    def encode_each(self, captions: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (position in `captions`, features of its valid tokens, float32 [L, D]), shortest first.

        A batch holds captions that are padded to one length, their own rounded up, so that the features of a
        caption do not depend on which others are encoded beside it. While one batch is computed the one
        before is handed out.
        """
        ids = self.tokenize(captions)

        def padded(i: int) -> int:
            return min(round_up(len(ids[i]), LENGTH_STEP), self.text_length)

        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        batches = [
            (length, same[start : start + self._batch_size])
            for length, group in itertools.groupby(order, padded)
            for same in [list(group)]
            for start in range(0, len(same), self._batch_size)
        ]
        waiting = None
        for length, part in batches:
            features = self._run([ids[i] for i in part], length)
            if waiting is not None:
                yield from self._valid(*waiting, ids)
            waiting = part, features
        if waiting is not None:
            yield from self._valid(*waiting, ids)

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes captions at their full width.

        Args:
          captions: n texts.

        Returns:
          features float32 [n, S, D], 0 past each caption's end, and lengths int32 [n].
        """
        features = np.zeros((len(captions), self.text_length, self.width), np.float32)
        lengths = np.zeros(len(captions), np.int32)
        for i, valid in self.encode_each(captions):
            features[i, : len(valid)] = valid
            lengths[i] = len(valid)
        return features, lengths

    def null_text(self) -> tuple[np.ndarray, int]:
        """What diffusers guides away from: the output for "" with its own mask.

        Returns:
          features float32 [S, D] at all positions, the padding's too, and the tokens of "".
        """
        ids = self.tokenize([""])
        return np.asarray(self._run(ids, self.text_length))[0], len(ids[0])

    def _run(self, ids: list[list[int]], length: int) -> jax.Array:
        """[rows, length, D] on the devices; rows past `ids` are repeats of the first."""
        token_ids = np.full((self._batch_size, length), self._tokenizer.pad_token_id, np.int32)
        mask = np.zeros((self._batch_size, length), bool)
        for row in range(self._batch_size):
            caption = ids[row if row < len(ids) else 0]
            token_ids[row, : len(caption)] = caption
            mask[row, : len(caption)] = True
        self.load()
        return self._encode(self._params, *jax.device_put((token_ids, mask), self._rows))

    @staticmethod
    def _valid(
        part: list[int], features: jax.Array, ids: list[list[int]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        values = np.asarray(features)
        for row, i in enumerate(part):
            yield i, values[row, : len(ids[i])]


def _text_shardings(mesh: jax.sharding.Mesh, abstract: nnx.State, sharded: bool) -> dict[str, Any]:
    """The sharding of every weight, as a nested dict: along its 'embed' axis where the devices divide it."""

    def spread(axis: str | None, size: int) -> str | None:
        return "rows" if sharded and axis == "embed" and size % mesh.size == 0 else None

    shardings = {}
    for path, variable in nnx.to_flat_state(abstract):
        axes = variable.get_metadata().get("out_sharding") or ()
        spec = (spread(axis, size) for axis, size in zip(axes, variable.shape))
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return nnx.traversals.unflatten_mapping(shardings)


def load_tokenizer(config: TextEncoderConfig) -> Any:
    """Opens a tokenizer: 'byt5' (bytes), a folder, or a name on the HuggingFace hub.

    Raises:
      UserError: it is not there and cannot be fetched.
    """
    # Imported here: it takes seconds, and only text needs it.
    import transformers

    if config.tokenizer == "byt5":
        return transformers.ByT5Tokenizer()
    name, subfolder = config.tokenizer, config.tokenizer_subfolder
    # A folder may be the repository or the tokenizer itself.
    if Path(name).is_dir() and not (Path(name) / subfolder).is_dir():
        subfolder = ""
    try:
        return transformers.AutoTokenizer.from_pretrained(name, subfolder=subfolder)
    # Whatever the hub, the file formats and their optional packages raise, the user's remedy is the same.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer '{name}'{f' (subfolder {subfolder!r})' if subfolder else ''} cannot be opened "
            f"({reason}): give a folder or a HuggingFace name in features.text_encoder.tokenizer, or 'byt5'."
        ) from None


def t5_config(config: TextEncoderConfig, vocab_size: int) -> T5Config:
    """The shape of a config's encoder.

    Args:
      config: `weights` is a folder in HuggingFace's layout, or 'random'.
      vocab_size: of the tokenizer, for 'random'.

    Raises:
      UserError: no such folder, or a folder that holds no T5.
    """
    if config.weights == "random":
        return T5Config(
            vocab_size=vocab_size,
            d_model=config.d_model,
            d_ff=config.d_ff,
            d_kv=config.d_kv,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            dtype=config.dtype,
        )
    if not config.weights:
        raise UserError(
            "features.text_encoder.weights is empty: give a folder with a T5 encoder (config.json and "
            "safetensors), or 'random'."
        )
    folder = local_folder(config.weights, "features.text_encoder.weights")
    return T5Config.from_hf(read_json(folder / "config.json"), dtype=config.dtype)


def load_t5(config: TextEncoderConfig, vocab_size: int) -> tuple[T5Config, Any]:
    """The encoder of a config: its shape and its parameters, in the compute dtype, on the host.

    Args, Raises: as `t5_config`; and weights that do not fit the shape.
    """
    t5 = t5_config(config, vocab_size)
    if config.weights == "random":
        return t5, random_t5(t5, config.seed)
    folder = local_folder(config.weights, "features.text_encoder.weights")
    return t5, import_tensors(t5_table(t5), open_tensors(folder), t5.compute_dtype)


def random_t5(t5: T5Config, seed: int) -> dict[str, Any]:
    """Parameters drawn as `T5Encoder` draws them, in the compute dtype, the same on every machine.

    Its features have the norm that T5-XXL's would have, sqrt(4096) a token, whatever the width: the caption
    projection of a PixArt starts from N(0, 0.02), which is made for that and lets little of less through.

    On the host, with a generator whose stream numpy has frozen: `jax.random` compiles a program for every
    shape, which takes longer than all the encoding of a small set.
    """
    inner = t5.num_heads * t5.d_kv
    fan = {"embed": 1, "position_bias": t5.d_model, "q": t5.d_model * t5.d_kv, "o": inner, "wo": t5.d_ff}
    generator = np.random.RandomState(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if path[0].key == "final_norm":
            return np.full(leaf.shape, math.sqrt(T5_XXL_WIDTH / t5.d_model), t5.compute_dtype)
        if name == "scale":
            return np.ones(leaf.shape, t5.compute_dtype)
        values = generator.standard_normal(leaf.shape) * fan.get(name, t5.d_model) ** -0.5
        return values.astype(t5.compute_dtype)

    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: T5Encoder(t5, rngs=nnx.Rngs(0)))))
    return jax.tree_util.tree_map_with_path(draw, abstract)
