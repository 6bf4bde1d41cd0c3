"""The form of the web page: which controls it has, and how their values become a request and back.

The controls follow from the fields of `Settings`, the options of the samplers and the adapters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.errors import UserError, short
from pixart_jax.flags import field_kinds
from pixart_jax.pipeline.generation import options_of
from pixart_jax.pipeline.page.uploads import Uploads
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import SAMPLING, Request, typed

# Maximum number of images for one click.
MAX_IMAGES = 16
# Maximum number of characters of a text. The text encoder reads about the first thousand.
MAX_TEXT = 4000
# Range of the sliders of adapters; it is extended to the weights that the command gives.
WEIGHTS = (-2.0, 2.0)
# Aspect ratios that the page offers.
RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")

ADAPTERS = "Adapters"
_COUNT = "count"
# The two numbers of a setting that is an interval.
_ENDS = ("lowest", "highest")


@dataclasses.dataclass(frozen=True)
class Control:
    """A control of the page.

    Attributes:
      name: the setting; followed by ".lowest" or ".highest" for a number of an interval, and by the sampler
        and its option for `sampler_options`.
      label: the text beside it.
      kind: type of its value: str, int, float or bool.
      value: the initial value; None if the control is empty, which means the default.
      group: heading above it; "" for a control that is always shown.
      help: explanation.
      choices: the only values, for text.
      bounds: smallest and largest value, for numbers; None for no bound.
      hint: the default, shown while the control is empty.
      sampler: the only sampler that has it; None for all.
      is_file: whether its value is an upload.
    """

    name: str
    label: str
    kind: Any
    value: Any
    group: str = ""
    help: str = ""
    choices: tuple[str, ...] | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    hint: str = ""
    sampler: str | None = None
    is_file: bool = False

    def checked(self, value: Any) -> Any:
        """The value as this control allows it, of the type `kind`; None for the default.

        Args:
          value: what a page or anyone else sent.

        Raises:
          UserError: another type, a value outside the bounds, or a text that is too long.
        """
        name = ".".join(part for part in self.name.split(".") if part not in (*_ENDS, self.sampler))
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise UserError(
                f"{name} has {len(value):,} characters: it may have at most {MAX_TEXT:,}. Shorten it."
            )
        may_be_empty = self.value is None
        if value is None or (value == "" and (may_be_empty or self.kind is not str)):
            if not may_be_empty:
                raise UserError(f"{name} is empty: fill in the field '{self.label}'.")
            return None
        # A control that may be empty is a text field.
        if may_be_empty and self.kind in (int, float) and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        # A page may send 3.0 where the setting is 3.
        if self.kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        value = typed(name, self.kind, value)
        low, high = self.bounds
        if isinstance(value, int | float) and high is not None and not low <= value <= high:
            raise UserError(f"{name} is {short(value)}: it must be between {low} and {high}.")
        return value


class Asked(NamedTuple):
    """What a visitor asks for."""

    request: Request
    count: int
    # Weight of each adapter, by its path.
    weights: dict[str, float]


class Form:
    """The controls of a page.

    Attributes:
      controls: by name, in the order of the page.
      ratios: width and height in pixels of each aspect ratio that the model can generate.
    """

    def __init__(self, pipe: Pipeline):
        """Makes the controls for a pipeline; their values are its defaults."""
        self._defaults, _ = pipe.resolve(Request(""))
        adapters = getattr(pipe, "adapters", None)
        self._adapters = dict(adapters.weights) if adapters else {}
        self.controls = {each.name: each for each in self._make_controls()}
        self.ratios: dict[str, tuple[int, int]] = {}
        for ratio in RATIOS:
            size = self.size_of(pipe, ratio)
            if size and size not in self.ratios.values():
                self.ratios[ratio] = size

    @staticmethod
    def size_of(pipe: Pipeline, ratio: str) -> tuple[int, int] | None:
        """Width and height in pixels of an aspect ratio, WIDTH:HEIGHT; None if the model has no such size."""
        try:
            _, size = pipe.resolve(Request("", aspect_ratio=ratio))
        except UserError:
            return None
        return size.out_width, size.out_height

    def _make_controls(self) -> Iterator[Control]:
        kinds = field_kinds(Request)
        for field in dataclasses.fields(Request):
            # An aspect ratio fills in the width and the height.
            if not field.metadata.get("label") or field.name == "aspect_ratio":
                continue
            if field.name == "sampler_options":
                yield from self._sampler_options()
                continue
            common = {
                "label": field.metadata["label"],
                "group": field.metadata.get("group", ""),
                "help": field.metadata.get("help", ""),
                "choices": field.metadata.get("choices"),
                "bounds": field.metadata.get("bounds", (None, None)),
                "is_file": field.metadata.get("path", False),
            }
            yield from _controls(field.name, kinds[field.name], getattr(self._defaults, field.name), **common)
        yield Control(_COUNT, "Images", int, 1, bounds=(1, MAX_IMAGES))
        for number, (path, weight) in enumerate(self._adapters.items()):
            bounds = min(weight, WEIGHTS[0]), max(weight, WEIGHTS[1])
            label = f"Weight of {Path(path).name}"
            yield Control(f"adapter.{number}", label, float, float(weight), ADAPTERS, bounds=bounds)

    def _sampler_options(self) -> Iterator[Control]:
        for sampler in SAMPLERS:
            for name, (kind, default) in self._options(sampler).items():
                label = name.replace("_", " ").capitalize()
                common = {"label": label, "group": SAMPLING, "sampler": sampler, "hint": default}
                yield from _controls(f"sampler_options.{sampler}.{name}", kind, None, **common)

    def _options(self, sampler: str) -> dict[str, tuple[Any, Any]]:
        """Type and default of each option of a sampler."""
        own = self._defaults.sampler_options if sampler == self._defaults.sampler else {}
        return {
            name: (option.kind, (own or {}).get(name, option.default))
            for name, option in options_of(sampler).items()
        }

    def read(self, values: Mapping[str, Any], uploads: Uploads) -> Asked:
        """What the values of the controls ask for.

        Args:
          values: by the name of the control, of any type, as a page or anyone else sent them. That of a mask
            is the text of the brush.
          uploads: the images that they may name.

        Raises:
          UserError: a value that its control does not allow; an empty prompt; an image that is not an upload.
        """
        checked = {
            name: control.checked(values.get(name))
            for name, control in self.controls.items()
            if not control.is_file and (control.sampler in (None, values.get("sampler")))
        }
        count = checked.pop(_COUNT)
        weights = {path: checked.pop(f"adapter.{number}") for number, path in enumerate(self._adapters)}
        fields = self._fields(checked, uploads, values)
        request = Request.from_dict(fields)
        if not request.prompt.strip():
            raise UserError("The prompt is empty: type one.")
        return Asked(request, count, weights)

    def _fields(
        self, checked: Mapping[str, Any], uploads: Uploads, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The fields of the request."""
        fields: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for name, value in _with_intervals(checked).items():
            setting, _, option = name.partition(".")
            if value is None:
                continue
            if option:
                options[option.partition(".")[2]] = value
            else:
                fields[setting] = value
        if options:
            defaults = self._defaults
            own = defaults.sampler_options if fields["sampler"] == defaults.sampler else None
            fields["sampler_options"] = {**(own or {}), **options}
        image = values.get("image")
        if image in (None, ""):
            fields.pop("strength", None)
            return fields
        uploads.require(typed("image", str, image))
        drawn = mask_of(values.get("mask"))
        mask = uploads.add_mask(drawn, image) if drawn else None
        return fields | {"image": image} | ({"mask": mask} if mask else {})

    def values(self, record: Mapping[str, Any], uploads: Uploads) -> dict[str, Any]:
        """The values of the controls that ask for an image again: the inverse of `read`.

        Args:
          record: what the image stores (`image_files.make_record`).
          uploads: the images that it may name.

        Returns:
          A value for every control, by name. Those of images that are gone are None.
        """
        request = record["request"]
        sampler = request.get("sampler", self._defaults.sampler)
        options = {
            f"sampler_options.{sampler}.{name}": value
            for name, value in (request.get("sampler_options") or {}).items()
            if value != _as_read(self._options(sampler).get(name, (None, None))[1])
        }
        known = {**request, **options, _COUNT: 1}
        known |= {
            f"adapter.{number}": each["weight"] for number, each in enumerate(record.get("adapters", ()))
        }
        for name, value in list(known.items()):
            if isinstance(value, list) and len(value) == len(_ENDS):
                known |= {f"{name}.{end}": number for end, number in zip(_ENDS, value)}
        values = {name: known.get(name, control.value) for name, control in self.controls.items()}
        image = values.get("image")
        values["image"] = image if image and uploads.find(image) else None
        values["mask"] = uploads.mask_url(values["mask"]) if values["image"] and values["mask"] else ""
        return values


