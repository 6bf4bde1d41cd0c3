import errno
import signal

import pytest

from pixart_jax.config import WatchdogConfig
from pixart_jax.errors import EXIT_STORAGE, RunStopped
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.supervision import supervised


class Watched(Cluster):
    closed = False

    def close(self):
        self.closed = True
        super().close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_run_directory_that_cannot_be_written_ends_with_its_own_status(number):
    cluster = Watched()
    with (
        pytest.raises(RunStopped, match="run directory runs/x cannot be written") as stopped,
        supervised(cluster, WatchdogConfig(), "runs/x"),
    ):
        raise OSError(number, "no")
    assert stopped.value.status == EXIT_STORAGE and cluster.closed


def test_other_errors_pass_and_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGTERM)
    cluster = Watched()
    with pytest.raises(FileNotFoundError), supervised(cluster, WatchdogConfig(), "runs/x"):
        assert signal.getsignal(signal.SIGTERM) is not before  # a request to stop
        raise FileNotFoundError(errno.ENOENT, "a file of the user")
    assert cluster.closed and signal.getsignal(signal.SIGTERM) is before
