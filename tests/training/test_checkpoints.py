import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from damage import damaged
from digits_runs import ENVIRONMENT, free_port, stop
from full_disk import largest_file
from jax.sharding import Mesh
from stage_batches import CONFIG, MODEL

from pixart_jax.config import CheckpointConfig, MeshConfig, to_dict
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import (
    EXIT_DIVERGED,
    EXIT_STORAGE,
    EXIT_UNAVAILABLE,
    OutputError,
    RunStopped,
    UserError,
)
from pixart_jax.files import sha256_of_json
from pixart_jax.training import sharding
from pixart_jax.training.checkpoints import Checkpoints, _Manager, lock_run
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import TrainState, abstract_state, merge, new_state
from pixart_jax.weights.checkpoints import (
    PATHS,
    absolute,
    checksums,
    finished_steps,
    read_back,
    read_config,
    read_weights,
    unreadable,
    write_weights,
)

OBJECTIVE = make_objective(CONFIG)


def state_on(mesh, params):
    optimizer = make_optimizer(CONFIG.optimizer, 8)
    target, shardings = abstract_state(OBJECTIVE, optimizer, mesh)
    make = jax.jit(lambda tree: new_state(tree, OBJECTIVE, optimizer), out_shardings=shardings)
    return make({NETWORK: params}), target


def one_device():
    shape = (1,) * len(sharding.MESH_AXES)
    return Mesh(np.array(jax.devices()[:1]).reshape(shape), sharding.MESH_AXES)


@pytest.fixture(scope="module")
def saved(random_params, tmp_path_factory):
    """A run directory with a checkpoint of step 0, its state on one device, and the restore target."""
    _, params = random_params(MODEL)
    state, target = state_on(one_device(), params)
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(state, {"fingerprint": "f"}, CONFIG)
    checkpoints.wait()
    checkpoints.close()
    return workdir, state, target


def at_step(state, step):
    return dataclasses.replace(state, step=jax.numpy.asarray(step, "int32"))


def restore(workdir, target, step=0):
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    try:
        return checkpoints.restore(step, target)
    finally:
        checkpoints.close()


def test_a_checkpoint_opens_on_any_mesh(random_params, tmp_path):
    _, params = random_params(MODEL)
    state, _ = state_on(sharding.make_mesh(MeshConfig(2, 4, 1)), params)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=5))
    assert checkpoints.latest_step() is None
    assert checkpoints.due(5, 7) and checkpoints.due(7, 7) and not checkpoints.due(6, 7)
    checkpoints.save(state, {"fingerprint": "f"}, CONFIG)
    checkpoints.wait()
    checkpoints.close()
    for mesh in (
        sharding.make_mesh(MeshConfig(8, 1, 1)),
        one_device(),
        sharding.make_mesh(MeshConfig(4, 1, 2)),
    ):
        _, target = state_on(mesh, params)
        again = Checkpoints(tmp_path, CheckpointConfig())
        restored, loader, config = again.restore(again.latest_step(), target)
        again.close()
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, target))
        assert loader == {"fingerprint": "f"} and config == CONFIG


def test_which_checkpoints_are_kept(saved, tmp_path):
    """The newest two, multiples of eight, and the best by validation loss."""
    _, state, _ = saved
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=2, keep=2, keep_every=8, keep_best=1))
    for step, loss in ((2, 0.9), (4, 0.1), (6, 0.8), (8, 0.7), (9, None), (10, 0.6), (12, 0.5)):
        checkpoints.save(at_step(state, step), {}, CONFIG, loss)
    checkpoints.wait()
    checkpoints.close()
    assert finished_steps(tmp_path / "checkpoints") == [4, 8, 10, 12]
    # After a restart the earlier losses are still known.
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=2, keep=1, keep_every=8, keep_best=1))
    checkpoints.save(at_step(state, 14), {}, CONFIG, 0.4)
    checkpoints.wait()
    checkpoints.close()
    assert finished_steps(tmp_path / "checkpoints") == [4, 8, 14]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_what_a_killed_run_has_left_is_removed(saved, tmp_path):
    """Half of an old checkpoint that was being removed, of a new one, and of a text file."""
    _, state, _ = saved
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(at_step(state, 2), {}, CONFIG)
    checkpoints.close()
    for name in ("removed.orbax-checkpoint-tmp/1/ema", "3.orbax-checkpoint-tmp/ema"):
        shutil.copytree(tmp_path / "checkpoints/2/ema", tmp_path / "checkpoints" / name)
    killed = "from pathlib import Path; from pixart_jax import files; import os, sys\n"
    killed += "with files.temporary(Path(sys.argv[1])): os._exit(1)"
    subprocess.run([sys.executable, "-c", killed, tmp_path], check=False)
    assert len(list(tmp_path.glob(".pixart-*.tmp"))) == 1
    with contextlib.ExitStack() as stack:
        lock_run(absolute(tmp_path), Cluster(), stack)
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        assert checkpoints.latest_step() == 2
        checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "lock"]
    end = time.monotonic() + 60  # Orbax removes checkpoints in a thread
    while len(left := list((tmp_path / "checkpoints").iterdir())) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert [path.name for path in left] == ["2"]


