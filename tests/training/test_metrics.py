import json

import numpy as np
import pytest

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


def test_only_the_first_process_writes(tmp_path):
    writer = MetricWriter(tmp_path, first_step=0, total_steps=1, active=False)
    writer.write(1, {"loss": 1.0})
    writer.progress(1, {})
    writer.image(1, "x", np.zeros((1, 1, 3), np.uint8))
    writer.close()
    assert not list(tmp_path.iterdir())
