"""Fuzzing: runs a command or a reader on hostile input, and judges what it did.

A target (`tests/fuzz/`) puts an input into a sandbox folder, calls `Sandbox.command` or `Sandbox.read`, and
checks the outcome with `Outcome.check`:

- The status is 0, 2 or another documented one. An exception that commands do not report is a bug.
- An error is one printable line of limited length.
- The input's content is never executed: no process was started, no connection opened, and the file that
  hostile pickles try to write does not exist.
- Nothing is written outside the output folder, and after an error there is no output and no temporary file.
- Time and memory are limited. An example that blocks outside of Python ends the process after a while.

`fuzz` makes a test out of a target. `make test` always tries the same few examples. `make fuzz` tries new
ones for some minutes (`FUZZ_MINUTES`), and prints how to repeat a failure.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import io
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from absl import flags
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from pixart_jax.errors import run_command
from pixart_jax.flags import define, read

# The exit statuses in docs/architecture.md and docs/survival.md, without 1, which is a bug, and without those
# of signals.
DOCUMENTED = {0, 2, 65, 69, 74, 75}
# A message may repeat several values, each of at most `errors.LONGEST_VALUE` characters, and long paths.
LONGEST_LINE = 3000
# Characters that change what a terminal shows: controls, escapes, separators of lines, directions of writing.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# Limits of an example: seconds, and bytes that it may allocate.
SECONDS, BYTES = 20, 4 * 2**30

ROOT = Path(__file__).parent.parent
# Minutes for all targets together; None for the same few examples at each run.
MINUTES = float(os.environ["FUZZ_MINUTES"]) if os.environ.get("FUZZ_MINUTES") else None
# Seed and number of examples of a round of `make fuzz` to repeat.
REPEATED = tuple(map(int, os.environ["FUZZ_REPEAT"].split("/"))) if os.environ.get("FUZZ_REPEAT") else None
# The most examples in a round of `make fuzz`.
ROUND = 500
# Examples that failed, which the next `make fuzz` tries first. Not in the repository.
DATABASE = ROOT / ".hypothesis" / "examples"


class Started(BaseException):
    """Raised in place of heavy work: the input has passed all checks."""


class TooSlow(BaseException):
    """An example took longer than `SECONDS`."""


def stop_here(*_: Any, **__: Any) -> Any:
    """Takes the place of a function that begins heavy work."""
    raise Started


def fuzz(examples: int, *fixtures: str, **strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """Makes a test from a function that takes a `Sandbox`, fixtures, and a drawn value for each strategy.

    Args:
      examples: number of examples in `make test`.
      fixtures: names of the fixtures that the function takes after the sandbox.
      strategies: hypothesis strategies by the name of the argument.
    """

    def decorate(target: Callable[..., None]) -> Any:
        def test(sandbox, request, seconds_per_target):
            given = [request.getfixturevalue(name) for name in fixtures]

            def example(**drawn: Any) -> None:
                try_example(target, sandbox, given, drawn)

            # The database of examples uses the name.
            example.__name__ = f"{target.__module__}.{target.__name__}".replace(".", "_")
            if MINUTES is None and REPEATED is None:
                settings(_SHORT, max_examples=examples)(hypothesis.given(**strategies)(example))()
                return
            begin, count = time.monotonic(), examples
            while count > 0:
                seed = int.from_bytes(os.urandom(4), "little")
                if REPEATED is not None:
                    seed, count = REPEATED
                now = time.monotonic()
                # A new function for each round, because hypothesis allows each only one seed.
                run = hypothesis.given(**strategies)(example)
                try:
                    hypothesis.seed(seed)(settings(_LONG, max_examples=count)(run))()
                except BaseException as error:
                    name = request.node.nodeid
                    error.add_note(
                        f"To repeat: FUZZ_REPEAT={seed}/{count} .venv/bin/python -m pytest '{name}'"
                    )
                    raise
                # As many examples as the rest of the time is enough for.
                each = (time.monotonic() - now) / count
                left = begin + seconds_per_target - time.monotonic()
                count = 0 if REPEATED is not None else min(int(left / each), ROUND)

        test.__name__, test.__doc__ = target.__name__, target.__doc__
        test.__module__ = target.__module__
        return test

    return decorate


def try_example(target: Callable[..., None], sandbox: Sandbox, given: Sequence[Any], drawn: Any) -> None:
    """Runs one example in an empty sandbox."""
    sandbox.clear()
    target(sandbox, *given, **drawn)


_CHECKS = dict(deadline=None, suppress_health_check=list(HealthCheck))
_SHORT = settings(derandomize=True, database=None, phases=(Phase.explicit, Phase.generate), **_CHECKS)
_LONG = settings(
    database=DirectoryBasedExampleDatabase(DATABASE),
    print_blob=False,
    **_CHECKS,
)


# --- Running ----------------------------------------------------------------------------------------


class Outcome:
    """What an example did.

    Attributes:
      status: exit status; None if heavy work would have begun.
      out, err: standard output and standard error.
      trespasses: events outside of the sandbox, or that only code of the input can have caused.
      before, after: the files in the sandbox, see `Sandbox.files`.
    """

    def __init__(self, status, out, err, trespasses, before, after):
        self.status, self.out, self.err = status, out, err
        self.trespasses, self.before, self.after = trespasses, before, after

    def check(self, *, outputs: Sequence[str] = (), leaves: Sequence[str] = (), allowed=DOCUMENTED) -> None:
        """Asserts the properties at the top of this file.

        Args:
          outputs: files and folders in the sandbox that may be written.
          leaves: those of them that may exist even after an error.
          allowed: exit statuses.
        """
        assert not self.trespasses, self.trespasses
        assert "Traceback" not in self.err + self.out, self.err
        if self.status is not None:
            assert self.status in allowed, (self.status, self.err)
        if self.status:
            lines = self.err.splitlines()
            assert len(lines) == 1 or (self.status == 2 and not lines and self.out), self.err[-3000:]
        for line in self.err.splitlines():
            assert len(line) <= LONGEST_LINE, f"{len(line)} characters: {line[:500]}"
            assert not _CONTROLS.search(line), f"control characters in {line!r}"
        changed = {path for path in self.before | self.after if self.before.get(path) != self.after.get(path)}
        places = (*outputs, *leaves) if not self.status else tuple(leaves)
        stray = sorted(
            path
            for path in changed
            if not any(path == place or path.startswith(f"{place}/") for place in places)
        )
        assert not stray, (
            f"status {self.status}, and these files were written or removed: {stray}; {self.err}"
        )
        partial = [path for path in changed & self.after.keys() if path.endswith((".tmp", ".partial"))]
        assert not partial, partial


class Sandbox:
    """A folder that inputs are written to, and in which commands run.

    Attributes:
      path: the folder.
      canary: a file that code in a hostile input would write.
      unread: paths that the next example must not open.
    """

    def __init__(self, path: Path):
        self.path = path
        self.canary = path / "canary"
        self.unread: set[str] = set()
        _audit()

    def clear(self) -> None:
        """Removes the files of the last example."""
        self.unread = set()
        for name in os.listdir(self.path):
            _remove(self.path / name)

    def write(self, name: str, data: bytes | str) -> Path:
        """Writes an input file. Lone surrogates in text become bytes that are not UTF-8."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
        return path

    def files(self) -> dict[str, Any]:
        """All files and folders in the sandbox by relative path, with size and time of change."""
        found = {}
        for folder, folders, names in os.walk(self.path):
            for name in (*folders, *names):
                path = os.path.join(folder, name)
                status = os.lstat(path)
                # The time of a folder changes with each temporary file.
                facts = None if name in folders else (status.st_size, status.st_mtime_ns)
                found[os.path.relpath(path, self.path)] = facts
        return found

    def command(self, module: str, *arguments: str) -> Outcome:
        """Runs a command of the project in this process: command("sample", "--prompts=x")."""
        command = importlib.import_module(f"pixart_jax.{module}")
        values = flags.FlagValues()
        define(command.Flags, values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flags, "FLAGS", values)
            return self._run(
                lambda argv: command.main(read(command.Flags, argv, values)), [module, *arguments]
            )

    def read(self, function: Callable[..., Any], *arguments: Any) -> Outcome:
        """Calls a function that reads an input, with the error messages and statuses of a command."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flags, "FLAGS", flags.FlagValues())
            return self._run(lambda _: function(*arguments) and None, ["command"])

    def _run(self, main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> Outcome:
        before, status = self.files(), None
        # As of a process: standard output takes Unicode only, and standard error escapes the rest.
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
        err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(argv))
            patch.chdir(self.path)
            patch.setenv("HOME", str(self.path / "home"))
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                _watched(self.path, self.unread) as trespasses,
                _limited(),
                contextlib.suppress(Started),
            ):
                try:
                    run_command(main)
                except SystemExit as stopped:
                    status = stopped.code
                except TooSlow as error:
                    raise AssertionError(str(error)) from error
        for stream in (out, err):
            stream.flush()
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
        if self.canary.exists():
            trespasses = [*trespasses, "the canary was written"]
        return Outcome(status, *texts, trespasses, before, self.files())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Limits time and memory in the block: beyond them, `TooSlow` and `MemoryError` are raised."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {SECONDS} seconds")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    # Again and again, because Python drops an exception that is raised in a callback.
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    # A thread of the command that blocks keeps the main thread waiting even after the exception.
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


# --- Watching ---------------------------------------------------------------------------------------

# Events that only code in an input can cause.
_CODE = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pty.spawn",
    "os.kill",
    "os.killpg",
)
_NETWORK = ("socket.connect", "socket.getaddrinfo", "urllib.Request")
# Events that change files, with the positions of the paths in their arguments.
_WRITING = {
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.chmod": (0,),
    "shutil.rmtree": (0,),
    "shutil.move": (0, 1),
}
_watcher: dict[str, Any] = {"sandbox": None, "unread": set(), "found": []}


@functools.cache
def _audit() -> None:
    sys.addaudithook(_see)


def _see(event: str, arguments: tuple) -> None:
    """An audit hook (PEP 578): notes what happens outside of the sandbox while it is watched."""
    sandbox = _watcher["sandbox"]
    if sandbox is None:
        return
    if event == "open":
        path, mode, how = arguments
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(how, int) and how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        paths = [path] if writes else []
        if _watcher["unread"] and isinstance(path, str) and os.path.join(sandbox, path) in _watcher["unread"]:
            _watcher["found"].append(f"read {path}")
    elif event in _WRITING:
        paths = [arguments[position] for position in _WRITING[event]]
    elif event in _CODE or event in _NETWORK:
        _watcher["found"].append(f"{event} {arguments!r:.200}")
        return
    else:
        return
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike) and not _harmless(os.fsdecode(path), sandbox):
            _watcher["found"].append(f"{event} {os.fsdecode(path)}")


def _harmless(path: str, sandbox: str) -> bool:
    """Whether a path is in the sandbox, or one that imports and the compilation cache write."""
    if path == os.devnull or "__pycache__" in path or path.endswith(".pyc"):
        return True
    places = [sandbox, *filter(None, [os.environ.get("JAX_COMPILATION_CACHE_DIR")])]
    path = os.path.normpath(os.path.join(sandbox, path))
    return any(path == place or path.startswith(f"{place}/") for place in places)


@contextlib.contextmanager
def _watched(sandbox: Path, unread: set[str]) -> Iterator[list[str]]:
    found: list[str] = []
    _watcher.update(sandbox=str(sandbox), found=found, unread=unread)
    try:
        yield found
    finally:
        _watcher["sandbox"] = None