@pytest.mark.parametrize("part", ["trained", "ema"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_parameters_that_are_not_finite_are_not_saved(saved, tmp_path, part, value):
    state = copy.deepcopy(at_step(saved[1], 7))
    bias = getattr(state, part)
    bias = (bias["ema"] if part == "ema" else bias)[NETWORK]["final_layer"]["linear"]
    bias["bias"] = bias["bias"].at[1].set(value)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(
        RunStopped, match=r"network.final_layer.linear.bias .* at step 7: .*is not saved"
    ) as stop:
        checkpoints.save(state, {}, CONFIG)
    checkpoints.close()
    assert stop.value.status == EXIT_DIVERGED and finished_steps(absolute(tmp_path)) == []


def test_a_run_that_diverges_finishes_its_checkpoint(saved, tmp_path, monkeypatch):
    finalize = _Manager._finalize

    def slow(*args):
        time.sleep(0.5)
        finalize(*args)

    stop = RunStopped("diverged", EXIT_DIVERGED, everywhere=True)
    with pytest.raises(RunStopped), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(at_step(saved[1], 1), {}, CONFIG)
        monkeypatch.setattr(_Manager, "_finalize", slow)
        checkpoints.save(at_step(saved[1], 2), {}, CONFIG)
        raise stop
    assert finished_steps(absolute(tmp_path) / "checkpoints") == [1, 2]


@pytest.mark.parametrize(
    ("error", "processes", "waits"),
    [
        (RunStopped("", EXIT_DIVERGED, everywhere=True), 2, True),
        (RunStopped("", EXIT_STORAGE), 2, False),  # it would wait for the others forever
        (RunStopped("", EXIT_STORAGE), 1, True),
        (UserError(""), 1, True),
        (KeyboardInterrupt(), 1, False),
    ],
)
def test_what_waits_for_a_checkpoint(tmp_path, monkeypatch, error, processes, waits):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.close()
    closed = []
    monkeypatch.setattr(checkpoints, "close", lambda: closed.append(1))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(type(error)), checkpoints:
        raise error
    assert closed == [1] * waits


def test_the_newest_checkpoint_is_that_of_the_largest_step(saved, tmp_path):
    _, state, _ = saved
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    for step in (1, 2):
        checkpoints.save(at_step(state, step), {}, CONFIG)
    checkpoints.wait()
    checkpoints.close()
    os.utime(tmp_path / "checkpoints/2", (0, 0))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.latest_step() == 2
    checkpoints.close()


def flip_bits(file, places, rng):
    content = bytearray(file.read_bytes())
    for place in places(len(content)):
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


# The files of an item hold the list of arrays, their locations and the data.
@pytest.mark.parametrize("item", ["trained", "optimizer"])
def test_a_flipped_bit_is_detected(saved, tmp_path, item):
    workdir, state, target = saved
    rng = random.Random(item)
    files = sorted(path for path in (workdir / "checkpoints/0" / item).rglob("*") if path.is_file())
    for file in rng.sample(files, 4):
        copy = tmp_path / file.name
        shutil.copytree(workdir, copy)
        flip_bits(copy / file.relative_to(workdir), lambda size: [rng.randrange(size)], rng)
        try:
            restored, _, _ = restore(copy, target)
        except UserError as error:
            assert "exists but cannot be read" in str(error) and "\n" not in str(error)
        else:
            # This byte has no effect. For example, it is in a timestamp or in data that is never read.
            jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("item", ["trained", "frozen", "ema", "optimizer"])
def test_damaged_arrays_raise(saved, tmp_path, item):
    workdir, _, target = saved
    shutil.copytree(workdir, tmp_path / "run")
    data = [path for path in (tmp_path / "run/checkpoints/0" / item).rglob("d/*") if path.is_file()]
    assert data
    for file in data:
        flip_bits(file, lambda size: range(0, size, 64), random.Random(0))
    with pytest.raises(UserError, match="exists but cannot be read") as raised:
        restore(tmp_path / "run", target)
    assert f"0/{item}" in str(raised.value) or "'network'" in str(raised.value)


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "optimizer/_METADATA", "ema/manifest.ocdbt"])
def test_a_pipe_in_a_checkpoint_does_not_block(saved, tmp_path, file):
    workdir, _, target = saved
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run/checkpoints/0" / file).unlink()
    os.mkfifo(tmp_path / "run/checkpoints/0" / file)
    for read in (lambda: restore(tmp_path / "run", target), lambda: read_weights(tmp_path / "run")):
        with pytest.raises(UserError, match=f"cannot be read \\({file} is not a regular file"):
            read()


