"""Detects a process that died or hangs, reports which one it is, and stops the others.

A thread in every process sends heartbeats to the key-value store of `jax.distributed` and reads those of all
other processes. A heartbeat contains the step and the phase of the main thread. The reader measures how old
heartbeats are with its own monotonic clock, so the clocks of the hosts need not agree and may be changed.

A process that ends with an error writes its message to the store, and the other processes repeat it.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
import threading
import time
import traceback
from types import TracebackType

import jax

from pixart_jax.config import WatchdogConfig
from pixart_jax.errors import (
    EXIT_INTERRUPTED,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    RunStopped,
    UserError,
    report,
)
from pixart_jax.training.distributed import Cluster, first_line

# Phases in which a process may wait for others in a collective; one that hangs is probably in another phase.
_WAITING = ("step", "compile")
_AGAIN = "run the same command again to resume from the newest checkpoint"


@dataclasses.dataclass
class Sign:
    """The newest heartbeat of a process, and when it changed.

    Attributes:
      beat: number of heartbeats.
      count: number of phases that the main thread has begun.
      step, phase: step and phase of the main thread.
      beat_changed, phase_changed: when `beat` and `count` last changed, in seconds of our monotonic clock.
    """

    beat: int
    count: int
    step: int
    phase: str
    beat_changed: float
    phase_changed: float

    def update(self, text: str, now: float) -> None:
        """Reads a heartbeat, written by `Watchdog._watch`."""
        beat, count, step, phase = text.split(maxsplit=3)
        if int(beat) != self.beat:
            self.beat, self.beat_changed = int(beat), now
        if int(count) != self.count:
            self.count, self.phase_changed = int(count), now
        self.step, self.phase = int(step), phase


def verdict(signs: dict[int, Sign], now: float, config: WatchdogConfig) -> str:
    """Describes in one line which process is dead or hangs; "" if none is.

    A process is dead after `dead_seconds` without a heartbeat. If no process has begun a new phase for
    `hang_seconds`, the run hangs, and the process that is furthest behind causes it: the others wait for it.
    """
    dead = [i for i, sign in signs.items() if now - sign.beat_changed > config.dead_seconds]
    if dead:
        return _silent(dead, signs, config.dead_seconds)
    if all(now - sign.phase_changed > config.hang_seconds for sign in signs.values()):
        behind = min(sign.step for sign in signs.values())
        last = {i: sign for i, sign in signs.items() if sign.step == behind}
        busy = {i: sign for i, sign in last.items() if sign.phase not in _WAITING} or last
        names = ", ".join(f"process {i} (in '{sign.phase}' of step {sign.step})" for i, sign in busy.items())
        return f"{names} made no progress for {config.hang_seconds} seconds"
    return ""


class Watchdog:
    """A context within which a thread watches the processes of a run.

    If another process is dead, hangs or has stopped, the thread reports it and ends this process with
    `EXIT_UNAVAILABLE`. It cannot raise in the main thread, which may be blocked in a collective.

    Args:
      cluster: processes of the run.
      config: time-outs.
    """

    def __init__(self, cluster: Cluster, config: WatchdogConfig):
        self._cluster, self._config = cluster, config
        self._interval = min(2.0, config.dead_seconds / 8)
        now = time.monotonic()
        self._signs = {i: Sign(-1, -1, 0, "start", now, now) for i in range(cluster.count)}
        self._beat, self._count, self._step, self._phase = 0, 0, 0, "start"
        self._line = ""
        self._said, self._saying = False, threading.Lock()
        self._stop = threading.Event()
        self._unanswered = 0  # intervals since the store has answered
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if cluster.count > 1:
            self._threads.append(threading.Thread(target=self._time, name="watchdog timer", daemon=True))

    def _progress(self, step: int, phase: str) -> None:
        self._step, self._phase = step, phase
        self._count += 1

    def __enter__(self) -> Watchdog:
        self._cluster.progress = self._progress
        if self._cluster.count > 1:
            self._cluster.reason = self._why_aborted
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._cluster.count == 1 or error is None or getattr(error, "everywhere", False):
            self._stop.set()
            for thread in self._threads:
                thread.join()
            return
        # This process must not exit normally: the others may wait for it in a collective, and at exit JAX
        # would wait for them.
        known = isinstance(error, UserError | RunStopped)
        line = f"error: {error}" if known else f"error: {kind.__name__}: {first_line(error)}"
        status = getattr(error, "status", EXIT_USAGE) if known else 1
        if known and not error.collective:
            self._leave(line, status)
        if isinstance(error, KeyboardInterrupt):
            self._leave("stopped: Ctrl-C", EXIT_INTERRUPTED)
        # A failed collective does not tell which process is responsible. Wait for the thread to find out: if
        # another process died, the thread reports it and ends this process. The traceback of the collective
        # then says nothing more; that of a bug is printed at once.
        collective = isinstance(error, jax.errors.JaxRuntimeError)
        if not known and not collective:
            traceback.print_exception(kind, error, trace)
        self._stop.wait(self._config.dead_seconds + 4 * self._interval)
        if collective:
            traceback.print_exception(kind, error, trace)
        self._leave(line, status)

    def _leave(self, line: str, status: int) -> None:
        """Ends this process after writing its message to the store for the others."""
        self._stop.set()
        report(line)
        try:
            self._cluster.client.key_value_set(f"stopped/{self._cluster.index}", " ".join(line.split()))
        except Exception:
            report("the other processes could not be notified")
        # Process 0 hosts the store: give the others time to read the message before it disappears.
        time.sleep(3 * self._interval)
        _exit(status)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            self._beat += 1
            mine = f"{self._beat} {self._count} {self._step} {self._phase}"
            try:
                texts = self._exchange(mine)
            except Exception:
                continue  # `_time` ends this process if it happens for too long
            self._unanswered = 0
            for index, text in texts.items():
                self._signs[index].update(text, now)
            if self._line or (line := verdict(self._signs, now, self._config)):
                self._end(self._line or line)

    def _time(self) -> None:
        """Ends this process if the store does not answer: if process 0 hangs, `_exchange` does not return."""
        while not self._stop.wait(self._interval):
            self._unanswered += 1
            if self._unanswered * self._interval > self._config.dead_seconds:
                self._end(f"process 0 (the coordinator, {self._cluster.coordinator}) does not respond")

    def _exchange(self, mine: str) -> dict[int, str]:
        """Sends a heartbeat and returns the newest heartbeat of every process that has sent one."""
        client, me = self._cluster.client, self._cluster.index
        if self._cluster.count == 1:
            return {0: mine}
        client.key_value_set(f"alive/{me}", mine, allow_overwrite=True)
        stopped = [(_index(key), text) for key, text in client.key_value_dir_get("stopped/")]
        others = [f"process {index} stopped: {text}" for index, text in stopped if index != me]
        if others:
            self._line = "; ".join(others)
        return {_index(key): text for key, text in client.key_value_dir_get("alive/")}

    def _end(self, line: str) -> None:
        if self._stop.is_set():
            return
        self._line = line
        with self._saying:
            if self._said:
                return  # JAX's runtime is already ending this process
            self._said = True
            report(f"stopped: {line}; {_AGAIN}")
        if self._phase_is_stuck():
            faulthandler.dump_traceback(all_threads=True)
        if self._cluster.count > 1 and self._cluster.first:
            # Let the others reach the same verdict before the store disappears with this process.
            time.sleep(3 * self._interval)
        _exit(EXIT_UNAVAILABLE)

    def _phase_is_stuck(self) -> bool:
        mine = self._signs[self._cluster.index]
        return time.monotonic() - mine.phase_changed > self._config.hang_seconds

    def _why_aborted(self) -> str:
        with self._saying:
            if self._said:
                return ""
            self._said = True
        if self._line:
            return self._line
        now = time.monotonic()
        silent = [
            i
            for i, sign in self._signs.items()
            if i and now - sign.beat_changed > self._config.dead_seconds / 2
        ]
        if silent and self._unanswered * self._interval < self._config.dead_seconds / 2:
            line = _silent(silent, self._signs, self._config.dead_seconds // 2)
        else:
            line = f"process 0 (the coordinator, {self._cluster.coordinator}) died or does not respond"
        return f"{line}; {_AGAIN}"


def _silent(processes: list[int], signs: dict[int, Sign], seconds: int) -> str:
    names = ", ".join(f"process {i} (last seen at step {signs[i].step})" for i in processes)
    return f"{names} sent no heartbeat for {seconds} seconds"


def _index(key: str) -> int:
    return int(key.rpartition("/")[2])


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
