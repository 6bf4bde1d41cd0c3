"""Converts weights between official PixArt, diffusers, DiT and this project's checkpoints, and adapters.

    python -m pixart_jax.convert --input=PixArt-XL-2-512x512.pth --output=weights/xl2 --to=checkpoint
    python -m pixart_jax.convert --input=runs/stage3 --output=my-pixart --to=diffusers --pipeline=BASE
    python -m pixart_jax.convert --input=BASE --adapter=lora.safetensors:0.8 --output=merged --to=diffusers
    python -m pixart_jax.convert --input=lora.safetensors --output=lora --to=peft

Writing is atomic: the output appears under its name once all of it is on disk.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixart_jax.config import DiffusionConfig, TrainConfig
from pixart_jax.constants import LARGEST_SIDE, LARGEST_WIDTH
from pixart_jax.errors import UserError, listing, one_of
from pixart_jax.files import copy, list_folder
from pixart_jax.flags import CommandFlags, flag, run
from pixart_jax.models.pixart import NULL_TEXT
from pixart_jax.readers import read_json
from pixart_jax.weights import backbones, cards
from pixart_jax.weights.adapter_export import WRITERS
from pixart_jax.weights.adapter_files import Specs, read_adapter, read_adapters
from pixart_jax.weights.checkpoints import check_name, write_weights
from pixart_jax.weights.configs import (
    PIPELINE_SIDE_WITH_SIZES,
    PIPELINE_SIDE_WITHOUT_SIZES,
    SCHEDULER,
    TEXT_LENGTH,
    read_noise_schedule,
    read_scheduler,
    to_diffusers_config,
    to_noise_schedule,
)
from pixart_jax.weights.files import (
    CARD,
    COPY,
    all_or_nothing,
    check_output,
    write_safetensors,
    write_torch,
)
from pixart_jax.weights.loading import Weights, read_any, with_adapters

FORMATS = ("diffusers", "official", "checkpoint")
ADAPTER_FORMATS = tuple(WRITERS)
SIZE_CONDITIONS = ("auto", "keep", "fold")
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PIPELINE_CLASS = "PixArtAlphaPipeline"

Say = Callable[[str], None]


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    weights: str | None = None,
    pipeline: str | Path | None = None,
    size_conditions: str = "auto",
    licence: str | None = None,
    adapter: Specs = (),
    adapter_alpha: float | None = None,
    overwrite: bool = False,
    say: Say = print,
    **overrides: Any,
) -> None:
    """Reads weights of any format and writes them in another.

    Args:
      source: weights that `loading.read_any` can read; with 'peft', 'comfyui' and 'kohya', an adapter that
        `adapter_files.read_adapter` can read, such as a run that trained one.
      output: with 'official', a file that ends in .safetensors or .pth, or a folder for model.safetensors;
        with 'diffusers', 'checkpoint' and 'peft', a folder; with 'comfyui' and 'kohya', a .safetensors file.
      to: 'diffusers', 'official' (for a DiT, DiT's format) or 'checkpoint'; 'peft', 'comfyui' or 'kohya' for
        an adapter.
      weights: 'ema' or 'raw'; None for the moving average if there is one.
      pipeline: with 'diffusers', the folder of a `PixArtAlphaPipeline` whose other parts are copied, so that
        the output is a complete pipeline.
      size_conditions: with 'diffusers', 'keep' them; 'fold' them into the weights for the square size that
        the model was trained at; or 'auto', which folds them if `PixArtAlphaPipeline` would not pass any.
      licence: of the exported weights, a key of `cards.LICENCES`; None for the licence of the source.
      adapter: adapters to merge into the weights, in float32, see `adapter_files.Specs`.
      adapter_alpha: alpha of adapters that do not state their scale.
      overwrite: replace an existing file, or a folder that is an export of this project.
      say: called with each line of the report.
      overrides: values that the source does not contain, see `loading.read_any`.

    Raises:
      UserError: the input is wrong; nothing has been written.
      RunStopped: the output cannot be written; nothing is left of it.
    """
    source, output = Path(source), Path(output)
    one_of("--to", to, (*FORMATS, *ADAPTER_FORMATS))
    if to in ADAPTER_FORMATS:
        given = {
            **{"pipeline": pipeline, "licence": licence, "adapter": adapter or None},
            **{"size_conditions": None if size_conditions == "auto" else size_conditions, **overrides},
        }
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name} has no effect on an adapter (--to={to}): leave it out.")
        _convert_adapter(source, output, to, weights, adapter_alpha, overwrite, say)
        return
    one_of("--size_conditions", size_conditions, SIZE_CONDITIONS)
    if licence is not None:
        one_of("--licence", licence, cards.LICENCES)
    if pipeline is not None and to != "diffusers":
        raise UserError(f"--pipeline only works with --to=diffusers, not with --to={to}: leave it out.")
    # Check the output first: an error after reading gigabytes would waste the user's time.
    if to == "official" and output.suffix not in (".safetensors", ".pth", ""):
        raise UserError(
            f"--output={output}: with --to=official it must end in .safetensors or .pth, or be a folder."
        )
    if to == "checkpoint":
        check_name(output)
    check_output(output, overwrite=overwrite)
    if to == "official" and output.suffix:
        check_output(_card_beside(output), overwrite=overwrite)
    _check_apart(source, output)
    base = _read_base(Path(pipeline)) if pipeline is not None else None
    if pipeline is not None:
        _check_apart(Path(pipeline), output)

    adapters = read_adapters(adapter, adapter_alpha)
    read = with_adapters(read_any(source, weights, pipeline=pipeline, **overrides), adapters)
    for note in read.notes:
        say(note)
    read = dataclasses.replace(read, licence=licence or read.licence)
    write = {"diffusers": _write_diffusers, "official": _write_official, "checkpoint": _write_checkpoint}[to]
    if to == "diffusers":
        read, lines = _for_diffusers(read, size_conditions, base)
    else:
        lines = _about_null_text(read) if to == "official" else ()
    if read.adapter and read.adapter.base_dtype != "float32":
        dtype = read.adapter.base_dtype
        lines = (
            *lines,
            f"the run stores its base in {dtype}: these weights are the base rounded to {dtype}, with the "
            "adapter. To merge the adapter into the original weights, convert --input=BASE --adapter=RUN.",
        )
    lines = (
        *lines,
        *(f"merged the adapter {Path(each.name).name} with weight {weight:g}." for each, weight in adapters),
    )
    for line in lines:
        say(line)
    card = cards.card(read.config, read.licence, source.name, lines, read.manifest)
    with all_or_nothing(output, overwrite=overwrite) as folder:
        write(folder / output.name, read, card, base)
    count = sum(leaf.size for leaf in jax.tree.leaves(read.params))
    say(f"wrote {output}: {read.source} -> {to}, {count:,} parameters in float32, licence {read.licence}")


def _convert_adapter(
    source: Path, output: Path, to: str, weights: str | None, alpha: float | None, overwrite: bool, say: Say
) -> None:
    """Reads an adapter of any format and writes it in another."""
    if to != "peft" and output.suffix != ".safetensors":
        raise UserError(f"--output={output}: with --to={to} it must end in .safetensors.")
    check_output(output, overwrite=overwrite)
    _check_apart(source, output)
    adapter = read_adapter(source, alpha, weights)
    for note in adapter.notes:
        say(note)
    dora = any(factors.magnitude is not None for factors in adapter.modules.values())
    if to != "peft" and dora:
        say(
            "ComfyUI computes DoRA with the norm of W in place of that of W + s B A: its images will differ. "
            "For the same images, merge the adapter into its base (--adapter)."
        )
    with all_or_nothing(output, overwrite=overwrite) as folder:
        WRITERS[to](folder / output.name, adapter)
    ranks = sorted({factors.rank for factors in adapter.modules.values()})
    say(f"wrote {output}: adapter -> {to}, {len(adapter.modules)} modules of rank {listing(ranks)}")


# --- Formats ----------------------------------------------------------------------------------------


def _write_official(path: Path, read: Weights, card: str, base: None) -> None:
    kind = "dit" if read.config.model.kind == "dit" else "official"
    shapes, tensors = backbones.export_backbone(kind, read.params, read.config.model)
    metadata = {"format": "pt", cards.FACTS_KEY: cards.facts(read.config, read.licence), **_manifest(read)}
    if path.suffix == ".pth":
        # The keys that the loaders of the two official projects expect.
        write_torch(path, "ema" if kind == "dit" else "state_dict", tensors, metadata)
        _card_beside(path).write_text(card, encoding="utf-8")
    elif path.suffix == ".safetensors":
        write_safetensors(path, shapes, tensors, metadata)
        _card_beside(path).write_text(card, encoding="utf-8")
    else:
        path.mkdir()
        write_safetensors(path / "model.safetensors", shapes, tensors, metadata)
        (path / CARD).write_text(card, encoding="utf-8")


def _card_beside(path: Path) -> Path:
    """The path of the card of an export that is a single file."""
    return path.with_name(f"{path.name}.md")


def _write_checkpoint(path: Path, read: Weights, card: str, base: None) -> None:
    write_weights(path, read.params, read.config)
    (path / CARD).write_text(card, encoding="utf-8")


def _write_diffusers(path: Path, read: Weights, card: str, base: _Base | None) -> None:
    path.mkdir()
    folder = path
    if base is not None:
        for name in base.parts:
            # Files downloaded from the hub are symbolic links into its cache; copy their contents.
            _copy_folder(base.folder / name, path / name)
        index = {**base.index, "transformer": ["diffusers", "PixArtTransformer2DModel"]}
        _write_json(path / "model_index.json", index)
        if _reschedules(read.config, base):
            scheduler = read_scheduler(path)
            _write_json(path / SCHEDULER, {**scheduler, **to_noise_schedule(read.config.diffusion)})
        folder = path / "transformer"
        folder.mkdir()
    shapes, tensors = backbones.export_backbone("diffusers", read.params, read.config.model)
    _write_json(folder / "config.json", to_diffusers_config(read.config.model))
    write_safetensors(folder / _DIFFUSERS_WEIGHTS, shapes, tensors, {"format": "pt", **_manifest(read)})
    (path / CARD).write_text(card, encoding="utf-8")


def _copy_folder(source: Path, target: Path) -> None:
    target.mkdir()
    for child in list_folder(source):
        (_copy_folder if child.is_dir() else copy)(child, target / child.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _manifest(read: Weights) -> dict[str, str]:
    return {cards.MANIFEST_KEY: json.dumps(cards.published(read.manifest))}


# --- Differences between the formats -----------------------------------------------------------------


def _for_diffusers(
    read: Weights, size_conditions: str, base: _Base | None
) -> tuple[Weights, tuple[str, ...]]:
    """Weights that diffusers can run, and a line for each way in which its images will differ."""
    config = read.config
    model, guidance, lines = config.model, config.guidance, []
    if model.kind == "dit":
        raise UserError(
            "--to=diffusers needs a PixArt, but these weights are a DiT, which has no text: train stage 2 "
            "from it, or use --to=official."
        )
    side = model.base_size * model.patch_size
    if model.size_conditions and side != PIPELINE_SIDE_WITH_SIZES:
        pixels = config.features.image_size
        if size_conditions == "fold" or (
            size_conditions == "auto" and (base is not None or side == PIPELINE_SIDE_WITHOUT_SIZES)
        ):
            params, model = backbones.fold_size_conditions(read.params, model, pixels, pixels)
            read = dataclasses.replace(read, params=params, config=dataclasses.replace(config, model=model))
            lines.append(
                f"size conditions folded for {pixels}x{pixels} px, because {_PIPELINE_CLASS} passes them at "
                f"1024 px only. The network gives the same output at {pixels}x{pixels} px; at other sizes it "
                f"still uses the conditions of {pixels}x{pixels} px."
            )
        else:
            lines.append(
                f"size conditions kept. {_PIPELINE_CLASS} does not pass any at {pixels} px: to use it, "
                "convert with --size_conditions=fold."
            )
    if guidance.null_text == "token":
        lines.append(
            "diffusers uses T5's features of the empty text as negative prompt. These weights use their own "
            "null caption, which diffusers cannot store: images with guidance will differ."
        )
    elif guidance.null_mask == "caption":
        lines.append(
            "diffusers uses the null caption with its own mask. These weights use it with the mask of the "
            "caption: images with guidance will differ."
        )
    if model.text_length != TEXT_LENGTH:
        lines.append(
            f"these weights use captions of {model.text_length} tokens. {_PIPELINE_CLASS} truncates them to "
            f"{TEXT_LENGTH}, unless called with max_sequence_length={model.text_length}."
        )
    if guidance.channels != 4:
        lines.append(
            "diffusers applies guidance to every channel. These weights use guidance on only "
            f"{guidance.channels}."
        )
    if not config.features.text_encoder.clean_caption:
        lines.append(
            f"{_PIPELINE_CLASS} cleans captions. These weights were trained without: call it with "
            "clean_caption=False."
        )
    schedule = ", ".join(f"{name} {value}" for name, value in to_noise_schedule(config.diffusion).items())
    if base is not None:
        _check_fits(base, config)
        if _reschedules(config, base):
            lines.append(f"the scheduler gets the noise schedule of these weights: {schedule}.")
    elif to_noise_schedule(config.diffusion) != to_noise_schedule(DiffusionConfig()):
        lines.append(
            f"these weights have the noise schedule {schedule}, which a transformer folder cannot hold: give "
            "--pipeline, or set these values in the scheduler."
        )
    return read, tuple(lines)


def _reschedules(config: TrainConfig, base: _Base) -> bool:
    """Whether the scheduler of a pipeline folder has another noise schedule than the weights."""
    return read_noise_schedule(base.folder, config.diffusion) != config.diffusion


def _about_null_text(read: Weights) -> tuple[str, ...]:
    null_text = read.params.get(NULL_TEXT)
    if null_text is None or np.any(np.asarray(null_text)):
        return ()
    return (
        f"{backbones.OFFICIAL_NULL_TEXT} is zero, because a diffusers model has no null caption. The "
        "official samplers need T5's features of the empty text there; load_pipeline and diffusers compute "
        "them themselves.",
    )


# --- The pipeline around a transformer ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Base:
    """A pipeline folder. All its parts except the transformer are copied."""

    folder: Path
    index: dict[str, Any]
    parts: tuple[str, ...]


def _read_base(folder: Path) -> _Base:
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"--pipeline={folder} has no model_index.json: give the local folder of a {_PIPELINE_CLASS} "
            "(download one with 'hf download PixArt-alpha/PixArt-XL-2-512x512 --local-dir …')."
        )
    index = read_json(folder / "model_index.json", COPY)
    if index.get("_class_name") != _PIPELINE_CLASS:
        raise UserError(
            f"--pipeline={folder} is a {index.get('_class_name')}: give the folder of a {_PIPELINE_CLASS}."
        )
    parts = []
    for name, value in index.items():
        # [None, None] stands for a part that the pipeline does not have.
        if (
            name.startswith("_")
            or name == "transformer"
            or not isinstance(value, list)
            or value[:1] in ([], [None])
        ):
            continue
        if Path(name).name != name or not (folder / name).is_dir():
            raise UserError(
                f"--pipeline={folder} names the part '{name}', but has no such folder: copy the complete "
                "folder."
            )
        parts.append(name)
    return _Base(folder, index, tuple(parts))


def _check_fits(base: _Base, config: TrainConfig) -> None:
    model = config.model
    checks = (
        ("text_encoder", "d_model", model.text_dim, "the model's text width"),
        ("vae", "latent_channels", model.in_channels, "the model's latent channels"),
        ("vae", "scaling_factor", config.features.latent_scale, "the model's scaling factor"),
    )
    for part, field, wanted, meaning in checks:
        file = base.folder / part / "config.json"
        if part in base.parts and file.is_file():
            value = read_json(file, COPY).get(field, wanted)
            if value != wanted:
                raise UserError(
                    f"--pipeline={base.folder}: its {part} has {field} {value}, but {meaning} is {wanted}: "
                    "give the pipeline with the encoders that the model was trained with."
                )


# --- Command ----------------------------------------------------------------------------------------


def _check_apart(source: Path, output: Path) -> None:
    """Checks that writing the output does not replace the input."""
    source, output = source.resolve(), output.resolve()
    if source == output or output in source.parents:
        raise UserError(f"--output={output} would replace the input '{source}': choose another output.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(CommandFlags):
    """Arguments of `convert`; `input` is its `source`."""

    input: str | None = flag(
        None,
        "Weights to read: an official PixArt or DiT file (.safetensors, .pth, .pt), a diffusers "
        "transformer or pipeline folder, a run directory or a checkpoint. With --to=peft, comfyui or kohya: "
        "an adapter (LoRA or DoRA) of any tool.",
        path=True,
    )
    output: str | None = flag(
        None,
        "Where to write: a folder; a .safetensors or .pth file with --to=official; a .safetensors file with "
        "--to=comfyui or kohya.",
        path=True,
    )
    to: str | None = flag(
        None,
        "Format to write: of weights, or (peft, comfyui, kohya) of an adapter.",
        choices=(*FORMATS, *ADAPTER_FORMATS),
    )
    adapter: tuple[str, ...] = flag(
        (),
        "LoRA or DoRA to merge into the weights: PATH or PATH:WEIGHT; may be given several times.",
        path=True,
    )
    adapter_alpha: float | None = flag(
        None, "alpha of adapters whose files do not state their scale.", above=0, maximum=1e6
    )
    weights: str | None = flag(
        None, "Weights to read if the input has both; default: ema.", choices=("ema", "raw")
    )
    pipeline: str | None = flag(
        None,
        f"With --to=diffusers: folder of a {_PIPELINE_CLASS} whose text encoder, VAE, tokenizer and "
        "scheduler are copied, so that the output is a complete pipeline.",
        path=True,
    )
    size_conditions: str = flag(
        "auto",
        "With --to=diffusers: keep them, fold them for the square size the model was trained at, or (auto) "
        f"fold them only where {_PIPELINE_CLASS} would pass none.",
        choices=SIZE_CONDITIONS,
    )
    licence: str | None = flag(
        None, "Licence of the weights; default: that of the input.", choices=tuple(cards.LICENCES)
    )
    overwrite: bool = flag(False, "Replace an existing output.")
    num_heads: int | None = flag(
        None,
        "Attention heads, if the input does not say; default: 16 at width 1152.",
        minimum=1,
        maximum=LARGEST_WIDTH,
    )
    base_size: int | None = flag(
        None,
        "Tokens per side at the training size (16 at 256 px), if the input does not say.",
        minimum=1,
        maximum=LARGEST_SIDE,
    )
    position_scale: float | None = flag(
        None,
        "Divisor of the positions, if the input does not say; default: 1.",
        above=0,
        maximum=LARGEST_SIDE,
    )
    text_length: int | None = flag(
        None,
        "Tokens of the null caption, if the input has none; default: 120.",
        minimum=1,
        maximum=LARGEST_WIDTH,
    )
    null_text: str | None = flag(
        None,
        "Null caption; default: token (official), t5_empty (diffusers).",
        choices=("token", "t5_empty"),
    )
    null_mask: str | None = flag(
        None, "Null caption's mask; default: caption (official), own (diffusers).", choices=("caption", "own")
    )
    guided_channels: int | None = flag(
        None, "Latent channels that are guided, 3 or 4 (all); default: 4.", minimum=3, maximum=4
    )
    aspect_ratio: str | None = flag(
        None,
        "Aspect ratio that size conditions get; default: bucket (official), true (diffusers).",
        choices=("bucket", "true"),
    )
    latent_scale: float | None = flag(
        None,
        "Factor from VAE latents to the model's input; default: 0.18215, or the VAE's own.",
        above=0,
        maximum=1e6,
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `convert`."""
        given = {name: value for name, value in vars(self).items() if name not in ("words", "present")}
        return {"source": given.pop("input"), **given}


def main(given: Flags) -> None:
    given.no_words()
    given.require("input", "output", "to")
    convert(**given.arguments)


if __name__ == "__main__":
    run(main, Flags)
