import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags
from command_line import parse
from ml_collections import ConfigDict

from pixart_jax.errors import UserError
from pixart_jax.flags import CommandFlags, flag, values_for

ROOT = Path(__file__).parents[1]
COMMANDS = ("benchmark", "caption", "convert", "evaluate", "precompute", "train")


@dataclasses.dataclass(frozen=True)
class Options:
    part: tuple[int, int] = (0, 1)
    workers: int = flag(8, "Number of threads.", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Options, CommandFlags):
    out: str | None = flag(None, "Folder.")
    scale: float | None = flag(None, "Number.")
    on: bool = flag(True, "Switch.")
    kind: str = flag("a", "Choice.", choices=("a", "b"))
    option: tuple[str, ...] = flag((), "Repeatable.")
    interval: tuple[float, float] | None = flag(None, "Two numbers.")
    values: dict[str, Any] | None = flag(None, "Values by name.")
    config: ConfigDict | None = flag(None, "Config file.")


def test_flags_are_parsed_as_their_annotations_say(tmp_path):
    assert parse(Flags) == Flags()
    file = tmp_path / "config.py"
    file.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'a': 1})")
    given = parse(
        Flags,
        "word",
        "--workers=3",
        "--out=x",
        "--scale=2",
        "--noon",
        "--kind=b",
        "--option=a=1",
        "--option=b",
        "--interval=1,2.5",
        '--values={"order": [3]}',
        f"--config={file}",
        "other",
    )
    present = {"workers", "out", "scale", "on", "kind", "option", "interval", "values", "config"}
    assert dataclasses.replace(given, config=None) == Flags(
        words=("word", "other"),
        present=frozenset(present),
        workers=3,
        out="x",
        scale=2.0,
        on=False,
        kind="b",
        option=("a=1", "b"),
        interval=(1.0, 2.5),
        values={"order": [3]},
    )
    assert given.config.a == 1
    # A flag is present even if it repeats the default.
    assert parse(Flags, "--kind=a").present == {"kind"}
    assert values_for(Options, given) == {"part": (0, 1), "workers": 3}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--workers=0", "--workers=0: 0 is not a positive integer"),
        ("--workers=x", "--workers=x"),
        ("--kind=c", "--kind=c: value should be one of <a|b>"),
        ("--interval=1", "--interval=1: give two numbers, LOW,HIGH"),
        ("--interval=1,x", "--interval=1,x: give two numbers"),
        ("--values={", "give a JSON object"),
        ("--values=3", "give a JSON object"),
        ("--ouf=x", "Did you mean: out"),
    ],
)
def test_input_errors_in_a_flag(argument, message):
    with pytest.raises(absl_flags.Error, match=message):
        parse(Flags, argument)


def test_input_errors_that_a_command_reports():
    given = Flags(out="", words=("statz",))
    with pytest.raises(UserError, match=r"^--out, --scale are missing: see --help\.$"):
        given.require("workers", "out", "scale")
    with pytest.raises(UserError, match=r"^--out is missing: give a folder\.$"):
        given.require("out", hint="give a folder.")
    with pytest.raises(UserError, match="argument 'statz' is not a flag"):
        given.no_words()
    with pytest.raises(UserError, match=r"mode 'statz': choose one of stats\. Did you mean 'stats'\?"):
        given.mode({"stats": 1})
    Flags().no_words()
    assert Flags(words=("stats",)).mode({"stats": 1}) == 1
    for words in ((), ("stats", "more")):
        with pytest.raises(UserError, match="choose one of stats"):
            Flags(words=words).mode({"stats": 1})


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_of_a_command(name):
    cls = importlib.import_module(f"pixart_jax.{name}").Flags
    assert values_for(cls, parse(cls)) == values_for(cls, cls())
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            assert len(field.metadata["help"]) > 8 and field.metadata["help"].endswith("."), field.name


def test_help_prints_the_docstring_and_every_flag():
    command = [sys.executable, "-m", "pixart_jax.convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    module = importlib.import_module("pixart_jax.convert")
    shown = done.stdout
    assert shown.startswith(module.__doc__.splitlines()[0])
    for field in dataclasses.fields(module.Flags):
        if "help" in field.metadata:
            assert f"--{field.name}:" in shown or f"--[no]{field.name}:" in shown
            assert " ".join(field.metadata["help"].split()) in " ".join(shown.split())
