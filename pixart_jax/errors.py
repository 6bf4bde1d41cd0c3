"""What a command says when its input is wrong, and how it ends."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence

from absl import app, flags

# Exit statuses every command keeps to (docs/architecture.md lists them). Past 2 they are those of sysexits.h.
EXIT_USAGE = 2
# The loss diverged: another start would diverge again.
EXIT_DIVERGED = 65
# Another process of the run died or hangs, or the processes did not find each other.
EXIT_UNAVAILABLE = 69
# A checkpoint or the metrics could not be written.
EXIT_STORAGE = 74
# Stopped by SIGTERM or Ctrl-C with everything saved: the same command continues.
EXIT_PREEMPTED = 75
# Ctrl-C, as shells have it.
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """A mistake in the input that the user can mend.

    The message is one line that names the value, the rule it breaks and the fix. Commands print it
    without a traceback and end with status 2.

    Attributes:
      collective: as of `RunStopped`.
    """

    collective = False


class RunStopped(Exception):
    """A run that ends before its last step for a reason that is no defect of this project.

    Args:
      message: one line: what happened, and what to do.
      status: of the command.
      everywhere: all processes of the run stop for this reason at this step.
      collective: it comes from work that the processes do together, where the death of another process raises
        the same exceptions. The watchdog looks for a dead process before it believes the message.
    """

    def __init__(self, message: str, status: int, *, everywhere: bool = False, collective: bool = False):
        super().__init__(message)
        self.status = status
        self.everywhere = everywhere
        self.collective = collective


# Who speaks, before every message of a process that is one of several.
_speaker = ""


def speak_as(prefix: str) -> None:
    """Puts `prefix` before what this process reports from now on."""
    global _speaker
    _speaker = prefix


def report(message: object) -> None:
    """Prints one line on standard error, in the name of this process."""
    print(f"{_speaker}{' '.join(str(message).split())}", file=sys.stderr, flush=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest known name, or "" when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Raises a `UserError` that names the choices, unless `value` is one of them."""
    known = list(known)
    if value not in known:
        raise UserError(
            f"{name} is '{value}': choose one of {', '.join(known)}.{did_you_mean(str(value), known)}"
        )


def at_least(name: str, value: float, least: float) -> None:
    """Raises a `UserError` if `value` is below `least`."""
    if value < least:
        raise UserError(f"{name} is {value}: it must be at least {least}.")


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Parses the flags of the running command, calls `main(argv)` and exits.

    Status 0 (or what `main` returns) on success; 2 with one line on standard error for a `UserError`
    or a flag that does not parse; its own status, likewise, for a `RunStopped`. Any other exception is a
    defect of this project and keeps its traceback.
    """
    app.define_help_flags()
    try:
        status = main(_parse(sys.argv)) or 0
    except (UserError, flags.Error) as error:
        report(f"error: {error}")
        status = EXIT_USAGE
    except RunStopped as stop:
        report(f"stopped: {stop}")
        status = stop.status
    sys.exit(status)


def _parse(argv: Sequence[str]) -> Sequence[str]:
    """Parses the flags; whatever a wrong flag or config value makes ml_collections raise is a `UserError`."""
    try:
        return flags.FLAGS([_underscored(argument) for argument in argv])
    except SystemExit:
        # Only the help flags end the program here, and being helped is no failure.
        sys.exit(0)
    except (AttributeError, KeyError, OSError, TypeError, ValueError, flags.Error) as error:
        text = str(error.args[0]) if error.args else type(error).__name__
        if "Traceback (most recent call last)" in text:
            # An error inside the config file: its last line, without the name of the exception.
            text = text.strip().splitlines()[-1].partition(": ")[2]
        elif isinstance(error, KeyError | AttributeError):
            text = f"a --config.… flag names a field that does not exist: {text}"
        raise UserError(text) from error


def _underscored(argument: str) -> str:
    """--from-image=x as --from_image=x, where that is a flag: people write both."""
    name, separator, value = argument.partition("=")
    spelled = name.lstrip("-").replace("-", "_")
    return f"--{spelled}{separator}{value}" if name.startswith("--") and spelled in flags.FLAGS else argument
