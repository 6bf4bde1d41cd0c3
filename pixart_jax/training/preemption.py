"""Handles SIGTERM and Ctrl-C: the run saves a checkpoint after the current step and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from pixart_jax.errors import report
from pixart_jax.training.distributed import Cluster


@contextlib.contextmanager
def stop_requests(cluster: Cluster) -> Iterator[None]:
    """Within this context, SIGTERM and the first Ctrl-C request a stop; a second Ctrl-C ends the process.

    `cluster.stop_requested` returns whether a stop was requested. With several processes it is enough to
    signal one of them: `jax.distributed` handles SIGTERM and chooses a step that no process has passed yet,
    so that all processes save the same step. A single process has its own handler.
    """
    requested = threading.Event()

    def terminate(*_: object) -> None:
        requested.set()

    def interrupt(*_: object) -> None:
        report("Ctrl-C: saving at the end of this step; press it again to stop at once without saving")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    shared = jax.distributed.is_initialized()
    handlers = {signal.SIGINT: interrupt} | ({} if shared else {signal.SIGTERM: terminate})
    # Python allows signal handlers only in the main thread.
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    cluster.stop_requested = (
        multihost_utils.reached_preemption_sync_point if shared else lambda _: requested.is_set()
    )
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
