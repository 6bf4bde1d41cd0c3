"""What the command adds around `train()`: the watchdog, signals, and errors of the run directory."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from pixart_jax.config import WatchdogConfig
from pixart_jax.errors import EXIT_STORAGE, RunStopped
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.preemption import stop_requests
from pixart_jax.training.watchdog import Watchdog

# Error numbers of writing to a directory that is full, read-only or damaged.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextlib.contextmanager
def supervised(cluster: Cluster, config: WatchdogConfig, workdir: str) -> Iterator[None]:
    """Within this context, the processes watch each other and stop on signals. At its end they disconnect.

    Args:
      cluster: processes of the run.
      config: time-outs of the watchdog.
      workdir: run directory, for the message.

    Raises:
      RunStopped: if the run directory cannot be written.
    """
    try:
        with Watchdog(cluster, config), stop_requests(cluster):
            try:
                yield
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                raise RunStopped(
                    f"run directory {workdir} cannot be written ({error}): free disk space or fix the "
                    "folder, then run the same command again; it resumes from the newest checkpoint.",
                    EXIT_STORAGE,
                ) from error
    finally:
        cluster.close()