def test_files_that_cannot_be_opened_are_not_called_damaged(saved, tmp_path, monkeypatch):
    workdir, _, target = saved
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run/checkpoints/0/trained/manifest.ocdbt").write_bytes(b"")  # as Orbax sees it

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pixart_jax.weights.checkpoints.open_regular", refused)
    with pytest.raises(UserError, match=r"Permission denied: '.*/trained/.*intact: fix the cause"):
        restore(tmp_path / "run", target)


@pytest.mark.parametrize("file", ["metadata/metadata", "loader/metadata"])
def test_an_edited_manifest_raises(saved, tmp_path, file):
    workdir, _, target = saved
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run/checkpoints/0" / file
    path.write_text(path.read_text().replace('"f"', '"g"').replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="exists but cannot be read"):
        restore(tmp_path / "run", target)


def test_metadata_of_other_types(saved, tmp_path):
    folder = absolute(tmp_path / "checkpoints/0")
    file = folder / "metadata/metadata"
    file.parent.mkdir(parents=True)
    written = json.loads((saved[0] / "checkpoints/0/metadata/metadata").read_text())
    del written["sha256"], written["versions"]
    for part in ("optimizer", "ema"):
        written["checksums"].pop(part, None)
    count = 0
    for place, changed in itertools.islice(damaged(written), 0, None, 7):
        file.write_text(json.dumps({**changed, "sha256": sha256_of_json(changed)}))
        try:
            read_config(folder)
        except UserError as error:
            assert "\n" not in str(error), place
            count += 1
    assert count > 100
    for text in (b"[]", b"[" * 100_000, b"\xff", b'{"sha256": 1, "sha256": 1}'):
        file.write_bytes(text)
        with pytest.raises(UserError, match=r"metadata/metadata exists but cannot be read \(.*\): remove"):
            read_config(folder)


@pytest.mark.parametrize("change", [{"clip_norm": 0.0}, {"name": "muon"}])
def test_a_checkpoint_of_another_optimizer_is_not_called_damaged(saved, change):
    optimizer = make_optimizer(dataclasses.replace(CONFIG.optimizer, **change), 8, OBJECTIVE)
    target, _ = abstract_state(OBJECTIVE, optimizer, one_device())
    with pytest.raises(UserError, match=r"is of another optimizer: .* Use the optimizer\.name and") as raised:
        restore(saved[0], target)
    assert "emove" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_checkpoint_with_other_items_is_not_called_damaged(saved):
    target = dataclasses.replace(saved[2], frozen={})
    with pytest.raises(UserError, match="is of another model: it holds ema, frozen, optimizer, trained"):
        restore(saved[0], target)


def caused_by(cause: Exception) -> Exception:
    """What Orbax raises if TensorStore raises `cause`."""
    error = Exception("Encountered error while reading array index: (slice(0, 2, 1),). See full details: …")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        MemoryError(),
        TimeoutError("no answer"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3 bytes"),
        ValueError("UNAVAILABLE: the server is down"),
        caused_by(ValueError('PERMISSION_DENIED: Error reading "a/0.0"')),
    ],
)
def test_only_damaged_files_are_to_be_removed(error):
    assert "emove" not in str(unreadable("run/checkpoints/3", error))
    assert "remove that step" in str(unreadable("run/checkpoints/3", ValueError("bad checksum")))


