"""Captions: reading the fields of a record, cleaning, and the noun statistics of the paper's Table 1.

`clean_caption` returns exactly what diffusers' PixArt pipelines compute with `clean_caption=True`. Captions
in training and prompts in sampling must be cleaned in the same way, or the model gets text of a kind that it
was not trained on.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import html
import math
import os
import re
import unicodedata
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pixart_jax.data.images import Refused
from pixart_jax.errors import UserError, did_you_mean, listing, short
from pixart_jax.flags import LARGEST, SMALLEST

# Default names of caption fields: all official fields that exist or, if none does, the first of the other
# names that exists.
OFFICIAL_FIELDS = ("prompt", "sharegpt4v")
OTHER_FIELDS = ("caption", "text")

# Longer captions are skipped before they are cleaned, because the time that cleaning takes grows with the
# square of the length: 3 s for the worst caption of this many characters. The text encoder reads far fewer.
LONGEST_CAPTION = 10_000
# Largest number of captions of an image.
MOST_CAPTIONS = 1000
# Longest name of a caption, in characters.
_LONGEST_NAME = 255

# A tagger takes a caption and returns (word, Penn Treebank tag) pairs.
Tagger = Callable[[str], Iterable[tuple[str, str]]]

TAGGERS = ("textblob", "nltk", "spacy:MODEL")
DEFAULT_TAGGER = "textblob"
# Table 1: a noun is valid if it appears more than this many times in the data set.
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

# Three lists of (pattern, replacement), which are applied in order. The order matters, because a pattern is
# applied to the result of those before. Errors of the original are kept, such as "www:" instead of "www.".
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


# Unicode categories of characters that cannot be seen: controls, zero-width spaces, spaces, and marks that
# change the character before them. The other blank characters are the Hangul fillers and the empty Braille
# pattern.
_INVISIBLE = frozenset(["Cc", "Cf", "Zs", "Zl", "Zp", "Mn"])
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")


class Caption(NamedTuple):
    """One caption of an image.

    Attributes:
      text: the caption, not empty.
      weight: relative probability of choosing it among the captions of the image; positive.
      name: name of the field that it comes from.
    """

    text: str
    weight: float = 1.0
    name: str = "caption"


class CleanedCaption(NamedTuple):
    """A caption from which cleaning removed words, a line of cleaned.jsonl.

    Attributes:
      caption: the original text.
      cleaned: the text after cleaning.
      removed: the words that are not in it, separated by spaces. Changed words are among them.
    """

    caption: str
    cleaned: str
    removed: str

    @property
    def emptied(self) -> bool:
        """Whether no letter, digit or symbol is left."""
        return not _has_content(self.cleaned)


def captions_of(value: Any, weight: float = 1.0, name: str = "caption") -> tuple[Caption, ...]:
    """Converts the value of a field to captions.

    Args:
      value: text, UTF-8 bytes, None, or a sequence of these. None and text without a visible character are
        ignored.
      weight: weight of the field. Several captions share it equally, so that the probability of choosing
        this field does not depend on their number.
      name: name of the field.

    Raises:
      Refused: with reason "bad_caption", if a value is not text or too long, or there are too many; with
        reason "bad_record", if the weight of a caption is not a float32.
    """
    texts = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    _check_count(texts)
    texts = [text for text in map(_text, texts) if text]
    if not texts or not weight:
        return ()
    if not SMALLEST <= weight / len(texts) <= LARGEST[float]:
        raise Refused(
            "bad_record",
            f"caption '{name}' has weight {weight / len(texts):g}: it must be 0, or from {SMALLEST:g} to "
            f"{LARGEST[float]:g}",
        )
    return tuple(Caption(text, weight / len(texts), name) for text in texts)


def captions_of_record(record: Mapping[str, Any], fields: Mapping[str, float] | None) -> tuple[Caption, ...]:
    """Reads the captions of a record.

    Args:
      record: values by field name. The field "captions" may have a list of texts, or of objects {"text",
        "weight", "name"}, where the weight (default 1) and the name are optional.
      fields: weights by field name. None: only "captions" if the record has it, else `default_fields`.

    Raises:
      Refused: with reason "bad_record" or "bad_caption".
    """
    if fields is None:
        fields = {"captions": 1.0} if record.get("captions") is not None else default_fields(record)
    captions: tuple[Caption, ...] = ()
    for name, weight in fields.items():
        value = record.get(name)
        captions += _listed(value, weight) if name == "captions" else captions_of(value, weight, name)
    return captions


def default_fields(known: Iterable[str]) -> dict[str, float]:
    """Returns which of the names in `known` are caption fields, each with weight 1; may be empty."""
    known = set(known)
    official = [name for name in OFFICIAL_FIELDS if name in known]
    others = [name for name in OTHER_FIELDS if name in known]
    return dict.fromkeys(official or others[:1], 1.0)


def field_weights(fields: str | Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """Returns the weights of caption fields by name.

    Args:
      fields: one name or several names, which get weight 1, or weights by name.

    Raises:
      UserError: a weight is not a positive number.
    """
    if isinstance(fields, str):
        fields = [fields]
    weights = dict(fields) if isinstance(fields, Mapping) else dict.fromkeys(fields, 1.0)
    for name, weight in weights.items():
        try:
            weights[name] = float(weight)
        except (TypeError, ValueError, OverflowError):
            weights[name] = math.nan
        if not SMALLEST <= weights[name] <= LARGEST[float]:
            raise UserError(
                f"caption weight of '{name}' is {short(weight, quote=True)}: must be a positive number, such "
                f"as 0.5, from {SMALLEST:g} to {LARGEST[float]:g}"
            )
    return weights


def parse_caption_fields(text: str) -> dict[str, float] | None:
    """Parses the value of a flag: "prompt", or "prompt,sharegpt4v", or "prompt=1,sharegpt4v=3".

    Returns:
      the weights by field name; None for "", which means `default_fields`.

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
    """Checks that a source has the caption fields that will be read from it.

    Args:
      fields: the fields that the user requests, or None for the default ones.
      known: all fields that the source has.
      required: whether every sample must have a caption.
      where: the source, for the message.

    Raises:
      UserError: a requested field does not exist, or captions are required and there is no caption field.
    """
    known = list(known)
    for name in fields or ():
        if name not in known:
            raise UserError(
                f"caption field '{name}': '{where}' has only {listing(known)}; set caption_fields."
                f"{did_you_mean(name, known)}"
            )
    if required and fields is None and "captions" not in known and not default_fields(known):
        raise UserError(
            f"'{where}': no field is named captions, {', '.join(OFFICIAL_FIELDS + OTHER_FIELDS)} "
            f"(fields: {listing(known)}); pass the name of your caption field as caption_fields"
        )


