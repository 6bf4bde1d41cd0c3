"""Fields of dataclasses that are set on the command line: the flags of a command and the fields of a config.

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

The fields of a config are made with `flag` too. Each is set with --config.SECTION.FIELD=VALUE. Whoever
declares a field declares its allowed values, and `check_fields` checks them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from pixart_jax import hub
from pixart_jax.errors import UserError, did_you_mean, finite, in_utf8, one_of, run_command
from pixart_jax.readers import parse_json

T = typing.TypeVar("T")

# What a path is for, see `flag`.
PATHS = (False, True, "images", "weights", "text", "output", "local")

# The largest values of fields that declare none: those of int32 and float32, in which devices compute.
LARGEST = {int: 2**31 - 1, float: 3.4028234e38}
# Devices treat positive numbers below this one, which float32 cannot represent in full precision, as 0.
SMALLEST = 1.1754944e-38
# Seeds are 32-bit numbers.
LARGEST_SEED = 2**32 - 1

# `--help` lists the flags of the command's module. Without this line, absl would count all flags as this
# module's.
flags.disclaim_key_flags()


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    also: float | None = None,
    path: bool | str = False,
    **metadata: Any,
) -> Any:
    """Returns a dataclass field that is set on the command line and parsed as its annotation says.

    Args:
      default: the value if the flag is not given.
      help: the description that `--help` prints.
      choices: all allowed values, for text.
      minimum, maximum: the smallest and the largest allowed value, for numbers. A number never exceeds
        `LARGEST`, is never NaN, and never lies between 0 and `SMALLEST`.
      above, below: likewise, but this value itself is not allowed.
      also: an allowed value outside this range.
      path: whether the text names files or folders, in which `~` stands for the home directory. Several are
        separated by commas; in NAME=PATH, the path starts after the equals sign. What it is for decides what
        a path of the hub means (`hub/paths.py`):
          True       data to read: `fetched` downloads all of it
          'images'   the same, and a list of images brings its folder
          'weights'  weights to read: `fetched` only looks up the commit; what opens them downloads what it
                     needs of them
          'text'     a text, or the path of a file to read
          'output'   to write, which must be on this machine
          'local'    to read, which must be on this machine, as of a program
      metadata: further metadata of the field.
    """
    assert path in PATHS, path
    known = {"help": help, "choices": choices, "also": also, "path": path}
    known |= {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=known | metadata)


def whole_number(text: object, least: int, most: int) -> int | None:
    """Parses a whole number in decimal digits; None if it is not one, or not in [least, most]."""
    digits = str(text)
    # Python converts no text of more than 4,300 digits.
    number = int(digits) if digits.isdecimal() and len(digits) < 20 else -1
    return number if least <= number <= most else None


def check_fields(values: Any, prefix: str) -> None:
    """Checks all fields of a dataclass that are made with `flag`, and replaces `~` in those that are paths.

    Args:
      values: an instance; fields that are None are skipped.
      prefix: put before the name of a field in messages, such as "optimizer.".

    Raises:
      UserError: a value is not among the choices, is outside the range, or is not Unicode.
    """
    for name, field in _flag_fields(type(values)).items():
        value = getattr(values, name)
        if value is None:
            continue
        if field.metadata["choices"]:
            one_of(f"{prefix}{name}", value, field.metadata["choices"])
        if field.metadata["path"]:
            paths = tuple(map(expand_user, value)) if isinstance(value, tuple) else expand_user(value)
            object.__setattr__(values, name, paths)  # the dataclass is frozen
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int | float) and not isinstance(each, bool):
                _check_range(f"{prefix}{name}", each, field.metadata)
            elif isinstance(each, str) and not field.metadata["path"]:
                in_utf8(f"{prefix}{name}", each, "give text in UTF-8")
            elif isinstance(each, str):
                _check_hub(f"{prefix}{name}", each, field.metadata["path"])


def _check_hub(name: str, value: str, path: bool | str) -> None:
    if path == "text":
        return  # what is not a path of the hub is a text
    hub.check_paths(name, value, output=path == "output")
    if path == "local" and any(hub.is_hub(each) for _, each in hub.hub_parts(value)):
        raise UserError(
            f"{name} is '{value}', and a program of the hub is not run: download it, read it, and give its "
            "local path."
        )


def fetched(given: T) -> T:
    """Downloads what the flags of a command name on the hub, after all cheap checks.

    Args:
      given: the flags, or another dataclass whose fields are made with `flag`.

    Returns:
      The same, with local paths in place of data on the hub, and with the commits of weights on the hub,
      which are downloaded when they are opened.

    Raises:
      UserError, RunStopped: see `hub.local`.
    """
    changes = {}
    for name, field in _flag_fields(type(given)).items():
        value, path = getattr(given, name), field.metadata["path"]
        if value and path:
            each = [_fetched(text, path) for text in (value if isinstance(value, tuple) else (value,))]
            changes[name] = tuple(each) if isinstance(value, tuple) else each[0]
    return dataclasses.replace(given, **changes)


def _fetched(text: str, path: bool | str) -> str:
    if hub.PREFIX not in text or path in ("output", "local"):
        return text
    if path == "weights":
        return hub.pinned(text)
    if path == "text":
        return str(hub.local(text, everything=True)) if hub.names_one(text) else text
    return ",".join(
        f"{prefix}{hub.local(each, everything=True, with_folder=path == 'images')}"
        for prefix, each in hub.hub_parts(text)
    )


def _check_range(name: str, value: float, limits: Mapping[str, Any]) -> None:
    if value == limits["also"]:
        return
    if isinstance(value, float):
        finite(name, value)
    largest = LARGEST[int if isinstance(value, int) else float]
    low, above, high, below = (limits[limit] for limit in ("minimum", "above", "maximum", "below"))
    rule = range_words(limits)
    if high is None and below is None and value > largest:
        rule = f"at most {largest}"
    elif low is not None and low < 0 and 0 < abs(value) < SMALLEST:
        rule = f"0, or at least {SMALLEST} in absolute value"
    elif 0 < value < SMALLEST and above in (None, 0):
        rule = f"at least {SMALLEST}" + (", or 0" if above is None else "")
    elif (
        (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    ):
        return
    shown = str(value) if isinstance(value, float) or abs(value) < 10**20 else f"{str(value)[:20]}…"
    raise UserError(f"{name} is {shown}: it must be {rule}.")


def range_words(limits: Mapping[str, Any]) -> str:
    """Describes the range in the metadata of a field: "at least 1, or -1", "in [0, 1)"; "" for none."""
    low, above, high, below = (limits[limit] for limit in ("minimum", "above", "maximum", "below"))
    lower = f"above {above}" if above is not None else f"at least {low}" if low is not None else ""
    upper = f"below {below}" if below is not None else f"at most {high}" if high is not None else ""
    words = lower or upper
    if lower and upper:
        words = f"in {'[' if above is None else '('}{low if above is None else above}, "
        words += f"{high if below is None else below}{']' if below is None else ')'}"
    return words if limits["also"] is None else f"{words}, or {limits['also']}"


def expand_user(text: str) -> str:
    """Replaces `~` and `~USER` at the start of comma-separated paths by the home directory, as shells do."""

    def one(path: str) -> str:
        name, equals, value = path.partition("=")
        if equals and name.isidentifier():
            return f"{name}={os.path.expanduser(value)}"
        return os.path.expanduser(path)

    return ",".join(map(one, text.split(",")))


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


def run(
    main: Callable[[Any], int | None], cls: type[CommandFlags], more_help: Callable[[], str] | None = None
) -> None:
    """Defines the flags of a command, parses them, calls `main`, and exits as `run_command` does.

    Args:
      main: takes an instance of `cls` and returns the exit status; None means 0.
      cls: the class that declares the flags.
      more_help: returns the text that `--help` prints after the flags.
    """
    define(cls)
    run_command(lambda argv: main(read(cls, argv)), more_help)


def define(cls: type[CommandFlags], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines an absl flag for each field of `cls` that is made with `flag`."""
    kinds = field_kinds(cls)
    for name, field in _flag_fields(cls).items():
        default, metadata = field.default, field.metadata
        if metadata["choices"]:
            flags.DEFINE_enum(name, default, list(metadata["choices"]), metadata["help"], values)
            continue
        _DEFINE[kinds[name]](name, default, metadata["help"], flag_values=values)
        if kinds[name] is ConfigDict:
            values[name].parser = _ConfigFileParser(name)


