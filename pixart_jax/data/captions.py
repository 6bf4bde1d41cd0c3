"""Captions: their fields in a record, their cleaning, and the statistics of the paper's Table 1.

`clean_caption` gives, character for character, what diffusers' PixArt pipelines give with
`clean_caption=True`: features and prompts must go through the same cleaning, or the model meets at sampling a
text it was never trained on.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import html
import math
import os
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pixart_jax.data.images import Refused
from pixart_jax.errors import UserError, did_you_mean

# Names under which captions are looked for when the user names none: the official pair, both of them, or
# else the first of the others.
OFFICIAL_FIELDS = ("prompt", "sharegpt4v")
OTHER_FIELDS = ("caption", "text")

# A tagger takes a caption and returns (word, Penn Treebank tag) pairs.
Tagger = Callable[[str], Iterable[tuple[str, str]]]

TAGGERS = ("textblob", "nltk", "spacy:MODEL")
DEFAULT_TAGGER = "textblob"
# Table 1: a noun is valid when it appears more than this many times in the data set.
VALID_ABOVE = 10

_URL = (
    r"\b((?:{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])"
    r"|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)))"
)
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)

# Three runs of (pattern, replacement), each in order. The order is part of the format: later patterns
# meet what earlier ones left, oddities included ("www:" is what the original has, not "www.").
_BEFORE_HTML = (
    ("<person>", "person"),  # tag of the LAION captions
    (_URL.format(scheme="https?"), ""),
    (_URL.format(scheme="www"), ""),
)
_AFTER_HTML = (
    (r"@[\w\d]+\b", ""),  # @nickname
    # CJK strokes, phonetic extensions, enclosed and compatibility forms, ideographs, hexagrams
    *((f"[{block}]+", "") for block in (
        "\u31c0-\u31ef", "\u31f0-\u31ff", "\u3200-\u32ff", "\u3300-\u33ff", "\u3400-\u4dbf", "\u4dc0-\u4dff",
        "\u4e00-\u9fff",
    )),
    (f"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP address
    (r"\d:\d\d\s+$", ""),  # article id
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE_TYPES})", ""),  # file name
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\\/\*]+", " "),
    (r"\s+\.\s+", " "),
)  # fmt: skip
_AFTER_UNICODE = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 1920x1080, with a Latin x, a Cyrillic х or a times sign
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


class Caption(NamedTuple):
    """One caption of an image: its text, its weight in the draw (positive), and which caption it is."""

    text: str
    weight: float = 1.0
    name: str = "caption"


def captions_of(value: Any, weight: float = 1.0, name: str = "caption") -> tuple[Caption, ...]:
    """Makes captions of a value: text, UTF-8 bytes, None, or a sequence of these.

    The captions of a sequence share the weight, so that a field's share in the draw does not depend on how
    many it holds. Values without text give no caption.

    Raises:
      Refused: "bad_caption", for what is not text.
    """
    texts = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    texts = [text for text in map(_text, texts) if text]
    return tuple(Caption(text, weight / len(texts), name) for text in texts if weight > 0)


def captions_of_record(record: Mapping[str, Any], fields: Mapping[str, float] | None) -> tuple[Caption, ...]:
    """Reads the captions of a record.

    Args:
      record: field name to value. The field "captions" may hold a list of {"text", "weight", "name"}, of
        which weight (1) and name may be left out, or of texts.
      fields: field name to weight. None takes "captions" alone where the record has it, else the fields of
        known names (`default_fields`).

    Raises:
      Refused: "bad_record" or "bad_caption".
    """
    if fields is None:
        fields = {"captions": 1.0} if record.get("captions") is not None else default_fields(record)
    captions: tuple[Caption, ...] = ()
    for name, weight in fields.items():
        value = record.get(name)
        captions += _listed(value, weight) if name == "captions" else captions_of(value, weight, name)
    return captions


def default_fields(known: Iterable[str]) -> dict[str, float]:
    """Returns the caption fields among known names, each with weight 1; empty when there are none."""
    known = set(known)
    official = [name for name in OFFICIAL_FIELDS if name in known]
    others = [name for name in OTHER_FIELDS if name in known]
    return dict.fromkeys(official or others[:1], 1.0)


def field_weights(fields: str | Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """Returns caption field to weight, from names (weight 1) or a mapping.

    Raises:
      UserError: a weight is not a positive number.
    """
    if isinstance(fields, str):
        fields = [fields]
    weights = dict(fields) if isinstance(fields, Mapping) else dict.fromkeys(fields, 1.0)
    for name, weight in weights.items():
        try:
            weights[name] = float(weight)
        except (TypeError, ValueError):
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise UserError(
                f"caption weight of '{name}' is {weight!r}: must be a positive number, such as 0.5"
            )
    return weights


def parse_caption_fields(text: str) -> dict[str, float] | None:
    """Reads caption fields from a flag: "prompt", or "prompt,sharegpt4v", or "prompt=1,sharegpt4v=3".

    Returns:
      Field name to weight; None for "", which stands for the fields of known names.

    Raises:
      UserError: a weight is not a positive number.
    """
    fields: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, separator, weight = part.partition("=")
        fields[name.strip()] = weight if separator else 1.0
    return field_weights(fields) if fields else None


def check_fields(
    fields: Mapping[str, float] | None, known: Iterable[str], required: bool, where: str | os.PathLike
) -> None:
    """Checks, at the door, that a source has the caption fields that are to be read.

    Args:
      fields: those the user asks for, or None.
      known: the fields there are.
      required: whether captions must be there.
      where: the source, for the message.

    Raises:
      UserError: a field asked for is not there, or none is known.
    """
    known = list(known)
    for name in fields or ():
        if name not in known:
            raise UserError(
                f"caption field '{name}': '{where}' has only {', '.join(known)}; set caption_fields."
                f"{did_you_mean(name, known)}"
            )
    if required and fields is None and "captions" not in known and not default_fields(known):
        raise UserError(
            f"'{where}': no captions under the names captions, {', '.join(OFFICIAL_FIELDS + OTHER_FIELDS)} "
            f"(fields: {', '.join(known)}); name yours with caption_fields"
        )


def _listed(value: Any, weight: float) -> tuple[Caption, ...]:
    """Reads the field "captions"."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise Refused("bad_record", f"field 'captions' is {type(value).__name__}, must be a list")
    captions: tuple[Caption, ...] = ()
    for number, entry in enumerate(value):
        entry = entry if isinstance(entry, Mapping) else {"text": entry}
        if "text" not in entry:
            raise Refused("bad_record", f"captions[{number}] has no 'text' (fields: {', '.join(entry)})")
        own = 1.0 if entry.get("weight") is None else entry["weight"]
        if isinstance(own, bool) or not isinstance(own, (int, float)) or not 0 <= own < math.inf:
            raise Refused("bad_record", f"captions[{number}] has weight {own!r}, must be a number from 0 up")
        captions += captions_of(entry["text"], weight * own, str(entry.get("name") or f"caption{number}"))
    return captions


