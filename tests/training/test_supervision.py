import errno
import signal

import pytest

from pixart_jax.config import WatchdogConfig
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.supervision import supervised


class Watched(Cluster):
    closed = False

    def close(self):
        self.closed = True
        super().close()


def test_errors_pass_and_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGTERM)
    cluster = Watched()
    with pytest.raises(FileNotFoundError), supervised(cluster, WatchdogConfig()):
        assert signal.getsignal(signal.SIGTERM) is not before  # a request to stop
        raise FileNotFoundError(errno.ENOENT, "a file of the user")
    assert cluster.closed and signal.getsignal(signal.SIGTERM) is before
