"""Compares real processes on this machine, connected by gloo, with one process that is never interrupted."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from digits_runs import log_of, losses, make_features, start, stop, tiny_config, wait_for_step
from kill_library import MISSING, compiled, variables

from pixart_jax.config import CheckpointConfig, InitConfig, LogConfig, MeshConfig, WatchdogConfig
from pixart_jax.errors import EXIT_PREEMPTED, EXIT_UNAVAILABLE, EXIT_USAGE, RunStopped, UserError
from pixart_jax.train import train
from pixart_jax.training import sharding
from pixart_jax.training.distributed import Cluster, _announced, batch_part, connect

STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Stage 2 of the digits after a stage 1. Its batches can be divided among 3 and among 8 devices."""
    folder = tmp_path_factory.mktemp("digits")
    make_features(folder / "features", "stage2")
    train(tiny_config(folder / "features", "stage1", steps=1), folder / "stage1")
    base = tiny_config(
        folder / "features",
        "stage2",
        steps=STEPS,
        init=InitConfig(method="reparameterize", path=str(folder / "stage1")),
        checkpoint=CheckpointConfig(every=2, keep=10**6),
        watchdog=WatchdogConfig(dead_seconds=10),
        log=LogConfig(every=1, validate_every=2, validation_samples=24, sample_every=0),
    )
    return dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=24))


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run directory of a single process."""
    workdir = tmp_path_factory.mktemp("alone")
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """Three processes, one of which is killed while it saves step 4.

    Gives the run directory, and the statuses and logs of the processes.
    """
    if MISSING:
        pytest.skip(MISSING)
    folder = tmp_path_factory.mktemp("killed")
    workdir = folder / "run"
    point = "fsync 1 before checkpoints/4.*/ocdbt.process_2/d/*"
    processes = start(3, "stage2", workdir, config, environment=variables(compiled(folder), workdir, point))
    try:
        statuses = [process.wait(timeout=900) for process in processes]
    finally:
        stop(processes)
    return workdir, statuses, [log_of(workdir, index).read_text() for index in range(3)]


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same(run, alone, steps, name="loss"):
    found, expected = losses(run, name), losses(alone, name)
    np.testing.assert_allclose([found[k] for k in steps], [expected[k] for k in steps], rtol=1e-5)


def test_three_processes_have_the_same_losses_as_one(killed, alone):
    same(killed[0], alone, range(1, 5))
    same(killed[0], alone, [2], "validation_loss")


def test_a_process_that_is_killed_while_saving_is_named_and_the_others_stop(killed):
    workdir, statuses, logs = killed
    assert statuses == [EXIT_UNAVAILABLE, EXIT_UNAVAILABLE, -signal.SIGKILL], logs
    for index, log in enumerate(logs[:2]):
        # Reported by the watchdog, or by the abort handler if JAX's runtime was the first to notice.
        (line,) = [line for line in log.splitlines() if line.startswith(f"[process {index} of 3] stopped:")]
        assert "process 2 (last seen at step " in line and "sent no heartbeat for " in line
        assert "Traceback" not in log.partition(line)[0]  # of the step that failed because of it
        assert (
            "Metadata file does not exist" not in log
        )  # Orbax logs it in every run; see `errors._drop_noise`
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [
        "2",
        "4.orbax-checkpoint-tmp",
    ]


def test_one_process_resumes_a_run_of_three(killed, config, alone, tmp_path):
    workdir = shutil.copytree(killed[0], tmp_path / "run")
    train(config, workdir)
    same(workdir, alone, range(1, STEPS + 1))
    assert files_in(workdir / "checkpoints") == ["2", "4", "6"]


def test_four_processes_resume_it_and_save_together_after_a_signal(killed, config, alone, tmp_path):
    """Each model is sharded over two processes, and one process gets SIGTERM."""
    workdir = shutil.copytree(killed[0], tmp_path / "run")
    many = dataclasses.replace(config, steps=10**6, mesh=MeshConfig(data=2, tensor=2))
    processes = start(4, "stage2", workdir, many)
    try:
        # The killed run may have logged steps after its checkpoint, which this one removes and repeats.
        wait_for_step(workdir, STEPS, processes)
        processes[2].terminate()
        for process in processes:
            process.wait(timeout=300)
    finally:
        stop(processes)
    assert [process.returncode for process in processes] == [EXIT_PREEMPTED] * 4, log_of(
        workdir, 0
    ).read_text()
    found = losses(workdir)
    newest = max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    assert newest == max(found)
    stopped = f"stopped: a stop was requested: step {newest} of 1000000 is saved"
    assert stopped in log_of(workdir, 2).read_text()
    same(workdir, alone, range(1, STEPS + 1))
    same(workdir, alone, [4, 6], "validation_loss")


def test_processes_with_different_configs_stop_and_name_the_difference(config, tmp_path):
    processes = start(2, "stage2", tmp_path / "run", config, last=("--config.seed=1",))
    try:
        assert [process.wait(timeout=900) for process in processes] == [EXIT_USAGE] * 2
    finally:
        stop(processes)
    log = log_of(tmp_path / "run", 0).read_text()
    assert "the processes of the run do not agree: config is " in log and "on process 1 and" in log
    assert "data is " in log and not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["node0", "node0:", ":1234", "node0:x", "node0:70000", ""])
def test_a_coordinator_has_a_host_and_a_port(address):
    with pytest.raises(UserError, match=r"^--coordinator is .*: give HOST:PORT of process 0"):
        connect(address, 2, 0, WatchdogConfig())


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"SLURM_NTASKS": "4"}, "None, None, None", "SLURM_NTASKS is 4, but JAX found no cluster to join"),
        ({}, "'localhost:1', 2, 1", "the processes did not find each other at localhost:1"),
    ],
)
def test_processes_that_cannot_connect_stop(environment, arguments, message):
    script = f"""
