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
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from pixart_jax.captioning.model import DEFAULT_MODEL, PROMPT_STYLES, Describe, load_captioner
from pixart_jax.captioning.run import caption_images
from pixart_jax.data.captions import (
    DEFAULT_TAGGER,
    VALID_ABOVE,
    Caption,
    NounCounter,
    load_tagger,
    parse_caption_fields,
    statistics_table,
)
from pixart_jax.data.images import RefusalReport, Refused
from pixart_jax.data.sources import KINDS, Example, Source, open_source
from pixart_jax.data.sources.options import parse_options, parse_part
from pixart_jax.errors import UserError, did_you_mean, run_command

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
    without: collections.Counter[str] = collections.Counter()
    for index in range(len(source)):
        try:
            captions = source[index].captions
        except Refused as refused:
            without[refused.reason] += 1
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
    if without:
        print("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(without.items())))


class _TextLines(Source):
    """A plain text file with one caption per line."""

    kind = "txt"

    def __init__(self, path: str):
        try:
            self._lines = Path(path).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"'{path}' cannot be read as UTF-8 text ({error}): give a file of captions."
            ) from None
        self._lines = [line.strip() for line in self._lines if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, index: int) -> str:
        return f"line {index + 1}"

    def __getitem__(self, index: int) -> Example:
        return Example(self.key(index), b"", (Caption(self._lines[index]),))


# --------------------------------------------------------------------------------------------------
# The command


def define_flags() -> None:
    """Defines the flags. Not at import, because other commands define flags with the same names."""
    flags.DEFINE_string("images", None, "Images: a folder, list, archive or dataset name; see --source.")
    flags.DEFINE_string("out", None, "JSON-lines file to write or to resume.")
    flags.DEFINE_string("source", "auto", f"Kind of --images: auto, or one of {', '.join(KINDS)}.")
    flags.DEFINE_multi_string(
        "source_option", [], "NAME=VALUE for the source, such as image_root=DIR or key_field=id; repeatable."
    )
    flags.DEFINE_string(
        "caption_fields", "", "Fields with original captions, as NAME[=WEIGHT],...; default: common names."
    )
    flags.DEFINE_string("model", DEFAULT_MODEL, "Image-to-text model of transformers: its id or folder.")
    flags.DEFINE_string(
        "instruction",
        "",
        "Instruction to the model; {caption} is replaced by the original caption. Default: that of the "
        "paper.",
    )
    flags.DEFINE_bool("with_original", False, "Give the model the original caption of the image.")
    flags.DEFINE_enum(
        "prompt_style",
        "auto",
        PROMPT_STYLES,
        "How the model gets the instruction: through its chat template, as plain text, or not at all. auto: "
        "chat if it has a template, else none.",
    )
    flags.DEFINE_integer("batch_size", 16, "Images per call of the model.")
    flags.DEFINE_integer("max_new_tokens", 512, "Length of the longest caption, in tokens of the model.")
    flags.DEFINE_string("device", "auto", "torch device; auto: cuda if there is one, else cpu.")
    flags.DEFINE_string("dtype", "auto", "dtype of the weights; auto: bfloat16 on cuda, float32 on cpu.")
    flags.DEFINE_string("shard", "0/1", "I/N: caption every N-th image from the I-th, counted from 0.")
    flags.DEFINE_float("max_refused_share", 0.05, "Fail if a larger share of images, 0 to 1, is skipped.")
    flags.DEFINE_integer("workers", 4, "Threads that read and decode images.")
    flags.DEFINE_string(
        "tagger", DEFAULT_TAGGER, "stats: part-of-speech tagger: textblob, nltk or spacy:MODEL."
    )
    flags.DEFINE_integer(
        "valid_above", VALID_ABOVE, "stats: a noun is valid if it appears more often than this."
    )


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    values = flags.FLAGS
    if argv[1:2] == ["stats"]:
        if len(argv) != 3:
            raise UserError(
                f"stats takes 1 file, not {len(argv) - 2}: python -m pixart_jax.caption stats FILE"
            )
        print_statistics(_open(argv[2], statistics=True), values.tagger, values.valid_above)
        return
    if len(argv) > 1:
        close = did_you_mean(argv[1], ["stats"])
        raise UserError(f"argument '{argv[1]}' is unknown: give 'stats', or images with --images.{close}")
    for name in ("images", "out"):
        if not getattr(values, name):
            raise UserError(
                f"--{name} is missing: python -m pixart_jax.caption --images=DIR --out=captions.jsonl"
            )
    part, source = parse_part(values.shard), _open(values.images)
    report = RefusalReport(values.max_refused_share)
    model_settings = {name: getattr(values, name) for name in ("max_new_tokens", "prompt_style", "dtype")}
    written = caption_images(
        source,
        _loaded_when_needed(values.model, device=values.device, **model_settings),
        values.out,
        report,
        name=values.model,
        instruction=values.instruction,
        with_original=values.with_original,
        batch_size=values.batch_size,
        shard=part,
        settings=model_settings,
        workers=values.workers,
    )
    print(report.table())
    print(f"{written:,} captions written to {values.out}")


def _loaded_when_needed(name: str, **options: Any) -> Describe:
    """`load_captioner`, called at the first batch, so that a file that is complete needs no model."""
    model = functools.cache(lambda: load_captioner(name, **options))
    return lambda images, instructions: model()(images, instructions)


def _open(path: str, statistics: bool = False) -> Source:
    """Opens the source that the flags describe. Captions are required only where they are used."""
    values = flags.FLAGS
    if statistics and values.source == "auto" and path.endswith(".txt"):
        return _TextLines(path)
    options: dict[str, Any] = {"require_captions": statistics or values.with_original}
    options |= parse_options(values.source_option)
    if values.caption_fields:
        options["caption_fields"] = parse_caption_fields(values.caption_fields)
    return open_source(values.source, path, **options)


if __name__ == "__main__":
    define_flags()
    run_command(main)