def test_checksums_depend_on_the_order_and_not_on_the_mesh():
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    whole = checksums({"a": jax.numpy.asarray(values)})
    mesh = sharding.make_mesh(MeshConfig(8, 1, 1))
    spread = jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert checksums({"a": spread}) == whole
    assert checksums({"a": jax.numpy.asarray(values.T)}) != whole
    assert list(whole) == ["['a']"]


def test_a_full_disk_costs_one_checkpoint(saved, tmp_path):
    """A limit on the file size simulates a full disk: the run stops with one line, and the next resumes."""
    _, state, target = saved
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(at_step(state, 1), {}, CONFIG)
    checkpoints.wait()
    with (
        largest_file(10_000),
        pytest.raises(RunStopped, match=r"could not be written to .* it resumes from step 1\.") as stopped,
    ):
        checkpoints.save(at_step(state, 2), {}, CONFIG)
        checkpoints.wait()
    assert stopped.value.status == EXIT_STORAGE and "\n" not in str(stopped.value)
    # A real process would end here together with its threads; wait until they have finished.
    with contextlib.suppress(Exception):
        checkpoints.close()
    before = None
    while (now := sorted(str(path) for path in tmp_path.rglob("*"))) != before:
        before = now
        time.sleep(0.5)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.latest_step() == 1
    checkpoints.restore(1, target)
    checkpoints.save(at_step(state, 2), {}, CONFIG)
    checkpoints.wait()
    checkpoints.close()
    assert finished_steps(tmp_path / "checkpoints") == [1, 2]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


TOGETHER = """
import os, sys, time
import jax, numpy as np
from pixart_jax.config import CheckpointConfig, MeshConfig, TrainConfig, WatchdogConfig
from pixart_jax.errors import run_command
from pixart_jax.training.checkpoints import Checkpoints
from pixart_jax.training.distributed import connect
from pixart_jax.training.sharding import make_mesh, replicated
from pixart_jax.training.state import TrainState
from pixart_jax.training.watchdog import Watchdog

port, index, workdir, case = sys.argv[1:]
del sys.argv[1:]

def main(_):
    watch = WatchdogConfig(dead_seconds=4)
    with Watchdog(connect(f"localhost:{port}", 2, int(index), watch), watch):
        everywhere = replicated(make_mesh(MeshConfig()))
        def state(step):
            weights = {"w": np.zeros(4, np.float32)}
            held = TrainState(np.int32(step), weights, {}, {"ema": weights}, weights, np.float32(0))
            one = lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda part: x[part])
            return jax.tree.map(one, held)
        checkpoints = Checkpoints(workdir, CheckpointConfig())
        checkpoints.save(state(1), {}, TrainConfig())
        checkpoints.wait()
        if case == "storage":  # Orbax raises it in a thread, after waiting for the others for minutes
            if index == "0":
                raise checkpoints._unwritten(OSError("No space left on device"))
            time.sleep(60)
        if index == "1":
            os._exit(0)
        if case == "restore":
            abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
            checkpoints.restore(1, jax.tree.map(abstract, state(1)))
        else:
            checkpoints.save(state(2), {}, TrainConfig())

run_command(main)
"""