import functools
from pixart_jax.config import WatchdogConfig
from pixart_jax.errors import run_command
from pixart_jax.training.distributed import connect
run_command(lambda _: print(connect({arguments}, WatchdogConfig(connect_seconds=2)).count))
"""

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == EXIT_UNAVAILABLE, done.stderr
    assert not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "stopped: " in line]
    assert message in line


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"SLURM_NTASKS": "1"}, ""),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES lists several hosts"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX is set"),
    ],
)
def test_launchers_are_recognized(environment, said):
    assert _announced(environment) == said


def test_a_single_process_agrees_with_itself():
    cluster = Cluster()
    cluster.check_agreement({"config": "a"})
    assert cluster.gather("x", "value") == ["value"] and cluster.first


class Store:
    """A key-value store with the values that other processes have written."""

    def __init__(self, values):
        self.values = values

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, timeout):
        return self.values[key]


def test_differences_between_processes_are_named(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    store = Store({"gather/agreement/1": '{"jax": "0.9", "config": "a"}'})
    with pytest.raises(RunStopped, match=r"jax is 0\.9 on process 1 and 0\.10 on process 0") as stopped:
        Cluster(0, 2, store).check_agreement({"jax": "0.10", "config": "a"})
    assert stopped.value.everywhere
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(RunStopped, match="2 processes were started, but JAX found the devices of 1"):
        Cluster(0, 2, store).check_agreement({})
    with pytest.raises(RunStopped, match="did not send its 'later' within 1 seconds"):
        Cluster(0, 2, store).gather("later", "x", timeout=1)


def test_processes_that_share_a_model_read_the_same_rows(monkeypatch):
    """Fake devices of several processes, with the rows that the mesh assigns to them."""

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    def parts(rows_of_processes, batch):
        places = {Device(process): (rows,) for process, rows in rows_of_processes}
        fake = type("Sharding", (), {"devices_indices_map": lambda self, shape: places})()
        monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: fake)
        out = []
        for index in range(max(process for process, _ in rows_of_processes) + 1):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            out.append(batch_part(sharding.make_mesh(MeshConfig()), batch))
        return out

    halves = slice(0, 4), slice(4, 8)
    assert parts([(0, halves[0]), (1, halves[1])], 8) == [(0, 2), (1, 2)]
    assert parts([(0, halves[0]), (1, halves[0]), (2, halves[1]), (3, halves[1])], 8) == [
        (0, 2), (0, 2), (1, 2), (1, 2),
    ]  # fmt: skip
    # The devices of process 0 are not adjacent in the mesh.
    assert parts([(0, slice(0, 2)), (1, slice(2, 4)), (1, slice(4, 6)), (0, slice(6, 8))], 8) == [
        (0, 2), (1, 2),
    ]  # fmt: skip
    with pytest.raises(Exception, match="distributes a batch unevenly"):
        parts([(0, slice(0, 6)), (1, slice(4, 8))], 8)
