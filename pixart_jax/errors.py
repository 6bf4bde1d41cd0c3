"""Errors of inputs and outputs, exit statuses, and how commands report them."""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import math
import os
import re
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags

# Exit statuses of all commands, listed in docs/architecture.md and docs/survival.md. Those from 64 to 78 have
# the meaning of sysexits.h, so that a scheduler can tell whether to restart a run.
EXIT_USAGE = 2
# The loss diverged. A restart would diverge again.
EXIT_DIVERGED = 65
# Another process of the run died or hangs, or the processes did not find each other.
EXIT_UNAVAILABLE = 69
# An output could not be written.
EXIT_STORAGE = 74
# Stopped by SIGTERM or Ctrl-C after saving a checkpoint. The same command resumes the run.
EXIT_PREEMPTED = 75
# Interrupted by Ctrl-C, as in shells (128 + SIGINT).
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """An error in the input, which the user can fix.

    The message is one line that names the value, the rule that it breaks and the fix. Commands print it
    without a traceback and exit with status 2. Long values in it are shortened (`with_short_values`).

    Attributes:
      collective: see `RunStopped`.
    """

    collective = False

    def __init__(self, message: object = ""):
        super().__init__(with_short_values(str(message)))


class RunStopped(Exception):
    """Stops a run before its last step for a reason that is not a bug in this project.

    Args:
      message: one line that explains what happened and what to do.
      status: exit status of the command.
      everywhere: whether all processes of the run stop at this step for the same reason.
      collective: whether the error comes from an operation that all processes perform together. If another
        process dies, such an operation raises the same exceptions, so the watchdog checks for a dead process
        before it reports the message.
    """

    def __init__(self, message: str, status: int, *, everywhere: bool = False, collective: bool = False):
        super().__init__(message)
        self.status = status
        self.everywhere = everywhere
        self.collective = collective


# What to do if an output cannot be written, by error number.
_PLACE = "choose another path"
_ROOM = "free space there, then run the same command again"
_RIGHTS = f"make its folder writable, or {_PLACE}"
_FIXES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EEXIST: f"a file is where a folder should be; {_PLACE}",
    errno.ENOTDIR: f"a file is where a folder should be; {_PLACE}",
    errno.EISDIR: f"a folder is where the file should be; {_PLACE}",
    errno.ENAMETOOLONG: "shorten the path or the name",
    errno.EPIPE: "the program that reads it has ended",
}


class OutputError(RunStopped):
    """An output cannot be written; the status is `EXIT_STORAGE`.

    Code that writes raises it with `writing`, so that all commands have the same message: one line that names
    the path, the reason and the fix.

    Args:
      path: the output.
      error: what the operating system or a library says.
    """

    def __init__(self, path: object, error: Exception):
        # A `ValueError` without a number is about the path.
        other = _PLACE if isinstance(error, ValueError) else f"check the disk, or {_PLACE}"
        fix = _FIXES.get(_error_number(error), other)
        super().__init__(f"'{short(path)}' cannot be written ({system_reason(error)}): {fix}.", EXIT_STORAGE)


def system_reason(error: Exception) -> str:
    """Why a file could not be read or written: "No space left on device", or the first line of the error."""
    number = _error_number(error)
    if number:
        return os.strerror(number)
    if "embedded null" in str(error):  # Python 3.13 words it otherwise than 3.11
        return "embedded null byte"
    return short(next(iter(str(error).splitlines()), "")) or type(error).__name__


def _error_number(error: Exception) -> int | None:
    """The error number of the operating system; None if neither the error nor its message has one."""
    # Libraries in C++ raise their own types, with the system's text somewhere in the message.
    known = (number for number in (*_FIXES, errno.EIO, errno.ENOENT) if os.strerror(number) in str(error))
    return getattr(error, "errno", None) or next(known, None)


@contextlib.contextmanager
def writing(path: object, *also: type[Exception]) -> Iterator[None]:
    """Within this context, an error of the operating system means that the output `path` cannot be written.

    Nothing but the output may be read or written in it, except by functions that raise a `UserError` for what
    they cannot read: otherwise the message would blame the output.

    Args:
      path: the output to name, which need not be the file that is written first.
      also: what a library raises in place of an `OSError`.

    Raises:
      OutputError: in place of an `OSError`, and of the `ValueError` for a path with a character that no path
        can have.
    """
    try:
        yield
    except (UserError, RunStopped):
        raise
    except (OSError, *also) as error:
        raise OutputError(path, error) from error
    except ValueError as error:
        if _can_be_a_path(str(path)):
            raise
        raise OutputError(path, error) from error


def _can_be_a_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


# Maximum number of characters of a value in a message.
LONGEST_VALUE = 200
# A value in quotes, from a quote that opens to one that closes. An apostrophe within a word does neither.
_QUOTED = re.compile(r"""(?<!\w)(['"])(.*?)\1(?!\w)""", re.DOTALL)
_WITHOUT_SPACES = re.compile(rf"\S{{{LONGEST_VALUE + 1},}}")


