"""The flags of a command, declared as the fields of one dataclass.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Flags(CommandFlags):
        out: str | None = flag(None, "Folder for the results.")
        steps: int = flag(20, "Model evaluations per image.", minimum=1)

    def main(given: Flags) -> None:
        given.no_words()
        given.require("out")

    if __name__ == "__main__":
        run(main, Flags)

Flags are defined when a command runs, not when its module is imported, because several commands have flags of
the same name and absl has a single set of flags per process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from pixart_jax.errors import UserError, did_you_mean, run_command

T = typing.TypeVar("T")

# `--help` lists the flags of the command's module. Without this line, absl would count all flags as this
# module's.
flags.disclaim_key_flags()


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    **metadata: Any,
) -> Any:
    """Returns a dataclass field that is a flag of the same name. Its annotation determines how it is parsed.

    Args:
      default: the value if the flag is not given.
      help: the description that `--help` prints.
      choices: all allowed values, for text.
      minimum: the smallest allowed value, for numbers.
      metadata: further metadata of the field.
    """
    known = {"help": help, "choices": choices, "minimum": minimum}
    return dataclasses.field(default=default, metadata=known | metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandFlags:
    """The command-line arguments of a command. Each command declares its flags in a subclass.

    Attributes:
      words: the arguments that are not flags.
      present: names of the flags that the user gave, including those given with their default values.
    """

    words: tuple[str, ...] = ()
    present: frozenset[str] = frozenset()

    def require(self, *names: str, hint: str = "see --help.") -> None:
        """Raises a `UserError` unless each of these flags has a value."""
        missing = [f"--{name}" for name in names if not getattr(self, name)]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise UserError(f"{', '.join(missing)} {verb} missing: {hint}")

    def no_words(self) -> None:
        """Raises a `UserError` if there are arguments that are not flags."""
        if self.words:
            raise UserError(f"argument '{self.words[0]}' is not a flag: see --help.")

    def mode(self, modes: Mapping[str, T]) -> T:
        """Returns the value in `modes` that is named by the only argument that is not a flag.

        Raises:
          UserError: there is no such argument, more than one, or an unknown one.
        """
        if len(self.words) != 1 or self.words[0] not in modes:
            word = " ".join(self.words)
            raise UserError(f"mode '{word}': choose one of {', '.join(modes)}.{did_you_mean(word, modes)}")
        return modes[self.words[0]]


def run(main: Callable[[Any], int | None], cls: type[CommandFlags]) -> None:
    """Defines the flags of a command, parses them, calls `main`, and exits as `run_command` does.

    Args:
      main: takes an instance of `cls` and returns the exit status; None means 0.
      cls: the class that declares the flags.
    """
    define(cls)
    run_command(lambda argv: main(read(cls, argv)))


def define(cls: type[CommandFlags], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines an absl flag for each field of `cls` that is made with `flag`."""
    kinds = field_kinds(cls)
    for name, field in _flag_fields(cls).items():
        default, metadata = field.default, field.metadata
        if metadata["choices"]:
            flags.DEFINE_enum(name, default, list(metadata["choices"]), metadata["help"], values)
            continue
        bound = {} if metadata["minimum"] is None else {"lower_bound": metadata["minimum"]}
        _DEFINE[kinds[name]](name, default, metadata["help"], flag_values=values, **bound)


def read(
    cls: type[CommandFlags], argv: Sequence[str], values: flags.FlagValues = flags.FLAGS
) -> CommandFlags:
    """Returns an instance of `cls` with the values of the parsed flags.

    Args:
      cls: the class that was passed to `define`.
      argv: what remains after parsing: the name of the program, and the arguments that are not flags.
      values: the flags that were passed to `define`.
    """
    given = {name: values[name].value for name in _flag_fields(cls)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    present = frozenset(name for name in given if values[name].present)
    return cls(**given, words=tuple(argv[1:]), present=present)


def values_for(cls: type, given: Any) -> dict[str, Any]:
    """Returns the attributes of `given` that are fields of the dataclass `cls`, by name."""
    return {field.name: getattr(given, field.name) for field in dataclasses.fields(cls)}


def field_kinds(cls: type) -> dict[str, Any]:
    """Returns the type of each field of a dataclass by name; `X` for a field annotated with `X | None`."""
    hints = typing.get_type_hints(cls)
    return {field.name: _without_none(hints[field.name]) for field in dataclasses.fields(cls)}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    (kind,) = (each for each in typing.get_args(hint) if each is not types.NoneType)
    return kind


def _flag_fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if "help" in field.metadata}


class _PairParser(flags.ArgumentParser):
    syntactic_help = "LOW,HIGH"

    def parse(self, argument: str) -> tuple[float, float]:
        try:
            low, high = (float(number) for number in argument.split(","))
        except ValueError:
            raise ValueError("give two numbers, LOW,HIGH.") from None
        return low, high


class _JsonParser(flags.ArgumentParser):
    syntactic_help = "a JSON object"

    def parse(self, argument: str) -> dict[str, Any]:
        try:
            value = json.loads(argument)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError('give a JSON object, {"NAME": VALUE}.')
        return value


# The function that defines a flag of each type.
_DEFINE: Mapping[Any, Callable[..., Any]] = {
    str: flags.DEFINE_string,
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    tuple[str, ...]: flags.DEFINE_multi_string,
    tuple[float, float]: functools.partial(flags.DEFINE, _PairParser()),
    dict[str, Any]: functools.partial(flags.DEFINE, _JsonParser()),
    ConfigDict: config_flags.DEFINE_config_file,
}
