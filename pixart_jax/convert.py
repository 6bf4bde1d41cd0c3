"""Converts weights between official PixArt, diffusers, DiT and this project's checkpoints, and adapters.

    python -m pixart_jax.convert --input=PixArt-XL-2-512x512.pth --output=weights/xl2 --to=checkpoint
    python -m pixart_jax.convert --input=runs/stage3 --output=my-pixart --to=diffusers --pipeline=BASE
    python -m pixart_jax.convert --input=PixArt-Sigma-XL-2-1024-MS.pth --output=weights/sigma --to=checkpoint
    python -m pixart_jax.convert --input=BASE --adapter=lora.safetensors:0.8 --output=merged --to=diffusers
    python -m pixart_jax.convert --input=lora.safetensors --output=lora --to=peft
    python -m pixart_jax.convert --input=runs/stage3 --to=diffusers --push=hub:OWNER/NAME --push_dry_run

Writing is atomic: the output appears under its name once all of it is on disk.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart_jax.constants import LARGEST_SIDE, LARGEST_WIDTH
from pixart_jax.errors import UserError, listing, one_of
from pixart_jax.files import copy, list_folder
from pixart_jax.flags import CommandFlags, fetched, flag, run
from pixart_jax.hub import is_hub, pinned
from pixart_jax.models.configs import NULL_TEXT, OFFICIAL_MODES
from pixart_jax.weights import cards
from pixart_jax.weights.configs import (
    SCHEDULER,
    read_scheduler,
    to_diffusers_config,
    to_noise_schedule,
)
from pixart_jax.weights.families import INDEX, PIPELINES, family_of
from pixart_jax.weights.files import (
    ADAPTER_FORMATS,
    CARD,
    all_or_nothing,
    check_output,
    write_safetensors,
    write_torch,
)

if TYPE_CHECKING:
    from pixart_jax.publishing import Push
    from pixart_jax.weights.adapter_files import Specs
    from pixart_jax.weights.diffusers_export import Base
    from pixart_jax.weights.loading import Weights

FORMATS = ("diffusers", "official", "checkpoint")
SIZE_CONDITIONS = ("auto", "keep", "fold")
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

# Flags that belong to --push.
PUSH_FLAGS = ("push_dry_run", "push_private", "push_images", "push_metrics")

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
      pipeline: with 'diffusers', the folder of a `PixArtAlphaPipeline` or `PixArtSigmaPipeline` whose other
        parts are copied, so that the output is a complete pipeline, of the class that fits the weights.
      size_conditions: with 'diffusers', 'keep' them; 'fold' them into the weights for the square size that
        the model was trained at; or 'auto', which folds them if the pipeline would not pass any.
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
    import jax

    from pixart_jax.weights.adapter_files import read_adapters
    from pixart_jax.weights.checkpoints import check_name
    from pixart_jax.weights.diffusers_export import for_diffusers, read_base
    from pixart_jax.weights.loading import read_any, with_adapters

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
    base = read_base(Path(pipeline)) if pipeline is not None else None
    if pipeline is not None:
        _check_apart(Path(pipeline), output)

    hub_name = pinned(str(source)) if is_hub(source) else ""
    adapters = read_adapters(adapter, adapter_alpha)
    read = with_adapters(read_any(source, weights, pipeline=pipeline, **overrides), adapters)
    for note in read.notes:
        say(note)
    read = dataclasses.replace(read, licence=licence or read.licence)
    write = {"diffusers": _write_diffusers, "official": _write_official, "checkpoint": _write_checkpoint}[to]
    if to == "diffusers":
        read, lines = for_diffusers(read, size_conditions, base)
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
    card = cards.card(read.config, read.licence, hub_name or source.name, lines, read.manifest)
    with all_or_nothing(output, overwrite=overwrite) as folder:
        write(folder / output.name, read, card, base)
    count = sum(leaf.size for leaf in jax.tree.leaves(read.params))
    say(f"wrote {output}: {read.source} -> {to}, {count:,} parameters in float32, licence {read.licence}")


def _convert_adapter(
    source: Path, output: Path, to: str, weights: str | None, alpha: float | None, overwrite: bool, say: Say
) -> None:
    """Reads an adapter of any format and writes it in another."""
    from pixart_jax.weights.adapter_export import WRITERS
    from pixart_jax.weights.adapter_files import read_adapter

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
    from pixart_jax.weights import backbones

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
    from pixart_jax.weights.checkpoints import write_weights

    write_weights(path, read.params, read.config)
    (path / CARD).write_text(card, encoding="utf-8")


def _write_diffusers(path: Path, read: Weights, card: str, base: Base | None) -> None:
    from pixart_jax.weights import backbones
    from pixart_jax.weights.diffusers_export import reschedules

    path.mkdir()
    folder = path
    if base is not None:
        for name in base.parts:
            # Files downloaded from the hub are symbolic links into its cache; copy their contents.
            _copy_folder(base.folder / name, path / name)
        family = family_of(read.config.model.text_length)
        transformer = ["diffusers", "PixArtTransformer2DModel"]
        _write_json(path / INDEX, {**base.index, "_class_name": family.pipeline, "transformer": transformer})
        if reschedules(read.config, base):
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


def _about_null_text(read: Weights) -> tuple[str, ...]:
    from pixart_jax.weights import backbones

    null_text = read.params.get(NULL_TEXT)
    if null_text is None or np.any(np.asarray(null_text)):
        return ()
    return (
        f"{backbones.OFFICIAL_NULL_TEXT} is zero, because a diffusers model has no null caption. The "
        "official samplers need the text encoder's features of the empty text there; load_pipeline and "
        "diffusers compute them themselves.",
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
        path="weights",
    )
    output: str | None = flag(
        None,
        "Where to write: a folder; a .safetensors or .pth file with --to=official; a .safetensors file with "
        "--to=comfyui or kohya.",
        path="output",
    )
    to: str | None = flag(
        None,
        "Format to write: of weights, or (peft, comfyui, kohya) of an adapter.",
        choices=(*FORMATS, *ADAPTER_FORMATS),
    )
    adapter: tuple[str, ...] = flag(
        (),
        "LoRA or DoRA to merge into the weights: PATH or PATH:WEIGHT; may be given several times.",
        path="weights",
    )
    adapter_alpha: float | None = flag(
        None, "alpha of adapters whose files do not state their scale.", above=0, maximum=1e6
    )
    weights: str | None = flag(
        None, "Weights to read if the input has both; default: ema.", choices=("ema", "raw")
    )
    pipeline: str | None = flag(
        None,
        f"With --to=diffusers: folder of a {PIPELINES} whose text encoder, VAE, tokenizer and scheduler are "
        "copied, so that the output is a complete pipeline.",
        path="weights",
    )
    size_conditions: str = flag(
        "auto",
        "With --to=diffusers: keep them, fold them for the square size the model was trained at, or (auto) "
        "fold them only where the pipeline would pass none.",
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
        "Tokens of captions, if the input has no null caption; 300 says that it is of PixArt-Sigma. Default: "
        "120, or 300 with --pipeline of a PixArtSigmaPipeline.",
        minimum=1,
        maximum=LARGEST_WIDTH,
    )
    kv_compression: str | None = flag(
        None,
        "How a PixArt-Sigma compresses keys and values, if its file has weights for that but does not say; "
        "'ave' is the official name of 'nearest'. Default: conv.",
        choices=tuple(dict.fromkeys((*OFFICIAL_MODES, *OFFICIAL_MODES.values()))),
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
        "Factor from VAE latents to the model's input; default: the VAE's own, otherwise 0.18215, or 0.13025 "
        "for PixArt-Sigma.",
        above=0,
        maximum=1e6,
    )
    clean_caption: bool | None = flag(
        None, "Whether prompts are cleaned; default: as in training (not for PixArt-Sigma)."
    )
    lower_case: bool | None = flag(
        None,
        "Whether prompts that are not cleaned are converted to lower case; default: as in training (not for "
        "PixArt-Sigma).",
    )

    push: str | None = flag(
        None,
        "Upload the result to this repository of the hub, hub:OWNER/NAME[@BRANCH]. --output is then only "
        "needed to keep a copy.",
    )
    push_dry_run: bool = flag(False, "--push: only print the files, their sizes and the model card.")
    push_private: bool = flag(False, "--push: if the repository is new, create it as a private one.")
    push_images: str | None = flag(
        None, "--push: folder of pictures that sample wrote, to show in the model card.", path=True
    )
    push_metrics: tuple[str, ...] = flag(
        (),
        "--push: result of evaluate to show in the model card, such as fid.json; may be given several times.",
        path=True,
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `convert`."""
        others = ("words", "present", "push", *PUSH_FLAGS)
        given = {name: value for name, value in vars(self).items() if name not in others}
        return {"source": given.pop("input"), **given}


