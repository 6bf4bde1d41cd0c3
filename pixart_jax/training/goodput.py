"""Measures how the wall time of a run, over all its starts, is divided among phases.

    goodput = seconds in steps / seconds since the run was first started

`summary.json` in the run directory holds the totals. Every start of the run adds to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from pixart_jax.files import replace_text
from pixart_jax.readers import COUNT, read_json

# Phases of a run. 'data' is the time for which the host waits for batches, 'compile' the first step of every
# image size. 'restart' is the cost of interruptions: the time between two starts, the time until the first
# step, and the time of steps that had to be repeated.
PHASES = ("step", "compile", "data", "checkpoint", "evaluation", "restart", "other")
FILE = "summary.json"


class Goodput:
    """Adds up the seconds of each phase.

    Args:
      workdir: run directory.
      first_step: step from which this start resumes.
      active: whether this process reads and writes the summary; only the first process should.
      observe: called with the name of a phase whenever one begins.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        first_step: int,
        active: bool = True,
        observe: Callable[[str], None] = lambda phase: None,
    ):
        self._path = workdir / FILE
        self._active, self._observe = active, observe
        self._first_step = first_step
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._starts = 1
        before = _read(self._path) if active else None
        if before:
            self._seconds = {phase: before["seconds"].get(phase, 0.0) for phase in PHASES}
            self._starts += before["starts"]
            # Wall clocks can be set back; do not count negative time.
            self._seconds["restart"] += max(0.0, time.time() - before["written_at"])
            lost = max(0, before["step"] - first_step)
            again = min(self._seconds["step"], lost * self._seconds["step"] / max(1, before["step"]))
            self._seconds["step"] -= again
            self._seconds["restart"] += again
        # Time outside all phases counts as 'restart' until the loop begins, then as 'other'.
        self._rest, self._since = "restart", time.monotonic()

    def begin(self) -> None:
        """Marks the start of the training loop. From now on, time outside all phases counts as 'other'."""
        self._settle(self._rest)
        self._rest = "other"
        self._begun = self._working()

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Counts the time within this context as `phase`."""
        self._settle(self._rest)
        self._observe(phase)
        try:
            yield
        finally:
            self._settle(phase)

    def _settle(self, phase: str) -> None:
        now = time.monotonic()
        self._seconds[phase] += now - self._since
        self._since = now

    def shares(self) -> dict[str, float]:
        """Returns the share of each phase in the total time since the first start, as metrics."""
        self._settle(self._rest)
        total = max(sum(self._seconds.values()), 1e-9)
        return {f"goodput_{phase}": seconds / total for phase, seconds in self._seconds.items()}

    def seconds_left(self, step: int, steps: int) -> float:
        """Returns the seconds from `step` to `steps`, at the average speed of this start.

        The average includes everything but compilation: also validation, sample images and checkpoints.
        """
        self._settle(self._rest)
        return (steps - step) * (self._working() - self._begun) / (step - self._first_step)

    def _working(self) -> float:
        return sum(self._seconds[phase] for phase in PHASES if phase not in ("compile", "restart"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Replaces `summary.json`.

        Args:
          step: completed updates.
          values: newest metrics.
        """
        if not self._active:
            return
        shares = self.shares()
        summary = {
            "step": step,
            "starts": self._starts,
            "goodput": shares["goodput_step"],
            "share": {phase: round(shares[f"goodput_{phase}"], 6) for phase in PHASES},
            "seconds": self._seconds,
            "written_at": time.time(),
            "newest": {name: value for name, value in values.items() if not name.startswith("goodput_")},
        }
        replace_text(self._path, json.dumps(summary, indent=1))


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What earlier starts have written, or None if this is the first one or the file is empty.

    Raises:
      UserError: the file is damaged.
    """
    if not path.exists() or (os.path.isfile(path) and not os.path.getsize(path)):
        return None
    shape = {"step": COUNT, "starts": COUNT, "seconds": {str: float}, "written_at": float}
    # Lenient, because a metric may be NaN.
    return read_json(path, "remove it; only the goodput of the earlier starts is lost", shape, lenient=True)
