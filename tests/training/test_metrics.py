import json
import types

import jax
import numpy as np
import pytest
from full_disk import largest_file

from pixart_jax.config import TrainConfig
from pixart_jax.errors import OutputError, UserError
from pixart_jax.training import metrics
from pixart_jax.training.metrics import MetricWriter, check_trackers, device_memory
from pixart_jax.training.trackers import TensorBoard

RUN = TrainConfig(name="digits/stage2", steps=4)


@pytest.mark.parametrize("bucket", [False, True])
def test_a_resumed_run_writes_no_step_twice(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(metrics, "is_bucket", lambda path: bucket)
    writer = MetricWriter(tmp_path, RUN, first_step=0, active=True)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    writer.image(3, "samples", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    # The run was killed after step 3 while it wrote a line; its newest checkpoint is that of step 2.
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "lo')
    writer = MetricWriter(tmp_path, RUN, first_step=2, active=True)
    writer.write(3, {"loss": 9.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]


def test_outputs_that_cannot_be_written(tmp_path):
    """The line of a step that does not fit is removed again."""
    for name in ("metrics.jsonl", "tensorboard"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        if name == "tensorboard":
            (run / name).write_text("a file")
        else:
            (run / name).mkdir()
        with pytest.raises(UserError if name == "metrics.jsonl" else OutputError, match=f"{run / name}'"):
            MetricWriter(run, RUN, first_step=0, active=True)
    writer = MetricWriter(tmp_path, RUN, first_step=0, active=True)
    writer.write(1, {"loss": 1.0})
    writer.sync()
    long = {f"metric_{number}": 1.0 for number in range(100)}
    with largest_file(300), pytest.raises(OutputError, match=r"metrics.jsonl' cannot be written .File too"):
        writer.write(2, long)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    with largest_file(300), pytest.raises(OutputError, match=r"tensorboard' cannot be written .File too"):
        writer.image(2, "samples", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        writer.sync()


def test_the_first_error_is_the_one_to_report(tmp_path, monkeypatch):
    def close(tracker):
        raise OutputError("tensorboard", OSError("full"))

    monkeypatch.setattr(TensorBoard, "close", close)
    with pytest.raises(RuntimeError, match="first"), MetricWriter(tmp_path, RUN, first_step=0, active=True):
        raise RuntimeError("first")
    with pytest.raises(OutputError, match="full"), MetricWriter(tmp_path, RUN, first_step=0, active=True):
        pass


def test_only_the_first_process_writes(tmp_path):
    writer = MetricWriter(tmp_path, RUN, first_step=0, active=False)
    writer.write(1, {"loss": 1.0})
    writer.image(1, "x", np.zeros((1, 1, 3), np.uint8))
    writer.close()
    assert not list(tmp_path.iterdir())


def test_the_progress_bar_shows_what_the_file_has(tmp_path, capsys):
    writer = MetricWriter(tmp_path, RUN, first_step=0, active=True)
    values = {
        "loss": 0.25, "mse": 0.5, "gradient_norm": 0.0123456, "learning_rate": 2e-5,
        "images_per_second": 80.0, "memory_gib": 31.25, "memory_peak_gib": 40.0, "seconds_left": 3723.4,
        "validation_loss": 0.3,
    }  # fmt: skip
    writer.write(2, values)
    writer.close()
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 2, **values}
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "50%" in shown and "2/4" in shown
    assert "loss=0.25, val=0.3, grad=0.01235, lr=2e-05, img/s=80, GiB=31.25, left=1:02:03]" in shown


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    assert device_memory() == {}  # CPUs do not report it
    stats = [{"bytes_in_use": use << 30, "peak_bytes_in_use": 7 << 29, "num_allocs": 1} for use in (2, 3)]
    devices = [types.SimpleNamespace(memory_stats=lambda each=each: each) for each in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert device_memory() == {"memory_gib": 3.0, "memory_peak_gib": 3.5}


def test_trackers_must_be_installed(tmp_path, monkeypatch):
    check_trackers(["tensorboard"])
    # A folder that wandb makes for its runs in the working directory is not the package.
    (tmp_path / "no_service").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^log.tracker names 'no_service', which is not installed: run `pip"):
        check_trackers(["tensorboard", "no_service"])
