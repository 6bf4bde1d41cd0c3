"""Converts configs from and to dicts, flags, files and JSON, and lists their fields."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from pixart_jax import hub
from pixart_jax.config.sections import InitConfig
from pixart_jax.config.stage import TrainConfig, model_facts
from pixart_jax.errors import UserError, one_of, short
from pixart_jax.flags import field_kinds, load_config_file, range_words, unknown_field
from pixart_jax.models.configs import SIZES, BackboneConfig, DiTConfig, PixArtConfig

T = TypeVar("T")

MODELS = {cls.kind: cls for cls in (PixArtConfig, DiTConfig)}


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config to nested dicts of plain values. A model config also gets its class, as "kind"."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return {"kind": config.kind, **out} if isinstance(config, BackboneConfig) else out


def to_config_dict(config: TrainConfig) -> ConfigDict:
    """Converts a config to a `ConfigDict`, whose fields can be set with flags.

    Values that are computed from others are set to 0, so that they are computed again after flags are set.
    """
    values = to_dict(config)
    for name, value in model_facts(config).items():
        if values["features"][name] == value:
            values["features"][name] = 0
    if config.model.size != "custom":
        values["model"] |= dict.fromkeys(SIZES[config.model.size], 0)
    # A field without a value needs a type, so that a flag can set it.
    kinds = field_kinds(type(config.model))
    for name, value in values["model"].items():
        if value is None:
            values["model"][name] = placeholder(kinds[name])
    return ConfigDict(values)


def from_dict(values: Mapping[str, Any], cls: type[T] = TrainConfig, where: str = "") -> T:
    """Converts nested dicts to a config and checks all values. The inverse of `to_dict`.

    Args:
      values: fields by name; a missing field gets its default.
      cls: the dataclass to make.
      where: prefix of field names in messages.

    Raises:
      UserError: a field is unknown, or a value has the wrong type or is not allowed.
    """
    values = _section(values, where)
    if cls is InitConfig and "handover" in values:
        values["method"] = values.pop("handover")  # the name of the field in version 0.1
    if cls is TrainConfig and "model" in values:
        model = _section(values["model"], "model.")
        kind = model.pop("kind", "pixart")
        one_of("model.kind", kind, MODELS)
        values["model"] = from_dict(model, MODELS[kind], "model.")
    hints, kinds = typing.get_type_hints(cls), field_kinds(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    for name, value in values.items():
        if name not in fields:
            known = dict.fromkeys([*(f"{where}{field}" for field in fields), *all_fields()])
            raise UserError(unknown_field(f"{where}{name}", known))
        hint = hints[name]
        if dataclasses.is_dataclass(value):
            continue
        if dataclasses.is_dataclass(hint):
            values[name] = from_dict(value, hint, f"{where}{name}.")
        elif hint is float and type(value) is int and abs(value) <= sys.float_info.max:
            values[name] = float(value)
        elif type(value) not in (typing.get_args(hint) or (hint,)):
            raise UserError(
                f"config field '{where}{name}' is {value!r}: it must be of type {kinds[name].__name__}."
            )
    return cls(**values)


def _section(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        name = where.removesuffix(".") or "config"
        raise UserError(f"config section '{name}' is {short(values)}: it must have fields.")
    return dict(values)


def from_config_dict(config: ConfigDict) -> TrainConfig:
    """Converts the config of a config file, after flags have changed it, and checks all values."""
    return from_dict(config.to_dict())


def from_file(spec: str) -> TrainConfig:
    """Loads a config file.

    Args:
      spec: the path or name of a config, with its argument if it has one; see `flags.load_config_file`.

    Raises:
      UserError: the file does not exist, or the config is not valid.
    """
    return from_config_dict(load_config_file(spec))


def to_json(config: TrainConfig) -> str:
    """Converts a config to JSON with sorted keys, so that equal configs have the same text and hash."""
    return json.dumps(to_dict(config), indent=1, sort_keys=True)


# --- All fields


class FieldInfo(typing.NamedTuple):
    """A field of a config: the dataclass that has it, its type and its declaration."""

    section: type
    kind: type
    field: dataclasses.Field


def all_fields(cls: type = TrainConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Returns all fields of a config, with those of every model, by name: "optimizer.learning_rate"."""
    out: dict[str, FieldInfo] = {}
    for field in dataclasses.fields(cls):
        kind, name = field_kinds(cls)[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            for each in (kind, *MODELS.values()) if kind is BackboneConfig else (kind,):
                for inner, info in all_fields(each, f"{name}.").items():
                    out.setdefault(inner, info)
        else:
            out[name] = FieldInfo(cls, kind, field)
    return out


def with_pinned_paths(
    config: TrainConfig, before: Mapping[str, Any] | None = None, unread: tuple[str, ...] = ()
) -> TrainConfig:
    """The config with the commits of all paths of the hub, so that it always names the same files.

    Args:
      config: as the user gives it.
      before: the config, or the part of it, that earlier work stored. Its commits are used for paths without
        a revision, so that the same command continues with the same files.
      unread: beginnings of the names of fields whose files are not read. They stay as they are, because
        finding their commits may need a network.

    Raises:
      UserError: see `hub.local`.
    """
    values = to_dict(config)
    for name, info in all_fields().items():
        *sections, field = name.split(".")
        place, then = values, before or {}
        for section in sections:
            place = place.get(section, {})
            then = then.get(section, {}) if isinstance(then, Mapping) else {}
        text = place.get(field)
        if info.field.metadata["path"] and text and hub.PREFIX in text and not name.startswith(unread):
            then = then.get(field) if isinstance(then, Mapping) else None
            place[field] = hub.pinned(text, then if isinstance(then, str) else "")
    return config if values == to_dict(config) else from_dict(values)


def describe_fields() -> str:
    """Returns the text of `train --help` about the config: every field with its type, default and meaning."""
    lines = [
        "Fields of the config. Each is set with --config.NAME=VALUE. The config file gives other defaults.",
    ]
    section = None
    for name, (cls, kind, field) in all_fields().items():
        if cls is not section and cls is not TrainConfig:
            lines += ["", f"{name.rpartition('.')[0]}: {cls.__doc__.splitlines()[0]}"]
        section = cls
        default = repr(field.default) if kind is str else field.default
        limits = range_words(field.metadata)
        about = f"{kind.__name__}, default {default}" + (f", {limits}" if limits else "")
        lines += [f"  --config.{name} ({about})"]
        lines += textwrap.wrap(field.metadata["help"], 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
