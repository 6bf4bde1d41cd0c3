"""From captions to text features, with a tokenizer and a T5 encoder.

The encoder runs on all local devices: the batch is sharded over them, and the weights can be sharded too.

Axes: n captions, S text_length, D text width, L valid tokens of a caption.
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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from pixart_jax.config import TextEncoderConfig
from pixart_jax.data.captions import prepare_caption
from pixart_jax.encoders.batches import local_sharding, round_up
from pixart_jax.errors import UserError
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.quantization import T5_KEPT, kernels, quantize_parameters
from pixart_jax.models.t5 import T5Config, T5Encoder, abstract_t5
from pixart_jax.readers import read_json
from pixart_jax.weights.files import COPY, open_tensors
from pixart_jax.weights.hub import check_hub_name, local_folder
from pixart_jax.weights.t5 import t5_table
from pixart_jax.weights.tables import import_parameters

# Captions are padded to a multiple of this many tokens. One program is compiled for each padded length; a
# larger step means fewer programs but more computation on padding.
LENGTH_STEP = 16
# Default number of captions encoded at a time.
TEXT_BATCH = 64
# Width of T5-XXL, the text encoder that PixArt was trained with.
T5_XXL_WIDTH = 4096


@dataclasses.dataclass(frozen=True)
class CutCaption:
    """A caption that was longer than S tokens and was truncated.

    Attributes:
      caption: the original text.
      removed: the text of the tokens that were cut off.
      tokens: the number of tokens before truncation.
    """

    caption: str
    removed: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class UnknownCaption:
    """A caption with characters that are not in the tokenizer's vocabulary.

    The network gets the same token for all of them. T5 knows English, French, German and Romanian; most other
    scripts and emojis are unknown to it.

    Attributes:
      caption: the original text.
      unknown: the number of unknown tokens.
      tokens: the number of all tokens, including the end token.
      characters: the unknown characters, each once; '' in lists of older versions.
    """

    caption: str
    unknown: int
    tokens: int
    characters: str = ""


def cut_summary(cut: Sequence[CutCaption], length: int, where: str = "") -> str:
    """Returns a line that tells how many captions were truncated to `length` tokens, with an example.

    Args:
      cut: these captions, at least one.
      length: S.
      where: the file that lists them, if there is one.
    """
    first, listed = cut[0], f" (all in {where})" if where else ""
    return (
        f"{len(cut):,} captions were truncated to {length} tokens{listed}, for example one of {first.tokens} "
        f"tokens, which lost {first.removed[:80]!r}"
    )


# How many unknown characters a line names.
MOST_CHARACTERS = 20


def unknown_summary(unknown: Sequence[UnknownCaption], where: str = "") -> str:
    """Returns a line that tells how many captions have unknown characters, with an example.

    Args:
      unknown: these captions, at least one.
      where: the file that lists them, if there is one.
    """
    first, listed = unknown[0], f" (all in {where})" if where else ""
    found = "".join(dict.fromkeys("".join(line.characters for line in unknown)))
    named = f": {found[:MOST_CHARACTERS]}{'…' if len(found) > MOST_CHARACTERS else ''}" if found else ""
    return (
        f"{len(unknown):,} captions have characters that the tokenizer does not know{listed}{named}; for "
        f"example '{first.caption[:80]}': {first.unknown} of its {first.tokens} tokens are unknown, and the "
        "network cannot tell them apart; translate such captions"
    )


class TextEncoder:
    """A tokenizer and a T5 encoder.

    Attributes:
      text_length: S.
      width: D.
      t5: the encoder's config.
      bytes_per_device: size of the weights on one device while they are loaded.
      bytes_of_largest: size of the largest parameter in the compute dtype, if it is quantized; otherwise 0.
      rows_per_device: captions that one device encodes at a time.
      clean_caption, lower_case: how captions are prepared, see `data.captions.prepare_caption`.
      cut: the `CutCaption`s so far, one each time a caption was truncated.
      unknown: the `UnknownCaption`s so far, likewise.
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
          config: names the tokenizer and the weights.
          text_length: S, the largest number of tokens of a caption, including its end token.
          batch_size: captions encoded at a time, rounded up to a multiple of the number of local devices.
          sharded: True shards the weights over the local devices and gathers each layer when it runs, so
            that T5-XXL's 9.5 GB fit on eight devices of 16 GB next to everything else. False replicates
            them, which is faster when many captions are encoded.
          load: False postpones loading the weights until `load` is called or the first caption is encoded.

        Raises:
          UserError: the tokenizer or the weights cannot be found, or do not belong together.
        """
        self.text_length = text_length
        self.clean_caption, self.lower_case = config.clean_caption, config.lower_case
        self._tokenizer = load_tokenizer(config)
        t5 = t5_config(config, len(self._tokenizer))
        if t5.vocab_size < len(self._tokenizer):
            raise UserError(
                f"tokenizer '{config.tokenizer}' has {len(self._tokenizer)} tokens, but the text encoder "
                f"'{config.weights}' has only {t5.vocab_size}: give the tokenizer that belongs to it."
            )
        self.width = t5.d_model
        self.cut: list[CutCaption] = []
        self.unknown: list[UnknownCaption] = []
        self._rows, _ = local_sharding()
        self._batch_size = round_up(batch_size, self._rows.mesh.size)
        self.rows_per_device = self._batch_size // self._rows.mesh.size
        self.t5, self._config, self._params = t5, config, None
        graph, abstract = nnx.split(abstract_t5(t5, config.weights_dtype))
        self._shardings = _text_shardings(self._rows.mesh, abstract, sharded)
        self.bytes_per_device = sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(self._shardings))
        )
        quantized = (leaf.size for leaf in jax.tree.leaves(abstract) if leaf.dtype == jnp.int8)
        self.bytes_of_largest = max(quantized, default=0) * t5.compute_dtype.itemsize

        @functools.partial(
            jax.jit, in_shardings=(self._shardings, self._rows, self._rows), out_shardings=self._rows
        )
        def encode(params: Any, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
            # Constraining the activations to the batch axis makes XLA gather the weights of a layer instead
            # of splitting its matrix products, so that features do not depend on `sharded`.
            with activation_sharding(self._of_activations):
                return nnx.merge(graph, params)(token_ids, mask)

        self._encode = encode
        if load:
            self.load()

    def load(self) -> None:
        """Loads the weights onto the devices, if they are not loaded yet.

        Raises:
          UserError: the weights cannot be found, or do not fit the config.
        """
        if self._params is None:
            self._params = jax.device_put(load_t5(self._config, len(self._tokenizer))[1], self._shardings)

    def release(self) -> None:
        """Frees the memory of the weights. The next call that encodes loads them again."""
        self._params = None

    def _of_activations(self, axes: tuple[str | None, ...]) -> NamedSharding:
        spread = ("rows" if axis == "batch" else None for axis in axes)
        return NamedSharding(self._rows.mesh, PartitionSpec(*spread))

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Cleans and tokenizes captions.

        Long ones are truncated to S tokens and added to `cut`; those with unknown characters are added to
        `unknown`.

        Args:
          captions: n texts.

        Returns:
          For each caption the ids of its valid tokens. The last one is always the end token.
        """
        if not captions:
            return []
        texts = [prepare_caption(caption, self.clean_caption, self.lower_case) for caption in captions]
        untruncated = self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        out = []
        for caption, text, ids in zip(captions, texts, untruncated):
            unknown = ids.count(self._tokenizer.unk_token_id)
            if unknown:
                self.unknown.append(UnknownCaption(caption, unknown, len(ids), self._unknown_in(text)))
            if len(ids) > self.text_length:
                removed = self._tokenizer.decode(ids[self.text_length - 1 : -1])
                self.cut.append(CutCaption(caption, removed, len(ids)))
                ids = [*ids[: self.text_length - 1], ids[-1]]
            out.append(ids)
        return out

    def _unknown_in(self, text: str) -> str:
        """The characters of a text that are unknown, each once."""
        characters = [each for each in dict.fromkeys(text) if not each.isspace()]
        found = self._tokenizer(characters, add_special_tokens=False)["input_ids"] if characters else []
        return "".join(c for c, ids in zip(characters, found) if self._tokenizer.unk_token_id in ids)

    def encode_each(self, captions: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (position in `captions`, features of its valid tokens, float32 [L, D]), shortest first.

        A batch only holds captions of the same padded length, so that the features of a caption do not
        depend on the other captions. The features of one batch are yielded while the devices compute the
        next one.
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
        """Encodes captions into arrays of full length.

        Args:
          captions: n texts.

        Returns:
          features float32 [n, S, D], 0 after each caption's last token, and the lengths int32 [n].
        """
        features = np.zeros((len(captions), self.text_length, self.width), np.float32)
        lengths = np.zeros(len(captions), np.int32)
        for i, valid in self.encode_each(captions):
            features[i, : len(valid)] = valid
            lengths[i] = len(valid)
        return features, lengths

    def null_text(self) -> tuple[np.ndarray, int]:
        """The features of the empty caption with its own mask; diffusers uses them as negative prompt.

        Returns:
          features float32 [S, D] at all positions, including padding, and the number of tokens of "".
        """
        ids = self.tokenize([""])
        return np.asarray(self._run(ids, self.text_length))[0], len(ids[0])

    def _run(self, ids: list[list[int]], length: int) -> jax.Array:
        """Encodes one batch, filled up with copies of its first row: [rows, length, D] on the devices."""
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
    """The sharding of every weight, as a nested dict.

    With `sharded`, a weight is split along its 'embed' axis if the number of devices divides it.
    """

    def spread(axis: str | None, size: int) -> str | None:
        return "rows" if sharded and axis == "embed" and size % mesh.size == 0 else None

    shardings = {}
    for path, variable in nnx.to_flat_state(abstract):
        axes = variable.get_metadata().get("out_sharding") or ()
        spec = (spread(axis, size) for axis, size in zip(axes, variable.shape))
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return nnx.traversals.unflatten_mapping(shardings)


def load_tokenizer(config: TextEncoderConfig) -> Any:
    """Opens the tokenizer of a config: 'byt5' (bytes), a folder, or a name on the HuggingFace hub.

    Raises:
      UserError: it cannot be found or opened.
    """
    # Imported here because it takes seconds, and a config may have no text.
    import transformers

    if config.tokenizer == "byt5":
        return transformers.ByT5Tokenizer()
    name, subfolder = config.tokenizer, config.tokenizer_subfolder
    # A local folder may be a complete repository, or the tokenizer itself.
    if Path(name).is_dir() and not (Path(name) / subfolder).is_dir():
        subfolder = ""
    if not Path(name).is_dir():
        check_hub_name(name, "features.text_encoder.tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(name, subfolder=subfolder)
    # The hub, the file formats and their optional packages raise many kinds of errors; the fix is the same.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer '{name}'{f' (subfolder {subfolder!r})' if subfolder else ''} cannot be opened "
            f"({reason}): give a folder or a HuggingFace name in features.text_encoder.tokenizer, or 'byt5'."
        ) from None


def t5_config(config: TextEncoderConfig, vocab_size: int) -> T5Config:
    """The T5 config of a text encoder.

    Args:
      config: its `weights` are a folder in HuggingFace's layout, or 'random'.
      vocab_size: size of the tokenizer's vocabulary, used with 'random'.

    Raises:
      UserError: the folder cannot be found, or does not hold a T5.
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
            "features.text_encoder.weights is empty: give a folder that holds a T5 encoder (config.json and "
            "safetensors), or 'random'."
        )
    folder = local_folder(config.weights, "features.text_encoder.weights")
    return T5Config.from_hf(read_json(folder / "config.json", COPY), dtype=config.dtype)


def load_t5(config: TextEncoderConfig, vocab_size: int) -> tuple[T5Config, Any]:
    """The T5 config of a text encoder and its parameters, on the host.

    They are in the compute dtype. With `config.weights_dtype` 'int8', each kernel is quantized as soon as it
    is read, so that the host never holds all of them in the compute dtype.

    Args: as `t5_config`.

    Raises:
      UserError: as `t5_config`, or the weights do not fit the config.
    """
    t5 = t5_config(config, vocab_size)
    if config.weights == "random":
        parameters = nnx.traversals.flatten_mapping(random_t5(t5, config.seed)).items()
    else:
        folder = local_folder(config.weights, "features.text_encoder.weights")
        parameters = import_parameters(t5_table(t5), open_tensors(folder), t5.compute_dtype)
    if config.weights_dtype == "int8":
        parameters = quantize_parameters(parameters, kernels(abstract_t5(t5, "auto"), T5_KEPT))
    return t5, nnx.traversals.unflatten_mapping(dict(parameters))


def random_t5(t5: T5Config, seed: int) -> dict[str, Any]:
    """Random parameters with the scales of `T5Encoder`, in the compute dtype, the same on every machine.

    The features of a token have norm sqrt(4096), as T5-XXL's have, whatever the width. PixArt's caption
    projection is initialized from N(0, 0.02) for features of that norm; smaller features would have little
    effect on the network.

    The numbers come from numpy's `RandomState`, whose stream is frozen, and not from `jax.random`, which
    compiles a program for every shape: that would take longer than encoding a small data set.
    """
    inner = t5.num_heads * t5.d_kv
    fan = {"embed": 1, "position_bias": t5.d_model, "q": t5.d_model * t5.d_kv, "o": inner, "wo": t5.d_ff}
    generator = np.random.RandomState(seed)

    def initialize(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if path[0].key == "final_norm":
            return np.full(leaf.shape, math.sqrt(T5_XXL_WIDTH / t5.d_model), t5.compute_dtype)
        if name == "scale":
            return np.ones(leaf.shape, t5.compute_dtype)
        values = generator.standard_normal(leaf.shape) * fan.get(name, t5.d_model) ** -0.5
        return values.astype(t5.compute_dtype)

    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: T5Encoder(t5, rngs=nnx.Rngs(0)))))
    return jax.tree_util.tree_map_with_path(initialize, abstract)
