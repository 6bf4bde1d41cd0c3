"""Writes dense captions with an image-to-text model, and counts the nouns of captions.

    python -m pixart_jax.caption --images=photos --out=captions.jsonl
    python -m pixart_jax.caption stats captions.jsonl

The first command writes one line per image (see `captioning/run.py`). Other commands read the file with
`--source=jsonl`, or, for images in archives, with the archive's own source and its option `captions`. If the
command is killed, run it again: it continues where it stopped. The second command prints the columns of the
paper's Table 1 for each kind of caption in a file.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

from pixart_jax.captioning.model import DEFAULT_MODEL, PROMPT_STYLES, Describe, load_captioner
from pixart_jax.captioning.run import caption_images
from pixart_jax.constants import LARGEST_BATCH, LARGEST_WIDTH, MOST_THREADS
from pixart_jax.data.captions import (
    DEFAULT_TAGGER,
    VALID_ABOVE,
    NounCounter,
    captions_of,
    load_tagger,
    parse_caption_fields,
    statistics_table,
)
from pixart_jax.data.images import RefusalReport, Refused
from pixart_jax.data.sources import KINDS, Example, Source, open_source
from pixart_jax.data.sources.options import parse_options, parse_part
from pixart_jax.data.sources.paths import existing_file
from pixart_jax.errors import UserError, did_you_mean
from pixart_jax.flags import CommandFlags, fetched, flag, run
from pixart_jax.hub import local

# --------------------------------------------------------------------------------------------------
# Statistics


def print_statistics(source: Source, tagger: str = DEFAULT_TAGGER, valid_above: int = VALID_ABOVE) -> None:
    """Prints the columns of the paper's Table 1 for each kind of caption in a source, without reading images.

    Args:
      source: the captions.
      tagger: the part-of-speech tagger: textblob, nltk or spacy:MODEL.
      valid_above: a noun is valid if it appears more often than this.

    Raises:
      UserError: the tagger cannot be used, or the source has no captions.
    """
    tag = load_tagger(tagger)
    counters: dict[str, NounCounter] = {}
    skipped: collections.Counter[str] = collections.Counter()
    for index in range(len(source)):
        try:
            captions = source[index].captions
        except Refused as refused:
            skipped[refused.reason] += 1
            continue
        by_name: dict[str, list[str]] = {}
        for caption in captions:
            by_name.setdefault(caption.name, []).append(caption.text)
        for name, texts in by_name.items():
            counters.setdefault(name, NounCounter(tag, valid_above)).add(texts)
    if not counters:
        raise UserError("the file has no captions: name their fields with --caption_fields.")
    print(statistics_table({name: counter.statistics() for name, counter in sorted(counters.items())}))
    print(f"VN: nouns that appear more than {valid_above} times, DN: distinct nouns; tagger: {tagger}")
    if skipped:
        print("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())))


class _TextLines(Source):
    """A plain text file with one caption per line."""

    kind = "txt"

    def __init__(self, path: str):
        try:
            lines = existing_file(path).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"'{path}' cannot be read as UTF-8 text ({error}): give a file of captions."
            ) from None
        self._lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, index: int) -> str:
        return f"line {self._lines[index][0]}"

    def __getitem__(self, index: int) -> Example:
        return Example(self.key(index), b"", captions_of(self._lines[index][1]))


# --------------------------------------------------------------------------------------------------
# The command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(CommandFlags):
    images: str | None = flag(
        None, "Images: folder, list, archive or dataset name, see --source.", path="images"
    )
    out: str | None = flag(None, "File of JSON lines to write, or to continue.", path="output")
    source: str = flag("auto", f"Kind of --images: auto or one of {', '.join(KINDS)}.")
    source_option: tuple[str, ...] = flag(
        (), "NAME=VALUE for the source, such as image_root=DIR or key_field=id.", path=True
    )
    caption_fields: str = flag(
        "", "Fields that hold existing captions, as NAME[=WEIGHT],...; default: the usual names."
    )
    model: str = flag(DEFAULT_MODEL, "Image-to-text model of transformers: id or folder.", path="weights")
    instruction: str = flag(
        "", "What to ask the model; {caption} stands for the existing caption. Default: the paper's wording."
    )
    with_original: bool = flag(False, "Show the model the image's existing caption.")
    prompt_style: str = flag(
        "auto", "How to format the question; auto: chat if there is a chat template.", choices=PROMPT_STYLES
    )
    batch_size: int = flag(16, "Number of images in a batch.", minimum=1, maximum=LARGEST_BATCH)
    max_new_tokens: int = flag(
        512, "Maximum length of a caption, in tokens of the model.", minimum=1, maximum=LARGEST_WIDTH
    )
    device: str = flag("auto", "PyTorch device; auto: cuda if there is one, otherwise cpu.")
    dtype: str = flag("auto", "Type of the weights; auto: bfloat16 on cuda, float32 on cpu.")
    shard: str = flag("0/1", "I/N: caption every N-th image, starting with image I (counted from 0).")
    max_refused_share: float = flag(
        0.05, "Stop when more than this share of the images (0 to 1) is skipped.", minimum=0, maximum=1
    )
    workers: int = flag(4, "Number of threads that read and decode images.", minimum=1, maximum=MOST_THREADS)
    tagger: str = flag(DEFAULT_TAGGER, "stats: textblob, nltk or spacy:MODEL.")
    valid_above: int = flag(
        VALID_ABOVE, "stats: a noun is valid if it appears more often than this.", minimum=0
    )


def main(given: Flags) -> None:
    if given.words[:1] == ("stats",):
        if len(given.words) != 2:
            raise UserError(
                f"stats takes 1 file, not {len(given.words) - 1}: python -m pixart_jax.caption stats FILE"
            )
        source = _open(fetched(given), str(local(given.words[1], everything=True)), statistics=True)
        print_statistics(source, given.tagger, given.valid_above)
        return
    if given.words:
        close = did_you_mean(given.words[0], ["stats"])
        raise UserError(
            f"argument '{given.words[0]}' is unknown: give 'stats', or images with --images.{close}"
        )
    given.require("images", "out", hint="python -m pixart_jax.caption --images=DIR --out=captions.jsonl")
    part = parse_part(given.shard)
    given = fetched(given)
    source = _open(given, given.images)
    report = RefusalReport(given.max_refused_share)
    model_settings = {name: getattr(given, name) for name in ("max_new_tokens", "prompt_style", "dtype")}
    written = caption_images(
        source,
        _loaded_when_needed(given.model, device=given.device, **model_settings),
        given.out,
        report,
        name=given.model,
        instruction=given.instruction,
        with_original=given.with_original,
        batch_size=given.batch_size,
        shard=part,
        settings=model_settings,
        workers=given.workers,
    )
    print(report.table())
    print(f"{written:,} captions written to {given.out}")


def _loaded_when_needed(name: str, **options: Any) -> Describe:
    """Loads the model at the first call, so that no model is loaded if all captions are already written."""
    model = functools.cache(lambda: load_captioner(name, **options))
    return lambda images, instructions: model()(images, instructions)


def _open(given: Flags, path: str, statistics: bool = False) -> Source:
    """Opens the source. Captions are required only where they are used."""
    if statistics and given.source == "auto" and path.lower().endswith(".txt"):
        return _TextLines(path)
    options: dict[str, Any] = {"require_captions": statistics or given.with_original}
    options |= parse_options(given.source_option)
    if given.caption_fields:
        options["caption_fields"] = parse_caption_fields(given.caption_fields)
    source = open_source(given.source, path, **options)
    for note in source.notes:
        print(note)
    return source


if __name__ == "__main__":
    run(main, Flags)
