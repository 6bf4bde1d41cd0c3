"""What a user asks for: the settings of an image, each declared once, and requests read from text and files.

To add a setting, add one field to `Settings`. This makes it a flag of `sample`, a field of JSONL lines and of
the record in a PNG, a keyword argument of `Pipeline.__call__` and a control of the web page. Then write the
code that uses it: in `generation.py` for the scope `PROGRAM`, else in `pipeline.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.constants import LARGEST_SIDE, MOST_STEPS, SAMPLER_NAMES
from pixart_jax.data.prompts import read_prompts
from pixart_jax.errors import UserError, did_you_mean, finite, short
from pixart_jax.flags import LARGEST_SEED, check_fields, expand_user, field_kinds, flag
from pixart_jax.hub import check_paths, is_hub, local

# Scopes. Images of one batch may differ in the settings of scope IMAGE and share all others. Another value of
# a setting of scope PROGRAM needs another compiled program.
IMAGE, BATCH, PROGRAM = "image", "batch", "program"


# Headings of the web page.
SAMPLING, GUIDANCE, SIZE, START = "Sampling", "Guidance", "Size and memory", "Start from an image"

# Kinds of guidance.
CAPTION, ROUTING = "caption", "routing"

# Side in pixels of the smallest tiles that an image may be decoded in.
MIN_TILE = 128


def setting(
    default: Any,
    help: str,
    scope: str,
    *,
    choices: Sequence[str] | None = None,
    label: str,
    group: str = "",
    bounds: tuple[float | None, float | None] = (None, None),
    **limits: Any,
) -> Any:
    """A field of `Settings`.

    Args:
      default: None if the weights or other settings decide it.
      help: the text of the flag and of the keyword argument.
      scope: IMAGE, BATCH or PROGRAM.
      choices: the only values allowed, for text.
      label: label of its control on the web page.
      group: heading above that control; "" for a control that is always shown.
      bounds: smallest and largest value of that control, for numbers.
      limits: which numbers are allowed, and whether the text is a path, as for `flag`.
    """
    return flag(
        default, help, choices=choices, scope=scope, label=label, group=group, bounds=bounds, **limits
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How an image is generated. Files are named by their paths."""

    negative_prompt: str = setting(
        "",
        "What to guide away from; empty: the null caption that the model was trained with.",
        IMAGE,
        label="Negative prompt",
        group=GUIDANCE,
    )
    width: int | None = setting(
        None,
        "Pixels; default: the size the model was trained at.",
        BATCH,
        label="Width (px)",
        bounds=(1, 4096),
        minimum=1,
        maximum=LARGEST_SIDE,
    )
    height: int | None = setting(
        None,
        "Pixels; default: the size the model was trained at.",
        BATCH,
        label="Height (px)",
        bounds=(1, 4096),
        minimum=1,
        maximum=LARGEST_SIDE,
    )
    aspect_ratio: str | None = setting(
        None,
        "WIDTH:HEIGHT, such as 16:9, instead of width and height.",
        BATCH,
        label="Aspect ratio",
    )
    binning: bool = setting(
        True,
        "Generate at the bucket with the nearest aspect ratio and resize to the requested size; otherwise "
        "generate at the requested size itself.",
        BATCH,
        label="Generate at the nearest bucket, and resize",
        group=SIZE,
    )
    seed: int = setting(
        0,
        "Seed of the first image of each prompt; image k has seed + k.",
        IMAGE,
        label="Seed",
        bounds=(0, None),
        minimum=0,
        maximum=LARGEST_SEED,
    )
    steps: int = setting(
        20,
        "Model evaluations per image.",
        PROGRAM,
        label="Steps",
        group=SAMPLING,
        bounds=(1, 100),
        minimum=1,
        maximum=MOST_STEPS,
    )
    guidance_scale: float | None = setting(
        None,
        "1 or less for no guidance; default: the scale stored with the weights.",
        BATCH,
        label="Guidance scale",
        group=GUIDANCE,
        bounds=(0, 15),
        minimum=0,
    )
    guidance_interval: tuple[float, float] | None = setting(
        None,
        "Lowest and highest timestep (0 to 999) that is guided; default: all are.",
        PROGRAM,
        label="guided timestep",
        group=GUIDANCE,
        minimum=0,
        maximum=1_000_000,
    )
    guidance_rescale: float = setting(
        0.0,
        "0 to 1: how far to rescale the guided noise to the standard deviation of the conditional one.",
        PROGRAM,
        label="Rescale guidance",
        group=GUIDANCE,
        bounds=(0, 1),
        minimum=0,
        maximum=1,
    )
    guidance_by: str = setting(
        CAPTION,
        "What guidance moves away from: 'caption' (the prediction for the null caption or the negative "
        "prompt) or 'routing' (the prediction for the same prompt in which some tokens skip the blocks in "
        "the middle, for weights that were trained with token routing).",
        PROGRAM,
        choices=(CAPTION, ROUTING),
        label="Guidance by",
        group=GUIDANCE,
    )
    sampler: str = setting(
        "dpm_solver",
        "Sampling algorithm.",
        PROGRAM,
        choices=SAMPLER_NAMES,
        label="Sampler",
        group=SAMPLING,
    )
    sampler_options: dict[str, Any] | None = setting(
        None,
        'Further options of the sampler by name, such as {"order": 3}.',
        PROGRAM,
        label="Options of the sampler",
        group=SAMPLING,
    )
    image: str | None = setting(
        None,
        "Image to start from (image to image), or the image that the mask belongs to (inpainting).",
        IMAGE,
        path=True,
        label="Image to start from",
        group=START,
    )
    mask: str | None = setting(
        None,
        "Mask of the same size as the image: light where the image is regenerated.",
        IMAGE,
        path=True,
        label="Mask",
        group=START,
    )
    strength: float | None = setting(
        None,
        "Share of the steps, 0 to 1, that is run on the image to start from; default: 0.8, or 1 with a mask.",
        PROGRAM,
        label="Strength",
        group=START,
        bounds=(0, 1),
        above=0,
        maximum=1,
    )
    tile: int | None = setting(
        None,
        "Side in pixels of the tiles that the VAE decodes one after the other, which takes less memory; 0: "
        "the whole image at once. Default: 0, or 1024 if the whole image would not fit into the memory of a "
        "device.",
        BATCH,
        label="Tile (px)",
        group=SIZE,
        bounds=(0, 4096),
        minimum=MIN_TILE,
        maximum=LARGEST_SIDE,
        also=0,
    )

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Settings:
        """The settings of a call, which may hold values for several images and arrays in place of files.

        Raises:
          UserError: an unknown name, or a value of the wrong type.
        """
        _check_names(cls, arguments, "argument ")
        kinds = {name: kind for name, kind in field_kinds(cls).items() if name not in PER_PROMPT}
        checked = dict(arguments)
        for name, value in arguments.items():
            if name in kinds and value is not None:
                checked[name] = typed(f"argument {name}", kinds[name], _plain(value))
        return cls(**checked)


