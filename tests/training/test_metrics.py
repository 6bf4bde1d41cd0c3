import json

import numpy as np
import pytest
from full_disk import largest_file

from pixart_jax.errors import OutputError, UserError
from pixart_jax.training import metrics
from pixart_jax.training.metrics import MetricWriter


@pytest.mark.parametrize("bucket", [False, True])
def test_a_resumed_run_writes_no_step_twice(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(metrics, "is_bucket", lambda path: bucket)
    writer = MetricWriter(tmp_path, first_step=0, total_steps=4, active=True)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
        writer.progress(step, {"loss": 0.5})
    writer.image(3, "samples", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    # The run was killed after step 3 while it wrote a line; its newest checkpoint is that of step 2.
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "lo')
    writer = MetricWriter(tmp_path, first_step=2, total_steps=4, active=True)
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
            MetricWriter(run, first_step=0, total_steps=4, active=True)
    writer = MetricWriter(tmp_path, first_step=0, total_steps=4, active=True)
    writer.write(1, {"loss": 1.0})
    writer.sync()
    long = {f"metric_{number}": 1.0 for number in range(100)}
    with largest_file(300), pytest.raises(OutputError, match=r"metrics.jsonl' cannot be written .File too"):
        writer.write(2, long)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    with largest_file(300), pytest.raises(OutputError, match=r"tensorboard' cannot be written .File too"):
        writer.image(2, "samples", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        writer.sync()


def test_only_the_first_process_writes(tmp_path):
    writer = MetricWriter(tmp_path, first_step=0, total_steps=1, active=False)
    writer.write(1, {"loss": 1.0})
    writer.progress(1, {})
    writer.image(1, "x", np.zeros((1, 1, 3), np.uint8))
    writer.close()
    assert not list(tmp_path.iterdir())