def short(value: object, quote: bool = False) -> str:
    """Returns a value as text of at most `LONGEST_VALUE` characters, for a message.

    Args:
      value: any value.
      quote: use `repr`, which puts text in quotes.
    """
    text = repr(value) if quote else str(value)
    if len(text) <= LONGEST_VALUE:
        return text
    note = f" ({len(text):,} characters)"
    kept = LONGEST_VALUE - len(note) - 1
    return f"{text[: kept - kept // 3]}…{text[-(kept // 3) :]}{note}"


def listing(names: Iterable[object]) -> str:
    """Joins names from a file for a message, each shortened to `LONGEST_VALUE` characters."""
    return ", ".join(map(short, names))


def with_short_values(message: str) -> str:
    """Shortens the values in a message that have more than 200 characters, and escapes what is not printable.

    These values are text in quotes or brackets, and text without spaces.

    Every `UserError`, every reason for skipping a sample and every printed message passes through here, so
    that a file's content (an image in base64, a list of a thousand numbers) does not fill the screen. For a
    value that has spaces and no quotes, call `short`.
    """
    message = _with_short_brackets(message)
    message = _QUOTED.sub(lambda found: found[1] + short(found[2]) + found[1], message)
    return printable(_WITHOUT_SPACES.sub(lambda found: short(found[0]), message))


def printable(text: str) -> str:
    r"""Replaces characters that are neither printable nor spaces by escapes, such as \x1b.

    A terminal would take some of them as commands, for example to colour, move or hide text. Halves of
    surrogate pairs cannot be written in UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each.isspace() else each.encode("unicode_escape").decode()
        for each in text
    )


def _with_short_brackets(message: str) -> str:
    """Shortens the outermost lists and objects, [...] and {...}, in a message."""
    parts, end, opened = [], 0, []
    for bracket in re.finditer(r"[\[\]{}]", message):
        if bracket[0] in "[{":
            opened.append(bracket.start())
        elif opened:
            start = opened.pop()
            if not opened:
                parts += [message[end:start], short(message[start : bracket.end()])]
                end = bracket.end()
    return "".join([*parts, message[end:]])


# Prefix of the messages of this process; empty if it is the only one.
_prefix = ""


def set_message_prefix(prefix: str) -> None:
    """Sets the prefix of all further messages that this process reports."""
    global _prefix
    _prefix = prefix


def report(message: object) -> None:
    """Prints a message as one line on standard error, with the prefix of this process."""
    line = f"{_prefix}{' '.join(with_short_values(str(message)).split())}"
    # A progress bar leaves the cursor at the end of its text, so that a message would continue that line.
    tqdm = sys.modules.get("tqdm")
    (tqdm.tqdm.write if tqdm else print)(line, file=sys.stderr)
    sys.stderr.flush()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest known name, or "" if no name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Raises a `UserError` that names the choices, unless `value` is one of them."""
    known = list(known)
    if value not in known:
        raise UserError(
            f"{name} is '{short(value)}': choose one of {', '.join(known)}.{did_you_mean(str(value), known)}"
        )


def in_utf8(name: str, value: object, fix: str) -> None:
    """Raises a `UserError` if text has bytes that are not UTF-8, which Python stores as surrogates.

    Args:
      name: what the text is, for the message.
      value: the text, or a path.
      fix: what to do, for the message.
    """
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is '{short(value)}', which is not UTF-8: {fix}.") from None


def at_least(name: str, value: float, least: float) -> None:
    """Raises a `UserError` if `value` is below `least`."""
    if not value >= least:  # NaN is below everything
        raise UserError(f"{name} is {short(value)}: it must be at least {least}.")


def finite(name: str, value: float) -> None:
    """Raises a `UserError` if `value` is NaN or infinite."""
    if not math.isfinite(value):
        raise UserError(f"{name} is {value}: it must be a finite number.")


