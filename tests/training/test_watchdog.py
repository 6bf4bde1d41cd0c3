import signal
import subprocess
import sys

import pytest
from digits_runs import free_port

from pixart_jax.config import WatchdogConfig
from pixart_jax.errors import EXIT_UNAVAILABLE
from pixart_jax.training.watchdog import Sign, verdict

CONFIG = WatchdogConfig(dead_seconds=30, hang_seconds=600)


def sign(text="1 1 7 step", now=0.0):
    out = Sign(-1, -1, 0, "start", 0.0, 0.0)
    out.update(text, now)
    return out


def test_a_slow_process_with_heartbeats_is_alive():
    signs = {0: sign(), 1: sign()}
    assert not verdict(signs, 29, CONFIG)
    for now in range(2, 590, 2):
        for one in signs.values():
            one.update(f"{now} 1 7 step", now)
        assert not verdict(signs, now, CONFIG)


def test_a_process_without_heartbeats_is_named():
    signs = {i: sign() for i in range(3)}
    for i in (0, 2):
        signs[i].update("2 1 7 step", 20.0)
    line = verdict(signs, 31.0, CONFIG)
    assert line == "process 1 (last seen at step 7) sent no heartbeat for 30 seconds"


@pytest.mark.parametrize(
    ("places", "named"),
    [
        # All others wait in the step that the hanging process has not begun.
        ({0: (8, "step"), 1: (7, "data"), 2: (8, "step")}, "process 1 (in 'data' of step 7) made"),
        ({0: (8, "step"), 1: (8, "checkpoint")}, "process 1 (in 'checkpoint' of step 8) made"),
        (
            {0: (8, "step"), 1: (8, "step")},
            "process 0 (in 'step' of step 8), process 1 (in 'step' of step 8)",
        ),
    ],
)
def test_the_process_that_the_others_wait_for_is_named(places, named):
    signs = {i: sign(f"1 5 {step} {phase}") for i, (step, phase) in places.items()}
    for now in (300.0, 590.0, 601.0):
        for i, (step, phase) in places.items():
            signs[i].update(f"{now:.0f} 5 {step} {phase}", now)
        assert (verdict(signs, now, CONFIG) != "") == (now > 600)
    assert named in verdict(signs, 601.0, CONFIG)
    # As long as any process makes progress, the run does not hang.
    signs[0].update("602 6 9 step", 602.0)
    assert not verdict(signs, 603.0, CONFIG)


def test_a_single_process_that_hangs_prints_its_stack():
    script = """
import time
from pixart_jax.config import WatchdogConfig
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.watchdog import Watchdog

cluster = Cluster()
with Watchdog(cluster, WatchdogConfig(dead_seconds=4, hang_seconds=1)):
    cluster.progress(3, "data")
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_UNAVAILABLE
    assert "stopped: process 0 (in 'data' of step 3) made no progress for 1 seconds" in done.stderr
    assert 'File "<string>", line 10' in done.stderr


@pytest.mark.parametrize(
    ("number", "seconds", "said"),
    [(signal.SIGKILL, 20, "died or does not respond"), (signal.SIGSTOP, 4, "does not respond")],
)
def test_the_death_of_the_coordinator_is_reported(number, seconds, said):
    """Process 0 hosts the key-value store. If it dies, JAX's runtime ends the others with abort(). If it
    hangs, the store takes requests but does not answer them.
    """
    port = free_port()
    script = f"""
import sys, time
from pixart_jax.config import WatchdogConfig
from pixart_jax.training.distributed import connect
from pixart_jax.training.watchdog import Watchdog

config = WatchdogConfig(dead_seconds={seconds})
with Watchdog(connect("localhost:{port}", 2, int(sys.argv[1]), config), config):
    print("ready", flush=True)
    time.sleep(300)
"""
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", script, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    )
    try:
        assert [process.stdout.readline() for process in (first, second)] == ["ready\n"] * 2
        first.send_signal(number)
        _, log = second.communicate(timeout=60)
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert second.returncode == EXIT_UNAVAILABLE
    (line,) = [line for line in log.splitlines() if line.startswith("[process 1 of 2] stopped:")]
    assert f"process 0 (the coordinator, localhost:{port}) {said}; run the same command again" in line
