"""Handles SIGTERM and Ctrl-C: the run saves a checkpoint after the current step and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from pixart_jax.errors import end_interrupted, report
from pixart_jax.training.distributed import Cluster

_FIRST = "Ctrl-C: saving at the end of this step; press it again to stop at once without saving"
# Seconds after the second Ctrl-C in which the main thread can end the process itself.
_GRACE = 5.0


@contextlib.contextmanager
def stop_requests(cluster: Cluster) -> Iterator[None]:
    """Within this context, SIGTERM and the first Ctrl-C request a stop; a second Ctrl-C ends the process.

    `cluster.stop_requested` returns whether a stop was requested. With several processes it is enough to
    signal one of them: `jax.distributed` handles SIGTERM and chooses a step that no process has passed yet,
    so that all processes save the same step. A single process has its own handler.
    """
    requested = False

    # A signal can arrive while another one is handled, or while the main thread prints. The handlers
    # therefore take no locks, as `threading.Event` does, and print nothing.
    def terminate(*_: object) -> None:
        nonlocal requested
        requested = True

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    shared = jax.distributed.is_initialized()
    cluster.stop_requested = multihost_utils.reached_preemption_sync_point if shared else lambda _: requested
    # Python allows signal handlers only in the main thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {} if shared else {signal.SIGTERM: terminate}
    # Shells let commands in the background ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        handlers[signal.SIGINT] = interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with _watched_interrupts():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched_interrupts() -> Iterator[None]:
    """Within this context, a thread reports the first Ctrl-C and makes sure that the second ends the process.

    Python runs a handler of signals only between two instructions of the main thread, and the compilation of
    a program is one instruction.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    ended = threading.Event()

    def watch() -> None:
        pressed = 0
        while pressed < 2 and (signals := os.read(read, 1)):
            if signals[0] == signal.SIGINT:
                pressed += 1
                if pressed == 1:
                    report(_FIRST)
        if pressed == 2 and not ended.wait(_GRACE):
            end_interrupted()

    thread = threading.Thread(target=watch, name="interrupts", daemon=True)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)
