import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pixart_jax.errors import EXIT_INTERRUPTED
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.preemption import stop_requests


def arrives(condition):
    end = time.monotonic() + 10
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_sigterm_requests_a_stop():
    before = signal.getsignal(signal.SIGTERM)
    cluster = Cluster()
    with stop_requests(cluster):
        assert not cluster.stop_requested(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert arrives(lambda: cluster.stop_requested(1))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def interruptible():
    """The shell in which the tests run may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requests(Cluster()):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_second_interrupt_raises_at_once(interruptible, capsys):
    before = signal.getsignal(signal.SIGINT)
    cluster = Cluster()
    with stop_requests(cluster), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert arrives(lambda: cluster.stop_requested(1))
        assert arrives(lambda: "press it again to stop at once" in capsys.readouterr().err)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_may_arrive_while_another_is_handled():
    """A handler that takes a lock would wait for itself forever."""
    program = """
import os, subprocess, sys
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.preemption import stop_requests

cluster = Cluster()
with stop_requests(cluster):
    send = f"import os\\nfor _ in range(50_000): os.kill({os.getpid()}, 15)"
    sender = subprocess.Popen([sys.executable, "-c", send])
    while sender.poll() is None:
        cluster.stop_requested(1)
assert cluster.stop_requested(1)
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_interrupts_are_noticed_while_the_main_thread_compiles():
    """Its handlers cannot run then. A mutex that it waits for in C stands for the compilation."""
    program = """
import ctypes, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from pixart_jax.training import preemption
from pixart_jax.training.distributed import Cluster

preemption._GRACE = 0.1
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with preemption.stop_requests(Cluster()):
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        limit = threading.Timer(60, process.kill)
        limit.start()
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline().startswith("Ctrl-C: saving at the end of this step")
            process.send_signal(signal.SIGINT)
            assert process.wait() == EXIT_INTERRUPTED
            assert process.stderr.read() == "interrupted: the same command continues\n"
        finally:
            limit.cancel()
            process.kill()
