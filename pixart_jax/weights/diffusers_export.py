"""What an export to diffusers needs: weights that diffusers can run, and the pipeline folder around them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pixart_jax.config import DiffusionConfig, TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.hub import local
from pixart_jax.readers import read_json
from pixart_jax.weights import backbones
from pixart_jax.weights.configs import read_noise_schedule, to_noise_schedule
from pixart_jax.weights.families import INDEX, PIPELINES, Family, family_of, family_of_pipeline
from pixart_jax.weights.files import COPY
from pixart_jax.weights.hub import ALPHA_PIPELINE, ENCODERS
from pixart_jax.weights.loading import Weights
from pixart_jax.weights.t5 import other_than_t5

# Side of the latents, in positions, of networks to which no pipeline passes size conditions.
_SIDE_WITHOUT_SIZES = 64


@dataclasses.dataclass(frozen=True)
class Base:
    """A pipeline folder. All its parts except the transformer are copied."""

    folder: Path
    family: Family
    index: dict[str, Any]
    parts: tuple[str, ...]


def read_base(folder: Path) -> Base:
    """Reads which parts a pipeline folder has.

    Raises:
      UserError: it is not the folder of a pipeline in `PIPELINES`, or a part is missing.
    """
    folder = local(folder, parts=ENCODERS)
    if not (folder / INDEX).is_file():
        raise UserError(
            f"--pipeline={folder} has no {INDEX}: give the folder of a {PIPELINES}, such as "
            f"{ALPHA_PIPELINE}, which is downloaded."
        )
    index, family = read_json(folder / INDEX, COPY), family_of_pipeline(folder)
    if family is None:
        raise UserError(
            f"--pipeline={folder} is a {index.get('_class_name')}: give the folder of a {PIPELINES}."
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
    return Base(folder, family, index, tuple(parts))


def _check_fits(base: Base, config: TrainConfig) -> None:
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


def for_diffusers(read: Weights, size_conditions: str, base: Base | None) -> tuple[Weights, tuple[str, ...]]:
    """Returns weights that diffusers can run, and a line for each way in which its images will differ.

    Args:
      read: the weights.
      size_conditions: one of `convert.SIZE_CONDITIONS`, see `convert.convert`.
      base: the pipeline folder that they are put into; None for the transformer alone.

    Raises:
      UserError: diffusers has no such network; the parts of `base` do not fit it; the weights were trained
        with a text encoder other than T5, and `base` is given; or size conditions that the pipeline would not
        pass are to be kept.
    """
    config = read.config
    model, guidance, lines = config.model, config.guidance, []
    if model.kind == "dit":
        raise UserError(
            "--to=diffusers needs a PixArt, but these weights are a DiT, which has no text: train stage 2 "
            "from it, or use --to=official."
        )
    backbones.check_diffusers_knows(model)
    family = family_of(model.text_length)
    other = _other_text_encoder(config)
    if other and base is not None:
        raise UserError(
            f"--pipeline={base.folder}: these weights were trained with the text encoder {other}, and a "
            f"{family.pipeline} has a T5: leave out --pipeline, which writes the transformer alone."
        )
    if other:
        lines.append(
            f"the text encoder is left out. It is {other}, and a {family.pipeline} has a T5: pass it this "
            "encoder's features as prompt_embeds and negative_prompt_embeds."
        )
    side = model.base_size * model.patch_size
    if model.size_conditions and side != family.passes_sizes:
        pixels = config.features.image_size
        unused = base is not None or family.passes_sizes is None or side == _SIDE_WITHOUT_SIZES
        if size_conditions == "fold" or (size_conditions == "auto" and unused):
            params, model = backbones.fold_size_conditions(read.params, model, pixels, pixels)
            read = dataclasses.replace(read, params=params, config=dataclasses.replace(config, model=model))
            which = f"at {8 * family.passes_sizes} px only" if family.passes_sizes else "to no network"
            lines.append(
                f"size conditions folded for {pixels}x{pixels} px, because {family.pipeline} passes them "
                f"{which}. The network gives the same output at {pixels}x{pixels} px; at other sizes it "
                f"still uses the conditions of {pixels}x{pixels} px."
            )
        elif base is not None:
            raise UserError(
                f"--size_conditions=keep: {family.pipeline} passes none to these weights, which would fail: "
                "use --size_conditions=fold."
            )
        else:
            lines.append(
                f"size conditions kept. {family.pipeline} does not pass any at {pixels} px: to use it, "
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
    if base is not None and base.family is not family:
        lines.append(
            f"the folder is that of a {family.pipeline}, because these weights use captions of "
            f"{model.text_length} tokens."
        )
    if model.text_length != family.text_length:
        lines.append(
            f"these weights use captions of {model.text_length} tokens. {family.pipeline} truncates them to "
            f"{family.text_length}, unless called with max_sequence_length={model.text_length}."
        )
    if guidance.channels != 4:
        lines.append(
            "diffusers applies guidance to every channel. These weights use guidance on only "
            f"{guidance.channels}."
        )
    text_encoder = config.features.text_encoder
    if not text_encoder.clean_caption:
        also = "" if text_encoder.lower_case else " It converts them to lower case even then."
        lines.append(
            f"{family.pipeline} cleans captions. These weights were trained without: call it with "
            f"clean_caption=False.{also}"
        )
    schedule = ", ".join(f"{name} {value}" for name, value in to_noise_schedule(config.diffusion).items())
    if base is not None:
        _check_fits(base, config)
        if reschedules(config, base):
            lines.append(f"the scheduler gets the noise schedule of these weights: {schedule}.")
    elif to_noise_schedule(config.diffusion) != to_noise_schedule(DiffusionConfig()):
        lines.append(
            f"these weights have the noise schedule {schedule}, which a transformer folder cannot hold: give "
            "--pipeline, or set these values in the scheduler."
        )
    return read, tuple(lines)


def _other_text_encoder(config: TrainConfig) -> str | None:
    """Folder and kind of the text encoder of a run, if it is on this machine and not a T5."""
    folder = Path(config.features.text_encoder.weights)
    kind = None
    if config.features.text_encoder.weights and (folder / "config.json").is_file():
        kind = other_than_t5(folder)
    return f"'{folder.name}' ({kind})" if kind else None


def reschedules(config: TrainConfig, base: Base) -> bool:
    """Whether the scheduler of a pipeline folder has another noise schedule than the weights."""
    return read_noise_schedule(base.folder, config.diffusion) != config.diffusion
