"""Input errors, exit statuses, and how commands report them."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence

from absl import app, flags

# Exit statuses of all commands, listed in docs/architecture.md and docs/survival.md. Those from 64 to 78 have
# the meaning of sysexits.h, so that a scheduler can tell whether to restart a run.
EXIT_USAGE = 2
# The loss diverged. A restart would diverge again.
EXIT_DIVERGED = 65
# Another process of the run died or hangs, or the processes did not find each other.
EXIT_UNAVAILABLE = 69
# A checkpoint or the metrics could not be written.
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


# Number of characters of a value that a message repeats at most.
LONGEST_VALUE = 200
# A value in quotes, from a quote that opens to one that closes. An apostrophe within a word does neither.
_QUOTED = re.compile(r"""(?<!\w)(['"])(.*?)\1(?!\w)""", re.DOTALL)
_IN_BRACKETS = re.compile(rf"\[[^\[\]]{{{LONGEST_VALUE + 1},}}\]|{{[^{{}}]{{{LONGEST_VALUE + 1},}}}}")
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


def with_short_values(message: str) -> str:
    """Shortens the values in a message that have more than 200 characters.

    These are text in quotes or brackets, and text without spaces.

    Every `UserError`, every reason for skipping a sample and every printed message passes through here, so
    that a file's content (an image in base64, a list of a thousand numbers) does not fill the screen. For a
    value that has spaces and no quotes, call `short`.
    """
    message = _QUOTED.sub(lambda found: found[1] + short(found[2]) + found[1], message)
    for pattern in (_IN_BRACKETS, _WITHOUT_SPACES):
        message = pattern.sub(lambda found: short(found[0]), message)
    return message


# Prefix of the messages of this process; empty if it is the only one.
_prefix = ""


def set_message_prefix(prefix: str) -> None:
    """Sets the prefix of all further messages that this process reports."""
    global _prefix
    _prefix = prefix


def report(message: object) -> None:
    """Prints a message as one line on standard error, with the prefix of this process."""
    print(f"{_prefix}{' '.join(with_short_values(str(message)).split())}", file=sys.stderr, flush=True)


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


def at_least(name: str, value: float, least: float) -> None:
    """Raises a `UserError` if `value` is below `least`."""
    if value < least:
        raise UserError(f"{name} is {short(value)}: it must be at least {least}.")


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Parses the flags of the command, calls `main(argv)` and exits the process.

    The exit status is 0, or the one that `main` returns. After a `UserError` or an invalid flag it is 2,
    after a `RunStopped` that of the exception; in both cases the message is printed as one line on standard
    error. Any other exception is a bug in this project and keeps its traceback.
    """
    app.define_help_flags()
    try:
        status = main(_parse(sys.argv)) or 0
    except (UserError, flags.Error) as error:
        text = f"error: {error}"
        for argument in sys.argv:
            value = argument.partition("=")[2]
            text = text.replace(value, short(value)) if len(value) > LONGEST_VALUE else text
        report(text)
        status = EXIT_USAGE
    except RunStopped as stop:
        report(f"stopped: {stop}")
        status = stop.status
    sys.exit(status)


def _parse(argv: Sequence[str]) -> Sequence[str]:
    """Parses the flags and turns all exceptions that ml_collections and absl raise into a `UserError`."""
    try:
        return flags.FLAGS([_underscored(argument) for argument in argv])
    except SystemExit:
        # Only the help flags exit here, and absl exits with status 1 although printing help is no error.
        sys.exit(0)
    except (AttributeError, KeyError, OSError, TypeError, ValueError, flags.Error) as error:
        text = str(error.args[0]) if error.args else type(error).__name__
        if "Traceback (most recent call last)" in text:
            # An error inside the config file. Keep the last line, without the name of the exception.
            text = text.strip().splitlines()[-1].partition(": ")[2]
        elif isinstance(error, KeyError | AttributeError):
            text = f"a --config.… flag names a field that does not exist: {text}"
        raise UserError(text) from error


def _underscored(argument: str) -> str:
    """Rewrites --from-image=x as --from_image=x if that is a flag, so that both spellings work."""
    name, separator, value = argument.partition("=")
    spelled = name.lstrip("-").replace("-", "_")
    return f"--{spelled}{separator}{value}" if name.startswith("--") and spelled in flags.FLAGS else argument