def _listed(value: Any, weight: float) -> tuple[Caption, ...]:
    """Reads the field "captions" (see `captions_of_record`)."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise Refused("bad_record", f"field 'captions' is {type(value).__name__}, must be a list")
    _check_count(value)
    captions: tuple[Caption, ...] = ()
    for number, entry in enumerate(value):
        entry = entry if isinstance(entry, Mapping) else {"text": entry}
        if "text" not in entry:
            raise Refused("bad_record", f"captions[{number}] has no 'text' (fields: {listing(entry)})")
        own = 1.0 if entry.get("weight") is None else entry["weight"]
        if isinstance(own, bool) or not isinstance(own, (int, float)) or not 0 <= own <= LARGEST[float]:
            raise Refused(
                "bad_record",
                f"captions[{number}] has weight {short(own, quote=True)}, must be from 0 to "
                f"{LARGEST[float]:g}",
            )
        name = str(entry.get("name") or f"caption{number}")
        if len(name) > _LONGEST_NAME:
            raise Refused(
                "bad_record",
                f"the name of captions[{number}] has {len(name):,} characters, over {_LONGEST_NAME}",
            )
        captions += captions_of(entry["text"], weight * own, _text(name))
    return captions


def _check_count(values: Sequence[Any]) -> None:
    if len(values) > MOST_CAPTIONS:
        raise Refused("bad_caption", f"{len(values):,} captions, over {MOST_CAPTIONS:,}")


def _text(value: Any) -> str:
    """Returns text without leading and trailing whitespace; "" for None, and for invisible text."""
    if isinstance(value, bytes):
        # No UTF-8 character has more than four bytes. The file may begin with a byte order mark.
        if len(value) > 4 * LONGEST_CAPTION + 3:
            raise Refused("bad_caption", f"{len(value):,} bytes: it may have {LONGEST_CAPTION:,} characters")
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refused("bad_caption", f"byte {error.start} is not UTF-8") from None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused("bad_caption", f"a caption is {type(value).__name__}, must be text")
    value = value.strip()
    if len(value) > LONGEST_CAPTION:
        raise Refused("bad_caption", f"{len(value):,} characters, over {LONGEST_CAPTION:,}")
    if not any(map(_is_visible, value)):
        return ""
    if "\0" in value:
        raise Refused("bad_caption", f"character {value.index(chr(0))} is NUL; is it text in UTF-16?")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can have
        raise Refused("bad_caption", f"character {error.start} is not Unicode") from None
    return value


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in _INVISIBLE and character not in _BLANK


def clean_caption(caption: str, passes: int = 2) -> str:
    """Cleans a caption as diffusers' PixArt pipelines do.

    Converts it to lower case and removes URLs, HTML, nicknames, CJK characters, ids, file names, sizes,
    phrases of online shops, and quotes around the caption. Repairs wrong encodings with ftfy.

    Args:
      caption: any text.
      passes: how often the rules are applied. The pipelines and the official feature extractor apply them
        twice, because removing some text can create a new match for a rule.

    Returns:
      the cleaned caption, which may be empty.

    Raises:
      UserError: ftfy or beautifulsoup4 is not installed. (diffusers then leaves captions uncleaned.)
    """
    for _ in range(passes):
        caption = _clean_once(caption)
    return caption


@functools.lru_cache(maxsize=1 << 14)  # a caption is checked when it is read, and then encoded
def prepare_caption(caption: str, clean: bool = True, lower_case: bool = True) -> str:
    """Prepares a caption or a prompt for the tokenizer.

    The first two ways are those of diffusers' pipelines, the third is that of PixArt-Sigma's training:

        clean=True                       cleaned with `clean_caption`, which also converts it to lower case
        clean=False                      stripped, and converted to lower case
        clean=False, lower_case=False    stripped

    Args:
      caption: any text.
      clean, lower_case: see above.

    Raises:
      UserError: it has more than `LONGEST_CAPTION` characters. Sources skip such captions, so it is a prompt.
    """
    if len(caption) > LONGEST_CAPTION:
        raise UserError(
            f"prompt '{short(caption)}' is too long: shorten it to at most {LONGEST_CAPTION:,} characters."
        )
    if clean:
        return clean_caption(caption)
    return caption.lower().strip() if lower_case else caption.strip()


def cleaning_loss(caption: str, clean: bool = True) -> CleanedCaption | None:
    """Returns what cleaning removes from a caption; None if all of its words are kept.

    The official cleaning removes CJK characters, URLs, file names, long numbers, and words such as "sks123"
    or "4x4". Words are compared in lower case, without punctuation. If there are no words, but cleaning
    leaves nothing, all of the text counts as removed.
    """
    if not clean:
        return None
    cleaned = prepare_caption(caption)
    kept = collections.Counter(_words(cleaned))
    removed = []
    for word in _words(html.unescape(urllib.parse.unquote_plus(caption)).lower()):
        if kept[word] > 0:
            kept[word] -= 1
        else:
            removed.append(word)
    if not removed and (cleaned or not caption.strip()):
        return None
    return CleanedCaption(caption, cleaned, " ".join(removed) or caption)


def without_emptied(
    captions: Sequence[Caption], clean: bool
) -> tuple[tuple[Caption, ...], tuple[CleanedCaption, ...]]:
    """Drops the captions of an image that cleaning leaves without words, which would train the empty caption.

    Args:
      captions: the captions of the image, as they are in the source.
      clean: whether captions are cleaned.

    Returns:
      the other captions, unchanged; and the captions from which cleaning removes words.

    Raises:
      Refused: with reason "emptied_caption", if there were captions and all are dropped.
    """
    losses = [cleaning_loss(caption.text, clean) for caption in captions]
    kept = tuple(c for c, loss in zip(captions, losses, strict=True) if not (loss and loss.emptied))
    if captions and not kept:
        raise Refused(
            "emptied_caption",
            f"cleaning removes its caption '{short(captions[0].text)}' completely; "
            "--config.features.text_encoder.clean_caption=False keeps it",
        )
    return kept, tuple(filter(None, losses))


def cleaning_summary(cleaned: Sequence[CleanedCaption], where: str = "") -> str:
    """Returns a line that tells how many captions lost words in cleaning, with an example.

    Args:
      cleaned: these captions, at least one.
      where: the file that lists them, if there is one.
    """
    first = next((line for line in cleaned if not line.emptied), cleaned[0])
    return (
        f"{len(cleaned):,} captions lost words in cleaning{f' (all in {where})' if where else ''}, for "
        f"example '{first.caption[:80]}' lost '{first.removed[:80]}'; "
        "--config.features.text_encoder.clean_caption=False turns cleaning off"
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _has_content(text: str) -> bool:
    """Whether text has a letter, a digit or a symbol such as an emoji."""
    return any(character.isalnum() or unicodedata.category(character) == "So" for character in text)


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


# The cache of `re` is shared and may drop some of these many patterns.
_compiled = functools.cache(re.compile)


@functools.cache
def _cleaning_libraries() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Imports ftfy and Beautiful Soup on first use, because only cleaning needs them."""
    try:
        import bs4
        import bs4.builder
        import ftfy
    except ImportError as error:
        raise UserError(
            f"caption cleaning needs the package '{error.name}', which is not installed; "
            "pip install ftfy beautifulsoup4, or turn cleaning off (the features then differ from diffusers')"
        ) from None
    # Beautiful Soup warns if a caption looks like a path or a URL.
    warnings.filterwarnings("ignore", category=bs4.MarkupResemblesLocatorWarning)

    def text_of(markup: str) -> str:
        try:
            return bs4.BeautifulSoup(markup, features="html.parser").text
        except bs4.builder.ParserRejectedMarkup:  # text such as "<![", for which diffusers raises an error
            return markup

    return ftfy.fix_text, text_of