@dataclasses.dataclass(frozen=True)
class Request(Settings):
    """One image: its prompt, its settings, and where its prompt's features and its noise come from."""

    prompt: str = dataclasses.field(metadata={"scope": IMAGE, "label": "Prompt"})
    # (file, row): features that `array_files.save_embeddings` wrote, and starting noise, .npy [N, h, w, C].
    embeddings: tuple[str, int] | None = dataclasses.field(default=None, metadata={"scope": IMAGE})
    latents: tuple[str, int] | None = dataclasses.field(default=None, metadata={"scope": IMAGE})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Request:
        """Makes a request from values that were read from JSON.

        Args:
          values: by field.
          where: text put before a message.

        Raises:
          UserError: an unknown field, a value of the wrong type or outside its range, text that is not
            Unicode, or no prompt.
        """
        _check_names(cls, values, f"{where}field ")
        if "prompt" not in values:
            raise UserError(f"{where}there is no prompt: give one in the field 'prompt'.")
        kinds, defaults = field_kinds(cls), {field.name: field.default for field in dataclasses.fields(cls)}
        checked = {}
        for name, value in values.items():
            if value is None and defaults[name] is None:
                continue
            checked[name] = typed(f"{where}{name}", kinds[name], value)
            for inner, number in numbers_of(name, checked.get(name)):
                finite(f"{where}{inner}", number)
        request = cls(**checked)
        for path in request.files:
            check_path(f"{where}the name of a file", path)
        check_fields(request, where)
        return request

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files it reads."""
        rows = (row[0] for row in (self.embeddings, self.latents) if row is not None)
        return tuple(dict.fromkeys(path for path in (self.image, self.mask, *rows) if path is not None))


def names_of(scope: str) -> tuple[str, ...]:
    """Names of the fields of a scope."""
    return tuple(field.name for field in dataclasses.fields(Request) if field.metadata["scope"] == scope)


def takes_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the fields of `Settings` in the signature and the docstring of a function that has **settings."""
    signature = inspect.signature(function)
    *own, _ = signature.parameters.values()
    fields = dataclasses.fields(Settings)
    keywords = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            # A call may have a value for each of its prompts.
            annotation=f"{field.type} | Sequence" if field.metadata["scope"] == IMAGE else field.type,
        )
        for field in fields
    ]
    lines = [f"  {field.name}: {field.metadata['help']}" for field in fields]
    function.__signature__ = signature.replace(parameters=[*own, *keywords])
    function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__), "", "Settings:", *lines])
    return function


# Arguments of diffusers' pipelines, with what they are called here.
_DIFFUSERS_NAMES = {
    "callback_on_step_end": "'callback'",
    "eta": "sampler_options={'eta': …}",
    "generator": "'seed', a number",
    "mask_image": "'mask'",
    "negative_prompt_embeds": "'negative_embeddings'",
    "num_images_per_prompt": "'images_per_prompt'",
    "num_inference_steps": "'steps'",
    "output_type": "'output'",
    "prompt": "'prompts'",
    "prompt_embeds": "'embeddings'",
    "use_resolution_binning": "'binning'",
}


