"""Names the process that died or hangs, and stops the others.

Every process sends a sign of life from a thread, with the step and phase its main thread is in, to the
key-value store of `jax.distributed`, and reads those of all others. Ages are counted on the reader's own
monotonic clock: the clocks of the hosts need not agree, and may jump.

A process that ends with an error of its own leaves its last line in the store, and the others repeat it.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from types import TracebackType

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

# Phases in which a process waits for the others, rather than keeping them waiting.
_WAITING = ("step", "compile")


@dataclasses.dataclass
class Sign:
    """The newest sign of life of a process, and when it last changed, in seconds of our clock.

    Attributes:
      beat: counts signs.
      step, phase: where its main thread is; `count` counts its phases.
      beat_changed, phase_changed: when.
    """

    beat: int
    count: int
    step: int
    phase: str
    beat_changed: float
    phase_changed: float

    def update(self, text: str, now: float) -> None:
        """Takes over what `encode` wrote."""
        beat, count, step, phase = text.split(maxsplit=3)
        if int(beat) != self.beat:
            self.beat, self.beat_changed = int(beat), now
        if int(count) != self.count:
            self.count, self.phase_changed = int(count), now
        self.step, self.phase = int(step), phase


def verdict(signs: dict[int, Sign], now: float, config: WatchdogConfig) -> str:
    """Says in one line which process is dead or hangs; "" while none is.

    Dead is who has sent no sign for `dead_seconds`. When no process at all has moved on for `hang_seconds`,
    the one that hangs is the one furthest behind: the others wait for it.
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
    """Watches the processes of a run from a thread, between `with` and its end."""

    def __init__(self, cluster: Cluster, config: WatchdogConfig):
        self._cluster, self._config = cluster, config
        self._interval = min(2.0, config.dead_seconds / 8)
        now = time.monotonic()
        self._signs = {i: Sign(-1, -1, 0, "start", now, now) for i in range(cluster.count)}
        self._beat, self._count, self._step, self._phase = 0, 0, 0, "start"
        self._line = ""
        self._said, self._saying = False, threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _progress(self, step: int, phase: str) -> None:
        self._step, self._phase = step, phase
        self._count += 1

    def __enter__(self) -> Watchdog:
        self._cluster.progress = self._progress
        if self._cluster.count > 1:
            self._cluster.reason = self._why_aborted
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._cluster.count == 1 or error is None or getattr(error, "everywhere", False):
            self._stop.set()
            self._thread.join()
            return
        # Others may be waiting for this process in a collective, and JAX would wait for them at the exit.
        told = isinstance(error, UserError | RunStopped)
        line = f"error: {error}" if told else f"error: {kind.__name__}: {first_line(error)}"
        status = getattr(error, "status", EXIT_USAGE) if told else 1
        if told and not error.collective:
            self._leave(line, status)
        if isinstance(error, KeyboardInterrupt):
            self._leave("stopped: Ctrl-C", EXIT_INTERRUPTED)
        if not told:
            traceback.print_exception(kind, error, trace)
        # A collective that failed says nothing of who is to blame. The thread ends this process if it knows.
        self._stop.wait(self._config.dead_seconds + 4 * self._interval)
        self._leave(line, status)

    def _leave(self, line: str, status: int) -> None:
        """Ends this process alone, so that the others can tell why."""
        self._stop.set()
        report(line)
        try:
            self._cluster.client.key_value_set(f"stopped/{self._cluster.index}", " ".join(line.split()))
        except Exception:
            report("the other processes could not be told")
        # With process 0 goes the store: the others need time to read it.
        time.sleep(3 * self._interval)
        _exit(status)

    def _watch(self) -> None:
        heard = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            self._beat += 1
            mine = f"{self._beat} {self._count} {self._step} {self._phase}"
            try:
                texts = self._exchange(mine)
                heard = now
            except Exception as error:
                if now - heard > self._config.dead_seconds:
                    self._end(
                        f"process 0 (the coordinator, {self._cluster.coordinator}) does not answer: {error}"
                    )
                continue
            for index, text in texts.items():
                self._signs[index].update(text, now)
            if self._line or (line := verdict(self._signs, now, self._config)):
                self._end(self._line or line)

    def _exchange(self, mine: str) -> dict[int, str]:
        """Sends a sign of life; returns the newest of every process that has sent any."""
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
                return  # the runtime ends this process
            self._said = True
            report(f"stopped: {line}; the same command continues from the newest checkpoint")
        if self._phase_is_stuck():
            faulthandler.dump_traceback(all_threads=True)
        if self._cluster.count > 1 and self._cluster.first:
            # The others come to the same verdict, unless the store goes before.
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
        if silent and _answers(self._cluster.coordinator):
            return _silent(silent, self._signs, self._config.dead_seconds // 2)
        return (
            f"process 0 (the coordinator, {self._cluster.coordinator}) died or does not answer; the same "
            "command continues from the newest checkpoint"
        )


def _silent(processes: list[int], signs: dict[int, Sign], seconds: int) -> str:
    names = ", ".join(f"process {i} (last seen at step {signs[i].step})" for i in processes)
    return f"{names} gave no sign of life for {seconds} seconds"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except OSError:
        return False


def _index(key: str) -> int:
    return int(key.rpartition("/")[2])


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
