"""SIGTERM and Ctrl-C: the run saves at the next step boundary and ends with a status of its own."""

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
    """Within this context SIGTERM and the first Ctrl-C are requests to stop; a second Ctrl-C ends at once.

    `cluster.stop_requested` tells of them. With several processes a signal to one of them reaches all,
    through `jax.distributed`, which then owns SIGTERM: it chooses a step that no process has passed. A single
    process has a handler of its own.
    """
    requested = threading.Event()

    def terminate(*_: object) -> None:
        requested.set()

    def interrupt(*_: object) -> None:
        report("Ctrl-C: saving at the end of this step; once more to stop at once, without saving")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    shared = jax.distributed.is_initialized()
    handlers = {signal.SIGINT: interrupt} | ({} if shared else {signal.SIGTERM: terminate})
    # Python allows handlers in the main thread alone.
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