def _check_names(cls: type, values: Mapping[str, Any], what: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            ours = _DIFFUSERS_NAMES.get(name)
            hint = f" Here it is {ours}." if ours else did_you_mean(name, known)
            raise UserError(f"{what}'{name}' is unknown.{hint}")


def numbers_of(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yields the names and values of the numbers in a setting, also of those in `sampler_options`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers_of(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers_of(name, inner)
    elif isinstance(value, float | np.floating):
        yield name, float(value)


# The largest `images_per_prompt`. All requests are in memory before the first image is generated.
MOST_IMAGES = 100_000

# Settings of which a call may have one value for each prompt.
PER_PROMPT = ("negative_prompt", "seed", "image", "mask")

# What a value must be.
_WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict[str, Any]: "an object, {...}",
    tuple[float, float]: "two numbers, [low, high]",
    tuple[str, int]: "a file and a row, [file, row]",
}


def _plain(value: Any) -> Any:
    """The value with the numbers that arrays and scalars of NumPy, JAX and PyTorch hold in their place."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(_plain(inner) for inner in value)
    return value.tolist() if hasattr(value, "tolist") else value


def typed(name: str, kind: Any, value: Any) -> Any:
    """A value as the type of its field.

    Raises:
      UserError: it has another type, or text that is not Unicode. The message begins with `name`.
    """
    try:
        return _checked(kind, value)
    except TypeError:
        raise UserError(f"{name} is {short(value, quote=True)}: it must be {_WORDS[kind]}.") from None
    except UnicodeEncodeError:
        raise UserError(f"{name} is {short(value)!a}: remove the characters that are not Unicode.") from None


def _checked(kind: Any, value: Any) -> Any:
    """A value as the type of its field, or a TypeError."""
    outer = typing.get_origin(kind) or kind
    if outer is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise TypeError
        return tuple(_checked(each, part) for each, part in zip(inner, value))
    accepted = (int, float) if kind is float else outer
    # JSON's true is no number, although Python's is.
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    if kind is str:
        value.encode()  # JSON can have half of a surrogate pair, and a command line bytes that are not UTF-8
    return value


def read_requests(
    source: str, defaults: Mapping[str, Any] | None = None, images_per_prompt: int = 1
) -> list[list[Request]]:
    """Reads prompts.

    Args:
      source: a prompt, or a file of prompts; see `data.prompts.read_prompts`. The fields are those of
        `Request` and 'images_per_prompt'. Paths in a file are relative to it.
      defaults: values of the fields that a request does not set.
      images_per_prompt: number of requests to make of each prompt, with consecutive seeds.

    Returns:
      The requests of each prompt.

    Raises:
      UserError: no prompt, a file that does not exist or cannot be read, or an invalid line, with its number.
    """
    defaults, path, out = dict(defaults or {}), Path(source), []
    kinds = field_kinds(Request) | {"images_per_prompt": int}
    for where, values in read_prompts(source, kinds):
        count = values.pop("images_per_prompt", images_per_prompt)
        if type(count) is not int or not 1 <= count <= MOST_IMAGES:
            raise UserError(
                f"{where}images_per_prompt is {short(count, quote=True)}: it must be a whole number from 1 "
                f"to {MOST_IMAGES}."
            )
        for name in ("image", "mask"):
            if isinstance(values.get(name), str):
                values[name] = _beside(path, values[name], f"{where}{name}")
        for name in ("embeddings", "latents"):
            match values.get(name):
                case [str(file), row]:
                    values[name] = [_beside(path, file, f"{where}{name}"), row]
        # A line that sets height or width must not inherit aspect_ratio, and vice versa.
        sides = ("height", "width") if "aspect_ratio" in values else ()
        ratio = ("aspect_ratio",) if {"height", "width"} & set(values) else ()
        kept = {name: value for name, value in defaults.items() if name not in (*sides, *ratio)}
        out.append(with_consecutive_seeds(Request.from_dict({**kept, **values}, where), count))
    return out


def _beside(file: Path, path: str, name: str) -> str:
    """A path in a file of prompts, which is relative to that file."""
    check_path(name, path)
    if is_hub(path):
        check_paths(name, path)
        return str(local(path, everything=True))
    return str(file.parent / expand_user(path))


def check_path(name: str, path: str) -> None:
    """Raises a `UserError` for text that cannot be a path."""
    if "\0" in typed(name, str, path):
        raise UserError(f"{name} is {short(path, quote=True)}: a path has no NUL character, remove it.")


def with_consecutive_seeds(request: Request, count: int) -> list[Request]:
    """The requests of the images of a prompt: image k has the request's seed + k."""
    return [dataclasses.replace(request, seed=request.seed + k) for k in range(count)]
