"""From captions to text features, with a tokenizer and a text encoder.

The network of the encoder is a T5 in Flax (`t5.py`), or another encoder of transformers in PyTorch
(`torch_text.py`).

Axes: n captions, S text_length, D text width, L valid tokens of a caption.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.config import TextEncoderConfig
from pixart_jax.constants import TEXT_BATCH
from pixart_jax.data.captions import prepare_caption
from pixart_jax.encoders.batches import round_up
from pixart_jax.encoders.t5 import T5Network
from pixart_jax.encoders.torch_text import TorchNetwork
from pixart_jax.errors import UserError
from pixart_jax.hub import local
from pixart_jax.weights.hub import check_hub_name, local_folder
from pixart_jax.weights.t5 import other_than_t5

# Captions are padded to a multiple of this many tokens. One program is compiled for each padded length; a
# larger step means fewer programs but more computation on padding.
LENGTH_STEP = 16


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
      tokens: the number of all tokens, including those that the tokenizer adds at the ends.
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
    """A tokenizer and a text encoder.

    Attributes:
      text_length: S.
      width: D.
      network: the encoder itself, a `T5Network` or a `TorchNetwork`, with what it needs of memory.
      clean_caption: whether captions are cleaned, see `TextEncoderConfig`.
      lower_case: whether captions that are not cleaned are converted to lower case.
      cut: a `CutCaption` for each time a caption was truncated.
      unknown: an `UnknownCaption` for each caption with unknown characters.
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
          text_length: S, the largest number of tokens of a caption, including those that the tokenizer adds
            at its ends.
          batch_size: captions encoded at a time; a T5 rounds it up to a multiple of the number of local
            devices.
          sharded: True shards the weights of a T5 over the local devices and gathers each layer when it runs,
            so that T5-XXL's 9.5 GB fit on eight devices of 16 GB next to everything else. False replicates
            them, which is faster when many captions are encoded.
          load: False postpones loading the weights until `load` is called or the first caption is encoded.

        Raises:
          UserError: the tokenizer or the weights cannot be found or opened, do not belong together, or do not
            take captions of S tokens.
        """
        self.text_length = text_length
        self.clean_caption, self.lower_case = config.clean_caption, config.lower_case
        self._tokenizer = load_tokenizer(config)
        other = None
        if config.weights not in ("", "random"):
            other = other_than_t5(local_folder(config.weights, "features.text_encoder.weights"))
        if other:
            network = TorchNetwork(config, text_length, batch_size)
        else:
            network = T5Network(config, len(self._tokenizer), text_length, batch_size, sharded)
        # Added tokens, which the network may lack, do not count: Gemma 3 has one for images.
        if network.vocab_size < self._tokenizer.vocab_size:
            raise UserError(
                f"tokenizer '{config.tokenizer}' has {self._tokenizer.vocab_size} tokens, but the text "
                f"encoder '{config.weights}' has only {network.vocab_size}: give the tokenizer that belongs "
                "to it."
            )
        self.network, self.width = network, network.width
        self.cut: list[CutCaption] = []
        self.unknown: list[UnknownCaption] = []
        self._first, self._last = _added_tokens(self._tokenizer)
        if text_length < self._first + self._last:
            raise UserError(
                f"features.text_length is {text_length}, but tokenizer '{config.tokenizer}' adds "
                f"{self._first + self._last} tokens to every caption: increase it."
            )
        if load:
            network.load()

    def load(self) -> None:
        """Loads the weights onto the devices, if they are not loaded yet.

        Raises:
          UserError: the weights cannot be found, or do not fit the config.
        """
        self.network.load()

    def release(self) -> None:
        """Frees the memory of the weights. The next call that encodes loads them again."""
        self.network.release()

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Cleans and tokenizes captions.

        Long ones are truncated to S tokens and added to `cut`; those with unknown characters are added to
        `unknown`.

        Args:
          captions: n texts.

        Returns:
          For each caption the ids of its valid tokens, at least one. The tokens that the tokenizer adds at
          the ends are kept when a caption is truncated.
        """
        if not captions:
            return []
        texts = [prepare_caption(caption, self.clean_caption, self.lower_case) for caption in captions]
        untruncated = self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        out = []
        for caption, text, ids in zip(captions, texts, untruncated):
            end = len(ids) - self._last
            # Some tokenizers, such as CLIP's, use one token for the unknown and for the end.
            unknown = ids[self._first : end].count(self._tokenizer.unk_token_id)
            if unknown:
                self.unknown.append(UnknownCaption(caption, unknown, len(ids), self._unknown_in(text)))
            if len(ids) > self.text_length:
                kept = self.text_length - self._last
                removed = self._tokenizer.decode(ids[kept:end])
                self.cut.append(CutCaption(caption, removed, len(ids)))
                ids = [*ids[:kept], *ids[end:]]
            out.append(ids or [self._stand_in()])
        return out

    def _stand_in(self) -> int:
        """The one token of a text without tokens: "", if the tokenizer adds none."""
        tokenizer = self._tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None:
                return token
        raise UserError(
            'the tokenizer has no token for the empty caption "": give one with a token for the beginning, '
            "the end or padding in features.text_encoder.tokenizer."
        )

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
            (length, same[start : start + self.network.batch_size])
            for length, group in itertools.groupby(order, padded)
            for same in [list(group)]
            for start in range(0, len(same), self.network.batch_size)
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

    def _run(self, ids: list[list[int]], length: int) -> Any:
        """Encodes one batch, filled up with copies of its first row: an array [rows, length, D]."""
        rows, padding = self.network.batch_size, self._tokenizer.pad_token_id
        # A language model may have no token for padding. Any token will do, because the mask excludes it.
        token_ids = np.full((rows, length), 0 if padding is None else padding, np.int32)
        mask = np.zeros((rows, length), bool)
        for row in range(rows):
            caption = ids[row if row < len(ids) else 0]
            token_ids[row, : len(caption)] = caption
            mask[row, : len(caption)] = True
        if token_ids.max() >= self.network.vocab_size:
            raise UserError(
                f"the tokenizer has given the token {token_ids.max()}, but the text encoder has only "
                f"{self.network.vocab_size}: give the tokenizer that belongs to it in "
                "features.text_encoder.tokenizer."
            )
        return self.network.run(token_ids, mask)

    @staticmethod
    def _valid(part: list[int], features: Any, ids: list[list[int]]) -> Iterator[tuple[int, np.ndarray]]:
        values = np.asarray(features)
        for row, i in enumerate(part):
            yield i, values[row, : len(ids[i])]


def _added_tokens(tokenizer: Any) -> tuple[int, int]:
    """How many tokens a tokenizer adds before and after a text: [CLS] and [SEP], or an end token alone."""
    bare, ids = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    first = next(start for start in range(len(ids)) if ids[start : start + len(bare)] == bare)
    return first, len(ids) - first - len(bare)


def load_tokenizer(config: TextEncoderConfig) -> Any:
    """Opens the tokenizer of a config: 'byt5' (bytes), a folder, or a name on the HuggingFace hub.

    Raises:
      UserError: it cannot be found or opened.
    """
    # Imported here because it takes seconds, and a config may have no text.
    import transformers

    if config.tokenizer == "byt5":
        return transformers.ByT5Tokenizer()
    name, subfolder = str(local(config.tokenizer, parts=())), config.tokenizer_subfolder
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
            f"({reason}): give a folder or a path of the hub in features.text_encoder.tokenizer, or 'byt5'."
        ) from None
