"""Kills a process at a chosen system call: see kill_library.c. This module does not import JAX."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

MISSING = "" if shutil.which("cc") else "needs a C compiler, cc"
SOURCE = Path(__file__).with_suffix(".c")


def compiled(folder: Path) -> Path:
    """Compiles the library into a folder; returns its path."""
    library = folder / "kill_library.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def variables(library: Path, root: Path, point: str = "", log: Path | None = None) -> dict[str, str]:
    """The environment of a process that is killed at `point`.

    Args:
      library: as returned by `compiled`.
      root: folder to observe.
      point: KIND NUMBER WHEN PATTERN; "" to only log the calls.
      log: file outside `root` to which the calls are appended.
    """
    chosen = {"LD_PRELOAD": str(library), "KILL_AT_ROOT": os.path.realpath(root)}
    return chosen | ({"KILL_AT": point} if point else {}) | ({"KILL_AT_LOG": str(log)} if log else {})


def killed_at(point: str, root: Path, log: Path, work: Callable[[], None]) -> Callable[[], None]:
    """Returns `work` for a forked process in which the library is already loaded; see `variables`."""

    def run() -> None:
        library = os.environ["LD_PRELOAD"]
        os.environ.update(variables(Path(library), root, point, log))
        ctypes.CDLL(library).kill_at_begin()
        work()

    return run