def main(given: Flags) -> None:
    given.no_words()
    given.require("input", "to", *(() if given.push else ("output",)))
    push = _read_push(given)
    given = fetched(given)
    if push is None:
        convert(**given.arguments)
        return
    from pixart_jax.publishing import publish

    images = Path(given.push_images) if given.push_images else None
    push = dataclasses.replace(push, images=images, metrics=tuple(map(Path, given.push_metrics)))
    arguments = given.arguments
    if given.to in ADAPTER_FORMATS:  # the card alone states it
        arguments["licence"] = None
    with tempfile.TemporaryDirectory(prefix="pixart-push-") as folder:
        name = push.place.repository.rpartition("/")[2]
        suffix = ".safetensors" if given.to in ("comfyui", "kohya") else ""
        output = Path(given.output or f"{folder}/{name.removesuffix(suffix)}{suffix}")
        convert(**{**arguments, "output": output})
        publish(output, push)


def _read_push(given: Flags) -> Push | None:
    """What --push and its flags say; None without it. Checks that the account may write."""
    if not given.push:
        also = next((name for name in PUSH_FLAGS if name in given.present), None)
        if also:
            raise UserError(f"--{also} has no effect without --push=hub:OWNER/NAME: leave it out.")
        return None
    from pixart_jax.publishing import Push, check_rights, parse_push

    place = parse_push(given.push)
    if not given.push_dry_run:
        check_rights(place)
    return Push(place, given.push_private, given.push_dry_run, licence=given.licence)


if __name__ == "__main__":
    run(main, Flags)