@pytest.mark.parametrize("case", ["save", "restore", "storage"])
def test_a_dead_process_is_distinguished_from_failing_storage(case, tmp_path):
    """JAX raises a `ValueError` if another process has died, and Orbax raises one if a file is damaged."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(port), str(index), str(tmp_path), case],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        for index in range(2)
    ]
    try:
        logs = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        stop(processes)
    said = [[line for line in log.splitlines() if line.startswith("[process ")] for log in logs]
    (line,) = said[0]
    if case == "storage":
        assert [process.returncode for process in processes] == [EXIT_STORAGE, EXIT_UNAVAILABLE], logs
        assert line.startswith("[process 0 of 2] error: a checkpoint could not be written to ")
        assert said[1][0].startswith(
            "[process 1 of 2] stopped: process 0 stopped: error: a checkpoint could not"
        )
    else:
        assert processes[0].returncode == EXIT_UNAVAILABLE, logs
        assert line.startswith("[process 0 of 2] stopped: process 1 (last seen at step 0) sent no heartbeat")


def test_an_unwritable_run_directory_raises_at_the_start(tmp_path):
    with pytest.raises(OutputError, match="'/proc/self/run/checkpoints' cannot be written"):
        Checkpoints("/proc/self/run", CheckpointConfig())
    with contextlib.ExitStack() as stack, pytest.raises(OutputError, match="/proc/self/run/lock' cannot be"):
        lock_run(absolute("/proc/self/run"), Cluster(), stack)
    (tmp_path / "checkpoints").touch()
    with pytest.raises(OutputError, match=r"checkpoints' cannot be written .*: a file is where a folder"):
        Checkpoints(tmp_path, CheckpointConfig())


@pytest.mark.parametrize("name", ["real[1]", "a*b", "a?b", "[x]/run", r"a\b"])
def test_names_that_orbax_takes_as_patterns_are_rejected(random_params, tmp_path, name):
    """Orbax would find no files to merge in `real[1]`, and those of other folders in `a*b`."""
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=r"cannot be written to .*pattern"):
        lock_run(tmp_path / name, Cluster(), stack)
    with pytest.raises(UserError, match=r"cannot be written to .*pattern"):
        write_weights(tmp_path / name, random_params(MODEL)[1], CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_first_checkpoint_that_cannot_be_read_stops_the_run(saved, random_params, tmp_path, monkeypatch):
    """The folder's name makes Orbax lose the arrays without an error."""
    _, state, _ = saved
    checkpoints = Checkpoints(tmp_path / "real[1]", CheckpointConfig())
    with pytest.raises(RunStopped, match=r"cannot be read back.*choose another --workdir") as stopped:
        checkpoints.save(state, {}, CONFIG)
    assert stopped.value.status == EXIT_STORAGE and "\n" not in str(stopped.value)
    checkpoints.close()
    monkeypatch.setattr("pixart_jax.weights.checkpoints.check_name", lambda path: None)
    with pytest.raises(RunStopped, match=r"weights written to .* cannot be read back"):
        write_weights(tmp_path / "w[1]" / "w", random_params(MODEL)[1], CONFIG)
    assert not list((tmp_path / "w[1]").iterdir())


def test_reading_back_compares_every_array(tmp_path, monkeypatch):
    # Every array is read alone.
    monkeypatch.setattr("pixart_jax.weights.checkpoints.READ_BACK_BYTES", 1)
    weights = {"a": jax.numpy.arange(3.0), "b": {"c": jax.numpy.ones((2, 2))}}
    optimizer = make_optimizer(CONFIG.optimizer, 8).init(weights)
    state = TrainState(jax.numpy.int32(7), weights, {}, {"ema": weights}, optimizer, jax.numpy.float32(0))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state, {}, CONFIG)
    checkpoints.close()
    folder = absolute(tmp_path / "checkpoints/7")
    numbers = {"step": state.step, "loss_average": state.loss_average}
    items = {"trained": weights, "optimizer": {"state": optimizer, **numbers}}
    read_back(folder, items)
    file = folder / "metadata/metadata"
    written = json.loads(file.read_text())
    del written["sha256"]
    for name in items:
        for array in written["checksums"][name]:
            changed = copy.deepcopy(written)
            changed["checksums"][name][array] += 1
            file.write_text(json.dumps({**changed, "sha256": sha256_of_json(changed)}))
            with pytest.raises(UserError, match=re.escape(f"array {array} differs")):
                read_back(folder, items)


def test_a_run_directory_is_used_by_one_run(tmp_path, capsys):
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        lock_run(tmp_path / "run", Cluster(), first)
        name = f"process {os.getpid()} on host {socket.gethostname()}"
        with pytest.raises(UserError, match=re.escape(f"is used by another run ({name}): wait until")):
            lock_run(tmp_path / "run", Cluster(), second)
        # The first process of a run locks the directory for all.
        lock_run(tmp_path / "run", Cluster(1, 2), second)
        first.close()
        lock_run(tmp_path / "run", Cluster(), second)
        lock_run(absolute("gs://bucket/run"), Cluster(), second)
    assert "gs://bucket/run cannot be locked, as it is in a bucket" in capsys.readouterr().out