def _text(value: Any) -> str:
    """Returns stripped text, "" for None."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refused("bad_caption", f"byte {error.start} is not UTF-8") from None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused("bad_caption", f"a caption is {type(value).__name__}, must be text")
    return value.strip()


def clean_caption(caption: str, passes: int = 2) -> str:
    """Cleans a caption as diffusers' PixArt pipelines do.

    Lower-cases it and removes what web captions carry besides words: URLs, HTML, nicknames, CJK characters,
    ids, file names, sizes, shop phrases, quotes around the whole. Mended encodings come from ftfy.

    Args:
      caption: any text.
      passes: how often the rules are applied; the pipelines and the official feature extractor apply them
        twice, since one pass may uncover what the next removes.

    Returns:
      The cleaned caption, which may be empty.

    Raises:
      UserError: ftfy or beautifulsoup4 is not installed. diffusers would silently leave captions uncleaned.
    """
    for _ in range(passes):
        caption = _clean_once(caption)
    return caption


def prepare_caption(caption: str, clean: bool = True) -> str:
    """Does what the diffusers pipelines do to a prompt before the tokenizer.

    Args:
      caption: any text.
      clean: True for `clean_caption`; False lower-cases and strips only.
    """
    return clean_caption(caption) if clean else caption.lower().strip()


def _clean_once(caption: str) -> str:
    fix_text, soup = _cleaning_libraries()
    caption = urllib.parse.unquote_plus(caption).strip().lower()
    caption = _replace(_BEFORE_HTML, caption)
    caption = soup(caption)
    caption = _replace(_AFTER_HTML, caption)
    if len(re.findall(r"[-_]", caption)) > 3:  # this-is-a-file-name
        caption = re.sub(r"[-_]", " ", caption)
    caption = html.unescape(html.unescape(fix_text(caption)))
    return _replace(_AFTER_UNICODE, caption).strip()


def _replace(rules: Iterable[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = _compiled(pattern).sub(replacement, text)
    return text


# More patterns than the cache of `re` would be sure to keep.
_compiled = functools.cache(re.compile)


@functools.cache
def _cleaning_libraries() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Imports ftfy and Beautiful Soup when first needed: sampling without cleaning does without them."""
    try:
        import bs4
        import bs4.builder
        import ftfy
    except ImportError as error:
        raise UserError(
            f"caption cleaning needs the package '{error.name}', which is not installed; "
            "pip install ftfy beautifulsoup4, or turn cleaning off (the features then differ from diffusers')"
        ) from None
    # A caption that looks like a path is still a caption.
    warnings.filterwarnings("ignore", category=bs4.MarkupResemblesLocatorWarning)

    def text_of(markup: str) -> str:
        try:
            return bs4.BeautifulSoup(markup, features="html.parser").text
        except bs4.builder.ParserRejectedMarkup:  # "<![" and its like: no HTML, and diffusers would stop
            return markup

    return ftfy.fix_text, text_of


