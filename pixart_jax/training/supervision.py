"""What runs around `train()` when it is a command: watchdog, signals, and a run directory that fails."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from pixart_jax.config import WatchdogConfig
from pixart_jax.errors import EXIT_STORAGE, RunStopped
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.preemption import stop_requests
from pixart_jax.training.watchdog import Watchdog

# Error numbers of writing to a folder that is full, read-only or damaged.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextlib.contextmanager
def supervised(cluster: Cluster, config: WatchdogConfig, workdir: str) -> Iterator[None]:
    """Within this context the processes of a run watch each other and stop on signals; then they disconnect.

    Raises:
      RunStopped: the run directory cannot be written; or as `Watchdog`.
    """
    try:
        with Watchdog(cluster, config), stop_requests(cluster):
            try:
                yield
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                raise RunStopped(
                    f"run directory {workdir} cannot be written ({error}): make room or mend the folder and "
                    "start the same command again; it continues from the newest checkpoint.",
                    EXIT_STORAGE,
                ) from error
    finally:
        cluster.close()