def read(
    cls: type[CommandFlags], argv: Sequence[str], values: flags.FlagValues = flags.FLAGS
) -> CommandFlags:
    """Returns an instance of `cls` with the values of the parsed flags.

    Args:
      cls: the class that was passed to `define`.
      argv: what remains after parsing: the name of the program, and the arguments that are not flags.
      values: the flags that were passed to `define`.

    Raises:
      UserError: the value of a flag is not allowed.
    """
    given = {name: values[name].value for name in _flag_fields(cls)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    present = frozenset(name for name in given if values[name].present)
    out = cls(**given, words=tuple(argv[1:]), present=present)
    check_fields(out, "--")
    return out


def values_for(cls: type, given: Any) -> dict[str, Any]:
    """Returns the attributes of `given` that are fields of the dataclass `cls`, by name."""
    return {field.name: getattr(given, field.name) for field in dataclasses.fields(cls)}


@functools.cache
def field_kinds(cls: type) -> Mapping[str, Any]:
    """Returns the type of each field of a dataclass by name; `X` for a field annotated with `X | None`."""
    hints = typing.get_type_hints(cls)
    kinds = {field.name: _without_none(hints[field.name]) for field in dataclasses.fields(cls)}
    return types.MappingProxyType(kinds)


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
            value = parse_json(argument, lenient=True)  # whoever takes it checks its values
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError('give a JSON object, {"NAME": VALUE}.')
        return value


class _ConfigFileParser(flags.ArgumentParser):
    """Loads a config file and checks the names of the fields that other flags set."""

    syntactic_help = "a config file"

    def __init__(self, name: str):
        super().__init__()
        self._prefix = f"{name}."

    def parse(self, path: str) -> ConfigDict:
        config = load_config_file(path)
        config.lock()
        # config_flags reads them from here, too.
        for argument in sys.argv:
            name = argument.lstrip("-").partition("=")[0].removeprefix("no")
            if argument.startswith("-") and name.startswith(self._prefix):
                _check_field(name.removeprefix(self._prefix), config)
        return config


def load_config_file(spec: str) -> ConfigDict:
    """Runs `get_config` of a config file.

    Args:
      spec: the path, or the name of a config that comes with this package, such as 'stage3'; with an argument
        for `get_config` if it has one: 'configs/stage3.py:512' or 'stage3:512'.

    Raises:
      UserError: the file does not exist, raises an exception, or does not take this argument.
    """
    path, colon, argument = expand_user(spec).partition(":")
    path = _config_file(path)
    arguments = [argument] if colon else []
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"config file '{path}' has no function get_config: see configs/stage3.py.")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            hint = f"takes no '{argument}': leave it out" if colon else "needs one: give FILE:ARGUMENT"
            raise UserError(f"the argument of config file '{path}': get_config {hint}.") from None
        config = get_config(*arguments)
    except UserError:
        raise
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
        raise UserError(f"line {line} of config file '{path}': {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of config file '{path}' returns {type(config).__name__}, not a ConfigDict."
        )
    return config