def mask_of(brush: Any) -> str:
    """The mask in the value of the brush, which is JSON; "" if nothing is drawn.

    Raises:
      UserError: another value.
    """
    if brush in (None, ""):
        return ""
    try:
        mask = json.loads(brush)["mask"] if isinstance(brush, str) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        mask = None
    if not isinstance(mask, str):
        raise UserError("The mask is damaged: clear it, and draw it again.")
    return mask


def _controls(name: str, kind: Any, value: Any, hint: Any = None, **common: Any) -> Iterator[Control]:
    """The control of a setting, or the two of an interval."""
    if kind == tuple[float, float]:
        label = common.pop("label")
        values, hints = (pair or (None, None) for pair in (value, hint))
        for end, one, default in zip(_ENDS, values, hints):
            text = "" if default is None else str(default)
            title = f"{end.capitalize()} {label[:1].lower()}{label[1:]}"
            yield Control(f"{name}.{end}", title, float, one, hint=text, **common)
        return
    yield Control(name, kind=kind, value=value, hint="" if hint is None else str(hint), **common)


def _with_intervals(checked: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the two numbers of each interval together, None if both are empty.

    Raises:
      UserError: only one of them is empty.
    """
    joined: dict[str, Any] = {}
    for name, value in checked.items():
        setting, _, end = name.rpartition(".")
        if end not in _ENDS:
            joined[name] = value
            continue
        joined.setdefault(setting, []).append(value)
    for name, value in joined.items():
        if isinstance(value, list):
            if None not in value:
                continue
            if any(number is not None for number in value):
                raise UserError(f"{name} has only one of its two numbers: fill in both, or none.")
            joined[name] = None
    return joined


def _as_read(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
