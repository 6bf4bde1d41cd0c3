import os
import signal
import time

import pytest

from pixart_jax.training.distributed import Cluster
from pixart_jax.training.preemption import stop_requests


def arrives(cluster):
    end = time.monotonic() + 10
    while not cluster.stop_requested(1) and time.monotonic() < end:
        time.sleep(0.01)
    return cluster.stop_requested(1)


def test_sigterm_requests_a_stop():
    before = signal.getsignal(signal.SIGTERM)
    cluster = Cluster()
    with stop_requests(cluster):
        assert not cluster.stop_requested(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert arrives(cluster)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_interrupt_raises_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)
    cluster = Cluster()
    with stop_requests(cluster), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert arrives(cluster)
        assert "press it again to stop at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert signal.getsignal(signal.SIGINT) is before