def _config_file(path: str) -> str:
    """The config file that a path or the name of a config stands for."""
    if os.path.isfile(path):
        return path
    package = Path(__file__).parent
    # In a checkout, the folder of configs is beside the package.
    folders = (package / "configs", package.parent / "configs")
    ours = {file.stem: str(file) for folder in folders for file in sorted(folder.glob("*.py"))}
    if path in ours:
        return ours[path]
    file = Path(path)
    listed = file.name and os.path.isdir(file.parent)
    others = [str(other) for other in sorted(file.parent.glob("*.py"))] if listed else []
    if file.suffix == ".py" and file.stem in ours and not os.path.isdir(file.parent):
        raise UserError(
            f"config file '{path}' does not exist: for the one of this package, give '{file.stem}'."
        )
    raise UserError(
        f"config file '{path}' does not exist: give a file such as configs/stage3.py:512, or one of "
        f"{', '.join(ours)}.{did_you_mean(str(file), [*others, *ours])}"
    )


def _check_field(path: str, config: ConfigDict) -> None:
    """Raises a `UserError` unless `path` names a field of a config or a section of it."""
    place: Any = config
    for name in path.split("."):
        if not isinstance(place, ConfigDict) or name not in place:
            raise UserError(unknown_field(path, field_paths(config)))
        place = place[name]


def field_paths(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Returns the names of all fields of a config, such as "optimizer.learning_rate"."""
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from field_paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def unknown_field(path: str, known: Iterable[str]) -> str:
    """Returns the message for a config field that does not exist. It names the nearest field.

    Args:
      path: the name that was given, such as "optimizer.lr".
      known: the names of all fields.
    """
    known = list(known)
    section, _, name = path.rpartition(".")
    lower, prefix = name.lower(), f"{section}." if section else ""

    def nearness(other: str) -> float:
        if other.replace(".", "_") == path.replace(".", "_").lower():
            return 2.0
        its_section, _, its_name = other.rpartition(".")
        words = its_name.split("_")
        # "lr" and "warmup" are near "learning_rate" and "warmup_steps", which share few letters with them; so
        # is "guidance_scale" to "scale".
        short = lower in ("".join(word[:1] for word in words), *words) or its_name in lower.split("_")
        same_name = 1.0 if lower == its_name else max(0.8 * short, _ratio(lower, its_name))
        # A name that is merely similar does not count if it is in another section than the given one.
        least = 0.6 if section == its_section or section not in sections else 0.8
        return 0.0 if same_name < least else same_name + 0.5 * _ratio(section, its_section)

    sections = {other.rpartition(".")[0] for other in known} - {""}

    nearest = max(known, key=nearness, default="")
    hint = ""
    if nearest and nearness(nearest):
        hint = f" Did you mean '{nearest}'?"
    elif inside := dict.fromkeys(
        other.removeprefix(prefix).partition(".")[0] for other in known if other.startswith(prefix)
    ):
        hint = f" Fields of {section or 'the config'}: {', '.join(inside)}."
    elif section:
        hint = did_you_mean(section, sections)
    return f"config field '{path}' is unknown.{hint}"


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


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