@dataclasses.dataclass(frozen=True)
class CaptionStatistics:
    """The columns of the paper's Table 1 for one set of captions.

    Attributes:
      images: number of images.
      total_nouns: number of nouns in all captions, with repetitions.
      distinct_nouns: number of distinct nouns (DN).
      valid_nouns: number of distinct nouns that appear more than 10 times (VN).
    """

    images: int
    total_nouns: int
    distinct_nouns: int
    valid_nouns: int

    @property
    def valid_share(self) -> float:
        """VN / DN; 0 if there are no nouns."""
        return self.valid_nouns / self.distinct_nouns if self.distinct_nouns else 0.0

    @property
    def average(self) -> float:
        """Average number of nouns per image; 0 if there are no images."""
        return self.total_nouns / self.images if self.images else 0.0


class NounCounter:
    """Counts the nouns of captions as the paper's Table 1 does.

    A noun is a word with at least one letter that is tagged NN, NNS, NNP or NNPS. Words are compared in lower
    case, without stemming: "cat" and "cats" are two nouns. The paper gives no details of its method except
    that it uses NLTK. Compare the paper's numbers only with those of `tagger="nltk"`, and compare two data
    sets only with the same tagger.

    The default tagger is part of the package textblob. It uses rules and a lexicon of 94,000 words (ported
    from pattern.en), needs no download, takes about 0.4 ms for a caption of 40 words, and supports only
    English. It tags unknown words as nouns, so that spelling errors increase the number of distinct nouns.

    Args:
      tagger: "textblob"; "nltk" (its perceptron tagger, whose data must be downloaded); "spacy:MODEL" for an
        installed spaCy model; or a function from text to (word, Penn Treebank tag) pairs.
      valid_above: a noun is valid if it appears more than this many times.

    Raises:
      UserError: the tagger is unknown, or its package or data is not installed.
    """

    def __init__(self, tagger: str | Tagger = DEFAULT_TAGGER, valid_above: int = VALID_ABOVE):
        self._tag = load_tagger(tagger) if isinstance(tagger, str) else tagger
        self._valid_above = valid_above
        self._images = 0
        self._appearances: collections.Counter[str] = collections.Counter()

    def add(self, captions: str | Iterable[str]) -> None:
        """Counts the nouns of one image, which may have several captions."""
        self._images += 1
        for caption in [captions] if isinstance(captions, str) else captions:
            tagged = self._tag(caption)
            nouns = (word.lower() for word, label in tagged if label.startswith("NN"))
            self._appearances.update(noun for noun in nouns if any(map(str.isalpha, noun)))

    def statistics(self) -> CaptionStatistics:
        """Returns the statistics of all images so far."""
        return CaptionStatistics(
            images=self._images,
            total_nouns=self._appearances.total(),
            distinct_nouns=len(self._appearances),
            valid_nouns=sum(times > self._valid_above for times in self._appearances.values()),
        )


def load_tagger(name: str) -> Tagger:
    """Returns the tagger with a name; see `NounCounter`.

    Raises:
      UserError: the tagger is unknown, or its package or data is not installed.
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
    """Formats statistics as the columns of Table 1, one line per set of captions.

    Args:
      rows: statistics by the name of the set.
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