def test_bucket_paths_are_kept_unchanged():
    assert str(absolute("gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"
    assert absolute("runs/one").is_absolute()


def test_paths_that_orbax_cannot_open_are_not_called_damaged():
    for use in (absolute, read_weights, lambda path: Checkpoints(path, CheckpointConfig())):
        with pytest.raises(UserError, match=r"checkpoint is '.*', which is not UTF-8: rename the folder"):
            use("runs/a\udcff")


def test_relative_paths_are_those_of_the_run(random_params, tmp_path, monkeypatch):
    """A checkpoint is used from another working directory, and with the whole project at another place."""
    project = tmp_path / "project"
    for name in ("weights/vae", "weights/t5", "features/a", "features/b", "random"):
        (project / name).mkdir(parents=True)
    (tmp_path / "elsewhere/weights/vae").mkdir(parents=True)  # must not be taken for that of the run
    (tmp_path / "disk").mkdir()
    (project / "runs").symlink_to(tmp_path / "disk")
    text = dataclasses.replace(CONFIG.features.text_encoder, weights="weights/t5", tokenizer="org/name")
    config = dataclasses.replace(
        CONFIG,
        features=dataclasses.replace(CONFIG.features, vae="weights/vae", text_encoder=text),
        data=dataclasses.replace(CONFIG.data, train="features/a,features/b", validation="features/gone"),
    )
    params = random_params(MODEL)[1]
    monkeypatch.chdir(project)
    write_weights("runs/one", params, config)
    text = dataclasses.replace(text, weights="random")
    features = dataclasses.replace(config.features, text_encoder=text)
    write_weights("two", params, dataclasses.replace(config, features=features))
    monkeypatch.chdir(tmp_path / "elsewhere")
    for workdir in (project / "runs/one", "../disk/one", "../disk/one/checkpoints/0"):
        found = read_weights(workdir)[1]
        assert found.features.vae == str(project / "weights/vae")
        assert found.features.text_encoder.weights == str(project / "weights/t5")
        assert found.features.text_encoder.tokenizer == "org/name"
        assert found.data.train == f"{project / 'features/a'},{project / 'features/b'}"
        assert found.data.validation == "features/gone"
        assert found.compile.cache == found.init.path == ""
    project.rename(tmp_path / "moved")
    found = read_weights(tmp_path / "moved/two")[1]
    assert found.features.vae == str(tmp_path / "moved/weights/vae")
    assert found.features.text_encoder.weights == "random"


def test_the_paths_of_a_config_exist():
    for name in PATHS:
        assert isinstance(functools.reduce(dict.__getitem__, name.split("."), to_dict(CONFIG)), str)


def test_weights_can_be_saved_without_an_optimizer(random_params, tmp_path):
    _, params = random_params(MODEL)
    write_weights(tmp_path / "weights", params, CONFIG)
    found, config = read_weights(tmp_path / "weights")
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert config == CONFIG
    with pytest.raises(UserError, match="exists"):
        write_weights(tmp_path / "weights", params, CONFIG)
    with pytest.raises(UserError, match="holds no 'raw' weights: use --weights=ema"):
        read_weights(tmp_path / "weights", "raw")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    (item,) = (tmp_path / "weights").glob("**/ema")
    item.rename(item.with_name("trained"))
    with pytest.raises(UserError, match="holds no 'ema' weights: use --weights=raw"):
        read_weights(tmp_path / "weights")


def test_an_average_cannot_take_the_name_of_another_item(random_params, tmp_path):
    objective = OBJECTIVE._replace(averages={"ema": 0.9, "optimizer": 0.5})
    params = {NETWORK: random_params(MODEL)[1]}
    state = new_state(params, objective, make_optimizer(CONFIG.optimizer, 8))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(ValueError, match="cannot be called 'optimizer'"):
        checkpoints.save(state, {}, CONFIG)
    checkpoints.close()


def test_weights_are_read_without_the_other_networks(random_params, tmp_path):
    """Sampling needs only one network of a run, with the average and the frozen parameters."""
    params = {NETWORK: random_params(MODEL)[1], "helper": {"w": jax.numpy.arange(4.0)}}
    objective = OBJECTIVE._replace(is_trained=lambda path: OBJECTIVE.is_trained(path) and path[-1] != "bias")
    state = new_state(params, objective, make_optimizer(CONFIG.optimizer, 8))
    average = jax.tree.map(lambda leaf: leaf + 1, state.trained)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(dataclasses.replace(state, ema={"ema": average}), {}, CONFIG)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path, "raw")[0], params[NETWORK])
    expected = merge(average, state.frozen)[NETWORK]
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path)[0], expected)


def test_absent_and_damaged_checkpoints_raise_different_errors(random_params, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        read_weights(tmp_path / "nothing")
    _, params = random_params(MODEL)
    write_weights(tmp_path / "weights", params, CONFIG)
    (tmp_path / "weights/checkpoints/0/metadata/metadata").write_text("{")
    with pytest.raises(UserError, match="exists but cannot be read"):
        read_weights(tmp_path / "weights")
