"""What the command adds around `train()`: the watchdog and signals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pixart_jax.config import WatchdogConfig
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.preemption import stop_requests
from pixart_jax.training.watchdog import Watchdog


@contextlib.contextmanager
def supervised(cluster: Cluster, config: WatchdogConfig) -> Iterator[None]:
    """Within this context, the processes watch each other and stop on signals. At its end they disconnect.

    Args:
      cluster: processes of the run.
      config: time-outs of the watchdog.
    """
    try:
        with Watchdog(cluster, config), stop_requests(cluster):
            yield
    finally:
        cluster.close()