def run_command(
    main: Callable[[Sequence[str]], int | None], more_help: Callable[[], str] | None = None
) -> None:
    """Parses the flags of the command, calls `main(argv)` and exits the process.

    The exit status is 0, or the one that `main` returns. After a `UserError`, an invalid flag or a path that
    is too long it is 2, after a `RunStopped` that of the exception, if standard output cannot be written 74,
    after Ctrl-C 130; in these cases the message is printed as one line on standard error. Any other exception
    is a bug in this project and keeps its traceback.

    Args:
      main: takes what remains after parsing, and returns the exit status; None means 0.
      more_help: returns the text that `--help` prints after the flags.
    """
    _drop_noise()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _on_interrupt)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _on_unraisable
    if hasattr(sys.stdout, "reconfigure"):
        # Lines of progress appear in log files at once. The names of files may have bytes that are not UTF-8.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    app.define_help_flags()
    try:
        with _checked_output():
            status = main(_parse(sys.argv, more_help)) or 0
    except (UserError, flags.Error) as error:
        text = f"error: {error}"
        for argument in sys.argv:
            for value in (argument, argument.partition("=")[2]):
                text = text.replace(value, short(value)) if len(value) > LONGEST_VALUE else text
        report(text)
        status = EXIT_USAGE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        report(
            f"error: '{short(error.filename)}' has a name that is too long for a file or folder: shorten it."
        )
        status = EXIT_USAGE
    except OutputError as error:
        report(f"error: {error}")
        status = error.status
    except RunStopped as stop:
        report(f"stopped: {stop}")
        status = stop.status
    except KeyboardInterrupt:
        end_interrupted()
    sys.exit(status)


def _on_interrupt(number: int, frame: types.FrameType | None) -> None:
    """Handles Ctrl-C: raises KeyboardInterrupt, but ends the process at once while it imports modules.

    An import could swallow the exception. Commands import JAX when they need it.
    """
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            end_interrupted()
        frame = frame.f_back
    raise KeyboardInterrupt


def end_interrupted() -> NoReturn:
    """Reports a Ctrl-C and ends the process at once.

    It does not end as after other exceptions: JAX may have been interrupted while it traced a function, and
    Python can crash or hang when it frees what this has left. Python would also wait for threads, such as
    those that write a checkpoint.
    """
    report("interrupted: the same command continues")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _checked_output() -> Iterator[None]:
    """Raises an `OutputError` if standard output cannot be written, for example because its disk is full."""
    try:
        yield
    except OSError as error:
        # `print` does not say what it could not write. If it was not this, an empty line does not matter.
        if error.filename is None:
            with writing("standard output"):
                print(flush=True)
        raise
    with writing("standard output"):
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()


def _on_unraisable(unraisable: Any) -> None:
    """Handles an exception that Python drops, in `__del__` or a callback.

    A Ctrl-C is repeated: JAX has a callback for garbage collection, which is frequent while modules are
    imported. An exception that tells nothing is dropped. Any other is printed, as Python does.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    # If a write fails, Orbax closes its event loop, and each of the other writes complains about that.
    elif not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


# Warnings that libraries log in normal runs and that need no action: logger and beginning of the message.
_NOISE = {
    # Orbax: checkpoints are written without the optional metadata of a folder, and a folder of temporary
    # files may be gone before it is removed.
    "absl": ("Metadata file does not exist", "Unable to find the step"),
    # Tokenizers do not need PyTorch; a command that needs it raises its own error.
    "transformers": ("PyTorch was not found",),
}
_ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"


def _drop_noise() -> None:
    """Keeps the messages in `_NOISE` from being printed, and exceptions that Orbax logs and also raises."""
    for name, beginnings in _NOISE.items():
        logging.getLogger(name).addFilter(
            lambda record, beginnings=beginnings: not str(record.msg).startswith(beginnings)
        )
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not _is_from_orbax(record))


def _is_from_orbax(record: logging.LogRecord) -> bool:
    """Whether a message shows an exception of one of Orbax's threads or tasks.

    When a checkpoint is written, many of them work at the same time. If one cannot write, all fail and log
    their tracebacks. One of the exceptions is raised again where the command waits for the checkpoint.
    """
    if not record.exc_info:
        return False
    # TensorStore's futures have no frames, but name the file, which is in a temporary folder of Orbax.
    frames = traceback.extract_tb(record.exc_info[2])
    return "orbax-checkpoint-tmp" in str(record.exc_info[1]) or any(_ORBAX in f.filename for f in frames)


def _parse(argv: Sequence[str], more_help: Callable[[], str] | None = None) -> Sequence[str]:
    """Parses the flags and turns all exceptions that ml_collections and absl raise into a `UserError`."""
    try:
        return flags.FLAGS([_underscored(argument) for argument in argv])
    except SystemExit:
        # Only the help flags exit here, and absl exits with status 1 although printing help is no error.
        if more_help:
            print(more_help())
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        name, dot, _ = error.flagname.partition(".")
        if dot and name in flags.FLAGS:
            raise UserError(f"--{error.flagname} needs --{name}=FILE before it.") from error
        raise UserError(str(error)) from error
    except (AttributeError, KeyError, OSError, TypeError, ValueError, flags.Error) as error:
        raise UserError(str(error.args[0]) if error.args else type(error).__name__) from error


def _underscored(argument: str) -> str:
    """Rewrites --from-image=x as --from_image=x if that is a flag, so that both spellings work."""
    name, separator, value = argument.partition("=")
    spelled = name.lstrip("-").replace("-", "_")
    return f"--{spelled}{separator}{value}" if name.startswith("--") and spelled in flags.FLAGS else argument
