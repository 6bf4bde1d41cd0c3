import errno
import os
import subprocess
import sys

import pytest
from absl import flags
from tqdm import tqdm

from pixart_jax.data.images import Refused
from pixart_jax.errors import (
    EXIT_STORAGE,
    LONGEST_VALUE,
    OutputError,
    RunStopped,
    UserError,
    _parse,
    at_least,
    did_you_mean,
    in_utf8,
    one_of,
    report,
    run_command,
    short,
    with_short_values,
    writing,
)


def test_did_you_mean():
    assert did_you_mean("optimizr", ["optimizer", "data"]) == " Did you mean 'optimizer'?"
    assert did_you_mean("zzz", ["optimizer"]) == ""


def test_checks_of_a_value():
    one_of("codec", "vae", iter(["pixels", "vae"]))
    at_least("steps", 1, 1)
    with pytest.raises(UserError, match="steps is nan"):
        at_least("steps", float("nan"), 1)
    with pytest.raises(UserError) as error:
        one_of("codec", "vea", iter(["pixels", "vae"]))
    assert str(error.value) == "codec is 'vea': choose one of pixels, vae. Did you mean 'vae'?"
    with pytest.raises(UserError) as error:
        one_of("codec", None, ["pixels"])
    assert str(error.value) == "codec is 'None': choose one of pixels."
    with pytest.raises(UserError) as error:
        at_least("steps", 0, 1)
    assert str(error.value) == "steps is 0: it must be at least 1."
    in_utf8("--name", "é", "")
    with pytest.raises(UserError) as error:
        in_utf8("--name", "a\udcff", "give text in UTF-8")
    assert str(error.value) == r"--name is 'a\udcff', which is not UTF-8: give text in UTF-8."


