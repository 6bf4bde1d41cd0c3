import dataclasses
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags
from command_line import outside, parse
from ml_collections import ConfigDict

from pixart_jax.config import TrainConfig
from pixart_jax.errors import EXIT_INTERRUPTED, UserError, run_command
from pixart_jax.flags import (
    CommandFlags,
    define,
    expand_user,
    field_kinds,
    flag,
    read,
    values_for,
    whole_number,
)

ROOT = Path(__file__).parents[1]
COMMANDS = ("benchmark", "caption", "convert", "evaluate", "precompute", "sample", "train")


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
        ("--workers=0", "--workers is 0: it must be at least 1"),
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
    with pytest.raises((absl_flags.Error, UserError), match=message):
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


def flags_of(name):
    """The class of the flags of a command; the kind and the field of each flag, by name."""
    cls = importlib.import_module(f"pixart_jax.{name}").Flags
    kinds = field_kinds(cls)
    fields = (field for field in dataclasses.fields(cls) if "help" in field.metadata)
    return cls, {field.name: (kinds[field.name], field) for field in fields}


# Flags for which 0 has a meaning. All other numbers must be above 0.
ZERO = {
    *(
        "guidance_interval",
        "guidance_rescale",
        "guidance_scale",
        "max_crop",
        "max_refused_share",
        "min_bucket",
    ),
    *("crop_seed", "min_size", "port", "price", "process_id", "seed", "tile", "valid_above"),
    "validation_share",
}


# Flags whose upper bound is that of their type, 2^31 - 1, and why no smaller one is needed.
UNLIMITED = {
    "guidance_scale": "an image that is not finite is an error",
    **dict.fromkeys(("min_bucket", "samples", "step", "valid_above"), "only compared with counts"),
    **dict.fromkeys(("num_processes", "process_id"), "JAX compares them with the processes that exist"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_nonsense_values_of_every_number_are_rejected(name):
    cls, declared = flags_of(name)
    for flag_name, (kind, field) in declared.items():
        if kind not in (int, float, tuple[float, float]):
            continue
        limits = field.metadata
        assert limits["minimum"] is not None or limits["above"] is not None, flag_name
        limited = limits["maximum"] is not None or limits["below"] is not None
        assert limited != (flag_name in UNLIMITED), flag_name
        if flag_name in ZERO:
            parse(cls, f"--{flag_name}=0" + (",0" if kind == tuple[float, float] else ""))
        numbers = outside(field, int if kind is int else float)
        for number in numbers if flag_name in ZERO else [0, *numbers]:
            argument = f"--{flag_name}={number}" + (f",{number}" if kind == tuple[float, float] else "")
            with pytest.raises((absl_flags.Error, UserError), match=f"--{flag_name}") as raised:
                parse(cls, argument)
            assert "\n" not in str(raised.value), argument


def test_text_is_unicode_and_paths_may_have_any_bytes():
    cls, _ = flags_of("evaluate")
    assert parse(cls, "--out=a\udcff").out == "a\udcff"
    with pytest.raises(UserError, match=r"--name is 'a.*', which is not UTF-8: give text in UTF-8\."):
        parse(cls, "--name=a\udcff")
    with pytest.raises(UserError, match=r"name is .* is not UTF-8"):
        dataclasses.replace(TrainConfig(), name="a\udcff")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("1", 1), (7, 7), ("007", 7), ("10", 10)],
        *((text, None) for text in ("0", "11", "-1", "1.0", "", " 1", "x", "1_0", "9" * 5000, None)),
    ],
)
def test_whole_numbers(text, number):
    assert whole_number(text, 1, 10) == number


# Flags that hold text other than a choice or a path.
TEXT = {
    *("aspect_ratio", "caption_fields", "coordinator", "device", "dtype", "hardware", "host", "instruction"),
    *("name", "negative_prompt", "sampler", "shard", "source", "split", "tagger", "topology"),
    *("allow_host", "auth", "caption", "push", "widths"),  # the path in `auth` is not at its beginning
}


@pytest.mark.parametrize("name", COMMANDS)
def test_home_directories_are_expanded_in_every_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    cls, declared = flags_of(name)
    for flag_name, (kind, field) in declared.items():
        if kind not in (str, tuple[str, ...]) or field.metadata["choices"] or flag_name in TEXT:
            continue
        value = getattr(parse(cls, f"--{flag_name}=~/a"), flag_name)
        assert value == ("/home/someone/a" if kind is str else ("/home/someone/a",)), flag_name


def test_expand_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for text, expected in {
        "~": "/home/someone",
        "~/a,b,~/c": "/home/someone/a,b,/home/someone/c",
        "image_root=~/a": "image_root=/home/someone/a",
        "a~b/~": "a~b/~",
        "gs://bucket/~/a": "gs://bucket/~/a",
        "~no such user~": "~no such user~",
        "a cat, ~5 years old": "a cat, ~5 years old",
    }.items():
        assert expand_user(text) == expected


def test_train_help_lists_the_fields_of_the_config():
    command = [sys.executable, "-m", "pixart_jax.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--workdir:" in done.stdout
    assert "--config.optimizer.learning_rate (float, default 2e-05, above 0)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/nope.py"], "config file 'configs/nope.py' does not exist"),
        (["--config=configs/stage3"], "Did you mean 'configs/stage3.py'"),
        (["--config="], "config file '' does not exist"),
        (["--config=configs"], "does not exist"),
        (["--config", "a long name, " * 50 + "/x.py"], "(655 characters)' does not exist: give a file"),
        (["--config=configs/stage2.py:512"], "get_config takes no '512'"),
        (
            ["--config=configs/stage2.py", "--config.optimizer.lr=1"],
            "'optimizer.lr' is unknown. Did you mean 'optimizer.learning_rate'",
        ),
        (["--config=configs/stage2.py", "--config.optimizr.eps=1"], "Did you mean 'optimizer.eps'"),
        (["--config=configs/stage2.py", "--config.steps.x=1"], "'steps.x' is unknown"),
        (["--config=configs/stage2.py", "--noconfig.features.txt"], "Did you mean 'features.text'"),
        (["--config.optimizer.lr=1"], "--config.optimizer.lr needs --config=FILE before it"),
        (["--config.steps=1", "--config=configs/stage2.py"], "before a value for --config was specified"),
        ([], "--config is missing"),
    ],
)
def test_a_wrong_config_is_an_error_of_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    train, values = importlib.import_module("pixart_jax.train"), absl_flags.FlagValues()
    define(train.Flags, values)
    monkeypatch.setattr(absl_flags, "FLAGS", values)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda argv: train.main(read(train.Flags, argv, values)))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_interrupting_a_command_prints_one_line(tmp_path):
    # Compiling the text encoder, and encoding single images, takes so long that the signal arrives in time.
    arguments = ["--config=configs/digits.py:stage2", "--images=digits", f"--out={tmp_path / 'out'}"]
    # A shell that starts the tests in the background lets them, and the processes they start, ignore Ctrl-C.
    program = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "runpy.run_module('pixart_jax.precompute', run_name='__main__', alter_sys=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--image_batch=1"],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The line arrives although it goes to a pipe: commands print line by line.
    assert "samples" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED
    assert errors.endswith("interrupted: the same command continues\n") and "Traceback" not in errors


def test_distributed_precompute_on_one_machine_is_an_error_of_one_line(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    arguments = ["--config=configs/digits.py:stage1", "--images=digits", "--out=unused", "--distributed"]
    done = subprocess.run(
        [sys.executable, "-m", "pixart_jax.precompute", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(lines) == 1 and "--distributed" in lines[0] and "--shard=I/N" in lines[0]