@dataclasses.dataclass(frozen=True)
class CaptionStatistics:
    """The columns of the paper's Table 1 for one set of captions.

    Attributes:
      images: how many were counted.
      total_nouns: nouns with repetition.
      distinct_nouns: different nouns (DN).
      valid_nouns: different nouns that appear more than 10 times (VN).
    """

    images: int
    total_nouns: int
    distinct_nouns: int
    valid_nouns: int

    @property
    def valid_share(self) -> float:
        """VN / DN, 0 without nouns."""
        return self.valid_nouns / self.distinct_nouns if self.distinct_nouns else 0.0

    @property
    def average(self) -> float:
        """Nouns per image, 0 without images."""
        return self.total_nouns / self.images if self.images else 0.0


class NounCounter:
    """Counts the nouns of captions as the paper's Table 1 does.

    A noun is a word tagged NN, NNS, NNP or NNPS that holds a letter; words are compared in lower case and
    not reduced to their stem ("cat" and "cats" are two). The paper says no more than that it counted with
    NLTK, so compare its figures with a run of `tagger="nltk"`, and sets of captions with each other under one
    tagger. The default is the rule-and-lexicon tagger that textblob carries in its wheel (94,000 words,
    ported from pattern.en): it needs no download and no model, takes about 0.4 ms a caption of 40 words, is
    English only, and calls words it does not know nouns, so that misspellings raise the count of distinct
    nouns.

    Args:
      tagger: "textblob"; "nltk" (its perceptron tagger, whose data the user has downloaded); "spacy:MODEL"
        for an installed spaCy model; or a function from text to (word, Penn tag) pairs.
      valid_above: appearances that a valid noun exceeds.

    Raises:
      UserError: unknown tagger, or its package or data is not installed.
    """

    def __init__(self, tagger: str | Tagger = DEFAULT_TAGGER, valid_above: int = VALID_ABOVE):
        self._tag = load_tagger(tagger) if isinstance(tagger, str) else tagger
        self._valid_above = valid_above
        self._images = 0
        self._appearances: collections.Counter[str] = collections.Counter()

    def add(self, captions: str | Iterable[str]) -> None:
        """Counts one image by its caption, or by its captions together."""
        self._images += 1
        for caption in [captions] if isinstance(captions, str) else captions:
            tagged = self._tag(caption)
            nouns = (word.lower() for word, label in tagged if label.startswith("NN"))
            self._appearances.update(noun for noun in nouns if any(map(str.isalpha, noun)))

    def statistics(self) -> CaptionStatistics:
        """Returns the figures of what was counted so far."""
        return CaptionStatistics(
            images=self._images,
            total_nouns=self._appearances.total(),
            distinct_nouns=len(self._appearances),
            valid_nouns=sum(times > self._valid_above for times in self._appearances.values()),
        )


def load_tagger(name: str) -> Tagger:
    """Returns the tagger of a name, see `NounCounter`.

    Raises:
      UserError: unknown name, or the package or its data is not installed.
    """
    kind, _, model = name.partition(":")
    try:
        if name == "textblob":
            from textblob.en import tag

            return tag
        if name == "nltk":
            import nltk

            nltk.pos_tag(nltk.word_tokenize("a test"))
            return lambda text: nltk.pos_tag(nltk.word_tokenize(text))
        if kind == "spacy" and model:
            import spacy

            pipeline = spacy.load(model)
            return lambda text: [(token.text, token.tag_) for token in pipeline(text)]
    except ImportError as error:
        raise UserError(
            f"tagger '{name}' needs the package '{error.name}', which is not installed; pip install {kind}"
        ) from None
    except LookupError:
        raise UserError(
            f"tagger '{name}': its data is not installed; python -m nltk.downloader punkt_tab "
            "averaged_perceptron_tagger_eng"
        ) from None
    except OSError:
        raise UserError(
            f"tagger '{name}': spaCy has no model '{model}' installed; python -m spacy download {model}"
        ) from None
    raise UserError(f"tagger '{name}': must be one of {', '.join(TAGGERS)}.{did_you_mean(name, TAGGERS)}")


def statistics_table(rows: dict[str, CaptionStatistics]) -> str:
    """Writes statistics as the columns of Table 1, one line per set of captions.

    Args:
      rows: name of the set to its statistics.
    """
    header = ("captions", "images", "VN", "DN", "VN/DN", "total nouns", "average")
    lines = [header]
    for name, row in rows.items():
        counts = [f"{n:,}" for n in (row.images, row.valid_nouns, row.distinct_nouns)]
        lines.append((name, *counts, f"{row.valid_share:.1%}", f"{row.total_nouns:,}", f"{row.average:.1f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