@pytest.mark.parametrize(
    ("outcome", "status", "printed"),
    [
        (None, 0, ""),
        (UserError("the value\n is wrong"), 2, "error: the value is wrong\n"),
        (flags.Error("no such flag"), 2, "error: no such flag\n"),
        (
            OutputError("x", OSError(errno.ENOSPC, "")),
            74,
            "error: 'x' cannot be written (No space left on device): "
            "free space there, then run the same command again.\n",
        ),
        (RunStopped("the loss diverged", 65), 65, "stopped: the loss diverged\n"),
    ],
)
def test_input_errors_are_one_line(monkeypatch, capsys, outcome, status, printed):
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(_):
        if outcome:
            raise outcome

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == status
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EDQUOT, "no"), "'x' cannot be written (Disk quota exceeded): free space there"),
        (PermissionError(errno.EACCES, "no"), "(Permission denied): make its folder writable, or choose"),
        (OSError(errno.EROFS, "no"), "(Read-only file system): make its folder writable, or choose"),
        (OSError(errno.EIO, "no"), "(Input/output error): check the disk, or choose another path."),
        (OSError("encoder error -2\nmore"), "(encoder error -2): check the disk"),
        (
            RuntimeError("write() failed: No space left on device; writing x"),
            "(No space left on device): free",
        ),
        (OSError(), "(OSError): check the disk"),
    ],
)
def test_what_cannot_be_written_has_a_reason_and_a_fix(error, message):
    with pytest.raises(OutputError) as caught, writing("x", RuntimeError):
        raise error
    assert message in str(caught.value) and caught.value.status == EXIT_STORAGE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [UserError("the input is wrong"), RunStopped("x", 65), ValueError("x"), KeyError()]
)
def test_only_errors_of_writing_are_translated(error):
    with pytest.raises(type(error)) as caught, writing("x", RuntimeError, RunStopped), writing("y"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("to", ["/dev/full", "closed pipe"])
def test_a_full_disk_under_standard_output_is_one_line(to):
    program = """
import sys
from pixart_jax.errors import run_command
sys.argv = ["command"]
run_command(lambda _: print("a result"))
"""
    if to == "/dev/full":
        reason, out = "No space left on device", os.open(to, os.O_WRONLY)
    else:
        reason, (read, out) = "Broken pipe", os.pipe()
        os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(out)
    assert done.returncode == EXIT_STORAGE
    assert done.stderr.startswith(f"error: 'standard output' cannot be written ({reason}): ")
    assert done.stderr.count("\n") == 1


def interrupted(program):
    """Runs code that interrupts its process. Returns the exit status, and what it prints as an error."""
    program = f"import os, signal, sys, threading, time\nfrom pixart_jax.errors import run_command\n{program}"
    # The shell in which the tests run may ignore Ctrl-C, and processes inherit this.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_an_interrupt_that_python_drops_is_repeated():
    """Python prints exceptions in `__del__` and in callbacks for garbage collection, and goes on."""
    program = """
class Interrupted:
    def __del__(self):
        raise KeyboardInterrupt

def main(_):
    Interrupted()
    time.sleep(30)

run_command(main)
"""
    assert interrupted(program) == (130, "interrupted: the same command continues\n")


def test_an_interrupt_ends_the_command_at_once():
    """Python would wait for threads, and could crash when it frees what JAX was tracing."""
    program = """
class Traced:
    def __del__(self):
        os.abort()

def main(_):
    threading.Thread(target=time.sleep, args=[100]).start()
    traced = Traced()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(100)

run_command(main)
"""
    assert interrupted(program) == (130, "interrupted: the same command continues\n")


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        run_command(lambda _: 1 / 0)


def test_flags_are_read_with_dashes_too(monkeypatch):
    values = flags.FlagValues()
    from_image = flags.DEFINE_string("from_image", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    for argument in ("--from-image=a-b.png", "--from_image=a-b.png"):
        _parse(["command", argument])
        assert from_image.value == "a-b.png"
    with pytest.raises(UserError, match="from-imag"):
        _parse(["command", "--from-imag=x"])


def test_warnings_of_libraries_in_normal_runs_are_not_printed():
    program = """
import logging, sys
from absl import logging as absl_logging
from pixart_jax.errors import run_command
def main(_):
    absl_logging.warning("Metadata file does not exist: %s", "x/_CHECKPOINT_METADATA")
    absl_logging.warning("Unable to find the step %d for deletion or renaming, err=%s", 3, "x")
    logging.getLogger("transformers").warning("PyTorch was not found. Models won't be available.")
    absl_logging.warning("a warning that matters")
sys.argv = ["command"]
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1 and "a warning that matters" in done.stderr


def test_orbax_does_not_print_the_exceptions_that_it_raises(tmp_path):
    """If one of the threads and tasks that write a checkpoint fails, all of them print tracebacks."""
    program = """
import logging, resource, sys
import numpy as np, orbax.checkpoint as ocp
from pixart_jax.errors import run_command, writing
def main(_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    arrays = {str(i): np.random.default_rng(i).normal(size=3000) for i in range(20)}
    try:
        raise ValueError("not of a checkpoint")
    except ValueError:
        logging.getLogger("absl").exception("a bug of ours")
    with writing("out", Exception), ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(sys.argv[1], args=ocp.args.StandardSave(arrays))
        writer.wait_until_finished()
sys.argv = ["command", sys.argv[1]]
run_command(lambda _: main(_))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "c")], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == EXIT_STORAGE, done.stderr
    line = (
        "error: 'out' cannot be written (File too large): free space there, then run the same command again."
    )
    assert done.stderr.splitlines()[-1] == line
    # The traceback of the bug may also show the line of the program.
    assert done.stderr.count("Traceback") == done.stderr.count("\nValueError: not of a") == 1, done.stderr


LONG = "/9j/" * 1000
SPACED = "it's a long caption, " * 40


def test_a_message_does_not_repeat_a_long_value(capsys):
    for message in (
        f"field 'image' is '{LONG}', must be a path",
        f'"{SPACED}" is not a number',
        f"--x={LONG}: no",
    ):
        for error in (UserError(message), Refused("broken", message)):
            # The message keeps its words, and the value its two ends and its length.
            text = str(error)
            assert len(text) < len(message.replace(LONG, "").replace(SPACED, "")) + LONGEST_VALUE + 20
            assert "characters)" in text and text.split("'")[0].split('"')[0][:5] in str(error)
        report(message)
        assert len(capsys.readouterr().err) < 300
    for value in ([1.5] * 500, dict.fromkeys(range(500), 0), [[1, {"a": [2]}]] * 100):
        assert len(with_short_values(f"layers is {value!r}: it must be a number")) < 250
    assert len(short([1.5] * 1000)) == len(short("x" * 1000)) == LONGEST_VALUE
    assert short("x" * LONGEST_VALUE) == "x" * LONGEST_VALUE
    assert short(f"{'a' * 500}.png").endswith(".png (504 characters)")
    with pytest.raises(UserError) as error:
        one_of("codec", SPACED, ["pixels"])
    assert len(str(error.value)) < 260


@pytest.mark.parametrize(
    "message",
    [
        "'a.jsonl': no object has the field 'path' (fields: image, prompt); set path_field.",
        f"it's 'x' {'and more words ' * 30} 'y', isn't it?",
        "",
    ],
)
def test_other_messages_are_not_changed(message):
    assert with_short_values(message) == str(UserError(message)) == message


@pytest.mark.parametrize("arguments", [[f"--prompts={SPACED}"], ["--prompts", SPACED]])
def test_a_long_value_of_a_flag_is_not_repeated(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])

    def main(_):
        raise flags.Error(f"flag --prompts={SPACED}: is wrong")

    monkeypatch.setattr("pixart_jax.errors._parse", lambda argv, more_help: argv)
    with pytest.raises(SystemExit):
        run_command(main)
    assert len(capsys.readouterr().err) < 260


def test_a_path_that_is_too_long_is_one_line(monkeypatch, capsys, tmp_path):
    """`pathlib` raises an error for such a name, even if it is only asked whether the file exists."""
    monkeypatch.setattr("pixart_jax.errors._parse", lambda argv, more_help: argv)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda _: (tmp_path / SPACED).stat())
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "too long for a file or folder: shorten it." in said and len(said) < 300 and said.count("\n") == 1


def test_a_message_does_not_continue_the_line_of_a_progress_bar(capsys):
    with tqdm(total=10) as bar:
        bar.update(3)
        bar.refresh()
        report("stopped: at step 3")
    assert "stopped: at step 3" in capsys.readouterr().err.splitlines()


def test_a_file_cannot_give_commands_to_the_terminal(capsys):
    name = "red\x1b[31m, back\u202ewards, half \ud83d, a bell\x07, 猫 é"
    escaped = r"red\x1b[31m, back\u202ewards, half \ud83d, a bell\x07, 猫 é"
    assert str(UserError(f"'{name}' is no image:\n  remove it.")) == f"'{escaped}' is no image:\n  remove it."
    report(f"'{name}' was skipped")
    assert capsys.readouterr().err == f"'{escaped}' was skipped\n"
